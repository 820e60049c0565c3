"""Folders as people have them, named in a recipe: which file is the truth, and what is no checkpoint."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import Result

from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import RecipeError
from stockflow.recipe import resolve_location
from stockflow.storage import StorageConfig, open_store
from tests import runs
from tests.checkpoints import LLAMA_CONFIG, write_checkpoint
from tests.hub_server import hub_server
from tests.s3_server import free_port

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
    result = runs.invoke(*words)
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


def listed_in(folder: Path, *files: str) -> None:
    """Write an index that names these files, by turns."""
    weight_map = {name: files[place % len(files)] for place, name in enumerate(NAMES)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


THREE = tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))


def the_index_of_another_cut(folder: Path) -> None:
    write(folder, shards(1.0))
    listed_in(folder, *THREE)


def the_index_of_pickles_that_were_converted(folder: Path) -> None:
    write(folder, shards(1.0))
    listed_in(folder, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def the_index_of_another_cut_of_a_tied_model(folder: Path) -> None:
    the_index_of_another_cut(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"tie_word_embeddings": True}))
    weight_map = dict.fromkeys((*NAMES, "lm_head.weight"), THREE[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def the_index_of_another_cut_and_a_file_of_the_same(folder: Path) -> None:
    the_index_of_another_cut(folder)
    save_file(full(1.0), folder / "model.safetensors")


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


def of_open_clip(folder: Path) -> None:
    write(folder, {"open_clip_model.safetensors": full(1.0)})


def pickles_of_open_clip(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    touch(folder, "open_clip_config.json", content=b"{}")
    torch.save(full(1.0), folder / "open_clip_pytorch_model.bin")


def both_of_open_clip(folder: Path) -> None:
    pickles_of_open_clip(folder)
    save_file(full(1.0), folder / "open_clip_model.safetensors")


def another_library_beside_open_clip(folder: Path) -> None:
    write(folder, {"open_clip_model.safetensors": full(9.0)})
    torch.save(full(1.0), folder / "pytorch_model.bin")


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
    a_stale_index: "2 of 2 files of model.safetensors.index.json are not there, and model.safetensors has every",
    a_stale_index_of_which_one_shard_is_left: "1 of 2 files of model.safetensors.index.json is not there",
    a_stale_index_with_a_tied_head: "model.safetensors has every tensor it lists: that file is read",
    the_index_of_another_cut: "3 of 3 files of model.safetensors.index.json are not there, and the 2 numbered files "
    "such as model-00001-of-00002.safetensors have every tensor it lists: they are read",
    the_index_of_pickles_that_were_converted: "2 of 2 files of model.safetensors.index.json are not there",
    the_index_of_another_cut_of_a_tied_model: "have every tensor it lists: they are read",
    the_index_of_another_cut_and_a_file_of_the_same: "model.safetensors and the 2 numbered files hold the same",
    an_index_that_names_the_single_file: "",
    a_tensor_in_two_shards: "'model.norm.weight'; read from the one that the index names",
    metadata_that_is_null: "",
    shards_without_an_index: "2 numbered files of weights and no index that names them: all of them are read",
    shards_beside_those_of_an_earlier_cut: "",
    a_variant_alone: "as the variant 'fp16' only: model.fp16.safetensors is read",
    a_variant_in_shards: "as the variant 'fp16' only: model.safetensors.index.fp16.json is read",
    a_variant_in_older_shards_without_an_index: "as the variant 'bf16' only",
    a_variant_beside_the_plain_file: "",
    a_file_of_another_name: "has no other weights than my-merge.v2.safetensors: they are read",
    of_open_clip: "a merge that it gives names to is written as open_clip_model.*",
    pickles_of_open_clip: "is a model of open_clip: open_clip_pytorch_model.bin is read",
    both_of_open_clip: "is a model of open_clip: open_clip_model.safetensors is read",
    another_library_beside_open_clip: "pytorch_model.bin is read",
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
    two_equal_sets: "names, shapes and dtypes are equal, and the numbers of 'model.embed_tokens.weight' are not",
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


def test_packed_weights_beside_the_shards_they_were_made_from_are_told_as_two_sets(tmp_path: Path) -> None:
    subject = write(tmp_path / "subject", shards(1.0), index="auto")
    layer = NAMES[1].removesuffix("weight")
    scales = {f"{layer}{kind}": torch.ones((4, 1), dtype=torch.bfloat16) for kind in ("scales", "biases")}
    codes = {f"{layer}weight": torch.zeros((4, 8), dtype=torch.uint32)}
    save_file(full(1.0, NAMES[0], NAMES[2]) | codes | scales, subject / "model.safetensors", {"format": "mlx"})

    said = refused(tmp_path, subject)

    assert "holds two sets of weights, model.safetensors (5 tensors" in said
    assert f"naming {subject}/model.safetensors or {subject}/{INDEX}. model.safetensors holds MLX weights" in said
    assert "which are not read: take the other" in said
    assert "16-bit model" not in said
    assert "accept" not in said
    assert is_mean(merged(tmp_path, subject / INDEX)[0], 1.0)


def test_an_accepted_ambiguity_is_read_as_loaders_do(tmp_path: Path) -> None:
    two_equal_sets(tmp_path / "subject")

    tensors, said = merged(tmp_path, tmp_path / "subject", accept=["two-sets-of-weights"])

    assert is_mean(tensors, 5.5)
    assert "holds two sets of weights" in said


@pytest.mark.parametrize("build", [of_open_clip, pickles_of_open_clip, both_of_open_clip])
def test_a_model_of_open_clip_is_written_as_the_file_that_it_asks_for(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "subject")
    recipe = {"merge_method": "passthrough", "models": [str(tmp_path / "subject")]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))

    for _ in range(2):
        assert cli("merge", tmp_path / "r.yaml", tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["open_clip_model.safetensors"]
    assert cli("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("named", ["consolidated.safetensors", ""])
def test_what_mistrals_library_reads_is_written_under_its_names(tmp_path: Path, named: str) -> None:
    """Its config goes along where its weights are read, and stays behind where those for transformers are."""
    folder = write(tmp_path / "subject", {"consolidated.safetensors": full(1.0), "model.safetensors": full(1.0)})
    touch(folder, "params.json", content=b'{"dim": 4}')
    recipe = {"merge_method": "passthrough", "models": [str(folder / named)]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))

    for _ in range(2):
        assert cli("merge", tmp_path / "r.yaml", tmp_path / "out").exit_code == 0
    published = {path.name for path in (tmp_path / "out").iterdir()}
    of_library = {"consolidated.safetensors", "params.json"}
    assert published & {*of_library, "model.safetensors"} == (of_library if named else {"model.safetensors"})
    assert cli("verify", tmp_path / "out").exit_code == 0


def test_a_named_file_without_config_is_said_to_be_renamed(tmp_path: Path) -> None:
    folder = write(tmp_path / "subject", {"sd_xl_base.safetensors": full(1.0)})
    (folder / "config.json").unlink()
    recipe = {"merge_method": "passthrough", "models": [str(folder / "sd_xl_base.safetensors")]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))

    said = cli("plan", tmp_path / "r.yaml", tmp_path / "out").output

    assert "is read, and a merge is written as model.safetensors, whatever" in " ".join(said.split())


@pytest.mark.parametrize("size", ["100", "1MB"])
def test_a_part_of_a_pipeline_is_written_under_the_names_that_diffusers_asks_for(tmp_path: Path, size: str) -> None:
    a_part_of_a_pipeline_in_shards(tmp_path / "subject")
    recipe = {"merge_method": "passthrough", "models": [str(tmp_path / "subject")]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))

    finished = cli("merge", tmp_path / "r.yaml", tmp_path / "out", "--shard-size", size)

    assert finished.exit_code == 0, finished.output
    found = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    stem, index = "diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"
    numbered = {f"{stem}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    assert found == ({f"{stem}.safetensors"} if size == "1MB" else numbered | {index})
    assert size == "1MB" or {*json.loads((tmp_path / "out" / index).read_text())["weight_map"].values()} == numbered
    assert cli("verify", tmp_path / "out", "--inputs", "--sample", "100%").exit_code == 0
    assert cli("diff", tmp_path / "subject", tmp_path / "out").exit_code == 0
    assert cli("merge", tmp_path / "r.yaml", tmp_path / "out", "--shard-size", size).exit_code == 0
    if size != "1MB":
        (tmp_path / "out" / index).write_text("{}")
        assert cli("verify", tmp_path / "out").exit_code == 4


def test_a_single_file_beside_shards_that_hold_the_same_is_read_and_said(tmp_path: Path) -> None:
    write(tmp_path / "subject", shards(5.5), index="auto")
    save_file(full(5.5), tmp_path / "subject" / "model.safetensors")

    tensors, said = merged(tmp_path, tmp_path / "subject")

    assert is_mean(tensors, 5.5)
    assert "hold the same, wherever they were looked at: the former is read" in said


def test_a_guess_is_an_error_under_strict(tmp_path: Path) -> None:
    a_stale_index(tmp_path / "subject")

    assert "[weights-chosen, refused by --strict]" in refused(tmp_path, tmp_path / "subject", "--strict")


def test_a_stale_index_beside_a_file_that_has_less_is_no_model(tmp_path: Path) -> None:
    a_stale_index(tmp_path / "subject")
    save_file(full(1.0, NAMES[0]), tmp_path / "subject" / "model.safetensors")

    said = refused(tmp_path, tmp_path / "subject")

    assert "model.safetensors lacks 2 tensors that the index lists, such as 'model.layers.0.mlp.up_proj.weight'" in said


def test_an_index_of_which_a_part_is_there_beside_another_set_is_refused_until_accepted(tmp_path: Path) -> None:
    the_index_of_another_cut(tmp_path / "subject")
    save_file(full(9.0, NAMES[0]), tmp_path / "subject" / THREE[0])

    said = refused(tmp_path, tmp_path / "subject")

    assert "2 of 3 files of model.safetensors.index.json are not there, and the 2 numbered files such as" in said
    assert f"beside {THREE[0]}, which it names. Fetch the missing files, or remove the index" in said
    assert is_mean(merged(tmp_path, tmp_path / "subject", accept=["two-sets-of-weights"])[0], 1.0)


def a_set_that_lacks_a_tensor(folder: Path) -> None:
    write(folder, shards(1.0, *NAMES[:2]))
    listed_in(folder, *THREE)


def a_set_that_lacks_a_file(folder: Path) -> None:
    the_index_of_another_cut(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def two_whole_sets(folder: Path) -> None:
    write(folder, shards(1.0) | dict(zip(THREE, [full(9.0, name) for name in NAMES], strict=True)))
    listed_in(folder, "model-00001-of-00001.safetensors")


def pickles_beside(folder: Path) -> None:
    write(folder, {})
    listed_in(folder, *THREE)
    torch.save(full(1.0), folder / "pytorch_model.bin")


BESIDE_AN_INDEX: Mapping[Build, tuple[str, ...]] = {
    a_set_that_lacks_a_tensor: (
        "3 of 3 files of model.safetensors.index.json are not there, such as model-00001-of-00003.safetensors, and the "
        "2 numbered files such as model-00001-of-00002.safetensors lack 1 tensor that the index lists, such as",
        "or remove the index if the 2 numbered files such as model-00001-of-00002.safetensors are the model",
    ),
    a_set_that_lacks_a_file: (
        "the index names model-00001-of-00003.safetensors, model-00002",
        "model-00001-of-00002.safetensors is there, which it does not name: if it is the model, see that one whole "
        "set is there and remove the index; else fetch the 3 files",
    ),
    two_whole_sets: ("are there, which it does not name: if they are the model, see that one whole set",),
    pickles_beside: ("pytorch_model.bin is there, which it does not name: if that is the model, name /", "else fetch"),
}
"""What is said of what lies beside an index whose files are not there."""


@pytest.mark.parametrize("build", BESIDE_AN_INDEX, ids=lambda build: build.__name__)
def test_what_lies_beside_an_index_without_its_files_is_named(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "subject")

    said = refused(tmp_path, tmp_path / "subject")

    assert "did not finish" not in said
    for words in BESIDE_AN_INDEX[build]:
        assert words in said


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


# ------------------------------------------------------------------------------- places that stand for a checkpoint


def test_a_single_file_is_a_model_with_the_files_beside_it(tmp_path: Path) -> None:
    """Two models in one folder, as merges of diffusion models lie."""
    folder = write(tmp_path / "models", {"a.safetensors": full(1.0), "b.safetensors": full(9.0)})

    assert is_mean(merged(tmp_path, folder / "a.safetensors")[0], 1.0)


@pytest.mark.parametrize(("named", "value"), [("model.safetensors", 5.5), (INDEX, 1.0)])
def test_one_of_two_sets_is_chosen_by_naming_it(named: str, value: float, tmp_path: Path) -> None:
    two_equal_sets(tmp_path / "subject")

    assert f"choose by naming {tmp_path}/subject/model.safetensors or" in refused(tmp_path, tmp_path / "subject")
    assert is_mean(merged(tmp_path, tmp_path / "subject" / named)[0], value)


def test_one_shard_is_no_model(tmp_path: Path) -> None:
    subject = write(tmp_path / "subject", shards(1.0), index="auto")

    said = refused(tmp_path, subject / "model-00001-of-00002.safetensors")

    assert f"it is one of 2 files of a model; name its folder, {subject}" in said


def test_two_models_of_one_folder_are_verified_and_compared_as_what_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "models", {"a.safetensors": full(1.0), "b.safetensors": full(9.0)})
    merged(tmp_path, folder / "a.safetensors")

    assert cli("verify", tmp_path / "out", "--inputs").exit_code == 0
    assert cli("diff", folder / "a.safetensors", folder / "b.safetensors").exit_code == 1
    assert cli("diff", folder / "a.safetensors", folder / "a.safetensors").exit_code == 0
    save_file(full(2.0), folder / "a.safetensors")
    assert cli("verify", tmp_path / "out", "--inputs").exit_code == 4


def test_an_output_is_not_the_folder_of_a_single_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "models", {"model.safetensors": full(1.0)})
    recipe = recipe_over(tmp_path, folder / "model.safetensors")

    finished = cli("merge", recipe, folder, "--overwrite", "--device", "cpu")

    assert finished.exit_code == 2
    assert "the output" in finished.output
    assert bool((load_file(folder / "model.safetensors")[NAMES[0]] == 1.0).all())


COMMITS = ("a" * 40, "b" * 40)


def hub_cache(root: Path, *values: float, main: int | None = None) -> Path:
    """Write a model's folder as the hub's client keeps it: blobs, and snapshots of links."""
    model = root / "models--org--name"
    (model / "blobs").mkdir(parents=True)
    (model / "refs").mkdir()
    for commit, value in zip(COMMITS, values, strict=False):
        plain = write(root / f"plain-{commit[0]}", {"model.safetensors": full(value)})
        (model / "snapshots" / commit).mkdir(parents=True)
        for file in plain.iterdir():
            blob = file.rename(model / "blobs" / f"{commit[0]}-{file.name}")
            (model / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    if main is not None:
        (model / "refs" / "main").write_text(COMMITS[main])
    return model


@pytest.mark.parametrize("below", ["", "snapshots"])
@pytest.mark.parametrize(("values", "main", "expected"), [((9.0, 1.0), 1, 1.0), ((1.0,), None, 1.0), ((1.0,), 1, 1.0)])
def test_the_folder_of_the_hubs_cache_is_its_snapshot(
    values: tuple[float, ...], main: int | None, expected: float, below: str, tmp_path: Path
) -> None:
    model = hub_cache(tmp_path / "hub", *values, main=main)

    tensors, said = merged(tmp_path, model / below)

    assert is_mean(tensors, expected)
    assert "is a folder of the hub's cache; read is its snapshot" in said


def test_a_file_in_a_snapshot_is_read_through_its_link(tmp_path: Path) -> None:
    model = hub_cache(tmp_path / "hub", 1.0, main=0)

    assert is_mean(merged(tmp_path, model / "snapshots" / COMMITS[0] / "model.safetensors")[0], 1.0)


def test_a_cache_that_does_not_say_which_snapshot(tmp_path: Path) -> None:
    model = hub_cache(tmp_path / "hub", 1.0, 2.0)

    assert "has 2 snapshots and no refs/main among them; name one" in refused(tmp_path, model)
    assert "it is the hub's cache, of org/name; name one as org/name" in refused(tmp_path, tmp_path / "hub")


@pytest.mark.parametrize(
    ("name", "expected"), [("org/name", 9.0), (f"org/name@{COMMITS[0]}", 1.0), ("org/name@v1", 1.0), ("ORG/name", None)]
)
def test_a_name_of_the_hub_is_read_from_its_cache_where_it_may_not_be_asked(
    name: str, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hub_cache(tmp_path / "hub", 1.0, 9.0, main=1)
    (model / "refs" / "v1").write_text(COMMITS[0])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    if expected is None:
        assert "has no snapshot of it; unset it, fetch it there (`hf download ORG/name`)" in refused(tmp_path, name)
        return
    tensors, said = merged(tmp_path, name)

    assert is_mean(tensors, expected)
    assert f"hf://{name} is read offline; read is its snapshot {model}/snapshots/{COMMITS[expected == 9.0]}" in said


def test_a_file_that_is_named_alone_has_no_folders_of_other_models(tmp_path: Path) -> None:
    write(tmp_path / "models" / "SD1.5", {"v1-5.safetensors": full(9.0)})
    one = tmp_path / "models" / "juggernaut.safetensors"
    save_file(full(1.0), one)

    tensors, said = merged(tmp_path, one)

    assert is_mean(tensors, 1.0)
    assert "left out" not in said
    assert "SD1.5" not in said


def test_a_file_that_is_named_in_a_models_folder_has_its_subfolders(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {"model.safetensors": full(1.0)})
    write(model / "2_Dense", {"model.safetensors": full(9.0)})

    assert "2_Dense/model.safetensors" in merged(tmp_path, model / "model.safetensors")[1]


def test_a_cache_of_nothing_and_one_of_a_data_set(tmp_path: Path) -> None:
    assert "download it: `hf download org/name`" in refused(tmp_path, hub_cache(tmp_path / "hub"))
    (tmp_path / "datasets--org--set" / "snapshots").mkdir(parents=True)
    assert "is a dataset in the hub's cache, no model" in refused(tmp_path, tmp_path / "datasets--org--set")


# ------------------------------------------------------------------------------------ folders that are no checkpoint


def touch(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


def pointers(folder: Path) -> None:
    touch(folder, *shards(1.0), "config.json", content=POINTER)
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: f for f, held in shards(1.0).items() for n in held}}))


def a_pointer_to_the_index(folder: Path) -> None:
    touch(folder, INDEX, content=POINTER)


def a_page(folder: Path) -> None:
    touch(folder, "model.safetensors", content=b"\n<!DOCTYPE html>\n<html class=''>" + b" " * 200)


def a_message_of_the_hub(folder: Path) -> None:
    touch(folder, "model.safetensors", content=b"Entry not found")


def a_renamed_pickle(folder: Path) -> None:
    touch(folder, "model.safetensors", content=b"PK\x03\x04" + bytes(100))


def a_renamed_gguf(folder: Path) -> None:
    touch(folder, "model.safetensors", content=b"GGUF\x03\0\0\0" + bytes(100))


def zeros(folder: Path) -> None:
    touch(folder, "model.safetensors", content=bytes(4096))


def an_empty_file(folder: Path) -> None:
    touch(folder, "model.safetensors", content=b"")


def an_adapter(folder: Path) -> None:
    touch(folder, "adapter_model.safetensors", "tokenizer.json")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "OFT"}))


def an_adapter_of_diffusers(folder: Path) -> None:
    touch(folder, "pytorch_lora_weights.safetensors")


def consolidated(folder: Path) -> None:
    touch(folder, "consolidated.safetensors", "params.json", "tekken.json")


def consolidated_pickles(folder: Path) -> None:
    touch(folder, "consolidated.00.pth", "consolidated.01.pth", "params.json")


def a_pipeline(folder: Path) -> None:
    touch(folder, "unet/config.json", "vae/config.json")
    parts = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(parts))


def a_run(folder: Path) -> None:
    touch(folder, *(f"checkpoint-{step}/model.safetensors" for step in (50, 100, 1000, 900)), "trainer_state.json")


def a_run_of_deepspeed(folder: Path) -> None:
    touch(folder, "global_step100/mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest", "config.json")


def a_run_of_fsdp(folder: Path) -> None:
    touch(folder, "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "config.json")


def distributed(folder: Path) -> None:
    touch(folder, "__0_0.distcp", "__1_0.distcp", ".metadata")


def pickles(folder: Path) -> None:
    touch(folder, "lit_model.pth", "model.ckpt", "optimizer.pt", "config.json")


def pickles_of_old(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    torch.save(full(1.0), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def numbered_pickles_of_which_one_is_missing(folder: Path) -> None:
    touch(folder, "pytorch_model-00001-of-00002.bin")


def gguf(folder: Path) -> None:
    touch(folder, "model-Q4_K_M.gguf", "README.md")


def numbered_files_of_which_one_is_missing(folder: Path) -> None:
    touch(folder, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")


def two_counts_of_numbered_files(folder: Path) -> None:
    for total in (2, 3):
        touch(folder, *(f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)))


def a_message_of_a_server(folder: Path) -> None:
    touch(folder, "model.safetensors", content=b'{"error":"Invalid username or password."}')


def ranks(folder: Path) -> None:
    touch(folder, "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors")


def ranks_of_tensorrt(folder: Path) -> None:
    touch(folder, "rank0.safetensors", "rank1.safetensors")


def slices(folder: Path, *files: str) -> Path:
    """Write half of every matrix, and the whole norm, as two processes hold them."""
    half = full(1.0, *NAMES[:2], shape=(2, 6)) | full(1.0, NAMES[2])
    return write(folder, dict.fromkeys(files, half))


def slices_of_savers(folder: Path) -> None:
    slices(folder, *(f"shard-{number:05d}-model-00001-of-00001.safetensors" for number in (1, 2)))


def a_slice_of_savers(folder: Path) -> Path:
    slices_of_savers(folder)
    return folder / "shard-00002-model-00001-of-00001.safetensors"


def slices_of_deepseek(folder: Path) -> None:
    slices(folder, "model0-mp2.safetensors", "model1-mp2.safetensors")


def one_slice_of_deepseek(folder: Path) -> None:
    slices(folder, "model0-mp2.safetensors")


def slices_of_meta(folder: Path) -> None:
    slices(folder, "consolidated.00.safetensors", "consolidated.01.safetensors")


def slices_of_megatron(folder: Path) -> None:
    slices(folder, "mp_rank_00.safetensors", "mp_rank_01.safetensors")


def slices_of_tensor_parallelism(folder: Path) -> None:
    slices(folder, "weights-tp0.safetensors", "weights-tp1.safetensors")


def slices_of_any_name(folder: Path) -> None:
    slices(folder, "piece_0.safetensors", "piece_1.safetensors")


def slices_that_are_numbered_as_shards(folder: Path) -> None:
    slices(folder, *shards(1.0))


def models_of_the_same_names(folder: Path) -> None:
    write(folder, {"a.safetensors": full(1.0), "b.safetensors": full(2.0)})


def openvino(folder: Path) -> None:
    touch(folder, "openvino_model.bin", "openvino_model.xml")


def ctranslate2(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"\x06\0\0\0\x0c\0WhisperSpec\0" + bytes(range(200)))
    touch(folder, "config.json", "vocabulary.json")


def another_library(folder: Path) -> None:
    (folder / "model.bin").write_bytes(bytes(range(1, 200)))


def tensorflow(folder: Path) -> None:
    touch(folder, "config.json", "tf_model-00001-of-00002.h5", "tf_model-00002-of-00002.h5", "tf_model.h5.index.json")


def flax(folder: Path) -> None:
    touch(folder, "config.json", "flax_model.msgpack")


def exported(folder: Path) -> None:
    touch(folder, "config.json", "tokenizer.json", "onnx/model.onnx", "onnx/model_quantized.onnx")


def several_models(folder: Path) -> None:
    touch(folder, "a.safetensors", "b.safetensors")


def two_variants(folder: Path) -> None:
    touch(folder, "model.fp16.safetensors", "model.bf16.safetensors")


def a_folder_of_models(folder: Path) -> None:
    touch(folder, "llama/model.safetensors", "qwen/model.safetensors")


def a_download_that_did_not_finish(folder: Path) -> None:
    touch(folder, "config.json", "tokenizer.json")


REFUSED: Mapping[Build, tuple[str, ...]] = {
    pointers: ("is a git-lfs pointer", "run `git lfs pull`"),
    a_pointer_to_the_index: (f"{INDEX} is a git-lfs pointer", "run `git lfs pull`"),
    a_page: ("is a web page", "`hf download ORG/NAME`"),
    a_message_of_the_hub: ("is the message of a server", "`hf auth login`"),
    a_renamed_pickle: ("is a PyTorch file (pickle)", "convert it"),
    a_renamed_gguf: ("is a GGUF file", "take the model it was made from"),
    zeros: ("begins with zeros", "fetch it again"),
    an_empty_file: ("is empty", "fetch it again"),
    an_adapter: ("an adapter of the type 'OFT'", "only LORA is read"),
    an_adapter_of_diffusers: (
        "it holds an adapter, no model",
        "what made it (diffusers: `load_lora_weights(FILE)`, `fuse_lora()`",
    ),
    consolidated: ("in the layout of Mistral or Meta", "consolidated.safetensors"),
    consolidated_pickles: ("in the layout of Mistral or Meta", "convert it"),
    a_pipeline: ("it is a diffusers pipeline whose parts (unet, vae) have no weights", "did not finish"),
    a_run: ("the folder of a run (checkpoint-50, checkpoint-100, checkpoint-900, checkpoint-1000)", "/checkpoint-1000"),
    a_run_of_deepspeed: ("a checkpoint of DeepSpeed", "`python -m deepspeed.utils.zero_to_fp32 /"),
    a_run_of_fsdp: ("FSDP's parts", "`accelerate merge-weights"),
    distributed: (".metadata: its pickle has the instruction", "which no tensor needs"),
    pickles: ("lit_model.pth and 1 more are PyTorch's pickles", "save_pretrained"),
    pickles_of_old: ("was written by a PyTorch of before 1.6", "safetensors.torch.save_file"),
    numbered_pickles_of_which_one_is_missing: ("pytorch_model-00001-of-00002.bin, number 2 is missing", "fetch"),
    gguf: ("model-Q4_K_M.gguf is GGUF", "take the model it was made from"),
    numbered_files_of_which_one_is_missing: (
        "of 3 files like model-00001-of-00003.safetensors, number 2 is missing",
        "fetch",
    ),
    two_counts_of_numbered_files: ("it has numbered files of 2 and of 3", "move those away that are not meant"),
    a_message_of_a_server: ("is the message of a server", "download it again"),
    ranks: ("model-rank-1-part-0.safetensors: each file has what one process held of every matrix", "was made from"),
    ranks_of_tensorrt: ("rank0.safetensors, rank1.safetensors: each file has", "take the model it was made from"),
    slices_of_deepseek: ("model1-mp2.safetensors: each file has what one process held of every matrix",),
    one_slice_of_deepseek: ("model0-mp2.safetensors: each file has what one process held of every matrix",),
    slices_of_meta: ("consolidated.01.safetensors: each file has what one process held", "take the model it was made"),
    slices_of_savers: (
        "shard-00002-model-00001-of-00001.safetensors: each file has what one process wrote",
        "join them with `consolidate_safetensors_files(",
    ),
    a_slice_of_savers: ("each file has what one process wrote", "join them with `consolidate_safetensors_files("),
    slices_of_megatron: ("mp_rank_01.safetensors: each file has what one process held of every matrix",),
    slices_of_tensor_parallelism: ("weights-tp1.safetensors: each file has what one process held of every matrix",),
    slices_of_any_name: ("piece_0.safetensors, piece_1.safetensors hold tensors of the same names: each file has",),
    slices_that_are_numbered_as_shards: ("nor of 3 tensors in all: files that hold the same names have what each",),
    models_of_the_same_names: ("name the file that is meant. They hold the same names: one that has a part of every",),
    openvino: ("compiled by OpenVINO", "take the model it was made from"),
    tensorflow: (
        "tf_model-00001-of-00002.h5 and 1 more are TensorFlow's",
        "transformers 4 as the class",
        "from_tf=True",
    ),
    flax: ("flax_model.msgpack is Flax' weights", "transformers 4 as the class", "from_flax=True"),
    exported: ("onnx is ONNX", "take the model it was made from"),
    ctranslate2: ("model.bin is of CTranslate2 (faster-whisper)", "take the model it was made from"),
    another_library: ("model.bin is of another library by its first bytes", "take the model it was made from"),
    several_models: ("it has several weights, a.safetensors, b.safetensors", "name the file that is meant"),
    two_variants: ("model.bf16.safetensors, model.fp16.safetensors", "name the file that is meant"),
    a_folder_of_models: ("it has no weights, and 2 folders (llama, qwen)", "name the one with the model"),
    a_download_that_did_not_finish: ("it has 2 files but no weights", "its download or copy did not finish"),
}
"""What each folder is, and the next step."""


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_what_is_no_checkpoint_is_called_by_its_name_with_the_next_step(build: Build, tmp_path: Path) -> None:
    (tmp_path / "subject").mkdir()
    build(tmp_path / "subject")

    said = refused(tmp_path, tmp_path / "subject")

    assert str(tmp_path / "subject") in said
    for words in REFUSED[build]:
        assert words in said
    assert "slices" not in build.__name__ or "name the file" not in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.gguf", "it is GGUF, which"),
        ("a.onnx", "it is ONNX"),
        ("a.safetensors", "there is no such file"),
    ],
)
def test_a_file_that_is_no_weights_is_called_what_it_is(name: str, message: str, tmp_path: Path) -> None:
    if not name.endswith(".safetensors"):
        touch(tmp_path, name)

    assert f"there is no checkpoint at {tmp_path}/{name}: {message}" in refused(tmp_path, tmp_path / name)


def test_the_own_layout_of_mistral_is_merged_where_the_file_is_named(tmp_path: Path) -> None:
    subject = write(tmp_path / "subject", {"consolidated.safetensors": full(1.0)})

    assert f"name the file: {subject}/consolidated.safetensors" in refused(tmp_path, subject)
    assert is_mean(merged(tmp_path, subject / "consolidated.safetensors")[0], 1.0)


def test_what_one_of_several_processes_held_is_no_model_though_it_is_named(tmp_path: Path) -> None:
    subject = write(tmp_path / "subject", {f"rank{number}.safetensors": full(1.0) for number in range(2)})

    assert "each file has what one process held of every matrix" in refused(tmp_path, subject / "rank0.safetensors")
    alone = write(tmp_path / "alone", {"lora_rank32.safetensors": full(1.0)})
    assert is_mean(merged(tmp_path, alone / "lora_rank32.safetensors")[0], 1.0)


def test_all_wrong_paths_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "run")
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("./nowhere", "./run", str(tmp_path / "none"))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))

    said = " ".join(cli("plan", recipe, tmp_path / "out").output.split())

    assert "3 models cannot be opened" in said
    assert f"{tmp_path}/nowhere: the folder does not exist or is empty (a relative path counts from {tmp_path})" in said
    assert "it is the folder of a run" in said
    assert f"{tmp_path}/none: the folder does not exist" in said


# --------------------------------------------------------------------------------------------- the hub's addresses


@pytest.mark.parametrize(
    ("address", "model"),
    [
        ("https://huggingface.co/org/name", "hf://org/name"),
        ("https://huggingface.co/org/name/", "hf://org/name"),
        ("http://www.huggingface.co/org/name", "hf://org/name"),
        ("huggingface.co/org/name", "hf://org/name"),
        ("https://hf.co/org/name.v2#usage", "hf://org/name.v2"),
        ("https://huggingface.co/org/name/tree/main", "hf://org/name@main"),
        ("https://huggingface.co/org/name/tree/main/sub/folder", "hf://org/name@main/sub/folder"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F12", "hf://org/name@refs/pr/12"),
        ("https://huggingface.co/org/name/blob/v1.0/model.safetensors", "hf://org/name@v1.0"),
        ("https://huggingface.co/org/name/resolve/main/vae/model.safetensors", "hf://org/name@main/vae"),
        ("https://huggingface.co/org/name/commit/" + "c" * 40, "hf://org/name@" + "c" * 40),
        ("https://huggingface.co/org/name/discussions/3", "hf://org/name"),
    ],
)
def test_an_address_of_the_hub_is_read_as_the_model_it_shows(address: str, model: str) -> None:
    assert resolve_location(address) == model


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("https://s3.console.aws.amazon.com/s3/buckets/models?prefix=t2/&region=eu-west-1", "s3://models/t2"),
        (
            "https://us-east-1.console.aws.amazon.com/s3/buckets/models?region=us-east-1&prefix=a%20b/t2/",
            "s3://models/a b/t2",
        ),
        (
            "https://s3.console.aws.amazon.com/s3/object/models?prefix=t2/model.safetensors",
            "s3://models/t2/model.safetensors",
        ),
        ("https://s3.console.aws.amazon.com/s3/buckets/models/t2/?tab=overview", "s3://models/t2"),
        ("https://models.s3.eu-west-1.amazonaws.com/t2/", "s3://models/t2"),
        ("https://my.models.s3.amazonaws.com/t2", "s3://my.models/t2"),
        ("https://s3.eu-west-1.amazonaws.com/models/t2", "s3://models/t2"),
        ("https://s3-eu-west-1.amazonaws.com/models/t2/", "s3://models/t2"),
        ("https://models.s3.amazonaws.com/t2/x.safetensors?X-Amz-Signature=secret", "s3://models/t2/x.safetensors"),
        ("https://console.cloud.google.com/storage/browser/models/t2;tab=objects?project=x", "gs://models/t2"),
        ("https://storage.googleapis.com/models/t2", "gs://models/t2"),
    ],
)
def test_addresses_of_stores_are_refused_with_what_they_mean(address: str, place: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"is an address of an object store; write '{place}'")) as caught:
        resolve_location(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://models.s3.eu-west-1.amazonaws.com/t2/model.safetensors",
        "https://models.s3-website.eu-west-1.amazonaws.com/t2",
        "https://example.org/s3/buckets/models",
    ],
)
def test_what_is_read_over_http_is_no_address_of_a_store(address: str) -> None:
    assert resolve_location(address) == address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://huggingface.co/datasets/org/name", "not of a model"),
        ("https://huggingface.co/spaces/org/name", "not of a model"),
        ("https://huggingface.co/org", "not of a model"),
        ("https://huggingface.co", "not of a model"),
        ("https://huggingface.co/org/name/tree/a%2Fb", "has a slash"),
        ("https://huggingface.co/org/name/edit/main/README.md", "write org/name"),
        ("https://huggingface.co/org/name?library=transformers", "cut it off at the `?`"),
        ("https://user:secret@huggingface.co/org/name", "carries a user and a password"),
    ],
)
def test_other_pages_of_the_hub_are_refused(address: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        resolve_location(address)
    assert "secret" not in str(caught.value)


def test_a_model_of_the_hub_is_read_by_its_address(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {"model.safetensors": full(1.0)})
    recipe = recipe_over(tmp_path, "https://huggingface.co/org/name/tree/main")
    with hub_server({"org/name": model}) as endpoint:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = runs.command("merge", recipe, tmp_path / "out", "--device", "cpu")
        finished = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    assert finished.returncode == 0, finished.stderr
    assert is_mean(load_file(tmp_path / "out" / "model.safetensors"), 1.0)


def test_models_that_the_hub_does_not_have_are_named_with_the_folders_that_are_not_there(tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("org/none", "./nowhere", "org/name", "org/no")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    model = write(tmp_path / "model", {"model.safetensors": full(1.0)})
    with hub_server({"org/name": model}) as endpoint:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = runs.command("plan", recipe, tmp_path / "out")
        finished = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    assert finished.returncode == 2
    assert "3 models cannot be opened" in finished.stderr
    for said in ("cannot read hf://org/none: no such model", "nowhere: the folder does not exist", "hf://org/no:"):
        assert said in finished.stderr


def test_a_hub_that_cannot_be_reached_hides_no_wrong_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("org/one", "/no/a", "org/two", "/no/b")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))

    said = cli("plan", recipe, tmp_path / "out")

    assert said.exit_code == 2
    assert "4 models cannot be opened" in said.output
    for words in ("/no/a: the folder does not exist", "/no/b: the folder", "hf://org/one: the hub did not answer"):
        assert said.output.count(words) == 1


@pytest.mark.parametrize("location", ["org/name", "https://huggingface.co/org/name", "checkpoints/llama"])
def test_a_hub_that_cannot_be_reached_is_named_with_why_it_was_asked(location: str, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    recipe = recipe_over(tmp_path, location)

    finished = subprocess.run(
        runs.command("plan", recipe, tmp_path / "out"), cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert finished.returncode == 2, finished.stderr
    assert "is read as the name of a model on the Hugging Face hub, as there is no such folder" in finished.stderr
    assert "Traceback" not in finished.stderr


# --------------------------------------------------------------------------------- tensors that have no elements


def both(folder: Path, one: Tensors, other: Tensors, rules: object = None) -> Result:
    """Plan the mean of two models."""
    models = []
    for name, tensors in (("one", one), ("other", other)):
        model = write(folder / name, {"model.safetensors": tensors})
        models.append({"model": str(model), "parameters": {"weight": 0.5}})
    recipe = folder / "recipe.yaml"
    parts = {"merge_method": "linear", "models": models, "stockflow": {"rules": rules or []}}
    recipe.write_text(yaml.safe_dump(parts))
    return cli("plan", recipe, folder / "out")


EMPTY = torch.empty(0)


@pytest.mark.parametrize("one_only", [False, True], ids=["in every model", "in one"])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:2], NAMES[2:], ("x.bias",)], ids=str)
def test_placeholders_of_zero_3_are_refused(names: tuple[str, ...], one_only: bool, tmp_path: Path) -> None:
    whole = full(1.0) | full(1.0, "x.weight") | {"x.bias": torch.ones(4)}
    if names == ("x.bias",):
        whole, names = (
            {name.replace("x.", "layers.0.self_attn.q_proj."): each for name, each in whole.items()},
            ("layers.0.self_attn.q_proj.bias",),
        )
    hollow = whole | dict.fromkeys(names, EMPTY)

    finished = both(tmp_path, hollow, whole if one_only else hollow)

    assert finished.exit_code == 2
    assert "placeholders that DeepSpeed's ZeRO-3 leaves" in " ".join(finished.output.split())


def test_a_checkpoint_of_nothing_but_empty_tensors_is_refused_whatever_their_names(tmp_path: Path) -> None:
    nothing = {"a": EMPTY, "b": EMPTY}

    finished = both(tmp_path, nothing, nothing)

    assert finished.exit_code == 2
    assert "2 tensors of" in finished.output


def test_legitimately_empty_tensors_pass(tmp_path: Path) -> None:
    tensors = full(1.0) | {
        "odd.empty": EMPTY,
        "layers.0.mlp.down_proj.g_idx": EMPTY,
        "layers.0.adapter.mlp.weight": torch.empty(0, 7),
        "layers.0.adapter.mlp.bias": EMPTY,
        "layers.0.mlp.experts.gate_up_proj": torch.empty(0, 4, 6),
    }

    assert both(tmp_path, tensors, tensors).exit_code == 0


@pytest.mark.parametrize(("action", "code"), [("skip", 0), ("copy", 2)])
def test_placeholders_that_rules_leave_out_are_no_dead_end(action: str, code: int, tmp_path: Path) -> None:
    """A copy of one is an empty tensor in the output."""
    hollow = full(1.0) | {NAMES[2]: EMPTY}

    assert both(tmp_path, hollow, hollow, [{"filter": "norm", "action": action}]).exit_code == code


def test_the_output_of_a_merge_that_has_not_finished_is_no_model(tmp_path: Path) -> None:
    write(tmp_path / "ones", {"model.safetensors": full(1.0)})
    (tmp_path / "first").mkdir()
    merged(tmp_path / "first", tmp_path / "ones")
    assert is_mean(merged(tmp_path, tmp_path / "first" / "out")[0], 2.0)
    (tmp_path / "first" / "out" / "manifest.json").unlink()

    said = refused(tmp_path, tmp_path / "first" / "out")

    assert "is the output of a merge that has not finished" in said
    assert "run that merge again to its end" in said
    assert "accept: [unfinished-output]" in said


@pytest.mark.parametrize("said", ["tf", "flax", "mlx", "pt"])
def test_weights_that_lie_as_another_framework_has_them_are_said(said: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", {"conv.weight": torch.ones(3, 3, 2)})
    save_file({"conv.weight": torch.ones(3, 3, 2)}, tmp_path / "m" / "model.safetensors", metadata={"format": said})
    store = open_store(str(tmp_path / "m"), StorageConfig())
    (opened,) = open_checkpoints([store], settles=lambda position, name: False)

    found = [remark.severity for remark in opened.remarks if remark.code == "other-framework"]
    assert found == {"pt": [], "mlx": ["warning"]}.get(said, ["refusal"])
    slices(tmp_path / "half", "model0-mp2.safetensors")
    assert "each file has what one process held" in refused(tmp_path, tmp_path / "half" / "model0-mp2.safetensors")


@pytest.mark.parametrize(
    ("files", "is_said"),
    [
        (("piece_0", "piece_1"), True),
        (("part-0-of-x", "part-1-of-x"), True),
        (("epoch_0", "epoch_1"), False),
        (("model_v0", "model_v1"), False),
        (("model_7", "model_8"), False),
        (("a", "b"), False),
    ],
)
def test_a_named_file_among_numbered_ones_of_the_same_names_is_warned_of(
    files: tuple[str, str], is_said: bool, tmp_path: Path
) -> None:
    subject = write(tmp_path / "subject", {f"{file}.safetensors": full(1.0) for file in files})

    tensors, said = merged(tmp_path, subject / f"{files[1]}.safetensors")

    assert is_mean(tensors, 1.0)
    assert ("is one of 2 files that hold the same names" in said) == ("part-of-a-model" in said) == is_said


def test_a_named_file_among_numbered_ones_of_other_names_is_quiet(tmp_path: Path) -> None:
    files = {"piece_0.safetensors": full(1.0), "piece_1.safetensors": full(1.0, "vae.weight", "text.weight")}

    assert "part-of-a-model" not in merged(tmp_path, write(tmp_path / "s", files) / "piece_0.safetensors")[1]


# ---------------------------------------------------------------------------------------- an index above its files


def in_a_subfolder(folder: Path, file: str = "mtp/model.safetensors") -> Path:
    """Write a model whose index names a file in a folder below it."""
    (folder / "mtp").mkdir(parents=True)
    last = full(1.0, NAMES[2])
    write(folder, {"model-00001-of-00001.safetensors": full(1.0, *NAMES[:2]), "mtp/model.safetensors": last})
    weight_map = dict.fromkeys(NAMES[:2], "model-00001-of-00001.safetensors") | {NAMES[2]: file}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_files_in_subfolders_that_an_index_names_are_read_and_published_flat(tmp_path: Path) -> None:
    subject = in_a_subfolder(tmp_path / "subject")

    tensors, said = merged(tmp_path, subject)

    assert is_mean(tensors, 1.0)
    assert "left out" not in said
    assert cli("verify", tmp_path / "out", "--inputs", "--sample", "100%").exit_code == 0


def test_a_file_in_a_subfolder_that_is_not_there_is_missing(tmp_path: Path) -> None:
    said = refused(tmp_path, in_a_subfolder(tmp_path / "subject", "mtp/other.safetensors"))

    assert "the index names mtp/other.safetensors, which is not there; with 1 tensor" in said


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/model.safetensors", "mtp/../model.safetensors", ".git/x.safetensors", "mtp//x", ""],
)
def test_an_index_names_nothing_outside_of_its_folder_or_hidden(file: str, tmp_path: Path) -> None:
    said = refused(tmp_path, in_a_subfolder(tmp_path / "subject", file))

    assert "expected the name of a file beside the index, or in a folder there that is not hidden" in said


def test_an_index_leads_through_no_link_out_of_the_folder(tmp_path: Path) -> None:
    subject = in_a_subfolder(tmp_path / "subject")
    (subject / "mtp").rename(tmp_path / "elsewhere")
    (subject / "mtp").symlink_to(tmp_path / "elsewhere")

    refused(tmp_path, subject)
