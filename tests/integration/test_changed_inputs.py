"""An input replaced at any moment, on any store, is an error with its name and both stamps; never a mixed model."""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import boto3
import pytest
import torch
import yaml

from stockflow.engine.worker import WorkerSpec
from stockflow.errors import InputChangedError, OutputConflictError
from stockflow.events import Event, Moved, OnEvent, all_of
from stockflow.output.keys import receipt_key
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import Stamp, StorageConfig, StoreOptions, local, open_store
from tests.checkpoints import Family, make_family
from tests.fault_proxy import FaultyProxy
from tests.runs import MIB, grown_bytes

SHAPES = {f"model.layers.{index}.weight": (40, 50) for index in range(6)}
SHARD_SIZE = 5_000
"""one tensor in each"""
FILE = "model.safetensors"
STORES = [
    *("disk", "s3-obstore", "s3-without-if-match", "memory"),
    pytest.param("s3-fsspec", marks=pytest.mark.chaos),  # its clients take a third of a second each to start
]


class Place(Protocol):
    """Where a family lies whose last tuned model is replaced."""

    recipe: Path
    output: str
    file: str
    """as messages name it"""

    def read(self) -> bytes: ...

    def replace(self, payload: bytes) -> None:
        """Write the file again."""

    def restore(self, payload: bytes) -> None:
        """Bring back the state it was planned in, stamp included."""

    def stamp(self) -> Stamp: ...


class OnDisk:
    def __init__(self, folder: Path, family: Family) -> None:
        self._path = family.tuned[-1] / FILE
        self._times = (self._path.stat().st_atime_ns, self._path.stat().st_mtime_ns)
        self.recipe = write_recipe(folder, [str(path) for path in (family.base, *family.tuned)])
        self.output = str(folder / "out")
        self.file = str(self._path)

    def read(self) -> bytes:
        return self._path.read_bytes()

    def replace(self, payload: bytes) -> None:
        # In place, by one write: what is read beside it sees the old state or the new one, none in between.
        with self._path.open("r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            assert file.write(payload) == len(payload)
            if len(payload) < size:
                file.truncate()

    def restore(self, payload: bytes) -> None:
        self._path.write_bytes(payload)
        os.utime(self._path, ns=self._times)

    def stamp(self) -> Stamp:
        return open_store(str(self._path.parent), StorageConfig()).stamp(FILE)


class Remote:
    def __init__(self, folder: Path, family: Family, root: str, options: StoreOptions) -> None:
        storage = StorageConfig({root: options})
        urls = []
        for path in (family.base, *family.tuned):
            urls.append(f"{root}/{path.name}")
            store = open_store(urls[-1], storage)
            for file in path.iterdir():
                store.put(file.name, file.read_bytes())
        self._store = store
        given = {name: value for name in ("endpoint", "client") if (value := getattr(options, name))}
        self.recipe = write_recipe(folder, urls, {root: given})
        self.output = f"{root}/out"
        self.file = f"{self._store.url}/{FILE}"

    def read(self) -> bytes:
        return self._store.read_head(FILE, 10_000_000)[0]

    def replace(self, payload: bytes) -> None:
        self._store.put(FILE, payload)

    restore = replace

    def stamp(self) -> Stamp:
        return self._store.stamp(FILE)


def write_recipe(folder: Path, models: Sequence[str], storage: object = None) -> Path:
    content = {
        "merge_method": "model_stock",
        "base_model": models[0],
        "models": [{"model": model} for model in models[1:]],
        "stockflow": {"storage": storage or {}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_endpoint: str) -> Iterator[Place]:
    family = make_family(tmp_path / "family", 2, SHAPES, torch.bfloat16, buffers=False)
    if request.param == "disk":
        yield OnDisk(tmp_path, family)
        return
    if request.param == "memory":
        yield Remote(tmp_path, family, f"memory://{tmp_path.name}", StoreOptions())
        return
    bucket = tmp_path.name.replace("_", "-").lower()[-40:].strip("-") + "-changed"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    with FaultyProxy(s3_endpoint) as proxy:
        if request.param == "s3-without-if-match":
            proxy.ignored_headers.add("if-match")
        client = "fsspec" if request.param == "s3-fsspec" else "obstore"
        yield Remote(tmp_path, family, f"s3://{bucket}", StoreOptions(endpoint=proxy.url, client=client))


Execute = Callable[[WorkerSpec, Sequence[ShardPlan], OnEvent], Iterator[Receipt]]


def merge_at(place: Place, execute: Execute = in_this_process) -> Merged:
    options = MergeOptions(1024 * MIB + grown_bytes(), 2, "cpu", SHARD_SIZE)
    return merge(Inputs.open(load_recipe(str(place.recipe))), place.output, options, execute)


def other_bytes(payload: bytes) -> bytes:
    """Return weights of the same size and header, another in their last element."""
    return payload[:-2] + bytes([payload[-2] ^ 1, payload[-1]])


class Once:
    """Replaces the input when the first bytes have been read."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act, self._is_done = act, False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Moved) and event.num_read and not self._is_done:
            self._is_done = True
            self._act()


def at_the_start(act: Callable[[], None]) -> Execute:
    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        act()
        yield from in_this_process(spec, shards, on_event)

    return execute


def within_a_shard(act: Callable[[], None]) -> Execute:
    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        yield from in_this_process(spec, shards, all_of(on_event, Once(act)))

    return execute


def between_shards(act: Callable[[], None]) -> Execute:
    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        for number, receipt in enumerate(in_this_process(spec, shards, on_event)):
            yield receipt
            if number == 2:
                act()

    return execute


@pytest.mark.parametrize("moment", [at_the_start, within_a_shard, between_shards])
def test_an_input_replaced_while_merging_is_named_with_both_stamps(
    place: Place, moment: Callable[[Callable[[], None]], Execute]
) -> None:
    planned, payload = place.stamp(), place.read()

    with pytest.raises(InputChangedError) as caught:
        merge_at(place, moment(lambda: place.replace(other_bytes(payload))))
    replaced = place.stamp()
    finished = open_store(place.output, load_recipe(str(place.recipe)).storage).list_top()
    place.restore(payload)

    assert caught.value.exit_code == 2
    assert all(words in str(caught.value) for words in (place.file, planned.version, replaced.version))
    assert (planned.size, planned == replaced) == (replaced.size, False)
    assert "manifest.json" not in finished
    if "memory" not in place.output:  # where a time is all there is, a restored file is another one
        resumed = merge_at(place)
        # The fourth shard is read while the third becomes durable.
        assert moment is not between_shards or resumed.num_resumed in (3, 4)
        assert resumed.outcome == "merged"


def test_a_shard_that_has_no_receipt_yet_stays_the_runs_own(tmp_path: Path) -> None:
    place = OnDisk(tmp_path, make_family(tmp_path / "family", 2, SHAPES, torch.bfloat16, buffers=False))

    def stop_before_the_receipt(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        for receipt in in_this_process(spec, shards[:1], on_event):
            open_store(place.output, StorageConfig(), writable=True).delete([receipt_key(spec.plan_id, receipt.file)])
        raise InputChangedError("stopped here")
        yield receipt

    with pytest.raises(InputChangedError, match="stopped here"):
        merge_at(place, stop_before_the_receipt)

    assert merge_at(place).outcome == "merged"


def test_an_input_replaced_before_resuming_is_named_with_both_stamps(place: Place) -> None:
    planned, payload = place.stamp(), place.read()

    def stop() -> None:
        raise InputChangedError("stopped here")

    with pytest.raises(InputChangedError, match="stopped here"):
        merge_at(place, between_shards(stop))
    place.replace(other_bytes(payload))
    with pytest.raises(OutputConflictError, match="is claimed by an unfinished run of another plan") as caught:
        merge_at(place)

    assert caught.value.exit_code == 2
    words = rf"{place.file} changed: it was {planned.size:,} bytes, {planned.version}, it is .*{place.stamp().version}"
    assert re.search(words, str(caught.value))


def test_an_input_replaced_after_the_merge_is_named_with_both_stamps(place: Place) -> None:
    planned, payload = place.stamp(), place.read()
    merge_at(place)
    place.replace(other_bytes(payload))

    with pytest.raises(OutputConflictError, match="holds the finished output of another plan") as caught:
        merge_at(place)

    assert f"{place.file} changed: it was {planned.size:,} bytes, {planned.version}" in str(caught.value)


@pytest.mark.parametrize("change", ["grows", "shrinks", "an older time", "a nanosecond"])
def test_a_file_is_known_by_its_size_and_its_time(change: str, tmp_path: Path) -> None:
    place = OnDisk(tmp_path, make_family(tmp_path / "family", 2, SHAPES))
    payload, (accessed, modified) = place.read(), place._times

    def replace() -> None:
        spoiled = {"grows": payload + b"\0" * 8, "shrinks": payload[:-8]}.get(change, other_bytes(payload))
        place.replace(spoiled)
        times = {"an older time": modified - 10**12, "a nanosecond": modified + 1}.get(change, modified)
        os.utime(place.file, ns=(accessed, times))

    with pytest.raises(InputChangedError, match=r"changed since it was planned: expected .* found ") as caught:
        merge_at(place, at_the_start(replace))

    assert place.file in str(caught.value)


@pytest.mark.parametrize("how", ["rewritten in place", "replaced by another file", "replaced by its copy"])
def test_a_file_whose_size_and_time_are_put_back_is_noticed_within_a_run(how: str, tmp_path: Path) -> None:
    place = OnDisk(tmp_path, make_family(tmp_path / "family", 2, SHAPES))
    payload, planned = place.read(), place.stamp()

    def change() -> None:
        if how == "rewritten in place":
            place.replace(other_bytes(payload))
        else:
            copy = tmp_path / "copy"
            copy.write_bytes(payload if how == "replaced by its copy" else other_bytes(payload))
            copy.replace(place.file)
        os.utime(place.file, ns=place._times)
        assert place.stamp() == planned

    told = "it was written to" if how == "rewritten in place" else "another file is there"
    with pytest.raises(InputChangedError, match=rf"its size and time are the same, but {told}") as caught:
        merge_at(place, at_the_start(change))

    assert place.file in str(caught.value)
    assert caught.value.exit_code == 2
    place.restore(payload)
    assert merge_at(place).outcome == "merged"


def test_what_only_this_machine_knows_of_a_file_is_in_no_plan(tmp_path: Path) -> None:
    place = OnDisk(tmp_path, make_family(tmp_path / "family", 2, SHAPES))
    first = Inputs.open(load_recipe(str(place.recipe)))
    place.restore(place.read())

    assert first.plan().plan_id == Inputs.open(load_recipe(str(place.recipe))).plan().plan_id
    sent = pickle.loads(pickle.dumps(first.storage))
    assert sent == first.storage
    assert sent.sightings._seen == {} != first.sightings._seen


def test_the_same_bytes_written_again_are_the_same_on_s3(tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    """An ETag names bytes; a time does not."""
    family = make_family(tmp_path / "family", 2, SHAPES)
    place = Remote(tmp_path, family, f"s3://{s3_bucket}", StoreOptions(endpoint=s3_endpoint))
    payload = place.read()

    result = merge_at(place, between_shards(lambda: place.replace(payload)))

    assert result.outcome == "merged"


def test_other_settings_are_not_called_changed_inputs(tmp_path: Path) -> None:
    place = OnDisk(tmp_path, make_family(tmp_path / "family", 2, SHAPES))
    merge_at(place)
    place.recipe.write_text(place.recipe.read_text() + "parameters:\n  filter_wise: true\n")

    with pytest.raises(OutputConflictError) as caught:
        merge_at(place)

    assert "since then" not in str(caught.value)


def test_a_file_cut_short_while_it_is_read_is_named_with_both_stamps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(9000))
    store = open_store(str(tmp_path), StorageConfig())
    planned, read = store.stamp("a.bin"), local._read_up_to

    def cut_and_read(descriptor: int, buffer: memoryview, start: int) -> int:
        os.truncate(path, 5000)
        return read(descriptor, buffer, start)

    monkeypatch.setattr(local, "_read_up_to", cut_and_read)
    with pytest.raises(InputChangedError) as caught:
        store.read_into("a.bin", 0, memoryview(bytearray(9000)), planned)
    cut = store.stamp("a.bin")

    assert cut.size == 5000
    assert all(words in str(caught.value) for words in (str(path), planned.version, cut.version))


def test_a_stamp_that_promises_more_than_there_is_ends_no_loop(tmp_path: Path) -> None:
    """As a file system may that loses data and keeps the size in its records."""
    (tmp_path / "a.bin").write_bytes(bytes(10))
    store = open_store(str(tmp_path), StorageConfig())

    with pytest.raises(InputChangedError, match=r"a\.bin ended at byte 10 while it was read"):
        store.read_into("a.bin", 4, memoryview(bytearray(9)), store.stamp("a.bin"))
