"""`stockflow submit` to a cluster that asks for a token: what it says, how it ends, what it leaves."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import pytest
import yaml

from tests import ray_nodes, runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.ray_nodes import Cluster

pytestmark = pytest.mark.cluster

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYACCESS0001",
    "AWS_SECRET_ACCESS_KEY": "canary/Secret+Access/Key0002=",
    "AWS_SESSION_TOKEN": "canarySessionToken0003//abc+def==",
    "HF_TOKEN": "hf_canaryHubToken0004",
}
"""what the one who submits has in the environment, and the cluster has not"""
WAITS = ("--memory", "2GiB", "--workers", "1")
ENOUGH_S = 120


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[Cluster]:
    """A head that computes nothing, a node with one CPU, credentials of their own for S3."""
    with ray_nodes.cluster(os.environ | {"AWS_ENDPOINT_URL_S3": s3_endpoint}) as made:
        made.start_head()
        made.add_node()
        yield made


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 2)


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", family)


class Finished:
    """How a command ended and what it said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def job(self) -> str:
        """The id of the job it submitted or joined."""
        return next(line.split(" job ")[1].split()[0] for line in self.err.splitlines() if " at http" in line)


def start(cluster: Cluster, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Begin to submit."""
    command = runs.command("submit", *arguments, "--address", cluster.url)
    return subprocess.Popen(
        command,
        cwd=runs.REPOSITORY,
        env=cluster.client_environment | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> Finished:
    """Wait for the end of a command."""
    out, err = process.communicate(timeout=ENOUGH_S)
    assert "Traceback" not in out + err
    return Finished(process.returncode, out, err)


def submit(cluster: Cluster, *arguments: object, **environment: str) -> Finished:
    """Submit, and wait for the end."""
    return ended(start(cluster, *arguments, **environment))


def status(cluster: Cluster, job: str) -> str:
    return str(json.loads(cluster.ask(f"/api/jobs/{job}")[1])["status"])


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + ENOUGH_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def logs(cluster: Cluster, job: str) -> str:
    code, body = cluster.ask(f"/api/jobs/{job}/logs")
    return str(json.loads(body)["logs"]) if code == 200 else ""


@contextmanager
def occupied(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Keep the cluster's one CPU busy, so that merges wait for it; what is given lets go of it."""
    script = (
        "import sys; from ray.job_submission import JobSubmissionClient\n"
        "print(JobSubmissionClient(sys.argv[1]).submit_job(entrypoint='sleep 600', entrypoint_num_cpus=1))"
    )
    command = [sys.executable, "-c", script, cluster.url]
    environment = cluster.client_environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=ENOUGH_S)
    job = done.stdout.split()[-1]
    try:
        wait_until(lambda: status(cluster, job) == "RUNNING", "the CPU to be taken")
        yield lambda: stop(cluster, job)
    finally:
        stop(cluster, job)


def stop(cluster: Cluster, job: str) -> None:
    """Stop a job as an operator does, and see it end."""
    command = [str(ray_nodes.SCRIPTS / "ray"), "job", "stop", "--address", cluster.url, job]
    with suppress(subprocess.CalledProcessError):
        subprocess.run(command, env=cluster.client_environment, capture_output=True, check=True, timeout=ENOUGH_S)
    wait_until(lambda: status(cluster, job) not in ("PENDING", "RUNNING"), f"the end of {job}")


# --------------------------------------------------------------------------------------------- how merges end


def test_it_says_and_does_what_the_merge_does(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    done = submit(cluster, recipe, tmp_path / "out", *WAITS)
    again = submit(cluster, recipe, tmp_path / "out", *WAITS)

    local = runs.merge_here(recipe, tmp_path / "local")
    assert [runs.shard_digests(tmp_path / "out")] == runs.expected_digests([local])
    assert (done.code, again.code) == (0, 0), done.out + done.err + again.out
    assert done.out.startswith("opening checkpoints\n")
    assert done.out.splitlines()[-2:] == [f"output: {tmp_path}/out", f"next: stockflow verify {tmp_path}/out"]
    note, *rest = done.err.splitlines()
    assert note.startswith(f"note: if this address is a tunnel, every node of the cluster must see {tmp_path}/out, ")
    assert rest == [f"submitted job {done.job} at {cluster.url}", f"job {done.job}: done"]
    assert again.job == f"{done.job}-2"
    assert "already finished" in again.out


def test_a_log_for_collectors_is_passed_on_as_it_comes_for_a_recipe_from_windows(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    recipe.write_bytes(recipe.read_bytes().replace(b"\n", b"\r\n"))
    with occupied(cluster) as let_go:
        process = start(cluster, recipe, tmp_path / "out", *WAITS, "--log-format", "json", "--log-level", "debug")
        first = json.loads(wait_for_line(process, "merging"))  # while it runs, though it cannot end
        let_go()
        done = ended(process)

    assert done.code == 0, done.out + done.err
    assert first["plan"]
    lines = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert (lines[-1]["exit_code"], {"debug", "info"} <= {line["level"] for line in lines}) == (0, True)


def test_no_credential_reaches_the_cluster(
    cluster: Cluster, family: Family, s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    """The one who submits has secrets in the environment and in a comment; the cluster has credentials of its own."""
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            client.upload_file(str(path), s3_bucket, f"in/{folder.name}/{path.name}")
    models = [{"model": f"s3://{s3_bucket}/in/{folder.name}"} for folder in family.tuned]
    document = {"merge_method": "model_stock", "base_model": f"s3://{s3_bucket}/in/base", "models": models}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"# from https://me:canaryPassword0009@host/x?sig=canarySig0010\n{yaml.safe_dump(document)}")

    done = submit(cluster, recipe, f"s3://{s3_bucket}/out", *WAITS, **SECRETS)

    assert done.code == 0, done.out + done.err
    local = runs.merge_here(write_recipe(tmp_path / "local.yaml", "model_stock", family), tmp_path / "out")
    shard = client.get_object(Bucket=s3_bucket, Key="out/model.safetensors")["Body"].read()
    assert shard == (tmp_path / "out" / local.plan.shards[0].file).read_bytes()
    table = cluster.ask("/api/jobs/")[1]
    assert done.job in table
    assert f"s3://{s3_bucket}/in/base" in table  # the recipe is there to be read
    for text in (table, logs(cluster, done.job), done.out, done.err):
        for secret in (*SECRETS.values(), cluster.token, "canaryPassword0009", "canarySig0010"):
            assert secret not in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--gpus-per-worker", "1", "--device", "cuda"], 5, "no node of the cluster can hold a worker.* 1 GPU"),
        (["--label", "pool=nowhere"], 5, "no node of the cluster can hold a worker.*label pool=nowhere"),
        (["--memory", "100MB"], 2, "Raise --memory"),
    ],
)
def test_what_the_cluster_cannot_do_is_said_before_workers_start(
    options: list[str], code: int, message: str, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    done = submit(cluster, recipe, tmp_path / "out", "--workers", 1, "--memory", "2GiB", *options)

    assert done.code == code, done.out + done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("stockflow: ")]
    assert re.search(message, line), line
    assert done.err.splitlines()[-1] == f"job {done.job} failed with exit code {code}; what it said is above"
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_what_the_cluster_may_not_read_is_said(cluster: Cluster, s3_bucket: str, recipe: Path) -> None:
    missing = submit(cluster, recipe, f"s3://{s3_bucket}-of-another/out", *WAITS)

    assert missing.code in (2, 3), missing.out + missing.err
    assert any(line.startswith("stockflow: ") and "of-another" in line for line in missing.out.splitlines())


def test_a_wrong_token_submits_nothing(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    before = cluster.ask("/api/jobs/")[1]

    wrong = submit(cluster, recipe, tmp_path / "out", RAY_AUTH_TOKEN="a-wrong-one")
    none = submit(cluster, recipe, tmp_path / "out", RAY_AUTH_MODE="disabled")

    for done in (wrong, none):
        assert (done.code, done.out) == (2, "")
        assert f"\nstockflow: the cluster at {cluster.url} does not accept this token" in done.err
        assert "a-wrong-one" not in done.err
    assert cluster.ask("/api/jobs/")[1] == before


FOLLOW = """
import sys
from stockflow.run.executors.ray.jobs import Jobs
from stockflow.run.submission import exit_code, follow, how_it_ended
jobs = Jobs(sys.argv[1])
assert jobs.submit(sys.argv[2], sys.argv[3], {}, {})
assert not jobs.submit(sys.argv[2], sys.argv[3], {}, {})
job = follow(jobs, sys.argv[2], sys.stdout.write, sys.stderr.write)
print(how_it_ended(job))
sys.exit(exit_code(job))
"""


@pytest.mark.parametrize(
    ("script", "code"), [("exit 3", 3), ("exit 70", 70), ("kill -9 $$", 5), ("no-such-program", 127)]
)
def test_the_exit_code_of_the_driver_is_passed_on(script: str, code: int, cluster: Cluster) -> None:
    command = [sys.executable, "-c", FOLLOW, cluster.url, f"t-{code}", script]

    done = subprocess.run(
        command, cwd=runs.REPOSITORY, env=cluster.client_environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == code, done.stdout + done.stderr


# ------------------------------------------------------------------------------------- leaving, joining, stopping


def wait_for_line(process: "subprocess.Popen[str]", text: str) -> str:
    """Read what a command says until a line has some text."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"it ended without {text!r}: {ended(process).err}")


def test_who_leaves_leaves_the_job_alone_and_may_come_back(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with occupied(cluster) as let_go:
        first = start(cluster, recipe, out, *WAITS)
        wait_for_line(first, "merging")
        first.send_signal(signal.SIGTERM)
        terminated = ended(first)
        second = start(cluster, recipe, out, *WAITS)
        wait_for_line(second, "merging")
        second.send_signal(signal.SIGINT)
        interrupted = ended(second)
        other = submit(cluster, recipe, out, *WAITS, "--shard-size", 300_000)
        unfollowed = submit(cluster, recipe, out, *WAITS, "--no-follow")
        assert status(cluster, terminated.job) == "RUNNING"
        third = start(cluster, recipe, out, *WAITS)
        wait_for_line(third, "merging")
        let_go()
        finished = ended(third)

    assert (terminated.code, interrupted.code, other.code, unfollowed.code) == (143, 130, 2, 0)
    assert {terminated.job, interrupted.job, unfollowed.job, finished.job} == {terminated.job}
    assert f"\nat work already: job {terminated.job} at {cluster.url}\n" in interrupted.err
    for left in (terminated, interrupted, unfollowed):
        assert f"  stop: ray job stop --address {cluster.url} {terminated.job}\n" in left.err
        assert f"  status: stockflow status {out} --watch\n" in left.err
    assert f"job {terminated.job} merges into {out} already, with another recipe or other options" in other.err
    assert finished.code == 0, finished.out + finished.err
    assert runs.run("verify", out).returncode == 0


def test_a_stopped_job_ends_its_followers_and_resumes(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    with occupied(cluster):
        process = start(cluster, recipe, tmp_path / "out", *WAITS)
        wait_for_line(process, "merging")
        jobs = json.loads(cluster.ask("/api/jobs/")[1])
        (job,) = [job["submission_id"] for job in jobs if job["metadata"].get("output") == str(tmp_path / "out")]
        stop(cluster, job)
        stopped = ended(process)
    again = submit(cluster, recipe, tmp_path / "out", *WAITS)

    assert stopped.code == 143
    assert "stockflow: stopped by SIGTERM; run the same command again to resume" in stopped.out
    assert stopped.err.splitlines()[-1] == f"job {job} was stopped; submit the same again to resume"
    assert again.code == 0, again.out + again.err


class Terminal:
    """A command at a terminal, and what stands on it."""

    def __init__(self, cluster: Cluster, *arguments: object) -> None:
        command = runs.command("submit", *arguments, "--address", cluster.url)
        self._end, other = pty.openpty()
        self._process = subprocess.Popen(
            command, cwd=runs.REPOSITORY, env=cluster.client_environment, stdin=other, stdout=other, stderr=other,
            preexec_fn=lambda: _own_terminal(other),
        )  # fmt: skip
        os.close(other)
        self.text = ""

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + ENOUGH_S
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self._end], [], [], 1.0)[0]:
                self.text += os.read(self._end, 4096).decode()

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def exit_code(self) -> int:
        reader = threading.Thread(target=self._drain, daemon=True)
        reader.start()
        code = self._process.wait(timeout=ENOUGH_S)
        reader.join(timeout=5)
        return code

    def _drain(self) -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(self._end, 4096):
                self.text += part.decode()


def _own_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize(("answer", "state"), [("y\n", "STOPPED"), ("\n", "RUNNING"), ("\x03", "RUNNING")])
def test_at_a_terminal_ctrl_c_asks(answer: str, state: str, cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    with occupied(cluster):
        terminal = Terminal(cluster, recipe, tmp_path / "out", *WAITS)
        terminal.read_until("merging")
        terminal.type("\x03")
        terminal.read_until("Otherwise it goes on [y/N]: ")
        job = terminal.text.split("Stop job ")[1].split("?")[0]
        assert status(cluster, job) == "RUNNING"
        terminal.type(answer)
        code = terminal.exit_code()
        found = status(cluster, job)
        stop(cluster, job)

    assert (code, found) == (130, state), terminal.text
    assert "Traceback" not in terminal.text
    assert ("was stopped" if state == "STOPPED" else "  stop: ray job stop ") in terminal.text
