"""What a tensor is, told from its name: the kind of module it belongs to, and its layer.

A name is split at its dots; upper and lower case are the same. The first rule that holds gives the kind:

1. ``norm``: a part that contains ``norm``, or is ``ln``, ``ln_1``, ``bn2`` and the like, wherever it stands
   (``post_attention_layernorm`` is a norm, not attention)
2. ``router``: ``router``, ``gate`` as a part of its own outside an expert, ``shared_expert_gate``,
   ``e_score_correction_bias``
3. ``experts``: a part that contains ``expert``, shared experts too
4. ``head``: ``lm_head``, ``classifier``, ``score``, ``pooler``, a part that ends in ``head``, ``output`` at the top ...
5. ``other``: rotary tables, which are buffers
6. ``embedding``: a part that contains ``embed``; ``wte``, ``wpe``, ``cls_token``, ``shared`` at the top ...
7. ``attention``: a part that contains ``attn`` or ``attention``
8. ``mlp``: ``mlp``, ``ffn``, ``feed_forward``, ``fc1``, ``up_proj``; BERT's ``intermediate`` and ``output``
9. ``other``: the rest
"""

import re
from typing import NamedTuple

OF_ADAPTERS = (".modules_to_save.", ".original_module.", ".base_layer.weight", ".base_layer.bias")
"""Parts of the names that PEFT gives what it wraps."""
OF_TRAINERS = ("exp_avg", "momentum_buffer", "optimizer.", "ema_model.", "model_ema.")
"""Parts of the names of what a trainer keeps beside weights."""
MARKS_OF_PREDICTION = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
"""Tensors by whose presence loaders of one file know what a diffusion model predicts. Source: ComfyUI."""
TRAINING_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that say what held a model in training, which loaders do not take off."""
WRAPPERS = frozenset({"model", "language_model", "base_model", "transformer", "backbone", *TRAINING_WRAPPERS})
"""Parts of names that say what held a model as it was saved, and nothing of the tensor."""
EXPERT_WORDS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
"""What most families call the matrices of an expert, and what those do that follow Mixtral."""
KINDS = ("embedding", "attention", "mlp", "experts", "router", "norm", "head", "other")
"""Every kind there is, in the order in which reports show them."""

_RULES = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("norm", r"norm|(^|\.)(ln|bn)(_?\w)?(\.|$)|(^|\.)ln_\w+"),
        (
            "router",
            r"(^|\.)(router|shared_expert_gate|e_score_correction_bias|expert_bias)(\.|$)"
            r"|^(?!.*(^|\.)experts?\.).*(^|\.)gate(\.|$)",
        ),
        ("experts", r"expert"),
        (
            "head",
            r"(^|\.)(classifier|score|pooler|cls|heads|qa_outputs|embed_out|text_projection|visual_projection)(\.|$)"
            r"|(^|[._])head(\.|$)|^output\.",
        ),
        ("other", r"rotary"),
        ("embedding", r"embed|(^|\.)(wte|wpe|(cls|dist|mask|register)_tokens?)(\.|$)|^shared\."),
        ("attention", r"attn|attention"),
        (
            "mlp",
            r"mlp|ffn|feed_?forward|densereludense|(^|\.)(ff|fc\d?|(gate|up|down|gate_up)_proj|intermediate|output)(\.|$)"
            r"|dense_h_to_4h|dense_4h_to_h",
        ),
    )
)
_FUSED = re.compile(r"expert|(^|\.)\w*moe(\.|$)|(^|\.)(input|output)_linear\.", re.I)
_ROLES = {word: role for role, words in EXPERT_WORDS.items() for word in words}
_PROJECTION = re.compile(rf"(.*\.experts)\.(\d{{1,6}})\.({'|'.join(_ROLES)})\.weight")
_OTHER_GATE = re.compile(r"attn|attention|shared_expert_gate", re.I)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d{1,9})(?:\.|$)", re.I)


def kind_of(name: str) -> str:
    """Return the kind of module that a tensor belongs to, one of ``KINDS``."""
    lowered = name.lower()
    return next((kind for kind, pattern in _RULES if pattern.search(lowered)), "other")


class LayerPlace(NamedTuple):
    """A layer among its like: where the tensors of a tower's layers have the same text before the number."""

    stack: str
    """what stands before the number"""
    number: int
    rest: str
    """what stands behind it"""


class LayerNames:
    """How the names of tensors tell their layers."""

    def __init__(self, around: tuple[str, str] | None = None) -> None:
        """Take the texts before and behind the number with which names in layers begin; None for the common ones."""
        own = around and re.compile(rf"{re.escape(around[0])}(\d{{1,9}}){re.escape(around[1])}")
        self._find = own.match if own else _LAYER.search

    def place(self, name: str) -> LayerPlace | None:
        """Return where a tensor lies, None if it is in no layer."""
        found = self._find(name)
        return LayerPlace(name[: found.start(1)], int(found[1]), name[found.end(1) :]) if found else None


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to, None if it is in no layer.

    It is the first number behind ``layers``, ``layer``, ``h``, ``block``, ``blocks`` or ``resblocks``: the outer one
    where such parts are nested. Encoder and decoder, and the towers of a model with several, count from 0 each.
    """
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def is_router(name: str) -> bool:
    """Return whether a tensor chooses among experts: ``mlp.gate.weight``, ``router.weight``, ``expert_bias``.

    A gate of attention, or of the experts that are always in use, chooses nothing.
    """
    may_be = ".gate." in name or "router" in name or name.endswith("_bias")  # kind_of takes twenty times as long
    return may_be and kind_of(name) == "router" and _OTHER_GATE.search(name) is None


def holds_fused_experts(name: str, num_dimensions: int) -> bool:
    """Return whether a tensor is a projection of all experts of a layer, along its first dimension.

    It has three dimensions or more, and its name speaks of experts or a mixture of them: ``experts.gate_up_proj``,
    ``block_sparse_moe.input_linear.weight``.
    """
    return num_dimensions >= 3 and _FUSED.search(name) is not None


class Projection(NamedTuple):
    """A projection of one expert of a layer."""

    stem: str
    """what names of the layer's experts begin with"""
    expert: int
    role: str
    """``gate``, ``up`` or ``down``"""


def projection_of(name: str) -> Projection | None:
    """Return which projection of which expert a tensor is, by the names that most families use; None if it is none."""
    found = _PROJECTION.fullmatch(name)
    return Projection(found[1], int(found[2]), _ROLES[found[3]]) if found else None
