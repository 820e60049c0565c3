"""The cluster: finding it, starting one on this machine, what it has, and what it is about to lose."""

import glob
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from stockflow.errors import ComputeLostError

OBJECT_STORE_BYTES = 100_000_000
"""Only keys and counters pass through Ray."""
PROBE_S = 10.0
"""How long an address may take to answer; ``ray.init`` tries a dead one for minutes (2.60, measured)."""
_SETTINGS = b"\x04"
"""type of the frame that both sides of HTTP/2 begin with"""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What the executor asks of Ray."""

    num_workers: int | None = None
    """None: one per GPU if GPUs are asked for, else one per CPU of the cluster"""
    gpus_per_worker: float = 0.0
    address: str | None = None
    """None: RAY_ADDRESS, else a cluster on this machine"""
    no_worker_timeout_s: float = 900.0
    """how long to wait for the first worker, and for a next one once all are lost; a GPU node takes minutes"""
    stall_timeout_s: float = 900.0
    """an item that counts nothing for so long is taken for hung; its worker is replaced"""


@contextmanager
def connected(options: RayOptions, num_items: int) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine; our signal handlers stay in force.

    Raises:
        ComputeLostError: the address is wrong, nothing answers there, or its versions are not ours.
    """
    if ray.is_initialized():
        yield
        return
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    where = "on this machine" if address == "local" else f"at {address}"
    try:
        with _handlers_kept():
            if address == "local":
                _start_here(options, num_items)
            else:
                _join(address)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ComputeLostError):
            raise
        raise ComputeLostError(
            f"cannot use Ray {where}: {brief(error)}; check that the head is up, and that it has the Ray and "
            f"Python versions of this environment (Ray {ray.__version__})"
        ) from error
    _keep_standard_output_clean()
    try:
        yield
    finally:
        ray.shutdown()


def worker_count(options: RayOptions) -> int:
    """Return how many workers to start in the connected cluster."""
    if options.num_workers:
        return options.num_workers
    resources = _resources(ray.cluster_resources())  # type: ignore[no-untyped-call]
    slots = resources["CPU"]
    if options.gpus_per_worker:
        slots = min(slots, resources["GPU"] / options.gpus_per_worker)
    return max(int(slots), 1)


def describe_resources() -> str:
    """Return what the connected cluster has, and how much of it is free, in words."""
    has = _resources(ray.cluster_resources())  # type: ignore[no-untyped-call]
    free = _resources(ray.available_resources())  # type: ignore[no-untyped-call]
    return f"{has['CPU']:g} CPU ({free['CPU']:g} free) and {has['GPU']:g} GPU ({free['GPU']:g} free)"


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that are about to leave."""
    # Ray 2.60 tells it nowhere else. Without the answer pre-empted nodes are only left later.
    with suppress(Exception):
        from ray._private.state import state

        return frozenset(state.get_draining_nodes())
    return frozenset()


def brief(error: BaseException) -> str:
    """Return the first and the last line of an error: what Ray says of it, and the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return text.removesuffix(".") if len(text) <= 500 else f"{text[:500]}..."


def _join(address: str) -> None:
    if address.startswith(("http://", "https://", "ray://")):
        raise ComputeLostError(
            f"RAY_ADDRESS is {address}: a merge runs inside the cluster. Submit it as a job (`ray job submit --address "
            "http://HEAD:8265 -- stockflow merge ...`), or name the head itself as HOST:6379"
        )
    if ":" in address and not os.environ.get("RAY_USE_TLS"):
        _probe(address)
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
    with suppress(Exception):
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
        signal.raise_signal(signal.SIGTERM)
