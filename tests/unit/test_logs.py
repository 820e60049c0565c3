"""Log lines: what stands in them, from which level on, without secrets; and nothing on standard error but them."""

import io
import json
import logging
import re
import signal
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stockflow import api
from stockflow.errors import StorageError
from stockflow.events import Begun, Cost, Done, Dropped, Event, Moved, Note, Retry, Run, Stage
from stockflow.progress.display import LogLevel
from stockflow.progress.lines import PlainLines
from stockflow.progress.logs import LogLines
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.pages import section
from tests.waiting import HANG_S

NEVER_S = 1e6
SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
COST = Cost(100, 7, {"total": 2.0, "read": 1.5}, {"read": 1}, 5000)
EVENTS: Sequence[Event] = (
    Stage("planning"),
    Run("run-1", "plan-1"),
    Stage("merging", total_bytes=400, num_items=4, unit="shards", counts_written=True),
    Begun("s1", "a:1", 100),
    Begun("s2", "b:2", 100),
    Moved(300, 100),
    Done("s1", cost=COST),
    Retry("lost", "s2"),
    Note("a worker was lost"),
    Retry("storage"),
    Begun("s2", "c:3", 100),
    Dropped("s1", 100),
)


def logged(events: Sequence[Event], level: LogLevel = "debug", error: Exception | None = None) -> list[dict[str, Any]]:
    stream = io.StringIO()
    with suppress(StorageError, RuntimeError), LogLines(stream, level=level, interval_s=NEVER_S) as lines:
        for event in events:
            lines(event)
        if error:
            raise error
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_has_a_time_a_level_and_ids_from_when_they_are_known() -> None:
    lines = logged(EVENTS)

    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("debug", "info", "warning", "error")
        assert line["message"]
    assert [(line.get("run"), line.get("plan")) for line in lines[:2]] == [(None, None), ("run-1", "plan-1")]
    assert {(line["run"], line["plan"]) for line in lines[1:]} == {("run-1", "plan-1")}


def test_shards_are_named_with_their_workers() -> None:
    lines = [line for line in logged(EVENTS) if "shard" in line]

    assert [(line["shard"], line.get("worker"), line.get("cause")) for line in lines] == [
        ("s1", "a:1", None),
        ("s2", "b:2", None),
        ("s1", "a:1", None),
        ("s2", "b:2", "lost"),
        ("s2", "c:3", None),
        ("s1", None, None),
    ]
    done = lines[2]
    assert (done["bytes"], done["tensors"], done["seconds"], done["retries"], done["peak_memory_bytes"]) == (
        100, 7, {"total": 2.0, "read": 1.5}, {"read": 1}, 5000,
    )  # fmt: skip


LINES_BY_LEVEL = {
    "debug": ["planning", "run", "merging", "s1: a", "s2: b", "s1: done", "s2: tried", "a worker", "the start", "s2: c",
              "s1: to be", "done"],
    "info": ["planning", "run", "merging", "s1: done", "s2: tried", "a worker", "the start", "s1: to be", "done"],
    "warning": ["s2: tried", "a worker", "the start", "s1: to be"],
    "error": [],
}  # fmt: skip


@pytest.mark.parametrize("level", LINES_BY_LEVEL)
def test_a_level_leaves_out_what_matters_less(level: LogLevel) -> None:
    messages = [line["message"] for line in logged(EVENTS, level)]

    assert len(messages) == len(LINES_BY_LEVEL[level])
    for message, begin in zip(messages, LINES_BY_LEVEL[level], strict=True):
        assert message.startswith(begin)


PLAIN_BY_LEVEL = {
    "debug": ["planning", "run", "merging", "s1: a", "s2: b", "s1: done", "s2: tried", "note: a", "the start", "s2: c",
              "s1: to be", "merging: "],
    "info": ["planning", "merging", "note: a", "merging: "],
    "warning": ["note: a"],
    "error": [],
}  # fmt: skip


@pytest.mark.parametrize("level", PLAIN_BY_LEVEL)
def test_plain_lines_have_levels_too(level: LogLevel) -> None:
    stream = io.StringIO()
    with PlainLines(stream, interval_s=NEVER_S, level=level) as lines:
        for event in EVENTS:
            lines(event)
        lines._said = -NEVER_S
        lines.tick()

    said = stream.getvalue().splitlines()
    assert len(said) == len(PLAIN_BY_LEVEL[level])
    for line, begin in zip(said, PLAIN_BY_LEVEL[level], strict=True):
        assert line.startswith(begin)


def test_how_things_stand_is_a_line_with_numbers() -> None:
    stream = io.StringIO()
    with LogLines(stream, interval_s=NEVER_S) as lines:
        for event in EVENTS[:-1]:
            lines(event)
        lines.tick()
    with LogLines(quiet := io.StringIO(), has_progress=False, interval_s=NEVER_S) as lines:
        lines(EVENTS[0])
        lines.tick()

    line = json.loads(stream.getvalue().splitlines()[-2])
    assert line["message"].startswith("merging: 25 %")
    assert (line["stage"], line["done_bytes"], line["total_bytes"], line["items_done"]) == ("merging", 100, 400, 1)
    assert [json.loads(text)["message"] for text in quiet.getvalue().splitlines()] == ["planning", "done"]


@pytest.mark.parametrize(
    "text",
    [
        f"cannot read https://user:{SECRET}@host/x",
        f"GET https://bucket.s3.amazonaws.com/x?X-Amz-Signature={SECRET} failed",
        f"Authorization: Bearer {SECRET}",
        f"the server said {SECRET}",
    ],
)
def test_secrets_are_replaced_wherever_they_stand(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if text.startswith("the server"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    stream = io.StringIO()
    with suppress(RuntimeError), LogLines(stream, interval_s=NEVER_S) as lines:
        lines(Note(text))
        logging.getLogger("some.client").error(text)
        raise RuntimeError(text)

    said = stream.getvalue()
    assert len(said.splitlines()) == 3
    assert SECRET not in said


def test_what_libraries_say_becomes_lines_while_it_lasts() -> None:
    stream = io.StringIO()
    before = list(logging.getLogger().handlers)
    with LogLines(stream, interval_s=NEVER_S):
        logging.getLogger("some.client").warning("%d requests failed", 3)
        logging.getLogger("some.client").info("not told")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("old", UserWarning, stacklevel=1)

    first, second, _ = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["level"], first["logger"], first["message"]) == ("warning", "some.client", "3 requests failed")
    assert (second["logger"], "old" in second["message"]) == ("py.warnings", True)
    assert logging.getLogger().handlers == before


def test_an_error_is_the_last_line_with_its_exit_code() -> None:
    last = logged(EVENTS, "error", StorageError("no answer"))[-1]

    assert (last["level"], last["message"], last["exit_code"]) == ("error", "no answer", 3)
    assert last["run"] == "run-1"
    assert "traceback" not in last


# -------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return write_recipe(root / "recipe.yaml", "model_stock", make_family(root, 2))


def test_standard_error_of_a_merge_and_a_verification_is_json(recipe: Path, tmp_path: Path) -> None:
    logs = ("--log-format", "json", "--log-level", "debug")
    command = runs.command(
        "merge", recipe, tmp_path / "out", "--shard-size", 300_000, "--device", "cpu", "--json", *logs
    )
    merging = subprocess.Popen(
        command, cwd=runs.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    out, said = merging.communicate(timeout=HANG_S)
    verified = runs.invoke("verify", tmp_path / "out", *logs)

    lines = [json.loads(line) for line in said.splitlines()]
    shards = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert merging.returncode == 0
    assert {line["plan"] for line in lines if "plan" in line} == {json.loads(out)["plan_id"]}
    assert {line["shard"] for line in lines if "seconds" in line} == shards
    assert {line["worker"].rpartition(":")[2] for line in lines if "worker" in line} == {str(merging.pid)}
    assert (lines[-1]["message"], lines[-1]["exit_code"]) == ("done", 0)
    assert verified.exit_code == 0
    assert "verifying" in [json.loads(line).get("stage") for line in verified.stderr.splitlines()]


def test_a_mistake_is_json_too(tmp_path: Path) -> None:
    result = runs.invoke("merge", tmp_path / "no.yaml", tmp_path, "--log-format", "json")

    last = json.loads(result.stderr.splitlines()[-1])
    assert result.exit_code == last["exit_code"] == 2
    assert last["message"].startswith(f"cannot read {tmp_path}/no.yaml: no such file")


def test_quiet_says_errors_only(recipe: Path, tmp_path: Path) -> None:
    good = runs.invoke("merge", recipe, tmp_path / "out", "--log-format", "json", "--quiet")
    bad = runs.invoke("merge", "no.yaml", tmp_path / "out", "--log-format", "json", "--quiet")

    assert (good.exit_code, good.output) == (0, "")
    (line,) = bad.stderr.splitlines()
    assert json.loads(line)["exit_code"] == 2


def test_a_bug_is_one_line_with_its_traceback(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"https://user:{SECRET}@host/x")

    monkeypatch.setattr(api, "merge", broken)
    result = runs.invoke("merge", recipe, tmp_path / "out", "--log-format", "json")

    (line,) = [json.loads(text) for text in result.stderr.splitlines()]
    assert result.exit_code == line["exit_code"] == 70
    assert line["message"] == "this is a bug in stockflow, please report it: RuntimeError: https://host/x"
    assert "in broken" in line["traceback"]
    assert SECRET not in result.stderr


@pytest.mark.parametrize("progress", ["rich", "lanes", "json"])
def test_two_forms_at_once_are_refused(progress: str) -> None:
    result = runs.invoke("merge", "r", "o", "--log-format", "json", "--progress", progress)

    assert result.exit_code == 2
    assert result.stderr == (
        f"stockflow: --log-format json and --progress {progress} exclude each other: leave one of them out\n"
    )


def test_a_signal_is_said_in_json(tmp_path: Path) -> None:
    waiting = subprocess.Popen(
        runs.command("merge", "-", tmp_path / "out", "--log-format", "json"),
        cwd=runs.REPOSITORY, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert waiting.stderr is not None
    assert json.loads(waiting.stderr.readline())["message"] == "opening checkpoints"

    waiting.send_signal(signal.SIGTERM)
    _, said = waiting.communicate(timeout=HANG_S)

    last = json.loads(said.splitlines()[-1])
    assert waiting.returncode == last["exit_code"] == 143
    assert last["message"].startswith("stopped by SIGTERM")


def test_levels_and_fields_are_documented() -> None:
    page = section("clusters.md", "Operations")
    fields = {name for line in logged(EVENTS, error=RuntimeError("x")) for name in line}

    assert [name for name in {*fields, *LINES_BY_LEVEL} - {"unit"} if f"`{name}`" not in page] == []


def test_a_library_that_logs_wrongly_does_not_end_the_merge(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise what goes wrong

    with LogLines(stream, interval_s=NEVER_S):
        logging.getLogger("library").warning("%d files", "many")

    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["done"]
    assert "%d files" in capsys.readouterr().err
