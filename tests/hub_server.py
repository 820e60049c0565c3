"""A hub on loopback: the few endpoints of huggingface.co that reading a model takes."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
GATED = "org/gated"


@contextmanager
def hub_server(models: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders as models, each with one commit, and give the URL for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"models": dict(models)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models: ClassVar[dict[str, Path]]

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model(found[1], found[2])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            self._json([self._entry(file) for file in self._files(found[1])])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(self.models[found[1]] / found[3])
        else:
            self._refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", urlsplit(self.path).path)
        wanted = json.loads(body)["paths"] if body.startswith("{") else [unquote(p[6:]) for p in body.split("&")]
        files = self._files(found[1]) if found else []
        self._json([self._entry(file) for file in files if file.name in wanted])

    def _model(self, name: str, revision: str | None) -> None:
        if name == GATED:
            self._refuse("GatedRepo", 403)
        elif name not in self.models:
            self._refuse("RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self._refuse("RevisionNotFound")
        else:
            siblings = [{"rfilename": file.name} for file in self._files(name)]
            self._json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def _files(self, name: str) -> list[Path]:
        return sorted(self.models[name].iterdir())

    def _entry(self, file: Path) -> dict[str, object]:
        oid = f"{zlib.crc32(file.read_bytes()):040x}"
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._refuse("EntryNotFound")
            return
        payload = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(payload))) if asked else (0, len(payload))
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{zlib.crc32(payload):040x}"'}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(payload)}"
        self._send(206 if asked else 200, payload[start:stop], headers)

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str, status: int = 404) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, payload: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)
