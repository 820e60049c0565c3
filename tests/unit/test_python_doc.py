"""docs/recipes.md#python runs as it stands, and docs/insight.md#progress names every field there is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import typer

from stockflow.cli import app
from stockflow.storage import LocalStore
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.integration.test_clean import grow_old
from tests.pages import section
from tests.runs import REPOSITORY

BLOCKS = re.findall(r"^```python\n(.*?)^```$", section("recipes.md", "Python"), re.MULTILINE | re.DOTALL)
PROGRESS = section("insight.md", "Progress")


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    assert len(BLOCKS) >= 7

    # A process of its own: its memory is bounded, and that of the test runner may be more already.
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(BLOCKS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stderr


def test_the_commands_that_have_progress_are_named() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {option for each in command.params for option in each.opts} for name, command in commands.items()}
    named = set(re.findall(r"`([a-z-]+)`", PROGRESS.split("say on standard error")[0]))

    assert named | {"demo"} == {name for name in options if "--progress" in options[name]}


def test_the_fields_of_progress_are_those_that_are_documented(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"w": (8, 4)}, buffers=False)
    recipe, output = write_recipe(tmp_path / "recipe.yaml", "model_stock", family), tmp_path / "out"
    commands = (
        ["merge", recipe, output],
        ["plan", recipe, output],
        ["verify", output, "--inputs", "--sample", "100%"],
        ["diff", family.base, family.base],
        ["inspect", recipe, "--out", tmp_path / "found"],
        ["audit", recipe, output],
        ["audit", output],
        ["report", output],
        ["clean", output, "--yes"],
    )
    events = []
    for command in commands:
        if command[0] == "clean":  # it touches nothing where a run was seen lately
            grow_old(LocalStore(str(output)))
        finished = runs.invoke(*command, "--progress", "json")
        assert finished.exit_code == 0, finished.stderr
        events += [json.loads(line) for line in finished.stderr.splitlines()]

    documented = set(re.findall(r"`([a-z_]+)`", PROGRESS))
    assert {key for event in events for key in event} <= documented
    assert {event["stage"] for event in events if event["event"] == "stage"} == set(
        re.search(r"^\| `stage` \| (`.*`) \|$", PROGRESS, re.MULTILINE)[1].strip("`").split("`, `")  # type: ignore[index]
    )
