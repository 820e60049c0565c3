"""Whether files are in memory: asked without reading them, so that asking changes nothing."""

import ctypes
import mmap
import os

WINDOW_PAGES = 64
NUM_WINDOWS = 32
"""per file, evenly spread"""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_FAILED = ctypes.c_void_p(-1).value


def cached_share(descriptor: int) -> float | None:
    """Return how much of an open file is in the page cache, from a sample; None where the system does not tell.

    Of files that we may not write, Linux says that all is in memory.
    """
    try:
        size = os.fstat(descriptor).st_size
        starts = {size * number // NUM_WINDOWS // mmap.PAGESIZE for number in range(NUM_WINDOWS)} if size else set()
        found = [_resident(descriptor, page, size) for page in sorted(starts)]
    except OSError:
        return None
    num_pages = sum(pages for _, pages in found)
    return sum(resident for resident, _ in found) / num_pages if num_pages else None


def _resident(descriptor: int, first_page: int, size: int) -> tuple[int, int]:
    """Resident pages, and pages, of one window."""
    start = first_page * mmap.PAGESIZE
    length = min(WINDOW_PAGES * mmap.PAGESIZE, size - start)
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address is None or address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    num_pages = -(-length // mmap.PAGESIZE)
    flags = ctypes.create_string_buffer(num_pages)
    try:
        if _libc.mincore(address, length, flags):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        _libc.munmap(address, length)
    return sum(flag & 1 for flag in flags.raw), num_pages
