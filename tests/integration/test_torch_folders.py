"""Models saved by PyTorch are merged like their twins in safetensors, from disk and from S3, bit for bit."""

import json
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import NotFoundError
from stockflow.recipe import load_recipe
from stockflow.storage import StorageConfig, open_model
from stockflow.verification.recompute import SampleOptions
from stockflow.verification.verify import verify
from tests import oracle, runs
from tests.checkpoints import BUFFERS, ZOO, Family, make_family, write_checkpoint, write_recipe


def saved_by_torch(model: Path, num_files: int = 1) -> Path:
    """Write the weights of a checkpoint in safetensors with ``torch.save``, beside it; return the new folder."""
    folder = model.parent / f"{model.name}-bin"
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: each for file in sorted(model.glob("*.safetensors")) for name, each in load_file(file).items()}
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number in range(num_files):
        names, file = list(tensors)[number::num_files], f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", 2, ZOO)


@pytest.mark.parametrize("method", ["model_stock", "ties"])
def test_a_merge_of_pickles_is_that_of_the_oracle(method: str, family: Family, tmp_path: Path) -> None:
    """A base in one file, a model in several, one in safetensors."""
    parameters = {"per_model": {"density": [0.5, 0.5], "weight": [1.0, 1.0]}} if method == "ties" else {}
    mixed = Family(saved_by_torch(family.base), (saved_by_torch(family.tuned[0], 3), family.tuned[1]))
    recipe = write_recipe(tmp_path / "recipe.yaml", method, mixed, **parameters)

    merged = runs.merge_here(recipe, tmp_path / "out")

    wanted = {"densities": [0.5, 0.5], "weights": [1.0, 1.0]} if method == "ties" else {}
    expected = oracle.merge_folder(method, family.base, family.tuned, **wanted)
    found = oracle.load_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys() == {*ZOO, *BUFFERS}
    for name, result in expected.items():
        if result.dtype in oracle.FORMATS:
            bits = oracle.round_to(result.dtype, found[name].array)
            assert oracle.ulp_distance(result.dtype, bits, result.bits).max(initial=0) <= 1
        else:
            np.testing.assert_array_equal(found[name].array, result.out)
    assert "weights-chosen" in {remark.code for remark in merged.plan.remarks}
    sample = SampleOptions(1.0, seed=0, memory_bytes=2**31 + runs.grown_bytes(), num_threads=2)
    assert [str(each) for each in verify(str(tmp_path / "out"), StorageConfig(), sample=sample).findings] == []


def test_on_s3_they_are_the_same_also_where_files_are_named(
    family: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str
) -> None:
    pickled = Family(saved_by_torch(family.base), (saved_by_torch(family.tuned[0], 3), family.tuned[1]))
    local = runs.merge_here(write_recipe(tmp_path / "here.yaml", "model_stock", pickled), tmp_path / "out")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in sorted(path for path in (tmp_path / "models").rglob("*") if path.is_file()):
        client.upload_file(str(path), s3_bucket, str(path.relative_to(tmp_path / "models")))
    names = ["base-bin/pytorch_model.bin", "tuned-1-bin", "tuned-2/model.safetensors"]
    base, *tuned = (Path(f"PLACE/{name}") for name in names)
    options = {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}
    recipe = write_recipe(
        tmp_path / "remote.yaml", "model_stock", Family(base, tuple(tuned)), stockflow={"storage": options}
    )
    recipe.write_text(recipe.read_text().replace("PLACE", f"s3://{s3_bucket}"))

    merged = runs.merge_here(recipe, f"s3://{s3_bucket}/out")

    assert runs.expected_digests([merged]) == runs.expected_digests([local])
    assert merged.plan.checkpoints[2].url == f"s3://{s3_bucket}/tuned-2/model.safetensors"
    assert verify(f"s3://{s3_bucket}/out", load_recipe(str(recipe)).storage).findings == ()


def test_a_tied_head_is_one_tensor_with_its_embedding(tmp_path: Path) -> None:
    """Saved under both names in pickles, under one in safetensors."""
    shapes = {"model.embed_tokens.weight": (97, 48), "model.norm.weight": (48,)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    family = make_family(tmp_path / "models", 2, shapes, torch.float32, buffers=False, config=config)
    tensors = load_file(family.base / "model.safetensors")
    base = write_checkpoint(tmp_path / "tied", {"none": torch.ones(1)}, config=config)
    (base / "model.safetensors").unlink()
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, base / "pytorch_model.bin")

    merged = runs.merge_here(
        write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(base, family.tuned)), tmp_path / "out"
    )

    expected = oracle.merge_folder("model_stock", family.base, family.tuned)
    found = oracle.load_checkpoint(tmp_path / "out")
    assert found.keys() == {*shapes, "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found[name].array, expected["model.embed_tokens.weight"].out.astype(np.float32))
    assert "tied-head" in {remark.code for remark in merged.plan.remarks}


def test_a_file_is_read_by_its_http_address_where_nothing_is_listed(
    family: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str
) -> None:
    pickled = saved_by_torch(family.tuned[0])
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in (family.base / "model.safetensors", pickled / "pytorch_model.bin"):
        client.upload_file(str(path), s3_bucket, f"{path.parent.name}/{path.name}", {"ACL": "public-read"})
    root = f"{s3_endpoint}/{s3_bucket}"
    stores = [
        open_model(f"{root}/{name}", StorageConfig())
        for name in ("base/model.safetensors", "tuned-1-bin/pytorch_model.bin")
    ]

    remote = open_checkpoints(stores)

    local = open_checkpoints([open_model(str(each), StorageConfig()) for each in (family.base, pickled)])
    assert [each.specs for each in remote] == [each.specs for each in local]
    assert [each.extents for each in remote] == [each.extents for each in local]
    with pytest.raises(NotFoundError, match=r"/base/none.safetensors: there is no such file; check the name"):
        open_checkpoints([open_model(f"{root}/base/none.safetensors", StorageConfig())])


def test_blocks_of_fp8_in_pickles_are_paired_with_their_scales(tmp_path: Path) -> None:
    random, models = torch.Generator().manual_seed(0), []
    for number in range(3):
        codes = torch.randn(200, 130, generator=random).to(torch.float8_e4m3fn)
        tensors = {"a.weight": codes, "a.weight_scale_inv": torch.rand(2, 2, generator=random) + 0.5}
        models.append(write_checkpoint(tmp_path / f"m{number}", tensors, config={"model_type": "llama"}))
    twins = Family(models[0], tuple(models[1:]))
    pickled = Family(saved_by_torch(models[0]), tuple(map(saved_by_torch, models[1:])))
    given = {"dtype": "bfloat16"}
    expected = runs.merge_here(write_recipe(tmp_path / "twins.yaml", "model_stock", twins, **given), tmp_path / "twins")

    merged = runs.merge_here(write_recipe(tmp_path / "recipe.yaml", "model_stock", pickled, **given), tmp_path / "out")

    assert runs.expected_digests([merged]) == runs.expected_digests([expected])
