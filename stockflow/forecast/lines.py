"""A forecast in words and numbers, for people and for programs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from stockflow.forecast.amounts import StoreRequests, store_of
from stockflow.forecast.seconds import STAGES, Forecast
from stockflow.storage import redact, scheme_of
from stockflow.text.sizes import counted, estimate, gb

NUM_STAGES = 3
"""Of what goes on side by side so many are listed, the longest."""


def forecast_facts(found: Forecast) -> dict[str, object]:
    """Return time, requests and money, for programs."""
    prediction, conditions = found.prediction, found.conditions
    price, num_machines = conditions.machine_price, conditions.num_machines
    return {
        "seconds": prediction.seconds,
        "phases": dict(prediction.phases),
        "stages": dict(prediction.stages),
        "bottleneck": prediction.bottleneck,
        "bottleneck_in_words": STAGES[prediction.bottleneck],
        "workers": conditions.num_workers,
        "threads_per_worker": conditions.num_threads,
        "inputs_in_memory": prediction.in_memory,
        "disk_seconds": prediction.disk_s,
        "cost": {"machine_price": price, "num_machines": num_machines, "machines": found.cost},
        "store_requests": [
            {"url": redact(asked.url), "gets": asked.gets, "puts": asked.puts, "bytes_out": asked.bytes_out}
            for asked in found.requests
        ],
        "sources": list(found.sources),
    }


def forecast_lines(found: Forecast) -> Iterator[str]:
    """Yield time, requests and money, line by line."""
    prediction, conditions = found.prediction, found.conditions
    workers = counted(conditions.num_workers, "worker") if conditions.on_ray else "one process"
    each = " each" if conditions.num_workers > 1 else ""
    parts = ", ".join(
        f"{phase} {estimate(seconds)}" for phase, seconds in prediction.phases.items() if seconds >= 0.005
    )
    threads = counted(conditions.num_threads, "thread")
    yield f"  time    about {estimate(prediction.seconds)} by {workers} of {threads}{each}: {parts}"
    yield f"  limit   {STAGES[prediction.bottleneck]}; side by side: {_longest(prediction.stages)}"
    for asked in _by_store(found.requests):
        yield (
            f"  store   {asked.url}: {asked.gets:,} GETs, {asked.puts:,} PUTs and listings; "
            f"{gb(asked.bytes_out)} out, {gb(asked.bytes_kept)} in"
        )
    if found.cost is not None:
        machines = counted(conditions.num_machines, "machine")
        yield f"  cost    {money(found.cost)}: {machines} at {conditions.machine_price:g} an hour, start to end"
    for source in found.sources:
        yield f"  model   {source}"
    if prediction.disk_s:
        yield f"  model   {_disk_words(found)}"


def _disk_words(found: Forecast) -> str:
    takes = estimate(found.prediction.disk_s)
    if found.prediction.in_memory:
        return f"inputs in folders are taken to be in memory; from the disk, reading them takes at least {takes}"
    why = "at the rate that is given" if found.conditions.read_rate else "as they do not fit into memory"
    return f"inputs in folders are taken to come from the disk, {why}: {takes}"


def _by_store(requests: Iterable[StoreRequests]) -> Iterator[StoreRequests]:
    """What each bucket is asked; folders are not counted."""
    stores: dict[str, list[Sequence[int]]] = {}
    for url, *amounts in requests:
        if scheme_of(url) not in ("file", "memory"):
            stores.setdefault(redact(store_of(url)), []).append(amounts)
    yield from (StoreRequests(store, *map(sum, zip(*found, strict=True))) for store, found in stores.items())


def _longest(stages: Mapping[str, float]) -> str:
    shown = sorted(stages, key=lambda stage: -stages[stage])[:NUM_STAGES]
    return ", ".join(f"{STAGES[stage]} {estimate(stages[stage])}" for stage in shown)


def money(amount: float) -> str:
    """Return an amount for people, in whatever currency the price was."""
    return f"{amount:.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"
