"""An inspection in words, for a terminal: the models among each other, then by kind, then by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stockflow.checkpoints.naming import KINDS
from stockflow.insight.inspection import Inspection, Subject
from stockflow.kernels.arrays import Floats
from stockflow.methods.ratios import cosine_matrix
from stockflow.planning.budget import gb
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line

MAX_LAYER_LINES = 40
"""More layers than this are shown several to a line."""
MAX_MATRIX = 12
MAX_NAMED = 3
NOTABLE = {
    "unchanged": "unchanged in every model: a merge copies them from the base",
    "zero_delta": "unchanged in at least one model, whose pairs count as cosine 0",
    "would_clamp": "with a negative mean cosine: Model Stock keeps the base there, mergekit leaves the models behind",
    "degenerate": "whose task vectors cancel: no ratio exists",
    "nonfinite": "with NaN or infinity in some model: nothing can be said of them",
    "copied": "without statistics: integers, empty, named in a rule that copies, or not of one shape everywhere",
}


def inspection_lines(inspection: Inspection) -> Iterator[str]:
    """Yield the summary, line by line."""
    num_elems = sum(inspection.subjects[number].planned.output.num_elems for number in inspection.compared)
    yield (
        f"inspected {len(inspection.compared)} of {len(inspection.subjects)} tensors ({num_elems / 1e9:.3g} B "
        f"parameters) in {inspection.seconds:.1f} s; read {gb(inspection.num_bytes_read)}"
    )
    yield from _models(inspection)
    if inspection.compared:
        yield ""
        yield from _by_kind(inspection)
        yield ""
        yield from _by_layer(inspection)
    yield ""
    yield from _notable(inspection)


def _models(inspection: Inspection) -> Iterator[str]:
    """One line per model: where it is, how far it went from the base, its cosines with the others."""
    yield f"  base {redact(inspection.checkpoints[0].url)}"
    if not inspection.compared:
        return
    pooled, num_tuned = inspection.pooled(inspection.compared), inspection.num_tuned
    norms_N, base_norm = pooled.gram.delta_norms_GN[0], float(pooled.gram.base_norm_G[0])
    with_matrix = 2 <= num_tuned <= MAX_MATRIX
    matrix = cosine_matrix(pooled.cosines_GP[0].tolist(), num_tuned)
    table = [["", "|d| / |w0|", *(str(number + 1) for number in range(num_tuned) if with_matrix), ""]]
    for number, ref in enumerate(inspection.checkpoints[1:]):
        cosines = [f"{cosine:.3f}" for cosine in matrix[number]] if with_matrix else []
        table.append([str(number + 1), share(norms_N[number] / base_norm), *cosines, redact(ref.url)])
    if with_matrix:
        yield "cosines of the task vectors, all tensors together"
    yield from grid(table, left=(len(table[0]) - 1,))


HEADS = (
    "tensors",
    "params",
    "|d| / |w0|",
    "cosine",
    "angle",
    "t",
    "t from - to",
    "2-model t",
    "mean-angle",
    "adjacent",
)


def _by_kind(inspection: Inspection) -> Iterator[str]:
    groups = inspection.groups(lambda subject: subject.kind)
    table = [["kind", *HEADS]]
    table += [[kind, *_cells(inspection, groups[kind])] for kind in KINDS if kind in groups]
    yield from grid(table, left=(0,))


def _by_layer(inspection: Inspection) -> Iterator[str]:
    layers = sorted({subject.layer for subject in inspection.subjects if subject.layer is not None})
    per_line = -(-len(layers) // MAX_LAYER_LINES) if layers else 1

    def line_of(subject: Subject) -> int:
        return -1 if subject.layer is None else layers.index(subject.layer) // per_line

    table = [["layer", *HEADS]]
    for line, numbers in sorted(inspection.groups(line_of).items()):
        together = layers[line * per_line : (line + 1) * per_line] if line >= 0 else []
        first_last = dict.fromkeys(str(layer) for layer in (*together[:1], *together[-1:]))
        table.append(["-".join(first_last) or "none", *_cells(inspection, numbers)])
    yield from grid(table, left=(0,))


def _cells(inspection: Inspection, numbers: Sequence[int]) -> list[str]:
    pooled = inspection.pooled(numbers)
    num_elems = sum(inspection.subjects[number].planned.output.num_elems for number in numbers)
    drift, base_norm = float(np.mean(pooled.gram.delta_norms_GN[0])), float(pooled.gram.base_norm_G[0])
    ratios_T = _finite(inspection.ratios["exact"][list(numbers)])
    extremes = f"{ratios_T.min():.3f} - {ratios_T.max():.3f}" if len(ratios_T) else ""
    others = (_finite(inspection.ratios[name][list(numbers)]) for name in ("two_model", "mean_angle", "adjacent"))
    cosine = float(pooled.mean_cosine_G[0])
    return [
        f"{len(numbers):,}",
        f"{num_elems:,}" if num_elems < 1e6 else f"{num_elems / 1e6:,.1f} M",
        share(drift / base_norm) if base_norm else "",
        f"{cosine:.3f}" if np.isfinite(cosine) else "",
        f"{np.degrees(np.arccos(cosine)):.1f}°" if np.isfinite(cosine) else "",
        middle(ratios_T),
        extremes,
        *map(middle, others),
    ]


def _notable(inspection: Inspection) -> Iterator[str]:
    for flag, words in NOTABLE.items():
        numbers = inspection.flagged.get(flag, [])
        if flag == "zero_delta":
            unchanged = set(inspection.flagged.get("unchanged", []))
            numbers = [number for number in numbers if number not in unchanged]
        if numbers:
            names = ", ".join(in_a_line(inspection.subjects[number].name) for number in numbers[:MAX_NAMED])
            more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
            yield f"{len(numbers)} tensors {words} ({names}{more})"
    if inspection.num_tuned > 2:
        yield (
            "t is N cos / (1 + (N - 1) cos), cos the mean over all pairs; the last three columns are what other tools "
            "take for t (docs/insight.md#inspect)"
        )


def grid(rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> Iterator[str]:
    """Yield rows of cells as lines, columns aligned: to the right, those in ``left`` to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()


def share(value: float) -> str:
    """Return a share in percent, with two digits that count."""
    percent = 100.0 * value
    if not percent or abs(percent) >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.2g} %" if abs(percent) >= 0.001 else f"{percent:.1e} %"


def middle(values: Floats) -> str:
    """Return the median as it goes into a table; nothing if there is none."""
    return f"{np.median(values):.3f}" if len(values) else ""


def _finite(values: Any) -> Floats:
    found: Floats = values[np.isfinite(values)]
    return found
