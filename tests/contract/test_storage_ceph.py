"""The storage contract on Ceph's gateway, through both clients: ``make test-ceph``.

What moto takes on trust is real here: signatures are checked, and 412 is the server's own.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from threading import Barrier

import boto3
import pytest

from stockflow.errors import AccessDeniedError, AlreadyExistsError, InputChangedError, StorageError
from stockflow.recipe import load_recipe
from stockflow.storage import StorageConfig, Store, StoreOptions, open_store, parts, read_small
from stockflow.storage.etags import PartDigests, names_same
from stockflow.storage.remote import RemoteStore
from stockflow.storage.s3 import forget_session
from stockflow.verification.verify import verify
from tests.ceph_server import PACKAGES, ceph_gateway, missing_binaries
from tests.contract import test_storage_contract as contract
from tests.contract import test_storage_s3 as s3_only
from tests.fault_proxy import FaultyProxy
from tests.integration.test_s3_merge import Listener, Place, merge_at, shards
from tests.runs import run
from tests.s3_server import CREDENTIALS, s3_credentials

pytestmark = pytest.mark.ceph

FOREIGN = "SOMEBODYELSES"
SECRETS = (FOREIGN, CREDENTIALS["AWS_SECRET_ACCESS_KEY"])

# Every test that takes a store is collected here once more, with the fixtures below.
globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if name.startswith("test_") and "store" in signature(test).parameters
    }
)
sibling = contract.sibling
opener = s3_only.opener
test_a_missing_bucket_is_called_a_bucket = s3_only.test_a_missing_bucket_is_called_a_bucket
test_a_denied_request_names_the_key_and_that_it_was_unsigned = (
    s3_only.test_a_denied_request_names_the_key_and_that_it_was_unsigned
)
test_folder_markers_are_not_objects = s3_only.test_folder_markers_are_not_objects


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The gateway, in the place of moto for everything that is asked for an endpoint here."""
    if missing := missing_binaries():
        pytest.skip(
            f"Ceph is not installed: no {', '.join(missing)}; apt-get install --no-install-recommends {PACKAGES}"
        )
    with s3_credentials(), ceph_gateway() as url:
        yield url


@pytest.fixture(params=["s3-obstore", "s3-s3fs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store over an empty prefix of a new bucket."""
    return contract._open(request, tmp_path, "run/foo")


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes one of the credentials somebody else's, from the next client on."""

    def replace(variable: str) -> None:
        monkeypatch.setenv(variable, FOREIGN)
        forget_session()

    yield replace
    monkeypatch.undo()
    forget_session()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Place:
    """Checkpoints on disk and in buckets of this gateway."""
    return Place(tmp_path_factory.mktemp("ceph"), s3_endpoint)


# Real signatures


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_refused_and_not_told(
    opener: s3_only.Opener,
    s3_endpoint: str,
    s3_bucket: str,
    variable: str,
    foreign: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="stockflow")
    owner = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint)
    owner.put("a.bin", contract.PAYLOAD)
    stamp = owner.stamp("a.bin")
    foreign(variable)
    store = opener(f"s3://{s3_bucket}/run", endpoint=s3_endpoint)
    requests: list[Callable[[], object]] = [
        lambda: store.stamp("a.bin"),
        lambda: store.read_head("a.bin", 8),
        lambda: contract.read(store, "a.bin", 0, 10, stamp),
        store.list,
        lambda: store.put("b.bin", b"1"),
        lambda: store.put_new("b.bin", b"1"),
        lambda: store.delete(["a.bin"]),
        lambda: write_large(store, "b.bin"),
    ]

    for number, request in enumerate(requests):
        with pytest.raises(AccessDeniedError, match=rf"s3://{s3_bucket}/run.*: access denied .*HTTP 403") as caught:
            request()
        assert caught.value.exit_code == 2
        # The answer to a HEAD, the first of them, has no body that could tell why.
        assert number == 0 or "the access key or its secret is not one" in str(caught.value)
        told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
        assert not any(secret in told for secret in SECRETS)
    assert store.num_retries == 0
    keys = {name.lower(): value for name, value in CREDENTIALS.items() if name.endswith("_KEY_ID") or "SECRET" in name}
    left = boto3.client("s3", endpoint_url=s3_endpoint, **keys).list_objects_v2(Bucket=s3_bucket)["Contents"]
    assert [entry["Key"] for entry in left] == ["run/a.bin"]


def test_the_command_line_returns_two_for_a_wrong_secret(
    s3_endpoint: str, s3_bucket: str, foreign: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    foreign("AWS_SECRET_ACCESS_KEY")

    finished = run("verify", f"s3://{s3_bucket}/model")

    assert finished.returncode == 2, finished.stderr
    assert "access denied" in finished.stderr
    assert not any(secret in finished.stdout + finished.stderr for secret in SECRETS)


def write_large(store: Store, key: str) -> None:
    """Write an object of several parts."""
    with store.create(key, size=17 << 20) as sink:
        sink.write(bytes(17 << 20))


# Real 412s


def test_the_server_itself_refuses_to_read_a_replaced_object(store: Store) -> None:
    """Not only our comparison of ETags, which comes after the bytes."""
    assert isinstance(store, RemoteStore)
    client = store._client
    store.put("a.bin", contract.PAYLOAD)
    planned = store.stamp("a.bin")
    store.put("a.bin", contract.PAYLOAD[::-1])

    with pytest.raises(client.errors) as caught:
        client.read("a.bin", 0, 10, planned)
    assert client.failure(caught.value).status == 412
    with pytest.raises(InputChangedError, match="changed since it was planned"):
        contract.read(store, "a.bin", 0, 10, planned)


def test_one_of_many_rivals_wins_whichever_client_they_use(s3_endpoint: str, s3_bucket: str) -> None:
    options = [StoreOptions(endpoint=s3_endpoint, client=client) for client in ("obstore", "fsspec")]
    rivals = [open_store(f"s3://{s3_bucket}/run", StorageConfig({"s3://": options[number % 2]})) for number in range(8)]
    barrier = Barrier(len(rivals))

    def claim(number: int, key: str) -> bool:
        barrier.wait()
        try:
            rivals[number].put_new(key, str(number).encode())
        except AlreadyExistsError:
            return False
        return True

    for key in ("first.json", "second.json", "third.json", "fourth.json", "fifth.json"):
        with ThreadPoolExecutor(len(rivals)) as pool:
            won = list(pool.map(partial(claim, key=key), range(len(rivals))))

        assert sum(won) == 1
        assert str(won.index(True)).encode() == read_small(rivals[0], key, max_bytes=10)


# Flipped bytes


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_the_server_refuses_what_does_not_fit_its_signature(
    s3_endpoint: str, s3_bucket: str, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plain HTTP the hash of every part is signed; moto does not look. obstore sends no part again for that."""
    monkeypatch.setattr(parts, "DEFAULT_PART_BYTES", 5 << 20)
    with FaultyProxy(s3_endpoint) as proxy:
        options = StoreOptions(endpoint=proxy.url, client=client)
        store = open_store(f"s3://{s3_bucket}/run", StorageConfig({"s3://": options}))
        proxy.fail("put", "flip")
        store.put("small.bin", contract.PAYLOAD)
        proxy.fail("part", "flip")
        refusal = pytest.raises(StorageError, match=r"cannot write .*/run/b\.bin .*XAmzContentSHA256Mismatch")
        with refusal if client == "obstore" else nullcontext():
            write_large(store, "b.bin")

    assert proxy.met["part", "flip"] == 1
    assert read_small(store_at(s3_endpoint, s3_bucket), "small.bin", max_bytes=99_999) == contract.PAYLOAD
    assert ("b.bin" in store_at(s3_endpoint, s3_bucket).list()) == (client == "fsspec")


def store_at(endpoint: str, bucket: str) -> Store:
    return open_store(f"s3://{bucket}/run", StorageConfig({"s3://": StoreOptions(endpoint=endpoint)}))


@pytest.mark.parametrize("num_bytes", [0, 1, 5 << 20, (5 << 20) + 1, 11 << 20])
def test_its_etags_are_the_digests_of_what_was_sent(
    store: Store, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "DEFAULT_PART_BYTES", 5 << 20)
    payload = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    sent = PartDigests(5 << 20)
    sent.update(payload)

    with store.create("b.bin", size=num_bytes) as sink:
        sink.write(payload)

    assert names_same(store.stamp("b.bin").version, sent.etags())


# Real pages


def test_listings_go_on_past_a_thousand_names(store: Store) -> None:
    names = [f"{number:04}" for number in range(1002)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b"1"), names))

    assert names == list(store.list()) == list(store.list_top())


# A merge


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_a_merge_is_the_same_as_on_disk(place: Place, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.endpoint)
    reference = shards(merge_at(place.recipe(place.on_disk), str(place.folder / f"reference-{client}")))
    listener = Listener()
    recipe = place.recipe(place.on_s3, **{bucket: {"client": client} for bucket in ("bases", "tunes", "out")})

    result = merge_at(recipe, f"s3://out/{client}", listener)

    assert reference == shards(result)
    assert {"if-match"} == set(result.manifest.pins)
    assert not [note for note in listener.notes if " read over http://" not in note]
    assert not verify(f"s3://out/{client}", load_recipe(str(recipe)).storage, inputs=True).findings
    assert "Uploads" not in place.s3.list_multipart_uploads(Bucket="out")
