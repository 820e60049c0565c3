"""tensors.parquet of an output that is not trusted: read in a process of its own, bounded in memory and time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from stockflow.errors import CheckpointError

Row = dict[str, object]


def decode_apart(payload: bytes, max_rows: int) -> list[Row]:
    """Return the rows of a table of tensors.

    A few bytes of Parquet can stand for terabytes, and a malformed file can end its reader; pyarrow bounds
    neither. The process that ``stockflow.output.tables`` is when it is run has limits of its own.

    Raises:
        CheckpointError: it is not a table of tensors, has more than ``max_rows`` rows, or breaks the bounds.
    """
    package = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve address space, which is what is bounded
    }
    finished = subprocess.run(
        [sys.executable, "-m", "stockflow.output.tables", str(max_rows)],
        input=payload,
        capture_output=True,
        env=environment,
        check=False,
    )
    if finished.returncode < 0:
        name = signal.Signals(-finished.returncode).name
        raise CheckpointError(f"this is not a table of tensors: its reader was ended by {name}")
    if finished.returncode:
        lines = finished.stderr.decode(errors="replace").strip().splitlines() or ["its reader failed"]
        raise CheckpointError(lines[-1][:400])
    return [json.loads(line) for line in finished.stdout.splitlines()]
