"""What an audit learns of a tensor, span by span: its Gram, the noise of rounding it, whose formula its bits follow.

Shape suffixes: M sources, N tuned models, G groups, K formulas, C candidates (formulas of different t), E elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stockflow.checkpoints.files.header import DTYPES
from stockflow.engine.arithmetic import Weighted
from stockflow.engine.pieces import LoadedPiece, Piece
from stockflow.engine.procedures.linear import GramSweep
from stockflow.engine.procedures.proceeding import MapSpans, Tools, swept
from stockflow.engine.survey import Examiner, Look
from stockflow.engine.units import Unit, spans_of
from stockflow.insight.formulas import (
    FORMULAS,
    GRAM_PRECISION,
    ROUNDINGS_OF_A_TOOL,
    SAME_RATIO,
    SECONDARY,
    TensorEvidence,
    decide,
    ratio_errors,
    ratios_of,
)
from stockflow.insight.steps import StepsSweep, as_stored
from stockflow.kernels.arrays import Floats
from stockflow.kernels.roundings import (
    count_roundings,
    patterns_in,
    squared_steps,
)
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import FLOAT_BYTES
from stockflow.methods.ratios import Geometry, finite
from stockflow.planning.job import Reading, TensorJob
from stockflow.planning.operands import Operand
from stockflow.planning.working_precision import FloatBits

NONFINITE, MERGE_NONFINITE = "nonfinite", "nonfinite_merge"
"""Flags: NaN or infinity in a model; in the merge, and in no model."""
EXACT, TWO_MODEL, EXTRAPOLATED = (FORMULAS.index(name) for name in ("exact", "two_model", "extrapolated"))


def correct_formula(job: TensorJob) -> int:
    """Return which formula the recipe asks for: with ``on_negative: extrapolate`` it is that one."""
    return EXTRAPOLATED if job.result.parameters.shared.get("on_negative") == "extrapolate" else EXACT


@dataclass
class Tally:
    """What is known of a unit or, added up, of a tensor. Squares are sums over its elements."""

    is_finite: bool = True
    are_models_finite: bool = True
    num_groups: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    mean_squared: float = 0.0
    """|d|^2 of the mean task vector"""
    update_squared: float = 0.0
    """(t |d|)^2 with the correct t"""
    old_squared: float = 0.0
    """squared difference of the old formula's result and the correct one"""
    steps_squared: float = 0.0
    """squared distances of representable numbers"""
    ratios_K: Floats = field(default_factory=lambda: np.zeros(len(FORMULAS)))
    """sums of t, and of t |d|^2"""
    weighted_ratios_K: Floats = field(default_factory=lambda: np.zeros(len(FORMULAS)))
    merged_squared: float = 0.0
    """|m - w_0|^2"""
    merged_times_mean: float = 0.0
    off_ray_squared: float = 0.0
    """what no t explains"""
    distances_K: Floats = field(default_factory=lambda: np.zeros(len(FORMULAS)))
    """|m - w_0 - t d|^2"""
    deltas_NN: Any = 0.0
    merged_times_deltas_N: Any = 0.0
    contenders_K: npt.NDArray[np.bool_] = field(default_factory=lambda: np.ones(len(FORMULAS), np.bool_))
    same_KK: npt.NDArray[np.bool_] = field(default_factory=lambda: np.ones((len(FORMULAS),) * 2, np.bool_))
    equal_K: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(FORMULAS), np.int64))
    roundings_K: Floats = field(default_factory=lambda: np.zeros(len(FORMULAS)))
    most_K: Floats = field(default_factory=lambda: np.zeros(len(FORMULAS)))
    nearer_KK: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(FORMULAS),) * 2, np.int64))

    def add(self, other: "Tally") -> None:
        """Count another unit in."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if name == "flags":
                self.flags = {key: self.flags.get(key, 0) + value.get(key, 0) for key in {*self.flags, *value}}
            elif name in ("is_finite", "are_models_finite", "contenders_K", "same_KK"):
                setattr(self, name, mine & value)
            elif name == "most_K":
                self.most_K = np.maximum(mine, value)
            else:
                setattr(self, name, mine + value)


@dataclass(frozen=True)
class AuditExaminer(Examiner):
    """Holds tensors against the formulas; with ``has_merged`` the last source is the merged tensor."""

    has_merged: bool

    @property
    def num_sweeps(self) -> int:
        """Twice where there is something to compare: the ratios must be known first."""
        return 2 if self.has_merged else 1

    def span_bytes(self, look: Look, num_elems: int) -> int:
        """Return what the results of all formulas take."""
        return len(FORMULAS) * num_elems * DTYPES[rounded_to(look)].bits // 8 if self.has_merged else 0

    def state_bytes(self, look: Look, num_groups: int) -> int:
        """Return the size of the products."""
        return num_groups * len(look.reading.operands) ** 2 * FLOAT_BYTES

    def examine(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> Tally:
        """Return what one unit says."""
        products_GMM, steps_squared = self._products(look, unit, tools, map_spans)
        tally = Tally(num_groups=len(products_GMM), steps_squared=steps_squared)
        models = Gram(products_GMM[:, :-1, :-1] if self.has_merged else products_GMM)
        tally.is_finite = bool(np.isfinite(products_GMM).all())
        tally.are_models_finite = bool(np.isfinite(models.products_GMM).all())
        candidates: list[int] = []
        ratios_KG = np.zeros((len(FORMULAS), len(products_GMM)))
        if tally.is_finite:
            correct = correct_formula(planned_of(look))
            ratios_KG = ratios_of(Geometry(models))
            self._tally_models(tally, models, correct, ratios_KG)
            if self.has_merged:
                self._tally_merged(tally, rounded_to(look), products_GMM, ratios_KG)
                candidates = self._candidates(tally, correct)
        if self.has_merged:
            self._compare(tally, look, unit, candidates, ratios_KG, tools, map_spans)
        return tally

    def conclude(self, look: Look, parts: Sequence[Tally]) -> dict[str, Any]:
        """Return the row of a tensor."""
        tally = Tally()
        for part in parts:
            tally.add(part)
        return audit_row(look, tally, has_merged=self.has_merged)

    def _products(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> tuple[Floats, float]:
        """Return the Gram of each group, and the squared steps around the elements of the output."""
        shown = len(look.reading.operands) - 1 if self.has_merged else 0
        dtype = look.reading.dtypes[shown]
        dtype = dtype if DTYPES[dtype].kind == "float" else rounded_to(look)
        steps = StepsSweep(shown, dtype, squared_steps(dtype, rounded_to(look)), tools)
        gram = GramSweep(unit, tools, refuses=False, float_bits=self._float_bits(look))
        total_GMM, total_steps = swept(unit, [gram, steps], map_spans, last=not self.has_merged)
        return total_GMM, total_steps

    def _float_bits(self, look: Look) -> FloatBits:
        """What is held against results is computed finer than these; else it is what a merge computes."""
        return 64 if self.has_merged else planned_of(look).result.working_bits

    def _tally_models(self, tally: Tally, models: Gram, correct: int, ratios_KG: Floats) -> None:
        mean_G = _mean_squared(models)
        correct_G = ratios_KG[correct]
        flags = Geometry(models).flags()
        tally.flags = {name: int(np.count_nonzero(flags_G)) for name, flags_G in flags.items()}
        with np.errstate(invalid="ignore"):  # where task vectors cancel t is infinite and |d| 0
            tally.mean_squared = float(mean_G.sum())
            tally.update_squared = float((correct_G**2 * mean_G).sum())
            tally.old_squared = float(((ratios_KG[TWO_MODEL] - correct_G) ** 2 * mean_G).sum())
            tally.ratios_K = ratios_KG.sum(axis=1)
            tally.weighted_ratios_K = (ratios_KG * mean_G).sum(axis=1)
            close_KKG = np.abs(ratios_KG[:, None] - ratios_KG[None]) <= SAME_RATIO * np.abs(ratios_KG[:, None])
        tally.same_KK = np.asarray(close_KKG.all(axis=2))

    def _tally_merged(self, tally: Tally, dtype: str, products_GMM: Floats, ratios_KG: Floats) -> None:
        """Distances of the merged tensor from every formula: quadratic forms of the Gram, group by group."""
        num_tuned = products_GMM.shape[1] - 2
        mean_G = _mean_squared(Gram(products_GMM[:, :-1, :-1]))
        merged_G = products_GMM[:, -1, -1]
        times_deltas_GN = products_GMM[:, -1, 1:-1]
        times_mean_G = times_deltas_GN.sum(axis=1) / num_tuned
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            along_G = np.where(mean_G > 0.0, times_mean_G**2 / mean_G, 0.0)
            distances_KG = merged_G - 2.0 * ratios_KG * times_mean_G + ratios_KG**2 * mean_G
            scale_K = (merged_G + ratios_KG**2 * mean_G).sum(axis=1)
            own_errors_KG = ratio_errors(ratios_KG, num_tuned, dtype)
            own_error_K = (own_errors_KG**2 * mean_G).sum(axis=1)
            # Outside of [0, 1] a tool subtracts larger numbers than it ends with, and each of them is rounded.
            reach_K = (np.abs(ratios_KG) + np.abs(1.0 - ratios_KG)).max(axis=1)
            noise_K = (ROUNDINGS_OF_A_TOOL * reach_K) ** 2 * tally.steps_squared / 12.0
            allowed_K = noise_K + own_error_K + GRAM_PRECISION * scale_K
        tally.merged_squared = float(merged_G.sum())
        tally.merged_times_mean = float(times_mean_G.sum())
        tally.off_ray_squared = float(np.maximum(merged_G - along_G, 0.0).sum())
        tally.distances_K = np.maximum(distances_KG, 0.0).sum(axis=1)
        tally.deltas_NN = products_GMM[:, 1:-1, 1:-1].sum(axis=0)
        tally.merged_times_deltas_N = times_deltas_GN.sum(axis=0)
        tally.contenders_K = np.asarray(np.isfinite(ratios_KG).all(axis=1) & (tally.distances_K <= allowed_K))

    def _candidates(self, tally: Tally, correct: int) -> list[int]:
        """Return the formulas whose results are computed: the correct one, and contenders of another t."""
        wanted = [k for k in range(len(FORMULAS)) if tally.contenders_K[k]]
        if any(FORMULAS[k] not in SECONDARY for k in wanted):
            wanted = [k for k in wanted if FORMULAS[k] not in SECONDARY]
        tally.contenders_K = np.isin(np.arange(len(FORMULAS)), wanted)
        chosen = [] if math.isinf(tally.ratios_K[correct]) else [correct]
        for k in wanted:
            if not any(tally.same_KK[k, other] for other in chosen):
                chosen.append(k)
        return chosen

    def _compare(
        self,
        tally: Tally,
        look: Look,
        unit: Unit,
        candidates: Sequence[int],
        ratios_KG: Floats,
        tools: Tools,
        map_spans: MapSpans,
    ) -> None:
        """Hold every element against what the candidates give, rounded once."""
        num_tuned, num_candidates = len(look.reading.operands) - 2, len(candidates)
        group_elems, dtype = look.reading.group_elems, rounded_to(look)

        def compare(span: Piece) -> tuple[Any, ...]:
            loaded = span.loaded()
            counts = (
                np.zeros(num_candidates, np.int64), np.zeros(num_candidates), np.zeros(num_candidates),
                np.zeros((num_candidates, num_candidates), np.int64),
            )  # fmt: skip
            merged = as_stored(loaded, num_tuned + 1, dtype, tools)
            models = _without_last(loaded)
            results_CB = np.empty((num_candidates, merged.nbytes), np.uint8)
            first = (loaded.start - unit.start) // group_elems
            last = -(-(loaded.stop - unit.start) // group_elems)
            for result, k in zip(results_CB, candidates, strict=True):
                weights_GN = np.repeat((ratios_KG[k, first:last] / num_tuned)[:, None], num_tuned, axis=1)
                tools.arithmetic.combine(models, Weighted(weights_GN, True, dtype, 64), result)
            count_roundings(patterns_in(merged, dtype), patterns_in(results_CB, dtype), *counts)
            return counts

        chosen = np.array(candidates, np.intp)
        for piece in unit.sweep(last=True):
            for equal_C, roundings_C, most_C, nearer_CC in map_spans(compare, spans_of(piece)) if candidates else ():
                tally.equal_K[chosen] += equal_C
                tally.roundings_K[chosen] += roundings_C
                tally.most_K[chosen] = np.maximum(tally.most_K[chosen], most_C)
                tally.nearer_KK[np.ix_(chosen, chosen)] += nearer_CC
        self._copy_to_equals(tally, candidates)

    def _copy_to_equals(self, tally: Tally, candidates: Sequence[int]) -> None:
        """Give formulas of equal t what was counted for the one of them that was computed."""
        stands_for = list(range(len(FORMULAS)))
        for k in range(len(FORMULAS)):
            stands_for[k] = next((other for other in candidates if tally.same_KK[k, other]), k)
        tally.equal_K = tally.equal_K[stands_for]
        tally.roundings_K = tally.roundings_K[stands_for]
        tally.most_K = tally.most_K[stands_for]
        tally.nearer_KK = tally.nearer_KK[np.ix_(stands_for, stands_for)]


def audit_row(look: Look, tally: Tally, *, has_merged: bool) -> dict[str, Any]:
    """Return what is reported of a tensor."""
    reading, dtype = look.reading, rounded_to(look)
    row: dict[str, Any] = {
        "dtype": dtype,
        "scope": reading.scope,
        "num_groups": tally.num_groups,
        "flags": sorted(name for name, count in tally.flags.items() if count),
        "match": None,
        "candidates": [],
    }
    if not tally.is_finite:
        return row | {"match": "not_finite", "flags": [MERGE_NONFINITE if tally.are_models_finite else NONFINITE]}
    correct, ratios_K = correct_formula(planned_of(look)), _ratios(tally)
    row |= _of_models(tally, ratios_K, correct)
    return row | _of_merge(look, tally, ratios_K, correct) if has_merged else row


def _of_models(tally: Tally, ratios_K: Sequence[float], correct: int) -> dict[str, Any]:
    """What the formulas make of a tensor, and how far the first one that mergekit had is from the correct one."""
    old, size = math.sqrt(tally.old_squared), _size(tally)
    ratios = {f"ratio_{name}": ratios_K[k] for k, name in enumerate(FORMULAS) if name not in ("average", "base")}
    norms = {"mean_norm": math.sqrt(tally.mean_squared), "update_norm": math.sqrt(tally.update_squared)}
    found = {**ratios, "ratio_correct": ratios_K[correct], **norms, "old_error": old}
    return {name: finite(value) for name, value in found.items()} | {
        "old_distance": _share(old, size),
        "old_roundings": _share(old, math.sqrt(tally.steps_squared)),
        "rounding_noise": _share(math.sqrt(tally.steps_squared / 12.0), size),
    }


def _of_merge(look: Look, tally: Tally, ratios_K: Sequence[float], correct: int) -> dict[str, Any]:
    """What a merge has of a tensor: by whose formula it was made, and how far it is from the correct one."""
    num_elems = look.reading.num_elems
    match, candidates = decide(
        TensorEvidence(
            num_elems, len(look.reading.operands) - 2, tally.contenders_K.tolist(), ratios_K, tally.same_KK,
            tally.equal_K.tolist(), tally.roundings_K.tolist(), tally.nearer_KK,
        ),
        rounded_to(look),
    )  # fmt: skip
    weights_N, *_ = np.linalg.lstsq(tally.deltas_NN, tally.merged_times_deltas_N, rcond=None)
    distance = math.sqrt(tally.distances_K[correct])
    return {
        "match": match,
        "candidates": list(candidates),
        "implied_ratio": _share(tally.merged_times_mean, tally.mean_squared),
        "implied_weights": weights_N.tolist(),
        "residual": _share(math.sqrt(tally.off_ray_squared), math.sqrt(tally.merged_squared)),
        "error": finite(distance),
        "distance": _share(distance, _size(tally)) if distance else 0.0,
        "equal_share": float(tally.equal_K[correct] / num_elems),
        "mean_roundings": float(tally.roundings_K[correct] / num_elems),
        "max_roundings": float(tally.most_K[correct]),
    }


def _size(tally: Tally) -> float:
    """What distances are shares of: the correct update; where there is none, the mean task vector."""
    return math.sqrt(tally.update_squared or tally.mean_squared)


def look_at(planned: TensorJob, merged: Operand | None) -> Look:
    """Return the look at a planned tensor's models, and at what a merge made of them where there is one."""
    reading = planned.reading
    operands = reading.operands if merged is None else (*reading.operands, merged)
    return Look(replace(reading, operands=operands, float_bits=64), AuditExaminer(merged is not None), planned)


def rounded_to(look: Look) -> str:
    """Return the dtype of the results: that of the merge which is looked at, else the planned one."""
    planned = planned_of(look)
    has_merged = len(look.reading.operands) > len(planned.reading.operands)
    return look.reading.dtypes[-1] if has_merged else planned.output.dtype


def planned_of(look: Look) -> TensorJob:
    """Return what the recipe makes of a tensor that an audit looks at."""
    assert look.planned is not None
    return look.planned


def _without_last(piece: LoadedPiece) -> LoadedPiece:
    reading: Reading = piece.reading
    return replace(
        piece,
        reading=replace(reading, operands=reading.operands[:-1]),
        offsets=piece.offsets[:-1],
        dtypes=piece.dtypes[:-1],
        widths=piece.widths[:-1],
    )


def _mean_squared(models: Gram) -> Floats:
    """|mean task vector|^2 per group."""
    total_G: Floats = models.products_GMM[:, 1:, 1:].sum(axis=(1, 2))
    return np.maximum(total_G, 0.0) / models.num_tuned**2


def _ratios(tally: Tally) -> list[float]:
    """The ratio by each formula; over several groups the mean, weighted by how much each moves the tensor."""
    if tally.num_groups == 1 or not tally.mean_squared:
        return [float(value) / tally.num_groups for value in tally.ratios_K]
    return [float(value) / tally.mean_squared for value in tally.weighted_ratios_K]


def _share(part: float, whole: float) -> float | None:
    return finite(part / whole) if whole else None
