"""Time of ``stockflow inspect`` against ``stockflow merge`` of the same recipe: whole processes, warm, interleaved.

``python -m tests.benchmarks.inspect_merge [--gb 0.8 --tuned 4 --rounds 5]``; checkpoints and options are those of
``local_merge``. ``audit`` of what the merge wrote is measured beside them.
"""

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.cases import (
    STOCKFLOW,
    Case,
    add_case_options,
    case_from,
    recipe_of,
    workplace,
    write_recipe,
)
from tests.benchmarks.processes import run, warm
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record, spread


class InspectBench:
    """One case: its recipe, and a merge to audit."""

    def __init__(self, case: Case, folder: Path, work: Path) -> None:
        """Write the recipe."""
        self._folders = case.folders(folder)
        self._recipe = work / "recipe.yaml"
        self._output, self._audited = work / "output", work / "audited"
        write_recipe(self._recipe, recipe_of(case, [str(path) for path in self._folders]))
        self._options = case.options
        self._timed("merge", self._audited)

    def inspect(self) -> Facts:
        """Inspect, and print JSON to nobody."""
        return self._timed("inspect")

    def merge(self) -> Facts:
        """Merge; the output is removed outside of the time."""
        facts = self._timed("merge", self._output)
        shutil.rmtree(self._output)
        return facts

    def audit(self) -> Facts:
        """Audit a merge."""
        return self._timed("audit", self._audited)

    def _timed(self, command: str, *arguments: Path) -> Facts:
        warm(self._folders)
        finished = run([*STOCKFLOW, command, str(self._recipe), *map(str, arguments), *self._options])
        return {"s": finished.seconds, "cpu_s": finished.cpu_seconds, "peak_rss_mib": finished.peak_rss_mib}


def main() -> None:
    """Make inputs, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser)
    add_run_options(parser, "inspect")
    arguments = parser.parse_args()
    case = case_from(arguments)
    with workplace([case], arguments.folder, keep=arguments.keep) as work:
        bench = InspectBench(case, arguments.folder, work)
        measures = {"merge": bench.merge, "inspect": bench.inspect, "audit": bench.audit}
        runs = interleaved(measures, arguments.rounds)
    found = {name: medians(these) for name, these in runs.items()}
    rows = [
        (name, spread(these, "s"), f"{found[name]['s'] / found['merge']['s']:.2f}", f"{found[name]['cpu_s']:.2f}",
         f"{found[name]['peak_rss_mib']:.0f}")
        for name, these in runs.items()
    ]  # fmt: skip
    columns = ("", "whole process, s", ": merge", "CPU s", "RSS MiB")
    print_table(f"{case.label}: medians (smallest-largest)", columns, rows)
    record(arguments, {"case": asdict(case), "medians": found, "runs": runs})


if __name__ == "__main__":
    main()
