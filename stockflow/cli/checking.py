"""``stockflow verify`` and ``stockflow clean``."""

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import AsJson, Memory, OutputArgument, Quiet, StorageRecipe, size_option
from stockflow.errors import EXIT_FINDINGS, RecipeError

if TYPE_CHECKING:
    from stockflow.verify import SampleOptions


def verify(
    output: OutputArgument,
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
    recipe: StorageRecipe = None,
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

    with exit_codes():
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


def clean(
    output: OutputArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is shown.")] = False,
    recipe: StorageRecipe = None,
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

    with exit_codes():
        config = load_recipe(recipe).storage if recipe else StorageConfig()
        store = open_store(output, config, writable=True)
        leftovers = find_leftovers(store)
        if yes:
            remove(store, leftovers)
        if as_json:
            print(json.dumps(leftover_facts(leftovers, is_removed=yes), indent=1))
        elif not quiet:
            print("\n".join(leftover_lines(leftovers, is_removed=yes)))


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
        memory_bytes=size_option("--memory", memory) or default_memory(),
        num_threads=len(os.sched_getaffinity(0)),
    )
