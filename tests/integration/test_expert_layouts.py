"""Experts in several layouts: the same models merge to the same numbers, however each of them was saved."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stockflow.run.driver import Merged
from stockflow.storage import StorageConfig, open_store
from tests import oracle, runs
from tests.checkpoints import Family, write_checkpoint, write_recipe
from tests.expert_models import SMALL, Sizes, Tensors, family, models
from tests.quantised import fp8
from tests.runs import MIB, merge_here
from tests.selection import by_name, diagonal, mostly_slow

METHODS: dict[str, dict[str, Any]] = {
    "model_stock": {},
    "task_arithmetic": {"parameters": {"weight": 0.5}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "dare_ties": {"parameters": {"weight": 0.5, "density": 0.4}},
}
MIXED: Mapping[str, Mapping[int, str] | str] = {
    "all one by one": "separate",
    "base fused": {0: "fused", 1: "separate", 2: "separate"},
    "tunes fused": {0: "separate", 1: "fused", 2: "fused"},
    "all fused": "fused",
    "families": {0: "separate", 1: "mixtral", 2: "fused"},
    "mixtral's base": {0: "mixtral", 1: "fused", 2: "separate"},
    "granite": "granite",
    "transposed": "qwen_vl",
    "transposed base": {0: "qwen_vl", 1: "separate", 2: "fused"},
    "transposed tunes": {0: "fused", 1: "qwen_vl", 2: "llama4"},
    "transposed tune of one by one": {0: "separate", 1: "llama4", 2: "separate"},
    "by turns": "gpt_oss",
    "stacks": {0: "step", 1: "turned_step", 2: "separate"},
    "turned stacks": {0: "turned_step", 1: "fused", 2: "step"},
    "flat": "dbrx",
    "flat base": {0: "dbrx", 1: "qwen_vl", 2: "mixtral"},
}
ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w2": "down", "w3": "up"}
SINGLE = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
LARGE = Sizes(num_experts=2, hidden=640, inner=512, num_layers=1)
"""A projection has more elements than a span."""


def merged(folder: Path, layouts: Mapping[int, str] | str, method: str, sizes: Sizes = SMALL, **top: Any) -> Merged:
    models = family(folder, 2, layouts, sizes)
    recipe = write_recipe(folder / "recipe.yaml", method, models, **METHODS[method] | top)
    return merge_here(recipe, folder / "out")


def tensors(folder: Path) -> Tensors:
    return {
        name: value
        for path in sorted((folder / "out").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def projections(stored: Tensors) -> dict[tuple[str, str, str], torch.Tensor]:
    """Return the projections of experts by layer, number and role, whatever the layout."""
    found = {}
    for name, value in stored.items():
        layer = name.split(".")[2]
        if single := SINGLE.search(name):
            found[layer, single[1], ROLES[single[2]]] = value
        elif ".moe." in name and name.endswith("_proj.weight"):
            role = ROLES[name.split(".")[-2]]
            found |= {(layer, str(number), role): _upright(each, role) for number, each in enumerate(value)}
        elif ".experts.mlp." in name:
            role = {"w1": "gate", "v1": "up", "w2": "down"}[name[-2:]]
            each_of = value.chunk(SMALL.num_experts)
            found |= {(layer, str(number), role): _upright(each, role) for number, each in enumerate(each_of)}
        elif name.endswith(("gate_up_proj", "input_linear.weight")):
            for number, both in enumerate(value):
                halves = both.chunk(2) if len(both) > both.shape[1] else both.T.chunk(2)
                if f"{name}_bias" in stored:
                    halves = both.T[::2], both.T[1::2]
                found[layer, str(number), "gate"], found[layer, str(number), "up"] = halves
        elif name.endswith(("experts.down_proj", "output_linear.weight")):
            is_straight = value.shape[1] > value.shape[2]
            found |= {
                (layer, str(number), "down"): each if is_straight else each.T for number, each in enumerate(value)
            }
    return found


def _upright(matrix: torch.Tensor, role: str) -> torch.Tensor:
    """Return a projection with a row per output, as SMALL is: fewer within than without."""
    is_upright = (matrix.shape[0] > matrix.shape[1]) == (role == "down")
    return matrix if is_upright else matrix.T


@pytest.fixture(scope="module", params=["model_stock", "ties"])
def one_by_one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The merge of models that all store their experts one by one."""
    folder = tmp_path_factory.mktemp("separate")
    merged(folder, "separate", request.param)
    return request.param, folder


@pytest.mark.parametrize("mixed", MIXED)
def test_no_layout_changes_a_number(one_by_one: tuple[str, Path], tmp_path: Path, mixed: str) -> None:
    method, reference = one_by_one

    merged(tmp_path, MIXED[mixed], method)

    ours, theirs = projections(tensors(reference)), projections(tensors(tmp_path))
    assert ours.keys() == theirs.keys()
    assert len(ours) == SMALL.num_layers * SMALL.num_experts * 3
    for key, value in ours.items():
        assert torch.equal(value.contiguous().view(torch.int16), theirs[key].contiguous().view(torch.int16)), key


@pytest.mark.parametrize("mixed", MIXED)
def test_every_projection_has_its_own_ratio_in_every_layout(tmp_path: Path, mixed: str) -> None:
    merged(tmp_path / "mixed", MIXED[mixed], "model_stock")
    merged(tmp_path / "alike", "separate", "model_stock")

    ratios = [
        sorted(row["ratio"] for name, row in runs.tensor_facts(tmp_path / each / "out").items() if SINGLE.search(name))
        for each in ("mixed", "alike")
    ]

    assert ratios[0] == ratios[1]
    assert len(set(ratios[0])) == SMALL.num_layers * SMALL.num_experts * 3


@pytest.mark.parametrize(
    "layout", ["separate", "fused", "mixtral", "granite", "llama4", "qwen_vl", "gpt_oss", "step", "dbrx"]
)
def test_the_output_has_the_layout_of_the_base(tmp_path: Path, layout: str) -> None:
    others = "separate" if layout == "fused" else "fused"
    others = layout if layout in ("granite", "gpt_oss") else others

    merged(tmp_path, {0: layout, 1: others, 2: others}, "task_arithmetic")

    expected = models(1, layout)[0]
    assert {name: value.shape for name, value in tensors(tmp_path).items()} == {n: v.shape for n, v in expected.items()}


@pytest.mark.parametrize("layouts", [{0: "fused", 1: "separate", 2: "fused"}, {0: "separate", 1: "fused", 2: "fused"}])
@pytest.mark.parametrize("method", ["model_stock", "task_arithmetic"])
def test_values_are_those_of_the_oracle(tmp_path: Path, method: str, layouts: Mapping[int, str]) -> None:
    merged(tmp_path, layouts, method)
    alike = family(tmp_path / "alike", 2, "separate")
    given = {"weights": [0.5, 0.5]} if method == "task_arithmetic" else {}

    expected = oracle.merge_folder(method, alike.base, alike.tuned, **given)

    found = projections(tensors(tmp_path))
    for layer, number, role in found:
        value = expected[f"model.layers.{layer}.mlp.experts.{number}.{role}_proj.weight"].out
        bits = oracle.round_to("BF16", value)
        ours = found[layer, number, role].contiguous().view(torch.int16).numpy().view("u2")
        assert oracle.ulp_distance("BF16", ours, bits).max() <= 1
        assert (ours == bits).mean() > 0.99


@pytest.mark.parametrize("asked", ["fused", "separate"])
def test_the_recipe_may_ask_for_a_layout(tmp_path: Path, asked: str) -> None:
    donor = {"fused": "separate", "separate": "fused"}[asked]
    stockflow = {"stockflow": {"experts": asked}}

    merged(tmp_path / "asked", {0: donor, 1: donor, 2: donor}, "model_stock", **stockflow)
    merged(tmp_path / "alike", asked, "model_stock")

    ours, theirs = tensors(tmp_path / "asked"), tensors(tmp_path / "alike")
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("donor", "method"), diagonal(by_name("fused", "separate", "qwen_vl"), by_name("model_stock", "dare_ties"))
)
def test_memory_threads_places_and_shards_change_no_byte(tmp_path: Path, method: str, donor: str) -> None:
    own = family(tmp_path, 2, {0: donor, 1: "separate", 2: "qwen_vl"}, LARGE)
    recipe = write_recipe(tmp_path / "recipe.yaml", method, own, **METHODS[method])
    copies = write_recipe(tmp_path / "copies.yaml", method, in_memory(own, tmp_path.name), **METHODS[method])

    merge_here(recipe, tmp_path / "much", memory_bytes=2048 * MIB)
    merge_here(recipe, tmp_path / "little", memory_bytes=190 * MIB, num_threads=1)
    merge_here(copies, tmp_path / "streamed", memory_bytes=2048 * MIB)
    merge_here(copies, tmp_path / "in passing", memory_bytes=420 * MIB, num_threads=1)
    merge_here(recipe, tmp_path / "shards", shard_size=1_000_000)

    outputs = [runs.shard_digests(tmp_path / each) for each in ("much", "little", "streamed", "in passing")]
    whole = load_file(tmp_path / "much" / "model.safetensors")
    parts = [load_file(path) for path in sorted((tmp_path / "shards").glob("*.safetensors"))]
    assert len(parts) > 2
    assert outputs == [outputs[0]] * 4
    together = {name: value for part in parts for name, value in part.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)


def in_memory(own: Family, name: str) -> Family:
    """Return copies that are no local files, so that they are read into slabs."""
    urls = [f"memory://{name}-{number}" for number in range(1 + len(own.tuned))]
    for source, url in zip((own.base, *own.tuned), urls, strict=True):
        store = open_store(url, StorageConfig())
        for path in source.iterdir():
            store.put(path.name, path.read_bytes())
    return Family(urls[0], tuple(urls[1:]))  # type: ignore[arg-type]


def test_what_is_transposed_is_read_once(tmp_path: Path) -> None:
    own = family(tmp_path, 2, "qwen_vl", LARGE)
    copies = write_recipe(tmp_path / "copies.yaml", "linear", in_memory(own, tmp_path.name), parameters={"weight": 1.0})

    result = merge_here(copies, tmp_path / "out", memory_bytes=2048 * MIB)

    assert result.manifest.summary["bytes_read"] == result.plan.num_source_bytes


@pytest.mark.parametrize("layout", mostly_slow(["fused", "separate", "llama4"], ["llama4"]))
def test_outputs_of_mixed_layouts_are_verified_and_gone_on_with(tmp_path: Path, layout: str) -> None:
    others = {"fused": "separate", "separate": "llama4", "llama4": "fused"}[layout]
    result = merged(tmp_path, {0: layout, 1: others, 2: others}, "model_stock")
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"

    verified = runs.invoke("verify", output, "--inputs", "--sample", "1.0")
    assert verified.exit_code == 0, verified.stdout + verified.stderr
    digests = runs.shard_digests(output)
    (output / "manifest.json").unlink()
    again = merge_here(recipe, output)
    assert again.plan.plan_id == result.plan.plan_id
    assert runs.shard_digests(output) == digests

    audited = runs.invoke("audit", output, "--json")
    assert audited.exit_code == 0, audited.stderr
    looked = runs.invoke("inspect", recipe, "--json")
    assert looked.exit_code == 0, looked.stderr
    cosines = {row["name"]: row["mean_cosine"] for row in json.loads(looked.stdout)["tensors"]}
    facts = runs.tensor_facts(output)
    assert cosines.keys() == facts.keys()
    assert all(abs(facts[name]["mean_cosine"] - cosine) < 1e-9 for name, cosine in cosines.items())


def test_a_byte_that_changed_in_a_fused_output_is_found(tmp_path: Path) -> None:
    merged(tmp_path, {0: "fused", 1: "separate", 2: "fused"}, "model_stock")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    payload = bytearray(path.read_bytes())
    payload[-3] ^= 1
    path.write_bytes(payload)

    verified = runs.invoke("verify", tmp_path / "out")

    assert verified.exit_code != 0


def test_quantised_experts_are_parted_where_their_scales_are(tmp_path: Path) -> None:
    """The fused model in FP8, the others one by one in plain numbers: as if it were one by one, too."""
    sizes = Sizes(num_experts=2, hidden=40, inner=32, num_layers=1)
    drawn = models(2, {0: "separate", 1: "fused", 2: "separate"}, sizes)
    found: dict[str, Tensors] = {"fused": {}, "separate": {}}
    for name, value in drawn[1].items():
        if ".experts." not in name:
            found["fused"][name] = found["separate"][name] = value
            continue
        coded = fp8(value.float(), (32, 32)).tensors
        found["fused"] |= {name: coded["weight"], f"{name}_scale_inv": coded["weight_scale_inv"]}
        stem, codes, scales = name.rpartition(".")[0], coded["weight"], coded["weight_scale_inv"]
        roles = ("gate", "up") if "gate_up" in name else ("down",)
        for number in range(sizes.num_experts):
            halves = zip(roles, codes[number].chunk(len(roles)), scales[number].chunk(len(roles)), strict=True)
            for role, code, scale in halves:
                own = f"{stem}.{number}.{role}_proj.weight"
                found["separate"] |= {own: code.contiguous(), f"{own}_scale_inv": scale.contiguous()}
    outputs = {}
    for layout, tune in found.items():
        each = [drawn[0], tune, drawn[2]]
        folders = [write_checkpoint(tmp_path / layout / str(n), model, config={}) for n, model in enumerate(each)]
        asked = {"stockflow": {"accept": ["quantised-tunes"]}}
        recipe = write_recipe(
            tmp_path / f"{layout}.yaml", "model_stock", Family(folders[0], tuple(folders[1:])), **asked
        )
        merge_here(recipe, tmp_path / layout / "out")
        outputs[layout] = tensors(tmp_path / layout)

    assert outputs["fused"].keys() == drawn[0].keys()
    assert all(torch.equal(outputs["fused"][name], outputs["separate"][name]) for name in drawn[0])
