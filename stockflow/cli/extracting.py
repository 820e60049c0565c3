"""``stockflow extract``."""

from typing import Annotated, Unpack

import typer

from stockflow.cli.options import Answer, Logging, StorageRecipe, Told, command, facts_of
from stockflow.settings import ExtractSettings


@command(ExtractSettings, Logging, resumes=True)
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint: a folder, a URL, or org/name on the hub.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The checkpoint that was tuned from it.")],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Folder or URL (s3://, gs://, az://) of the adapter.")
    ],
    told: Told,
    recipe: StorageRecipe = None,
    **settings: Unpack[ExtractSettings],
) -> Answer:
    """Extract a LoRA adapter from the difference of two checkpoints, as PEFT writes it, and publish it at OUTPUT.

    Streamed: every matrix is read twice, whatever its size. Tensors that are equal are no targets; what changed and
    does not decompose (norms, biases, routers, embeddings) is refused by name, or written whole with --keep-whole.
    Running the same command again resumes.
    """
    from stockflow import api

    found = api.extract(base, tuned, output, recipe=recipe, on_event=told.on_event, **settings)
    return Answer(lambda: found, facts_of(found), is_kept=True)
