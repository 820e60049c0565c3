"""What has been learned about a tensor, unit by unit, and the row of facts it becomes."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stockflow.engine.noise import Seen, facts_of
from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import Coefficients
from stockflow.output.receipts import TensorFacts
from stockflow.planning.job import Result, TensorJob

ROUNDING_NOISE = "rounding_noise"
"""Flag of tensors that a model changes by less than the error of rounding to codes."""
SCALES = "scales"
"""Flag of what belongs to the codes before it."""
MAX_COEFFICIENT_GROUPS = 1024
"""Coefficients of more groups than this are not recorded one by one."""
COLUMNS = ("mean_cosine", "min_cosine", "max_cosine", "ratio", "legacy_ratio")
"""Facts that have a column of their own in tensors.parquet; all others go into its map ``facts``."""


@dataclass
class Ledger:
    """What has been learned about one result of a tensor, unit by unit."""

    job: TensorJob
    result: Result
    shard: str
    facts: dict[str, list[Floats]] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    """groups that carry a flag"""
    squares: list[Floats] = field(default_factory=list)
    """|w_0|^2 and |d_i|^2 per group, shape (G, M)"""
    gram_MM: Floats | None = None
    """products of [w_0, d_1 .. d_N], the groups added in order; None where no Gram is needed"""
    coefficients: list[Floats] = field(default_factory=list)
    means: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """facts of units, each with the elements it speaks of"""
    counts: dict[str, int] = field(default_factory=dict)
    """elements of a kind"""
    _base_squares: dict[int, float] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    """of changes beside the error of codes"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, coefficients: Coefficients, gram: Gram | None) -> None:
        """Add the decision of one unit."""
        if self.job.reading.num_groups <= MAX_COEFFICIENT_GROUPS:
            self.coefficients.append(coefficients.weights_GM)
        for name, values_G in coefficients.facts.items():
            self.facts.setdefault(name, []).append(values_G)
        flags = dict(coefficients.flags)
        if gram is not None:
            so_far = [] if self.gram_MM is None else [self.gram_MM[np.newaxis]]
            # Along the first axis numpy adds one after the other, so it is no matter how groups came in units.
            self.gram_MM = np.add.reduce(np.concatenate([*so_far, gram.products_GMM]), axis=0)
            self.squares.append(np.diagonal(gram.products_GMM, axis1=1, axis2=2).copy())  # a view would keep it all
            flags["zero_delta"] = gram.zero_deltas_GN.any(axis=1)
        for name, flags_G in flags.items():
            self.flags[name] = self.flags.get(name, 0) + int(np.count_nonzero(flags_G))

    def take_over(self, decided: "Ledger", own: Gram | None) -> None:
        """Add what was decided for a unit that the tensor is a part of; products and norms are its own."""
        for name in ("facts", "flags", "coefficients", "means"):
            setattr(self, name, getattr(decided, name).copy())
        if own is not None:
            self.gram_MM = own.products_GMM[0]
            self.squares = [np.diagonal(own.products_GMM, axis1=1, axis2=2).copy()]

    def record_means(self, facts: Mapping[str, float], num_elems: int) -> None:
        """Add facts that speak of ``num_elems`` elements at once."""
        for name, value in facts.items():
            self.means.setdefault(name, []).append((value, num_elems))

    def add_base(self, start: int, square: float) -> None:
        """Add |w_0|^2 of the span from element ``start`` on, where no Gram has it; from any thread."""
        with self._lock:
            self._base_squares[start] = square

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the counts of elements; from any thread."""
        with self._lock:
            for name, number in counts.items():
                self.counts[name] = self.counts.get(name, 0) + number

    def see(self, seen: Sequence[Seen]) -> None:
        """Add what a span says of changes beside the error of codes; from any thread."""
        with self._lock:
            self.seen.extend(seen)

    def of_scales(self) -> list[TensorFacts]:
        """Return the rows of the scales that follow the codes of the tensor, which say nothing further."""
        return [
            TensorFacts(
                name=output.name,
                shape=output.shape,
                dtype=output.dtype,
                shard=self.shard,
                method=self.result.method,
                scope=self.job.reading.scope,
                num_elems=output.num_elems,
                flags=(SCALES,),
            )
            for output in self.result.outputs[1:]
        ]

    def close(self) -> TensorFacts:
        """Return the row of facts of the finished tensor."""
        self._complete()
        reading, output = self.job.reading, self.result.outputs[0]
        num_groups = reading.num_groups
        grouped = {"groups": float(num_groups)} if num_groups > 1 else {}
        if num_groups > 1 and self.flags.get("clamped"):
            grouped["clamped_groups"] = float(self.flags["clamped"])
        norms, noise = self._norms(), facts_of(self.seen)
        if noise.get("rounding_signal", 1.0) < 1:
            self.flags[ROUNDING_NOISE] = num_groups
        return TensorFacts(
            name=output.name,
            shape=output.shape,
            dtype=output.dtype,
            shard=self.shard,
            method=self.result.method,
            scope=reading.scope,
            num_elems=output.num_elems,
            mean_cosine=self._mean("mean_cosine"),
            min_cosine=self._extreme("min_cosine", min),
            max_cosine=self._extreme("max_cosine", max),
            ratio=self._mean("ratio"),
            legacy_ratio=self._mean("legacy_ratio"),
            base_norm=norms[0] if norms else None,
            delta_norms=tuple(norms[1:]),
            flags=("copied",) if self.job.is_copy else tuple(sorted(self._raised())),
            facts={
                **grouped,
                **({"numbers": float(reading.num_elems)} if self.result.rule else {}),
                **self._further(),
                **noise,
                **{name: float(number) for name, number in self.counts.items()},
            },
            coefficients=self._hex_coefficients(),
        )

    def _complete(self) -> None:
        """Put |w_0|^2 where the products leave it out, its spans added in order."""
        if not self._base_squares or self.gram_MM is None:
            return
        total = 0.0
        for _, square in sorted(self._base_squares.items()):
            total += square
        self.gram_MM[0, 0] = total
        self.squares[0][:, 0] = total

    def _raised(self) -> Iterable[str]:
        return (name for name, count in self.flags.items() if count)

    def _further(self) -> dict[str, float]:
        """What the method says beside the facts that have a column of their own."""
        found = {name: self._mean(name) for name in self.facts if name not in COLUMNS}
        found |= {name: _weighted_mean(values) for name, values in self.means.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _values(self, name: str) -> list[Floats]:
        """The finite values of a fact, unit by unit."""
        return [values_G[np.isfinite(values_G)] for values_G in self.facts.get(name, [])]

    def _mean(self, name: str) -> float | None:
        values = self._values(name)
        count = sum(map(len, values))
        return _exact_sum(values) / count if count else None

    def _extreme(self, name: str, pick: Callable[[list[float]], float]) -> float | None:
        extremes = [pick(values_G.tolist()) for values_G in self._values(name) if len(values_G)]
        return pick(extremes) if extremes else None

    def _norms(self) -> list[float]:
        if not self.squares or not all(np.isfinite(squares_GM).all() for squares_GM in self.squares):
            return []
        columns = range(self.squares[0].shape[1])
        return [math.sqrt(_exact_sum([squares_GM[:, column] for squares_GM in self.squares])) for column in columns]

    def _hex_coefficients(self) -> tuple[tuple[str, ...], ...] | None:
        if not self.coefficients:
            return None
        return tuple(tuple(float(weight).hex() for weight in row) for weights in self.coefficients for row in weights)


class GramSum:
    """The Gram of whole models, tensor by tensor: products of [w_0, d_1 .. d_N] over all elements so far."""

    def __init__(self, num_models: int) -> None:
        """Begin with no tensor."""
        self._sources = tuple(range(num_models))
        self._total_MM: Floats | None = None

    def add(self, ledger: Ledger) -> None:
        """Add a finished tensor, if it has a finite Gram of all checkpoints with the first as anchor."""
        gram_MM = ledger.gram_MM
        is_whole = tuple(operand.checkpoint for operand in ledger.job.reading.operands) == self._sources
        if gram_MM is not None and is_whole and np.isfinite(gram_MM).all():
            self._total_MM = gram_MM if self._total_MM is None else self._total_MM + gram_MM

    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Return the sum as a receipt holds it: no rows if no tensor was added, or the sum is beyond float64."""
        if self._total_MM is None or not np.isfinite(self._total_MM).all():
            return ()
        return tuple(map(tuple, self._total_MM.tolist()))


def _weighted_mean(values: Sequence[tuple[float, int]]) -> float:
    if len(values) == 1:
        return values[0][0]
    return math.fsum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def _exact_sum(parts: Iterable[Floats]) -> float:
    """Return the correctly rounded sum, which depends on no order; one part at a time becomes Python floats."""
    return math.fsum(value for part in parts for value in part.tolist())
