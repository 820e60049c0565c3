"""tensors.parquet: one row of facts per tensor."""

import json
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from stockflow.errors import CheckpointError

if TYPE_CHECKING:  # the process that reads a table starts without what rows are made of
    from stockflow.output.receipts import TensorFacts

TENSORS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("dtype", pa.string()),
        ("shard", pa.string()),
        ("method", pa.string()),
        ("scope", pa.string()),
        ("num_elems", pa.int64()),
        ("mean_cosine", pa.float64()),
        ("min_cosine", pa.float64()),
        ("max_cosine", pa.float64()),
        ("ratio", pa.float64()),
        ("legacy_ratio", pa.float64()),
        ("base_norm", pa.float64()),
        ("delta_norms", pa.list_(pa.float64())),
        ("flags", pa.list_(pa.string())),
        ("facts", pa.map_(pa.string(), pa.float64())),
    ]
)

MAX_ROW_BYTES = 16_384
"""A name of 100 characters and norms of 100 models take 3,000."""
READER_MEMORY_BYTES = 2**30
"""Beside the file itself; 92,000 rows of nine models take a quarter of it."""
READER_SECONDS = 120


def encode_tensors(rows: "Iterable[TensorFacts]") -> bytes:
    """Return the rows as a parquet file; equal rows give equal bytes.

    Python values are those of one column at a time: of 185,000 rows as mappings they would take 100 MiB more.
    """
    rows = list(rows)
    columns = [pa.array([_plain(getattr(row, field.name)) for row in rows], field.type) for field in TENSORS_SCHEMA]
    table = pa.Table.from_arrays(columns, schema=TENSORS_SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    payload: bytes = buffer.getvalue().to_pybytes()
    del table, columns, buffer
    pa.default_memory_pool().release_unused()
    return payload


def _plain(value: object) -> object:
    return list(value.items()) if isinstance(value, Mapping) else value


def decode_tensors(payload: bytes) -> list[dict[str, object]]:
    """Return the rows of a parquet file as plain dictionaries, ``facts`` as a mapping.

    Raises:
        CheckpointError: it is not a table of tensors.
    """
    # Arrow's threads, and its calls back into a Python file object, outlive the read: with pyarrow 26.0.1 and
    # pq.read_table(io.BytesIO(...)) one `verify` in ten aborted at exit (apache/arrow issues 33975, 50482).
    try:
        table = pq.ParquetFile(pa.BufferReader(payload)).read(use_threads=False)
        if not table.schema.equals(TENSORS_SCHEMA):
            raise ValueError(f"expected the columns {TENSORS_SCHEMA.names}, found {table.schema.names}"[:1000])
        rows: list[dict[str, object]] = table.to_pylist(maps_as_pydicts="strict")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"this is not a table of tensors: {error}") from None
    return rows


def read_facts(path: Path) -> "list[TensorFacts]":
    """Return the rows of a local tensors.parquet."""
    from stockflow.output.receipts import TensorFacts

    return [TensorFacts(**row) for row in decode_tensors(path.read_bytes())]  # type: ignore[arg-type]


def main() -> None:
    """Print the rows of the Parquet file on standard input, one JSON object each: see ``verification.table``."""
    max_rows = int(sys.argv[1])
    payload = sys.stdin.buffer.read()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most_bytes = pages * resource.getpagesize() + READER_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (READER_SECONDS, READER_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for line in _lines(payload, max_rows):
            print(line)
    except CheckpointError as error:
        sys.exit(str(error))
    except MemoryError:
        sys.exit(f"this is not a table of tensors: it takes more than {READER_MEMORY_BYTES:,} bytes of memory to read")


def _lines(payload: bytes, max_rows: int) -> list[str]:
    try:
        num_rows = pq.ParquetFile(pa.BufferReader(payload)).metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CheckpointError(f"this is not a table of tensors: {error}") from None
    if num_rows > max_rows:
        raise CheckpointError(f"it has {num_rows:,} rows, expected at most {max_rows:,}")
    lines = [json.dumps(row) for row in decode_tensors(payload)]
    if sum(map(len, lines)) > MAX_ROW_BYTES * (max_rows + 1):
        raise CheckpointError(f"its rows take more than {MAX_ROW_BYTES:,} bytes each")
    return lines


if __name__ == "__main__":
    main()
