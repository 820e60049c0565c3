"""Factors of low rank that a tensor's changes are made of, read by themselves: their products need no element.

``<s B A, t D C> = s t sum((B^T D) * (A C^T))``, so that a Gram takes megabytes where the base has gigabytes.
"""

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from stockflow.checkpoints.decodes.low_rank import LowRank
from stockflow.checkpoints.decodes.stored import verbatim
from stockflow.checkpoints.files.layout import Extent
from stockflow.planning.job import Reading, TensorJob
from stockflow.planning.operands import Operand


@dataclass(frozen=True, slots=True)
class Factor:
    """All bytes of A or of B of one operand, as a work of its own."""

    job: TensorJob
    operand: int
    is_b: bool
    reading: Reading
    num_sweeps: int = 1
    output_width: int = 0
    kept_bytes: int = 0
    ahead_bytes: int = 0
    place_beside: tuple[int, int] = (0, 0)

    @property
    def kind(self) -> Hashable:
        """No kernel goes over bytes."""
        return Factor

    @property
    def costs(self) -> Hashable:
        """The number of bytes."""
        return Factor, self.reading.num_elems

    @property
    def place(self) -> tuple[int, Extent, int]:
        """The checkpoint it is read from, where its bytes begin there, and their number."""
        (own,) = self.reading.operands
        return own.checkpoint, own.extents[0], self.reading.num_elems

    def scratch_bytes(self, num_elems: int) -> int:
        """Return nothing."""
        del num_elems
        return 0

    def span_state_bytes(self, num_groups: int) -> int:
        """Return nothing."""
        del num_groups
        return 0


@dataclass(slots=True)
class FactorRanges:
    """Where factors lie that stay in memory from their products to the merge of what they change."""

    by_file: dict[tuple[int, str], list[tuple[int, int]]] = field(default_factory=dict)
    """begins and ends in ascending order, by checkpoint and file"""

    @classmethod
    def of(cls, jobs: Iterable[TensorJob]) -> "FactorRanges":
        """Return the ranges of all factors of these jobs."""
        made = cls()
        for checkpoint, extent, size in sorted({factor.place for factor in factors_of(jobs)}):
            made.by_file.setdefault((checkpoint, extent.file), []).append((extent.start, extent.start + size))
        return made

    def covering(self, checkpoint: int, file: str, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the factors that bytes of a file are of, in order; none if any byte is of something else."""
        known = self.by_file.get((checkpoint, file), [])
        first = max(bisect_right(known, start, key=lambda each: each[0]) - 1, 0)
        found = known[first : bisect_right(known, stop - 1, key=lambda each: each[0])]
        is_whole = bool(found) and found[0][0] <= start and stop <= found[-1][1]
        return found if is_whole and all(one[1] == other[0] for one, other in pairwise(found)) else []


def batches(jobs: Iterable[TensorJob], room: int) -> Iterator[tuple[list[TensorJob], FactorRanges]]:
    """Yield runs of jobs that are merged one after the other, and which factors are held meanwhile, if they fit.

    Args:
        jobs: in the order of the output.
        room: bytes that factors may take.
    """
    run: list[TensorJob] = []
    filled = 0
    if not room:
        yield list(jobs), FactorRanges()
        return
    for job in jobs:
        size = factor_bytes(job)
        is_alike = not size or not filled or filled + size <= room or min(filled, size) > room
        if not is_alike:
            yield run, _held(run, filled, room)
            run, filled = [], 0
        run.append(job)
        filled += size
    if run:
        yield run, _held(run, filled, room)


def factor_bytes(job: TensorJob) -> int:
    """Return what the factors of a tensor's changes take as they are stored, where these are known by them."""
    return sum(factor.reading.num_elems for factor in factors_of([job]))


def _held(run: list[TensorJob], filled: int, room: int) -> FactorRanges:
    return FactorRanges.of(run) if 0 < filled <= room else FactorRanges()


def factors_of(jobs: Iterable[TensorJob]) -> Iterator[Factor]:
    """Yield the factors of the jobs whose changes are known by them: operand by operand, A before B."""
    for job in jobs:
        for number, operand in enumerate(job.reading.operands if job.has_known_changes else ()):
            if isinstance(operand.decode, LowRank):
                yield from (_factor(job, number, operand, is_b=is_b) for is_b in (False, True))


def _factor(job: TensorJob, number: int, operand: Operand, *, is_b: bool) -> Factor:
    place = -1 if is_b else -2
    decode, shape = operand.decode, job.reading.shape
    assert isinstance(decode, LowRank)
    size = decode.ranges(shape, 0, job.reading.num_elems)[place].stop
    own = Operand(operand.checkpoint, operand.name, (operand.extents[place],), verbatim(decode.dtypes[place]))
    return Factor(job, number, is_b, Reading(job.reading.name, (size,), (own,)))
