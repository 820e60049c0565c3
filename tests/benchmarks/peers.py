"""The same merge by stockflow and by mergekit: ``make bench-peers``, or ``make bench-peers ARGS='--gb 0.1'``.

mergekit runs in a virtual environment of its own, made at the first use. All tools see warm inputs and run once per
round, interleaved; whole processes are measured, as users start them. Details: docs/benchmarks.md.
"""

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.benchmarks.cases import Case, add_case_options, case_from, recipe_of, workplace, write_recipe
from tests.benchmarks.local import LocalBench, timed
from tests.benchmarks.processes import Finished, run, warm
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record, spread

MERGEKIT_VERSION = "0.1.5"
ENVIRONMENT = Path(__file__).parents[2] / ".bench" / f"mergekit-{MERGEKIT_VERSION}"
REQUIREMENTS = ("torch==2.13.0", f"mergekit=={MERGEKIT_VERSION}")
DTYPES = {
    "mergekit bfloat16": {"dtype": "bfloat16"},
    "mergekit float32": {"dtype": "float32", "out_dtype": "bfloat16"},
}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Make environment and inputs, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser)
    add_run_options(parser, "peers")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="mergekit's virtual environment")
    parser.add_argument("--mergekit-flags", default="--lazy-unpickle", help="options of mergekit-yaml")
    arguments = parser.parse_args()
    case = case_from(arguments)
    if (case.layout, case.dtype) != ("dense", "bfloat16"):
        parser.error("mergekit merges what it has an architecture for: --layout dense --dtype bfloat16")
    program = installed(arguments.environment)
    with workplace([case], arguments.folder, keep=arguments.keep) as work:
        bench = LocalBench(case, arguments.folder, work)
        bench.measure_memory()
        peers = {
            name: Peer([str(program), *shlex.split(arguments.mergekit_flags)], bench, dtypes, work / f"{name}.yaml")
            for name, dtypes in DTYPES.items()
        }
        memory = {"stockflow": bench.memory} | {name: peer.measure_memory() for name, peer in peers.items()}
        measures = {"floor": bench.floor, "stockflow": bench.merge}
        measures |= {name: peer.merge for name, peer in peers.items()}
        measures["mergekit --help"] = partial(timed, [str(program), "--help"])
        runs = interleaved(measures, arguments.rounds)
    show(case, runs, memory)
    found = {name: medians(these) for name, these in runs.items()}
    record(
        arguments,
        {
            "case": asdict(case),
            "mergekit": mergekit_versions(program),
            "medians": found,
            "memory": memory,
            "ratios": {name: found[name]["s"] / found["stockflow"]["s"] for name in peers},
            "runs": runs,
        },
    )


def installed(environment: Path) -> Path:
    """Return ``mergekit-yaml``, installed into an environment of its own if it is not there."""
    program = environment / "bin" / "mergekit-yaml"
    if not program.exists():
        print(f"installing {' '.join(REQUIREMENTS)} into {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(environment / "bin" / "pip"), "install", "--quiet", *REQUIREMENTS], check=True)
    return program.absolute()


def mergekit_versions(program: Path) -> dict[str, str]:
    """Return the versions of mergekit and of what it computes with."""
    code = "from importlib.metadata import version; print(*(version(name) for name in {names!r}))"
    names = ("mergekit", "torch", "safetensors", "transformers")
    finished = run([str(program.with_name("python")), "-c", code.format(names=names)])
    return dict(zip(names, finished.stdout.split(), strict=True))


class Peer:
    """mergekit with one choice of dtypes."""

    def __init__(self, command: list[str], bench: LocalBench, dtypes: dict[str, str], recipe: Path) -> None:
        """Write the configuration: the recipe of the case, and in which dtypes to compute and write."""
        self._folders = bench.folders
        self._output = recipe.with_suffix(".output")
        write_recipe(recipe, recipe_of(bench.case, [str(path) for path in self._folders]) | dtypes)
        program, *flags = command
        self._command = [program, str(recipe), str(self._output), *flags]

    def merge(self) -> Facts:
        """Measure one merge; ``sync_s`` is what flushing its output to the disk takes afterwards, as it does not."""
        finished, sync_s = self._run(sampled=False)
        return {
            "s": finished.seconds,
            "cpu_s": finished.cpu_seconds,
            "others_cpu_s": finished.others_cpu_seconds,
            "sync_s": sync_s,
            "peak_rss_mib": finished.peak_rss_mib,
            "disk_read_mb": finished.disk_read_mb,
        }

    def measure_memory(self) -> Facts:
        """Sample the memory of one merge that is not timed."""
        finished, _ = self._run(sampled=True)
        assert finished.peak_pss_mib is not None
        assert finished.peak_anonymous_mib is not None
        return {"peak_pss_mib": finished.peak_pss_mib, "peak_anonymous_mib": finished.peak_anonymous_mib}

    def _run(self, *, sampled: bool) -> tuple[Finished, float]:
        warm(self._folders)
        finished = run(self._command, sampled=sampled, environment=OFFLINE)
        if not any(self._output.glob("*.safetensors")):
            raise SystemExit(f"{self._command[0]} ended well and wrote no weights to {self._output}")
        started = time.perf_counter()
        os.sync()
        sync_s = time.perf_counter() - started
        shutil.rmtree(self._output)
        os.sync()
        return finished, sync_s


def show(case: Case, runs: dict[str, list[Facts]], memory: dict[str, Facts]) -> None:
    """Print one row per tool."""
    ours = statistics.median(run["s"] for run in runs["stockflow"])
    rows = []
    for name, these in runs.items():
        middle, held = medians(these), memory.get(name, {})
        rows.append(
            (
                name,
                spread(these, "s"),
                f"{middle['s'] / ours:.2f}",
                f"{middle['cpu_s']:.2f}",
                f"{middle['others_cpu_s']:.2f}" if "others_cpu_s" in middle else "",
                f"{middle['sync_s']:.2f}" if "sync_s" in middle else "",
                *(f"{held[kind]:.0f}" if held else "" for kind in ("peak_pss_mib", "peak_anonymous_mib")),
                f"{middle['peak_rss_mib']:.0f}" if "peak_rss_mib" in middle else "",
                f"{middle['disk_read_mb']:.0f}" if "disk_read_mb" in middle else "",
            )
        )
    time_columns = ("whole process, s", ": stockflow", "CPU s", "others' CPU s", "flush after, s")
    columns = ("", *time_columns, "PSS MiB", "anonymous", "RSS", "from disk, MB")
    print_table(f"{case.label}: medians (smallest-largest)", columns, rows)


if __name__ == "__main__":
    main()
