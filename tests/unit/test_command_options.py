"""Every command that may take long shows its progress in the same ways, and can be told to be quiet."""

import inspect
import json
import shlex
from pathlib import Path

import pytest
import typer

import stockflow
from stockflow.cli import app
from stockflow.settings import (
    DiffSettings,
    ExtractSettings,
    MergeSettings,
    PlanSettings,
    ReadSettings,
    SurveySettings,
    as_words,
    flag_of,
    settings_of,
)
from tests import runs
from tests.checkpoints import make_family, write_recipe

WITHOUT_PROGRESS = {"lint", "schema", "status", "submit"}
"""One reads small files, one prints a constant, one is progress itself, one shows what the cluster's merge says."""
STYLES = ["json", "plain", "none"]


def test_every_command_has_progress_and_quiet() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {option for each in command.params for option in each.opts} for name, command in commands.items()}

    assert {name for name in options if not {"--progress", "--quiet"} <= options[name]} == WITHOUT_PROGRESS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_recipe(folder / "recipe.yaml", "model_stock", make_family(folder, 2, {"weight": (40, 16)}))


def test_the_next_command_makes_the_plan_that_was_shown(recipe: Path) -> None:
    options = ["--memory", "1GiB", "--workers", "8", "--executor", "ray", "--shard-size", "20KB", "--overwrite"]

    finished = runs.invoke("plan", recipe, recipe.parent / "out", *options)

    assert finished.stdout.splitlines()[-1].endswith(f"{recipe.parent / 'out'} {' '.join(options)}")


@pytest.mark.parametrize("style", STYLES)
def test_a_plan_that_is_quick_tells_programs_only(recipe: Path, style: str) -> None:
    finished = runs.invoke("plan", recipe, recipe.parent / "out", "--progress", style)

    assert finished.exit_code == 0
    assert finished.stdout.splitlines()[-1] == f"next: stockflow merge {recipe} {recipe.parent / 'out'}"
    events = [json.loads(line) for line in finished.stderr.splitlines()]
    assert [event["stage"] for event in events if event["event"] == "stage"] == (
        ["opening checkpoints", "planning", "looking at the output"] if style == "json" else []
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_failing_clean_says_so_in_the_chosen_way(tmp_path: Path, style: str) -> None:
    finished = runs.invoke("clean", tmp_path, "--progress", style)

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
    finished = runs.invoke("plan", recipe, recipe.parent / "out", "--quiet", "--progress", "json")

    assert (finished.exit_code, finished.stdout, finished.stderr) == (0, "", "")


def test_the_next_command_is_one_that_a_shell_takes(recipe: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "my recipe's.yaml"
    spaced.write_text(recipe.read_text())
    (tmp_path / "a b").mkdir()

    told = runs.invoke("plan", spaced, tmp_path / "an output", "--follow-links", tmp_path / "a b").stdout
    shown = told.splitlines()[-1]

    words = ["stockflow", "merge", str(spaced), str(tmp_path / "an output"), "--follow-links", str(tmp_path / "a b")]
    assert shlex.split(shown.removeprefix("next: ")) == words


def test_summaries_are_whole_and_short_help_works() -> None:
    shown = runs.invoke("-h")

    assert shown.exit_code == 0
    assert "..." not in shown.stdout.split("Commands:")[1]
    assert runs.invoke("plan", "-h").stdout == runs.invoke("plan", "--help").stdout


# ------------------------------------------------------------------------------------ settings, declared once


FUNCTIONS = {
    "merge": MergeSettings, "plan": PlanSettings, "inspect": SurveySettings, "audit": SurveySettings,
    "diff": DiffSettings, "verify": ReadSettings, "extract": ExtractSettings,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_its_command_shows(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {each.name: (each.opts, each.help) for each in command.params}
    settings = settings_of(FUNCTIONS[name])

    function = getattr(stockflow, name)
    parameters = inspect.signature(function).parameters
    num_places = sum(each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for each in parameters.values())

    assert settings
    for key, (declared, setting) in settings.items():
        assert options[key] == ([flag_of(key, setting)], setting.help)
        assert (parameters[key].annotation, parameters[key].default) == (declared, setting.default)
        assert f"    {key}: {setting.help}" in function.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        function(*["x"] * num_places, nonsense=1)


def test_words_of_a_command_line_say_the_settings_again() -> None:
    """What `submit` sends: every setting of a merge, read back by the command."""
    given = {
        "memory": "2GiB", "workers": 3, "executor": None, "device": "cuda", "gpus_per_worker": 0.5,
        "shard_size": "5GB", "overwrite": True, "strict": True, "allow_unmerged": True, "random_seed": 7,
        "verify_inputs": True,
        "labels": {"pool": "spot", "zone": "a b"},
        "worker_timeout": 60.0, "shard_timeout": 1234567.0, "follow_links": ("/x y", "/z"),
    }  # fmt: skip
    assert given.keys() == settings_of(MergeSettings).keys()

    words = as_words(given, MergeSettings)

    context = typer.main.get_command(app).commands["merge"].make_context("merge", ["recipe", "out", *words])  # type: ignore[attr-defined]
    read = {key: context.params[key] for key in given}
    assert read == given | {"labels": ["pool=spot", "zone=a b"], "follow_links": ["/x y", "/z"]}
    assert as_words({key: setting.default for key, (_, setting) in settings_of(MergeSettings).items()}) == []
