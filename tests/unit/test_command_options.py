"""Every command that may take long shows its progress in the same ways, and can be told to be quiet."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from stockflow.cli import app
from tests.checkpoints import make_family, write_recipe

WITHOUT_PROGRESS = {"schema", "status", "submit"}
"""One prints a constant, one is progress itself, one shows what the merge on the cluster says."""
STYLES = ["json", "plain", "none"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_every_command_has_progress_and_quiet() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {option for each in command.params for option in each.opts} for name, command in commands.items()}

    assert {name for name in options if not {"--progress", "--quiet"} <= options[name]} == WITHOUT_PROGRESS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_recipe(folder / "recipe.yaml", "model_stock", make_family(folder, 2, {"weight": (40, 16)}))


def test_the_next_command_makes_the_plan_that_was_shown(recipe: Path) -> None:
    options = ["--memory", "1GiB", "--shard-size", "20KB", "--workers", "8", "--executor", "ray", "--overwrite"]

    finished = run("plan", recipe, recipe.parent / "out", *options)

    assert finished.stdout.splitlines()[-1].endswith(f"{recipe.parent / 'out'} {' '.join(options)}")


@pytest.mark.parametrize("style", STYLES)
def test_a_plan_that_is_quick_tells_programs_only(recipe: Path, style: str) -> None:
    finished = run("plan", recipe, recipe.parent / "out", "--progress", style)

    assert finished.exit_code == 0
    assert finished.stdout.splitlines()[-1] == f"next: stockflow merge {recipe} {recipe.parent / 'out'}"
    events = [json.loads(line) for line in finished.stderr.splitlines()]
    assert [event["stage"] for event in events if event["event"] == "stage"] == (
        ["opening checkpoints", "planning", "looking at the output"] if style == "json" else []
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_failing_clean_says_so_in_the_chosen_way(tmp_path: Path, style: str) -> None:
    finished = run("clean", tmp_path, "--progress", style)

    assert finished.exit_code == 2
    assert finished.stdout == ""
    lines = finished.stderr.splitlines()
    if style == "json":
        end = json.loads(lines[-1])
        assert (end["event"], end["outcome"], end["exit_code"]) == ("end", "failed", 2)
        assert "nothing there is ours to remove" in end["message"]
    else:
        assert len(lines) == 1
        assert "nothing there is ours to remove" in lines[0]


def test_quiet_is_quiet_whatever_progress_says(recipe: Path) -> None:
    finished = run("plan", recipe, recipe.parent / "out", "--quiet", "--progress", "json")

    assert (finished.exit_code, finished.stdout, finished.stderr) == (0, "", "")
