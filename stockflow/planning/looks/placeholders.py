"""Placeholders: tensors of no elements where there should be some, as DeepSpeed's ZeRO-3 leaves of a model in parts."""

from collections.abc import Iterator, Mapping

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.naming import kind_of
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

Specs = Mapping[str, TensorSpec]


def placeholders(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors have no elements though their names, or other models, say that they have some."""
    empty_of: dict[int, list[str]] = {}
    """by identity of the specs, which models of one layout share"""
    for position, checkpoint in enumerate(proposal.checkpoints):
        specs = checkpoint.specs
        if id(specs) not in empty_of:
            empty_of[id(specs)] = [name for name, spec in specs.items() if 0 in spec.shape]
        others = [each.specs for each in proposal.checkpoints if each.specs is not specs]
        found = [name for name in empty_of[id(specs)] if _should_have_elements(name, specs, others)]
        if len(empty_of[id(specs)]) == len(specs):
            found = empty_of[id(specs)]
        names = [name for name in found if not proposal.recipe.spares(position, name)]
        if names:
            where = redact(checkpoint.url)
            text = (
                f"{counted(len(names), 'tensor')} of {where} {are(len(names))} without elements and should have some, "
                f"such as {shown(names[0])}: placeholders that DeepSpeed's ZeRO-3 leaves when each process saves its "
                "part; gather the weights (`python -m deepspeed.utils.zero_to_fp32 CHECKPOINT OUTPUT`)"
            )
            yield Remark("placeholders", text, "refusal", (where,), tuple(names))


def _should_have_elements(name: str, specs: Specs, others: list[Specs]) -> bool:
    spec = specs[name]
    if any(name in other and other[name].num_elems for other in others):
        return True
    return spec.shape == (0,) and kind_of(name) != "other" and _is_parameter(name) and not _is_of_empty(name, specs)


def _is_parameter(name: str) -> bool:
    """Whether a tensor is a weight by its name, and no list of indices, which may be empty."""
    return name.endswith((".weight", ".bias", "_proj"))


def _is_of_empty(name: str, specs: Specs) -> bool:
    """Whether a bias goes with a matrix without rows, as of a layer with no outputs."""
    weight = specs.get(f"{name.removesuffix('.bias')}.weight")
    return name.endswith(".bias") and weight is not None and len(weight.shape) > 1 and weight.shape[0] == 0
