"""A real Ceph object gateway on loopback: it checks signatures, and means its 412."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.s3_server import CREDENTIALS, free_port

PACKAGES = "ceph-mon ceph-osd ceph-mgr ceph-common radosgw"
BINARIES = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_START_S = 60
_STOP_S = 10

# Without cephx radosgw hangs (-13). One copy on one OSD in memory, no manager: nothing here outlives the tests.
# What is deleted or replaced is freed within seconds, not hours, as memory is what it lies in.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket =
crash dir = {folder}
log file = {folder}/$name.log
log to stderr = false
mon cluster log file = {folder}/cluster.log
mon data = {folder}/mon
mon allow pool size one = true
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd pool default size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class load list = *
osd class default list = *
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw gc obj min wait = 2
rgw gc processor period = 2
rgw gc processor max time = 2
"""


def missing_binaries() -> list[str]:
    """Return the programs of Ceph that are not installed here."""
    return [name for name in BINARIES if shutil.which(name) is None]


@contextmanager
def ceph_gateway(*, memory_bytes: int = 4 << 30) -> Iterator[str]:
    """Run a monitor, an OSD and a gateway with a user for ``CREDENTIALS``, give the gateway's URL, stop them all.

    ``memory_bytes`` is what the objects may take; no more is used than they do.
    """
    # Not pytest's folder: paths of Unix sockets end at 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))
    rgw_port = free_port()
    url = f"http://127.0.0.1:{rgw_port}"
    cluster = _Cluster(folder)
    try:
        with ExitStack() as stack:
            cluster.configure(rgw_port, memory_bytes)
            stack.enter_context(cluster.monitor())
            stack.enter_context(cluster.osd())
            # The user first: the pools are made by whoever comes first, and two would race.
            cluster.add_user(CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
            gateway = stack.enter_context(cluster.daemon("radosgw", "-n", "client.admin"))
            cluster.wait_for(rgw_port, gateway)
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Cluster:
    """The files of one cluster, and the programs that work on them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._configuration = folder / "ceph.conf"
        self._keyring = folder / "keyring"

    def configure(self, rgw_port: int, memory_bytes: int) -> None:
        """Write configuration, keys and the monitor's map and store."""
        fsid, mon_port = uuid.uuid4(), free_port()
        self._configuration.write_text(
            _CONFIGURATION.format(
                fsid=fsid, mon_port=mon_port, folder=self._folder, memory_bytes=memory_bytes, rgw_port=rgw_port
            )
        )
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        self._run(
            "ceph-authtool", "--create-keyring", self._keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        rights = [word for service in ("mon", "osd", "mgr") for word in ("--cap", service, "allow *")]
        self._run("ceph-authtool", self._keyring, "--gen-key", "-n", "client.admin", *rights)
        address = f"[v2:127.0.0.1:{mon_port}]"
        monmap = self._folder / "monmap"
        self._run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap)
        self._ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", self._keyring)

    @contextmanager
    def monitor(self) -> Iterator[None]:
        """Run the monitor."""
        with self.daemon("ceph-mon", "-i", "a"):
            yield

    @contextmanager
    def osd(self) -> Iterator[None]:
        """Make the one OSD known to the monitor, and run it."""
        key = self._run("ceph-authtool", "--gen-print-key").strip()
        self._run("ceph-authtool", self._keyring, "-n", "osd.0", "--add-key", key)
        number = uuid.uuid4()
        self._ceph("ceph", "osd", "new", number, "-i", "-", given=f'{{"cephx_secret": "{key}"}}')
        self._ceph("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number)
        with self.daemon("ceph-osd", "-i", "0"):
            yield

    def add_user(self, access_key: str, secret_key: str) -> None:
        """Create the user of the tests."""
        keys = (f"--access-key={access_key}", f"--secret-key={secret_key}")
        self._ceph("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)

    @contextmanager
    def daemon(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one daemon in the foreground of a process of ours, and end it."""
        process = subprocess.Popen(
            [*command, "-c", str(self._configuration), "-f"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait_for(self, port: int, process: subprocess.Popen[bytes]) -> None:
        """Return when something listens on ``port``, which ``process`` is to open."""
        deadline = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        logs = "".join(path.read_text(errors="replace")[-1000:] for path in sorted(self._folder.glob("*.log")))
        raise RuntimeError(f"{process.args!r} did not come up (exit code {process.poll()}):\n{logs}")

    def _ceph(self, program: str, *arguments: object, given: str = "") -> str:
        return self._run(program, "-c", self._configuration, *arguments, given=given)

    def _run(self, *command: object, given: str = "") -> str:
        # Their Python is Debian's, not ours.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        finished = subprocess.run(
            [str(word) for word in command],
            input=given,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        if finished.returncode:
            raise RuntimeError(f"{command[0]} failed with {finished.returncode}: {finished.stderr[-2000:]}")
        return finished.stdout
