"""Storage: one small interface over local disk, object stores and everything fsspec can read."""

from stockflow.storage.base import (
    HalfWritten,
    Listing,
    NewObject,
    Pin,
    Sink,
    Stamp,
    StorageConfig,
    Store,
    StoreOptions,
    check_key,
    check_stamp,
    read_small,
)
from stockflow.storage.links import trusted_folders
from stockflow.storage.local import LocalStore, PinnedFile
from stockflow.storage.locate import (
    is_weights,
    is_within,
    normalize_url,
    open_model,
    open_store,
    pin_revision,
    scheme_of,
)
from stockflow.text.redaction import redact

__all__ = [
    "HalfWritten",
    "Listing",
    "LocalStore",
    "NewObject",
    "Pin",
    "PinnedFile",
    "Sink",
    "Stamp",
    "StorageConfig",
    "Store",
    "StoreOptions",
    "check_key",
    "check_stamp",
    "is_weights",
    "is_within",
    "normalize_url",
    "open_model",
    "open_store",
    "pin_revision",
    "read_small",
    "redact",
    "scheme_of",
    "trusted_folders",
]
