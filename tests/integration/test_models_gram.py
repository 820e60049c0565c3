"""The Gram of whole models that receipts and manifest carry, against task vectors computed here in float64."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.engine.facts import Ledger
from stockflow.errors import CheckpointError
from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Coefficients
from stockflow.output import receipts
from stockflow.output.receipts import total_gram
from stockflow.planning.job import merging
from tests import oracle, runs
from tests.checkpoints import Family, make_family, write_recipe

SHAPES = {"a.weight": (300, 70), "b.weight": (41,), "c.experts": (5, 20, 30), "averaged.weight": (64, 64)}
RULES = {"rules": [{"filter": "averaged", "merge_method": "linear", "parameters": {"weight": 1.0}}]}


def expected_gram(family: Family, names: list[str]) -> Any:
    models = [oracle.load_checkpoint(folder) for folder in (family.base, *family.tuned)]
    flat = [np.concatenate([np.ravel(model[name].array) for name in names]) for model in models]
    vectors = np.stack([flat[0], *(tuned - flat[0] for tuned in flat[1:])]).astype(np.float64)
    gram = vectors @ vectors.T
    gram[0, 1:] = gram[1:, 0] = 0.0  # not needed by Model Stock, so not computed
    return gram


@pytest.mark.parametrize("parameters", [{}, {"filter_wise": True}])
def test_the_gram_of_whole_models_is_that_of_their_task_vectors(parameters: dict[str, Any], tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, SHAPES, num_shards=2, cosine=0.4)
    recipe = write_recipe(tmp_path / "r.yaml", "model_stock", family, parameters=parameters, stockflow=RULES)
    expected = expected_gram(family, ["a.weight", "b.weight", "c.experts"])

    result = runs.merge_here(recipe, tmp_path / "out", shard_size=30_000)

    recorded = runs.receipts(tmp_path / "out")
    summed = sum(np.array(receipt["gram"]) for receipt in recorded if receipt["gram"])
    assert len(recorded) > 2
    np.testing.assert_allclose(summed, expected, rtol=1e-12)
    np.testing.assert_allclose(np.array(result.manifest.gram), expected, rtol=1e-12)


@pytest.mark.parametrize("cuts", [(), (1,), (9,), (3, 4, 20)])
def test_how_groups_come_in_units_changes_no_bit(cuts: tuple[int, ...]) -> None:
    products_GMM = np.random.default_rng(0).random((40, 3, 3)) * 10.0 ** np.arange(-8, 1).reshape(3, 3)
    coefficients = Coefficients(np.zeros((1, 2)), anchored=True)
    one_by_one = products_GMM[0]
    for product_MM in products_GMM[1:]:
        one_by_one = one_by_one + product_MM
    job = merging(TensorSpec("w", "F32", (40, 10)), (), "model_stock", Parameters(), "row")
    ledger = Ledger(job, job.result, "shard")

    for part_GMM in np.split(products_GMM, cuts):
        ledger.record(coefficients, Gram(part_GMM))

    assert ledger.gram_MM is not None
    assert ledger.gram_MM.tobytes() == one_by_one.tobytes()


def test_methods_without_a_gram_record_none(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, SHAPES)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", family, per_model={"weight": [1.0, 1.0]}, with_base=False)

    result = runs.merge_here(recipe, tmp_path / "out")

    assert result.manifest.gram == ()
    assert [receipt["gram"] for receipt in runs.receipts(tmp_path / "out")] == [[]]


def test_a_shard_whose_gram_is_beyond_float64_leaves_the_total_open(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, SHAPES)
    runs.merge_here(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out", shard_size=30_000)
    found = [receipts.parse(json.dumps(fields).encode(), "here") for fields in runs.receipts(tmp_path / "out")]

    without = next(number for number, receipt in enumerate(found) if receipt.gram)

    assert len(total_gram(found)) == 3
    found[without] = replace(found[without], gram=())
    assert total_gram(found) == ()


def test_a_gram_that_is_none_is_refused(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, SHAPES)
    runs.merge_here(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out")
    (fields,) = runs.receipts(tmp_path / "out")

    with pytest.raises(CheckpointError, match="'gram'"):
        receipts.parse(json.dumps(fields | {"gram": "none"}).encode(), "here")
