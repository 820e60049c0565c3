"""Small pieces of HTML for the results of the Python API in a notebook; they take the notebook's own colours."""

import html
from collections.abc import Mapping, Sequence

from stockflow.text.escaping import in_a_line, printable

_TABLE = "border-collapse:collapse;margin:0.4em 0"
_LEFT = "text-align:left;padding:0.15em 0.8em 0.15em 0;white-space:nowrap"
_RIGHT = "text-align:right;padding:0.15em 0.8em;font-variant-numeric:tabular-nums"


def block(title: str, *parts: str) -> str:
    """Return a titled block of finished HTML."""
    return f"<div><strong>{html.escape(in_a_line(title))}</strong>{''.join(parts)}</div>"


def facts(pairs: Mapping[str, object]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f'<tr><th scope="row" style="{_LEFT}">{html.escape(name)}</th><td style="{_LEFT}">{_cell(value)}</td></tr>'
        for name, value in pairs.items()
    )
    return f'<table style="{_TABLE}"><tbody>{rows}</tbody></table>'


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table, numbers to the right; nothing if it has no rows."""
    if not rows:
        return ""
    numeric = [all(isinstance(row[place], int | float | None) for row in rows) for place in range(len(columns))]
    styles = [_RIGHT if is_numeric else _LEFT for is_numeric in numeric]
    head = "".join(
        f'<th scope="col" style="{style}">{html.escape(name)}</th>' for name, style in zip(columns, styles, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f'<td style="{style}">{_cell(value)}</td>' for value, style in zip(row, styles, strict=True))
        + "</tr>"
        for row in rows
    )  # fmt: skip
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def lines(text: str) -> str:
    """Return a text as it stands."""
    return f"<pre>{html.escape(printable(text))}</pre>"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(in_a_line(value))
