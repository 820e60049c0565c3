"""What slices and modules leave behind: parts of models that no module names, and what a config says of layers."""

import re
from collections.abc import Iterator, Mapping

from stockflow.planning.config.layers import states_layers
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.towers import NUM_LAYERS_KEYS
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

_OF_LAYERS = re.compile(r".*layer.*|first_k_dense_replace|decoder_sparse_step|.*_(interval|period|pattern)|fullatt_.*")
_SIZES = re.compile(r".*(norm|scale|eps|drop|act).*")


def modules_left_out(proposal: Proposal) -> Iterator[Remark]:
    """Yield what is not written, because the recipe names modules and it belongs to none of them."""
    names = proposal.left_out
    if names:
        modules = ", ".join(map(shown, proposal.recipe.modules))
        text = (
            f"{counted(len(names), 'tensor')} such as {shown(names[0])} {are(len(names))} in no module of the recipe "
            f"({modules}) and left out, as by mergekit; name the others, too, to keep them: "
            "`modules: {NAME: {models: [...]}}`"
        )
        yield Remark("module-left-out", text, tensors=tuple(names))


def layers_in_config(proposal: Proposal) -> Iterator[Remark]:
    """Yield what config.json says of layers and cannot be made true of stacked ones."""
    donor = proposal.donor
    for stacking in proposal.stackings if donor.config is not None else ():
        if not states_layers(donor.config or {}, stacking):
            text = (
                f"config.json of {redact(donor.url)} does not say that it has {stacking.num_layers[0]} layers, so that "
                f"of the output cannot say that it has {len(stacking.layers)}; correct it by hand"
            )
            yield Remark("config-layers", text, models=(redact(donor.url),))
        elif kept := ", ".join(map(shown, _kept(donor.config or {}, stacking.num_layers[0]))):
            text = (
                f"config.json speaks of layers in {kept}, too, which stay as they are: see whether they suit the output"
            )
            yield Remark("config-layers", text, "note", models=(redact(donor.url),))


def _kept(config: Mapping[str, object], num_layers: int) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _kept(value, num_layers)
        elif key not in NUM_LAYERS_KEYS and _OF_LAYERS.fullmatch(key) and not _SIZES.fullmatch(key):
            is_number = type(value) is int and value > 0
            if is_number or (isinstance(value, list) and value and len(value) != num_layers):
                yield key
