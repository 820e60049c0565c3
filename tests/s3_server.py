"""A real S3 server on loopback (moto), and a proxy in front of one that fails on request."""

import http.client
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Literal
from urllib.parse import urlsplit

import pytest

from stockflow.storage.s3 import forget_session

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIASTOCKFLOWTEST",
    "AWS_SECRET_ACCESS_KEY": "stockflow-test-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
FORBIDDEN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE")
"""variables of the developer's own that must not reach a test"""


@contextmanager
def s3_credentials() -> Iterator[None]:
    """Put the credentials of the test servers, and nothing of the developer's own, into the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FORBIDDEN:
            patch.delenv(name, raising=False)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        forget_session()
        yield


Fault = Literal["503", "reset", "truncate", "lost", "expired", "denied", "elsewhere", "501", "pass"]
"""``lost``: the request is carried out, and its answer never arrives; ``pass``: nothing goes wrong"""

ANSWERS: dict[str, tuple[int, bytes]] = {
    "503": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"),
    "501": (501, b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"),
    "expired": (400, b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"),
    "denied": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "elsewhere": (301, b"<Error><Code>PermanentRedirect</Code><Message>Use another endpoint</Message></Error>"),
}


@contextmanager
def moto_server() -> Iterator[str]:
    """Run ``moto_server`` on a free port and give its URL. Keep objects small: it copies them for each range."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # Real servers list a thousand names at a time; five make every listing go on past its first page.
    environment = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "5"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"moto_server did not come up on port {port} (exit code {process.poll()})")


class FaultyProxy:
    """Passes requests on to ``upstream``; the next ones meet the ``faults`` queued for their method."""

    def __init__(self, upstream: str, *, tls: ssl.SSLContext | None = None) -> None:
        self.faults: dict[str, deque[Fault]] = {}
        self.ignored_headers: set[str] = set()
        self.requests: list[str] = []
        """method and path of each request, in order"""
        self.headers: list[dict[str, str]] = []
        """their headers, names in lower case"""
        handler = type("Handler", (_Handler,), {"proxy": self, "upstream": urlsplit(upstream).netloc})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyProxy":
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, fault: Fault, *, times: int = 1, after: int = 0) -> None:
        """Let the next requests of one method meet a fault, ``after`` some that pass."""
        self.faults[method] = deque([*["pass"] * after, *[fault] * times])

    def next_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        """Record a request and return the fault it meets."""
        self.requests.append(f"{method} {path}")
        self.headers.append(headers)
        queue = self.faults.get(method)
        return queue.popleft() if queue else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    upstream: str

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.proxy.next_fault(self.command, self.path, headers)
        if fault in ANSWERS:
            self._send(ANSWERS[fault][0], {"Content-Type": "application/xml"}, ANSWERS[fault][1])
        elif fault == "reset":
            self._reset()
        else:
            answer = self._forward(body)
            if fault == "lost":
                self._reset()
            else:
                self._send(*answer, cut=fault == "truncate")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=10)
        kept = {k: v for k, v in self.headers.items() if k.lower() not in self.proxy.ignored_headers}
        connection.request(self.command, self.path, body, kept)
        reply = connection.getresponse()
        payload = reply.read()
        connection.close()
        return reply.status, dict(reply.getheaders()), payload

    def _send(self, status: int, headers: dict[str, str], payload: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        length = str(len(payload))
        if self.command == "HEAD":
            payload = b""
            length = next((value for name, value in headers.items() if name.lower() == "content-length"), "0")
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if cut else payload)
        self.close_connection = cut

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = self.rfile = open(os.devnull, "r+b")  # noqa: SIM115  # the base class flushes and closes them
