"""What docs/storage.md shows is accepted as it stands there."""

import json
import re
from pathlib import Path

import boto3
import pytest

from stockflow.recipe import parse_recipe
from stockflow.recipe.model import StorageEntry

PAGE = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_on_the_page_are_recipes(text: str) -> None:
    recipe = parse_recipe(text, "docs/storage.md")

    assert len(recipe.storage.by_prefix) == 3


def test_every_option_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)

    assert explained == list(StorageEntry.model_fields)


def test_the_lifecycle_rule_is_taken_by_a_server(s3_endpoint: str, s3_bucket: str) -> None:
    (rule,) = blocks("json")
    client = boto3.client("s3", endpoint_url=s3_endpoint)

    client.put_bucket_lifecycle_configuration(Bucket=s3_bucket, LifecycleConfiguration=json.loads(rule))

    (kept,) = client.get_bucket_lifecycle_configuration(Bucket=s3_bucket)["Rules"]
    assert kept["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
