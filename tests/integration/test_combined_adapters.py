"""Recipes whose output is an adapter, against the dense sums of what their adapters add, in float64."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import Result

import stockflow
from tests import adapters, oracle, runs
from tests.adapters import Adapter, write_adapter
from tests.checkpoints import llama_shapes, write_checkpoint

SHAPES = {name: shape for name, shape in llama_shapes().items() if "layers.1" not in name}
Q, K, UP = (f"model.layers.0.{name}_proj.weight" for name in ("self_attn.q", "self_attn.k", "mlp.up"))
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


class Family:
    """Adapters in folders, whose base is not there at all."""

    def __init__(self, folder: Path, made: Sequence[Adapter], **said: Any) -> None:
        self.folder, self.made = folder, made
        self.places = [
            write_adapter(folder / f"lora-{number}", each, **{"base_model_name_or_path": "org/base", **said})
            for number, each in enumerate(made)
        ]

    def recipe(self, weights: Sequence[float], **said: Any) -> Path:
        options = {"output": "adapter", **said.pop("stockflow", {})}
        models = [
            {"model": str(place), "parameters": {"weight": weight}}
            for place, weight in zip(self.places, weights, strict=True)
        ]
        recipe = {"merge_method": "linear", "models": models, "stockflow": options, **said}
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return self.folder / "recipe.yaml"

    def change(self, shares: Sequence[float], name: str) -> np.ndarray:
        """Return what the adapters add to a matrix together."""
        nothing = {name: np.zeros(SHAPES[name])}
        return sum(share * each.of(nothing)[name] for share, each in zip(shares, self.made, strict=True))


def merge(recipe: Path, *options: object) -> Result:
    words = ["merge", recipe, recipe.parent / "out", *options]
    result = runs.invoke(*words)
    assert "Traceback" not in result.output
    return result


def merged(recipe: Path, *options: object) -> dict[str, Any]:
    result = merge(recipe, "--json", "--quiet", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(recipe: Path) -> str:
    result = merge(recipe)
    assert result.exit_code == 2
    assert not (recipe.parent / "out" / "adapter_config.json").exists()
    return result.output


def factors(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a module as they are in the output, in float64."""
    held = load_file(folder / "out" / "adapter_model.safetensors")
    key = adapters.PREFIX + name.removesuffix(".weight")
    return tuple(held[f"{key}.lora_{part}.weight"].double().numpy() for part in "AB")  # type: ignore[return-value]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "adapter_config.json").read_text())


def three(folder: Path) -> Family:
    """Return adapters of different ranks, scales and targets."""
    return Family(
        folder,
        [
            adapters.linear(SHAPES, ["q_proj", "up_proj"], seed=1, r=3, lora_alpha=7.0),
            adapters.linear(SHAPES, ["q_proj", "k_proj"], seed=2, r=2, lora_alpha=5.0, use_rslora=True),
            adapters.linear(SHAPES, ["q_proj", "up_proj"], seed=3),
        ],
    )


@pytest.mark.parametrize(
    ("said", "shares"),
    [
        ({"merge_method": "linear"}, (0.25, 0.5, 0.25)),
        ({"merge_method": "task_arithmetic", "base_model": "org/base"}, (1.0, 2.0, 1.0)),
        (
            {"merge_method": "task_arithmetic", "base_model": "org/base", "parameters": {"lambda": 0.3}},
            (0.3, 0.6, 0.3),
        ),
    ],
)
def test_factors_side_by_side_are_the_weighted_sum(
    said: dict[str, Any], shares: tuple[float, ...], tmp_path: Path
) -> None:
    family = three(tmp_path)

    found = merged(family.recipe([1.0, 2.0, 1.0], **said))

    ranks = {each["name"] + ".weight": each["rank"] for each in found["modules"]}
    assert ranks == {Q: 10, K: 2, UP: 8}
    assert all(energy == 1.0 for energy in found["energy"].values())
    for name in ranks:
        a, b = factors(tmp_path, name)
        expected = family.change(shares, name)
        np.testing.assert_allclose(b @ a, expected, atol=2e-7 * np.abs(expected).max() * 10, err_msg=name)
        own = [load_file(place / "adapter_model.safetensors") for place in family.places]
        key = f"{adapters.PREFIX}{name.removesuffix('.weight')}.lora_A.weight"
        np.testing.assert_array_equal(a, np.concatenate([held[key] for held in own if key in held]))
    said_there = config(tmp_path)
    assert said_there["base_model_name_or_path"] == "org/base"
    assert sorted(said_there["target_modules"]) == sorted(name.removesuffix(".weight") for name in ranks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_the_adapter_is_the_merge_of_the_models(dtype: str, tmp_path: Path) -> None:
    family = three(tmp_path)
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    write_checkpoint(tmp_path / "base", base)
    merged(family.recipe([0.2, 0.5, 0.3], dtype=dtype))
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'out'}"}],
        "dtype": "float32",
    }
    (tmp_path / "read.yaml").write_text(yaml.safe_dump(recipe))

    runs.merge_here(tmp_path / "read.yaml", tmp_path / "model")

    read = oracle.load_checkpoint(tmp_path / "model")
    precision = 3e-7 if dtype == "float32" else 2**-8
    for name in (Q, K, UP):
        change = family.change((0.2, 0.5, 0.3), name)
        error = np.linalg.norm(read[name].array.reshape(SHAPES[name]) - (base[name].double().numpy() + change))
        rounding = 1e-7 * np.linalg.norm(base[name].numpy())
        assert error <= precision * np.linalg.norm(change) + rounding, name


def test_a_rank_takes_the_best_factors_there_are(tmp_path: Path) -> None:
    family = three(tmp_path)

    found = merged(family.recipe([0.25, 0.5, 0.25], stockflow={"rank": 4}))

    assert {each["name"] + ".weight": (each["rank"], each["summed_rank"]) for each in found["modules"]} == {
        Q: (4, 10), K: (2, 2), UP: (4, 8)
    }  # fmt: skip
    for name in (Q, UP):
        change = family.change((0.25, 0.5, 0.25), name)
        values = np.linalg.svd(change, compute_uv=False)
        a, b = factors(tmp_path, name)
        error = np.linalg.norm(b @ a - change)
        assert error == pytest.approx(np.linalg.norm(values[4:]), rel=1e-5)
        energy = found["energy"][name.removesuffix(".weight")]
        assert energy == pytest.approx(np.sum(values[:4] ** 2) / np.sum(values**2), rel=1e-9)
    assert config(tmp_path)["r"] == 4
    assert config(tmp_path)["rank_pattern"] == {"^model\\.layers\\.0\\.self_attn\\.k_proj": 2}


def test_filters_and_weights_of_zero_count_module_by_module(tmp_path: Path) -> None:
    family = three(tmp_path)
    weights = [{"filter": "up_proj", "value": 0.0}, {"value": 1.0}]
    recipe = yaml.safe_load(family.recipe([1.0, 1.0, 1.0]).read_text())
    recipe["models"][0]["parameters"]["weight"] = weights
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    merged(tmp_path / "recipe.yaml")

    a, b = factors(tmp_path, UP)
    assert len(a) == adapters.RANK
    np.testing.assert_allclose(b @ a, family.change((0.0, 0.5, 0.5), UP), atol=1e-6)
    a, b = factors(tmp_path, Q)
    np.testing.assert_allclose(b @ a, family.change((1 / 3, 1 / 3, 1 / 3), Q), atol=1e-6)


def test_embeddings_and_modules_that_are_saved_are_merged_as_they_are_held(tmp_path: Path) -> None:
    made = [adapters.saved(SHAPES), adapters.saved(SHAPES)]
    made[1].tensors = {key: value * 3 for key, value in made[1].tensors.items()}
    family = Family(tmp_path, made)

    found = merged(family.recipe([1.0, 3.0]))

    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(found["whole"]) == 3
    assert sorted(config(tmp_path)["modules_to_save"]) == ["lm_head", "model.embed_tokens", "model.norm"]
    for name in (NORM, EMBEDDING, HEAD):
        values = [each.tensors[adapters.PREFIX + name].double().numpy() for each in made]
        expected = oracle.widen("F32", oracle.round_to("F32", 0.25 * values[0] + 0.75 * values[1]))
        np.testing.assert_array_equal(held[adapters.PREFIX + name].numpy(), expected.reshape(SHAPES[name]))


def test_embeddings_of_factors_stay_so(tmp_path: Path) -> None:
    shapes = {EMBEDDING: SHAPES[EMBEDDING], HEAD: SHAPES[HEAD]}
    made = [adapters.embedded(shapes), adapters.embedded(shapes)]
    family = Family(tmp_path, made)
    for each in made:
        del each.tensors[f"{adapters.PREFIX}model.embed_tokens.base_layer.weight"]
    family = Family(tmp_path, made)

    merged(family.recipe([1.0, 1.0]))

    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a = held[f"{adapters.PREFIX}model.embed_tokens.lora_embedding_A"].double().numpy()
    b = held[f"{adapters.PREFIX}model.embed_tokens.lora_embedding_B"].double().numpy()
    own = made[0].tensors
    own_a, own_b = (own[f"{adapters.PREFIX}model.embed_tokens.lora_embedding_{part}"].double().numpy() for part in "AB")
    np.testing.assert_allclose(b @ a, adapters.ALPHA / adapters.RANK * (own_b @ own_a), atol=1e-6)


def _replaced(name: str, value: torch.Tensor) -> Adapter:
    made = adapters.linear(SHAPES, ["q_proj"])
    made.tensors[adapters.PREFIX + name] = value
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([adapters.with_lengths(SHAPES)], "DoRA"),
        ([adapters.tokens(SHAPES)], "rows of tokens"),
        ([adapters.saved(SHAPES), adapters.linear(SHAPES)], "held whole, and not by"),
        ([_replaced("model.layers.0.self_attn.q_proj.bias", torch.ones(48)), adapters.linear(SHAPES)], "q_proj.bias"),
        ([adapters.linear(SHAPES), adapters.turned(SHAPES)], "fan_in_fan_out"),
        ([adapters.linear(SHAPES), adapters.linear({Q: (48, 40)})], "of several shapes: [48, 40] and [48, 48]"),
        (
            [adapters.of_experts("model.layers.0.mlp.experts", {"down_proj": (4, 8, 6)}, ["down_proj"])],
            "of all experts of a layer at once",
        ),
        (
            [
                replace(
                    adapters.of_experts("model.layers.0.mlp.experts", {"down_proj": (4, 8, 6)}, ["down_proj"]),
                    config={"target_parameters": ["down_proj"]},
                )
            ],
            "of all experts of a layer at once",
        ),
    ],
)
def test_what_needs_the_base_is_refused_by_name(made: Sequence[Adapter], said: str, tmp_path: Path) -> None:
    text = refusal(Family(tmp_path, made).recipe([1.0] * len(made)))

    assert said in text
    assert "Remove `output: adapter`" in text


def test_adapters_of_several_tasks_are_refused(tmp_path: Path) -> None:
    tasks = ("SEQ_CLS", None, "CAUSAL_LM")
    made = [adapters.linear(SHAPES, ["q_proj"], seed=seed, task_type=task) for seed, task in enumerate(tasks)]

    assert "was trained for 'SEQ_CLS', and" in refusal(Family(tmp_path, made).recipe([1.0, 1.0, 1.0]))


def test_what_is_held_whole_needs_weights_that_leave_no_share_to_the_base(tmp_path: Path) -> None:
    family = Family(tmp_path, [adapters.saved(SHAPES)])

    text = refusal(family.recipe([0.5], merge_method="task_arithmetic", base_model="org/base"))

    assert "the base, which has a share of the result" in text


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"merge_method": "ties", "base_model": "org/base"}, "`ties` makes no adapter of adapters"),
        ({"parameters": {"normalize": False}}, "sum to 3, which would scale the base"),
        ({"stockflow": {"output": "model", "rank": 4}}, "cuts the factors of an adapter"),
        ({"stockflow": {"rank": 0}}, "rank"),
        ({"stockflow": {"output_format": "keep"}}, "it is of models"),
        ({"tokenizer_source": "union"}, "it is of models"),
        ({"merge_method": "task_arithmetic", "base_model": "org/other"}, "belong to several bases"),
    ],
)
def test_recipes_that_make_no_adapter_are_refused(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(three(tmp_path).recipe([1.0, 1.0, 1.0], **said))


@pytest.mark.parametrize(
    ("bases", "severity"),
    [
        (("/data/alice/llama-sft/checkpoint-500", "/data/bob/mistral-sft/checkpoint-500"), "refusal"),
        (("/mnt/a/Llama-3-8B", "/mnt/b/Llama-3-8B"), "note"),
        (("/mnt/a/Llama-3-8B", "meta-llama/Llama-3-8B"), None),
    ],
)
def test_adapters_of_two_bases_are_told_by_more_than_the_last_name(
    bases: tuple[str, str], severity: str | None, tmp_path: Path
) -> None:
    family = Family(tmp_path, [adapters.linear(SHAPES, ["q_proj"], seed=seed) for seed in (1, 2)])
    for place, base, made in zip(family.places, bases, family.made, strict=True):
        write_adapter(place, made, base_model_name_or_path=base)
    recipe = family.recipe([0.5, 0.5])

    found = runs.invoke("plan", recipe, tmp_path / "out")

    assert found.exit_code == (2 if severity == "refusal" else 0)
    assert all(base in found.output for base in bases) is (severity is not None)
    assert runs.invoke("plan", recipe, tmp_path / "out", "--strict").exit_code == (2 if severity else 0)
    accepting = family.recipe([0.5, 0.5], stockflow={"accept": ["adapter-elsewhere"]})
    assert runs.invoke("plan", accepting, tmp_path / "out", "--strict").exit_code == 0


def test_an_adapter_that_adds_nothing_is_said_among_adapters(tmp_path: Path) -> None:
    family = Family(tmp_path, [adapters.linear(SHAPES, ["q_proj"], seed=seed) for seed in (1, 2)], lora_alpha=0)

    assert "by which its factors add nothing" in runs.invoke("plan", family.recipe([0.5, 0.5]), tmp_path / "out").output


def test_a_model_among_the_adapters_is_named(tmp_path: Path) -> None:
    family = three(tmp_path)
    write_checkpoint(family.places[1], {"w": torch.ones(2)})
    for file in family.places[1].glob("adapter_*"):
        file.unlink()

    assert "every model but `base_model` is one" in refusal(family.recipe([1.0, 1.0, 1.0]))


def test_names_that_differ_in_wrappers_are_one_module(tmp_path: Path) -> None:
    made = [adapters.linear(SHAPES, ["q_proj"], seed=seed) for seed in (1, 2)]
    made[1].tensors = {
        key.replace("model.model.layers", "model.model.language_model.layers"): value
        for key, value in made[1].tensors.items()
    }
    family = Family(tmp_path, made)

    found = merged(family.recipe([1.0, 1.0]))

    assert [each["name"] for each in found["modules"]] == [Q.removesuffix(".weight")]
    a, b = factors(tmp_path, Q)
    np.testing.assert_allclose(b @ a, family.change((0.5, 0.5), Q), atol=1e-6)


def test_the_plan_says_rank_targets_and_bytes_and_writes_nothing(tmp_path: Path) -> None:
    recipe = three(tmp_path).recipe([1.0, 1.0, 1.0], stockflow={"rank": 4})

    words = runs.invoke("plan", recipe, tmp_path / "out")
    found = stockflow.plan(recipe, tmp_path / "out").facts()

    assert words.exit_code == 0
    assert "3 modules: ranks 2 to 4, cut from 10 at most" in words.stdout
    assert not (tmp_path / "out").exists()
    done = merged(recipe)
    assert done["bytes_written"] == found["bytes_written"]
    header = 8 + int.from_bytes((tmp_path / "out" / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size == found["bytes_written"] + header


def test_bytes_depend_neither_on_threads_nor_on_places(s3_endpoint: str, s3_bucket: str, tmp_path: Path) -> None:
    family = three(tmp_path)
    recipe = family.recipe([1.0, 2.0, 1.0], stockflow={"rank": 4})
    merged(recipe, "--workers", 1)
    here = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in [path for place in family.places for path in place.iterdir()]:
        client.upload_file(str(path), s3_bucket, f"{path.parent.name}/{path.name}")
    text = recipe.read_text().replace(str(tmp_path), f"s3://{s3_bucket}")
    text += f"  storage: {{s3://{s3_bucket}: {{endpoint: {s3_endpoint}}}}}\n"
    text = text.replace("stockflow:\n", "").replace("  output:", "stockflow:\n  output:")

    found = stockflow.merge(yaml.safe_load(text), f"s3://{s3_bucket}/out", workers=3)

    there = client.get_object(Bucket=s3_bucket, Key="out/adapter_model.safetensors")["Body"].read()
    assert here == there
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} < set(found.files)


def test_an_adapter_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    family = three(tmp_path)
    recipe = family.recipe([1.0, 1.0, 1.0])
    merged(recipe)

    assert "there already" in merge(recipe).output
    refused = merge(family.recipe([0.5, 1.0, 1.0]))
    assert (refused.exit_code, "finished output of another plan" in refused.output) == (2, True)
    assert merged(recipe, "--overwrite")["bytes_written"]


def test_a_number_beyond_the_dtype_is_an_error(tmp_path: Path) -> None:
    made = adapters.linear(SHAPES, ["q_proj"])
    made.tensors = {key: value * 1e6 for key, value in made.tensors.items()}

    assert "is beyond F16" in refusal(Family(tmp_path, [made]).recipe([1.0], dtype="float16"))


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_numbers_that_are_none_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    made = adapters.linear(SHAPES, ["q_proj"])
    key = adapters.PREFIX + Q.replace(".weight", ".lora_B.weight")
    made.tensors[key][3, 1] = float("inf")
    family = Family(tmp_path, [adapters.linear(SHAPES, ["q_proj"], seed=2), made])

    text = refusal(family.recipe([1.0, 1.0], stockflow=options))

    assert f"{family.places[1]}: '{key}' has NaN or infinity" in text


def test_an_adapter_is_not_replaced_by_what_it_becomes(tmp_path: Path) -> None:
    family = three(tmp_path)
    recipe = family.recipe([1.0, 1.0, 1.0])

    result = runs.invoke("merge", recipe, family.places[1], "--overwrite")

    assert result.exit_code == 2
    assert "lies in, the input" in result.output


def test_memory_that_is_too_small_is_refused(tmp_path: Path) -> None:
    result = merge(three(tmp_path).recipe([1.0, 1.0, 1.0]), "--memory", "64MiB")

    assert result.exit_code == 2
    assert "Raise --memory" in result.output
