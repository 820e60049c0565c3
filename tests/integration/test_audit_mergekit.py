"""``stockflow audit`` on real output of mergekit 0.1.5, in an environment of its own: ``make test-peers``."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.insight.verdict import Audit, judge
from tests.benchmarks.peers import ENVIRONMENT, OFFLINE, installed
from tests.benchmarks.processes import run
from tests.checkpoints import LLAMA_CONFIG, Family, llama_shapes, make_family, write_recipe
from tests.integration.test_audit import audited

pytestmark = pytest.mark.peers

CONFIG = LLAMA_CONFIG | {
    "hidden_size": 256, "intermediate_size": 640, "vocab_size": 1000, "head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def mergekit() -> Path:
    return installed(ENVIRONMENT)


def made_by_mergekit(mergekit: Path, family: Family, folder: Path, **dtypes: str) -> Path:
    """Merge by Model Stock; mergekit has no float64."""
    recipe = write_recipe(folder / "mergekit.yaml", "model_stock", family, **dtypes)
    output = folder / "mergekit"
    finished = run([str(mergekit), str(recipe), str(output)], environment=OFFLINE)
    assert list(output.glob("*.safetensors")), finished.stderr
    return output


def family_of(folder: Path, num_tuned: int, dtype: torch.dtype, **drawn: Any) -> tuple[Family, Path]:
    family = make_family(
        folder / "family", num_tuned, llama_shapes(CONFIG), dtype, buffers=False, config=CONFIG, **drawn
    )
    return family, write_recipe(folder / "recipe.yaml", "model_stock", family)


def labels(found: Audit) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in found.rows:
        counts[row["match"]] = counts.get(row["match"], 0) + 1
    return counts


@pytest.mark.parametrize("num_tuned", [2, 3, 5])
@pytest.mark.parametrize(
    ("stored", "dtypes"),
    [
        (F32, {"dtype": "float32"}),
        (BF16, {"dtype": "bfloat16"}),
        (BF16, {"dtype": "float32", "out_dtype": "bfloat16"}),
        (BF16, {"dtype": "float32"}),
    ],
    ids=["float32", "bfloat16", "float32 to bfloat16", "bfloat16 to float32"],
)
@pytest.mark.parametrize("delta_scale", [1e-3, 1e-2])
def test_mergekit_has_the_correct_formula_in_every_dtype(
    num_tuned: int, stored: torch.dtype, dtypes: dict[str, str], delta_scale: float, mergekit: Path, tmp_path: Path
) -> None:
    family, recipe = family_of(tmp_path, num_tuned, stored, delta_scale=delta_scale)

    found = audited(recipe, made_by_mergekit(mergekit, family, tmp_path, **dtypes))

    relative = [row["distance"] / row["rounding_noise"] for row in found.rows]
    print(f"distances of {min(relative):.2f} to {max(relative):.2f} times the noise of one rounding")
    assert labels(found) == {"exact": len(found.rows)}
    assert judge(found).answer == "no"


@pytest.mark.parametrize(("dtype", "name"), [(F32, "float32"), (BF16, "bfloat16")])
def test_mergekit_leaves_models_behind_that_oppose_each_other(
    dtype: torch.dtype, name: str, mergekit: Path, tmp_path: Path
) -> None:
    family, recipe = family_of(tmp_path, 3, dtype, cosine=-0.3)

    found = audited(recipe, made_by_mergekit(mergekit, family, tmp_path, dtype=name))

    assert labels(found) == {"extrapolated": len(found.rows)}
    assert judge(found).answer == "yes"


def test_mergekits_floor_under_norms_is_found_where_it_acts(mergekit: Path, tmp_path: Path) -> None:
    """Elements of 5e-6: the norms of task vectors are 2.5e-3 for matrices of 250,000, and 8e-5 for norms of 256."""
    family, recipe = family_of(tmp_path, 3, F32, delta_scale=5e-6)

    found = audited(recipe, made_by_mergekit(mergekit, family, tmp_path, dtype="float32"))

    by_kind = {row["kind"]: row["match"] for row in found.rows}
    assert (by_kind["norm"], by_kind["embedding"]) == ("floored", "exact")
