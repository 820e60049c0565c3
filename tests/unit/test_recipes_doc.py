"""What docs/recipes.md shows is accepted: recipes by the loader, commands by the command line."""

import re
from pathlib import Path

import pytest
import typer

from stockflow.cli import app
from stockflow.recipe import parse_recipe

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "recipes.md").read_text()
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"\bstockflow ([\w-]+)([^#\n&]*)", "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)))
SHOWN = [
    (page.name, *found)
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
    for found in re.findall(r"`stockflow (\w+)((?: [A-Z]+)+)\b", page.read_text())
]
"""Commands as they stand in sentences and tables: words in capitals are their arguments."""


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_on_the_page_are_recipes(text: str) -> None:
    recipe = parse_recipe(text, "docs/recipes.md")

    assert len(recipe.checkpoints) >= 2


@pytest.mark.parametrize(("name", "rest"), COMMANDS)
def test_commands_on_the_page_exist_with_their_options(name: str, rest: str) -> None:
    command = typer.main.get_group(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}

    assert set(re.findall(r"--[\w-]+", rest)) <= known


@pytest.mark.parametrize(("page", "name", "words"), SHOWN)
def test_commands_in_a_text_have_the_arguments_they_need(page: str, name: str, words: str) -> None:
    command = typer.main.get_group(app).commands[name]
    needed = [each for each in command.params if each.param_type_name == "argument" and each.required]

    assert len(words.split()) >= len(needed), page


def test_the_page_has_recipes_and_commands() -> None:
    assert len(RECIPES) == 12
    assert len(COMMANDS) > 12
    assert len(SHOWN) > 12
