"""Factors of low rank that a tensor's changes are made of, read by themselves: their products need no element.

``<s B A, t D C> = s t sum((B^T D) * (A C^T))``, so that a Gram takes megabytes where the base has gigabytes.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from stockflow.checkpoints.decodes.low_rank import LowRank
from stockflow.checkpoints.decodes.stored import verbatim
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

    def scratch_bytes(self, num_elems: int) -> int:
        """Return nothing."""
        del num_elems
        return 0

    def span_state_bytes(self, num_groups: int) -> int:
        """Return nothing."""
        del num_groups
        return 0


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
