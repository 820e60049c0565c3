"""Where bytes come from changes none of the output: read by the computing threads, held in slabs, or read again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.engine.in_place import Lookahead
from stockflow.planning.budget import Workspace, divide
from stockflow.planning.reads import Load, schedule
from stockflow.planning.work import Work
from stockflow.recipe import load_recipe
from stockflow.run.driver import Merged, MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, open_store
from tests.checkpoints import Family, make_family, write_recipe
from tests.runs import MIB, merge_here, shard_digests
from tests.selection import mostly_slow

SHAPES = {"small": (10, 20), "large": (3000, 1100), "experts": (3, 700, 400), "bias": (900,)}
"""Spans have 2**18 elements: the large tensor has thirteen, an expert two."""
LITTLE_BYTES = {"ties": 48 * MIB}
"""Too little to hold the large tensor: 13 MB of two checkpoints, 26 MB of four; TIES needs 38 MB to compute in."""
METHODS: dict[str, dict[str, Any]] = {
    "model_stock": {},
    "model_stock by row": {"stockflow": {"scope": "row"}},
    "model_stock by expert": {"stockflow": {"scope": "leading"}},
    "slerp": {"parameters": {"t": 0.3}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "dare_ties": {"parameters": {"weight": 0.5, "density": 0.4}},
}


@pytest.fixture(scope="module", params=mostly_slow(METHODS, ["model_stock", "model_stock by row", "ties"]))
def recipes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """One merge of files on disk, and the same merge of copies that are no local files."""
    folder = tmp_path_factory.mktemp("inputs")
    method = request.param.split(" ")[0]
    family = make_family(folder, 1 if method == "slerp" else 3, SHAPES, torch.bfloat16)
    copies = [f"memory://{folder.name}-{number}" for number in range(1 + len(family.tuned))]
    for source, url in zip((family.base, *family.tuned), copies, strict=True):
        store = open_store(url, StorageConfig())
        for path in Path(source).iterdir():
            store.put(path.name, path.read_bytes())
    asked = METHODS[request.param]
    elsewhere = Family(copies[0], tuple(copies[1:]))
    return (
        method,
        write_recipe(folder / "local.yaml", method, family, **asked),
        write_recipe(folder / "memory.yaml", method, elsewhere, **asked),
    )


def test_direct_held_and_repeated_reading_give_the_same_bytes(
    recipes: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, local, elsewhere = recipes
    divided: list[Workspace] = []

    def divide_little(
        jobs: Sequence[Work], memory_bytes: int, *, num_threads: int, baseline_bytes: int, direct: bool
    ) -> Workspace:
        spare = min(memory_bytes - baseline_bytes, spare_bytes)
        divided.append(
            divide(jobs, spare + baseline_bytes, num_threads=1, baseline_bytes=baseline_bytes, direct=direct)
        )
        return divided[-1]

    monkeypatch.setattr("stockflow.engine.session.divide", divide_little)
    merged: dict[str, Merged] = {}
    spare_bytes = 1024 * MIB
    merged["direct"] = merge_here(local, tmp_path / "direct", memory_bytes=2048 * MIB)
    merged["held"] = merge_here(elsewhere, tmp_path / "held", memory_bytes=2048 * MIB)
    spare_bytes = LITTLE_BYTES.get(method, 9 * MIB)
    merged["again"] = merge_here(elsewhere, tmp_path / "again", memory_bytes=2048 * MIB)

    read = {name: result.manifest.summary["bytes_read"] for name, result in merged.items()}
    assert [workspace.direct for workspace in divided] == [True, False, False]
    assert read["held"] == merged["held"].plan.num_source_bytes
    by_row = any(
        job.reading.scope == "row" for job in merged["held"].plan.jobs
    )  # a few rows at a time are decided and done
    assert (read["again"] > read["held"]) is not by_row
    digests = [shard_digests(tmp_path / name) for name in merged]
    assert digests[0] == digests[1] == digests[2]


class Announced:
    """Notes what would be announced to the disk."""

    def __init__(self) -> None:
        self.loads: list[Load] = []

    def read_soon(self, load: Load) -> None:
        self.loads.append(load)


def test_the_disk_hears_of_every_direct_load_once_in_order_and_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stockflow.engine.in_place.LOOKAHEAD_BYTES", 4 * MIB)
    family = make_family(tmp_path, 2, {f"w{number}": (600, 1000) for number in range(6)}, torch.bfloat16)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    plan, workspace = plan_merge(Inputs.open(load_recipe(str(recipe))), str(tmp_path / "out"), MergeOptions(2**40, 1))
    steps = list(schedule(list(plan.jobs), workspace))
    loads = [load for step in steps if step.direct for load in step.loads]
    disk = Announced()
    lookahead = Lookahead(steps, disk)  # type: ignore[arg-type]

    for number, load in enumerate(loads):
        lookahead.passed(load)
        assert load in disk.loads
        assert len(disk.loads) == min(number + 3, len(loads)), "about 4 MiB ahead, two loads of 3.6 MB"

    assert disk.loads == loads
