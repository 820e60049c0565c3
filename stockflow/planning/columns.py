"""Columns: tensors of which each run of elements along the first dimension gets its own decision.

They are merged by rows, as what they are when they are transposed, so that no kernel knows of it.
"""

import math
from collections.abc import Iterable, Sequence

from stockflow.checkpoints.decodes.stored import Plain
from stockflow.checkpoints.decodes.transposed import Transposed
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.errors import PlanError
from stockflow.methods import METHODS
from stockflow.planning.experts.projections import Whole, part_of
from stockflow.planning.job import TensorJob, merging
from stockflow.planning.operands import Operand
from stockflow.text.strictjson import shown


def by_columns(jobs: Sequence[TensorJob]) -> Sequence[TensorJob]:
    """Return jobs, of those whose parameters ask for columns the ones that merge these as rows.

    Raises:
        PlanError: the numbers of one are stored in a way that cannot be read column by column.
    """
    if not any(METHODS[name].columns_if for name in METHODS.keys() & {job.method for job in jobs}):
        return jobs
    return [_turned(job) if _is_asked(job) else job for job in jobs]


def _is_asked(job: TensorJob) -> bool:
    method, given = job.result.declared, job.result.parameters
    asks = method.columns_if is not None and given.flag(method.columns_if) and method.asks_for_rows(given)
    return asks and len(job.output.shape) > 1


def _turned(job: TensorJob) -> TensorJob:
    spec, result = job.output, job.result
    are_plain = job.reading.is_plain and isinstance(result.encode, Plain)
    if not are_plain or not all(isinstance(each.decode, Plain) for each in job.reading.operands):
        raise PlanError(
            f"{shown(spec.name)} cannot be taken column by column, as `{result.declared.columns_if}` asks: its rows "
            "follow a vocabulary, or some model stores it in codes, with an adapter, or transposed; name it in a rule "
            "with another method"
        )
    seen = TensorSpec(spec.name, spec.dtype, (math.prod(spec.shape[1:]), spec.shape[0]))
    merged = merging(seen, _transposed(job.reading.operands), result.method, result.parameters, "row")
    return part_of(merged, Whole(job.whole or spec, Transposed(spec.dtype)))


def _transposed(operands: Iterable[Operand]) -> tuple[Operand, ...]:
    return tuple([each._replace(decode=Transposed(each.decode.dtype)) for each in operands])
