"""The page: templates filled with what the report says. The home of jinja2.

Charts are tables with coloured cells where cells are what is shown, and SVG drawn by the templates where lengths are;
no plotting library gives pages that are small, need no network, follow the reader's light or dark theme, and read
well with a screen reader. Every word of an output is a stranger's: all of it is escaped, and a content security
policy names the one style and the one script by their digests, so that nothing else could run.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from stockflow.checkpoints.naming import kind_of, layer_of
from stockflow.reports import palette, words
from stockflow.reports.charts import MAX_ROWS, relative_changes
from stockflow.reports.course import MAX_LANES, Course
from stockflow.reports.evidence import Evidence
from stockflow.reports.figures import Heatmap, MergeGeometry, Spread
from stockflow.text.escaping import printable
from stockflow.text.redaction import without_secrets
from stockflow.text.sizes import amount, counted, elapsed, gb, mib
from stockflow.version import __version__

MAX_FILES_LISTED = 600
"""of all inputs together"""
MAX_MODELS = 26
"""in the matrix of cosines, and of curves"""
MAX_REMARKS = 100
MAX_TICKS = 6
MAX_RECIPE_LINES, MAX_RECIPE_WIDTH = 500, 300


@dataclass(frozen=True, slots=True)
class Scale:
    """A run of numbers on a line of 100 %."""

    low: float
    high: float

    def at(self, value: float) -> str:
        """Return where a number lies, in percent."""
        width = self.high - self.low
        place = (value - self.low) / width if width > 0 else 0.5
        return f"{100 * min(max(place, 0.0), 1.0):.2f}%"

    def between(self, left: float, right: float) -> str:
        """Return how long a run is, in percent."""
        width = self.high - self.low
        return f"{100 * min(max((right - left) / width, 0.0), 1.0):.2f}%" if width > 0 else "0%"

    def ticks(self, unit: float = 1.0) -> list[float]:
        """Return round numbers, or round multiples of a unit, to write at the line: at most ``MAX_TICKS``."""
        width = (self.high - self.low) / unit
        if not 0.0 < width < 1e300:
            return [self.low]
        step = round_step(width / MAX_TICKS) * unit
        first = math.ceil(self.low / step - 1e-9)
        numbers = [step * index for index in range(first, first + MAX_TICKS + 1)]
        return [number for number in numbers if number <= self.high + 1e-9 * step]

    def anchor(self, value: float) -> str:
        """Return how text at a number is aligned: so that it stays within the line."""
        place = float(self.at(value)[:-1])
        return "start" if place < 2.0 else "end" if place > 98.0 else "middle"


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from zero, with round numbers to write at it."""

    scale: Scale
    marks: tuple[float, ...]


def rising_axis(largest: float, num: int = 4) -> Axis:
    """Return an axis from zero to a round number that is at least ``largest``."""
    if not 0.0 < largest < 1e300:
        return Axis(Scale(0.0, 1.0), (0.0, 1.0))
    step = round_step(largest / num)
    marks = [step * index for index in range(num + 1) if step * (index - 1) < largest]
    return Axis(Scale(0.0, marks[-1]), tuple(marks))


def round_step(least: float) -> float:
    """Return the smallest round number that is at least ``least``, which is positive."""
    power = 10.0 ** int(f"{least:e}".split("e")[1])
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def time_unit(longest: float) -> float:
    """Return the unit in which times up to ``longest`` are read: a second, a minute, an hour, a day."""
    return next((unit for unit in (86_400.0, 3600.0, 60.0) if longest >= 2 * unit), 1.0)


def render(evidence: Evidence, geometry: MergeGeometry, course: Course) -> str:
    """Return the page of a report."""
    environment = _environment()
    style = environment.get_template("page.css.j2").render(
        themes={theme: _colours(theme) for theme in ("light", "dark")},
        num_columns=len(geometry.layers),
        num_models=len(geometry.letters),
    )
    script = environment.get_template("page.js").render()
    page: str = environment.get_template("page.html.j2").render(
        evidence=evidence,
        manifest=evidence.manifest,
        geometry=geometry,
        course=course,
        style=Markup(style),  # made of our own files and colours; nothing of the output is in it
        script=Markup(script),  # our own file
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'",
        headline=words.headline(evidence),
        verdict=list(words.verdict(geometry)),
        formula_note=words.formula_note(geometry),
        remarks=words.remarks_in_order(evidence),
        recipe=without_secrets(evidence.manifest.recipe),
        limits={
            "files": max(MAX_FILES_LISTED // max(len(evidence.models), 1), 5),
            "lanes": MAX_LANES,
            "remarks": MAX_REMARKS,
            "rows": MAX_ROWS,
        },
        version=__version__,
    )
    return page


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stockflow.reports", "page"),
        autoescape=True,
        finalize=_visible,  # before it is escaped
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "n": words.number,
        "share": words.share,
        "seconds": elapsed,
        "moment": words.moment,
        "amount": amount,
        "name": words.printable,
        "counted": counted,
        "method": words.method_name,
        "fact": words.fact_name,
        "gb": gb,
        "mib": mib,
        "kind": kind_of,
        "layer": layer_of,
        "text": _text,
        "breaking": _breaking,
    }
    environment.globals |= {
        "Scale": Scale,
        "max_models": MAX_MODELS,
        "time_unit": time_unit,
        "rising_axis": rising_axis,
        "shade": shade,
        "shown_layers": shown_layers,
        "spread_scale": spread_scale,
        "largest_change": lambda row: max(relative_changes(row), default=None),
        "layers_words": layers_words,
        "cosine_scale": cosine_scale,
    }
    return environment


def _colours(theme: palette.Theme) -> dict[str, Any]:
    sequential, diverging = palette.sequential(theme), palette.diverging(theme)
    return {
        "tokens": palette.tokens(theme),
        "sequential": [(colour, palette.text_on(colour)) for colour in sequential],
        "diverging": [(colour, palette.text_on(colour)) for colour in diverging],
    }


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(value: str) -> str:
    """Return a stranger's text of several lines as it is shown: without what is not printable."""
    lines = value.splitlines()
    shown = [words.printable(line, MAX_RECIPE_WIDTH) for line in lines[:MAX_RECIPE_LINES]]
    return "\n".join(shown if len(lines) <= MAX_RECIPE_LINES else [*shown, "... (manifest.json has all of it)"])


def _visible(value: Any) -> Any:
    """Spell out what of a stranger's text would not be seen, or turns what is beside it around."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _breaking(name: str) -> Markup:
    """Return a tensor's name as it is shown: where it is too long for its column, it breaks behind a dot."""
    return Markup(".<wbr>").join(escape(part) for part in words.printable(name).split("."))


def shade(heatmap: Heatmap, value: float) -> str:
    """Return the class of the colour that a value has in a heatmap."""
    num = palette.NUM_DIVERGING if heatmap.is_diverging else palette.NUM_SEQUENTIAL
    width = heatmap.high - heatmap.low
    place = (value - heatmap.low) / width if width > 0 else 1.0
    index = min(max(int(place * num), 0), num - 1)
    return f"{'d' if heatmap.is_diverging else 'q'}{index}"


def shown_layers(layers: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which columns of a heatmap are numbered: so many that the numbers do not touch."""
    step = next((step for step in (1, 2, 4, 8, 16, 32) if len(layers) <= 16 * step), 64)
    return [index % step == 0 for index in range(len(layers))]


def layers_words(run: tuple[int, int]) -> str:
    """Return what a column of layers is called."""
    return f"layer {run[0]}" if run[0] == run[1] else f"layers {run[0]} to {run[1]}"


def spread_scale(spreads: Sequence[Spread | None]) -> Scale:
    """Return the scale on which several spreads are drawn: 0 to 1, and farther if they are."""
    known = [found for found in spreads if found]
    return Scale(
        min([0.0, *(max(found.low, -10.0) for found in known)]),
        max([1.0, *(min(found.high, 10.0) for found in known)]),
    )


def cosine_scale(geometry: MergeGeometry) -> Heatmap:
    """Return the scale of the cosines between whole models: that of the layers where there is one."""
    if geometry.cosine_map:
        return geometry.cosine_map
    return Heatmap((), (), -1.0, 1.0, is_diverging=True)
