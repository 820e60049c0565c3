"""No secret in anything a merge leaves behind or says: planted, and looked for everywhere afterwards."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import boto3
import pytest
import torch
import typer
import yaml

from stockflow.cli.exits import exit_codes
from stockflow.storage import fs, objects
from stockflow.storage.retry import RetryPolicy
from stockflow.storage.s3 import forget_session
from tests import runs
from tests.checkpoints import Family, make_family
from tests.runs import REPOSITORY, command
from tests.s3_server import FORBIDDEN, free_port
from tests.selection import mostly_slow

CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYACCESS0001",
    "AWS_SECRET_ACCESS_KEY": "canary/Secret+Access/Key0002=",
    "AWS_SESSION_TOKEN": "canarySessionToken0003//abc+def==",
    "HF_TOKEN": "hf_canaryHubToken0004",
    "AZURE_STORAGE_ACCOUNT_KEY": "canaryAzureKey0005==",
    "GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "canaryGoogleKey0006"}',
    "STORAGE_API_TOKEN": "canaryOtherToken0007",
}
"""in the environment of every merge here"""
IN_URLS = {"user": "canaryUser0008", "password": "canary/Password0009", "signature": "canarySignature0010"}
NEEDLES = tuple(
    form.encode()
    for secret in (*CANARIES.values(), "canaryGoogleKey0006", *IN_URLS.values(), "Secret+Access", "Password0009")
    for form in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
)
ANSWERS = {
    "denied": (403, "AccessDenied"),
    "wrong key": (403, "InvalidAccessKeyId"),
    "wrong secret": (403, "SignatureDoesNotMatch"),
    "expired": (400, "ExpiredToken"),
    "no bucket": (404, "NoSuchBucket"),
    "malformed": (400, "InvalidRequest"),
    "broken": (500, "InternalError"),
}


class _Telltale(BaseHTTPRequestHandler):
    """A store that refuses everything and repeats in its answer all it was told, as some do."""

    answer: tuple[int, str]

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, code = self.answer
        told = " ".join(CANARIES.values()) + f" at https://host{self.path}?X-Amz-Signature={IN_URLS['signature']} "
        told += "; ".join(f"{name}: {value}" for name, value in self.headers.items())
        message = told.replace("&", "&amp;").replace("<", "&lt;")
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _refuse


@contextmanager
def telltale(answer: tuple[int, str]) -> Iterator[str]:
    handler = type("Handler", (_Telltale,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("models"), 2, {"a.weight": (33, 65), "b.weight": (129,)})


def recipe_of(path: Path, base: str, *models: str, **storage: Mapping[str, Any]) -> Path:
    """A recipe with secrets where a user might leave them: in comments."""
    recipe: dict[str, Any] = {"merge_method": "model_stock", "base_model": base}
    recipe["models"] = [{"model": model} for model in models]
    if storage:
        recipe["stockflow"] = {"storage": {f"s3://{bucket}/": options for bucket, options in storage.items()}}
    user, password, signature = IN_URLS.values()
    path.write_text(
        f"# was s3://{user}:{password}@bucket/base\n# or https://{user}@host/x, https://host/x?sig={signature}\n"
        + yaml.safe_dump(recipe)
    )
    return path


def merged(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with all canaries in its environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in FORBIDDEN}
    return subprocess.run(
        command(*arguments), cwd=REPOSITORY, env=inherited | CANARIES | environment, capture_output=True, check=False
    )


def leaks(*places: Path | bytes) -> list[str]:
    """Return every canary in the given texts and files, and in all files below the given folders."""
    texts: dict[str, bytes] = {}
    for number, place in enumerate(places):
        if isinstance(place, bytes):
            texts[f"text {number}"] = place
        else:
            texts |= {str(path): path.read_bytes() for path in (place, *place.rglob("*")) if path.is_file()}
    return [f"{name}: {needle.decode()}" for name, text in texts.items() for needle in NEEDLES if needle in text]


def said(finished: subprocess.CompletedProcess[bytes]) -> bytes:
    return finished.stdout + finished.stderr


def upload(s3_endpoint: str, bucket: str, family: Family) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            client.put_object(Bucket=bucket, Key=f"{folder.name}/{path.name}", Body=path.read_bytes())


def downloaded(s3_endpoint: str, bucket: str, prefix: str, folder: Path) -> Path:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            path = folder / entry["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read())
    return folder


def test_what_is_looked_for_would_be_found(tmp_path: Path) -> None:
    for secret in (*CANARIES.values(), *IN_URLS.values()):
        (tmp_path / "left").write_text(f"x{secret}y")

        assert leaks(tmp_path)
        assert leaks(tmp_path / "left")
        assert leaks(secret.encode())


def test_a_merge_on_disk_leaves_no_secret(family: Family, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "recipe.yaml", str(family.base), *map(str, family.tuned))

    finished = merged("merge", recipe, tmp_path / "out", "--json", "--device", "cpu")
    again = merged("merge", recipe, tmp_path / "out", "--device", "cpu")
    planned = merged("plan", recipe, tmp_path / "out", "--json")
    verified = merged("verify", tmp_path / "out", "--inputs", "--json")

    assert [run.returncode for run in (finished, again, planned, verified)] == [0] * 4, said(finished)
    assert leaks(tmp_path / "out", *map(said, (finished, again, planned, verified))) == []
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "# was s3://bucket/base" in manifest["recipe"]
    assert {"manifest.json", "README.md", "claim.json", "plan.json"} <= {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("client", mostly_slow(["obstore", "fsspec"], ["fsspec"]))
def test_a_merge_on_s3_leaves_no_secret(
    client: str, family: Family, s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    upload(s3_endpoint, s3_bucket, family)
    models = [f"s3://{s3_bucket}/{folder.name}" for folder in (family.base, *family.tuned)]
    recipe = recipe_of(tmp_path / "recipe.yaml", *models, **{s3_bucket: {"client": client}})

    finished = merged("merge", recipe, f"s3://{s3_bucket}/out", "--device", "cpu", AWS_ENDPOINT_URL=s3_endpoint)

    assert finished.returncode == 0, said(finished)
    left = downloaded(s3_endpoint, s3_bucket, "out/", tmp_path / "left")
    assert (left / "out" / "manifest.json").exists()
    assert leaks(left, said(finished)) == []


@pytest.mark.parametrize(
    ("refusal", "client"),
    [
        *((refusal, "obstore") for refusal in ANSWERS),
        *(("broken", "fsspec"), ("wrong secret", "fsspec")),
        *(
            pytest.param(refusal, "fsspec", marks=pytest.mark.slow)
            for refusal in ANSWERS
            if refusal not in ("broken", "wrong secret")
        ),
    ],
)
def test_a_store_that_repeats_what_it_was_told_is_not_quoted(
    refusal: str, client: str, family: Family, tmp_path: Path, in_this_process: Callable[..., str]
) -> None:
    with telltale(ANSWERS[refusal]) as url:
        for base, output in (("s3://bucket/base", str(tmp_path / "out")), (str(family.base), "s3://bucket/out")):
            recipe = recipe_of(tmp_path / "recipe.yaml", base, *map(str, family.tuned), bucket={"client": client})

            told = in_this_process("merge", str(recipe), output, AWS_ENDPOINT_URL=url)

            assert told.startswith("stockflow: cannot")
            assert leaks(told.encode(), tmp_path / "out") == []


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Runs a command that must fail, with canaries in the environment and few attempts; returns what it said."""
    for name in FORBIDDEN:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**CANARIES, "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    for module in (objects, fs):
        monkeypatch.setattr(module, "RetryPolicy", partial(RetryPolicy, attempts=2, first_delay_s=0.01))

    def run(*arguments: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        forget_session()
        finished = runs.invoke(*arguments, "--quiet")
        assert finished.exit_code in (2, 3), finished.output
        return finished.stderr

    yield run
    monkeypatch.undo()
    forget_session()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_endpoint_out_of_reach_is_named_without_its_password(
    scheme: str, family: Family, tmp_path: Path, in_this_process: Callable[..., str]
) -> None:
    user, password, _ = IN_URLS.values()
    recipe = recipe_of(tmp_path / "recipe.yaml", "s3://bucket/base", *map(str, family.tuned))
    secret = quote(password, safe="")
    for endpoint in (f"{scheme}://{user}:{secret}@127.0.0.1:{free_port()}", f"{user}:{password}@127.0.0.1:9000"):
        told = in_this_process("merge", str(recipe), str(tmp_path / "out"), AWS_ENDPOINT_URL=endpoint)

        assert told.startswith("stockflow: ")
        assert leaks(told.encode()) == []


def test_a_secret_on_the_command_line_is_refused_before_anything_hears_of_it(
    family: Family, tmp_path: Path, in_this_process: Callable[..., str]
) -> None:
    user, password, signature = IN_URLS.values()
    recipe = str(recipe_of(tmp_path / "recipe.yaml", str(family.base), *map(str, family.tuned)))
    for place in (
        f"s3://{user}:{password}@bucket/x",
        f"https://{user}:{quote(password, safe='')}@127.0.0.1:1/x",
        f"https://127.0.0.1:1/x?X-Amz-Signature={signature}",
        f"s3://bucket/x?X-Amz-Signature={signature}",
        f"gs://{user}:{password}@bucket/x",
        f"hf://{user}:{password}@org/x",
    ):
        for arguments in (["merge", recipe, place], ["merge", place, str(tmp_path / "o")], ["verify", place]):
            told = in_this_process(*arguments)

            assert re.search("carries a user and a password|came with a query", told), told
            assert leaks(told.encode()) == []
    assert not (tmp_path / "o").exists()


def test_a_bug_is_printed_without_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])

    with pytest.raises(typer.Exit), exit_codes():
        raise RuntimeError(f"GET https://{IN_URLS['user']}:x@host/?{IN_URLS['signature']} by {CANARIES['HF_TOKEN']}")

    told = capsys.readouterr().err
    assert "RuntimeError" in told
    assert "please report" in told
    assert leaks(told.encode()) == []


MERGES_ON_RAY = """
import json, sys
import ray
from typer.testing import CliRunner
from stockflow.cli import app
from stockflow.run.executors.ray import RayOptions, connected
with connected(RayOptions(num_workers=1), 2):
    for place in sys.argv[2:]:
        merge = ["merge", *place.split(), "--executor", "ray", "--workers", "1", "--device", "cpu"]
        finished = CliRunner().invoke(app, merge)
        print(finished.exit_code, finished.output)
    from ray._private.state import state
    from ray._private.worker import global_worker
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
    state._connect_and_get_accessor()
    tables = [state.job_table(), state.actor_table(None), state.node_table()]
    stored = [(key, _internal_kv_get(key)) for key in _internal_kv_list(b"")]
    session = global_worker.node.get_session_dir_path()
with open(sys.argv[1], "w") as dump:
    json.dump({"session": session, "tables": repr(tables), "stored": repr(stored)}, dump)
"""
"""Merges on one local cluster, and writes down what Ray knows in the end."""


@pytest.mark.slow
def test_a_merge_on_ray_leaves_no_secret_in_ray_either(
    family: Family, s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    """One that ends well, one that fails in a worker, one in the driver: Ray's tables, what it stores, every log."""
    upload(s3_endpoint, s3_bucket, family)
    models = [f"s3://{s3_bucket}/{folder.name}" for folder in (family.base, *family.tuned)]
    recipe = recipe_of(tmp_path / "recipe.yaml", *models)
    infinite = make_family(tmp_path / "infinite", 2, {"a.weight": (33, 65)}, torch.float32, base_scale=1e39)
    failing = recipe_of(tmp_path / "failing.yaml", str(infinite.base), *map(str, infinite.tuned))
    dump = tmp_path / "ray.json"
    merges = [
        f"{recipe} s3://{s3_bucket}/out",
        f"{failing} s3://{s3_bucket}/failed",
        f"{recipe} s3://no-such-bucket/out",
    ]
    inherited = {name: value for name, value in os.environ.items() if name not in (*FORBIDDEN, "RAY_ADDRESS")}

    finished = subprocess.run(
        [sys.executable, "-c", MERGES_ON_RAY, dump, *merges],
        cwd=REPOSITORY, env=inherited | CANARIES | {"AWS_ENDPOINT_URL": s3_endpoint}, capture_output=True, check=False,
    )  # fmt: skip

    assert [line[:2] for line in said(finished).splitlines() if line[:2] in (b"0 ", b"2 ")] == [b"0 ", b"2 ", b"2 "]
    assert b"has NaN or infinity" in said(finished)
    known = json.loads(dump.read_text())
    logs = Path(known["session"], "logs")
    assert "no-such-bucket" in known["tables"], "the job table holds the command line"
    assert len([path for path in logs.rglob("*") if path.is_file()]) > 5
    left = downloaded(s3_endpoint, s3_bucket, "", tmp_path / "left")
    assert (left / "out" / "manifest.json").exists()
    assert not (left / "failed" / "manifest.json").exists()
    assert leaks(dump, logs, left, said(finished)) == []
