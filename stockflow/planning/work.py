"""Work: what is done with a reading, whoever does it, as far as reading it and memory go."""

from collections.abc import Hashable
from typing import Protocol

from stockflow.planning.job import Reading


class Work(Protocol):
    """What is done with a reading, as far as reading it and memory go. All sizes in bytes."""

    @property
    def reading(self) -> Reading:
        """What is read."""

    @property
    def num_sweeps(self) -> int:
        """How often its elements go by."""

    @property
    def kind(self) -> Hashable:
        """Equal for works that need the same kernels."""

    @property
    def costs(self) -> Hashable:
        """Equal for works that take the same memory."""

    @property
    def output_width(self) -> int:
        """Bytes that become of an element."""

    @property
    def place_beside(self) -> tuple[int, int]:
        """Its place among the works that are read and written at once, one behind the other, and their number.

        (0, 0) where it is cut as suits the memory.
        """

    def scratch_bytes(self, num_elems: int) -> int:
        """Return what one thread needs, beside the operands, for a span of so many elements."""

    def span_state_bytes(self, num_groups: int) -> int:
        """Return what one sweep leaves behind of a span of so many groups."""

    @property
    def ahead_bytes(self) -> int:
        """What is held to learn its geometry, before anything is merged."""

    @property
    def kept_bytes(self) -> int:
        """What is kept of the rows of a unit until it is decided."""
