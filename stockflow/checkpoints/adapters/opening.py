"""Adapters: a checkpoint with what a LoRA adapter adds to its tensors, as one checkpoint that nobody has written."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from stockflow.checkpoints.adapters.config import CONFIG_KEY, WEIGHTS_KEY, AdapterConfig, parse_adapter_config
from stockflow.checkpoints.adapters.keys import place_of
from stockflow.checkpoints.adapters.stacks import one_by_one
from stockflow.checkpoints.beside.side_files import is_tokenizer_or_template
from stockflow.checkpoints.files.documents import read_json
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent, HeaderCache, OnFile, read_header
from stockflow.checkpoints.tokens.vocabularies import FORMS
from stockflow.checkpoints.values import as_numbers
from stockflow.errors import CheckpointError, NotFoundError
from stockflow.storage import Stamp, Store, key_of_adapter
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

_WEIGHTS = (WEIGHTS_KEY, "adapter_model.bin")
"""The first that is there is read."""
MAX_CONFIG_BYTES = 4_000_000
MAX_PROBE_BYTES = 65_536
"""Of the first, the middle and the last factor B."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it lies in its folder."""

    where: str
    """what it is called in messages"""
    config: AdapterConfig
    specs: Mapping[str, TensorSpec]
    """by key"""
    extents: Mapping[str, Extent]
    """by key; the files as they are called in the place of model and adapter together"""
    files: Mapping[str, Stamp]
    tokenizer: Mapping[str, Stamp]
    """what is there of a tokenizer and its templates, if there is a vocabulary; by key in the folder"""
    remarks: tuple[Remark, ...] = ()


WithBase = Callable[[Store, str], Store]
"""Returns the place of an adapter and the base that it names."""


def base_named(store: Store) -> str | None:
    """Return the base that the adapter in a folder names; None if there is no adapter.

    Raises:
        CheckpointError: it names none, or is none that is understood.
    """
    with suppress(NotFoundError):
        return _base_of(store) if {CONFIG_KEY} <= store.listing().files.keys() else None
    return None


def _base_of(store: Store) -> str:
    config = parse_adapter_config(read_json(store, CONFIG_KEY, MAX_CONFIG_BYTES), store.where(CONFIG_KEY))
    if config.base is None:
        where = store.where()
        raise CheckpointError(f"the adapter at {where} does not say what its base is; name both: `model: BASE+{where}`")
    return config.base


def read_adapter(store: Store, cache: HeaderCache, on_file: OnFile) -> Adapter:
    """Return the adapter in a folder.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read, or is none that is understood.
    """
    files = store.listing().files
    key = next((each for each in _WEIGHTS if each in files), None)
    if CONFIG_KEY not in files or key is None:
        raise NotFoundError(_lack(store, files))
    config = parse_adapter_config(read_json(store, CONFIG_KEY, MAX_CONFIG_BYTES), store.where(CONFIG_KEY))
    contents, stamp = read_header(store, key, cache, on_file)
    file = key_of_adapter(key)
    placed = one_by_one({each.spec.name: (each.spec, Extent(file, each.start)) for each in contents.tensors})
    return Adapter(
        where=store.where(),
        config=config,
        specs={key: spec for key, (spec, _) in placed.items()},
        extents={key: extent for key, (_, extent) in placed.items()},
        files={file: stamp, key_of_adapter(CONFIG_KEY): files[CONFIG_KEY]},
        tokenizer=_tokenizer(files),
        remarks=tuple(_on_zeros(store, key, stamp, placed)),
    )


def _on_zeros(
    store: Store, file: str, stamp: Stamp, placed: Mapping[str, tuple[TensorSpec, Extent]]
) -> Iterator[Remark]:
    """Yield that an adapter adds nothing, as before training, or where shards were saved in their place."""
    parts = {key: place_of(key).part for key in placed}
    if not {*parts.values()} <= {"lora_A", "lora_B"}:
        return
    products = [placed[key] for key, part in parts.items() if part == "lora_B"]
    probed = [products[index] for index in sorted({0, len(products) // 2, len(products) - 1})] if products else []
    if not probed or any(_has_numbers(store, file, stamp, *each) for each in probed):
        return
    text = (
        f"{store.where()} has nothing but zeros where it was looked at in {shown(probed[0][0].name)} and the like: it "
        "was never trained, or saved without its weights, and the base stays as it is"
    )
    yield Remark("zeros", text, models=(store.url,), tensors=tuple(spec.name for spec, _ in probed))


def _has_numbers(store: Store, file: str, stamp: Stamp, spec: TensorSpec, extent: Extent) -> bool:
    buffer = bytearray(min(spec.num_bytes, MAX_PROBE_BYTES))
    if buffer:
        store.read_into(file, extent.start, memoryview(buffer), stamp)
    numbers = as_numbers(bytes(buffer), spec.dtype)
    return numbers is None or bool(numbers.any())


def _tokenizer(files: Mapping[str, Stamp]) -> dict[str, Stamp]:
    has_vocabulary = any(form.fullmatch(key) for form, _ in FORMS for key in files)
    return {key: stamp for key, stamp in files.items() if has_vocabulary and is_tokenizer_or_template(key)}


def _lack(store: Store, files: Mapping[str, Stamp]) -> str:
    if CONFIG_KEY not in files:
        return f"there is no adapter at {store.where()}: expected {CONFIG_KEY}, as PEFT writes it"
    return f"there is no adapter at {store.where()}: it has {CONFIG_KEY} and no {WEIGHTS_KEY}; fetch it"
