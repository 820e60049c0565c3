"""Pipelines of diffusers: components with weights are merged where they lie, and the rest is copied."""

import json
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import stockflow
from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import CheckpointError, NotFoundError, UserError
from stockflow.recipe import load_recipe
from stockflow.storage import StorageConfig, open_model
from stockflow.verification.recompute import SampleOptions
from stockflow.verification.verify import verify
from tests import oracle, runs
from tests.checkpoints import Family, Shape, make_tensors, write_recipe

COMPONENTS: dict[str, dict[str, Shape]] = {
    "unet": {"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.attn.to_q.weight": (33, 65), "conv_in.bias": (8,)},
    "vae": {"decoder.conv_in.weight": (6, 4, 3, 3)},
    "text_encoder": {"text_model.embeddings.token_embedding.weight": (97, 24), "text_model.final.bias": (24,)},
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.0", "requires_safety_checker": False,
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
}  # fmt: skip
COPIED = {
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
}  # fmt: skip
STEM = "diffusion_pytorch_model"


def components(number: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of the base, or of a model tuned from it, by component."""
    return {
        folder: {
            name: make_tensors(f"{folder}.{name}", shape, 2)[number].to(torch.float16) for name, shape in shapes.items()
        }
        for folder, shapes in COMPONENTS.items()
    }


def write_pipeline(folder: Path, number: int, index: dict[str, Any] = INDEX) -> Path:
    for part, tensors in components(number).items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"number": number}))
        stem = "model" if part == "text_encoder" else STEM
        save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
    for key in COPIED - {"model_index.json"}:
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_sharded(component: Path) -> None:
    tensors = oracle_tensors(component)
    (component / f"{STEM}.safetensors").unlink()
    files = {name: f"{STEM}-0000{place + 1}-of-0000{len(tensors)}.safetensors" for place, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, component / file, {"format": "pt"})
    (component / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def oracle_tensors(component: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(component.glob("*.safetensors")))


def make_pickled(component: Path) -> None:
    tensors = oracle_tensors(component)
    (component / f"{STEM}.safetensors").unlink()
    torch.save(tensors, component / f"{STEM}.bin")


@pytest.fixture
def pipelines(tmp_path: Path) -> Family:
    """The same model in three forms."""
    base, *tuned = (write_pipeline(tmp_path / "models" / f"m{number}", number) for number in range(3))
    make_sharded(base / "unet")
    make_pickled(tuned[0] / "unet")
    make_pickled(tuned[0] / "vae")
    return Family(base, tuple(tuned))


def recipe_of(family: Family, folder: Path, **more: Any) -> Path:
    return write_recipe(folder / "recipe.yaml", "model_stock", family, **more)


def test_each_component_is_merged_in_its_folder_and_the_rest_is_copied(pipelines: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"

    merged = runs.merge_here(recipe_of(pipelines, tmp_path), out)

    assert [shard.file for shard in merged.plan.shards] == [
        f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors", "text_encoder/model.safetensors"
    ]  # fmt: skip
    models = [components(number) for number in range(3)]
    for folder, shapes in COMPONENTS.items():
        found = oracle_tensors(out / folder)
        assert found.keys() == shapes.keys()
        for name, tensor in found.items():
            base, *tuned = (model[folder][name].to(torch.float64).numpy() for model in models)
            expected = oracle.model_stock(base, tuned).out
            assert np.abs(tensor.to(torch.float64).numpy() - expected).max() <= np.abs(expected).max() * 2**-11
    assert {side.key for side in merged.plan.side_files} == COPIED
    assert all((out / key).read_bytes() == (pipelines.base / key).read_bytes() for key in COPIED)
    assert not (out / "config.json").exists()
    texts = [remark.text for remark in merged.plan.remarks if remark.code == "weights-chosen"]
    assert "unet, vae, text_encoder merged, each in its folder; tokenizer, scheduler copied" in texts[0]
    assert {remark.code for remark in merged.plan.remarks} == {"weights-chosen"}
    sample = SampleOptions(1.0, seed=0, memory_bytes=2**31 + runs.grown_bytes(), num_threads=2)
    assert [str(each) for each in verify(str(out), StorageConfig(), sample=sample).findings] == []
    assert stockflow.diff(out, out).is_equal


def test_parts_that_are_put_together_or_scheduled_in_another_way_are_said(pipelines: Family, tmp_path: Path) -> None:
    for folder in pipelines.tuned:
        (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
        (folder / "model_index.json").write_text(json.dumps(INDEX | {"_class_name": "Other"}))

    remarks = stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out").plan.remarks

    said = " ".join(each.text for each in remarks if (each.code, each.severity) == ("side-files-differ", "warning"))
    assert "v_prediction" in said
    assert "Other" in said


SCHEDULERS: dict[str, tuple[dict[str, str], dict[str, str], list[str]]] = {
    "velocity": ({"_class_name": "PNDMScheduler"}, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
                 ["epsilon", "v_prediction"]),
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": "DDIMScheduler"},
             ["flow_prediction", "epsilon"]),
    "alike": ({"_class_name": "PNDMScheduler"}, {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, []),
    "unsaid": ({}, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULERS)
@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "AutoencoderKL"])
def test_components_that_predict_otherwise_by_the_schedulers_beside_them_are_said(
    pipelines: Family, tmp_path: Path, case: str, kind: str
) -> None:
    usual, other, expected = SCHEDULERS[case]
    for number, folder in enumerate((pipelines.base, *pipelines.tuned)):
        (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": kind}))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(other if number == 2 else usual))
    named_file = pipelines.tuned[1] / "unet" / f"{STEM}.safetensors"
    units = Family(pipelines.base / "unet", (pipelines.tuned[0] / "unet", named_file))

    remarks = stockflow.plan(recipe_of(units, tmp_path), tmp_path / "out").plan.remarks

    found = [each for each in remarks if each.code == "predictions-differ"]
    assert [[*dict.fromkeys(each.values.values())] for each in found] == [expected] * (
        bool(expected) and kind != "AutoencoderKL"
    )
    for each in found:
        first, last = expected
        assert each.severity == "warning"
        assert f"'{first}' for {units.base}, {units.tuned[0]}; '{last}' for {named_file}: " in each.text


COMPONENT_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("heads-differ", {"attention_head_dim": 4}, "unet/config.json: size of an attention head differs: 8 in "),
    "class": ("architecture-differs", {"_class_name": "Other"}, "unet/config.json: _class_name differs: 'UNet' in "),
}


@pytest.mark.parametrize("case", COMPONENT_CONFIGS)
def test_components_of_other_heads_or_classes_are_refused_as_models_are(
    pipelines: Family, tmp_path: Path, case: str
) -> None:
    code, changed, said = COMPONENT_CONFIGS[case]
    own = {"_class_name": "UNet", "attention_head_dim": 8, "sample_size": 64, "act_fn": "silu"}
    for number, folder in enumerate((pipelines.base, *pipelines.tuned)):
        text = json.dumps(own | (changed if number == 2 else {}))
        (folder / "unet" / "config.json").write_text(text)
        (folder / "scheduler" / "scheduler_config.json").write_text(text)  # of a component without weights

    with pytest.raises(stockflow.PlanError) as caught:
        stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out")

    assert str(caught.value).count("\n") == 1
    assert said in str(caught.value)
    assert f"accept: [{code}]" in str(caught.value)
    copied = {"rules": [{"filter": "unet/", "action": "copy"}]}
    remarks = stockflow.plan(recipe_of(pipelines, tmp_path, stockflow=copied), tmp_path / "out").plan.remarks
    assert [each.code for each in remarks if "unet/config.json" in each.text] == ["side-files-differ"]


def test_what_else_components_say_is_a_warning_once(pipelines: Family, tmp_path: Path) -> None:
    for folder in pipelines.tuned:
        (folder / "unet" / "config.json").write_text('{"act_fn": "gelu", "shift_factor": 2, "number_of_parts": 2}')
    (pipelines.base / "unet" / "config.json").write_text('{"act_fn": "silu", "shift_factor": 1, "number_of_parts": 1}')

    remarks = stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out").plan.remarks

    said = [each for each in remarks if "unet/config.json" in each.text]
    assert [each.severity for each in said] == ["warning"] * 3
    texts = [each.text for each in said if each.code == "config-differs"]
    assert [fact for text in texts for fact in ("activation", "shift_factor") if f"{fact} differs:" in text] == [
        "activation",
        "shift_factor",
    ]
    (beside,) = [each.text for each in said if each.code == "side-files-differ"]
    assert "with {'number_of_parts': 1}" in beside


def test_what_newer_versions_write_of_components_is_a_note(pipelines: Family, tmp_path: Path) -> None:
    for folder in pipelines.tuned:
        (folder / "vae" / "config.json").write_text('{"number": 5, "scaling_factor": 0.18215, "shift_factor": null}')
        (folder / "unet" / "config.json").write_text('{"number": 5, "class_embed_type": null, "dropout": 0.0}')
    for part in ("vae", "unet"):
        (pipelines.base / part / "config.json").write_text('{"number": 5}')

    remarks = stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out").plan.remarks

    (said,) = [each for each in remarks if "/config.json of" in each.text]
    assert (said.code, said.severity) == ("side-files-differ", "note")
    assert "{'scaling_factor': 0.18215}" in said.text


def test_tokens_of_a_part_that_have_other_ids_are_refused(pipelines: Family, tmp_path: Path) -> None:
    for number, folder in enumerate((pipelines.base, *pipelines.tuned)):
        ids = {"a": 0, "b": 1, "c": 2} if number < 2 else {"a": 0, "b": 2, "c": 1}
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids))

    with pytest.raises(stockflow.PlanError) as caught:
        stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out")

    assert f"2 ids of tokenizer/vocab.json mean something else in {pipelines.tuned[1]} than" in str(caught.value)
    assert "accept: [vocabularies-differ]" in str(caught.value)
    copied = {"rules": [{"filter": "text_encoder/", "action": "copy"}]}
    remarks = stockflow.plan(recipe_of(pipelines, tmp_path, stockflow=copied), tmp_path / "out").plan.remarks
    assert "vocabularies-differ" not in {each.code for each in remarks}, "as it says, a rule copies that part"


def test_a_pipeline_on_s3_is_the_same(pipelines: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    local = runs.merge_here(recipe_of(pipelines, tmp_path), tmp_path / "out")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in sorted(path for path in (tmp_path / "models").rglob("*") if path.is_file()):
        client.upload_file(str(path), s3_bucket, str(path.relative_to(tmp_path / "models")))
    remote = recipe_of(pipelines, tmp_path, stockflow={"storage": {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}})
    remote.write_text(remote.read_text().replace(str(tmp_path / "models"), f"s3://{s3_bucket}"))

    merged = runs.merge_here(remote, f"s3://{s3_bucket}/out")

    assert runs.expected_digests([merged]) == runs.expected_digests([local])
    assert verify(f"s3://{s3_bucket}/out", load_recipe(str(remote)).storage).findings == ()


def test_a_file_beside_the_folders_is_a_model_of_its_own_where_it_is_named(pipelines: Family, tmp_path: Path) -> None:
    for number, model in enumerate((pipelines.base, *pipelines.tuned)):
        save_file({"model.diffusion.weight": torch.full((4, 6), float(number))}, model / "v1-5.safetensors")
    base, *tuned = (model / "v1-5.safetensors" for model in (pipelines.base, *pipelines.tuned))
    named = Family(base, tuple(tuned))

    whole = stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out")
    merged = runs.merge_here(recipe_of(named, tmp_path), tmp_path / "one")

    assert len(whole.plan.shards) == 3
    assert any("v1-5.safetensors (1 tensor" in note for note in whole.plan.notes), "left out, and said"
    assert [shard.file for shard in merged.plan.shards] == ["model.safetensors"]
    assert "model_index.json" not in {side.key for side in merged.plan.side_files}


def opened(folder: Path) -> list[str]:
    [checkpoint] = open_checkpoints([open_model(str(folder), StorageConfig())])
    return sorted({extent.file for extent in checkpoint.extents.values()})


def test_variants_are_read_where_there_is_nothing_else(pipelines: Family) -> None:
    unet = pipelines.tuned[1] / "unet"
    (unet / f"{STEM}.safetensors").rename(unet / f"{STEM}.fp16.safetensors")

    assert f"unet/{STEM}.fp16.safetensors" in opened(pipelines.tuned[1])
    (unet / f"{STEM}.non_ema.safetensors").write_bytes((unet / f"{STEM}.fp16.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"m2/unet: .*and 1 more may be meant.*leave in it what is meant"):
        opened(pipelines.tuned[1])


def test_components_that_are_not_whole_are_named(pipelines: Family) -> None:
    (pipelines.base / "unet" / f"{STEM}-00002-of-00003.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"m0/unet: .* names files that are not all there; fetch the component"):
        opened(pipelines.base)


def test_a_component_in_another_format_is_refused(pipelines: Family) -> None:
    """A copied config without its weights would be a pipeline that nobody can load."""
    vae = pipelines.base / "vae"
    (vae / f"{STEM}.safetensors").rename(vae / f"{STEM}.msgpack")

    with pytest.raises(CheckpointError, match=rf"m0/vae: its only weights, {STEM}.msgpack, are in a format"):
        opened(pipelines.base)


def test_a_component_that_a_model_lacks_is_refused(pipelines: Family, tmp_path: Path) -> None:
    (pipelines.tuned[0] / "vae" / f"{STEM}.bin").unlink()

    with pytest.raises(UserError, match=r"'vae/decoder.conv_in.weight' is missing in \S+/m1"):
        stockflow.plan(recipe_of(pipelines, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("name", ["../vae", "a/b", ".hidden", "_stockflow"])
def test_components_are_folders_of_the_pipeline(name: str, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "model", 0, INDEX | {name: ["diffusers", "X"]})

    if name.startswith("_"):
        assert len(opened(folder)) == 3
    else:
        with pytest.raises(CheckpointError, match=r"names the component .*, which is no folder"):
            opened(folder)


@pytest.mark.parametrize("document", ["[]", "{", '{"unet": 3, "vae": {"a": []}}', '{"unet": [[], []]}'])
def test_documents_that_name_no_component_make_no_pipeline(document: str, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "model", 0)
    (folder / "model_index.json").write_text(document)

    with pytest.raises(NotFoundError, match="there is no checkpoint at"):
        opened(folder)
