"""Precision: tensors that every model stores finer than the rest of its weights keep their dtype; ranges of dtypes."""

from collections.abc import Collection, Mapping, Sequence

from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.targets import OutputTensor
from stockflow.recipe import Recipe

_WIDER = {"F16": {"BF16", "F32", "F64"}, "BF16": {"F64"}, "F32": {"F64"}}
"""dtypes of floats that reach farther than another one"""


def has_smaller_range(output: str, operands: Collection[str]) -> bool:
    """Return whether numbers of operands may be beyond what the output holds, at either end."""
    return not _WIDER.get(output, set()).isdisjoint(operands)


def main_dtype(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the float dtype that most elements of a checkpoint are stored in; None if it has no floats."""
    floats = {dtype for dtype in {spec.dtype for spec in specs.values()} if DTYPES[dtype].kind == "float"}
    if len(floats) < 2:
        return next(iter(floats), None)
    sizes = dict.fromkeys(sorted(floats), 0)
    for spec in specs.values():
        if spec.dtype in floats:
            sizes[spec.dtype] += spec.num_elems
    return max(sizes, key=lambda dtype: sizes[dtype])


def kept_above(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> tuple[int, ...]:
    """Return per checkpoint above how many bits a tensor counts as meant finer; nothing if none is kept finer."""
    asked = recipe.output_dtype
    if asked is None or not recipe.stockflow.keep_precision:
        return ()
    by_layout = {id(each.specs): each.specs for each in checkpoints}
    mains = {layout: main_dtype(specs) for layout, specs in by_layout.items()}
    return tuple(max(_bits(asked), _bits(mains[id(each.specs)])) for each in checkpoints)


def kept_dtype(target: OutputTensor, indices: Sequence[int], above: Sequence[int]) -> str | None:
    """Return the dtype of a tensor that stays finer than asked: each of its models stores it finer than its rest.

    A router's bias in F32 among weights in BF16 is meant so; a checkpoint in F32 is cast as asked.
    """
    numbers, finest = target.stretch.numbers, ""
    for index in indices if above else ():
        dtype = target.source(index).dtype
        if _bits(dtype) <= above[numbers[index]]:
            return None
        finest = max(finest, dtype, key=_bits)
    return finest or None


def _bits(dtype: str | None) -> int:
    return DTYPES[dtype].bits if dtype else 0
