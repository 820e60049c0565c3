"""Names that do not fit together: told in groups with rules that do what they say, read as views, never merged away."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.planning.plan import MergePlan
from tests.plans import Merge, jobs_of, rule

HIDDEN, NUM_LAYERS = 4, 6


def llama(*, prefix: str = "model.", head: bool = True, layers: int = NUM_LAYERS) -> dict[str, torch.Tensor]:
    shapes = {f"{prefix}embed_tokens.weight": (16, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}
    for layer in range(layers):
        shapes[f"{prefix}layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}layers.{layer}.mlp.up_proj.weight"] = (2 * HIDDEN, HIDDEN)
    if head:
        shapes["lm_head.weight"] = (16, HIDDEN)
    return {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def tower(*, prefix: str = "vision_tower.", blocks: int = 3) -> dict[str, torch.Tensor]:
    names = [f"{prefix}blocks.{block}.{part}.weight" for block in range(blocks) for part in ("attn", "fc")]
    return {name: torch.ones(2, 2, dtype=torch.bfloat16) for name in names}


def merge_of(root: Path, *models: Mapping[str, torch.Tensor]) -> Merge:
    merge = Merge(root, (1, 1, 1))
    merge.models = [dict(each) for each in models]
    return merge.write()


def problems(merge: Merge, **top_level: Any) -> list[str]:
    return [line.strip() for line in merge.refusal(**top_level).splitlines()[1:]]


def pasted(sentence: str) -> dict[str, Any]:
    """Return the rule block that a message offers."""
    (block,) = re.findall(r"`(stockflow: \{rules: .*?\})`", sentence)
    parsed: dict[str, Any] = yaml.safe_load(block)
    return parsed


def test_a_part_that_others_lack_is_one_problem_with_rules_to_paste(tmp_path: Path) -> None:
    part = tower(prefix="memory.")
    merge = merge_of(tmp_path, llama() | part, llama(), llama())

    (said,) = problems(merge)

    assert said.startswith(f"6 tensors of 'memory.' are missing in {merge.folders[1]}, {merge.folders[2]}; ")
    plan = merge.plan(**pasted(said))
    assert {name for name, job in jobs_of(plan).items() if job.is_copy} == set(part)


def test_a_tower_that_only_a_tune_has_is_one_problem_with_rules_to_paste(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, llama(), llama() | tower(), llama())

    (said,) = problems(merge)

    assert said.startswith(f"6 tensors of 'vision_tower.' are in {merge.folders[1]} but not in {merge.folders[0]}")
    assert jobs_of(merge.plan(**pasted(said))).keys() == llama().keys()


def test_layers_that_others_lack_are_told_by_their_numbers(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, llama(), llama(layers=4), llama(layers=4))

    (said,) = problems(merge)

    assert said.startswith("4 tensors of 'model.layers.*.' (4 to 5) are missing in ")
    assert {name for name, job in jobs_of(merge.plan(**pasted(said))).items() if job.is_copy} == {
        name for name in llama() if ".4." in name or ".5." in name
    }


def test_a_bias_in_every_layer_is_one_problem(tmp_path: Path) -> None:
    biases = {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(HIDDEN).bfloat16() for n in range(NUM_LAYERS)}
    merge = merge_of(tmp_path, llama() | biases, llama(), llama())

    (said,) = problems(merge)

    assert said.startswith("6 tensors like 'model.layers.0.self_attn.q_proj.bias' are missing in ")
    assert said.endswith("a rule with `action: copy` would publish one model's whole bias beside averaged weights")


def test_what_the_layers_of_one_tune_compute_with_is_not_advised_to_be_left_out(tmp_path: Path) -> None:
    biases = {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(HIDDEN).bfloat16() for n in range(NUM_LAYERS)}
    beyond = {name: value for name, value in llama(layers=NUM_LAYERS + 1).items() if f".{NUM_LAYERS}." in name}
    merge = merge_of(tmp_path, llama(), llama() | biases | beyond, llama())

    said = problems(merge)

    assert len(said) == 2
    for each in said:
        assert f"its layers compute with them: leave {merge.folders[1]} out of the recipe" in each
        assert "action" not in each


def test_shapes_that_differ_alike_are_one_problem(tmp_path: Path) -> None:
    other = {name: value.repeat(2, 1) if "up_proj" in name else value for name, value in llama().items()}
    merge = merge_of(tmp_path, llama(), other, llama())

    (said,) = problems(merge)

    assert said == (
        f"6 tensors like 'model.layers.0.mlp.up_proj.weight' are [16, 4] in {merge.folders[1]}, "
        f"expected [8, 4] as in {merge.folders[0]}"
    )


def test_rules_are_not_proposed_for_most_of_a_model(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, llama(), {"lm_head.weight": llama()["lm_head.weight"]}, llama())

    assert all("to paste" not in said and "action" not in said for said in problems(merge))
    assert any("are these the models you mean?" in said for said in problems(merge))


@pytest.mark.parametrize("merged", [0, 1], ids=["the base has it", "a tune has it"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("model.", "model.language_model."), ("model.", "language_model.model."), ("model.", "module.model."),
     ("model.", "_orig_mod.model."), ("model.", ""), ("model.", "base_model.model.model.")],
)  # fmt: skip
def test_a_wrapper_in_the_names_is_read_through(tmp_path: Path, ours: str, theirs: str, merged: int) -> None:
    models = [llama(prefix=ours), llama(prefix=ours), llama(prefix=ours)]
    models[merged] = llama(prefix=theirs)
    merge = merge_of(tmp_path, *models)

    plan = merge.plan()

    assert jobs_of(plan).keys() == models[0].keys()
    assert all(len(job.reading.operands) == 3 for job in plan.jobs)
    assert {remark.severity for remark in plan.remarks if remark.code == "other-names"} == {"note"}


SPELLINGS = {
    "embeddings.LayerNorm.gamma": "embeddings.LayerNorm.weight",
    "embeddings.LayerNorm.beta": "embeddings.LayerNorm.bias",
    "pos_conv_embed.conv.parametrizations.weight.original1": "pos_conv_embed.conv.weight_v",
    "backbone.embedding.weight": "backbone.embeddings.weight",
}


@pytest.mark.parametrize("old", SPELLINGS)
@pytest.mark.parametrize("merged", [0, 1], ids=["the base has it", "a tune has it"])
def test_names_that_loaders_take_for_one_another_are_read_as_one(tmp_path: Path, old: str, merged: int) -> None:
    value = torch.ones(3, 2, dtype=torch.bfloat16)
    names = [old if number == merged else SPELLINGS[old] for number in range(3)]

    plan = merge_of(tmp_path, *(llama() | {name: value} for name in names)).plan()

    assert len(jobs_of(plan)[names[0]].reading.operands) == 3
    assert {remark.severity for remark in plan.remarks if remark.code == "other-names"} == {"note"}


VALUES = {"v_head.summary.weight": torch.ones(1, HIDDEN).bfloat16()}


@pytest.mark.parametrize(
    ("base", "tunes", "action"),
    [
        (llama(), llama(prefix="pretrained_model.model.") | VALUES, "skip"),
        (
            llama(prefix="bert.", head=False) | {"cls.bias": torch.ones(2).bfloat16()},
            llama(prefix="", head=False),
            "copy",
        ),
    ],
    ids=["only tunes have a head of values, as a trainer saves it", "only the base has a head of words"],
)
def test_what_a_view_does_not_explain_is_said_with_it_and_without(
    tmp_path: Path, base: dict[str, torch.Tensor], tunes: dict[str, torch.Tensor], action: str
) -> None:
    merge = merge_of(tmp_path, base, tunes, tunes)

    assert ["accept: [other-names]" in said for said in problems(merge)] == [True, True, False]
    (said,) = problems(merge, stockflow={"accept": ["other-names"]})
    assert said == problems(merge)[2]
    name = ({*base, *tunes} & {"cls.bias", *VALUES}).pop()
    assert repr(name) in said
    rules = [{"filter": name, "action": action}]
    plan = merge.plan(stockflow={"accept": ["other-names"], "rules": rules})
    assert jobs_of(plan).keys() == base.keys()
    assert plan.skipped == ((name,) if action == "skip" else ())


def test_wrappers_of_single_modules_are_read_through(tmp_path: Path) -> None:
    compiled = {re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name): value for name, value in llama().items()}

    plan = merge_of(tmp_path, llama(), compiled, llama()).plan()

    assert jobs_of(plan).keys() == llama().keys()


def test_layers_of_other_numbers_are_no_view(tmp_path: Path) -> None:
    """Read as such, layers 2 and 1 of a tune would be layers 0 and 1 of the base."""
    shifted = {
        re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + 1}", name): value
        for name, value in llama().items()
    }

    said = "\n".join(problems(merge_of(tmp_path, llama(), shifted, llama())))

    assert "model.layers.0" in said
    assert "accept" not in said


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("final.norm.weight", "final.norm"),
        ("final.norm", "final.norm.weight"),
        ("final.norm.weight", "final.norm.scale"),
        ("final.norm.weight", "inner.final.norm"),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"tower.weight": torch.ones(9, 9)}])
def test_a_parameter_of_a_module_under_another_end_is_told_and_read(
    tmp_path: Path, ours: str, theirs: str, beside: dict[str, torch.Tensor]
) -> None:
    merge = Merge(tmp_path)
    for number, tensors in enumerate(merge.models):
        tensors[ours] = torch.full((7,), float(number))
    if theirs.startswith("inner."):
        merge.models[2] = {f"inner.{name}": tensor for name, tensor in merge.models[2].items()}
        ours_there = f"inner.{ours}"
    else:
        ours_there = ours
    merge.models[2][theirs] = merge.models[2].pop(ours_there)
    merge.models[2] |= beside
    merge.write()
    skipping = [{"filter": "tower", "action": "skip"}] * bool(beside)

    refused = merge.refusal(stockflow={"rules": skipping})
    plan = merge.plan(stockflow={"accept": ["other-names"], "rules": skipping})

    assert f"{theirs!r} for {ours!r}" in refused
    assert "action" not in refused
    operands = jobs_of(plan)[ours].reading.operands
    assert [operand.checkpoint for operand in operands] == [0, 1, 2]


@pytest.mark.parametrize("theirs", ["final.norm.bias", "last.norm", "final.norm.weights"])
def test_a_parameter_of_another_kind_or_module_is_no_other_name(tmp_path: Path, theirs: str) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors["final.norm.weight"] = torch.ones(7)
    merge.models[2][theirs] = merge.models[2].pop("final.norm.weight")

    assert "other-names" not in merge.write().refusal()
    merge.models[2]["final.norm"] = torch.ones(8)
    assert "other-names" not in merge.write().refusal()


def test_several_towers_under_other_names_are_read_together(tmp_path: Path) -> None:
    old = llama(prefix="language_model.model.", head=False) | tower()
    new = llama(prefix="model.language_model.", head=False) | tower(prefix="model.vision_tower.")

    plan = merge_of(tmp_path, old, new, old).plan()

    assert jobs_of(plan).keys() == old.keys()
    (remark,) = [each for each in plan.remarks if each.code == "other-names"]
    assert remark.severity == "note"
    assert dict(remark.values) == {"language_model.model.": "model.language_model.", "": "model."}


def test_a_view_reads_the_tensor_that_bears_the_name(tmp_path: Path) -> None:
    def named(prefix: str) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(value, index) for index, (name, value) in enumerate(llama(prefix=prefix).items())}

    merge = merge_of(tmp_path, named("model."), named("model.language_model."), named("model."))
    plan = merge.plan()

    from safetensors.torch import load_file

    for job in plan.jobs:
        operand = job.reading.operands[1]
        payload = (merge.folders[1] / operand.extents[0].file).read_bytes()
        start = operand.extents[0].start
        value = torch.frombuffer(bytearray(payload[start : start + 2]), dtype=torch.bfloat16)
        assert value == load_file(merge.folders[0] / "model.safetensors")[job.output.name].flatten()[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "odd", "blocks"),
    [
        ("model.", "model.language_model.", 2, 3),
        ("model.language_model.", "model.", 1, 24),
        ("", "model.", 1, 3),
        ("model.", "", 0, 24),
        ("model.", "text.model.", 1, 24),
        ("text.", "words.", 2, 3),
    ],
)
def test_what_is_left_over_beside_other_names_is_told_alone(
    tmp_path: Path, ours: str, theirs: str, odd: int, blocks: int
) -> None:
    """Never are rules advised for layers that are there under other names; obeyed, all of these are merged."""
    beside = {f"extra.blocks.{block}.fc.weight": torch.ones(1, 2).bfloat16() for block in range(2) if odd}
    models = [llama(prefix=ours) | beside for _ in range(3)]
    models[odd] = llama(prefix=theirs) | tower(prefix="memory.", blocks=blocks)
    merge = merge_of(tmp_path, *models)
    accept = {"accept": ["other-names"]}

    rules = [rule for said in problems(merge, stockflow=accept) for rule in pasted(said)["stockflow"]["rules"]]

    copied, skipped = ("extra.blocks.", "memory.blocks.") if odd else ("memory.blocks.", "")
    assert rules == [
        *([{"filter": skipped, "action": "skip"}] if skipped else []),
        {"filter": copied, "action": "copy"},
    ]
    jobs = jobs_of(merge.plan(stockflow=accept | {"rules": rules}))
    assert jobs.keys() == models[0].keys()
    assert {name for name, job in jobs.items() if job.is_copy} == {name for name in models[0] if copied in name}


def test_experts_are_no_other_names_of_a_dense_layer(tmp_path: Path) -> None:
    """Layer by layer some expert has the shape of what the base has, and most are left over."""
    dense = {name: value for name, value in llama(layers=2).items() if "up_proj" not in name}
    ups = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(64, HIDDEN).bfloat16() for layer in range(2)}
    experts = {
        name.replace("mlp.", f"mlp.experts.{expert}."): value.clone()
        for name, value in ups.items()
        for expert in range(4)
    }
    merge = merge_of(tmp_path, dense | ups, dense | experts, dense | ups)

    assert all("accept" not in said for said in problems(merge))


def test_more_than_a_wrapper_is_read_through_only_where_that_is_accepted(tmp_path: Path) -> None:
    encoder, decoder = llama(prefix="encoder.", head=False), llama(prefix="decoder.", head=False)
    merge = merge_of(tmp_path, encoder, decoder, encoder)

    first = problems(merge)[0]

    assert "with 'decoder.' for 'encoder.'; they can be read as such if they mean the same; or accept it" in first
    plan: MergePlan = merge.plan(stockflow={"accept": ["other-names"]})
    assert jobs_of(plan).keys() == encoder.keys()


def test_other_shapes_under_other_names_are_no_view(tmp_path: Path) -> None:
    other = {name: value.repeat(2, 1) if value.dim() == 2 else value for name, value in llama(prefix="").items()}

    assert all("other-names" not in said for said in problems(merge_of(tmp_path, llama(), other, llama())))


def test_another_layout_is_one_problem(tmp_path: Path) -> None:
    experts = {f"model.layers.{n}.experts.{e}.w": torch.ones(2, 2).bfloat16() for n in range(3) for e in range(4)}
    fused = {f"model.layers.{n}.experts.fused": torch.ones(4, 2, 2).bfloat16() for n in range(3)}
    merge = merge_of(tmp_path, llama() | experts, llama() | fused, llama() | experts)

    (said,) = problems(merge)

    assert said.startswith(f"{merge.folders[1]} has 3 tensors such as 'model.layers.0.experts.fused' where ")
    assert "has 12 such as 'model.layers.0.experts.0.w', with as many elements" in said


def test_modules_in_which_nothing_is_merged_are_refused(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, llama(), llama(), llama())
    merge.recipe["modules"] = {"default": {"models": merge.recipe.pop("models")}}

    (said,) = problems(merge, stockflow={"rules": [{"filter": "*", "action": "copy"}]})

    assert said.startswith("nothing is merged: every tensor comes from one model, though `model_stock` is to merge 3")


@pytest.mark.parametrize(
    ("method", "parameters", "cause"),
    [
        ("task_arithmetic", {"weight": 1.0, "lambda": 0}, "lambda: 0"),
        ("ties", {"weight": 0, "density": 0.5}, "weight: 0"),
        ("dare_ties", {"weight": 1.0, "density": 0}, "density: 0"),
        ("nearswap", {"t": 0}, "t: 0"),
        ("slerp", {"t": [0, 0]}, "t: 0"),
        ("sce", {"select_topk": 0}, "select_topk: 0"),
        ("slerp", {"t": 1}, "t: 1"),
    ],
)
def test_values_by_which_nothing_is_merged_are_refused(
    tmp_path: Path, method: str, parameters: dict[str, Any], cause: str
) -> None:
    merge = merge_of(tmp_path, llama(), llama(), llama())
    if method in ("slerp", "nearswap"):
        merge.recipe["models"].pop()
    given: dict[str, Any] = {"merge_method": method, "parameters": parameters}

    (said,) = problems(merge, **given)

    assert said.startswith(f"nothing is merged: with `{cause}` every tensor comes from one model")
    assert merge.plan(**given, stockflow={"accept": ["unmerged"]})
    some = {name: [value, 0.5] if value == 0 else value for name, value in parameters.items()}
    if method != "slerp":
        assert merge.plan(**given | {"parameters": some})


ALONE = [
    ("linear", (1, 0), {}, 0),
    ("linear", (0, 1), {"normalize": False}, 1),
    ("linear", (0, 0.5), {"normalize": False}, None),
    ("linear", (3, 0), {}, 0),
    ("task_arithmetic", (0, 1), {}, 1),
    ("task_arithmetic", (0, 0.5), {}, None),
    ("task_arithmetic", (0, 0.5), {"lambda": 2}, 1),
    ("ties", (2, 0), {"density": 1}, 0),
    ("ties", (2, 0), {"density": 0.5}, None),
    ("breadcrumbs", (1, 0), {"density": 1}, None),
    ("nuslerp", (1, 0), {}, 0),
    ("nuslerp", (0, 0), {}, None),
    ("multislerp", (0, 1), {}, 1),
]
"""Methods, weights of two models, further parameters, and which of the two is the result, if one is."""


@pytest.mark.parametrize(("method", "weights", "parameters", "expected"), ALONE, ids=str)
def test_weights_by_which_one_model_is_the_result_are_refused(
    tmp_path: Path, method: str, weights: tuple[float, float], parameters: dict[str, Any], expected: int | None
) -> None:
    merge = merge_of(tmp_path, llama(), llama(), llama())
    tuned = merge.folders[1:]
    models = [
        {"model": str(folder), "parameters": {"weight": weight}} for folder, weight in zip(tuned, weights, strict=True)
    ]
    given: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}

    if expected is None:
        assert merge.plan(**given)
        return

    (said,) = problems(merge, **given)
    cause = f"`weight: {weights[0]:g}, {weights[1]:g}`"
    assert said.startswith(f"nothing is merged: with {cause} every tensor comes from one model, {tuned[expected]};")


def test_layers_of_two_models_by_weights_of_one_and_none_are_a_merge(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, llama(), llama(), llama())
    one, two = (
        {"model": str(folder), "parameters": {"weight": [{"filter": "lm_head", "value": first}, {"value": second}]}}
        for folder, first, second in zip(merge.folders[1:], (1, 0), (0, 1), strict=True)
    )

    assert merge.plan(merge_method="linear", models=[one, two])


@pytest.mark.parametrize("action", ["copy", "skip"])
def test_a_merge_in_which_nothing_is_merged_is_refused(tmp_path: Path, action: str) -> None:
    rules = {"rules": [{"filter": "lm_head", "action": "copy"}, {"filter": "*", "action": "copy"}]}
    merge = merge_of(tmp_path, llama(), llama(), llama())

    (said,) = problems(merge, stockflow=rules)

    assert said.startswith("nothing is merged: every tensor comes from one model, though `model_stock` is to merge 3")
    plan = merge.plan(stockflow=rules | {"accept": ["unmerged"]})
    assert all(job.is_copy for job in plan.jobs)
    merge.plan(stockflow=rule(filter="lm_head", action=action))


@pytest.mark.parametrize(
    ("copied", "is_said"),
    [
        (("model.",), True),
        (("layers",), True),
        (("embed", "norm", "lm_head"), False),
        (("mlp", "embed", "norm", "lm_head"), False),
        ((), False),
    ],
)
def test_rules_that_copy_all_layers_are_warned_of(tmp_path: Path, copied: tuple[str, ...], is_said: bool) -> None:
    merge = merge_of(tmp_path, llama(), llama(), llama())

    plan = merge.plan(stockflow={"rules": [{"filter": each, "action": "copy"} for each in copied]})

    said = [remark for remark in plan.remarks if remark.code == "unmerged"]
    assert [remark.severity for remark in said] == ["warning"] * is_said
    if copied == ("model.",):
        assert str(said[0]).startswith(
            "1 tensor of 15 is merged, 15 % of the bytes, and none in a layer: rules copy 12 tensors of layers, so the "
            f"output is {merge.folders[0]} but for 'lm_head.weight'; "
        )


def test_what_has_no_layers_is_merged_quietly(tmp_path: Path) -> None:
    dense = {f"{name}.weight": torch.ones(2, 2).bfloat16() for name in ("linear", "score", "extra")}

    plan = merge_of(tmp_path, dense, dense, dense).plan(stockflow=rule(filter="extra", action="copy"))

    assert all(remark.code != "unmerged" for remark in plan.remarks)
