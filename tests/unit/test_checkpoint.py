"""Opening a checkpoint: index and headers only, and every way a folder can contradict itself."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stockflow.checkpoints.beside.sorting import MAX_SIDE_FILE_BYTES
from stockflow.checkpoints.files.layout import FIRST_READ_BYTES
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.errors import CheckpointError, HeaderError, NotFoundError
from stockflow.storage import StorageConfig, open_store
from tests.checkpoints import BUFFERS, SIDE_FILES, ZOO, make_tensors, write_checkpoint

INDEX = "model.safetensors.index.json"
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.empty(0, 4, dtype=torch.float16),
}


def opened(folder: Path) -> Checkpoint:
    [checkpoint] = open_checkpoints([open_store(str(folder), StorageConfig())])
    return checkpoint


def sharded(folder: Path) -> Path:
    """Two shards: ``a`` and ``b`` in the first, ``c`` in the second."""
    folder.mkdir()
    save_file({name: TENSORS[name] for name in "ab"}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": TENSORS["c"]}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": 1, "b": 1, "c": 2})
    return folder


def write_index(folder: Path, shard_of: dict[str, int]) -> None:
    weight_map = {name: f"model-{number:05d}-of-00002.safetensors" for name, number in shard_of.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensor_bytes(folder: Path, checkpoint: Checkpoint, name: str) -> bytes:
    extent = checkpoint.extents[name]
    payload = (folder / extent.file).read_bytes()
    return payload[extent.start : extent.start + checkpoint.specs[name].num_bytes]


@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_every_tensor_is_found_where_its_bytes_are(tmp_path: Path, num_shards: int) -> None:
    tensors = {name: make_tensors(name, shape, 1)[0].to(torch.bfloat16) for name, shape in ZOO.items()} | BUFFERS
    folder = write_checkpoint(tmp_path / "m", tensors, num_shards=num_shards)

    checkpoint = opened(folder)

    assert checkpoint.specs.keys() == checkpoint.extents.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.specs[name].shape == tuple(tensor.shape)
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw == tensor_bytes(folder, checkpoint, name)
    assert checkpoint.url == str(folder)
    assert checkpoint.config == json.loads((folder / "config.json").read_text())


def test_stamps_are_those_of_the_weight_files_and_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")

    files = opened(folder).files

    assert files.keys() == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX}
    for name, stamp in files.items():
        assert stamp.size == (folder / name).stat().st_size
        assert str((folder / name).stat().st_mtime_ns) in stamp.version


def test_tensors_come_in_the_order_of_files_and_offsets(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")

    checkpoint = opened(folder)

    extents = [(checkpoint.extents[name].file, checkpoint.extents[name].start) for name in checkpoint.specs]
    assert extents == sorted(extents)
    assert list(checkpoint.specs)[-1] == "c"


@pytest.mark.parametrize("margin", [-64, 0, 1, 200_000])
def test_headers_around_and_beyond_the_first_read(tmp_path: Path, margin: int) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"x": torch.ones(3)}, folder / "model.safetensors", metadata={"pad": ""})
    header_size = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    pad = "p" * (FIRST_READ_BYTES - header_size + margin)
    save_file({"x": torch.ones(3)}, folder / "model.safetensors", metadata={"pad": pad})

    checkpoint = opened(folder)

    assert load_file(folder / "model.safetensors").keys() == checkpoint.specs.keys()
    assert torch.ones(3).numpy().tobytes() == tensor_bytes(folder, checkpoint, "x")


def test_side_files_are_what_makes_the_folder_usable(tmp_path: Path) -> None:
    extra = {"chat_template.jinja": "{{ x }}", "merges.txt": "a b", "LICENSE": "", "spiece.model": ""}
    left_out = {
        "README.md": "", ".gitattributes": "", "manifest.json": "{}", "pytorch_model.bin": "", "x.gguf": "",
        "pytorch_model.bin.index.json": "{}", "mergekit_config.yml": "",
    }  # fmt: skip
    folder = write_checkpoint(tmp_path / "m", TENSORS, side_files=SIDE_FILES | extra | left_out)
    (folder / "original").mkdir()
    (folder / "original" / "dtypes.json").write_text("{}")

    checkpoint = opened(folder)

    assert checkpoint.side_files.keys() == SIDE_FILES.keys() | extra.keys()
    assert checkpoint.omitted_side_files == ()
    assert checkpoint.other_files == ("original/dtypes.json",)


PRIVATE = (
    "id_rsa", "id_rsa.pub", ".env", "credentials", "notes.txt", "train.sh", "train.py", "deploy.py", "Makefile",
    "trainer_state.json", "training_args.bin", "optimizer.pt", "events.out.tfevents.1", "all_results.json",
    "wandb-summary.json", "license.key", "license_key.txt", "tokenizer.json.bak", "vocab.py", "dump.csv", "core",
    "my_tokenizer.json", "secrets.yaml", "runs.jsonl", "tokenizer_config.json~",
)  # fmt: skip


def test_nothing_is_copied_but_what_a_loader_needs(tmp_path: Path) -> None:
    """Whatever else lies in a working folder would be published with the model."""
    folder = write_checkpoint(tmp_path / "m", TENSORS, side_files=SIDE_FILES | dict.fromkeys(PRIVATE, "secret"))

    checkpoint = opened(folder)

    assert checkpoint.side_files.keys() == SIDE_FILES.keys()
    of_training = {
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "events.out.tfevents.1",
        "all_results.json",
    }
    left_out = {name for name in PRIVATE if not name.startswith(".")}
    assert set(checkpoint.other_files) == left_out - of_training
    (remark,) = checkpoint.remarks
    assert remark.values["training"] == ", ".join(sorted(of_training))
    assert remark.values["no known kind"] == f"{len(left_out - of_training)} files", "their names are not published"


def test_code_is_copied_where_the_configs_name_it_with_what_it_imports(tmp_path: Path) -> None:
    code = {
        "modeling_x.py": "import os\nfrom .layers import (\n  Layer,\n)\nfrom . import rope, norms as n\n",
        "configuration_x.py": "from transformers import PretrainedConfig\n",
        "layers.py": "    from .kernels_x import fused\nfrom .modeling_x import X  # a circle\n",
        "rope.py": "", "norms.py": "", "kernels_x.py": "import .deep\n", "deep.py": "\xff", "processing_x.py": "",
        "tokenization_x.py": "", "pipeline_x.py": "",
    }  # fmt: skip
    others = {"train.py": "from .modeling_x import X", "setup.py": "", "elsewhere.py": "", "os.py": "", "conf.py": ""}
    configs = {
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}}),
        "preprocessor_config.json": json.dumps({"auto_map": {"AutoProcessor": "processing_x.X"}}),
    }
    config = {
        "auto_map": {
            "AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X", "AutoModelForY": "org/y--elsewhere.Y",
        },
        "custom_pipelines": {"x": {"impl": "pipeline_x.XPipeline", "pt": ["AutoModel"]}},
        "note": "conf.X",
    }  # fmt: skip
    folder = write_checkpoint(tmp_path / "m", TENSORS, side_files=code | others | configs, config=config)

    checkpoint = opened(folder)

    assert checkpoint.side_files.keys() == code.keys() | configs.keys()
    assert set(checkpoint.other_files) == others.keys()


def test_a_side_file_beyond_64_mb_is_omitted_and_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS, side_files={})
    for name, size in (("vocab.json", MAX_SIDE_FILE_BYTES), ("tokenizer.json", MAX_SIDE_FILE_BYTES + 1)):
        with (folder / name).open("wb") as file:
            os.truncate(file.fileno(), size)

    checkpoint = opened(folder)

    assert list(checkpoint.side_files) == ["vocab.json"]
    assert checkpoint.omitted_side_files == ("tokenizer.json",)


def test_without_a_config_there_is_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    (folder / "config.json").unlink()

    assert opened(folder).config is None


def test_links_are_followed_as_the_hubs_cache_needs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    repository.mkdir()
    real = sharded(repository / "blobs")
    folder = repository / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for path in real.iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")

    assert opened(folder).specs.keys() == {"a", "b", "c"}


def test_several_checkpoints_are_opened_in_the_order_given(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / str(number), {f"t{number}": torch.ones(1)}) for number in range(5)]

    found = open_checkpoints([open_store(str(folder), StorageConfig()) for folder in folders])

    assert [f"t{number}" for number in range(5)] == [next(iter(checkpoint.specs)) for checkpoint in found]
    assert open_checkpoints([]) == []


# ---------------------------------------------------------------------------------------- not a checkpoint


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no checkpoint at .*nowhere: the folder does not exist"):
        opened(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(NotFoundError, match=f"{tmp_path}/file.* a file is where a folder should be"):
        opened(tmp_path / "file")


def test_a_folder_with_weights_in_another_format(tmp_path: Path) -> None:
    for name in ("model.ckpt", "x.gguf", "notes.txt"):
        (tmp_path / name).write_text("")

    with pytest.raises(NotFoundError, match=r"x.gguf is GGUF, which is .*; take the model it was made from"):
        opened(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")

    with pytest.raises(NotFoundError, match=r"it has 1 file but no weights; expected model.safetensors or "):
        opened(tmp_path)


# ---------------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        ".sub/model.safetensors",
        "",
        ".",
        "..",
        "a\\b",
        "a\0b",
        "./",
        "././a",
        1,
        None,
        ["a"],
    ],
)
def test_an_index_entry_that_leaves_the_folder(tmp_path: Path, file: object) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))

    with pytest.raises(CheckpointError, match=r"tensor 'a' is said to be in .*; expected the name of a file") as caught:
        opened(folder)

    assert str(folder / INDEX) in str(caught.value)


def test_an_index_may_name_files_from_its_own_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    whole = opened(folder)
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))

    again = opened(folder)

    assert (again.extents, again.remarks) == (whole.extents, whole.remarks)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"the index names model-00002-of-00002.safetensors, which is not there"):
        opened(folder)


def test_an_index_that_names_a_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").mkdir()

    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors, which is not there"):
        opened(folder)


def test_a_tensor_in_two_files_of_which_the_index_names_neither(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"c": TENSORS["c"], "a": TENSORS["a"]}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"b": 1, "c": 2})

    with pytest.raises(CheckpointError, match=r"'a' is in both model-00001-of-00002.* and model-00002-of-00002"):
        opened(folder)


@pytest.mark.parametrize(
    ("shard_of", "message"),
    [
        ({"a": 1, "b": 1, "c": 2, "x": 2}, "'x' is listed in model-00002-of-00002.safetensors but not there"),
        ({"a": 1, "c": 2}, "'b' is in model-00001-of-00002.safetensors but not listed"),
        ({"a": 1, "b": 2, "c": 2}, "'b' is listed in model-00002-of-00002.safetensors but not there"),
    ],
)
def test_index_and_headers_that_disagree(tmp_path: Path, shard_of: dict[str, int], message: str) -> None:
    folder = sharded(tmp_path / "m")
    write_index(folder, shard_of)

    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder)

    assert "disagree on 1 tensor:" in str(caught.value)


def test_disagreements_are_reported_together_first_twenty_then_the_count(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    write_index(folder, {"a": 1, "c": 2} | {f"x{number}": 2 for number in range(30)})

    with pytest.raises(CheckpointError, match="disagree on 31 tensors") as caught:
        opened(folder)

    lines = str(caught.value).splitlines()
    assert len(lines) == 23
    assert lines[-2].strip() == "... and 11 more"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "is empty: a download or copy did not finish"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\xfd", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"weight_map": {"a": 1' + b"0" * 5000 + b"}}", "is not valid JSON"),
        (b'{"weight_map": {"\\ud800": "a"}}', "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{}", "expected a mapping `weight_map`"),
        (b'{"weight_map": {}}', "expected a mapping `weight_map`"),
        (b'{"weight_map": ["a"]}', "expected a mapping `weight_map`"),
        (b'{"weight_map": null}', "expected a mapping `weight_map`"),
    ],
)
def test_a_malformed_index(tmp_path: Path, payload: bytes, message: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_bytes(payload)

    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder)

    assert str(folder / INDEX) in str(caught.value)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "is empty: a download or copy did not finish"),
        (b"{'a': 1}", "is not valid JSON"),
        (b'"llama"', "is not a JSON object"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"x": "\\udc00"}', "is not valid JSON"),  # it could not be written into the output again
    ],
)
def test_a_malformed_config(tmp_path: Path, payload: bytes, message: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "config.json").write_bytes(payload)

    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder)

    assert str(folder / "config.json") in str(caught.value)


def test_escapes_in_a_config_are_no_offence(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "config.json").write_bytes(b'{"x": "\\u00e9 \\ud83e\\udd17"}')

    assert opened(folder).config == {"x": "é 🤗"}


def test_a_malformed_header_names_its_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"x")

    with pytest.raises(HeaderError, match="has trailing bytes") as caught:
        opened(folder)

    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_truncated_file_names_itself(tmp_path: Path, size: int) -> None:
    folder = sharded(tmp_path / "m")
    path = folder / "model-00001-of-00002.safetensors"
    os.truncate(path, size)

    with pytest.raises(HeaderError, match=r"bytes long|truncated|header") as caught:
        opened(folder)

    assert str(path) in str(caught.value)
