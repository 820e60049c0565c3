"""Fixed numbers: integers, indices, masks and frequencies, carried over if all models agree and never averaged."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.values import MASKS, Floats, as_numbers
from stockflow.planning.job import COPY, COPY_EQUAL, TensorJob, copying
from stockflow.planning.misfits import THEM, Misfit
from stockflow.planning.operands import Operand
from stockflow.planning.targets import OutputTensor
from stockflow.text.strictjson import shown

MAX_VALUES_SHOWN = 4
_ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""How far rounding to a dtype may take a number of its normal range, relative to it, at most."""


def is_fixed(target: OutputTensor) -> bool:
    """Return whether the donor's tensor of floats holds no weights, but indices, a mask or frequencies."""
    checkpoints, names = target.stretch.checkpoints, target.names
    if not _is_known(checkpoints[0], names[0]):
        return False
    # a mask is one in all models: what begins as ones and is trained is none
    return not names[0].endswith(MASKS) or all(map(_is_known, checkpoints, names))


def _is_known(checkpoint: Checkpoint, name: str) -> bool:
    known = checkpoint.values.fixed
    return bool(known) and checkpoint.extents.get(name) in known


def are_known(target: OutputTensor, indices: Sequence[int]) -> bool:
    """Return whether a tensor of floats in some models has one shape, and values that were read in all of them."""
    specs = [target.source(index) for index in indices]
    is_alike = len({spec.shape for spec in specs}) == 1 and any(spec.kind == "float" for spec in specs)
    return is_alike and all(_read(target, index) is not None for index in indices)


def carried_over(target: OutputTensor, operands: Mapping[int, Operand]) -> TensorJob | list[Misfit]:
    """Return the job that carries a tensor over, or in which models its values are others, as far as they were read.

    Args:
        target: what is written.
        operands: by index of the models that are to agree, the one that gives the bytes first.
    """
    spec, order = target.spec, list(operands)
    known = {index: numbers for index in order if (numbers := _read(target, index)) is not None}
    first = known.get(order[0])
    dtypes = {index: target.source(index).dtype for index in order}
    others = [
        index
        for index, numbers in known.items()
        if first is not None and not _are_one(numbers, first, {dtypes[index], spec.dtype})
    ]
    if others:
        return [_unlike(spec.name, {target.stretch.urls([index]): known[index] for index in (order[0], *others)})]
    if any(operand.decode.dtype != spec.dtype for operand in operands.values()):
        return copying(spec, (operands[order[0]],), COPY)
    return copying(spec, tuple(operands.values()), COPY_EQUAL)


def _are_one(numbers: Floats, first: Floats, dtypes: Collection[str]) -> bool:
    """Return whether numbers are equal, but for what the coarser one of two dtypes rounds away."""
    tolerance = max(_ROUNDING.get(dtype, 0.0) for dtype in dtypes) if len(dtypes) > 1 else 0.0
    return np.array_equal(numbers, first) or bool(tolerance and np.allclose(numbers, first, rtol=tolerance, atol=0))


def _read(target: OutputTensor, index: int) -> Floats | None:
    checkpoint, name = target.stretch.checkpoints[index], target.names[index]
    payload = checkpoint.values.data.get(checkpoint.extents[name])
    return None if payload is None else as_numbers(payload, checkpoint.specs[name].dtype)


def _unlike(name: str, values: Mapping[str, Floats]) -> Misfit:
    said = ", ".join(f"{_shown(numbers)} in {url}" for url, numbers in values.items())
    donor = next(iter(values))
    remedy, action = f"a rule with `action: copy` takes {THEM} from {donor}", "copy"
    if name.rpartition(".")[2] in ("d2t", "t2d"):
        remedy, action = "the rows of its head are of other tokens: merge drafts of one vocabulary", ""
    elif name.endswith("._extra_state"):
        remedy, action = f"TransformerEngine measures {THEM} anew: a rule with `action: skip` leaves {THEM} out", "skip"
    elif name.endswith((".weight_mask", ".bias_mask")):
        remedy, action = "`torch.nn.utils.prune.remove` makes it part of its weight", ""
    return Misfit(
        name, f"not equal in all models: {said}", f"an average of such numbers means nothing; {remedy}", action
    )


def _shown(numbers: Floats) -> str:
    few = [int(number) if number.is_integer() else number for number in numbers[:MAX_VALUES_SHOWN].tolist()]
    if len(numbers) == 1:
        return shown(few[0])
    return f"{', '.join(map(shown, few))}{' ...' * (len(numbers) > MAX_VALUES_SHOWN)}"
