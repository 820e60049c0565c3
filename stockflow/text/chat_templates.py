"""Chat templates: whether they can be read as loaders read them, and which words they put into every text.

Source: transformers' ``render_jinja_template``, an environment with loop controls and a ``generation`` block.
"""

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_CHARACTERS = 2**20
"""of a template; what is longer is none"""
_MARKER = re.compile(r"<\|\w+\|>|\[\|\w+\|\]|<\w+_of_(?:turn|image)>")
"""Words that are tokens by themselves, or mean nothing."""


def fault_in(template: str) -> str | None:
    """Return why a template cannot be read, with its line; None if it can."""
    from jinja2 import TemplateSyntaxError  # most plans have no template to look at

    try:
        _environment().parse(template[:MAX_CHARACTERS])
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {str(error.message).partition('. ')[0]}"
    except RecursionError:
        return "it is nested too deeply"
    return None


def markers_in(template: str) -> list[str]:
    """Return the markers that a template writes, in order."""
    return list(dict.fromkeys(_MARKER.findall(template)))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """``{% generation %}``: what the model itself wrote."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            """Return what is between the two tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
