"""Folders that are no checkpoint: what they are instead, and the next step."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from stockflow.checkpoints.adapters.factors import OF_DIFFUSERS
from stockflow.checkpoints.files.candidates import (
    INDEX_FILE,
    SINGLE_FILE,
    SUFFIXES,
    Group,
    alike_but_for_a_number,
    groups_of,
    lacking,
    naming_of,
    parts_of_ranks,
    parts_of_savers,
)
from stockflow.checkpoints.files.disguises import disguise_of
from stockflow.checkpoints.files.documents import read_json
from stockflow.checkpoints.files.parts import OF_RANKS, OF_SAVERS, hold_the_same
from stockflow.errors import CheckpointError, NotFoundError
from stockflow.storage import Stamp, Store, redact, scheme_of
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.redaction import command_line
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

MAX_DESCRIPTION_BYTES = 1_000_000
NUM_NAMED = 4

_STEP = re.compile(r"(?:checkpoint|global_?step|step|epoch|iter)[-_]?(\d{1,18})", re.IGNORECASE)
_TO_SAFETENSORS = "convert it: load it with transformers and `save_pretrained(folder, safe_serialization=True)`"
_OF_OTHERS = (
    "which are not read; convert them: load them with transformers 4 as the class that config.json names, "
    "`from_pretrained(folder, from_{}=True)`, and save that with `save_pretrained(other_folder)`"
)
"""Transformers 5 reads none of them; another class than the model's own would leave out its head."""
_MADE_FROM = "take the model it was made from"
_PICKLES = re.compile(
    r"(?!optimizer|scheduler|scaler|training_args|r(ng|andom)_state|openvino_|ggml|params_shard_).+\.(bin|pt|pth|ckpt|pkl)",
    re.IGNORECASE,
)
_STARTS_OF_PICKLES = (b"PK", b"\x80", b"\x1f\x8b")
"""Of zip archives, of pickles, of what gzip made."""
NUM_HEAD_BYTES = 64
_FORMATS: tuple[tuple[str, str], ...] = (
    (
        r".+\.distcp",
        "of a distributed checkpoint of PyTorch (DCP), and its .metadata is not there; fetch it",
    ),
    (r"openvino(_.*\.(bin|xml))?", f"compiled by OpenVINO; {_MADE_FROM}"),
    (r"ggml.*\.bin", f"of whisper.cpp or llama.cpp, which is for inference; {_MADE_FROM}"),
    (r"params_shard_\d+\.bin", f"compiled for MLC; {_MADE_FROM}"),
    (
        r"_CHECKPOINT_METADATA|manifest\.ocdbt",
        "a checkpoint of Orbax (JAX), which is not read; export it to Hugging Face's layout",
    ),
    (r".+\.ot", f"the Rust port's weights, which are not read; {_MADE_FROM}"),
    (r".+\.gguf", f"GGUF, which is for inference and lost precision; {_MADE_FROM}"),
    (
        _PICKLES.pattern,
        "PyTorch's pickles, which are read if they are called pytorch_model.bin, or as shards of it are, or named: "
        f"name the file if it holds the weights of a model, else {_TO_SAFETENSORS}",
    ),
    (r"tf_model.*\.h5", f"TensorFlow's weights, {_OF_OTHERS.format('tf')}"),
    (r".+\.(h5|keras)", "Keras' weights, which are not read; export the model to Hugging Face's layout with KerasHub"),
    (r".+\.msgpack", f"Flax' weights, {_OF_OTHERS.format('flax')}"),
    (r"(.+\.)?onnx(_data)?", f"ONNX, which is for inference; {_MADE_FROM}"),
    (r".+\.nemo", "a NeMo archive, which is not read; export it to Hugging Face's layout with NeMo"),
    (r".+\.npz", "NumPy's arrays, which are not read; write them as safetensors"),
    (r"saved_model\.pb", f"TensorFlow's, which is not read; {_MADE_FROM}"),
    (r".+\.(engine|plan)", f"compiled for one GPU by TensorRT; {_MADE_FROM}"),
    (r".+\.(parquet|arrow|jsonl)|dataset_infos?\.json", "of a data set, no model"),
    (r".+\.(tar|tgz|zip|zst|gz)", "an archive; unpack it first"),
)
"""Whole names of files by what they are, and what to do."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder without a checkpoint."""

    store: Store
    files: Mapping[str, Stamp]
    folders: Sequence[str]
    groups: Sequence[Group]

    @property
    def where(self) -> str:
        return self.store.where()


def nothing_here(store: Store, files: Mapping[str, Stamp], folders: Sequence[str]) -> str:
    """Return why a folder, or the file that was named, is no checkpoint, and what to do."""
    if store.only and store.only not in files:
        return f"there is no checkpoint at {redact(store.url)}: there is no such file; check the name"
    if store.only and any(group.single == store.only for group in parts_of_ranks(groups_of(files))):
        return f"there is no checkpoint at {redact(store.url)}: {OF_RANKS}"
    if store.only:
        naming = naming_of(store.only)
        if naming and any(group.stem == naming.stem for group in parts_of_savers(groups_of(files))):
            return f"there is no checkpoint at {redact(store.url)}: {OF_SAVERS}"
        number = f"it is one of {naming.total} files of a model" if naming and naming.number else "it is no model"
        return f"there is no checkpoint at {redact(store.url)}: {number}; name its folder, {store.where()}"
    place = _Place(store, files, folders, groups_of(files))
    reasons = (reason for look in _LOOKS for reason in look(place))
    return f"there is no checkpoint at {place.where}: {next(reasons)}"


def no_folder(url: str) -> str:
    """Return what a file is that was named in place of a model's folder, and what to do; empty if nothing is known."""
    name = url.rpartition("/")[2]
    said = next((said for pattern, said in _FORMATS if re.fullmatch(pattern, name, re.IGNORECASE)), "")
    return said and f"there is no checkpoint at {url}: it is {said}"


def _nothing(place: _Place) -> Iterator[str]:
    if place.files or place.folders:
        return
    url = place.store.url
    if scheme_of(url) != "file" and url.endswith((".gguf", ".json")):
        yield "it names a file; give the folder it is in"
    if "*" in url:
        yield "no wildcards are read; name each model by itself"
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    here = os.getcwd()
    relative = f" (a relative path counts from {here})" if url.startswith(f"{here}/") else ""
    unseen = "" if scheme_of(url) == "file" else " (keys with an empty, `.` or `..` segment are not seen)"
    what = "there is no such file" if url.endswith(SUFFIXES) else "the folder does not exist or is empty"
    yield f"{what}{relative}{unseen}; {expected}"


def _adapter(place: _Place) -> Iterator[str]:
    names = [name for name in place.files if name.startswith(("adapter_model.", "pytorch_lora_weights."))]
    if "adapter_config.json" not in place.files and not names:
        return
    base = _said(place, "adapter_config.json").get("base_model_name_or_path")
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    named = f"name its base with it: `model: BASE+{in_a_line(place.where)}`"
    fused = f"it is not PEFT's, whose alone are read: put it into the weights with what made it ({OF_DIFFUSERS})"
    yield f"it holds an adapter{of}, no model; {named if 'adapter_config.json' in place.files else fused}"


def _pipeline(place: _Place) -> Iterator[str]:
    if "model_index.json" not in place.files:
        return
    parts = [name for name, kind in _said(place, "model_index.json").items() if isinstance(kind, list)]
    there = _some([name for name in parts if name in place.folders]) or "none of its folders is there"
    yield f"it is a diffusers pipeline whose parts ({there}) have no weights; its download or copy did not finish"


def _own_layout(place: _Place) -> Iterator[str]:
    names = [name for name in place.files if name.startswith("consolidated")]
    if not names:
        return
    alone = [name for name in names if name.endswith(".safetensors") and "-of-" not in name]
    how = f"; or, if all models are like it, name the file: {place.where}/{in_a_line(alone[0])}" if alone else ""
    yield (
        f"{in_a_line(names[0])} is in the layout of Mistral or Meta, not of transformers; take the repository's "
        f"transformers weights, or convert it (transformers: convert_*_weights_to_hf.py){how}"
    )


def _incomplete(place: _Place) -> Iterator[str]:
    for lack in lacking(place.groups):
        yield f"{lack}, and there is no index; fetch them"


def _ranks(place: _Place) -> Iterator[str]:
    if parts := parts_of_ranks(place.groups):
        yield f"{_some([str(group) for group in parts])}: {OF_RANKS}"


def _savers(place: _Place) -> Iterator[str]:
    if parts := parts_of_savers(place.groups):
        yield f"{_some([str(group) for group in parts])}: {OF_SAVERS}"


def _several(place: _Place) -> Iterator[str]:
    for group in place.groups:
        if len(group.shards) > 1 and not group.single and not group.index:
            counts = " and of ".join(map(str, sorted(group.shards)))
            yield f"it has numbered files of {counts}, like {group}, and no index; move those away that are not meant"
    if place.groups:
        them = _some([str(group) for group in place.groups])
        if len(place.groups) == 1:
            yield f"its only weights, {them}, are not those of a model by their name; name the file itself if they are"
        files = [group.single for group in place.groups if group.single]
        same = hold_the_same(place.store, files)
        if same and any(alike_but_for_a_number(file, files) for file in files):
            yield f"{them} hold tensors of the same names: {OF_RANKS}"
        parts = ". They hold the same names: one that has a part of every matrix is no model" if same else ""
        yield f"it has several weights, {them}, and none is {SINGLE_FILE}; name the file that is meant{parts}"


def _megatron(place: _Place) -> Iterator[str]:
    if any(name.startswith("mp_rank_") for name in place.folders) or "latest_checkpointed_iteration.txt" in place.files:
        yield "it is a checkpoint of Megatron, which is not read; convert it to Hugging Face's layout with its tools"


def _steps(place: _Place) -> Iterator[str]:
    found = [(int(match[1]), name) for name in place.folders if (match := _STEP.fullmatch(name))]
    if not found:
        return
    found.sort()
    names = ", ".join(name for _, name in found[-NUM_NAMED:])
    before = f"{len(found) - NUM_NAMED} more and " if len(found) > NUM_NAMED else ""
    if any(name.startswith("global_step") for _, name in found):
        yield (
            f"it is a checkpoint of DeepSpeed ({before}{names}), whose weights are in parts; gather them with "
            f"`{command_line('python', '-m', 'deepspeed.utils.zero_to_fp32', place.where)} OUTPUT --safe_serialization`"
        )
    yield f"it is the folder of a run ({before}{names}); name one of them, the newest is {place.where}/{found[-1][1]}"


def _cache(place: _Place) -> Iterator[str]:
    models = [name.removeprefix("models--").replace("--", "/") for name in place.folders if name.startswith("models--")]
    if models:
        yield f"it is the hub's cache, of {_some(models)}; name one as org/name, or its folder models--org--name"


def _sharded_training(place: _Place) -> Iterator[str]:
    parts = [name for name in place.folders if name.startswith("pytorch_model_fsdp")]
    if parts:
        yield (
            f"{in_a_line(parts[0])} holds the weights in FSDP's parts; name it, {place.store.where(parts[0])}, or "
            f"gather them with `{command_line('accelerate', 'merge-weights', place.store.where(parts[0]))} OUTPUT`"
        )


def _no_pickle(place: _Place) -> Iterator[str]:
    """Yield what files of other libraries are that have the names of PyTorch's, by their first bytes."""
    for name in filter(_PICKLES.fullmatch, place.files):
        head, _ = place.store.read_head(name, NUM_HEAD_BYTES)
        if len(head) == NUM_HEAD_BYTES and not disguise_of(head, len(head)) and not head.startswith(_STARTS_OF_PICKLES):
            of = "CTranslate2 (faster-whisper)" if b"Spec" in head else "another library"
            yield f"{in_a_line(name)} is of {of} by its first bytes, none of PyTorch; take the model it was made from"


def _other_format(place: _Place) -> Iterator[str]:
    for pattern, said in _FORMATS:
        names = [name for name in (*place.files, *place.folders) if re.fullmatch(pattern, name, re.IGNORECASE)]
        if names:
            which = some(names, 1, in_a_line)
            yield f"{which} {are(len(names))} {said}"


def _below(place: _Place) -> Iterator[str]:
    if place.folders and not any(name.endswith(".json") for name in place.files):
        count = counted(len(place.folders), "folder")
        yield f"it has no weights, and {count} ({_some(place.folders)}); name the one with the model"


def _no_weights(place: _Place) -> Iterator[str]:
    below = f" and {counted(len(place.folders), 'folder')} ({_some(place.folders)})" if place.folders else ""
    yield (
        f"it has {counted(len(place.files), 'file')}{below} but no weights; expected {SINGLE_FILE} or {INDEX_FILE}. "
        "If this is where the model should be, its download or copy did not finish"
    )


_LOOKS: tuple[Callable[[_Place], Iterator[str]], ...] = (
    _nothing, _adapter, _pipeline, _ranks, _savers, _own_layout, _incomplete, _several, _megatron, _steps, _cache,
    _sharded_training, _no_pickle, _other_format, _below, _no_weights,
)  # fmt: skip
"""The first that has something to say decides."""


def _some(names: Sequence[str]) -> str:
    return some(names, NUM_NAMED, in_a_line)


def _said(place: _Place, key: str) -> Mapping[str, object]:
    with suppress(CheckpointError, NotFoundError):
        return read_json(place.store, key, MAX_DESCRIPTION_BYTES)
    return {}
