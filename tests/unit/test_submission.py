"""What is submitted to a cluster, and what is refused before one is asked."""

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from aiohttp import web
from ray.job_submission import JobSubmissionClient

from stockflow import __version__
from stockflow.errors import AccessDeniedError, ComputeLostError, NotFoundError, RecipeError
from stockflow.run import submission
from stockflow.run.executors.ray.jobs import Job, LogStream
from stockflow.run.submission import Submission, exit_code, follow, how_it_ended, make_request
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.pages import section
from tests.s3_server import free_port
from tests.waiting import HANG_S


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "family", 2, {"w": (10, 10)})


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", family)


@pytest.fixture(autouse=True)
def open_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def refused(recipe: object, output: object, *options: object) -> tuple[int, str]:
    """Submit what cannot be; return the exit code and the one message."""
    result = runs.invoke("submit", recipe, output, *options)
    assert result.stdout == ""
    message = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("note: "))
    assert message.startswith("stockflow: ")
    assert "Traceback" not in message
    return result.exit_code, message


# ------------------------------------------------------------------------------------------ what the job runs


def run_entrypoint(request: Submission, program: str | None, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run what a job would, where ``stockflow`` is a script, or missing."""
    path = tmp_path / "bin"
    path.mkdir(exist_ok=True)
    (path / "cat").symlink_to("/bin/cat")
    if program is not None:
        (path / "stockflow").write_text(f"#!/bin/sh\n{program}\n")
        (path / "stockflow").chmod(0o755)
    command = ["/bin/sh", "-c", request.entrypoint]
    return subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True, check=False)


THIS = f'[ "$1" = --version ] && echo "stockflow {__version__}" && exit\n'


def test_the_job_becomes_the_merge_and_hands_it_the_recipe(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text() + '# it\'s "$HOME" `id` \\ \n# RECIPE\n'
    recipe.write_text(text)
    request = make_request(str(recipe), str(tmp_path / "o u't"), ["--label", "pool=in(a,b)", "--workers", "3"])

    done = run_entrypoint(request, THIS + 'for word; do echo "[$word]"; done; cat; exit 5', tmp_path)

    words = ["merge", "-", str(tmp_path / "o u't"), "--executor", "ray", "--label", "pool=in(a,b)", "--workers", "3"]
    assert done.stdout == "".join(f"[{word}]\n" for word in words) + text
    assert done.returncode == 5


def test_a_recipe_may_hold_the_word_that_ends_it(tmp_path: Path) -> None:
    text = "a\nRECIPE\nRECIPE_\nb\n"
    request = Submission("", submission._script(["stockflow", "merge"], text), ())

    assert run_entrypoint(request, THIS + "cat", tmp_path).stdout == text


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_the_newlines_of_a_recipe_are_those_of_the_log_that_repeats_it(
    newline: str, recipe: Path, tmp_path: Path
) -> None:
    plain = make_request(str(recipe), str(tmp_path / "out"))
    recipe.write_bytes(recipe.read_bytes().replace(b"\n", newline.encode()))

    assert make_request(str(recipe), str(tmp_path / "out")) == plain


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, f"stockflow: the head has no stockflow on its PATH; use an image with stockflow {__version__}"),
        ("echo stockflow 99.0", f"stockflow: submitted by stockflow {__version__}, and the head has stockflow 99.0"),
        ("exit 3", f"stockflow: submitted by stockflow {__version__}, and the head has ;"),
    ],
)
def test_an_image_without_this_stockflow_is_refused(
    program: str | None, message: str, recipe: Path, tmp_path: Path
) -> None:
    done = run_entrypoint(make_request(str(recipe), str(tmp_path / "out")), program, tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("options", [["--gpus-per-worker", "1"], ["--device", "cuda", "--gpus-per-worker", "1"]])
def test_a_merge_on_gpus_names_the_image_with_torch(options: list[str], recipe: Path, tmp_path: Path) -> None:
    done = run_entrypoint(make_request(str(recipe), str(tmp_path / "out"), options), None, tmp_path)

    assert done.returncode == 2
    assert f"use an image with stockflow[torch] {__version__}, for GPUs\n" in done.stderr


def test_a_recipe_at_a_url_is_read_by_the_cluster() -> None:
    request = make_request("s3://bucket/recipe.yaml", "s3://bucket/out", ["--overwrite"])

    last = "exec stockflow merge s3://bucket/recipe.yaml s3://bucket/out --executor ray --overwrite"
    assert request.entrypoint.splitlines()[-1] == last
    assert request.paths == ()


def test_ids_tell_outputs_apart_and_requests_are_compared(recipe: Path, tmp_path: Path) -> None:
    one, same, wider, other = (
        make_request(str(recipe), f"{tmp_path}/{name}", options)
        for name, options in (
            ("A b.v2", []),
            ("./A b.v2/", []),
            ("A b.v2", ["--workers", "8"]),
            ("b", []),
        )
    )

    assert one == same
    assert one.base_id == wider.base_id != other.base_id
    assert one.digest != wider.digest
    assert re.fullmatch(r"stockflow-a-b-v2-[0-9a-f]{10}", one.base_id)


# ----------------------------------------------------------------------------- refused before a cluster is asked


def test_folders_must_mean_the_same_on_the_cluster(
    family: Family, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(family.base)
    absolute = recipe.read_text()

    paths = make_request(str(recipe), "out").paths
    recipe.write_text(absolute.replace(str(family.base), f"'{tmp_path}/link'"))
    through_a_link = make_request(str(recipe), "out").paths
    recipe.write_text(absolute.replace(str(family.base), "./family/base"))
    with pytest.raises(RecipeError, match=r"names \./family/base as seen from where it is read"):
        make_request(str(recipe), "out")

    assert paths == through_a_link == (str(tmp_path / "out"), str(family.base), *map(str, family.tuned))


@pytest.mark.parametrize("written", ["{}", '"{}"', "file://{}", '"file://{}"'])
def test_folders_may_have_spaces_and_commas_in_their_names(written: str, tmp_path: Path) -> None:
    family = make_family(tmp_path / "my models, a", 2, {"w": (10, 10)})
    recipe = tmp_path / "recipe.yaml"
    models = "".join(f"  - model: {written.format(folder)}\n" for folder in family.tuned)
    recipe.write_text(f"merge_method: model_stock\nbase_model: {written.format(family.base)}\nmodels:\n{models}")

    paths = make_request(str(recipe), str(tmp_path / "out")).paths

    assert paths == (str(tmp_path / "out"), str(family.base), *map(str, family.tuned))


def test_bad_requests_are_refused_without_a_cluster(recipe: Path, tmp_path: Path) -> None:
    out, nobody = tmp_path / "out", ("--address", f"http://127.0.0.1:{free_port()}")
    long = tmp_path / "long.yaml"
    long.write_text(recipe.read_text() + "# a long comment\n" * 7000)
    secret = tmp_path / "secret.yaml"
    secret.write_text(recipe.read_text().replace("base_model: ", "base_model: s3://key:hunter2@bucket"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("merge_method: no_such_method\nmodels: []\n")
    cuda = ("--device", "cuda", *nobody)

    for given, message in {
        (recipe, out, "--address", "ray://head:10001"): "--address ray://head:10001: expected where the dashboard",
        (recipe, out, "--address", "http:/head"): "--address http:/head: expected where the dashboard",
        (recipe, out, "--address", "http://head:99999"): "expected where the dashboard",
        (recipe, out, "--memory", "much", *nobody): "--memory: expected a size",
        (recipe, out, "--label", "spot", *nobody): "--label spot: expected KEY=VALUE",
        (recipe, out, *cuda): "--device cuda on Ray: say how many GPUs a worker gets",
        (recipe, out, "--gpus-per-worker", "1.5", *nobody): "expected a fraction of one GPU",
        (tmp_path / "none.yaml", out, *nobody): "no such file",
        (broken, out, *nobody): "unknown method 'no_such_method'",
        (secret, out, *nobody): "carries a user and a password",
        (long, out, *nobody): "more than a job can carry .*submit its URL",
        (recipe, "http://example.com/out", *nobody): "which stockflow only reads",
        (recipe, "s3://key:hunter2@bucket/out", *nobody): "carries a user and a password",
        ("s3://key:hunter2@bucket/r.yaml", out, *nobody): "carries a user and a password",
    }.items():
        code, said = refused(*given)
        assert code == 2, given
        assert re.search(message, said), said
        assert "hunter2" not in said


# --------------------------------------------------------------------------------------- clusters that are none


@contextmanager
def answering(status: int, payload: bytes) -> Iterator[str]:
    """Serve one answer to everything, as whatever listens at a wrong address may."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_nobody_at_the_address_exits_with_5(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS would send Ray's client elsewhere."""
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")

    code, message = refused(recipe, tmp_path / "out", "--address", address)

    assert (code, os.environ["RAY_ADDRESS"] != address) == (5, True)
    assert message.startswith(f"stockflow: no Ray head answers at {address}: connection refused. Expected the address")


@pytest.mark.parametrize(
    ("status", "payload", "code", "message"),
    [
        (200, b"<html>hello</html>", 5, "what answers at {} is not the job API of Ray; expected"),
        (404, b"", 5, "what answers at {} is not the job API of Ray; expected"),
        (200, b"[]", 5, "what answers at {} is not the job API of Ray; expected"),
        (401, b"", 2, "the cluster at {} does not accept this token (RAY_AUTH_MODE is disabled): set"),
        (
            200,
            b'{"ray_version": "2.9.3"}',
            2,
            "the cluster at {} runs Ray 2.9.3; stockflow needs 2.52",
        ),
    ],
)
def test_what_answers_is_not_what_is_needed(
    status: int, payload: bytes, code: int, message: str, recipe: Path, tmp_path: Path
) -> None:
    with answering(status, payload) as address:
        result = refused(recipe, tmp_path / "out", "--address", address)

    assert result[0] == code
    assert result[1].startswith(f"stockflow: {message.format(address)}")


@pytest.mark.parametrize(
    ("url", "is_said"),
    [
        ("http://127.0.0.1:{}", "note: if this address is a tunnel, every node of the cluster must see "),
        ("localhost:{}", "note: if this address is a tunnel, every node of the cluster must see "),
        ("http://0.0.0.0:{}", "note: every node of the cluster must see "),
    ],
)
def test_folders_are_named_whatever_the_address(url: str, is_said: str, recipe: Path, tmp_path: Path) -> None:
    address = url.format(free_port())

    result = runs.invoke("submit", recipe, tmp_path / "out", "--address", address)

    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert note.startswith(f"{is_said}{tmp_path / 'out'}, {tmp_path / 'family'}")
    assert note.endswith(", as they are here")


def test_folders_that_links_may_lead_into_are_sent_along_and_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Submission] = []

    def make(*given: Any) -> Submission:
        made.append(make_request(*given))
        return made[-1]

    monkeypatch.setattr(submission, "make_request", make)
    monkeypatch.chdir(tmp_path)
    words = ["--follow-links", "store", "--follow-links", str(tmp_path / "other")]

    result = runs.invoke("submit", recipe, tmp_path / "out", "--address", f"127.0.0.1:{free_port()}", *words)

    (request,) = made
    absolute = [str(tmp_path / "store"), str(tmp_path / "other")]
    assert f"--executor ray --follow-links {absolute[0]} --follow-links {absolute[1]} <<" in request.entrypoint
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert all(folder in note for folder in absolute)


def test_options_of_logs_are_the_jobs(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def make(recipe: str, output: str, options: Sequence[str], folders: Sequence[str]) -> Submission:
        asked.append(options)
        raise RecipeError("enough")

    monkeypatch.setattr(submission, "make_request", make)
    for options in ([], ["--log-format", "json", "--log-level", "debug"]):
        refused(recipe, tmp_path / "out", "--address", "head:8265", *options)

    assert asked == [[], ["--log-format", "json", "--log-level", "debug"]]


# ------------------------------------------------------------------------------------------- how a job is followed


class Scripted:
    """A cluster whose streams and answers are given; real ones cannot be broken at will."""

    def __init__(
        self, log: str | Exception, streams: Sequence[Sequence[str | None]], answers: Sequence[Job | Exception]
    ) -> None:
        self._log, self._streams, self._answers = log, iter(streams), iter(answers)
        self._parts: Iterator[str | None] = iter(())
        self.num_open = 0

    def stream(self, job_id: str) -> "Scripted":
        self._parts = iter(next(self._streams))
        self.num_open += 1
        return self

    def close(self) -> None:
        self.num_open -= 1

    def read(self, timeout_s: float) -> str | None:
        return next(self._parts, None)

    def job(self, job_id: str) -> Job:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def logs(self, job_id: str) -> str:
        if isinstance(self._log, Exception):
            raise self._log
        return self._log


RUNNING = Job("j", "RUNNING", None, "")
DONE = Job("j", "SUCCEEDED", 0, "")


def followed(jobs: Any, entrypoint: str = "", lost_s: float = submission.LOST_S) -> tuple[str, list[str]]:
    said: list[str] = []
    notes: list[str] = []
    try:
        assert follow(jobs, "j", said.append, notes.append, entrypoint=entrypoint, look_s=0.01, lost_s=lost_s) == DONE
    finally:
        assert jobs.num_open == 0
    return "".join(said), notes


def test_each_line_is_shown_once_though_the_stream_breaks() -> None:
    log = "setting up\nrun: stockflow\nmerge\none\ntwo\nthree\n"
    streams = [[log[:17], None], [log[:5], log[5:38], None], [], *[[]] * 9]

    plain, _ = followed(Scripted(log, streams, [RUNNING, RUNNING, RUNNING, DONE]))
    without, _ = followed(Scripted(log, streams, [RUNNING, RUNNING, DONE]), "stockflow\nmerge")
    not_begun, _ = followed(Scripted("no space left\n", [[]] * 9, [DONE]), "stockflow\nmerge")

    assert plain == log
    assert without == "one\ntwo\nthree\n"
    assert not_begun == "no space left\n"


def test_a_head_that_is_silent_for_a_while_is_waited_for() -> None:
    gone: list[Job | Exception] = [ComputeLostError("no head")] * 3
    said, notes = followed(Scripted("x\n", [[]] * 9, [RUNNING, *gone, RUNNING, DONE]))

    assert said == "x\n"
    assert notes == ["the head does not answer; trying for up to 300 s"]
    with pytest.raises(ComputeLostError, match="the job may go on: submit the same again to follow it"):
        followed(Scripted("", [[]] * 9, [RUNNING, *gone]), lost_s=0.0)
    with pytest.raises(ComputeLostError, match="Submit the same again to resume"):
        followed(Scripted("", [[]] * 9, [RUNNING, NotFoundError("not known")]))


@pytest.mark.parametrize("error", [ComputeLostError("no head"), NotFoundError("no job"), AccessDeniedError("no token")])
def test_a_log_that_cannot_be_read_leaves_the_result(error: Exception) -> None:
    said, notes = followed(Scripted(error, [["one\n"], *[[]] * 9], [RUNNING, DONE]), "never said")

    assert said == "one\n"
    assert notes == [f"the job is over, and the last of what it said is missing here: {error}"]


def test_what_is_held_for_an_entrypoint_that_never_comes_is_shown_meanwhile() -> None:
    log = "".join(f"line {number}\n" for number in range(2000))
    shown_while: list[int] = []
    said: list[str] = []

    class Looked(Scripted):
        def job(self, job_id: str) -> Job:
            shown_while.append(len("".join(said)))
            return super().job(job_id)

    jobs: Any = Looked(log, [[log, None], *[[]] * 9], [RUNNING, DONE])
    follow(jobs, "j", said.append, lambda note: None, entrypoint="stockflow\nmerge", look_s=0.01)

    assert shown_while[0] == len(log)
    assert "".join(said) == log


def test_a_stream_that_is_closed_gives_up_its_connection_and_thread() -> None:
    """A server of websockets that never says a word; Ray's own client."""
    opened, closed = Event(), Event()

    async def silent(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        opened.set()
        async for _ in answer:
            pass
        closed.set()
        return answer

    with serving(silent) as address:
        client = JobSubmissionClient.__new__(JobSubmissionClient)
        client._address, client._cookies, client._headers, client._ssl_context = address, None, None, None
        stream = LogStream(client, "j")
        assert opened.wait(HANG_S)
        assert stream.read(0.01) == ""
        stream.close()
        assert stream.read(HANG_S) is None
        assert closed.wait(HANG_S)
        at_once = LogStream(client, "j")
        at_once.close()
        assert at_once.read(HANG_S) is None


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """Serve the log of a job on a thread."""
    loop, port = asyncio.new_event_loop(), free_port()
    application = web.Application()
    application.router.add_get("/api/jobs/j/logs/tail", handler)
    runner = web.AppRunner(application)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", port).start())
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()


@pytest.mark.parametrize(
    ("job", "code", "words"),
    [
        (DONE, 0, "job j: done"),
        (Job("j", "FAILED", 3, ""), 3, "failed with exit code 3"),
        (Job("j", "FAILED", 70, ""), 70, "failed with exit code 70"),
        (Job("j", "FAILED", -11, ""), 139, "failed with exit code 139"),
        (Job("j", "FAILED", 1, ""), 5, "ended with 1, which no merge does by itself"),
        (Job("j", "FAILED", 137, ""), 5, "want of memory on the head"),
        (Job("j", "FAILED", -9, ""), 5, "want of memory on the head"),
        (Job("j", "FAILED", None, "node died\nmore"), 5, "was lost: node died; submit the same again"),
        (Job("j", "FAILED", None, ""), 5, "was lost: the head does not say why"),
        (Job("j", "STOPPED", None, ""), 143, "was stopped; submit the same again"),
    ],
)
def test_the_end_of_a_job_is_the_end_of_the_merge(job: Job, code: int, words: str) -> None:
    assert exit_code(job) == code
    assert words in how_it_ended(job)


@pytest.mark.parametrize(
    ("code", "tries_again"), [(1, True), (2, False), (3, True), (5, True), (70, False), (143, True)]
)
def test_the_documented_loop_tries_again_what_may_go_well(code: int, tries_again: bool) -> None:
    page = section("clusters.md", "Operations")
    loop = page[page.index("    until stockflow merge") : page.index("In a Kubernetes `Job`")]
    first_fails = f"sleep() {{ tried=yes; }}; stockflow() {{ [ $tried ] || return {code}; }}\n"

    done = subprocess.run(["/bin/sh", "-c", first_fails + loop], check=False)

    assert done.returncode == (0 if tries_again else code)
