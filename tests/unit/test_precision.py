"""Precision: what stays finer than asked, what is never averaged, and what a smaller range loses, in figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stockflow
from stockflow.planning.job import COPY, COPY_EQUAL
from stockflow.planning.plan import MergePlan
from tests import runs
from tests.plans import Merge, jobs_of, rule

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FINER = {
    "mlp.gate.e_score_correction_bias": (4,), "mixer.A_log": (4,), "mixer.dt_bias": (4,), "attn.sinks": (4,),
    "norm.weight": (7,), "router.weight": (4, 7),
}  # fmt: skip


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


def add(merge: Merge, name: str, *tensors: torch.Tensor) -> Merge:
    for own, tensor in zip(merge.models, tensors, strict=True):
        own[name] = tensor.clone()
    return merge


def drawn(shape: tuple[int, ...], dtype: torch.dtype = F32) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)]


def codes(plan: MergePlan) -> list[str]:
    return [remark.code for remark in plan.remarks]


# Dtypes


@pytest.mark.parametrize("name", FINER)
def test_what_every_model_stores_finer_than_its_rest_stays_so_and_that_is_said(merge: Merge, name: str) -> None:
    add(merge, name, *drawn(FINER[name])).write(config={})

    plan = merge.plan(dtype="bfloat16")
    blind = merge.plan(dtype="bfloat16", stockflow={"keep_precision": False})

    assert {job.output.dtype for job in plan.jobs if job.output.name == name} == {"F32"}
    assert {job.output.dtype for job in plan.jobs if not job.is_copy and job.output.name != name} == {"BF16"}
    (said,) = (remark for remark in plan.remarks if remark.code != "routers-merged")
    assert (said.code, said.severity, said.tensors) == ("precision-kept", "note", (name,))
    assert "is written as F32 instead of BF16" in said.text
    assert {job.output.dtype for job in blind.jobs if not job.is_copy} == {"BF16"}
    assert set(codes(blind)) <= {"routers-merged"}


def test_a_kept_tensor_is_merged_to_the_last_bit_of_its_own_precision(merge: Merge, tmp_path: Path) -> None:
    tensors = drawn((4,))
    add(merge, "mixer.A_log", *tensors).write(config={})
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in merge.folders[1:]]
    recipe = merge.recipe | {"merge_method": "task_arithmetic", "models": models, "dtype": "bfloat16"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")["mixer.A_log"]
    base, one, two = (tensor.double() for tensor in tensors)
    assert torch.equal(found, (base + 0.5 * (one - base) + 0.5 * (two - base)).float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_checkpoint_that_is_finer_as_a_whole_is_cast_as_asked(merge: Merge) -> None:
    for tensors in merge.models:
        tensors.update({name: each.float() for name, each in tensors.items() if each.is_floating_point()})

    plan = merge.write(config={}).plan(dtype="bfloat16")

    assert {job.output.dtype for job in plan.jobs if not job.is_copy} == {"BF16"}
    assert codes(plan) == []


@pytest.mark.parametrize(
    ("dtypes", "asked", "kept"),
    [
        ((F32, F32, F32), "bfloat16", "F32"),
        ((F64, F64, F64), "bfloat16", "F64"),
        ((F64, F32, F32), "bfloat16", "F64"),
        ((F32, BF16, F32), "bfloat16", "BF16"),
        ((BF16, F32, F32), "bfloat16", "BF16"),
        ((F32, F32, F32), "float16", "F32"),
        ((F32, F32, F32), "float32", "F32"),
        ((F64, F64, F64), "float32", "F64"),
        ((F32, F32, F32), "float64", "F64"),
        ((F16, F16, F16), "bfloat16", "BF16"),
    ],
)
def test_it_takes_all_models_to_keep_a_tensor(
    merge: Merge, dtypes: tuple[torch.dtype, ...], asked: str, kept: str
) -> None:
    add(merge, "bias", *(tensor.to(dtype) for tensor, dtype in zip(drawn((4,)), dtypes, strict=True)))

    plan = merge.write(config={}).plan(dtype=asked)

    assert jobs_of(plan)["bias"].output.dtype == kept
    said = [remark for remark in plan.remarks if remark.code == "dtypes-differ"]
    assert [(each.severity, each.tensors) for each in said] == [
        ("note" if dtypes[0] == BF16 else "warning", ("bias",))
    ] * (BF16 in dtypes)


def test_without_finer_tensors_the_plan_is_the_same_either_way(merge: Merge) -> None:
    merge.write(config={})
    ids = {merge.plan(dtype="bfloat16", stockflow={"keep_precision": keep}).plan_id for keep in (True, False)}

    assert len(ids) == 1


# Index data and integers


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize(
    "name", ["embeddings.position_ids", "position_ids_2.position_ids", "embeddings.token_type_ids"]
)
def test_index_data_in_floats_is_carried_over_in_its_own_dtype(merge: Merge, name: str, dtype: torch.dtype) -> None:
    positions = torch.arange(77).reshape(1, 77).to(dtype)
    plan = add(merge, name, positions, positions, positions).write(config={}).plan(dtype="float16")

    job = jobs_of(plan)[name]
    assert job.method == COPY_EQUAL
    assert job.output.dtype == {F32: "F32", F64: "F64", F16: "F16", BF16: "BF16"}[dtype]
    assert "index-data" in codes(plan)


NO_WEIGHTS = {
    "visual.attn_mask": torch.full((7, 7), -torch.inf).triu(1),
    "h.0.attn.mask": torch.full((7, 7), -torch.inf).triu(1),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "layers.0.rotary_emb.inv_freq": 1e4 ** -torch.linspace(0, 1, 8),
    "fc.weight_mask": torch.tensor([1.0, 0.0, 1.0]),
    "freqs_cis": torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_masks_and_frequencies_are_carried_over_or_refused_where_they_differ(merge: Merge, name: str) -> None:
    value = NO_WEIGHTS[name]
    plan = add(merge, name, value, value, value).write(config={}).plan()

    assert jobs_of(plan)[name].method == COPY_EQUAL
    assert codes(plan) == (["index-data"] if value.dtype == F32 else [])
    other = 1 - value if name.endswith("weight_mask") else value * 2 + 1
    found = add(merge, name, value, value, other).write(config={}).refusal()
    assert f"'{name}' is not equal in all models" in found
    assert ("torch.nn.utils.prune.remove" if "weight_mask" in name else "a rule with `action: copy`") in found


def test_frequencies_that_tunes_store_rounded_are_the_donors(merge: Merge) -> None:
    value = NO_WEIGHTS["layers.0.rotary_emb.inv_freq"]
    plan = add(merge, "rope.inv_freq", value, value.bfloat16(), value.half()).write(config={}).plan()

    assert (jobs_of(plan)["rope.inv_freq"].method, jobs_of(plan)["rope.inv_freq"].output.dtype) == (COPY, "F32")
    assert (
        "is not equal in all models"
        in add(merge, "rope.inv_freq", value, *[value.half() * 1.01] * 2).write(config={}).refusal()
    )


def test_tokens_of_a_draft_that_differ_are_not_advised_to_be_copied(merge: Merge) -> None:
    found = add(merge, "d2t", torch.arange(4), torch.arange(4), torch.arange(4) + 1).write(config={}).refusal()

    assert "the rows of its head are of other tokens: merge drafts of one vocabulary" in found
    assert "action" not in found


@pytest.mark.parametrize(
    "values",
    [drawn((9,)), [torch.tensor(0.0), *drawn(())[1:]], [torch.tensor(1.0)] * 3, [torch.ones(9), *drawn((9,))[1:]]],
    ids=["any", "a scalar", "a scalar alike", "ones that are trained"],
)
def test_weights_under_the_name_of_a_mask_are_weights(merge: Merge, values: list[torch.Tensor]) -> None:
    plan = add(merge, "spatial_mask", *values).write(config={}).plan()

    assert jobs_of(plan)["spatial_mask"].method == "model_stock"
    assert "index-data" not in codes(plan)


def test_a_mask_of_16_bits_is_one(merge: Merge) -> None:
    value = torch.full((7, 7), -1e4, dtype=BF16).triu(1)

    assert (
        jobs_of(add(merge, "attn_mask", value, value, value).write(config={}).plan())["attn_mask"].method == COPY_EQUAL
    )


def test_large_masks_are_told_by_a_part_of_the_first(merge: Merge) -> None:
    hiding = torch.full((600, 600), -torch.inf).triu(1)
    for tensors in merge.models:
        tensors |= {f"h.{layer}.attn.mask": hiding.clone() for layer in range(2)}
        tensors["h.0.soft_mask"] = drawn((600, 600))[0]

    found = jobs_of(merge.write(config={}).plan())

    assert [found[f"h.{layer}.attn.mask"].method for layer in range(2)] == [COPY_EQUAL] * 2
    assert found["h.0.soft_mask"].method == "model_stock"


def test_equal_indices_of_several_dtypes_are_the_donors(merge: Merge) -> None:
    positions = torch.arange(300)
    plan = add(merge, "e.position_ids", positions.float(), positions, positions.double()).write(config={}).plan()
    assert (jobs_of(plan)["e.position_ids"].method, jobs_of(plan)["e.position_ids"].output.dtype) == (COPY, "F32")

    plan = add(merge, "e.position_ids", positions, positions.float(), positions).write(config={}).plan()
    assert (jobs_of(plan)["e.position_ids"].method, jobs_of(plan)["e.position_ids"].output.dtype) == (COPY, "I64")


def test_weights_under_the_name_of_indices_are_weights(merge: Merge) -> None:
    plan = add(merge, "e.position_ids", *drawn((77,))).write(config={}).plan()

    assert jobs_of(plan)["e.position_ids"].method == "model_stock"


DIFFERENT: dict[str, tuple[torch.Tensor, torch.Tensor, str]] = {
    "bn.num_batches_tracked": (torch.tensor(100), torch.tensor(250), "100 in {}/base, 250 in {}/two"),
    "steps": (torch.tensor([3, 1, 2]), torch.tensor([3, 1, 4]), "3, 1, 2 in {}/base, 3, 1, 4 in {}/two"),
    "e.position_ids": (torch.arange(9), torch.arange(9) + 2, "0, 1, 2, 3 ... in {}/base, 2, 3, 4, 5 ... in {}/two"),
    "f.position_ids": (
        torch.arange(9).float(), torch.arange(9).float() + 2, "0, 1, 2, 3 ... in {}/base, 2, 3, 4, 5 ... in {}/two",
    ),
    "mask": (torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool), "1, 1 in {}/base, 0, 0 in {}/two"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_small_integers_that_differ_are_found_at_plan_time_with_a_rule(merge: Merge, name: str) -> None:
    first, second, said = DIFFERENT[name]
    add(merge, name, first, first, second).write(config={})

    found = merge.refusal()
    root = merge.folders[0].parent
    assert f"'{name}' is not equal in all models: {said.format(root, root)}" in found
    assert f"a rule with `action: copy` takes it from {root}/base" in found

    job = jobs_of(merge.plan(stockflow=rule(filter=name, action="copy")))[name]
    assert job.method == COPY


def test_many_counters_that_differ_are_one_line_with_the_rule_to_paste(merge: Merge) -> None:
    for layer in range(40):
        add(merge, f"layers.{layer}.bn.num_batches_tracked", torch.tensor(5), torch.tensor(5), torch.tensor(7))
    merge.write(config={})

    found = merge.refusal()
    assert "one problem" in found
    assert 'rules: [{filter: ".bn.num_batches_tracked", action: copy}]' in found
    assert merge.plan(stockflow=rule(filter=".bn.num_batches_tracked", action="copy"))


def test_running_statistics_that_no_training_changed_are_quiet(merge: Merge, tmp_path: Path) -> None:
    for name in ("bn.running_mean", "bn.running_var"):
        add(merge, name, *drawn((4,))[:1] * 3)
    merge.write(config={})
    (tmp_path / "recipe.yaml").write_text(json.dumps(merge.recipe))

    said = stockflow.plan(tmp_path / "recipe.yaml", tmp_path / "out").plan.remarks
    assert {remark.code for remark in said} == {"stranger"}, "the models are drawn apart"


def test_means_of_running_statistics_are_said(merge: Merge) -> None:
    for name in ("bn.running_mean", "bn.running_var", "codebook.embed_avg", "conv.weight_u"):
        add(merge, name, *(tensor.abs() for tensor in drawn((4,))))
    merge.write(config={})

    (said,) = merge.plan().remarks
    assert (said.code, said.severity) == ("running-statistics", "warning")
    assert set(said.tensors) == {"bn.running_mean", "bn.running_var", "codebook.embed_avg", "conv.weight_u"}
    copied = [{"filter": filter, "action": "copy"} for filter in ("running", "embed_avg", "weight_u")]
    assert codes(merge.plan(stockflow={"rules": copied})) == []


# What a smaller range loses


def lost(sources: list[np.ndarray[Any, Any]], written: np.ndarray[Any, Any]) -> dict[str, float]:
    """Count in plain numpy what F16 results lost."""
    is_zero = written == 0
    is_subnormal = ~is_zero & (np.abs(written.astype(np.float64)) < 2.0**-14)
    return {
        "zeroed": float((is_zero & np.any([source != 0 for source in sources], axis=0)).sum()),
        "subnormal": float(is_subnormal.sum()),
    }


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("method", ["model_stock", "ties", "linear"])
def test_what_f16_loses_is_counted(merge: Merge, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    exponents = torch.linspace(-30, 0, 3000, dtype=F64).reshape(30, 100)
    tensors = [(2.0**exponents * (1 + 0.01 * seed)).to(dtype) for seed in range(3)]
    tensors[0][0, :7] = tensors[1][0, :7] = tensors[2][0, :7] = 0
    for own in merge.models:
        del own["empty"], own["position_ids"]
    add(merge, "w", *tensors).write(config={})
    parameters = {"ties": {"weight": 1.0, "density": 1.0}, "linear": {"weight": 1.0}}.get(method, {})
    recipe = merge.recipe | {"merge_method": method, "parameters": parameters, "dtype": "float16"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    rows = runs.tensor_facts(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["w"].numpy()
    expected = lost([tensor.double().numpy() for tensor in tensors], written)
    assert {name: rows["w"]["facts"][name] for name in expected} == expected
    assert min(expected.values()) > 100
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{sum(row['facts'].get('zeroed', 0) for row in rows.values()):,.0f} elements are written as 0" in card
    total = result.manifest.summary["zeroed_elements"]
    assert total == sum(row["facts"].get("zeroed", 0) for row in rows.values())
    assert "narrower-range" in codes(result.plan)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 7), ("float32", 23)])
def test_what_is_lost_of_f64_is_counted(merge: Merge, tmp_path: Path, dtype: str, bits: int) -> None:
    exponents = torch.linspace(-160, -110, 3000, dtype=F64).reshape(30, 100)
    tensors = [2.0**exponents * (1 + 0.01 * seed) for seed in range(3)]
    tensors[0][0, :7] = tensors[1][0, :7] = tensors[2][0, :7] = 0
    add(merge, "w", *tensors).write(config={})
    (tmp_path / "recipe.yaml").write_text(json.dumps(merge.recipe | {"dtype": dtype}))
    result = runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    written = load_file(tmp_path / "out" / "model.safetensors")["w"].double().numpy()
    is_zero = (written == 0) & (tensors[1].numpy() != 0)
    facts = runs.tensor_facts(tmp_path / "out")["w"]["facts"]
    assert facts["zeroed"] == is_zero.sum() == (tensors[1].numpy() < 2.0 ** (-127 - bits)).sum() - 7
    assert facts["subnormal"] == ((written != 0) & (written < 2.0**-126)).sum() > 100
    assert "narrower-range" in codes(result.plan)


def test_f16_of_f16_is_not_counted(merge: Merge, tmp_path: Path) -> None:
    for own in merge.models:
        own.update({name: each.to(F16) for name, each in own.items() if each.is_floating_point()})
    merge.write(config={})
    (tmp_path / "recipe.yaml").write_text(json.dumps(merge.recipe))
    result = runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    assert "narrower-range" not in codes(result.plan)
    assert "zeroed_elements" not in result.manifest.summary


# What only the whole merge shows


def merged_with(merge: Merge, root: Path, weights: tuple[float, float], **top_level: Any) -> Any:
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(merge.folders[1:], weights, strict=True)
    ]
    recipe = merge.recipe | {"merge_method": "task_arithmetic", "models": models, **top_level}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return runs.merge_here(root / "recipe.yaml", root / "out")


@pytest.mark.parametrize(("weights", "num_negative"), [((0.5, 0.5), 0), ((2.0, 2.0), 3)])
def test_variances_that_come_out_below_zero_are_counted_and_said(
    merge: Merge, tmp_path: Path, weights: tuple[float, float], num_negative: int
) -> None:
    base, one = torch.full((8,), 1.0), torch.tensor([0.5] * 3 + [1.0] * 5)
    add(merge, "bn.running_var", base, one, one).write(config={})
    result = merged_with(merge, tmp_path, weights)

    found = load_file(tmp_path / "out" / "model.safetensors")["bn.running_var"]
    assert int((found < 0).sum()) == num_negative
    assert runs.tensor_facts(tmp_path / "out")["bn.running_var"]["facts"]["below_zero"] == num_negative
    said = [remark for remark in result.manifest.remarks if "below zero" in remark.text]
    assert [remark.tensors for remark in said] == ([("bn.running_var",)] if num_negative else [])
    assert ("came out below zero" in (tmp_path / "out" / "README.md").read_text()) == bool(num_negative)


def test_small_tensors_that_lose_their_distinct_values_are_counted_and_said(merge: Merge, tmp_path: Path) -> None:
    """256 biases between 4 and 4.25: BF16 has 17 numbers there, F32 all of them."""
    bias, wide = 4.0 + torch.arange(256) / 1024, 2.0 ** torch.arange(-64, 64)
    for own in merge.models:
        own.update({name: each.float() for name, each in own.items() if each.is_floating_point()})
    add(merge, "gate.e_score_correction_bias", bias, bias, bias)
    add(merge, "wide", wide, wide, wide).write(config={})
    result = merged_with(merge, tmp_path, (0.5, 0.5), dtype="bfloat16")

    facts = {name: row["facts"] for name, row in runs.tensor_facts(tmp_path / "out").items()}
    assert (facts["gate.e_score_correction_bias"]["collapsed"], facts["wide"]["collapsed"]) == (256 - 9, 0)
    (said,) = (remark for remark in result.manifest.remarks if remark.code == "values-collapsed")
    assert (said.severity, said.tensors) == ("note", ("gate.e_score_correction_bias",))


@pytest.mark.parametrize(
    ("change", "method", "dtype", "num_lost"),
    [
        (2e-4, "task_arithmetic", "bfloat16", 1024),
        (2e-4, "model_stock", "bfloat16", 1024),
        (2e-4, "ties", "bfloat16", 1024),
        (2e-4, "task_arithmetic", "float32", None),
        (0.1, "task_arithmetic", "bfloat16", 0),
        (0.1, "ties", "bfloat16", 0),
        (0.0, "task_arithmetic", "bfloat16", 0),
    ],
)
@pytest.mark.parametrize("stored", [BF16, F32])
def test_changes_that_rounding_loses_are_said(
    tmp_path: Path, stored: torch.dtype, change: float, method: str, dtype: str, num_lost: int | None
) -> None:
    """Between 1 and 2 BF16 has steps of 2**-7: of a change by 2e-4 it keeps nothing, F32 all, and of 0.1 most."""
    base = 1 + torch.arange(9000).reshape(90, 100) % 128 / 128
    merge = Merge(tmp_path, (1, 1, 1))
    for own in merge.models:
        own.clear()
    tunes = [base + change * (1 + torch.rand(90, 100, generator=torch.manual_seed(seed))) for seed in range(2)]
    add(merge, "w", base.to(stored), *tunes).write(config={})
    parameters = {"density": 0.2} if method == "ties" else {}
    result = merged_with(merge, tmp_path, (0.5, 0.5), dtype=dtype, merge_method=method, parameters=parameters)

    facts = runs.tensor_facts(tmp_path / "out")["w"]["facts"]
    assert facts.get("rounded_away") == num_lost
    assert facts.get("changed") == (None if num_lost is None else 1024 * bool(change))
    said = [remark.text for remark in result.manifest.remarks if remark.code == "rounded-away"]
    assert [text.partition(", as")[0] for text in said] == [
        "the output is the base again: of 1,024 elements looked at in 1 tensor that models change, 1,024 came out as "
        "the base's"
    ] * bool(num_lost)
    out = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(out, base.to(out.dtype)) == bool(num_lost or not change)


@pytest.mark.parametrize("shape", [(80, 80), (700, 800)])
def test_a_file_that_was_cut_is_told_by_the_zeros_at_its_end(
    merge: Merge, tmp_path: Path, shape: tuple[int, int]
) -> None:
    """Half a tensor of zeros is no matter of samples, and of 560,000 elements the last span alone has the end."""
    values = [tensor + 1 for tensor in drawn(shape)]
    values[2].view(-1)[-600:] = 0
    for number, own in enumerate(merge.models):
        own.clear()
        own["a.weight"], own["c.weight"] = (values[0] * (1 + 0.1 * number + at) for at in range(2))
        own["b.weight"] = values[number]
    merge.write(config={})
    result = merged_with(merge, tmp_path, (0.5, 0.5))

    (said,) = (remark for remark in result.manifest.remarks if remark.code == "zeros")
    assert (said.models, said.tensors) == ((str(merge.folders[2]),), ("b.weight",))


def test_matrices_that_changed_places_are_said_when_all_of_them_were_read(merge: Merge, tmp_path: Path) -> None:
    """A header that swaps two names of equal shape is as valid as any, and few tensors are looked at beforehand."""
    names = [f"{number:02}.weight" for number in range(20)]
    drawn = [torch.randn(80, 80, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    for number, own in enumerate(merge.models):
        order = [0, 1, 2, 3, 5, 4, *range(6, 20)] if number == 2 else range(20)
        own.clear()
        own.update({name: (drawn[at] * (1 + 0.01 * number)).to(BF16) for name, at in zip(names, order, strict=True)})
        own.update({f"{at}.norm.weight": torch.full((9,), 0.1 + (number == 2 and at == 2)) for at in range(6)})
    merge.write(config={})
    (tmp_path / "recipe.yaml").write_text(json.dumps(merge.recipe))
    result = runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    assert "stranger" not in codes(result.plan)
    (said,) = (remark for remark in result.manifest.remarks if remark.code == "stranger")
    assert (said.models, said.tensors) == ((str(merge.folders[2]),), ("2.norm.weight", "04.weight", "05.weight"))
