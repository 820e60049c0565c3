"""A merge as it is proposed: a recipe, its opened checkpoints and the jobs that were planned from them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stockflow.checkpoints.files.layout import folder_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.samples import Samples
from stockflow.checkpoints.tokens.tokenizers import Tokenizer
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Method
from stockflow.planning.job import TensorJob
from stockflow.planning.targets import Stacking
from stockflow.planning.ties import WrittenHead, written_heads
from stockflow.planning.vocabulary.token_ids import Followed
from stockflow.recipe import Recipe

NUM_PARTS = 5
"""Of a name, within which its layer stands: ``vision_tower.vision_model.encoder.layers.0``, and what holds experts."""


@dataclass(frozen=True)
class Proposal:
    """What is looked at."""

    recipe: Recipe
    checkpoints: Sequence[Checkpoint]
    """in the order of ``recipe.checkpoints``"""
    jobs: Sequence[TensorJob]
    """of the tensors that could be planned"""
    skipped: Sequence[str]
    """names of the tensors that rules leave out"""
    config: Mapping[str, object] | None = None
    """what is published"""
    tokenizers: Sequence[Tokenizer] = ()
    """of the checkpoints, or none: they were not read"""
    samples: Samples = ()
    """of each checkpoint, if some were taken"""
    left_out: Sequence[str] = ()
    """names of the tensors that belong to no module of the recipe"""
    stackings: Sequence[Stacking] = ()
    """of the towers whose layers are stacked"""

    followed: Followed | None = None
    """configs that follow the output's vocabulary"""

    @property
    def donor(self) -> Checkpoint:
        """Gives names, order and config."""
        return self.checkpoints[self.recipe.donor]

    @property
    def side_files_donor(self) -> Checkpoint:
        """Gives tokenizer and other small files."""
        return self.checkpoints[self.recipe.side_files_donor]

    @cached_property
    def written(self) -> Mapping[str, TensorJob]:
        """The jobs by the name of what they write, in order."""
        return {job.output.name: job for job in self.jobs}

    @cached_property
    def filtered(self) -> str:
        """The names that rules and filters look at, of what is written or left out, a line each."""
        return "\n".join(dict.fromkeys((*(job.stored_name for job in self.jobs), *self.skipped)))

    @cached_property
    def held(self) -> Collection[str]:
        """The names in any checkpoint, but for parts of what is stored as one."""
        parts = {job.output.name for job in self.jobs if job.whole}
        return {name for each in self.checkpoints for name in (*each.settled, *each.specs)} - parts

    @cached_property
    def heads(self) -> Sequence[WrittenHead]:
        """The heads and copies that are written."""
        return tuple(written_heads(self.checkpoints, self.jobs))

    @cached_property
    def begins(self) -> frozenset[str]:
        """The first parts of the names that are written, within which a layer and its module stand."""
        return frozenset(".".join(name.split(".", NUM_PARTS)[:NUM_PARTS]) for name in self.written)

    @cached_property
    def methods(self) -> Sequence[tuple[Method, Parameters]]:
        """The methods in use with what they are given, each setting once."""
        given = {id(job.result.parameters): job.result for job in self.jobs}
        return [(each.declared, each.parameters) for each in given.values()]

    @cached_property
    def folders(self) -> Mapping[str, bool]:
        """Folders of which tensors are written, and whether any of these is merged; empty: the model's own."""
        found: dict[str, bool] = {}
        for job in self.jobs:
            folder = folder_of(job.reading.operands[0].extents[0].file)
            found[folder] = found.get(folder, False) or (not job.is_copy and len(job.reading.operands) > 1)
        return found

    @cached_property
    def merged_configs(self) -> list[str]:
        """Keys of the configs of components and modules of which tensors are merged, where they were read."""
        donors = self.tokenizers[self.recipe.side_files_donor : self.recipe.side_files_donor + 1]
        keys = [key for each in donors for key in each.uses if key.endswith("/config.json")]
        return [key for key in keys if self.folders.get(folder_of(key))]

    def is_skipped(self, name: str) -> bool:
        """Return whether a rule leaves a tensor out, in whichever model it is."""
        rule = self.recipe.rule_for(name)
        return rule is not None and rule.action == "skip"
