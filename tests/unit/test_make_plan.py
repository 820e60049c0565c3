"""What planning makes of checkpoints and a recipe, what it refuses, and how it lays the output out."""

import json
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.checkpoints.files.header import header_bytes, parse_header
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.job import COPY, COPY_EQUAL
from stockflow.planning.looks.one_file import is_read_from_one
from stockflow.planning.make import default_shard_size, few_shards_note
from stockflow.recipe import parse_size
from stockflow.storage import Stamp
from stockflow.text.sizes import counted
from tests.plans import NAMES, Merge, job, jobs_of, model, rule


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


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
    assert not any("which holds them all" in note for note in named.notes)


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


def test_a_missing_tensor_is_refused_unless_a_rule_names_it(merge: Merge) -> None:
    del merge.models[1]["embed.weight"], merge.models[2]["embed.weight"]
    merge.write()

    found = merge.refusal()

    assert f"'embed.weight' is missing in {merge.folders[1]}, {merge.folders[2]}" in found
    assert "one problem" in found
    assert "skip" not in found, "what the base has, its class computes with"
    assert jobs_of(merge.plan(stockflow=rule(filter="embed", action="copy")))["embed.weight"].result.method == COPY
    assert "embed.weight" not in jobs_of(merge.plan(stockflow=rule(filter="embed", action="skip")))


FAR: dict[str, tuple[dict[str, Any], str]] = {
    "percentages": (
        {"merge_method": "task_arithmetic", "parameters": {"weight": 60}}, "`weight: 60` is not .* write 0.6",
    ),
    "a factor": (
        {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.5, "lambda": 100}},
        "`lambda: 100` is not between -10 and 10",
    ),
    "weights of a third": (
        {"merge_method": "linear", "parameters": {"weight": 0.1, "normalize": False}}, "the weights sum to 0.3 and",
    ),
    "weights of an average": ({"merge_method": "linear", "parameters": {"weight": 0.3, "normalize": False}}, ""),
    "weights of twice": (
        {"merge_method": "linear", "parameters": {"weight": 0.7, "normalize": False}}, "the weights sum to 2.1 and",
    ),
    "weights that are normalized": ({"merge_method": "linear", "parameters": {"weight": 50.0 / 10}}, ""),
    "percentages that are normalized": ({"merge_method": "ties", "parameters": {"weight": 60, "normalize": True}}, ""),
    "percentages that are not": (
        {"merge_method": "task_arithmetic", "parameters": {"weight": 60, "normalize": False}}, "`weight: 60` is not",
    ),
    "percentages of directions": (
        {"merge_method": "multislerp", "parameters": {"weight": 60, "normalize_weights": False}}, "`weight: 60` is not",
    ),
    "a model times nothing": (
        {"merge_method": "passthrough", "parameters": {"scale": 0}}, "`scale: 0` of every tensor makes an output of",
    ),
    "a module times nothing": (
        {"merge_method": "passthrough", "parameters": {"scale": [{"filter": "embed", "value": 0}, {"value": 1}]}}, "",
    ),
    "a negative weight": ({"merge_method": "task_arithmetic", "parameters": {"weight": -1.5}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FAR)
def test_values_far_from_any_merge_are_said(merge: Merge, case: str) -> None:
    recipe, expected = FAR[case]
    if recipe["merge_method"] == "passthrough":
        merge.recipe = {"models": merge.recipe["models"][:1]}

    said = [each.text for each in merge.write().plan(**recipe).remarks if each.code == "far-values"]

    assert len(said) == bool(expected)
    assert not expected or re.match(expected, said[0])


DIVIDED: dict[str, str | None] = dict.fromkeys(
    ["linear", "task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"], "normalize"
) | {"multislerp": "normalize_weights", "nuslerp": None}
"""Methods that divide by the sum of all weights, and the flag that asks for it."""
ELECTING = ["ties", "dare_ties", "della", "breadcrumbs_ties"]
"""Methods that divide each number by the weights that agree on its sign."""


def said_of_weights(merge: Merge, method: str, flag: str | None, asked: bool, second: float = -0.9999) -> list[str]:
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(merge.folders[1:], (1.0, second), strict=True)
    ]
    parameters = {flag: asked} if flag else {}
    plan = merge.write().plan(merge_method=method, models=models, parameters=parameters)
    return [each.text for each in plan.remarks if each.code == "far-values"]


@pytest.mark.parametrize(
    ("method", "weight", "num_said"),
    [
        ("linear", [0.7, 0.3], 1),
        ("nuslerp", [0.7, 0.3], 1),
        ("task_arithmetic", [0.7, 0.3], 0),
        ("linear", 0.7, 0),
        ("linear", [{"filter": "embed", "value": 0.7}, {"value": 0.3}], 1),
    ],
    ids=str,
)
def test_a_gradient_of_weights_that_are_normalized_is_said_where_all_models_have_the_same(
    merge: Merge, method: str, weight: object, num_said: int
) -> None:
    plan = merge.write().plan(merge_method=method, parameters={"weight": weight})

    said = [each.text for each in plan.remarks if each.code == "no-effect"]

    assert len(said) == num_said
    assert all("the same for every model" in text for text in said)


@pytest.mark.parametrize(("second", "num_said"), [(0.4, 1), (1.0, 0)])
def test_a_median_that_one_weight_decides_is_said(merge: Merge, second: float, num_said: int) -> None:
    said = said_of_weights(merge, "geometric_median", None, True, second)

    assert said == ["with `weight: 1, 0.4` one model outweighs the others: it is the result itself"] * num_said


@pytest.mark.parametrize("method", DIVIDED)
def test_weights_that_cancel_magnify_what_models_have_apart(merge: Merge, method: str) -> None:
    flag = DIVIDED[method]

    (said,) = said_of_weights(merge, method, flag, True)

    assert said.startswith("the weights sum to 0.0001, by which all are divided: single ones count up to 1e+04 times")
    assert said.endswith(f"; change them, or `{flag}: false`" if flag else "; change them")
    if flag:
        assert not any("by which all are divided" in text for text in said_of_weights(merge, method, flag, False))


@pytest.mark.parametrize("method", sorted(DIVIDED.keys() - {"linear", "multislerp"}))
@pytest.mark.parametrize("second", [-1.0, -1.0 + 1e-13])
def test_weights_that_sum_to_zero_are_said_by_methods_that_do_not_refuse_them(
    merge: Merge, method: str, second: float
) -> None:
    (said,) = said_of_weights(merge, method, DIVIDED[method], True, second)

    assert said.startswith("the weights sum to zero, so nothing is divided by that: they count ")
    assert ("alike" if method == "nuslerp" else "as they are") in said
    assert DIVIDED[method] is None or not said_of_weights(merge, method, DIVIDED[method], False, second)


@pytest.mark.parametrize("method", ELECTING)
def test_weights_of_methods_that_elect_signs_do_not_cancel(merge: Merge, method: str) -> None:
    assert said_of_weights(merge, method, "normalize", True) == []


def test_what_all_tunes_have_is_not_advised_to_be_left_out(merge: Merge) -> None:
    for tensors in merge.models[1:]:
        tensors["score.weight"] = torch.ones(2, 3)

    found = merge.write().refusal()

    assert "all others were trained with it: take a base that has it" in found
    assert "skip" not in found


def test_a_head_that_the_class_of_the_output_does_not_have_is_advised_to_be_left_out(merge: Merge) -> None:
    merge.models[1]["lm_head.weight"] = merge.models[2]["lm_head.weight"] = torch.ones(2, 3)

    found = merge.write(config={"architectures": ["LlamaForSequenceClassification"]}).refusal()

    assert "all others were trained with it" in found
    assert f"the class of {merge.folders[0]} has none, a rule with `action: skip` leaves it out" in found


def test_index_data_of_other_lengths_is_advised_to_be_copied(merge: Merge) -> None:
    for tensors, length in zip(merge.models, (77, 248, 77), strict=True):
        tensors["position_ids"] = torch.arange(length)[None]

    found = merge.write().refusal()

    assert f"a rule with `action: copy` takes it from {merge.folders[0]}" in found
    copied = jobs_of(merge.plan(stockflow=rule(filter="position_ids", action="copy")))["position_ids"]
    assert copied.output.shape == (1, 77)


def test_a_bias_that_some_models_lack_is_not_advised_to_be_copied(merge: Merge) -> None:
    merge.models[0]["model.layers.0.self_attn.q_proj.bias"] = torch.ones(3)

    found = merge.write().refusal()

    assert "write zeros for it into that model" in found
    assert "to paste" not in found


def test_what_a_trainer_keeps_is_advised_to_be_left_out_though_all_tunes_have_it(merge: Merge) -> None:
    for tensors in merge.models[1:]:
        tensors["optimizer.state.embed.exp_avg"] = torch.ones(2, 3)

    assert "that is what a trainer keeps; a rule with `action: skip` leaves it out" in merge.write().refusal()


def test_rows_of_labels_are_no_tokens(merge: Merge) -> None:
    for number, tensors in enumerate(merge.models):
        tensors["classifier.weight"] = torch.ones(3 if number else 2, 7)

    found = merge.write().refusal()

    assert "a row is of something else than a token there, such as a label" in found
    assert "tokenizer" not in found


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
        f"'embed.weight' is [21, 7] in {merge.folders[1]}, expected [20, 7] as in {merge.folders[0]}; with the "
        "tokenizer.json of each model beside it, `tokenizer_source: base` merges rows by token"
    ) in merge.refusal()


def test_integers_of_another_width_and_integers_for_floats(merge: Merge) -> None:
    merge.models[1]["position_ids"] = torch.arange(9, dtype=torch.int32)
    merge.models[2]["layers.0.norm.weight"] = torch.ones(7, dtype=torch.int16)
    merge.write()

    found = merge.refusal()

    assert f"'position_ids' is I32 in {merge.folders[1]}, expected I64 as in {merge.folders[0]}" in found
    assert f"'layers.0.norm.weight' is I16 in {merge.folders[2]}, expected BF16 as in {merge.folders[0]}" in found
    assert "2 problems" in found


@pytest.mark.parametrize("where", [0, 2])
def test_fp8_is_refused_by_name_and_copied_by_rule(merge: Merge, where: int) -> None:
    merge.models[where]["embed.weight"] = torch.ones(20, 7).to(torch.float8_e4m3fn)
    merge.write()

    found = merge.refusal()

    assert f"{merge.folders[where]} holds FP8 weights (1 tensor, such as embed.weight)" in found
    assert "one problem" in found
    job = jobs_of(merge.plan(dtype="float32", stockflow=rule(filter="embed", action="copy")))["embed.weight"]
    assert job.output.dtype == ("F8_E4M3" if where == 0 else "BF16")
    assert job.output.num_bytes == job.reading.num_elems


def test_complex_tensors_are_compared_not_merged(merge: Merge) -> None:
    for tensors in merge.models:
        tensors["rotary"] = torch.ones(3, dtype=torch.complex64)

    assert jobs_of(merge.write().plan())["rotary"].result.method == COPY_EQUAL


def test_all_differences_are_reported_together(merge: Merge) -> None:
    for number in range(10):
        merge.models[1][f"extra{number}"] = torch.ones(1)
        merge.models[0][f"missing{number}"] = torch.ones(1)
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


@pytest.mark.parametrize(("config", "num_files"), [({"pretrained_cfg": {}}, 1), ({"model_type": "x"}, 3)])
def test_what_timm_reads_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], num_files: int
) -> None:
    monkeypatch.setattr("stockflow.planning.make.LEAST_SHARD_BYTES", 200)

    merge = Merge(tmp_path).write(config=config)

    assert len(merge.plan().shards) == num_files
    for size, is_cut in ((200, "pretrained_cfg" in config), (10**6, False)):
        remarks = merge.plan(stockflow={"shard_size": size}).remarks
        said = [remark.text for remark in remarks if remark.code == "one-file"]
        assert [text.startswith("the output is cut into 3 files, and ") for text in said] == [True] * is_cut


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (["open_clip_model.safetensors"], {"model_type": "x"}, True),
        (["consolidated.safetensors"], None, True),
        (["sd_xl_base_1.0.safetensors"], None, True),
        (["sd_xl_base_1.0.safetensors"], {"model_type": "x"}, False),
        (["model.safetensors"], None, False),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None, False),
        (["a-00001-of-00001.safetensors"], None, False),
        (["pytorch_model.bin"], None, False),
    ],
)
def test_which_loaders_read_one_file_is_told_from_names_and_config(
    names: list[str], config: dict[str, Any] | None, expected: bool
) -> None:
    files = {name: Stamp(1, "") for name in names}

    assert is_read_from_one(Checkpoint("/m", {}, {}, files, config, {}, ())) == expected


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
