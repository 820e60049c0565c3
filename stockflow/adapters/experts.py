"""Experts of a layer in one tensor: factors of each of their matrices, put together as PEFT keeps them for parameters.

``A`` is ``[experts * rank, in]``, expert by expert; ``B`` is ``[out, rank * experts]``, rank by rank. Of two parameters
of a module the first that it declares is wrapped first. Source: ``ParamWrapper`` of PEFT 0.21.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stockflow.adapters.examiners import FactoredChange
from stockflow.adapters.peft import factor_keys
from stockflow.adapters.targets import Pair
from stockflow.checkpoints.adapters.experts import TURNED
from stockflow.checkpoints.adapters.keys import NESTED
from stockflow.checkpoints.files.header import TensorSpec, width_of
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.opening import Checkpoint
from stockflow.kernels.arrays import Bytes, Patterns
from stockflow.kernels.floats import FORMATS
from stockflow.planning.operands import Operand, stored
from stockflow.planning.spans import SPAN_ELEMS

PARAMETERS = ("gate_up_proj", "down_proj")
"""That hold the matrices of all experts, in the order in which modules declare them."""


@dataclass(frozen=True, slots=True)
class StackedTarget:
    """A tensor of the matrices of all experts of a layer."""

    module: str
    parameter: str
    num_experts: int
    shape: tuple[int, int]
    """of each matrix, as it is stored"""
    is_turned: bool
    """whether a matrix is stored as ``[in, out]``"""

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return f"{self.module}.{self.parameter}"

    def operand(self, number: int, checkpoint: Checkpoint, expert: int) -> Operand:
        """Return the matrix of one expert in a checkpoint, which is the ``number``-th."""
        spec, extent = checkpoint.specs[self.name], checkpoint.extents[self.name]
        start = extent.start + expert * math.prod(self.shape) * width_of(spec.dtype)
        return stored(number, spec, Extent(extent.file, start))


def stacked_targets(pair: Pair) -> Sequence[StackedTarget]:
    """Return the tensors of all experts of a layer that may be changed by factors: those stored as plain numbers."""
    is_turned = (pair.base.config or {}).get("model_type") in TURNED
    return [
        StackedTarget(module, parameter, shape[0], (shape[1], shape[2]), is_turned)
        for module, names in pair.parameters.items()
        for parameter in PARAMETERS
        if (name := f"{module}.{parameter}") in names
        if len(shape := pair.base.specs[name].shape) == 3 and pair.base.specs[name].num_elems and shape[2] <= SPAN_ELEMS
        if all(_is_plain(each, name) for each in (pair.base, pair.tuned))
    ]


def _is_plain(checkpoint: Checkpoint, name: str) -> bool:
    is_elsewhere = name in checkpoint.stored or name in checkpoint.joined
    return checkpoint.specs[name].dtype in FORMATS and not is_elsewhere


@dataclass(frozen=True, slots=True)
class StackedFactors:
    """Factors of all experts of a tensor."""

    a: Bytes
    b: Bytes
    squares: float
    """squared norm of the change"""
    energy: float
    """share of it that factors keep"""


def put_together(target: StackedTarget, changes: Sequence[FactoredChange], rank: int, dtype: str) -> StackedFactors:
    """Return the factors of all experts as PEFT has them; each is filled with zeros up to the rank of all."""
    rows, columns = target.shape[::-1] if target.is_turned else target.shape
    kind = np.dtype(f"u{width_of(dtype)}")
    a_XKC: Patterns = np.zeros((len(changes), rank, columns), kind)
    b_RKX: Patterns = np.zeros((rows, rank, len(changes)), kind)
    for expert, change in enumerate(changes):
        a_XKC[expert, : change.rank] = change.right.view(kind).reshape(change.rank, columns)
        b_RKX[:, : change.rank, expert] = change.left.view(kind).reshape(rows, change.rank)
    squares = math.fsum(change.squares for change in changes)
    kept = math.fsum(change.squares * change.kept for change in changes)
    return StackedFactors(a_XKC.reshape(-1).view(np.uint8), b_RKX.reshape(-1).view(np.uint8), squares, kept / squares)


def stacked_specs(target: StackedTarget, rank: int, dtype: str, *, is_inner: bool) -> tuple[TensorSpec, TensorSpec]:
    """Return A and B of a tensor of experts as they are written."""
    key_a, key_b = factor_keys(f"{target.module}{NESTED if is_inner else ''}", is_embedding=False)
    rows, columns = target.shape[::-1] if target.is_turned else target.shape
    stacked = rank * target.num_experts
    return TensorSpec(key_a, dtype, (stacked, columns)), TensorSpec(key_b, dtype, (rows, stacked))


def inner_targets(targets: Sequence[StackedTarget]) -> Mapping[StackedTarget, bool]:
    """Return of targets that changed whether another one of their module is wrapped around them."""
    names = {target.name for target in targets}
    outer = PARAMETERS[-1]
    return {target: target.parameter != outer and f"{target.module}.{outer}" in names for target in targets}
