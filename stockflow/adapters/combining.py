"""Combining adapters as planned, module by module in float64, each number rounded once; and what came of it."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from stockflow.adapters.card import combination_card
from stockflow.adapters.combination import CombinationPlan, CombinedModule, CombinedTensor, Sources, ranks_in_words
from stockflow.adapters.peft import AdapterDescription
from stockflow.adapters.pieces import AdapterPieces
from stockflow.adapters.publishing import FINISHED, AdapterPlan, admit, claimed, publish
from stockflow.adapters.record import AdapterRecord, factor_row, is_whole, read_record, share, whole_row
from stockflow.adapters.sketch import Factors
from stockflow.adapters.truncation import decomposed
from stockflow.ahead import map_ahead
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.errors import BudgetError, NumericsError
from stockflow.events import Done, Moved, Note, OnEvent, Stage
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.once import rounded
from stockflow.output.manifest import PublishedFile
from stockflow.planning.budget import BASELINE_BYTES, client_bytes
from stockflow.planning.plan import CheckpointRef
from stockflow.storage import Store, own_key, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import gb, least_mib, mib
from stockflow.text.tables import grid

BLOCK_ELEMS = 2**21
"""Elements of a tensor that is held whole which are added up at a time."""
NUM_COPIES = 4
"""Factors of a module in float64, as read, side by side, decomposed and rounded."""
NUM_SHOWN = 20


class CombinedFactors(NamedTuple):
    """The factors of a module as they are written."""

    a: Bytes
    b: Bytes
    energy: float
    """share of the squared norm of the sum that they keep"""


@dataclass(frozen=True)
class CombinedAdapter:
    """An adapter that was made of others."""

    plan: CombinationPlan
    energies: Mapping[str, float]
    """by module, the share of the squared norm that its rank keeps"""
    files: Mapping[str, PublishedFile]
    seconds: float

    @property
    def output_url(self) -> str:
        """Where it is."""
        return self.plan.output_url

    def facts(self) -> dict[str, object]:
        """Return all of it for programs."""
        files = {key: asdict(file) for key, file in self.files.items()}
        return {**self.plan.facts(), "energy": dict(self.energies), "files": files, "seconds": self.seconds}

    def lines(self) -> Iterator[str]:
        """Yield a summary for people, with the modules of which the least is kept."""
        size = gb(sum(file.size for file in self.files.values()))
        yield f"adapter {redact(self.output_url)}: {size} in {self.seconds:.1f} s"
        yield f"  {len(self.plan.modules):,} modules with factors of {ranks_in_words(self.plan.modules)}"
        cut = {name: kept for name, kept in self.energies.items() if kept < 1.0}
        if cut:
            rows = sorted(cut.items(), key=lambda item: item[1])[:NUM_SHOWN]
            cells = ((in_a_line(name), str(self.plan.ranks[name]), share(kept)) for name, kept in rows)
            yield from grid([("module", "rank", "energy kept"), *cells])

    def __str__(self) -> str:
        return "\n".join(self.lines())


def combine(
    plan: CombinationPlan,
    sources: Sources,
    output: Store,
    recipe_text: str,
    *,
    memory_bytes: int,
    num_threads: int,
    overwrite: bool,
    on_event: OnEvent,
) -> CombinedAdapter:
    """Combine adapters and publish the result.

    Args:
        plan: of them.
        sources: the adapters, by the numbers that the plan has for them.
        output: where the result goes.
        recipe_text: for the card.
        memory_bytes: bound of this process.
        num_threads: that read and compute modules side by side.
        overwrite: whether an adapter at the output is replaced.
        on_event: told how it goes.

    Raises:
        UserError: the output is taken, a number is beyond the dtype, or the memory is too small.
        StorageError: storage failed after retries.
    """
    began = time.time()
    threads = _num_threads(plan, sources, output, memory_bytes, num_threads)
    made = _adapter_plan(plan, sources, recipe_text)
    found = admit(output, made, plan.num_bytes, overwrite=overwrite)
    if found.finished and not overwrite:
        on_event(Note(FINISHED))
        return _on_record(plan, read_record(output, found.finished))
    with claimed(output, made, found, began, on_event) as (pieces, tell):
        _combine(plan, sources, pieces, threads, tell)
        card, energies = combination_card(plan, recipe_text), _energies(pieces)
        summary = {"tensors": len(pieces.rows), "seconds_total": pieces.seconds}
        manifest = publish(output, made, pieces, _described(plan).encode(), card, summary, tell)
    return CombinedAdapter(plan, energies, manifest.files, pieces.seconds)


def _combine(plan: CombinationPlan, sources: Sources, pieces: AdapterPieces, threads: int, tell: OnEvent) -> None:
    """Make all that no earlier run made."""
    modules = [each for each in plan.modules if each.module not in pieces.rows]
    tensors = [each for each in plan.tensors if each.spec.name not in pieces.rows]
    num_items = len(modules) + len(tensors)
    tell(Stage("reading the inputs", total_bytes=plan.num_read, num_items=num_items, unit="tensors"))
    with ThreadPoolExecutor(threads, thread_name_prefix="combine") as pool:
        found = map_ahead(pool, threads, lambda module: _factors_of(module, plan.dtype, sources), modules)
        for module, factors in zip(modules, found, strict=True):
            spec = TensorSpec(module.module, plan.dtype, module.shape)
            held = zip(module.specs(plan.dtype), factors[:2], strict=True)
            pieces.num_read += _tell(tell, module, sources)
            pieces.add(factor_row(spec, module.rank, factors.energy), *held)
        for tensor in tensors:
            pieces.add(whole_row(tensor.spec), (tensor.spec, _added(tensor, sources)))
            tell(Done(tensor.spec.name))
    pieces.flush()


def _adapter_plan(plan: CombinationPlan, sources: Sources, recipe_text: str) -> AdapterPlan:
    stores = [source.store for source in sources if source]
    files = [source.adapter.files for source in sources if source]
    stamps = ({own_key(key): stamp for key, stamp in each.items()} for each in files)
    left_out = ("output_url", "urls", "num_read")
    return AdapterPlan(
        checkpoints=tuple(CheckpointRef(store.url, each) for store, each in zip(stores, stamps, strict=True)),
        pins=tuple(store.pin for store in stores),
        settings={name: value for name, value in asdict(plan).items() if name not in left_out},
        made_by=recipe_text,
    )


def _energies(pieces: AdapterPieces) -> Mapping[str, float]:
    return {row.name: row.facts["energy"] for row in pieces.rows.values() if not is_whole(row)}


def _on_record(plan: CombinationPlan, record: AdapterRecord) -> CombinedAdapter:
    """Return what a finished adapter is by its records."""
    energies = {each.name: each.energy for each in record.tensors if each.energy is not None}
    return CombinedAdapter(plan, energies, record.manifest.files, record.manifest.summary["seconds_total"])


def _num_threads(plan: CombinationPlan, sources: Sources, output: Store, memory_bytes: int, most: int) -> int:
    """Return how many modules may be in memory side by side, and at most ``most``.

    Raises:
        BudgetError: none may.
    """
    urls = [source.store.url for source in sources if source]
    fixed = BASELINE_BYTES["cpu"] + client_bytes(urls, output.url, plan.num_bytes)
    largest = max(plan.modules, key=_held_bytes)
    whole = max((2 * each.spec.num_bytes + 24 * BLOCK_ELEMS for each in plan.tensors), default=0)
    least = fixed + max(_held_bytes(largest), whole)
    if least > memory_bytes:
        raise BudgetError(
            f"the factors of {largest.module!r} need at least {least_mib(least)} of memory, {mib(fixed)} of it for the "
            f"process itself; the limit is {mib(memory_bytes)}. Raise --memory"
        )
    return max(min(most, (memory_bytes - fixed) // _held_bytes(largest)), 1)


def _held_bytes(module: CombinedModule) -> int:
    return 8 * NUM_COPIES * module.summed_rank * sum(module.shape)


def _tell(on_event: OnEvent, module: CombinedModule, sources: Sources) -> int:
    """Tell that a module is done; return how many bytes were read of it."""
    read = [sources[share.source] for share in module.shares]
    keys = [share.keys for share in module.shares]
    sizes = (source.spec(key).num_bytes for source, pair in zip(read, keys, strict=True) if source for key in pair)
    num_read = sum(sizes)
    on_event(Moved(num_read))
    on_event(Done(module.module))
    return num_read


def _factors_of(module: CombinedModule, dtype: str, sources: Sources) -> CombinedFactors:
    left_RK, right_KC = _side_by_side(module, sources)
    energy = 1.0
    if not np.isfinite(left_RK).all():
        raise NumericsError(f"the factors of {module.module!r} overflow with these weights; give smaller ones")
    if module.rank < module.summed_rank:
        found = decomposed(left_RK, right_KC)
        energy = found.kept(module.rank)
        left_RK, right_KC = found.factors(module.rank)
        left_RK, right_KC = _filled(left_RK, right_KC, module.rank)
    spec_a, spec_b = module.specs(dtype)
    return CombinedFactors(_rounded(right_KC, spec_a), _rounded(left_RK, spec_b), energy)


def _side_by_side(module: CombinedModule, sources: Sources) -> Factors:
    """Return the factors of all shares: scaled columns of B, and rows of A as they are."""
    lefts, rights = [], []
    for each in module.shares:
        source = sources[each.source]
        assert source is not None
        key_a, key_b = each.keys
        rights.append(source.matrix(key_a))
        lefts.append(source.matrix(key_b) * each.weight)
    return Factors(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))


def _filled(left_RL: Floats, right_LC: Floats, rank: int) -> Factors:
    """Return factors with zeros up to a rank that is larger than the matrix has."""
    lacking = rank - left_RL.shape[1]
    return Factors(np.pad(left_RL, ((0, 0), (0, lacking))), np.pad(right_LC, ((0, lacking), (0, 0))))


def _added(tensor: CombinedTensor, sources: Sources) -> Bytes:
    """Return the weighted sum of a tensor that all hold whole."""
    parts = [_block(tensor, sources, start) for start in range(0, tensor.spec.num_elems, BLOCK_ELEMS)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def _block(tensor: CombinedTensor, sources: Sources, start: int) -> Bytes:
    stop = min(start + BLOCK_ELEMS, tensor.spec.num_elems)
    sum_E = np.zeros(stop - start)
    for number, key, weight in tensor.shares:
        source = sources[number]
        assert source is not None
        sum_E += weight * source.numbers(key, start, stop)
    return _rounded(sum_E, tensor.spec)


def _rounded(values: Floats, spec: TensorSpec) -> Bytes:
    found, are_finite = rounded(values, spec.dtype)
    if not are_finite:
        raise NumericsError(f"{spec.name!r} is beyond {spec.dtype}; name another `dtype`")
    return found


def _described(plan: CombinationPlan) -> AdapterDescription:
    return AdapterDescription(
        base=plan.base,
        ranks=plan.ranks,
        candidates=None,
        saved=plan.saved,
        has_biases=plan.has_biases,
        is_turned=plan.is_turned,
        task=plan.task,
    )
