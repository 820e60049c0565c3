"""The model of time and money at its limits: where one thing alone costs anything, the result is that thing exactly."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.forecast.amounts import Kernel, LoadWork, Reading, Requests, ShardWork, StepWork, Workload
from stockflow.forecast.calibration import Calibration, KernelCost, MachineCosts, PlaceCosts
from stockflow.forecast.prediction import Conditions, Model, Prediction
from stockflow.forecast.prices import MachinePrices, Prices, StorePrices, cost_of

GB = 10**9
KERNEL = Kernel("linear", "BF16", 3)
FREE = MachineCosts(
    name="free", cores=4, kernels=(KernelCost("linear", "BF16", 3, 0.0, 0.0),), hash_ns=0.0, crowding=1.0, turn_us=0.0,
    open_piece_us=0.0, plan_tensor_us=0.0, merge_tensor_us=0.0, merge_piece_us=0.0, ray_start_s=0.0,
)  # fmt: skip
ENDLESS = 1e30
"""bytes per second"""
INSTANT = PlaceCosts(
    url="s3://bucket", start_s=0.0, publish_s=0.0, shard_s=0.0, get_s=0.0, put_s=0.0, read_rate=ENDLESS,
    cold_rate=ENDLESS, write_rate=ENDLESS, read_cpu_ns=0.0, write_cpu_ns=0.0, write_thread_ns=0.0,
)  # fmt: skip
DISK = replace(INSTANT, url="/disk")
NUM_LOADS = 100


def shard(
    num_bytes: int = GB,
    read: int = GB,
    requests: int = 1000,
    elems: int = GB // 2,
    *,
    turns: int = 0,
    passes: int = 1,
    reads: int = 1,
) -> ShardWork:
    """A shard in many equal steps, so that the ends of the pipeline hardly count."""
    part = NUM_LOADS
    readings = {index: Reading(requests // part, read // part, read // part) for index in range(3)}
    load = LoadWork(Counter({KERNEL: elems // part}), num_bytes // part, readings, num_turns=turns // part)
    return ShardWork("model.safetensors", num_bytes, (StepWork((load,), passes, reads),) * part)


SHARD = shard()


def workload(num_shards: int = 1, shard: ShardWork = SHARD) -> Workload:
    return Workload((shard,) * num_shards, (1, 1, 1), 10 * num_shards, 0, 0, False, {1: 10 * num_shards})


def predict(
    machine: MachineCosts = FREE,
    place: PlaceCosts = INSTANT,
    conditions: Conditions | None = None,
    work: Workload | None = None,
    *,
    direct: bool = False,
) -> Prediction:
    calibration = Calibration("today", "0", "", machine, (place,))
    inputs = [f"{place.url}/{index}" for index in range(3)]
    model = Model(calibration, inputs, f"{place.url}/out", conditions or Conditions(), direct)
    return model.predict(work or workload())


@pytest.mark.parametrize(
    ("machine", "place", "conditions", "seconds", "bottleneck"),
    [
        pytest.param({}, {"read_rate": GB / 2}, {}, 6.0, "network_read", id="reading 3 GB at 0.5 GB/s"),
        pytest.param({}, {"write_rate": GB / 4}, {}, 4.0, "network_write", id="writing 1 GB at 0.25 GB/s"),
        pytest.param({"hash_ns": 0.5}, {}, {"cores_per_worker": 2.0}, 0.5, "hash", id="hashing 1 GB on one of 2 cores"),
        pytest.param({}, {"read_cpu_ns": 2.0}, {"cores_per_worker": 2.0}, 3.0, "cpu", id="the client's CPU, 2 cores"),
        pytest.param({}, {"server_read_ns": 2.0}, {}, 6.0, "cpu", id="a server on the same core"),
        pytest.param({}, {}, {"request_rate": 100.0}, 30.63, "request_rate", id="3,000 reads and 63 of uploading"),
        pytest.param({}, {"start_s": 0.7, "publish_s": 0.2}, {}, 0.9, "start", id="what every merge pays"),
        pytest.param({}, {"turns": 1.0, "read_rate": GB, "write_rate": GB}, {}, 4.0, "store", id="taking turns"),
    ],
)  # fmt: skip
def test_one_cost_alone_is_the_time(
    machine: dict[str, float],
    place: dict[str, float],
    conditions: dict[str, float],
    seconds: float,
    bottleneck: str,
) -> None:
    found = predict(replace(FREE, **machine), replace(INSTANT, **place), Conditions(**conditions))

    assert found.seconds == pytest.approx(seconds, rel=0.01)
    assert found.bottleneck == bottleneck


@pytest.mark.parametrize(("num_threads", "seconds"), [(1, 3.0), (2, 1.5), (4, 0.75)])
def test_arithmetic_alone_is_divided_among_threads(num_threads: int, seconds: float) -> None:
    machine = replace(FREE, kernels=(KernelCost("linear", "BF16", 3, 4.0, 2.0),))

    found = predict(machine, conditions=Conditions(num_threads=num_threads, cores_per_worker=4.0))

    assert found.seconds == pytest.approx(seconds)
    assert found.bottleneck == "compute"


def test_threads_beyond_the_cores_are_no_help() -> None:
    machine = replace(FREE, kernels=(KernelCost("linear", "BF16", 3, 4.0, 2.0),))

    two, eight = (predict(machine, conditions=Conditions(num_threads=n, cores_per_worker=2.0)) for n in (2, 8))

    assert eight.seconds == two.seconds


def test_stages_overlap_and_what_a_shard_pays_does_not() -> None:
    place = replace(INSTANT, read_rate=3 * GB, write_rate=GB, shard_s=0.5)

    found = predict(place=place)

    assert found.seconds == pytest.approx(1.0 + 0.5, rel=0.01)


def test_latency_counts_for_requests_that_are_not_full() -> None:
    few, many = (shard(read=GB // 4, requests=count) for count in (NUM_LOADS, 5 * NUM_LOADS))
    place = replace(INSTANT, get_s=0.1)

    more = predict(place=place, work=workload(shard=many)).seconds
    less = predict(place=place, work=workload(shard=few)).seconds

    assert more - less == pytest.approx(4 * NUM_LOADS * 3 * 0.1 / 16, rel=0.01)


def test_a_given_network_replaces_the_calibrated_one() -> None:
    found = predict(place=replace(INSTANT, read_rate=GB), conditions=Conditions(read_rate=GB / 10))

    assert found.seconds == pytest.approx(30.0)


def test_only_what_is_not_in_memory_comes_from_the_disk() -> None:
    warm, half = (
        predict(place=replace(DISK, cold_rate=GB), conditions=Conditions(cold_share=share), direct=True)
        for share in (0.0, 0.5)
    )

    assert (warm.seconds, half.seconds) == (pytest.approx(0.0, abs=1e-6), pytest.approx(1.5))
    assert half.bottleneck == "disk_read"


def test_what_comes_from_the_disk_costs_cpu_once() -> None:
    place = replace(DISK, cold_cpu_ns=2.0, read_cpu_ns=1.0)
    work = workload(shard=shard(passes=1, reads=2))

    warm, cold = (
        predict(place=place, conditions=Conditions(cold_share=share), work=work, direct=True).seconds
        for share in (0.0, 1.0)
    )

    assert warm == pytest.approx(2 * 3.0)
    assert cold == pytest.approx(2 * 3.0 + 6.0)


def test_threads_that_read_wait_for_one_another() -> None:
    work = workload(shard=shard(turns=1000))
    conditions = Conditions(num_threads=2, cores_per_worker=4.0)

    alone, together = (
        predict(replace(FREE, turn_us=300.0), DISK, replace(conditions, num_threads=n), work, direct=True).seconds
        for n in (1, 4)
    )

    assert alone == pytest.approx(0.0, abs=1e-9)
    assert together == pytest.approx(1000 * 300e-6 / 4)


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_workers_divide_the_shards(num_workers: int) -> None:
    conditions = Conditions(num_workers=num_workers, on_ray=True)

    found = predict(replace(FREE, hash_ns=1.0), conditions=conditions, work=workload(8))

    assert found.seconds == pytest.approx(8.0 / num_workers)


def test_more_workers_are_no_help_against_the_stores_request_rate() -> None:
    times = [
        predict(
            replace(FREE, hash_ns=1.0),
            conditions=Conditions(num_workers=n, request_rate=3063.0, on_ray=True),
            work=workload(64),
        )
        for n in (1, 2, 8, 64)
    ]

    assert [found.seconds for found in times] == pytest.approx([64.0] * 4, rel=0.01)
    assert times[-1].bottleneck == "request_rate"


@pytest.mark.parametrize("num_workers", [1, 8, 64])
def test_workers_share_one_disk(num_workers: int) -> None:
    conditions = Conditions(num_workers=num_workers, cold_share=1.0, on_ray=True)

    found = predict(place=replace(DISK, cold_rate=GB), conditions=conditions, work=workload(8), direct=True)

    assert found.seconds == pytest.approx(8 * 3.0)
    assert found.bottleneck == "disk_read"


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    num_workers=st.integers(1, 12),
    request_rate=st.none() | st.floats(10.0, 1e5),
    hash_ns=st.floats(0.0, 5.0),
)
def test_more_workers_are_never_slower(
    sizes: list[int], num_workers: int, request_rate: float | None, hash_ns: float
) -> None:
    shards = tuple(shard(size * 10**6, 0, 0, 0) for size in sizes)
    work = replace(workload(), shards=shards)
    fewer, more = (
        predict(
            replace(FREE, hash_ns=hash_ns),
            conditions=Conditions(num_workers=n, request_rate=request_rate, on_ray=True),
            work=work,
        ).seconds
        for n in (num_workers, num_workers + 1)
    )

    assert more <= fewer * (1 + 1e-9)


def test_kernels_between_measurements_are_interpolated_and_beyond_them_extended() -> None:
    machine = replace(
        FREE,
        kernels=(
            KernelCost("linear", "BF16", 3, 1.0, 10.0),
            KernelCost("linear", "BF16", 5, 3.0, 20.0),
            KernelCost("linear", "F32", 5, 6.0, 40.0),
        ),
    )

    assert machine.statistics_ns(Kernel("linear", "BF16", 4)) == 2.0
    assert machine.combine_ns(Kernel("linear", "BF16", 7)) == 30.0
    assert machine.statistics_ns(Kernel("linear", "F32", 3)) == 2.0, "the shape of BF16, at the level of F32"
    assert machine.statistics_ns(Kernel("copy", "U8", 1)) == 0.0


STORE = StorePrices("a store", 1.0, 10.0, 0.5, 0.0, 2.0, 3.0)
TABLE = Prices("here", "today", "EUR", {"s3": STORE}, {"big": MachinePrices(7.2, 16, 64.0, 10.0)})


@pytest.mark.parametrize(("transfer", "moved"), [("same-region", 0.0), ("other-region", 8.0), ("internet", 12.0)])
def test_costs_are_the_sum_of_requests_transfer_and_machines(transfer: str, moved: float) -> None:
    asked = [
        ("s3://in/a", Requests(gets=3000, puts=100, bytes_out=4 * GB)),
        ("/a/folder", Requests(gets=10**9, puts=10**9, bytes_out=10**15)),
        ("s3://out", Requests(gets=1000, puts=200, bytes_kept=2 * GB)),
    ]

    found = cost_of(TABLE, asked, transfer=transfer, machine="big", num_machines=3, seconds=500)  # type: ignore[arg-type]

    assert found.requests == pytest.approx(4 * 1.0 + 0.3 * 10.0)
    assert found.transfer == pytest.approx(moved)
    assert found.machines == pytest.approx(7.2 * 3 * 500 / 3600)
    assert found.storage_per_month == pytest.approx(1.0)
    assert found.total == pytest.approx(found.requests + found.transfer + found.machines)
