"""`verify --sample`: tensors merged again from the inputs, held against records and bytes; lies are found and named."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stockflow.engine.cpu import HostArithmetic
from stockflow.engine.pieces import LoadedPiece
from stockflow.errors import BudgetError, PlanError
from stockflow.kernels.arrays import Floats
from stockflow.output.tables import encode_tensors, read_facts
from stockflow.storage import StorageConfig
from stockflow.text.sealed import seal
from stockflow.verification import recompute
from stockflow.verification.verify import SampleOptions, Verification, verify
from tests import runs
from tests.checkpoints import Family, Shape, make_family, write_recipe
from tests.integration.test_verify import endorse, manifest

MIB = 2**20
SHARD_SIZE = 300_000
SHAPES: dict[str, Shape] = {
    "embed.weight": (129, 257),
    "experts": (4, 33, 65),
    "long": (400_001,),
    "norm.weight": (1023,),
    "many.rows": (1500, 8),
    "empty": (0, 7),
    "scalar": (),
}
GROUPED = {"embed.weight": 129, "experts": 132, "many.rows": 1500}
"""Rows of the tensors that have rows."""


@dataclass(frozen=True)
class Case:
    """A merge, and how much of it has its coefficients on record."""

    name: str
    method: str
    num_recorded: int
    num_decided: int = 0
    num_tuned: int = 3
    dtype: torch.dtype = torch.bfloat16
    drawn: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)


WEIGHTS = {"per_model": {"weight": [0.3, 0.5, 0.4]}}
CASES = [
    Case("one ratio per tensor", "model_stock", 6),
    Case("one ratio per tensor, F32", "model_stock", 6, dtype=torch.float32),
    Case("one ratio per tensor, F64 to BF16", "model_stock", 6, dtype=torch.float64, asked={"dtype": "bfloat16"}),
    Case("by row", "model_stock", 5, 1, asked={"stockflow": {"scope": "row"}}),
    Case("by leading index", "model_stock", 6, asked={"stockflow": {"scope": "leading"}}),
    Case("opposed", "model_stock", 6, drawn={"cosine": -0.3}),
    Case("extrapolated", "model_stock", 6, drawn={"cosine": -0.3}, asked={"stockflow": {"on_negative": "extrapolate"}}),
    Case("linear", "linear", 6, asked=WEIGHTS),
    Case("linear, not normalized", "linear", 6, asked=WEIGHTS | {"parameters": {"normalize": False}}),
    Case("task_arithmetic", "task_arithmetic", 6, asked=WEIGHTS),
    Case("slerp, nearly parallel", "slerp", 6, num_tuned=1, asked={"parameters": {"t": 0.3}}),
    Case("slerp", "slerp", 6, num_tuned=1, drawn={"delta_scale": 0.03}, asked={"parameters": {"t": 0.3}}),
    Case("elected by sign", "ties", 0, 6, asked={"per_model": {"weight": [1.0, 0.5, 0.8], "density": [0.3, 0.5, 1.0]}}),
]

UNLIKE = ("one ratio per tensor, F64 to BF16", "by row", "by leading index", "linear", "slerp", "elected by sign")
"""Cases that differ in where their coefficients stand, or in what another machine makes of them."""


def sampled(output: Path, share: float = 1.0, seed: int = 1, memory_bytes: int = 1024 * MIB) -> Verification:
    options = SampleOptions(share, seed, memory_bytes + runs.grown_bytes(), num_threads=2)
    return verify(str(output), StorageConfig(), sample=options)


def found_in(output: Path) -> dict[str, str]:
    return {finding.where: finding.problem for finding in sampled(output).findings}


def merged(root: Path, case: Case) -> Path:
    family = make_family(root, case.num_tuned, SHAPES, case.dtype, num_shards=2, **case.drawn)
    runs.merge_here(
        write_recipe(root / "recipe.yaml", case.method, family, **case.asked), root / "out", shard_size=SHARD_SIZE
    )
    return root / "out"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.name}")
def test_every_method_is_recomputed_bit_for_bit(case: Case, tmp_path: Path) -> None:
    output = merged(tmp_path, case)

    result = sampled(output)

    assert result.findings == ()
    assert result.sampled is not None
    assert (result.sampled.num_recorded, result.sampled.num_decided) == (case.num_recorded, case.num_decided)
    assert result.sampled.num_copied == 4  # three buffers and the empty tensor
    assert result.sampled.num_left_out == 0
    assert result.sampled.same_class


@pytest.mark.parametrize("case", [case for case in CASES if case.name in UNLIKE], ids=lambda case: case.name)
def test_without_receipts_the_table_has_the_ratio_and_the_rest_is_decided_again(case: Case, tmp_path: Path) -> None:
    output = merged(tmp_path, case)
    shutil.rmtree(next(output.glob("_stockflow/*/receipts")))

    result = sampled(output)

    assert result.findings == ()
    assert result.sampled is not None
    scope = case.asked.get("stockflow", {}).get("scope", "tensor")
    on_table = {"model_stock": {"tensor": 5, "row": 3, "leading": 5}[scope], "slerp": 0, "ties": 0}.get(case.method, 6)
    assert (result.sampled.num_recorded, result.sampled.num_decided) == (on_table, 6 - on_table)


# ------------------------------------------------------------------------------- another class of machine


@pytest.mark.parametrize("case", [case for case in CASES if case.name in UNLIKE], ids=lambda case: case.name)
def test_another_class_of_machine_agrees(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU adds up in another order; what it decides differs in the last bits."""
    output = tmp_path / "out"
    family = make_family(tmp_path, case.num_tuned, SHAPES, case.dtype, num_shards=2, **case.drawn)
    recipe = write_recipe(tmp_path / "recipe.yaml", case.method, family, **case.asked)
    ours = HostArithmetic.gram

    def otherwise_rounded(self: HostArithmetic, span: LoadedPiece, group_elems: int, **asked: Any) -> Floats:
        products = ours(self, span, group_elems, **asked)
        return products * (1.0 + 1e-14 * np.cos(np.arange(products.size)).reshape(products.shape))

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(HostArithmetic, "numerics_class", "cuda-sm90")
        elsewhere.setattr(HostArithmetic, "gram", otherwise_rounded)
        runs.merge_here(recipe, output)

    result = sampled(output)

    assert manifest(output)["numerics_classes"] == ["cuda-sm90"]
    assert result.findings == ()
    assert result.sampled is not None
    assert not result.sampled.same_class
    assert result.sampled.num_left_out == 0
    shutil.rmtree(next(output.glob("_stockflow/*/receipts")))
    assert sampled(output).findings == ()  # decided again, where the table has no coefficients: close to the bytes


# ------------------------------------------------------------------------------------------- what is found


STOCK = CASES[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sampled")
    merged(root, STOCK)
    return root


@pytest.fixture
def output(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "out", tmp_path / "out"))


def shard_with(output: Path, name: str) -> str:
    index = json.loads((output / "model.safetensors.index.json").read_text())
    return str(index["weight_map"][name])


def rewrite_receipts(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every receipt and seal it anew."""
    for path in output.glob("_stockflow/*/receipts/*.json"):
        fields = json.loads(path.read_text())
        del fields["seal"]
        change(fields)
        path.write_bytes(seal(json.dumps(fields)))


def forge_shard(output: Path, name: str, change: Callable[[torch.Tensor], object]) -> str:
    """Change a tensor, and everything that states digests of its shard."""
    key = shard_with(output, name)
    tensors = load_file(output / key)
    before = (output / key).read_bytes()
    change(tensors[name])
    names = list(json.loads(before[8 : 8 + int.from_bytes(before[:8], "little")]))[1:]
    save_file({name: tensors[name] for name in names}, output / key, metadata={"format": "pt"})
    endorse(output, key)
    digest = manifest(output)["files"][key]
    rewrite_receipts(output, lambda fields: fields.update(digest) if fields["file"] == key else None)
    return key


def test_one_changed_weight_is_found_though_every_digest_agrees(output: Path) -> None:
    for name, place, shown in (("long", 300_000, "300,000"), ("embed.weight", 129 * 257 - 1, "33,152")):
        whole = Path(shutil.copytree(output, output.parent / name))

        key = forge_shard(whole, name, lambda tensor, at=place: tensor.view(-1)[at].add_(0.25))

        assert verify(str(whole), StorageConfig()).findings == ()
        found = found_in(whole)
        assert found.keys() == {key}
        assert f"{name!r} is not what the inputs give: 1 of " in found[key]
        assert found[key].endswith(f"elements differ, the first at flat index {shown}")


def test_a_changed_buffer_is_found(output: Path) -> None:
    key = forge_shard(output, "model.position_ids", lambda tensor: tensor.view(-1)[5].add_(1))

    assert "'model.position_ids' is not what the inputs give: 1 of 77 elements" in found_in(output)[key]


@pytest.mark.parametrize("column", ["mean_cosine", "min_cosine", "ratio", "legacy_ratio", "base_norm"])
def test_a_statistic_off_by_more_than_1e_7_is_found(output: Path, column: str) -> None:
    [path] = output.glob("_stockflow/*/tensors.parquet")
    key = str(path.relative_to(output))
    original = {row.name: row for row in read_facts(path)}["long"]

    def forge(change: float) -> dict[str, str]:
        rows = read_facts(path)
        lying = [row for row in rows if row.name == "long"]
        object.__setattr__(lying[0], column, getattr(original, column) * (1.0 + change))
        path.write_bytes(encode_tensors(rows))
        endorse(output, key)
        rewrite_receipts(output, lambda fields: agree(fields, lying[0]))
        return found_in(output)

    def agree(fields: dict[str, Any], lying: Any) -> None:
        for row in fields["tensors"]:
            if row["name"] == "long":
                row[column] = getattr(lying, column)

    found = forge(1e-5)

    assert f"says {column} of 'long' is" in found[key]
    if column not in ("ratio",):  # the combine takes a ratio by its last bit where no receipt has coefficients
        assert forge(1e-9) == {}


def test_coefficients_that_do_not_follow_from_the_inputs_are_found(output: Path) -> None:
    def lie(fields: dict[str, Any]) -> None:
        for row in fields["tensors"]:
            if row["name"] == "long":
                row["coefficients"] = [[(float.fromhex(text) * (1 + 1e-5)).hex() for text in row["coefficients"][0]]]

    rewrite_receipts(output, lie)
    found = found_in(output)

    shard = shard_with(output, "long")
    receipt = f"_stockflow/{manifest(output)['plan_id']}/receipts/{shard}.json"
    assert found.keys() == {receipt, shard}
    assert "says the coefficients of 'long' are " in found[receipt]
    assert "'long' is not what the inputs give" in found[shard]


# ------------------------------------------------------------------------------------------------- the inputs


def test_what_needs_a_changed_input_is_left_out_and_the_input_named(tmp_path: Path) -> None:
    family: Family = make_family(tmp_path, 2, SHAPES, num_shards=2)
    runs.merge_here(
        write_recipe(tmp_path / "recipe.yaml", "model_stock", family), tmp_path / "out", shard_size=SHARD_SIZE
    )
    touched = family.tuned[1] / "model-00001-of-00004.safetensors"
    num_touched = len(load_file(touched))
    touched.touch()

    result = sampled(tmp_path / "out")

    assert [finding.where for finding in result.findings] == [str(touched)]
    assert "changed since the merge" in result.findings[0].problem
    assert result.sampled is not None
    assert result.sampled.num_left_out == num_touched
    assert result.sampled.num_compared == result.sampled.num_planned - num_touched


def test_an_input_whose_bytes_rotted_is_found(tmp_path: Path) -> None:
    """Size and time are those of the plan: only the bytes can tell."""
    family = make_family(tmp_path, 2, SHAPES)
    runs.merge_here(write_recipe(tmp_path / "recipe.yaml", "model_stock", family), tmp_path / "out")
    path = family.tuned[0] / "model.safetensors"
    state, payload = path.stat(), bytearray(path.read_bytes())
    payload[-40_000] ^= 0x40
    path.write_bytes(payload)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    assert found_in(tmp_path / "out")


# -------------------------------------------------------------------------------------------- share, seed, memory


def test_a_seed_chooses_the_tensors_and_a_share_their_number(root: Path) -> None:
    results = [sampled(root / "out", share, seed).sampled for share, seed in ((0.3, 1), (0.3, 1), (0.3, 2), (1e-9, 1))]

    counts = [result.num_compared for result in results if result]
    assert counts == [3, 3, 3, 1]  # of ten
    assert results[0] == results[1] != results[2]


def test_a_budget_too_small_and_numerics_of_another_version_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match="Raise --memory"):
        sampled(root / "out", memory_bytes=20 * MIB)
    monkeypatch.setattr(recompute, "NUMERICS", 99)
    with pytest.raises(PlanError, match="made with numerics 6, this version of stockflow has 99"):
        sampled(root / "out")


def test_the_command_line_says_what_was_recomputed_how(root: Path) -> None:
    def invoke(*arguments: str) -> Any:
        return runs.invoke("verify", root / "out", *arguments)

    shown = invoke("--sample", "50%", "--seed", "7")
    as_json = invoke("--sample", "0.5", "--seed", "7", "--json")

    assert shown.exit_code == as_json.exit_code == 0, shown.output
    line = shown.stdout.splitlines()[-1]
    assert line.startswith("recomputed 5 of 10 tensors (--seed 7): ")
    stated: Mapping[str, Any] = json.loads(as_json.stdout)["sampled"]
    assert f"{stated['num_recorded']} combined from the coefficients on record" in line
    assert f"{stated['num_copied']} copied" in line
    for arguments, message in (
        (["--sample", "0"], "--sample: expected a share of the tensors such as 5% or 0.05"),
        (["--sample", "101%"], "--sample: expected a share"),
        (["--sample", "nan"], "--sample: expected a share"),
        (["--seed", "1"], "--seed and --memory go with --sample"),
    ):
        refused = invoke(*arguments)
        assert (refused.exit_code, message in refused.stderr) == (2, True)


def test_nothing_is_written(output: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.rglob("*") if path.is_file()}

    sampled(output)

    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.rglob("*") if path.is_file()
    }


def test_units_in_the_last_place_are_told_from_changes() -> None:
    from stockflow.verification.bits import Difference

    def compared(dtype: str, kind: Any, left: float, right: float) -> Difference:
        difference = Difference()
        pair = (np.array([1.0, value], kind).view(np.uint8) for value in (left, right))
        difference.add(dtype, 10, *map(memoryview, pair))
        return difference

    same = compared("F16", np.float16, 1.0, 1.0)
    assert (same.num_elems, same.first) == (0, -1)
    near = compared("F16", np.float16, 1.0, float(np.nextafter(np.float16(1), np.float16(2))))
    assert (near.num_elems, near.first, near.is_close) == (1, 11, True)
    assert not compared("F16", np.float16, 1.0, 1.01).is_close
    assert compared("F32", np.float32, 1e-9, -1e-9).is_close
    assert not compared("F32", np.float32, 0.5, 0.50001).is_close
    assert compared("F64", np.float64, 0.0, -0.0).is_close
    assert not compared("I64", np.int64, 3, 4).is_close
    assert not compared("F32", np.float32, 0.5, float("nan")).is_close
