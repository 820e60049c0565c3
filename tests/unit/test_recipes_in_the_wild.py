"""Recipes in the wild: each published form runs, warns of what has no effect, or is refused with its reason."""

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch

import stockflow
from stockflow.errors import UserError
from stockflow.recipe import load_recipe
from stockflow.text.remarks import Remark
from tests import runs
from tests.adapters import PROJECTIONS, linear, write_adapter
from tests.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint
from tests.token_files import tokenizer_json

FORMS = Path(__file__).parents[1] / "data" / "recipes_in_the_wild"
ROWS = list(csv.DictReader((FORMS / "index.tsv").read_text().splitlines(), delimiter="\t"))
SAYS_MORE = ("05_model_stock_name_tokenizer_source.yaml",)
"""Called right by the index although they hold a key that nothing reads."""
REFUSED = {
    "44_passthrough_multi_document.yaml": "`first_part`, `second_part` and 1 without a name",
    "53_dare_ties_multi_document.yaml": "`short-v2` and 1 without a name",
    "60_linear_one_model_four_ranges.yaml": "",
}
"""Forms that may either run or be refused: what the refusal names."""
MERGED_LAYERS = 4
"""Forms of so many layers are merged, larger ones planned."""


@dataclass(frozen=True)
class Outcome:
    verdict: Literal["runs", "warns", "refuses"]
    remarks: tuple[Remark, ...] = ()
    refusal: str = ""

    def says(self, word: str) -> bool:
        return any(word in text for text in (self.refusal, *(remark.text for remark in self.remarks)))


def config_of(num_layers: int) -> dict[str, object]:
    return LLAMA_CONFIG | {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": num_layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "torch_dtype": "bfloat16",
    }  # fmt: skip


@cache
def shapes_of(num_layers: int) -> dict[str, tuple[int, ...]]:
    return llama_shapes(config_of(num_layers))


def write_models(folder: Path, row: dict[str, str]) -> None:
    """Write the Llamas that a form names, of as many layers as the index says."""
    num_layers = int(row["layers"].split(">")[0])
    places = [folder / f"m{number}" for number in range(int(row["models"]))]
    places += [folder / "with a space" / "m0"] if "spaces" in row["features"] and row["method"] == "linear" else []
    for number, place in enumerate(places):
        random = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes_of(num_layers).items()}
        write_checkpoint(
            place,
            {name: value.to(torch.bfloat16) for name, value in tensors.items()},
            config=config_of(num_layers),
            side_files={"tokenizer.json": tokenizer_json(["<unk>", "<turn_start>", "<turn_end>"])},
        )
    for lora in sorted(set(re.findall(r"lora\d", (FORMS / row["file"]).read_text()))):
        write_adapter(folder / lora, linear(shapes_of(num_layers), PROJECTIONS, seed=int(lora[-1])))


def outcome(folder: Path, row: dict[str, str]) -> Outcome:
    """Return what becomes of a form: planned, and merged where it is small."""
    path = folder / row["file"]
    path.write_text((FORMS / row["file"]).read_text().replace("{dir}", str(folder)))
    try:
        remarks = load_recipe(str(path)).remarks
        write_models(folder, row)
        stockflow.plan(path, folder / "out")
        if int(row["layers"].split(">")[0]) <= MERGED_LAYERS:
            runs.merge_here(path, folder / "out")
    except UserError as error:
        return Outcome("refuses", refusal=str(error))
    return Outcome("warns" if remarks else "runs", remarks)


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_each_form_fares_as_serves_who_brings_it(row: dict[str, str], tmp_path: Path) -> None:
    found = outcome(tmp_path, row)

    if row["right"].startswith("either"):
        assert found.verdict == "runs" or REFUSED[row["file"]] in found.refusal, found
        return
    assert found.verdict == ("warns" if row["file"] in SAYS_MORE else row["right"].partition(":")[0]), found
    assert all(found.says(word) for word in (row["words"] or "").split(",")), found
    lines = (FORMS / row["file"]).read_text().splitlines()
    for remark in found.remarks:
        line, key = remark.place.split(":")[-2], remark.values["key"].split(".")[-1]
        assert key in lines[int(line) - 1], remark


def test_the_index_names_every_form() -> None:
    assert {row["file"] for row in ROWS} == {path.name for path in FORMS.glob("*.yaml")}
    assert set(REFUSED) | set(SAYS_MORE) <= {row["file"] for row in ROWS}
