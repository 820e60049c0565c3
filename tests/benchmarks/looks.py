"""What the looks at inputs add to ``stockflow plan`` of 92,000 names of nine checkpoints, on disk and on S3 (moto).

Plans with and without them take turns, each in a process of its own that leaves its imports out: values and samples
that are read of tensors, all remarks on configs, files, names and values, and comparing tokenizers. Requests are those
that a proxy in front of the store saw. ``--tokenizers equal`` gives each model the same ``tokenizer.json`` of 129,280
tokens, ``differ`` one token more to each::

    python -m tests.benchmarks.looks /tmp/looks --rounds 5 --tokenizers equal
"""

import argparse
import json
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

from tests.benchmarks.preloaded import NEEDED, NEEDED_ON_OBJECT_STORAGE, clocked, load
from tests.benchmarks.processes import run
from tests.s3_server import CREDENTIALS, FaultyProxy, moto_server, s3_credentials
from tests.scale.test_planning import NUM_CHECKPOINTS, files_of_a_checkpoint, of_model, recipe_over

NUM_TOKENS = 129_280
BUCKET = "looks"
WITH, WITHOUT = "with", "without"


def main() -> None:
    """Write the models, time rounds on both stores, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizers", choices=("none", "equal", "differ"), default="equal")
    parser.add_argument("--plan", choices=(WITH, WITHOUT), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(timed_plan(arguments.folder, with_looks=arguments.plan == WITH)))
        return
    shutil.rmtree(arguments.folder, ignore_errors=True)
    models = {str(number): files_of(number, arguments.tokenizers) for number in range(NUM_CHECKPOINTS)}
    report("disk", [one_round(on_disk(arguments.folder, models)) for _ in range(arguments.rounds)])
    with s3_credentials(), on_s3(arguments.folder, models) as (recipe, proxy):
        report("S3", [one_round(recipe, proxy) for _ in range(arguments.rounds)])


def files_of(number: int, tokenizers: str) -> Mapping[str, bytes]:
    """Return the files of one of the models."""
    files = files_of_a_checkpoint()
    files = {name: of_model(number, content) if "-of-" in name else content for name, content in files.items()}
    if tokenizers != "none":
        num_tokens = NUM_TOKENS + (number if tokenizers == "differ" else 0)
        vocabulary = {f"token-{token}": token for token in range(num_tokens)}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        files["tokenizer.json"] = json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()
    return files


def on_disk(folder: Path, models: Mapping[str, Mapping[str, bytes]]) -> Path:
    """Write the models once; return a recipe over them."""
    recipe = folder / "disk.yaml"
    if not recipe.exists():
        for model, files in models.items():
            (folder / model).mkdir(parents=True)
            for name, content in files.items():
                (folder / model / name).write_bytes(content)
        recipe_over([str(folder / model) for model in models], recipe)
    return recipe


@contextmanager
def on_s3(folder: Path, models: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[Path, FaultyProxy]]:
    """Put the models into a bucket; give a recipe over them and the proxy through which it reaches them."""
    with moto_server() as url, FaultyProxy(url) as proxy:
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket=BUCKET)
        for model, files in models.items():
            for name, content in files.items():
                client.put_object(Bucket=BUCKET, Key=f"{model}/{name}", Body=content)
        recipe = recipe_over([f"s3://{BUCKET}/{model}" for model in models], folder / "s3.yaml")
        storage = {"storage": {f"s3://{BUCKET}/": {"endpoint": proxy.url}}}
        recipe.write_text(f"{recipe.read_text()}stockflow: {json.dumps(storage)}\n")
        yield recipe, proxy


def one_round(recipe: Path, proxy: FaultyProxy | None = None) -> dict[str, dict[str, Any]]:
    """Plan once without the looks and once with them."""
    found = {}
    for kind in (WITHOUT, WITH):
        before = len(proxy.steps) if proxy else 0
        command = [sys.executable, "-m", "tests.benchmarks.looks", str(recipe), "--plan", kind]
        found[kind] = json.loads(run(command, environment=CREDENTIALS if proxy else {}).stdout.splitlines()[-1])
        found[kind]["requests"] = Counter(proxy.steps[before:]) if proxy else Counter()
    return found


def timed_plan(recipe: Path, *, with_looks: bool) -> dict[str, Any]:
    """Plan in this process, imports left out."""
    load(NEEDED + NEEDED_ON_OBJECT_STORAGE)
    from stockflow.cli import app

    if not with_looks:
        take_looks_away()
    output = f"s3://{BUCKET}/out" if recipe.stem == "s3" else str(recipe.parent / "out")
    return clocked(lambda: {"exit_code": app(["plan", str(recipe), output, "--memory", "4GiB"], standalone_mode=False)})


def take_looks_away() -> None:
    """Read no values, samples or tokenizers, and remark on nothing."""
    from stockflow.checkpoints import opening
    from stockflow.checkpoints.values import NOTHING_READ
    from stockflow.planning import make
    from stockflow.run import driver, inputs

    opening.read_values = lambda *_: NOTHING_READ  # type: ignore[assignment]
    driver.take_samples = lambda *_: ()  # type: ignore[assignment]
    inputs.read_tokenizers = lambda *_, **__: ()  # type: ignore[assignment]
    make.remarks_on = lambda _: ()  # type: ignore[assignment]


def report(store: str, rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Print medians of both, and of what one has more in the same round."""
    for clock in ("s", "cpu_s"):
        values = {kind: [each[kind][clock] for each in rounds] for kind in (WITHOUT, WITH)}
        more = [with_them - without for without, with_them in zip(*values.values(), strict=True)]
        shares = [extra / without for extra, without in zip(more, values[WITHOUT], strict=True)]
        medians = {kind: f"{statistics.median(value):.2f}" for kind, value in values.items()}
        print(
            f"{store}, {clock}: {medians[WITHOUT]} without, {medians[WITH]} with; {statistics.median(more):+.2f} "
            f"({statistics.median(shares):+.1%}; {min(shares):+.1%} to {max(shares):+.1%})"
        )
    for kind in (WITHOUT, WITH):
        if rounds[0][kind]["requests"]:
            print(f"{store}, requests {kind}: {dict(rounds[0][kind]['requests'])}")


if __name__ == "__main__":
    main()
