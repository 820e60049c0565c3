"""Newer Pythons: the default set, whole merges, and every test that needs no torch. `make test-pythons`.

torch is left out: for these Pythons the package index has it with CUDA only, some gigabytes.
"""

import re
import tomllib
from pathlib import Path

import pytest

from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.install.environments import Environment, build_wheel, find_python

PYTHONS = ("3.12", "3.13")
METHODS = ("model_stock", "linear", "task_arithmetic", "ties")

pytestmark = [pytest.mark.pythons, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module", params=PYTHONS)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of another Python with the default set and what tests need, but torch."""
    python = find_python(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} here: neither python{request.param} on the PATH nor one of pyenv's")
    folder = tmp_path_factory.mktemp("environment")
    made = Environment.make(folder / "venv", python)
    project = tomllib.loads((runs.REPOSITORY / "pyproject.toml").read_text())["project"]
    development = [line for line in project["optional-dependencies"]["dev"] if line != "stockflow[torch]"]
    made.install(build_wheel(folder), *development)
    assert not made.has("torch")
    return made


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_another_python_merges_the_same_bytes(
    method: str, executor: str, installed: Environment, family: Family, tmp_path: Path
) -> None:
    per_model = {} if method == "model_stock" else {"weight": [0.5, 0.2, 0.3]}
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, per_model=per_model)

    installed.run("stockflow", "merge", recipe, tmp_path / "there", "--executor", executor, "--quiet")
    installed.run("stockflow", "verify", tmp_path / "there", "--inputs", "--sample", "100%")

    here = runs.merge_here(recipe, tmp_path / "here")
    assert runs.expected_digests([here]) == [runs.shard_digests(tmp_path / "there")]


def test_what_needs_no_torch_is_tested_on_it(installed: Environment) -> None:
    """Modules of tests that import torch are left out; the count shows that the rest was collected."""
    tests = [runs.REPOSITORY / "tests" / name for name in ("unit", "property", "contract")]

    said = installed.run(
        "python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "-q", "-rs",
        "--rootdir", runs.REPOSITORY, "-c", runs.REPOSITORY / "pyproject.toml", *tests, timeout_s=1800,
    ).stdout  # fmt: skip

    print(f"\n{said.splitlines()[-1]}")
    passed = re.search(r"(\d+) passed", said)
    assert passed
    assert int(passed[1]) > 1000, said
