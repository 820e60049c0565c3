"""Surveys on a real Ray cluster: rows come back by value, and are those of one process."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stockflow.events import Done, Event, Moved, Stage
from stockflow.insight.audit import audit, open_recipe
from stockflow.insight.comparison import compare_checkpoints
from stockflow.insight.surveys import Survey, find_subjects, inspect
from stockflow.recipe import load_recipe
from stockflow.run.executors.ray import RayOptions, connected
from stockflow.run.inputs import Inputs
from stockflow.run.places import MAX_BATCH_TENSORS, batches, survey_in_this_process, survey_on_ray
from stockflow.storage import StorageConfig
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.integration.test_audit import options

SHAPES = {f"model.layers.{number}.mlp.up_proj.weight": (30, 40 + number) for number in range(MAX_BATCH_TENSORS + 6)}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3, SHAPES, num_shards=2)


@pytest.fixture(scope="module")
def recipe(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", "model_stock", family)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Survey]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(RayOptions(num_workers=2), 2):
            yield partial(survey_on_ray, options=RayOptions(num_workers=2))  # type: ignore[misc]


def test_batches_are_all_tensors_in_order_and_small(recipe: Path) -> None:
    subjects, _ = find_subjects(Inputs.open(load_recipe(str(recipe))))
    looks = [subject.look for subject in subjects if subject.look]

    found = list(batches(looks))

    assert [look for batch in found for look in batch.looks] == looks
    assert [batch.first for batch in found] == [0, MAX_BATCH_TENSORS]


@pytest.mark.cluster
def test_an_inspection_on_ray_is_that_of_one_process_bit_for_bit(recipe: Path, on_ray: Survey) -> None:
    inputs = Inputs.open(load_recipe(str(recipe)))
    here = inspect(inputs, options(), survey_in_this_process, lambda _: None)
    events: list[Event] = []

    there = inspect(inputs, options(), on_ray, events.append)

    assert np.array_equal(here.packed_TQ, there.packed_TQ, equal_nan=True)
    assert len(here.compared) == len(SHAPES)
    num_read = sum(event.num_read for event in events if isinstance(event, Moved))
    assert num_read == there.num_bytes_read == here.num_bytes_read
    assert {type(event) for event in events} == {Stage, Moved, Done}, "nothing of batches, which are no items"
    assert {event.item for event in events if isinstance(event, Done)} == set(SHAPES)


@pytest.mark.cluster
def test_an_audit_on_ray_is_that_of_one_process(recipe: Path, on_ray: Survey, tmp_path: Path) -> None:
    runs.merge_here(recipe, tmp_path / "out")
    merge = open_recipe(Inputs.open(load_recipe(str(recipe))), str(tmp_path / "out"))
    here = audit(merge, options(), survey_in_this_process, lambda _: None)

    there = audit(merge, options(), on_ray, lambda _: None)

    assert here.rows == there.rows
    assert {row["match"] for row in there.rows} == {"exact"}


@pytest.mark.cluster
def test_a_comparison_on_ray_is_that_of_one_process(family: Family, on_ray: Survey) -> None:
    here, there = (
        compare_checkpoints(str(family.base), str(family.tuned[0]), StorageConfig(), options(), survey)
        for survey in (survey_in_this_process, on_ray)
    )

    assert {**here.facts(), "seconds": 0} == {**there.facts(), "seconds": 0}
    assert len(there.differing) == len(SHAPES)
