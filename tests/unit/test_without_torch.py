"""What does not need torch works without it; what does says so in one sentence, and how to install it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stockflow import MissingLibraryError
from stockflow.engine import devices
from tests import runs
from tests.checkpoints import make_family, write_recipe

INSTALL = "pip install 'stockflow[torch]'"


def without_torch(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run ``stockflow`` in a process that finds no torch."""
    script = "import sys; sys.modules['torch'] = None; from stockflow.cli import main; main()"
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(line, cwd=runs.REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 3, {"w": (33, 65)}))


def test_a_merge_on_processors_and_every_judge_of_it_need_no_torch(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    for command in (
        ["plan", recipe, output],
        ["inspect", recipe],
        ["merge", recipe, output, "--device", "cpu"],
        ["verify", output, "--inputs", "--sample", "100%"],
        ["audit", recipe, output],
        ["report", output],
    ):
        finished = without_torch(*command)
        assert finished.returncode == 0, finished.stderr

    assert runs.expected_digests([runs.merge_here(recipe, tmp_path / "with torch")]) == [runs.shard_digests(output)]


def test_a_merge_on_a_gpu_names_what_to_install(recipe: Path, tmp_path: Path) -> None:
    finished = without_torch("merge", recipe, tmp_path / "out", "--device", "cuda", "--quiet")

    assert finished.returncode == 2
    assert finished.stderr == (
        f"stockflow: --device cuda needs torch, which is not installed on {os.uname().nodename}; {INSTALL}\n"
    )


def test_the_demo_names_what_to_install_and_makes_no_folder(tmp_path: Path) -> None:
    finished = without_torch("demo", tmp_path / "demo")

    assert finished.returncode == 2
    assert finished.stderr == (
        f"stockflow: stockflow demo needs torch, which is not installed on {os.uname().nodename}; {INSTALL}\n"
    )
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def gpu_node_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose driver is loaded: as far as one is needed to be told to install torch."""
    monkeypatch.setattr(devices, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "stockflow.engine.cuda", raising=False)


@pytest.mark.usefixtures("gpu_node_without_torch")
def test_a_worker_that_is_given_gpus_and_has_no_torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or eight GPUs would stand idle at their price."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    with pytest.raises(MissingLibraryError, match=r"a worker that is given GPUs needs torch, .*stockflow\[torch\]"):
        devices.check_gpu_is_seen("auto")


@pytest.mark.usefixtures("gpu_node_without_torch")
def test_where_nobody_asks_for_its_gpu_a_machine_without_torch_computes_on_processors() -> None:
    assert devices.open_device("auto").kind == "cpu"


def test_everything_else_that_is_missing_stays_what_it_is() -> None:
    from stockflow.extras import needs_torch

    with pytest.raises(ModuleNotFoundError, match="no_such_library") as caught, needs_torch("this"):
        __import__("no_such_library")

    assert not isinstance(caught.value, MissingLibraryError)
