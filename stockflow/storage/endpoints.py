"""Endpoints: what is wrong with an address that gives no sound answer; asked once, when a request failed for good."""

import http.client
import socket
import ssl
from contextlib import suppress
from urllib.parse import urlsplit

from stockflow.text.redaction import redact

TIMEOUT_S = 2.0
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
"""what OpenSSL calls an answer that is no handshake; a connection that breaks may be of any server"""


def endpoint_mistake(endpoint: str, path: str) -> str | None:
    """Return in words what must be changed about an endpoint, None if nothing is seen.

    Args:
        endpoint: ``http://`` or ``https://`` address.
        path: what was asked there.
    """
    with suppress(OSError, ValueError, http.client.HTTPException):
        is_secure, speaks_tls = endpoint.startswith("https://"), _speaks_tls(endpoint)
        if speaks_tls and not is_secure:
            return f"it speaks TLS: write https://{urlsplit(endpoint).netloc}"
        if speaks_tls is False and is_secure:
            return "it answers, but not by TLS: mend its port, or write http:// if this store has no TLS"
        return _redirection(endpoint, path)
    return None


def _speaks_tls(endpoint: str) -> bool | None:
    """Return whether a server makes a handshake, whatever its certificate; None: it says nothing.

    Raises:
        OSError: it cannot be reached.
    """
    parts = urlsplit(endpoint)
    address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        try:
            _trusting().wrap_socket(connection, server_hostname=parts.hostname).close()
        except ssl.SSLError as error:
            reason = str(error.reason)
            return True if "ALERT" in reason else False if reason in _NO_TLS else None
        except (TimeoutError, ConnectionError):
            return None
    return True


def _redirection(endpoint: str, path: str) -> str | None:
    parts = urlsplit(endpoint)
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.netloc, timeout=TIMEOUT_S, context=_trusting()
        )
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
    try:
        connection.request("HEAD", path)
        answer = connection.getresponse()
        target = urlsplit(answer.headers.get("Location", ""))
    finally:
        connection.close()
    if answer.status // 100 != 3 or not target.netloc or target.netloc == parts.netloc:
        return None
    place = redact(f"{target.scheme}://{target.netloc}")
    return f"it redirects to {place}, which is not followed with credentials: name that address, if it is the store's"


def _trusting() -> ssl.SSLContext:
    """A context that shows whether there is TLS at all; nothing is sent through it that is secret."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
