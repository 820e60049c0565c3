"""Cards of adapters: what they were made of, and what they keep."""

from stockflow.adapters.combination import CombinationPlan, ranks_in_words
from stockflow.adapters.findings import Extraction
from stockflow.adapters.record import share
from stockflow.storage import redact
from stockflow.text.escaping import code_block, code_cell
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


def combination_card(plan: CombinationPlan, recipe_text: str) -> str:
    """Return README.md of an adapter that was made of others."""
    inputs = "\n".join(f"| {code_cell(redact(url))} |" for url in plan.urls)
    return f"""---
library_name: peft
tags:
- lora
- merge
- stockflow
---
# An adapter of {len(plan.urls)} adapters

Merged by stockflow {__version__}, in float64, each number rounded once: {len(plan.modules)} modules with factors of
{ranks_in_words(plan.modules)}.

| adapter |
|---|
{inputs}

## Recipe

{code_block(recipe_text.strip(), "yaml")}
"""
