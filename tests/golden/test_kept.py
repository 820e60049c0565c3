"""A plan and half an output that were kept: what is built later finds the same plan in them, and goes on with them.

They are of numerics 6. Whoever moves ``NUMERICS``, or what is copied, makes them anew in the same commit
(``python -m tests.golden.test_kept``) and says which digests moved.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import boto3

from stockflow.planning import file as plan_file
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.s3_server import moto_server, s3_credentials

KEPT = Path(__file__).parent / "kept"
"""The output, less its last shard and what is published at the end."""
MISSING = "model-00002-of-00002.safetensors"
SHAPES = {"model.embed_tokens.weight": (40, 24), "model.layers.0.norm.weight": (33,), "model.layers.0.w": (24, 24)}


def merge(folder: Path, endpoint: str) -> dict[str, Any]:
    """Merge three models from one bucket into another; places and versions (ETags) are the same every time."""
    client = boto3.client("s3", endpoint_url=endpoint)
    family = make_family(folder / "family", 3, SHAPES, num_shards=2)
    for bucket, root in (("kept-inputs", folder / "family"), ("kept-output", folder / "output")):
        client.create_bucket(Bucket=bucket)
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            client.upload_file(str(path), bucket, str(path.relative_to(root)))
    places = {model: f"s3://kept-inputs/{Path(model).name}" for model in map(str, (family.base, *family.tuned))}
    recipe = write_recipe(
        folder / "recipe.yaml", "model_stock", family,
        stockflow={"storage": {f"s3://kept-{side}/": {"endpoint": endpoint} for side in ("inputs", "output")}},
    )  # fmt: skip
    text = recipe.read_text()
    for model in sorted(places, key=len, reverse=True):
        text = text.replace(model, places[model])
    recipe.write_text(text)
    runs.merge_elsewhere(recipe, "s3://kept-output/out", "--shard-size", "3KB")
    shutil.rmtree(folder / "output", ignore_errors=True)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="kept-output")
    for found in (found for page in pages for found in page["Contents"]):
        target = folder / "output" / found["Key"]
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("kept-output", found["Key"], str(target))
    manifest: dict[str, Any] = json.loads((folder / "output" / "out" / "manifest.json").read_text())
    return manifest


def test_a_kept_plan_is_read_and_written_as_it_was() -> None:
    (path,) = KEPT.rglob("plan.json")
    payload = path.read_bytes()

    recorded = plan_file.parse(payload, "plan.json")

    assert path.parent.name == recorded.plan_id == recorded.digest == recorded.plan.plan_id
    assert recorded.merge_id == recorded.copies_digest == recorded.plan.merge_id
    assert plan_file.encode(recorded.plan) == payload


def test_a_kept_output_is_gone_on_with(tmp_path: Path) -> None:
    shutil.copytree(KEPT, tmp_path / "output" / "out")
    digests = runs.shard_digests(KEPT)
    (receipts,) = KEPT.glob("_stockflow/*/receipts")
    before = {path.name: path.read_bytes() for path in receipts.iterdir()}

    with s3_credentials(), moto_server() as endpoint:
        manifest = merge(tmp_path, endpoint)

    output = tmp_path / "output" / "out"
    assert manifest["plan_id"] == receipts.parent.name
    after = {path.name: path.read_bytes() for path in (output / receipts.relative_to(KEPT)).iterdir()}
    assert {name: after[name] for name in before} == before, "finished shards are not merged again"
    assert after.keys() - before.keys() == {f"{MISSING}.json"}
    assert {name: manifest["files"][name]["sha256"] for name in digests} == digests


def keep() -> None:
    """Make the kept output anew."""
    with tempfile.TemporaryDirectory() as folder, s3_credentials(), moto_server() as endpoint:
        merge(Path(folder), endpoint)
        output = Path(folder) / "output" / "out"
        shutil.rmtree(KEPT, ignore_errors=True)
        kept = [*output.rglob("plan.json"), *output.rglob("claim.json"), *output.rglob("numerics/*")]
        kept += [
            path for path in (*output.glob("*.safetensors"), *output.rglob("receipts/*")) if MISSING not in path.name
        ]
        for path in kept:
            target = KEPT / path.relative_to(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


if __name__ == "__main__":
    keep()
    print(f"kept in {KEPT}", file=sys.stderr)
