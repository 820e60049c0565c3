"""``stockflow merge`` and ``stockflow plan``."""

import json

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    GpusPerWorker,
    Label,
    Memory,
    OutputArgument,
    Overwrite,
    Quiet,
    RecipeArgument,
    ShardSize,
    ShardTimeout,
    Workers,
    WorkerTimeout,
    execute_on,
    is_on_ray,
    merge_options,
    open_inputs,
)


def merge(
    recipe: RecipeArgument,
    output: OutputArgument,
    memory: Memory = None,
    shard_size: ShardSize = None,
    workers: Workers = None,
    executor: Executor = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    label: Label = None,
    worker_timeout: WorkerTimeout = None,
    shard_timeout: ShardTimeout = None,
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

    with exit_codes():
        with interruptible(), reporting(quiet=quiet) as observer:
            observer.on_stage("opening checkpoints")
            options = merge_options(memory, shard_size, workers, device, overwrite, on_ray=is_on_ray(executor))
            execute = execute_on(
                executor,
                workers,
                gpus_per_worker,
                worker_timeout=worker_timeout,
                shard_timeout=shard_timeout,
                label=label,
            )
            result = driver.merge(open_inputs(recipe), output, options, execute, observer)
        if as_json:
            print(json.dumps(result_facts(result), indent=1))
        elif not quiet:
            print("\n".join(result_lines(result)))


def plan(
    recipe: RecipeArgument,
    output: OutputArgument,
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
    from stockflow.planning import few_shards_note

    with exit_codes():
        options = merge_options(memory, shard_size, workers, device, overwrite, on_ray=is_on_ray(executor))
        opened = open_inputs(recipe)
        merge_plan, workspace = driver.plan_merge(opened, output, options)
        notes = list(driver.output_notes(opened, output, merge_plan, overwrite=overwrite))
        notes += few_shards_note(merge_plan, options.num_workers)
        with driver.collector_paused():
            if as_json:
                print(json.dumps(project(merge_plan, workspace, notes), indent=1))
            elif not quiet:
                print("\n".join(plan_lines(merge_plan, workspace, notes)))
