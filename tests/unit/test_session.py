"""Sessions: what keeps them from beginning is said."""

import threading

from stockflow.engine.session import Session
from stockflow.events import Event, Note
from stockflow.storage import StorageConfig


def test_kernels_that_take_longer_than_loading_are_said_while_they_are_compiled() -> None:
    told: list[Event] = []
    was_told = threading.Event()

    def listen(event: Event) -> None:
        told.append(event)
        was_told.set()

    session = Session((), StorageConfig(), memory_bytes=1, num_threads=1, device="cpu", on_event=listen)
    session.prepare(lambda: None, patience_s=3600)
    assert told == []

    session.prepare(lambda: was_told.wait() or None, patience_s=0.01)
    session.close()

    (note,) = told
    assert isinstance(note, Note)
    assert "compiling kernels" in note.text
