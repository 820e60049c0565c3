"""What only an object store can do wrong, through both clients: faults, rights, regions, weaker promises."""

import http.server
import logging
import re
import ssl
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stockflow.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    InputChangedError,
    NotFoundError,
    RecipeError,
    StockflowError,
    StorageError,
)
from stockflow.storage import StoreOptions, normalize_url
from stockflow.storage.base import Stamp
from stockflow.storage.fs import FsspecStore
from stockflow.storage.objects import ObjectStore
from stockflow.storage.remote import RemoteStore
from stockflow.storage.retry import RetryPolicy
from stockflow.storage.s3 import bucket_region, forget_session
from tests.fault_proxy import Fault, FaultyProxy
from tests.s3_server import CREDENTIALS, free_port

QUICK = RetryPolicy(attempts=4, first_delay_s=0.01, max_delay_s=0.05)
PAYLOAD = bytes(range(256)) * 40

Opener = Callable[..., RemoteStore]


@pytest.fixture(params=[ObjectStore, FsspecStore], ids=["obstore", "s3fs"])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Opens a store through one of the clients."""

    def open_it(url: str, policy: RetryPolicy = QUICK, **options: Any) -> RemoteStore:
        store: RemoteStore = request.param(url, StoreOptions(**options), policy)
        return store

    return open_it


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_endpoint) as server:
        yield server


@pytest.fixture
def store(opener: Opener, proxy: FaultyProxy, s3_bucket: str) -> RemoteStore:
    return opener(f"s3://{s3_bucket}/run", endpoint=proxy.url)


@pytest.fixture
def fresh_session() -> Iterator[None]:
    forget_session()
    yield
    forget_session()


def read(store: RemoteStore, key: str, start: int, num_bytes: int, stamp: Stamp) -> bytes:
    buffer = bytearray(num_bytes)
    store.read_into(key, start, memoryview(buffer), stamp)
    return bytes(buffer)


# Faults


@pytest.mark.parametrize("fault", ["503", "reset", "truncate"])
def test_a_failed_read_is_repeated_and_counted(store: RemoteStore, proxy: FaultyProxy, fault: Fault) -> None:
    store.put("a.bin", PAYLOAD)
    stamp = store.stamp("a.bin")
    proxy.fail("GET", fault, times=2)
    proxy.requests.clear()

    assert PAYLOAD[5:4005] == read(store, "a.bin", 5, 4000, stamp)
    # aiohttp repeats once on its own when a kept connection is reset, and cannot be told not to.
    assert store.num_retries in ({1, 2} if fault == "reset" and isinstance(store, FsspecStore) else {2})
    assert [request.partition(" ")[0] for request in proxy.requests].count("GET") == 3


def test_a_store_that_keeps_failing_is_given_up(store: RemoteStore, proxy: FaultyProxy) -> None:
    store.put("a.bin", PAYLOAD)
    stamp = store.stamp("a.bin")
    proxy.fail("GET", "503", times=20)

    with pytest.raises(StorageError, match=r"cannot read s3://.*/run/a\.bin after 4 attempts: .*SlowDown"):
        read(store, "a.bin", 0, 10, stamp)
    assert store.num_retries == 3


def test_an_endpoint_that_is_down_is_named(opener: Opener, s3_endpoint: str) -> None:
    store = opener("s3://bucket/run", endpoint=f"http://127.0.0.1:{free_port()}")

    with pytest.raises(StorageError, match=r"s3://bucket/run/a\.bin after 4 attempts: .*(refused|connect)"):
        store.stamp("a.bin")


def test_a_part_that_fails_once_is_sent_again(store: RemoteStore, proxy: FaultyProxy) -> None:
    payload = bytes(17 << 20)
    proxy.fail("PUT", "503")

    with store.create("big.bin", size=len(payload)) as sink:
        sink.write(payload)

    assert len(payload) == store.stamp("big.bin").size


def test_an_upload_that_cannot_be_completed_is_aborted(
    opener: Opener, proxy: FaultyProxy, s3_endpoint: str, s3_bucket: str
) -> None:
    policy = RetryPolicy(attempts=2, first_delay_s=0.01, max_delay_s=0.05)
    store = opener(f"s3://{s3_bucket}/run", policy, endpoint=proxy.url)

    def write() -> None:
        with store.create("big.bin") as sink:
            sink.write(bytes(17 << 20))
            proxy.fail("POST", "503", times=9)

    with pytest.raises(StorageError, match=r"cannot write .*/run/big\.bin"):
        write()

    assert store.list() == {}
    uploads = boto3.client("s3", endpoint_url=s3_endpoint).list_multipart_uploads(Bucket=s3_bucket)
    assert "Uploads" not in uploads


def test_the_callers_own_error_is_not_blamed_on_the_store(store: RemoteStore) -> None:
    def write() -> None:
        with store.create("a.bin"):
            raise OSError("the local disk is gone")

    with pytest.raises(OSError, match=r"^the local disk is gone$"):
        write()
    assert store.list() == {}


def test_a_creation_whose_answer_was_lost_is_ours(store: RemoteStore, proxy: FaultyProxy) -> None:
    """Else a driver would take its own claim for a rival's."""
    proxy.fail("PUT", "lost")

    store.put_new("claim.json", b"mine")

    assert store.num_retries == 1


def test_a_rival_who_won_meanwhile_keeps_the_key(store: RemoteStore, proxy: FaultyProxy) -> None:
    store.put("claim.json", b"theirs")
    proxy.fail("PUT", "503")

    with pytest.raises(AlreadyExistsError, match=r"claim\.json already exists"):
        store.put_new("claim.json", b"mine")


# Weaker promises


def test_a_change_is_noticed_where_if_match_is_ignored(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.ignored_headers.add("if-match")
    store.put("a.bin", PAYLOAD)
    planned = store.stamp("a.bin")
    store.put("a.bin", PAYLOAD[::-1])

    with pytest.raises(InputChangedError, match="changed since it was planned"):
        read(store, "a.bin", 0, 10, planned)


def test_a_server_without_ranges_is_refused(store: RemoteStore, proxy: FaultyProxy) -> None:
    """Its first bytes must not be taken for those asked."""
    store.put("a.bin", PAYLOAD)
    stamp = store.stamp("a.bin")
    proxy.ignored_headers.add("range")

    with pytest.raises(StorageError, match=r"a\.bin"):
        read(store, "a.bin", 100, 10, stamp)


def test_every_range_carries_the_planned_etag(store: RemoteStore, proxy: FaultyProxy) -> None:
    store.put("a.bin", PAYLOAD)
    stamp = store.stamp("a.bin")

    read(store, "a.bin", 0, 10, stamp)

    assert stamp.version == proxy.headers[-1]["if-match"]
    assert proxy.headers[-1]["range"] == "bytes=0-9"
    assert store.pin == "if-match"


# Where and who


def test_a_missing_bucket_is_called_a_bucket(opener: Opener, s3_endpoint: str) -> None:
    store = opener("s3://no-such-bucket/run", endpoint=s3_endpoint)
    wrong_bucket = pytest.raises(NotFoundError, match="the bucket does not exist")

    with wrong_bucket:
        store.stamp("a.bin")
    with wrong_bucket:
        store.read_head("a.bin", 8)
    with wrong_bucket:
        store.list()
    with wrong_bucket:
        store.list_top()
    with wrong_bucket:
        store.put_new("a.bin", b"1")
    with wrong_bucket, store.create("a.bin") as sink:
        sink.write(b"1")


def test_no_credentials_is_said_before_any_request(
    opener: Opener, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(AccessDeniedError, match="no AWS credentials found"):
        opener("s3://bucket/run", endpoint=proxy.url).stamp("a.bin")
    assert proxy.requests == []


def test_a_missing_profile_is_named(
    opener: Opener, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")

    with pytest.raises(AccessDeniedError, match="nobody"):
        opener("s3://bucket/run", endpoint=s3_endpoint).stamp("a.bin")


def test_a_denied_request_names_the_key_and_that_it_was_unsigned(
    opener: Opener, s3_endpoint: str, s3_bucket: str
) -> None:
    store = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint)
    store.put("a.bin", PAYLOAD)
    stamp = store.stamp("a.bin")
    stranger = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint, anonymous=True)

    with pytest.raises(AccessDeniedError, match=r"run/a\.bin: access denied .*sent unsigned"):
        stranger.stamp("a.bin")
    with pytest.raises(AccessDeniedError, match=r"run/a\.bin: access denied .*sent unsigned"):
        read(stranger, "a.bin", 0, 10, stamp)


def test_anonymous_requests_are_not_signed(
    opener: Opener, proxy: FaultyProxy, s3_endpoint: str, s3_bucket: str
) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).put_object(
        Bucket=s3_bucket, Key="run/a.bin", Body=PAYLOAD, ACL="public-read"
    )
    signed = opener(f"s3://{s3_bucket}/run", endpoint=proxy.url)
    anonymous = opener(f"s3://{s3_bucket}/run", endpoint=proxy.url, anonymous=True)

    signed.stamp("a.bin")
    anonymous.stamp("a.bin")

    assert ["authorization" in headers for headers in proxy.headers] == [True, False]


def test_payer_and_key_travel_with_the_requests(opener: Opener, proxy: FaultyProxy, s3_bucket: str) -> None:
    store = opener(f"s3://{s3_bucket}", endpoint=proxy.url, requester_pays=True, kms_key="alias/merges")

    store.put("a.bin", PAYLOAD)
    store.read_head("a.bin", 10)

    assert [headers.get("x-amz-request-payer") for headers in proxy.headers] == ["requester"] * 2
    assert proxy.headers[0]["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/merges"


def test_the_endpoint_of_the_options_wins_over_the_environment(
    opener: Opener, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several endpoints in one recipe, one of them the environment's."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")

    opener(f"s3://{s3_bucket}", endpoint=s3_endpoint).put("a.bin", b"1")

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    assert list(opener(f"s3://{s3_bucket}").list()) == ["a.bin"]


def test_an_endpoint_that_is_no_url_is_refused(opener: Opener) -> None:
    with pytest.raises(RecipeError, match="expected http://host or https://host"):
        opener("s3://bucket", endpoint="minio:9000").stamp("a.bin")


def test_a_bundle_without_certificates_is_refused(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")

    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(RecipeError, match=rf"cannot use the CA bundle .*{name}"):
            opener("s3://bucket", endpoint="https://127.0.0.1:9", ca_bundle=str(tmp_path / name)).stamp("a.bin")


def test_the_region_is_the_buckets_own(s3_endpoint: str) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(
        Bucket="in-frankfurt", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )

    assert bucket_region("in-frankfurt", "us-east-1", s3_endpoint) == "eu-central-1"
    assert bucket_region("nowhere", "us-west-2", f"http://127.0.0.1:{free_port()}") == "us-west-2"


def test_a_private_authority_is_trusted_when_named(
    opener: Opener, s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    certificate = tmp_path / "ca.pem"
    with FaultyProxy(s3_endpoint, tls=_self_signed(certificate)) as server:
        trusting = opener(f"s3://{s3_bucket}", endpoint=server.url, ca_bundle=str(certificate))
        trusting.put("a.bin", PAYLOAD)
        read(trusting, "a.bin", 0, 10, trusting.stamp("a.bin"))

        with pytest.raises(RecipeError, match=r"certificate is not trusted.*ca_bundle"):
            opener(f"s3://{s3_bucket}", endpoint=server.url).stamp("a.bin")


def test_an_endpoint_of_the_other_kind_is_told_with_what_to_write(
    opener: Opener, s3_endpoint: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(QUICK, attempts=2, read_timeout_s=1.0)
    with FaultyProxy(s3_endpoint, tls=_self_signed(tmp_path / "ca.pem")) as server:
        open_one = opener(f"s3://{s3_bucket}", quick, endpoint=server.url.replace("https:", "http:"))
        with pytest.raises(RecipeError, match=rf"`endpoint` under .*, and it speaks TLS: write {server.url}"):
            open_one.stamp("a.bin")

        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint.replace("http:", "https:"))
        with pytest.raises(RecipeError, match=r"from AWS_ENDPOINT_URL\), and it answers, but not by TLS"):
            opener(f"s3://{s3_bucket}", quick).list()


def test_an_endpoint_that_redirects_is_refused_by_the_name_it_gives(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.told["moved"] = (("Location", "http://127.0.0.1:9/secret?token=1"),)
    for step in ("get", "list", "put"):
        proxy.fail(step, "moved", times=99)
        proxy.fail("head", "moved", times=99)
        with pytest.raises(RecipeError, match=r"redirects to http://127\.0\.0\.1:9, which is not followed") as caught:
            {"get": lambda: store.read_head("a", 9), "list": store.list, "put": lambda: store.put("a", b"")}[step]()
        assert "secret" not in str(caught.value)
        proxy.faults.clear()


def test_an_endpoint_that_breaks_every_connection_is_named_with_what_named_it(
    opener: Opener, proxy: FaultyProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    for step in ("get", "head", "list"):
        proxy.fail(step, "reset", times=99)

    for request in (lambda store: store.stamp("a"), lambda store: store.read_head("a", 1), lambda store: store.list()):
        with pytest.raises(StorageError, match=rf"the endpoint is {proxy.url} \(from AWS_ENDPOINT_URL_S3\)"):
            request(opener(f"s3://{s3_bucket}/run", replace(QUICK, attempts=2)))


def test_a_clock_that_is_wrong_is_called_so(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.fail("list", "skewed")

    with pytest.raises(AccessDeniedError, match=r"this machine's clock says 20.* UTC, too far from the store's"):
        store.list()


# Over plain HTTP, as any other scheme of fsspec


class _Redirecting(http.server.BaseHTTPRequestHandler):
    """Sends every request of a name on to a place."""

    places: ClassVar = {
        "circle": "circle",
        "file": "file:///etc/passwd",
        "ftp": "ftp://127.0.0.1/a",
        "link": "http://169.254.169.254/latest/meta-data",
        "named": "http://[fe80::1]/a",
    }

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.places[self.path.split("/")[1]])
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


ASKS: tuple[Callable[[RemoteStore], object], ...] = (
    lambda store: store.stamp("a"),
    lambda store: store.read_head("a", 9),
    lambda store: store.listing(),
)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("circle", "redirects more than 5 times"),
        ("file", r"scheme than http and https \(file\)"),
        ("ftp", r"scheme than http and https \(ftp\)"),
        ("link", "redirects to 169.254.169.254, an address of this machine's own link"),
        ("named", "redirects to fe80::1, an address"),
    ],
)
def test_a_redirection_to_nowhere_good_is_refused_at_once(name: str, told: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_address[1]}/{name}"
        for ask in (
            lambda store: store.stamp("a"),
            lambda store: store.read_head("a", 9),
            lambda store: store.listing(),
        ):
            store = FsspecStore(place, StoreOptions(), RetryPolicy())
            with pytest.raises(RecipeError, match=told):
                ask(store)
            assert store.num_retries == 0
        server.shutdown()


def test_a_web_server_is_read_by_ranges(s3_endpoint: str, s3_bucket: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.put_object(Bucket=s3_bucket, Key="run/a.bin", Body=PAYLOAD, ACL="public-read")
    client.put_object(Bucket=s3_bucket, Key="run/private.bin", Body=PAYLOAD)
    store = FsspecStore(f"{s3_endpoint}/{s3_bucket}/run", StoreOptions(), QUICK)
    down = FsspecStore(f"http://127.0.0.1:{free_port()}/run", StoreOptions(), QUICK)

    assert store.pin == "stat"
    assert store.read_head("a.bin", 4) == (PAYLOAD[:4], store.stamp("a.bin"))
    assert read(store, "a.bin", 5, 4000, store.stamp("a.bin")) == PAYLOAD[5:4005]
    with pytest.raises(NotFoundError, match=r"run/no\.bin"):
        store.stamp("no.bin")
    with pytest.raises(AccessDeniedError, match=r"run/private\.bin.*HTTP 403"):
        store.stamp("private.bin")
    with pytest.raises(StorageError, match=r"run/a\.bin after 4 attempts"):
        down.stamp("a.bin")


@pytest.mark.parametrize("url", ["nosuch://place/run", "gs://place/run"])
def test_a_scheme_without_its_package_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot open {url}: "):
        FsspecStore(url, StoreOptions())


# Discretion and order


def test_no_message_tells_a_secret(
    opener: Opener, proxy: FaultyProxy, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    endpoint = proxy.url.replace("http://", "http://user:hunter2@")
    store = opener(f"s3://{s3_bucket}/run", endpoint=endpoint)
    proxy.fail("GET", "503", times=9)
    failures: list[Callable[[], object]] = [
        lambda: store.stamp("no.bin"),
        store.list,
        lambda: store.read_head("a.bin", 8),
    ]

    for failure in failures:
        with pytest.raises(StockflowError) as caught:
            failure()
        told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
        assert not any(word in told for word in ("hunter2", "list-type", CREDENTIALS["AWS_SECRET_ACCESS_KEY"]))


def test_folder_markers_are_not_objects(opener: Opener, s3_endpoint: str, s3_bucket: str) -> None:
    """The web console of AWS writes them."""
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for key in ("run/", "run/sub/", "run/sub/a.bin", "run/empty"):
        client.put_object(Bucket=s3_bucket, Key=key, Body=b"1" if key.endswith("bin") else b"")
    store = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint)

    assert list(store.list()) == ["empty", "sub/a.bin"]
    assert list(store.list_top()) == ["empty"]
    assert store.listing().folders == ("sub",)


def test_listings_go_on_past_one_page(opener: Opener, s3_endpoint: str, s3_bucket: str) -> None:
    """The test server gives five names at a time."""
    store = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint)
    names = [f"{number:02}" for number in range(17)]
    for name in names:
        store.put(name, b"1")

    assert names == list(store.list()) == list(store.list_top())
    store.delete(names)
    assert store.list() == {}


def test_each_page_of_a_listing_has_attempts_of_its_own(
    opener: Opener, proxy: FaultyProxy, s3_endpoint: str, s3_bucket: str
) -> None:
    """Five pages of five names, each of which fails three times of the four that it may; so does that of uploads."""
    names = [f"{number:02}" for number in range(22)]
    behind, store = (opener(f"s3://{s3_bucket}/run", endpoint=url) for url in (s3_endpoint, proxy.url))
    for name in names:
        behind.put(name, b"1")
    boto3.client("s3", endpoint_url=s3_endpoint).create_multipart_upload(Bucket=s3_bucket, Key="run/upload")
    failing: deque[Fault] = deque(("503", "reset", "html", "pass") * 5)

    for number, read in enumerate((store.list, store.list_top), 1):
        proxy.faults["list"] = failing.copy()
        assert names == list(read())
        assert proxy.steps.count("list") == 20 * number
    proxy.fail("list", "html", times=3)
    assert [left.key for left in store.half_written() or ()] == ["upload"]
    assert store.num_retries == 33


AZURE_PAGE = 150


class _Azure(http.server.BaseHTTPRequestHandler):
    """Lists a container in pages, as Azure and its emulator do; each page but the first fails three times before."""

    protocol_version = "HTTP/1.1"
    names: ClassVar[list[str]]
    fails: ClassVar[Counter[int]]

    def do_GET(self) -> None:
        first = int(parse_qs(urlsplit(self.path).query).get("marker", ["0"])[0])
        self.fails[first] += first > 0
        page = self.names[first : first + AZURE_PAGE]
        blobs = "".join(map(_azure_entry, page))
        after = first + AZURE_PAGE if first + AZURE_PAGE < len(self.names) else ""
        listing = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{after}</NextMarker></EnumerationResults>"
        body = listing.encode()
        self.send_response(503 if 0 < self.fails[first] < 4 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _azure_entry(name: str) -> str:
    facts = {
        "Last-Modified": "Sun, 29 Nov 2026 10:00:00 GMT",
        "Etag": "0x1",
        "Content-Length": int(not name.endswith("/")),
        "Content-Type": "application/octet-stream",
    }
    told = "".join(f"<{key}>{value}</{key}>" for key, value in facts.items())
    return f"<Blob><Name>{name}</Name><Properties>{told}</Properties></Blob>"


def test_a_listing_elsewhere_than_on_s3_goes_on_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine failures, of four attempts each; the marker of a folder is the last of what obstore gives at once."""
    files = [f"run/{number:03}" for number in range(99)] + [f"run/folder/{number:03}" for number in range(401)]
    _Azure.names, _Azure.fails = sorted([*files, "run/folder/"]), Counter()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Azure) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{server.server_port}")
        store = ObjectStore("az://container/run", StoreOptions(), QUICK)

        found = store.list()
        server.shutdown()

    assert [f"run/{name}" for name in found] == files
    assert store.num_retries == 9


def test_a_page_of_html_for_a_listing_is_called_so(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.fail("GET", "html", times=4)

    with pytest.raises(StorageError, match=r"after 4 attempts: a page of HTML came.*; the endpoint is http") as told:
        store.list()
    assert not re.search(r"\b500\b", str(told.value))


def test_an_etag_that_is_another_once_is_asked_for_again(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.fail("HEAD", "wrong-etag")
    with store.create("big.bin") as sink:
        sink.write(bytes(17 << 20))
    stamp = store.stamp("big.bin")
    proxy.fail("GET", "wrong-etag")

    assert bytes(10) == read(store, "big.bin", 5, 10, stamp)
    assert not any(proxy.faults.values())


def _self_signed(certificate: Path) -> ssl.SSLContext:
    """Write a new certificate for 127.0.0.1 and return a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stockflow test")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret = certificate.with_suffix(".key")
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)
    return context


# Keys and classes of storage


ODD_KEYS = ("run//a.json", "run//", "run/sub//b.json", "run/../c.json", "run/./d.json", "run/sub/../e", "run/x/")


def test_keys_that_no_path_can_name_make_no_prefix_unlistable(opener: Opener, s3_endpoint: str, s3_bucket: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for key in (*ODD_KEYS, "run/model.safetensors", "run/sub/config.json", "run/1%20ü/f"):
        client.put_object(Bucket=s3_bucket, Key=key, Body=b"x")
    store = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint)

    assert list(store.listing().files) == ["model.safetensors"]
    assert set(store.listing().folders) - {"x"} == {"1%20ü", "sub"}
    assert list(store.list()) == ["1%20ü/f", "model.safetensors", "sub/config.json"]
    assert list(store.list("sub/")) == ["sub/config.json"]
    assert len(store.list(at_most=1)) == 1
    assert store.read_head("model.safetensors", 1)[0] == b"x"
    assert not opener(f"s3://{s3_bucket}/elsewhere", endpoint=s3_endpoint).listing().files


def test_a_listing_despite_odd_keys_tells_of_failures_like_any_other(
    opener: Opener, proxy: FaultyProxy, s3_endpoint: str, s3_bucket: str
) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).put_object(Bucket=s3_bucket, Key="run//a", Body=b"x")
    store = opener(f"s3://{s3_bucket}/run", endpoint=proxy.url)
    proxy.fail("GET", "503", times=3)

    assert not store.listing().files
    assert store.num_retries == 3


def test_an_archived_object_is_called_so_with_the_command_that_restores_it(
    opener: Opener, s3_endpoint: str, s3_bucket: str
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for storage_class in ("GLACIER", "DEEP_ARCHIVE"):
        key = f"run/a b {storage_class}.bin"
        client.put_object(Bucket=s3_bucket, Key=key, Body=PAYLOAD, StorageClass=storage_class)
        store, name = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint), key.removeprefix("run/")
        stamp = store.stamp(name)

        with pytest.raises(AccessDeniedError, match=r"it is archived \(Glacier\)\. Restore it") as caught:
            store.read_head(name, 10)
        with pytest.raises(AccessDeniedError, match="it is archived"):
            read(store, name, 0, 10, stamp)
        command = f"aws s3api restore-object --bucket {s3_bucket} --key '{key}' --restore-request Days=7"
        assert f"`{command}`" in str(caught.value)

        client.restore_object(Bucket=s3_bucket, Key=key, RestoreRequest={"Days": 7})
        assert store.read_head(name, 10)[0] == PAYLOAD[:10]


@pytest.mark.parametrize("region", ["us-west-2", ""])
def test_an_access_point_is_refused_by_its_arn_with_the_way_on(opener: Opener, region: str) -> None:
    with pytest.raises(RecipeError, match=r"an access point by its ARN.*; write its alias") as caught:
        normalize_url(f"s3://arn:aws:s3:{region}:123456789012:accesspoint/my-point/folder")
    assert "-s3alias/folder" in str(caught.value)


def test_a_directory_bucket_is_refused_by_its_name(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    store = opener("s3://models--usw2-az1--x-s3/folder", region="us-west-2")

    for request in (store.listing, lambda: store.read_head("a", 1), lambda: store.put("a", b"")):
        with pytest.raises(RecipeError, match=r"'models--usw2-az1--x-s3' is a directory bucket.*`aws s3 sync`"):
            request()
