"""Time and memory of local merges against the I/O floor: ``make bench ARGS='--gb 0.8 --tuned 4 --method ties'``.

Every case and yardstick once per round, interleaved, each in a process of its own; medians. What each is:
docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import (
    STOCKFLOW,
    Case,
    add_case_options,
    add_sweep_options,
    planned,
    recipe_of,
    sweep_from,
    told_apart,
    workplace,
    write_recipe,
)
from tests.benchmarks.processes import MIB, run, warm
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record, spread


def main() -> None:
    """Make the inputs, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser)
    add_sweep_options(parser)
    add_run_options(parser, "local")
    arguments = parser.parse_args()
    try:
        cases = sweep_from(arguments)
    except ValueError as error:
        parser.error(str(error))
    with workplace(cases, arguments.folder, keep=arguments.keep) as work:
        benches = [LocalBench(case, arguments.folder, work / str(number)) for number, case in enumerate(cases)]
        for bench in benches:
            bench.measure_memory()
        measures: dict[tuple[str, str], Callable[[], Facts]] = {}
        for bench in benches:
            measures[bench.case.label, "floor"] = bench.floor
            measures[bench.case.label, "merge"] = bench.merge
        small = {("start-up", name): partial(timed, command) for name, command in benches[0].small_commands().items()}
        runs = interleaved(measures | small, arguments.rounds)
    found = [result(bench, runs[bench.case.label, "floor"], runs[bench.case.label, "merge"]) for bench in benches]
    show(found)
    starts = {name: runs["start-up", name] for _, name in small}
    print_table("start-up", ("command", "s"), [(name, spread(these, "s")) for name, these in starts.items()])
    record(arguments, {"cases": found, "start_up": {name: medians(these) for name, these in starts.items()}})


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
        self._output = work / "output"
        self.recipe = write_recipe(work / "recipe.yaml", recipe_of(case, [str(path) for path in self.folders]))
        self.plan = planned(self.recipe, case, self._output)
        self.memory: Facts = {}

    def floor(self) -> Facts:
        """Measure the floor once, with all inputs in the page cache."""
        warm(self.folders)
        sizes = [str(shard["bytes"]) for shard in self.plan["shards"]]
        inputs = [str(path) for path in self.folders]
        command = [sys.executable, "-m", "tests.benchmarks.floor", str(self._output)]
        finished = run([*command, "--inputs", *inputs, "--sizes", *sizes])
        remove(self._output)
        found: Facts = json.loads(finished.stdout)
        return found | {"disk_read_mb": finished.disk_read_mb}

    def merge(self) -> Facts:
        """Measure one merge."""
        finished = run(self.case.command(self.recipe, self._output))
        remove(self._output)
        report: dict[str, Any] = json.loads(finished.stdout)
        summary: Facts = report["summary"]
        return {
            "s": finished.seconds,
            "merge_s": report["seconds"],
            "shards_s": summary["seconds_total"],
            "cpu_s": finished.cpu_seconds,
            "peak_rss_mib": finished.peak_rss_mib,
            "peak_receipts_mib": summary["peak_memory_bytes"] / MIB,
            "disk_read_mb": finished.disk_read_mb,
            **{name: value for name, value in summary.items() if name.startswith("seconds_")},
        }

    def measure_memory(self) -> None:
        """Sample the memory of one merge that is not timed; it also brings programs and inputs into the page cache."""
        warm(self.folders)
        finished = run(self.case.command(self.recipe, self._output), sampled=True)
        remove(self._output)
        assert finished.peak_pss_mib is not None
        assert finished.peak_anonymous_mib is not None
        self.memory = {
            "peak_pss_mib": finished.peak_pss_mib,
            "peak_anonymous_mib": finished.peak_anonymous_mib,
            "projected_mib": self.plan["projected_memory_bytes"] / MIB,
        }

    def small_commands(self) -> dict[str, list[str]]:
        """Return the commands whose start-up users wait for, and what they are measured against."""
        plan = [*STOCKFLOW, "plan", str(self.recipe), str(self._output)]
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


def result(bench: LocalBench, floors: list[Facts], merges: list[Facts]) -> dict[str, Any]:
    """Return medians, ratios and all runs of a case."""
    floor, merge = medians(floors), medians(merges)
    return {
        "case": asdict(bench.case),
        "tensors": bench.plan["tensors"],
        "shards": len(bench.plan["shards"]),
        "source_bytes": bench.plan["source_bytes"],
        "floor": floor,
        "merge": merge,
        "memory": bench.memory,
        "ratios": {
            "shards_to_floor": merge["shards_s"] / floor["s"],
            "merge_to_floor": merge["merge_s"] / floor["s"],
            "process_to_floor": merge["s"] / floor["s"],
            "shards_ns_per_input_byte": 1e9 * merge["shards_s"] / bench.plan["source_bytes"],
            "pss_to_projected": bench.memory["peak_pss_mib"] / bench.memory["projected_mib"],
        },
        "runs": {"floor": floors, "merge": merges},
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print the cases side by side."""

    def row(words: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (words, *(value(case) for case in found))

    def seconds(words: str, yardstick: str, name: str = "s") -> tuple[str, ...]:
        return row(words, lambda case: spread(case["runs"][yardstick], name))

    def number(words: str, group: str, name: str, form: str) -> tuple[str, ...]:
        return row(words, lambda case: format(case[group][name], form))

    def nanoseconds(case: dict[str, Any]) -> float:
        return float(case["ratios"]["shards_ns_per_input_byte"])

    rows = [
        row("input, GB; tensors", lambda case: f"{case['source_bytes'] / 1e9:.2f}; {case['tensors']:,}"),
        seconds("floor, s", "floor"),
        row(
            "  read + hash + write, s",
            lambda case: " + ".join(f"{case['floor'][name]:.2f}" for name in ("read_s", "hash_s", "write_s")),
        ),
        seconds("whole process, s", "merge"),
        seconds("  merge by its own clock, s", "merge", "merge_s"),
        seconds("  shards alone, s", "merge", "shards_s"),
        number("shards alone : floor", "ratios", "shards_to_floor", ".2f"),
        number("merge by its own clock : floor", "ratios", "merge_to_floor", ".2f"),
        number("whole process : floor", "ratios", "process_to_floor", ".2f"),
        number("shards alone, ns per input byte", "ratios", "shards_ns_per_input_byte", ".3f"),
        row("  : that of the first case", lambda case: f"{nanoseconds(case) / nanoseconds(found[0]):.2f}"),
        row("CPU of floor; of process, s", lambda case: f"{case['floor']['cpu_s']:.2f}; {case['merge']['cpu_s']:.2f}"),
        number("peak memory projected, MiB", "memory", "projected_mib", ".0f"),
        number("  PSS of the process tree, MiB", "memory", "peak_pss_mib", ".0f"),
        number("  VmHWM by the receipts, MiB", "merge", "peak_receipts_mib", ".0f"),
        number("PSS : projected", "ratios", "pss_to_projected", ".2f"),
        row(
            "read from disk by floor; by process, MB",
            lambda case: f"{case['floor']['disk_read_mb']:.0f}; {case['merge']['disk_read_mb']:.0f}",
        ),
    ]
    common, own = told_apart([Case(**case["case"]) for case in found])
    print_table(f"{common}: medians (smallest-largest)", ("", *own), rows)


if __name__ == "__main__":
    main()
