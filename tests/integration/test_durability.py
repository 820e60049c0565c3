"""Nothing on a disk counts before it is on the disk: the order of writes, flushes and renames of a whole merge."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stockflow.storage.local import LocalStore
from stockflow.storage.partials import PARTIAL_SUFFIX
from tests.checkpoints import make_family, write_recipe
from tests.runs import merge_here

SHAPES = {f"model.layers.{index}.weight": (40, 50) for index in range(3)}


@dataclass
class Recorder:
    """What a process asked of the file system, in order: (call, path), a rename by where it leads."""

    events: list[tuple[str, str]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    """who asked"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wrap(self, name: str, told: Callable[..., str]) -> Callable[..., Any]:
        function = getattr(os, name)

        def recorded(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.events.append((name, told(*arguments)))
                self.threads.append(threading.get_ident())
            return function(*arguments, **named)

        return recorded

    def neighbours(self, number: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """Return what the same thread asked just before and just after."""
        own = [event for event, thread in enumerate(self.threads) if thread == self.threads[number]]
        here = own.index(number)
        return self.events[own[here - 1]], self.events[own[here + 1]]

    def positions(self, name: str, path: object) -> list[int]:
        """Return when a call was made on a path."""
        return [number for number, event in enumerate(self.events) if event == (name, str(path))]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    told: dict[str, Callable[..., str]] = {
        "fsync": lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"),
        "replace": lambda source, target: str(target),
        "link": lambda source, target: str(target),
        "unlink": lambda path: str(path),
        "mkdir": lambda path, *mode: str(path),
    }
    wrapped = {name: found.wrap(name, words) for name, words in told.items()}
    for name, function in wrapped.items():
        monkeypatch.setattr(os, name, function)
    return found


def partial_of(path: str) -> str:
    """Return how the temporary sibling of a file begins."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.")


def test_every_file_of_a_merge_is_flushed_named_and_flushed_again_before_the_next_counts(
    tmp_path: Path, recorder: Recorder
) -> None:
    family = make_family(tmp_path, 2, SHAPES, buffers=False)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    output = tmp_path / "new" / "out"
    recorder.events.clear()
    recorder.threads.clear()

    merge_here(recipe, output, shard_size=5_000)

    named = [
        (number, path)
        for number, (name, path) in enumerate(recorder.events)
        if name in ("replace", "link") and path.startswith(str(output))  # a clean clone keeps compiled kernels, too
        if not path.endswith("/progress.json")  # as often as there is time for it
    ]
    shards = [path for _, path in named if path.endswith(".safetensors")]
    assert len(shards) == 3
    durable: dict[str, int] = {}
    for number, path in named:
        flushed, (name, folder) = recorder.neighbours(number)
        assert flushed[0] == "fsync", f"{path} was named before it was flushed"
        assert flushed[1].startswith(partial_of(path))
        assert flushed[1].endswith(PARTIAL_SUFFIX)
        assert (name, folder) == ("fsync", os.path.dirname(path)), f"the name of {path} was not flushed"
        durable.setdefault(path, number + 1)
    for shard in shards:
        (receipt,) = [path for path in durable if path.endswith(f"/receipts/{os.path.basename(shard)}.json")]
        named_at = recorder.positions("replace", receipt)[0]
        assert durable[shard] < named_at - 1, "the receipt was flushed before its shard"
    manifest = str(output / "manifest.json")
    assert named[-1][1] == manifest
    gone = {path for path in durable if "/runs/" in path}  # a run's own record, taken away at its end
    assert len(gone) == 1
    there = {str(path) for path in output.rglob("*") if path.is_file() and path.name != "progress.json"}
    assert set(durable) - gone == there


def test_new_folders_are_flushed_into_those_they_lie_in(tmp_path: Path, recorder: Recorder) -> None:
    """Else a published output could be gone with its folder."""
    LocalStore(str(tmp_path / "a" / "b")).put("c/d.json", b"1")

    for made in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        made_at = recorder.positions("mkdir", made)[0]
        assert recorder.events[made_at + 1] == ("fsync", str(made.parent))


def test_what_is_deleted_is_gone_for_good_before_anything_is_written(tmp_path: Path, recorder: Recorder) -> None:
    """An old manifest that comes back after a power cut would stand beside new weights."""
    store = LocalStore(str(tmp_path))
    for key in ("manifest.json", "sub/a.json"):
        store.put(key, b"1")
    recorder.events.clear()

    store.delete(["manifest.json", "sub/a.json", "absent.json"])

    assert [name for name, _ in recorder.events] == ["unlink", "unlink", "unlink", "fsync", "fsync"]
    assert [path for name, path in recorder.events if name == "fsync"] == [str(tmp_path), str(tmp_path / "sub")]


@pytest.mark.parametrize("writes", ["put", "put_new", "create"])
def test_a_flush_that_fails_is_an_error_and_leaves_nothing(
    writes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel may have dropped the bytes: the file must not count."""
    store = LocalStore(str(tmp_path))

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)

    def write() -> None:
        if writes != "create":
            getattr(store, writes)("a.json", b"1")
            return
        with store.create("a.json") as sink:
            sink.write(b"1")

    with pytest.raises(OSError, match=r"a\.json: Input/output error; run again"):
        write()
    assert list(tmp_path.iterdir()) == []
