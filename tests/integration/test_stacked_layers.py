"""Layers stacked and mapped: the forms of published recipes, each output tensor held against sources found by hand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import deserialize

import stockflow
from tests import oracle, runs
from tests.checkpoints import LLAMA_CONFIG, llama_shapes, make_tensors, write_checkpoint

Run = tuple[int, int, int]
"""A model, and its first layer and the one behind the last."""
SMALL: dict[str, Any] = LLAMA_CONFIG | {
    "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "head_dim": 4,
}  # fmt: skip


def write_models(folder: Path, depths: list[int], **config: Any) -> dict[str, Path]:
    """Write Llamas m0, m1 ... of so many layers, tuned from each other as far as they have tensors of one name."""
    shapes = llama_shapes(SMALL | {"num_hidden_layers": max(depths)})
    drawn = {name: make_tensors(name, shape, len(depths) - 1 or 1, delta_scale=0.01) for name, shape in shapes.items()}
    found = {}
    for number, depth in enumerate(depths):
        names = llama_shapes(SMALL | {"num_hidden_layers": depth})
        tensors = {name: drawn[name][number].to(torch.bfloat16) for name in names}
        own = SMALL | {"num_hidden_layers": depth, "torch_dtype": "bfloat16"} | config
        found[f"m{number}"] = write_checkpoint(folder / f"m{number}", tensors, num_shards=1 + number, config=own)
    return found


def write(path: Path, text: str, models: Mapping[str, Path]) -> Path:
    for name, folder in models.items():
        text = text.replace(f"{{dir}}/{name}\n", f"{folder}\n").replace(f"{{dir}}/{name},", f"{folder},")
    assert "{dir}" not in text
    path.write_text(text)
    return path


def sources(slices: list[list[Run]]) -> Iterator[tuple[str, float, list[tuple[int, str]]]]:
    """Yield each tensor of the output: its name, its depth, and the models and names that it is made from."""
    for first_or_last, names in ((slices[0], ["model.embed_tokens"]), (slices[-1], ["model.norm", "lm_head"])):
        for name in names:
            yield f"{name}.weight", 0.0, [(model, f"{name}.weight") for model, _, _ in first_or_last]
    parts = sorted(name.split(".", 3)[3] for name in llama_shapes(SMALL) if name.startswith("model.layers.0."))
    number = 0
    for runs_ in slices:
        _, start, stop = runs_[0]
        for step in range(stop - start):
            depth = step / (stop - start - 1) if stop - start > 1 else 1.0
            for part in parts:
                froms = [(model, f"model.layers.{first + step}.{part}") for model, first, _ in runs_]
                yield f"model.layers.{number}.{part}", depth, froms
            number += 1


def over(values: list[float], depth: float) -> float:
    return float(np.interp(depth, np.linspace(0, 1, len(values)), values)) if len(values) > 1 else values[0]


Merged = Callable[[str, float, list[oracle.Floats]], oracle.OracleResult]


def slerp(table: list[tuple[str, list[float]]], base: int = 0) -> Merged:
    def merged(name: str, depth: float, inputs: list[oracle.Floats]) -> oracle.OracleResult:
        values = next(values for part, values in table if part in name)
        return oracle.slerp(inputs[base], inputs[1 - base], over(values, depth))

    return merged


def weighted(*weights: float) -> Merged:
    return lambda name, depth, inputs: oracle.linear(inputs, list(weights))


def of_base(weights: list[float], base: int = 0, **more: Any) -> Merged:
    """Task vectors from the source that is the base."""

    def merged(name: str, depth: float, inputs: list[oracle.Floats]) -> oracle.OracleResult:
        tuned = [each for number, each in enumerate(inputs) if number != base]
        method = oracle.ties if "densities" in more else oracle.task_arithmetic
        return method(inputs[base], tuned, weights=weights, **more)

    return merged


def filtered_by_own_names(name: str, depth: float, inputs: list[oracle.Floats]) -> oracle.OracleResult:
    """m1's filter sees the name in m1, whose layer 1 is the output's layer 0; the rest of m1 falls to the slice."""
    weight = 0.9371 if name.startswith("model.layers.0.") else over([0.1153, 0.5371], depth)
    return oracle.linear(inputs, [0.5153, weight])


@dataclass(frozen=True)
class Form:
    depths: list[int]
    text: str
    slices: list[list[Run]]
    merged: Merged


TUTORIAL_T = [("self_attn", [0, 0.5, 0.3, 0.7, 1]), ("mlp", [1, 0.5, 0.7, 0.3, 0]), ("", [0.5])]
FILTERS_T: list[tuple[str, list[float]]] = [
    ("lm_head", [0.55]), ("embed_tokens", [0.7]), ("self_attn", [0.65, 0.35]), ("mlp", [0.35, 0.65]),
    ("layernorm", [0.4, 0.6]), ("", [0.5]),
]  # fmt: skip
FORMS = {
    "slerp, the form of tutorials": Form([32, 32], """
slices:
  - sources:
      - model: {dir}/m0
        layer_range: [0, 32]
      - model: {dir}/m1
        layer_range: [0, 32]
merge_method: slerp
base_model: {dir}/m0
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""", [[(0, 0, 32), (1, 0, 32)]], slerp(TUTORIAL_T)),
    "slerp, the base second": Form([48, 48], """
slices:
  - sources:
      - model: {dir}/m1
        layer_range: [0, 48]
      - model: {dir}/m0
        layer_range: [0, 48]
merge_method: slerp
base_model: {dir}/m0
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
""", [[(1, 0, 48), (0, 0, 48)]], slerp(TUTORIAL_T, base=1)),
    "slerp, filters of one value": Form([32, 32], """
slices:
  - sources:
      - model: {dir}/m1
        layer_range: [0, 32]
      - model: {dir}/m0
        layer_range: [0,32]
merge_method: slerp
base_model: {dir}/m0
parameters:
  t:
    - filter: lm_head
      value: [0.55]
    - filter: embed_tokens
      value: [0.7]
    - filter: self_attn
      value: [0.65, 0.35]
    - filter: mlp
      value:  [0.35, 0.65]
    - filter: layernorm
      value: [0.4, 0.6]
    - filter: modelnorm
      value: [0.6]
    - value: 0.5
dtype: bfloat16
""", [[(1, 0, 32), (0, 0, 32)]], slerp(FILTERS_T, base=1)),
    "linear, in one slice": Form([2, 2], """
dtype: float16
merge_method: linear
slices:
- sources:
  - layer_range: [0, 2]
    model: {dir}/m1
    parameters:
      weight: 0.5153
  - layer_range: [0, 2]
    model: {dir}/m0
    parameters:
      weight: 0.4847
""", [[(1, 0, 2), (0, 0, 2)]], weighted(0.5153, 0.4847)),
    "task arithmetic, all layers": Form([32, 32, 32], """
base_model: {dir}/m0
dtype: bfloat16
merge_method: task_arithmetic
parameters:
  normalize: false
slices:
- sources:
  - layer_range: [0, 32]
    model: {dir}/m0
  - layer_range: [0, 32]
    model: {dir}/m1
    parameters:
      weight: 0.5071
  - layer_range: [0, 32]
    model: {dir}/m2
    parameters:
      weight: 0.4931
""", [[(0, 0, 32), (1, 0, 32), (2, 0, 32)]], of_base([0.5071, 0.4931])),
    "ties, a module, the base third": Form([40, 40, 40, 40], """
base_model: {dir}/m0
dtype: bfloat16
merge_method: ties
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 40]
        model: {dir}/m1
        parameters:
          density: 0.4
          weight: 0.2571
      - layer_range: [0, 40]
        model: {dir}/m2
        parameters:
          density: 0.5
          weight: 0.3571
      - layer_range: [0, 40]
        model: {dir}/m0
        parameters:
          density: 0.5
          weight: 0.3
      - layer_range: [0, 40]
        model: {dir}/m3
        parameters:
          density: 0.6
          weight: 0.4571
parameters:
  lamda: 0.85
  normalize: 1.0
""", [[(1, 0, 40), (2, 0, 40), (0, 0, 40), (3, 0, 40)]],
        of_base([0.2571, 0.3571, 0.4571], 2, densities=[0.4, 0.5, 0.6], normalize=True)),
    "slices of two depths, an own base, layers used twice": Form([6, 9, 6], """
merge_method: task_arithmetic
base_model: {dir}/m0
slices:
- sources:
  - model: {dir}/m0
    layer_range: [0, 4]
  - model: {dir}/m1
    layer_range: [5, 9]
- sources:
  - model: {dir}/m1
    layer_range: [3, 5]
  - model: {dir}/m2
    layer_range: [2, 4]
  base_model: {dir}/m1
- sources:
  - model: {dir}/m2
    layer_range: [5, 6]
  - model: {dir}/m0
    layer_range: [1, 2]
parameters:
  weight: 0.7121
""", [[(0, 0, 4), (1, 5, 9)], [(1, 3, 5), (2, 2, 4)], [(2, 5, 6), (0, 1, 2)]],
        lambda name, depth, inputs: (
            oracle.task_arithmetic(inputs[1], inputs[:1], [0.7121])
            if name.startswith(("model.layers.6.", "model.norm", "lm_head"))
            else oracle.task_arithmetic(inputs[0], inputs[1:], [0.7121])
        )),
    "a filter that sees the names of its model, values over the slice": Form([6, 6], """
merge_method: linear
slices:
- sources:
  - model: {dir}/m0
    layer_range: [0, 4]
    parameters: {weight: 0.5153}
  - model: {dir}/m1
    layer_range: [1, 5]
    parameters: {weight: [{filter: layers.1., value: 0.9371}]}
  parameters: {weight: [0.1153, 0.5371]}
""", [[(0, 0, 4), (1, 1, 5)]], filtered_by_own_names),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_tensor_is_made_of_the_sources_that_its_slice_gives_it(form: str, tmp_path: Path) -> None:
    depths, text, slices, merged = (getattr(FORMS[form], each) for each in ("depths", "text", "slices", "merged"))
    models = write_models(tmp_path, depths)
    recipe = write(tmp_path / "recipe.yaml", text, models)

    result = runs.merge_here(recipe, tmp_path / "out")

    inputs = [oracle.load_checkpoint(folder) for folder in models.values()]
    found = oracle.load_checkpoint(tmp_path / "out")
    num_wrong = num_elems = 0
    wanted = list(sources(slices))
    assert found.keys() == {name for name, _, _ in wanted}
    for name, depth, froms in wanted:
        want = merged(name, depth, [inputs[model][own].array for model, own in froms]).out
        dtype = found[name].dtype
        num_wrong += np.count_nonzero(oracle.round_to(dtype, found[name].array) != oracle.round_to(dtype, want))
        num_elems += want.size
    print(f"FIGURES {form}: {num_wrong} of {num_elems:,} differ")
    assert num_wrong <= 1e-4 * num_elems
    assert result.plan.config is not None
    assert result.plan.config["num_hidden_layers"] == sum(stop - start for (_, start, stop), *_ in slices)


PASSTHROUGH: dict[str, tuple[list[int], list[Run], str]] = {
    "six overlapping": ([32], [(0, 0, 10), (0, 5, 15), (0, 10, 20), (0, 15, 25), (0, 20, 25), (0, 22, 32)], ""),
    "two models": ([32, 32], [(0, 0, 32), (1, 24, 32)], ""),
    "pruned, with a base": ([36], [(0, 0, 18), (0, 28, 36)], "base_model: {dir}/m0\n"),
    "eighty to 140": ([80], [(0, 10 * number, 10 * number + 20) for number in range(7)], ""),
    "deeper than the first": ([4, 9], [(0, 0, 4), (1, 3, 9), (0, 2, 3)], ""),
}
"""The depths of the models, the layers of each slice, and what else the recipe says."""


def stack(path: Path, models: Mapping[str, Path], slices: list[Run], more: str = "") -> Path:
    """Write a recipe of passthrough."""
    text = f"merge_method: passthrough\ndtype: bfloat16\n{more}slices:\n" + "".join(
        f"- sources:\n  - layer_range: [{start}, {stop}]\n    model: {{dir}}/m{model}\n"
        for model, start, stop in slices
    )
    return write(path, text, models)


@pytest.mark.parametrize("form", PASSTHROUGH)
def test_passthrough_carries_the_bytes_of_every_layer_over(form: str, tmp_path: Path) -> None:
    depths, slices, more = PASSTHROUGH[form]
    models = write_models(tmp_path, depths)

    result = runs.merge_here(stack(tmp_path / "recipe.yaml", models, slices, more), tmp_path / "out")

    inputs = [stored_bytes(folder) for folder in models.values()]
    found = stored_bytes(tmp_path / "out")
    wanted = {name: inputs[model][own] for name, _, [(model, own)] in sources([[run] for run in slices])}
    assert found == wanted
    assert all(job.is_copy for job in result.plan.jobs)
    assert result.plan.config is not None
    assert result.plan.config["num_hidden_layers"] == sum(stop - start for _, start, stop in slices)


def stored_bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: bytes(entry["data"]) for path in files for name, entry in deserialize(path.read_bytes())}


def test_a_scale_of_a_filter_is_applied_to_its_tensors_alone(tmp_path: Path) -> None:
    models = write_models(tmp_path, [4])
    scale = "parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [2, 4]}]}\n"

    runs.merge_here(stack(tmp_path / "recipe.yaml", models, [(0, 0, 3), (0, 1, 4)], scale), tmp_path / "out")

    (inputs,) = (oracle.load_checkpoint(folder) for folder in models.values())
    found = oracle.load_checkpoint(tmp_path / "out")
    for name, depth, [(_, own)] in sources([[(0, 0, 3)], [(0, 1, 4)]]):
        factor = 0.0 if "o_proj" in name else 2.0 + 2.0 * depth if "down_proj" in name else 1.0
        want = oracle.round_to("BF16", factor * inputs[own].array)
        assert np.array_equal(oracle.round_to("BF16", found[name].array) & 0x7FFF, want & 0x7FFF), name


def test_a_stack_of_120_layers_from_two_models_of_80_is_loaded_and_run(tmp_path: Path) -> None:
    """Two of the shape of 70B models, small in all but depth."""
    transformers = pytest.importorskip("transformers")
    models = write_models(tmp_path, [80, 80])

    runs.merge_here(stack(tmp_path / "recipe.yaml", models, [(0, 0, 40), (1, 20, 60), (0, 40, 80)]), tmp_path / "out")

    model, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.model.layers) == model.config.num_hidden_layers == 120
    parts = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in models.values()]
    order = [*range(40), *(80 + layer for layer in range(20, 60)), *range(40, 80)]
    layers = [*parts[0].model.layers, *parts[1].model.layers]
    parts[0].model.layers = torch.nn.ModuleList([layers[number] for number in order])
    parts[0].config.num_hidden_layers = len(order)
    tokens = torch.arange(24).reshape(2, 12)
    assert torch.equal(model(tokens, use_cache=False).logits, parts[0](tokens, use_cache=False).logits)


def test_a_stack_of_a_model_whose_config_has_a_type_per_layer_is_loaded(tmp_path: Path) -> None:
    """mergekit writes the number of layers alone, and transformers refuses such a config."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, use_sliding_window=True, sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "m0", safe_serialization=True)
    types = config.layer_types
    assert len(set(types)) == 2

    recipe = stack(tmp_path / "recipe.yaml", {"m0": tmp_path / "m0"}, [(0, 0, 3), (0, 1, 4)])
    runs.merge_here(recipe, tmp_path / "out")

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.layer_types == [*types[:3], *types[1:]]
    assert len(loaded.model.layers) == 6
    assert loaded(torch.arange(12).reshape(1, 12)).logits.isfinite().all()


def test_a_stack_is_resumed_verified_reported_and_audited(tmp_path: Path) -> None:
    models = write_models(tmp_path, [6, 6, 6])
    slices = [[(0, 0, 4), (1, 1, 5), (2, 0, 4)], [(0, 2, 6), (1, 2, 6), (2, 2, 6)]]
    text = "merge_method: model_stock\nbase_model: {dir}/m0\nslices:\n"
    for each in slices:
        text += "- sources:\n" + "".join(
            f"  - model: {{dir}}/m{model}\n    layer_range: [{start}, {stop}]\n" for model, start, stop in each
        )
    recipe, output = write(tmp_path / "recipe.yaml", text, models), tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=5000)
    digests = runs.shard_digests(output)

    for path in [output / "manifest.json", *sorted(output.glob("*.safetensors"))[:3]]:
        path.unlink()
    assert runs.merge_here(recipe, output, shard_size=5000).outcome == "merged"

    assert runs.shard_digests(output) == digests
    verification = stockflow.verify(str(output), inputs=True, sample="100%")
    assert verification.is_sound, verification.findings
    assert stockflow.audit(str(recipe), str(output)).verdict.answer == "no"
    rows = {row["name"]: row for row in stockflow.inspect(str(recipe)).rows()}
    facts = runs.tensor_facts(output)
    assert rows.keys() == facts.keys() == {name for name, _, _ in sources(slices)}
    assert all(rows[name]["mean_cosine"] == facts[name]["mean_cosine"] for name in facts)
    assert stockflow.report(str(output)).geometry.all_tensors.num_tensors == len(facts)
