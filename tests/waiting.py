"""Waiting for what other threads and processes do, on a machine of any speed."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

HANG_S = 180.0
"""Bounds what hangs: nothing that works comes near it, at a tenth of the speed either."""


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[Any] | None" = None) -> None:
    """Wait until a condition holds, as long as the process that is to bring it about, if any, is there.

    Raises:
        AssertionError: the process ended, or the condition never came to hold.
    """
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
