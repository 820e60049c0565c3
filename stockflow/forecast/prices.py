"""What a merge costs: requests, transfer and machines apart, by a table of prices that the user can replace."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

from stockflow.errors import RecipeError
from stockflow.forecast.amounts import Requests
from stockflow.storage import scheme_of
from stockflow.text.records import fields_of, parse_record

FORMAT = "stockflow-prices-1"
MAX_FILE_BYTES = 1_000_000
BUILT_IN = "prices.json"
GB = 1e9

T = TypeVar("T")
TransferFrom = Literal["same-region", "other-region", "internet"]
"""Where the machines are, seen from the inputs."""


@dataclass(frozen=True, slots=True)
class StorePrices:
    """Prices of one kind of object store."""

    name: str
    """what they are of, in words"""
    per_1000_gets: float
    """reads of a range or of an object's state"""
    per_1000_puts: float
    """writes, parts of uploads, and listings"""
    per_gb_month: float
    """keeping the output"""
    per_gb_same_region: float
    """reading from a machine in the store's region"""
    per_gb_other_region: float
    """reading from another region of the same provider"""
    per_gb_internet: float
    """reading from anywhere else"""


@dataclass(frozen=True, slots=True)
class MachinePrices:
    """A machine by the hour."""

    per_hour: float
    cores: int
    memory_gib: float
    network_gbit: float
    """sustained"""

    def share_of_network(self, num_workers: int) -> float:
        """Return the bytes per second of one of so many workers, each with a core of its own."""
        return self.network_gbit * 1e9 / 8 / min(num_workers, self.cores)


@dataclass(frozen=True, slots=True)
class Prices:
    """A table of prices."""

    source: str
    """where they are from"""
    date: str
    currency: str
    stores: Mapping[str, StorePrices]
    """by scheme of the URL"""
    machines: Mapping[str, MachinePrices]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a merge costs; the parts are apart because different people pay them."""

    requests: float
    transfer: float
    machines: float
    storage_per_month: float
    """of the output, from then on; not part of the total"""

    @property
    def total(self) -> float:
        """What the merge itself costs."""
        return self.requests + self.transfer + self.machines


def cost_of(
    prices: Prices,
    asked: Sequence[tuple[str, Requests]],
    *,
    transfer: TransferFrom,
    machine: str | None,
    num_machines: int,
    seconds: float,
) -> Cost:
    """Return what a merge costs.

    Args:
        prices: the table.
        asked: URL and what is asked of it; folders cost nothing.
        transfer: where the machines are, seen from the inputs.
        machine: kind of machine; None: they are ours.
        num_machines: how many.
        seconds: for how long each.

    Raises:
        RecipeError: the table has no such store or machine.
    """
    requests = moved = kept = 0.0
    for url, what in asked:
        if scheme_of(url) in ("file", "memory"):
            continue
        store = _entry(prices.stores, scheme_of(url), "store", prices)
        requests += what.gets / 1000 * store.per_1000_gets + what.puts / 1000 * store.per_1000_puts
        per_gb = {
            "same-region": store.per_gb_same_region,
            "other-region": store.per_gb_other_region,
            "internet": store.per_gb_internet,
        }[transfer]
        moved += what.bytes_out / GB * per_gb
        kept += what.bytes_kept / GB * store.per_gb_month
    hourly = machine_of(prices, machine).per_hour if machine else 0.0
    return Cost(requests, moved, hourly * num_machines * seconds / 3600, kept)


def machine_of(prices: Prices, name: str) -> MachinePrices:
    """Return a machine of the table.

    Raises:
        RecipeError: it has none of this name.
    """
    return _entry(prices.machines, name, "machine", prices)


def _entry(table: Mapping[str, T], name: str, kind: str, prices: Prices) -> T:
    if name not in table:
        raise RecipeError(
            f"the prices ({prices.source}) have no {kind} {name!r}; known: {', '.join(sorted(table))}. "
            "Add it in a file of your own: --prices FILE"
        )
    return table[name]


def load_prices(given: str | os.PathLike[str] | None) -> Prices:
    """Return the prices of a file, or the built-in examples.

    Raises:
        RecipeError: the file is not there, or is no table of prices.
    """
    if given is None:
        built_in = resources.files("stockflow.forecast").joinpath("data", BUILT_IN)
        return _parsed(built_in.read_bytes(), "the built-in prices")
    try:
        with Path(given).open("rb") as file:
            payload = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise RecipeError(f"cannot read the prices {given}: {error.strerror}") from None
    return _parsed(payload, os.fspath(given))


def _parsed(payload: bytes, where: str) -> Prices:
    try:
        return parse_record(Prices, fields_of(payload, FORMAT))
    except ValueError as error:
        raise RecipeError(f"{where} is not a table of prices: {error}; docs/insight.md#cost shows one") from None
