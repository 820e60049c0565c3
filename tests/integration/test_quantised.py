"""Quantised models merged as the numbers they stand for, and written again: real files in published layouts.

One model has a module in each of the forms, so that a few merges show what holds of all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import stockflow
from stockflow.errors import NumericsError, PlanError
from stockflow.planning import file as plan_file
from tests import oracle, quantised, runs
from tests.checkpoints import write_checkpoint
from tests.quantised import FORMS, NVFP4, Quantised, Tensors, same_codes

MODULE = "model.layers.0.mlp.up_proj"
SHAPE = (300, 416)
"""Ragged in every block; a third band of 44 rows."""
LEAST_CORRECT = 0.9999
MIXED = [form for form in FORMS if form not in ("other blocks", "no config", *NVFP4)]
"""Forms that go into one model, whose config says 128 x 128."""


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def family(form: str) -> list[Quantised]:
    """A base and two tunes of it, in a form."""
    make, base = FORMS[form][0], drawn(0)
    return [make(base), *(make(base + 0.3 * drawn(seed)) for seed in (1, 2))]


def module(form: str) -> str:
    """Of a kind of its own: how scales are chosen is told by kind."""
    return f"model.layers.0.mlp.{chr(97 + list(FORMS).index(form))}_proj"


def inside(made: Quantised, name: str = MODULE) -> Tensors:
    return {f"{name}.{own}": tensor for own, tensor in made.tensors.items()}


def write_model(folder: Path, tensors: Tensors, said: Mapping[str, object] | None, num_shards: int = 1) -> Path:
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 416}
    if said is not None:
        config["text_config"] = {"quantization_config": {"quant_method": "x", **said}}
    plain = {"model.norm.weight": torch.ones(7, dtype=torch.bfloat16)}
    return write_checkpoint(folder, tensors | plain, config=config, num_shards=num_shards, side_files={})


def write_recipe(root: Path, models: list[Path], **top_level: Any) -> Path:
    recipe = {
        "merge_method": "model_stock",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | top_level))
    return path


def merged(root: Path, models: list[Path], **top_level: Any) -> dict[str, oracle.Stored]:
    runs.merge_here(write_recipe(root, models, **top_level), root / "out", memory_bytes=600 * runs.MIB)
    return oracle.load_checkpoint(root / "out")


def share_correct(found: oracle.Stored, expected: oracle.Floats) -> float:
    """Of elements; zeros of either sign are equal, as the oracle does not model signs."""
    right = oracle.widen(found.dtype, oracle.round_to(found.dtype, expected)).reshape(found.array.shape)
    return float((found.array == right).mean())


@dataclass(frozen=True)
class Mixed:
    """A base and two tunes with a module of every form, and outputs of their merge."""

    root: Path
    made: Mapping[str, list[Quantised]]
    models: list[Path]

    def expected(self, form: str) -> oracle.Floats:
        base, *tuned = self.made[form]
        return oracle.model_stock(base.values, [each.values for each in tuned]).out

    def merge(self, name: str, **top_level: Any) -> Path:
        root = self.root / name
        root.mkdir()
        runs.merge_here(write_recipe(root, self.models, **top_level), root / "out", memory_bytes=600 * runs.MIB)
        return root / "out"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    root = tmp_path_factory.mktemp("mixed")
    made = {form: family(form) for form in MIXED}
    models = []
    for number in range(3):
        tensors = {name: t for form in MIXED for name, t in inside(made[form][number], module(form)).items()}
        models.append(write_model(root / f"m{number}", tensors, quantised.DEEPSEEK, 1 + number))
    return Mixed(root, made, models)


@pytest.fixture(scope="module")
def widened(mixed: Mixed) -> Path:
    return mixed.merge("widened", dtype="bfloat16")


@pytest.fixture(scope="module")
def kept(mixed: Mixed) -> Path:
    return mixed.merge("kept")


@pytest.mark.parametrize("form", MIXED)
def test_models_of_a_format_merge_as_the_numbers_that_its_definition_says(
    form: str, mixed: Mixed, widened: Path
) -> None:
    found = oracle.load_checkpoint(widened)

    assert found.keys() == {*(f"{module(form)}.weight" for form in MIXED), "model.norm.weight"}
    assert found[f"{module(form)}.weight"].dtype == "BF16"
    assert share_correct(found[f"{module(form)}.weight"], mixed.expected(form)) >= LEAST_CORRECT
    config = json.loads((widened / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]


@pytest.mark.parametrize("form", ["other blocks", "no config", *NVFP4])
def test_what_goes_with_no_other_merges_alone(form: str, tmp_path: Path) -> None:
    made = family(form)
    models = [write_model(tmp_path / f"m{n}", inside(each), FORMS[form][1]) for n, each in enumerate(made)]

    found = merged(tmp_path, models, stockflow={"output_format": "bfloat16"})[f"{MODULE}.weight"]

    expected = oracle.model_stock(made[0].values, [each.values for each in made[1:]])
    assert share_correct(found, expected.out) >= LEAST_CORRECT


def test_decoded_models_have_the_bits_of_their_definitions(mixed: Mixed, tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(mixed.models[0])}], "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    found = oracle.load_checkpoint(tmp_path / "out")

    for form in MIXED:
        assert share_correct(found[f"{module(form)}.weight"], mixed.made[form][0].values) == 1, form


@pytest.mark.parametrize("columns", [203, 416])
def test_rows_of_codes_that_fill_no_container_are_as_long_as_their_shape_says(columns: int, tmp_path: Path) -> None:
    made = [quantised.int4(drawn(seed, (90, columns)).double().numpy()) for seed in range(3)]
    models = [write_model(tmp_path / f"m{n}", inside(each), quantised.INT4) for n, each in enumerate(made)]

    found = merged(tmp_path, models, dtype="float32")[f"{MODULE}.weight"]

    expected = oracle.model_stock(made[0].values, [each.values for each in made[1:]])
    assert found.array.shape == (90, columns)
    assert share_correct(found, expected.out) >= LEAST_CORRECT


def test_experts_in_one_tensor_merge_one_by_one(tmp_path: Path) -> None:
    """Kept, as they are; plain numbers of one such tensor alone would lie as in no model."""
    name = "model.layers.0.mlp.experts.down_proj"
    values = [drawn(seed, (3, 40, 96)).double().numpy() for seed in range(3)]
    made = [quantised.mxfp4_blocks(each, "down_proj") for each in values]
    tensors = [{f"{name}{own.removeprefix('down_proj')}": t for own, t in each.tensors.items()} for each in made]
    models = [write_model(tmp_path / f"m{n}", each, {}) for n, each in enumerate(tensors)]
    expected = oracle.model_stock(made[0].values, [each.values for each in made[1:]], scope="leading").out

    with pytest.raises(PlanError, match="whose plain numbers are stored transposed"):
        merged(tmp_path, models, dtype="bfloat16")
    runs.merge_here(write_recipe(tmp_path, models), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in found.items() if name in key} == {
        key: tensor.shape for key, tensor in tensors[0].items()
    }
    again = quantised.mxfp4_blocks(expected, "down_proj").tensors
    assert same_codes(found[f"{name}_blocks"], again["down_proj_blocks"], is_f4=True) >= 0.999
    assert torch.equal(found[f"{name}_scales"], again["down_proj_scales"])


def test_formats_meet_and_the_plan_is_read_back_as_it_was(tmp_path: Path) -> None:
    base = drawn(0)
    made = [quantised.fp8(base, (128, 128)), quantised.int4((base + 0.3 * drawn(1)).double().numpy())]
    plain = base.bfloat16()
    models = [
        write_model(tmp_path / "fp8", inside(made[0]), {"weight_block_size": [128, 128]}),
        write_model(tmp_path / "int4", inside(made[1]), {"group_size": 32}),
        write_model(tmp_path / "plain", {f"{MODULE}.weight": plain}, None),
    ]

    found = merged(tmp_path, models, dtype="bfloat16")

    expected = oracle.model_stock(made[0].values, [made[1].values, plain.double().numpy()])
    assert share_correct(found[f"{MODULE}.weight"], expected.out) >= LEAST_CORRECT


def test_an_output_in_codes_is_what_its_plan_says_and_is_merged_again_the_same(kept: Path) -> None:
    (path,) = (kept / "_stockflow").glob("*/plan.json")
    recorded = plan_file.parse(path.read_bytes(), str(path))
    assert recorded.plan.plan_id == recorded.plan_id == recorded.digest
    assert recorded.plan.merge_id == recorded.merge_id == recorded.copies_digest
    verified = runs.invoke("verify", kept, "--sample", "100%")
    assert verified.exit_code == 0, verified.stdout + verified.stderr


@pytest.mark.parametrize("columns", [4096])
def test_codes_and_numbers_are_the_same_for_every_budget_and_number_of_threads(columns: int, tmp_path: Path) -> None:
    """Bands of 128 rows are longer than a span here."""
    shape, names = (300, columns), ("DeepSeek-V3", "Kimi-K2")
    models = []
    for number in range(3):
        tensors: Tensors = {}
        for form in names:
            make = FORMS[form][0]
            tensors |= inside(make(drawn(0, shape) + 0.3 * number * drawn(number, shape)), module(form))
        models.append(write_model(tmp_path / f"m{number}", tensors, {}))
    for asked in ({}, {"dtype": "bfloat16"}):
        recipe, digests = write_recipe(tmp_path, models, **asked), set()
        for memory, threads in ((340, 1), (420, 2), (1200, 2)):
            output = tmp_path / f"out{memory}{len(asked)}"
            runs.merge_here(recipe, output, memory_bytes=memory * runs.MIB, num_threads=threads)
            digests.add((output / "model.safetensors").read_bytes())
        assert len(digests) == 1


def test_quantised_tunes_of_a_plain_base_are_refused_until_accepted(tmp_path: Path) -> None:
    base = drawn(0)
    models = [write_model(tmp_path / "base", {f"{MODULE}.weight": base.bfloat16()}, None)]
    for seed in (1, 2):
        made = quantised.fp8(base + drawn(seed), (128, 128))
        models.append(write_model(tmp_path / f"m{seed}", inside(made), {}))

    with pytest.raises(PlanError) as caught:
        merged(tmp_path, models)
    said = f"{models[1]} has 1 tensor such as {MODULE}.weight as codes, {models[0]} as plain numbers"
    assert said in str(caught.value)
    assert "Give the 16-bit models that were quantised, or the base in the same codes" in str(caught.value)

    assert f"{MODULE}.weight" in merged(tmp_path, models, stockflow={"accept": ["quantised-tunes"]})


def test_equal_models_come_out_in_the_bytes_of_their_codes_and_scales(mixed: Mixed, tmp_path: Path) -> None:
    copies = [mixed.models[0], tmp_path / "copy", tmp_path / "another"]
    tensors = load_file(copies[0] / "model.safetensors")
    for folder in copies[1:]:
        write_checkpoint(folder, tensors, config=json.loads((copies[0] / "config.json").read_text()), side_files={})

    runs.merge_here(write_recipe(tmp_path, copies, stockflow={"accept": ["same-samples"]}), tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["quantization_config"] == {"quant_method": "x", **quantised.DEEPSEEK}


@pytest.mark.parametrize("form", MIXED)
def test_what_changed_is_written_in_the_codes_of_the_base_by_its_own_rule(form: str, mixed: Mixed, kept: Path) -> None:
    """Those that numpy makes of the float64 result, but where float32 rounds to the other side of a tie."""
    again = FORMS[form][0](torch.from_numpy(np.asarray(mixed.expected(form), np.float32)))
    found = load_file(kept / "model.safetensors")

    for own, tensor in again.tensors.items():
        written = found[f"{module(form)}.{own}"]
        assert (written.dtype, written.shape) == (tensor.dtype, tensor.shape)
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(written, tensor, rtol=1e-6, atol=0)
        else:
            assert same_codes(written, tensor, is_f4=form in ("Kimi-K3", "DeepSeek-V4's experts")) >= 0.9995


def test_scales_that_are_powers_of_two_stay_so_whatever_they_are_stored_in(tmp_path: Path) -> None:
    made = []
    for seed in range(3):
        each = quantised.fp8(drawn(seed), (128, 128), scale="E8M0")
        exponents = each.tensors["weight_scale_inv"].view(torch.uint8).int() - 127
        made.append(Quantised(each.tensors | {"weight_scale_inv": torch.exp2(exponents.float())}, each.values))
    models = [write_model(tmp_path / f"m{n}", inside(each), {}) for n, each in enumerate(made)]

    runs.merge_here(write_recipe(tmp_path, models), tmp_path / "out", memory_bytes=600 * runs.MIB)

    scales = load_file(tmp_path / "out" / "model.safetensors")[f"{MODULE}.weight_scale_inv"]
    assert (torch.frexp(scales)[0] == 0.5).all()


def test_a_format_that_is_only_read_is_refused_with_the_words_to_add(tmp_path: Path) -> None:
    made = family("modelopt")
    models = [write_model(tmp_path / f"m{n}", inside(each), {}) for n, each in enumerate(made)]

    with pytest.raises(PlanError, match=r"NVFP4 in .*which is read and not written.*output_format: bfloat16"):
        merged(tmp_path, models)


def test_one_block_that_nothing_changed_in_keeps_its_codes_while_others_change(tmp_path: Path) -> None:
    """As they are, though their scales are none that the rule would choose."""
    base = drawn(0, (256, 256))
    made = quantised.fp8(base, (128, 128))
    odd = {"weight": made.tensors["weight"], "weight_scale_inv": made.tensors["weight_scale_inv"] * 1.37}
    codes = odd["weight"].view(torch.uint8).clone()
    codes[:128, :128] = codes[:128, :128].roll(1, 0)
    tuned = odd | {"weight": codes.view(torch.float8_e4m3fn)}
    both = [inside(Quantised(each, made.values)) for each in (odd, tuned)]
    models = [write_model(tmp_path / f"m{n}", each, {}) for n, each in enumerate(both)]

    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    codes, scales = (found[f"{MODULE}.{own}"] for own in ("weight", "weight_scale_inv"))
    same = codes.view(torch.uint8) == odd["weight"].view(torch.uint8)
    assert same[128:].all()
    assert same[:, 128:].all()
    assert not same[:128, :128].all()
    assert torch.equal(scales.flatten()[1:], odd["weight_scale_inv"].flatten()[1:])
    assert scales[0, 0] != odd["weight_scale_inv"][0, 0]


def stored_rows(output: Path) -> dict[str, dict[str, Any]]:
    (table,) = (output / "_stockflow").glob("*/tensors.parquet")
    return {row["name"]: row | {"facts": dict(row["facts"])} for row in pq.read_table(table).to_pylist()}


@pytest.mark.parametrize(("change", "is_noisy"), [(0.1, False), (0.001, True)])
def test_changes_that_are_smaller_than_the_error_of_their_codes_are_flagged(
    change: float, is_noisy: bool, tmp_path: Path
) -> None:
    """Against the truth, which only whoever drew the weights knows: the error of both codes in the change."""
    base = drawn(0, (256, 256))
    changes = [change * drawn(seed, (256, 256)) for seed in (1, 2)]
    made = [quantised.fp8(each, (128, 128)) for each in (base, *(base + each for each in changes))]
    models = [write_model(tmp_path / f"m{n}", inside(each), {}) for n, each in enumerate(made)]

    runs.merge_here(write_recipe(tmp_path, models), tmp_path / "out")

    row = stored_rows(tmp_path / "out")[f"{MODULE}.weight"]
    signal, changed = row["facts"]["rounding_signal"], row["facts"]["changed_codes"]
    assert ("rounding_noise" in row["flags"]) is is_noisy
    assert (signal < 1) is is_noisy
    found = [each.values - made[0].values for each in made[1:]]
    truth = [np.linalg.norm(d) / np.linalg.norm(d - true.numpy()) for d, true in zip(found, changes, strict=True)]
    assert is_noisy or signal == pytest.approx(min(truth), rel=0.2)
    codes = [each.tensors["weight"].view(torch.uint8) for each in made]
    assert changed == pytest.approx(np.mean([(each != codes[0]).float().mean() for each in codes[1:]]), rel=0.2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("in 1 of 1 tensor in codes a model differs from the base by less" in card) is is_noisy


def test_tunes_of_what_a_base_was_before_it_was_rounded_are_told_from_those_of_its_codes(tmp_path: Path) -> None:
    base = drawn(0, (256, 256))
    made = quantised.fp8(base, (128, 128))
    for name, master in (("before", base), ("after", torch.from_numpy(made.values).float())):
        models = [write_model(tmp_path / name / "base", inside(made), {})]
        for seed in (1, 2):
            tuned = (master + 0.001 * drawn(seed, (256, 256))).bfloat16()
            models.append(write_model(tmp_path / name / f"m{seed}", {f"{MODULE}.weight": tuned}, None))
        runs.merge_here(write_recipe(tmp_path / name, models), tmp_path / name / "out")

    codes = {
        name: {each["code"] for each in json.loads((tmp_path / name / "out" / "manifest.json").read_text())["remarks"]}
        for name in ("before", "after")
    }
    assert "other-master" in codes["before"]
    assert "other-master" not in codes["after"]


@pytest.mark.parametrize(("form", "scales"), [("DeepSeek-V3", "weight_scale_inv"), ("Kimi-K2", "weight_scale")])
def test_scales_far_from_those_of_the_base_are_said_whatever_the_method(form: str, scales: str, tmp_path: Path) -> None:
    base, tuned, _ = family(form)
    inverse = {**tuned.tensors, scales: 1 / tuned.tensors[scales]}
    tunes = {"near": inside(tuned), "inverse": {f"{MODULE}.{own}": tensor for own, tensor in inverse.items()}}
    said = {}
    for name, tensors in tunes.items():
        models = [
            write_model(tmp_path / f"{name}{n}", each, FORMS[form][1]) for n, each in enumerate((inside(base), tensors))
        ]
        recipe = write_recipe(tmp_path, models, merge_method="task_arithmetic", parameters={"weight": 0.5})
        told = stockflow.plan(recipe, tmp_path / "out")
        said[name] = {remark.code for remark in told.plan.remarks}

    assert "stranger" in said["inverse"]
    assert not {"stranger", "same-samples", "zeros"} & said["near"]


def test_an_audit_leaves_codes_out_by_name_and_judges_the_rest(tmp_path: Path) -> None:
    models = [
        write_model(tmp_path / str(number), inside(each), FORMS["DeepSeek-V3"][1])
        for number, each in enumerate(family("DeepSeek-V3"))
    ]
    merged(tmp_path, models)

    found = stockflow.audit(str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))

    assert found.left_out == {
        f"{MODULE}.weight": "FP8 (E4M3) with scales of F32 in the merged checkpoint; an audit tells readings apart by "
        "single roundings"
    }
    assert [row["name"] for row in found.rows] == ["model.norm.weight"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["DeepSeek-V3", "E5M2", "Kimi-K2", "Kimi-K3"])
def test_what_is_not_finite_is_a_code_of_its_own_or_refused_and_harms_no_number_beside_it(
    form: str, bad: float, tmp_path: Path
) -> None:
    """With `on_nonfinite: propagate`; without, it is refused where it is read."""
    base, changed = drawn(0), drawn(0)
    changed[7, 9] = bad
    models = [write_model(tmp_path / "base", inside(FORMS[form][0](base)), FORMS[form][1])]
    models.append(write_model(tmp_path / "one", {f"{MODULE}.weight": changed.bfloat16()}, None))
    recipe: dict[str, Any] = {"merge_method": "linear", "stockflow": {"on_nonfinite": "propagate"}}
    recipe["models"] = [{"model": str(each), "parameters": {"weight": 0.5}} for each in models]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    if form.startswith("Kimi") or (form == "DeepSeek-V3" and bad == float("inf")):
        with pytest.raises(NumericsError, match=r"has NaN or infinity, which .* cannot say"):
            runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")
        return
    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    scales = next(found[name].double() for name in found if "scale" in name)
    block = (128, 128) if form == "DeepSeek-V3" else SHAPE
    numbers = (found[f"{MODULE}.weight"].double() * quantised.spread(scales, SHAPE, block)).numpy()
    assert np.array_equal(numbers[7, 9], bad, equal_nan=True)
    numbers[7, 9] = base[7, 9]
    assert np.linalg.norm(numbers - base.numpy()) < 0.08 * float(base.norm())


def test_codes_differ_by_numbers_between_which_no_others_are_counted(tmp_path: Path) -> None:
    one, two = (
        write_model(tmp_path / str(n), inside(each), FORMS["DeepSeek-V3"][1])
        for n, each in enumerate(family("DeepSeek-V3")[:2])
    )

    difference = stockflow.diff(str(one), str(two))

    (told,) = difference.differing
    assert told.most_roundings is None
    assert told.relative_distance == pytest.approx(0.3, rel=0.1)
    assert "roundings apart" not in str(difference)
