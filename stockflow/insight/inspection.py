"""What ``stockflow inspect`` found: the statistics of a merge without the merge, in numbers and in words.

A tensor's row is its Gram: |w_0|^2 and the products of its task vectors, in float64, added in the order in which a
merge adds them. Cosines, norms, angles and ratios follow from it; sums of Grams are the Grams of several tensors
together, which is how layers, kinds and whole models are compared.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stockflow.checkpoints.naming import KINDS, kind_of, layer_of
from stockflow.engine.facts import ROUNDING_NOISE
from stockflow.engine.survey import Look
from stockflow.kernels.arrays import Floats
from stockflow.methods.ratios import RATIOS, Geometry, cosine_matrix, finite, pairs, unpacked
from stockflow.planning.job import TensorJob
from stockflow.planning.plan import CheckpointRef
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.sizes import counted, gb, share
from stockflow.text.tables import grid

FORMAT = "stockflow-inspection-1"
MAX_LAYER_LINES = 40
"""More layers than this are shown several to a line."""
MAX_MATRIX = 12
MAX_NAMED = 3
NOTABLE = {
    "unchanged": "unchanged in every model: a merge copies them from the base",
    "zero_delta": "unchanged in at least one model, whose pairs count as cosine 0",
    "would_clamp": "with a negative mean cosine: Model Stock keeps the base there, mergekit leaves the models behind",
    "degenerate": "whose task vectors cancel: no ratio exists",
    ROUNDING_NOISE: "of which a model changes less than rounding to codes does: cosines below the floor say nothing",
    "nonfinite": "with NaN or infinity in some model: nothing can be said of them",
    "copied": "without statistics: integers, empty, named in a rule that copies, or not of one shape everywhere",
}
NOISE = ("rounding_signal", "cosine_floor")
"""What rows have of the error of codes."""
ROWS_AT_ONCE = 2048
"""Tensors whose rows are plain Python values at a time: with 16 models one has 300 numbers."""


@dataclass(frozen=True)
class Subject:
    """A tensor, and how the recipe merges it."""

    planned: TensorJob
    look: Look | None
    """what is read of it; None where there is nothing to compare"""

    @property
    def name(self) -> str:
        """Its name."""
        return self.planned.output.name

    @cached_property
    def kind(self) -> str:
        """See ``naming``."""
        return kind_of(self.name)

    @cached_property
    def layer(self) -> int | None:
        """See ``naming``."""
        return layer_of(self.name)


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    checkpoints: tuple[CheckpointRef, ...]
    """base first"""
    subjects: Sequence[Subject]
    packed_TQ: Floats
    """a Gram per tensor; NaN where there is nothing to compare"""
    noise: Sequence[Mapping[str, float | None]]
    """facts of the error of codes, per tensor (``engine.noise``)"""
    num_bytes_read: int
    seconds: float

    @property
    def num_tuned(self) -> int:
        """N, the number of tuned models."""
        return len(self.checkpoints) - 1

    @cached_property
    def compared(self) -> list[int]:
        """Numbers of the tensors that have finite statistics."""
        finite_T = np.asarray(np.isfinite(self.packed_TQ).all(axis=1))
        return np.flatnonzero(finite_T).tolist()

    def geometry(self, numbers: Sequence[int]) -> Geometry:
        """Return the geometry of some tensors, each a group."""
        return Geometry(unpacked(self.packed_TQ[list(numbers)], self.num_tuned))

    def pooled(self, numbers: Sequence[int]) -> Geometry:
        """Return the geometry of some tensors taken together, as if they were one."""
        return Geometry(unpacked(self.packed_TQ[list(numbers)].sum(axis=0, keepdims=True), self.num_tuned))

    @cached_property
    def ratios(self) -> Mapping[str, Floats]:
        """Every reading of the ratio, per tensor; NaN where there is none."""
        found = {name: np.full(len(self.subjects), np.nan) for name in RATIOS}
        for numbers in _portions(self.compared):
            geometry = self.geometry(numbers)
            for name in RATIOS:
                found[name][numbers] = geometry.ratio(name)
        return found

    def floor(self, numbers: Sequence[int]) -> float | None:
        """Return the floor of the cosine of some tensors together: those of each, by the squares of their changes."""
        with_floor = [number for number in numbers if self.noise[number].get("cosine_floor") is not None]
        if not with_floor:
            return None
        squares_T = (self.geometry(numbers).gram.delta_norms_GN ** 2).sum(axis=1)
        floors_T = np.array([self.noise[number].get("cosine_floor") or 0.0 for number in numbers])
        total = float(squares_T.sum())
        return float(floors_T @ squares_T) / total if total else None

    @cached_property
    def flagged(self) -> Mapping[str, list[int]]:
        """Numbers of the tensors that carry each flag."""
        flagged: dict[str, list[int]] = {}
        for numbers in _portions(self.compared):
            for name, flags_G in self.geometry(numbers).flags().items():
                flagged.setdefault(name, []).extend(np.array(numbers)[flags_G].tolist())
        read = [number for number, subject in enumerate(self.subjects) if subject.look]
        signals = {number: self.noise[number].get("rounding_signal") for number in self.compared}
        flagged[ROUNDING_NOISE] = [number for number, signal in signals.items() if signal is not None and signal < 1]
        flagged["nonfinite"] = sorted(set(read) - set(self.compared))
        flagged["copied"] = sorted(set(range(len(self.subjects))) - set(read))
        return flagged

    def groups(self, key: Callable[[Subject], Any]) -> dict[Any, list[int]]:
        """Return the numbers of the tensors that have statistics, by what ``key`` says of them."""
        found: dict[Any, list[int]] = {}
        for number in self.compared:
            found.setdefault(key(self.subjects[number]), []).append(number)
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row of plain values per tensor, in the order of the checkpoint."""
        flags_of: dict[int, list[str]] = {}
        for name, numbers in sorted(self.flagged.items()):
            for number in numbers:
                flags_of.setdefault(number, []).append(name)
        compared = set(self.compared)
        for numbers in _portions(range(len(self.subjects))):
            found = dict(zip(*self._statistics([n for n in numbers if n in compared]), strict=True))
            for number in numbers:
                yield {
                    **_identity(self.subjects[number]),
                    **found.get(number, NO_STATISTICS),
                    **{name: self.noise[number].get(name) for name in NOISE},
                    "flags": flags_of.get(number, []),
                }

    def facts(self) -> dict[str, Any]:
        """Return what `stockflow inspect --json` prints."""
        return summary(self) | {"tensors": list(self.rows())}

    def __str__(self) -> str:
        return "\n".join(inspection_lines(self))

    def _statistics(self, numbers: Sequence[int]) -> tuple[Sequence[int], list[dict[str, Any]]]:
        if not numbers:
            return [], []
        geometry = self.geometry(numbers)
        columns: dict[str, list[Any]] = {
            "base_norm": geometry.gram.base_norm_G.tolist(),
            "delta_norms": geometry.gram.delta_norms_GN.tolist(),
            "cosines": geometry.cosines_GP.tolist(),
            "angles": geometry.angles_GP.tolist(),
            "mean_cosine": [finite(value) for value in geometry.mean_cosine_G],
            **{f"ratio_{name}": [finite(value) for value in self.ratios[name][list(numbers)]] for name in RATIOS},
        }
        return numbers, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


NO_STATISTICS: dict[str, Any] = {
    "base_norm": None, "delta_norms": [], "cosines": [], "angles": [], "mean_cosine": None,
    **{f"ratio_{name}": None for name in RATIOS},
}  # fmt: skip


def _identity(subject: Subject) -> dict[str, Any]:
    spec = subject.planned.output
    return {
        "name": subject.name,
        "kind": subject.kind,
        "layer": subject.layer,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "num_elems": spec.num_elems,
        "method": subject.planned.result.method,
    }


def _portions(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        yield list(numbers[start : start + ROWS_AT_ONCE])


def summary(inspection: Inspection) -> dict[str, Any]:
    """Return what goes before the rows: models, pairs, and the tensors pooled by kind, by layer and as a whole."""
    layers = sorted(inspection.groups(lambda subject: subject.layer).items(), key=lambda item: (item[0] is None, item))
    kinds = inspection.groups(lambda subject: subject.kind)
    return {
        "format": FORMAT,
        "base": redact(inspection.checkpoints[0].url),
        "models": [redact(ref.url) for ref in inspection.checkpoints[1:]],
        "pairs": [list(pair) for pair in pairs(inspection.num_tuned)],
        "num_tensors": len(inspection.subjects),
        "bytes_read": inspection.num_bytes_read,
        "seconds": inspection.seconds,
        "flags": {name: len(numbers) for name, numbers in sorted(inspection.flagged.items())},
        "all": pooled_facts(inspection, inspection.compared),
        "kinds": {kind: pooled_facts(inspection, numbers) for kind, numbers in kinds.items()},
        "layers": [{"layer": layer, **pooled_facts(inspection, numbers)} for layer, numbers in layers],
    }


def pooled_facts(inspection: Inspection, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the statistics of some tensors together, and the spread of their ratios."""
    if not numbers:
        return {"tensors": 0, "num_elems": 0}
    pooled = inspection.pooled(numbers)
    facts: dict[str, Any] = {
        "tensors": len(numbers),
        "num_elems": sum(inspection.subjects[number].planned.output.num_elems for number in numbers),
        "base_norm": float(pooled.gram.base_norm_G[0]),
        "delta_norms": pooled.gram.delta_norms_GN[0].tolist(),
        "cosines": pooled.cosines_GP[0].tolist(),
        "mean_cosine": finite(pooled.mean_cosine_G[0]),
        "cosine_floor": inspection.floor(numbers),
    }
    for name in RATIOS:
        found = inspection.ratios[name][list(numbers)]
        found = found[np.isfinite(found)]
        spread = np.quantile(found, [0.0, 0.5, 1.0]).tolist() if len(found) else [None] * 3
        facts[f"ratio_{name}"] = dict(zip(("min", "median", "max"), spread, strict=True))
    return facts


def json_parts(inspection: Inspection) -> Iterator[str]:
    """Yield inspect.json, piece by piece: the summary, and one line per tensor."""
    head = json.dumps(summary(inspection), indent=1, ensure_ascii=False)
    yield head.removesuffix("\n}") + ',\n "tensors": ['
    separator = "\n"
    for row in inspection.rows():
        yield f"{separator}  {json.dumps(row, ensure_ascii=False)}"
        separator = ",\n"
    yield "\n ]\n}\n"


def inspection_lines(inspection: Inspection) -> Iterator[str]:
    """Yield the summary, line by line."""
    num_elems = sum(inspection.subjects[number].planned.output.num_elems for number in inspection.compared)
    yield (
        f"inspected {len(inspection.compared):,} of {counted(len(inspection.subjects), 'tensor')} "
        f"({counted(num_elems, 'parameter', cut=True)}) in {inspection.seconds:.1f} s; "
        f"read {gb(inspection.num_bytes_read)}"
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


FLOOR = "floor"
HEADS = (
    "tensors",
    "params",
    "|d| / |w0|",
    "cosine",
    FLOOR,
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
    yield from grid(_with_floors(inspection, table))


def _with_floors(inspection: Inspection, table: list[list[str]]) -> list[list[str]]:
    """Return a table without the floors of cosines, if there are none."""
    if any(each.get("cosine_floor") is not None for each in inspection.noise):
        return table
    place = table[0].index(FLOOR)
    return [[*row[:place], *row[place + 1 :]] for row in table]


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
    yield from grid(_with_floors(inspection, table))


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
        f"{floor:.3f}" if (floor := inspection.floor(numbers)) is not None else "",
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
            names = some([inspection.subjects[number].name for number in numbers], MAX_NAMED, in_a_line)
            yield f"{counted(len(numbers), 'tensor')} {words} ({names})"
    if inspection.num_tuned > 2:
        yield (
            "t is N cos / (1 + (N - 1) cos), cos the mean over all pairs; the last three columns are what other tools "
            "take for t (docs/insight.md#inspect)"
        )


def middle(values: Floats) -> str:
    """Return the median as it goes into a table; nothing if there is none."""
    return f"{np.median(values):.3f}" if len(values) else ""


def _finite(values: Any) -> Floats:
    found: Floats = values[np.isfinite(values)]
    return found
