"""Fuzz one reader, guided by the branches it takes: ``python -m tests.fuzz.coverage_guided READER SECONDS SEED``.

Runs on Linux with atheris (libFuzzer); ends with 0 if nothing but typed errors came out within the limits. What was
found lies in the current folder as ``crash-*``, ``timeout-*`` or ``oom-*``; it belongs among the CRASHERS of
tests/property/test_hostile_documents.py.
"""

import json
import random
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stockflow", "yaml", "json"]):
    from tests.fuzz.readers import NASTY, READERS, attempt, places

LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1", "-close_fd_mask=0")


def with_length(data: bytes) -> bytes:
    """Return a file whose length field fits its JSON, so that what is behind the length is reached."""
    end = data.rfind(b"}") + 1
    return struct.pack("<Q", end - 8) + data[8:] if end > 8 else data


def restructured(data: bytes, source: random.Random) -> bytes:
    """Return a JSON document with one value replaced, removed or renamed; the same bytes if it is none."""
    try:
        document = json.loads(data)
        path = source.choice(places(document))
    except (ValueError, RecursionError):
        return data
    if not path:
        return data
    parent = document
    for step in path[:-1]:
        parent = parent[step]
    value = source.choice(NASTY)
    match source.randrange(4):
        case 0:
            del parent[path[-1]]
        case 1 if isinstance(parent, dict):
            parent[str(value)[:100] if isinstance(value, str) else "n"] = parent[path[-1]]
        case _:
            parent[path[-1]] = value
    return json.dumps(document, ensure_ascii=source.random() < 0.5).encode(errors="surrogatepass")


def main() -> None:
    """Fuzz until the time is over."""
    name, seconds, seed = sys.argv[1:4]
    reader = READERS[name]

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        source = random.Random(number)
        if name in ("header", "recipe", "table") or source.random() < 0.5:
            mutated = atheris.Mutate(data, max_size)
        else:
            mutated = restructured(data, source)
        return (with_length(mutated) if name == "header" and source.random() < 0.8 else mutated)[:max_size]

    def try_it(data: bytes) -> None:
        reason = attempt(reader, data)
        assert len(reason or "") < 5000, "a message this long helps nobody"

    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "valid").write_bytes(reader.document)
        arguments = [sys.argv[0], *LIMITS, f"-max_total_time={seconds}", f"-seed={seed}", corpus]
        atheris.Setup(arguments, try_it, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
