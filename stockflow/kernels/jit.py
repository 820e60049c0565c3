"""How kernels are compiled: by numba, strictly as written, once per machine."""

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def jit(function: F) -> F:
    """Compile a kernel to machine code that runs without the interpreter lock.

    Without numba's ``fastmath`` additions keep their order and no multiplication is fused with an addition, so a
    kernel gives the same bits on every processor. Machine code is kept beside the module or in the user's cache
    folder (``NUMBA_CACHE_DIR`` names another); where neither can be written, each process compiles for itself.
    """
    try:
        compiled = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder can be written
        compiled = njit(nogil=True, error_model="numpy")(function)
    return cast(F, compiled)
