"""Text that others wrote, as it is shown: names of tensors and files, what a server said. It stays a text.

An escape sequence would command the terminal, a line feed make up a line of ours, an override of direction turn what
follows around, a backtick or a pipe end the cell of a table. Names are shown whole, with what would do so spelt out.
"""

import re


def in_a_line(text: object) -> str:
    """Return a text on one line, without what is not printable: an escape and a line feed are spelt out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def printable(text: object) -> str:
    """Return a text of several lines, without what is not printable but line feeds and tabs."""
    whole = str(text).replace("\r\n", "\n")
    return "\n".join("\t".join(map(in_a_line, line.split("\t"))) for line in whole.split("\n"))


def code_cell(text: object) -> str:
    """Return a text as code in a cell of a Markdown table: nothing in it ends the code, the cell or the row."""
    line = in_a_line(text).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str) -> str:
    """Return a text as a block of code in Markdown: nothing in it ends the block."""
    block = printable(text)
    fence = "`" * max(_longest_run(block) + 1, 3)
    return f"{fence}{language}\n{block}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
