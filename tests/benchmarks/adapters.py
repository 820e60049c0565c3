"""Model Stock of three adapters against that of the checkpoints they make: ``make bench-adapters ARGS='--gb 0.4'``.

Both from the page cache, and from Ceph's gateway through a proxy that caps the rate, once per round, interleaved. The
base is synthetic, every linear weight has factors of F32, and the checkpoints are what stockflow makes of base and
adapter. Prints, keeps no line; what decides: docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import numpy as np
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import stockflow
from tests.benchmarks.cases import STOCKFLOW
from tests.benchmarks.processes import MIB, run, warm
from tests.benchmarks.report import Facts, interleaved, medians, print_table, spread
from tests.benchmarks.scale_out import proxies
from tests.ceph_server import PACKAGES, ceph_gateway, missing_binaries
from tests.s3_server import CREDENTIALS, FORBIDDEN

BUCKET = "bench"
KINDS = ("adapters", "checkpoints")
NUM_TUNED = 3
MEMORY = "2GiB"
Key = tuple[str, str]
"""place, kind"""


def main() -> None:
    """Make base, adapters and checkpoints, run the rounds and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.6, help="of the base; four times as much disk and memory")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rate", type=float, default=100e6, help="bytes a second between the gateway and all workers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for inputs and outputs")
    arguments = parser.parse_args()
    if missing := missing_binaries():
        parser.error(f"no {', '.join(missing)}; apt-get install --no-install-recommends {PACKAGES}")
    for name in FORBIDDEN:
        os.environ.pop(name, None)
    os.environ |= CREDENTIALS
    with TemporaryDirectory(dir=arguments.folder) as folder:
        models = Path(folder) / BUCKET
        write_models(models, arguments.gb, arguments.rank)
        with stores(models, arguments.rate) as found:
            measures = {
                (place, kind): partial(measure, root, storage, kind, Path(folder))
                for place, (root, storage) in found.items()
                for kind in KINDS
            }
            warm([models])
            show(interleaved(measures, arguments.rounds))


def write_models(folder: Path, gb: float, rank: int) -> None:
    """Write a base, three adapters and what each makes of it."""
    words = ["--layout", "dense", "--gb", str(gb), "--dtype", "bfloat16", "--seed", "0", "--tuned", "0"]
    subprocess.run([sys.executable, "-m", "tests.benchmarks.synthetic", str(folder), *words], check=True)
    files = [safe_open(path, "numpy") for path in sorted((folder / "base").glob("*.safetensors"))]
    names = [(file, name) for file in files for name in file.keys() if "_proj." in name]  # noqa: SIM118
    shapes = [(name.removesuffix(".weight"), file.get_slice(name).get_shape()) for file, name in names]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    for number in range(NUM_TUNED):
        random, place = np.random.default_rng(number), folder / f"lora{number}"
        place.mkdir()
        tensors = dict[str, np.ndarray]()
        for module, (rows, columns) in shapes:
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                drawn = 0.01 * random.standard_normal(shape, np.float32)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = drawn
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))
        model = {"model": f"{folder}/base+{place}"}
        stockflow.merge({"merge_method": "passthrough", "models": [model]}, folder / f"full{number}")


@contextmanager
def stores(models: Path, rate: float) -> Iterator[dict[str, tuple[str, dict[str, object]]]]:
    """Serve the models; give places by name, each with its storage options."""
    files = [path for path in models.rglob("*") if path.is_file() and "_stockflow" not in path.parts]
    memory = 2 * sum(path.stat().st_size for path in files) + (2 << 30)
    with ceph_gateway(memory_bytes=memory) as gateway, proxies(gateway, 1, rate) as (port,):
        client = boto3.client("s3", endpoint_url=gateway)
        client.create_bucket(Bucket=BUCKET)
        for path in files:
            client.upload_file(str(path), BUCKET, str(path.relative_to(models)))
        root = f"s3://{BUCKET}"
        s3 = {"storage": {root: {"endpoint": f"http://127.0.0.1:{port}"}}}
        yield {"page cache": (str(models), {}), f"S3 at {rate / 1e6:g} MB/s": (root, s3)}


def measure(root: str, storage: dict[str, object], kind: str, work: Path) -> Facts:
    """Merge once, to the disk."""
    base = f"{root}/base"
    named = {"adapters": f"{base}+{root}/lora{{}}", "checkpoints": f"{root}/full{{}}"}[kind]
    models = [{"model": named.format(number)} for number in range(NUM_TUNED)]
    recipe = {"merge_method": "model_stock", "base_model": base, "models": models, "stockflow": storage}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--memory", MEMORY, "--workers", "2", "--quiet", "--json"]
    with TemporaryDirectory(dir=work) as out:
        finished = run([*STOCKFLOW, "merge", str(work / "recipe.yaml"), f"{out}/out", *options])
    summary = json.loads(finished.stdout)["summary"]
    return {
        "s": finished.seconds,
        "cpu_s": finished.cpu_seconds,
        "others_cpu_s": finished.others_cpu_seconds,
        "gb_read": summary["bytes_read"] / 1e9,
        "peak_mib": summary["peak_memory_bytes"] / MIB,
    }


def show(runs: dict[Key, list[Facts]]) -> None:
    """Print medians, and of each place the ratio of its two."""
    found: dict[Key, Facts] = {key: medians(these) for key, these in runs.items()}
    names = ("cpu_s", "others_cpu_s", "gb_read", "peak_mib")
    rows: list[Sequence[str]] = [
        (*key, spread(these, "s"), *(f"{found[key][name]:.2f}" for name in names)) for key, these in runs.items()
    ]
    print_table("Model Stock of three", ("place", "of", "s", "CPU s", "others' CPU s", "GB read", "MiB"), rows, words=2)
    for place in dict.fromkeys(place for place, _ in runs):
        ours, theirs = (found[place, kind] for kind in KINDS)
        print(
            f"{place}: {ours['s'] / theirs['s']:.2f} of the time, "
            f"{ours['gb_read'] / theirs['gb_read']:.2f} of the bytes"
        )


if __name__ == "__main__":
    main()
