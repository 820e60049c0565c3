"""One contract for every store, held against real files, real memory and a real S3 server."""

import fcntl
import hashlib
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import IO

import boto3
import pytest

from stockflow.errors import AlreadyExistsError, InputChangedError, NotFoundError, RecipeError
from stockflow.storage import StorageConfig, Store, StoreOptions, open_store, read_small
from stockflow.storage.base import Stamp

PAYLOAD = bytes(range(256)) * 40


@pytest.fixture(params=["local", "memory", "s3-obstore", "s3-s3fs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store over an empty prefix."""
    return _open(request, tmp_path, "run/foo")


@pytest.fixture
def sibling(store: Store) -> Store:
    """A store whose URL starts with the other's, as text."""
    return open_store(f"{store.url}bar", _config_of(store))


def _open(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Store:
    kind = request.param
    if kind == "local":
        return open_store(str(tmp_path / prefix), StorageConfig())
    if kind == "memory":
        return open_store(f"memory://{secrets.token_hex(6)}/{prefix}", StorageConfig())
    endpoint, bucket = request.getfixturevalue("s3_endpoint"), request.getfixturevalue("s3_bucket")
    options = StoreOptions(endpoint=endpoint, client="fsspec" if kind == "s3-s3fs" else "obstore")
    _CONFIGS[bucket] = StorageConfig({"s3://": options})
    return open_store(f"s3://{bucket}/{prefix}", _CONFIGS[bucket])


_CONFIGS: dict[str, StorageConfig] = {}


def _config_of(store: Store) -> StorageConfig:
    return _CONFIGS.get(_bucket_of(store), StorageConfig())


def _bucket_of(store: Store) -> str:
    return store.url.removeprefix("s3://").split("/")[0]


def open_uploads(store: Store) -> list[str]:
    """The keys of multipart uploads that were neither completed nor aborted."""
    if not store.url.startswith("s3://"):
        return []
    bucket = _bucket_of(store)
    client = boto3.client("s3", endpoint_url=_CONFIGS[bucket].by_prefix["s3://"].endpoint)
    return [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


def read(store: Store, key: str, start: int, num_bytes: int, stamp: Stamp) -> bytes:
    buffer = bytearray(num_bytes)
    store.read_into(key, start, memoryview(buffer), stamp)
    return bytes(buffer)


def pieces_of(payload: bytes, num_bytes: int) -> Iterator[memoryview]:
    """Pieces in one buffer that is overwritten as soon as the next is asked for, as the engine's are."""
    buffer = bytearray(num_bytes)
    for start in range(0, len(payload), num_bytes):
        piece = payload[start : start + num_bytes]
        buffer[: len(piece)] = piece
        yield memoryview(buffer)[: len(piece)]
        buffer[:] = b"\xee" * num_bytes


# Reading


def test_a_stamp_is_the_same_however_it_is_asked_for(store: Store) -> None:
    """The plan takes stamps from listings and heads, the reader compares them with HEAD and with each answer."""
    store.put("a.bin", PAYLOAD)

    stamp = store.stamp("a.bin")

    assert len(PAYLOAD) == stamp.size
    assert stamp.version
    assert store.read_head("a.bin", 8)[1] == stamp
    assert {"a.bin": stamp} == store.list() == store.list_top()


@pytest.mark.parametrize("num_bytes", [0, 1, 8, len(PAYLOAD), len(PAYLOAD) + 1, 1 << 20])
def test_read_head_gives_what_there_is(store: Store, num_bytes: int) -> None:
    store.put("a.bin", PAYLOAD)

    payload, stamp = store.read_head("a.bin", num_bytes)

    assert PAYLOAD[:num_bytes] == payload
    assert len(PAYLOAD) == stamp.size


def test_an_empty_object_is_an_object(store: Store) -> None:
    """No byte range of it exists, which S3 answers with an error."""
    store.put("empty", b"")

    payload, stamp = store.read_head("empty", 8)
    store.read_into("empty", 0, memoryview(bytearray()), stamp)

    assert payload == b""
    assert stamp.size == 0
    assert {"empty": stamp} == store.list()


def test_ranges_are_exact_from_many_threads(store: Store) -> None:
    store.put("a.bin", PAYLOAD)
    stamp = store.stamp("a.bin")
    spans = [(start, length) for start in (0, 1, 255, 256, 4097, len(PAYLOAD) - 1) for length in (1, 7, 1000, 9999)]
    spans = [(start, min(length, len(PAYLOAD) - start)) for start, length in spans]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda span: read(store, "a.bin", span[0], span[1], stamp), spans * 4))

    assert [PAYLOAD[start : start + length] for start, length in spans * 4] == found


def test_a_buffer_larger_than_one_request_is_filled(store: Store) -> None:
    payload = secrets.token_bytes(17 << 20)
    with store.create("big.bin", size=len(payload)) as sink:
        sink.write(payload)
    buffer = bytearray(len(payload) - 8)

    store.read_into("big.bin", 8, memoryview(buffer), store.stamp("big.bin"))

    assert payload[8:] == buffer


def test_a_replaced_object_is_noticed(store: Store) -> None:
    """A mixture of two versions of a checkpoint must never be merged."""
    store.put("a.bin", PAYLOAD)
    planned = store.stamp("a.bin")
    store.put("a.bin", PAYLOAD[::-1])

    assert planned != store.stamp("a.bin")
    if store.url.startswith("memory://"):
        return  # pinned by stat: the engine compares stamps around each shard
    with pytest.raises(InputChangedError, match=r"a\.bin changed since it was planned: expected 10,240 bytes"):
        read(store, "a.bin", 0, 10, planned)


def test_a_shortened_object_is_noticed(store: Store) -> None:
    store.put("a.bin", PAYLOAD)
    planned = store.stamp("a.bin")
    store.put("a.bin", b"short")

    with pytest.raises((InputChangedError, OSError), match=r"a\.bin"):
        read(store, "a.bin", 100, 10, planned)


def test_what_is_not_there_is_not_found(store: Store) -> None:
    stamp = Stamp(10, '"0123"')

    with pytest.raises(NotFoundError, match=r"no/such"):
        store.stamp("no/such")
    with pytest.raises(NotFoundError, match=r"no/such"):
        store.read_head("no/such", 8)
    with pytest.raises(NotFoundError, match=r"no/such"):
        read(store, "no/such", 0, 8, stamp)
    assert store.list() == store.list("no/") == store.list_top() == {}


# Listing


def test_listings_are_sorted_relative_and_stay_under_the_prefix(store: Store, sibling: Store) -> None:
    """``foo`` must not show what lies under ``foobar``."""
    for key in ("b.bin", "a.bin", "sub/c.bin", "sub/deep/d.bin", "subway/e.bin"):
        store.put(key, key.encode())
    sibling.put("other.bin", b"1")

    assert list(store.list()) == ["a.bin", "b.bin", "sub/c.bin", "sub/deep/d.bin", "subway/e.bin"]
    assert list(store.list("sub/")) == ["sub/c.bin", "sub/deep/d.bin"]
    assert list(store.list_top()) == ["a.bin", "b.bin"]
    assert list(sibling.list()) == ["other.bin"]


def test_a_listing_has_the_folders_too_and_a_bounded_one_ends(store: Store, sibling: Store) -> None:
    for key in ("b.bin", "sub/c.bin", "sub/deep/d.bin", "sub/deep/e.bin", "subway/e.bin"):
        store.put(key, key.encode())
    sibling.put("elsewhere/other.bin", b"1")

    found = store.listing()

    assert (list(found.files), found.folders) == (["b.bin"], ("sub", "subway"))
    assert found.files == store.list_top()
    assert len(store.list(at_most=3)) == 3
    assert len(store.list("sub/", at_most=2)) == 2
    assert store.list("sub/", at_most=2).keys() <= store.list("sub/").keys()
    assert list(store.list("sub/", at_most=99)) == ["sub/c.bin", "sub/deep/d.bin", "sub/deep/e.bin"]
    assert store.list("sub/", at_most=0) == {}


def test_odd_names_survive(store: Store) -> None:
    name = "tokenizer é +&=%20 (1).json"
    store.put(name, b"1")

    assert [name] == list(store.list()) == list(store.list_top())
    assert read_small(store, name, max_bytes=10) == b"1"


# Writing


@pytest.mark.parametrize("piece_bytes", [1 << 20, 5_000_001])
def test_a_large_object_arrives_as_written_though_buffers_are_reused(store: Store, piece_bytes: int) -> None:
    payload = secrets.token_bytes(20 << 20)

    with store.create("dir/big.bin", size=len(payload)) as sink:
        for piece in pieces_of(payload, piece_bytes):
            sink.write(piece)

    found = read_small(store, "dir/big.bin", max_bytes=len(payload))
    assert hashlib.sha256(payload).digest() == hashlib.sha256(found).digest()
    assert open_uploads(store) == []


@pytest.mark.parametrize("num_bytes", [0, 5])
def test_a_small_object_arrives(store: Store, num_bytes: int) -> None:
    with store.create("small.bin") as sink:
        sink.write(b"x" * num_bytes)

    assert b"x" * num_bytes == read_small(store, "small.bin", max_bytes=10)


class _Stopped(BaseException):
    """What a signal handler raises."""


def write_part(store: Store, key: str, num_bytes: int, error: BaseException) -> None:
    """Write some bytes of an object, then fail."""
    with store.create(key, size=num_bytes) as sink:
        for piece in pieces_of(bytes(num_bytes), 1 << 20):
            sink.write(piece)
        raise error


@pytest.mark.parametrize("error", [ValueError("stop"), _Stopped("stop")])
@pytest.mark.parametrize("num_bytes", [0, 10, 18 << 20])
def test_an_interrupted_object_leaves_nothing(store: Store, error: BaseException, num_bytes: int) -> None:
    """Nothing half-written is ever visible, and no upload goes on costing money."""
    with pytest.raises(type(error), match="stop"):
        write_part(store, "part.bin", num_bytes, error)

    assert store.list() == {}
    assert open_uploads(store) == []


def test_an_interrupted_replacement_leaves_the_old_object(store: Store) -> None:
    store.put("a.bin", PAYLOAD)

    with pytest.raises(ValueError, match="stop"):
        write_part(store, "a.bin", 10, ValueError("stop"))

    assert read_small(store, "a.bin", max_bytes=len(PAYLOAD)) == PAYLOAD


def test_put_replaces_and_put_new_refuses(store: Store) -> None:
    store.put("claim.json", b"1")
    store.put("claim.json", b"2")

    with pytest.raises(AlreadyExistsError, match=r"claim\.json already exists"):
        store.put_new("claim.json", b"3")
    store.put_new("other.json", b"4")

    assert read_small(store, "claim.json", max_bytes=10) == b"2"
    assert read_small(store, "other.json", max_bytes=10) == b"4"


def test_exactly_one_of_many_rivals_creates(store: Store) -> None:
    """Two drivers must never both own an output."""
    barrier = Barrier(8)

    def claim(rival: int) -> bool:
        barrier.wait()
        try:
            store.put_new("claim.json", str(rival).encode())
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))

    assert sum(won) == 1
    assert str(won.index(True)).encode() == read_small(store, "claim.json", max_bytes=10)


def test_deleting_twice_is_harmless(store: Store) -> None:
    store.put("a.bin", b"1")
    store.put("sub/b.bin", b"1")

    for _ in range(2):
        store.delete(["a.bin", "sub/b.bin", "never.bin"])
        store.delete([])

    assert store.list() == {}


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/./b", "a\\b"])
def test_a_key_that_climbs_out_is_refused(store: Store, key: str) -> None:
    with pytest.raises(RecipeError):
        store.stamp(key)
    with pytest.raises(RecipeError):
        store.put(key, b"1")
    with pytest.raises(RecipeError):
        store.delete([key])
    with pytest.raises(RecipeError), store.create(key):
        pass


# Promises that not every store keeps


def test_these_stores_refuse_a_second_creation_and_a_pin_to_another_state(store: Store) -> None:
    store.put_new("claim.json", b"mine")

    assert store.creates_exclusively("claim.json", b"theirs")
    assert store.pins_reads("claim.json")
    assert read_small(store, "claim.json", max_bytes=9) == b"mine"


# Options


def test_a_prefix_ends_where_a_folder_does() -> None:
    """Or one team's endpoint and rights would be used for another's bucket."""
    bucket, folder = StoreOptions(region="bucket"), StoreOptions(region="folder")
    config = StorageConfig({"s3://team/": bucket, "s3://team/private": folder})

    assert bucket == config.for_url("s3://team") == config.for_url("s3://team/model")
    assert folder == config.for_url("s3://team/private") == config.for_url("s3://team/private/model")
    assert bucket == config.for_url("s3://team/private-not")
    assert StoreOptions() == config.for_url("s3://team2/model")


def test_sweeping_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    """A killed worker leaves a partial file of gigabytes; a live one is still writing its own."""
    writer = (
        "import os, sys; from stockflow.storage import StorageConfig, open_store\n"
        "with open_store(sys.argv[1], StorageConfig(), writable=True).create('a.bin') as file:\n"
        "    file.write(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", writer, str(tmp_path)], check=False)
    (dead,) = tmp_path.iterdir()
    os.utime(dead, (0, 0))
    store = open_store(str(tmp_path), StorageConfig(), writable=True)

    with store.create("b.bin") as file:
        file.write(b"whole")
        (alive,) = set(tmp_path.iterdir()) - {dead}
        os.utime(alive, (0, 0))
        store.discard(store.half_written() or ())

    assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]


@pytest.mark.parametrize("write", ["put", "put_new"])
def test_a_writer_that_slept_before_it_locked_its_file_writes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    store, lock, swept = open_store(str(tmp_path), StorageConfig(), writable=True), fcntl.flock, []

    def sweep_first(file: int | IO[bytes], operation: int) -> None:
        if not swept:
            (partial,) = tmp_path.iterdir()
            swept.append(partial.name)
            os.utime(partial, (0, 0))
            store.discard(store.half_written() or ())
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    getattr(store, write)("a.json", b"whole")

    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"whole"


def test_what_was_found_abandoned_stays_if_its_writer_wakes_up(tmp_path: Path) -> None:
    partial = tmp_path / ".a.bin.0123abcd.stockflow-partial"
    partial.write_bytes(b"half")
    os.utime(partial, (0, 0))
    store = open_store(str(tmp_path), StorageConfig(), writable=True)
    found = store.half_written() or ()

    with partial.open("rb") as awake:
        fcntl.flock(awake, fcntl.LOCK_EX)
        store.discard(found)
        assert partial.exists()
    store.discard(found)

    assert [piece.is_abandoned for piece in found] == [True]
    assert not partial.exists()


@pytest.mark.parametrize("write", ["put", "put_new", "create"])
def test_a_full_disk_never_publishes_half_a_file(tmp_path: Path, write: str) -> None:
    """The kernel takes what still fits and raises nothing; a limit on file sizes does the same."""
    script = (
        "import resource, signal, sys\n"
        "from stockflow.errors import RecipeError\n"
        "from stockflow.storage import StorageConfig, open_store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = open_store(sys.argv[1], StorageConfig(), writable=True)\n"
        "try:\n"
        "    if sys.argv[2] == 'create':\n"
        "        with store.create('a.json') as file:\n"
        "            file.write(memoryview(bytes(2000)))\n"
        "    else:\n"
        "        getattr(store, sys.argv[2])('a.json', bytes(2000))\n"
        "except RecipeError as error:\n"
        "    print(error)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), write], capture_output=True, text=True, check=True
    )

    assert "File too large" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_listed_while_neighbours_write_and_remove_files_in_it(tmp_path: Path) -> None:
    """Two runs of one plan do; what has just gone must not be taken for a folder that is not there."""
    store, ended = open_store(str(tmp_path), StorageConfig(), writable=True), threading.Event()

    def write_and_remove(name: str) -> None:
        while not ended.is_set():
            store.put(name, b"x")
            store.delete([name])

    with ThreadPoolExecutor(3) as neighbours:
        busy = [neighbours.submit(write_and_remove, f"{number}.bin") for number in range(3)]
        try:
            for _ in range(1000):
                assert not any(name.startswith(".") for name in (*store.list_top(), *store.list()))
        finally:
            ended.set()
        for each in busy:
            each.result()
