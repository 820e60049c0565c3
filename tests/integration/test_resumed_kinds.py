"""Merges of every kind, stopped after a shard and begun again, and from and to object storage: the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from stockflow.events import Done, Event
from stockflow.recipe import recipe_of
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from tests import runs
from tests.checkpoints import LLAMA_CONFIG, Family, make_family
from tests.selection import mostly_slow
from tests.token_files import tokenizer_json

TIED = LLAMA_CONFIG | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
SHARD_SIZE = 200_000
"""a handful of shards"""
MEMORY_BYTES = 1024 * runs.MIB
Models = list[str]


class StoppedError(Exception):
    """After the first shard."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = make_family(tmp_path_factory.mktemp("kinds"), 2, num_shards=2, config=TIED, seed=11)
    tokens = [f"t{number}" for number in range(120)]
    for number, folder in enumerate((made.base, *made.tuned)):
        own = [*tokens[:100], f"own {number}", *tokens[100 + number :]]
        (folder / "tokenizer.json").write_text(tokenizer_json(own))
    return made


def whole(method: str, **parameters: Any) -> Callable[[Models], dict[str, Any]]:
    def recipe(models: Models) -> dict[str, Any]:
        tuned = models[1:2] if method == "arcee_fusion" else models[1:]
        return {"merge_method": method, "base_model": models[0], "models": tuned, "parameters": parameters}

    return recipe


def union(models: Models) -> dict[str, Any]:
    return whole("model_stock")(models) | {"tokenizer_source": "union"}


def stacked(models: Models) -> dict[str, Any]:
    def sources(first: int) -> list[dict[str, Any]]:
        return [{"model": model, "layer_range": [first, first + 1]} for model in models[1:]]

    slices = [{"sources": sources(number), "parameters": {"weight": [0.25, 1.0]}} for number in (0, 1, 0)]
    return {"merge_method": "linear", "slices": slices, "dtype": "float32"}


KINDS: dict[str, Callable[[Models], dict[str, Any]]] = {
    "a union of vocabularies": union,
    "a stack of layers": stacked,
    "dare_ties": whole("dare_ties", weight=0.6, density=0.4),
    "della": whole("della", weight=0.6, density=0.5, epsilon=0.1),
    "breadcrumbs": whole("breadcrumbs", weight=0.6, density=0.5, gamma=0.02),
    "sce": whole("sce", select_topk=0.3),
    "arcee_fusion": whole("arcee_fusion"),
    "nuslerp": whole("nuslerp", weight=0.7),
    "karcher": whole("karcher"),
    "geometric_median": whole("geometric_median", weight=1.0),
}


def merged(recipe: dict[str, Any], output: str, on_event: Callable[[Event], None] = lambda event: None) -> Merged:
    accepted = {"accept": ["vocabularies-differ"], **recipe.get("stockflow", {})}
    options = MergeOptions(MEMORY_BYTES + runs.grown_bytes(), 2, "cpu", SHARD_SIZE)
    return merge(Inputs.open(recipe_of(recipe | {"stockflow": accepted})), output, options, in_this_process, on_event)


def digests(result: Merged) -> list[str]:
    return [result.manifest.files[shard.file].sha256 for shard in result.plan.shards]


@pytest.mark.parametrize(
    "kind", mostly_slow(KINDS, ["a union of vocabularies", "a stack of layers", "dare_ties", "karcher"])
)
def test_what_was_stopped_goes_on_and_storage_changes_no_byte(
    kind: str, family: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str
) -> None:
    recipe = KINDS[kind]([str(folder) for folder in (family.base, *family.tuned)])
    reference = merged(recipe, str(tmp_path / "whole"))

    def stop(event: Event) -> None:
        if isinstance(event, Done) and event.cost is not None:
            raise StoppedError

    with pytest.raises(StoppedError):
        merged(recipe, str(tmp_path / "out"), stop)
    assert not (tmp_path / "out" / "manifest.json").exists()
    resumed = merged(recipe, str(tmp_path / "out"))

    assert len(reference.plan.shards) > 2
    assert 1 <= resumed.num_resumed < len(resumed.plan.shards)
    assert digests(resumed) == digests(reference)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    urls = []
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            client.put_object(Bucket=s3_bucket, Key=f"{folder.name}/{path.name}", Body=path.read_bytes())
        urls.append(f"s3://{s3_bucket}/{folder.name}")
    storage = {"stockflow": {"storage": {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}}}
    remote = merged(KINDS[kind](urls) | storage, f"s3://{s3_bucket}/out")
    assert digests(remote) == digests(reference)
    assert remote.plan.merge_id == reference.plan.merge_id
    names = [{key.rpartition("/")[2] for key in each.manifest.files} for each in (remote, reference)]
    assert names[0] == names[1]
