"""Progress: what events add up to, and how it is shown; no test waits for a clock."""

import io
import json
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from stockflow.errors import PlanError, StorageError
from stockflow.events import Begun, Cost, Done, Dropped, Event, Moved, Note, Retry, Run, Stage
from stockflow.progress.display import reporting
from stockflow.progress.lines import JsonLines, PlainLines
from stockflow.progress.live import LiveDisplay
from stockflow.progress.state import WINDOW_S, State
from stockflow.progress.wording import duration, in_words
from tests import runs
from tests.checkpoints import make_family, write_recipe

MERGING = Stage(
    "merging", total_bytes=4_000, done_bytes=1_000, num_items=4, num_done=1, unit="shards", counts_written=True
)
SHARD = Begun("shard-2", "node:1", 1_000)
NEVER_S = 1e6


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def done(shard: str) -> Done:
    return Done(shard, "node:1", Cost(1_000, 1, {}, {}, 0))


# ------------------------------------------------------------------------------------------------- what it adds up to


def test_written_bytes_count_towards_a_merge_and_read_ones_towards_a_comparison(clock: Clock) -> None:
    for stage, done, left_s in (
        (MERGING, 1_600, 4.0 * 2_400 / 600),
        (Stage("comparing", total_bytes=9_000), 1_800, 16.0),
    ):
        state = State(clock)
        state.take(stage)
        state.take(SHARD)
        clock.now += 4.0
        state.take(Moved(1_800, 600))

        now = state.snapshot()

        assert (now.num_read, now.num_written, now.done_bytes) == (1_800, 600, done)
        assert now.bytes_per_s == pytest.approx(600.0)
        assert now.left_s == pytest.approx(left_s)


def test_rates_are_those_of_the_last_half_minute(clock: Clock) -> None:
    state = State(clock)
    state.take(Stage("comparing", total_bytes=10**9))
    for _ in range(60):
        clock.now += 1.0
        state.take(Moved(1_000_000))
    for _ in range(int(WINDOW_S) + 5):
        clock.now += 1.0
        state.take(Moved(1_000))

    now = state.snapshot()

    assert now.bytes_per_s == pytest.approx(1_000)
    assert now.left_s == pytest.approx((10**9 - now.done_bytes) / 1_000)


def test_a_stall_shows_in_the_rate(clock: Clock) -> None:
    state = State(clock)
    state.take(Stage("comparing", total_bytes=10**9))
    clock.now += 1.0
    state.take(Moved(10_000))
    before = state.snapshot().bytes_per_s
    clock.now += 600.0

    assert state.snapshot().bytes_per_s < before / 100


def test_a_stage_begins_at_zero_and_hands_over_what_the_one_before_was(clock: Clock) -> None:
    state = State(clock)
    assert state.take(Stage("opening checkpoints", unit="files")) is None
    clock.now += 3.0
    state.take(Done("a"))
    ended = state.take(MERGING)

    assert ended is not None
    assert (ended.stage.name, ended.elapsed_s, ended.num_done, ended.last_item) == ("opening checkpoints", 3.0, 1, "a")
    now = state.snapshot()
    assert (now.num_read, now.num_done, now.elapsed_s, now.last_item) == (0, 1, 0.0, "")


def test_more_than_expected_is_not_more_than_everything(clock: Clock) -> None:
    state = State(clock)
    state.take(Stage("merging a sample again", total_bytes=100))
    clock.now += 1.0
    state.take(Moved(250))

    assert (state.snapshot().done_bytes, state.snapshot().share, state.snapshot().left_s) == (100, 1.0, 0.0)


def test_what_lost_workers_wrote_is_not_done(clock: Clock) -> None:
    """Two nodes are taken back again and again: four shards of a thousand bytes, each lost once at 70 %."""
    state = State(clock)
    state.take(Stage("merging", total_bytes=4_000, num_items=4, unit="shards", counts_written=True))
    seen = []

    def work(shard: str, num_bytes: int) -> None:
        state.take(Begun(shard, "node:1", 1_000))
        clock.now += num_bytes / 100
        state.take(Moved(0, num_bytes, "node:1"))
        seen.append(state.snapshot())

    for shard in ("a", "b", "c", "d"):
        work(shard, 700)
        state.take(Retry("preempted", shard))
    all_lost = state.snapshot()
    for shard in ("a", "b", "c", "d"):
        work(shard, 1_000)
        state.take(done(shard))

    assert [now.done_bytes for now in seen] == [700, 1_000, 1_000, 1_000, 1_000, 2_000, 3_000, 4_000]
    assert (all_lost.done_bytes, all_lost.left_s) == (0, pytest.approx(4_000 / 100))
    assert (state.snapshot().done_bytes, state.snapshot().num_done, state.snapshot().share) == (4_000, 4, 1.0)


def test_a_worker_that_did_not_come_up_loses_no_work(clock: Clock) -> None:
    state = State(clock)
    for event in (MERGING, SHARD, Moved(0, 600), Retry("storage")):
        state.take(event)

    assert state.snapshot().done_bytes == 1_600


def test_what_is_dropped_is_done_no_more(clock: Clock) -> None:
    """One shard of an earlier run and one of this run, both of another numerics class than was agreed on."""
    state = State(clock)
    for event in (MERGING, SHARD, Moved(0, 1_000), done(SHARD.item)):
        state.take(event)
    before = state.snapshot()
    for event in (Dropped("shard-1", 1_000), Dropped(SHARD.item, 1_000)):
        state.take(event)
    dropped = state.snapshot()
    for event in (SHARD, Moved(0, 400)):
        state.take(event)

    assert [(now.num_done, now.done_bytes) for now in (before, dropped, state.snapshot())] == [
        (2, 2_000),
        (0, 0),
        (0, 400),
    ]


def test_what_each_worker_did_is_told_apart(clock: Clock) -> None:
    state = State(clock)
    state.take(MERGING)
    clock.now += 2.0
    state.take(Moved(10, 5, "b"))
    state.take(Moved(1, 0, "a"))
    state.take(Moved(1, 0, "a"))
    state.take(Done("shard-2", "a"))

    workers = state.snapshot().workers

    assert [(one.worker, one.num_read, one.num_written, one.num_done) for one in workers] == [
        ("a", 2, 0, 1),
        ("b", 10, 5, 0),
    ]
    assert workers[0].last_item == "shard-2"


def test_how_the_run_and_its_output_stand_outlasts_the_stage(clock: Clock) -> None:
    state = State(clock)
    state.take(Run("run-1", "plan-1"))
    state.take(Stage("opening checkpoints"))
    state.take(Moved(5))
    state.take(replace(MERGING, resumed=("shard-1",)))
    for event in (SHARD, Begun("shard-3", "node:2", 1_000), Moved(70, 1_000), Retry("lost"), done(SHARD.item)):
        clock.now += 1.0
        state.take(event)
    merging = state.snapshot()
    state.take(Stage("publishing"))

    now = state.overview()

    assert (now.run, now.stage, now.at) == (Run("run-1", "plan-1"), Stage("publishing"), 105.0)
    assert (now.num_read, now.num_written, now.retries) == (75, 1_000, {"lost": 1})
    assert now.finished == {"shard-1", "shard-2"}
    assert now.output == merging
    assert (merging.num_done, merging.num_resumed, merging.finished_bytes) == (2, 1, 2_000)
    assert [(one.begun.item, one.since) for one in merging.in_work] == [("shard-3", 102.0)]
    assert (state.snapshot().num_read, state.snapshot().in_work) == (0, ())


def test_a_stage_that_has_stalled_for_long_has_no_rate_and_no_end_in_sight(clock: Clock) -> None:
    state = State(clock)
    state.take(Stage("comparing", total_bytes=10**9))
    clock.now += 1.0
    state.take(Moved(10_000))
    clock.now += WINDOW_S
    state.snapshot()
    clock.now += WINDOW_S

    assert (state.snapshot().bytes_per_s, state.snapshot().left_s) == (0.0, None)


def test_no_count_gets_lost_between_threads() -> None:
    state = State()
    state.take(MERGING)

    def move() -> None:
        for _ in range(2_000):
            state.take(Moved(1, 1))
            state.take(Done("x"))

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    now = state.snapshot()
    assert (now.num_read, now.num_written, now.num_done) == (8_000, 8_000, 8_001)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (59.6, "60 s"), (125, "2 min 05 s"), (7_200, "2 h 00 min"), (90_061, "25 h 01 min")],
)
def test_times_are_said_as_people_do(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ------------------------------------------------------------------------------------------------------ how it is shown


def test_plain_lines_say_stages_notes_and_how_things_stand() -> None:
    stream = io.StringIO()
    with PlainLines(stream, interval_s=NEVER_S) as lines:
        for event in (Stage("planning"), MERGING, Note("a worker was lost"), SHARD):
            lines(event)
        lines(Moved(100, 1_000))
        lines(Done("a shard"))
        lines._said = -NEVER_S
        lines.tick()

    said = stream.getvalue().splitlines()
    assert said[:3] == ["planning", "merging 4 shards, 4 kB; 1 are there already", "note: a worker was lost"]
    assert said[3].startswith("merging: 50 %  2 kB of 4 kB written  ")
    assert "2/4 shards" in said[3]
    assert len(said) == 4


def test_what_ends_before_the_delay_says_only_notes() -> None:
    stream = io.StringIO()
    with PlainLines(stream, delay_s=NEVER_S) as lines:
        lines(Stage("verifying", total_bytes=10))
        lines(Note("look here"))
        lines(Note("not meant", "warning"))
        lines(Moved(10))

    assert stream.getvalue() == "note: look here\nwarning: not meant\n"


def parsed(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_are_one_object_each_and_end_with_the_outcome() -> None:
    stream = io.StringIO()
    with JsonLines(stream, interval_s=NEVER_S) as lines:
        lines(Stage("opening checkpoints", unit="files"))
        lines(Done("model.safetensors"))
        lines(MERGING)
        lines(SHARD)
        lines(Moved(9, 600))

    events = parsed(stream.getvalue())
    assert [event["event"] for event in events] == ["stage", "progress", "stage", "progress", "end"]
    assert (events[1]["items_done"], events[1]["last_item"]) == (1, "model.safetensors")
    assert (events[3]["done_bytes"], events[3]["total_bytes"], events[3]["read_bytes"]) == (1_600, 4_000, 9)
    assert (events[4]["outcome"], events[4]["exit_code"], events[4]["message"]) == ("done", 0, None)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(PlanError("no"), 2), (StorageError("gone"), 3), (KeyboardInterrupt(), 130), (ValueError("a bug"), 70)],
)
def test_json_says_how_it_failed(error: BaseException, exit_code: int) -> None:
    stream = io.StringIO()
    with pytest.raises(type(error)), JsonLines(stream, interval_s=NEVER_S):
        raise error

    (end,) = parsed(stream.getvalue())
    assert (end["event"], end["outcome"], end["exit_code"]) == ("end", "failed", exit_code)


def screen(*, has_lanes: bool, events: list[Event]) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with LiveDisplay(has_lanes=has_lanes, console=console) as display:
        for event in events:
            display(event)
        display.tick()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_a_bar_and_lanes_on_request() -> None:
    events: list[Event] = [MERGING, SHARD, Moved(100, 1_000, "worker 1"), Moved(100, 0, "worker 2"), Note("careful")]

    shown, with_lanes = (screen(has_lanes=has_lanes, events=events) for has_lanes in (False, True))

    for words in ("merging", "50 %", "2 kB of 4 kB written", "1/4 shards", "note: careful"):
        assert words in shown
    assert "worker 1" not in shown
    assert "worker 1" in with_lanes
    assert "worker 2" in with_lanes


def test_a_display_with_a_delay_draws_nothing_for_what_is_quick() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with LiveDisplay(delay_s=NEVER_S, console=console) as display:
        display(MERGING)

    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_none_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting("none") as on_event:
        for event in (MERGING, Note("x"), Moved(1)):
            on_event(event)

    assert capsys.readouterr().err == ""


def test_words_for_what_has_no_size(clock: Clock) -> None:
    state = State(clock)
    state.take(Stage("opening checkpoints", unit="files"))
    clock.now += 65.0
    state.take(Done("x"))

    assert in_words(state.snapshot()) == "1 file  for 65 s"


# ----------------------------------------------------------------------------------------------------- on the commands


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    root = tmp_path_factory.mktemp("world")
    family = make_family(root, 2, {"w": (40, 16), "v": (16,)}, buffers=False)
    recipe = write_recipe(root / "recipe.yaml", "model_stock", family)
    places = {
        "RECIPE": recipe,
        "OUT": root / "out",
        "NEW": root / "new",
        "A": family.base,
        "B": family.base,
        "MISSING": root / "missing",
    }

    def run(*arguments: str) -> tuple[str, str]:
        words = [str(places.get(word, word)) for word in arguments]
        result = runs.invoke(*words)
        return result.stdout, result.stderr

    run("merge", "RECIPE", "OUT")
    return run


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "merge": (["merge", "RECIPE", "NEW"], ["opening checkpoints", "planning", "merging", "publishing"]),
    "plan": (["plan", "RECIPE", "OUT"], ["opening checkpoints", "planning", "looking at the output"]),
    "verify": (["verify", "OUT", "--inputs", "--sample", "100%"], ["verifying", "merging a sample again"]),
    "diff": (["diff", "A", "B"], ["opening checkpoints", "comparing"]),
    "inspect": (["inspect", "RECIPE"], ["opening checkpoints", "planning", "reading the inputs"]),
    "audit RECIPE": (["audit", "RECIPE"], ["opening checkpoints", "planning", "reading the inputs"]),
    "audit OUTPUT": (["audit", "OUT"], ["reading records", "looking at the inputs", "reading the inputs"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_machines_what_it_does(name: str, merged: Callable[..., tuple[str, str]]) -> None:
    arguments, stages = COMMANDS[name]

    out, err = merged(*arguments, "--progress", "json", "--json")

    events = parsed(err)
    begun = [event["stage"] for event in events if event["event"] == "stage"]
    assert [stage for stage in begun if stage in stages] == stages
    assert events[-1]["event"] == "end"
    assert json.loads(out)
    last_words = {event["stage"]: event for event in events if event["event"] == "progress"}
    for event in last_words.values():
        if event["total_bytes"] is not None:
            assert event["done_bytes"] == event["total_bytes"], "the last word on a stage is that it is done"


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_is_quiet_and_none_shows_no_progress(name: str, merged: Callable[..., tuple[str, str]]) -> None:
    arguments, _ = COMMANDS[name]

    assert merged(*arguments, "--quiet", "--progress", "json") == ("", "")
    out, err = merged(*arguments, "--progress", "none")

    assert (out != "", err) == (True, "")


def test_an_error_is_told_machines_once(merged: Callable[..., tuple[str, str]]) -> None:
    _, err = merged("diff", "A", "MISSING", "--progress", "json")

    end = parsed(err)[-1]
    assert (end["outcome"], end["exit_code"]) == ("failed", 2)
    assert "there is no checkpoint at" in str(end["message"])
