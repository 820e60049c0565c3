"""What this process is and takes."""

import os
from pathlib import Path


def process_name() -> str:
    """Return which process of which machine this is, as ``node:pid``."""
    return f"{os.uname().nodename}:{os.getpid()}"


def current_memory_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
