"""What ``stockflow plan`` answers: what a merge will read, write, hold, take and cost; in words and for programs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stockflow.forecast.amounts import Requests, Workload, requests_of
from stockflow.forecast.calibration import Calibration
from stockflow.forecast.pagecache import cached_share
from stockflow.forecast.prediction import SHORT_STAGES, STAGES, Conditions, Model, Prediction
from stockflow.forecast.prices import Cost, Prices, TransferFrom, cost_of, machine_of
from stockflow.planning.plan import MergePlan
from stockflow.storage import LocalStore, Store, redact

SHOWN_STAGES = 4
SHOWN_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Forecast:
    """Time and money."""

    prediction: Prediction
    requests: Sequence[tuple[str, Requests]]
    """by URL: the inputs, then the output"""
    cost: Cost
    prices: Prices
    machine: str | None
    num_machines: int
    conditions: Conditions
    sources: tuple[str, ...]
    """where the model's constants are from, and what was assumed"""


def forecast(
    plan: MergePlan,
    work: Workload,
    output: str,
    conditions: Conditions,
    *,
    direct: bool,
    calibration: tuple[Calibration, str],
    prices: Prices,
    machine: str | None,
    transfer: TransferFrom,
    memory_bytes: int,
) -> Forecast:
    """Return what a merge will take and cost.

    Args:
        plan: what is to be merged.
        work: what that asks for.
        output: URL of the output.
        conditions: workers and networks.
        direct: see ``Workspace``.
        calibration: the model's constants, and where they are from.
        prices: the table of prices.
        machine: kind of machine in that table; None: machines cost nothing.
        transfer: where the machines are, seen from the inputs.
        memory_bytes: of one worker.

    Raises:
        RecipeError: the prices lack a store or the machine.
    """
    constants, where = calibration
    inputs = [checkpoint.url for checkpoint in plan.checkpoints]
    prediction = Model(constants, inputs, output, conditions, direct).predict(work)
    by_input, by_output = requests_of(work, inputs, prediction.seconds)
    requests = [*zip(inputs, by_input, strict=True), (output, by_output)]
    num_machines = _num_machines(prices, machine, conditions, memory_bytes) if machine else 0
    cost = cost_of(
        prices,
        requests,
        transfer=transfer,
        machine=machine,
        num_machines=num_machines,
        seconds=prediction.seconds,
    )
    sources = (where, *_assumptions(constants, (*inputs, output), conditions))
    return Forecast(prediction, requests, cost, prices, machine, num_machines, conditions, sources)


def cold_share(plan: MergePlan, stores: Sequence[Store]) -> float:
    """Return how much of the local inputs is not in memory: by a sample of their pages, weighed by size."""
    cold = total = 0.0
    for checkpoint, store in zip(plan.checkpoints, stores, strict=True):
        if isinstance(store, LocalStore):
            for file, stamp in checkpoint.files.items():
                cached = _cached_share(store, file)
                total += stamp.size
                cold += stamp.size * (0.0 if cached is None else 1.0 - cached)
    return cold / total if total else 0.0


def _cached_share(store: LocalStore, file: str) -> float | None:
    try:
        with store.opened(file) as descriptor:
            return cached_share(descriptor)
    except OSError:  # gone since it was planned: the merge will say so
        return None


def _num_machines(prices: Prices, name: str, conditions: Conditions, memory_bytes: int) -> int:
    """As many as have room for all workers, by cores and by memory."""
    machine = machine_of(prices, name)
    if not conditions.on_ray:
        return 1
    fitting = min(machine.cores // conditions.num_threads, int(machine.memory_gib * 2**30 // memory_bytes))
    return -(-conditions.num_workers // max(fitting, 1))


def _assumptions(calibration: Calibration, urls: Sequence[str], conditions: Conditions) -> Iterator[str]:
    seen: set[str] = set()
    for url in urls:
        place, is_measured = calibration.place(url)
        root = redact("/".join(url.split("/")[:3])) if "://" in url else os.path.dirname(url)
        if is_measured or root in seen or (place.is_local and place.name):  # then the machine is another one anyway
            continue
        seen.add(root)
        option = "--folder" if place.is_local else "--url"
        yield (
            f"{root} was not measured: taken to be like {place.name or redact(place.url)}; "
            f"`stockflow calibrate {option} {root}` measures it"
        )
    if conditions.cold_share:
        yield f"{conditions.cold_share:.0%} of the local inputs must come from the disk, the rest is in memory"


def forecast_facts(found: Forecast) -> dict[str, object]:
    """Return it for programs."""
    prediction, cost = found.prediction, found.cost
    return {
        "seconds": prediction.seconds,
        "phases": {phase.name: phase.seconds for phase in prediction.phases},
        "stages": dict(prediction.stages),
        "bottleneck": prediction.bottleneck,
        "bottleneck_in_words": STAGES[prediction.bottleneck],
        "workers": found.conditions.num_workers,
        "threads_per_worker": found.conditions.num_threads,
        "cold_share": found.conditions.cold_share,
        "cost": {
            "currency": found.prices.currency,
            "requests": cost.requests,
            "transfer": cost.transfer,
            "machines": cost.machines,
            "total": cost.total,
            "storage_per_month": cost.storage_per_month,
            "machine": found.machine,
            "num_machines": found.num_machines,
            "prices": found.prices.source,
        },
        "store_requests": [
            {"url": redact(url), "gets": asked.gets, "puts": asked.puts, "bytes_out": asked.bytes_out}
            for url, asked in found.requests
        ],
        "sources": list(found.sources),
    }


def forecast_lines(found: Forecast) -> Iterator[str]:
    """Yield it line by line, for people."""
    prediction, conditions = found.prediction, found.conditions
    workers = _counted(conditions.num_workers, "worker") if conditions.on_ray else "one process"
    each = " each" if conditions.num_workers > 1 else ""
    parts = ", ".join(
        f"{phase.name} {duration(phase.seconds)}" for phase in prediction.phases if phase.seconds >= 0.005
    )
    threads = _counted(conditions.num_threads, "thread")
    yield f"  time    about {duration(prediction.seconds)} by {workers} of {threads}{each}: {parts}"
    yield f"  limit   {STAGES[prediction.bottleneck]}; side by side: {_stages(prediction.stages)}"
    yield from _cost_lines(found)
    for source in found.sources:
        yield f"  model   {source}"


def _cost_lines(found: Forecast) -> Iterator[str]:
    cost, unit = found.cost, found.prices.currency
    if not (cost.total or cost.storage_per_month or found.machine):
        yield "  cost    nothing is billed here; --machine NAME adds the price of machines"
        return
    machines = f"machines {money(cost.machines)}"
    machines += f" ({found.num_machines} x {found.machine})" if found.machine else " (none named: --machine)"
    yield (
        f"  cost    {money(cost.total, unit)}: requests {money(cost.requests)}, transfer {money(cost.transfer)}, "
        f"{machines}; the output then {money(cost.storage_per_month)} a month"
    )
    yield f"  prices  {found.prices.source}"


def _stages(stages: Mapping[str, float]) -> str:
    longest = max(stages.values(), default=0.0)
    shown = sorted((stage for stage in stages if stages[stage] >= SHOWN_SHARE * longest), key=lambda s: -stages[s])
    return ", ".join(f"{SHORT_STAGES[stage]} {duration(stages[stage])}" for stage in shown[:SHOWN_STAGES])


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def money(amount: float, currency: str = "") -> str:
    """Return an amount for people."""
    text = f"{amount:.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"
    return f"{text} {currency}".strip()
