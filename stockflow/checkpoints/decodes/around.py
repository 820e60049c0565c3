"""Decodes around another one: what they have of it. Values of the plan."""

from stockflow.checkpoints.decodes.stored import Decode


class Around:
    """What a decode has of the one within it, whose extents come first."""

    __slots__ = ()
    inner: Decode
    is_plain = False

    @property
    def dtype(self) -> str:
        """Of the first extent within."""
        return self.inner.dtype

    @property
    def width(self) -> int:
        """Bytes of an element of the first extent within."""
        return self.inner.width

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the extents within."""
        return self.inner.widths

    @property
    def bytes_per_elem(self) -> float:
        """Of the extents within."""
        return self.inner.bytes_per_elem

    @property
    def words(self) -> str:
        """What users call the decode within."""
        return self.inner.words

    @property
    def whole_rows(self) -> bool:
        """Whether the decode within wants them."""
        return self.inner.whole_rows

    def run_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the decode within needs."""
        return self.inner.run_bytes(shape)

    def scratch_elems(self, shape: tuple[int, ...], num_elems: int) -> int:
        """Return what the decode within needs."""
        return self.inner.scratch_elems(shape, num_elems)
