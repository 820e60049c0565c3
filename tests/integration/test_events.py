"""The events of real merges: the only channel, heard by progress.json and by whoever asks alike."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from stockflow.engine.process import process_name
from stockflow.engine.worker import WorkerSpec
from stockflow.errors import NumericsError
from stockflow.events import Begun, Done, Event, Moved, Note, OnEvent, Retry, Run, Stage, Workers, all_of
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run import driver
from stockflow.run.driver import Execute, Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from tests import runs
from tests.checkpoints import make_family, write_recipe

SHARD_SIZE = 300_000
"""four shards of the little models here"""
NUM_SHARDS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return write_recipe(root / "recipe.yaml", "model_stock", make_family(root, 2))


def merged(
    recipe: Path, output: Path, on_event: OnEvent, execute: Execute = in_this_process, num_workers: int | None = None
) -> Merged:
    options = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", SHARD_SIZE, num_workers=num_workers)
    return merge(Inputs.open(load_recipe(str(recipe))), str(output), options, execute, on_event)


E = TypeVar("E", bound=Event)


def of(kind: type[E], events: Sequence[Event]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def after(num_shards: int, act: Callable[[OnEvent], None]) -> Execute:
    """Merge so many shards here, do something, and merge the others."""

    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        yield from in_this_process(spec, shards[:num_shards], on_event)
        act(on_event)
        yield from in_this_process(spec, shards[num_shards:], on_event)

    return execute


def stop(_: OnEvent) -> None:
    raise NumericsError("stopped here")


def progress_of(output: Path) -> dict[str, Any]:
    (path,) = output.glob("_stockflow/*/progress.json")
    return dict(json.loads(path.read_text()))


def test_events_say_everything_about_a_merge_and_its_resumption(recipe: Path, tmp_path: Path) -> None:
    first: list[Event] = []
    second: list[Event] = []
    with pytest.raises(NumericsError, match="stopped here"):
        merged(recipe, tmp_path / "out", first.append, after(2, stop))

    result = merged(recipe, tmp_path / "out", second.append)

    sizes = {
        shard.file: sum(job.output.num_bytes for job in shard.jobs) for shard in result.plan.shards
    }  # fmt: skip
    files = list(sizes)
    assert [each.name for each in of(Stage, second)] == [
        "planning", "looking for finished shards", "merging", "publishing",
    ]  # fmt: skip
    begun = of(Begun, first)
    assert [(each.item, each.num_bytes) for each in begun] == [(file, sizes[file]) for file in files[:2]]
    assert {each.worker for each in (*begun, *of(Done, first), *of(Moved, first))} == {process_name()}
    (merging,) = (each for each in of(Stage, second) if each.name == "merging")
    assert (merging.resumed, merging.num_done) == (tuple(files[:2]), 2)
    assert (merging.done_bytes, merging.total_bytes) == (sum(map(sizes.get, files[:2])), sum(sizes.values()))  # type: ignore[arg-type]
    assert [each.item for each in of(Done, second)] == files[2:]
    costs = [each.cost for each in of(Done, second)]
    assert [cost and cost.num_bytes for cost in costs] == [sizes[file] for file in files[2:]]
    ids = {(each.run, each.plan_id) for each in (*of(Run, first), *of(Run, second))}
    assert (len(ids), {plan_id for _, plan_id in ids}) == (2, {result.plan.plan_id})


def test_progress_json_hears_what_every_listener_hears(recipe: Path, tmp_path: Path) -> None:
    events: list[Event] = []

    def lose(tell: OnEvent) -> None:
        tell(Retry("lost"))
        stop(tell)

    with pytest.raises(NumericsError):
        merged(recipe, tmp_path / "out", events.append, after(2, lose))

    said, moved = progress_of(tmp_path / "out"), of(Moved, events)
    assert (said["bytes_read"], said["bytes_written"]) == (
        sum(each.num_read for each in moved), sum(each.num_written for each in moved),
    )  # fmt: skip
    done = of(Done, events)
    assert said["shards_done"] == len(done) == 2
    assert said["bytes_done"] == sum((tmp_path / "out" / each.item).stat().st_size for each in done)
    assert (said["run"], said["plan_id"]) == (of(Run, events)[0].run, of(Run, events)[0].plan_id)
    assert (said["stage"], said["message"], said["retries"]) == ("failed", "stopped here", {"lost": 1})


@pytest.mark.parametrize("kind", [Stage, Begun, Moved, Done])
def test_what_a_listener_raises_ends_the_run_and_progress_json_says_so(
    recipe: Path, tmp_path: Path, kind: type[Event]
) -> None:
    def refuse(event: Event) -> None:
        if isinstance(event, kind) and not (isinstance(event, Stage) and event.name != "merging"):
            raise ZeroDivisionError("a bug of the listener")

    with pytest.raises(ZeroDivisionError, match="a bug of the listener"):
        merged(recipe, tmp_path / "out", refuse)

    said = progress_of(tmp_path / "out")
    assert (said["stage"], said["exit_code"], said["message"]) == ("failed", 70, "ZeroDivisionError")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert merged(recipe, tmp_path / "out", lambda _: None).outcome == "merged", "it resumes"


def test_after_a_listener_that_raises_the_next_are_not_told() -> None:
    told: list[Event] = []

    def refuse(event: Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        all_of(told.append, refuse, told.append)(Note("x"))

    assert told == [Note("x")]


@pytest.mark.parametrize(("least_bytes", "notes"), [(1, 1), (10**12, 0)], ids=["a long merge", "a short one"])
def test_shards_that_are_few_for_a_cluster_are_noted_once_it_is_known_how_many_workers_it_holds(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes: int, notes: int
) -> None:
    monkeypatch.setattr(driver, "LEAST_GOOD_SHARD_BYTES", least_bytes)
    events: list[Event] = []

    merged(recipe, tmp_path / "out", events.append, after(1, lambda tell: tell(Workers(8))))

    said = [each.text for each in of(Note, events) if f"{NUM_SHARDS} shards for 8 workers" in each.text]
    assert len(said) == notes
    assert of(Workers, events) == [Workers(8)]
