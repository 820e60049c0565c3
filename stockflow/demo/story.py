"""The demo: train, plan, merge, verify, compare. Real parts throughout; whatever the numbers are, they are printed."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stockflow.demo import DemoInputs, held_out_loss, make_checkpoints
from stockflow.events import OnEvent, Stage, ignore
from stockflow.output import manifest
from stockflow.output.card import by_kind, mean, shown
from stockflow.output.keys import tensors_key
from stockflow.output.receipts import TensorFacts
from stockflow.output.tables import read_facts
from stockflow.settings import MergeSettings, PlanSettings, as_words
from stockflow.storage import StorageConfig, open_store
from stockflow.text.redaction import command_line
from stockflow.text.tables import grid

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; losses are in nats per byte of held-out text."""

    losses: dict[str, float]
    ratios: dict[str, tuple[int, float | None, float | None, float | None]]
    """per kind of layer: tensors, mean cosine, mean ratio, mean ratio by the two-model formula"""
    seconds: float


def run_demo(folder: Path, settings: Mapping[str, Any], say: Say, on_event: OnEvent = ignore) -> DemoResult:
    """Make checkpoints in ``folder``, merge them twice, verify, and measure every model.

    Each command is a process of its own, so that what a merge says of its memory is not that of training.

    Args:
        folder: an empty folder; everything the demo makes stays there.
        settings: of the merges, see ``MergeSettings``.
        say: called with each line for the reader.
        on_event: told how it goes, from several threads.

    Raises:
        CalledProcessError: a command failed, and said why on standard error.
    """
    started = time.perf_counter()
    say(f"1. training a small language model and four fine-tuned ones in {folder} (about a minute)")
    on_event(Stage("training models"))
    inputs = make_checkpoints(folder, lambda line: say(f"   {line}"))
    stock_recipe, average_recipe = _write_recipes(folder, inputs)
    stock, average = folder / "model-stock", folder / "average"
    merging = as_words(settings, MergeSettings)
    on_event(Stage("merging"))
    _run(2, say, "plan", stock_recipe, stock, *as_words(settings, PlanSettings))
    _run(3, say, "merge", stock_recipe, stock, *merging)
    _run(4, say, "merge", average_recipe, average, *merging)
    _run(5, say, "verify", stock, "--inputs")
    say("\n6. measuring all models on text none of them has read")
    on_event(Stage("measuring models"))
    folders = {"base": inputs.base, **inputs.tuned, "plain average": average, "Model Stock": stock}
    losses = {name: held_out_loss(model) for name, model in folders.items()}
    return DemoResult(losses, _ratios(_facts(stock)), time.perf_counter() - started)


def _run(number: int, say: Say, *words: str | Path) -> None:
    """Run a command of stockflow and pass on what it prints."""
    said = tuple(map(str, words))
    say(f"\n{number}. {command_line('stockflow', *said)}")
    command = (sys.executable, "-m", "stockflow", *said, "--progress", "none")
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in finished.stdout.splitlines():
        say(f"   {line}")


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


def _facts(output: Path) -> Sequence[TensorFacts]:
    plan_id = manifest.read(open_store(str(output), StorageConfig())).plan_id
    return read_facts(output / tensors_key(plan_id))


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
