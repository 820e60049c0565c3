"""Who is who: a model under several names is one model, a copy is named, and so is what is no tune of the base."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import stockflow
from stockflow.checkpoints.identity import same_models
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.errors import RecipeError
from stockflow.planning.plan import MergePlan
from stockflow.recipe import load_recipe
from stockflow.results import PlanResult
from stockflow.run.driver import MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, open_store
from tests import runs
from tests.checkpoints import LLAMA_CONFIG, Family, llama_shapes, make_family, write_checkpoint
from tests.hub_server import COMMIT, hub_server

TIED = LLAMA_CONFIG | {"tie_word_embeddings": True}
"""The families have no head."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3, seed=5, config=TIED)


def recipe_at(folder: Path, base: object, *models: object, **top_level: Any) -> Path:
    content = {"merge_method": "model_stock", "base_model": str(base), "models": [{"model": str(m)} for m in models]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | top_level))
    return path


def planned(recipe: Path) -> MergePlan:
    plan, _ = plan_merge(Inputs.open(load_recipe(str(recipe))), str(recipe.parent / "out"), MergeOptions(2**31, 1))
    return plan


def codes(plan: MergePlan) -> list[str]:
    return [remark.code for remark in plan.remarks]


def snapshot(folder: Path, source: Path, name: str = "models--Org--Base") -> Path:
    """Lay a model out as the hub's cache does."""
    place = folder / name / "snapshots" / COMMIT
    shutil.copytree(source, place)
    return place


def test_ordinary_tunes_are_not_spoken_of(tmp_path: Path, family: Family) -> None:
    assert codes(planned(recipe_at(tmp_path, family.base, *family.tuned))) == []


def test_two_snapshots_of_one_commit_are_one_model(tmp_path: Path, family: Family) -> None:
    base = snapshot(tmp_path / "one", family.base)
    again = snapshot(tmp_path / "two", family.base, "models--org--base")

    plan = planned(recipe_at(tmp_path, base, again, *family.tuned))

    assert codes(plan) == ["same-model"]
    assert plan.notes[0] == f"{again} is {base} under another name: it is not counted as a model that was tuned from it"
    reference = planned(recipe_at(tmp_path, base, *family.tuned))
    assert plan.plan_id == reference.plan_id


def test_a_folder_and_the_file_in_it_are_one_model(tmp_path: Path, family: Family) -> None:
    file = next(family.base.glob("*.index.json"), family.base / "model.safetensors")

    plan = planned(recipe_at(tmp_path, family.base, file, *family.tuned))

    assert codes(plan) == ["same-model"]
    assert plan.plan_id == planned(recipe_at(tmp_path, family.base, *family.tuned)).plan_id


@pytest.mark.parametrize("name", ["link", "{base}/", "{base}/../{base.name}", "file://{base}"])
def test_the_base_behind_a_link_or_another_path_is_said_as_it_is_written(
    name: str, tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(family.base)
    written = name.format(base=family.base)

    result = runs.merge_here(recipe_at(tmp_path, family.base, written, *family.tuned[:2]), tmp_path / "out")

    (remark,) = result.manifest.remarks
    assert (remark.code, remark.models) == ("same-model", (str(family.base),))
    becomes = "it is not counted as a model that was tuned from it"
    assert remark.text == f"{written} is {family.base} under another name: {becomes}"
    assert remark.place == f"{tmp_path / 'recipe.yaml'}:4:3"


def test_the_base_that_is_listed_by_its_own_name_is_not_spoken_of(tmp_path: Path, family: Family) -> None:
    assert codes(planned(recipe_at(tmp_path, family.base, family.base, *family.tuned))) == []


def test_a_tune_listed_again_behind_a_link_is_said_as_it_is_written(tmp_path: Path, family: Family) -> None:
    (tmp_path / "link").symlink_to(family.tuned[0])

    (remark,) = planned(recipe_at(tmp_path, family.base, *family.tuned[:2], tmp_path / "link")).remarks

    assert (remark.code, remark.models) == ("repeated-model", (str(family.tuned[0]),))
    assert remark.text.endswith(f"{family.tuned[0]}, here as {tmp_path / 'link'}; it counts once")


def test_the_folder_of_the_hubs_cache_and_a_link_to_its_snapshot_are_one_model(tmp_path: Path, family: Family) -> None:
    place = snapshot(tmp_path, family.base)
    (tmp_path / "link").symlink_to(place)

    plan = planned(recipe_at(tmp_path, place.parent.parent, tmp_path / "link", *family.tuned))

    assert codes(plan) == ["same-model", "snapshot"]
    assert plan.notes[0].startswith(f"{tmp_path / 'link'} is {place.parent.parent} under another name")


@pytest.mark.parametrize(("changed", "expected"), [({}, ["same-model"]), ({"pad_token_id": 3}, ["same-samples"])])
def test_hard_links_to_the_files_of_the_base_are_the_base_if_their_config_is(
    changed: dict[str, int], expected: list[str], tmp_path: Path, family: Family
) -> None:
    shutil.copytree(family.base, tmp_path / "linked", copy_function=os.link)
    (tmp_path / "linked/config.json").unlink()
    (tmp_path / "linked/config.json").write_text(json.dumps(TIED | changed))

    plan = planned(recipe_at(tmp_path, family.base, tmp_path / "linked", *family.tuned))

    assert [code for code in codes(plan) if code.startswith("same")] == expected


@pytest.mark.parametrize("name", ["Org/Base", "org/base@main", "hf://ORG/base", f"org/base@{COMMIT}"])
def test_the_base_under_another_name_of_the_hub_is_no_tune(tmp_path: Path, family: Family, name: str) -> None:
    """In a process of its own: the hub's client reads HF_ENDPOINT when it is imported."""
    recipe = recipe_at(tmp_path, "org/base", name, family.tuned[0])
    models = {"org/base": family.base, "Org/Base": family.base, "ORG/base": family.base}
    with hub_server(models) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        arguments = runs.command("plan", recipe, tmp_path / "out")
        refused = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    assert refused.returncode == 2
    assert "under another name: it is not counted as a model that was tuned from it" in refused.stderr
    assert "`model_stock` needs at least 2 models besides the base, found 1" in refused.stderr


def test_the_hubs_model_and_its_snapshot_are_one() -> None:
    def at(url: str) -> Checkpoint:
        return Checkpoint(url, {}, {}, {}, None, {}, ())

    urls = [f"hf://Org/Base@{COMMIT}", f"/cache/models--org--base/snapshots/{COMMIT}", f"hf://org/base@{'0' * 40}"]

    assert same_models(urls, [at(url) for url in urls]) == {urls[1]: urls[0]}


def test_a_copy_on_s3_is_the_model_it_copies(tmp_path: Path, family: Family, s3_endpoint: str, s3_bucket: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    places = {"base": family.base, "copied": family.base, "one": family.tuned[0], "two": family.tuned[1]}
    for prefix, folder in places.items():
        for path in folder.iterdir():
            client.put_object(Bucket=s3_bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    urls = [f"s3://{s3_bucket}/{prefix}" for prefix in places]
    storage = {"storage": {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}}

    plan = planned(recipe_at(tmp_path, *urls, stockflow=storage))

    assert codes(plan) == ["same-model", "over-http"]
    assert [ref.url for ref in plan.checkpoints] == [urls[0], urls[2], urls[3]]


def test_a_tune_under_two_names_is_merged_once(tmp_path: Path, family: Family) -> None:
    tune = snapshot(tmp_path / "one", family.tuned[0])
    again = snapshot(tmp_path / "two", family.tuned[0])

    plan = planned(recipe_at(tmp_path, family.base, tune, again, family.tuned[1]))

    assert "it is merged once" in plan.notes[0]
    assert len(plan.checkpoints) == 3


def test_a_tune_under_two_names_with_a_value_for_each_is_refused(tmp_path: Path, family: Family) -> None:
    tune, again = (snapshot(tmp_path / name, family.tuned[0]) for name in ("one", "two"))
    recipe = recipe_at(tmp_path, family.base, tune, again, merge_method="task_arithmetic", parameters={"weight": 0.5})

    with pytest.raises(RecipeError, match="are one model, and `task_arithmetic` has values for each; list it once"):
        Inputs.open(load_recipe(str(recipe)))


def stacked(root: Path, base: Path, again: Path, tune: Path, **top_level: Any) -> Path:
    """Two slices, the second of which names the base in another way."""
    slices = [
        {"sources": [{"model": str(model), "layer_range": [start, start + 1]} for model in (first, tune)]}
        for start, first in enumerate((base, again))
    ]
    content = {"merge_method": "linear", "base_model": str(base), "slices": slices} | top_level
    (root / "recipe.yaml").write_text(yaml.safe_dump({"parameters": {"weight": 0.5}, **content}))
    return root / "recipe.yaml"


def test_slices_that_name_the_base_in_two_ways_mean_the_base(tmp_path: Path, family: Family) -> None:
    base, again = (snapshot(tmp_path / name, family.base) for name in ("one", "two"))

    plan = planned(stacked(tmp_path, base, again, family.tuned[0]))

    assert codes(plan) == ["same-model"]
    assert plan.notes[0] == f"{again} is {base} under another name: the layers of both are those of one model"
    assert plan.plan_id == planned(stacked(tmp_path, base, base, family.tuned[0])).plan_id


def test_one_slice_of_a_model_under_two_names_is_refused(tmp_path: Path, family: Family) -> None:
    tune, again = (snapshot(tmp_path / name, family.tuned[0]) for name in ("one", "two"))
    recipe = stacked(tmp_path, tune, tune, again, base_model=str(family.base))

    with pytest.raises(RecipeError, match=r"are those of one model; the same model as sources\[0\]"):
        Inputs.open(load_recipe(str(recipe)))


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer", "side_files_from", "chat_template", "tokens"])
def test_every_place_that_names_a_model_means_the_same_one(tmp_path: Path, family: Family, key: str) -> None:
    tune, again = (snapshot(tmp_path / name, family.tuned[0]) for name in ("one", "two"))
    for folder in (tune, again):
        (folder / "chat_template.jinja").write_text("{{ 'of the tune' }}")

    def asked(location: Path) -> dict[str, Any]:
        where = str(location)
        token = {"source": {"kind": "model_token", "model": where, "token_id": 1}}
        return {
            "tokenizer": {"tokenizer": {"source": where}},
            "tokens": {"tokenizer": {"source": "base", "tokens": {"a": token}}},
            "side_files_from": {"stockflow": {"side_files_from": where}},
        }.get(key, {key: where})

    plans = [
        planned(recipe_at(tmp_path, family.base, tune, again, family.tuned[1], **asked(place))).plan_id
        for place in (tune, again)
    ]

    assert plans[0] == plans[1]


def test_a_copy_on_disk_is_suspected_before_and_proved_after(tmp_path: Path, family: Family) -> None:
    shutil.copytree(family.base, tmp_path / "copy")
    recipe = recipe_at(tmp_path, family.base, family.tuned[0], tmp_path / "copy", family.tuned[1])

    assert codes(planned(recipe)) == ["same-samples"]
    result = runs.merge_here(recipe, tmp_path / "out")

    (proof,) = [remark for remark in result.manifest.remarks if remark.code == "copy"]
    assert proof.models == (str(tmp_path / "copy"), str(family.base))


def test_a_copy_in_another_dtype_is_suspected(tmp_path: Path, family: Family) -> None:
    tune = load_file(family.tuned[0] / "model.safetensors")
    finer = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tune.items()}
    copy = write_checkpoint(tmp_path / "finer", finer, config=TIED)

    assert "same-samples" in codes(planned(recipe_at(tmp_path, family.base, family.tuned[0], copy)))


def finer(root: Path) -> tuple[Path, Path, Family]:
    """Write a tune in F32 and its cast to BF16."""
    family = make_family(root, 2, llama_shapes(TIED), buffers=False, delta_scale=0.01)
    generator = torch.Generator().manual_seed(0)
    own = load_file(family.tuned[0] / "model.safetensors")
    fine = {
        name: each.float() * (1 + 0.01 * torch.randn(each.shape, generator=generator)) for name, each in own.items()
    }
    cast = {name: each.bfloat16() for name, each in fine.items()}
    return (
        write_checkpoint(root / "fine", fine, config=TIED),
        write_checkpoint(root / "cast", cast, config=TIED),
        family,
    )


def same_samples(recipe: Path) -> list[tuple[str, ...]]:
    found = Inputs.open(load_recipe(str(recipe)))
    plan, _ = plan_merge(found, "/none", MergeOptions(2**31, 1, accepted=("head-untied",)))
    return [(*each.models, each.text.rpartition(", ")[2]) for each in plan.remarks if each.code == "same-samples"]


def test_one_model_in_two_precisions_is_suspected_as_tunes_and_as_base(tmp_path: Path) -> None:
    fine, cast, family = finer(tmp_path)
    said = "once they are rounded to BF16: one may be the other in another precision"

    assert same_samples(recipe_at(tmp_path, family.base, cast, fine, family.tuned[1])) == [(str(cast), str(fine), said)]
    assert same_samples(recipe_at(tmp_path, fine, cast, *family.tuned)) == [(str(fine), str(cast), said)]


@pytest.mark.parametrize("noise", [1e-5, 2e-4])
def test_a_tune_of_changes_that_rounding_undoes_is_no_precision_of_its_base(tmp_path: Path, noise: float) -> None:
    family = make_family(tmp_path, 1, llama_shapes(TIED), buffers=False)
    own = load_file(family.base / "model.safetensors")
    near = {name: each.float() * (1 + noise * (-1) ** torch.arange(each.shape[-1])) for name, each in own.items()}
    tune = write_checkpoint(tmp_path / "near", near, config=TIED)

    assert same_samples(recipe_at(tmp_path, family.base, tune, *family.tuned)) == []


@pytest.mark.parametrize("part", ["q_proj", "v_proj", "down_proj"])
def test_tunes_that_differ_in_one_kind_of_matrix_alone_are_no_copies(tmp_path: Path, part: str) -> None:
    names = [name for name in llama_shapes(TIED) if part in name]
    changed, family = llamas(tmp_path, dict.fromkeys(names, lambda tensor: tensor * 1.25))

    assert same_samples(recipe_at(tmp_path, family.base, family.tuned[0], changed)) == []


def test_a_copy_among_the_models_of_a_module_is_proved(tmp_path: Path, family: Family) -> None:
    shutil.copytree(family.base, tmp_path / "copy")
    tunes = [{"model": str(place)} for place in (family.tuned[0], tmp_path / "copy", family.tuned[1])]
    content = {"merge_method": "model_stock", "base_model": str(family.base), "modules": {"default": {"models": tunes}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))

    result = runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    (proof,) = [remark for remark in result.manifest.remarks if remark.code == "copy"]
    assert proof.models == (str(tmp_path / "copy"), str(family.base))


@pytest.mark.parametrize(("epsilon", "expected"), [(1e-7, []), (1e3, ["far-values"])])
def test_changes_that_are_all_below_what_a_method_counts_are_said(
    epsilon: float, expected: list[str], tmp_path: Path, family: Family
) -> None:
    recipe = recipe_at(tmp_path, family.base, *family.tuned, merge_method="ram", parameters={"epsilon": epsilon})

    assert codes(planned(recipe)) == expected


@pytest.mark.parametrize(("t", "expected"), [(1e-7, []), (0.5, ["far-values"])])
def test_steps_that_no_change_exceeds_are_said(t: float, expected: list[str], tmp_path: Path, family: Family) -> None:
    recipe = recipe_at(tmp_path, family.base, family.tuned[0], merge_method="nearswap", parameters={"t": t})

    remarks = planned(recipe).remarks

    assert [each.code for each in remarks] == expected
    assert all(each.text.endswith(f"the output is {family.tuned[0]}") for each in remarks)


def test_a_tune_that_is_another_ones_copy_is_proved(tmp_path: Path, family: Family) -> None:
    shutil.copytree(family.tuned[0], tmp_path / "copy")
    recipe = recipe_at(tmp_path, family.base, family.tuned[0], tmp_path / "copy")

    result = runs.merge_here(recipe, tmp_path / "out")

    (proof,) = [remark for remark in result.manifest.remarks if remark.code == "copy"]
    assert proof.models == (str(tmp_path / "copy"), str(family.tuned[0]))
    told = runs.invoke("merge", recipe, tmp_path / "again")
    assert f"{tmp_path / 'copy'} is equal to {family.tuned[0]} in every tensor that was merged" in told.stdout


def test_another_model_of_equal_shapes_is_called_one(tmp_path: Path, family: Family) -> None:
    stranger = make_family(tmp_path / "stranger", 1, seed=99, config=TIED).base

    plan = planned(recipe_at(tmp_path, family.base, family.tuned[0], stranger))

    (remark,) = plan.remarks
    assert (remark.code, remark.models) == ("stranger", (str(stranger),))
    assert float(remark.values[str(stranger)]) == pytest.approx(2**0.5, abs=0.2)


def llamas(root: Path, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> tuple[Path, Family]:
    """Write a base and two tunes, and a copy of one of which some tensors are others."""
    family = make_family(root, 2, llama_shapes(TIED), buffers=False, delta_scale=0.01)
    tensors = load_file(family.tuned[0] / "model.safetensors")
    changed = {name: change(tensors[name]).contiguous() for name, change in changes.items()}
    return write_checkpoint(root / "changed", tensors | changed), family


def test_matrices_the_other_way_round_are_named_though_the_rest_is_a_tune(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qo"]
    turned, family = llamas(tmp_path, dict.fromkeys(names, torch.t))

    plan = planned(recipe_at(tmp_path, family.base, family.tuned[1], turned))

    (remark,) = plan.remarks
    assert (remark.code, remark.models) == ("stranger", (str(turned),))
    assert remark.tensors
    assert set(remark.tensors) <= set(names)


def test_norms_that_another_library_stores_one_higher_are_named_though_the_rest_is_a_tune(tmp_path: Path) -> None:
    """As llama.cpp and others hold those of Gemma; all base norms are near zero there."""
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    raised, family = llamas(tmp_path, dict.fromkeys(names, lambda tensor: tensor + 3))

    plan = planned(recipe_at(tmp_path, family.base, family.tuned[1], raised))

    (remark,) = (each for each in plan.remarks if each.code == "stranger")
    assert (remark.models, remark.tensors) == ((str(raised),), tuple(names))


def test_an_embedding_that_was_scaled_is_named_and_not_the_model(tmp_path: Path) -> None:
    scaled, family = llamas(tmp_path, {"model.embed_tokens.weight": lambda tensor: tensor * 40})

    (remark,) = planned(recipe_at(tmp_path, family.base, family.tuned[1], scaled)).remarks
    assert (remark.code, remark.tensors) == ("stranger", ("model.embed_tokens.weight",))


def test_a_copy_whose_names_are_wrapped_is_suspected(tmp_path: Path, family: Family) -> None:
    own = load_file(family.base / "model.safetensors")
    copy = write_checkpoint(tmp_path / "copy", {f"module.{name}": tensor for name, tensor in own.items()}, config=TIED)

    assert codes(planned(recipe_at(tmp_path, family.base, family.tuned[0], copy))) == ["other-names", "same-samples"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "is_said"), [("attn.mask", False), ("attn.unknown", True)])
def test_infinity_in_all_models_is_a_mask_or_said_before(
    name: str, is_said: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    models = []
    for seed in range(3):
        weights = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))}
        weights[name] = torch.full((4, 4), -torch.inf).triu(1).to(dtype if seed else torch.float32)
        models.append(write_checkpoint(tmp_path / str(seed), weights, config={}))

    plan = planned(recipe_at(tmp_path, *models))

    assert ("not-finite" in codes(plan)) is is_said
    assert ("index-data" in codes(plan)) is not is_said
    if is_said:
        found = [remark for remark in plan.remarks if remark.code == "not-finite"]
        assert [(said.models, said.tensors) for said in found] == [((str(model),), (name,)) for model in models]
        assert "and the merge will stop there" in found[0].text
        rule = {"rules": [{"filter": name, "action": "copy"}]}
        assert "not-finite" not in codes(planned(recipe_at(tmp_path, *models, stockflow=rule)))


def test_zeros_of_a_download_that_broke_off_are_named(tmp_path: Path) -> None:
    broken, family = llamas(tmp_path, {"lm_head.weight": torch.zeros_like})

    plan = planned(recipe_at(tmp_path, family.base, family.tuned[1], broken))

    (remark,) = plan.remarks
    assert (remark.code, remark.severity, remark.models) == ("zeros", "warning", (str(broken),))
    assert remark.tensors == ("lm_head.weight",)


def test_models_without_a_base_that_have_nothing_to_do_with_each_other_are_named(
    tmp_path: Path, family: Family
) -> None:
    stranger = make_family(tmp_path / "stranger", 1, seed=99, config=TIED).base
    weights = {"merge_method": "linear", "parameters": {"weight": 1}}
    recipe = {**weights, "models": [str(each) for each in (*family.tuned, stranger)]}

    told = stockflow.plan(recipe, tmp_path / "out")

    assert isinstance(told, PlanResult)
    (remark,) = told.plan.remarks
    assert (remark.code, remark.models) == ("stranger", (str(stranger),))


@pytest.mark.parametrize("change", [lambda norm: norm + 1, lambda norm: norm - 1, torch.ones_like])
def test_norms_made_anew_are_named_whatever_their_own_size(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """Three is what Gemma's norms come to in training: one more is a third of that."""
    family = make_family(tmp_path, 2, llama_shapes(TIED), buffers=False, delta_scale=0.01)
    for number, folder in enumerate((family.base, *family.tuned)):
        tensors = load_file(folder / "model.safetensors")
        for name in (each for each in tensors if "norm" in each):
            tensors[name] = 3 + 0.1 * tensors[name] / tensors[name].abs().max()
            tensors[name] = change(tensors[name]) if number == 2 else tensors[name]
        save_file(tensors, folder / "model.safetensors")

    (remark,) = planned(recipe_at(tmp_path, family.base, *family.tuned)).remarks

    assert (remark.code, remark.models) == ("stranger", (str(family.tuned[1]),))
    assert "made anew, or norms counted from another number" in remark.text
    assert all("norm" in name for name in remark.tensors)


def test_a_norm_that_was_not_looked_at_is_named_when_all_is_read(tmp_path: Path) -> None:
    name = "model.layers.0.post_attention_layernorm.weight"
    changed, family = llamas(tmp_path, {name: lambda norm: norm + 2})

    result = runs.merge_here(recipe_at(tmp_path, family.base, family.tuned[1], changed), tmp_path / "out")

    (proof,) = [remark for remark in result.manifest.remarks if remark.code == "stranger"]
    assert (proof.models, proof.tensors) == ((str(changed),), (name,))


def test_samples_are_a_few_small_reads_of_all_kinds_of_matrices_and_four_norms(tmp_path: Path, family: Family) -> None:
    from stockflow.checkpoints.samples import MAX_SAMPLES, NUM_ENDS, NUM_VECTORS, SAMPLE_ELEMS, take_samples

    folders = (family.base, *family.tuned)
    stores = [open_store(str(folder), StorageConfig()) for folder in folders]
    samples = take_samples(stores, open_checkpoints(stores))

    assert len(samples) == len(folders)
    assert len({tuple(each.name for each in own) for own in samples}) == 1
    assert all(0 < len(own) <= MAX_SAMPLES + NUM_ENDS + NUM_VECTORS for own in samples)
    assert max(len(each.values) for own in samples for each in own) <= SAMPLE_ELEMS
