"""Adapters: a checkpoint with what a LoRA adapter adds to its tensors, as one checkpoint that nobody has written."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from stockflow.checkpoints.adapters.config import CONFIG_KEY, WEIGHTS_KEY, AdapterConfig, parse_adapter_config
from stockflow.checkpoints.adapters.factors import factors_within, of_another_format
from stockflow.checkpoints.adapters.keys import place_of
from stockflow.checkpoints.adapters.stacks import Placed, one_by_one
from stockflow.checkpoints.beside.side_files import is_tokenizer_or_template
from stockflow.checkpoints.files.documents import read_json
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent, HeaderCache, OnFile, read_header, unheard
from stockflow.checkpoints.files.tree import is_hidden
from stockflow.checkpoints.tokens.vocabularies import FORMS
from stockflow.checkpoints.values import as_numbers
from stockflow.errors import CheckpointError, NotFoundError
from stockflow.storage import Listing, Stamp, Store, key_of_adapter
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

_WEIGHTS = (WEIGHTS_KEY, "adapter_model.bin")
"""The first that is there is read."""
MAX_CONFIG_BYTES = 4_000_000
NUM_NAMED = 5
MAX_SAMPLE_BYTES = 65_536
"""Of the first, the middle and the last factor B."""

_TRAINED_WHOLE = re.compile(
    r"(non_lora_trainables|new_embeddings)\.(bin|safetensors)|(mm_projector|trainable_params)\.bin"
)


class FactorSample(NamedTuple):
    """What was looked at of a factor."""

    payload: bytes
    has_numbers: bool
    """whether any is not zero"""


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
    samples: Mapping[str, FactorSample]
    """of some factors, by key"""
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
        raise _lack(store, store.listing(), cache)
    config = parse_adapter_config(read_json(store, CONFIG_KEY, MAX_CONFIG_BYTES), store.where(CONFIG_KEY))
    contents, stamp = read_header(store, key, cache, on_file)
    if not contents.tensors:
        raise CheckpointError(f"{store.where(key)} has no tensors: it was saved without its weights; fetch it again")
    file = key_of_adapter(key)
    placed = one_by_one({each.spec.name: (each.spec, Extent(file, each.start)) for each in contents.tensors})
    samples = _sampled(store, key, stamp, placed)
    return Adapter(
        where=store.where(),
        config=config,
        specs={key: spec for key, (spec, _) in placed.items()},
        extents={key: extent for key, (_, extent) in placed.items()},
        files={file: stamp, key_of_adapter(CONFIG_KEY): files[CONFIG_KEY]},
        tokenizer=_tokenizer(files),
        samples=samples,
        remarks=(*_on_scale(store, config), *_on_zeros(store, samples, placed), *_on_others(store, files)),
    )


def _on_scale(store: Store, config: AdapterConfig) -> Iterator[Remark]:
    """Yield that an adapter adds nothing as its config says so."""
    if config.alpha == 0 and not any(config.alpha_pattern.values()):
        text = f"{store.where()} says `lora_alpha: 0`, by which its factors add nothing, and the base stays as it is"
        yield Remark("zeros", text, models=(store.url,))


def _on_others(store: Store, files: Mapping[str, Stamp]) -> Iterator[Remark]:
    """Yield that weights lie beside an adapter which were trained with it, and which no adapter holds."""
    if names := [key for key in files if _TRAINED_WHOLE.fullmatch(key)]:
        text = (
            f"{shown(names[0])} beside the adapter {store.where()} has weights that were trained with it (LLaVA's "
            "projector, rows of new tokens), which are not read, so that the base's stay; put both into the base with "
            "the library that wrote them, and merge the models that it gives"
        )
        yield Remark("adapter-part", text, "refusal", (store.url,))


def _on_zeros(store: Store, samples: Mapping[str, FactorSample], placed: Mapping[str, Placed]) -> Iterator[Remark]:
    """Yield that an adapter adds nothing, as before training, or where shards were saved in their place."""
    parts = {place_of(key).part for key in placed}
    if not samples or parts - {"lora_A", "lora_B"} or any(each.has_numbers for each in samples.values()):
        return
    text = (
        f"{store.where()} has nothing but zeros where it was looked at in {shown(next(iter(samples)))} and the like: "
        "it was never trained, or saved without its weights, and the base stays as it is"
    )
    yield Remark("zeros", text, models=(store.url,), tensors=tuple(samples))


def _sampled(store: Store, file: str, stamp: Stamp, placed: Mapping[str, Placed]) -> dict[str, FactorSample]:
    """Return the begin of the first, the middle and the last factor B, by key."""
    products = [key for key in placed if place_of(key).part == "lora_B"]
    chosen = sorted({0, len(products) // 2, len(products) - 1}) if products else []
    return {products[number]: _sample(store, file, stamp, *placed[products[number]]) for number in chosen}


def _sample(store: Store, file: str, stamp: Stamp, spec: TensorSpec, extent: Extent) -> FactorSample:
    buffer = bytearray(min(spec.num_bytes, MAX_SAMPLE_BYTES))
    if buffer:
        store.read_into(file, extent.start, memoryview(buffer), stamp)
    numbers = as_numbers(bytes(buffer), spec.dtype)
    return FactorSample(bytes(buffer), numbers is None or bool(numbers.any()))


def _tokenizer(files: Mapping[str, Stamp]) -> dict[str, Stamp]:
    has_vocabulary = any(form.fullmatch(key) for form, _ in FORMS for key in files)
    return {key: stamp for key, stamp in files.items() if has_vocabulary and is_tokenizer_or_template(key)}


def _lack(store: Store, listing: Listing, cache: HeaderCache) -> NotFoundError | CheckpointError:
    """Return why a folder holds no adapter that is read, and what to do.

    Raises:
        CheckpointError: its config is of another library's.
    """
    where = store.where()
    if CONFIG_KEY in listing.files:
        given = read_json(store, CONFIG_KEY, MAX_CONFIG_BYTES)
        if isinstance(given, dict) and not given.get("peft_type"):
            parse_adapter_config(given, store.where(CONFIG_KEY))
        return NotFoundError(f"there is no adapter at {where}: it has {CONFIG_KEY} and no {WEIGHTS_KEY}; fetch it")
    weights = [key for key in listing.files if key.endswith(".safetensors") and store.only in ("", key)]
    for key in weights[:NUM_NAMED]:
        with suppress(CheckpointError):
            contents, _ = read_header(store, key, cache, unheard)
            if factors := factors_within({each.spec.name: each.spec for each in contents.tensors}):
                return CheckpointError(of_another_format(store.where(key), factors))
    others = [folder for folder in listing.folders if not is_hidden(folder)][:NUM_NAMED]
    within = f", or the folder below it that has one ({', '.join(map(shown, others))})" if others else ""
    return NotFoundError(f"there is no adapter at {where}: expected {CONFIG_KEY}, as PEFT writes it{within}")
