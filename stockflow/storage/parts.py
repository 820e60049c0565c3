"""How objects are cut: uploads into parts of one constant size, which some stores insist on (R2), reads into ranges."""

MAX_PARTS = 10_000
"""limit of S3 and of what imitates it"""
DEFAULT_PART_BYTES = 16 << 20
"""large enough to hide a request's latency, small enough to keep a few in flight; holds to 156 GiB"""
PARTS_IN_FLIGHT = 6
SMALL_BYTES = 4 << 20
"""Most that is kept and written in one request: at the least rate of a line, as long as silence may last."""
RANGE_BYTES = 8 << 20
"""Largest range request, cheapest for clients: with 32 MiB obstore takes 1.6 times the CPU, for fresh pages."""
_MIB = 1 << 20


def part_bytes(size: int | None) -> int:
    """Return the part size for an object of ``size`` bytes (None: unknown), in whole MiB."""
    least = -(-(size or 0) // MAX_PARTS)
    return max(DEFAULT_PART_BYTES, -(-least // _MIB) * _MIB)


def upload_bytes(size: int | None) -> int:
    """Return the most host memory one upload holds: the parts in flight and the one being filled."""
    return (PARTS_IN_FLIGHT + 2) * part_bytes(size)
