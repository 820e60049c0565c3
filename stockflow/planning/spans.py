"""How a tensor is cut into spans: the runs of elements that one thread computes at a time."""

from collections.abc import Iterator

SPAN_ELEMS = 2**18
"""A millisecond of computing for one thread. Part of the numerics: products are summed span by span."""
BLOCK_ELEMS = 2**15
"""What elementwise methods see at a time, or a whole row: task vectors that long stay in the second-level cache."""


def stretch_of(num_elems: int, group_elems: int, band: int = 1) -> int:
    """Return how many elements are cut into spans by themselves: a group or band that is longer than a span, or all."""
    if band > SPAN_ELEMS:
        return band
    return group_elems if group_elems > SPAN_ELEMS else num_elems


def span_bounds(num_elems: int, group_elems: int, row_elems: int = 1, band: int = 1) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the spans of a tensor: whole groups, or a run inside one large group.

    Groups are what gets its own decision (the tensor, a row, a leading index). Spans of a group start at
    multiples of SPAN_ELEMS within it, or of as many whole rows of ``row_elems`` as that holds, wherever chunks and
    slabs begin.
    """
    step = span_step(group_elems, row_elems, band) if num_elems else 1
    for first in range(0, num_elems, max(stretch_of(num_elems, group_elems, band), 1)):
        last = min(first + stretch_of(num_elems, group_elems, band), num_elems)
        yield from ((start, min(start + step, last)) for start in range(first, last, step))


def span_step(group_elems: int, row_elems: int, band: int) -> int:
    """Return the most elements of a span: whole groups if they are shorter, whole bands if those are."""
    together = group_elems if group_elems <= SPAN_ELEMS else row_elems
    if band <= SPAN_ELEMS:
        together = max(together, band)
    return SPAN_ELEMS // together * together


def chunk_step(group_elems: int, most_elems: int, row_elems: int = 1, band: int = 1) -> int:
    """Return the largest run of whole spans, and of whole bands, within ``most_elems``, which holds at least one."""
    step = band if band > SPAN_ELEMS else span_step(group_elems, row_elems, band)
    return most_elems // step * step
