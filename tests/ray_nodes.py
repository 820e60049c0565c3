"""Ray nodes on this machine, each as `ray start` makes it, and the death of one: all its processes at once.

Every process of a node carries a mark in its environment. Only what carries our mark is killed, so other clusters on
the machine are left alone, and nothing of ours stays behind.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError

from tests.s3_server import free_port

SCRIPTS = Path(sys.executable).parent
MARK = "STOCKFLOW_TEST_NODE"
STORE_BYTES = 80_000_000
UP_S = 90.0


@dataclass
class Node:
    """One `ray start --block` and whatever it started."""

    mark: str
    process: "subprocess.Popen[bytes]"
    metrics_port: int

    def metrics(self) -> str:
        """Return what Prometheus would read from the node."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def processes(self) -> list[int]:
        """Return the ids of all processes of the node, those of jobs and workers included."""
        return marked(self.mark)

    def kill(self) -> int:
        """Let the machine lose its power: no process gets to say anything. Return how many there were."""
        killed = 0
        while ids := self.processes():
            for process_id in ids:
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
                    killed += 1
            time.sleep(0.05)
        self.process.wait()
        return killed


@dataclass
class Cluster:
    """A head without CPUs and nodes with one each, on free ports, asked for a token."""

    folder: Path
    environment: Mapping[str, str]
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    nodes: list[Node] = field(default_factory=list)
    gcs_port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def url(self) -> str:
        """Where the job API listens."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What a user of the cluster has in the environment: the token, and no cluster of another."""
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        return {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"} | ours

    def start_head(self) -> Node:
        """Start the head and wait until its job API answers."""
        dashboard = ("--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}")
        node = self._start("--head", f"--port={self.gcs_port}", "--num-cpus=0", *dashboard)
        self._wait(node, lambda: self.ask("/api/version")[0] == 200)
        return node

    def add_node(self) -> Node:
        """Start one more node with one CPU and wait until it serves its metrics."""
        node = self._start(f"--address={_own_address()}:{self.gcs_port}", "--num-cpus=1")
        self._wait(node, lambda: bool(node.metrics()))
        return node

    def ask(self, path: str, token: str | None = None) -> tuple[int, str]:
        """Return status and body of what the head answers; ``token`` instead of ours."""
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def stop(self) -> None:
        """End every process of every node; ask first, then insist."""
        for node in reversed(self.nodes):
            node.process.terminate()
        for node in self.nodes:
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(timeout=15)
            node.kill()

    def _start(self, *options: str) -> Node:
        node_folder = self.folder / f"n{len(self.nodes)}"
        node_folder.mkdir()
        mark, metrics_port = f"{self.mark}-{len(self.nodes)}", free_port()
        command = [
            *(str(SCRIPTS / "ray"), "start", "--block", "--disable-usage-stats", *options),
            *(f"--temp-dir={node_folder}", f"--object-store-memory={STORE_BYTES}"),
            *(f"--metrics-export-port={metrics_port}", f"--dashboard-agent-listen-port={free_port()}"),
            f"--runtime-env-agent-port={free_port()}",
        ]
        environment = self.client_environment | {
            MARK: mark,
            "TMPDIR": str(node_folder),  # what a killed process leaves is removed with the cluster
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # A job finds its command in the PATH of the process that ran `ray start`.
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        }
        with open(node_folder / "start.log", "wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        node = Node(mark, process, metrics_port)
        self.nodes.append(node)
        return node

    def _wait(self, node: Node, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline and node.process.poll() is None:
            with suppress(URLError, OSError):
                if is_up():
                    return
            time.sleep(0.2)
        log = self.folder / f"n{self.nodes.index(node)}" / "start.log"
        raise RuntimeError(f"a Ray node did not come up within {UP_S:.0f} s:\n{log.read_text()[-3000:]}")


@contextmanager
def cluster(environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Give a cluster without nodes; whatever is started in it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="sf-ray-", dir="/tmp"))  # short: paths of sockets end at 107 bytes
    made = Cluster(folder, environment)
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def marked(mark: str) -> list[int]:
    """Return the ids of the processes whose environment carries ``mark``."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _own_address() -> str:
    """Return the address that Ray takes for this machine's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))  # nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
