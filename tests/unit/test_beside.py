"""Files beside the weights: each is copied, left out and said, or refused; of a whole folder tree."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import stockflow
from stockflow.checkpoints.files import tree
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.errors import LinkError, PlanError
from stockflow.storage import StorageConfig, open_store
from stockflow.text.remarks import Remark
from tests.checkpoints import SIDE_FILES, Family, make_family, write_checkpoint, write_recipe

TENSORS = {"a": torch.arange(6, dtype=torch.float32), "b": torch.arange(5, dtype=torch.float32)}
MODULES = json.dumps([{"path": "", "type": "custom_st.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}])
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4241003\n"
PAGE = "\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for key, content in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def opened(folder: Path) -> Checkpoint:
    [checkpoint] = open_checkpoints([open_store(str(folder), StorageConfig())])
    return checkpoint


def by_code(checkpoint: Checkpoint) -> dict[str, Remark]:
    return {remark.code: remark for remark in checkpoint.remarks}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", TENSORS, side_files=SIDE_FILES)


COPIED: dict[str, dict[str, str | bytes]] = {
    "templates": {"additional_chat_templates/tool_use.jinja": "{{ x }}", "additional_chat_templates/rag.jinja": ""},
    "a second tokenizer": {"decoder_tokenizer/tokenizer.json": "{}", "decoder_tokenizer/tokenizer_config.json": "{}"},
    "pooling": {"modules.json": MODULES, "1_Pooling/config.json": "{}", "custom_st.py": ""},
    "a tokenizer of a module": {
        "modules.json": json.dumps([{"path": "0_WordEmbeddings", "type": "x.WordEmbeddings"}]),
        "0_WordEmbeddings/wordembedding_config.json": "{}",
        "0_WordEmbeddings/whitespacetokenizer_config.json": "{}",
    },
    "the config of another library": {"open_clip_config.json": "{}", "gliner_config.json": "{}"},
    "speakers": {"spk_dict.pt": b"PK\x03\x04", "voices/a.pt": "1"},
    "the world's vocabulary": {"rwkv_vocab_v20230424.txt": "1 'a' 1"},
    "voices": {"speaker_embeddings_path.json": "{}", "speaker_embeddings/v2/en_speaker_0.npy": "1"},
    "a module within a module": {
        "modules.json": json.dumps([{"path": "0_Asym/", "type": "x.Asym"}]),
        "0_Asym/config.json": "{}",
        "0_Asym/query-0_Dense/config.json": "{}",
    },
}


@pytest.mark.parametrize("files", COPIED.values(), ids=COPIED)
def test_what_a_loader_looks_for_in_subfolders_is_copied(folder: Path, files: dict[str, str | bytes]) -> None:
    checkpoint = opened(write(folder, files))

    assert checkpoint.side_files.keys() == SIDE_FILES.keys() | files.keys()
    assert checkpoint.remarks == ()


def test_code_in_packages_is_copied_with_what_it_imports(tmp_path: Path) -> None:
    code: dict[str, str | bytes] = {
        "modeling/main.py": "from .layers.attention import Attention\nfrom ..shared import norms\nimport .rope",
        "modeling/__init__.py": "from . import extras as e",
        "modeling/layers/__init__.py": "", "modeling/rope.py": "",
        "modeling/layers/attention.py": "from .... import too_far",
        "modeling/extras.py": "from .deep.er import (\n  X,\n)", "modeling/deep/er.py": "", "shared/norms.py": "",
        "configuration_x.py": "",
    }  # fmt: skip
    others: dict[str, str | bytes] = {
        "modeling/unused.py": "",
        "shared/unused.py": "",
        "train.py": "",
        "too_far.py": "",
    }
    config = {"auto_map": {"AutoModel": "modeling/main.X", "AutoConfig": "configuration_x.C", "AutoOther": "../up.X"}}
    folder = write(write_checkpoint(tmp_path / "m", TENSORS, config=config), code | others)

    checkpoint = opened(folder)

    assert checkpoint.side_files.keys() == SIDE_FILES.keys() | code.keys()
    assert set(checkpoint.other_files) == others.keys()
    assert checkpoint.missing_files == ()


def test_code_that_imports_what_is_not_there_is_no_whole_model(tmp_path: Path) -> None:
    code: dict[str, str | bytes] = {
        "modeling_x.py": "from .rope_x import rope\nfrom . import __version__\nfrom .configuration_x import C",
        "configuration_x.py": "from transformers import PretrainedConfig\nimport .flags",
    }
    config = {"auto_map": {"AutoModel": "modeling_x.X"}}

    checkpoint = opened(write(write_checkpoint(tmp_path / "m", TENSORS, config=config), code))

    assert checkpoint.missing_files == ("rope_x.py", "flags.py")


@pytest.mark.parametrize("files", [{}, {"other.py": ""}], ids=["no code", "other code"])
def test_code_and_modules_that_are_named_in_vain_are_said(
    family: Family, tmp_path: Path, files: dict[str, str]
) -> None:
    references = ["modeling_x.X", "org/elsewhere--modeling_y.Y", "pkg.deep.Z", None]
    write(
        family.base,
        {"config.json": json.dumps({"auto_map": {"AutoModel": references}}), "modules.json": MODULES} | files,
    )
    (family.base / "1_Pooling").symlink_to(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    remarks = {remark.code: remark for remark in stockflow.plan(recipe, tmp_path / "out").plan.remarks}

    assert remarks["missing-files"].severity == "warning"
    names = "'1_Pooling', 'modeling_x.py', 'pkg/deep.py', 'custom_st.py', 'x.py'"
    assert remarks["missing-files"].values == {"names": names}


def test_a_vocabulary_that_code_opens_is_copied_with_it(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}),
        "tokenization_x.py": 'FILES = {"file": "words_2023.txt"}; OTHER = "config.json"', "words_2023.txt": "a",
    }  # fmt: skip
    folder = write(write_checkpoint(tmp_path / "m", TENSORS, side_files={}), {**files, "notes.txt": "mine"})

    assert opened(folder).side_files.keys() == files.keys()


def test_side_files_that_only_others_have_are_said(family: Family, tmp_path: Path) -> None:
    for model in family.tuned:
        write(model, {"chat_template.jinja": "{{ x }}", "LICENSE": "mine", "trainer_state.json": "{}"})
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    remarks = [each for each in stockflow.plan(recipe, tmp_path / "out").plan.remarks if each.code == "not-taken"]

    assert [(remark.severity, remark.models) for remark in remarks] == [("note", tuple(map(str, family.tuned)))]
    assert remarks[0].text.startswith("'LICENSE' of "), "the template is said by side-files-differ"


LEFT_OUT: dict[str, tuple[dict[str, str | bytes], str]] = {
    "pickle": ({"pytorch_model.bin": "12345", "m.bin.index.json": "{}"}, "2 files of weights in other formats (7 B)"),
    "other formats": (
        dict.fromkeys(
            ("model.pth", "m.gguf", "m.msgpack", "m.h5", "m.onnx", "m.ckpt", "m.tflite", "weights.npz", "model.pb"), "1"
        ),
        "9 files of weights in other formats (9 B)",
    ),
    "exports in folders": (
        {"onnx/model.onnx": "1", "onnx/config.json": "2", "openvino/openvino_model.xml": "3", "coreml/m/x": "4"},
        "4 files of weights in other formats (4 B)",
    ),
    "a trainer": (
        {
            "trainer_state.json": "1", "training_args.bin": "1", "optimizer.pt": "1", "scheduler.pt": "1",
            "rng_state_0.pth": "1", "zero_to_fp32.py": "1", "latest": "1", "events.out.tfevents.17.host": "1",
            "eval_results.json": "1", "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt": "1",
            "runs/Nov28/events.out.tfevents.1": "1", "wandb/run/secret.json": "1", "optimizer.safetensors": "1",
        },
        "13 files of training (13 B)",
    ),
    "checkpoints of the run": (
        {"checkpoint-500/model.safetensors": "1", "checkpoint-500/tokenizer.json": "{}"},
        "2 files of training (3 B)",
    ),
    "original": (
        {"original/params.json": "{}", "original/consolidated.00.pth": "1"},
        "1 file of weights in other formats (1 B), 1 file of the own layout of Mistral or Meta (2 B)",
    ),
    "Mistral's": (
        {"params.json": "{}", "consolidated.safetensors": "1", "figures/x.jpg": ""},
        "2 files of the own layout of Mistral or Meta (3 B)",
    ),
    "another index": (
        {"other.safetensors.index.json": "{}"},
        "as no loader of the output needs it, 1 file of indexes of weights that are not read (2 B)",
    ),
    "private": ({"id_rsa": "k", "notes/plan.txt": "secret", "tokenizer/id_rsa": "k"}, "3 files of no known kind (8 B)"),
    "no module": ({"1_Pooling/config.json": "{}"}, "1 file of no known kind (2 B)"),
    "no template": (
        {"additional_chat_templates/a/x.jinja": "1", "templates/x.jinja": "1"}, "2 files of no known kind (2 B)"
    ),
    "what nobody knows": (
        {"mel_stats.pth": "1", "voice.npy": "1"}, "m: 2 files of no known kind (2 B), which a loader may need or not",
    ),
    "licences of others": ({"vendored/LICENSE": "1"}, "1 file of no known kind (1 B)"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "said"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_no_loader_needs_stays_and_is_counted(folder: Path, files: dict[str, str | bytes], said: str) -> None:
    checkpoint = opened(write(folder, files))

    assert checkpoint.side_files.keys() == SIDE_FILES.keys()
    (remark,) = checkpoint.remarks
    assert (remark.code, remark.severity) == ("left-out", "note")
    assert said in remark.text
    assert remark.values["bytes"] == str(sum(len(content) for content in files.values()))


def test_a_trained_head_that_stays_behind_is_warned_of(folder: Path) -> None:
    checkpoint = opened(write(folder, {"model_head.pkl": "1", "config_setfit.json": "{}"}))

    (remark,) = checkpoint.remarks
    assert (remark.severity, remark.values) == ("warning", {"heads": "model_head.pkl"})
    assert checkpoint.side_files.keys() - SIDE_FILES.keys() == {"config_setfit.json"}


def test_a_folder_whose_name_no_store_takes_is_not_listed_and_said(folder: Path) -> None:
    write(folder, {"sub\ndir/x.txt": "1", "back\\slash/x.txt": "1"})

    (remark,) = opened(folder).remarks

    assert remark.values["not listed to the end"] == "back\\slash, sub\\ndir"
    assert "\n" not in remark.text


def test_hidden_files_pictures_and_what_an_output_has_of_its_own_are_no_matter(folder: Path) -> None:
    files: dict[str, str | bytes] = {
        ".gitattributes": "1", ".git/config": "1", ".cache/huggingface/x.lock": "1", "README.md": "1",
        "._model.safetensors": "1", "._model-00001-of-00002.safetensors": "1", "manifest.json": "{}",
        "_stockflow/claim.json": "{}", "1_Pooling/.env": "1", "mergekit_config.yml": "1",
        "figures/benchmark.jpg": "1", "assets/Report.PDF": "1", "logo.svg": "1", "README_zh.md": "1",
    }  # fmt: skip

    assert opened(write(folder, files)).remarks == ()


def test_weights_that_no_index_names_are_said_with_tensors_and_bytes(folder: Path) -> None:
    (folder / "draft").mkdir()
    save_file({"extra": torch.ones(3), "a": torch.ones(6)}, folder / "consolidated.safetensors")
    save_file({"q": torch.ones(1)}, folder / "adapter_model.safetensors")
    save_file({"deep": torch.ones(2), "a": torch.ones(2)}, folder / "draft" / "model.safetensors")
    write(folder, {"broken.safetensors": struct.pack("<Q", 10**9) + b"{"})

    remark = by_code(opened(folder))["unlisted-weights"]

    sizes = {path.name: path.stat().st_size for path in folder.rglob("*.safetensors")}
    assert remark.severity == "warning"
    assert dict(remark.values) == {
        "adapter_model.safetensors": f"1 tensor, {sizes['adapter_model.safetensors']} B",
        "broken.safetensors": "9 B, no header that can be read",
        "consolidated.safetensors": "2 tensors, "
        f"{sizes['consolidated.safetensors']} B; 1 of them under names that are merged",
        "draft/model.safetensors": f"2 tensors, {(folder / 'draft' / 'model.safetensors').stat().st_size} B; "
        "1 of them under names that are merged",
    }
    assert set(remark.tensors) == {"extra", "a", "q", "draft/a", "draft/deep"}
    assert "4 files of weights of " in remark.text


def test_the_weights_in_another_precision_are_a_note_and_others_that_are_called_so_a_warning(folder: Path) -> None:
    halves = {name: tensor.half() for name, tensor in TENSORS.items()}
    save_file({"a": halves["a"]}, folder / "model.fp16-00001-of-00002.safetensors")
    save_file({"b": halves["b"]}, folder / "model.fp16-00002-of-00002.safetensors")
    save_file(TENSORS, folder / "model.non_ema.safetensors")
    write(folder, {"model.safetensors.index.fp16.json": "{}"})

    (remark,) = opened(folder).remarks

    assert (remark.code, remark.severity) == ("left-out", "note")
    assert (
        "as no loader of the output needs it, 4 files of the weights in another precision or not averaged ("
        in remark.text
    )
    save_file(halves | {"c": torch.ones(1)}, folder / "model.bf16.safetensors")
    save_file(halves, folder / "model.ema.safetensors")
    assert opened(folder).remarks[0].values.keys() == {"model.bf16.safetensors", "model.ema.safetensors"}
    assert opened(folder).remarks[0].code == "unlisted-weights"


def test_what_python_compiled_is_of_a_known_kind(folder: Path) -> None:
    checkpoint = opened(write(folder, {"__pycache__/m.cpython-311.pyc": "1", "old.pyc": "1"}))

    assert checkpoint.other_files == ()
    assert "as no loader of the output needs it, 2 files of compiled Python (2 B)" in checkpoint.remarks[0].text


def test_many_subfolders_are_bounded_and_those_that_were_not_listed_are_said(folder: Path) -> None:
    write(folder, {f"aaa/{number}": "1" for number in range(tree.MAX_FILES + 1)})
    write(folder, {f"b{number:02}/x": "1" for number in range(tree.MAX_FOLDERS)})
    write(folder, {"additional_chat_templates/x.jinja": "1"})

    checkpoint = opened(folder)

    assert "additional_chat_templates/x.jinja" in checkpoint.side_files, "what loaders ask for is listed first"
    (remark,) = checkpoint.remarks
    assert remark.values["not listed to the end"] == "aaa, b30, b31"
    assert (
        "1,030 files of no known kind (1.03 kB), which a loader may need or not; 3 folders not listed to the end"
        in remark.text
    )


DAMAGE: dict[str, tuple[str, str | bytes, str]] = {
    "a pointer": ("tokenizer.json", POINTER, "is a git-lfs pointer, not the file it stands for; run `git lfs pull`"),
    "a binary's pointer": ("spiece.model", POINTER, "is a git-lfs pointer"),
    "a template's pointer": ("chat_template.jinja", POINTER, "is a git-lfs pointer"),
    "a page": ("tokenizer_config.json", PAGE, "is a web page, not the file; download the file itself"),
    "a binary's page": ("tokenizer.model", "<html>404</html>", "is a web page"),
    "half a JSON": ("tokenizer.json", '{"a": [1,', "is not valid JSON"),
    "what Rust does not read": ("tokenizer.json", '{"a": NaN}', "is not valid JSON"),
    "no JSON": ("generation_config.json", "oops", "is not valid JSON"),
    "a message of the hub": ("tokenizer.json", "Entry not found", "is the message of a server, not the file"),
    "an error of a store": ("LICENSE", "<?xml version='1.0'?><Error/>", "is an answer in XML"),
    "a packed one": ("vocab.json", b"\x1f\x8b\x08", "is compressed; unpack it first"),
    "zeros": ("spiece.model", bytes(100), "begins with zeros"),
    "a page after a mark": ("merges.txt", b"\xef\xbb\xbf<!DOCTYPE html>", "is a web page"),
    "a JSON text": ("added_tokens.json", '"Entry not found"', "is no JSON object"),
    "a key twice": ("special_tokens_map.json", '{"a": 1, "a": 2}', "is not valid JSON"),
    "bytes": ("vocab.json", b"\xff\xfe\x00", "is not valid JSON"),
    "nothing": ("added_tokens.json", "", "is empty: a download or copy did not finish"),
    "an empty binary": ("spiece.model", b"", "is empty"),
    "a large one cut": ("tokenizer.json", '{"a": "' + "x" * 2**20, "is not valid JSON, or its end is missing"),
    "a large page": ("tokenizer.json", PAGE + " " * 2**20, "is a web page"),
    "a large text": ("tokenizer.json", "error " * 2**18, "is not valid JSON, or its end is missing"),
    "a large list as a mapping": ("vocab.json", "[" + " " * 2**20 + "}", "is not valid JSON, or its end is missing"),
    "in a subfolder": ("additional_chat_templates/rag.jinja", POINTER, "is a git-lfs pointer"),
    "of a module": ("1_Pooling/config.json", PAGE, "is a web page"),
    "the list of modules": ("modules.json", PAGE, "is a web page"),
    "modules in a mapping": ("modules.json", '{"0": {"path": ""}}', "is no JSON list of modules"),
    "modules without paths": ("modules.json", '[{"path": null}]', "is no JSON list of modules"),
}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", 2, {"w": (4, 4)})


@pytest.mark.parametrize(("key", "content", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_that_would_be_copied_is_refused_until_accepted(
    family: Family, tmp_path: Path, key: str, content: str | bytes, said: str
) -> None:
    write(family.base, {"modules.json": MODULES, "1_Pooling/config.json": "{}"} | {key: content})
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    with pytest.raises(PlanError) as caught:
        stockflow.plan(recipe, tmp_path / "out")
    assert f"one problem:\n  {family.base}/{key} {said}" in str(caught.value)

    accepting = write_recipe(tmp_path / "r.yaml", "model_stock", family, stockflow={"accept": ["damaged-file"]})
    plan = stockflow.plan(accepting, tmp_path / "out").plan
    assert key not in {side.key for side in plan.side_files}
    assert "damaged-file" in {remark.code for remark in plan.remarks}


def test_files_that_are_not_copied_may_be_damaged(family: Family, tmp_path: Path) -> None:
    write(family.tuned[0], {"tokenizer.json": POINTER, "spiece.model": ""})
    write(family.base, {"pytorch_model.bin": POINTER, "notes.json": PAGE, "LICENSE": "", "merges.txt": ""})
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    plan = stockflow.plan(recipe, tmp_path / "out").plan

    assert {"LICENSE", "merges.txt", "tokenizer.json"} <= {side.key for side in plan.side_files}
    chosen = write_recipe(
        tmp_path / "r.yaml", "model_stock", family, stockflow={"side_files_from": str(family.tuned[0])}
    )
    with pytest.raises(PlanError, match=r"2 problems:\n.*tuned-1/spiece.model is empty"):
        stockflow.plan(chosen, tmp_path / "out")


def test_large_and_odd_files_that_are_whole_are_copied(family: Family, tmp_path: Path) -> None:
    whole: dict[str, str | bytes] = {
        "tokenizer.json": b'\xef\xbb\xbf{"a": "' + b"x" * 2**20 + b'"}\n\n', "vocab.json": "[" + "1," * 2**19 + "1]",
        "special_tokens_map.json": "[]", "tokenizer_config.json": '{"x": NaN}',
        "spiece.model": b"\x0a\x0e\x0a\x05<html>",
    }  # fmt: skip
    write(family.base, whole)

    plan = stockflow.plan(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out").plan

    assert whole.keys() <= {side.key for side in plan.side_files}


@pytest.mark.parametrize("target", ["nowhere", "../../secret.json"], ids=["broken", "outside"])
@pytest.mark.parametrize("key", ["1_Pooling/config.json", "additional_chat_templates/x.jinja", "tokenizer.json"])
def test_a_link_in_a_subfolder_is_refused_where_it_would_be_copied(folder: Path, key: str, target: str) -> None:
    write(folder, {"modules.json": MODULES})
    write(folder.parent.parent, {"secret.json": "{}"})
    path = folder / key
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)

    with pytest.raises(LinkError, match=key):
        opened(folder)


def test_links_that_no_loader_asks_for_do_not_matter(folder: Path) -> None:
    write(folder, {"notes/a.txt": "1"})
    (folder / "notes" / "b.txt").symlink_to("/etc/passwd")
    (folder / "elsewhere").symlink_to("/etc")
    (folder / "circle").symlink_to(".")

    checkpoint = opened(folder)

    assert set(checkpoint.other_files) == {"notes/a.txt", "notes/b.txt"}


def test_names_that_would_clash_in_an_output_are_not_copied(folder: Path) -> None:
    names = [
        "README.md",
        "manifest.json/x",
        "model.safetensors.index.json",
        "config.json",
        "model-00001-of-00002.safetensors",
    ]
    modules = [{"path": name, "type": "x.Pooling"} for name in names]
    write(
        folder,
        {"modules.json": json.dumps(modules)}
        | {f"{name}/config.json": "{}" for name in ("README.md", "manifest.json/x", names[4])},
    )

    checkpoint = opened(folder)

    assert set(checkpoint.omitted_side_files) == {
        "README.md/config.json", "manifest.json/x/config.json", "model-00001-of-00002.safetensors/config.json"
    }  # fmt: skip
    assert checkpoint.side_files.keys() == SIDE_FILES.keys() | {"modules.json"}
