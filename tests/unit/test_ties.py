"""Tied heads: one tensor or two follows from configs and stored values, and a merge keeps what each model meant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stockflow.errors import PlanError
from stockflow.planning.job import COPY
from stockflow.planning.plan import MergePlan
from stockflow.recipe import load_recipe
from stockflow.run import driver
from stockflow.run.inputs import Inputs
from tests import runs
from tests.checkpoints import write_checkpoint
from tests.plans import Merge, jobs_of, rule

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEY = "tie_word_embeddings"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SHAPE = (3000, 40)
"""Larger than the ranges that are looked at."""
FORMS = ("tied", "twice", "own", "untied", "lacking")


def tensors(form: str, seed: int, names: tuple[str, str] = (EMBEDDING, HEAD)) -> dict[str, torch.Tensor]:
    """An embedding and, by the form, no head, the embedding again, or a head of its own."""
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(SHAPE, generator=random).to(torch.bfloat16) for _ in range(2)]
    own = {"twice": drawn[0].clone(), "own": drawn[1], "untied": drawn[1]}
    norm = {"model.norm.weight": torch.ones(40, dtype=torch.bfloat16)}
    return norm | {names[0]: drawn[0]} | ({names[1]: own[form]} if form in own else {})


def config_of(form: str) -> dict[str, Any]:
    """Only ``untied`` and ``lacking`` say that they are untied; ``own`` contradicts its config."""
    return CONFIG | {KEY: form not in ("untied", "lacking")}


def written(root: Path, *forms: str, names: tuple[str, str] = (EMBEDDING, HEAD)) -> Merge:
    merge = Merge(root)
    for number, (folder, form) in enumerate(zip(merge.folders, forms, strict=True)):
        write_checkpoint(folder, tensors(form, number, names), config=config_of(form))
    return merge


def codes(plan: MergePlan) -> list[str]:
    return [remark.code for remark in plan.remarks]


def mean(root: Path, merge: Merge, **top_level: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Merge to the mean of the two tuned models; return tensors and config."""
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in merge.folders[1:]]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(merge.folders[0]), "models": models, **top_level}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    runs.merge_here(root / "recipe.yaml", root / "out")
    return load_file(root / "out" / "model.safetensors"), json.loads((root / "out" / "config.json").read_text())


def expected(forms: tuple[str, ...], which: str) -> torch.Tensor:
    """The mean of two models, computed in float64 from what each of them has for a head or an embedding."""
    found = []
    for seed, form in enumerate(forms):
        own = tensors(form, seed)
        found.append(own.get(HEAD, own[EMBEDDING]).double() if which == HEAD else own[EMBEDDING].double())
    base, one, two = found
    return base + 0.5 * (one - base) + 0.5 * (two - base)


MERGED: dict[tuple[str, ...], tuple[set[str], bool]] = {
    ("tied", "tied", "tied"): ({EMBEDDING}, True),
    ("twice", "twice", "twice"): ({EMBEDDING, HEAD}, True),
    ("twice", "tied", "tied"): ({EMBEDDING, HEAD}, True),
    ("twice", "tied", "twice"): ({EMBEDDING, HEAD}, True),
    ("tied", "twice", "tied"): ({EMBEDDING}, True),
    ("tied", "twice", "twice"): ({EMBEDDING}, True),
    ("untied", "untied", "untied"): ({EMBEDDING, HEAD}, False),
}
"""What is written of an embedding and a head, and what the config says then."""
REFUSED = [
    ("tied", "untied", "untied"), ("tied", "untied", "tied"), ("twice", "untied", "tied"), ("untied", "tied", "tied"),
    ("untied", "tied", "twice"), ("own", "own", "own"), ("own", "tied", "tied"), ("tied", "own", "tied"),
    ("twice", "own", "twice"), ("untied", "own", "untied"), ("untied", "untied", "twice"),
]  # fmt: skip


@pytest.mark.parametrize("forms", MERGED, ids="-".join)
def test_a_head_is_merged_as_what_it_is_in_each_model(tmp_path: Path, forms: tuple[str, ...]) -> None:
    names, flag = MERGED[forms]
    found, config = mean(tmp_path, written(tmp_path, *forms))

    assert found.keys() - {"model.norm.weight"} == names
    assert config[KEY] is flag
    for name in names:
        assert torch.equal(found[name], expected(forms, name).to(torch.bfloat16))
    if flag and HEAD in names:
        assert torch.equal(found[HEAD], found[EMBEDDING])


@pytest.mark.parametrize("forms", MERGED, ids="-".join)
def test_what_is_stored_twice_in_some_models_only_is_said(tmp_path: Path, forms: tuple[str, ...]) -> None:
    plan = written(tmp_path, *forms).plan()

    is_mixed = {"tied", "twice"} <= set(forms)
    assert codes(plan) == (["tied-head"] if is_mixed else [])
    if is_mixed:
        assert (
            "is merged and written beside it" in plan.notes[0]
            if forms[0] == "twice"
            else "is not written" in plan.notes[0]
        )


@pytest.mark.parametrize("forms", REFUSED, ids="-".join)
def test_a_head_of_its_own_among_tied_ones_is_refused_or_untied_with_the_config(
    tmp_path: Path, forms: tuple[str, ...]
) -> None:
    merge = written(tmp_path, *forms)
    refused = merge.refusal()
    assert "'lm_head.weight' is a tensor of its own in " in refused
    assert "accept: [head-untied]" in refused

    found, config = mean(tmp_path, merge, stockflow={"accept": ["head-untied"]})

    assert config[KEY] is False
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name], expected(forms, name).to(torch.bfloat16))


@pytest.mark.parametrize("nested", [False, True])
def test_every_section_that_ties_is_untied(tmp_path: Path, nested: bool) -> None:
    merge = written(tmp_path, "tied", "untied", "untied")
    config: dict[str, Any] = {"text_config": {KEY: True}, KEY: True} if nested else {"text_config": {KEY: True}}
    (merge.folders[0] / "config.json").write_text(json.dumps(config))

    plan = merge.plan(stockflow={"accept": ["head-untied"]})

    assert plan.config == {"text_config": {KEY: False}, KEY: False}


def test_one_row_that_differs_makes_a_head_of_its_own(tmp_path: Path) -> None:
    merge = written(tmp_path, "twice", "twice", "twice")
    for row in (0, SHAPE[0] - 1):
        changed = tensors("twice", 2)
        changed[HEAD][row] += 1
        write_checkpoint(merge.folders[2], changed, config=config_of("twice"))

        assert f"is a tensor of its own in {merge.folders[2]}, and one with" in merge.refusal()


ROW = 700
"""Between the ranges that are looked at first."""


def with_rows_of_its_own(seed: int, names: tuple[str, str] = (EMBEDDING, HEAD)) -> dict[str, torch.Tensor]:
    """A head that is the embedding but for two rows, as when new tokens alone are trained."""
    found = tensors("twice", seed, names)
    found[names[1]][ROW - 1 : ROW + 1] += 1
    return found


@pytest.mark.parametrize(
    "forms",
    [("tied", "tied", "rows"), ("rows", "tied", "tied"), ("twice", "rows", "rows"), ("rows", "rows", "rows")],
    ids="-".join,
)  # fmt: skip
def test_a_head_with_a_few_rows_of_its_own_is_no_copy(tmp_path: Path, forms: tuple[str, ...]) -> None:
    merge = written(tmp_path, *forms)
    own = {number: with_rows_of_its_own(number) for number, form in enumerate(forms) if form == "rows"}
    for number, found in own.items():
        write_checkpoint(merge.folders[number], found, config=config_of("twice"))
    with pytest.raises(PlanError) as refused:
        mean(tmp_path, merge)
    for number in own:
        said = f"{merge.folders[number]} (where it is the embedding but for some rows, the last of them {ROW})"
        assert said in str(refused.value)

    merged, config = mean(tmp_path, merge, stockflow={"accept": ["head-untied"]})

    assert config[KEY] is False
    heads = [
        own[number][HEAD].double() if number in own else tensors("tied", number)[EMBEDDING].double()
        for number in range(3)
    ]
    right = heads[0] + 0.5 * (heads[1] - heads[0]) + 0.5 * (heads[2] - heads[0])
    assert torch.equal(merged[HEAD], right.to(torch.bfloat16))
    assert torch.equal(merged[EMBEDDING], expected(("tied",) * 3, EMBEDDING).to(torch.bfloat16))


@pytest.mark.parametrize(
    "names",
    [("shared.weight", "lm_head.weight"), ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")],
    ids=lambda names: names[1],
)
def test_heads_of_other_families_are_compared_in_whole(tmp_path: Path, names: tuple[str, str]) -> None:
    merge = written(tmp_path, "tied", "tied", "tied", names=names)
    write_checkpoint(merge.folders[2], with_rows_of_its_own(2, names), config=config_of("twice"))

    assert f"the last of them {ROW}" in merge.refusal()


@pytest.mark.parametrize(
    "names",
    [("shared.weight", "encoder.embed_tokens.weight"), (EMBEDDING, "model.layers.1.embed_tokens.weight")],
    ids=lambda names: names[1],
)
def test_copies_with_a_few_rows_of_their_own_are_another_tensor(tmp_path: Path, names: tuple[str, str]) -> None:
    merge = written(tmp_path, "twice", "twice", "twice", names=names)
    write_checkpoint(merge.folders[2], with_rows_of_its_own(2, names), config=config_of("twice"))

    said = [remark.text for remark in merge.plan().remarks if remark.code == "tied-head"]
    assert len(said) == 1
    assert f"and another tensor in {merge.folders[2]}" in said[0]


def test_a_plan_says_what_it_did_not_compare_and_the_merge_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_COMPARED_BYTES", 4 * SHAPE[0] * SHAPE[1] - 1)
    merge = written(tmp_path, "tied", "twice", "tied")
    recipe = tmp_path / "recipe.yaml"
    mean(tmp_path, merge)
    before = runs.invoke("plan", recipe, tmp_path / "next")
    assert "(in every range that was looked at; a merge compares all of it)" in " ".join(before.stdout.split())

    write_checkpoint(merge.folders[1], with_rows_of_its_own(1), config=config_of("twice"))
    assert runs.invoke("plan", recipe, tmp_path / "next").exit_code == 0
    with pytest.raises(PlanError, match=f"the last of them {ROW}"):
        mean(tmp_path, merge)
    with pytest.raises(PlanError, match=f"the last of them {ROW}"):  # as inspect and audit plan
        Inputs.open(load_recipe(str(recipe))).plan()


@pytest.mark.parametrize("forms", [("tied", "tied"), ("twice", "tied")], ids="-".join)
def test_a_head_that_was_left_behind_is_named_and_may_be_left_out(tmp_path: Path, forms: tuple[str, ...]) -> None:
    merge = written(tmp_path, *forms, "twice")
    stale = tensors("twice", 2) | {HEAD: tensors("tied", 0)[EMBEDDING]}
    write_checkpoint(merge.folders[2], stale, config=config_of("twice"))
    refused = merge.refusal()

    base, _, tune = merge.folders
    assert f"{tune} (where it is the embedding of {base}, as if it had been left behind in training)" in refused
    rules = rule(filter=HEAD, action="skip")
    assert "`stockflow: {rules: [{filter: lm_head.weight, action: skip}]}` leaves it out" in refused

    found, config = mean(tmp_path, merge, stockflow=rules)

    assert (config[KEY], HEAD in found) == (True, False)
    assert torch.equal(found[EMBEDDING], expected(("tied",) * 3, EMBEDDING).to(torch.bfloat16))


@pytest.mark.parametrize("row", [0, ROW])
def test_a_head_that_was_trained_in_part_is_none_that_was_left_behind(tmp_path: Path, row: int) -> None:
    merge = written(tmp_path, "tied", "tied", "twice")
    trained = tensors("twice", 2) | {HEAD: tensors("tied", 0)[EMBEDDING]}
    trained[HEAD][row] += 1
    write_checkpoint(merge.folders[2], trained, config=config_of("twice"))

    assert f"is a tensor of its own in {merge.folders[2]}, and one with" in merge.refusal()


@pytest.mark.parametrize("head", [EMBEDDING, HEAD])
def test_a_head_that_a_config_alone_unties_is_called_that(tmp_path: Path, head: str) -> None:
    merge = written(tmp_path, "tied", "tied", "untied")
    own = tensors("untied", 2)
    write_checkpoint(merge.folders[2], own | {HEAD: own[head].clone()}, config=config_of("untied"))

    alone = " (by its config alone: it is the embedding again)" if head == EMBEDDING else ""
    assert f"is a tensor of its own in {merge.folders[2]}{alone}, and one with" in merge.refusal()


def test_an_untied_model_whose_head_is_the_bases_embedding_is_not_advised_to_lose_it(tmp_path: Path) -> None:
    merge = written(tmp_path, "tied", "tied", "untied")
    own = tensors("untied", 2) | {HEAD: tensors("tied", 0)[EMBEDDING]}
    write_checkpoint(merge.folders[2], own, config=config_of("untied"))

    assert "skip" not in merge.refusal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_values_of_another_dtype_are_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    merge = written(tmp_path, "tied", "tied", "tied")
    again = tensors("tied", 1)
    large = again[EMBEDDING].abs().clamp(2**-14, 2)  # all of them numbers of F16, too
    again[EMBEDDING] = large.copysign(again[EMBEDDING])
    again[HEAD] = again[EMBEDDING].to(dtype)
    write_checkpoint(merge.folders[1], again, config=config_of("tied"))

    assert codes(merge.plan()) == ["tied-head"]


@pytest.mark.parametrize(
    "options",
    [
        rule(filter=HEAD, action="copy"),
        rule(filter=EMBEDDING, action="copy"),
        rule(filter=HEAD, merge_method="linear", parameters={"weight": 1.0}),
        rule(filter="embed", merge_method="task_arithmetic", parameters={"weight": 0.1}),
    ],
    ids=str,
)  # fmt: skip
def test_a_rule_that_would_part_a_stored_pair_warns(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = written(tmp_path, "twice", "twice", "tied").plan(stockflow=options)

    (said,) = [remark for remark in plan.remarks if remark.code == "pair-parted"]
    assert (said.severity, said.tensors) == ("warning", (HEAD, EMBEDDING))


def test_a_filter_of_a_parameter_that_would_part_a_stored_pair_warns(tmp_path: Path) -> None:
    merge = written(tmp_path, "twice", "twice", "twice")
    weights = [{"filter": "lm_head", "value": 0.1}, {"value": 0.5}]

    assert codes(merge.plan(merge_method="task_arithmetic", parameters={"weight": weights})) == ["pair-parted"]


def test_a_head_that_a_rule_leaves_out_and_rules_for_both_part_nothing(tmp_path: Path) -> None:
    merge = written(tmp_path, "twice", "tied", "twice")
    assert codes(merge.plan(stockflow=rule(filter=HEAD, action="skip"))) == ["skipped"]

    both = [{"filter": name, "action": "copy"} for name in (HEAD, EMBEDDING)]
    plan = merge.plan(stockflow={"rules": both})
    assert codes(plan) == ["tied-head"]
    assert {jobs_of(plan)[name].method for name in (HEAD, EMBEDDING)} == {COPY}


def test_a_head_that_nobody_has_is_said(tmp_path: Path) -> None:
    (said,) = written(tmp_path, "lacking", "lacking", "lacking").plan().remarks

    assert said.code == "promise-unkept"
    assert f"{KEY}: false" in said.text
    assert "no head is written" in said.text


@pytest.mark.parametrize(("model_type", "is_said"), [("llama", True), ("gemma", False), ("qwen3_moe", True)])
def test_a_head_that_nobody_has_is_said_where_the_type_of_model_means_one(
    tmp_path: Path, model_type: str, is_said: bool
) -> None:
    """A matrix of a layer may have the embedding's shape; it is no head."""
    own = tensors("lacking", 0)
    own["model.layers.0.mlp.up_proj.weight"] = own[EMBEDDING].clone()
    merge = Merge(tmp_path)
    for folder in merge.folders:
        write_checkpoint(folder, own, config={"model_type": model_type, "architectures": ["XForCausalLM"]})

    assert [each.code for each in merge.plan().remarks] == ["promise-unkept"] * is_said


def test_a_copy_that_is_an_embedding_in_some_models_only_is_warned_of(tmp_path: Path) -> None:
    names = ("shared.weight", "encoder.embed_tokens.weight")
    merge = Merge(tmp_path)
    for number, folder in enumerate(merge.folders):
        embedding = torch.randn(16, 8).bfloat16()
        own = dict(zip(names, (embedding, embedding * 1.25 if number == 2 else embedding.clone()), strict=True))
        write_checkpoint(folder, own, config={"model_type": "bart", KEY: True})

    (said,) = merge.plan().remarks

    assert (said.code, said.severity, said.tensors) == ("tied-head", "warning", names[1:])
    assert f"and another tensor in {merge.folders[2]}" in said.text
    assert "loaders that tie the two take one for both" in said.text


PARTS = ("head.dense.weight", "encoder.layer.0.attention.output.dense.weight", "decoder.bias")


@pytest.mark.parametrize("head", [None, "cls.predictions.decoder.weight", "decoder.weight"])
def test_what_is_called_like_a_head_or_an_output_is_none(tmp_path: Path, head: str | None) -> None:
    """BERT's layers have outputs, ModernBERT's head is more than its decoder: what has a row per token is one."""
    own = tensors("lacking", 0)
    own |= {name: torch.ones(3, dtype=torch.bfloat16) for name in PARTS}
    own |= {head: tensors("untied", 0)[HEAD]} if head else {}
    merge = Merge(tmp_path)
    for folder in merge.folders:
        write_checkpoint(folder, own, config=config_of("lacking") | {"architectures": ["BertForMaskedLM"]})

    assert ("no head is written" in "".join(remark.text for remark in merge.plan().remarks)) == (head is None)


@pytest.mark.parametrize("forms", [("untied", "lacking", "untied"), ("lacking", "untied", "untied")], ids="-".join)
def test_a_missing_head_is_never_advised_to_be_copied_or_left_out(tmp_path: Path, forms: tuple[str, ...]) -> None:
    found = written(tmp_path, *forms).refusal()

    assert "lm_head.weight" in found
    assert "action: " not in found
    assert f"say `{KEY}: true` there if head and embedding are one" in found


def test_a_head_that_a_class_has_none_of_may_be_copied(tmp_path: Path) -> None:
    """As AutoModel saves a tune: its config says of the head what that of the base does."""
    merge = written(tmp_path, "untied", "lacking", "untied")
    bare = config_of("lacking") | {"architectures": ["LlamaModel"]}
    (merge.folders[1] / "config.json").write_text(json.dumps(bare))

    accepted: dict[str, Any] = {"accept": ["architecture-differs"]}
    found = merge.refusal(stockflow=accepted)

    assert f"lm_head.weight' is missing in {merge.folders[1]}; a rule with `action: copy` takes it from" in found
    rules = [{"filter": "lm_head", "action": "copy"}]
    assert jobs_of(merge.plan(stockflow=accepted | {"rules": rules}))["lm_head.weight"].is_copy


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.wte.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("backbone.embeddings.weight", "lm_head.weight"),
        ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("model.shared.weight", "model.decoder.embed_tokens.weight"),
        ("tok_embeddings.weight", "output.weight"),
        ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"),
    ],
    ids=lambda names: names[1],
)  # fmt: skip
def test_heads_and_copies_of_other_families_are_known(tmp_path: Path, names: tuple[str, str]) -> None:
    merge = written(tmp_path, "twice", "tied", "twice", names=names)
    plan = merge.plan()

    assert codes(plan) == ["tied-head"]
    job = jobs_of(plan)[names[1]]
    assert job.reading.operands[1].extents == jobs_of(plan)[names[0]].reading.operands[1].extents


def test_a_larger_head_is_no_copy_of_a_smaller_embedding(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for number, folder in enumerate(merge.folders):
        own = tensors("tied", number) | {HEAD: torch.ones(SHAPE[0] + 1, SHAPE[1], dtype=torch.bfloat16)}
        write_checkpoint(folder, own, config=CONFIG)

    assert merge.plan().remarks == ()


# Configs that say both, and copies in layers that predict further tokens


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
@pytest.mark.parametrize("form", ["own", "twice", "tied"])
def test_flags_that_contradict_each_other_are_decided_by_the_tensors(
    tmp_path: Path, form: str, flags: tuple[bool, bool]
) -> None:
    merge = Merge(tmp_path)
    config = CONFIG | {KEY: flags[0], "text_config": {"model_type": "llama", KEY: flags[1]}}
    for number, folder in enumerate(merge.folders):
        write_checkpoint(folder, tensors(form, number), config=config)
    plan = merge.plan()

    is_tied = form != "own"
    assert plan.config is not None
    assert (plan.config[KEY], plan.config["text_config"][KEY]) == (is_tied, is_tied)  # type: ignore[index]
    assert codes(plan) == ["tie-flags-disagree"] * 3
    assert "the published config says " + str(is_tied).lower() in plan.notes[0]


MTP_EMBEDDING, MTP_HEAD = "model.layers.1.embed_tokens.weight", "model.layers.1.shared_head.head.weight"
MTP_CONFIG = CONFIG | {KEY: False, "num_hidden_layers": 1, "num_nextn_predict_layers": 1}


def with_prediction(seed: int, *, is_stale: bool = False) -> dict[str, torch.Tensor]:
    """A layer, and one that predicts further tokens with copies of embedding and head, or with those of the base."""
    own, stale = tensors("own", seed), tensors("own", 0)
    copied = stale if is_stale else own
    layers = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(8, 40).to(torch.bfloat16) for n in (0, 1)}
    return own | layers | {MTP_EMBEDDING: copied[EMBEDDING].clone(), MTP_HEAD: copied[HEAD].clone()}


def test_copies_in_a_prediction_layer_follow_the_merged_embedding_though_tunes_lack_the_layer(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for number, folder in enumerate(merge.folders):
        found = with_prediction(number)
        kept = found if number == 0 else {name: each for name, each in found.items() if "layers.1." not in name}
        write_checkpoint(folder, kept, config=MTP_CONFIG)
    found, _ = mean(tmp_path, merge)

    base = load_file(merge.folders[0] / "model.safetensors")
    assert torch.equal(found[EMBEDDING], expected(("own", "own", "own"), EMBEDDING).to(torch.bfloat16))
    assert torch.equal(found[MTP_EMBEDDING], found[EMBEDDING])
    assert torch.equal(found[MTP_HEAD], found[HEAD])
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    assert {"tied-head", "part-kept"} <= set(codes(merge.plan()))


def test_a_copy_that_was_left_behind_is_said_and_merged_as_stored(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for number, folder in enumerate(merge.folders):
        write_checkpoint(folder, with_prediction(number, is_stale=True), config=MTP_CONFIG)
    plan = merge.plan()

    said = [remark for remark in plan.remarks if remark.code == "tied-head"]
    assert [remark.tensors for remark in said] == [(MTP_EMBEDDING,), (MTP_HEAD,)]
    assert f"in {merge.folders[0]}, and another tensor in {merge.folders[1]}, {merge.folders[2]}" in said[0].text
    assert not jobs_of(plan)[MTP_EMBEDDING].is_copy


def test_a_rule_that_parts_a_copy_in_a_layer_from_its_embedding_warns_though_the_head_is_untied(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for number, folder in enumerate(merge.folders):
        write_checkpoint(folder, with_prediction(number), config=MTP_CONFIG)
    plan = merge.plan(stockflow=rule(filter="model.embed_tokens", action="copy"))

    assert [remark.tensors for remark in plan.remarks if remark.code == "pair-parted"] == [(MTP_EMBEDDING, EMBEDDING)]
