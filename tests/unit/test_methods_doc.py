"""docs/methods.md names the methods there are; its numbers are computed again from its words."""

import math
import re

import numpy as np
import pytest

from stockflow.methods import METHODS
from stockflow.methods.gram import Gram
from stockflow.methods.parameters import FROM_BASE
from stockflow.methods.ratios import Geometry
from stockflow.recipe.checks import UNDER_STOCKFLOW
from tests.pages import section

PAGE = section("methods.md", "Model Stock")
ROWS = re.findall(r"^\| (-?0\.\d, -?0\.\d, -?0\.\d) \|(.*)\|$", PAGE, re.MULTILINE)
READINGS = ("exact", "mean_angle", "adjacent", "two_model")


def expected(c12: float, c13: float, c23: float) -> list[float]:
    mean = (c12 + c13 + c23) / 3
    angle = math.cos((math.acos(c12) + math.acos(c13) + math.acos(c23)) / 3)
    ours, angles, neighbours = (3 * c / (1 + 2 * c) for c in (mean, angle, (c12 + c23) / 2))
    return [ours, angles, neighbours, 2 * mean / (1 + mean)]


@pytest.mark.parametrize(("cosines", "cells"), ROWS)
def test_the_table_of_readings_is_right(cosines: str, cells: str) -> None:
    c12, c13, c23 = map(float, cosines.split(", "))
    products = np.array([[1, 0, 0, 0], [0, 1, c12, c13], [0, c12, 1, c23], [0, c13, c23, 1]], np.float64)
    geometry = Geometry(Gram(products[None]))

    stated = [float(cell) for cell in cells.split("|")]
    assert stated == pytest.approx(expected(c12, c13, c23), abs=5.1e-5)
    assert stated == pytest.approx([float(geometry.ratio(name)[0]) for name in READINGS], abs=5.1e-5)


def test_the_table_is_there() -> None:
    assert len(ROWS) == 5


GIVEN_ELSEWHERE = {*UNDER_STOCKFLOW, FROM_BASE}


def test_every_method_is_listed_with_its_parameters_and_source() -> None:
    table = section("methods.md").partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .*? \| (.*) \|$", table, re.MULTILINE)

    assert {name: parameters for name, parameters, _ in rows} == {
        name: ", ".join(f"`{each.name}`" for each in method.parameters if each.name not in GIVEN_ELSEWHERE)
        for name, method in METHODS.items()
    }
    assert [name for name, _, source in rows if source not in METHODS[name].source] == []
