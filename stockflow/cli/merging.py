"""``stockflow merge``."""

import json

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    FollowLinks,
    GpusPerWorker,
    Label,
    LogFormat,
    LogFormatName,
    LogLevel,
    LogLevelName,
    Memory,
    MetricsPort,
    OutputArgument,
    Overwrite,
    Progress,
    ProgressName,
    Quiet,
    RecipeArgument,
    ShardSize,
    ShardTimeout,
    Workers,
    WorkerTimeout,
    labels_option,
    size_option,
    with_metrics,
    with_progress,
)
from stockflow.cli.printing import say


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
    follow_links: FollowLinks = None,
    progress: Progress = ProgressName.auto,
    log_format: LogFormat = LogFormatName.text,
    log_level: LogLevel = LogLevelName.info,
    metrics_port: MetricsPort = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints as RECIPE says and publish the result at OUTPUT.

    Running the same command again resumes: shards that are there already are kept. The output is complete
    when OUTPUT/manifest.json exists; `stockflow verify` checks every byte of it.
    """
    from stockflow import api
    from stockflow.interruption import interruptible

    with exit_codes():
        with (
            with_progress(progress, quiet=quiet, log_format=log_format, log_level=log_level) as told,
            interruptible(),  # within: else the exit that `with_progress` makes of a signal is an error again
            with_metrics(metrics_port, told) as on_event,
        ):
            result = api.merge(
                recipe,
                output,
                memory=size_option("--memory", memory),
                shard_size=size_option("--shard-size", shard_size),
                workers=workers,
                executor=executor.value if executor else None,
                gpus_per_worker=gpus_per_worker,
                labels=labels_option(label or ()),
                worker_timeout=worker_timeout,
                shard_timeout=shard_timeout,
                device=device.value,
                overwrite=overwrite,
                follow_links=follow_links or (),
                on_event=on_event,
            )
        if as_json:
            print(json.dumps(result.facts(), indent=1))
        elif not quiet:
            say(result)
