"""What settings stand for: opened inputs, the options of a merge or a survey, and where the work is done."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stockflow.checkpoints.opening import link_notes
from stockflow.errors import PlanError, RecipeError
from stockflow.events import Done, Note, OnEvent, Stage, ignore
from stockflow.output.receipts import Receipt
from stockflow.planning.budget import default_memory
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import Recipe, RecipeLike, amended, recipe_of
from stockflow.recipe.values import OUTPUT_DTYPES
from stockflow.run.driver import Execute, MergeOptions, Ready
from stockflow.run.inputs import Inputs
from stockflow.settings import (
    DeviceName,
    ExecutorName,
    Location,
)
from stockflow.storage import StorageConfig, open_store, trusted_folders
from stockflow.text.remarks import objections

if TYPE_CHECKING:
    from stockflow.adapters.combination import CombinationPlan, Sources
    from stockflow.adapters.combining import CombinedAdapter
    from stockflow.adapters.extraction import ExtractOptions
    from stockflow.engine.survey import Look, SurveySpec
    from stockflow.engine.worker import WorkerSpec
    from stockflow.insight.surveys import Survey, SurveyOptions
    from stockflow.insight.verdict import Merge
    from stockflow.verification.verify import SampleOptions


def storage_of(recipe: RecipeLike | None, follow_links: Sequence[Location] = ()) -> StorageConfig:
    """Return the storage options of a recipe, or none, and which links are followed."""
    options = StorageConfig() if recipe is None else recipe_of(recipe).storage
    return replace(options, trusted=trusted_folders(follow_links))


def read_recipe(given: RecipeLike, on_event: OnEvent) -> Recipe:
    """Return the recipe that is meant, and tell before it is waited for that its checkpoints will be opened."""
    on_event(Stage("opening checkpoints", unit="files"))
    return recipe_of(given)


def open_inputs(
    recipe: RecipeLike,
    on_event: OnEvent = ignore,
    follow_links: Sequence[Location] = (),
    seed: int | None = None,
    *,
    reads_twice: bool = False,
    is_told: bool = False,
) -> Inputs:
    """Return the opened checkpoints of a recipe; a seed stands before its own. Tells of it, unless that was done."""
    if not is_told:
        on_event(Stage("opening checkpoints", unit="files"))
    trusted = trusted_folders(follow_links)
    seeded = amended(recipe_of(recipe), **({} if seed is None else {"seed": seed}))
    inputs = Inputs.open(seeded, lambda file: on_event(Done(file)), trusted, reads_twice=reads_twice)
    for store, checkpoint in zip(inputs.stores, inputs.checkpoints, strict=True):
        for note in link_notes(store, checkpoint.files):
            on_event(Note(note))
    return inputs


def open_merge(
    subject: RecipeLike,
    merged: Location | None,
    recipe: RecipeLike | None,
    on_event: OnEvent = ignore,
    follow_links: Sequence[Location] = (),
) -> "Merge":
    """Return what is to be audited: an output of stockflow, or what a recipe says, of a merge that may be there."""
    from stockflow.insight import audit as auditing

    if merged is None and isinstance(subject, str | os.PathLike) and is_output(os.fspath(subject)):
        return auditing.open_output(os.fspath(subject), storage_of(recipe, follow_links), on_event)
    if recipe is not None:
        raise RecipeError(
            "recipe: this names whose storage options apply to an output of stockflow; here a recipe is audited, "
            "whose own apply. Leave it out"
        )
    inputs = open_inputs(subject, on_event, follow_links)
    return auditing.open_recipe(inputs, None if merged is None else os.fspath(merged), on_event)


def sample_options(sample: float | str | None, seed: int | None, memory: int | None) -> "SampleOptions | None":
    """Return which share of the tensors to merge again, and with what."""
    from stockflow.verification.sample import SampleOptions, draw_seed, parse_share

    if sample is None:
        if seed is not None or memory is not None:
            raise RecipeError("seed and memory go with a sample: nothing is computed without it")
        return None
    try:
        share = parse_share(str(sample))
    except RecipeError as error:
        raise RecipeError(f"sample: {error}") from None
    return SampleOptions(
        share=share,
        seed=draw_seed() if seed is None else seed,
        memory_bytes=memory or default_memory(),
        num_threads=len(os.sched_getaffinity(0)),
    )


def is_on_ray(executor: ExecutorName | None) -> bool:
    """Return whether Ray executes: asked for by name, or by RAY_ADDRESS."""
    return executor == "ray" or (executor is None and bool(os.environ.get("RAY_ADDRESS")))


def merge_options(
    *,
    memory: int | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    device: DeviceName = "auto",
    overwrite: bool = False,
    strict: bool = False,
    accepted: tuple[str, ...] = (),
    on_ray: bool = False,
) -> MergeOptions:
    """Return the options of a merge as the driver takes them."""
    cores = len(os.sched_getaffinity(0))
    # A Ray worker has one CPU slot, so it computes on one thread and shares the node with as many as that has cores.
    num_slots = min(workers or cores, cores) if on_ray else 1
    return MergeOptions(
        memory_bytes=memory or default_memory(num_slots=num_slots),
        num_threads=1 if on_ray else workers or cores,
        device=device,
        shard_size=shard_size,
        overwrite=overwrite,
        strict=strict,
        accepted=accepted,
        num_workers=workers if on_ray else None,
        holds_plan=not on_ray,
    )


def options_of(chosen: SimpleNamespace, workers: int | None) -> MergeOptions:
    """Return the options that settings of a merge or a plan stand for."""
    return merge_options(
        memory=chosen.memory,
        shard_size=chosen.shard_size,
        workers=workers,
        device=chosen.device,
        overwrite=chosen.overwrite,
        strict=chosen.strict,
        accepted=("unmerged",) if chosen.allow_unmerged else (),
        on_ray=is_on_ray(chosen.executor),
    )


def execute_on(chosen: SimpleNamespace) -> tuple[Execute, Ready]:
    """Return what merges shards where settings of a merge say, and what sees that it could."""
    if not is_on_ray(chosen.executor):
        return _in_this_process, partial(_ready_here, chosen.device)
    asked = {
        "num_workers": chosen.workers,
        "gpus_per_worker": chosen.gpus_per_worker,
        "labels": chosen.labels,
        "item_timeout_s": chosen.shard_timeout,
        "no_worker_timeout_s": chosen.worker_timeout,
    }
    told = {name: value for name, value in asked.items() if value is not None}
    return partial(_on_ray, told), partial(_ready_on_ray, told)


@contextmanager
def _ready_here(device: DeviceName, _: int) -> Iterator[None]:
    if device == "cuda":
        from stockflow.engine.devices import open_device

        open_device(device)
    yield


@contextmanager
def _ready_on_ray(asked: Mapping[str, Any], num_shards: int) -> Iterator[None]:
    from stockflow.run.executors import ray

    with ray.reached(ray.RayOptions(**asked), num_shards):
        yield


def _in_this_process(spec: "WorkerSpec", shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
    from stockflow.run.places import in_this_process

    return in_this_process(spec, shards, on_event)


def _on_ray(
    asked: Mapping[str, Any], spec: "WorkerSpec", shards: Sequence[ShardPlan], on_event: OnEvent
) -> Iterator[Receipt]:
    from stockflow.run.executors.ray import RayOptions
    from stockflow.run.places import on_ray

    return on_ray(spec, shards, on_event, RayOptions(**asked))


def is_output(location: str) -> bool:
    """Return whether a location is that of a checkpoint rather than of a recipe."""
    if "\n" in location:
        return False
    return os.path.isdir(location) or ("://" in location and not location.endswith((".yaml", ".yml", ".json")))


def survey_options(chosen: SimpleNamespace) -> "SurveyOptions":
    """Return what a survey may use; a comparison computes on the CPU."""
    from stockflow.insight.surveys import SurveyOptions

    device, on_ray = getattr(chosen, "device", "cpu"), is_on_ray(chosen.executor)
    options = merge_options(memory=chosen.memory, workers=chosen.workers, on_ray=on_ray)
    return SurveyOptions(options.memory_bytes, options.num_threads, device)


def extract_options(chosen: SimpleNamespace) -> "ExtractOptions":
    """Return what an extraction keeps."""
    from stockflow.adapters.extraction import ExtractOptions

    return ExtractOptions(
        rank=chosen.rank,
        energy=chosen.energy,
        dtype=OUTPUT_DTYPES[chosen.dtype],
        keep_whole=chosen.keep_whole,
        embeddings=chosen.embeddings,
        overwrite=chosen.overwrite,
    )


def plan_adapter(
    recipe: Recipe, output: Location, chosen: SimpleNamespace, on_event: OnEvent
) -> "tuple[CombinationPlan, Sources]":
    """Return what the adapters of a recipe make together, and the adapters; nothing is written."""
    from stockflow.adapters.binding import plan_combination
    from stockflow.adapters.sources import open_sources, remarks_on
    from stockflow.output.target import check_apart

    storage = storage_of(recipe, chosen.follow_links)
    store = open_store(os.fspath(output), storage, writable=True)
    sources = open_sources(recipe, storage, on_event)
    check_apart(store.url, [source.store for source in sources if source])
    remarks = tuple(remarks_on(recipe, sources))
    if problems := objections(remarks, recipe.stockflow.accept, strict=chosen.strict):
        raise PlanError("\n".join(problems), remarks)
    for each in remarks:
        on_event(Note(str(each), "note" if each.severity == "note" else "warning"))
    return plan_combination(recipe, sources, store.url), sources


def merge_adapter(recipe: Recipe, output: Location, chosen: SimpleNamespace, on_event: OnEvent) -> "CombinedAdapter":
    """Merge the adapters of a recipe into one, in this process."""
    from stockflow.adapters.combining import combine

    plan, sources = plan_adapter(recipe, output, chosen, on_event)
    options = merge_options(memory=chosen.memory, workers=None if is_on_ray(chosen.executor) else chosen.workers)
    return combine(
        plan,
        sources,
        open_store(os.fspath(output), storage_of(recipe, chosen.follow_links), writable=True),
        recipe.text,
        memory_bytes=options.memory_bytes,
        num_threads=options.num_threads,
        overwrite=chosen.overwrite,
        on_event=on_event,
    )


def survey_on(chosen: SimpleNamespace) -> "Survey":
    """Return what looks at tensors where the settings say."""
    if not is_on_ray(chosen.executor):
        return _survey_in_this_process
    return partial(_survey_on_ray, chosen.workers, getattr(chosen, "gpus_per_worker", 0.0))


def _survey_in_this_process(
    spec: "SurveySpec", looks: "Sequence[Look]", on_event: OnEvent
) -> Iterator[tuple[int, Any]]:
    from stockflow.run.places import survey_in_this_process

    return survey_in_this_process(spec, looks, on_event)


def _survey_on_ray(
    workers: int | None,
    gpus_per_worker: float,
    spec: "SurveySpec",
    looks: "Sequence[Look]",
    on_event: OnEvent,
) -> Iterator[tuple[int, Any]]:
    from stockflow.run.executors.ray import RayOptions
    from stockflow.run.places import survey_on_ray

    options = RayOptions(num_workers=workers, gpus_per_worker=gpus_per_worker)
    return survey_on_ray(spec, looks, on_event, options)
