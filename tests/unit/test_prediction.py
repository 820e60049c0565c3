"""The model of time and money at its limits: where one thing alone costs anything, the result is that thing exactly."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.forecast.amounts import InputAmounts, Kernel, Workload
from stockflow.forecast.constants import Calibration, KernelCost, MachineCosts, PlaceCosts
from stockflow.forecast.seconds import Conditions, Forecast, Prediction, busiest_share, predict
from tests.simulation import simulate

GB = 10**9
KERNEL = Kernel("linear", "BF16", 2, 1)
LINEAR = KernelCost("linear", "BF16", 1.0, 0.5, 1.0)
"""of two sources 4 ns for a pass, 2 for the combine"""
FREE = MachineCosts("free", 4, (KernelCost("linear", "BF16", 0.0, 0.0, 0.0),), 1.0, 0.0, 0.0, 0.0)
ENDLESS = 1e30
"""bytes per second"""
STORE = PlaceCosts("s3://bucket", 0.0, 0.0, 0.0, ENDLESS, ENDLESS, 0.0, 0.0)
DISK = replace(STORE, url="/disk")
CALM = Conditions(memory_bytes=10**12)


def workload(*sizes: int) -> Workload:
    """Shards of these sizes, one of a gigabyte by default, each of three tensors that three models hold; read twice."""
    sizes = sizes or (GB,)
    total, number = sum(sizes), len(sizes)
    inputs = tuple(InputAmounts(f"/{index}", 1, False, 1000 * number, total, total // 2) for index in range(3))
    return Workload(inputs, sizes, {KERNEL: total // 2}, 3 * number, 9 * number, {1: 3 * number})


def predicted(
    machine: MachineCosts = FREE,
    place: PlaceCosts = STORE,
    conditions: Conditions = CALM,
    work: Workload | None = None,
) -> Prediction:
    work = work or workload()
    work = replace(work, inputs=tuple(replace(each, url=f"{place.url}{each.url}") for each in work.inputs))
    return predict(work, Calibration("today", "0", "", machine, (place,)), f"{place.url}/out", conditions)


@pytest.mark.parametrize(
    ("machine", "place", "conditions", "seconds", "bottleneck"),
    [
        pytest.param({}, {"read_rate": GB / 2}, {}, 6.0, "read", id="reading 3 GB at 0.5 GB/s"),
        pytest.param({}, {"write_rate": GB / 4}, {}, 4.0, "write", id="writing 1 GB at 0.25 GB/s"),
        pytest.param({}, {"latency_s": 0.016}, {}, 3.0 + 2 * 0.016, "requests", id="3,000 requests, 16 in flight"),
        pytest.param({}, {"read_cpu_ns": 2.0}, {"cores": 2.0}, 3.0, "cpu", id="the client's CPU, 2 cores"),
        pytest.param({}, {"write_cpu_ns": 2.0}, {"cores": 2.0}, 1.0, "cpu", id="hashing on one of 2 cores"),
        pytest.param({}, {}, {"request_rate": 100.0}, 30.63, "request_rate", id="3,000 reads and 63 of uploading"),
        pytest.param({}, {"start_s": 0.9}, {}, 0.9, "start", id="what every merge pays"),
        pytest.param({"tensor_us": 1e6, "piece_us": 1e5}, {}, {}, 3.9, "start", id="3 tensors, 9 sources"),
        pytest.param({}, {}, {"read_rate": GB / 10.0}, 30.0, "read", id="a network that is given"),
        pytest.param({}, {}, {"write_rate": GB / 10.0}, 10.0, "write", id="a network to write to that is given"),
        pytest.param({}, {}, {"latency_s": 0.16}, 30 + 0.32 + 30 * 0.16, "requests", id="a latency that is given"),
    ],
)  # fmt: skip
def test_one_cost_alone_is_the_time(
    machine: dict[str, float],
    place: dict[str, float],
    conditions: dict[str, float],
    seconds: float,
    bottleneck: str,
) -> None:
    found = predicted(replace(FREE, **machine), replace(STORE, **place), replace(CALM, **conditions))

    assert found.seconds == pytest.approx(seconds, rel=0.001)
    assert found.bottleneck == bottleneck


@pytest.mark.parametrize(("num_threads", "seconds"), [(1, 3.0), (2, 1.5), (4, 0.75)])
def test_arithmetic_alone_is_divided_among_threads(num_threads: int, seconds: float) -> None:
    machine = replace(FREE, kernels=(LINEAR,))

    found = predicted(machine, conditions=Conditions(num_threads=num_threads, cores=4.0))

    assert found.seconds == pytest.approx(seconds)
    assert found.stages["compute"] == pytest.approx(seconds)


def test_threads_beyond_the_cores_are_no_help() -> None:
    machine = replace(FREE, kernels=(LINEAR,))

    two, eight = (predicted(machine, conditions=Conditions(num_threads=n, cores=2.0)) for n in (2, 8))

    assert eight.seconds == two.seconds


def test_cores_that_compute_together_are_slower_than_one_alone() -> None:
    machine = replace(FREE, kernels=(LINEAR,), efficiency=0.5)

    alone, together = (predicted(machine, conditions=Conditions(num_threads=n, cores=2.0)) for n in (1, 2))

    assert (alone.seconds, together.seconds) == (pytest.approx(3.0), pytest.approx(3.0 / 2 / 0.5))


def test_files_are_read_by_the_threads_that_compute() -> None:
    machine, place = replace(FREE, kernels=(LINEAR,)), replace(DISK, read_cpu_ns=1.0)

    found = predicted(machine, place, replace(CALM, num_threads=2, cores=2.0))

    assert found.stages["compute"] == pytest.approx((3.0 + 3.0) / 2)


def test_stages_overlap_and_what_shards_pay_does_not() -> None:
    place = replace(STORE, read_rate=3 * GB, write_rate=GB, shard_s=0.5)

    assert predicted(place=place, work=workload(*[GB] * 3)).seconds == pytest.approx(3.0 + 2 * 0.5)


@pytest.mark.parametrize(
    ("conditions", "seconds"),
    [
        pytest.param({"memory_bytes": 2 * GB}, 0.0, id="fits into memory"),
        pytest.param({"memory_bytes": GB}, 1.5, id="does not"),
        pytest.param({"memory_bytes": 2 * GB, "read_rate": GB / 2.0}, 3.0, id="a rate is given"),
    ],
)
def test_folders_are_read_from_the_disk_once_if_at_all(conditions: dict[str, float], seconds: float) -> None:
    place = replace(DISK, read_rate=GB)

    found = predicted(place=place, conditions=Conditions(**conditions))  # type: ignore[arg-type]

    assert found.seconds == pytest.approx(seconds)
    assert found.disk_s == pytest.approx(seconds or 1.5)
    assert found.in_memory == (not seconds)


SMALL = {"elems": 39_798_016, "num_bytes": 79_630_048, "num_tensors": 309, "num_shards": 1}
MEDIUM = {"elems": 153_633_792, "num_bytes": 307_276_056, "num_tensors": 75, "num_shards": 2}
LARGE = {"elems": 395_339_776, "num_bytes": 790_686_048, "num_tensors": 57, "num_shards": 4}
"""Model Stock of a base and four tuned models of 0.08, 0.3 and 0.8 GB: what the planner says of them."""
MORNING = MachineCosts(
    "2 cores", 2, (KernelCost("linear", "BF16", 0.2624, 0.04141, 0.2873),), efficiency=0.72, tensor_us=233.7,
    piece_us=7.892, ray_start_s=6.0,
)  # fmt: skip
NOON = MachineCosts(
    "2 cores", 2, (KernelCost("linear", "BF16", 0.2487, 0.0408, 0.2763),), efficiency=0.72, tensor_us=233.1,
    piece_us=11.59, ray_start_s=6.0,
)  # fmt: skip
MORNINGS_DISK = PlaceCosts("/disk", 1.055, 0.009, 0.0, 1.275e9, 0.8213e9, 0.086, 1.217)
NOONS_DISK = PlaceCosts("/disk", 1.118, 0.0374, 0.0, 1.006e9, 0.7517e9, 0.0815, 1.329)
GATEWAY = PlaceCosts("s3://bench", 2.525, 0.2163, 0.043, 0.6966e9, 0.1551e9, 2.839, 13.55)
"""of an S3 server on the same two cores"""


@pytest.mark.parametrize(
    ("case", "machine", "place", "read", "requests", "measured_s"),
    [
        pytest.param(SMALL, MORNING, MORNINGS_DISK, 561_820_160, 785, 1.48, id="0.4 GB, disk, morning"),
        pytest.param(MEDIUM, MORNING, MORNINGS_DISK, 3_051_530_240, 5906, 2.29, id="1.5 GB, disk, morning"),
        pytest.param(LARGE, MORNING, MORNINGS_DISK, 7_906_529_280, 15_145, 3.46, id="4 GB, disk, morning"),
        pytest.param(SMALL, NOON, NOONS_DISK, 561_820_160, 785, 1.26, id="0.4 GB, disk, noon"),
        pytest.param(MEDIUM, NOON, NOONS_DISK, 3_051_530_240, 5906, 1.82, id="1.5 GB, disk, noon"),
        pytest.param(LARGE, NOON, NOONS_DISK, 7_906_529_280, 15_145, 3.37, id="4 GB, disk, noon"),
        pytest.param(SMALL, NOON, GATEWAY, 397_980_160, 65, 4.17, id="0.4 GB, S3"),
        pytest.param(MEDIUM, NOON, GATEWAY, 1_536_337_920, 217, 7.27, id="1.5 GB, S3"),
        pytest.param(LARGE, NOON, GATEWAY, 3_953_397_760, 586, 14.33, id="4 GB, S3"),
    ],
)
def test_merges_that_were_measured_are_predicted_within_a_quarter(
    case: dict[str, int], machine: MachineCosts, place: PlaceCosts, read: int, requests: int, measured_s: float
) -> None:
    """Recorded merges of 1 + 4 models, medians of whole processes, with the constants measured right before them."""
    number, num_bytes = case["num_tensors"], case["elems"] * 2
    inputs = tuple(InputAmounts(f"/{i}", 3 + i, False, requests // 5, read // 5, num_bytes) for i in range(5))
    sizes = (case["num_bytes"] // case["num_shards"],) * case["num_shards"]
    work = Workload(inputs, sizes, {Kernel("linear", "BF16", 5, 1): case["elems"]}, number, 5 * number, {})

    found = predicted(machine, place, replace(CALM, num_threads=2, cores=2.0), work)

    assert found.seconds == pytest.approx(measured_s, rel=0.25)


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_workers_divide_the_shards(num_workers: int) -> None:
    conditions = replace(CALM, num_workers=num_workers, on_ray=True)

    found = predicted(replace(FREE, ray_start_s=6.0), replace(STORE, write_rate=GB), conditions, workload(*[GB] * 8))

    assert found.seconds == pytest.approx(6.0 + 8.0 / num_workers)


def test_workers_that_find_no_shard_are_what_a_merge_waits_for() -> None:
    found = predicted(
        place=replace(STORE, write_rate=GB), conditions=replace(CALM, num_workers=8), work=workload(*[GB] * 4)
    )

    assert found.bottleneck == "workers"


def test_more_workers_are_no_help_against_the_stores_request_rate() -> None:
    times = [
        predicted(
            place=replace(STORE, write_rate=GB),
            conditions=replace(CALM, num_workers=n, request_rate=3063.0),
            work=workload(*[GB] * 64),
        )
        for n in (1, 2, 8, 64)
    ]

    assert [found.seconds for found in times] == pytest.approx([64.0] * 4, rel=0.01)
    assert times[-1].bottleneck == "request_rate"


@pytest.mark.parametrize("num_workers", [1, 8, 64])
def test_workers_share_one_disk(num_workers: int) -> None:
    conditions = Conditions(num_workers=num_workers, on_ray=True)

    found = predicted(place=replace(DISK, read_rate=GB), conditions=conditions, work=workload(*[GB] * 8))

    assert found.seconds == pytest.approx(8 * 1.5)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    num_workers=st.integers(1, 12),
    request_rate=st.none() | st.floats(10.0, 1e5),
)
def test_more_workers_are_never_slower(sizes: list[int], num_workers: int, request_rate: float | None) -> None:
    work = workload(*(size * 10**6 for size in sizes))
    fewer, more = (
        predicted(
            replace(FREE, kernels=(LINEAR,), tensor_us=100.0),
            conditions=Conditions(num_workers=n, request_rate=request_rate, on_ray=True),
            work=work,
        ).seconds
        for n in (num_workers, num_workers + 1)
    )

    assert more <= fewer * (1 + 1e-9)


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_workers=st.integers(1, 12))
def test_shards_are_given_out_as_the_executor_does(sizes: list[int], num_workers: int) -> None:
    run = simulate(sizes, num_workers, duration=float)

    assert busiest_share(sizes, num_workers) * sum(sizes) == pytest.approx(run.makespan_s)


def test_kernels_grow_with_the_sources_and_what_was_not_measured_takes_what_is_most_like_it() -> None:
    slow, ties = replace(LINEAR, dtype="F32", combine_source_ns=3.0), KernelCost("elementwise", "BF16", 2.0, 0.0, 1.0)
    machine = replace(FREE, kernels=(ties, slow, LINEAR))

    assert machine.elem_ns(Kernel("linear", "BF16", 4, 1)) == 4 * 1.0 + 16 * 0.5 + 4 * 1.0
    assert machine.elem_ns(Kernel("linear", "F32", 4, 0)) == 4 * 3.0
    assert machine.elem_ns(Kernel("linear", "F8_E4M3", 2, 1)) == machine.elem_ns(KERNEL)
    assert machine.elem_ns(Kernel("elementwise", "F32", 4, 2)) == 2 * 4 * 2.0 + 4 * 1.0


@pytest.mark.parametrize(("num_workers", "num_machines"), [(1, 1), (16, 1), (17, 2), (33, 3)])
def test_machines_cost_their_price_for_the_predicted_time(num_workers: int, num_machines: int) -> None:
    conditions = Conditions(num_workers=num_workers, on_ray=True, machine_cores=16)
    half_an_hour = predicted(place=replace(STORE, start_s=1800.0), conditions=conditions)

    def found(price: float | None) -> Forecast:
        return Forecast(half_an_hour, (), replace(conditions, machine_price=price), ())

    assert found(7.2).cost == pytest.approx(7.2 * num_machines / 2)
    assert found(None).cost is None
