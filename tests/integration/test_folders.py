"""Folders as people have them, named in a recipe: which file is the truth, and what is no checkpoint."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from stockflow.cli import app
from tests.checkpoints import LLAMA_CONFIG

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
INDEX = "model.safetensors.index.json"
Tensors = Mapping[str, torch.Tensor]
Build = Callable[[Path], object]
"""Makes a folder; returns the location to name where it is not the folder."""


def full(value: float, *names: str, shape: tuple[int, ...] = (4, 6)) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name in names or NAMES}


def write(folder: Path, files: Mapping[str, Tensors], *, index: Mapping[str, str] | str | None = None) -> Path:
    """Write files of tensors, a config, and an index of what they hold (``auto``), another one, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    for file, tensors in files.items():
        save_file(dict(tensors), folder / file, {"format": "pt"})
    if index is not None:
        held = {name: file for file, tensors in files.items() for name in tensors} if index == "auto" else index
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": held}))
    return folder


def shards(value: float, *names: str) -> dict[str, dict[str, torch.Tensor]]:
    first, *rest = names or NAMES
    return {
        "model-00001-of-00002.safetensors": full(value, first),
        "model-00002-of-00002.safetensors": full(value, *rest),
    }


def recipe_over(folder: Path, location: object, rules: object = None, accept: object = None, **more: object) -> Path:
    """The mean of the model at ``location`` and one of threes."""
    plain = write(folder / "plain", {"model.safetensors": full(3.0)})
    options = {"rules": rules or [], "accept": accept or []}
    models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in (location, plain)]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "stockflow": options} | more))
    return path


def cli(*words: object) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert "Traceback" not in result.output
    return result


def merged(folder: Path, location: object, *options: object, **recipe: object) -> tuple[dict[str, torch.Tensor], str]:
    """Return what a merge with the model of threes gives, and what was said."""
    out = folder / "out"
    finished = cli("merge", recipe_over(folder, location, **recipe), out, "--device", "cpu", *options)
    assert finished.exit_code == 0, finished.output
    tensors = {name: each for file in out.glob("*.safetensors") for name, each in load_file(file).items()}
    return tensors, " ".join(finished.output.split())


def refused(folder: Path, location: object, *options: object, **recipe: object) -> str:
    """Return why a plan is refused."""
    finished = cli("plan", recipe_over(folder, location, **recipe), folder / "out", *options)
    assert finished.exit_code == 2, finished.output
    return " ".join(finished.output.split())


def is_mean(tensors: Tensors, value: float) -> bool:
    """Whether every tensor is the mean of threes and of ``value``."""
    return tensors.keys() == set(NAMES) and all(bool((each == (3.0 + value) / 2).all()) for each in tensors.values())


# ------------------------------------------------------------------------------------ which file is the truth


def a_stray_file_without_elements(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    save_file({name: torch.empty(0) for name in NAMES}, folder / "model.safetensors")


def a_stray_file_with_one_tensor_without_elements(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    save_file(full(9.0, *NAMES[:2]) | {NAMES[2]: torch.empty(0)}, folder / "model.safetensors")


def a_stray_file_of_few_tensors_without_elements(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    save_file({NAMES[0]: torch.empty(0)}, folder / "model.safetensors")


def shards_without_elements_beside_a_file(folder: Path) -> None:
    write(folder, {"model.safetensors": full(1.0)})
    for file, tensors in shards(9.0).items():
        save_file({name: torch.empty(0) for name in tensors}, folder / file)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {name: file for file, held in shards(9.0).items() for name in held}})
    )


def a_stale_index(folder: Path) -> None:
    write(folder, {"model.safetensors": full(1.0)})
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {name: file for file, held in shards(1.0).items() for name in held}})
    )


def a_stale_index_of_which_one_shard_is_left(folder: Path) -> None:
    a_stale_index(folder)
    save_file(full(9.0, NAMES[0]), folder / "model-00001-of-00002.safetensors")


def a_stale_index_with_a_tied_head(folder: Path) -> None:
    a_stale_index(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"tie_word_embeddings": True}))
    weight_map = dict.fromkeys((*NAMES, "lm_head.weight"), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def an_index_that_names_the_single_file(folder: Path) -> None:
    write(folder, {"model.safetensors": full(1.0)}, index="auto")


def a_tensor_in_two_shards(folder: Path) -> None:
    both = shards(1.0)
    write(folder, both, index="auto")
    save_file(
        full(9.0, NAMES[2]) | both["model-00001-of-00002.safetensors"], folder / "model-00001-of-00002.safetensors"
    )


def metadata_that_is_null(folder: Path) -> None:
    header = json.dumps(
        {"__metadata__": None} | {n: {"dtype": "F32", "shape": [4, 6], "data_offsets": [i * 96, i * 96 + 96]}
        for i, n in enumerate(NAMES)}
    ).encode()  # fmt: skip
    write(folder, {})
    body = torch.ones(3 * 24).numpy().tobytes()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)


def shards_without_an_index(folder: Path) -> None:
    write(folder, shards(1.0))


def shards_beside_those_of_an_earlier_cut(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    for number in (1, 2, 3):
        save_file(full(9.0, NAMES[number - 1]), folder / f"model-0000{number}-of-00003.safetensors")


def a_variant_alone(folder: Path) -> None:
    write(folder, {"model.fp16.safetensors": full(1.0)})


def a_variant_in_shards(folder: Path) -> None:
    files = {file.replace("model-", "model.fp16-"): held for file, held in shards(1.0).items()}
    write(folder, files, index="auto")
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")


def a_variant_in_older_shards_without_an_index(folder: Path) -> None:
    write(folder, {file.replace(".safetensors", ".bf16.safetensors"): held for file, held in shards(1.0).items()})


def a_variant_beside_the_plain_file(folder: Path) -> None:
    write(folder, {"model.safetensors": full(1.0), "model.fp16.safetensors": full(9.0)})


def a_file_of_another_name(folder: Path) -> None:
    write(folder, {"my-merge.v2.safetensors": full(1.0)})


def a_part_of_a_pipeline(folder: Path) -> None:
    write(folder, {"diffusion_pytorch_model.safetensors": full(1.0)})


def a_part_of_a_pipeline_in_shards(folder: Path) -> None:
    files = {file.replace("model-", "diffusion_pytorch_model-"): held for file, held in shards(1.0).items()}
    write(folder, files, index="auto")
    (folder / INDEX).rename(folder / "diffusion_pytorch_model.safetensors.index.json")


def an_adapter_beside_a_whole_model(folder: Path) -> None:
    write(folder, {"model.safetensors": full(1.0), "adapter_model.safetensors": full(9.0, "lora_A.weight")})


READ: Mapping[Build, str] = {
    a_stray_file_without_elements: "a stray placeholder; model.safetensors.index.json is read",
    a_stray_file_with_one_tensor_without_elements: "a stray placeholder; model.safetensors.index.json is read",
    a_stray_file_of_few_tensors_without_elements: "a stray placeholder; model.safetensors.index.json is read",
    shards_without_elements_beside_a_file: "where model.safetensors has some; that file is read",
    a_stale_index: "2 of the 2 files of model.safetensors.index.json are not there, and model.safetensors has every",
    a_stale_index_of_which_one_shard_is_left: "1 of the 2 files of model.safetensors.index.json are not there",
    a_stale_index_with_a_tied_head: "model.safetensors has every tensor it lists: that file is read",
    an_index_that_names_the_single_file: "",
    a_tensor_in_two_shards: "'model.norm.weight'; read from the one that the index names",
    metadata_that_is_null: "",
    shards_without_an_index: "2 numbered files of weights and no index: all of them are read",
    shards_beside_those_of_an_earlier_cut: "",
    a_variant_alone: "as the variant 'fp16' only: model.fp16.safetensors is read",
    a_variant_in_shards: "as the variant 'fp16' only: model.safetensors.index.fp16.json is read",
    a_variant_in_older_shards_without_an_index: "as the variant 'bf16' only",
    a_variant_beside_the_plain_file: "",
    a_file_of_another_name: "has no other weights than my-merge.v2.safetensors: they are read",
    a_part_of_a_pipeline: "a part of a diffusers pipeline: diffusion_pytorch_model.safetensors is read",
    a_part_of_a_pipeline_in_shards: "diffusion_pytorch_model.safetensors.index.json is read",
    an_adapter_beside_a_whole_model: "",
}
"""What is read as the model of ones that it is, and what is said of it."""


@pytest.mark.parametrize("build", READ, ids=lambda build: build.__name__)
def test_the_model_is_read_and_what_was_told_apart_is_said(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "subject")

    tensors, said = merged(tmp_path, tmp_path / "subject")

    assert is_mean(tensors, 1.0)
    assert READ[build] in said


def two_equal_sets(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    save_file(full(5.5), folder / "model.safetensors")


def two_sets_of_which_one_has_more(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    save_file(full(5.5, NAMES[0], NAMES[1]), folder / "model.safetensors")


def two_sets_of_other_shapes(folder: Path) -> None:
    write(folder, shards(1.0), index="auto")
    save_file(full(5.5, shape=(8, 6)), folder / "model.safetensors")


def two_sets_without_an_index(folder: Path) -> None:
    write(folder, shards(1.0) | {"model.safetensors": full(5.5)})


AMBIGUOUS: Mapping[Build, str] = {
    two_equal_sets: "names, shapes and dtypes are equal, and what they hold may not be",
    two_sets_of_which_one_has_more: "1 tensor only in the second, such as 'model.norm.weight'",
    two_sets_of_other_shapes: "3 tensors of another shape or dtype, such as 'model.embed_tokens.weight'",
    two_sets_without_an_index: "the 2 numbered files (3 tensors, 288 B)",
}


@pytest.mark.parametrize("build", AMBIGUOUS, ids=lambda build: build.__name__)
def test_two_sets_of_weights_are_named_with_their_difference(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "subject")

    said = refused(tmp_path, tmp_path / "subject")

    assert "holds two sets of weights, model.safetensors (" in said
    assert AMBIGUOUS[build] in said
    assert "`stockflow: {accept: [two-sets-of-weights]}`" in said


def test_an_accepted_ambiguity_is_read_as_loaders_do(tmp_path: Path) -> None:
    two_equal_sets(tmp_path / "subject")

    tensors, said = merged(tmp_path, tmp_path / "subject", accept=["two-sets-of-weights"])

    assert is_mean(tensors, 5.5)
    assert "holds two sets of weights" in said


def test_a_guess_is_an_error_under_strict(tmp_path: Path) -> None:
    a_stale_index(tmp_path / "subject")

    assert "[weights-chosen, refused by --strict]" in refused(tmp_path, tmp_path / "subject", "--strict")


def test_a_stale_index_beside_a_file_that_has_less_is_no_model(tmp_path: Path) -> None:
    a_stale_index(tmp_path / "subject")
    save_file(full(1.0, NAMES[0]), tmp_path / "subject" / "model.safetensors")

    said = refused(tmp_path, tmp_path / "subject")

    assert "model.safetensors lacks 2 tensors that the index lists, such as 'model.layers.0.mlp.up_proj.weight'" in said


# ------------------------------------------------------------------- rules act before index and headers are compared


def listed_but_absent(folder: Path, *names: str, config: Mapping[str, object] | None = None) -> Path:
    write(folder, shards(1.0), index="auto")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(names, "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | (config or {})))
    return folder


def test_a_listed_tensor_that_no_file_holds_is_refused_with_what_to_do(tmp_path: Path) -> None:
    said = refused(tmp_path, listed_but_absent(tmp_path / "subject", "lm_head.weight"))

    assert "'lm_head.weight' is listed in model-00002-of-00002.safetensors but not there" in said
    assert "Fetch index and files again from one place, or leave tensors out by rules with `action: skip`" in said


@pytest.mark.parametrize("how", ["skipped", "accepted", "tied"])
def test_a_listed_tensor_that_no_file_holds_is_no_dead_end(how: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if how == "tied" else {}
    subject = listed_but_absent(tmp_path / "subject", "lm_head.weight", config=tied)
    rules = [{"filter": "lm_head", "action": "skip"}] if how == "skipped" else []

    tensors, said = merged(tmp_path, subject, rules=rules, accept=["index-disagrees"] if how == "accepted" else [])

    assert is_mean(tensors, 1.0)
    assert ("such as 'lm_head.weight' for 'model.embed_tokens.weight'" in said) == (how == "tied")
    assert ("disagree on 1 tensor" in said) == (how == "accepted")


T5_NAMES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("stored", "listed"),
    [
        ("shared.weight", T5_NAMES),
        ("model.shared.weight", ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")),
        ("encoder.embed_tokens.weight", ("shared.weight", "decoder.embed_tokens.weight")),
        ("bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",)),
        ("transformer.wte.weight", ("lm_head.weight",)),
        ("model.decoder.embed_tokens.weight", ("proj_out.weight",)),
    ],
)
def test_public_models_list_the_other_names_of_tied_tensors(
    stored: str, listed: tuple[str, ...], tmp_path: Path
) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    folders = []
    for number, value in enumerate((1.0, 3.0)):
        folder = write(tmp_path / str(number), {"model-00001-of-00001.safetensors": full(value, stored)})
        weight_map = dict.fromkeys((stored, *listed), "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config))
        folders.append({"model": str(folder), "parameters": {"weight": 0.5}})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": folders}))

    finished = cli("merge", recipe, tmp_path / "out", "--device", "cpu")

    assert finished.exit_code == 0, finished.output
    assert f"lists {len(listed)} name" in " ".join(finished.output.split())
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {stored}


def test_an_untied_head_that_is_listed_and_absent_is_no_alias(tmp_path: Path) -> None:
    subject = listed_but_absent(tmp_path / "subject", "lm_head.weight", config={"tie_word_embeddings": False})

    assert "'lm_head.weight' is listed" in refused(tmp_path, subject)


def test_an_unlisted_tensor_is_refused_unless_rules_leave_it_out(tmp_path: Path) -> None:
    subject = write(tmp_path / "subject", shards(1.0), index="auto")
    save_file(full(1.0, NAMES[0]) | full(1.0, "extra"), subject / "model-00001-of-00002.safetensors")

    assert "'extra' is in model-00001-of-00002.safetensors but not listed" in refused(tmp_path, subject)
    assert is_mean(merged(tmp_path, subject, rules=[{"filter": "extra", "action": "skip"}])[0], 1.0)


@pytest.mark.parametrize("is_donor", [True, False])
def test_what_is_copied_from_another_model_need_not_be_listed(is_donor: bool, tmp_path: Path) -> None:
    """Of the donor itself, it must: that is where the copy comes from."""
    subject = listed_but_absent(tmp_path / "subject", "lm_head.weight")
    donor = write(tmp_path / "donor", {"model.safetensors": full(3.0) | full(7.0, "lm_head.weight")})
    base = subject if is_donor else donor
    models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in (subject, donor)]
    recipe = tmp_path / "recipe.yaml"
    rules = [{"filter": "lm_head", "action": "copy"}]
    parts = {"merge_method": "linear", "base_model": str(base), "models": models, "stockflow": {"rules": rules}}
    recipe.write_text(yaml.safe_dump(parts))

    finished = cli("merge", recipe, tmp_path / "out", "--device", "cpu")

    assert finished.exit_code == (2 if is_donor else 0), finished.output
    if not is_donor:
        assert bool((load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"] == 7.0).all())


def test_a_missing_shard_is_named_with_what_it_would_hold(tmp_path: Path) -> None:
    subject = write(tmp_path / "subject", shards(1.0), index="auto")
    (subject / "model-00002-of-00002.safetensors").unlink()

    said = refused(tmp_path, subject, accept=["index-disagrees"])

    assert "the index names model-00002-of-00002.safetensors, which is not there; with 2 tensors, such as" in said
