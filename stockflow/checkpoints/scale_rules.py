"""Scale rules: how the scales of a quantised model follow from its weights, told from a few of its codes.

Families of one format choose scales in different ways, and configs do not say which, or say what is not true.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from stockflow.checkpoints.decodes.stored import BlockScaled, GroupScaled
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.quantised import Stored
from stockflow.checkpoints.values import as_numbers
from stockflow.storage import Stamp, Store

AMAX, POWER_OF_TWO, SEVEN, SEVEN_AND_HALF, FLOOR, EVEN, CEIL = (
    "amax", "power_of_two", "seven", "seven_and_half", "floor", "even", "ceil",
)  # fmt: skip
"""Largest magnitude over the largest code, the same rounded up to a power of two; over 7 and over 7.5; for E2M1 the
power of two below a quarter of it, the same rounded up from 1.75, and the least that does not saturate."""
RULES = (AMAX, POWER_OF_TWO, SEVEN, SEVEN_AND_HALF, FLOOR, EVEN, CEIL)
MAX_KINDS = 16
"""Kinds of tensors that are looked at."""
MAX_SCALE_BYTES, MAX_CODE_BYTES = 16_384, 65_536
_NUMBER = re.compile(r"\d+")
LOWEST, THREE = 0, 5
"""What -8 is stored as, and 3.0."""


def kind_of(name: str) -> str:
    """Return a name without its numbers: what tensors of all layers, and experts, have in common."""
    return _NUMBER.sub("#", name)


def by_kind(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the first quantised tensor of each kind that is looked at."""
    kinds: dict[str, Stored] = {}
    for name, held in stored.items():
        kinds.setdefault(kind_of(name), held)
    return dict(list(kinds.items())[:MAX_KINDS])


def find_rules(
    store: Store, files: Mapping[str, Stamp], extents: Mapping[str, Extent], kinds: Mapping[str, Stored]
) -> dict[str, str]:
    """Return the rule of each kind of tensor where it is not the usual one of its format.

    Raises:
        StorageError: reading failed after retries.
        InputChangedError: a file is no longer the one whose header was read.
    """

    def read(held: Stored, part: int, most: int) -> bytes:
        spec = held.parts[part]
        extent, buffer = extents[spec.name], bytearray(min(spec.num_bytes, most))
        store.read_into(extent.file, extent.start, memoryview(buffer), files[extent.file])
        return bytes(buffer)

    def found() -> Iterator[tuple[str, str]]:
        for kind, held in kinds.items():
            decode = held.decode
            if isinstance(decode, BlockScaled) and decode.scale_dtype != "F8_E8M0":
                if _are_powers(as_numbers(read(held, 1, MAX_SCALE_BYTES), decode.scale_dtype)):
                    yield kind, POWER_OF_TWO
            elif isinstance(decode, GroupScaled) and not decode.whole:
                codes = _codes(decode, read(held, 0, MAX_CODE_BYTES))
                if decode.codes == "I4" and (codes == LOWEST).any():
                    yield kind, SEVEN_AND_HALF
                if decode.codes == "F4" and _largest_of_groups(codes, decode.group, THREE):
                    yield kind, CEIL

    return dict(found())


def usual_rule(decode: BlockScaled | GroupScaled) -> str:
    """Return the rule that a format is mostly written by."""
    if isinstance(decode, BlockScaled):
        return POWER_OF_TWO if decode.scale_dtype == "F8_E8M0" else AMAX
    return SEVEN if decode.codes == "I4" else FLOOR


def _are_powers(scales: np.ndarray | None) -> bool:
    return scales is not None and scales.size > 0 and bool((np.frexp(scales)[0] == 0.5).all())


def _codes(decode: GroupScaled, payload: bytes) -> np.ndarray:
    """Return codes of whole rows, without what fills these up; of a row that is longer than was read, its begin."""
    packed = np.frombuffer(payload, np.uint8)
    rows = packed[: packed.size // decode.row_bytes * decode.row_bytes] if packed.size >= decode.row_bytes else packed
    rows = rows.reshape(-1, min(decode.row_bytes, max(rows.size, 1)))
    codes = np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
    return codes[:, : min(decode.num_columns, codes.shape[1])]


def _largest_of_groups(codes: np.ndarray, group: int, code: int) -> bool:
    """Return whether a code is the largest of a group, whatever its sign."""
    whole = (codes & 7)[:, : codes.shape[1] // group * group].reshape(-1, group)
    return bool((whole.max(axis=1) == code).any()) if whole.size else False
