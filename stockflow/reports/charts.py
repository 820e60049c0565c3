"""Makes the figures of a report from the rows of facts: by kind, by layer, by pair of models."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from stockflow.checkpoints.naming import KINDS, kind_of, layer_of
from stockflow.output.receipts import TensorFacts
from stockflow.reports.evidence import Evidence
from stockflow.reports.figures import (
    Cell,
    Change,
    FactSummary,
    Heatmap,
    Histogram,
    KindSummary,
    Line,
    MergeGeometry,
    Notable,
    Outside,
    Spread,
)

MAX_PARTS = 24
"""Lines of a heatmap; with more, kinds are shown instead of parts."""
COUNTS_OF_GROUPS = ("groups", "clamped_groups")
"""Facts that say how a tensor was divided."""
MAX_LAYERS = 256
"""Columns of a heatmap; with more, neighbouring layers share one."""
NUM_BINS = 40
NUM_PER_REASON = 6
"""Tensors named for each reason to look at one."""
MAX_ROWS = 2000
"""Tensors a page lists; a page of all 92,000 of a large model would be one of 30 MB."""

LARGEST_ROUNDED = 1e6
"""Ends of a scale beyond this are no ratio; they are shown as they are."""

_kind_of, _layer_of = lru_cache(maxsize=2**17)(kind_of), lru_cache(maxsize=2**17)(layer_of)
"""Every chart asks them of every tensor."""

Measure = Callable[[TensorFacts], float | None]


def geometry_of(evidence: Evidence) -> MergeGeometry:
    """Return the geometry of a merge."""
    rows, letters = evidence.rows, tuple(model.letter for model in evidence.tuned)
    columns = _columns(rows)
    matrix, norms = _models_matrix(evidence.manifest.gram, len(evidence.manifest.inputs))
    notable = tuple(_notable(rows))
    return MergeGeometry(
        kinds=tuple(_kinds(rows)),
        method_facts=tuple(_method_facts(rows)),
        ratio_map=_heatmap(rows, columns, _ratio),
        cosine_map=_heatmap(rows, columns, _cosine),
        outside=tuple(_outside(rows)),
        ratios=_histogram([row.ratio for row in rows]),
        cosines=_histogram([row.mean_cosine for row in rows]),
        layers=columns,
        changes=tuple(_changes(_of_all_models(evidence), columns, letters)),
        letters=letters,
        matrix=matrix,
        norms=norms,
        notable=notable,
        listed=_listed(rows, notable),
        num_rows=len(rows),
    )


def _ratio(row: TensorFacts) -> float | None:
    return row.ratio


def _cosine(row: TensorFacts) -> float | None:
    return row.mean_cosine


def relative_changes(row: TensorFacts) -> tuple[float, ...]:
    """Return |d_i| / |w_0| per model; nothing where the norms are not known or the base is zero."""
    base_norm = row.base_norm
    if base_norm is None or base_norm <= 0.0:
        return ()
    changes = tuple(norm / base_norm for norm in row.delta_norms)
    return changes if all(map(math.isfinite, changes)) else ()


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return how the numbers that are there are spread, None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(len(known), *map(float, np.percentile(known, [0, 25, 50, 75, 100])))


def _median(values: Iterable[float | None]) -> float | None:
    found = spread(values)
    return found.median if found else None


def _kinds(rows: Sequence[TensorFacts]) -> Iterator[KindSummary]:
    by_kind: dict[str, list[TensorFacts]] = {kind: [] for kind in KINDS}
    for row in rows:
        by_kind[_kind_of(row.name)].append(row)
    for kind, members in (*by_kind.items(), ("all", rows)):
        if members or kind == "all":
            yield KindSummary(
                kind,
                len(members),
                sum(row.num_parameters for row in members),
                spread(row.ratio for row in members),
                spread(row.mean_cosine for row in members),
                spread(change for row in members for change in relative_changes(row)),
                *(sum(flag in row.flags for row in members) for flag in ("clamped", "zero_delta", "copied")),
            )


def _method_facts(rows: Sequence[TensorFacts]) -> Iterator[FactSummary]:
    """Yield what methods say beside the columns of the table, by name, as many names as a report has room for."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.facts.items():
            if name not in COUNTS_OF_GROUPS and math.isfinite(value) and (name in found or len(found) < MAX_PARTS):
                found.setdefault(name, []).append(value)
    for name, values in found.items():
        spread_of_all = spread(values)
        assert spread_of_all is not None
        yield FactSummary(name, spread_of_all)


# By layer


def _columns(rows: Sequence[TensorFacts]) -> tuple[tuple[int, int], ...]:
    """Return the runs of layers that are shown side by side."""
    layers = sorted({layer for row in rows if (layer := _layer_of(row.name)) is not None})
    width = -(-len(layers) // MAX_LAYERS) or 1
    runs = [layers[start : start + width] for start in range(0, len(layers), width)]
    return tuple((run[0], run[-1]) for run in runs)


def part_of(name: str) -> str:
    """Return a tensor's name with every number in it replaced: equal for the same part of all layers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split(".")).removesuffix(".weight")


def _parts(rows: Sequence[TensorFacts]) -> dict[str, str]:
    """Return what each tensor in a layer is called on the left of a heatmap: its part, or its kind if there are many.

    What all parts begin with, such as ``model.layers.*``, is left out.
    """
    in_layers = [row.name for row in rows if _layer_of(row.name) is not None]
    parts = {name: part_of(name) for name in in_layers}
    distinct = set(parts.values())
    if len(distinct) > MAX_PARTS:
        return {name: _kind_of(name) for name in in_layers}
    heads = {part.split("*.", 1)[0] for part in distinct}
    if len(heads) == 1:
        return {name: part.split("*.", 1)[-1] for name, part in parts.items()}
    return parts


def _heatmap(rows: Sequence[TensorFacts], columns: Sequence[tuple[int, int]], measure: Measure) -> Heatmap | None:
    measured = [row for row in rows if measure(row) is not None and _layer_of(row.name) is not None]
    if not measured:
        return None
    parts = _parts(measured)
    place = {layer: index for index, (first, last) in enumerate(columns) for layer in range(first, last + 1)}
    members: dict[tuple[str, str], dict[int, list[TensorFacts]]] = defaultdict(lambda: defaultdict(list))
    for row in measured:
        layer = _layer_of(row.name)
        assert layer is not None
        members[_kind_of(row.name), parts[row.name]][place[layer]].append(row)
    ordered = sorted(members.items(), key=lambda item: KINDS.index(item[0][0]))  # else in the order of the model
    lines = tuple(
        Line(part, kind, tuple(_cell(by_column.get(index, ()), measure) for index in range(len(columns))))
        for (kind, part), by_column in ordered
    )
    values = [cell.value for line in lines for cell in line.cells if cell]
    low, high = min(values), max(values)
    if low < 0.0:
        most = _rounded_up(max(-low, high), 0.1)
        return Heatmap(tuple(columns), lines, -most, most, is_diverging=True)
    step = 0.1 if high - low > 0.2 else 0.02
    low = _rounded_down(low, step)
    return Heatmap(tuple(columns), lines, low, max(_rounded_up(high, step), low + step), is_diverging=False)


def _cell(members: Sequence[TensorFacts], measure: Measure) -> Cell | None:
    found = spread(measure(row) for row in members)
    if found is None:
        return None
    num_clamped = sum("clamped" in row.flags for row in members)
    return Cell(found.median, found.low, found.high, found.count, num_clamped)


def _rounded_down(value: float, step: float) -> float:
    return value if abs(value) > LARGEST_ROUNDED else round(math.floor(value / step + 1e-9) * step, 6)


def _rounded_up(value: float, step: float) -> float:
    return value if abs(value) > LARGEST_ROUNDED else round(math.ceil(value / step - 1e-9) * step, 6)


def _outside(rows: Sequence[TensorFacts]) -> Iterator[Outside]:
    """Yield the tensors in no layer that were decided by their geometry."""
    groups: dict[str, list[TensorFacts]] = defaultdict(list)
    for row in rows:
        if _layer_of(row.name) is None and (row.ratio is not None or row.mean_cosine is not None):
            groups[part_of(row.name)].append(row)
    for part, members in list(groups.items())[:MAX_PARTS]:
        ratio, cosine = (_median(map(measure, members)) for measure in (_ratio, _cosine))
        yield Outside(part, _kind_of(members[0].name), len(members), ratio, cosine)


def _of_all_models(evidence: Evidence) -> Sequence[TensorFacts]:
    """The rows whose norms are those of all models in their order; slices may take other ones."""
    if evidence.plan is None or not evidence.plan.is_stacked:
        return evidence.rows
    every = tuple(range(len(evidence.manifest.inputs)))
    whole = {
        job.output.name
        for job in evidence.plan.jobs
        if tuple(operand.checkpoint for operand in job.reading.operands) == every
    }
    return [row for row in evidence.rows if row.name in whole]


def _changes(
    rows: Sequence[TensorFacts], columns: Sequence[tuple[int, int]], letters: Sequence[str]
) -> Iterator[Change]:
    """Yield how far each model went from the base, relative to it: norms of all tensors of a layer together."""
    known = [row for row in rows if len(relative_changes(row)) == len(letters)]
    place = {layer: index for index, (first, last) in enumerate(columns) for layer in range(first, last + 1)}
    largest = max((norm for row in known for norm in (row.base_norm or 0.0, *row.delta_norms)), default=0.0)
    if not largest:
        return
    # Only shares matter; of the largest one, squares neither overflow nor vanish together.
    squares = (np.array([[row.base_norm or 0.0, *row.delta_norms] for row in known]) / largest) ** 2
    by_column = np.zeros((len(columns), 1 + len(letters)))
    for row, square in zip(known, squares, strict=True):
        layer = _layer_of(row.name)
        if layer is not None:
            by_column[place[layer]] += square
    total = squares.sum(axis=0)
    for index, letter in enumerate(letters, start=1):
        values = [math.sqrt(column[index] / column[0]) if column[0] else None for column in by_column]
        yield Change(letter, tuple(values), math.sqrt(total[index] / total[0]) if total[0] else None)


# Distributions and models


def _histogram(values: Iterable[float | None]) -> Histogram | None:
    known = np.array([value for value in values if value is not None and abs(value) <= LARGEST_ROUNDED])
    if len(known) < 2:
        return None
    low, high = _rounded_down(float(known.min()), 0.05), _rounded_up(float(known.max()), 0.05)
    counts, edges = np.histogram(known, bins=NUM_BINS, range=(low, max(high, low + 0.05)))
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)), float(np.median(known)))


def _models_matrix(
    gram: Sequence[Sequence[float]], num_inputs: int
) -> tuple[tuple[tuple[float | None, ...], ...], tuple[float, ...]]:
    """Return cosines and norms of whole models; nothing if no sound Gram is on record."""
    if (
        len(gram) != num_inputs
        or any(len(row) != num_inputs for row in gram)
        or any(g[i] < 0 for i, g in enumerate(gram))
    ):
        return (), ()
    norms = tuple(math.sqrt(row[index]) for index, row in enumerate(gram))

    def cosine(i: int, j: int) -> float | None:
        if not norms[i] or not norms[j]:
            return None
        return 1.0 if i == j else max(-1.0, min(1.0, gram[i][j] / norms[i] / norms[j]))

    places = range(1, num_inputs)
    return tuple(tuple(cosine(i, j) for j in places) for i in places), norms


# Tensors


def _notable(rows: Sequence[TensorFacts]) -> Iterator[Notable]:
    """Yield tensors worth a look: of each reason the strongest, the gravest reason first."""
    reasons: dict[int, list[str]] = defaultdict(list)

    def pick(reason: Callable[[TensorFacts], str], strength: Measure) -> None:
        found = [(value, index) for index, row in enumerate(rows) if (value := strength(row)) is not None]
        for _, index in sorted(found, key=lambda item: (-item[0], item[1]))[:NUM_PER_REASON]:
            reasons[index].append(reason(rows[index]))

    pick(_clamped_words, lambda row: -(row.mean_cosine or 0.0) if "clamped" in row.flags else None)
    pick(lambda _: "unchanged in a model", lambda row: row.num_elems if "zero_delta" in row.flags else None)
    pick(lambda _: "lowest t", lambda row: None if row.ratio is None or "clamped" in row.flags else -row.ratio)
    pick(lambda _: "largest change", lambda row: max(relative_changes(row), default=None))
    pick(lambda _: "uneven changes", _unevenness)
    pick(lambda _: "formula matters", _formula_gap)
    for index, words in reasons.items():
        yield Notable(rows[index], tuple(words))


def _clamped_words(row: TensorFacts) -> str:
    groups, clamped = row.facts.get("groups"), row.facts.get("clamped_groups")
    return f"clamped in {clamped:,.0f} of {groups:,.0f} groups" if groups and clamped else "clamped"


def _unevenness(row: TensorFacts) -> float | None:
    """How many times farther one model went than another, if at least three times."""
    norms = row.delta_norms
    if len(norms) < 2 or not min(norms):
        return None
    share = max(norms) / min(norms)
    return share if share >= 3.0 else None


def _formula_gap(row: TensorFacts) -> float | None:
    """How far the two-model formula is off, if noticeably."""
    if row.ratio is None or row.legacy_ratio is None:
        return None
    gap = abs(row.ratio - row.legacy_ratio)
    return gap if gap >= 0.01 else None


def _listed(rows: Sequence[TensorFacts], notable: Sequence[Notable]) -> tuple[TensorFacts, ...]:
    if len(rows) <= MAX_ROWS:
        return tuple(rows)
    first = [one.row for one in notable]
    names = {row.name for row in first}
    rest = [row for row in rows if row.name not in names]
    rest.sort(key=lambda row: math.inf if row.ratio is None else row.ratio)
    return (*first, *rest[: MAX_ROWS - len(first)])
