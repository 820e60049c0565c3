"""Addresses of object stores, as their consoles and their own HTTP have them: which bucket and folder they are of."""

import re
from urllib.parse import parse_qs, unquote, urlsplit

_CONSOLE = re.compile(r"([\w-]+\.)?(s3\.)?console\.(aws\.amazon\.com|amazonaws\.cn|amazonaws-us-gov\.com)")
_HOST = re.compile(
    r"(?:(?P<bucket>.+)\.)?s3[.-](?!website|accesspoint)(?:dualstack\.)?(?:[a-z0-9-]+\.)?amazonaws\.com(?:\.cn)?"
)
_GOOGLE_CONSOLE = re.compile(r"/storage/browser/(?:_details/)?([^;]+)")
_GOOGLE = ("storage.googleapis.com", "storage.cloud.google.com")


def in_a_store(address: str) -> str | None:
    """Return ``s3://bucket/folder`` or ``gs://bucket/folder`` for an address of the web that means it, else None."""
    parts = urlsplit(address)
    host, path = (parts.hostname or "").lower(), unquote(parts.path)
    if parts.scheme.lower() not in ("http", "https"):
        return None
    if _CONSOLE.fullmatch(host) and (found := re.match(r"/s3/(?:buckets|object)/([^/]+)/?(.*)", path)):
        prefix = parse_qs(parts.query).get("prefix", [found[2]])[0]
        return _joined("s3", f"{found[1]}/{prefix}")
    if found := _HOST.fullmatch(host):
        return _joined("s3", f"{found['bucket'] or ''}/{path}")
    if host == "console.cloud.google.com" and (found := _GOOGLE_CONSOLE.match(path)):
        return _joined("gs", found[1])
    return _joined("gs", path) if host in _GOOGLE else None


def _joined(scheme: str, place: str) -> str | None:
    inner = "/".join(part for part in place.split("/") if part)
    return f"{scheme}://{inner}" if inner else None
