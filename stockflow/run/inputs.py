"""Inputs of a merge: an opened recipe, its stores and checkpoints, and the plan they make."""

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from stockflow.checkpoints.beside.damage import without_damaged
from stockflow.checkpoints.copies import compared
from stockflow.checkpoints.files.layout import OnFile, unheard
from stockflow.checkpoints.identity import same_models
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints, open_tokenizer
from stockflow.checkpoints.pipelines import pipeline_around, predicted_by
from stockflow.checkpoints.samples import Samples
from stockflow.checkpoints.tokens.tokenizers import Tokenizer, read_tokenizers
from stockflow.errors import AccessDeniedError, NotFoundError, StockflowError, StorageError, UserError
from stockflow.events import OnEvent, Stage, ignore
from stockflow.planning.make import make_plan
from stockflow.planning.plan import MergePlan
from stockflow.planning.vocabulary.files import is_taken
from stockflow.recipe import Recipe
from stockflow.recipe.unify import unified
from stockflow.run.bases import with_base
from stockflow.storage import StorageConfig, Store, halves_of, open_model, pin_revision
from stockflow.storage.sightings import Sightings


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's cycle collector from walking a million small objects again and again while they are made.

    Planning 92,000 tensors of nine checkpoints takes half the time without it; nothing made here has cycles. What was
    made is old at once, so that the collector does not walk it when it goes on, either.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.unfreeze()
            gc.enable()


@dataclass
class Inputs:
    """An opened recipe: stores and checkpoints, in the order of ``recipe.locations``."""

    recipe: Recipe
    stores: list[Store]
    checkpoints: list[Checkpoint] = field(default_factory=list)
    trusted: tuple[str, ...] = ()
    """folders that links of weights may lead into"""
    reads_twice: bool = False
    """whether what is read of remote models is read again and compared"""
    sightings: Sightings = field(default_factory=Sightings)
    """of local files, from planning on"""
    are_compared: bool = False
    """whether heads were held against their embeddings"""

    @property
    def storage(self) -> StorageConfig:
        """How inputs and output are reached: the recipe's options, the links that are followed, how often is read."""
        return replace(
            self.recipe.storage, trusted=self.trusted, reads_twice=self.reads_twice, sightings=self.sightings
        )

    @classmethod
    def open(
        cls, recipe: Recipe, on_file: OnFile = unheard, trusted: tuple[str, ...] = (), *, reads_twice: bool = False
    ) -> "Inputs":
        """Open every checkpoint concurrently.

        Args:
            recipe: names them.
            on_file: told of each file whose header was read.
            trusted: resolved folders that links of weights may lead into.
            reads_twice: whether what is read of remote models is read again and compared.

        Raises:
            UserError: one is missing, forbidden or malformed.
            StorageError: reading failed after retries.
        """
        inputs = cls(recipe, [], trusted=trusted, reads_twice=reads_twice)
        found = list(_stores_or_why_not(recipe.checkpoints, inputs.storage))
        with collector_paused():
            made = dict[str, Store]()
            complete = partial(_completing, made, inputs.storage)
            inputs.checkpoints = open_checkpoints(found, on_file, recipe.spares, complete)
        inputs.stores = [
            made.get(each.url) or _store_of(store, each, inputs.storage)
            for store, each in zip(found, inputs.merged, strict=True)
        ]
        inputs.checkpoints = [_with_prediction(each, inputs.storage) for each in inputs.checkpoints]
        for location in recipe.locations[len(recipe.checkpoints) :]:
            inputs.stores.append(open_model(pin_revision(location), inputs.storage))
            inputs.checkpoints.append(open_tokenizer(inputs.stores[-1]))
        for donor in {recipe.side_files_donor, recipe.vocabulary_donor}:
            is_copied = partial(is_taken, recipe, donor)
            inputs.checkpoints[donor] = without_damaged(inputs.stores[donor], inputs.checkpoints[donor], is_copied)
        return inputs._unified()

    @property
    def merged(self) -> list[Checkpoint]:
        """Those whose tensors are read, in the order of ``recipe.checkpoints``."""
        return self.checkpoints[: len(self.recipe.checkpoints)]

    def forget_tensors(self) -> None:
        """Drop the checkpoints, of which the plan has all that a merge reads: of 92,000 tensors of three 100 MiB."""
        self.checkpoints.clear()

    def compare_heads(self, most_bytes: int | None, on_event: OnEvent = ignore) -> None:
        """Hold heads that seem to be their embeddings against them in whole, of each model as far as so many bytes go.

        Raises:
            StorageError: reading failed after retries.
            InputChangedError: an input is no longer the one that was opened.
        """
        if self.are_compared:
            return
        num_merged, self.are_compared = len(self.merged), True
        if not all(copy.is_whole for each in self.merged for copy in each.values.copies.values()):
            on_event(Stage("comparing heads with their embeddings"))
        self.checkpoints[:num_merged] = compared(self.stores[:num_merged], self.merged, most_bytes)

    def _unified(self) -> "Inputs":
        """Return them with each model once, however many names the recipe has for it."""
        same = same_models(self.recipe.checkpoints, self.merged, self.sightings)
        if not same:
            return self
        recipe = unified(self.recipe, same)
        kept = [self.recipe.locations.index(location) for location in recipe.locations]
        return replace(
            self,
            recipe=recipe,
            stores=[self.stores[index] for index in kept],
            checkpoints=[self.checkpoints[index] for index in kept],
        )

    def plan(
        self,
        *,
        shard_size: int | None = None,
        strict: bool = False,
        accepted: Collection[str] = (),
        samples: Samples = (),
    ) -> MergePlan:
        """Return the plan; tokenizers are read for it where several models have a row per token, or an adapter may.

        Heads that were not compared are compared in whole.

        Raises:
            PlanError: the inputs do not fit together.
            InputChangedError: a tokenizer is no longer the one that was listed.
            StorageError: reading failed after retries.
        """
        self.compare_heads(None)
        with collector_paused():
            asked = self.recipe.vocabulary is not None or self.recipe.chat_template is not None
            tokenizers: Sequence[Tokenizer] = ()
            if asked or len(self.checkpoints) > 1 or len(halves_of(self.checkpoints[0].url)) > 1:
                tokenizers = read_tokenizers(self.stores, self.checkpoints, with_documents=asked)
            return make_plan(
                self.recipe,
                self.checkpoints,
                tokenizers=tokenizers,
                shard_size=shard_size,
                strict=strict,
                accepted=accepted,
                samples=samples,
            )


def _completing(made: dict[str, Store], storage: StorageConfig, adapter: Store, base: str) -> Store:
    """Return the store of an adapter that was named alone with its base: it knows whose tokenizer is read."""
    store = with_base(adapter, base, storage=storage)
    return made.setdefault(store.url, store)


def _with_prediction(opened: Checkpoint, storage: StorageConfig) -> Checkpoint:
    """Return a checkpoint with what the scheduler beside it says that it predicts, if it is a part of a pipeline."""
    if around := pipeline_around(opened.url, opened.files, opened.config):
        with suppress(UserError):
            return replace(opened, predicts=predicted_by(open_model(around, storage)))
    return opened


def _store_of(store: Store | StockflowError, opened: Checkpoint, storage: StorageConfig) -> Store:
    """Return the store that a checkpoint was read from, which may be of more than was named."""
    is_same = not isinstance(store, StockflowError) and store.url == opened.url
    return cast(Store, store) if is_same else open_model(opened.url, storage)


def _stores_or_why_not(locations: Sequence[str], storage: StorageConfig) -> Iterator[Store | StockflowError]:
    """Yield each model's store, or why there is none: it is told with what else is wrong. A lost hub is asked once."""
    lost: StockflowError | None = None
    for location in locations:
        try:
            yield lost if lost and "hf://" in location else open_model(pin_revision(location), storage)
        except (UserError, StorageError) as error:
            is_about_one = isinstance(error, NotFoundError | AccessDeniedError)
            lost = error if "hf://" in location and not is_about_one else lost
            yield error
