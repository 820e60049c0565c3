"""Quantised tensors as they are published, and what they stand for by definition: numpy, no code of the product.

Sources: the published layouts; OCP Microscaling Formats v1.0 (E8M0, E2M1); arXiv:2209.05433 (E4M3, E5M2);
compressed-tensors, whose `pack_to_int32` turns -8 .. -1 into 0x76543210. torch makes the codes of FP8.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)


@dataclass(frozen=True)
class Quantised:
    """What lies in a module, and the numbers of its weight in float64."""

    tensors: Tensors
    values: np.ndarray


def drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def spread(scales: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Each scale repeated over its block, cut to the shape of the codes."""
    grid = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return grid[..., : shape[-2], : shape[-1]]


def fp8(
    values: torch.Tensor,
    block: tuple[int, int],
    *,
    scale: str = "F32",
    name: str = "weight_scale_inv",
    codes: torch.dtype = torch.float8_e4m3fn,
) -> Quantised:
    """Codes of eight bits with a scale per block; ``scale`` says how these are stored."""
    rows, columns = values.shape[-2:]
    grid = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    padded = torch.zeros(*values.shape[:-2], grid[-2] * block[0], grid[-1] * block[1])
    padded[..., :rows, :columns] = values
    amax = padded.reshape(*values.shape[:-2], grid[-2], block[0], grid[-1], block[1]).abs().amax((-3, -1))
    scales = (amax / torch.finfo(codes).max).clamp(min=2.0**-120)
    if scale in ("E8M0", "U8"):
        exponents = torch.ceil(torch.log2(scales)).to(torch.int32)
        scales, stored = torch.exp2(exponents.double()).float(), (exponents + 127).to(torch.uint8)
        stored = stored.view(torch.float8_e8m0fnu) if scale == "E8M0" else stored
    else:
        stored = scales.to({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[scale])
        scales = stored.float()
    over = spread(scales, tuple(values.shape), block)
    found = (values / over).clamp(-torch.finfo(codes).max, torch.finfo(codes).max).to(codes)
    return Quantised({"weight": found, name: stored}, (found.double() * over.double()).numpy())


def nibbles(codes: np.ndarray, per_container: int) -> np.ndarray:
    """Codes below 16 packed two to a byte, the first in the lower half, rows filled up with zeros."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // per_container) * per_container), np.uint8)
    padded[:, :columns] = codes
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def grouped(scales: np.ndarray, group: int, columns: int) -> np.ndarray:
    return np.repeat(scales.astype(np.float64), group, axis=1)[:, :columns]


def int4(values: np.ndarray, group: int = 32, *, most: float = 7.0) -> Quantised:
    """compressed-tensors pack-quantized, symmetric; scales of BF16, rounded before codes are chosen."""
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // group) * group))
    padded[:, :columns] = values
    amax = np.abs(padded.reshape(rows, -1, group)).max(-1)
    stored = torch.from_numpy(np.maximum(amax / most, 2.0**-60)).to(torch.bfloat16)
    over = grouped(stored.double().numpy(), group, columns)
    lowest = -8 if most > 7 else -7
    codes = np.clip(np.rint(values / over), lowest, 7)
    words = nibbles((codes + 8).astype(np.uint8), 8).view("<i4")
    shape = torch.tensor([rows, columns], dtype=torch.int32)
    tensors = {"weight_packed": torch.from_numpy(words.copy()), "weight_scale": stored, "weight_shape": shape}
    return Quantised(tensors, codes * over)


def e2m1(values: np.ndarray) -> np.ndarray:
    """The nearest code of four bits; ties to the even code."""
    magnitudes = np.abs(values)[..., None] - E2M1[:8]
    distance = np.abs(magnitudes)
    best = distance.argmin(-1)
    tied = (distance == distance.min(-1, keepdims=True)).sum(-1) > 1
    best = np.where(tied & (best % 2 == 1), best + 1, best)
    return (best + 8 * np.signbit(values)).astype(np.uint8)


def mxfp4_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes below 16, exponents (E8M0) per 32 columns, and the numbers; scales by the floor rule of OCP."""
    rows, columns = values.shape
    amax = np.maximum(np.abs(values.reshape(rows, -1, 32)).max(-1), 2.0**-100)
    exponents = np.frexp(amax)[1] - 1 - 2
    over = grouped(np.ldexp(1.0, exponents), 32, columns)
    codes = e2m1(np.clip(values / over, -6, 6))
    return codes, (exponents + 127).astype(np.uint8), E2M1[codes] * over


def mxfp4(values: np.ndarray, form: str) -> Quantised:
    """MXFP4 as Kimi-K3 (``packed``) and DeepSeek-V4 (``I8``) store it."""
    codes, exponents, numbers = mxfp4_codes(values)
    packed, scales = torch.from_numpy(nibbles(codes, 2)), torch.from_numpy(exponents)
    if form == "packed":
        return Quantised({"weight_packed": packed, "weight_scale": scales}, numbers)
    return Quantised({"weight": packed.view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}, numbers)


def mxfp4_blocks(values: np.ndarray, name: str = "gate_up_proj") -> Quantised:
    """MXFP4 as gpt-oss stores it: [experts, rows, groups, 16] bytes."""
    experts, rows, columns = values.shape
    codes, exponents, numbers = mxfp4_codes(values.reshape(-1, columns))
    blocks = torch.from_numpy(nibbles(codes, 2).reshape(experts, rows, columns // 32, 16))
    scales = torch.from_numpy(exponents.reshape(experts, rows, -1))
    return Quantised({f"{name}_blocks": blocks, f"{name}_scales": scales}, numbers.reshape(values.shape))


def nvfp4(values: np.ndarray, form: str) -> Quantised:
    """NVFP4 by modelopt (the whole tensor's scale multiplies) and by compressed-tensors (it divides)."""
    rows, columns = values.shape
    whole = np.float32(np.abs(values).max() / (6 * 448))
    amax = np.abs(values.reshape(rows, -1, 16)).max(-1)
    stored = torch.from_numpy(np.maximum(amax / 6 / whole, 2.0**-6)).to(torch.float8_e4m3fn)
    reciprocal = np.float32(1) / whole
    factor = float(whole) if form == "modelopt" else 1 / float(reciprocal)
    over = grouped(stored.double().numpy(), 16, columns) * factor
    codes = e2m1(np.clip(values / over, -6, 6))
    packed = torch.from_numpy(nibbles(codes, 2))
    if form == "modelopt":
        tensors = {"weight": packed, "weight_scale": stored, "weight_scale_2": torch.tensor(whole)}
        return Quantised(tensors | {"input_scale": torch.tensor(0.5)}, E2M1[codes] * over)
    tensors = {"weight_packed": packed, "weight_scale": stored, "weight_global_scale": torch.tensor([reciprocal])}
    return Quantised(tensors, E2M1[codes] * over)


Maker = Callable[[torch.Tensor], Quantised]
INT4: dict[str, object] = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
DEEPSEEK: dict[str, object] = {"weight_block_size": [128, 128]}


def by_numpy(make: Callable[..., Quantised], *given: object, **named: object) -> Maker:
    return lambda weight: make(weight.double().numpy(), *given, **named)


def by_row(weight: torch.Tensor) -> Quantised:
    return fp8(weight, (1, weight.shape[1]), scale="BF16", name="weight_scale")


def by_tensor(weight: torch.Tensor) -> Quantised:
    return fp8(weight, (weight.shape[0], weight.shape[1]), name="qscale_weight")


def e5m2(weight: torch.Tensor) -> Quantised:
    return fp8(weight, (weight.shape[0], weight.shape[1]), name="weight_scale", codes=torch.float8_e5m2)


FORMS: dict[str, tuple[Maker, dict[str, object]]] = {
    "DeepSeek-V3": (lambda w: fp8(w, (128, 128)), DEEPSEEK),
    "DeepSeek-V4": (lambda w: fp8(w, (128, 128), scale="E8M0", name="scale"), DEEPSEEK),
    "Qwen3": (lambda w: fp8(w, (128, 128), scale="BF16"), DEEPSEEK),
    "no config": (lambda w: fp8(w, (128, 128)), {}),
    "other blocks": (lambda w: fp8(w, (64, 32)), {"weight_block_size": [64, 32]}),
    "MiniMax-M3": (lambda w: fp8(w, (1, 32), scale="U8"), DEEPSEEK),
    "by row": (by_row, {}),
    "by tensor": (by_tensor, {}),
    "E5M2": (e5m2, {}),
    "Kimi-K2": (by_numpy(int4), INT4),
    "INT4 of 7.5": (by_numpy(int4, most=7.5), INT4),
    "INT4 by row": (by_numpy(int4, 416), {}),
    "Kimi-K3": (by_numpy(mxfp4, "packed"), {}),
    "DeepSeek-V4's experts": (by_numpy(mxfp4, "I8"), {}),
    "modelopt": (by_numpy(nvfp4, "modelopt"), {}),
    "NVFP4": (by_numpy(nvfp4, "compressed"), {}),
}
"""How published families store a weight, and what their config says of it."""
NVFP4 = ("modelopt", "NVFP4")
"""Those that are read, and not written."""


def same_codes(found: torch.Tensor, expected: torch.Tensor, *, is_f4: bool = False) -> float:
    """Share of equal bytes; zeros of either sign are equal."""
    pairs = [each.view(torch.uint8).numpy().astype(int) for each in (found, expected)]
    if is_f4:
        pairs = [np.stack([np.where(half == 8, 0, half) for half in (each & 15, each >> 4)]) for each in pairs]
    return float((pairs[0] == pairs[1]).mean())
