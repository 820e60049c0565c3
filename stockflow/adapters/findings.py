"""What was extracted into an adapter: per tensor, and all together; in words and in facts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from stockflow.output.manifest import PublishedFile
from stockflow.storage import redact
from stockflow.text import notebook
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import counted, gb
from stockflow.text.tables import grid

NUM_SHOWN = 20
"""Tensors a summary lists."""


@dataclass(frozen=True, slots=True)
class ExtractedTensor:
    """What an adapter holds of a tensor that changed."""

    name: str
    shape: tuple[int, ...]
    held: Literal["factors", "whole"]
    rank: int | None = None
    """of factors"""
    norm: float | None = None
    """Frobenius norm of the change, where factors hold it"""
    energy: float | None = None
    """share of the squared norm of the change that factors keep"""


@dataclass(frozen=True)
class Extraction:
    """An adapter that was extracted from the difference of two checkpoints."""

    output_url: str
    base_url: str
    tuned_url: str
    dtype: str
    """of the factors"""
    tensors: tuple[ExtractedTensor, ...]
    """those that changed, in the order of the base's files"""
    num_equal: int
    """how many did not"""
    files: Mapping[str, PublishedFile]
    num_read: int
    """bytes"""
    seconds: float

    @property
    def factored(self) -> Sequence[ExtractedTensor]:
        """The tensors that factors hold."""
        return [tensor for tensor in self.tensors if tensor.held == "factors"]

    @property
    def energy(self) -> float:
        """Share of the squared norm of all changes held by factors that these keep."""
        squares = [(tensor.norm or 0.0) ** 2 for tensor in self.factored]
        kept = sum(square * (tensor.energy or 0.0) for square, tensor in zip(squares, self.factored, strict=True))
        return kept / sum(squares)

    @property
    def num_bytes(self) -> int:
        """Size of the adapter."""
        return sum(file.size for file in self.files.values())

    def facts(self) -> dict[str, object]:
        """Return all of it for programs."""
        return {
            "output": redact(self.output_url),
            "base": redact(self.base_url),
            "tuned": redact(self.tuned_url),
            "dtype": self.dtype,
            "energy": self.energy,
            "equal_tensors": self.num_equal,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "files": {key: asdict(file) for key, file in self.files.items()},
            "bytes_read": self.num_read,
            "bytes_written": self.num_bytes,
            "seconds": self.seconds,
        }

    def lines(self) -> Iterator[str]:
        """Yield a summary for people: what is kept, and of which tensors the least."""
        factored, num_whole = self.factored, len(self.tensors) - len(self.factored)
        ranks = sorted({tensor.rank or 0 for tensor in factored})
        of_rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        read = f"{gb(self.num_read)} read in {self.seconds:.1f} s"
        yield f"adapter {redact(self.output_url)}: {gb(self.num_bytes)}; {read}"
        kept = f"{share(self.energy)} of the energy"
        yield f"  {counted(len(factored), 'tensor')} by factors of {of_rank}, which keep {kept}"
        yield f"  {counted(num_whole, 'tensor')} whole; {self.num_equal:,} equal in both models"
        yield ""
        more = f" (the first {NUM_SHOWN} of {len(factored)})" if len(factored) > NUM_SHOWN else ""
        yield f"  tensors of which the least is kept{more}"
        yield from self.table(NUM_SHOWN)
        yield f"next: the tuned model is `model: {self.named}` in a recipe"

    @property
    def named(self) -> str:
        """How a recipe names the tuned model by its adapter."""
        return f"{redact(self.base_url)}+{redact(self.output_url)}"

    def table(self, num_rows: int | None = None) -> Iterator[str]:
        """Yield a table of the tensors that factors hold, the least kept first."""
        rows = sorted(self.factored, key=lambda tensor: tensor.energy or 0.0)[:num_rows]
        yield from grid([("tensor", "rank", "energy kept", "norm of the change"), *map(_cells, rows)])

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        columns = ("name", "shape", "held", "rank", "norm", "energy")
        rows = [[getattr(tensor, column) for column in columns] for tensor in self.tensors[:NUM_SHOWN]]
        title = f"adapter of {len(self.tensors)} tensors: {share(self.energy)} of the energy kept"
        return notebook.block(title, notebook.table(columns, rows))


def share(value: float) -> str:
    """Return a share in per cent, with as many nines as it has."""
    return f"{100.0 * value:.4g} %" if value < 0.999 else f"{100.0 * value:.6g} %"


def _cells(tensor: ExtractedTensor) -> tuple[str, ...]:
    return in_a_line(tensor.name), str(tensor.rank), share(tensor.energy or 0.0), f"{tensor.norm or 0.0:.4g}"
