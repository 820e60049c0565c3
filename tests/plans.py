"""Plans of small checkpoints, for tests of planning."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.checkpoints.copies import compared
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import PlanError
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Scope
from stockflow.planning.job import COPIES, TensorJob, copying, merging
from stockflow.planning.make import make_plan
from stockflow.planning.operands import stored
from stockflow.planning.plan import MergePlan
from stockflow.recipe import parse_recipe
from stockflow.storage import open_store
from tests.checkpoints import write_checkpoint

NAMES = ("embed.weight", "layers.0.norm.weight", "layers.1.norm.weight", "position_ids", "scalar", "empty")


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(20, 7, generator=random).to(dtype),
        "layers.0.norm.weight": torch.randn(7, generator=random).to(dtype),
        "layers.1.norm.weight": torch.randn(7, generator=random).to(dtype),
        "position_ids": torch.arange(9),
        "scalar": torch.randn((), generator=random).to(dtype),
        "empty": torch.empty(0, 7, dtype=dtype),
    }


class Merge:
    """Three checkpoints on disk and a recipe that can be changed before it is planned."""

    def __init__(self, root: Path, num_shards: tuple[int, int, int] = (1, 2, 3)) -> None:
        self.folders = [root / name for name in ("base", "one", "two")]
        self.models = [model(seed) for seed in range(3)]
        self._num_shards = num_shards
        self.recipe: dict[str, Any] = {
            "merge_method": "model_stock",
            "base_model": str(self.folders[0]),
            "models": [{"model": str(folder)} for folder in self.folders[1:]],
        }

    def write(self, **kwargs: Any) -> "Merge":
        for folder, tensors, shards in zip(self.folders, self.models, self._num_shards, strict=True):
            write_checkpoint(folder, tensors, num_shards=shards, **kwargs)
        return self

    def plan(self, shard_size: int | None = None, **top_level: Any) -> MergePlan:
        recipe = parse_recipe(yaml.safe_dump(self.recipe | top_level), "recipe.yaml")
        stores = [open_store(location, recipe.storage) for location in recipe.checkpoints]
        return make_plan(recipe, compared(stores, open_checkpoints(stores), None), shard_size=shard_size)

    def refusal(self, **top_level: Any) -> str:
        with pytest.raises(PlanError) as caught:
            self.plan(**top_level)
        return str(caught.value)


def jobs_of(plan: MergePlan) -> dict[str, TensorJob]:
    return {job.output.name: job for job in plan.jobs}


def rule(**entry: Any) -> dict[str, Any]:
    return {"rules": [entry]}


def job(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...] = ("BF16", "BF16", "BF16"),
    *,
    output: str | None = None,
    method: str = "model_stock",
    scope: Scope = "tensor",
    starts: tuple[int, ...] | None = None,
) -> TensorJob:
    """A job whose sources lie in one file per checkpoint."""
    spec = TensorSpec(name, output or dtypes[0], shape)
    operands = tuple(
        stored(number, TensorSpec(name, dtype, shape), Extent("model.safetensors", starts[number] if starts else 0))
        for number, dtype in enumerate(dtypes)
    )
    if method in COPIES:
        return copying(spec, operands, method)
    return merging(spec, operands, method, Parameters(), scope)
