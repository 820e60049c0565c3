"""What a user is told, by the command line, when an input or output place is not as the recipe says."""

import http.server
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
import yaml
from huggingface_hub import constants
from typer.testing import Result

from stockflow.storage import fs, hub, objects
from stockflow.storage.faults import Failure, user_error
from stockflow.storage.retry import RetryPolicy
from stockflow.storage.s3 import CONNECT_TIMEOUT, forget_session
from tests import runs
from tests.checkpoints import Family, make_family
from tests.fault_proxy import Fault, FaultyProxy, Outage
from tests.hub_server import COMMIT, GATED, hub_server
from tests.runs import REPOSITORY, command
from tests.s3_server import free_port

QUICK = partial(RetryPolicy, attempts=2, first_delay_s=0.01)
Told = Callable[..., str]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("models"), 1, {"a.weight": (33, 65), "b.weight": (129,)})


@pytest.fixture
def bucket(s3_bucket: str, s3_endpoint: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with a base and a tuned model, and room for the output."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for name, folder in (("base", family.base), ("tuned", family.tuned[0])):
        for path in folder.iterdir():
            client.put_object(Bucket=s3_bucket, Key=f"{name}/{path.name}", Body=path.read_bytes())
    return s3_bucket


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_endpoint) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def linear(*models: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model} for model in models], "parameters": {"weight": 0.5}}


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Result]:
    """Merges with the command line."""

    def run_it(base: str, tuned: str, output: str | None = None, **options: object) -> Result:
        storage = {"stockflow": {"storage": {f"{base.rpartition('/')[0]}/": options}}} if options else {}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(linear(base, tuned) | storage))
        arguments = ["merge", str(tmp_path / "recipe.yaml"), output or str(tmp_path / "out"), "--device", "cpu"]
        return runs.invoke(*arguments, "--quiet")

    return run_it


@pytest.fixture
def told(merge: Callable[..., Result]) -> Told:
    """Returns what a merge that must be refused says, a line of each model; the exit code is 2 or given."""

    def refused(base: str, tuned: str, output: str | None = None, *, code: int = 2, **options: object) -> str:
        result = merge(base, tuned, output, **options)
        assert code == result.exit_code, result.output
        assert result.stderr.startswith("stockflow: ")
        assert result.stderr.count("\n") == 1 + 2 * (tuned == "/no/where"), result.stderr
        return result.stderr

    return refused


@pytest.fixture(params=["obstore", "fsspec"])
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# S3


def test_what_is_refused_here_works_otherwise(merge: Callable[..., Result], bucket: str, client: str) -> None:
    result = merge(f"s3://{bucket}/base", f"s3://{bucket}/tuned", f"s3://{bucket}/out", client=client)

    assert result.exit_code == 0, result.output


def test_a_wrong_bucket_is_called_a_bucket(told: Told, bucket: str, client: str) -> None:
    nowhere = told(f"s3://{bucket}-not/base", f"s3://{bucket}/tuned", client=client)
    no_output = told(f"s3://{bucket}/base", f"s3://{bucket}/tuned", "s3://no-such-output/x")

    assert f"s3://{bucket}-not/base: the bucket does not exist; check its name and the endpoint" in nowhere
    assert "s3://no-such-output/x" in no_output
    assert "the bucket does not exist" in no_output


def test_an_empty_prefix_says_what_was_expected(told: Told, bucket: str, client: str) -> None:
    said = told(f"s3://{bucket}/nothing", f"s3://{bucket}/tuned", client=client)

    assert f"no checkpoint at s3://{bucket}/nothing: the folder does not exist or is empty" in said


def test_an_object_is_not_taken_for_a_folder(told: Told, bucket: str) -> None:
    config = told(f"s3://{bucket}/base/config.json", f"s3://{bucket}/tuned")
    nothing = told(f"s3://{bucket}/base/other.safetensors", f"s3://{bucket}/tuned")

    assert f"s3://{bucket}/base/config.json: it names a file; give the folder it is in" in config
    assert f"no checkpoint at s3://{bucket}/base/other.safetensors: there is no such file; check the name" in nothing


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("denied", "/base: access denied (HTTP 403 AccessDenied Access Denied); the credentials need s3:ListBucket"),
        ("expired", "/base: access denied (HTTP 400 ExpiredToken The provided token has expired.); the credentials"),
        ("elsewhere", "/base: the bucket is in another region than the one asked"),
    ],
)
def test_a_refused_listing_says_why(
    told: Told, proxy: FaultyProxy, bucket: str, client: str, fault: Fault, expected: str
) -> None:
    proxy.fail("GET", fault, times=99)

    assert expected in told(f"s3://{bucket}/base", "/no/where", client=client)


def test_a_refused_file_names_action_and_key(told: Told, proxy: FaultyProxy, bucket: str, client: str) -> None:
    """Listing is allowed, reading is not."""
    proxy.fail("GET", "denied", times=99, after=1)

    said = told(f"s3://{bucket}/base", "/no/where", client=client)

    assert "access denied" in said
    assert f"cannot read s3://{bucket}/base/" in said
    assert "the credentials need s3:GetObject on it" in said


def test_a_refused_write_names_action_and_key(told: Told, proxy: FaultyProxy, bucket: str, client: str) -> None:
    proxy.fail("PUT", "denied", times=99)

    said = told(f"s3://{bucket}/base", f"s3://{bucket}/tuned", f"s3://{bucket}/out", client=client)

    assert f"cannot write s3://{bucket}/out/_stockflow/" in said
    assert "access denied" in said
    assert "the credentials need s3:PutObject on it" in said


def test_rights_that_end_during_a_merge_end_it(told: Told, proxy: FaultyProxy, bucket: str) -> None:
    proxy.outages.append(Outage("put", "out/model.safetensors", "expired"))

    said = told(f"s3://{bucket}/base", f"s3://{bucket}/tuned", f"s3://{bucket}/out")

    assert f"cannot write s3://{bucket}/out/model.safetensors: access denied" in said
    assert "sign in again" in said


def test_no_credentials_is_said_at_once(told: Told, bucket: str, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_session()

    try:
        assert "no AWS credentials found" in told(f"s3://{bucket}/base", "/no/where", client=client)
    finally:
        forget_session()


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_half_a_pair_of_credentials_is_called_one(told: Told, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delenv(missing)
    forget_session()

    try:
        said = told("s3://bucket/base", "/no/where")
    finally:
        forget_session()

    assert f"half of a pair of AWS credentials: {missing} is missing in the environment; set both or none" in said


@pytest.mark.parametrize("status", [401, 403])
def test_an_unsigned_request_is_not_blamed_on_credentials(status: int) -> None:
    said = str(user_error(Failure("denied", status, is_unsigned=True), "read", "s3://bucket/key"))

    assert "`anonymous: true` says" in said
    assert "credentials" not in said


def test_an_endpoint_that_is_down_is_a_storage_failure(
    told: Told, bucket: str, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for module in (objects, fs):
        monkeypatch.setattr(module, "RetryPolicy", QUICK)

    said = told(f"s3://{bucket}/base", f"s3://{bucket}/tuned", code=3, client=client)

    assert f"cannot list s3://{bucket}/base after 2 attempts: " in said
    assert "run again" in said


def test_an_address_that_never_answers_is_given_up_within_a_minute() -> None:
    policy = RetryPolicy()
    pauses_s = sum(min(policy.max_delay_s, policy.first_delay_s * 2.0**number) for number in range(policy.attempts - 1))

    assert policy.attempts * CONNECT_TIMEOUT.total_seconds() + pauses_s < 60


# Elsewhere


def test_google_without_credentials_is_refused_at_once(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{free_port()}")

    assert "no Google credentials found; set GOOGLE_APPLICATION_CREDENTIALS" in told("gs://bucket/base", "/no/where")


def test_azure_without_an_account_names_the_variable(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)

    assert "set AZURE_STORAGE_ACCOUNT_NAME" in told("az://container/base", "/no/where")


@contextmanager
def web_server(handler: type[http.server.SimpleHTTPRequestHandler], folder: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """Python's own server: it lists folders, and ignores ranges."""

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class Ranges(WholeFiles):
    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            super().do_GET()
            return
        whole = Path(self.translate_path(self.path)).read_bytes()
        part = whole[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


def test_a_web_server_is_an_input_only(
    told: Told, merge: Callable[..., Result], family: Family, tmp_path: Path
) -> None:
    with web_server(Ranges, family.base.parent) as url:
        merged = merge(f"{url}/base", f"{url}/tuned-1", str(tmp_path / "from-the-web"))
        refused = told(f"{url}/base", f"{url}/tuned-1", f"{url}/out")
        nothing = told(f"{url}/nothing", f"{url}/tuned-1")
    on_disk = merge(str(family.base), str(family.tuned[0]))

    assert (merged.exit_code, on_disk.exit_code) == (0, 0), merged.output + on_disk.output
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "from-the-web" / file).read_bytes()
    assert "uses http://, which stockflow only reads" in refused
    assert "there is no checkpoint at" in nothing


def test_a_web_server_without_ranges_is_refused(told: Told, family: Family) -> None:
    """It would send a whole file for every range of it."""
    with web_server(WholeFiles, family.base.parent) as url:
        assert "ignores range requests, and stockflow reads parts of files" in told(f"{url}/base", f"{url}/tuned-1")


# The hub


def test_a_model_of_the_hub_is_read_at_the_commit_its_name_stood_for(
    tmp_path: Path, family: Family, merge: Callable[..., Result]
) -> None:
    """In a process of its own: the hub's client reads HF_ENDPOINT when it is imported."""
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(linear("org/base", "hf://org/tuned@main")))
    arguments = command("merge", tmp_path / "hub.yaml", tmp_path / "hub", "--device", "cpu", "--quiet")
    with hub_server({"org/base": family.base, "org/tuned": family.tuned[0]}) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        merged = subprocess.run(arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    on_disk = merge(str(family.base), str(family.tuned[0]))

    assert (merged.returncode, on_disk.exit_code) == (0, 0), merged.stderr + on_disk.output
    manifest, reference = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("hub", "out"))
    assert [f"hf://org/base@{COMMIT}", f"hf://org/tuned@{COMMIT}"] == [ref["url"] for ref in manifest["inputs"]]
    assert reference["files"]["model.safetensors"] == manifest["files"]["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/absent", "cannot read hf://org/absent: no such model, or none HF_TOKEN may see"),
        ("org/base@v9", "cannot read hf://org/base@v9: the model has no such branch, tag or commit"),
        (GATED, f"cannot read hf://{GATED}: accept its conditions at https://huggingface.co/{GATED}"),
    ],
)
def test_a_model_the_hub_refuses_is_named(
    told: Told, family: Family, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    with hub_server({"org/base": family.base}) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)

        assert expected in told(name, str(family.tuned[0]))


def test_a_hub_that_may_not_or_cannot_be_asked_is_named(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_POLICY", QUICK())
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")

    assert "cannot read hf://org/base: the hub did not answer" in told("org/base", "/no/where")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in told("org/base", "/no/where")
