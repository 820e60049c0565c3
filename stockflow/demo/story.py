"""The demo: train, plan, merge, verify, compare. Real parts throughout; whatever the numbers are, they are printed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stockflow.demo import DemoInputs, held_out_loss, make_checkpoints
from stockflow.events import OnEvent, Stage, ignore
from stockflow.forecast.amounts import survey
from stockflow.forecast.lines import plan_lines, result_lines
from stockflow.output.card import by_kind, mean, shown
from stockflow.output.keys import tensors_key
from stockflow.output.receipts import TensorFacts
from stockflow.output.tables import read_facts
from stockflow.recipe import load_recipe
from stockflow.run import driver
from stockflow.run.driver import Execute, Merged, MergeOptions
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig
from stockflow.text.tables import grid
from stockflow.verification.verify import Verification, summary_lines, verify

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; losses are in nats per byte of held-out text."""

    losses: dict[str, float]
    ratios: dict[str, tuple[int, float | None, float | None, float | None]]
    """per kind of layer: tensors, mean cosine, mean ratio, mean ratio by the two-model formula"""
    verification: Verification
    seconds: float


def run_demo(folder: Path, options: MergeOptions, execute: Execute, say: Say, on_event: OnEvent = ignore) -> DemoResult:
    """Make checkpoints in ``folder``, merge them twice, verify, and measure every model.

    Args:
        folder: an empty folder; everything the demo makes stays there.
        options: memory, threads, device and shard size of the merges.
        execute: where shards are merged.
        say: called with each line for the reader.
        on_event: told how it goes, from several threads.
    """
    started = time.perf_counter()
    say(f"1. training a small language model and four fine-tuned ones in {folder} (about a minute)")
    on_event(Stage("training models"))
    inputs = make_checkpoints(folder, lambda line: say(f"   {line}"))
    stock_recipe, average_recipe = _write_recipes(folder, inputs)
    say(f"\n2. stockflow plan {stock_recipe} {folder / 'model-stock'}")
    opened, output = _open(stock_recipe), str(folder / "model-stock")
    plan, workspace = driver.plan_merge(opened, output, options)
    work = survey(plan, workspace)
    for line in plan_lines(plan, workspace, work, driver.least_memory_of(opened, output, plan, options)):
        say(f"   {line}")
    say(f"\n3. stockflow merge {stock_recipe} {folder / 'model-stock'}")
    stock = _merge(stock_recipe, folder / "model-stock", options, execute, on_event)
    for line in result_lines(stock):
        say(f"   {line}")
    _merge(average_recipe, folder / "average", options, execute, on_event)
    say(f"\n4. stockflow verify {folder / 'model-stock'}")
    verification = verify(str(folder / "model-stock"), StorageConfig(), inputs=True, on_event=on_event)
    for line in summary_lines(verification):
        say(f"   {line}")
    say("\n5. measuring all models on text none of them has read")
    on_event(Stage("measuring models"))
    folders = {
        "base": inputs.base,
        **inputs.tuned,
        "plain average": folder / "average",
        "Model Stock": folder / "model-stock",
    }
    losses = {name: held_out_loss(model) for name, model in folders.items()}
    facts = read_facts(folder / "model-stock" / tensors_key(stock.plan.plan_id))
    return DemoResult(losses, _ratios(facts), verification, time.perf_counter() - started)


def demo_tables(result: DemoResult) -> str:
    """Return the two tables of the demo as text."""
    base = result.losses["base"]
    best_tuned = min(list(result.losses.values())[1:-2])
    lines = ["held-out loss (nats per byte; lower is better)", ""]
    for name, loss in result.losses.items():
        lines.append(f"  {name:<24} {loss:.4f}   {loss - base:+.4f} against base")
    lines += [
        "",
        f"  best fine-tuned {best_tuned:.4f}, plain average {result.losses['plain average']:.4f}, "
        f"Model Stock {result.losses['Model Stock']:.4f}",
        "  (tiny models trained for a minute: this shows the tool at work, not which method is best for yours)",
        "",
        "ratio t by kind of layer (legacy: the two-model formula, which is wrong for these four models)",
        "",
    ]
    rows = [(kind, str(count), *map(shown, means)) for kind, (count, *means) in result.ratios.items()]
    lines += grid([("kind", "tensors", "mean cos", "mean t", "legacy t"), *rows])
    return "\n".join(lines)


def _write_recipes(folder: Path, inputs: DemoInputs) -> tuple[Path, Path]:
    models = "".join(f"  - model: {path}\n" for path in inputs.tuned.values())
    head = f"base_model: {inputs.base}\nmodels:\n{models}dtype: bfloat16\n"
    stock, average = folder / "model-stock.yaml", folder / "average.yaml"
    stock.write_text(f"merge_method: model_stock\n{head}")
    average.write_text(f"merge_method: linear\n{head}parameters:\n  weight: 1.0\n")
    return stock, average


def _open(recipe: Path) -> Inputs:
    return Inputs.open(load_recipe(str(recipe)))


def _merge(recipe: Path, output: Path, options: MergeOptions, execute: Execute, on_event: OnEvent) -> Merged:
    return driver.merge(_open(recipe), str(output), options, execute, on_event)


def _ratios(
    rows: Sequence[TensorFacts],
) -> dict[str, tuple[int, float | None, float | None, float | None]]:
    return {
        kind: (
            len(members),
            mean([row.mean_cosine for row in members]),
            mean([row.ratio for row in members]),
            mean([row.legacy_ratio for row in members]),
        )
        for kind, members in by_kind(rows).items()
    }
