"""The floor of a local merge: one thread, buffered, with the merge's fsync policy, in a process of its own.

Reads every input byte into a reused buffer; then hashes and writes as many bytes as the output has, file by file, each
flushed to the disk. Prints what that took, start of the interpreter left out.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

BUFFER_BYTES = 1 << 20


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the written files; made, and left there")
    parser.add_argument("--inputs", type=Path, nargs="+", required=True, help="folders of checkpoints")
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="of the output files, in bytes")
    arguments = parser.parse_args()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    buffer[:] = os.urandom(BUFFER_BYTES)  # no fresh pages in what is measured
    arguments.output.mkdir(parents=True)
    started, cpu = time.perf_counter(), time.process_time()
    read_all(arguments.inputs, buffer)
    read_s = time.perf_counter() - started
    hash_s = write_all(arguments.output, arguments.sizes, buffer)
    seconds = time.perf_counter() - started
    facts = {
        "s": seconds,
        "cpu_s": time.process_time() - cpu,
        "read_s": read_s,
        "hash_s": hash_s,
        "write_s": seconds - read_s - hash_s,
    }
    print(json.dumps(facts))


def read_all(folders: Sequence[Path], buffer: memoryview) -> None:
    """Read every weight file into ``buffer``."""
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_all(folder: Path, sizes: Sequence[int], buffer: memoryview) -> float:
    """Hash and write files of these sizes; return the seconds that hashing took."""
    hash_s = 0.0
    for number, size in enumerate(sizes):
        digest, left = hashlib.sha256(), size
        with (folder / f"{number}.bin").open("xb", buffering=0) as file:
            while left > 0:
                part = buffer[: min(left, BUFFER_BYTES)]
                began = time.perf_counter()
                digest.update(part)
                hash_s += time.perf_counter() - began
                left -= file.write(part)
            os.fsync(file.fileno())
    return hash_s


if __name__ == "__main__":
    main()
