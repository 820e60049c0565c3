"""Which device computes, and what every device offers to a worker."""

import ctypes
import os
from importlib.util import find_spec
from typing import Literal, Protocol

from stockflow.engine.arithmetic import Arithmetic
from stockflow.engine.cpu import HostArithmetic
from stockflow.errors import PlanError
from stockflow.extras import needs_torch
from stockflow.kernels.arrays import Bytes

Device = Literal["auto", "cpu", "cuda"]


class OpenDevice(Arithmetic, Protocol):
    """A device ready to compute."""

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """What it is."""

    @property
    def numerics_class(self) -> str:
        """The class of machines on which equal plans give equal bytes."""

    def allocate(self, num_bytes: int) -> Bytes:
        """Return memory to read into or to compute into, as the device likes it."""


def open_device(device: Device) -> OpenDevice:
    """Return the device to compute on: what torch sees decides, not what a scheduler says.

    torch is asked only where a driver for its devices is loaded: importing it takes longer than a small merge. Where
    it is not installed it sees nothing.

    Raises:
        MissingLibraryError: ``cuda`` is asked for and torch is not installed.
        PlanError: ``cuda`` is asked for and torch sees no CUDA device.
    """
    if device == "cuda" or (device == "auto" and _has_driver() and find_spec("torch")):
        with needs_torch("--device cuda"):
            from stockflow.engine.cuda import CudaArithmetic, is_available

        if is_available():
            return CudaArithmetic()
        if device == "cuda":
            raise PlanError("--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build")
    return HostArithmetic()


def check_gpu_is_seen(device: Device) -> None:
    """Refuse to compute on processors where a scheduler gave this process GPUs that are there, and torch sees none.

    Raises:
        MissingLibraryError: torch is not even installed.
        PlanError: as it says.
    """
    if device != "auto" or not os.environ.get("CUDA_VISIBLE_DEVICES") or not _has_driver():
        return
    with needs_torch("a worker that is given GPUs"):
        from stockflow.engine.cuda import is_available

    if not is_available():
        raise PlanError(
            f"{os.uname().nodename} gave this worker GPUs, and torch sees none there: install a CUDA build of torch, "
            "look at the node's driver, or compute on processors (--device cpu)"
        )


def _has_driver() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden from this process
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
