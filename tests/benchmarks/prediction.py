"""How well ``stockflow plan`` predicts: ``make bench-prediction``.

Constants are measured first, by ``stockflow calibrate``, and stay as they are. Then every case is planned and
merged once per round, interleaved: three sizes from disk to disk, and three from an S3 server to itself (moto, a
process on the same cores, or Ceph's gateway where it is installed). Printed are the seconds of the whole process,
predicted and measured.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import boto3

from tests.benchmarks.cases import (
    STOCKFLOW,
    Case,
    add_case_options,
    case_from,
    planned,
    recipe_of,
    workplace,
    write_recipe,
)
from tests.benchmarks.processes import run, warm
from tests.benchmarks.report import add_run_options, medians, print_table, record
from tests.benchmarks.s3_merge import BUCKET
from tests.benchmarks.s3_merge import remove as remove_objects
from tests.ceph_server import ceph_gateway, missing_binaries
from tests.s3_server import CREDENTIALS, FORBIDDEN, moto_server

GOAL = 0.25


@dataclass
class Place:
    """One case at one storage."""

    name: str
    case: Case
    recipe: Path
    output: str
    endpoint: str | None
    inputs: Sequence[Path]

    @property
    def options(self) -> list[str]:
        """What plan and merge are told beside recipe and output."""
        return [*self.case.options, "--executor", "local"]

    def predict(self, calibration: Path) -> dict[str, Any]:
        """Return what ``stockflow plan`` says."""
        warm(self.inputs)
        return planned(self.recipe, self.output, [*self.options, "--calibration", str(calibration)])

    def merge(self) -> dict[str, float]:
        """Return what a merge took."""
        finished = run([*STOCKFLOW, "merge", str(self.recipe), self.output, *self.options])
        summary = json.loads(finished.stdout)["summary"]
        if self.endpoint:
            remove_objects(self.output, self.endpoint)
        else:
            shutil.rmtree(self.output)
            os.sync()
        stages = {name: value for name, value in summary.items() if name.startswith("seconds_")}
        return {
            "s": finished.seconds,
            "cpu_s": finished.cpu_seconds,
            "others_cpu_s": finished.others_cpu_seconds,
        } | stages


def main() -> None:
    """Calibrate, predict and merge, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser, gb=0.8)
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.2, 0.8, 2.0], help="GB per checkpoint, on disk")
    parser.add_argument(
        "--s3-sizes", type=float, nargs="*", default=[0.03, 0.06, 0.13], help="GB per checkpoint, on S3"
    )
    parser.add_argument("--s3-tuned", type=int, default=2)
    parser.add_argument("--server", choices=("moto", "ceph"), default="moto")
    parser.add_argument("--calibration", type=Path, help="constants measured earlier, instead of measuring them now")
    add_run_options(parser, "prediction")
    arguments = parser.parse_args()
    if arguments.server == "ceph" and (missing := missing_binaries()):
        parser.error(f"no {', '.join(missing)}")
    for name in FORBIDDEN:
        os.environ.pop(name, None)
    os.environ |= CREDENTIALS
    case = case_from(arguments)
    local = [replace(case, gb=gb) for gb in arguments.sizes]
    remote = [replace(case, gb=gb, tuned=arguments.s3_tuned, memory="2GiB") for gb in arguments.s3_sizes]
    with workplace([*local, *remote], arguments.folder, keep=arguments.keep) as work, ExitStack() as stack:
        places = [_on_disk(each, arguments.folder, work) for each in local]
        endpoint = None
        if remote:
            server = moto_server() if arguments.server == "moto" else ceph_gateway(memory_bytes=8 << 30)
            endpoint = stack.enter_context(server)
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
            places += [_on_s3(each, arguments, work, endpoint) for each in remote]
        calibration = arguments.calibration or _calibrate(arguments.folder, work / "calibration.json", endpoint)
        found: dict[str, list[tuple[dict[str, Any], dict[str, float]]]] = {place.name: [] for place in places}
        for _ in range(arguments.rounds):
            for place in places:
                predicted = place.predict(calibration)
                measured = place.merge()
                found[place.name].append((predicted, measured))
                seconds = predicted["forecast"]["seconds"]
                print(f"{place.name}: predicted {seconds:.2f} s, measured {measured['s']:.2f} s", file=sys.stderr)
        constants = json.loads(calibration.read_text())
    rows, facts = [], []
    for place in places:
        predicted = found[place.name][-1][0]["forecast"]
        measured = medians([facts for _, facts in found[place.name]])
        spread = sorted(facts["s"] for _, facts in found[place.name])
        predictions = [each["forecast"]["seconds"] for each, _ in found[place.name]]
        error = statistics.median(predictions) / measured["s"] - 1
        rows.append(
            (
                place.name,
                f"{statistics.median(predictions):.2f}",
                f"{measured['s']:.2f} ({spread[0]:.2f}-{spread[-1]:.2f})",
                f"{error:+.0%}" + ("" if abs(error) <= GOAL else " beyond the goal"),
                predicted["bottleneck"],
            )
        )
        facts.append(
            {
                "place": place.name,
                "case": asdict(place.case),
                "predicted_s": predictions,
                "error": error,
                "phases": predicted["phases"],
                "stages": predicted["stages"],
                "bottleneck": predicted["bottleneck"],
                "measured": measured,
                "measured_s": spread,
            }
        )
    columns = ("", "predicted s", "measured s (smallest-largest)", "error", "bottleneck")
    print_table(f"stockflow plan against stockflow merge, {arguments.rounds} rounds", columns, rows)
    record(arguments, {"server": arguments.server, "calibration": constants, "cases": facts})


def _calibrate(folder: Path, path: Path, endpoint: str | None) -> Path:
    url = ["--url", f"s3://{BUCKET}"] if endpoint else []
    subprocess.run([*STOCKFLOW, "calibrate", "--folder", str(folder), "--out", str(path), *url], check=True)
    return path


def _on_disk(case: Case, root: Path, work: Path) -> Place:
    folders = case.folders(root)
    recipe = write_recipe(work / f"disk-{case.gb:g}.yaml", recipe_of(case, [str(path) for path in folders]))
    name = f"disk, 1 + {case.tuned} x {case.gb:g} GB"
    return Place(name, case, recipe, str(work / f"output-{case.gb:g}"), None, folders)


def _on_s3(case: Case, arguments: argparse.Namespace, work: Path, endpoint: str) -> Place:
    folders = case.folders(arguments.folder)
    prefix = case.family.folder(arguments.folder).name
    for folder in folders:
        _upload(folder, f"{prefix}/{folder.name}", endpoint)
    locations = [f"s3://{BUCKET}/{prefix}/{folder.name}" for folder in folders]
    recipe = write_recipe(work / f"s3-{case.gb:g}.yaml", recipe_of(case, locations))
    name = f"{arguments.server}, 1 + {case.tuned} x {case.gb:g} GB"
    return Place(name, case, recipe, f"s3://{BUCKET}/output-{case.gb:g}", endpoint, folders)


def _upload(folder: Path, key: str, endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"{key}/{path.name}")


if __name__ == "__main__":
    main()
