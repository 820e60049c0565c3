"""Records of adapters made here: a row per tensor or module, the manifest, and what both say to who asks later."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NoReturn

from stockflow.checkpoints.adapters.config import WEIGHTS_KEY
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.errors import CheckpointError, NotFoundError, PlanError
from stockflow.output import manifest as manifest_file
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import TensorFacts
from stockflow.storage import Store, redact
from stockflow.text import notebook
from stockflow.text.escaping import in_a_line
from stockflow.text.redaction import without_secrets
from stockflow.text.sizes import counted, gb
from stockflow.text.tables import grid
from stockflow.verification.files import Output
from stockflow.verification.records import read_rows

NUM_SHOWN = 20
"""Tensors a summary lists."""
FACTORS, WHOLE = "factors", "whole"
"""Methods of rows."""


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

    @classmethod
    def of(cls, row: TensorFacts) -> "ExtractedTensor":
        """Return what a row says."""
        if is_whole(row):
            return cls(row.name, row.shape, "whole")
        norm = row.delta_norms[0] if row.delta_norms else None
        return cls(row.name, row.shape, "factors", rank_of(row), norm, row.facts.get("energy"))


def factor_row(spec: TensorSpec, rank: int, energy: float, norm: float | None = None) -> TensorFacts:
    """Return the row of what factors hold: of rank 0 if it did not change."""
    return TensorFacts(
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        shard=WEIGHTS_KEY,
        method=FACTORS,
        scope="tensor",
        num_elems=spec.num_elems,
        delta_norms=() if norm is None else (norm,),
        flags=() if rank else ("zero_delta",),
        facts={"rank": rank, "energy": energy},
    )


def whole_row(spec: TensorSpec) -> TensorFacts:
    """Return the row of what is held whole."""
    return TensorFacts(spec.name, spec.shape, spec.dtype, WEIGHTS_KEY, WHOLE, "tensor", spec.num_elems)


def is_whole(row: TensorFacts) -> bool:
    """Return whether a row is of what is held whole."""
    return row.method == WHOLE


def rank_of(row: TensorFacts | None) -> int:
    """Return the rank of the factors that a row is of; 0: there are none."""
    return int(row.facts.get("rank", 0)) if row else 0


@dataclass(frozen=True)
class AdapterRecord:
    """What is on record of a finished adapter."""

    url: str
    manifest: Manifest
    tensors: tuple[ExtractedTensor, ...]
    findings = ()

    def facts(self) -> dict[str, object]:
        """Return all of it for programs."""
        manifest = self.manifest
        return {
            "output": redact(self.url),
            "plan_id": manifest.plan_id,
            "merge_id": manifest.merge_id,
            "made_by": without_secrets(manifest.recipe),
            "inputs": [redact(ref.url) for ref in manifest.inputs],
            "summary": dict(manifest.summary),
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "files": {key: asdict(file) for key, file in manifest.files.items()},
        }

    def lines(self) -> Iterator[str]:
        """Yield it for people."""
        factored = [tensor for tensor in self.tensors if tensor.held == "factors"]
        size = gb(sum(file.size for file in self.manifest.files.values()))
        yield f"adapter {redact(self.url)}: {size}, plan {self.manifest.plan_id[:12]}"
        yield from (f"  input   {redact(ref.url)}" for ref in self.manifest.inputs)
        keeps = f", which keep {share(energy_of(factored))} of the energy" if factored[0].norm is not None else ""
        whole = f"; {counted(len(self.tensors) - len(factored), 'tensor')} whole"
        yield f"  {counted(len(factored), 'tensor')} by factors of {ranks_of(factored)}{keeps}{whole}"
        yield f"  made by {in_a_line(without_secrets(self.manifest.recipe))}"
        yield ""
        yield from least_kept(factored)

    def save(self, place: str) -> NoReturn:
        """Refuse to write a page.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            f"{redact(self.url)} is an adapter, of which there is no page for {redact(place)}; "
            "without --html all of it is printed, and README.md there has the table"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        return notebook.block("adapter", notebook.facts({"output": redact(self.url), "tensors": len(self.tensors)}))


def find_record(store: Store) -> AdapterRecord | None:
    """Return what is on record of the adapter in a place; None if no adapter was made there.

    Raises:
        DamagedOutputError: its table is not what was published.
        StorageError: reading failed after retries.
    """
    try:
        manifest = manifest_file.read(store)
    except (NotFoundError, CheckpointError):
        return None
    return read_record(store, manifest) if manifest.is_adapter else None


def read_record(store: Store, manifest: Manifest) -> AdapterRecord:
    """Return what is on record of an adapter beside its manifest.

    Raises:
        DamagedOutputError: its table is not what was published.
    """
    rows = read_rows(Output(store), manifest)
    return AdapterRecord(store.url, manifest, tuple(map(ExtractedTensor.of, rows)))


def energy_of(factored: Sequence[ExtractedTensor]) -> float:
    """Return the share of the squared norm of all changes that their factors keep."""
    squares = [(tensor.norm or 0.0) ** 2 for tensor in factored]
    kept = sum(square * (tensor.energy or 0.0) for square, tensor in zip(squares, factored, strict=True))
    return kept / sum(squares)


def ranks_of(factored: Sequence[ExtractedTensor]) -> str:
    """Return the ranks of factors in words."""
    ranks = sorted({tensor.rank or 0 for tensor in factored})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def least_kept(factored: Sequence[ExtractedTensor]) -> Iterator[str]:
    """Yield a table of the tensors of which factors keep the least."""
    more = f" (the first {NUM_SHOWN} of {len(factored)})" if len(factored) > NUM_SHOWN else ""
    yield f"  tensors of which the least is kept{more}"
    rows = sorted(factored, key=lambda tensor: tensor.energy or 0.0)[:NUM_SHOWN]
    yield from grid([("tensor", "rank", "energy kept", "norm of the change"), *map(_cells, rows)])


def share(value: float) -> str:
    """Return a share in per cent, with as many nines as it has."""
    return f"{100.0 * value:.4g} %" if value < 0.999 else f"{100.0 * value:.6g} %"


def _cells(tensor: ExtractedTensor) -> tuple[str, ...]:
    norm = "" if tensor.norm is None else f"{tensor.norm:.4g}"
    return in_a_line(tensor.name), str(tensor.rank), share(tensor.energy or 0.0), norm
