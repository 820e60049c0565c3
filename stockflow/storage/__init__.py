"""Storage: one small interface over local disk, object stores and everything fsspec can read."""

from stockflow.storage.base import (
    Pin,
    Sink,
    Stamp,
    StorageConfig,
    Store,
    StoreOptions,
    check_key,
    check_stamp,
    exists,
    read_small,
    redact,
)
from stockflow.storage.locate import is_within, normalize_url, open_store

__all__ = [
    "Pin",
    "Sink",
    "Stamp",
    "StorageConfig",
    "Store",
    "StoreOptions",
    "check_key",
    "check_stamp",
    "exists",
    "is_within",
    "normalize_url",
    "open_store",
    "read_small",
    "redact",
]
