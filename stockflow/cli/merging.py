"""``stockflow merge``."""

import json

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    GpusPerWorker,
    Memory,
    OutputArgument,
    Overwrite,
    Quiet,
    RecipeArgument,
    ShardSize,
    Workers,
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
            execute = execute_on(executor, workers, gpus_per_worker)
            result = driver.merge(open_inputs(recipe), output, options, execute, observer)
        if as_json:
            print(json.dumps(result_facts(result), indent=1))
        elif not quiet:
            print("\n".join(result_lines(result)))
