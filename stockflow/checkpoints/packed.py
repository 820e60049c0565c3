"""Packed weights: numbers that mean nothing without the scales beside them, told from names, dtypes and neighbours.

A config says what was meant, the tensors what is there: the two disagree in several published families.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from stockflow.checkpoints.files.header import DTYPES, TensorSpec

Specs = Mapping[str, TensorSpec]

_CODE_DTYPES = frozenset(
    name for name, dtype in DTYPES.items() if dtype.kind == "packed" or (dtype.kind == "integer" and dtype.bits <= 32)
) - {"BOOL"}
"""What codes are stored in; indices and counters are mostly of 64 bits, masks of one."""
_SCALE = re.compile(r"(^|[._])(scale|scales|scale_inv|scale_2|absmax|scb|qscale_weight|weight_scales?\w*)$", re.I)
_TABLE = re.compile(r"(^|[._])(q?zeros?|zero_point|g_idx|shape|format|q_scale|q_groups?|q_group_map|q_invperm|q_perm)$")
"""Integers beside codes and scales."""
_COUNT = re.compile(r"(^|_)(bias|ids?|idx|index|mask|steps?|count(er)?|tracked)$", re.I)
"""Integers of a model of plain numbers."""
_SCALES_OF_CODES = ("weight_scale_inv", ".weight_scale", "_proj_scale_inv")
_SCALES_OF_WEIGHTS = (*_SCALES_OF_CODES, ".SCB", ".weight.absmax")
"""Ends of the names of scales; those after the first three are beside weights of several formats."""
_KEPT_PLAIN = re.compile(r"(^|[._])bias$")
"""Beside codes, but a tensor of plain numbers."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The packed tensors of one format in one checkpoint."""

    format: str
    """as its users call it"""
    codes: tuple[str, ...]
    parts: frozenset[str]
    """codes and whatever belongs to them: scales, zero points, shapes, tables"""


Siblings = Mapping[str, TensorSpec]
"""What lies in the same module, by what its name has beyond the module's."""


def _gptq_or_awq(code: TensorSpec, siblings: Siblings) -> str:
    scales = siblings.get("scales")
    if scales is not None and scales.shape[-1:] == code.shape[-1:]:
        return "GPTQ"
    return "GPTQ" if "g_idx" in siblings else "AWQ"


def _compressed(code: TensorSpec, siblings: Siblings) -> str:
    if "weight_global_scale" in siblings:
        return "compressed-tensors (NVFP4)"
    return "compressed-tensors (MXFP4)" if code.dtype == "U8" else "compressed-tensors"


_BY_NAME: tuple[tuple[re.Pattern[str], Callable[[TensorSpec, Siblings], str]], ...] = tuple(
    (re.compile(rf"(^|\.)({pattern})$"), tell)
    for pattern, tell in (
        (r"qweight", _gptq_or_awq),
        (r"weight_packed", _compressed),
        (r"\w+_blocks", lambda *_: "MXFP4"),
        (r"W_q", lambda *_: "HQQ"),
        (r"Qidxs(_\d)?", lambda *_: "QuIP#"),
        (r"codes", lambda *_: "AQLM"),
        (r"q_weight", lambda *_: "EXL2"),
        (r"trellis", lambda *_: "EXL3"),
        (r"(res_)?indices", lambda *_: "VPTQ"),
        (r"dqweight", lambda *_: "FP-Quant"),
        (r"weight\._data(\.\w+)?", lambda *_: "quanto"),
        (r"weight_qdata|_weight_qdata", lambda *_: "torchao"),
        (r"bitmask", lambda *_: "compressed-tensors (2:4 sparse)"),
        (r"B(_24|_meta)?|meta", lambda *_: "Marlin"),
    )
)
"""Names that only codes have."""
_NEEDS = {
    "codes": "codebooks",
    **dict.fromkeys(("indices", "res_indices"), "centroids"),
    "bitmask": "compressed",
    **dict.fromkeys(("B", "B_24", "B_meta", "meta"), "s"),
}
"""Names that are codes only beside another."""


UNPACKED = "Give the 16-bit model it was made from, or a copy of it that was dequantised to bfloat16"
"""What to do about them."""


def packed_weights(specs: Specs) -> tuple[PackedWeights, ...]:
    """Return what of a checkpoint is packed, by format; nothing for one of plain numbers, whatever its config says."""
    candidates = [spec for spec in specs.values() if spec.dtype in _CODE_DTYPES]
    if not candidates:
        return ()
    modules = by_module(specs)
    codes: dict[str, list[str]] = {}
    for spec in candidates:
        module, _, own = spec.name.rpartition(".")
        siblings = modules[module] | _attached(modules, spec.name)
        found = _format_of(spec, own, siblings)
        if found:
            codes.setdefault(found, []).append(spec.name)
    return tuple(PackedWeights(name, tuple(found), _parts(modules, found)) for name, found in codes.items())


def leftover_scales(specs: Specs) -> tuple[list[str], list[str]]:
    """Return the scales that belong to no codes: beside weights of plain numbers, and of weights that are not there.

    Those of codes that are read are no tensors of a checkpoint.
    """
    beside, alone = list[str](), list[str]()
    coded = {_module_of_codes(name) for name, spec in specs.items() if spec.kind != "float"}
    for name in specs:
        if name.endswith(_SCALES_OF_WEIGHTS):
            weight = specs.get(_weight_of(name))
            if weight is not None and weight.kind == "float":
                beside.append(name)
            elif weight is None and name.endswith(_SCALES_OF_CODES) and name.rpartition(".")[0] not in coded:
                alone.append(name)
    return beside, alone


def _module_of_codes(name: str) -> str | None:
    module, _, own = name.rpartition(".")
    return None if own.endswith(("shape", "scale")) else module


def _weight_of(scale: str) -> str:
    return re.sub(r"_scale(_inv)?$|[.]absmax$", "", re.sub(r"[.]SCB$", ".weight_scale", scale))


def by_module(specs: Specs) -> dict[str, dict[str, TensorSpec]]:
    """Return the tensors of each module, by what their names have beyond the module's."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module, _, own = name.rpartition(".")
        modules.setdefault(module, {})[own] = spec
    return modules


def _attached(modules: Mapping[str, Siblings], code: str) -> dict[str, TensorSpec]:
    """What is named like something inside a tensor, as ``weight.absmax`` is."""
    inside = {**modules.get(code, {}), **modules.get(f"{code}.quant_state", {})}
    return {f"weight.{own}": spec for own, spec in inside.items()}


def _format_of(spec: TensorSpec, own: str, siblings: Siblings) -> str | None:
    """What a tensor is a code of; None if it is none, but a scale or an index."""
    if _SCALE.search(own) or _TABLE.search(own):
        return None
    for pattern, tell in _BY_NAME:
        if pattern.search(spec.name) and (own not in _NEEDS or _NEEDS[own] in siblings):
            return tell(spec, siblings)
    if spec.kind == "packed":
        return _float_format(spec, siblings)
    scales = [name for name, each in siblings.items() if each is not spec and _is_scale_of(name, each, own, spec)]
    is_matrix = own == "weight" and len(spec.shape) > 1
    if not scales:
        return f"packed {spec.dtype}" if is_matrix else None
    return _integer_format(spec, siblings) if spec.shape else None


def _is_scale_of(name: str, scale: TensorSpec, own: str, code: TensorSpec) -> bool:
    """Return whether a tensor may be the scales of integers: their names share a stem, and there are fewer."""
    if not _SCALE.search(name) or _COUNT.search(own) or scale.num_elems >= code.num_elems:
        return False
    stem, own = _SCALE.sub("", name).strip("._").lower(), own.lower()
    return stem in own or own in stem


def _float_format(spec: TensorSpec, siblings: Siblings) -> str:
    if not spec.dtype.startswith("F8"):
        return f"FP{spec.dtype[1]}"
    scale = next((siblings[name] for name in ("weight_scale_inv", "scale") if name in siblings), None)
    return "FP8 block" if scale is not None and len(scale.shape) > 1 else "FP8"


def _integer_format(spec: TensorSpec, siblings: Siblings) -> str:
    if "SCB" in siblings:
        return "bitsandbytes (LLM.int8)"
    if any("absmax" in name for name in siblings):
        is_fp4 = any("fp4" in name and "nf4" not in name for name in siblings)
        return f"bitsandbytes ({'FP4' if is_fp4 else 'NF4'})"
    if spec.dtype == "U32" and "scales" in siblings:
        return "MLX"
    if "weight_scales" in siblings:
        return "EETQ"
    if "scale" in siblings and siblings["scale"].dtype == "F8_E8M0":
        return "MXFP4"
    if "weight_scale_2" in siblings:
        return "NVFP4"
    return "INT8 with scales" if spec.dtype == "I8" else f"packed {spec.dtype} with scales"


def _parts(modules: Mapping[str, Siblings], codes: list[str]) -> frozenset[str]:
    return frozenset(name for code in codes for name in _of_code(modules, code))


def _of_code(modules: Mapping[str, Siblings], code: str) -> Iterator[str]:
    beside = {**modules[code.rpartition(".")[0]], **_attached(modules, code)}
    yield from (spec.name for own, spec in beside.items() if not _KEPT_PLAIN.search(own))
