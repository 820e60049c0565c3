"""The image of `deploy/Dockerfile`, really built and run. `make image-test`: root, buildah, debootstrap, five minutes.

Its base is Debian with Ray, not `rayproject/ray`: no registry is needed. What the Dockerfile adds is the same.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stockflow import __version__
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.image import buildah

REPOSITORY = Path(__file__).parents[2]
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
TAG = "localhost/stockflow:test"

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(buildah.missing() is not None, reason=str(buildah.missing())),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[buildah.Store]:
    store = buildah.Store(tmp_path_factory.mktemp("images"))
    base = "localhost/ray:test"
    buildah.make_base(store, base, CONSTRAINTS["ray"])
    store.build(TAG, REPOSITORY / "deploy" / "Dockerfile", REPOSITORY, BASE_IMAGE=base)
    yield store
    store.remove()


@pytest.fixture(scope="module")
def container(store: buildah.Store) -> str:
    return store.start(TAG)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder with checkpoints that user 1000 of a container may use; pytest's own folders are closed to others."""
    for folder in (tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 3))
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o644)
    return tmp_path


def test_the_command_runs_as_user_1000(store: buildah.Store, container: str) -> None:
    assert store.inside(container, "id", "-u").strip() == "1000"
    assert store.inside(container, "stockflow", "--version").strip() == f"stockflow {__version__}"


def test_the_image_says_how_to_see_whether_it_works(store: buildah.Store) -> None:
    config: Any = json.loads(store.run("inspect", "--type", "image", TAG))["Docker"]["config"]

    assert config["Healthcheck"]["Test"] == ["CMD", "stockflow", "--version"]
    assert config["User"] == "1000"


def test_packages_are_those_that_were_tested(store: buildah.Store, container: str) -> None:
    """Ray and the wheels come from the base and an index; the versions are those of constraints.txt all the same."""
    frozen = store.inside(container, "python", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check")
    installed = dict(line.split("==", 1) for line in frozen.splitlines() if "==" in line)
    ours = {name: version.partition("+")[0] for name, version in installed.items() if name in CONSTRAINTS}

    assert {"ray", "torch", "numba", "numpy", "obstore"} <= ours.keys()
    assert ours == {name: CONSTRAINTS[name] for name in ours}
    assert store.inside(container, "python", "-m", "pip", "check").strip() == "No broken requirements found."


def test_a_merge_gives_the_bytes_it_gives_here_and_compiles_nothing(
    store: buildah.Store, container: str, shared: Path
) -> None:
    """Also in a new container: its kernels are compiled for AVX2 whatever the machine, and are found again."""
    recipe = shared / "recipe.yaml"
    listing = ("sh", "-c", 'cd "$NUMBA_CACHE_DIR" && find . -type f -printf "%p %T@\\n" | sort')
    compiled = store.inside(container, *listing)
    assert len(compiled.splitlines()) > 20

    store.inside(container, "stockflow", "merge", recipe, shared / "there", volumes=[shared])

    here = runs.merge_here(recipe, shared / "here")
    assert runs.expected_digests([here]) == [runs.shard_digests(shared / "there")]
    assert store.inside(container, *listing) == compiled


def test_its_machine_code_is_for_every_processor_with_avx2(store: buildah.Store, container: str) -> None:
    """Not for the one it was built on: numba takes code only for the very processor that it was compiled for."""
    ask = (
        "from numba.core.registry import cpu_target as c; print(*c.target_context.codegen().magic_tuple()[1:], sep='|')"
    )

    assert store.inside(container, "python", "-c", ask).strip() == "x86-64-v3|"


def test_sources_carry_whole_seconds_so_that_their_machine_code_survives_a_registry(
    store: buildah.Store, container: str
) -> None:
    """Layers are tar files, which may drop fractions; numba holds the time of a source against what it compiled."""
    fractions = """
import pathlib, stockflow
sources = pathlib.Path(stockflow.__file__).parent.rglob("*.py")
print({path.stat().st_mtime_ns % 10**9 for path in sources})
"""

    assert store.inside(container, "python", "-c", fractions).strip() == "{0}"


def test_ray_works_in_it(store: buildah.Store, container: str, shared: Path) -> None:
    """The merge starts a cluster in the container, with the token that the image's setting asks for."""
    recipe = shared / "recipe.yaml"
    options = ("--executor", "ray", "--workers", 1, "--memory", "1GiB")

    store.inside(container, "stockflow", "merge", recipe, shared / "there", *options, volumes=[shared])

    here = runs.merge_here(recipe, shared / "here")
    assert runs.expected_digests([here]) == [runs.shard_digests(shared / "there")]
