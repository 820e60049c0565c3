"""The plan and what follows from it: identity, refusals, layout, the read schedule, the memory model."""

import copy
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.checkpoints.header import TensorSpec, header_bytes, parse_header
from stockflow.checkpoints.opening import Extent, open_checkpoints
from stockflow.errors import BudgetError, PlanError
from stockflow.methods.protocol import Parameters, Scope
from stockflow.planning.budget import (
    GOOD_NUM_SLABS,
    MAX_CHUNK_SPANS,
    MIB,
    MIN_SLABS,
    OPTIMAL_READ_BYTES,
    Workspace,
    default_memory,
    divide,
)
from stockflow.planning.job import COPIES, COPY, COPY_EQUAL, TensorJob, copying, merging, stored
from stockflow.planning.make import default_shard_size, few_shards_note, make_plan
from stockflow.planning.plan import MergePlan
from stockflow.planning.reads import ALIGNMENT, Load, LoadPiece, Request, Step, schedule, split_request
from stockflow.planning.spans import SPAN_ELEMS, span_bounds
from stockflow.recipe import parse_recipe, parse_size
from stockflow.storage import open_store
from stockflow.text.sizes import counted
from tests.checkpoints import write_checkpoint

NAMES = ("embed.weight", "layers.0.norm.weight", "layers.1.norm.weight", "position_ids", "scalar", "empty")


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(20, 7, generator=random).to(dtype),
        "layers.0.norm.weight": torch.randn(7, generator=random).to(dtype),
        "layers.1.norm.weight": torch.randn(7, generator=random).to(dtype),
        "position_ids": torch.arange(9),
        "scalar": torch.randn((), generator=random).to(dtype),
        "empty": torch.empty(0, 7, dtype=dtype),
    }


class Merge:
    """Three checkpoints on disk and a recipe that can be changed before it is planned."""

    def __init__(self, root: Path, num_shards: tuple[int, int, int] = (1, 2, 3)) -> None:
        self.folders = [root / name for name in ("base", "one", "two")]
        self.models = [model(seed) for seed in range(3)]
        self._num_shards = num_shards
        self.recipe: dict[str, Any] = {
            "merge_method": "model_stock",
            "base_model": str(self.folders[0]),
            "models": [{"model": str(folder)} for folder in self.folders[1:]],
        }

    def write(self, **kwargs: Any) -> "Merge":
        for folder, tensors, shards in zip(self.folders, self.models, self._num_shards, strict=True):
            write_checkpoint(folder, tensors, num_shards=shards, **kwargs)
        return self

    def plan(self, shard_size: int | None = None, **top_level: Any) -> MergePlan:
        recipe = parse_recipe(yaml.safe_dump(self.recipe | top_level), "recipe.yaml")
        stores = [open_store(location, recipe.storage) for location in recipe.checkpoints]
        return make_plan(recipe, open_checkpoints(stores), shard_size=shard_size)

    def refusal(self, **top_level: Any) -> str:
        with pytest.raises(PlanError) as caught:
            self.plan(**top_level)
        return str(caught.value)


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


def jobs_of(plan: MergePlan) -> dict[str, TensorJob]:
    return {job.output.name: job for job in plan.jobs}


def rule(**entry: Any) -> dict[str, Any]:
    return {"rules": [entry]}


# ----------------------------------------------------------------------------------------------- identity


def test_equal_inputs_give_equal_plans(merge: Merge) -> None:
    merge.write()

    assert merge.plan() == merge.plan()
    assert merge.plan().plan_id == merge.plan().plan_id
    assert re.fullmatch("[0-9a-f]{64}", merge.plan().plan_id)
    assert merge.plan().plan_id != merge.plan().merge_id


def test_the_plan_is_the_same_in_another_process(merge: Merge, tmp_path: Path) -> None:
    """Neither the hash seed nor the memory, the workers or the device of the command is in it."""
    merge.write()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge.recipe))
    expected = merge.plan()

    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "stockflow", "plan", path, tmp_path / "out", "--json", *options],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
                check=True,
                capture_output=True,
            ).stdout
        )
        for seed, options in (
            ("1", ["--memory", "700MiB", "--workers", "1"]),
            ("2", ["--memory", "3GiB", "--device=cpu"]),
        )
    ]

    assert [expected.plan_id] * 2 == [plan["plan_id"] for plan in found]
    assert [expected.merge_id] * 2 == [plan["merge_id"] for plan in found]


def test_what_the_recipe_says_about_anything_else_is_not_in_the_plan(merge: Merge) -> None:
    merge.write()
    plan = merge.plan()

    storage = {"storage": {"s3://elsewhere/": {"anonymous": True}}}

    assert plan.plan_id == merge.plan(stockflow=storage).plan_id
    assert plan.plan_id == merge.plan(stockflow={"on_negative": "clamp", "shard_size": "256MB"}).plan_id


CHANGES: dict[str, Mapping[str, Any]] = {
    "a parameter": {"parameters": {"filter_wise": True}},
    "a parameter for one tensor": {"parameters": {"filter_wise": [{"filter": "embed", "value": True}]}},
    "the policy": {"stockflow": {"on_negative": "extrapolate"}},
    "the scope": {"stockflow": {"scope": "leading"}},
    "the dtype": {"dtype": "float32"},
    "the method": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "a rule": {"stockflow": rule(filter="embed", action="copy")},
    "a tensor less": {"stockflow": rule(filter="embed", action="skip")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_both_ids_change_with_what_decides_the_output(merge: Merge, change: str) -> None:
    merge.write()
    before, after = merge.plan(), merge.plan(**CHANGES[change])

    assert before.plan_id != after.plan_id
    assert before.merge_id != after.merge_id


def test_both_ids_change_with_layout_order_and_the_donor_of_side_files(merge: Merge) -> None:
    merge.write()
    before = merge.plan()
    reordered = merge.plan(models=merge.recipe["models"][::-1])
    side_files = merge.plan(stockflow={"side_files_from": str(merge.folders[1])})

    for after in (merge.plan(shard_size=100), reordered, side_files):
        assert before.plan_id != after.plan_id
    for after in (merge.plan(shard_size=100), side_files):
        assert before.merge_id != after.merge_id


def test_both_ids_change_with_the_config_that_is_published(merge: Merge) -> None:
    merge.write()
    before = merge.plan()
    path = merge.folders[0] / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))

    after = merge.plan()

    assert before.config != after.config
    assert before.plan_id != after.plan_id
    assert before.merge_id != after.merge_id


def test_a_touched_input_is_another_plan_of_the_same_merge(merge: Merge) -> None:
    merge.write()
    before = merge.plan()
    os.utime(merge.folders[1] / "model-00001-of-00002.safetensors", ns=(1, 1))
    touched = merge.plan()
    os.utime(merge.folders[0] / "tokenizer.json", ns=(1, 1))
    touched_side_file = merge.plan()

    assert len({before.plan_id, touched.plan_id, touched_side_file.plan_id}) == 3
    assert len({before.merge_id, touched.merge_id, touched_side_file.merge_id}) == 1


def test_copies_elsewhere_give_the_same_merge(tmp_path: Path) -> None:
    here = Merge(tmp_path / "here").write()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    there = Merge(tmp_path / "there")

    assert here.plan().plan_id != there.plan().plan_id
    assert here.plan().merge_id == there.plan().merge_id


def test_inputs_that_are_sharded_otherwise_give_the_same_merge(tmp_path: Path) -> None:
    """Only the base's layout can matter: it gives the order."""
    one = Merge(tmp_path / "one", (1, 2, 3)).write()
    other = Merge(tmp_path / "other", (1, 3, 1)).write()

    assert one.plan().plan_id != other.plan().plan_id
    assert one.plan().merge_id == other.plan().merge_id


def test_the_plan_is_plain_json(merge: Merge) -> None:
    plan = merge.write().plan()

    text = json.dumps(plan.to_json(), allow_nan=False)

    assert plan.plan_id == json.loads(text)["plan_id"]
    assert [job.output.name for job in plan.jobs] == [
        row[0] for shard in json.loads(text)["shards"] for row in shard["tensors"]
    ]


# ----------------------------------------------------------------------------------- what becomes of tensors


def test_floats_are_merged_integers_compared_and_empty_tensors_copied(merge: Merge) -> None:
    jobs = jobs_of(merge.write().plan())

    assert {name: job.result.method for name, job in jobs.items()} == {
        "embed.weight": "model_stock",
        "layers.0.norm.weight": "model_stock",
        "layers.1.norm.weight": "model_stock",
        "scalar": "model_stock",
        "position_ids": COPY_EQUAL,
        "empty": COPY,
    }
    assert [operand.checkpoint for operand in jobs["embed.weight"].reading.operands] == [0, 1, 2]
    assert [operand.checkpoint for operand in jobs["position_ids"].reading.operands] == [0, 1, 2]
    assert jobs["position_ids"].reading.num_elems == 72


def test_the_output_follows_the_donors_order(tmp_path: Path) -> None:
    merge = Merge(tmp_path, (3, 1, 2)).write()
    files = sorted(merge.folders[0].glob("*.safetensors"))
    expected = []
    for path in files:
        payload = path.read_bytes()
        head = payload[: header_bytes(payload[:8], len(payload), "")]
        expected += [placed.spec.name for placed in parse_header(head, len(payload), "")]

    assert len(NAMES) == len(expected)
    assert expected == [job.output.name for job in merge.plan().jobs]


def test_without_a_base_the_first_model_is_the_donor(merge: Merge) -> None:
    merge.models[1] = {name: merge.models[1][name] for name in reversed(NAMES)}
    merge.write()
    recipe: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1.0}, "base_model": None}

    plan = merge.plan(**recipe)

    assert [str(folder) for folder in merge.folders[1:]] == [checkpoint.url for checkpoint in plan.checkpoints]
    assert plan.donor == 0
    assert all(job.output.dtype == job.reading.dtypes[0] for job in plan.jobs)


@pytest.mark.parametrize(
    ("dtypes", "written"),
    [
        (("BF16", "BF16", "BF16"), "BF16"),
        (("F16", "F16", "F16"), "F16"),
        (("BF16", "F16", "BF16"), "F32"),
        (("BF16", "F32", "BF16"), "F32"),
        (("F16", "F16", "F32"), "F32"),
        (("F32", "BF16", "F16"), "F32"),
        (("BF16", "F32", "F64"), "F64"),
    ],
)
def test_what_is_written_holds_every_source(merge: Merge, dtypes: tuple[str, ...], written: str) -> None:
    """As the usual tool promotes them; the donor's own would round the other models first."""
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    for number, dtype in enumerate(dtypes):
        merge.models[number] = model(number, kinds[dtype])

    plan = merge.write().plan()

    assert {job.output.dtype for job in plan.jobs if not job.is_copy} == {written}
    said = [note for note in plan.notes if f"written as {written}" in note]
    assert len(said) == (len(set(dtypes)) > 1)
    assert all(f"are of {' and '.join(sorted(set(dtypes)))} and" in note for note in said)
    named = merge.plan(dtype="bfloat16")
    assert {job.output.dtype for job in named.jobs if not job.is_copy} == {"BF16"}
    assert not any("written as" in note for note in named.notes)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("weights", ["of the recipe", "of each model", "both"])
def test_a_base_counts_for_linear_if_the_recipe_gives_it_a_weight(merge: Merge, weights: str, listed: bool) -> None:
    merge.write()
    base, *tuned = map(str, merge.folders)
    models = [{"model": folder} for folder in ([base, *tuned] if listed else tuned)]
    if weights != "of the recipe":
        models = [{**entry, "parameters": {"weight": 0.7}} for entry in models]
    shared = {} if weights == "of each model" else {"parameters": {"weight": 0.4}}

    plan = merge.plan(merge_method="linear", models=models, **shared)

    job = jobs_of(plan)["embed.weight"]
    said = [note for note in plan.notes if "is not among the models" in note]
    own = 0.4 if weights == "of the recipe" else 0.7
    if listed:
        assert [operand.checkpoint for operand in job.reading.operands] == [0, 1, 2]
        assert said == []
    elif weights == "of each model":
        assert [operand.checkpoint for operand in job.reading.operands] == [1, 2]
        assert job.result.parameters.each("weight") == (0.7, 0.7)
        assert "does not merge it in; it gives names" in said[0]
    else:
        assert [operand.checkpoint for operand in job.reading.operands] == [1, 2, 0]
        assert job.result.parameters.each("weight") == (own, own, 0.4)
        assert "merges it in like them" in said[0]
        assert base in said[0]
    assert plan.donor == 0


def test_mixed_float_dtypes_are_fine(merge: Merge) -> None:
    merge.models[0] = model(0, torch.float32)
    merge.models[2] = model(2, torch.float16)
    merge.write()

    job = jobs_of(merge.plan())["embed.weight"]
    cast = jobs_of(merge.plan(dtype="float32", out_dtype="float16"))["embed.weight"]

    assert list(job.reading.dtypes) == ["F32", "BF16", "F16"]
    assert (job.output.dtype, job.reading.bytes_per_elem, job.output_width, job.result.float_bits) == ("F32", 8, 4, 32)
    assert cast.output.dtype == "F16"


def test_a_float64_source_is_merged_in_float64(merge: Merge) -> None:
    merge.models[1] = model(1, torch.float64)

    assert jobs_of(merge.write().plan())["embed.weight"].reading.float_bits == 64


def test_rules_copy_skip_and_choose_another_method(merge: Merge) -> None:
    merge.write()
    rules = [
        {"filter": "embed", "action": "copy"},
        {"filter": "layers.0", "action": "skip"},
        {"filter": "layers.1", "merge_method": "linear", "parameters": {"weight": 0.5}},
        {"filter": "layers", "action": "skip"},
    ]

    plan = merge.plan(dtype="float32", stockflow={"rules": rules})

    jobs = jobs_of(plan)
    assert (jobs["embed.weight"].result.method, jobs["embed.weight"].output.dtype) == (COPY, "BF16")
    assert [operand.checkpoint for operand in jobs["embed.weight"].reading.operands] == [0]
    assert plan.skipped == ("layers.0.norm.weight",)
    assert "layers.0.norm.weight" not in jobs
    assert jobs["layers.1.norm.weight"].result.method == "linear"
    assert [operand.checkpoint for operand in jobs["layers.1.norm.weight"].reading.operands] == [1, 2]
    assert any("layers.0.norm.weight" in note for note in plan.notes)


def test_skipping_everything_is_refused(merge: Merge) -> None:
    assert "the rules skip every tensor" in merge.write().refusal(stockflow=rule(filter="*", action="skip"))


def test_checkpoints_without_tensors_are_refused(merge: Merge) -> None:
    merge.models = [{}, {}, {}]
    merge._num_shards = (1, 1, 1)

    assert f"{merge.folders[0]} holds no tensors" in merge.write().refusal()


# ----------------------------------------------------------------------------------------------- refusals


def test_a_missing_tensor_is_refused_unless_a_rule_names_it(merge: Merge) -> None:
    del merge.models[1]["embed.weight"], merge.models[2]["embed.weight"]
    merge.write()

    found = merge.refusal()

    assert f"'embed.weight' is missing in {merge.folders[1]}, {merge.folders[2]}" in found
    assert "one problem" in found
    assert jobs_of(merge.plan(stockflow=rule(filter="embed", action="copy")))["embed.weight"].result.method == COPY
    assert "embed.weight" not in jobs_of(merge.plan(stockflow=rule(filter="embed", action="skip")))


def test_an_extra_tensor_is_refused_unless_a_rule_skips_it(merge: Merge) -> None:
    merge.models[2]["vision.weight"] = torch.ones(3)
    merge.write()

    found = merge.refusal()

    assert f"'vision.weight' is in {merge.folders[2]} but not in {merge.folders[0]}" in found
    assert "action: skip" in found
    assert "vision" in merge.refusal(stockflow=rule(filter="vision", action="copy"))
    assert "vision.weight" not in jobs_of(merge.plan(stockflow=rule(filter="vision", action="skip")))


def test_shapes_that_differ(merge: Merge) -> None:
    merge.models[1]["embed.weight"] = torch.ones(21, 7, dtype=torch.bfloat16)
    merge.write()

    assert (
        f"'embed.weight' is [21, 7] in {merge.folders[1]}, expected [20, 7] as in {merge.folders[0]}" in merge.refusal()
    )


def test_integers_of_another_width_and_integers_for_floats(merge: Merge) -> None:
    merge.models[1]["position_ids"] = torch.arange(9, dtype=torch.int32)
    merge.models[2]["embed.weight"] = torch.ones(20, 7, dtype=torch.int16)
    merge.write()

    found = merge.refusal()

    assert f"'position_ids' is I32 in {merge.folders[1]}, expected I64 as in {merge.folders[0]}" in found
    assert f"'embed.weight' is I16 in {merge.folders[2]}, expected BF16 as in {merge.folders[0]}" in found
    assert "2 problems" in found


@pytest.mark.parametrize("where", [0, 2])
def test_fp8_is_refused_by_name_and_copied_by_rule(merge: Merge, where: int) -> None:
    merge.models[where]["embed.weight"] = torch.ones(20, 7).to(torch.float8_e4m3fn)
    merge.write()

    found = merge.refusal()

    assert f"'embed.weight' is F8_E4M3 in {merge.folders[where]}; FP8 and packed formats are not merged yet" in found
    assert "action: copy" in found
    job = jobs_of(merge.plan(dtype="float32", stockflow=rule(filter="embed", action="copy")))["embed.weight"]
    assert job.output.dtype == ("F8_E4M3" if where == 0 else "BF16")
    assert job.output.num_bytes == job.reading.num_elems


def test_complex_tensors_are_compared_not_merged(merge: Merge) -> None:
    for tensors in merge.models:
        tensors["rotary"] = torch.ones(3, dtype=torch.complex64)

    assert jobs_of(merge.write().plan())["rotary"].result.method == COPY_EQUAL


def test_all_differences_are_reported_together(merge: Merge) -> None:
    for number in range(10):
        merge.models[1][f"extra.{number}"] = torch.ones(1)
        merge.models[0][f"missing.{number}"] = torch.ones(1)
    merge.models[2]["embed.weight"] = torch.ones(1, 7, dtype=torch.bfloat16)
    for tensors in (merge.models[1], merge.models[2]):
        tensors["scalar"] = torch.tensor(1)
    merge.write()

    lines = merge.refusal().splitlines()

    assert "23 problems" in lines[0]
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 3 more"
    assert all(line.startswith("  '") for line in lines[1:-1])


def test_a_parameter_that_no_filter_gives_is_refused_by_tensor(merge: Merge) -> None:
    merge.write()
    weights: dict[str, Any] = {"parameters": {"weight": [{"filter": "layers", "value": 0.5}]}}

    with pytest.raises(ValueError, match=r"`linear` needs the parameter `weight` .* 'embed.weight'|'embed.weight'"):
        merge.plan(merge_method="linear", **weights)


# ------------------------------------------------------------------------------------------------- layout


def job(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...] = ("BF16", "BF16", "BF16"),
    *,
    output: str | None = None,
    method: str = "model_stock",
    scope: Scope = "tensor",
    starts: tuple[int, ...] | None = None,
) -> TensorJob:
    """A job whose sources lie in one file per checkpoint."""
    spec = TensorSpec(name, output or dtypes[0], shape)
    operands = tuple(
        stored(number, TensorSpec(name, dtype, shape), Extent("model.safetensors", starts[number] if starts else 0))
        for number, dtype in enumerate(dtypes)
    )
    if method in COPIES:
        return copying(spec, operands, method)
    return merging(spec, operands, method, Parameters(), scope)


@pytest.mark.parametrize(
    ("num_elems", "expected"),
    [
        (1, 256_000_000),
        (32_768_000_000, 256_000_000),
        (64_000_000_000, 500_000_000),
        (640_000_000_000, 5_000_000_000),
        (10**13, 5_000_000_000),
    ],
)
def test_the_default_shard_size_follows_from_the_output_alone(num_elems: int, expected: int) -> None:
    assert expected == default_shard_size([job("a", (num_elems,), output="BF16")])


def test_one_shard_is_a_plain_file_and_several_are_numbered(merge: Merge) -> None:
    merge.write()

    assert [shard.file for shard in merge.plan().shards] == ["model.safetensors"]
    assert [shard.file for shard in merge.plan(shard_size=1).shards][:2] == [
        "model-00001-of-00005.safetensors",
        "model-00002-of-00005.safetensors",
    ]


@pytest.mark.parametrize("shard_size", [1, 13, 14, 15, 28, 72, 100, 280, 281, 352, 10_000])
def test_shards_are_filled_in_order_up_to_the_size(merge: Merge, shard_size: int) -> None:
    merge.write()
    whole = [job.output.name for job in merge.plan().jobs]

    shards = merge.plan(shard_size=shard_size).shards

    assert whole == [job.output.name for shard in shards for job in shard.jobs]
    for shard in shards:
        num_bytes = [job.output.num_bytes for job in shard.jobs]
        assert sum(num_bytes) <= shard_size or sum(map(bool, num_bytes)) == 1
        assert shard.num_bytes == len(shard.header) + sum(num_bytes)
        placed = parse_header(shard.header, shard.num_bytes, shard.file)
        assert {job.output for job in shard.jobs} == {entry.spec for entry in placed}
    for before, after in pairwise(shards):
        assert sum(job.output.num_bytes for job in (*before.jobs, after.jobs[0])) > shard_size


def test_the_recipes_shard_size_yields_to_the_command_lines(merge: Merge) -> None:
    merge.write()
    options = {"shard_size": 100}

    assert len(merge.plan(stockflow=options).shards) == len(merge.plan(shard_size=100).shards) > 1
    assert len(merge.plan(shard_size=10_000, stockflow=options).shards) == 1


# -------------------------------------------------------------------------------------------------- spans


@given(num_groups=st.integers(0, 40), group_elems=st.integers(1, 3 * SPAN_ELEMS + 5))
@settings(deadline=None)
def test_spans_cover_a_tensor_once_and_never_straddle_their_boundaries(num_groups: int, group_elems: int) -> None:
    num_elems = num_groups * group_elems

    spans = list(span_bounds(num_elems, group_elems))

    assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), num_elems]
    for start, stop in spans:
        assert 0 < stop - start <= SPAN_ELEMS
        if group_elems <= SPAN_ELEMS:
            assert start % group_elems == stop % group_elems == 0
        else:
            assert start // group_elems == (stop - 1) // group_elems
            assert start % group_elems % SPAN_ELEMS == 0
            assert stop % group_elems % SPAN_ELEMS == 0 or stop % group_elems == 0


def test_nothing_has_no_spans() -> None:
    assert list(span_bounds(0, 0)) == []
    assert list(span_bounds(0, 5)) == []


# ----------------------------------------------------------------------------------------------- schedule

shapes = st.one_of(
    st.lists(st.integers(0, 50), max_size=3).map(tuple),
    st.tuples(st.integers(1, 9), st.integers(1, 2 * SPAN_ELEMS)),
    st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(1, 1000)),
    st.tuples(st.integers(1, 9 * SPAN_ELEMS)),
)
methods = st.sampled_from(
    [
        *(("model_stock", scope) for scope in get_args(Scope)),
        *((method, "tensor") for method in ("linear", COPY, COPY_EQUAL)),
    ]
)


@st.composite
def shards(draw: st.DrawFn) -> list[TensorJob]:
    """Tensors laid out one after the other, with gaps and in another order in some checkpoints."""
    num_sources = draw(st.integers(2, 4))
    float_dtypes = st.tuples(*[st.sampled_from(["BF16", "F32", "F64"])] * num_sources)
    drawn = [(draw(shapes), draw(methods), draw(float_dtypes)) for _ in range(draw(st.integers(1, 12)))]
    starts: list[list[int]] = [[0] * len(drawn) for _ in range(num_sources)]
    for checkpoint in range(num_sources):
        position = draw(st.integers(8, 200))
        for index in draw(st.permutations(range(len(drawn)))) if draw(st.booleans()) else range(len(drawn)):
            starts[checkpoint][index] = position
            shape, _, dtypes = drawn[index]
            position += TensorSpec("", dtypes[checkpoint], shape).num_bytes + draw(st.sampled_from([0, 0, 0, 5]))
    jobs = []
    for index, (shape, (method, scope), dtypes) in enumerate(drawn):
        count = 1 if method == COPY else num_sources
        jobs.append(
            job(
                f"t{index}",
                shape,
                dtypes[:1] * count if method == COPY_EQUAL else dtypes[:count],
                method=method,
                scope=scope,
                starts=tuple(row[index] for row in starts),
            )
        )
    return jobs


def workspace_for(jobs: list[TensorJob], spare: int, *, direct: bool = False) -> Workspace:
    return divide(jobs, spare, num_threads=1, baseline_bytes=0, direct=direct)


def pieces_of(steps: list[Step]) -> list[LoadPiece]:
    return [piece for step in steps for load in step.loads for piece in load.pieces]


def check_load(load: Load, workspace: Workspace, room: int) -> None:
    """Every source byte of every piece is where the offsets say, in ``room`` bytes."""
    taken = sorted((request.offset, request.offset + request.stop - request.start) for request in load.requests)
    assert all(before[1] <= after[0] for before, after in pairwise(taken)), "requests overwrite each other"
    assert all(stop <= room for _, stop in taken), "a load is larger than its slab"
    assert sum(piece.work.output_width * (piece.stop - piece.start) for piece in load.pieces) <= workspace.out_bytes
    for piece, offsets in zip(load.pieces, load.offsets, strict=True):
        reading = piece.work.reading
        for operand, width, offset in zip(reading.operands, reading.widths, offsets, strict=True):
            start = operand.extents[0].start + width * piece.start
            num_bytes = width * (piece.stop - piece.start)
            if num_bytes:
                holders = [
                    request
                    for request in load.requests
                    if request.checkpoint == operand.checkpoint and request.start <= start < request.stop
                ]
                assert any(
                    start + num_bytes <= holder.stop and offset == holder.offset + start - holder.start
                    for holder in holders
                )
                assert offset % width == 0
    widths = {
        (operand.checkpoint, operand.extents[0].file, operand.extents[0].start + width * piece.start): width
        for piece in load.pieces
        for operand, width in zip(piece.work.reading.operands, piece.work.reading.widths, strict=True)
        if piece.stop > piece.start
    }
    for before, after in pairwise(load.requests):
        touching = (before.checkpoint, before.file) == (after.checkpoint, after.file) and after.start <= before.stop
        aligned = (after.start - before.start) % widths[after.checkpoint, after.file, after.start] == 0
        assert not (touching and aligned), "neighbours in a file are read by one request"


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB), direct=st.booleans())
@settings(deadline=None, max_examples=120)
def test_the_schedule_covers_every_tensor_once_within_its_slabs(
    jobs: list[TensorJob], spare: int, direct: bool
) -> None:
    workspace = workspace_for(jobs, spare, direct=direct)

    steps = list(schedule(jobs, workspace))

    pieces = pieces_of(steps)
    for each in jobs:
        own = [piece for piece in pieces if piece.work is each]
        assert [0, *(piece.stop for piece in own)] == [*(piece.start for piece in own), each.reading.num_elems]
        spans = list(span_bounds(each.reading.num_elems, each.reading.group_elems))
        assert {piece.start for piece in own if piece.stop} <= {start for start, _ in spans}
        assert {piece.stop for piece in own if piece.stop} <= {stop for _, stop in spans}
    order = [piece.work.output.name for piece in pieces]
    assert [each.output.name for each in jobs] == list(dict.fromkeys(order))
    for step in steps:
        for load in step.loads:
            check_load(load, workspace, sys.maxsize if step.direct else workspace.slab_bytes)


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB))
@settings(deadline=None, max_examples=120)
def test_steps_are_whole_units_and_held_ones_fit(jobs: list[TensorJob], spare: int) -> None:
    workspace = workspace_for(jobs, spare)

    for step in schedule(jobs, workspace):
        if step.held:
            assert len(step.loads) <= workspace.num_slabs
            assert step.num_reads == 1
        if len(step.loads) == 1:
            assert (step.num_sweeps, step.held) == (1, True)
            continue
        pieces = [piece for load in step.loads for piece in load.pieces]
        assert len(pieces) == len(step.loads)
        [owner] = {id(piece.work): piece.work for piece in pieces}.values()
        assert step.num_sweeps == owner.num_sweeps
        assert pieces[0].start % owner.reading.group_elems == 0
        assert pieces[-1].stop - pieces[0].start == owner.reading.group_elems
        assert all(before.stop == after.start for before, after in pairwise(pieces))
        if step.num_sweeps > 1:
            assert step.held == (len(step.loads) <= workspace.num_slabs)


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB), direct=st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_workspace_keeps_within_the_memory(jobs: list[TensorJob], spare: int, direct: bool) -> None:
    workspace = workspace_for(jobs, spare, direct=direct)

    assert workspace.projected_bytes <= spare or not any(each.reading.num_elems for each in jobs)
    assert workspace.num_slabs >= MIN_SLABS
    for each in jobs:
        if each.reading.num_elems:
            assert workspace.chunk_elems(each) >= SPAN_ELEMS


def test_neighbours_in_a_file_are_one_request() -> None:
    """What makes small tensors cheap on object storage: 100 norms of 4 checkpoints are 4 requests."""
    jobs = [job(f"n{i}", (64,), ("BF16",) * 4, starts=(8 + 128 * i,) * 4) for i in range(100)]

    [step] = schedule(jobs, workspace_for(jobs, 64 * MIB))

    assert len(step.loads) == 1
    assert [(request.checkpoint, request.start, request.stop) for request in step.loads[0].requests] == [
        (0, 8, 12_808),
        (1, 8, 12_808),
        (2, 8, 12_808),
        (3, 8, 12_808),
    ]


def test_a_large_tensor_is_held_if_it_fits_and_read_again_if_not() -> None:
    large = job("t", (40 * SPAN_ELEMS,), ("F32",) * 3)
    roomy = divide([large], 1024 * MIB, num_threads=1, baseline_bytes=0)
    tight = divide([large], 16 * MIB, num_threads=1, baseline_bytes=0)

    [held], [streamed] = schedule([large], roomy), schedule([large], tight)

    assert (held.held, held.num_sweeps, held.num_reads) == (True, 2, 1)
    assert (streamed.held, streamed.num_sweeps, streamed.num_reads) == (False, 2, 2)
    assert len(held.loads) < len(streamed.loads)


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB))
@settings(deadline=None, max_examples=120)
def test_direct_steps_are_the_units_larger_than_a_span_and_hold_nothing(jobs: list[TensorJob], spare: int) -> None:
    for step in schedule(jobs, workspace_for(jobs, spare, direct=True)):
        pieces = [piece for load in step.loads for piece in load.pieces]
        if not step.direct:
            assert all(piece.stop - piece.start <= SPAN_ELEMS for piece in pieces)
            continue
        owner = pieces[0].work
        assert {id(piece.work) for piece in pieces} == {id(owner)}
        assert pieces[-1].stop - pieces[0].start > SPAN_ELEMS
        assert step.num_reads == step.num_sweeps == owner.num_sweeps


def test_direct_reading_takes_the_same_memory_whatever_the_tensor() -> None:
    small, huge = (job("t", (spans * SPAN_ELEMS,), ("BF16",) * 5) for spans in (40, 400_000))

    small_bytes, huge_bytes = (workspace_for([each], 2**40, direct=True).projected_bytes for each in (small, huge))

    assert small_bytes == huge_bytes < 32 * MIB


def test_without_statistics_nothing_is_read_twice() -> None:
    for method in ("linear", COPY, COPY_EQUAL):
        large = job("t", (40 * SPAN_ELEMS,), ("F32",) * 3, method=method)

        [step] = schedule([large], divide([large], 16 * MIB, num_threads=1, baseline_bytes=0))

        assert len(step.loads) > 1
        assert step.num_reads == 1


def test_rows_that_fit_are_units_of_their_own_in_one_pass() -> None:
    rows = job("t", (1000, 4096), ("BF16",) * 3, scope="row")

    steps = list(schedule([rows], divide([rows], 32 * MIB, num_threads=1, baseline_bytes=0)))

    assert len(steps) > 1
    assert all((len(step.loads), step.num_reads) == (1, 1) for step in steps)
    assert all(piece.start % 4096 == piece.stop % 4096 == 0 for piece in pieces_of(steps))


@given(start=st.integers(0, 10**12), size=st.integers(1, 5 * OPTIMAL_READ_BYTES))
def test_a_range_is_split_into_the_size_that_storage_serves_best(start: int, size: int) -> None:
    request = Request(0, "model.safetensors", start, start + size, offset=ALIGNMENT)

    parts = list(split_request(request))

    assert [start, *(part.stop for part in parts)] == [*(part.start for part in parts), start + size]
    assert all(part.stop - part.start == OPTIMAL_READ_BYTES for part in parts[:-1])
    assert all(part.offset - request.offset == part.start - start for part in parts)
    assert len(parts) == math.ceil(size / OPTIMAL_READ_BYTES)


# ------------------------------------------------------------------------------------------------- budget


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    jobs = [job("small", (9,), ("BF16",) * 2), job("model.wide", (10**9,), ("F32",) * 9)]

    with pytest.raises(BudgetError) as caught:
        divide(jobs, 100 * MIB, num_threads=4, baseline_bytes=80 * MIB)

    found = str(caught.value)
    needed = int(re.search(r"at least ([\d,]+) MiB", found)[1].replace(",", ""))  # type: ignore[index]
    assert "'model.wide'" in found
    assert "262,144 elements x 9 checkpoints x 4 threads, 80 MiB of it for the process itself" in found
    assert "the limit is 100 MiB. Raise --memory or lower --workers" in found
    divide(jobs, (needed + 1) * MIB, num_threads=4, baseline_bytes=80 * MIB)
    with pytest.raises(BudgetError):
        divide(jobs, (needed - 1) * MIB, num_threads=4, baseline_bytes=80 * MIB)


def test_fewer_workers_are_no_advice_for_one_thread() -> None:
    """A Ray worker has one thread, however many workers there are."""
    with pytest.raises(BudgetError, match=r"the limit is 100 MiB\. Raise --memory$"):
        divide([job("w", (10**9,), ("F32",) * 9)], 100 * MIB, num_threads=1, baseline_bytes=80 * MIB)


def test_more_memory_buys_larger_chunks_then_more_slabs_and_no_more_than_is_useful() -> None:
    jobs = [job("t", (10**9,), ("BF16",) * 5)]
    sizes = [2**exponent * MIB for exponent in range(4, 15)]

    workspaces = [divide(jobs, size, num_threads=2, baseline_bytes=0) for size in sizes]

    assert [w.slab_bytes for w in workspaces] == sorted(w.slab_bytes for w in workspaces)
    assert workspaces[0].chunk_elems(jobs[0]) == SPAN_ELEMS
    assert workspaces[-1].chunk_elems(jobs[0]) == MAX_CHUNK_SPANS * SPAN_ELEMS
    assert all(w.num_slabs >= GOOD_NUM_SLABS for w in workspaces[1:])
    assert all(w.projected_bytes <= size for w, size in zip(workspaces, sizes, strict=True))
    small = divide([job("t", (10,))], 2**40, num_threads=2, baseline_bytes=0)
    assert small.projected_bytes < 200 * MIB


def test_nothing_to_do_needs_no_buffers() -> None:
    workspace = divide([job("e", (0, 4), method=COPY)], MIB, num_threads=1, baseline_bytes=0)

    assert workspace.projected_bytes < MIB
    [step] = schedule([job("e", (0, 4), method=COPY)], workspace)
    assert step.loads[0].requests == ()


def test_default_memory_is_a_share_of_what_is_there() -> None:
    whole = default_memory()

    assert 0 < whole <= 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert default_memory(4) == pytest.approx(whole / 4, rel=0.05)


def test_plans_survive_copying(merge: Merge) -> None:
    """Plans travel to workers; a digest computed before must not be what makes two of them equal."""
    plan = merge.write().plan()
    _ = plan.plan_id

    assert copy.deepcopy(plan) == plan
    assert copy.deepcopy(plan).plan_id == plan.plan_id


def test_large_shards_are_noted_with_a_size_that_gives_sixteen_per_worker(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for folder in merge.folders:
        write_holes(folder, num_tensors=400, tensor_bytes=10**9)

    (note,) = few_shards_note(merge.plan(200 * 10**9), 8)

    assert (
        note == "2 shards for 8 workers: with fewer than 4 each, some idle at the end; --shard-size 3.1GB gives enough"
    )


def write_holes(folder: Path, *, num_tensors: int, tensor_bytes: int) -> None:
    """Write a checkpoint whose header is real, and whose weights are one hole in a sparse file."""
    header = {
        f"layers.{index}.weight": {
            "dtype": "BF16",
            "shape": [tensor_bytes // 2],
            "data_offsets": [index * tensor_bytes, (index + 1) * tensor_bytes],
        }
        for index in range(num_tensors)
    }
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + num_tensors * tensor_bytes)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_few_shards_for_many_workers_are_noted_with_a_size_that_gives_enough(tmp_path: Path, num_workers: int) -> None:
    merge = Merge(tmp_path, (1, 1, 1))
    merge.models = [{f"layers.{index}.weight": torch.ones(10 + index % 5, 40) for index in range(20)}] * 3
    merge.write()

    (note,) = few_shards_note(merge.plan(), num_workers)

    assert note.startswith(
        f"1 shard for {counted(num_workers, 'worker')}: with fewer than 4 each, some idle at the end; --shard-size "
    )
    size = note.split("--shard-size ")[1].split(" ")[0]
    assert few_shards_note(merge.plan(parse_size(size)), num_workers) == []
    assert few_shards_note(merge.plan(), None) == []
