"""The card of an adapter: what it was made of, and what it keeps."""

from stockflow.adapters.findings import Extraction, share
from stockflow.storage import redact
from stockflow.text.escaping import code_cell
from stockflow.version import __version__


def extraction_card(found: Extraction) -> str:
    """Return README.md of an adapter that was extracted."""
    table = "\n".join(
        f"| {code_cell(row.name)} | {row.held} | {row.rank or ''} | {'' if row.energy is None else share(row.energy)} |"
        for row in found.tensors
    )
    return f"""---
library_name: peft
tags:
- lora
- stockflow
---
# What was tuned, as an adapter

Extracted by stockflow {__version__}: base and factors together are the tuned model, as far as the
factors keep it.

| | |
|---|---|
| base | {code_cell(redact(found.base_url))} |
| tuned | {code_cell(redact(found.tuned_url))} |
| energy kept | {share(found.energy)} of the squared norm of all changes that factors hold |

| tensor | held by | rank | energy kept |
|---|---|---:|---:|
{table}
"""
