"""Tables that ``inspect`` and ``audit`` write, one row per tensor: their columns."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stockflow.methods.ratios import RATIOS

_NAMED_TENSOR = [
    ("name", pa.string()),
    ("kind", pa.string()),
    ("layer", pa.int64()),
    ("shape", pa.list_(pa.int64())),
    ("dtype", pa.string()),
    ("num_elems", pa.int64()),
]

INSPECTION_SCHEMA = pa.schema(
    [
        *_NAMED_TENSOR,
        ("method", pa.string()),
        ("base_norm", pa.float64()),
        ("delta_norms", pa.list_(pa.float64())),
        ("cosines", pa.list_(pa.float64())),
        ("angles", pa.list_(pa.float64())),
        ("mean_cosine", pa.float64()),
        *((f"ratio_{name}", pa.float64()) for name in RATIOS),
        ("rounding_signal", pa.float64()),
        ("cosine_floor", pa.float64()),
        ("flags", pa.list_(pa.string())),
    ]
)

AUDIT_SCHEMA = pa.schema(
    [
        *_NAMED_TENSOR,
        ("scope", pa.string()),
        ("num_groups", pa.int64()),
        *((f"ratio_{name}", pa.float64()) for name in RATIOS),
        ("ratio_correct", pa.float64()),
        ("mean_norm", pa.float64()),
        ("update_norm", pa.float64()),
        ("old_error", pa.float64()),
        ("old_distance", pa.float64()),
        ("old_roundings", pa.float64()),
        ("match", pa.string()),
        ("candidates", pa.list_(pa.string())),
        ("implied_ratio", pa.float64()),
        ("implied_weights", pa.list_(pa.float64())),
        ("residual", pa.float64()),
        ("rounding_noise", pa.float64()),
        ("error", pa.float64()),
        ("distance", pa.float64()),
        ("equal_share", pa.float64()),
        ("mean_roundings", pa.float64()),
        ("max_roundings", pa.float64()),
        ("flags", pa.list_(pa.string())),
    ]
)


def encode_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema, rows_at_once: int = 4096) -> bytes:
    """Return plain rows as a parquet file; ``rows_at_once`` of them are Python values at a time."""
    buffer = pa.BufferOutputStream()
    remaining = iter(rows)
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        while portion := list(islice(remaining, rows_at_once)):
            writer.write_table(pa.Table.from_pylist(portion, schema=schema))
    payload: bytes = buffer.getvalue().to_pybytes()
    return payload
