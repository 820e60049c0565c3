"""Redirections of web servers: followed a few times, to http and https, and never to link-local addresses."""

import asyncio
from ipaddress import ip_address
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

from stockflow.errors import RecipeError
from stockflow.text.redaction import redact

MAX_REDIRECTIONS = 5


class Guard:
    """Refuses redirections; fsspec calls what went wrong "not found", so the refusal is kept."""

    def __init__(self) -> None:
        """Nothing was refused yet."""
        self.refusal: RecipeError | None = None

    def client_settings(self) -> dict[str, Any]:
        """Return what an HTTP client of fsspec is made with, so that it asks here."""
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(self._redirected)
        return {"client_kwargs": {"trace_configs": [trace]}, "skip_instance_cache": True}

    async def _redirected(
        self, session: aiohttp.ClientSession, context: Any, redirection: aiohttp.TraceRequestRedirectParams
    ) -> None:
        del session
        answer = redirection.response
        target = urljoin(str(answer.url), answer.headers.get("Location") or answer.headers.get("URI") or "")
        context.number = getattr(context, "number", 0) + 1
        reason = await _objection(target, context.number)
        if reason:
            self.refusal = RecipeError(f"{redact(str(redirection.url))} redirects {reason}; name where the files are")
            raise self.refusal


async def _objection(target: str, number: int) -> str | None:
    """Return why a redirection is not followed, in words that follow "redirects"."""
    parts = urlsplit(target)
    if number > MAX_REDIRECTIONS:
        return f"more than {MAX_REDIRECTIONS} times, perhaps in a circle"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"to another scheme than http and https ({parts.scheme or 'none'}), which is not followed"
    if await _is_link_local(parts.hostname):
        return f"to {parts.hostname}, an address of this machine's own link, which is not followed"
    return None


async def _is_link_local(host: str) -> bool:
    """Whether a host is, or resolves to, a link-local address: there cloud machines are told their credentials."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError:  # following it will tell
        return False
    return any(ip_address(str(address[0]).partition("%")[0]).is_link_local for *_, address in found)
