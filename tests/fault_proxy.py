"""A proxy in front of a real S3 server that does what networks and busy stores do: by request, or by rate and seed."""

import asyncio
import re
import socket
import ssl
import struct
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from html import unescape
from random import Random
from threading import Event, Thread
from typing import Literal, get_args
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal[
    *("503", "500", "501", "429", "wait", "expired", "denied", "elsewhere", "skewed", "html", "empty", "moved", "gone"),
    *("no-etag", "wrong-etag", "babble"),
    *("reset", "cut", "truncate", "lost", "stall", "slow", "short", "long", "shifted", "flip", "pass"),
]
"""What a request may meet.

The first line are answers of a server: ``wait`` is a throttle that says how long, ``html`` a page with status 200 as
of a gateway, ``empty`` nothing with status 200, ``moved`` a redirection. ``no-etag`` and ``wrong-etag``: an answer has
no ETag, or another one; ``babble``: it is no HTTP; ``reset``: the connection breaks before the store sees the request;
``cut``: it breaks within the answer's body; ``truncate``: that body ends early, without an error; ``lost``: the store
has acted, and nothing comes back; ``stall``: silence, within the answer's body or instead of an answer to a request
that the store never sees; ``slow``: the answer dribbles; ``short`` and ``long``: the answer is sound, and has a byte
less or more than was asked for; ``shifted``: so is the range, one byte further; ``flip``: one bit is another, on the
way up if the request has a body, else on the way down; ``pass``: nothing goes wrong.
"""
Step = Literal["head", "get", "list", "put", "create", "part", "complete", "abort", "delete", "other"]
"""What a request asks of S3; ``create`` to ``abort`` are those of a multipart upload."""

XML, HTML = ("Content-Type", "application/xml"), ("Content-Type", "text/html")
ANSWERS: dict[str, tuple[int, bytes]] = {
    "503": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"),
    "500": (500, b"<Error><Code>InternalError</Code><Message>We encountered an internal error</Message></Error>"),
    "501": (501, b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"),
    "expired": (400, b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"),
    "denied": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "429": (429, b"<Error><Code>TooManyRequests</Code><Message>Calm down</Message></Error>"),
    "wait": (429, b"<Error><Code>TooManyRequests</Code><Message>Calm down</Message></Error>"),
    "skewed": (403, b"<Error><Code>RequestTimeTooSkewed</Code><Message>The time differs too much</Message></Error>"),
    "gone": (404, b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"),
    "html": (200, b"<!doctype html><html><body><h1>Please sign in</h1></body></html>"),
    "empty": (200, b""),
    "moved": (307, b"<Error><Code>TemporaryRedirect</Code><Message>Go elsewhere</Message></Error>"),
    "elsewhere": (301, b"<Error><Code>PermanentRedirect</Code><Message>Use another endpoint</Message></Error>"),
}
TLS_HELLO = b"\x16"
"""the first byte of a handshake"""
STALL_S = 120.0
"""longer than any timeout of a client"""
SLOW_S = 0.2
"""between the halves of an answer"""
_RECOMPUTED = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive"})


@dataclass
class Weather:
    """Faults at random: each request draws from ``rates``, by its own words and how often it was made, not by order.

    So two runs that make the same requests meet the same faults, however their threads interleave.
    """

    rates: Mapping[Fault, float]
    seed: int
    steps: frozenset[Step] = frozenset(get_args(Step))
    """those that meet faults; others pass"""
    _seen: Counter[str] = field(default_factory=Counter)

    def draw(self, request: "Request") -> Fault:
        """Return what ``request`` meets."""
        if request.step not in self.steps:
            return "pass"
        self._seen[request.words] += 1
        drawn = Random(f"{self.seed} {request.words} {self._seen[request.words]}").random()
        for fault, rate in self.rates.items():
            if drawn < rate:
                return fault
            drawn -= rate
        return "pass"


@dataclass(frozen=True)
class Request:
    """One HTTP request, read whole."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def step(self) -> Step:
        """What the request asks of S3."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "uploadId" in query:
            steps: dict[str, Step] = {"PUT": "part", "POST": "complete", "DELETE": "abort"}
            return steps.get(self.method, "other")
        if self.method == "POST":
            return "create" if "uploads" in query else "delete" if "delete" in query else "other"
        if self.method == "GET":
            return "list" if urlsplit(self.path).path.count("/") < 2 or "list-type" in query else "get"
        plain: dict[str, Step] = {"HEAD": "head", "PUT": "put", "DELETE": "delete"}
        return plain.get(self.method, "other")

    @property
    def words(self) -> str:
        """What tells this request from others, in every run: bucket and upload's id have other names in each."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        told = " ".join(query.get(name, [""])[0] for name in ("prefix", "partNumber"))
        key = parts.path.lstrip("/").partition("/")[2]
        return f"{self.step} {key} {told} {self.header('range')}"

    def header(self, name: str) -> str:
        """Return a header, empty if there is none; ``name`` in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def without(self, names: set[str]) -> "Request":
        """Return the request without some headers."""
        kept = tuple((name, value) for name, value in self.headers if name.lower() not in names)
        return Request(self.method, self.path, kept, self.body)


@dataclass(frozen=True)
class Outage:
    """Every request of one step whose path has some words in it meets a fault."""

    step: Step
    words: str
    fault: Fault = "503"


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, read whole."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    length: str | None = None
    """what Content-Length says where that is not the body's: the answer to a HEAD"""

    def with_body(self, body: bytes) -> "Answer":
        """Return the answer with another body, its length stated rightly."""
        return Answer(self.status, self.headers, body)

    def with_etag(self, etag: str) -> "Answer":
        """Return the answer with another ETag, or with none."""
        kept = tuple((name, value) for name, value in self.headers if name.lower() != "etag")
        return Answer(self.status, (*kept, ("ETag", etag)) if etag else kept, self.body, self.length)


class FaultyProxy:
    """Passes requests on to ``upstream``, save those that meet a fault.

    The next requests of one method, or one step, meet those queued with ``fail``; all others meet an outage or the
    weather, where there is one.
    """

    def __init__(self, upstream: str, *, tls: ssl.SSLContext | None = None, weather: Weather | None = None) -> None:
        self.faults: dict[str, deque[Fault]] = {}
        self.ignored_headers: set[str] = set()
        self.weathers = [weather] if weather else []
        self.outages: list[Outage] = []
        self.delays_s: dict[Step, float] = {}
        """before requests of a step reach the store"""
        self.requests: list[str] = []
        """method and path of each request, in order"""
        self.headers: list[dict[str, str]] = []
        """their headers, names in lower case"""
        self.steps: list[Step] = []
        self.num_at_work = 0
        """requests other than GET that have come and are not answered"""
        self.met: Counter[tuple[Step, Fault]] = Counter()
        """faults that requests met, by step"""
        self.told: dict[Fault, tuple[tuple[str, str], ...]] = {"wait": (("Retry-After", "1"),)}
        """further headers of answers"""
        self.listing_lag_s = 0.0
        """how long what was written is not listed"""
        self._written_at: dict[str, float] = {}
        self._flips: Counter[str] = Counter()
        self.num_bytes = 0
        """sent to clients in bodies"""
        self._upstream = urlsplit(upstream)
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._listening = Event()
        self._stop = asyncio.Event()
        self._thread = Thread(target=self._serve_here, name="proxy", daemon=True)
        self.url = ""

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        if not self._listening.wait(10) or not self.url:
            raise RuntimeError("the proxy did not come up")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def fail(self, where: str, fault: Fault, *, times: int = 1, after: int = 0) -> None:
        """Let the next requests of one method (``GET``) or step (``part``) meet a fault, ``after`` some that pass."""
        self.faults[where] = deque([*["pass"] * after, *[fault] * times])

    def next_fault(self, request: Request) -> Fault:
        """Record a request and return what it meets."""
        self.requests.append(f"{request.method} {request.path}")
        self.headers.append({name.lower(): value for name, value in request.headers})
        self.steps.append(request.step)
        queue = self.faults.get(request.step) or self.faults.get(request.method)
        fault = queue.popleft() if queue else self._drawn(request)
        if fault != "pass":
            self.met[request.step, fault] += 1
        return fault

    def _drawn(self, request: Request) -> Fault:
        for outage in self.outages:
            if outage.step == request.step and outage.words in request.path:
                return outage.fault
        drawn = (weather.draw(request) for weather in self.weathers)
        return next((fault for fault in drawn if fault != "pass"), "pass")

    def _serve_here(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._listening.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._converse, "127.0.0.1", 0, ssl=self._tls, limit=1 << 20)
        port = server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{port}"
        self._listening.set()
        await self._stop.wait()
        server.close()
        talking = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests, one after the other."""
        try:
            while await self._answer_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # the client went away, or the proxy ends: asyncio would print a connection that was cancelled
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return whether the connection goes on."""
        request = await _read_request(reader, writer)
        if request is None:
            return False
        fault = self.next_fault(request)
        self.num_at_work += request.method != "GET"
        try:
            return await self._answer(request, writer, fault)
        finally:
            self.num_at_work -= request.method != "GET"

    async def _answer(self, request: Request, writer: asyncio.StreamWriter, fault: Fault) -> bool:
        await asyncio.sleep(self.delays_s.get(request.step, 0.0))
        if fault in ANSWERS:
            status, body = ANSWERS[fault]
            headers = (HTML if fault == "html" else XML, *self.told.get(fault, ()))
            return await self._send(request, writer, Answer(status, headers, body))
        if fault == "babble":
            writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            await writer.drain()
            return False
        if fault == "reset" or (fault == "stall" and request.body):
            return await self._silence(writer, 0.0 if fault == "reset" else STALL_S)
        answer = await self._forward(_spoiled(request, fault))
        if self.listing_lag_s:
            answer = self._lagging(request, answer)
        if fault == "lost":
            return await self._silence(writer, 0.0)
        if fault == "flip" and answer.body and not request.body:
            answer = answer.with_body(_flipped(answer.body, self._words_of_flip(request)))
        elif fault in ("no-etag", "wrong-etag"):
            answer = answer.with_etag("" if fault == "no-etag" else '"' + "1" * 32 + '"')
        elif fault in ("short", "long") and answer.body:
            answer = answer.with_body(answer.body[:-1] if fault == "short" else answer.body + b"\0")
        return await self._send(request, writer, answer, fault)

    def _lagging(self, request: Request, answer: Answer) -> Answer:
        """Return a listing without what was written lately."""
        now, bucket = time.monotonic(), urlsplit(request.path).path.split("/")[1]
        if request.step in ("put", "complete"):
            self._written_at[unquote(urlsplit(request.path).path)] = now
        if request.step != "list":
            return answer

        def kept(entry: re.Match[bytes]) -> bytes:
            written_at = self._written_at.get(f"/{bucket}/{unescape(entry[1].decode())}", now - self.listing_lag_s)
            return entry[0] if now - written_at >= self.listing_lag_s else b""

        return answer.with_body(re.sub(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", kept, answer.body, flags=re.S))

    def _words_of_flip(self, request: Request) -> str:
        """What decides which bit it is: another one each time that a request is made."""
        self._flips[request.words] += 1
        return f"{request.words} {self._flips[request.words]}"

    async def _silence(self, writer: asyncio.StreamWriter, seconds: float) -> bool:
        """Say nothing, then break the connection."""
        await asyncio.sleep(seconds)
        writer.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()
        return False

    async def _send(
        self, request: Request, writer: asyncio.StreamWriter, answer: Answer, fault: Fault = "pass"
    ) -> bool:
        """Send an answer, or what a fault leaves of it; return whether the connection goes on."""
        body = b"" if request.method == "HEAD" else answer.body
        length = answer.length if request.method == "HEAD" and answer.length else str(len(body))
        head = [f"HTTP/1.1 {answer.status} -", *(f"{name}: {value}" for name, value in answer.headers)]
        writer.write("\r\n".join([*head, f"Content-Length: {length}", "\r\n"]).encode("latin-1"))
        half = len(body) // 2
        if fault in ("cut", "truncate", "stall"):
            writer.write(body[:half])
            await writer.drain()
            if fault == "truncate":
                writer.close()
                return False
            return await self._silence(writer, STALL_S if fault == "stall" else 0.01)
        writer.write(body[:half])
        if fault == "slow":
            await writer.drain()
            await asyncio.sleep(SLOW_S)
        writer.write(body[half:])
        self.num_bytes += len(body)
        await writer.drain()
        return request.header("connection").lower() != "close"

    async def _forward(self, request: Request) -> Answer:
        """Ask the server behind, over a connection of its own."""
        kept = request.without(self.ignored_headers | _RECOMPUTED | {"expect"})
        async with self._connected() as (reader, writer):
            lines = [f"{name}: {value}" for name, value in kept.headers]
            lines += [f"Content-Length: {len(request.body)}", "Connection: close", "\r\n"]
            writer.write("\r\n".join([f"{request.method} {request.path} HTTP/1.1", *lines]).encode("latin-1"))
            writer.write(request.body)
            await writer.drain()
            status, headers = await _read_head(reader)
            body = b"" if request.method == "HEAD" else await _read_body(reader, headers)
        passed_on = tuple((name, value) for name, value in headers if name.lower() not in _RECOMPUTED)
        length = next((value for name, value in headers if name.lower() == "content-length"), None)
        return Answer(int(status.split()[1]), passed_on, body, length)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=1 << 20)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        first, headers = await _read_head(reader)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    method, path, _ = first.split(" ", 2)
    if any(name.lower() == "expect" for name, _ in headers):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return Request(method, path, headers, await _read_body(reader, headers, is_request=True))


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the first line and the headers."""
    first = await reader.readexactly(1)
    if first == TLS_HELLO:
        raise ConnectionError("no HTTP")
    lines = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    named = (line.partition(":") for line in lines[1:] if line)
    return lines[0], tuple((name, value.strip()) for name, _, value in named)


async def _read_body(
    reader: asyncio.StreamReader, headers: tuple[tuple[str, str], ...], *, is_request: bool = False
) -> bytes:
    found = {name.lower(): value for name, value in headers}
    if found.get("transfer-encoding", "").lower() == "chunked":
        chunks = []
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            chunks.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return b"".join(chunks)
    if "content-length" in found:
        return await reader.readexactly(int(found["content-length"]))
    return b"" if is_request else await reader.read()


def _spoiled(request: Request, fault: Fault) -> Request:
    """Return the request as it reaches the store."""
    if fault == "flip" and request.body:
        return Request(request.method, request.path, request.headers, _flipped(request.body, request.words))
    asked = request.header("range")
    if fault == "shifted" and asked:
        start, _, last = asked.removeprefix("bytes=").partition("-")
        moved = f"bytes={int(start) + 1}-{int(last) + 1 if last else ''}"
        others = request.without({"range"})
        return Request(request.method, request.path, (*others.headers, ("Range", moved)), request.body)
    return request


def _flipped(body: bytes, seed: str) -> bytes:
    """Return ``body`` with one bit changed."""
    spoiled = bytearray(body)
    if spoiled:
        random = Random(seed)
        spoiled[random.randrange(len(spoiled))] ^= 1 << random.randrange(8)
    return bytes(spoiled)
