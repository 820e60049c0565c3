"""`pip install stockflow` as a stranger types it: a wheel, an empty environment, no constraints. `make test-install`.

Needs the package index and some gigabytes of disk; five minutes.
"""

import json
import os
from pathlib import Path

import boto3
import pytest

from stockflow import __version__
from tests import ray_nodes, runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.install.environments import OLDEST_PIP, Environment, build_wheel, oldest_libraries

MOST_VERSIONS = 5
"""of one package whose metadata pip reads before it has an answer: a resolver that walks back reads dozens"""
PIPS = {"today's pip": "pip", f"pip {OLDEST_PIP}": f"pip=={OLDEST_PIP}"}
METHODS = {
    "model_stock": {},
    "linear": {"per_model": {"weight": [0.5, 0.2, 0.3]}},
    "task_arithmetic": {"per_model": {"weight": [0.5, 0.2, 0.3]}},
    "ties": {"per_model": {"weight": [0.5, 0.2, 0.3], "density": [0.5, 0.5, 0.9]}},
}

pytestmark = [pytest.mark.install, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=PIPS.values(), ids=PIPS.keys())
def empty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment.make(tmp_path_factory.mktemp("environment") / "venv", pip=request.param)


@pytest.fixture(scope="module")
def installed(empty: Environment, wheel: Path) -> Environment:
    """An environment with the default set."""
    before = empty.mib
    empty.install(wheel)
    print(f"\nstockflow: {empty.mib - before} MiB")
    return empty


@pytest.mark.parametrize("extras", ["", "[torch]"], ids=lambda extras: extras or "default set")
def test_pip_finds_what_agrees_at_once(empty: Environment, wheel: Path, extras: str) -> None:
    """Within three minutes, and without walking back through the versions of a package."""
    choice = empty.choose(f"{wheel}{extras}")

    print(f"\n{wheel.name}{extras}: {choice}")
    walked = {name: versions for name, versions in choice.looked_at.items() if len(versions) > MOST_VERSIONS}
    assert walked == {}
    assert len(choice.looked_at) >= len(choice.versions)
    assert ("torch" in choice.versions) == bool(extras)
    assert "boto3" not in choice.versions


def test_the_default_set_agrees_with_itself_and_has_no_torch(installed: Environment) -> None:
    assert installed.run("pip", "check").stdout.strip() == "No broken requirements found."
    assert installed.run("stockflow", "--version").stdout.strip() == f"stockflow {__version__}"
    assert not installed.has("torch")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3)


@pytest.mark.parametrize("method", METHODS)
def test_it_merges_the_bytes_that_are_merged_here(
    method: str, installed: Environment, family: Family, tmp_path: Path
) -> None:
    """And verifies them, by merging them all again; its libraries are those of today, not of constraints.txt."""
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, **METHODS[method])

    installed.run("stockflow", "merge", recipe, tmp_path / "there", "--quiet")
    installed.run("stockflow", "verify", tmp_path / "there", "--inputs", "--sample", "100%")

    here = runs.merge_here(recipe, tmp_path / "here")
    assert runs.expected_digests([here]) == [runs.shard_digests(tmp_path / "there")]


def test_ray_merges_in_it(installed: Environment, family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    installed.run("stockflow", "merge", recipe, tmp_path / "there", "--executor", "ray", "--workers", "1", "--quiet")

    here = runs.merge_here(recipe, tmp_path / "here")
    assert runs.expected_digests([here]) == [runs.shard_digests(tmp_path / "there")]


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_it_merges_from_s3_to_s3(
    client: str, installed: Environment, family: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str
) -> None:
    """With what botocore finds in the environment: boto3 is not there."""
    assert not installed.has("boto3")
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in (path for folder in (family.base, *family.tuned) for path in folder.iterdir()):
        s3.put_object(Bucket=s3_bucket, Key=f"{path.parent.name}/{path.name}", Body=path.read_bytes())
    bucket = f"s3://{s3_bucket}/"
    options = {"storage": {bucket: {"endpoint": s3_endpoint, "client": client}}}
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family, stockflow=options)
    recipe.write_text(recipe.read_text().replace(f"{family.base.parent}/", bucket))

    installed.run("stockflow", "merge", recipe, f"{bucket}out", "--quiet")
    told = installed.run("stockflow", "verify", f"{bucket}out", "--recipe", recipe, "--inputs", "--json").stdout

    assert json.loads(told)["findings"] == []


def test_the_oldest_libraries_that_are_allowed_do(wheel: Path, family: Family, tmp_path: Path) -> None:
    """Records are written and read, Ray merges, and its job API is spoken to: what only newer versions have shows."""
    constraints = tmp_path / "oldest.txt"
    constraints.write_text("\n".join(oldest_libraries()))
    oldest = Environment.make(tmp_path / "venv")
    oldest.install("--constraint", constraints, wheel)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    there, submitted = tmp_path / "there", tmp_path / "submitted"

    oldest.run("stockflow", "merge", recipe, there, "--executor", "ray", "--workers", "1", "--quiet")
    oldest.run("stockflow", "verify", there, "--inputs", "--sample", "100%")
    oldest.run("stockflow", "report", there, "--html", tmp_path / "report.html")
    oldest.run("stockflow", "audit", recipe, there, "--json")
    with ray_nodes.cluster(os.environ) as cluster, pytest.MonkeyPatch.context() as patch:
        cluster.start_head()
        cluster.add_node()
        for name, value in cluster.client_environment.items():
            patch.setenv(name, value)
        oldest.run("stockflow", "submit", recipe, submitted, "--address", cluster.url)

    here = runs.merge_here(recipe, tmp_path / "here")
    assert runs.expected_digests([here]) == [runs.shard_digests(there)] == [runs.shard_digests(submitted)]


def test_what_needs_torch_says_how_to_install_it(installed: Environment, family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    missing = f"needs torch, which is not installed on {os.uname().nodename}; pip install 'stockflow[torch]'\n"

    demo = installed.run("stockflow", "demo", tmp_path / "demo", code=2)
    merge = installed.run("stockflow", "merge", recipe, tmp_path / "out", "--device", "cuda", "--quiet", code=2)

    assert demo.stderr == f"stockflow: stockflow demo {missing}"
    assert merge.stderr == f"stockflow: --device cuda {missing}"
