"""The model card: what was merged, how, from what."""

import math
from collections.abc import Sequence

from stockflow import __version__
from stockflow.checkpoint import CONFIG_FILE
from stockflow.naming import KINDS, kind_of
from stockflow.plan import MergePlan
from stockflow.receipts import TensorFacts
from stockflow.recipe import Recipe
from stockflow.storage import redact


def model_card(recipe: Recipe, plan: MergePlan, rows: Sequence[TensorFacts]) -> str:
    """Return README.md of an output: front matter, inputs, recipe, and what the merge found."""
    inputs = "\n".join(
        f"| {index} | `{redact(checkpoint.url)}` | {_role(recipe, index)} |"
        for index, checkpoint in enumerate(plan.checkpoints)
    )
    return f"""---
library_name: transformers
tags:
- merge
- stockflow
---
# Merged with `{recipe.merge_method}`

This checkpoint was made by [stockflow](https://github.com/stockflow/stockflow) {__version__}.
`stockflow verify` holds it against `manifest.json`; `_stockflow/{plan.plan_id}/tensors.parquet` has one row per tensor.

| # | checkpoint | role |
|---|---|---|
{inputs}

## Recipe

```yaml
{recipe.text.strip()}
```

## Summary

{summary_table(rows)}

Merge id `{plan.merge_id}`, plan id `{plan.plan_id}`.
"""


def summary_table(rows: Sequence[TensorFacts]) -> str:
    """Return a Markdown table: tensors, parameters, mean cosine and ratio per kind of layer."""
    lines = [
        "| kind | tensors | parameters | mean cosine | mean ratio t | clamped |",
        "|---|---|---|---|---|---|",
    ]
    for kind, members in by_kind(rows).items():
        cosine, ratio = (mean([getattr(row, name) for row in members]) for name in ("mean_cosine", "ratio"))
        clamped = sum("clamped" in row.flags for row in members)
        lines.append(
            f"| {kind} | {len(members)} | {sum(row.num_elems for row in members):,} "
            f"| {shown(cosine)} | {shown(ratio)} | {clamped} |"
        )
    return "\n".join(lines)


def by_kind(rows: Sequence[TensorFacts]) -> dict[str, list[TensorFacts]]:
    """Return the rows grouped by kind of layer, in the order of ``KINDS``."""
    groups: dict[str, list[TensorFacts]] = {kind: [] for kind in KINDS}
    for row in rows:
        groups[kind_of(row.name)].append(row)
    return {kind: members for kind, members in groups.items() if members}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers that are there, None if none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def shown(value: float | None) -> str:
    """Return a fact for people."""
    return "-" if value is None else f"{value:.4f}"


def _role(recipe: Recipe, index: int) -> str:
    if index == 0 and recipe.base_model is not None:
        return "base"
    return f"model, {CONFIG_FILE} and tokenizer" if index == recipe.donor else "model"
