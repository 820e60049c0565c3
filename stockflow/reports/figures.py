"""Figures of a report: the geometry of the models and of their merge, as the numbers that are shown."""

import math
from dataclasses import asdict, dataclass, field

from stockflow.output.receipts import TensorFacts


@dataclass(frozen=True, slots=True)
class Spread:
    """How numbers are spread: least, quartiles, largest."""

    count: int
    low: float
    lower: float
    median: float
    upper: float
    high: float


@dataclass(frozen=True, slots=True)
class KindSummary:
    """Tensors of one kind, or all."""

    kind: str
    num_tensors: int
    num_elems: int
    ratio: Spread | None
    cosine: Spread | None
    change: Spread | None
    """|d_i| / |w_0| over tensors and models"""
    num_clamped: int
    num_zero_delta: int
    num_copied: int


@dataclass(frozen=True, slots=True)
class Cell:
    """The tensors of one part in one column of a heatmap."""

    value: float
    """their median"""
    low: float
    high: float
    num_tensors: int
    num_clamped: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a heatmap: a part of a layer, such as ``self_attn.q_proj``."""

    part: str
    kind: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, slots=True)
class Heatmap:
    """A measure by layer and part; columns are runs of layers, nearly always of one."""

    layers: tuple[tuple[int, int], ...]
    """first and last layer of each column"""
    lines: tuple[Line, ...]
    low: float
    """ends of the scale"""
    high: float
    is_diverging: bool
    """whether the scale has zero in its middle"""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many tensors have a value between neighbouring edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    median: float


@dataclass(frozen=True, slots=True)
class Outside:
    """A tensor, or several that differ in a number only, in no layer."""

    part: str
    kind: str
    num_tensors: int
    ratio: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Change:
    """|d_i| / |w_0| of one model by column of layers."""

    letter: str
    values: tuple[float | None, ...]
    total: float | None
    """over all tensors"""


@dataclass(frozen=True, slots=True)
class Notable:
    """A tensor worth a look, and why."""

    row: TensorFacts
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FactSummary:
    """What a method says of its tensors beside cosines and ratios."""

    name: str
    values: Spread


@dataclass(frozen=True)
class MergeGeometry:
    """What a report shows of the models and of their merge."""

    kinds: tuple[KindSummary, ...]
    """those that occur, in the order of ``KINDS``; last, all together"""
    method_facts: tuple[FactSummary, ...]
    ratio_map: Heatmap | None
    cosine_map: Heatmap | None
    outside: tuple[Outside, ...]
    ratios: Histogram | None
    cosines: Histogram | None
    layers: tuple[tuple[int, int], ...]
    changes: tuple[Change, ...]
    letters: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    """cosines of whole models' task vectors; no rows if they are not on record"""
    norms: tuple[float, ...]
    """|w_0| and |d_i| of whole models, over the tensors that the matrix covers"""
    notable: tuple[Notable, ...]
    listed: tuple[TensorFacts, ...] = field(repr=False)
    """up to ``MAX_ROWS`` rows, all of them if there are no more, else the notable ones and those of lowest ratio"""
    num_rows: int

    @property
    def all_tensors(self) -> KindSummary:
        """The summary of everything."""
        return self.kinds[-1]

    @property
    def mean_model_cosine(self) -> float | None:
        """The mean cosine of the pairs of whole models."""
        pairs = [row[j] for i, row in enumerate(self.matrix) for j in range(i + 1, len(row))]
        known = [cosine for cosine in pairs if cosine is not None]
        return math.fsum(known) / len(known) if known else None

    def facts(self) -> dict[str, object]:
        """Return everything but single tensors, for programs."""
        return {
            "kinds": [asdict(kind) for kind in self.kinds],
            "method_facts": [asdict(fact) for fact in self.method_facts],
            "models": list(self.letters),
            "model_cosines": [list(row) for row in self.matrix],
            "mean_model_cosine": self.mean_model_cosine,
            "model_norms": list(self.norms),
            "changes": [asdict(change) for change in self.changes],
            "notable": [{"name": one.row.name, "reasons": list(one.reasons)} for one in self.notable],
        }
