"""``stockflow mergekit-yaml``: a merge by the options of mergekit's command, so that scripts move over."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypedDict, Unpack

import typer

from stockflow.cli.merging import merged
from stockflow.cli.options import Answer, Logging, OutputArgument, RecipeArgument, Serving, Told, check_order, command
from stockflow.errors import RecipeError
from stockflow.settings import MergeSettings, Setting, flag_of, num_bytes, settings_of

_ACCEPTED_CRIMES = ["architecture-differs"]
_NO_USE = "No use here: "
_BYTES = {"k": 10**3, "m": 10**6, "b": 10**9}


def shard_bytes(option: str, given: str | None) -> int | None:
    """Return a size as mergekit writes it, ``5B`` or ``500M``, in bytes, as mergekit counts them; others as given."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", (given or "").strip().lower())
    if found is None:
        return num_bytes(option, given)
    return int(float(found[1]) * _BYTES[found[2]])


def _flag(name: str, help: str, default: bool = False) -> Setting:
    return Setting(help, default, flag=f"--{name}/--no-{name}", rank=-1)


def _needless(name: str, why: str, metavar: str | None = None) -> Setting:
    """Return an option that is accepted; its help is what is said where it is given."""
    text = f"{_NO_USE}{why}."
    return Setting(text, metavar=metavar, flag=f"--{name}", rank=-1) if metavar else _flag(name, text)


class MergekitSettings(TypedDict, total=False):
    """What mergekit's command takes beside that."""

    allow_crimes: Annotated[bool, _flag("allow-crimes", "Accept models of several architectures.")]
    cuda: Annotated[bool, _flag("cuda", "As --device cuda.")]
    gpu_rich: Annotated[bool, _flag("gpu-rich", "As --device cuda.")]
    copy_tokenizer: Annotated[
        bool, _flag("copy-tokenizer", "Whether the tokenizer and its chat template are copied.", default=True)
    ]
    out_shard_size: Annotated[str | None, Setting(
        "Largest output shard, as 5B, 500M or 5GB: bytes.", metavar="SIZE", parse=shard_bytes, rank=-1
    )]  # fmt: skip
    safe_serialization: Annotated[bool, _flag("safe-serialization", "Nothing else is written.", default=True)]
    write_model_card: Annotated[bool, _flag("write-model-card", "One is written in any case.", default=True)]
    unsafe_truncate_embeddings: Annotated[bool, _flag("unsafe-truncate-embeddings", "Refused.")]
    async_write: Annotated[bool, _needless("async-write", "writing goes on beside merging in any case")]
    clone_tensors: Annotated[bool, _needless("clone-tensors", "a layer that is used twice is written twice anyway")]
    lazy_unpickle: Annotated[bool, _needless("lazy-unpickle", "inputs of all formats are read by ranges")]
    low_cpu_memory: Annotated[bool, _needless("low-cpu-memory", "--memory bounds the whole process")]
    multi_gpu: Annotated[bool, _needless("multi-gpu", "--executor ray --gpus-per-worker spreads a merge over GPUs")]
    read_to_gpu: Annotated[bool, _needless("read-to-gpu", "tensors go to the device as they are read")]
    trust_remote_code: Annotated[bool, _needless("trust-remote-code", "no code of a model is run")]
    lora_merge_cache: Annotated[
        str | None, _needless("lora-merge-cache", "adapters are added as models are read", "DIR")
    ]
    lora_merge_dtype: Annotated[
        str | None, _needless("lora-merge-dtype", "adapters are added in the working precision, rounded once", "DTYPE")
    ]
    transformers_cache: Annotated[
        str | None, _needless("transformers-cache", "models on the hub are read by ranges, without a copy", "DIR")
    ]
    write_threads: Annotated[
        str | None, _needless("write-threads", "shards are written as fast as they are merged", "NUMBER")
    ]


@command(MergeSettings, MergekitSettings, Logging, Serving, delays=False, resumes=True)
def mergekit_yaml(
    recipe: RecipeArgument,
    output: OutputArgument,
    told: Told,
    num_threads: Annotated[int | None, typer.Option("--num-threads", "-j", help="As --workers.", min=1)] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="No use here.")] = 0,
    **settings: Unpack[MergeSettings],
) -> Answer:
    """Merge as RECIPE says, by the options of mergekit-yaml: replace `mergekit-yaml` in scripts by this.

    It is `stockflow merge`, whose options it takes too. Options of mergekit that have no use here are accepted, each
    with a line that says why.
    """
    from stockflow.events import Note
    from stockflow.recipe import amended, recipe_of

    check_order(recipe, output)
    given: dict[str, Any] = dict(settings)
    theirs = {name: given.pop(name) for name in MergekitSettings.__annotations__ if name in given}
    for note in _without_use(theirs, verbose):
        told.on_event(Note(note))
    options = _under_stockflow(theirs)
    ours: Any = given | _said_otherwise(theirs, num_threads)
    return merged(amended(recipe_of(recipe), **options), output, told, ours)


def _without_use(theirs: Mapping[str, Any], verbose: int) -> Iterator[str]:
    for name, (_, setting) in settings_of(MergekitSettings).items():
        if theirs[name] and setting.help.startswith(_NO_USE):
            why = setting.help.removeprefix(_NO_USE).removesuffix(".")
            yield f"{flag_of(name, setting).partition('/')[0]} has no use here: {why}"
    if not theirs["write_model_card"]:
        yield "--no-write-model-card has no use here: a card is written in any case"
    if verbose:
        yield "--verbose has no use here: --progress and --log-level say how much is told"


def _under_stockflow(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what options of mergekit's are in a recipe.

    Raises:
        RecipeError: one asks for what is not done here.
    """
    if not theirs["safe_serialization"]:
        raise RecipeError("--no-safe-serialization: only safetensors are written; leave it out")
    if theirs["unsafe_truncate_embeddings"]:
        raise RecipeError(
            "--unsafe-truncate-embeddings would cut vocabularies that differ, whatever their ids mean; leave it out"
        )
    crimes = {"accept": _ACCEPTED_CRIMES} if theirs["allow_crimes"] else {}
    return crimes | ({} if theirs["copy_tokenizer"] else {"copy_tokenizer": False})


def _said_otherwise(theirs: Mapping[str, Any], num_threads: int | None) -> MergeSettings:
    """Return settings of a merge that options of mergekit's stand for."""
    found: MergeSettings = {}
    if theirs["cuda"] or theirs["gpu_rich"]:
        found["device"] = "cuda"
    if num_threads is not None:
        found["workers"] = num_threads
    if (size := shard_bytes("--out-shard-size", theirs["out_shard_size"])) is not None:
        found["shard_size"] = size
    return found
