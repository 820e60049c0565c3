"""The model card: what was merged, how, from what."""

import math
from collections.abc import Sequence

from stockflow.checkpoints.naming import KINDS, kind_of
from stockflow.checkpoints.opening import CONFIG_FILE
from stockflow.output.receipts import TensorFacts
from stockflow.output.rounding import proved_of_tensors
from stockflow.planning.plan import MergePlan
from stockflow.recipe import Recipe
from stockflow.storage import redact
from stockflow.text.escaping import code_block, code_cell
from stockflow.version import __version__


def model_card(recipe: Recipe, plan: MergePlan, rows: Sequence[TensorFacts]) -> str:
    """Return README.md of an output: front matter, inputs, recipe, and what the merge found."""
    inputs = "\n".join(
        f"| {index} | {code_cell(redact(checkpoint.url))} | {_role(recipe, index)} |"
        for index, checkpoint in enumerate(plan.checkpoints)
    )
    return f"""---
library_name: transformers
tags:
- merge
- stockflow
---
# Merged with `{recipe.merge_method}`

This checkpoint was made by stockflow {__version__}.
`stockflow verify` holds it against `manifest.json`; `_stockflow/{plan.plan_id}/tensors.parquet` has one row per tensor.

| # | checkpoint | role |
|---|---|---|
{inputs}

## Recipe

{code_block(recipe.text.strip(), "yaml")}

{_said(plan, rows)}## Summary

t is the share of the models' average change that was kept, cosine the mean over pairs of models.

{summary_table(rows)}

`stockflow report . --html report.html`, run in a copy of this folder or with its URL, shows it by layer, and how the
merge ran.

Merge id `{plan.merge_id}`, plan id `{plan.plan_id}`.
"""


def summary_table(rows: Sequence[TensorFacts]) -> str:
    """Return a Markdown table: per kind of module and over all, tensors, parameters, and where t and cosine lie."""
    lines = [
        "| kind | tensors | parameters | t: mean | least | largest | cosine: mean | least | largest | clamped |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups = by_kind(rows)
    for kind, members in (*groups.items(), *([("**all**", rows)] if len(groups) > 1 else [])):
        numbers = [
            shown(of([getattr(row, name) for row in members]))
            for name in ("ratio", "mean_cosine")
            for of in (mean, least, largest)
        ]
        clamped = sum("clamped" in row.flags for row in members)
        lines.append(
            f"| {kind} | {len(members):,} | {sum(row.num_parameters for row in members):,} "
            f"| {' | '.join(numbers)} | {clamped:,} |"
        )
    return "\n".join(lines)


def by_kind(rows: Sequence[TensorFacts]) -> dict[str, list[TensorFacts]]:
    """Return the rows grouped by kind of module, in the order of ``KINDS``."""
    groups: dict[str, list[TensorFacts]] = {kind: [] for kind in KINDS}
    for row in rows:
        if "scales" not in row.flags:
            groups[kind_of(row.name)].append(row)
    return {kind: members for kind, members in groups.items() if members}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers that are there, None if none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def least(values: Sequence[float | None]) -> float | None:
    """Return the least of the numbers that are there, None if none is."""
    return min((value for value in values if value is not None), default=None)


def largest(values: Sequence[float | None]) -> float | None:
    """Return the largest of the numbers that are there, None if none is."""
    return max((value for value in values if value is not None), default=None)


def shown(value: float | None) -> str:
    """Return a fact for people."""
    return "-" if value is None else f"{value:.4f}"


def _said(plan: MergePlan, rows: Sequence[TensorFacts]) -> str:
    remarks = (*plan.remarks, *proved_of_tensors(plan, rows))
    lines = [f"- {code_cell(remark)}" for remark in remarks if remark.severity != "note"]
    return "\n".join(("## Known of these inputs", "", *lines, "", "")) if lines else ""


def _role(recipe: Recipe, index: int) -> str:
    if index >= len(recipe.checkpoints):
        return "tokenizer"
    if index == 0 and recipe.base_model is not None:
        return "base"
    return f"model, {CONFIG_FILE} and tokenizer" if index == recipe.donor else "model"
