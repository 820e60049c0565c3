"""One case on the local disk: its floor, its merge, its memory; each in a process of its own."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import STOCKFLOW, Case, planned, recipe_of, write_recipe
from tests.benchmarks.processes import MIB, run, warm
from tests.benchmarks.report import Facts


class LocalBench:
    """One case on the local disk, with its floor."""

    def __init__(self, case: Case, root: Path, work: Path) -> None:
        """Write the recipe and plan.

        Args:
            case: what to merge.
            root: where checkpoints lie.
            work: a folder for this case alone.
        """
        self.case = case
        self.folders = case.folders(root)
        self.output = work / "output"
        self.recipe = write_recipe(work / "recipe.yaml", recipe_of(case, [str(path) for path in self.folders]))
        self.plan = planned(self.recipe, self.output, case.options)
        self.memory: Facts = {}
        self._words = ["merge", str(self.recipe), str(self.output), *case.options]
        self.command = [*STOCKFLOW, *self._words]

    def floor(self) -> Facts:
        """Measure the floor once, with all inputs in the page cache."""
        warm(self.folders)
        sizes = [str(shard["bytes"]) for shard in self.plan["shards"]]
        inputs = [str(path) for path in self.folders]
        command = [sys.executable, "-m", "tests.benchmarks.floor", str(self.output)]
        finished = run([*command, "--inputs", *inputs, "--sizes", *sizes])
        remove(self.output)
        found: Facts = json.loads(finished.stdout)
        return found | {"others_cpu_s": finished.others_cpu_seconds, "disk_read_mb": finished.disk_read_mb}

    def merge(self) -> Facts:
        """Measure one merge."""
        finished = run(self.command)
        remove(self.output)
        report: dict[str, Any] = json.loads(finished.stdout)
        summary: Facts = report["summary"]
        return {
            "s": finished.seconds,
            "merge_s": report["seconds"],
            "cpu_s": finished.cpu_seconds,
            "others_cpu_s": finished.others_cpu_seconds,
            "peak_rss_mib": finished.peak_rss_mib,
            "peak_receipts_mib": summary["peak_memory_bytes"] / MIB,
            "disk_read_mb": finished.disk_read_mb,
            "parameters": summary["parameters"],
            **{name: value for name, value in summary.items() if name.startswith("seconds_")},
        }

    def merge_alone(self) -> Facts:
        """Measure one merge in a process that has imported everything before."""
        finished = run([sys.executable, "-m", "tests.benchmarks.preloaded", *self._words])
        remove(self.output)
        found = json.loads(finished.stdout)
        return {
            "s": found["s"],
            "cpu_s": found["cpu_s"],
            "others_cpu_s": finished.others_cpu_seconds,
            "disk_read_mb": finished.disk_read_mb,
        }

    def measure_memory(self) -> None:
        """Sample the memory of one merge that is not timed; it also brings programs and inputs into the page cache."""
        warm(self.folders)
        finished = run(self.command, sampled=True)
        remove(self.output)
        assert finished.peak_pss_mib is not None
        assert finished.peak_anonymous_mib is not None
        self.memory = {
            "peak_pss_mib": finished.peak_pss_mib,
            "peak_anonymous_mib": finished.peak_anonymous_mib,
            "projected_mib": self.plan["projected_memory_bytes"] / MIB,
        }

    def small_commands(self) -> dict[str, list[str]]:
        """Return the commands whose start-up users wait for, and what they are measured against."""
        plan = [*STOCKFLOW, "plan", str(self.recipe), str(self.output)]
        python = [sys.executable, "-c"]
        return {
            "stockflow --help": [*STOCKFLOW, "--help"],
            "stockflow plan": plan,
            "import torch": [*python, "import torch"],
            "python": [*python, "pass"],
        }


def timed(command: list[str]) -> Facts:
    """Measure a command that writes nothing."""
    finished = run(command)
    return {"s": finished.seconds, "cpu_s": finished.cpu_seconds, "peak_rss_mib": finished.peak_rss_mib}


def remove(output: Path) -> None:
    """Remove what was written, and leave no dirty pages to whoever is measured next."""
    shutil.rmtree(output)
    os.sync()
