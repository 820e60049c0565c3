"""Throttles that say how long to wait: what their headers ask for, and who waits for it."""

import logging
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from stockflow.interruption import pause
from stockflow.text.sizes import estimate

MAX_WAIT_S = 60.0
"""A store that asks for more is given up, and told with what it asked for."""
_LOG = logging.getLogger("stockflow.storage")


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait; None: it does not say.

    Source: RFC 9110 10.2.3 (Retry-After), draft-ietf-httpapi-ratelimit-headers (RateLimit, RateLimit-Reset).
    """
    told = {name.lower(): str(value) for name, value in headers.items()}
    with suppress(ValueError):
        return _seconds(told["retry-after"]) if "retry-after" in told else _limit_s(told)
    return None


def _seconds(text: str) -> float:
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text.strip()):
        return float(text)
    return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)


def _limit_s(told: Mapping[str, str]) -> float | None:
    window = re.search(r"\br=0\b.*?\bt=(\d{1,9})|\breset=(\d{1,9})", told.get("ratelimit", ""))
    if window:
        return float(window[1] or window[2])
    return float(told["ratelimit-reset"]) if "ratelimit-reset" in told else None


class Throttle:
    """What a store asked all who ask it to wait for; said once."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._is_said = False

    def obey(self, seconds: float, where: str) -> None:
        """Let nobody ask for so long."""
        with self._lock:
            self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)
            if not self._is_said:
                _LOG.warning("%s asks to wait %s before it is asked again", where, estimate(seconds))
            self._is_said = True

    def wait(self) -> None:
        """Return when asking is allowed.

        Raises:
            InterruptedRunError: the process is asked to end.
        """
        left_s = self._quiet_until - time.monotonic()
        if left_s > 0:
            pause(left_s)
