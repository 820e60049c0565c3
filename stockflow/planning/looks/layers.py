"""What slices and modules leave behind: parts of models that no module names, and what a config says of layers."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from stockflow.planning.config.layers import listed, numbers_of, sections_of
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.targets import Stacking
from stockflow.planning.towers import NUM_LAYERS_KEYS
from stockflow.storage import redact
from stockflow.text.examples import some, such
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are
from stockflow.text.strictjson import shown

_OF_LAYERS = re.compile(
    r".*layer.*|first_k_dense_replace|decoder_sparse_step|.*_(interval|period|pattern|idxs)|fullatt_.*"
    r"|(attention|block)_types"
)
_SIZES = re.compile(r".*(norm|scale|eps|drop|act).*")
_NO_NUMBERS = re.compile(
    r".*(token|size|shape|kernel|stride|dilation|dim|factor|ratio|rate|head|pinpoint|label|multiplier|channel"
    r"|resolution|version|pad|bins|section|limit|norm|scale|eps|drop|prob|range|suppress|depths|repeats).*"
)
"""Keys of lists of small integers that are no numbers of layers."""
_SCALES = ("scale_depth", "scale_attn_by_inverse_layer_idx")
"""By which layers are scaled more or less, the more there are or the later they come: of MiniCPM and of GPT-2."""
_PERIOD = re.compile(r".*_(interval|pattern|every_n_layers)")
_BY_NUMBER = {
    "layer_types": {
        "gemma2": 2, "gpt_oss": 2, "minimax": 2, "vaultgemma": 2, "modernbert": 3, "afmoe": 4, "cohere2": 4, "cwm": 4,
        "exaone4": 4, "olmo3": 4, "qwen3_5": 4, "qwen3_5_moe": 4, "qwen3_next": 4, "gemma3n": 5, "gemma3": 6,
        "gemma4": 6,
    },
    "no_rope_layers": {"llama4": 4, "smollm3": 4},
}  # fmt: skip
"""After how many layers kinds of layers repeat, by model type, where no list of this name states them."""


def modules_left_out(proposal: Proposal) -> Iterator[Remark]:
    """Yield what is not written, because the recipe names modules and it belongs to none of them."""
    names = proposal.left_out
    if names:
        modules = ", ".join(map(shown, proposal.recipe.modules))
        text = (
            f"{such(names)} {are(len(names))} in no module of the recipe "
            f"({modules}) and left out, as by mergekit; name the others, too, to keep them: "
            "`modules: {NAME: {models: [...]}}`"
        )
        yield Remark("module-left-out", text, tensors=tuple(names))


def layers_in_config(proposal: Proposal) -> Iterator[Remark]:
    """Yield what config.json says of layers and cannot be made true of stacked ones."""
    donor = proposal.donor
    for stacking in proposal.stackings if donor.config is not None else ():
        sections = list(sections_of(donor.config or {}, stacking))
        if not sections:
            text = (
                f"config.json of {redact(donor.url)} does not say that it has {stacking.num_layers[0]} layers, so that "
                f"of the output cannot say that it has {len(stacking.layers)}; correct it by hand"
            )
            yield Remark("config-layers", text, models=(redact(donor.url),))
        elif kept := ", ".join(map(shown, _all_kept(donor.config or {}, sections, stacking))):
            text = (
                f"config.json speaks of layers in {kept}, too, which stay as they are: see whether they suit the output"
            )
            yield Remark("config-layers", text, "note", models=(redact(donor.url),))
        for moved in (_moved(section, stacking) for section in sections):
            if moved:
                text = f"config.json of {redact(donor.url)} does not say of which kind each layer is, {moved}"
                yield Remark("config-layers", text, models=(redact(donor.url),))


def moved_biases(proposal: Proposal) -> Iterator[Remark]:
    """Yield where slices put the biases of positions that T5 has in the first layer of a tower, for all of them."""
    for stacking in proposal.stackings:
        of_bias = re.compile(rf"{re.escape(stacking.stack)}(\d+)\..*relative_attention_bias\.weight")
        specs = (name for each in proposal.checkpoints for name in each.specs)
        stored = {int(found[1]) for found in map(of_bias.fullmatch, specs) if found}
        names = {name: int(found[1]) for name in proposal.written if (found := of_bias.fullmatch(name))}
        if stored == {0} and set(names.values()) != {0}:
            url, is_lost = redact(proposal.donor.url), 0 not in names.values()
            layers = some([f"layer {number}" for number in names.values()], quote=str) or "none"
            means = (
                "make up that of layer 0; let the first slice begin with layer 0" if is_lost else "leave out the later"
            )
            text = (
                f"{url} has a relative_attention_bias in layer 0 of {stacking.stack}* alone, for all layers, and the "
                f"output in {layers}: loaders {means}"
            )
            yield Remark("promise-unkept", text, "warning" if is_lost else "note", (url,), tuple(names))


def _moved(section: Mapping[str, object], stacking: Stacking) -> str:
    """Return which layer becomes one of another kind, where loaders tell kinds by number; empty if none does."""
    kind = str(section.get("model_type")).removesuffix("_text")
    for key, periods in _BY_NUMBER.items():
        period = periods.get(kind, 1) if not section.get(key) and not any(map(_PERIOD.fullmatch, section)) else 1
        for place, (_, layer) in enumerate(stacking.layers):
            if (layer - place) % period:
                return (
                    f"and loaders of {kind!r} tell it by its number, alike every {period}: layer {layer} becomes layer "
                    f"{place}; a list there with a kind for each layer, `{key}`, follows them into the output"
                )
    return ""


def _all_kept(config: Mapping[str, object], sections: Iterable[Mapping[str, object]], stacking: Stacking) -> list[str]:
    """Return the keys that speak of layers and are not changed: by their words, or by values that number layers."""
    kept = dict.fromkeys(_kept(config, stacking.num_layers[0]))
    for key, value in ((key, value) for section in sections for key, value in section.items()):
        if not _NO_NUMBERS.fullmatch(key) and len(listed(key, value)) != stacking.num_layers[0]:
            kept |= {key: None} if _tell_layers(numbers_of(value), stacking) else {}
    return list(kept)


def _tell_layers(numbers: Sequence[int], stacking: Stacking) -> bool:
    """Return whether numbers may be those of layers, of which some are of another number in the output or gone."""
    may_be = len(set(numbers)) == len(numbers) and all(0 <= each < stacking.num_layers[0] for each in numbers)
    is_moved = any(place != layer for place, (_, layer) in enumerate(stacking.layers))
    return bool(numbers) and may_be and (is_moved or max(numbers) >= len(stacking.layers))


def _kept(config: Mapping[str, object], num_layers: int) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _kept(value, num_layers)
        elif key in _SCALES and value:
            yield key
        elif key not in NUM_LAYERS_KEYS and _OF_LAYERS.fullmatch(key) and not _SIZES.fullmatch(key):
            is_number = type(value) is int and value > 0
            if is_number or len(listed(key, value)) not in (0, num_layers):
                yield key
