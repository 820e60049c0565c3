"""Factors of adapters among tensors: told by the names that libraries give them, or by what makes low rank.

Sources of names: PEFT, kohya's sd-scripts, LyCORIS, diffusers, XLabs, mlx-lm, torchtune, llama.cpp, NeMo.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

_NAMED = re.compile(
    r"\.((poly_|rand|gra|de)?lora_(a|b|A|B|embedding_A|embedding_B|magnitude_vector|down|up|mid)|hada_[wt]\d\w*|lokr_[wt]\d\w*"
    r"|b?oft_\w+|vera_\w+|hra_u|ia3_l)(\.|$)|lora(_linear_layer|\d)?\.(down|up)\.|adapter(_\w+)?\.linear_(in|out)\."
    r"|^(lora|lycoris)_\w+\.[ab][12]\."
)
_MARKERS = ("lora", "lycoris_", ".hada_", ".lokr_", "oft_", ".vera_", ".hra_u", ".ia3_l", ".linear_in.")
_SECOND = re.compile(r"(?:(?<=[._:])|^)(up|b|B|v|V)(?=[._:]|$)")
"""A part of the name of a factor that stands left in a product."""
_FIRST = {"up": "down", "b": "a", "B": "A", "v": "u", "V": "U"}
NARROW = 4
"""How many times the dimension that two factors share is below all others: no feed-forward network is that narrow."""
MOST = 0.5
"""Share of the elements of all matrices beyond which a file is one of factors, whatever else lies in it."""
ELSEWHERE = 0.1
"""Share of those in matrices that are no factors and have a dimension that factors share: it is a width, no rank."""

OF_DIFFUSERS = (
    "diffusers: `load_lora_weights(FILE)`, `fuse_lora()`, `unload_lora_weights()`, "
    "`save_pretrained(FOLDER)` of a pipeline"
)
_PEFT = "PEFT"
_KINDS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (re.compile(r"^(unet|transformer|prior|text_encoder(_\d)?)\..*lora"), "diffusers", OF_DIFFUSERS),
    (re.compile(r"\.lora_(embedding_)?[AB]\b"), _PEFT, "PEFT: `model.merge_and_unload()`"),
    (re.compile(r"\.lora_[ab]\b"), "mlx-lm or torchtune", "mlx-lm: `mlx_lm.fuse`; torchtune: its merged checkpoint"),
    (
        re.compile(r"\.(hada|lokr)_|\.oft_(blocks|diag)|^(lora|lycoris)_\w+\.[ab][12]\."),
        "LyCORIS",
        "LyCORIS: `tools/merge.py BASE FILE OUTPUT`",
    ),
    (
        re.compile(r"^lora_\w+\.lora_(down|up|mid)\."),
        "kohya's sd-scripts",
        "sd-scripts: `networks/merge_lora.py`, `sdxl_merge_lora.py` or `flux_merge_lora.py`; " + OF_DIFFUSERS,
    ),
    (re.compile(r"lora(_linear_layer)?\.(down|up)\.|\.lora_(down|up)\."), "diffusers", OF_DIFFUSERS),
)
"""What the names of factors are like, whose they are, and what puts them into the weights."""
_ANY = "PEFT: `model.merge_and_unload()`, mlx-lm: `mlx_lm.fuse`, diffusers: `fuse_lora`"
_BARE = "each second times its first is what is added to the weight that they are named after"


class _LowRank(NamedTuple):
    first: TensorSpec
    second: TensorSpec
    """a matrix of few columns"""

    @property
    def rank(self) -> int:
        return self.second.shape[1]

    @property
    def is_of_low_rank(self) -> bool:
        if len(self.first.shape) < 2 or self.first.shape[0] != self.second.shape[1]:
            return False
        return 0 < self.rank * NARROW < math.prod(self.first.shape[1:])


def factors_within(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names of factors of adapters, and of what they wrap, in a whole model."""
    joined = "\n".join(specs)
    named = [*filter(_NAMED.search, specs)] if any(marker in joined for marker in _MARKERS) else []
    return named or _bare_factors(specs)


def _bare_factors(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return factors that no library's names tell: pairs of low rank, where most of what there is are such.

    A tensor with a bias of its own is a layer; so is a pair that is as narrow as other layers are wide.
    """
    pairs = [pair for pair in _pairs(specs) if pair.is_of_low_rank]
    within = dict.fromkeys(each.name for pair in pairs for each in pair)
    matrices = [spec for spec in specs.values() if len(spec.shape) > 1] if pairs else []
    whole = sum(spec.num_elems for spec in matrices)
    if not pairs or sum(specs[name].num_elems for name in within) <= MOST * whole:
        return []
    ranks = {pair.rank for pair in pairs}
    others = (spec for spec in matrices if spec.name not in within and not ranks.isdisjoint(spec.shape))
    return list(within) if sum(spec.num_elems for spec in others) <= ELSEWHERE * whole else []


def _pairs(specs: Mapping[str, TensorSpec]) -> Iterator[_LowRank]:
    tall = [spec for spec in specs.values() if len(spec.shape) > 1 and spec.shape[0] > NARROW * spec.shape[1]]
    for second in tall:
        name = second.name
        for found in _SECOND.finditer(name):
            first = f"{name[: found.start()]}{_FIRST[found[1]]}{name[found.end() :]}"
            if first in specs and not any(_bias_of(each) in specs for each in (name, first)):
                yield _LowRank(specs[first], second)


def _bias_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias"


def factors_said(url: str, factors: Sequence[str]) -> str:
    """Return that a model holds factors of an adapter, and what to do about it."""
    read = ", or give base and adapter, `model: BASE+ADAPTER`" if _origin(factors) == _PEFT else ""
    return f"{url} holds {_described(factors)}, and sums of factors are not factors of sums: {_way_on(factors)}{read}"


def of_another_format(file: str, factors: Sequence[str]) -> str:
    """Return what an adapter is that is not as PEFT writes it, and what to do about it."""
    if _origin(factors) == _PEFT:
        lack = "adapter_config.json, which says their scale, is not there: fetch it"
        return f"{file} holds {_described(factors)}, and {lack}"
    return (
        f"{file} holds {_described(factors)}, and of adapters only PEFT's are read (adapter_config.json beside "
        f"adapter_model.safetensors): {_way_on(factors)}, and name the model which that gives in the place of both"
    )


def _origin(factors: Sequence[str]) -> str:
    return next((of for pattern, of, _ in _KINDS if pattern.search(factors[0])), "")


def _described(factors: Sequence[str]) -> str:
    of = f" of {origin}" if (origin := _origin(factors)) else ""
    return f"{counted(len(factors), 'factor')} of adapters{of} such as {shown(factors[0])}"


def _way_on(factors: Sequence[str]) -> str:
    how = next((how for pattern, _, how in _KINDS if pattern.search(factors[0])), "")
    how = how or (_ANY if _NAMED.search(factors[0]) else _BARE)
    return f"put them into the weights with what made them ({how})"
