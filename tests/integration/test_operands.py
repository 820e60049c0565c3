"""Operands that are not plain: block-scaled codes, maps of rows; and several results of one reading. Real files."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stockflow.checkpoints.decodes.stored import BlockScaled, Decode, Plain, RowFill, RowRun, RowRuns, plain
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.engine.facts import Ledger
from stockflow.engine.layers import Layers
from stockflow.engine.merging import UnitMerger
from stockflow.engine.procedures.proceeding import StageClock
from stockflow.engine.session import Session
from stockflow.engine.shard import ShardMerger
from stockflow.engine.ways import Destination
from stockflow.methods.parameters import Parameters
from stockflow.planning.job import Reading, Result, TensorJob
from stockflow.planning.operands import Operand
from stockflow.planning.plan import CheckpointRef, ShardPlan
from stockflow.planning.working_precision import working_bits_of
from stockflow.storage import StorageConfig, open_store
from tests import oracle, runs

NAME = "model.layers.0.proj.weight"
SHAPE = (1153, 640)
"""Nine blocks of rows and a ragged tenth, five of columns; more than two spans."""
BLOCK = (128, 128)
HALVES = (0.5, 0.5)
STOCK = Parameters({"filter_wise": False, "on_negative": "clamp"})


class Memory(io.BytesIO):
    """A sink that keeps what is written."""

    def sync(self) -> None:
        """Do nothing."""


@dataclass
class Models:
    """Checkpoints on disk or in a bucket, opened, with the numbers that their operands stand for."""

    checkpoints: Sequence[Checkpoint]
    operands: tuple[Operand, ...]
    arrays: list[oracle.Floats]

    def reading(self, float_bits: Any = 32) -> Reading:
        return Reading(NAME, SHAPE, self.operands, float_bits=float_bits)


@dataclass
class Merged:
    """The bytes of a shard, and what they took to read."""

    array: oracle.Array
    num_read: int
    ratio: float | None


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def opened(places: Sequence[str | Path]) -> list[Checkpoint]:
    return open_checkpoints([open_store(str(place), StorageConfig()) for place in places])


def block_scaled(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and what they stand for by torch, which shares no code with the product."""
    rows, columns = (-(-size // block) for size, block in zip(values.shape, BLOCK, strict=True))
    scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.01 + 1e-4
    grid = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: values.shape[0], : values.shape[1]]
    codes = (values / grid).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales, codes.double() * grid.double()


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def merge(models: Models, job: TensorJob, *, num_threads: int = 2, memory_bytes: int = 2**30) -> Merged:
    """Merge a shard of one tensor as a worker does."""
    refs = [CheckpointRef(each.url, each.files) for each in models.checkpoints]
    memory = memory_bytes + runs.grown_bytes()
    session = Session(refs, StorageConfig(), memory_bytes=memory, num_threads=num_threads, device="cpu")
    try:
        merger = ShardMerger(session, refs, "error")
        shard, sink = ShardPlan("model.safetensors", (job,)), Memory()
        merger.prepare(shard.jobs)
        run = merger.merge(shard, session.divide(shard.jobs), sink, lambda num_read, num_written: None)
    finally:
        session.close()
    payload = sink.getvalue()[len(shard.header) :]
    bits = np.frombuffer(payload, {"BF16": np.uint16, "F32": np.uint32}[job.output.dtype])
    return Merged(bits.reshape(job.output.shape), run.bytes_read, run.facts[0].ratio)


def job_of(reading: Reading, dtype: str = "BF16", method: str = "model_stock", given: Parameters = STOCK) -> TensorJob:
    bits = working_bits_of(dtype, reading.dtypes)
    return TensorJob(
        reading, (Result((TensorSpec(NAME, dtype, reading.shape),), plain(dtype), method, given, 32, bits),)
    )


def share_correct(found: oracle.Array, expected: oracle.OracleResult, dtype: str) -> float:
    distance = oracle.ulp_distance(dtype, found, oracle.round_to(dtype, expected.out))
    return float((distance == 0).mean())


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base of BF16 and two block-scaled models, whose scales lie in the same file as their codes."""
    root, base = tmp_path_factory.mktemp("fp8"), drawn(0).bfloat16()
    places, arrays = [written(root / "base", {NAME: base})], [base.double().numpy()]
    for number in (1, 2):
        codes, scales, values = block_scaled(base.float() + drawn(number) * 0.3)
        places.append(written(root / f"m{number}", {NAME: codes, f"{NAME}_scale_inv": scales}))
        arrays.append(values.numpy())
    checkpoints = opened(places)
    scaled = BlockScaled("F8_E4M3", "F32", BLOCK)
    operands = [Operand(0, NAME, (checkpoints[0].extents[NAME],), plain("BF16"))]
    for number in (1, 2):
        extents = checkpoints[number].extents
        operands.append(Operand(number, NAME, (extents[NAME], extents[f"{NAME}_scale_inv"]), scaled))
    return Models(checkpoints, tuple(operands), arrays)


def test_every_code_is_the_number_that_torch_says() -> None:
    from stockflow.kernels.codecs import numbers_of_codes

    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()

    assert np.array_equal(numbers_of_codes("F8_E4M3", "float64"), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_block_scaled_models_merge_as_the_numbers_they_stand_for(fp8: Models, dtype: str) -> None:
    expected = oracle.model_stock(fp8.arrays[0], fp8.arrays[1:])

    found = merge(fp8, job_of(fp8.reading(64 if dtype == "F32" else 32), dtype))

    assert found.ratio == pytest.approx(float(expected.facts["ratio"][0]), abs=1e-9)
    assert share_correct(found.array, expected, dtype) >= 0.9999


def test_threads_memory_and_storage_change_no_bit_of_what_is_decoded(
    fp8: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = merge(fp8, job_of(fp8.reading()))
    alone = merge(fp8, job_of(fp8.reading()), num_threads=1)
    monkeypatch.setattr(
        "stockflow.engine.inputs.ReadsInPlace", type("NoStore", (), {})
    )  # all is read into slabs, ahead

    slabs = merge(fp8, job_of(fp8.reading()))
    tight = merge(fp8, job_of(fp8.reading()), memory_bytes=200 * 2**20)

    assert np.array_equal(direct.array, alone.array)
    assert np.array_equal(direct.array, slabs.array)
    assert np.array_equal(direct.array, tight.array)
    assert slabs.num_read >= fp8.reading().num_bytes


RUNS = {
    "a permutation": RowRuns(1153, (RowRun(600, 1153, 0), RowRun(0, 600, 553))),
    "a gap": RowRuns(1100, (RowRun(0, 500, 0), RowRun(500, 1100, 553))),
    "a repeated run": RowRuns(700, (RowRun(0, 700, 0), RowRun(100, 553, 700))),
    "single rows": RowRuns(1153, tuple(RowRun(1152 - row, 1153 - row, row) for row in range(1153))),
}


@pytest.mark.parametrize("anchors_missing", [False, True], ids=["zeros", "the anchor's"])
@pytest.mark.parametrize("is_direct", [True, False], ids=["in place", "in slabs"])
@pytest.mark.parametrize("name", RUNS)
def test_rows_are_gathered_by_range(
    name: str, is_direct: bool, anchors_missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = np.ones(SHAPE[0] + 2, bool)
    for run in RUNS[name].runs:
        missing[run.to + 1 : run.to + 1 + run.stop - run.start] = False
    missing[[0, -1]] = False
    edges = np.flatnonzero(np.diff(missing.astype(int))).reshape(-1, 2).tolist()
    fills = tuple(RowFill(start, stop, (0,)) for start, stop in edges) if anchors_missing else ()
    rows = RowRuns(RUNS[name].num_source_rows, RUNS[name].runs, fills)
    base, own = drawn(0).bfloat16(), drawn(1, (rows.num_source_rows, SHAPE[1])).bfloat16()
    checkpoints = opened([written(tmp_path / "base", {NAME: base}), written(tmp_path / "tuned", {NAME: own})])
    operands = tuple(
        Operand(number, NAME, (each.extents[NAME],), plain("BF16"), rows if number else None)
        for number, each in enumerate(checkpoints)
    )
    gathered = base.clone() if anchors_missing else torch.zeros_like(base)
    for run in rows.runs:
        gathered[run.to : run.to + run.stop - run.start] = own[run.start : run.stop]
    if not is_direct:
        monkeypatch.setattr("stockflow.engine.inputs.ReadsInPlace", type("NoStore", (), {}))
    models = Models(checkpoints, operands, [])
    given = Parameters({"lambda": 1.0, "normalize": False}, {"weight": (0.37,)})

    found = merge(models, job_of(models.reading(), method="task_arithmetic", given=given))

    expected = oracle.task_arithmetic(base.double().numpy(), [gathered.double().numpy()], [0.37])
    assert share_correct(found.array, expected, "BF16") >= 0.9999
    num_rows = sum(run.stop - run.start for run in rows.runs)
    assert found.num_read == 2 * SHAPE[1] * (SHAPE[0] + num_rows), "missing rows are not read"


def test_runs_that_touch_in_the_file_are_one_request() -> None:
    from stockflow.planning.reads import gathered

    rows = RowRuns(10, (RowRun(0, 2, 0), RowRun(2, 5, 2), RowRun(7, 9, 5)))
    operand = Operand(0, NAME, (_extent(),), plain("BF16"), rows)
    (slot,) = operand.slots((7, 3), 0, 21)

    requests = list(gathered(slot, 64))

    assert [(each.start, each.stop, each.offset) for each in requests] == [(8, 38, 64), (50, 62, 94)]


@pytest.mark.parametrize("wrong", [RowRun(3, 3, 0), RowRun(0, 11, 0), RowRun(-1, 4, 0)])
def test_a_run_that_is_none_is_refused(wrong: RowRun) -> None:
    with pytest.raises(ValueError, match="is no run of the 10 rows"):
        RowRuns(10, (wrong,))


def test_runs_that_name_a_row_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="begins at row 3, where the run before it goes on to 5"):
        RowRuns(10, (RowRun(0, 5, 0), RowRun(5, 6, 3)))


def test_several_results_come_from_one_read_and_are_what_each_would_be_alone(fp8: Models) -> None:
    results = [
        Result((TensorSpec(name, "BF16", SHAPE),), plain("BF16"), method, given)
        for name, method, given in (
            ("stock", "model_stock", STOCK),
            ("extrapolated", "model_stock", Parameters({"filter_wise": False, "on_negative": "extrapolate"})),
            ("half", "task_arithmetic", Parameters({"lambda": 0.5, "normalize": False}, {"weight": (1.0, 1.0)})),
            (
                "ties",
                "ties",
                Parameters({"lambda": 1.0, "normalize": True, "rescale": False}, {"weight": HALVES, "density": HALVES}),
            ),
        )
    ]
    refs = [CheckpointRef(each.url, each.files) for each in fp8.checkpoints]
    job = TensorJob(fp8.reading(), tuple(results))
    outs = {result.outputs[0].name: bytearray() for result in results}
    session = Session(refs, StorageConfig(), memory_bytes=2**31 + runs.grown_bytes(), num_threads=2, device="cpu")
    merger = UnitMerger(ShardMerger(session, refs, "error").tools(StageClock()), Layers())
    memory: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in outs}

    def out(name: str) -> Any:
        def take(piece: Any) -> Any:
            memory[name].append(np.empty(2 * (piece.stop - piece.start), np.uint8))
            return memory[name][-1]

        return take

    ledgers = [Ledger(job, result, "shard") for result in results]
    with session.stream([job], session.divide([job]), lambda num_read: None) as stream:
        for (unit,) in stream:
            merger.merge(unit, [Destination(out(name)) for name in outs], ledgers, session.map_spans)
    session.close()

    assert job.num_sweeps == 4, "as many as TIES takes alone"
    assert [ledger.close().method for ledger in ledgers] == [result.method for result in results]
    for result in results:
        together = np.concatenate(memory[result.outputs[0].name]).view(np.uint16).reshape(SHAPE)
        alone = merge(fp8, TensorJob(fp8.reading(), (result,)))
        assert np.array_equal(together, alone.array), result.outputs[0].name


def _extent() -> Any:
    from stockflow.checkpoints.files.layout import Extent

    return Extent("model.safetensors", 8)


@pytest.mark.parametrize("decode", [Plain("F32"), BlockScaled("F8_E4M3", "BF16", (128, 128))], ids=["plain", "scaled"])
def test_the_ranges_of_parts_are_those_of_the_whole(decode: Decode) -> None:
    shape = (300, 200)
    whole = decode.ranges(shape, 0, 60_000)

    parts = [decode.ranges(shape, start, min(start + 7001, 60_000)) for start in range(0, 60_000, 7001)]

    assert [part[0].start for part in parts[1:]] == [part[0].stop for part in parts[:-1]]
    assert (parts[0][0].start, parts[-1][0].stop) == tuple(whole[0])
    for number in range(len(whole)):
        assert min(part[number].start for part in parts) == whole[number].start
        assert max(part[number].stop for part in parts) == whole[number].stop
