"""The cluster: finding it, starting one on this machine, what it has, and what it is about to lose."""

import glob
import json
import logging
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from stockflow.errors import ComputeLostError, InterruptedRunError, PlanError, StockflowError
from stockflow.interruption import interruption, stop_requested
from stockflow.run.executors.tries import Limits

OBJECT_STORE_BYTES = 100_000_000
"""Only keys and counters pass through Ray."""
PROBE_S = 10.0
"""How long an address may take to answer; ``ray.init`` tries a dead one for minutes (2.60, measured)."""
ITEMS_PER_WORKER = 4
"""With fewer the last ones leave many workers idle."""
_SETTINGS = b"\x04"
"""type of the frame that both sides of HTTP/2 begin with"""


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class RayOptions(Limits):
    """What the executor asks of Ray, and how long it waits and how often it tries."""

    num_workers: int | None = None
    """None: as many as the cluster has room for, also once it has grown; where an autoscaler adds nodes, one to
    four items"""
    gpus_per_worker: float = 0.0
    address: str | None = None
    """None: RAY_ADDRESS, else a cluster on this machine"""
    labels: Mapping[str, str] = field(default_factory=dict)
    """what the nodes of workers are labelled with; values may be Ray's selectors: ``!spot``, ``in(a,b)``"""

    def __post_init__(self) -> None:
        """Refuse what Ray would.

        Raises:
            PlanError: above one, GPUs cannot be shared.
        """
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise PlanError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: expected a fraction of one GPU, or a whole number of them"
            )

    @property
    def need(self) -> str:
        """What a worker needs, in words."""
        labels = "".join(f", label {name}={value}" for name, value in self.labels.items())
        return f"1 CPU and {self.gpus_per_worker:g} GPU{labels}"


@contextmanager
def connected(options: RayOptions, num_items: int) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine; our signal handlers stay in force.

    Raises:
        ComputeLostError: the address is wrong, nothing answers there, or its versions are not ours.
    """
    if ray.is_initialized():
        yield
        return
    address = _address(options)
    where = "on this machine" if address == "local" else f"at {address}"
    try:
        with _handlers_kept():
            if address == "local":
                _start_here(options, num_items)
            else:
                _join(address)
    except StockflowError:
        raise
    except Exception as error:  # a node that does not come up in time is a plain Exception (2.60)
        raise ComputeLostError(
            f"cannot use Ray {where}: {brief(error)}; check that the head is up, and that it has the Ray and "
            f"Python versions of this environment (Ray {ray.__version__})"
        ) from error
    _keep_standard_output_clean()
    try:
        yield
    finally:
        if has_own_node():  # else it would end this process
            ray.shutdown()


@contextmanager
def reached(options: RayOptions, num_items: int) -> Iterator[None]:
    """Be connected to a cluster that is named and can hold a worker; one on this machine is started when items are.

    Raises:
        ComputeLostError: see ``connected`` and ``refuse_impossible``.
    """
    if starts_here(options):
        yield
        return
    with connected(options, num_items):
        refuse_impossible(options, lambda _: None)
        yield


def starts_here(options: RayOptions) -> bool:
    """Return whether connecting starts a cluster on this machine."""
    return not ray.is_initialized() and _address(options) == "local"


def _address(options: RayOptions) -> str:
    return options.address or os.environ.get("RAY_ADDRESS") or "local"


def worker_count(options: RayOptions, num_items: int) -> int:
    """Return how many workers to have in the connected cluster."""
    if options.num_workers:
        return options.num_workers
    if _can_grow():  # workers without a place are what an autoscaler goes by; its own bounds hold
        return -(-num_items // ITEMS_PER_WORKER)
    return max(sum(_slots(node, options) for node in _living_nodes()), 1)


def refuse_impossible(options: RayOptions, on_note: Callable[[str], None]) -> None:
    """Hold what a worker needs against every node there is.

    Raises:
        ComputeLostError: no node could ever hold one, and nothing adds nodes.
    """
    nodes = _living_nodes()
    if any(_slots(node, options) for node in nodes):
        return
    found = f"no node of the cluster can hold a worker: it has {describe_resources()}, a worker needs {options.need}"
    largest = max((_resources(node["Resources"])["GPU"] for node in nodes), default=0.0)
    if options.gpus_per_worker:
        found += f", and the most GPUs on one node are {largest:g}"
    if options.labels:
        labels = sorted({f"{key}={value}" for node in nodes for key, value in node["Labels"].items() if _is_set(key)})
        found += f"; labels there: {', '.join(labels) or 'none'}"
    # A head alone is a cluster whose nodes have not joined yet.
    has_workers = any(_resources(node["Resources"])["CPU"] for node in nodes)
    if has_workers and not _can_grow():
        raise ComputeLostError(f"{found}; ask for less (--gpus-per-worker, --label) or add nodes, then run again")
    on_note(f"{found}; waiting up to {options.no_worker_timeout_s:.0f} s for one that can (--worker-timeout)")


def describe_resources() -> str:
    """Return what the connected cluster has, and how much of it is free, in words."""
    has = _resources(ray.cluster_resources())  # type: ignore[no-untyped-call]
    free = _resources(ray.available_resources())  # type: ignore[no-untyped-call]
    return f"{has['CPU']:g} CPU ({free['CPU']:g} free) and {has['GPU']:g} GPU ({free['GPU']:g} free)"


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that are about to leave."""
    # Ray 2.60 tells it nowhere else. Without the answer pre-empted nodes are only left later.
    nodes: set[str] = set()
    with _optional():
        from ray._private.state import state

        nodes.update(state.get_draining_nodes())
    return frozenset(nodes)


def check_own_node() -> None:
    """See whether the raylet of the driver's node is there: without it Ray ends the driver, with 1 and no word (2.60).

    Raises:
        ComputeLostError: it is gone.
    """
    if not has_own_node():
        raise ComputeLostError(
            f"the Ray node of this driver ended ({os.uname().nodename}: its raylet is gone); start it again, then run "
            "again"
        )


def has_own_node() -> bool:
    """Return whether the raylet of the driver's node answers at its socket; True where it has none to be seen."""
    name = ""
    with _optional():
        from ray._private import worker

        name = str(getattr(worker._global_node, "raylet_socket_name", ""))
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(PROBE_S)
            if name.startswith("/"):
                probe.connect(name)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True
    return True


def _living_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _slots(node: Mapping[str, Any], options: RayOptions) -> int:
    """How many workers fit an empty node."""
    plain = {name: value for name, value in options.labels.items() if not value.startswith(("!", "in(", "!in("))}
    if any(node["Labels"].get(name) != value for name, value in plain.items()):
        return 0
    resources = _resources(node["Resources"])
    slots = int(resources["CPU"])
    if options.gpus_per_worker:
        slots = min(slots, _gpu_slots(resources["GPU"], options.gpus_per_worker))
    return slots


def _is_set(label: str) -> bool:
    """Whether somebody chose it: Ray's own name a node, or say what it is anyway."""
    return not label.startswith("ray.io/") or label in ("ray.io/market-type", "ray.io/accelerator-type")


def _gpu_slots(gpus: float, per_worker: float) -> int:
    """How many workers fit GPUs; a worker on a fraction of one does not reach over two."""
    if per_worker >= 1:
        return int(gpus / per_worker)
    return int(gpus) * int(1 / per_worker + 1e-9)


def _can_grow() -> bool:
    """Whether an autoscaler adds nodes to the cluster."""
    # Version 2 of it (KubeRay's default) says that it is there. Version 1 runs everywhere, to report; where it adds
    # none the types of nodes are made up from their ids (2.60). Without an answer the cluster stays as it is.
    can_grow = False
    with _optional():
        from ray.autoscaler.v2.utils import is_autoscaler_v2
        from ray.experimental.internal_kv import _internal_kv_get

        can_grow = is_autoscaler_v2(fetch_from_server=True)
        if not can_grow:
            status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
            can_grow = any(not kind.startswith("node_") for kind in status["autoscaler_report"]["active_nodes"])
    return can_grow


@contextmanager
def _optional() -> Iterator[None]:
    """Go on if Ray does not answer, or not as it does in 2.60; a signal that comes meanwhile still ends the run."""
    try:
        yield
    except InterruptedRunError:
        raise
    except Exception:
        if stop_requested():  # Ray turns what is raised within it into errors of its own
            raise


def brief(error: BaseException) -> str:
    """Return the first and the last line of an error: what Ray says of it, and the cause."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    text = text.partition(" Some common causes include")[0]  # three guesses of Ray's, whatever happened
    return text.removesuffix(".") if len(text) <= 500 else f"{text[:500]}..."


def _join(address: str) -> None:
    if address.startswith(("http://", "https://", "ray://")):
        raise ComputeLostError(
            f"RAY_ADDRESS is {address}: a merge runs inside the cluster. Submit it as a job (`stockflow submit ... "
            "--address http://HEAD:8265`), or name the head itself as HOST:6379"
        )
    if ":" in address and not os.environ.get("RAY_USE_TLS"):
        _probe(address)
        _check_token(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except RuntimeError as error:
        if "Version mismatch" in str(error):  # its lines are the two versions
            raise RuntimeError(" ".join(str(error).split())) from None
        raise


def _probe(address: str) -> None:
    """See whether a gRPC server listens, by the first frame of HTTP/2."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ValueError("expected HOST:PORT")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5)
        header = connection.recv(9)
    if header[3:4] != _SETTINGS:
        raise ConnectionError(
            "what answers there is not the head of a Ray cluster; expected its GCS port, 6379 by default"
        )


def _check_token(address: str) -> None:
    """Ask the head for something: ``ray.init`` takes 20 s to say that a token is wrong, and does not say it (2.60)."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    try:
        GcsClient(address=address).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=PROBE_S)
    except AuthenticationError:
        raise ComputeLostError(token_refused(address)) from None


def token_refused(address: str) -> str:
    """Return in words that a cluster does not accept the token of this process, and what to set."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return (
        f"the cluster at {address} does not accept this token (RAY_AUTH_MODE is {mode}): set RAY_AUTH_MODE=token, "
        "and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to the token of the cluster"
    )


def _start_here(options: RayOptions, num_items: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a merge tells nobody that it ran
    workers = options.num_workers or min(len(os.sched_getaffinity(0)), num_items)
    # Without a GPU the numbers are logical; with one Ray counts the devices itself, so that none is named twice.
    gpus = None if _has_gpus() or not options.gpus_per_worker else math.ceil(options.gpus_per_worker * workers)
    ray.init(
        address="local",
        num_cpus=workers,
        num_gpus=gpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    if _resources(ray.cluster_resources())["GPU"] < options.gpus_per_worker:  # type: ignore[no-untyped-call]
        resources = describe_resources()
        ray.shutdown()
        raise ComputeLostError(f"this machine has {resources}, a worker needs {options.gpus_per_worker:g} GPU")


def _keep_standard_output_clean() -> None:
    """Keep Ray from printing there that a worker died: with ``--json`` that is where the result goes."""
    # Ray 2.60 prints it even with log_to_driver=False and has no public switch; without this one it prints.
    with _optional():
        from ray._private import worker

        worker._worker_logs_enabled = False


def _has_gpus() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/kfd")


def _resources(reported: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(reported.get(name, 0.0)) for name in ("CPU", "GPU")}


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put back the signal handlers that ``ray.init`` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    was_stopped = False
    try:
        yield
    except SystemExit:  # from Ray's own handler of SIGTERM
        was_stopped = True
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if was_stopped:
        if stop_requested():  # the signal that Ray's handler took was seen: another one would end the process at once
            raise interruption(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
