"""``stockflow demo``."""

import json
from typing import Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    Memory,
    Overwrite,
    Progress,
    ProgressName,
    Quiet,
    ShardSize,
    Workers,
    is_on_ray,
    merge_options,
    with_progress,
)
from stockflow.cli.printing import say
from stockflow.errors import EXIT_FINDINGS


def demo(
    folder: Annotated[str | None, typer.Argument(help="Where to work. Default: a new temporary folder.")] = None,
    memory: Memory = None,
    shard_size: ShardSize = "2MB",
    workers: Workers = None,
    executor: Executor = None,
    device: Device = DeviceName.auto,
    overwrite: Overwrite = False,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train small language models, merge them with Model Stock, verify, and compare: two minutes, no network."""
    import tempfile
    from pathlib import Path

    from stockflow.api import execute_on
    from stockflow.errors import OutputConflictError
    from stockflow.extras import needs_torch

    with exit_codes():
        with needs_torch("stockflow demo"):
            from stockflow.demo.story import demo_tables, run_demo
        where = Path(folder or tempfile.mkdtemp(prefix="stockflow-demo-")).absolute()
        if where.exists() and not (where.is_dir() and (overwrite or not any(where.iterdir()))):
            raise OutputConflictError(f"{where} is not an empty folder; name a new one for the demo, or --overwrite")
        where.mkdir(parents=True, exist_ok=True)
        options = merge_options(memory, shard_size, workers, device, overwrite, on_ray=is_on_ray(executor))
        execute = execute_on(executor.value if executor else None, {"num_workers": workers})
        tells = not (quiet or as_json)
        # The story on standard output is progress enough.
        style = ProgressName.none if tells and progress is ProgressName.auto else progress
        with with_progress(style, quiet=quiet) as on_event:
            result = run_demo(where, options, execute, print if tells else lambda _: None, on_event)
        if as_json:
            facts = {"losses": result.losses, "findings": [str(finding) for finding in result.verification.findings]}
            print(json.dumps({**facts, "folder": str(where), "seconds": result.seconds}, indent=1))
        elif not quiet:
            say(f"\n{demo_tables(result)}\n\n{result.seconds:.0f} s; everything is in {where}")
            say(f"next: stockflow inspect {where / 'model-stock.yaml'}")
        if result.verification.findings:
            raise typer.Exit(EXIT_FINDINGS)
