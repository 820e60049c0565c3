"""A real S3 server on loopback (moto), and the credentials of the test servers."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stockflow.storage.s3 import forget_session
from tests.fault_proxy import Fault as Fault
from tests.fault_proxy import FaultyProxy as FaultyProxy

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIASTOCKFLOWTEST",
    "AWS_SECRET_ACCESS_KEY": "stockflow-test-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
FORBIDDEN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE")
"""variables of the developer's own that must not reach a test"""


@contextmanager
def s3_credentials() -> Iterator[None]:
    """Put the credentials of the test servers, and nothing of the developer's own, into the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FORBIDDEN:
            patch.delenv(name, raising=False)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        forget_session()
        yield


@contextmanager
def moto_server() -> Iterator[str]:
    """Run ``moto_server`` on a free port and give its URL. Keep objects small: it copies them for each range."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # Real servers list a thousand names at a time; five make every listing go on past its first page. Their parts
    # have 5 MiB or more; with less a small shard is an upload of several.
    environment = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "5", "S3_UPLOAD_PART_MIN_SIZE": str(1 << 20)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()  # it keeps nothing
        process.wait()


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"moto_server did not come up on port {port} (exit code {process.poll()})")
