"""Which tensors a sample takes, and what became of them."""

import math
import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from stockflow.errors import RecipeError
from stockflow.planning.plan import MergePlan

Groups = tuple[tuple[float, ...], ...]
"""The coefficients of a tensor, one tuple per group."""
RecordedCoefficients = Mapping[str, Groups]
"""Coefficients by the tensor's name."""


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How much to compute again, and with what."""

    share: float
    """of the tensors, above 0 and up to 1"""
    seed: int
    memory_bytes: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was computed again."""

    seed: int
    num_planned: int
    """tensors of the plan"""
    num_bytes: int
    """compared with the output"""
    num_recorded: int = 0
    """combined with coefficients on record"""
    num_decided: int = 0
    """decided again from the inputs, as the records do not hold what their decision was"""
    num_copied: int = 0
    num_left_out: int = 0
    """not computed: what they need is itself a finding"""
    same_class: bool = True
    """whether this machine computes as the one that merged; if not, tensors decided again need only be close"""

    @property
    def num_compared(self) -> int:
        """Tensors that were computed again."""
        return self.num_recorded + self.num_decided + self.num_copied


def parse_share(text: str) -> float:
    """Return a share written as ``5%`` or ``0.05``.

    Raises:
        RecipeError: it is none, or not above 0 and at most 1.
    """
    try:
        share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise RecipeError(f"expected a share of the tensors such as 5% or 0.05, above 0 and up to 100%, found {text!r}")
    return share


def draw_seed() -> int:
    """Return a seed that is another one each time, so that every verification looks elsewhere."""
    return secrets.randbits(32)


def choose(plan: MergePlan, options: SampleOptions) -> frozenset[str]:
    """Return the names of the tensors to compute again: at least one; the same for the same plan, share and seed."""
    names = [job.output.name for job in plan.jobs]
    chosen = random.Random(options.seed).sample(range(len(names)), math.ceil(options.share * len(names)))
    return frozenset(names[number] for number in chosen)


def sampled_line(sampled: Sampled) -> str:
    """Return what was done, for people."""
    how = [
        f"{count} {words}"
        for count, words in (
            (sampled.num_recorded, "combined from the coefficients on record"),
            (
                sampled.num_decided,
                "decided again from the inputs" + ("" if sampled.same_class else " on another class of machine"),
            ),
            (sampled.num_copied, "copied"),
            (sampled.num_left_out, "left out for the findings above"),
        )
        if count
    ]
    return f"recomputed {sampled.num_compared} of {sampled.num_planned} tensors (--seed {sampled.seed}): " + ", ".join(
        how
    )
