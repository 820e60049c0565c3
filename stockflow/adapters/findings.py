"""What was extracted into an adapter: per tensor, and all together; in words and in facts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from stockflow.adapters.pieces import AdapterPieces
from stockflow.adapters.publishing import AdapterPlan, changed_rows
from stockflow.adapters.record import AdapterRecord, ExtractedTensor, energy_of, least_kept, ranks_of, share
from stockflow.output.manifest import PublishedFile
from stockflow.storage import redact
from stockflow.text import notebook
from stockflow.text.sizes import counted, gb

NUM_SHOWN = 20
"""Tensors a notebook shows."""


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
    """bytes, by all runs that had a part in it"""
    seconds: float
    """that these took"""

    @property
    def factored(self) -> Sequence[ExtractedTensor]:
        """The tensors that factors hold."""
        return [tensor for tensor in self.tensors if tensor.held == "factors"]

    @property
    def energy(self) -> float:
        """Share of the squared norm of all changes held by factors that these keep."""
        return energy_of(self.factored)

    @property
    def summary(self) -> Mapping[str, float]:
        """What its manifest says of all tensors together."""
        return {
            "tensors": len(self.tensors),
            "equal_tensors": self.num_equal,
            "energy": self.energy,
            "seconds_total": self.seconds,
        }

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
        read = f"{gb(self.num_read)} read in {self.seconds:.1f} s"
        yield f"adapter {redact(self.output_url)}: {gb(self.num_bytes)}; {read}"
        kept = f"{share(self.energy)} of the energy"
        yield f"  {counted(len(factored), 'tensor')} by factors of {ranks_of(factored)}, which keep {kept}"
        yield f"  {counted(num_whole, 'tensor')} whole; {self.num_equal:,} equal in both models"
        yield ""
        yield from least_kept(factored)
        yield f"next: the tuned model is `model: {self.named}` in a recipe"

    @property
    def named(self) -> str:
        """How a recipe names the tuned model by its adapter."""
        return f"{redact(self.base_url)}+{redact(self.output_url)}"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        columns = ("name", "shape", "held", "rank", "norm", "energy")
        rows = [[getattr(tensor, column) for column in columns] for tensor in self.tensors[:NUM_SHOWN]]
        title = f"adapter of {len(self.tensors)} tensors: {share(self.energy)} of the energy kept"
        return notebook.block(title, notebook.table(columns, rows))


def extraction_of(
    output_url: str, plan: AdapterPlan, pieces: AdapterPieces, dtype: str, num_tensors: int
) -> Extraction:
    """Return what was extracted, before its files are written.

    Args:
        output_url: where they go.
        plan: of base and tuned model.
        pieces: all that is done.
        dtype: of the factors.
        num_tensors: of the base.
    """
    tensors = tuple(map(ExtractedTensor.of, changed_rows(pieces.rows.values())))
    base, tuned = plan.checkpoints
    num_equal = num_tensors - len(tensors)
    return Extraction(output_url, base.url, tuned.url, dtype, tensors, num_equal, {}, pieces.num_read, pieces.seconds)


def extraction_on_record(record: AdapterRecord, dtype: str) -> Extraction:
    """Return what was extracted, as the records of a finished adapter tell it."""
    manifest = record.manifest
    base, tuned = manifest.inputs
    return Extraction(
        output_url=record.url,
        base_url=base.url,
        tuned_url=tuned.url,
        dtype=dtype,
        tensors=record.tensors,
        num_equal=int(manifest.summary["equal_tensors"]),
        files=manifest.files,
        num_read=int(manifest.summary["bytes_read"]),
        seconds=manifest.summary["seconds_total"],
    )
