"""Time of a merge submitted as a job against the same merge on this machine: whole commands, warm, interleaved.

``python -m tests.benchmarks.submitted [--gb 0.4 --tuned 2 --rounds 5]``. The cluster is up before: a head and a node
per worker, all on this machine, with one CPU each. Between the two stands ``stockflow merge --executor ray`` on that
cluster, so that what Ray's workers take is told apart from what the job takes.
"""

import argparse
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.cases import STOCKFLOW, Case, add_case_options, case_from, recipe_of, workplace, write_recipe
from tests.benchmarks.processes import run, warm
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record, spread
from tests.ray_nodes import Cluster, cluster


class SubmitBench:
    """One case, and a cluster for it."""

    def __init__(self, case: Case, folder: Path, work: Path, ray: Cluster) -> None:
        """Write the recipe."""
        self._folders = case.folders(folder)
        self._output = work / "output"
        self._recipe = write_recipe(work / "recipe.yaml", recipe_of(case, [str(path) for path in self._folders]))
        self._options = ("--memory", case.memory, "--workers", str(case.threads), "--device", case.device)
        self._ray = ray

    def here(self) -> Facts:
        """Merge in one process, on as many threads as there are workers."""
        return self._timed("merge", "--executor", "local", "--quiet")

    def on_ray(self) -> Facts:
        """Merge on the cluster; this command is the driver."""
        return self._timed("merge", "--executor", "ray", "--quiet", RAY_ADDRESS=f"127.0.0.1:{self._ray.gcs_port}")

    def submitted(self) -> Facts:
        """Submit, and follow the job to its end."""
        return self._timed("submit", "--address", self._ray.url)

    def _timed(self, command: str, *options: str, **environment: str) -> Facts:
        warm(self._folders)
        words = [*STOCKFLOW, command, str(self._recipe), str(self._output), *self._options, *options]
        finished = run(words, environment=environment)
        shutil.rmtree(self._output)
        return {"s": finished.seconds, "machine_cpu_s": finished.cpu_seconds + finished.others_cpu_seconds}


def main() -> None:
    """Make inputs, start the cluster, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser, gb=0.4, tuned=2)
    add_run_options(parser, "submitted")
    arguments = parser.parse_args()
    case = case_from(arguments)
    with workplace([case], arguments.folder, keep=arguments.keep) as work, cluster(os.environ) as ray:
        ray.start_head()
        for _ in range(case.threads):
            ray.add_node()
        os.environ |= ray.client_environment
        bench = SubmitBench(case, arguments.folder, work, ray)
        measures = {"here": bench.here, "on Ray": bench.on_ray, "submitted": bench.submitted}
        runs = interleaved(measures, arguments.rounds)
    found = {name: medians(these) for name, these in runs.items()}
    rows = [
        (
            name,
            spread(these, "s"),
            f"{found[name]['s'] - found['here']['s']:+.2f}",
            f"{found[name]['machine_cpu_s']:.1f}",
        )
        for name, these in runs.items()
    ]
    print_table(f"{case.label}: medians (smallest-largest)", ("", "whole command, s", "over here, s", "CPU s"), rows)
    record(arguments, {"case": asdict(case), "medians": found, "runs": runs})


if __name__ == "__main__":
    main()
