"""Disguises: what lies under the name of weights or of JSON and is something else, told from its first bytes."""

import re

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAGIC: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), said)
    for pattern, said in (
        (
            re.escape(LFS_POINTER),
            "is a git-lfs pointer, not the file it stands for; run `git lfs pull` in the clone it came from",
        ),
        (
            rb"\s*(<!doctype html|<html|<head|<script)",
            "is a web page, not the file; download the file itself (of a model on the hub: `hf download ORG/NAME`)",
        ),
        (rb"\s*<\?xml", "is an answer in XML, as stores send with an error, not the file; download it again"),
        (
            rb"\s*\{\s*\"error\"|entry not found|invalid (username|credentials)|access to model"
            rb"|repository not found|unauthorized",
            "is the message of a server, not the file; download it again (from the hub: `hf auth login` first)",
        ),
        (rb"PK\x03\x04|\x80[\x02-\x05]", "is a PyTorch file (pickle); convert it to safetensors first"),
        (rb"GGUF", "is a GGUF file, which is for inference; take the model it was made from"),
        (rb"\x89HDF\r\n", "is an HDF5 file (Keras, TensorFlow); convert it to safetensors first"),
        (rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ|7z\xbc\xaf", "is compressed; unpack it first"),
        (rb"\0{64}", "begins with zeros: a download or copy did not finish; fetch it again"),
    )
)


def disguise_of(head: bytes, size: int) -> str:
    """Return what a file is instead of weights or JSON, and what to do; empty where nothing is known of it.

    Args:
        head: its first bytes, at least 64 if it has so many.
        size: of the whole file, in bytes.
    """
    if not size:
        return "is empty: a download or copy did not finish; fetch it again"
    plain = head.removeprefix(b"\xef\xbb\xbf")
    return next((said for pattern, said in _MAGIC if pattern.match(plain)), "")
