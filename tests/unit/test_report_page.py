"""The course of merges as receipts tell it, scales and colours, and pages of outputs as large as there are."""

import itertools
from collections.abc import Iterator

import pytest

from stockflow.output.manifest import Manifest, PublishedFile
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.planning.plan import CheckpointRef
from stockflow.reports import palette
from stockflow.reports.course import course_of
from stockflow.reports.evidence import Evidence, Model
from stockflow.reports.html import Scale, rising_axis, time_unit
from stockflow.reports.report import Report
from stockflow.reports.words import number, printable, share
from stockflow.storage import Stamp, StorageConfig
from stockflow.text.sizes import elapsed

MB = 10**6
START = 1.7e9
MAX_PAGE_BYTES = 5 * MB


def receipt(file: str, began: float, ended: float, worker: str = "n:1", **changes: object) -> Receipt:
    fields: dict[str, object] = {
        "plan_id": "p", "file": file, "size": MB, "sha256": "0" * 64, "stamp": Stamp(MB, "v"), "numerics_class": "cpu",
        "bytes_read": 3 * MB, "seconds": {}, "retries": {}, "peak_memory_bytes": 100, "tensors": (),
        "memory_bytes": 200, "gram": (), "began": START + began, "ended": START + ended, "worker": worker,
    }  # fmt: skip
    return Receipt(**{**fields, **changes})  # type: ignore[arg-type]


def test_throughput_is_the_bytes_of_shards_over_their_time() -> None:
    course = course_of([receipt("a", 0, 48), receipt("b", 24, 96, "n:2")], {})

    assert course.working_s == 96
    rates = [4 * MB / 48] * 24 + [4 * MB / 48 + 4 * MB / 72] * 24 + [4 * MB / 72] * 48
    assert course.rates == pytest.approx(rates)
    assert course.mean_rate == pytest.approx(8 * MB / 96)


def test_a_night_without_work_is_cut_out_and_told() -> None:
    course = course_of([receipt("a", 0, 100), receipt("b", 40_100, 40_200)], {})

    assert course.working_s == 200
    assert [(pause.at, pause.seconds) for pause in course.pauses] == [(100, 40_000)]
    assert [(span.start, span.stop) for span in course.lanes[0].spans] == [(0, 100), (100, 200)]


def test_a_short_break_is_no_pause() -> None:
    course = course_of([receipt("a", 0, 100), receipt("b", 130, 200)], {})

    assert (course.working_s, course.pauses) == (200, ())


@pytest.mark.parametrize(("began", "ended"), [(10, 5), (-START, 5), (0, 1e300)])
def test_a_clock_that_was_set_says_nothing(began: float, ended: float) -> None:
    course = course_of([receipt("a", began, ended)], {})

    assert (course.working_s, course.rates, course.began) == (None, (), None)
    assert course.lanes[0].num_bytes == 4 * MB


def test_workers_memory_and_retries_are_added_up() -> None:
    receipts = [
        receipt("a", 0, 1, "n:1", retries={"read": 2}, memory_bytes=500, peak_memory_bytes=300),
        receipt("b", 0, 1, "n:2", retries={"read": 1, "write": 4}, memory_bytes=700, peak_memory_bytes=400),
        receipt("c", 1, 2, "n:2", peak_memory_bytes=350),
    ]

    course = course_of(receipts, {"retries": 9, "seconds_read": 1.5, "seconds_wait_write": 0.25})

    assert dict(course.retries) == {"write": 4, "read": 3, "cause not on record": 2}
    assert course.retried_shards == (("b", 5), ("a", 2))
    assert [(lane.worker, lane.peak_bytes, lane.memory_bytes) for lane in course.lanes] == [
        ("n:2", 400, 700),
        ("n:1", 300, 500),
    ]
    assert [(stage.name, stage.seconds, stage.is_waiting) for stage in course.stages] == [
        ("reading ranges", 1.5, False),
        ("waiting for writes", 0.25, True),
    ]


def test_neighbours_share_a_block_where_a_worker_merged_very_many() -> None:
    course = course_of([receipt(f"{index}", index, index + 1, retries={"read": 1}) for index in range(1000)], {})

    (lane,) = course.lanes
    assert (lane.num_shards, len(lane.spans)) == (1000, 125)
    assert [(span.start, span.stop, span.num_retries) for span in lane.spans] == [
        (start, start + 8, 8) for start in range(0, 1000, 8)
    ]


def test_text_can_be_read_on_everything_it_is_written_on() -> None:
    for theme in ("light", "dark"):
        colours = palette.tokens(theme)
        for text, ground in palette.TEXT_PAIRS:
            assert palette.contrast(colours[text], colours[ground]) >= 4.5, (theme, text, ground)
        for colour in (*palette.sequential(theme), *palette.diverging(theme)):
            assert palette.contrast(palette.text_on(colour), colour) >= 4.5


def test_scales_of_colours_are_ordered_in_grey() -> None:
    def light(scale: list[str]) -> list[float]:
        return [palette.contrast(colour, "#000000") for colour in scale]

    assert light(palette.sequential("light")) == sorted(light(palette.sequential("light")), reverse=True)
    assert light(palette.sequential("dark")) == sorted(light(palette.sequential("dark")))
    middle = palette.NUM_DIVERGING // 2
    for theme, is_falling in (("light", True), ("dark", False)):
        lights = light(palette.diverging(theme))
        assert lights[middle:] == sorted(lights[middle:], reverse=is_falling)
        assert lights[: middle + 1] == sorted(lights[: middle + 1], reverse=not is_falling)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(0.0, 0.95), [0, 0.2, 0.4, 0.6, 0.8]),
        (Scale(-0.25, 0.85), [-0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        (Scale(0.0, 3.68), [0, 1, 2, 3]),
        (Scale(2.0, 2.0), [2.0]),
    ],
)
def test_axes_carry_round_numbers(scale: Scale, expected: list[float]) -> None:
    assert scale.ticks() == pytest.approx(expected)


def test_times_are_marked_in_round_units() -> None:
    assert Scale(0, 5 * 3600).ticks(time_unit(5 * 3600)) == [0, 3600, 7200, 10800, 14400, 18000]
    assert Scale(0, 600).ticks(time_unit(600)) == [0, 120, 240, 360, 480, 600]


@pytest.mark.parametrize("largest", [1e-300, 3e-7, 0.9, 1, 33, 99.9, 4e12, 1e299])
def test_an_axis_ends_above_the_largest(largest: float) -> None:
    axis = rising_axis(largest)

    assert largest * (1 - 1e-9) <= axis.scale.high <= 3 * largest
    assert axis.marks[0] == 0
    assert axis.marks[-1] == axis.scale.high


def test_words_for_numbers() -> None:
    assert [number(value) for value in (None, 0.5, -1.23456, 1e7)] == ["-", "0.500", "-1.235", "1.00e+07"]
    assert [share(value) for value in (None, 0.0843, 12.0)] == ["-", "8.43 %", "1.2e+03 %"]
    assert [elapsed(value) for value in (0.5, 59, 600, 3 * 3600, 72 * 3600)] == [
        "0.5 s", "59 s", "10 min", "3.0 h", "3.0 days",
    ]  # fmt: skip
    assert printable("a\x1b[0m\u202eb\n") == "a\\x1b[0m\\u202eb\\n"
    assert len(printable("x" * 1000)) == 160


def large_rows(num_layers: int, num_experts: int, num_models: int) -> Iterator[TensorFacts]:
    counter = itertools.count()
    attention = [f"self_attn.{part}_proj" for part in ("q_a", "q_b", "kv_a", "kv_b", "o")]
    experts = [f"mlp.experts.{expert}.{part}_proj" for expert in range(num_experts) for part in ("gate", "up", "down")]
    parts = ["input_layernorm", "post_attention_layernorm", *attention, "mlp.gate", *experts]
    for layer, part in itertools.product(range(num_layers), parts):
        cosine = (next(counter) * 0.618) % 1.0
        ratio = num_models * cosine / (1 + (num_models - 1) * cosine)
        name = f"language_model.model.layers.{layer}.{part}.weight"
        yield TensorFacts(
            name, (7168, 2048), "BF16", f"model-{layer:05}.safetensors", "model_stock", "tensor", 7168 * 2048,
            cosine, cosine, cosine, ratio, ratio / 2, 40.0, (0.5,) * num_models, ("clamped",) if ratio < 0.001 else (),
        )  # fmt: skip


def large_report(num_models: int, num_layers: int, num_experts: int) -> Report:
    rows = tuple(large_rows(num_layers, num_experts, num_models))
    files = {f"model-{index:05}.safetensors": Stamp(5 * 10**9, "e" * 64) for index in range(1, 164)}
    refs = tuple(CheckpointRef(f"s3://bucket/models/model-{index}", files) for index in range(num_models + 1))
    letters = ["0", *(str(index) for index in range(num_models))]
    receipts = tuple(
        receipt(
            f"model-{index:05}.safetensors", index // 40, index // 40 + 2, f"node-{index % 40}:1", retries={"read": 1}
        )
        for index in range(4000)
    )
    manifest = Manifest(
        "p" * 64, "m" * 64, "models:\n" + "- model: x\n" * 100_000, refs, ("etag",) * len(refs),
        {f"f-{index}": PublishedFile(1, "0" * 64) for index in range(8000)}, 2, ("cpu",), {"stockflow": "0"}, {},
        tuple(tuple(1.0 if i == j else 0.3 for j in range(num_models + 1)) for i in range(num_models + 1)),
    )  # fmt: skip
    models = tuple(
        Model(letter, f"model-{letter}", ref.url, "base" if letter == "0" else "model", "etag", 163, 10**12, "0" * 12)
        for letter, ref in zip(letters, refs, strict=True)
        for role in ("base" if letter == "0" else "model",)
    )
    evidence = Evidence("s3://bucket/out", manifest, rows, receipts, 4000, None, models, (), (), ())
    return Report(evidence, StorageConfig())


@pytest.mark.parametrize(
    ("num_models", "num_layers", "num_experts"), [pytest.param(4, 61, 500, marks=pytest.mark.scale), (60, 300, 8)]
)
def test_the_page_of_the_largest_outputs_stays_small(num_models: int, num_layers: int, num_experts: int) -> None:
    report = large_report(num_models, num_layers, num_experts)

    page = report.html()

    assert len(page.encode()) < MAX_PAGE_BYTES
    assert "The cosine between two models' changes" in page
    assert "4,000 requests were repeated (read: 4,000)" in page
    assert f"of {len(report.evidence.rows):,} tensors: those above and the ones with the lowest t" in page
    listed = [row.ratio for row in report.geometry.listed if row.ratio is not None]
    lowest = sorted(row.ratio for row in report.evidence.rows if row.ratio is not None)[:1900]
    assert set(lowest) <= set(listed)
    assert len(str(report)) < 20_000
