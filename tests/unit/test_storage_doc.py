"""What docs/promises.md#storage shows is accepted as it stands there."""

import json
import re
from pathlib import Path

import boto3
import pytest

from stockflow.recipe import parse_recipe
from stockflow.recipe.options import StorageEntry
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.fault_proxy import FaultyProxy
from tests.pages import section

ROOT = Path(__file__).parents[2]
PAGE = section("promises.md", "Storage")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_on_the_page_are_recipes(text: str) -> None:
    recipe = parse_recipe(text, "docs/promises.md#storage")

    assert len(recipe.storage.by_prefix) == 3


def test_every_option_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)

    assert explained == list(StorageEntry.model_fields)


def test_the_lifecycle_rule_is_taken_by_a_server(s3_endpoint: str, s3_bucket: str) -> None:
    (rule,) = blocks("json")
    client = boto3.client("s3", endpoint_url=s3_endpoint)

    client.put_bucket_lifecycle_configuration(Bucket=s3_bucket, LifecycleConfiguration=json.loads(rule))

    (kept,) = client.get_bucket_lifecycle_configuration(Bucket=s3_bucket)["Rules"]
    assert kept["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 3}


def rights() -> dict[str, str]:
    """Return what each right is for, by its name."""
    return dict(re.findall(r"^\| `(s3:\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE))


def test_every_right_of_the_policy_is_explained() -> None:
    policy = json.loads((ROOT / "deploy" / "s3-policy.json").read_text())
    actions = [statement["Action"] for statement in policy["Statement"]]
    granted = {name for action in actions for name in ([action] if isinstance(action, str) else action)}

    assert granted == rights().keys()


def test_what_a_plain_merge_deletes_is_on_the_page(
    s3_endpoint: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2))
    with FaultyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        runs.merge_here(recipe, f"s3://{s3_bucket}/out")

    (deleted,) = {request for request in proxy.requests if request.startswith("DELETE ")}
    assert "/runs/" in deleted
    assert "a run takes its own record away when it ends" in rights()["s3:DeleteObject"]
