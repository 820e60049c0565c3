"""Sinks of remote stores: a small object that is written at the end, and one whose errors say which it is."""

from collections.abc import Callable
from io import BytesIO

from stockflow.errors import StockflowError
from stockflow.storage.base import Sink
from stockflow.storage.etags import PartDigests


class Collected(BytesIO):
    """A small object on its way."""

    def sync(self) -> None:
        """Do nothing: it is written at the end."""


class NamedSink:
    """A sink that knows what it was given, and whose errors say which object could not be written."""

    def __init__(
        self,
        sink: Sink,
        sent: PartDigests | None,
        errors: tuple[type[Exception], ...],
        refuse: Callable[[Exception], StockflowError],
    ) -> None:
        """Take where bytes go, who digests them and what makes errors of a client's.

        Args:
            sink: of the client.
            sent: digests what is written; None: nobody asks.
            errors: what the client raises.
            refuse: makes an error of one of these.
        """
        self._sink, self._sent, self._errors, self._refuse = sink, sent, errors, refuse

    def write(self, payload: memoryview | bytes, /) -> object:
        """Append bytes."""
        if self._sent is not None:
            self._sent.update(payload)
        try:
            return self._sink.write(payload)
        except self._errors as error:
            raise self._refuse(error) from None

    def sync(self) -> None:
        """Do nothing: what a store has taken is durable."""
