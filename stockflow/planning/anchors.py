"""Anchors: operands that begin with the very bytes of the first one, as adapters of one base do, read these once."""

from collections.abc import Sequence
from dataclasses import replace

from stockflow.checkpoints.decodes.low_rank import on_anchor
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.job import TensorJob
from stockflow.planning.operands import Operand
from stockflow.storage import halves_of


def with_shared_reads(jobs: Sequence[TensorJob], checkpoints: Sequence[Checkpoint]) -> list[TensorJob]:
    """Return the jobs, with what operands of one base have in common read once."""
    shared = _SharedBase(checkpoints)
    return [shared.read_once(job) for job in jobs] if shared.is_shared else list(jobs)


class _SharedBase:
    """Which checkpoints are one base, alone or with an adapter."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Take the checkpoints of a plan."""
        urls = [halves_of(each.url)[0] for each in checkpoints]
        self._bases = [urls.index(url) for url in urls]
        self.is_shared = len(set(urls)) < len(urls)
        self._files = [each.files for each in checkpoints]

    def read_once(self, job: TensorJob) -> TensorJob:
        """Return a job whose operands take from the first one what they have of the same bytes."""
        anchor, *others = job.reading.operands
        if job.is_copy or anchor.rows is not None or not others:
            return job
        operands = tuple(self._on(anchor, each) for each in others)
        if operands == tuple(others):
            return job
        return replace(job, reading=replace(job.reading, operands=(anchor, *operands)))

    def _on(self, anchor: Operand, other: Operand) -> Operand:
        shared = anchor.extents == other.extents[: len(anchor.extents)]
        if not shared or other.rows is not None or self._bases[anchor.checkpoint] != self._bases[other.checkpoint]:
            return other
        ours, theirs = self._files[anchor.checkpoint], self._files[other.checkpoint]
        if any(ours[extent.file] != theirs[extent.file] for extent in anchor.extents):
            return other
        decode = on_anchor(other.decode, anchor.decode)
        return other if decode is None else other._replace(decode=decode)
