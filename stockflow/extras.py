"""Libraries that `pip install stockflow` leaves out: named, with the command that brings them, where one is missing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from stockflow.errors import MissingLibraryError


@contextmanager
def needs_torch(what: str) -> Iterator[None]:
    """Import torch, or what stands on it, within.

    Args:
        what: the command or option that cannot do without.

    Raises:
        MissingLibraryError: torch is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingLibraryError(
            f"{what} needs torch, which is not installed on {os.uname().nodename}; pip install 'stockflow[torch]'"
        ) from None
