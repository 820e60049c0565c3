"""The Python API: light to import, typed, the same as the command line, usable in a notebook."""

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import stockflow
from stockflow.recipe import Recipe, load_recipe
from stockflow.text import notebook
from stockflow.wiring import merge_options
from tests import runs
from tests.checkpoints import Family, make_family, write_checkpoint, write_recipe
from tests.runs import REPOSITORY

SHAPES = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "<b>": (3,)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    family = make_family(folder, 2, SHAPES, buffers=False)
    write_recipe(folder / "recipe.yaml", "model_stock", family)
    stockflow.merge(folder / "recipe.yaml", folder / "out", device="cpu")
    return folder


@pytest.fixture
def family(root: Path) -> Family:
    return Family(root / "base", (root / "tuned-1", root / "tuned-2"))


def modules_after(script: str) -> set[str]:
    code = f"{script}\nimport sys\nprint(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )  # fmt: skip
    return set(finished.stdout.splitlines()[-1].split())


def test_importing_loads_nothing_and_errors_little() -> None:
    loaded = modules_after("import stockflow; dir(stockflow); stockflow.__version__")
    assert {name for name in loaded if name.startswith("stockflow")} == {"stockflow", "stockflow.version"}
    assert not loaded & {"numpy", "yaml", "pydantic", "rich"}

    loaded = modules_after("import stockflow; stockflow.PlanError")
    assert {name for name in loaded if name.startswith("stockflow")} == {
        "stockflow",
        "stockflow.errors",
        "stockflow.version",
    }

    loaded = modules_after("import stockflow; stockflow.plan, stockflow.merge, stockflow.verify, stockflow.diff")
    assert not loaded & {"torch", "ray", "pyarrow", "numba", "rich", "typer", "fsspec"}


def test_no_public_name_is_a_module_too() -> None:
    """Else the import system would bind the module over the function."""
    modules = {path.stem for path in Path(stockflow.__file__).parent.iterdir()}

    assert not modules & set(stockflow.__all__)


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(stockflow.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    assert seen == set(stockflow._PUBLIC) == set(stockflow.__all__) - {"__version__"}
    for name in stockflow.__all__:
        assert getattr(stockflow, name) is not None
    assert Path(stockflow.__file__).with_name("py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        stockflow.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_every_error_is_public() -> None:
    from stockflow import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}

    assert kinds <= set(stockflow.__all__)


def test_a_recipe_is_what_it_says_in_whatever_form(root: Path, family: Family) -> None:
    path = root / "recipe.yaml"
    text = path.read_text()
    mapping = {
        "merge_method": "model_stock",
        "base_model": family.base,
        "models": [{"model": folder} for folder in family.tuned],
    }
    recipes: list[Recipe | str | os.PathLike[str] | dict[str, object]] = [
        path, str(path), text, yaml.safe_load(text), mapping, load_recipe(str(path)),
    ]  # fmt: skip

    plans = {stockflow.plan(recipe, root / "elsewhere").plan_id for recipe in recipes}

    assert len(plans) == 1
    assert not (root / "elsewhere").exists()


@pytest.mark.parametrize("name", ["plan", "merge", "verify", "diff"])
def test_facts_and_text_are_the_command_lines(name: str, root: Path) -> None:
    places = {
        "plan": (root / "recipe.yaml", root / "out"),
        "merge": (root / "recipe.yaml", root / "out"),
        "verify": (root / "out",),
        "diff": (root / "base", root / "tuned-1"),
    }[name]
    words = [name, *map(str, places)]

    result = getattr(stockflow, name)(*places)

    printed = json.loads(runs.invoke(*words, "--json").stdout)
    facts = json.loads(json.dumps(result.facts()))
    assert {**facts, "seconds": 0} == {**printed, "seconds": 0}
    lines = runs.invoke(*words).stdout.splitlines()
    times = re.compile(r"[\d.]+ s\b")
    assert [times.sub("", line) for line in str(result).splitlines()] == [
        times.sub("", line) for line in lines if not line.startswith("next: stockflow merge")
    ]


class Tags(HTMLParser):
    """Holds that tags are closed in order, and collects what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def shown(result: object) -> str:
    parser = Tags()
    parser.feed(result._repr_html_())  # type: ignore[attr-defined]
    assert parser.open == []
    return "\n".join(parser.texts)


def test_results_show_themselves_in_a_notebook(root: Path) -> None:
    plan = shown(stockflow.plan(root / "recipe.yaml", root / "out"))
    merge = shown(stockflow.merge(root / "recipe.yaml", root / "out"))
    verification = shown(stockflow.verify(root / "out"))
    diff = shown(stockflow.diff(root / "base", root / "tuned-1"))
    report = shown(stockflow.report(root / "out"))

    assert "3 by model_stock" in plan
    assert "already finished" in merge
    assert "no findings" in verification
    assert "3 of 3 tensors differ" in diff
    assert "Two models, merged by Model Stock" in report
    for text in (merge, diff):
        assert "<b>" in text.splitlines(), "names are text, never tags"


def test_a_finding_shows(root: Path, tmp_path: Path) -> None:
    stockflow.merge(root / "recipe.yaml", tmp_path / "out", device="cpu")
    (tmp_path / "out" / "extra.safetensors").write_bytes(b"")

    verification = stockflow.verify(tmp_path / "out")

    assert not verification.is_sound
    assert "extra.safetensors" in shown(verification)


def test_html_cells() -> None:
    text = notebook.table(("name", "number"), [("a & b", 1234), ("c", None)])

    assert "a &amp; b" in text
    assert "1,234" in text
    assert notebook.table(("name",), []) == ""


def test_facts_of_every_tensor_are_those_of_the_merge(root: Path) -> None:
    tensors = stockflow.merge(root / "recipe.yaml", root / "out").tensors

    assert {tensor.name for tensor in tensors} == set(SHAPES)
    assert all(tensor.ratio is not None and 0 <= tensor.ratio <= 1 for tensor in tensors)


def test_numbers_of_numpy_are_numbers(root: Path) -> None:
    given = {"random_seed": np.int64(3), "workers": np.int32(2), "machine_price": np.float32(2.0)}

    facts = stockflow.plan(root / "recipe.yaml", root / "elsewhere", **given).facts()  # type: ignore[arg-type]

    assert json.loads(json.dumps(facts))["forecast"]["cost"]["machine_price"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "memory: expected a size"),
        ({"memory": 0}, "memory: expected a size"),
        ({"shard_size": -1}, "shard_size: expected a size"),
        ({"workers": 0}, "workers: expected at least 1, found 0"),
        ({"workers": "2"}, "workers: expected an integer or None, found '2'"),
        ({"request_rate": True}, "request_rate: expected a number or None, found True"),
        ({"follow_links": "/models"}, "follow_links: expected a list, found '/models'"),
        ({"overwrite": "no"}, "overwrite: expected True or False, found 'no'"),
        ({"executor": "kubernetes"}, "executor: expected one of None, 'local', 'ray', found 'kubernetes'"),
        ({"device": "tpu"}, "device: expected one of 'auto', 'cpu', 'cuda', found 'tpu'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str, root: Path) -> None:
    with pytest.raises(stockflow.RecipeError, match=message):
        stockflow.plan(root / "recipe.yaml", root / "elsewhere", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("workers", "share"), [(1, 1), (3, 3), (4, 4), (64, 4), (None, 4)])
def test_by_default_a_ray_worker_shares_this_machine_with_as_many_as_it_has_cores(
    workers: int | None, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty-four workers are on many nodes: a 64th of the head's memory would be too little for any of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr("stockflow.wiring.default_memory", lambda num_slots: 24 * 2**30 // num_slots)

    options = merge_options(workers=workers, on_ray=True)

    assert (options.memory_bytes, options.num_threads) == (24 * 2**30 // share, 1)


def test_recipes_that_cannot_be(root: Path) -> None:
    with pytest.raises(stockflow.RecipeError, match="a mapping that no YAML could give"):
        stockflow.plan({"models": {1, 2}}, root / "elsewhere")
    for given in (b"models: []", 7, None, ["a", "b"]):
        with pytest.raises(stockflow.RecipeError, match=f"of type {type(given).__name__}: expected a path, a URL"):
            stockflow.plan(given, root / "elsewhere")  # type: ignore[arg-type]
    with pytest.raises(stockflow.RecipeError, match="<text>:1:1"):
        stockflow.plan("- a\n- b\n", root / "elsewhere")
    with pytest.raises(stockflow.NotFoundError):
        stockflow.plan(root / "nothing.yaml", root / "elsewhere")
    with pytest.raises(stockflow.RecipeError, match="seed and memory go with a sample"):
        stockflow.verify(root / "out", seed=1)


def test_what_a_callback_raises_ends_the_run(root: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(event: stockflow.Event) -> None:
        if isinstance(event, stockflow.Moved):
            raise Enough

    write_checkpoint(tmp_path / "a", {"w": torch.ones(2**18 + 3)})
    for call in (
        lambda: stockflow.diff(tmp_path / "a", tmp_path / "a", on_event=stop),
        lambda: stockflow.merge(root / "recipe.yaml", tmp_path / "out", device="cpu", on_event=stop),
        lambda: stockflow.verify(root / "out", on_event=stop),
    ):
        with pytest.raises(Enough):
            call()
