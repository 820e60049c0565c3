"""One measurement against object storage, in a process of its own that leaves its imports out.

``read`` reads every range of the weights with the engine's range size and requests in flight, into reused buffers.
``move`` does so while as many bytes as the merge's shards have are written, shard by shard, by the same client.
``merge`` is ``stockflow merge``. Prints what it took: seconds, and the CPU seconds of the client alone.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

from stockflow.engine.inputs import NUM_OBJECT_READERS
from stockflow.recipe import Recipe, load_recipe
from stockflow.storage import Stamp, Store, open_store
from stockflow.storage.parts import RANGE_BYTES
from tests.benchmarks.preloaded import NEEDED, NEEDED_ON_OBJECT_STORAGE, clocked, load, stockflow

PIECE_BYTES = 1 << 20
"""what one write gives to an upload"""

Facts = dict[str, Any]


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", required=True)
    parser.add_argument("--files", type=Path, required=True, help="JSON: names of weight files, per checkpoint")
    parser.add_argument("--shards", type=Path, help="JSON: sizes of the files to write, by name")
    arguments, words = parser.parse_known_args()
    load(NEEDED + NEEDED_ON_OBJECT_STORAGE)
    print(json.dumps(clocked(lambda: KINDS[arguments.kind](arguments, words))))


def merge(arguments: argparse.Namespace, words: list[str]) -> Facts:
    """Merge with the options ``words``; return what stockflow reports."""
    return {"report": stockflow(["merge", str(arguments.recipe), arguments.output, *words])}


def move(arguments: argparse.Namespace, _: list[str]) -> Facts:
    """Read the weights once while as many bytes as the merge's shards have are written."""
    recipe = load_recipe(str(arguments.recipe))
    target = open_store(arguments.output, recipe.storage, writable=True)
    piece = memoryview(os.urandom(PIECE_BYTES))
    with ThreadPoolExecutor(NUM_OBJECT_READERS) as pool:
        reading = pool.map(Reader(), ranges(recipe, arguments.files))
        for file, size in json.loads(arguments.shards.read_text()).items():
            with target.create(file, size=size) as sink:
                for start in range(0, size, PIECE_BYTES):
                    sink.write(piece[: min(PIECE_BYTES, size - start)])
        return {"read_bytes": sum(reading)}


def read(arguments: argparse.Namespace, _: list[str]) -> Facts:
    """Read the weights once."""
    recipe = load_recipe(str(arguments.recipe))
    with ThreadPoolExecutor(NUM_OBJECT_READERS) as pool:
        return {"read_bytes": sum(pool.map(Reader(), ranges(recipe, arguments.files)))}


KINDS: dict[str, Callable[[argparse.Namespace, list[str]], Facts]] = {"merge": merge, "move": move, "read": read}


@dataclass(frozen=True)
class Range:
    """Some bytes of one object."""

    store: Store
    file: str
    stamp: Stamp
    start: int
    stop: int


def ranges(recipe: Recipe, files: Path) -> Iterator[Range]:
    """Yield ranges of the engine's size that cover all weight files of all checkpoints."""
    for location, names in zip(recipe.checkpoints, json.loads(files.read_text()), strict=True):
        store = open_store(location, recipe.storage)
        for file in names:
            stamp = store.stamp(file)
            for start in range(0, stamp.size, RANGE_BYTES):
                yield Range(store, file, stamp, start, min(start + RANGE_BYTES, stamp.size))


class Reader:
    """Reads ranges into one buffer per thread."""

    def __init__(self) -> None:
        """Begin without buffers."""
        self._own = local()

    def __call__(self, span: Range) -> int:
        """Read a range; return its size."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(RANGE_BYTES))
        span.store.read_into(span.file, span.start, self._own.buffer[: span.stop - span.start], span.stamp)
        return span.stop - span.start


if __name__ == "__main__":
    main()
