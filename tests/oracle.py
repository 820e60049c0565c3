"""A second opinion: every method in naive float64 over whole checkpoints. Shares no code with the product.

Formulas are written as in the literature, on whole arrays, with no thought for memory; sums run in extended
precision (``np.longdouble``, 64 bits of significand on x86), far more exact than what they judge.
Signed zeros are not modelled, except that coefficients which are all zero return the base bit for bit.

Shape suffixes: G groups that get their own decision, E elements of a group, N tuned models.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import deserialize

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
Scope = Literal["tensor", "row", "leading"]

BLOCK_ELEMS = 1 << 20
"""Bounds the extended-precision temporaries; sums are exact enough for any value."""


class Format(NamedTuple):
    """An IEEE binary format; its exponent bias is ``2**(exponent_bits - 1) - 1``."""

    exponent_bits: int
    mantissa_bits: int
    carrier: type[np.unsignedinteger[Any]]


FORMATS: dict[str, Format] = {
    "BF16": Format(8, 7, np.uint16),
    "F16": Format(5, 10, np.uint16),
    "F32": Format(8, 23, np.uint32),
    "F64": Format(11, 52, np.uint64),
}
"""The dtypes that are merged."""

PLAIN: dict[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F8_E5M2": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1", "F8_E5M2FNUZ": "u1", "F8_E4M3FNUZ": "u1",
}  # fmt: skip
"""The dtypes that are copied, as numpy reads them; 8-bit floats stay codes."""


# --- numbers and bits ---------------------------------------------------------------------------------------


def round_to(dtype: str, values: npt.ArrayLike) -> Array:
    """Return the bit patterns of ``values``, each rounded once from float64, nearest even.

    Overflow gives infinity, underflow goes through subnormals to zero, and every NaN is the quiet one.
    """
    exponent_bits, mantissa_bits, carrier = FORMATS[dtype]
    source = np.asarray(values, dtype=np.float64)
    bits = np.array(source.view(np.uint64))
    if dtype == "F64":
        return bits
    negative = (bits >> np.uint64(63)).astype(np.int64)
    biased = ((bits >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64)
    fraction = (bits & np.uint64((1 << 52) - 1)).astype(np.int64)

    # |value| = significand * 2**(exponent - 52)
    significand = np.where(biased > 0, fraction | (1 << 52), fraction)
    exponent = np.maximum(biased, 1) - 1023
    smallest_exponent = 2 - (1 << (exponent_bits - 1))

    # Bits below the target's last place. From 54 on, everything is below half of it.
    shift = np.minimum(52 - mantissa_bits + np.maximum(smallest_exponent - exponent, 0), 60)
    kept = significand >> shift
    remainder = significand - (kept << shift)
    half = np.int64(1) << (shift - 1)
    kept += (remainder > half) | ((remainder == half) & (kept % 2 == 1))

    # A carry out of the mantissa moves into the exponent by itself: the codes are consecutive integers.
    code = kept + (np.maximum(exponent - smallest_exponent, 0) << mantissa_bits)
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    code = np.minimum(code, infinity)
    code = np.where(biased == 0x7FF, infinity, code) | (negative << (exponent_bits + mantissa_bits))
    code = np.where(np.isnan(source), infinity | (1 << (mantissa_bits - 1)), code)
    return np.asarray(code, dtype=carrier)


def widen(dtype: str, bits: Array) -> Floats:
    """Return the exact float64 values of bit patterns."""
    native = {"BF16": np.float32, "F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    if dtype == "BF16":
        bits = np.asarray(bits.astype(np.uint32) << 16)
    # numpy calls the widening of a signalling NaN invalid.
    with np.errstate(invalid="ignore"):
        return np.asarray(bits.view(native), dtype=np.float64)


def ulp_distance(dtype: str, left: Array, right: Array) -> Array:
    """Return how many representable numbers apart two arrays of bit patterns are; +0 and -0 are 0 apart."""
    exponent_bits, mantissa_bits, _ = FORMATS[dtype]
    sign = 1 << (exponent_bits + mantissa_bits)

    def place(bits: Array) -> npt.NDArray[np.int64]:
        magnitude = np.asarray(bits & (sign - 1), dtype=np.int64)
        return np.where(bits >= sign, -magnitude, magnitude)

    return np.asarray(np.abs(place(left) - place(right)))


# --- checkpoints --------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a checkpoint: float64 values of BF16, F16, F32, F64; everything else as it is stored."""

    dtype: str
    array: Array


def load_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the checkpoint in ``folder``, by name."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        for name, stored in _load_file(folder / file).items():
            assert weight_map[name] == file, f"{name} lies in {file}, the index says {weight_map[name]}"
            found[name] = stored
    assert found.keys() == weight_map.keys(), "the index names tensors that are in no file"
    return found


def _load_file(path: Path) -> dict[str, Stored]:
    return {
        name: Stored(entry["dtype"], _decode(entry["dtype"], entry["data"]).reshape(entry["shape"]))
        for name, entry in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }


def _decode(dtype: str, stored: bytes) -> Array:
    if dtype in FORMATS:
        return widen(dtype, np.frombuffer(stored, FORMATS[dtype].carrier))
    return np.frombuffer(stored, PLAIN[dtype])


# --- methods ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OracleResult:
    """What one output tensor must be, before it is rounded."""

    out: Array
    """float64, or the stored values of a copied tensor"""
    facts: Mapping[str, Array] = field(default_factory=dict)
    dtype: str = "F64"
    """of the output"""

    @property
    def bits(self) -> Array:
        """The output as stored: bit patterns of a float dtype, the plain values of any other."""
        return round_to(self.dtype, self.out) if self.dtype in FORMATS else self.out


def model_stock(
    base: Floats,
    tuned: Sequence[Floats],
    *,
    scope: Scope = "tensor",
    on_negative: Literal["clamp", "extrapolate"] = "clamp",
) -> OracleResult:
    """Return ``w_0 + (t / N) sum_i d_i`` with ``t = N cos / (1 + (N - 1) cos)``, cos the mean of all pairs.

    Facts: ``cosines`` [G, N, N], ``mean_cosine``, ``ratio``, ``legacy_ratio`` (NaN for cos <= 0) and
    ``base_norm`` [G], ``delta_norms`` and ``coefficients`` [G, N].

    Raises:
        ZeroDivisionError: the task vectors of a group cancel, with ``extrapolate``.
    """
    num_tuned = len(tuned)
    anchor_GE = _grouped(base, scope)
    deltas = [_grouped(weights, scope) - anchor_GE for weights in tuned]
    norms_GN = np.stack([np.sqrt(_dot(delta_GE, delta_GE)) for delta_GE in deltas], axis=1)
    cosines_GNN = np.zeros((*norms_GN.shape, num_tuned), dtype=np.longdouble)
    for i in range(num_tuned):
        cosines_GNN[:, i, i] = norms_GN[:, i] > 0
        for j in range(i):
            size_G = norms_GN[:, i] * norms_GN[:, j]
            cosine_G = np.where(size_G > 0, _dot(deltas[i], deltas[j]) / np.where(size_G > 0, size_G, 1), 0)
            cosines_GNN[:, i, j] = cosines_GNN[:, j, i] = np.clip(cosine_G, -1, 1)
    pairs = np.triu_indices(num_tuned, 1)
    mean_G = cosines_GNN[:, pairs[0], pairs[1]].mean(axis=1)
    ratio_G = np.array([_stock_ratio(float(cosine), num_tuned, on_negative) for cosine in mean_G])
    coefficients_GN = np.repeat(ratio_G[:, None] / num_tuned, num_tuned, axis=1)
    out_GE = anchor_GE.copy()
    moved_G = ratio_G != 0
    out_GE[moved_G] = _weighted_sum(
        [anchor_GE[moved_G], *(delta_GE[moved_G] for delta_GE in deltas)],
        [np.ones(int(moved_G.sum())), *coefficients_GN[moved_G].T],
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        legacy_G = np.where(mean_G > 0, 2 * mean_G / (1 + mean_G), np.nan)
    facts = {
        "cosines": cosines_GNN,
        "mean_cosine": mean_G,
        "ratio": ratio_G,
        "legacy_ratio": legacy_G,
        "base_norm": np.sqrt(_dot(anchor_GE, anchor_GE)),
        "delta_norms": norms_GN,
        "coefficients": coefficients_GN,
    }
    narrow = {key: value.astype(np.float64) for key, value in facts.items()}
    return OracleResult(out_GE.reshape(base.shape), narrow)


def linear(tensors: Sequence[Floats], weights: Sequence[float], *, normalize: bool = True) -> OracleResult:
    """Return ``sum_i a_i w_i``, divided by ``sum_i a_i`` if ``normalize``."""
    divisor = math.fsum(weights) if normalize else 1.0
    coefficients = [np.longdouble(weight) / np.longdouble(divisor) for weight in weights]
    return OracleResult(_combine(tensors, coefficients), {"coefficients": np.array([coefficients], np.float64)})


def task_arithmetic(
    base: Floats,
    tuned: Sequence[Floats],
    weights: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = False,
) -> OracleResult:
    """Return ``w_0 + lam * sum_i a_i d_i``, divided by ``sum_i a_i`` if ``normalize`` and that is >= 1e-8."""
    total = math.fsum(weights)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    coefficients = [lam * weight / divisor for weight in weights]
    out = _combine([base, *(tensor - base for tensor in tuned)], [1.0, *coefficients])
    return OracleResult(out, {"coefficients": np.array([coefficients])})


def slerp(base: Floats, tuned: Floats, t: float) -> OracleResult:
    """Return ``sin((1-t) a)/sin(a) w_0 + sin(t a)/sin(a) w_1``; a straight line where |cos a| > 0.9995.

    As in mergekit 0.1.5, a norm of at most 1e-8 is not divided out before the dot product.
    Facts: ``dot`` [1], and ``coefficients`` [1, 2] of the two tensors.
    """
    sides = [tensor.reshape(1, -1) for tensor in (base, tuned)]
    norms = [float(np.sqrt(_dot(side_GE, side_GE))[0]) for side_GE in sides]
    units = [side_GE / norm if norm > 1e-8 else side_GE for side_GE, norm in zip(sides, norms, strict=True)]
    dot = min(max(float(_dot(units[0], units[1])[0]), -1.0), 1.0)
    if abs(dot) > 0.9995:
        coefficients = [1.0 - t, t]
        out = _combine([base, tuned - base], [1.0, t])
    else:
        angle = math.acos(dot)
        coefficients = [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
        out = _combine([base, tuned], coefficients)
    return OracleResult(out, {"dot": np.array([dot]), "coefficients": np.array([coefficients])})


def sparse(
    base: Floats,
    tuned: Sequence[Floats],
    weights: Sequence[float],
    kept: Sequence[npt.NDArray[np.bool_]],
    *,
    elect: bool,
    normalize: bool,
    lam: float = 1.0,
    rescale: bool = False,
    factors: Sequence[Array | float] | None = None,
) -> OracleResult:
    """Return ``w_0 + lam * sum_i m_i a_i f_i s(d_i) / Z``: what is kept, rescaled, with signs elected, added up.

    ``s`` is 0 where an element is not kept; ``f_i`` gives what is kept the L1 norm of what was there with ``rescale``
    (unless all is kept, or either norm is below 1e-7), else it is ``factors``; ``m_i`` is true, or with ``elect``
    where ``a_i f_i s(d_i)`` has the sign of the sum over models (zero counts as +, a zero element never agrees);
    ``Z`` is 1, or with ``normalize`` ``sum_i m_i a_i``, or 1 where that is zero (below 1e-8 in size without
    ``elect``). All in extended precision.

    Facts: ``kept_shares`` and ``rescales`` [1, N], and ``margin`` (shape of the tensor), the size of the vote relative
    to the sum of its parts: where it is near 0 but not 0, rounding in the product may elect the other sign.
    """
    votes, rescales, shares = [], [], []
    for number, (tensor, weight, mask) in enumerate(zip(tuned, weights, kept, strict=True)):
        delta = tensor.astype(np.longdouble) - base
        left = np.where(mask, delta, 0.0)
        before, after = float(np.abs(delta).sum()), float(np.abs(left).sum())
        is_rescaled = rescale and not mask.all() and before >= 1e-7 and after >= 1e-7
        factor = np.abs(delta).sum() / np.abs(left).sum() if is_rescaled else factors[number] if factors else 1.0
        votes.append(weight * factor * left)
        rescales.append(float(np.mean(factor)) if np.size(factor) else 1.0)
        shares.append(float(mask.mean()) if mask.size else 0.0)
    equal = [1.0] * len(votes)
    vote, size = _combine(votes, equal), _combine([np.abs(weighted) for weighted in votes], equal)
    elected = np.where(vote >= 0, 1.0, -1.0)
    agreeing = [np.sign(weighted) == elected if elect else np.ones(base.shape, np.bool_) for weighted in votes]
    total = _combine([weighted * agrees for weighted, agrees in zip(votes, agreeing, strict=True)], equal)
    divisor: Any = _combine([agrees.astype(np.float64) for agrees in agreeing], weights) if normalize else 1.0
    divisor = np.where(divisor == 0 if elect else np.abs(divisor) < 1e-8, 1.0, divisor)
    margin = np.abs(vote) / np.where(size > 0, size, 1.0)
    facts = {"kept_shares": np.array([shares]), "rescales": np.array([rescales]), "margin": margin}
    return OracleResult(np.asarray(base + lam * total / divisor), facts)


def nuslerp(
    tensors: Sequence[Floats], weights: Sequence[float], *, base: Floats | None = None, scope: Scope = "tensor"
) -> OracleResult:
    """Return ``sin((1-t) a)/sin(a) x_1 + sin(t a)/sin(a) x_2``, ``t = a_2 / (a_1 + a_2)``, from the base if any.

    As in mergekit 0.1.5 t is 0.5 where the weights cancel, and parallel and opposed vectors are joined by a line.
    """
    total = weights[0] + weights[1]
    t = weights[1] / total if abs(total) >= 1e-6 else 0.5

    def weigh(vectors_NE: Array) -> Array:
        cosine = np.clip(_unit(vectors_NE[0]) @ _unit(vectors_NE[1]), -1, 1)
        if 1 - cosine**2 <= 1e-16:
            return np.array([1 - t, t], np.longdouble)
        angle = np.arccos(cosine)
        return np.array([np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)])

    return _by_group(weigh, tensors, base, scope)


def multislerp(
    tensors: Sequence[Floats],
    weights: Sequence[float],
    *,
    base: Floats | None = None,
    scope: Scope = "tensor",
    normalize_weights: bool = True,
    eps: float = 0.0,
) -> OracleResult:
    """Return ``sum_i a_i |x_i|`` times the exponential map, at the mean direction, of the mean of the logarithms.

    Facts: coefficients [G, N] of the vectors.

    Raises:
        ZeroDivisionError: three or more directions cancel.
    """
    divisor = math.fsum(weights) if normalize_weights else 1.0
    shares_N = np.array(weights, np.longdouble) / np.longdouble(divisor)

    def weigh(vectors_NE: Array) -> Array:
        if len(vectors_NE) == 1:
            return np.ones(1, np.longdouble)
        norms_N = np.array([_norm(vector_E) for vector_E in vectors_NE])
        if not norms_N.any():
            return np.zeros(len(norms_N), np.longdouble)
        scale_N = np.array([1 / (norm + eps) if norm else 0 for norm in norms_N], np.longdouble)
        sum_E = (shares_N * scale_N) @ vectors_NE
        if _norm(sum_E) < max(eps, 1e-8):
            if len(vectors_NE) > 2:
                raise ZeroDivisionError("the directions cancel")
            return shares_N
        mean_N, mean_E = shares_N * scale_N / _norm(sum_E), sum_E / _norm(sum_E)
        units_NE = scale_N[:, None] * vectors_NE
        tangent_N = shares_N * scale_N - (shares_N @ (units_NE @ mean_E)) * mean_N
        step = _norm(tangent_N @ vectors_NE) + eps
        turned_N = np.cos(step) * mean_N + (np.sin(step) / step if step else 1) * tangent_N
        return np.asarray((shares_N @ norms_N) * turned_N)

    return _by_group(weigh, tensors, base, scope)


def karcher(
    tensors: Sequence[Floats], *, scope: Scope = "tensor", max_iter: int = 10, tol: float = 1e-5
) -> OracleResult:
    """Return the mean norm times the Karcher mean of the directions, iterated on the vectors themselves."""

    def weigh(vectors_NE: Array) -> Array:
        norms_N = np.array([_norm(vector_E) for vector_E in vectors_NE])
        there = [index for index, norm in enumerate(norms_N) if norm > 0]
        mean_N = np.zeros(len(norms_N), np.longdouble)
        if not there:
            return mean_N
        units_NE = np.stack([_unit(vector_E) for vector_E in vectors_NE])
        mean_N[there] = np.longdouble(1) / len(there)
        if _norm(mean_N @ units_NE) < tol:
            mean_N = np.eye(len(norms_N), dtype=np.longdouble)[there[0]]
        mean_N = mean_N / _norm(mean_N @ units_NE)
        for _ in range(max_iter):
            mean_E, step_N = mean_N @ units_NE, np.zeros(len(norms_N), np.longdouble)
            for index in there:
                cosine = np.clip(units_NE[index] @ mean_E, -1, 1)
                angle = np.arccos(cosine)
                if angle >= tol and 1 - cosine**2 > 1e-14:
                    step_N[index] += angle / np.sin(angle) / len(there)
                    step_N -= angle / np.sin(angle) / len(there) * cosine * mean_N
            size = _norm(step_N @ units_NE)
            if size < tol:
                break
            mean_N = np.cos(size) * mean_N + np.sin(size) / size * step_N
            mean_N = mean_N / _norm(mean_N @ units_NE)
        per_vector_N = np.array([share / norm if norm else 0 for share, norm in zip(mean_N, norms_N, strict=True)])
        return np.asarray(norms_N.mean() * per_vector_N)

    return _by_group(weigh, tensors, None, scope)


def geometric_median(tensors: Sequence[Floats], weights: Sequence[float], *, scope: Scope = "tensor") -> OracleResult:
    """Return the point of least weighted distance to the tensors, found in coordinates of the space between them."""

    def weigh(vectors_NE: Array) -> Array:
        apart_NE = (vectors_NE - vectors_NE[0]).astype(np.float64)
        size = float(np.abs(apart_NE).max(initial=0.0)) or 1.0
        points_ND = np.linalg.qr((apart_NE / size).T, mode="r").T
        shares_N = np.array(weights, np.longdouble) / math.fsum(weights)
        return _median_shares(points_ND.astype(np.longdouble), shares_N)

    return _by_group(weigh, tensors, None, scope)


def _median_shares(points_ND: Array, weights_N: Array) -> Array:
    """By Weiszfeld's steps to rest, after every point was asked whether it is the median."""
    for index, point_D in enumerate(points_ND):
        far_N = np.sqrt(((points_ND - point_D) ** 2).sum(axis=1))
        apart = far_N > 1e-9 * max(far_N.max(), 1e-300)
        pull_D = (weights_N[apart] / far_N[apart]) @ (points_ND[apart] - point_D)
        if _norm(pull_D) < (1 - 1e-9) * weights_N[~apart].sum():
            return np.eye(len(points_ND), dtype=np.longdouble)[index]
    shares_N = weights_N
    for _ in range(20_000):
        far_N = np.sqrt(((points_ND - shares_N @ points_ND) ** 2).sum(axis=1))
        pulls_N = weights_N / far_N
        before_N, shares_N = shares_N, pulls_N / pulls_N.sum()
        if np.abs(shares_N - before_N).max() < 1e-14:
            break
    return shares_N


def _by_group(
    weigh: Callable[[Array], Array], tensors: Sequence[Floats], base: Floats | None, scope: Scope
) -> OracleResult:
    """Return ``sum_i c_i x_i`` per group, on top of the base if there is one; ``weigh`` gives c of vectors [N, E]."""
    sources = [_grouped(tensor, scope).astype(np.longdouble) for tensor in tensors]
    origin_GE = np.zeros_like(sources[0]) if base is None else _grouped(base, scope).astype(np.longdouble)
    out_GE = np.empty(origin_GE.shape, np.float64)
    coefficients = []
    for group, origin_E in enumerate(origin_GE):
        vectors_NE = np.stack([source_GE[group] - origin_E for source_GE in sources])
        coefficients.append(weigh(vectors_NE))
        out_GE[group] = origin_E + coefficients[-1] @ vectors_NE
    facts = {"coefficients": np.array(coefficients, np.float64).reshape(len(coefficients), len(tensors))}
    return OracleResult(out_GE.reshape(tensors[0].shape), facts)


def _norm(vector_E: Array) -> np.longdouble:
    return np.longdouble(np.sqrt((vector_E.astype(np.longdouble) ** 2).sum()))


def _unit(vector_E: Array) -> Array:
    norm = _norm(vector_E)
    return vector_E / norm if norm else vector_E


def ties(
    base: Floats,
    tuned: Sequence[Floats],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
    float_bits: Literal[32, 64] = 32,
    **more: Any,
) -> OracleResult:
    """Return ``sparse`` of exactly the k largest elements of each task vector, ``k = max(1, int(density * n))``.

    The lower index comes first among equal magnitudes. They are ranked as rounded to ``float_bits``, because which
    elements are kept depends on it; everything else is extended precision.
    """
    kept = []
    for tensor, density in zip(tuned, densities, strict=True):
        k = 0 if density <= 0.0 else max(1, int(density * base.size)) if density < 1.0 else base.size
        kept.append(largest(_magnitudes(base, tensor, float_bits), k))
    return sparse(base, tuned, weights, kept, elect=True, normalize=normalize, **more)


def breadcrumbs(
    base: Floats,
    tuned: Sequence[Floats],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    elect: bool,
    normalize: bool = False,
    float_bits: Literal[32, 64] = 32,
    **more: Any,
) -> OracleResult:
    """Return ``sparse`` of the positions low .. low + k - 1 of each task vector in ascending order.

    ``k = int(density * n)``, ``g = int(gamma * n)``, ``low = max(0, n - k - g)``; all positions at density 1.
    """
    kept, n = [], base.size
    for tensor, density, gamma in zip(tuned, densities, gammas, strict=True):
        k, g = int(density * n), int(gamma * n)
        low = max(0, n - k - g)
        magnitudes = _magnitudes(base, tensor, float_bits)
        kept.append(largest(magnitudes, n - low) & ~largest(magnitudes, n - low - k) | (density >= 1.0))
    return sparse(base, tuned, weights, kept, elect=elect, normalize=normalize, **more)


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Return the words of Philox 4x32-10 for counters of four words, shape (B, 4); Salmon et al. 2011."""
    c = [counter[:, word].astype(np.uint64) for word in range(4)]
    k = [np.uint64(word) for word in key]
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> half) ^ c[1] ^ k[0], b & low, (a >> half) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=1)


def words(seed: int, name: str, place: int, start: int, count: int) -> Array:
    """Return the random words of ``count`` elements of a tensor, from flat index ``start`` on, of one of the models."""
    digest = hashlib.sha256(json.dumps([seed, name, place]).encode()).digest()
    blocks = np.arange(start // 4, (start + count) // 4 + 1, dtype=np.uint64)
    zeros = np.zeros_like(blocks)
    counters = np.stack([blocks & np.uint64(2**32 - 1), blocks >> np.uint64(32), zeros, zeros], axis=1)
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    return philox(counters, key).ravel()[start % 4 : start % 4 + count]


def dare(
    base: Floats,
    tuned: Sequence[Floats],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    elect: bool,
    seed: int = 0,
    drawn_for: tuple[str, int] = ("w", 0),
    normalize: bool = False,
    rescale: bool | str = True,
    **more: Any,
) -> OracleResult:
    """Return ``sparse`` of the elements whose random word, over 2**32, is below the density."""
    name, start = drawn_for
    kept = [
        (words(seed, name, place, start, base.size) < density * 2.0**32).reshape(base.shape)
        for place, density in enumerate(densities)
    ]
    factors = [1 / density if density else 1.0 for density in densities] if rescale == "expected" else None
    is_l1 = rescale in (True, "l1")
    return sparse(base, tuned, weights, kept, elect=elect, normalize=normalize, rescale=is_l1, factors=factors, **more)


def della(
    base: Floats,
    tuned: Sequence[Floats],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    *,
    elect: bool,
    row_elems: int,
    seed: int = 0,
    drawn_for: tuple[str, int] = ("w", 0),
    float_bits: Literal[32, 64] = 32,
    rescale: bool | str = True,
    **more: Any,
) -> OracleResult:
    """Return ``sparse`` of the elements whose random word, over 2**32, is below a probability that grows with the rank.

    In each row of ``row_elems`` (at most 2**18, the last may be shorter) from ``density - epsilon`` to ``density +
    epsilon``; of equal magnitudes the lower index has the higher rank.
    """
    name, start = drawn_for
    kept, factors = [], []
    for place, (tensor, density, epsilon) in enumerate(zip(tuned, densities, epsilons, strict=True)):
        magnitudes = _magnitudes(base, tensor, float_bits).ravel()
        probability = np.empty(base.size)
        for first in range(0, base.size, row_elems):
            row = magnitudes[first : first + row_elems]
            ranks = np.empty(row.size)
            ranks[np.argsort(-row, kind="stable")] = np.arange(row.size)[::-1]
            growing = density - epsilon + 2 * epsilon * ranks / max(row.size - 1, 1)
            probability[first : first + row_elems] = growing if row.size > 1 else density
        probability = np.where(density <= 0, 0.0, np.where(density >= 1, 1.0, probability)).reshape(base.shape)
        kept.append(words(seed, name, place, start, base.size).reshape(base.shape) < probability * 2.0**32)
        factors.append(1 / np.where(probability > 0, probability, 1.0))
    given = factors if rescale == "expected" else None
    is_l1 = rescale in (True, "l1")
    return sparse(base, tuned, weights, kept, elect=elect, rescale=is_l1, factors=given, **more)


def sce(base: Floats, tuned: Sequence[Floats], *, topk: float = 1.0, float_bits: Literal[32, 64] = 32) -> OracleResult:
    """Return ``w_0 + sum_i c_i m_i d_i / max(sum_i c_i m_i, 1e-6)``, ``c_i`` the share of ``mean(d_i**2)``.

    With ``topk`` below 1 only the ``int(topk * count(var != 0))`` elements of largest variance over the models are
    kept in every ``d_i`` (the lower index first; ranked as standard deviations rounded to ``float_bits``). ``c_i = 1
    / N`` where the sum of the means is below 1e-6; ``m_i``: whether ``d_i`` has the sign of the sum, 0 being positive.
    """
    deltas = [tensor.astype(np.longdouble) - base for tensor in tuned]
    if topk < 1.0:
        working = np.float32 if float_bits == 32 else np.float64
        rounded = np.stack([(tensor - base).astype(working).astype(np.longdouble) for tensor in tuned])
        deviation = np.sqrt(np.mean((rounded - rounded.mean(axis=0)) ** 2, axis=0)).astype(np.float64).astype(working)
        deviation[(rounded == rounded[0]).all(axis=0)] = 0
        kept = largest(deviation.astype(np.float64), int(topk * np.count_nonzero(deviation)))
        deltas = [np.where(kept, delta, 0.0) for delta in deltas]
    means = [float((delta**2).sum()) / max(base.size, 1) for delta in deltas]
    shares = [1 / len(means) if sum(means) < 1e-6 else mean / sum(means) for mean in means]
    elected = np.where(sum(deltas) >= 0, 1.0, -1.0)
    agreeing = [np.sign(delta) == elected for delta in deltas]
    total = sum(share * delta * agrees for share, delta, agrees in zip(shares, deltas, agreeing, strict=True))
    divisor = sum(share * agrees for share, agrees in zip(shares, agreeing, strict=True))
    out = base + total / np.maximum(np.asarray(divisor, np.longdouble), np.longdouble(1e-6))
    return OracleResult(np.asarray(out, np.float64), {"shares": np.array([shares])})


def arcee_fusion(base: Floats, tuned: Floats, row_elems: int) -> OracleResult:
    """Return ``w_1`` where ``|w_1 - w_0| K`` reaches ``q2 + 1.5 (q3 - q1)`` of all of these, else ``w_0``.

    ``K = sum p log(p / q)`` per row, p and q the softmax of ``w_1`` and ``w_0``, plus 1e-8; quartiles are the elements
    at ``(n - 1) x``, rounded down, in ascending order. Facts: ``scores``, ``threshold``.
    """
    scores = np.empty(base.size, np.longdouble)
    delta = (tuned.astype(np.longdouble) - base).ravel()
    for first in range(0, base.size, row_elems):
        part = slice(first, first + row_elems)
        p, q = (_softmax(tensor.ravel()[part]) + np.longdouble(1e-8) for tensor in (tuned, base))
        scores[part] = np.abs(delta[part]) * (p * np.log(p / q)).sum()
    ordered = np.sort(scores)
    q1, q2, q3 = (ordered[(base.size - 1) * quarters // 4] for quarters in (1, 2, 3)) if base.size else (0, 0, 0)
    threshold = (q2 + np.longdouble(1.5) * (q3 - q1)) * (1 - np.longdouble(2.0) ** -55)  # equal but for rounding
    out = base + np.where(scores >= threshold, delta, 0).reshape(base.shape)
    facts = {"scores": scores.astype(np.float64), "threshold": np.array([threshold], np.float64)}
    return OracleResult(np.asarray(out, np.float64), facts)


def _softmax(values: Floats) -> Array:
    powers = np.exp(values.astype(np.longdouble) - values.max())
    return np.asarray(powers / powers.sum())


def ram(
    base: Floats, tuned: Sequence[Floats], *, epsilon: float = 1e-5, boost: tuple[float, float] | None = None
) -> OracleResult:
    """Return ``w_0`` plus the mean of the task vectors above ``epsilon``; ``boost`` is r and alpha of RAM+.

    With it what one model alone moves is times ``1 + r clip(rho_i, 0, alpha)``, ``rho_i`` the number of elements it
    moves beside others over the number it alone moves (at least ``epsilon``).
    """
    deltas = [tensor.astype(np.longdouble) - base for tensor in tuned]
    active = np.stack([np.abs(tensor - base) > epsilon for tensor in tuned])
    count = active.sum(axis=0)
    factors = []
    for moved in active:
        shared, unique = int((moved & (count > 1)).sum()), int((moved & (count == 1)).sum())
        rho = shared / max(unique, epsilon)
        factors.append(1 + boost[0] * min(max(rho, 0.0), boost[1]) if boost else 1.0)
    out = base.astype(np.longdouble)
    for delta, moved, factor in zip(deltas, active, factors, strict=True):
        out += np.where(moved, delta * np.where(count == 1, factor, 1.0) / np.maximum(count, 1), 0.0)
    return OracleResult(out.astype(np.float64), {"factors": np.array([factors])})


def nearswap(base: Floats, tuned: Floats, t: float) -> OracleResult:
    """Return ``a w_1 + (1 - a) w_0`` with ``a = clip(t / max(|w_0 - w_1|, 1e-6), 0, 1)``."""
    delta = tuned.astype(np.longdouble) - base
    share = np.clip(t / np.maximum(np.abs(delta), np.longdouble(1e-6)), 0, 1)
    return OracleResult(np.asarray(base + share * delta, np.float64))


def _stock_ratio(cosine: float, num_tuned: int, on_negative: str) -> float:
    if cosine == 0.0 or (cosine < 0.0 and on_negative == "clamp"):
        return 0.0
    denominator = 1.0 + (num_tuned - 1) * cosine
    if denominator <= 0.0:
        raise ZeroDivisionError(f"the {num_tuned} task vectors cancel: mean cosine {cosine!r}")
    return num_tuned * cosine / denominator


def largest(magnitudes: Floats, k: int) -> npt.NDArray[np.bool_]:
    """Return which elements are the k largest, the lower index first among equal ones."""
    kept = np.zeros(magnitudes.size, dtype=np.bool_)
    kept[np.argsort(-magnitudes.ravel(), kind="stable")[:k]] = True
    return kept.reshape(magnitudes.shape)


def _magnitudes(base: Floats, tensor: Floats, float_bits: int) -> Floats:
    working = np.float32 if float_bits == 32 else np.float64
    return np.asarray(np.abs((tensor - base).astype(working)).astype(np.float64))


def _grouped(tensor: Floats, scope: Scope) -> Floats:
    if scope == "row" and tensor.ndim >= 1:
        return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    if scope == "leading" and tensor.ndim >= 3:
        return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    return tensor.reshape(1, -1)


def _dot(left_GE: Floats, right_GE: Floats) -> npt.NDArray[np.longdouble]:
    """Return the product of each group, multiplied and summed in extended precision."""
    total_G = np.zeros(left_GE.shape[0], dtype=np.longdouble)
    for rows, columns in _blocks(left_GE.shape[0], left_GE.shape[1]):
        wide = left_GE[rows, columns].astype(np.longdouble)
        total_G[rows] += (wide * right_GE[rows, columns]).sum(axis=1)
    return total_G


def _weighted_sum(tensors: Sequence[Floats], weights_G: Sequence[Array]) -> Floats:
    """Return ``sum_i weights_i tensors_i`` per group in extended precision, rounded once to float64."""
    out_GE = np.empty_like(tensors[0], dtype=np.float64)
    for rows, columns in _blocks(out_GE.shape[0], out_GE.shape[1]):
        total = np.zeros(out_GE[rows, columns].shape, dtype=np.longdouble)
        for tensor_GE, weight_G in zip(tensors, weights_G, strict=True):
            total += tensor_GE[rows, columns] * weight_G[rows, None].astype(np.longdouble)
        out_GE[rows, columns] = total
    return out_GE


def _combine(tensors: Sequence[Floats], weights: Sequence[float | np.longdouble]) -> Floats:
    """Return ``sum_i weights_i tensors_i`` of whole tensors."""
    weights_G = [np.array([weight], dtype=np.longdouble) for weight in weights]
    return _weighted_sum([tensor.reshape(1, -1) for tensor in tensors], weights_G).reshape(tensors[0].shape)


def _blocks(num_groups: int, num_elems: int) -> Iterator[tuple[slice, slice]]:
    elem_step = max(1, min(num_elems, BLOCK_ELEMS))
    group_step = max(1, BLOCK_ELEMS // elem_step)
    for group in range(0, num_groups, group_step):
        for elem in range(0, num_elems, elem_step):
            yield slice(group, group + group_step), slice(elem, elem + elem_step)


# --- whole checkpoints --------------------------------------------------------------------------------------


def merge_folder(
    method: str,
    base_dir: Path | None,
    tuned_dirs: Sequence[Path],
    *,
    out_dtype: str | None = None,
    **parameters: Any,
) -> dict[str, OracleResult]:
    """Return what ``method`` makes of every tensor of the checkpoints, by name.

    Args:
        method: a name in ``METHODS``.
        base_dir: also the donor of names and dtypes; the first model is if it is None. ``linear`` and ``karcher`` do
            not count it: name it among ``tuned_dirs`` as well to do so.
        tuned_dirs: the models, in recipe order.
        out_dtype: of merged tensors, in the words of safetensors; if None the least that holds all that is merged.
        parameters: passed on: ``scope``, ``on_negative``, ``weights``, ``densities``, ``lam``, ``normalize``,
            ``t`` .., the same for every tensor; ``from_base`` of methods that can do without one.

    Raises:
        ValueError: names or shapes differ, or a tensor that is not merged is not equal everywhere.
    """
    tuned = [load_checkpoint(folder) for folder in tuned_dirs]
    base = load_checkpoint(base_dir) if base_dir is not None else None
    checkpoints = tuned if base is None else [base, *tuned]
    donor = checkpoints[0]
    if any(checkpoint.keys() != donor.keys() for checkpoint in checkpoints):
        raise ValueError("the checkpoints have different tensors")
    results = {}
    for name, (dtype, array) in donor.items():
        sources = [checkpoint[name] for checkpoint in checkpoints]
        if any(source.array.shape != array.shape for source in sources):
            raise ValueError(f"{name!r} has different shapes")
        if dtype in FORMATS:
            merged = _merge_stored(method, name, sources[0], sources[-len(tuned) :], parameters)
            counted = sources[-len(tuned) :] if method in ("linear", "karcher", "passthrough") else sources
            results[name] = OracleResult(merged.out, merged.facts, out_dtype or _promoted(counted))
        elif all(source.dtype == dtype and np.array_equal(source.array, array) for source in sources):
            results[name] = OracleResult(array, {}, dtype)
        else:
            raise ValueError(f"{name!r} is {dtype} and not equal everywhere")
    return results


def _promoted(sources: Sequence[Stored]) -> str:
    dtypes = sorted({source.dtype for source in sources}, key=lambda dtype: FORMATS[dtype].mantissa_bits)
    return "F32" if dtypes == ["BF16", "F16"] else dtypes[-1]


Rule = Callable[[Stored, Sequence[Stored], Mapping[str, Any]], OracleResult]


def _slerp_of_stored(base: Stored, tuned: Sequence[Stored], parameters: Mapping[str, Any]) -> OracleResult:
    (other,) = tuned
    return slerp(base.array, other.array, **parameters)


def _merge_stored(
    method: str, name: str, base: Stored, tuned: Sequence[Stored], parameters: Mapping[str, Any]
) -> OracleResult:
    """Merge one tensor. Experts that are fused into one are merged one by one, unless ``scope`` says otherwise."""
    given = dict(parameters)
    if method in ("model_stock", *IN_GRAM_SPACE, *ELEMENTWISE):
        is_fused = "experts" in name and base.array.ndim >= 3
        given.setdefault("scope", "leading" if is_fused else "tensor")
    if method not in ELEMENTWISE:
        return METHODS[method](base, tuned, given)
    scope = given.pop("scope")
    groups = [_grouped(stored.array, scope) for stored in (base, *tuned)]
    found = []
    for number, each in enumerate(zip(*groups, strict=True)):
        if method in DRAWN:
            given["drawn_for"] = (name, number * each[0].size)
        if method in ("della", "della_linear", "arcee_fusion"):
            given["row_elems"] = min(base.array.shape[-1], 2**18) if base.array.ndim else 1
        parts = [Stored(stored.dtype, group) for stored, group in zip((base, *tuned), each, strict=True)]
        found.append(METHODS[method](parts[0], parts[1:], given))
    facts = {
        key: np.concatenate([result.facts[key] for result in found]) if found else np.empty(0)
        for key in (found[0].facts if found else ())
    }
    out = np.concatenate([result.out for result in found]) if found else base.array
    return OracleResult(out.reshape(base.array.shape), facts)


def _float_bits(*stored: Stored) -> Literal[32, 64]:
    """Width that magnitudes are ranked in."""
    return 64 if any(each.dtype == "F64" for each in stored) else 32


def _breadcrumbs_of_stored(
    base: Stored, tuned: Sequence[Stored], parameters: Mapping[str, Any], *, elect: bool
) -> OracleResult:
    return breadcrumbs(base.array, _arrays(tuned), elect=elect, float_bits=_float_bits(base, *tuned), **parameters)


def _from(base: Stored, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a method that can do without a base."""
    given = {key: value for key, value in parameters.items() if key != "from_base"}
    return {**given, "base": base.array} if parameters["from_base"] else given


def _della_of_stored(
    base: Stored, tuned: Sequence[Stored], parameters: Mapping[str, Any], *, elect: bool
) -> OracleResult:
    normalized = {"normalize": elect} | dict(parameters)
    return della(base.array, _arrays(tuned), elect=elect, float_bits=_float_bits(base, *tuned), **normalized)


def _arrays(stored: Sequence[Stored]) -> list[Floats]:
    return [tensor.array for tensor in stored]


METHODS: dict[str, Rule] = {
    "model_stock": lambda base, tuned, kw: model_stock(base.array, _arrays(tuned), **kw),
    "linear": lambda _, tuned, kw: linear(_arrays(tuned), **kw),
    "task_arithmetic": lambda base, tuned, kw: task_arithmetic(base.array, _arrays(tuned), **kw),
    "slerp": _slerp_of_stored,
    "nuslerp": lambda base, tuned, kw: nuslerp(_arrays(tuned), **_from(base, kw)),
    "multislerp": lambda base, tuned, kw: multislerp(_arrays(tuned), **_from(base, kw)),
    "karcher": lambda _, tuned, kw: karcher(_arrays(tuned), **kw),
    "geometric_median": lambda _, tuned, kw: geometric_median(_arrays(tuned), **kw),
    "passthrough": lambda _, tuned, kw: linear(_arrays(tuned), normalize=False, **kw),
    "ties": lambda base, tuned, kw: ties(base.array, _arrays(tuned), float_bits=_float_bits(base, *tuned), **kw),
    "breadcrumbs": lambda base, tuned, kw: _breadcrumbs_of_stored(base, tuned, kw, elect=False),
    "breadcrumbs_ties": lambda base, tuned, kw: _breadcrumbs_of_stored(base, tuned, kw, elect=True),
    "dare_linear": lambda base, tuned, kw: dare(base.array, _arrays(tuned), elect=False, **kw),
    "dare_ties": lambda base, tuned, kw: dare(base.array, _arrays(tuned), elect=True, **kw),
    "della": lambda base, tuned, kw: _della_of_stored(base, tuned, kw, elect=True),
    "della_linear": lambda base, tuned, kw: _della_of_stored(base, tuned, kw, elect=False),
    "sce": lambda base, tuned, kw: sce(base.array, _arrays(tuned), float_bits=_float_bits(base, *tuned), **kw),
    "arcee_fusion": lambda base, tuned, kw: arcee_fusion(base.array, tuned[0].array, **kw),
    "ram": lambda base, tuned, kw: ram(base.array, _arrays(tuned), **kw),
    "ramplus_tl": lambda base, tuned, kw: ram(base.array, _arrays(tuned), **({"boost": (0.1, 0.2)} | dict(kw))),
    "nearswap": lambda base, tuned, kw: nearswap(base.array, tuned[0].array, **kw),
}
IN_GRAM_SPACE = ("nuslerp", "multislerp", "karcher", "geometric_median")
DRAWN = ("dare_linear", "dare_ties", "della", "della_linear")
"""Those that draw."""
ELEMENTWISE = (
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
    "nearswap",
    *DRAWN,
)
"""Those that decide on flat groups."""
