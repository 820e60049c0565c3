"""Verification finds every way an output can stop being what its manifest says, and the output is a model."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stockflow.errors import CheckpointError, NotFoundError
from stockflow.output.tables import decode_tensors
from stockflow.storage import StorageConfig
from stockflow.text.sealed import seal
from stockflow.verification.verify import Finding, Verification, verify
from tests import runs
from tests.checkpoints import Family, llama_shapes, make_family, write_recipe
from tests.runs import merge_here

INDEX = "model.safetensors.index.json"
SHARD_SIZE = 20_000
UNPUBLISHED = ("numerics/000000.json", "progress.json")
"""Records of who was at work; the latter is there only if the merge took a second."""


class Merged:
    """A family, and what became of it: one output of one shard, one of several."""

    def __init__(self, root: Path) -> None:
        self.family: Family = make_family(root, 3, llama_shapes(), buffers=False, num_shards=2)
        recipe = write_recipe(root / "recipe.yaml", "model_stock", self.family)
        self.single, self.sharded = root / "single", root / "sharded"
        merge_here(recipe, self.single)
        merge_here(recipe, self.sharded, shard_size=SHARD_SIZE)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("merged"))


@pytest.fixture
def single(merged: Merged, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged.single, tmp_path / "single"))


@pytest.fixture
def sharded(merged: Merged, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged.sharded, tmp_path / "sharded"))


def verified(output: Path, *, inputs: bool = False) -> Verification:
    return verify(str(output), StorageConfig(), inputs=inputs)


def findings(output: Path, *, inputs: bool = False) -> list[tuple[str, str]]:
    found = verified(output, inputs=inputs).findings
    assert all("\n" not in str(finding) for finding in found)
    return [(finding.where, finding.problem) for finding in found]


def manifest(output: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return parsed


def edit_manifest(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it anew: a forger's work."""
    fields = manifest(output)
    del fields["seal"]
    change(fields)
    (output / "manifest.json").write_bytes(seal(json.dumps(fields)))


def endorse(output: Path, *keys: str) -> None:
    """Make the manifest state size and digest of what is there now: a forger's work, to reach the other checks."""
    stated = {
        key: {"size": (output / key).stat().st_size, "sha256": hashlib.sha256((output / key).read_bytes()).hexdigest()}
        for key in keys
    }
    edit_manifest(output, lambda fields: fields["files"].update(stated))


def flip(path: Path, place: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[place] ^= 0x10
    path.write_bytes(payload)


def receipts(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.glob("_stockflow/*/receipts/*"))


def shards(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------ all is well


def test_what_was_merged_verifies(merged: Merged) -> None:
    for output, num_shards in ((merged.single, 1), (merged.sharded, len(shards(merged.sharded)))):
        result = verified(output, inputs=True)

        assert result.findings == ()
        assert result.num_tensors == len(llama_shapes())
        assert result.num_files == len(manifest(output)["files"]) == num_shards + 7 + (num_shards > 1)
        assert result.num_bytes == sum((output / key).stat().st_size for key in manifest(output)["files"])
        assert result.plan_id == manifest(output)["plan_id"]
    assert len(shards(merged.sharded)) >= 3


def test_a_copy_elsewhere_verifies(single: Path, sharded: Path) -> None:
    assert findings(single, inputs=True) == []
    assert findings(sharded) == []


def test_every_published_file_is_in_the_manifest(merged: Merged) -> None:
    for output in (merged.single, merged.sharded):
        there = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
        plan_id = manifest(output)["plan_id"]
        records = {"_stockflow/claim.json", *(f"_stockflow/{plan_id}/{name}" for name in UNPUBLISHED)}
        receipts = {f"_stockflow/{plan_id}/receipts/{name}.json" for name in shards(output)}

        assert there - records - receipts - {"manifest.json"} == manifest(output)["files"].keys()


# ---------------------------------------------------------------------------------------------- damaged files


def test_a_missing_file_of_any_kind_is_one_finding(sharded: Path) -> None:
    for key in manifest(sharded)["files"]:
        (sharded / key).rename(sharded / "elsewhere")

        [(where, problem)] = findings(sharded)

        assert where == key
        assert "no such file" in problem
        (sharded / "elsewhere").rename(sharded / key)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard(sharded: Path, size: int) -> None:
    path = sharded / shards(sharded)[1]
    whole = path.stat().st_size
    os.truncate(path, size if size >= 0 else whole - 1)

    [(where, problem)] = findings(sharded)

    assert where == path.name
    assert problem == f"is {path.stat().st_size:,} bytes long, expected {whole:,}"


def test_a_shard_with_bytes_behind_it(sharded: Path) -> None:
    path = sharded / shards(sharded)[0]
    path.write_bytes(path.read_bytes() + b"\0")

    [(where, problem)] = findings(sharded)

    assert (where, "bytes long, expected" in problem) == (path.name, True)


def test_swapped_shards(sharded: Path) -> None:
    first, second = shards(sharded)[:2]
    (sharded / first).rename(sharded / "x")
    (sharded / second).rename(sharded / first)
    (sharded / "x").rename(sharded / second)

    assert [first, second] == [where for where, _ in findings(sharded)]


def test_a_folder_in_the_place_of_a_shard(sharded: Path) -> None:
    path = sharded / shards(sharded)[0]
    path.unlink()
    path.mkdir()

    [(where, _)] = findings(sharded)

    assert where == path.name


STRANGERS = (
    "adapter_model.safetensors", "pytorch_model.bin", "x.gguf", "flax_model.msgpack", "onnx/model.onnx",
    "chat_template.jinja", "additional_chat_templates/rag.jinja", "added_tokens.json", "tokenizer.model",
    "modeling_x.py", "pkg/layers.py", "adapter_config.json", "preprocessor_config.json", "modules.json",
    "1_Pooling/config.json", "2_Dense/model.safetensors", "model.safetensors.index.json", "x_tokenizer/vocab.txt",
    "pytorch_model.bin.index.json", "special_tokens_map.json",
)  # fmt: skip
HARMLESS = (
    "notes.txt", ".gitattributes", ".cache/model.safetensors", "LICENSE", "logs/out.txt", "image.png",
    "other-merge/_stockflow/claim.json", "other-merge/model.safetensors",
)  # fmt: skip


def test_what_loaders_would_read_and_the_manifest_does_not_know(single: Path) -> None:
    for key in (*STRANGERS, *HARMLESS):
        (single / key).parent.mkdir(parents=True, exist_ok=True)
        (single / key).write_text("{}")

    assert findings(single) == [
        (key, "is not in the manifest; remove it, or loaders may read it") for key in sorted(STRANGERS)
    ]


# --------------------------------------------------------------------- consistent digests, inconsistent contents


def test_an_edited_index(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(shard for shard in shards(sharded) if shard != file)
    (sharded / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: other}}))

    [(where, _)] = findings(sharded)
    endorse(sharded, INDEX)
    forged = findings(sharded)

    assert where == INDEX
    assert forged == [(INDEX, f"says {name!r} is in {other}, found it in {file}")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].pop("lm_head.weight"), "does not list 'lm_head.weight'"),
        (
            lambda index: index["weight_map"].update(x="model.safetensors"),
            "says 'x' is in model.safetensors, found it in no",
        ),
        (lambda index: index.pop("weight_map"), "cannot be read"),
        (lambda index: index.update(weight_map=[]), "cannot be read"),
    ],
)
def test_an_index_that_lies_with_a_manifest_that_agrees(
    sharded: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    change(index)
    (sharded / INDEX).write_text(json.dumps(index))
    endorse(sharded, INDEX)

    [(where, problem)] = findings(sharded)

    assert where == INDEX
    assert message in problem


def test_a_tensor_renamed_in_its_shard(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["renamed"] = tensors.pop("model.norm.weight")
    save_file(tensors, single / "model.safetensors")
    endorse(single, "model.safetensors")

    problems = [problem for where, problem in findings(single) if where.endswith(".parquet")]

    assert sorted(problems) == [
        "does not list 'renamed' of model.safetensors",
        "says 'model.norm.weight' is in model.safetensors, found it in no shard",
    ]


def test_a_tensor_of_another_dtype_and_shape_than_the_table_says(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(24, dtype=torch.float32)
    save_file(tensors, single / "model.safetensors")
    endorse(single, "model.safetensors")

    found = findings(single)

    assert ("model.safetensors", "'model.norm.weight' is F32 (24,), the table says ('BF16', [48])") in found


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = shards(sharded)[:2]
    tensors = load_file(sharded / first)
    name = next(iter(tensors))
    save_file(load_file(sharded / second) | {name: tensors[name]}, sharded / second)
    endorse(sharded, second)

    found = findings(sharded)

    assert (second, f"holds {name!r}, which {first} holds too") in found


def test_a_malformed_shard_with_a_manifest_that_agrees(sharded: Path) -> None:
    key = shards(sharded)[0]
    (sharded / key).write_bytes(b"hello, this is no tensor at all")
    endorse(sharded, key)

    found = findings(sharded)

    assert {where for where, _ in found} == {key, f"_stockflow/{manifest(sharded)['plan_id']}/receipts/{key}.json"}
    assert found[0][1].startswith("is 31 bytes long by the manifest, ")
    assert "not a safetensors file" in found[1][1]


def test_no_damage_to_the_table_is_our_bug(single: Path) -> None:
    """Parquet readers raise many things; with a digest that agrees all of them are findings."""
    [key] = [key for key in manifest(single)["files"] if key.endswith(".parquet")]
    original = (single / key).read_bytes()
    refused = 0
    for place in range(0, len(original), 97):
        payload = bytearray(original)
        payload[place] ^= 0x10
        try:
            decode_tensors(bytes(payload))
        except CheckpointError:
            refused += 1
    assert refused > 10
    for place in (0, len(original) // 3, len(original) - 6):
        flip(single / key, place)
        endorse(single, key)
        assert {where for where, _ in findings(single)} <= {key, "model.safetensors", *receipts(single)}
        (single / key).write_bytes(original)
    for payload in (b"", b"PAR1", original[:-4]):
        (single / key).write_bytes(payload)
        endorse(single, key)
        [(where, problem)] = findings(single)
        assert (where, problem[:15]) == (key, "cannot be read:")


# ------------------------------------------------------------------------------------------------ the manifest


def test_edited_entries(single: Path) -> None:
    whole = manifest(single)["files"]["config.json"]

    edit_manifest(single, lambda fields: fields["files"]["config.json"].update(sha256="0" * 64))
    assert findings(single) == [("config.json", f"has sha256 {whole['sha256'][:16]}..., expected 0000000000000000...")]
    edit_manifest(single, lambda fields: fields["files"].update({"config.json": whole | {"size": 1}}))
    assert findings(single) == [("config.json", f"is {whole['size']:,} bytes long, expected 1")]
    edit_manifest(single, lambda fields: fields["files"].update({"config.json": whole, "../x": whole}))
    found = dict(findings(single))
    assert "leaves its folder" in found.pop("../x")
    assert found == {"manifest.json": "lists '../x', which the plan does not know"}


def test_a_shard_struck_from_the_manifest(sharded: Path) -> None:
    key = shards(sharded)[0]
    edit_manifest(sharded, lambda fields: fields["files"].pop(key))

    found = findings(sharded)

    assert (key, "is not in the manifest; remove it, or loaders may read it") in found
    assert ("manifest.json", f"does not list {key!r}, which the plan says was published") in found
    assert any(where == INDEX and key in problem for where, problem in found)


def test_any_file_struck_from_the_manifest(sharded: Path) -> None:
    """Also one that is no weight and gone from the folder: the plan knows what was published."""
    for key in manifest(sharded)["files"]:
        whole = (sharded / "manifest.json").read_bytes()
        edit_manifest(sharded, lambda fields, key=key: fields["files"].pop(key))

        assert ("manifest.json", f"does not list {key!r}, which the plan says was published") in findings(sharded)
        (sharded / "manifest.json").write_bytes(whole)


def test_a_plan_id_of_no_plan(single: Path) -> None:
    for forged in ("../../..", "0" * 63, "0" * 65, "A" * 64, ""):
        edit_manifest(single, partial(dict.update, plan_id=forged))

        [(where, problem)] = findings(single)

        assert where == "manifest.json"
        assert "which is no sha256" in problem


def test_a_plan_id_of_another_plan(single: Path) -> None:
    plan_id, forged = manifest(single)["plan_id"], "0" * 64
    edit_manifest(single, partial(dict.update, plan_id=forged))

    found = dict(findings(single))

    assert {f"_stockflow/{forged}/{name}" for name in ("plan.json", "tensors.parquet")} <= found.keys()
    assert "is a record of another run" in found[f"_stockflow/{plan_id}/receipts/model.safetensors.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(format="stockflow-manifest-2"),
        lambda fields: fields.pop("format"),
        lambda fields: fields.pop("files"),
        lambda fields: fields.update(extra=1),
        lambda fields: fields.update(files=[]),
        lambda fields: fields.update(files=None),
        lambda fields: fields.update(plan_id=5),
        lambda fields: fields["files"].update(a=None),
        lambda fields: fields["files"].update(a={"size": "1", "sha256": "0"}),
        lambda fields: fields["files"].update(a={"size": 1.5, "sha256": "0"}),
        lambda fields: fields["files"].update(a={"size": True, "sha256": "0"}),
        lambda fields: fields["files"].update(a={"size": -1, "sha256": "0"}),
        lambda fields: fields["files"].update(a={"size": 1, "sha256": 0}),
        lambda fields: fields["files"].update(a={"size": 1}),
        lambda fields: fields["inputs"].append({"url": 1, "files": {}}),
        lambda fields: fields["inputs"].append({"url": "x", "files": {"a": {"size": "1", "version": ""}}}),
        lambda fields: fields["inputs"].append({"url": "x"}),
    ],
)
def test_a_manifest_that_is_none_is_one_finding(single: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(single, change)

    [(where, problem)] = findings(single, inputs=True)

    assert where == "manifest.json"
    assert "is not a manifest of stockflow" in problem


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_one_finding(single: Path, payload: bytes) -> None:
    (single / "manifest.json").write_bytes(payload)

    [(where, _)] = findings(single)

    assert where == "manifest.json"


def test_without_a_manifest_there_is_no_output(single: Path) -> None:
    (single / "manifest.json").unlink()

    with pytest.raises(NotFoundError, match=r"has no manifest.json: it is not a finished output"):
        verified(single)


# -------------------------------------------------------------------------------------------------- the inputs


def test_inputs_that_changed_are_found_when_asked_for(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"a": (8, 8), "b": (8,)}, buffers=False, num_shards=2)
    output = tmp_path / "out"
    merge_here(write_recipe(tmp_path / "recipe.yaml", "model_stock", family), output)
    touched, removed = family.base / INDEX, family.tuned[0] / "model-00001-of-00002.safetensors"
    os.utime(touched, ns=(1, 1))
    removed.unlink()
    shutil.rmtree(family.tuned[1])

    found = dict(findings(output, inputs=True))

    assert findings(output) == []
    assert "changed since the merge" in found.pop(str(touched))
    assert "mtime_ns=1" in found.get(str(touched), "mtime_ns=1")
    assert "no such file" in found.pop(str(removed))
    assert {Path(where).parent for where in found} == {family.tuned[1]}
    assert all("no such file" in problem for problem in found.values())


# --------------------------------------------------------------------------------------------- the command line


def test_exit_4_with_one_line_per_finding(sharded: Path) -> None:
    first, second = shards(sharded)[:2]
    flip(sharded / first, -1)
    (sharded / second).unlink()

    result = runs.invoke("verify", sharded)
    as_json = runs.invoke("verify", sharded, "--json")

    assert result.exit_code == as_json.exit_code == 4
    progress = (result.stderr + as_json.stderr).splitlines()  # of a machine that is busy
    assert [line for line in progress if not line.startswith(("verifying", "checking"))] == []
    lines = result.stdout.splitlines()
    assert [first, second] == [line.partition(":")[0] for line in lines[:-2]]
    assert lines[-2] == f"2 findings in {sharded}"
    assert lines[-1].startswith("next: restore what is named above")
    stated = [Finding(**finding) for finding in json.loads(as_json.stdout)["findings"]]
    assert lines[:-2] == [str(finding) for finding in stated]


# -------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("layout", [pytest.param("single", marks=pytest.mark.slow), "sharded"])
def test_transformers_loads_the_output(merged: Merged, layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    output = getattr(merged, layout)

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype="auto", output_loading_info=True, local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(output, local_files_only=True)

    assert not any(report.values())
    stored = {name: tensor for shard in shards(output) for name, tensor in load_file(output / shard).items()}
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert tokenizer("stock")["input_ids"] == [1]
