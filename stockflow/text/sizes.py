"""Sizes, counts and durations as people read them."""

import math

UNITS_OF_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
UNITS_OF_COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
MIB = 2**20


def mib(num_bytes: float) -> str:
    """Return a size in MiB, as memory is counted."""
    return f"{num_bytes / MIB:,.0f} MiB" if num_bytes >= MIB or not num_bytes else f"{num_bytes:,.0f} bytes"


def least_mib(num_bytes: float) -> str:
    """Return a size in whole MiB that holds so many bytes."""
    return mib(math.ceil(num_bytes / MIB) * MIB)


def gb(num_bytes: float) -> str:
    """Return a size in decimal units, as storage is sold."""
    for unit, size in UNITS_OF_BYTES:
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def amount(number: float) -> str:
    """Return a large count: ``8.03 B`` parameters."""
    for unit, size in UNITS_OF_COUNTS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def counted(number: float, noun: str, *, cut: bool = False) -> str:
    """Return a count with its noun, in the plural unless it is one; ``cut`` to three digits: ``2.62 M parameters``."""
    return f"{amount(number) if cut else format(round(number), ',')} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    """Return the verb that goes with a count."""
    return "is" if number == 1 else "are"


def times(number: int) -> str:
    """Return how often: ``once``, ``3 times``."""
    return "once" if number == 1 else f"{number} times"


def duration(seconds: float) -> str:
    """Return a time that passes or is left, in whole seconds, of which there is always one."""
    whole = max(round(seconds), 1)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def estimate(seconds: float) -> str:
    """Return a time that is predicted, to about three digits."""
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def elapsed(seconds: float | None) -> str:
    """Return a time that was measured, days of it too; a dash where there is none."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def share(value: float) -> str:
    """Return a share in percent, with two digits that count."""
    percent = 100.0 * value
    if not percent or abs(percent) >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.2g} %" if abs(percent) >= 0.001 else f"{percent:.1e} %"
