"""What an audit learns of a tensor, span by span: its Gram, the noise of rounding it, whose formula its bits follow.

Shape suffixes: M sources, N tuned models, G groups, K formulas, C candidates (formulas of different t), E elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stockflow.checkpoints.header import TensorSpec
from stockflow.engine.merging import Arithmetic, MapSpans, spans_of
from stockflow.engine.units import Piece, Unit
from stockflow.insight.formulas import (
    FORMULAS,
    GRAM_PRECISION,
    ROUNDINGS_OF_A_TOOL,
    SAME_RATIO,
    SECONDARY,
    Evidence,
    decide,
    ratio_errors,
    ratios_of,
)
from stockflow.kernels.arrays import Floats
from stockflow.kernels.roundings import (
    count_roundings,
    fraction_bits,
    patterns_in,
    squared_steps,
    sum_of_steps,
)
from stockflow.methods.gram import Gram
from stockflow.methods.ratios import Geometry, finite
from stockflow.planning.plan import TensorJob
from stockflow.planning.spans import SPAN_ELEMS

NONFINITE, MERGE_NONFINITE = "nonfinite", "nonfinite_merge"
"""Flags: NaN or infinity in a model; in the merge, and in no model."""
EXACT, TWO_MODEL, EXTRAPOLATED = (FORMULAS.index(name) for name in ("exact", "two_model", "extrapolated"))


def correct_formula(job: TensorJob) -> int:
    """Return which formula the recipe asks for: with ``on_negative: extrapolate`` it is that one."""
    return EXTRAPOLATED if job.parameters.shared.get("on_negative") == "extrapolate" else EXACT


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
class AuditExaminer:
    """Holds tensors against the formulas; with ``has_merged`` the last source is the merged tensor."""

    has_merged: bool

    @property
    def num_sweeps(self) -> int:
        """Twice where there is something to compare: the ratios must be known first."""
        return 2 if self.has_merged else 1

    def span_bytes(self, job: TensorJob) -> int:
        """Return what the results of all formulas take."""
        return len(FORMULAS) * SPAN_ELEMS * job.output_width if self.has_merged else 0

    def examine(self, unit: Unit, arithmetic: Arithmetic, map_spans: MapSpans) -> Tally:
        """Return what one unit says."""
        products_GMM, steps_squared = self._products(unit, arithmetic, map_spans)
        tally = Tally(num_groups=len(products_GMM), steps_squared=steps_squared)
        models = Gram(products_GMM[:, :-1, :-1] if self.has_merged else products_GMM)
        tally.is_finite = bool(np.isfinite(products_GMM).all())
        tally.are_models_finite = bool(np.isfinite(models.products_GMM).all())
        candidates: list[int] = []
        ratios_KG = np.zeros((len(FORMULAS), len(products_GMM)))
        if tally.is_finite:
            ratios_KG = ratios_of(Geometry(models))
            self._tally_models(tally, unit.job, models, ratios_KG)
            if self.has_merged:
                self._tally_merged(tally, unit.job, products_GMM, ratios_KG)
                candidates = self._candidates(tally, unit.job)
        if self.has_merged:
            self._compare(tally, unit, candidates, ratios_KG, arithmetic, map_spans)
        return tally

    def conclude(self, job: TensorJob, parts: Sequence[Tally]) -> dict[str, Any]:
        """Return the row of a tensor."""
        tally = Tally()
        for part in parts:
            tally.add(part)
        return audit_row(job, tally, has_merged=self.has_merged)

    def _products(self, unit: Unit, arithmetic: Arithmetic, map_spans: MapSpans) -> tuple[Floats, float]:
        """Return the Gram of each group, and the squared steps around the elements of the output."""
        job, num_sources = unit.job, len(unit.job.sources)
        shown = num_sources - 1 if self.has_merged else 0
        dtype = job.sources[shown].spec.dtype
        steps_X = squared_steps(dtype, job.output.dtype)

        def products(span: Piece) -> tuple[Floats, float]:
            loaded = span.loaded()
            elems = min(job.group_elems, loaded.stop - loaded.start)
            patterns_E = patterns_in(loaded.source(shown), dtype)
            steps = float(sum_of_steps(patterns_E, fraction_bits(dtype), steps_X))
            return arithmetic.gram(loaded, elems, with_anchor=False), steps

        total_GMM = np.zeros(((unit.stop - unit.start) // job.group_elems, num_sources, num_sources))
        total_steps = 0.0
        for piece in unit.sweep(last=not self.has_merged):
            spans = spans_of(piece)
            for span, (products_GMM, steps) in zip(spans, map_spans(products, spans), strict=True):
                first = (span.start - unit.start) // job.group_elems
                total_GMM[first : first + len(products_GMM)] += products_GMM
                total_steps += steps
        return total_GMM, total_steps

    def _tally_models(self, tally: Tally, job: TensorJob, models: Gram, ratios_KG: Floats) -> None:
        mean_G = _mean_squared(models)
        correct_G = ratios_KG[correct_formula(job)]
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

    def _tally_merged(self, tally: Tally, job: TensorJob, products_GMM: Floats, ratios_KG: Floats) -> None:
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
            own_errors_KG = ratio_errors(ratios_KG, num_tuned, job.output.dtype)
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

    def _candidates(self, tally: Tally, job: TensorJob) -> list[int]:
        """Return the formulas whose results are computed: the correct one, and contenders of another t."""
        wanted = [k for k in range(len(FORMULAS)) if tally.contenders_K[k]]
        if any(FORMULAS[k] not in SECONDARY for k in wanted):
            wanted = [k for k in wanted if FORMULAS[k] not in SECONDARY]
        tally.contenders_K = np.isin(np.arange(len(FORMULAS)), wanted)
        correct = correct_formula(job)
        chosen = [] if math.isinf(tally.ratios_K[correct]) else [correct]
        for k in wanted:
            if not any(tally.same_KK[k, other] for other in chosen):
                chosen.append(k)
        return chosen

    def _compare(
        self,
        tally: Tally,
        unit: Unit,
        candidates: Sequence[int],
        ratios_KG: Floats,
        arithmetic: Arithmetic,
        map_spans: MapSpans,
    ) -> None:
        """Hold every element against what the candidates give, rounded once."""
        job, num_tuned = unit.job, len(unit.job.sources) - 2
        planned = replace(job, sources=job.sources[:-1])
        num_candidates = len(candidates)

        def compare(span: Piece) -> tuple[Any, ...]:
            loaded = span.loaded()
            counts = (
                np.zeros(num_candidates, np.int64), np.zeros(num_candidates), np.zeros(num_candidates),
                np.zeros((num_candidates, num_candidates), np.int64),
            )  # fmt: skip
            merged = loaded.source(num_tuned + 1)
            models = replace(loaded, job=planned, offsets=loaded.offsets[:-1])
            results_CB = np.empty((num_candidates, merged.nbytes), np.uint8)
            first = (loaded.start - unit.start) // job.group_elems
            last = -(-(loaded.stop - unit.start) // job.group_elems)
            for result, k in zip(results_CB, candidates, strict=True):
                weights_GN = np.repeat((ratios_KG[k, first:last] / num_tuned)[:, None], num_tuned, axis=1)
                arithmetic.combine(models, weights_GN, result, anchored=True)
            dtype = job.output.dtype
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


def audit_row(job: TensorJob, tally: Tally, *, has_merged: bool) -> dict[str, Any]:
    """Return what is reported of a tensor."""
    row: dict[str, Any] = {
        "dtype": job.output.dtype,
        "scope": job.scope,
        "num_groups": tally.num_groups,
        "flags": sorted(name for name, count in tally.flags.items() if count),
        "match": None,
        "candidates": [],
    }
    if not tally.is_finite:
        return row | {"match": "not_finite", "flags": [MERGE_NONFINITE if tally.are_models_finite else NONFINITE]}
    correct, ratios_K = correct_formula(job), _ratios(tally)
    size = math.sqrt(tally.update_squared or tally.mean_squared)
    row |= {f"ratio_{name}": finite(ratios_K[k]) for k, name in enumerate(FORMULAS) if name not in ("average", "base")}
    row |= {
        "ratio_correct": finite(ratios_K[correct]),
        "mean_norm": finite(math.sqrt(tally.mean_squared)),
        "update_norm": finite(math.sqrt(tally.update_squared)),
        "old_error": finite(math.sqrt(tally.old_squared)),
        "old_distance": _share(math.sqrt(tally.old_squared), size),
        "old_roundings": _share(math.sqrt(tally.old_squared), math.sqrt(tally.steps_squared)),
        "rounding_noise": _share(math.sqrt(tally.steps_squared / 12.0), size),
    }
    if not has_merged:
        return row
    num_elems = job.num_elems
    match, candidates = decide(
        Evidence(
            num_elems, len(job.sources) - 2, tally.contenders_K.tolist(), ratios_K, tally.same_KK,
            tally.equal_K.tolist(), tally.roundings_K.tolist(), tally.nearer_KK,
        ),
        job.output.dtype,
    )  # fmt: skip
    weights_N, *_ = np.linalg.lstsq(tally.deltas_NN, tally.merged_times_deltas_N, rcond=None)
    distance = math.sqrt(tally.distances_K[correct])
    return row | {
        "match": match,
        "candidates": list(candidates),
        "implied_ratio": _share(tally.merged_times_mean, tally.mean_squared),
        "implied_weights": weights_N.tolist(),
        "residual": _share(math.sqrt(tally.off_ray_squared), math.sqrt(tally.merged_squared)),
        "error": finite(distance),
        "distance": _share(distance, size) if distance else 0.0,
        "equal_share": float(tally.equal_K[correct] / num_elems),
        "mean_roundings": float(tally.roundings_K[correct] / num_elems),
        "max_roundings": float(tally.most_K[correct]),
    }


def with_merged(planned: TensorJob, source: Any) -> TensorJob:
    """Return the job that also reads the merged tensor, and in whose dtype results are rounded."""
    output = TensorSpec(planned.output.name, source.spec.dtype, planned.output.shape)
    return replace(planned, output=output, sources=(*planned.sources, source))


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
