"""Layer units: the experts of a layer that are decided as one, gate and up in one, however many tensors they are.

The order of their elements is that of a tensor that holds all: expert by expert, gate before up.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from stockflow.checkpoints.naming import projection_of
from stockflow.planning.job import TensorJob
from stockflow.text.strictjson import shown


@dataclass(frozen=True)
class LayerUnit:
    """Jobs that are decided as one."""

    name: str
    members: tuple[TensorJob, ...]
    """in the order of their elements"""

    @property
    def num_elems(self) -> int:
        """Elements of all members."""
        return sum(job.reading.num_elems for job in self.members)

    @cached_property
    def firsts(self) -> Mapping[str, int]:
        """Flat index in the unit of the first element of each member, by the name of its reading."""
        sizes = accumulate((job.reading.num_elems for job in self.members), initial=0)
        return {job.reading.name: first for job, first in zip(self.members, sizes, strict=False)}


def layer_units(jobs: Iterable[TensorJob]) -> list[LayerUnit]:
    """Return the units that span several jobs, in the order of their first ones."""
    members: dict[str, list[TensorJob]] = {}
    for job in jobs:
        if job.decided_in:
            members.setdefault(job.decided_in, []).append(job)
    return [LayerUnit(name, tuple(sorted(own, key=_place))) for name, own in members.items()]


def with_layers_together(jobs: Sequence[TensorJob]) -> list[TensorJob]:
    """Return jobs in their order, but for those that are decided as one, which follow the first of them."""
    own: dict[str, list[TensorJob]] = {}
    for job in jobs:
        own.setdefault(job.decided_in, []).append(job)
    if own.keys() <= {""}:
        return list(jobs)
    return [each for job in jobs for each in (own.pop(job.decided_in, []) if job.decided_in else [job])]


def segments(jobs: Iterable[TensorJob]) -> Iterator[list[TensorJob]]:
    """Yield runs of jobs that are merged one after the other: those that are decided as one, and what lies between."""
    for _, run in groupby(jobs, key=lambda job: job.decided_in):
        yield list(run)


def unlike_members(jobs: Iterable[TensorJob]) -> Iterator[str]:
    """Yield which experts cannot be decided as one: they are merged in several ways."""
    for unit in layer_units(jobs):
        first, *others = unit.members
        unlike = next((job for job in others if not _are_alike(first, job)), None)
        if unlike:
            yield (
                f"{shown(first.reading.name)} and {shown(unlike.reading.name)} are decided as one, as `scope: layer` "
                "says, and have several methods, parameters or dtypes; give all experts of a layer the same"
            )


def _are_alike(left: TensorJob, right: TensorJob) -> bool:
    one, other = left.result, right.result
    return (
        (one.method, one.dtype, one.float_bits, one.working_bits, len(left.reading.operands))
        == (other.method, other.dtype, other.float_bits, other.working_bits, len(right.reading.operands))
    ) and one.parameters == other.parameters


def _place(job: TensorJob) -> tuple[int, bool]:
    part = projection_of(job.reading.name)
    return (part.expert, part.role == "up") if part else (0, False)
