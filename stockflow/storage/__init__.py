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
from stockflow.storage.joined import JoinedStore, ReadsInPlace, halves_of, joined, key_of_adapter, own_key
from stockflow.storage.links import trusted_folders
from stockflow.storage.local import LocalStore, PinnedFile
from stockflow.storage.locate import (
    check_slashes,
    is_weights,
    is_within,
    local_path,
    normalize_url,
    open_model,
    open_store,
    pin_revision,
    scheme_of,
)
from stockflow.text.redaction import redact

__all__ = [
    "HalfWritten",
    "JoinedStore",
    "Listing",
    "LocalStore",
    "NewObject",
    "Pin",
    "PinnedFile",
    "ReadsInPlace",
    "Sink",
    "Stamp",
    "StorageConfig",
    "Store",
    "StoreOptions",
    "check_key",
    "check_slashes",
    "check_stamp",
    "halves_of",
    "is_weights",
    "is_within",
    "joined",
    "key_of_adapter",
    "local_path",
    "normalize_url",
    "open_model",
    "open_store",
    "own_key",
    "pin_revision",
    "read_small",
    "redact",
    "scheme_of",
    "trusted_folders",
]
