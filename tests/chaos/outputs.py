"""What lies in an output prefix, seen from outside: receipts, what is half-written, the manifest."""

import fcntl
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stockflow.storage.partials import PARTIAL_SUFFIX
from tests.fault_proxy import FaultyProxy

_QUIET_LOOKS = 15
"""at a proxy that has nothing to do, until what was sent to it cannot be on the way any more"""


@dataclass(frozen=True)
class Snapshot:
    """An output at one moment when no process works on it, or none that is about to be killed."""

    receipts: Mapping[str, str]
    """by file, what tells this writing of it from any other"""
    abandoned: frozenset[str]
    """shards, or their receipts, that a process died writing: partial files, open uploads"""
    is_published: bool


class Output(Protocol):
    """One output prefix."""

    url: str

    def snapshot(self) -> Snapshot:
        """Look closely."""

    def num_receipts(self) -> int:
        """Return how many there are; cheap, and it may count one that is being written."""

    def is_busy(self) -> bool:
        """Return whether a shard is being merged; cheap."""

    def settle(self) -> None:
        """Wait until all has arrived that a process sent before it was stopped."""

    def num_in_flight(self, before: Snapshot, after: Snapshot) -> int:
        """Return how many shards the process that died in between had begun, and has not finished."""


class FolderOutput:
    """An output on a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = str(folder)

    def snapshot(self) -> Snapshot:
        receipts = {}
        for path in self._receipts():
            stat = path.stat()
            receipts[path.name] = f"{stat.st_mtime_ns} {stat.st_ino}"
        abandoned = frozenset(str(path) for path in self._partial() if not _is_locked(path))
        return Snapshot(receipts, abandoned, (self._folder / "manifest.json").exists())

    def num_receipts(self) -> int:
        return len(self._receipts())

    def settle(self) -> None:
        pass

    def is_busy(self) -> bool:
        return any(_is_locked(path) for path in self._partial())

    def num_in_flight(self, before: Snapshot, after: Snapshot) -> int:
        return len(after.abandoned - before.abandoned)

    def _receipts(self) -> list[Path]:
        return list(self._folder.glob("_stockflow/*/receipts/model-*.json"))

    def _partial(self) -> list[Path]:
        return [path for path in self._folder.rglob(f".*{PARTIAL_SUFFIX}") if ".safetensors" in path.name]


class BucketOutput:
    """An output in a bucket, written through a proxy that is asked what went by."""

    def __init__(self, client: Any, proxy: FaultyProxy, bucket: str, prefix: str) -> None:
        self._client, self._proxy, self._bucket, self._prefix = client, proxy, bucket, prefix
        self._num_seen = 0
        self._written: set[str] = set()
        self._is_busy = False
        self.url = f"s3://{bucket}/{prefix}"

    def snapshot(self) -> Snapshot:
        uploads = self._client.list_multipart_uploads(Bucket=self._bucket).get("Uploads", ())
        abandoned = frozenset(entry["UploadId"] for entry in uploads if entry["Key"].startswith(f"{self._prefix}/"))
        receipts = {
            entry["Key"].rpartition("/")[2]: f"{entry['LastModified'].timestamp()} {entry['ETag']}"
            for entry in self._list("_stockflow/")
            if "/receipts/" in entry["Key"]
        }
        return Snapshot(receipts, abandoned, bool(self._list("manifest.json")))

    def num_receipts(self) -> int:
        self._follow()
        return len(self._written)

    def settle(self) -> None:
        num_quiet = 0
        while num_quiet < _QUIET_LOOKS:
            time.sleep(0.01)
            num_quiet = 0 if self._proxy.num_at_work else num_quiet + 1

    def is_busy(self) -> bool:
        self._follow()
        return self._is_busy

    def num_in_flight(self, before: Snapshot, after: Snapshot) -> int:
        del before, after
        return int(self.is_busy())

    def _follow(self) -> None:
        """Read on in the proxy's list: a shard is begun by its first read after the plan, or the last receipt."""
        for request in self._proxy.requests[self._num_seen :]:
            self._num_seen += 1
            if f"/{self._prefix}/" in request and request.startswith("PUT "):
                receipt = re.search(r"/receipts/(model-\S+\.json)", request)
                if receipt or request.endswith("/plan.json"):
                    self._is_busy = False
                if receipt:
                    self._written.add(receipt[1])
            elif re.match(rf"GET /{self._bucket}/\S+\.safetensors$", request):
                self._is_busy = True

    def _list(self, folder: str) -> list[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/{folder}"
        )
        return [entry for page in pages for entry in page.get("Contents", ())]


def _is_locked(path: Path) -> bool:
    """Whether a living writer holds the lock on its file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
