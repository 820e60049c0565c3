"""`deploy/s3-policy.json` on a server that checks signatures and rights: enough for a merge, and nothing too much."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
import yaml

from stockflow.output.keys import CLAIM_FILE
from tests import runs
from tests.checkpoints import make_family
from tests.s3_server import moto_server, s3_credentials

POLICY = (Path(__file__).parents[2] / "deploy" / "s3-policy.json").read_text()
NAMES = {"INPUT_BUCKET": "inputs", "INPUT_PREFIX": "models", "OUTPUT_BUCKET": "outputs", "OUTPUT_PREFIX": "merges"}
RECIPE, OUTPUT = "s3://outputs/merges/recipe.yaml", "s3://outputs/merges/merged"
pytestmark = pytest.mark.cluster
OPTIONS = ("--shard-size", 150_000, "--memory", "1GiB", "--executor", "local", "--device", "cpu")


class Role:
    """A user of the server who has the policy and nothing else; rights are checked while it acts."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self.local_recipe = folder / "recipe.yaml"
        self._iam = boto3.client("iam", endpoint_url=url, region_name="us-east-1")
        self._iam.create_user(UserName="stockflow")
        key = self._iam.create_access_key(UserName="stockflow")["AccessKey"]
        self._keys = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def has(self, policy: Any) -> None:
        """Replace what is allowed."""
        self._check_rights(from_request=float("inf"))
        self._iam.put_user_policy(UserName="stockflow", PolicyName="least", PolicyDocument=json.dumps(policy))
        self._check_rights(from_request=0)

    def run(self, *arguments: object) -> tuple[int, str]:
        """Run ``stockflow`` as this user; return exit code and what it said."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._keys.items():
                patch.setenv(name, value)
            patch.setenv("AWS_ENDPOINT_URL_S3", self._url)
            done = runs.run(*arguments)
        return done.returncode, done.stdout + done.stderr

    def let_an_hour_pass(self, output: str) -> None:
        """Say that whoever claimed the output was last seen an hour ago."""
        bucket, _, prefix = output.removeprefix("s3://").partition("/")
        where = {"Bucket": bucket, "Key": f"{prefix}/{CLAIM_FILE}"}
        s3 = boto3.client("s3", endpoint_url=self._url)
        self._check_rights(from_request=float("inf"))
        claim = json.loads(s3.get_object(**where)["Body"].read())
        s3.put_object(**where, Body=json.dumps(claim | {"heartbeat": claim["heartbeat"] - 3600.0}).encode())
        self._check_rights(from_request=0)

    def _check_rights(self, from_request: float) -> None:
        requests.post(f"{self._url}/moto-api/reset-auth", data=str(from_request), timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def role(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    """The user, on a server of its own with a base, two tuned models and a recipe."""
    folder = tmp_path_factory.mktemp("policy")
    with s3_credentials(), moto_server() as url:
        s3 = boto3.client("s3", endpoint_url=url)
        for bucket in ("inputs", "outputs"):
            s3.create_bucket(Bucket=bucket)
        family = make_family(folder, 2)
        models = [f"s3://inputs/models/{path.name}" for path in (family.base, *family.tuned)]
        for path, model in zip((family.base, *family.tuned), models, strict=True):
            for file in path.iterdir():
                s3.upload_file(str(file), "inputs", f"{model.removeprefix('s3://inputs/')}/{file.name}")
        recipe = {"merge_method": "model_stock", "base_model": models[0], "models": [{"model": m} for m in models[1:]]}
        s3.put_object(Bucket="outputs", Key="merges/recipe.yaml", Body=yaml.safe_dump(recipe).encode())
        role = Role(url, folder)
        role.local_recipe.write_text(yaml.safe_dump(recipe))
        yield role


def policy(without: str | None = None) -> Any:
    """The policy with our buckets' names, less one action on one resource: ``ACTION on SID``."""
    found = json.loads(re.sub("|".join(NAMES), lambda match: NAMES[match[0]], POLICY))
    for statement in found["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        statement["Action"] = [action for action in actions if f"{action} on {statement['Sid']}" != without]
    found["Statement"] = [statement for statement in found["Statement"] if statement["Action"]]
    return found


def test_the_policy_is_enough_for_everything_an_operator_runs(role: Role) -> None:
    role.has(policy())

    for command in (
        ("plan", RECIPE, OUTPUT, *OPTIONS),
        ("merge", RECIPE, OUTPUT, *OPTIONS),
        ("status", OUTPUT),
        ("verify", OUTPUT, "--sample", "10%"),
        ("clean", OUTPUT, "--yes"),
        ("merge", RECIPE, OUTPUT, *OPTIONS, "--overwrite"),
    ):
        if command[0] == "clean":  # which leaves alone what a run wrote lately
            role.let_an_hour_pass(OUTPUT)
        code, said = role.run(*command)
        assert code == 0, (command, said)
        assert "denied" not in said, (command, said)


def test_the_server_refuses_what_the_policy_does_not_allow(role: Role) -> None:
    """Or the test above would show nothing."""
    role.has(policy())

    code, said = role.run("merge", RECIPE, "s3://inputs/merged", *OPTIONS)

    assert (code, "denied" in said) == (2, True), said


@pytest.mark.parametrize(
    "right",
    [
        "s3:ListBucket on FindInputs",
        "s3:GetObject on ReadInputs",
        "s3:ListBucket on FindOutput",
        "s3:GetObject on ReadAndWriteOutput",
        "s3:PutObject on ReadAndWriteOutput",
    ],
)
@pytest.mark.parametrize("recipe", ["there", "here"])
def test_without_a_right_one_message_names_it(role: Role, right: str, recipe: str) -> None:
    """A recipe beside the output is read with the output's rights, so both are tried."""
    role.has(policy(without=right))

    place = RECIPE if recipe == "there" else role.local_recipe
    code, said = role.run("merge", place, OUTPUT, *OPTIONS, "--overwrite")

    assert code == 2, said
    assert right.split()[0] in said, said
    assert "Traceback" not in said
