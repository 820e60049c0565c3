"""The command line: wiring, printing, exit codes."""

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow import __version__
from stockflow.errors import EXIT_BUG, EXIT_FINDINGS, EXIT_USER, RecipeError, StockflowError
from stockflow.redaction import without_secrets

if TYPE_CHECKING:
    from stockflow.driver import Execute, Inputs, MergeOptions, Observer
    from stockflow.plan import ShardPlan
    from stockflow.receipts import Receipt
    from stockflow.verify import SampleOptions
    from stockflow.worker import WorkerSpec

app = typer.Typer(
    help="Exact, streaming merges of checkpoints too large for one machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done; 2 change recipe, inputs or budget; 3 storage failed, run again to resume; "
    "4 verify found something; 5 compute was lost; 70 our bug; 130/143 interrupted, resumable.",
)


class ExecutorName(StrEnum):
    """Where shards are merged."""

    local = "local"
    ray = "ray"


class DeviceName(StrEnum):
    """What computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe: a file, a URL, or - for standard input.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or URL (s3://, gs://, az://) of the output.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Bound of one worker process, such as 2GiB. Default: 80 % of what the machine allows."),
]
ShardSize = Annotated[
    str | None,
    typer.Option(help="Largest output shard, such as 5GB. Default: a 256th of the output, from 256 MB to 5 GB."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Local: compute threads (default: one per core). Ray: worker processes."),
]
Executor = Annotated[
    ExecutorName | None,
    typer.Option(help="Where to merge. Default: ray if RAY_ADDRESS is set, else local.", show_default=False),
]
GpusPerWorker = Annotated[float, typer.Option(min=0.0, help="Ray: GPUs per worker; a fraction lets several share one.")]
Device = Annotated[DeviceName, typer.Option(help="auto takes a GPU if torch sees one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output prefix holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stockflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def merge(
    recipe: Recipe_,
    output: Output,
    memory: Memory = None,
    shard_size: ShardSize = None,
    workers: Workers = None,
    executor: Executor = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    device: Device = DeviceName.auto,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints as RECIPE says and publish the result at OUTPUT.

    Running the same command again resumes: shards that are there already are kept. The output is complete
    when OUTPUT/manifest.json exists; `stockflow verify` checks every byte of it.
    """
    from stockflow import driver
    from stockflow.describe import result_facts, result_lines
    from stockflow.interruption import interruptible
    from stockflow.reporting import reporting

    with _exit_codes():
        with interruptible(), reporting(quiet=quiet) as observer:
            observer.on_stage("opening checkpoints")
            options = _options(memory, shard_size, workers, device, overwrite, on_ray=_is_on_ray(executor))
            execute = _execute(executor, workers, gpus_per_worker)
            result = driver.merge(_inputs(recipe), output, options, execute, observer)
        if as_json:
            print(json.dumps(result_facts(result), indent=1))
        elif not quiet:
            print("\n".join(result_lines(result)))


@app.command()
def plan(
    recipe: Recipe_,
    output: Output,
    memory: Memory = None,
    shard_size: ShardSize = None,
    workers: Workers = None,
    executor: Executor = None,
    device: Device = DeviceName.auto,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would read, write and hold; refuse what cannot work. Nothing is written."""
    from stockflow import driver
    from stockflow.describe import plan_lines, project

    with _exit_codes():
        options = _options(memory, shard_size, workers, device, overwrite, on_ray=_is_on_ray(executor))
        opened = _inputs(recipe)
        merge_plan, workspace = driver.plan_merge(opened, output, options)
        notes = list(driver.output_notes(opened, output, merge_plan, overwrite=overwrite))
        with driver.collector_paused():
            if as_json:
                print(json.dumps(project(merge_plan, workspace, notes), indent=1))
            elif not quiet:
                print("\n".join(plan_lines(merge_plan, workspace, notes)))


@app.command()
def verify(
    output: Output,
    inputs: Annotated[bool, typer.Option("--inputs", help="Compare the inputs' stamps too.")] = False,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Merge this share of the tensors, such as 5% or 0.05, again from the inputs: statistics must agree "
            "within 1e-7, and what the recorded coefficients give must be the published bytes.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which tensors a sample takes. Default: others each time; it is printed.")
    ] = None,
    memory: Memory = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose storage options apply (endpoints, anonymous access).")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Read every published file again and hold it against the manifest. Exit 4 with one line per finding.

    The output may be anyone's. --inputs and --sample also read the inputs that it names: use them where you
    trust those places. --seed and --memory go with --sample.
    """
    from dataclasses import asdict

    from stockflow.recipe import load_recipe
    from stockflow.reporting import counting
    from stockflow.storage import StorageConfig
    from stockflow.verify import summary_lines
    from stockflow.verify import verify as verify_output

    with _exit_codes():
        config = load_recipe(recipe).storage if recipe else StorageConfig()
        options = _sample(sample, seed, memory)
        with counting("verified", quiet=quiet) as on_bytes:
            result = verify_output(output, config, inputs=inputs, sample=options, on_bytes=on_bytes)
        if as_json:
            facts = {
                "output": result.output_url,
                "plan_id": result.plan_id,
                **({"sampled": asdict(result.sampled)} if result.sampled else {}),
                "findings": [asdict(finding) for finding in result.findings],
            }
            print(json.dumps(facts, indent=1))
        elif result.findings or not quiet:
            print("\n".join(summary_lines(result)))
        if result.findings:
            raise typer.Exit(EXIT_FINDINGS)


@app.command()
def clean(
    output: Output,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is shown.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose storage options apply (endpoints, anonymous access).")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what killed runs left at OUTPUT: open uploads, temporary files, stale records. --yes removes it.

    Nothing is touched while a run is at work, or was seen less than 15 minutes ago. What is published stays,
    and so do finished shards of an unfinished merge, which the same merge run again goes on with.
    """
    from stockflow.clean import find_leftovers, leftover_facts, leftover_lines, remove
    from stockflow.recipe import load_recipe
    from stockflow.storage import StorageConfig, open_store

    with _exit_codes():
        config = load_recipe(recipe).storage if recipe else StorageConfig()
        store = open_store(output, config, writable=True)
        leftovers = find_leftovers(store)
        if yes:
            remove(store, leftovers)
        if as_json:
            print(json.dumps(leftover_facts(leftovers, is_removed=yes), indent=1))
        elif not quiet:
            print("\n".join(leftover_lines(leftovers, is_removed=yes)))


@app.command()
def demo(
    folder: Annotated[str | None, typer.Argument(help="Where to work. Default: a new temporary folder.")] = None,
    memory: Memory = None,
    shard_size: ShardSize = "2MB",
    workers: Workers = None,
    executor: Executor = None,
    device: Device = DeviceName.auto,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train small language models, merge them with Model Stock, verify, and compare: two minutes, no network."""
    import tempfile
    from pathlib import Path

    from stockflow.demo.story import demo_tables, run_demo
    from stockflow.errors import OutputConflictError

    with _exit_codes():
        where = Path(folder or tempfile.mkdtemp(prefix="stockflow-demo-")).absolute()
        if where.exists() and not (where.is_dir() and (overwrite or not any(where.iterdir()))):
            raise OutputConflictError(f"{where} is not an empty folder; name a new one for the demo, or --overwrite")
        where.mkdir(parents=True, exist_ok=True)
        options = _options(memory, shard_size, workers, device, overwrite, on_ray=_is_on_ray(executor))
        execute = _execute(executor, workers, gpus_per_worker=0.0)
        result = run_demo(where, options, execute, (lambda _: None) if quiet or as_json else print)
        if as_json:
            facts = {"losses": result.losses, "findings": [str(finding) for finding in result.verification.findings]}
            print(json.dumps({**facts, "folder": str(where), "seconds": result.seconds}, indent=1))
        elif not quiet:
            print(f"\n{demo_tables(result)}\n\n{result.seconds:.0f} s; everything is in {where}")
        if result.verification.findings:
            raise typer.Exit(EXIT_FINDINGS)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from stockflow.recipe import recipe_schema

    with _exit_codes():
        print(json.dumps(recipe_schema(), indent=1), flush=True)


def main() -> None:
    """Run the command line."""
    app()


def _is_on_ray(executor: ExecutorName | None) -> bool:
    return executor is ExecutorName.ray or (executor is None and bool(os.environ.get("RAY_ADDRESS")))


def _execute(executor: ExecutorName | None, workers: int | None, gpus_per_worker: float) -> "Execute":
    return partial(_on_ray, workers, gpus_per_worker) if _is_on_ray(executor) else _in_this_process


def _in_this_process(spec: "WorkerSpec", shards: "Sequence[ShardPlan]", observer: "Observer") -> "Iterator[Receipt]":
    from stockflow.execution import in_this_process

    return in_this_process(spec, shards, observer)


def _on_ray(
    workers: int | None,
    gpus_per_worker: float,
    spec: "WorkerSpec",
    shards: "Sequence[ShardPlan]",
    observer: "Observer",
) -> "Iterator[Receipt]":
    from stockflow.execution import on_ray
    from stockflow.executors.ray import RayOptions

    return on_ray(spec, shards, observer, RayOptions(num_workers=workers, gpus_per_worker=gpus_per_worker))


def _inputs(recipe: str) -> "Inputs":
    from stockflow.driver import Inputs
    from stockflow.recipe import load_recipe

    return Inputs.open(load_recipe(recipe))


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors into one clear message and the exit code of their kind."""
    try:
        yield
    except StockflowError as error:
        print(f"stockflow: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_USER) from None
    except Exception:
        print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        print("stockflow: this is a bug in stockflow; please report the lines above", file=sys.stderr)
        raise typer.Exit(EXIT_BUG) from None


def _options(
    memory: str | None,
    shard_size: str | None,
    workers: int | None,
    device: DeviceName,
    overwrite: bool,
    *,
    on_ray: bool = False,
) -> "MergeOptions":
    from stockflow.budget import default_memory
    from stockflow.driver import MergeOptions

    cores = len(os.sched_getaffinity(0))
    # A Ray worker has one CPU slot, so it computes on one thread and shares the node with the others.
    return MergeOptions(
        memory_bytes=_size("--memory", memory) or default_memory(num_slots=(workers or cores) if on_ray else 1),
        num_threads=1 if on_ray else workers or cores,
        device=device.value,
        shard_size=_size("--shard-size", shard_size),
        overwrite=overwrite,
    )


def _sample(share: str | None, seed: int | None, memory: str | None) -> "SampleOptions | None":
    from stockflow.budget import default_memory
    from stockflow.verify.sample import SampleOptions, draw_seed, parse_share

    if share is None:
        if seed is not None or memory is not None:
            raise RecipeError("--seed and --memory go with --sample: nothing is computed without it")
        return None
    try:
        parsed = parse_share(share)
    except RecipeError as error:
        raise RecipeError(f"--sample: {error}") from None
    return SampleOptions(
        share=parsed,
        seed=draw_seed() if seed is None else seed,
        memory_bytes=_size("--memory", memory) or default_memory(),
        num_threads=len(os.sched_getaffinity(0)),
    )


def _size(option: str, text: str | None) -> int | None:
    from stockflow.recipe import parse_size

    try:
        return None if text is None else parse_size(text)
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None
