"""How a tensor is cut into spans: the runs of elements that one thread computes at a time."""

from collections.abc import Iterator

SPAN_ELEMS = 2**18
"""A millisecond of computing for one thread. Part of the numerics: products are summed span by span."""
BLOCK_ELEMS = 2**15
"""What elementwise methods see at a time, or a whole row: task vectors that long stay in the second-level cache."""


def span_bounds(num_elems: int, group_elems: int, row_elems: int = 1) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the spans of a tensor: whole groups, or a run inside one large group.

    Groups are what gets its own decision (the tensor, a row, a leading index). Spans of a group start at
    multiples of SPAN_ELEMS within it, or of as many whole rows of ``row_elems`` as that holds, wherever chunks and
    slabs begin.
    """
    if group_elems <= SPAN_ELEMS:
        step = SPAN_ELEMS // group_elems * group_elems if group_elems else 1
        yield from ((start, min(start + step, num_elems)) for start in range(0, num_elems, step))
        return
    for group_start in range(0, num_elems, group_elems):
        group_stop = group_start + group_elems
        step = SPAN_ELEMS // row_elems * row_elems
        for start in range(group_start, group_stop, step):
            yield start, min(start + step, group_stop)


def chunk_step(group_elems: int, most_elems: int, row_elems: int = 1) -> int:
    """Return the largest run of whole spans within ``most_elems``, which holds at least one span."""
    together = group_elems if group_elems <= SPAN_ELEMS else row_elems
    span = SPAN_ELEMS // together * together
    return most_elems // span * span
