"""How often the tokenizers of models on a store are read: equal ones once, whatever their number."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from stockflow.recipe import parse_recipe
from stockflow.run.inputs import Inputs
from tests.fault_proxy import FaultyProxy
from tests.s3_server import moto_server, s3_credentials
from tests.token_files import LETTERS, added, model_with, tokenizer_json

EQUAL = {"tokenizer.json": tokenizer_json(LETTERS), "tokenizer_config.json": '{"eos_token": "a"}'}
OTHER = {"tokenizer.json": tokenizer_json(LETTERS, more=added("<|x|>", start=10))}


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with s3_credentials(), moto_server() as moto, FaultyProxy(moto) as seen:
        boto3.client("s3", endpoint_url=moto).create_bucket(Bucket="models")
        yield seen


def plan(root: Path, proxy: FaultyProxy, names: list[str]) -> tuple[Counter[str], list[str]]:
    """Return how often each small file was asked for, and the codes of what was said."""
    s3 = boto3.client("s3", endpoint_url=proxy.url)
    for number, name in enumerate(names):
        folder = model_with(root / name, OTHER if name.startswith("other") else EQUAL, seed=number)
        for file in folder.iterdir():
            s3.upload_file(str(file), "models", f"{name}/{file.name}")
    recipe = {
        "merge_method": "model_stock",
        "base_model": f"s3://models/{names[0]}",
        "models": [{"model": f"s3://models/{name}"} for name in names[1:]],
        "stockflow": {"storage": {"s3://models": {"endpoint": proxy.url}}},
    }
    inputs = Inputs.open(parse_recipe(json.dumps(recipe), "recipe.yaml"))
    proxy.requests.clear()
    remarks = inputs.plan().remarks
    asked = Counter(request.split("?")[0].rpartition("/")[2] for request in proxy.requests)
    return asked, [remark.code for remark in remarks if remark.code != "over-http"]


def test_equal_tokenizers_on_a_store_are_read_once(tmp_path: Path, proxy: FaultyProxy) -> None:
    asked, said = plan(tmp_path, proxy, ["base", "one", "two", "three"])

    assert asked == {"tokenizer.json": 1, "tokenizer_config.json": 1}
    assert said == []


def test_each_tokenizer_that_differs_is_read_once_more(tmp_path: Path, proxy: FaultyProxy) -> None:
    asked, said = plan(tmp_path, proxy, ["base", "one", "other", "two"])

    assert asked["tokenizer.json"] == 2
    assert said == ["tokens-missing"]


def test_a_merge_of_files_that_changed_since_they_were_listed_is_refused(tmp_path: Path) -> None:
    from stockflow.errors import InputChangedError

    folders = [model_with(tmp_path / name, EQUAL, seed=number) for number, name in enumerate(("base", "one", "two"))]
    recipe = {"merge_method": "model_stock", "base_model": str(folders[0])}
    models = [{"model": str(folder)} for folder in folders[1:]]
    inputs = Inputs.open(parse_recipe(json.dumps(recipe | {"models": models}), "recipe.yaml"))
    (folders[1] / "tokenizer.json").write_text(tokenizer_json(LETTERS[::-1]) + " ")

    with pytest.raises(InputChangedError, match=r"one/tokenizer\.json changed since"):
        inputs.plan()
