"""What a method says of a tensor is recorded, whatever it is called."""

import numpy as np
import pytest

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.engine.facts import COLUMNS, Ledger
from stockflow.methods import METHODS
from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Coefficients
from stockflow.planning.job import merging

JOB = merging(TensorSpec("w", "BF16", (4, 10)), (), "model_stock", Parameters(), "row")


def test_a_fact_without_a_column_is_the_mean_over_the_groups() -> None:
    ledger = Ledger(JOB, JOB.result, "shard")

    for curvature_G in (np.array([1.0, 2.0]), np.array([6.0, np.nan])):
        ledger.record(Coefficients(np.zeros((2, 2)), True, {"curvature": curvature_G}), None)

    assert ledger.close().facts == {"groups": 4.0, "curvature": 3.0}


def test_facts_of_units_weigh_as_much_as_they_speak_of() -> None:
    ledger = Ledger(JOB, JOB.result, "shard")

    ledger.record_means({"kept_share_1": 0.5}, 10)
    ledger.record_means({"kept_share_1": 0.1}, 30)

    assert ledger.close().facts == {"groups": 4.0, "kept_share_1": pytest.approx(0.2, abs=1e-15)}


@pytest.mark.parametrize("name", ["model_stock", "slerp", "linear", "task_arithmetic"])
def test_a_method_declares_what_it_records(name: str) -> None:
    method, gram = METHODS[name], Gram(np.array([[[4.0, 0.1], [0.1, 1.0]]]) if name == "slerp" else np.eye(3)[None])
    given = {
        "model_stock": Parameters({"filter_wise": False, "on_negative": "clamp"}),
        "slerp": Parameters({"t": 0.3}),
        "linear": Parameters({"normalize": True}, {"weight": (1.0, 1.0)}),
        "task_arithmetic": Parameters({"lambda": 1.0, "normalize": False}, {"weight": (1.0, 1.0)}),
    }[name]

    decided = method.rule.coefficients(gram, given)  # type: ignore[attr-defined]

    assert tuple(decided.facts) == method.facts
    assert set(method.facts) <= set(COLUMNS)
