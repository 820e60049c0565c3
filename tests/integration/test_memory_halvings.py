"""A shard that ran out of memory is merged with a smaller budget: more passes, smaller buffers, the same bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.engine import session
from stockflow.engine.worker import WorkerSpec
from stockflow.errors import BudgetError
from stockflow.events import Moved, OnEvent
from stockflow.output.receipts import Receipt
from stockflow.planning import budget
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import StartWorker, receipt_of
from stockflow.storage import open_store
from tests import runs
from tests.checkpoints import make_family, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    shapes = {"large.weight": (2048, 1024), "small.weight": (300, 64)}
    family = make_family(folder, 3, shapes, torch.float32, buffers=False)
    return write_recipe(folder / "recipe.yaml", "model_stock", family)


def merged(recipe: Path, output: Path, memory_halvings: int, memory_bytes: int) -> dict[str, str]:
    """Merge as a worker on Ray does, as if each shard had run out of memory before; return the digests."""

    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        work = StartWorker(spec)()
        for shard in shards:
            answer = work(shard, lambda num_read, num_written: on_event(Moved(num_read, num_written)), memory_halvings)
            yield receipt_of(answer, open_store(str(output), spec.storage), spec.plan_id)

    merge(Inputs.open(load_recipe(str(recipe))), str(output), MergeOptions(memory_bytes, 1, "cpu"), execute)
    return runs.shard_digests(output)


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What workers were told to divide, in order."""
    told: list[int] = []

    def divide(jobs: Any, memory_bytes: int, **how: Any) -> budget.Workspace:
        told.append(memory_bytes)
        return budget.divide(jobs, memory_bytes, **how)

    monkeypatch.setattr(session, "divide", divide)
    return told


def test_each_time_with_half_the_memory_and_the_same_bytes(recipe: Path, tmp_path: Path, budgets: list[int]) -> None:
    memory = 4 * (1024 * runs.MIB + runs.grown_bytes())  # a quarter must be enough in a process that has grown
    digests = [merged(recipe, tmp_path / f"out-{number}", number, memory) for number in range(3)]

    assert [memory, memory // 2, memory // 4] == budgets
    assert digests == [digests[0]] * 3


def test_never_with_less_than_a_shard_needs(recipe: Path, tmp_path: Path, budgets: list[int]) -> None:
    memory = 512 * runs.MIB + runs.grown_bytes()
    expected = merged(recipe, tmp_path / "whole", 0, memory)

    assert expected == merged(recipe, tmp_path / "halved", 3, memory)
    assert budgets[1] < budgets[-1] <= memory


def test_a_budget_that_never_was_enough_is_said_as_it_is(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="needs at least"):
        merged(recipe, tmp_path / "out", 2, runs.MIB)
