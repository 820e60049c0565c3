"""Sealed JSON: records that end with a digest of themselves, so that a single changed byte is noticed."""

import hashlib

from stockflow.errors import CheckpointError

SEAL_KEY = "seal"
_OPENING = b',\n "seal": "'
_CLOSING = b'"}\n'
_TAIL_BYTES = len(_OPENING) + 64 + len(_CLOSING)


def seal(record: str) -> bytes:
    """Return the text of a JSON object, which has a member, with one more: the sha256 of everything before it."""
    body = record.rstrip().removesuffix("}").rstrip().encode()
    return body + _tail(body)


def check_seal(payload: bytes, where: str) -> None:
    """Compare a sealed record with its seal.

    A seal shows damage; who forges a record can forge its seal.

    Raises:
        CheckpointError: a byte of it is not the one that was written.
    """
    body = payload[:-_TAIL_BYTES]
    if payload[-_TAIL_BYTES:] != _tail(body):
        raise CheckpointError(
            f"{where} is not as it was written: its contents do not fit the digest it ends with; it was altered or "
            "damaged. Restore it, or run the merge again with --overwrite, which keeps what is still good"
        )


def _tail(body: bytes) -> bytes:
    return _OPENING + hashlib.sha256(body).hexdigest().encode() + _CLOSING
