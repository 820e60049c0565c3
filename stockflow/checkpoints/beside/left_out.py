"""Files of a model that stay behind: what they are, how much they hold, and what is said of them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from stockflow.checkpoints.beside.side_files import MISTRAL_CONFIG
from stockflow.checkpoints.files.candidates import PRECISIONS, SUFFIXES, naming_of
from stockflow.checkpoints.files.header import PlacedTensor
from stockflow.checkpoints.files.layout import folder_of
from stockflow.checkpoints.files.tree import Tree, is_hidden
from stockflow.storage import Stamp
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted, gb

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".onnx.data", ".pb", ".npz", ".npy", ".pkl", ".tar", ".tflite", ".mlmodel", ".nemo", ".distcp", ".pdparams",
    ".index.json",
)  # fmt: skip
_OF_ANYTHING = (".bin", ".pt", ".pth", ".pb", ".npz", ".npy", ".pkl", ".tar")
"""Those of files that hold whatever a library puts there: weights only by their names."""
REPLACED = ("config.json", "README.md", "manifest.json", "mergekit_config.yml")
"""Files that an output has of its own."""
MAX_TENSORS = 10_000
"""names of tensors that one remark holds"""

_HEAD = re.compile(r"model_head\.(pkl|joblib)")
OTHERS = "no known kind"
VARIANTS = "the weights in another precision or not averaged"
LIBRARYS = "the own layout of Mistral or Meta"
_VARIANTS = {*PRECISIONS, "non_ema"}
_FOR_READERS = re.compile(r".+\.(jpe?g|png|gif|svg|webp|bmp|ico|pdf|mp4|webm|mov|md|bib|cff)", re.IGNORECASE)
"""Pictures and texts, which no loader opens: what a loader does open, such as code's files, is told before."""
_KINDS: Mapping[str, re.Pattern[str]] = {
    "training": re.compile(
        r"(.+/)?((trainer_state|(all|train|eval|test|predict)_results)\.json|training_args\.(bin|json)|zero_to_fp32\.py"
        r"|latest|events\.out\.tfevents\..+|(optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth|safetensors)"
        r"|[^/]*_(optim|model)_states\.pt)|(.+/)?(checkpoint-\d+|global_step\d+|runs|wandb|logs)/.+"
    ),
    LIBRARYS: re.compile(r"(original/)?params\.json|consolidated([-.][^/]*)?\.safetensors(\.index\.json)?"),
    "indexes of weights that are not read": re.compile(r"(.+/)?[^/]*\.safetensors\.index\.json"),
    "weights in other formats": re.compile(
        r"(.+/)?(onnx|openvino|coreml|tflite|saved_model)/.+"
        rf"|(.+/)?[^/]*(model|consolidated|weights)[^/]*({'|'.join(map(re.escape, _OF_ANYTHING))})"
        rf"|.+({'|'.join(re.escape(each) for each in WEIGHT_SUFFIXES[1:] if each not in _OF_ANYTHING)})"
    ),
    "compiled Python": re.compile(r"(.+/)?__pycache__/.+|.+\.py[co]"),
}


def kind_of(key: str) -> str:
    """Return what a file that stays behind is of, in words."""
    if is_variant(key):
        return VARIANTS
    return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(key)), OTHERS)


def is_variant(key: str) -> bool:
    """Whether a file is called as weights in another precision are: ``model.fp16.safetensors``, or their index."""
    said = naming_of(key.rpartition("/")[2])
    return said is not None and said.suffix == SUFFIXES[0] and said.variant in _VARIANTS


def strays(tree: Tree, used: Collection[str]) -> list[str]:
    """Return the keys of weights in safetensors that are not merged, those of training and Mistral's library left out.

    What is called as that library calls its weights is its own where its config is there.
    """
    seen = (key for key in tree.files if key.endswith(".safetensors") and key not in used and not is_hidden(key))
    asked = {OTHERS, VARIANTS} if MISTRAL_CONFIG in tree.files else {OTHERS, VARIANTS, LIBRARYS}
    return [key for key in seen if kind_of(key) in asked]


def are_again(key: str, placed: Sequence[PlacedTensor] | None, merged: Collection[str]) -> bool:
    """Whether a file is a variant of the weights, and all that it holds is merged under its names."""
    return is_variant(key) and bool(placed) and all(each.spec.name in merged for each in placed or ())


def left_out(tree: Tree, used: Collection[str]) -> dict[str, Stamp]:
    """Return what stays behind; hidden files, pictures and texts, and what an output has of its own are not counted.

    Args:
        tree: the model's folder.
        used: what is merged, read or copied, and weights that are spoken of by themselves.
    """
    return {
        key: stamp
        for key, stamp in tree.files.items()
        if key not in used and key not in REPLACED and not is_hidden(key) and not _FOR_READERS.fullmatch(key)
    }


def files_remark(where: str, files: Mapping[str, Stamp], cut: Iterable[str]) -> Iterator[Remark]:
    """Yield how many files stay behind, and a trained head among them.

    Names of those of no known kind are nobody's business who reads the output.
    """
    by_kind: dict[str, list[str]] = {}
    heads = [key for key in files if _HEAD.fullmatch(key)]
    for key in (key for key in files if key not in heads):
        by_kind.setdefault(kind_of(key), []).append(key)
    cut = list(cut)
    if heads:
        said = some(heads, quote=in_a_line)
        text = (
            f"{said} of {where} stays behind: the classifier that SetFit trained on its embeddings, a "
            "pickle of scikit-learn that no merge reads. Loaded without, the output has an untrained one: train it anew"
        )
        yield Remark("left-out", text, "warning", (where,), values={"heads": said})
    if not by_kind and not cut:
        return
    counts = {
        kind: f"{counted(len(keys), 'file')} of {kind} ({gb(_size(files, keys))})" for kind, keys in by_kind.items()
    }
    parts = [f"{counts.pop(OTHERS)}, which a loader may need or not"] if OTHERS in counts else []
    if counts:
        parts.append(f"as no loader of the output needs it, {', '.join(counts.values())}")
    if cut:
        parts.append(f"{counted(len(cut), 'folder')} not listed to the end ({some(cut, quote=in_a_line)})")
    values = {
        kind: some(keys, quote=in_a_line) if kind != OTHERS else counted(len(keys), "file")
        for kind, keys in by_kind.items()
    }
    values |= {"bytes": f"{_size(files, chain(*by_kind.values())):,}"} | (
        {"not listed to the end": some(cut, quote=in_a_line)} if cut else {}
    )
    text = f"left out of {where}: {'; '.join(parts)}"
    yield Remark("left-out", text, "note", (where,), values=values)


def weights_remark(
    where: str, files: Mapping[str, tuple[Stamp, list[PlacedTensor] | None]], merged: Collection[str]
) -> Iterator[Remark]:
    """Yield which weights are not merged although loaders could read them.

    Args:
        where: the model.
        files: size, and tensors if its header could be read, of each of them.
        merged: names of the tensors that are merged.
    """
    if not files:
        return
    values = {key: _words(key, stamp, placed, merged) for key, (stamp, placed) in files.items()}
    names = [each.spec.name for _, placed in files.values() for each in placed or ()]
    listed = some([f"{in_a_line(key)} ({words})" for key, words in values.items()], quote=str)
    text = (
        f"{counted(len(files), 'file')} of weights of {where} {are(len(files))} left out, as neither its index nor "
        f"modules.json names {'it' if len(files) == 1 else 'them'}: {listed}"
    )
    yield Remark("unlisted-weights", text, "warning", (where,), tuple(names[:MAX_TENSORS]), values)


def _words(key: str, stamp: Stamp, placed: list[PlacedTensor] | None, merged: Collection[str]) -> str:
    if placed is None:
        return f"{gb(stamp.size)}, no header that can be read"
    folder = f"{folder_of(key)}/"
    again = sum(each.spec.name.removeprefix(folder) in merged for each in placed)
    said = f"; {again:,} of them under names that are merged" if again else ""
    return f"{counted(len(placed), 'tensor')}, {gb(stamp.size)}{said}"


def _size(files: Mapping[str, Stamp], keys: Iterable[str]) -> int:
    return sum(files[key].size for key in keys)
