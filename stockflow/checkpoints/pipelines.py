"""Pipelines of diffusers: the components that ``model_index.json`` names, and the weights in their folders.

Source: ``DiffusionPipeline.from_pretrained``, https://huggingface.co/docs/diffusers/using-diffusers/loading
"""

import re
from collections.abc import Iterator, Mapping

from stockflow.checkpoints.files.candidates import DIFFUSION_STEM, chosen_of, groups_of, lacking
from stockflow.checkpoints.files.documents import find_json, is_file_name
from stockflow.checkpoints.files.layout import folder_of
from stockflow.checkpoints.files.tree import Tree, is_hidden
from stockflow.checkpoints.modules import Modules
from stockflow.errors import CheckpointError
from stockflow.storage import Store
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

PIPELINE_FILE = "model_index.json"
_SCHEDULER_FILE = "scheduler/scheduler_config.json"
_MAX_SCHEDULER_BYTES = 1_000_000
_PREDICTS = re.compile(r".*(UNet|Transformer|DiT).*")
"""Classes of components whose output a scheduler takes for a step."""
_UNREAD = re.compile(r".+\.(pt|pth|ckpt|msgpack|h5|onnx|onnx_data|gguf|pb|tflite|pdparams)", re.IGNORECASE)
"""Weights in other formats."""


def find_pipeline(tree: Tree, document: object, where: str) -> Modules | None:
    """Return the components of a pipeline; None if it is none, or no component has weights that are read.

    Args:
        tree: what lies in its folder.
        document: what ``model_index.json`` says; None where it is not there, or cannot be read.
        where: the model, for messages.

    Raises:
        CheckpointError: a name leaves the folder, or weights of a component are not all there.
    """
    types = dict(_components(document, where))
    folders = tuple(folder for folder in types if tree.below(folder))
    weights = tuple(key for folder in folders for key in _weights_of(tree, folder, where))
    if not weights:
        return None
    references = tuple(f"{folder}/{name}" for folder, name in types.items())
    missing = tuple(folder for folder in types if folder not in folders and folder not in tree.cut)
    return Modules(folders, references, weights, missing, PIPELINE_FILE)


def pipeline_remark(components: Modules, where: str) -> Remark:
    """Return which components are merged, and which are copied."""
    merged = list(dict.fromkeys(map(folder_of, components.weights)))
    copied = [folder for folder in components.folders if folder not in merged]
    rest = f"; {', '.join(copied)} copied" if copied else ""
    text = f"{where} is a diffusers pipeline: {', '.join(merged)} merged, each in its folder{rest}"
    return Remark("weights-chosen", text, "note", (where,))


def pipeline_around(url: str, files: Mapping[str, object], config: Mapping[str, object] | None) -> str:
    """Return where the pipeline may lie of a model that is its component which predicts; empty: it is none."""
    folder, _, last = url.rpartition("/")
    folder = folder.rpartition("/")[0] if last in files else folder
    is_component = any(file.startswith(DIFFUSION_STEM) for file in files)
    of_one_model = not url.startswith("hf://") or folder.count("/") > len("//")
    is_asked = is_component and of_one_model and _PREDICTS.fullmatch(str((config or {}).get("_class_name", "")))
    return folder if is_asked else ""


def predicted_by(pipeline: Store) -> str:
    """Return what the scheduler of a pipeline takes from its model; empty: that is not said.

    Raises:
        NotFoundError: there is no pipeline, or it has no scheduler.
    """
    said = find_json(pipeline, _SCHEDULER_FILE, _MAX_SCHEDULER_BYTES)
    if not isinstance(said, dict) or not isinstance(name := said.get("_class_name"), str):
        return ""
    usual = "flow_prediction" if name.startswith("FlowMatch") or said.get("use_flow_sigmas") is True else "epsilon"
    return str(said.get("prediction_type") or usual)


def _components(document: object, where: str) -> Iterator[tuple[str, str]]:
    """Yield folder and class of each component that is used."""
    for name, value in document.items() if isinstance(document, dict) else ():
        is_class = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
        if not is_class or name.startswith("_"):
            continue
        if not is_file_name(name) or is_hidden(name):
            raise CheckpointError(f"{where}/{PIPELINE_FILE} names the component {shown(name)}, which is no folder")
        yield name, ".".join(value)


def _weights_of(tree: Tree, folder: str, where: str) -> tuple[str, ...]:
    """Return the weights of a component: those that diffusers finds, else the only ones."""
    names = [name for key in tree.below(folder) if "/" not in (name := key.removeprefix(f"{folder}/"))]
    groups = groups_of(names)
    unread = [name for name in names if _UNREAD.fullmatch(name)]
    if unread and not groups:
        raise CheckpointError(
            f"{where}/{folder}: its only weights, {in_a_line(unread[0])}, are in a format that is not read; save the "
            "component as safetensors beside them"
        )
    group = chosen_of(groups)
    files = (group.single,) if group and group.single else group.complete if group else ()
    if groups and not files:
        problem = next(lacking(groups), f"{groups[0]} and {len(groups) - 1} more may be meant")
        if group is not None:
            problem = f"{group} names files that are not all there"
        raise CheckpointError(f"{where}/{folder}: {problem}; fetch the component again, or leave in it what is meant")
    return tuple(f"{folder}/{file}" for file in files)
