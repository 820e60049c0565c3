"""The Python API: what the command line does, as functions with typed results. The command line calls these.

Names of options and their defaults are the command line's. Errors are StockflowError and its kinds.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from stockflow.checkpoints.opening import link_notes
from stockflow.errors import RecipeError
from stockflow.events import Done, Moved, Note, OnEvent, Stage, ignore
from stockflow.forecast.amounts import Workload, survey
from stockflow.forecast.constants import Calibration, load_calibration
from stockflow.forecast.lines import (
    duration,
    forecast_facts,
    forecast_lines,
    money,
    plan_lines,
    project,
    result_facts,
    result_lines,
)
from stockflow.forecast.seconds import STAGES, Conditions, Forecast, forecast
from stockflow.output.keys import tensors_key
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.planning.budget import Workspace, default_memory, gb, mib
from stockflow.planning.make import few_shards_note
from stockflow.planning.plan import MergePlan, ShardPlan
from stockflow.recipe import RecipeLike, parse_size, recipe_of, resolve_location
from stockflow.run import driver
from stockflow.run.driver import Execute, Inputs, MergeOptions, Outcome
from stockflow.storage import StorageConfig, open_store, read_small, redact, trusted_folders
from stockflow.text import notebook

if TYPE_CHECKING:
    from stockflow.engine.survey import Look, SurveySpec
    from stockflow.engine.worker import WorkerSpec
    from stockflow.insight.audit import Audit, Merge
    from stockflow.insight.difference import CheckpointDifference
    from stockflow.insight.inspection import Inspection, Survey, SurveyOptions
    from stockflow.reports.report import Report
    from stockflow.verification.verify import SampleOptions, Verification

ExecutorName = Literal["local", "ray"]
DeviceName = Literal["auto", "cpu", "cuda"]
Size = int | str
"""Bytes, or a text such as ``2GiB``."""
Location = str | os.PathLike[str]
"""A folder or a URL; of a checkpoint also ``org/name`` on the hub."""

MAX_TABLE_BYTES = 2_000_000_000
NUM_SHOWN = 20
"""Rows of a table in a notebook."""


@dataclass(frozen=True)
class PlanResult:
    """What a merge would read, write and hold."""

    plan: MergePlan
    """the recipe made exact: every tensor, its sources, its method"""
    workspace: Workspace
    """how a worker would divide its memory"""
    notes: tuple[str, ...]
    """what a merge would find at its output"""
    output_url: str
    work: Workload
    """requests, bytes and elements, shard by shard"""
    least_memory_bytes: int
    """a worker given less would refuse"""
    forecast: Forecast
    """time and money"""

    @property
    def plan_id(self) -> str:
        """sha256 of everything that decides the output's bytes."""
        return self.plan.plan_id

    @property
    def seconds(self) -> float:
        """How long a merge is predicted to take, from the start of its process to the end."""
        return self.forecast.prediction.seconds

    def facts(self) -> dict[str, object]:
        """Return what `stockflow plan --json` prints."""
        projected = project(self.plan, self.workspace, self.work, self.least_memory_bytes, self.notes)
        return projected | {"forecast": forecast_facts(self.forecast)}

    def lines(self) -> Iterator[str]:
        """Yield what `stockflow plan` prints."""
        yield from plan_lines(self.plan, self.workspace, self.work, self.least_memory_bytes, self.notes)
        yield from forecast_lines(self.forecast)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        facts = self.facts()
        plan = self.plan
        inputs = [
            (redact(checkpoint.url), len(checkpoint.files), gb(sum(stamp.size for stamp in checkpoint.files.values())))
            for checkpoint in plan.checkpoints
        ]
        return notebook.block(
            f"plan {plan.plan_id[:12]}",
            notebook.table(("input", "files", "size"), inputs),
            notebook.facts(
                {
                    "output": redact(self.output_url),
                    "tensors": facts["tensors"],
                    "methods": _counted(facts["methods"]),
                    "shards": len(plan.shards),
                    "to read": gb(_number(facts["bytes_to_read"])),
                    "to write": gb(plan.num_output_bytes),
                    "requests": facts["requests"],
                    "memory per worker": mib(self.workspace.projected_bytes),
                    "time": f"about {duration(self.seconds)}",
                    "waits for": STAGES[self.forecast.prediction.bottleneck],
                    "cost": None if self.forecast.cost is None else money(self.forecast.cost),
                    "notes": "; ".join((*plan.notes, *self.notes)) or None,
                }
            ),
        )


@dataclass(frozen=True)
class MergeResult:
    """What a finished merge was."""

    result: driver.MergeResult
    storage: StorageConfig

    @property
    def outcome(self) -> Outcome:
        """``merged``, or ``already_finished`` if there was nothing to do."""
        return self.result.outcome

    @property
    def output_url(self) -> str:
        """Where it is."""
        return self.result.output_url

    @property
    def plan(self) -> MergePlan:
        """What was merged, how."""
        return self.result.plan

    @property
    def manifest(self) -> Manifest:
        """What was published."""
        return self.result.manifest

    @property
    def summary(self) -> Mapping[str, float]:
        """Tensors, bytes, seconds by stage, peak memory, retries and more, by name."""
        return self.result.manifest.summary

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.result.seconds

    @cached_property
    def tensors(self) -> tuple[TensorFacts, ...]:
        """One row of facts per tensor, read from the output: cosines, ratio, norms, flags.

        Raises:
            StockflowError: it cannot be read.
        """
        from stockflow.output.tables import decode_tensors

        store = open_store(self.output_url, self.storage)
        payload = read_small(store, tensors_key(self.plan.plan_id), max_bytes=MAX_TABLE_BYTES)
        return tuple(TensorFacts(**row) for row in decode_tensors(payload))  # type: ignore[arg-type]

    def facts(self) -> dict[str, object]:
        """Return what `stockflow merge --json` prints."""
        return result_facts(self.result)

    def lines(self) -> Iterator[str]:
        """Yield what `stockflow merge` prints."""
        return result_lines(self.result)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        columns = ("name", "num_elems", "mean_cosine", "ratio", "base_norm")
        rows = [[getattr(tensor, column) for column in columns] for tensor in self.tensors]
        return notebook.block(
            f"{self.outcome.replace('_', ' ')}: {redact(self.output_url)}",
            notebook.lines(str(self)),
            notebook.table(columns, rows[:NUM_SHOWN]),
            f"<p>the first {NUM_SHOWN} of {len(rows):,} tensors</p>" if len(rows) > NUM_SHOWN else "",
        )


def plan(
    recipe: RecipeLike,
    output: Location,
    *,
    memory: Size | None = None,
    shard_size: Size | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    device: DeviceName = "auto",
    overwrite: bool = False,
    read_rate: str | float | None = None,
    write_rate: str | float | None = None,
    latency: str | float | None = None,
    request_rate: float | None = None,
    calibration: str | os.PathLike[str] | None = None,
    machine_price: float | None = None,
    follow_links: Sequence[Location] = (),
    on_event: OnEvent = ignore,
) -> PlanResult:
    """Return what a merge would read, write, hold, take and cost; refuse what cannot work. Nothing is written.

    Args:
        recipe: a file, a URL, its YAML as a text of several lines, or what the YAML says as a mapping.
        output: folder or URL of the output.
        memory: bound of one worker process; if None 80 % of what this machine allows, on Ray divided by its cores or
            by ``workers``, if fewer.
        shard_size: largest output shard; a 256th of the output, from 256 MB to 5 GB, if None.
        workers: local: compute threads, one per core if None. Ray: worker processes.
        executor: where to merge; ray if RAY_ADDRESS is set, else local, if None.
        device: auto takes a GPU if torch is installed and sees one.
        overwrite: whether a merge would replace what the output prefix holds.
        read_rate: of one worker from the inputs' store or disk, such as ``10Gbit/s``; as calibrated if None.
        write_rate: network of one worker to the output's store; as calibrated if None.
        latency: of one small request to a store, such as ``30ms``; as calibrated if None.
        request_rate: requests per second that the store takes from all workers together.
        calibration: file of constants, of the machine that will merge: its cores count then; what
            `stockflow calibrate` wrote, else the built-in ones, if None.
        machine_price: of one machine per hour, in any currency.
        follow_links: folders that links of weights may lead into; elsewhere only inside the checkpoint's own.
        on_event: told how it goes, from several threads.

    Raises:
        UserError: the recipe, the inputs or the budget must change.
        StorageError: reading failed after retries.
    """
    on_ray = is_on_ray(executor)
    constants = load_calibration(calibration)
    cores = constants[0].machine.cores if calibration else len(os.sched_getaffinity(0))
    threads = cores if workers is None and not on_ray else workers
    options = merge_options(memory, shard_size, threads, device, overwrite, on_ray=on_ray)
    conditions = Conditions(
        num_workers=(workers or cores) if on_ray else 1,
        num_threads=options.num_threads,
        cores=float(options.num_threads if on_ray else cores),
        read_rate=rate("read_rate", read_rate),
        write_rate=rate("write_rate", write_rate),
        latency_s=seconds("latency", latency),
        request_rate=request_rate,
        memory_bytes=default_memory(),
        on_ray=on_ray,
        machine_cores=cores,
        machine_price=_price("machine_price", machine_price),
    )
    inputs = open_inputs(recipe, on_event, follow_links)
    return _planned(inputs, os.fspath(output), options, conditions, constants, on_event)


def _planned(
    inputs: Inputs,
    output: str,
    options: MergeOptions,
    conditions: Conditions,
    constants: tuple[Calibration, str],
    on_event: OnEvent,
) -> PlanResult:
    on_event(Stage("planning"))
    merge_plan, workspace = driver.plan_merge(inputs, output, options)
    least_bytes = driver.least_memory_of(inputs, output, merge_plan, options)
    on_event(Stage("looking at the output"))
    notes = (
        *driver.side_file_notes(inputs),
        *driver.output_notes(inputs, output, merge_plan, overwrite=options.overwrite),
        *few_shards_note(merge_plan, options.num_workers),
    )
    url = driver.output_url(inputs, output)
    with driver.collector_paused():
        work = survey(merge_plan, workspace)
        found = forecast(work, constants, [checkpoint.url for checkpoint in merge_plan.checkpoints], url, conditions)
    return PlanResult(merge_plan, workspace, notes, url, work, least_bytes, found)


def merge(
    recipe: RecipeLike,
    output: Location,
    *,
    memory: Size | None = None,
    shard_size: Size | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    gpus_per_worker: float = 0.0,
    labels: Mapping[str, str] | None = None,
    worker_timeout: float | None = None,
    shard_timeout: float | None = None,
    device: DeviceName = "auto",
    overwrite: bool = False,
    follow_links: Sequence[Location] = (),
    on_event: OnEvent = ignore,
) -> MergeResult:
    """Merge checkpoints as the recipe says and publish the result; the same call again resumes.

    Args:
        recipe: a file, a URL, its YAML as a text of several lines, or what the YAML says as a mapping.
        output: folder or URL of the output.
        memory: bound of one worker process; if None 80 % of what this machine allows, on Ray divided by its cores or
            by ``workers``, if fewer.
        shard_size: largest output shard; a 256th of the output, from 256 MB to 5 GB, if None.
        workers: local: compute threads, one per core if None. Ray: worker processes.
        executor: where to merge; ray if RAY_ADDRESS is set, else local, if None.
        gpus_per_worker: Ray: a fraction lets several share one.
        labels: Ray: workers go to nodes with these labels.
        worker_timeout: Ray: seconds within which a worker must come; 900 if None.
        shard_timeout: Ray: seconds after which a shard that is not done goes to another worker.
        device: auto takes a GPU if torch is installed and sees one.
        overwrite: whether to replace what the output prefix holds.
        follow_links: folders that links of weights may lead into; elsewhere only inside the checkpoint's own.
        on_event: told how it goes, from several threads.

    Raises:
        UserError: the recipe, the inputs, the output or the budget must change.
        StorageError: storage failed after retries; the same call again resumes.
        ComputeLostError: workers were lost for good.
    """
    options = merge_options(memory, shard_size, workers, device, overwrite, on_ray=is_on_ray(executor))
    asked: dict[str, Any] = {"num_workers": workers, "gpus_per_worker": gpus_per_worker, "labels": labels or {}}
    if worker_timeout is not None:
        asked["no_worker_timeout_s"] = worker_timeout
    execute = execute_on(executor, asked | {"item_timeout_s": shard_timeout})
    inputs = open_inputs(recipe, on_event, follow_links)
    result = driver.merge(inputs, os.fspath(output), options, execute, on_event)
    return MergeResult(result, inputs.storage)


def inspect(
    recipe: RecipeLike,
    *,
    memory: Size | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    gpus_per_worker: float = 0.0,
    device: DeviceName = "auto",
    follow_links: Sequence[Location] = (),
    on_event: OnEvent = ignore,
) -> "Inspection":
    """Return the geometry of a recipe's models: cosines, norms, angles and ratios of every tensor. Nothing is merged.

    Args:
        recipe: a file, a URL, its YAML as a text of several lines, or what the YAML says as a mapping.
        memory: bound of one worker process; if None 80 % of what this machine allows, on Ray divided by its cores or
            by ``workers``, if fewer.
        workers: local: compute threads, one per core if None. Ray: worker processes.
        executor: where to read; ray if RAY_ADDRESS is set, else local, if None.
        gpus_per_worker: Ray: a fraction lets several share one.
        device: auto takes a GPU if torch is installed and sees one.
        follow_links: folders that links of weights may lead into; elsewhere only inside the checkpoint's own.
        on_event: told how it goes, from several threads.

    Raises:
        UserError: the recipe names no base, the inputs do not fit together, or the memory is too small.
        StorageError: reading failed after retries.
        ComputeLostError: workers were lost for good.
    """
    from stockflow.insight import inspection

    options = survey_options(memory, workers, executor, device)
    survey = survey_on(executor, workers, gpus_per_worker)
    return inspection.inspect(open_inputs(recipe, on_event, follow_links), options, survey, on_event)


def audit(
    subject: RecipeLike,
    merged: Location | None = None,
    *,
    recipe: RecipeLike | None = None,
    memory: Size | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    gpus_per_worker: float = 0.0,
    device: DeviceName = "auto",
    follow_links: Sequence[Location] = (),
    on_event: OnEvent = ignore,
) -> "Audit":
    """Tell which formula made a Model Stock merge, and how far it is from the correct one.

    Args:
        subject: recipe of the merge; alone: what the formula that mergekit first had would have done. Or the location
            of an output of stockflow, which says itself what it is.
        merged: checkpoint that some tool made by the recipe.
        recipe: of an output, its storage options apply (endpoints, anonymous access).
        memory: bound of one worker process; if None 80 % of what this machine allows, on Ray divided by its cores or
            by ``workers``, if fewer.
        workers: local: compute threads, one per core if None. Ray: worker processes.
        executor: where to read; ray if RAY_ADDRESS is set, else local, if None.
        gpus_per_worker: Ray: a fraction lets several share one.
        device: auto takes a GPU if torch is installed and sees one.
        follow_links: folders that links of weights may lead into; elsewhere only inside the checkpoint's own.
        on_event: told how it goes, from several threads.

    Raises:
        UserError: the merge is not by Model Stock, or recipe, inputs or memory must change.
        StorageError: reading failed after retries.
        ComputeLostError: workers were lost for good.
    """
    from stockflow.insight import audit as auditing

    options = survey_options(memory, workers, executor, device)
    survey = survey_on(executor, workers, gpus_per_worker)
    return auditing.audit(open_merge(subject, merged, recipe, on_event, follow_links), options, survey, on_event)


def diff(
    a: Location,
    b: Location,
    *,
    memory: Size | None = None,
    recipe: RecipeLike | None = None,
    follow_links: Sequence[Location] = (),
    on_event: OnEvent = ignore,
) -> "CheckpointDifference":
    """Compare two checkpoints tensor by tensor, streamed from anywhere.

    Args:
        a: the one that distances are relative to.
        b: the other one.
        memory: bound of the process; 80 % of what the machine allows if None.
        recipe: its storage options apply (endpoints, anonymous access).
        follow_links: folders that links of weights may lead into; elsewhere only inside the checkpoint's own.
        on_event: told how it goes, from several threads.

    Raises:
        UserError: a checkpoint is missing, forbidden or malformed, or the memory is too small.
        StorageError: reading failed after retries.
    """
    from stockflow.insight.comparison import compare_checkpoints

    return compare_checkpoints(
        resolve_location(os.fspath(a)),
        resolve_location(os.fspath(b)),
        storage_of(recipe, follow_links),
        survey_options(memory, None, "local", "cpu"),
        _survey_in_this_process,
        on_event=on_event,
    )


def verify(
    output: Location,
    *,
    inputs: bool = False,
    sample: float | str | None = None,
    seed: int | None = None,
    memory: Size | None = None,
    recipe: RecipeLike | None = None,
    follow_links: Sequence[Location] = (),
    on_event: OnEvent = ignore,
) -> "Verification":
    """Read every published file again and hold it against the manifest.

    Args:
        output: folder or URL of the output.
        inputs: whether to compare the inputs' stamps too.
        sample: merge this share of the tensors, such as ``0.05`` or ``5%``, again from the inputs.
        seed: which tensors a sample takes; others each time if None.
        memory: bound of the process that merges a sample again.
        recipe: its storage options apply (endpoints, anonymous access).
        follow_links: folders that links of weights may lead into; elsewhere only inside the checkpoint's own.
        on_event: told how it goes, from several threads.

    Raises:
        UserError: there is no finished output, or a sample cannot be merged again here.
        StorageError: reading failed after retries.
    """
    from stockflow.verification.verify import verify as verify_output

    config = storage_of(recipe, follow_links)
    options = sample_options(sample, seed, memory)
    return verify_output(os.fspath(output), config, inputs=inputs, sample=options, on_event=on_event)


def report(output: Location, *, recipe: RecipeLike | None = None, on_event: OnEvent = ignore) -> "Report":
    """Return what a finished merge did to the models and how it ran, from its records alone; no weight is read.

    Args:
        output: folder or URL of the output.
        recipe: its storage options apply (endpoints, anonymous access).
        on_event: told how it goes, from several threads.

    Raises:
        NotFoundError: there is no finished output.
        DamagedOutputError: its manifest or its table of tensors is not what was published.
        StorageError: reading failed after retries.
    """
    from stockflow.reports.report import report as report_on

    config = storage_of(recipe)
    on_event(Stage("reading records"))
    return report_on(os.fspath(output), config, lambda num_bytes: on_event(Moved(num_bytes)))


def storage_of(recipe: RecipeLike | None, follow_links: Sequence[Location] = ()) -> StorageConfig:
    """Return the storage options of a recipe, or none, and which links are followed."""
    options = StorageConfig() if recipe is None else recipe_of(recipe).storage
    return replace(options, trusted=trusted_folders(follow_links))


def open_inputs(recipe: RecipeLike, on_event: OnEvent = ignore, follow_links: Sequence[Location] = ()) -> Inputs:
    """Return the opened checkpoints of a recipe."""
    on_event(Stage("opening checkpoints", unit="files"))
    trusted = trusted_folders(follow_links)
    inputs = Inputs.open(recipe_of(recipe), lambda file: on_event(Done(file)), trusted)
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


def num_bytes(option: str, size: Size | None) -> int | None:
    """Return a size in bytes, or None if none is given; a message about it names the option."""
    try:
        return None if size is None else parse_size(str(size))
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None


_BITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def rate(option: str, given: str | float | None) -> float | None:
    """Return bytes per second from ``10Gbit/s``, ``1.25GB/s`` or a number; a message about it names the option."""
    if given is None:
        return None
    text = given.strip() if isinstance(given, str) else f"{given}/s"
    bits = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([kMGT])bit/s", text)
    with suppress(RecipeError):
        found = float(bits[1]) * _BITS[bits[2]] / 8 if bits else num_bytes(option, text.removesuffix("/s"))
        if found and text.endswith("/s"):
            return float(found)
    raise RecipeError(f"{option}: expected a rate such as 10Gbit/s or 1.25GB/s, found {given!r}")


def seconds(option: str, given: str | float | None) -> float | None:
    """Return seconds from ``30ms``, ``0.03s`` or a number; a message about it names the option."""
    if given is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?(ms|s)", given.strip() if isinstance(given, str) else f"{given}s")
    if not found:
        raise RecipeError(f"{option}: expected a time such as 30ms or 0.03s, found {given!r}")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def _price(option: str, given: float | None) -> float | None:
    if given is not None and not 0 <= given < math.inf:
        raise RecipeError(f"{option}: expected a price per hour, found {given}")
    return given


def sample_options(sample: float | str | None, seed: int | None, memory: Size | None) -> "SampleOptions | None":
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
        memory_bytes=num_bytes("memory", memory) or default_memory(),
        num_threads=len(os.sched_getaffinity(0)),
    )


def is_on_ray(executor: ExecutorName | None) -> bool:
    """Return whether Ray executes: asked for by name, or by RAY_ADDRESS."""
    _check_choice("executor", executor, (None, *get_args(ExecutorName)))
    return executor == "ray" or (executor is None and bool(os.environ.get("RAY_ADDRESS")))


def merge_options(
    memory: Size | None,
    shard_size: Size | None,
    workers: int | None,
    device: DeviceName,
    overwrite: bool,
    *,
    on_ray: bool = False,
) -> MergeOptions:
    """Return the options of a merge as the driver takes them."""
    _check_choice("device", device, get_args(DeviceName))
    if workers is not None and workers < 1:
        raise RecipeError(f"workers: expected at least 1, found {workers}")
    cores = len(os.sched_getaffinity(0))
    # A Ray worker has one CPU slot, so it computes on one thread and shares the node with as many as that has cores.
    num_slots = min(workers or cores, cores) if on_ray else 1
    return MergeOptions(
        memory_bytes=num_bytes("memory", memory) or default_memory(num_slots=num_slots),
        num_threads=1 if on_ray else workers or cores,
        device=device,
        shard_size=num_bytes("shard_size", shard_size),
        overwrite=overwrite,
        num_workers=workers if on_ray else None,
        holds_plan=not on_ray,
    )


def execute_on(executor: ExecutorName | None, on_ray: Mapping[str, Any]) -> Execute:
    """Return what merges shards where the options say; ``on_ray`` is what to ask of Ray (``RayOptions``)."""
    return partial(_on_ray, on_ray) if is_on_ray(executor) else _in_this_process


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


def survey_options(
    memory: Size | None, workers: int | None, executor: ExecutorName | None, device: DeviceName
) -> "SurveyOptions":
    """Return what a survey may use."""
    from stockflow.insight.inspection import SurveyOptions

    options = merge_options(memory, None, workers, device, False, on_ray=is_on_ray(executor))
    return SurveyOptions(options.memory_bytes, options.num_threads, options.device)


def survey_on(executor: ExecutorName | None, workers: int | None, gpus_per_worker: float) -> "Survey":
    """Return what looks at tensors where the options say."""
    if not is_on_ray(executor):
        return _survey_in_this_process
    return partial(_survey_on_ray, workers, gpus_per_worker)


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


def _check_choice(option: str, given: object, choices: Sequence[object]) -> None:
    if given not in choices:
        raise RecipeError(f"{option}: expected one of {', '.join(map(repr, choices))}, found {given!r}")


def _counted(counts: object) -> str:
    assert isinstance(counts, Mapping)
    return ", ".join(f"{count} by {name}" for name, count in counts.items())


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value
