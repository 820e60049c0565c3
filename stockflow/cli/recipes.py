"""Commands about recipes alone: ``stockflow lint`` and ``stockflow schema``."""

import json
from typing import Annotated

import typer

from stockflow.cli.exits import exit_codes, say
from stockflow.errors import EXIT_USER


def lint(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...", help="YAML recipes: files, folders of them, URLs, or - for standard input."
        ),
    ],
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what is otherwise only warned of.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Say what is wrong with recipes and what in them has no effect, without any model. Exit 2 if one is refused.

    All problems of all recipes, each with its line. Whether models fit together `stockflow plan` says.
    """
    from stockflow.recipe import lint as linting

    with exit_codes():
        found = list(linting.lint(recipes))
        counts = linting.counts_of(found)
        if as_json:
            say(json.dumps({"recipes": [linting.facts_of(each) for each in found], "counts": counts}, indent=1))
        else:
            say("\n".join(line for each in found for line in linting.lines_of(each)))
            say(linting.in_a_sentence(counts))
        if counts["refused"] or counts["unsupported"] or (strict and counts["warned"]):
            raise typer.Exit(EXIT_USER)


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from stockflow.recipe import recipe_schema

    with exit_codes():
        say(json.dumps(recipe_schema(), indent=1))
