"""Every request of both S3 clients under faults: what passes is ridden out, what does not is said, nothing lies.

The whole matrix, and most of what goes through s3fs, belongs to ``make chaos``.
"""

import base64
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import boto3
import pytest

from stockflow.errors import LostUploadError, StorageError
from stockflow.storage import StoreOptions, parts
from stockflow.storage.base import Stamp
from stockflow.storage.checksums import checksums_confirm, crc32c, crc64nvme, etag_confirms
from stockflow.storage.etags import PartDigests, md5_etag, names_same
from stockflow.storage.fs import FsspecStore
from stockflow.storage.objects import ObjectStore
from stockflow.storage.remote import RemoteStore
from stockflow.storage.retry import RetryPolicy
from stockflow.storage.s3 import Bucket, obstore_bucket
from stockflow.storage.throttles import asked_wait_s
from tests.fault_proxy import Fault, FaultyProxy, Step
from tests.waiting import HANG_S

QUICK = RetryPolicy(attempts=4, first_delay_s=0.01, max_delay_s=0.05)
IMPATIENT = replace(QUICK, read_timeout_s=1.0, write_timeout_s=1.5)
"""For answers that never come; so that a busy machine does not make more of them, all other tests wait longer."""
SMALL = bytes(range(256)) * 40
PART_BYTES = 5 << 20
LARGE = random.Random(5).randbytes(9 * PART_BYTES // 4)
"""three parts"""

THOROUGH = pytest.mark.chaos

WITH_BOTH = pytest.mark.parametrize("store_type", [ObjectStore, FsspecStore], ids=["obstore", "s3fs"])

Request = Callable[[RemoteStore, Stamp], object]


@pytest.fixture(params=[ObjectStore, pytest.param(FsspecStore, marks=pytest.mark.chaos)], ids=["obstore", "s3fs"])
def store_type(request: pytest.FixtureRequest) -> type[RemoteStore]:
    chosen: type[RemoteStore] = request.param
    return chosen


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(parts, "DEFAULT_PART_BYTES", PART_BYTES)
    with FaultyProxy(s3_endpoint) as server:
        yield server


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> RetryPolicy:
    """How long to wait for answers, by the fault that a test is about."""
    arguments = getattr(getattr(request.node, "callspec", None), "params", {})
    return IMPATIENT if arguments.get("fault") == "stall" else QUICK


@pytest.fixture
def store(
    store_type: Callable[..., RemoteStore], proxy: FaultyProxy, s3_bucket: str, policy: RetryPolicy
) -> RemoteStore:
    """A store with one object, ``a.bin``, and clients that are up."""
    opened = store_type(f"s3://{s3_bucket}/run", StoreOptions(endpoint=proxy.url), policy)
    opened.put("a.bin", SMALL)
    return opened


@pytest.fixture
def impatient(
    store: RemoteStore, store_type: Callable[..., RemoteStore], proxy: FaultyProxy, policy: RetryPolicy
) -> RemoteStore:
    """The same store with two attempts: the pauses between botocore's cannot be set."""
    return store_type(store.url, StoreOptions(endpoint=proxy.url), replace(policy, attempts=2))


@pytest.fixture
def behind(s3_endpoint: str, s3_bucket: str) -> Callable[[str], bytes]:
    """Reads an object past the proxy."""
    client = boto3.client("s3", endpoint_url=s3_endpoint)

    def read_it(key: str) -> bytes:
        payload: bytes = client.get_object(Bucket=s3_bucket, Key=f"run/{key}")["Body"].read()
        return payload

    return read_it


def read(store: RemoteStore, stamp: Stamp) -> bytes:
    buffer = bytearray(4000)
    store.read_into("a.bin", 5, memoryview(buffer), stamp)
    return bytes(buffer)


def upload(store: RemoteStore, payload: bytes = LARGE) -> None:
    with store.create("big.bin", size=len(payload)) as sink:
        for start in range(0, len(payload), 700_000):
            sink.write(payload[start : start + 700_000])


# What passes


@pytest.mark.parametrize(
    "fault",
    [
        *("503", "reset", "cut", "truncate", "stall", "short"),
        *(pytest.param(fault, marks=THOROUGH) for fault in ("500", "lost", "long", "shifted")),
    ],
)
def test_a_read_gives_the_right_bytes_in_the_end(store: RemoteStore, proxy: FaultyProxy, fault: Fault) -> None:
    stamp = store.stamp("a.bin")
    proxy.fail("get", fault, times=2)

    assert SMALL[5:4005] == read(store, stamp)
    assert proxy.met["get", fault] == 2
    # aiohttp repeats once on its own when a kept connection breaks, and cannot be told not to.
    silent = isinstance(store, FsspecStore) and fault in ("reset", "lost")
    assert store.num_retries in ({1, 2} if silent else {2}) or (fault == "stall" and store.num_retries > 2)


@pytest.mark.parametrize("fault", ["short", "long"])
def test_a_small_object_is_read_whole_in_the_end(store: RemoteStore, proxy: FaultyProxy, fault: Fault) -> None:
    proxy.fail("get", fault)

    assert store.read_head("a.bin", 99_999)[0] == SMALL
    assert store.num_retries == 1


def test_a_slow_answer_is_waited_for(store: RemoteStore, proxy: FaultyProxy) -> None:
    stamp = store.stamp("a.bin")
    proxy.fail("get", "slow")

    assert SMALL[5:4005] == read(store, stamp)
    assert (proxy.met["get", "slow"], store.num_retries) == (1, 0)


@pytest.mark.parametrize(
    "fault",
    ["503", "truncate", *(pytest.param(fault, marks=THOROUGH) for fault in ("reset", "cut", "lost", "stall", "short"))],
)
def test_a_listing_is_whole_in_the_end(store: RemoteStore, proxy: FaultyProxy, fault: Fault) -> None:
    for number in range(7):  # two pages of the test server
        store.put(f"{number}", b"1")
    proxy.fail("list", fault, times=1, after=1)

    assert len(store.list()) == 8
    assert proxy.met["list", fault] == 1


@pytest.mark.parametrize(
    "fault", ["lost", *(pytest.param(fault, marks=THOROUGH) for fault in ("503", "reset", "stall"))]
)
def test_a_stamp_is_right_in_the_end(store: RemoteStore, proxy: FaultyProxy, fault: Fault) -> None:
    proxy.fail("head", fault)

    assert len(SMALL) == store.stamp("a.bin").size
    assert proxy.met["head", fault] == 1


@pytest.mark.parametrize(
    "fault", ["lost", "stall", *(pytest.param(fault, marks=THOROUGH) for fault in ("503", "reset", "truncate"))]
)
@pytest.mark.parametrize("exclusive", [False, True], ids=["put", "put_new"])
def test_a_small_object_is_written_in_the_end(
    store: RemoteStore, proxy: FaultyProxy, behind: Callable[[str], bytes], fault: Fault, exclusive: bool
) -> None:
    proxy.fail("put", fault)

    (store.put_new if exclusive else store.put)("b.bin", SMALL)

    assert behind("b.bin") == SMALL
    assert proxy.met["put", fault] == 1


@pytest.mark.parametrize(
    "fault", ["503", "lost", "truncate", *(pytest.param(fault, marks=THOROUGH) for fault in ("reset", "stall"))]
)
@pytest.mark.parametrize("step", ["create", "part", "complete"])
def test_an_upload_is_whole_in_the_end(
    store: RemoteStore, proxy: FaultyProxy, behind: Callable[[str], bytes], step: Step, fault: Fault
) -> None:
    proxy.fail(step, fault)

    upload(store)

    assert behind("big.bin") == LARGE
    assert proxy.met[step, fault] == 1


def test_an_upload_whose_last_answer_never_comes_is_recognised(
    impatient: RemoteStore, proxy: FaultyProxy, behind: Callable[[str], bytes]
) -> None:
    """The store has acted; asked again it knows of no such upload."""
    proxy.fail("complete", "lost", times=99)

    upload(impatient)

    assert behind("big.bin") == LARGE


def test_a_part_may_take_longer_than_silence_lasts(
    store_type: Callable[..., RemoteStore], proxy: FaultyProxy, s3_bucket: str
) -> None:
    """No answer comes while a part is sent, and on a slow line that takes its time."""
    policy = replace(IMPATIENT, write_timeout_s=HANG_S)
    store = store_type(f"s3://{s3_bucket}/run", StoreOptions(endpoint=proxy.url), policy)
    proxy.delays_s["part"] = 2 * policy.read_timeout_s

    upload(store)

    assert proxy.steps.count("part") == 3


@WITH_BOTH
def test_the_range_that_comes_is_the_range_asked_for(store: RemoteStore, proxy: FaultyProxy) -> None:
    stamp = store.stamp("a.bin")
    proxy.fail("get", "shifted")

    assert read(store, stamp) == SMALL[5:4005]
    assert store.num_retries == 1


NONSENSE: tuple[Fault, ...] = ("html", "empty", "babble", "no-etag", "429")
"""answers that are not those of a store, and a throttle that botocore does not repeat"""
ASKED: dict[str, Request] = {
    "get": lambda store, stamp: (read(store, stamp), store.read_head("a.bin", 99_999)[0])[1],
    "head": lambda store, _: store.stamp("a.bin").size * b"x" and SMALL,
    "list": lambda store, _: SMALL if list(store.list()) == list(store.listing().files) == ["a.bin"] else b"",
    "put": lambda store, _: (store.put("b.bin", SMALL), store.put_new("c.bin", SMALL), SMALL)[2],
    "create": lambda store, _: (upload(store), SMALL)[1],
}


@WITH_BOTH
@pytest.mark.parametrize("step", ASKED)
def test_nonsense_for_an_answer_is_not_believed_but_asked_again(
    store: RemoteStore, proxy: FaultyProxy, step: Step
) -> None:
    stamp = store.stamp("a.bin")
    for fault in NONSENSE:
        proxy.fail(step, fault)

        assert ASKED[step](store, stamp) == SMALL, fault
        assert proxy.met[step, fault] == 1
        store.delete(["b.bin", "c.bin", "big.bin"])


@pytest.mark.parametrize("fault", [fault for fault in NONSENSE if fault != "babble"])
@pytest.mark.parametrize("step", ["part", "complete"])
def test_botocores_uploads_are_repeated_step_by_step(
    proxy: FaultyProxy, s3_bucket: str, behind: Callable[[str], bytes], step: Step, fault: Fault
) -> None:
    """obstore repeats parts itself, and only what says that it failed."""
    store = FsspecStore(f"s3://{s3_bucket}/run", StoreOptions(endpoint=proxy.url), QUICK)
    proxy.fail(step, fault, times=2)

    upload(store)

    assert behind("big.bin") == LARGE


def test_an_answer_that_is_nonsense_to_an_upload_is_asked_for_again_or_told_as_a_lost_upload(
    store: RemoteStore, behind: Callable[[str], bytes], proxy: FaultyProxy
) -> None:
    proxy.fail("part", "html")

    if isinstance(store, FsspecStore):
        upload(store)
        assert behind("big.bin") == LARGE
    else:
        with pytest.raises(LostUploadError, match=r"after 1 attempt: .*ETag.*run again"):
            upload(store)


@WITH_BOTH
def test_a_throttle_that_says_how_long_is_obeyed_with_one_line(
    store: RemoteStore, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    stamp = store.stamp("a.bin")
    proxy.told["wait"] = (("Retry-After", "1"),)
    proxy.fail("get", "wait", times=2)
    proxy.fail("head", "wait", times=2)
    started = time.monotonic()

    assert read(store, stamp) == SMALL[5:4005]

    assert time.monotonic() - started > 0.9
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.url} asks to wait 1 s before it is asked again"
    ]


@WITH_BOTH
def test_a_throttle_that_asks_for_too_much_ends_at_once(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.told["wait"] = (("RateLimit", '"default";r=0;t=3600'),)
    proxy.fail("head", "wait", times=2)

    with pytest.raises(StorageError, match=r"after 1 attempt: HTTP 429 .*it asks to wait 3,600 s"):
        store.stamp("a.bin")


def test_what_headers_ask_for_is_read_in_every_form() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)

    assert 58 < (asked_wait_s({"Retry-After": in_a_minute}) or 0) <= 60
    assert asked_wait_s({"retry-after": "7"}) == asked_wait_s({"RateLimit-Reset": "7"}) == 7
    assert asked_wait_s({"RateLimit": "limit=10, remaining=0, reset=7"}) == 7
    assert asked_wait_s({"RateLimit": '"default";r=5;t=7'}) is None
    assert asked_wait_s({"Retry-After": "soon"}) is asked_wait_s({}) is None


# What does not pass


FAILURES: list[tuple[Step, Fault, Request, str]] = [
    ("head", "503", lambda store, _: store.stamp("a.bin"), "cannot stat {}/a.bin after 2 attempts: HTTP 503"),
    ("get", "503", read, "cannot read {}/a.bin after 2 attempts: HTTP 503 SlowDown"),
    ("get", "cut", read, "cannot read {}/a.bin after 2 attempts: "),
    ("get", "stall", read, "cannot read {}/a.bin after 2 attempts: "),
    ("get", "short", read, "cannot read {}/a.bin after 2 attempts: 3999 bytes came from byte 5, expected 4000"),
    ("get", "shifted", read, "cannot read {}/a.bin after 2 attempts: "),
    ("list", "503", lambda store, _: store.list(), "cannot list {} after 2 attempts: HTTP 503 SlowDown"),
    ("put", "503", lambda store, _: store.put("r.json", b"1"), "cannot write {}/r.json after 2 attempts: HTTP 503"),
    ("put", "503", lambda store, _: store.put_new("m.json", b"1"), "cannot create {}/m.json after 2 attempts: HTTP"),
    ("create", "503", lambda store, _: upload(store), "(starting the upload) after 2 attempts: HTTP 503 SlowDown"),
    ("part", "503", lambda store, _: upload(store), ") after 2 attempts: HTTP 503 SlowDown"),
    ("part", "lost", lambda store, _: upload(store), " after 2 attempts: "),
    ("complete", "503", lambda store, _: upload(store), "(completing the upload) after 2 attempts: HTTP 503"),
    ("delete", "503", lambda store, _: store.delete(["a.bin"]), "cannot delete {}/a.bin after 2 attempts: HTTP 503"),
]


@pytest.mark.parametrize(("step", "fault", "request_", "told"), FAILURES)
def test_a_failure_that_lasts_names_object_operation_attempts_and_cause(
    impatient: RemoteStore, proxy: FaultyProxy, step: Step, fault: Fault, request_: Request, told: str
) -> None:
    stamp = impatient.stamp("a.bin")
    proxy.fail(step, fault, times=99)

    with pytest.raises(StorageError) as caught:
        request_(impatient, stamp)

    assert caught.value.exit_code == 3
    assert told.format(impatient.url) in str(caught.value)
    assert str(caught.value).endswith("run again")
    assert (f"cannot write {impatient.url}/big.bin" in str(caught.value)) == (step in ("create", "part", "complete"))


def test_an_upload_that_is_gone_is_no_missing_object(proxy: FaultyProxy, s3_endpoint: str, s3_bucket: str) -> None:
    """A lifecycle rule, or somebody, aborted it: exit 3, for another run makes the shard anew."""
    store = ObjectStore(f"s3://{s3_bucket}/run", StoreOptions(endpoint=proxy.url), QUICK)
    client = boto3.client("s3", endpoint_url=s3_endpoint)

    def write() -> None:
        with store.create("big.bin", size=len(LARGE)) as sink:
            sink.write(LARGE[: 2 * PART_BYTES])
            while not (uploads := client.list_multipart_uploads(Bucket=s3_bucket).get("Uploads")):
                pass
            client.abort_multipart_upload(Bucket=s3_bucket, Key="run/big.bin", UploadId=uploads[0]["UploadId"])
            sink.write(LARGE[2 * PART_BYTES :])

    with pytest.raises(StorageError, match=r"cannot write .*/run/big\.bin.*NoSuchUpload"):
        write()


# Flipped bytes


@WITH_BOTH
def test_a_byte_that_flips_in_a_small_object_is_noticed_and_mended(
    store: RemoteStore, proxy: FaultyProxy, behind: Callable[[str], bytes]
) -> None:
    proxy.fail("put", "flip")
    store.put("receipt.json", SMALL)
    proxy.fail("put", "flip")
    store.put_new("manifest.json", SMALL)

    assert behind("receipt.json") == SMALL == behind("manifest.json")
    assert sum(proxy.met.values()) == 2


@WITH_BOTH
def test_a_byte_that_flips_in_a_part_is_an_error(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.fail("part", "flip")

    with pytest.raises(StorageError, match=r"run/big\.bin is not what was sent: .* run again") as caught:
        upload(store)
    assert caught.value.exit_code == 3


@WITH_BOTH
def test_a_byte_that_flips_in_an_upload_of_one_request_is_mended(
    store: RemoteStore, proxy: FaultyProxy, behind: Callable[[str], bytes]
) -> None:
    proxy.fail("PUT", "flip")

    upload(store, SMALL)

    assert (behind("big.bin"), store.num_retries) == (SMALL, 1)


@WITH_BOTH
@pytest.mark.parametrize("payload", [SMALL, LARGE], ids=["one request", "parts"])
def test_a_bit_that_flips_in_an_object_that_is_read_whole_is_mended(
    store: RemoteStore, proxy: FaultyProxy, payload: bytes
) -> None:
    upload(store, payload)
    stamp, whole = store.stamp("big.bin"), bytearray(len(payload))
    proxy.fail("get", "flip", times=2)

    assert store.read_head("big.bin", len(payload) + 1)[0] == payload
    proxy.fail("get", "flip", times=1)
    store.read_into("big.bin", 0, memoryview(whole), stamp)

    assert whole == payload
    assert (proxy.met["get", "flip"], store.num_retries) == (3, 3)


def test_an_etag_that_only_looks_like_a_digest_is_noticed_once(
    store: RemoteStore, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with keys of a KMS: what comes twice is what the store has, or the checksum that it keeps says so at once."""
    reads = type(store._client).read_head
    stamp = Stamp(len(SMALL), '"' + "0" * 32 + '"')
    monkeypatch.setattr(type(store._client), "read_head", lambda *args: (reads(*args)[0], stamp))
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.put_object(Bucket=s3_bucket, Key="run/sha.bin", Body=SMALL, ChecksumAlgorithm="SHA256")

    assert store.read_head("sha.bin", 99_999)[0] == SMALL
    assert store.num_retries == 0
    assert store.read_head("a.bin", 99_999)[0] == SMALL
    assert store.num_retries == 1
    assert store.read_head("a.bin", 99_999)[0] == SMALL
    assert store.num_retries == 1


@pytest.mark.parametrize(("crc", "num_bytes"), [(crc32c, 4), (crc64nvme, 8)])
def test_checksums_are_taken_of_files_of_any_size(crc: Callable[[bytes], int], num_bytes: int) -> None:
    """What follows bytes with their own checksum is the same for all bytes, and they are not taken alike."""
    few, many = b"123456789", random.Random(6).randbytes((1 << 20) + 1)

    assert crc(many + crc(many).to_bytes(num_bytes, "little")) == crc(few + crc(few).to_bytes(num_bytes, "little"))


def test_checksums_are_those_of_their_catalogue() -> None:
    told = {
        "CRC32C": base64.b64encode(0xE3069283.to_bytes(4, "big")).decode(),
        "CRC64NVME": base64.b64encode(0xAE8B14860A799888.to_bytes(8, "big")).decode(),
        "CRC32": base64.b64encode(0xCBF43926.to_bytes(4, "big")).decode(),
    }
    for name, value in told.items():
        assert checksums_confirm({name: value}, b"123456789") is True
        assert checksums_confirm({name: value}, b"123456788") is False
    assert checksums_confirm({}, b"123456789") is None
    assert etag_confirms(f'"{hashlib.sha256(SMALL).hexdigest()}"', SMALL) is True
    assert etag_confirms('W/"5f-16"', SMALL) is None


@pytest.mark.parametrize("step", ["create", "complete"])
def test_a_byte_that_flips_in_the_words_around_an_upload_makes_no_wrong_object(
    impatient: RemoteStore, proxy: FaultyProxy, behind: Callable[[str], bytes], step: Step
) -> None:
    """It may hit the upload's id, or a space: what fails is an error, what does not is right."""
    ends = []
    for _ in range(4):
        proxy.fail(step, "flip")
        try:
            upload(impatient)
            ends.append(behind("big.bin") == LARGE)
        except StorageError:
            ends.append("big.bin" not in impatient.list() or behind("big.bin") == LARGE)

    assert ends == [True] * 4
    assert proxy.met[step, "flip"] == 4


def test_a_store_that_names_objects_its_own_way_is_read_back_once(
    store: RemoteStore, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with keys of a KMS: an ETag that is no MD5 says nothing, so the bytes decide."""
    client, own_name = type(store._client), '"' + "0" * 32 + '"'
    stamps, heads = client.stamp, client.read_head

    def named_head(client: Any, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        payload, stamp = heads(client, key, num_bytes)
        return payload, replace(stamp, version=own_name)

    monkeypatch.setattr(client, "stamp", lambda client, key: replace(stamps(client, key), version=own_name))
    monkeypatch.setattr(client, "read_head", named_head)
    monkeypatch.setattr(store, "_read_range", _unpinned(store))

    upload(store)
    read_back = proxy.steps.count("get")
    upload(store)

    assert proxy.steps.count("get") == read_back > 0


def _unpinned(store: RemoteStore) -> Callable[..., None]:
    reads = store._read_range

    def read_it(key: str, start: int, target: memoryview, stamp: Stamp) -> None:
        expected = store._client.read(key, 0, 1, None)[1]
        assert expected is not None
        reads(key, start, target, expected)

    return read_it


@pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, len(LARGE)])
def test_the_digests_are_what_a_store_calls_an_upload(
    store: RemoteStore, behind: Callable[[str], bytes], num_bytes: int
) -> None:
    sent = PartDigests(PART_BYTES)
    for start in range(0, num_bytes, 70_001):
        sent.update(LARGE[start : min(start + 70_001, num_bytes)])

    upload(store, LARGE[:num_bytes])

    assert names_same(store.stamp("big.bin").version, sent.etags())
    assert store._known_md5_etags is True
    assert hashlib.md5(SMALL).hexdigest() == md5_etag(SMALL)


def test_on_aws_every_part_carries_a_crc(proxy: FaultyProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 refuses a part that does not fit it (BadDigest). obstore lets this variable win over AWS's own address."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    on_aws = Bucket(s3_bucket, None, "us-east-1", path_style=True, ca_bundle=None, options=StoreOptions())
    timeouts: Any = {"allow_http": True}
    import obstore

    client = obstore_bucket(on_aws, {"max_retries": 0}, timeouts)
    with obstore.open_writer(client, "run/big.bin", buffer_size=PART_BYTES) as writer:
        writer.write(LARGE)
    obstore.put(client, "run/small.bin", b"123456789", use_multipart=False)

    sums = [headers.get("x-amz-checksum-crc64nvme") for headers in proxy.headers]
    created = next(headers for headers, step in zip(proxy.headers, proxy.steps, strict=True) if step == "create")
    assert created["x-amz-checksum-algorithm"] == "CRC64NVME"
    assert all(found for found, step in zip(sums, proxy.steps, strict=True) if step in ("part", "put"))
    assert sums[-1] == "rosUhgp5mIg="  # 0xae8b14860a799888, the check value of CRC-64/NVME
