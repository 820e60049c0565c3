"""Merges in codes, stopped and begun again, with other memory and threads, from and to S3, on Ray: the same bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from stockflow.engine.worker import WorkerSpec
from stockflow.events import Done, Event, OnEvent
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import recipe_of
from stockflow.run.driver import Execute, Inputs, Merged, MergeOptions, merge
from stockflow.run.executors.ray import RayOptions, connected
from stockflow.run.places import in_this_process, on_ray
from tests import quantised, runs
from tests.checkpoints import write_checkpoint
from tests.quantised import FORMS
from tests.waiting import HANG_S

SHARD_SIZE = 70_000
"""Of one weight each."""
SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("by row", "Kimi-K2", "Kimi-K3", "DeepSeek-V4")]


class StoppedError(Exception):
    """After the first shard."""


def write_family(root: Path, form: str) -> list[Path]:
    """Write a base and two tunes of it, three weights each, in a form."""
    make, said = FORMS[form]
    config = {"model_type": "llama", "quantization_config": {"quant_method": "x", **said}}
    places = []
    for number in range(3):
        tensors: quantised.Tensors = {}
        for layer in range(3):
            base, tuned = (quantised.drawn(seed, (300, 416)) for seed in (layer, 10 * layer + number))
            module = f"model.layers.{layer}.mlp.up_proj"
            tensors |= {f"{module}.{own}": tensor for own, tensor in make(base + 0.3 * number * tuned).tensors.items()}
        places.append(write_checkpoint(root / f"m{number}", tensors, config=config, num_shards=2, side_files={}))
    return places


def merged(
    places: Sequence[Path | str],
    output: Path | str,
    *,
    memory: int = 1024,
    threads: int = 1,
    on_event: Callable[[Event], None] = lambda event: None,
    execute: Execute = in_this_process,
    **said: Any,
) -> Merged:
    models = [{"model": str(place)} for place in places[1:]]
    recipe = {"merge_method": "model_stock", "base_model": str(places[0]), "models": models, "stockflow": said}
    options = MergeOptions(memory * runs.MIB + runs.grown_bytes(), threads, "cpu", SHARD_SIZE)
    return merge(Inputs.open(recipe_of(recipe)), str(output), options, execute, on_event)


def digests(result: Merged) -> list[str]:
    return [result.manifest.files[shard.file].sha256 for shard in result.plan.shards]


@pytest.mark.parametrize("form", ["DeepSeek-V3", *SLOW])
def test_no_interruption_memory_thread_worker_or_storage_changes_a_code(
    form: str, tmp_path: Path, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = write_family(tmp_path, form)
    reference = merged(places, tmp_path / "whole")

    def stop(event: Event) -> None:
        if isinstance(event, Done) and event.cost is not None:
            raise StoppedError

    with pytest.raises(StoppedError):
        merged(places, tmp_path / "resumed", on_event=stop)
    resumed = merged(places, tmp_path / "resumed")
    assert 1 <= resumed.num_resumed < len(resumed.plan.shards)
    assert digests(resumed) == digests(reference)
    assert digests(merged(places, tmp_path / "small", memory=320, threads=2)) == digests(reference)

    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in (each for place in places for each in place.iterdir()):
        client.put_object(Bucket=s3_bucket, Key=f"{path.parent.name}/{path.name}", Body=path.read_bytes())
    urls = [f"s3://{s3_bucket}/{place.name}" for place in places]
    storage = {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}
    assert digests(merged(urls, f"s3://{s3_bucket}/out", storage=storage)) == digests(reference)
    if form != "DeepSeek-V3":
        with on_two_workers(monkeypatch) as execute:
            on_workers = merged(urls, f"s3://{s3_bucket}/ray", execute=execute, storage=storage)
        assert digests(on_workers) == digests(reference)


@contextmanager
def on_two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Execute]:
    """Start Ray, and give what merges there."""
    options = RayOptions(num_workers=2, no_worker_timeout_s=HANG_S)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], told: OnEvent) -> Iterator[Receipt]:
        return on_ray(spec, shards, told, options)

    with connected(options, 2):
        yield execute
