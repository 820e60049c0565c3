"""How a tensor is cut into spans: the runs of elements that one thread computes at a time."""

from collections.abc import Iterator

GRAM_BLOCK = 256
"""Elements whose products are summed in working precision before float64 takes over; part of the numerics.

Squares of numbers with few bits (BF16) leave remainders 0, 1, 4 .. that round down more often than up: with
blocks of 1,024 the norms of BF16 task vectors were 1.3e-7 too small at any size and cosines of 0.5 were
1.1e-7 to 2.1e-7 off, with 256 it is 3e-8, for a tenth more time in the product.
"""
SPAN_ELEMS = 2**17
"""2.5 MiB of float32 for five sources, about one core's L2; a multiple of GRAM_BLOCK. Not part of the numerics."""


def span_bounds(num_elems: int, group_elems: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the spans of a tensor: whole groups, or a run inside one large group.

    Groups are what gets its own decision (the tensor, a row, a leading index). Spans of a group start at
    multiples of SPAN_ELEMS within it, so that Gram blocks never straddle two spans.
    """
    if group_elems <= SPAN_ELEMS:
        step = SPAN_ELEMS // group_elems * group_elems if group_elems else 1
        yield from ((start, min(start + step, num_elems)) for start in range(0, num_elems, step))
        return
    for group_start in range(0, num_elems, group_elems):
        group_stop = group_start + group_elems
        for start in range(group_start, group_stop, SPAN_ELEMS):
            yield start, min(start + SPAN_ELEMS, group_stop)


def chunk_step(group_elems: int, most_elems: int) -> int:
    """Return the largest run of whole spans within ``most_elems``, which holds at least one span."""
    span = SPAN_ELEMS // group_elems * group_elems if group_elems <= SPAN_ELEMS else SPAN_ELEMS
    return most_elems // span * span
