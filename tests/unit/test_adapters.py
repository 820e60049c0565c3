"""Adapters as sources: what each feature of PEFT's files makes of a base, and what is refused by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import stockflow
from stockflow.checkpoints.adapters.bases import likeness
from stockflow.errors import CheckpointError, NotFoundError, UserError
from stockflow.recipe import load_recipe
from stockflow.results import PlanResult
from stockflow.run.inputs import Inputs
from tests import adapters, oracle, runs, token_files
from tests.adapters import Adapter, write_adapter
from tests.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint

CONFIG = LLAMA_CONFIG | {"torch_dtype": "bfloat16"}
SHAPES = llama_shapes(CONFIG)
BIASES = {f"{name.removesuffix('.weight')}.bias": shape[:1] for name, shape in SHAPES.items() if "_proj" in name}
EXPERTS = "model.layers.0.mlp.experts"
FUSED = {"gate_up_proj": (3, 34, 21), "down_proj": (3, 21, 17)}
MOE = {f"{EXPERTS}.{name}": shape for name, shape in FUSED.items()}
TURNED = {f"{EXPERTS}.{name}": (shape[0], shape[2], shape[1]) for name, shape in FUSED.items()}
FORMS: dict[str, tuple[Callable[[Mapping[str, Any]], Adapter], Mapping[str, tuple[int, ...]]]] = {
    "plain factors": (adapters.linear, SHAPES),
    "scaled by the root of the rank": (
        lambda shapes: adapters.linear(shapes, r=3, lora_alpha=7, use_rslora=True),
        SHAPES,
    ),
    "patterns of rank and alpha": (adapters.patterned, SHAPES),
    "weights of [in, out]": (adapters.turned, SHAPES),
    "embedding and head": (adapters.embedded, SHAPES),
    "modules saved whole": (adapters.saved, SHAPES),
    "rows of tokens": (adapters.tokens, SHAPES),
    "rows of given lengths": (adapters.with_lengths, SHAPES),
    "biases": (adapters.biased, SHAPES | BIASES),
    "two parameters of experts": (lambda _: adapters.of_experts(EXPERTS, FUSED, list(FUSED)), SHAPES | MOE),
    "one parameter of experts": (lambda _: adapters.of_experts(EXPERTS, FUSED, ["down_proj"]), SHAPES | MOE),
    "parameters of experts that are named alone": (
        lambda _: replace(
            made := adapters.of_experts(EXPERTS, FUSED, list(FUSED)),
            config={**made.config, "target_parameters": list(FUSED)},
        ),
        SHAPES | MOE,
    ),
    "experts of [in, out]": (
        lambda _: adapters.of_experts(EXPERTS, FUSED, list(FUSED), is_turned=True),
        SHAPES | TURNED,
    ),
}
LEAST_CORRECT = 0.9999


def write_base(folder: Path, shapes: Mapping[str, tuple[int, ...]], **config: Any) -> dict[str, oracle.Floats]:
    random = torch.Generator().manual_seed(3)
    tensors = {name: (0.1 * torch.randn(shape, generator=random)).bfloat16() for name, shape in shapes.items()}
    write_checkpoint(folder, tensors, config=CONFIG | config, num_shards=2)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def merged(root: Path, model: str, **top_level: Any) -> dict[str, oracle.Stored]:
    recipe = {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "float32"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | top_level))
    runs.merge_here(root / "recipe.yaml", root / "out")
    return oracle.load_checkpoint(root / "out")


def share_correct(found: oracle.Stored, expected: oracle.Floats) -> float:
    right = oracle.widen(found.dtype, oracle.round_to(found.dtype, expected)).reshape(found.array.shape)
    return float((found.array == right).mean())


@pytest.mark.parametrize("form", FORMS)
def test_a_base_with_an_adapter_is_what_its_definition_says(form: str, tmp_path: Path) -> None:
    make, shapes = FORMS[form]
    base = write_base(tmp_path / "base", shapes)
    adapter = make(shapes)
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    expected = adapter.of(base)
    assert found.keys() == base.keys()
    assert adapter.changes
    for name, values in expected.items():
        assert share_correct(found[name], values) >= LEAST_CORRECT, name
        assert (name in adapter.changes) == bool((values != base[name]).any())


def test_an_adapter_may_be_a_file_of_torch(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES)
    adapter = adapters.linear(SHAPES)
    write_adapter(tmp_path / "lora", adapter)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.save(adapter.tensors, tmp_path / "lora" / "adapter_model.bin")

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    for name, values in adapter.of(base).items():
        assert share_correct(found[name], values) >= LEAST_CORRECT


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        (EXPERTS, ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_factors_of_all_experts_are_found_where_a_base_has_them_one_by_one(
    stem: str, words: tuple[str, str, str], tmp_path: Path
) -> None:
    gate, up, out = words
    own = {f"{stem}.{e}.{name}.weight": (17, 21) for e in range(3) for name in (gate, up)}
    own |= {f"{stem}.{e}.{out}.weight": (21, 17) for e in range(3)}
    base = write_base(tmp_path / "base", SHAPES | own)
    adapter = adapters.of_experts(EXPERTS, FUSED, list(FUSED))
    write_adapter(tmp_path / "lora", adapter)
    fused = {f"{EXPERTS}.{name}": np.zeros(shape) for name, shape in FUSED.items()}

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    deltas = adapter.of(fused)
    for expert in range(3):
        gate_up, down = (deltas[f"{EXPERTS}.{name}"][expert] for name in FUSED)
        for name, delta in ((gate, gate_up[:17]), (up, gate_up[17:]), (out, down)):
            whole = f"{stem}.{expert}.{name}.weight"
            assert share_correct(found[whole], base[whole] + delta) >= LEAST_CORRECT


@pytest.mark.parametrize("shared", ["", "lora_A", "lora_B"])
def test_stacked_factors_are_those_of_each_expert(shared: str, tmp_path: Path) -> None:
    """As Tinker saves them, which calls the head otherwise, too."""
    sizes = {"gate_proj": (17, 21), "up_proj": (17, 21), "down_proj": (21, 17)}
    own = {f"{EXPERTS}.{e}.{name}.weight": shape for e in range(3) for name, shape in sizes.items()}
    base = write_base(tmp_path / "base", SHAPES | own)
    adapter = adapters.linear({"lm_head.weight": SHAPES["lm_head.weight"]}, ["lm_head"])
    adapter.tensors = {key.replace("lm_head", "model.unembed_tokens"): t for key, t in adapter.tensors.items()}
    random, changes = np.random.default_rng(3), dict(adapter.changes)
    for (name, (rows, columns)), word in zip(sizes.items(), ("w1", "w3", "w2"), strict=True):
        num_a, num_b = 1 if shared == "lora_A" else 3, 1 if shared == "lora_B" else 3
        a = adapter.draw(f"{EXPERTS}.{word}.lora_A.weight", (num_a, adapters.RANK, columns), random)
        b = adapter.draw(f"{EXPERTS}.{word}.lora_B.weight", (num_b, rows, adapters.RANK), random)
        delta = adapters.ALPHA / adapters.RANK * (b @ a)
        changes |= {f"{EXPERTS}.{e}.{name}.weight": lambda w, d=delta[e]: w + d for e in range(3)}
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert found.keys() == base.keys()
    for name, change in changes.items():
        assert share_correct(found[name], change(base[name])) >= LEAST_CORRECT, name


def test_experts_that_adapters_have_one_by_one_are_found_in_what_holds_them_all(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES | MOE)
    gates_ups = {f"{EXPERTS}.{e}.{name}.weight": (17, 21) for e in range(3) for name in ("gate_proj", "up_proj")}
    downs = {f"{EXPERTS}.{e}.down_proj.weight": (21, 17) for e in range(3)}
    loras = [adapters.linear(gates_ups | downs, seed=seed) for seed in (0, 1)]
    models = []
    for number, adapter in enumerate(loras):
        write_adapter(tmp_path / f"lora{number}", adapter)
        models.append({"model": f"{tmp_path}/base+{tmp_path}/lora{number}"})
    recipe = {"merge_method": "model_stock", "base_model": f"{tmp_path}/base", "models": models, "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    plan = runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out").plan

    found = oracle.load_checkpoint(tmp_path / "out")
    assert found.keys() == base.keys()
    assert {job.num_statistic_passes for job in plan.jobs if EXPERTS in job.output.name} == {0}
    gate_up, down = (base[f"{EXPERTS}.{name}"] for name in FUSED)
    for expert in range(3):
        placed = (("gate_proj", gate_up[expert, :17]), ("up_proj", gate_up[expert, 17:]), ("down_proj", down[expert]))
        merged_up = found[f"{EXPERTS}.gate_up_proj"].array[expert]
        results = (merged_up[:17], merged_up[17:], found[f"{EXPERTS}.down_proj"].array[expert])
        for (word, own), result in zip(placed, results, strict=True):
            sources = [adapter.changes[f"{EXPERTS}.{expert}.{word}.weight"](own) for adapter in loras]
            right = oracle.model_stock(own, sources).out
            assert share_correct(oracle.Stored("F32", result), right) >= LEAST_CORRECT


@pytest.mark.parametrize(
    ("in_base", "in_adapter"),
    [
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
        ("language_model.model.", "model."),
        ("backbone.", "model."),
    ],
)
def test_names_are_found_through_what_wraps_a_model(in_base: str, in_adapter: str, tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (9, 7), "model.layers.1.mlp.up_proj.weight": (9, 7)}
    base = write_base(tmp_path / "base", {name.replace("model.", in_base): shape for name, shape in shapes.items()})
    adapter = adapters.linear(shapes)
    adapter.tensors = {key.replace("model.model.", f"model.{in_adapter}"): t for key, t in adapter.tensors.items()}
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    for name, change in adapter.changes.items():
        own = name.replace("model.", in_base)
        assert share_correct(found[own], change(base[own])) >= LEAST_CORRECT


TIED = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}


def tied_and(tmp_path: Path, adapter: Adapter) -> tuple[dict[str, oracle.Floats], dict[str, oracle.Stored], Any]:
    base = write_base(tmp_path / "base", TIED, tie_word_embeddings=True)
    write_adapter(tmp_path / "lora", adapter)
    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")
    return base, found, json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_an_adapted_head_of_a_tied_base_becomes_its_own(tmp_path: Path) -> None:
    adapter = adapters.linear({"lm_head.weight": SHAPES["lm_head.weight"]}, ["lm_head"])

    base, found, is_tied = tied_and(tmp_path, adapter)

    embedding = base["model.embed_tokens.weight"]
    assert share_correct(found["lm_head.weight"], adapter.changes["lm_head.weight"](embedding)) >= LEAST_CORRECT
    assert share_correct(found["model.embed_tokens.weight"], embedding) == 1
    assert is_tied is False


def test_an_adapted_embedding_leaves_a_tied_head_as_it_was(tmp_path: Path) -> None:
    whole = adapters.embedded(SHAPES)
    keys = [key for key in whole.tensors if "lora_embedding" in key]
    adapter = Adapter({key: whole.tensors[key] for key in keys}, {}, {})
    a, b = (adapter.tensors[key].double().numpy() for key in keys)

    base, found, is_tied = tied_and(tmp_path, adapter)

    embedding = base["model.embed_tokens.weight"]
    expected = embedding + adapters.ALPHA / adapters.RANK * (b @ a).T
    assert share_correct(found["model.embed_tokens.weight"], expected) >= LEAST_CORRECT
    assert share_correct(found["lm_head.weight"], embedding) == 1
    assert is_tied is False


@pytest.mark.parametrize(
    ("model_type", "embedding", "part", "head"),
    [
        ("bert", "bert.embeddings.word_embeddings", "cls.predictions.bias", "cls.predictions.decoder.weight"),
        ("roberta", "roberta.embeddings.word_embeddings", "lm_head.dense.weight", "lm_head.decoder.weight"),
        ("electra", "electra.embeddings.word_embeddings", "generator_lm_head.bias", "generator_lm_head.weight"),
        ("xlnet", "transformer.word_embedding", "lm_loss.bias", "lm_loss.weight"),
        ("gpt_neox", "gpt_neox.embed_in", "gpt_neox.final_layer_norm.weight", "embed_out.weight"),
        ("whisper", "model.decoder.embed_tokens", "model.decoder.layer_norm.weight", "proj_out.weight"),
        ("phi", "model.embed_tokens", "lm_head.bias", "lm_head.weight"),
    ],
)  # fmt: skip
def test_a_head_that_an_embedding_leaves_has_the_name_that_its_family_loads(
    model_type: str, embedding: str, part: str, head: str, tmp_path: Path
) -> None:
    shapes = {f"{embedding}.weight": (31, 8), part: (8, 8) if part.endswith("dense.weight") else (31,)}
    base = write_base(tmp_path / "base", shapes, model_type=model_type, tie_word_embeddings=True, vocab_size=31)
    adapter = Adapter(config={"target_modules": [embedding]})
    random = np.random.default_rng(2)
    a = adapter.draw(f"{embedding}.lora_embedding_A", (adapters.RANK, 31), random)
    b = adapter.draw(f"{embedding}.lora_embedding_B", (8, adapters.RANK), random)
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    whole = base[f"{embedding}.weight"]
    assert share_correct(found[f"{embedding}.weight"], whole + adapters.ALPHA / adapters.RANK * (b @ a).T) == 1
    assert share_correct(found[head], whole) == 1
    assert len(found) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_that_is_saved_whole_leaves_a_tied_head_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    name, whole = "model.embed_tokens.weight", adapters.saved(SHAPES)
    key = f"{adapters.PREFIX}{name}"
    adapter = Adapter({key: whole.tensors[key].to(dtype)}, {"modules_to_save": ["embed_tokens"]})

    base, found, is_tied = tied_and(tmp_path, adapter)

    assert share_correct(found[name], adapter.tensors[key].double().numpy()) == 1
    assert share_correct(found["lm_head.weight"], base[name]) == 1
    assert is_tied is False


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("more", [-1, 1])
def test_embedding_and_head_of_two_lengths_are_refused(more: int, has_head: bool, tmp_path: Path) -> None:
    rows, columns = SHAPES["model.embed_tokens.weight"]
    adapter = Adapter(config={"modules_to_save": ["embed_tokens"]})
    adapter.draw("model.embed_tokens.weight", (rows + more, columns), np.random.default_rng(1))
    write_adapter(tmp_path / "lora", adapter)
    write_base(tmp_path / "base", SHAPES if has_head else TIED, tie_word_embeddings=not has_head)

    said = refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert f"has {rows + more} rows and 'lm_head.weight' {rows}, which no loader takes" in said


@pytest.mark.parametrize(("model_type", "is_turned"), [("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("modules", [("attn",), ("attn", "wide")])
def test_square_matrices_lie_as_their_layers_have_them(
    modules: tuple[str, ...], flag: bool, model_type: str, is_turned: bool, tmp_path: Path
) -> None:
    if model_type == "llama" and flag and modules == ("attn",):
        is_turned = True  # nothing but the flag tells
    shapes = {"model.layers.0.attn.weight": (8, 8), "model.layers.0.wide.weight": (8, 20), "lm_head.weight": (31, 8)}
    straight = {
        name: shape[::-1] if is_turned and name != "lm_head.weight" else shape for name, shape in shapes.items()
    }
    base = write_base(tmp_path / "base", shapes, model_type=model_type)
    adapter = adapters.linear(straight, [*modules, "lm_head"], fan_in_fan_out=flag)
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    for name, change in adapter.changes.items():
        is_own = is_turned and name != "lm_head.weight"
        assert share_correct(found[name], change(base[name].T).T if is_own else change(base[name])) >= LEAST_CORRECT


def test_a_tied_model_beside_one_that_an_adapter_unties_is_published_untied(tmp_path: Path) -> None:
    adapter = adapters.linear({"lm_head.weight": SHAPES["lm_head.weight"]}, ["lm_head"])
    base = write_base(tmp_path / "base", TIED, tie_word_embeddings=True)["model.embed_tokens.weight"]
    write_adapter(tmp_path / "lora", adapter)
    models = [{"model": f"{tmp_path}/base{more}", "parameters": {"weight": 1}} for more in ("", f"+{tmp_path}/lora")]

    found = merged(tmp_path, "", merge_method="linear", models=models)

    expected = (base + adapter.changes["lm_head.weight"](base)) / 2
    assert share_correct(found["lm_head.weight"], expected) >= LEAST_CORRECT
    assert share_correct(found["model.embed_tokens.weight"], base) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_replaced_rows_are_those_of_a_tied_head_too(tmp_path: Path) -> None:
    adapter = adapters.tokens(TIED)

    base, found, is_tied = tied_and(tmp_path, adapter)

    name = "model.embed_tokens.weight"
    assert share_correct(found[name], adapter.changes[name](base[name])) == 1
    assert "lm_head.weight" not in found
    assert is_tied is True


EMBEDDING = "model.embed_tokens"


def once_more(form: str) -> tuple[Adapter, Callable[[oracle.Floats], oracle.Floats]]:
    """Return an adapter with the tensors of an embedding, and as PEFT writes them once more for a head that is tied."""
    rows, columns = SHAPES[f"{EMBEDDING}.weight"]
    made, random = Adapter(), np.random.default_rng(7)
    if form == "factors":
        made.config["ensure_weight_tying"] = True
        a = made.draw(f"{EMBEDDING}.lora_embedding_A", (adapters.RANK, rows), random)
        b = made.draw(f"{EMBEDDING}.lora_embedding_B", (columns, adapters.RANK), random)
        made.tensors[f"{adapters.PREFIX}lm_head.lora_A.weight"] = torch.from_numpy(b.T).float()
        made.tensors[f"{adapters.PREFIX}lm_head.lora_B.weight"] = torch.from_numpy(a.T).float()
        return made, lambda w: w + adapters.ALPHA / adapters.RANK * (b @ a).T
    if form == "rows":
        made.config["trainable_token_indices"] = [rows + 1, 3]
        whole = made.draw(f"{EMBEDDING}.token_adapter.base_layer.weight", (rows + 2, columns), random)
        whole[[rows + 1, 3]] = made.draw(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", (2, columns), random)
    else:
        made.config |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if form == "saved" else {}
        whole = made.draw(f"{EMBEDDING}.weight", (rows + 2, columns), random)
    made.tensors |= {key.replace(EMBEDDING, "lm_head"): tensor.clone() for key, tensor in made.tensors.items()}
    return made, lambda w: whole


@pytest.mark.parametrize("form", ["factors", "rows", "saved", "resized"])
def test_a_head_that_was_trained_as_one_with_the_embedding_stays_tied(form: str, tmp_path: Path) -> None:
    adapter, change = once_more(form)

    base, found, is_tied = tied_and(tmp_path, adapter)

    assert share_correct(found[f"{EMBEDDING}.weight"], change(base[f"{EMBEDDING}.weight"])) >= LEAST_CORRECT
    assert found.keys() == base.keys()
    assert is_tied is True


def test_rows_of_other_tokens_untie_a_head(tmp_path: Path) -> None:
    adapter = Adapter(config={"trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7]}})
    random, columns = np.random.default_rng(8), SHAPES["lm_head.weight"][1]
    rows = {
        name: adapter.draw(f"{name}.token_adapter.trainable_tokens_delta", (num, columns), random)
        for name, num in ((EMBEDDING, 2), ("lm_head", 1))
    }

    base, found, is_tied = tied_and(tmp_path, adapter)

    for name, indices in ((EMBEDDING, [5, 1]), ("lm_head", [7])):
        expected = base[f"{EMBEDDING}.weight"].copy()
        expected[indices] = rows[name]
        assert share_correct(found[f"{name}.weight"], expected) == 1
    assert is_tied is False


def test_what_peft_writes_of_more_tokens_counts_once(tmp_path: Path) -> None:
    """What was trained is there twice, and beside it what it began as."""
    adapter = Adapter(config={"modules_to_save": ["embed_tokens", "lm_head"]})
    random, (rows, columns) = np.random.default_rng(9), SHAPES["lm_head.weight"]
    expected = {
        name: adapter.draw(f"{name}.modules_to_save.weight", (rows + 2, columns), random)
        for name in (EMBEDDING, "lm_head")
    }
    for name in expected:
        adapter.draw(f"{name}.original_module.weight", (rows + 2, columns), random)
        whole = adapter.tensors[f"{adapters.PREFIX}{name}.modules_to_save.weight"]
        adapter.tensors[f"{adapters.PREFIX}{name}.weight"] = whole.clone()
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert all(share_correct(found[f"{name}.weight"], values) == 1 for name, values in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows + 2


def resized(root: Path, name: str, token: str) -> tuple[Path, oracle.Floats]:
    """Write an adapter with one token and one row more than the base; return the rows of its embedding."""
    made = adapters.saved(SHAPES | dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (98, 48)))
    write_adapter(root / name, made)
    own = token_files.tokenizer_json([f"t{number}" for number in range(97)], more=token_files.added(token, start=97))
    (root / name / "tokenizer.json").write_text(own)
    return root / name, made.changes["model.embed_tokens.weight"](np.zeros(()))


@pytest.mark.parametrize("is_alone", [False, True])
def test_the_tokenizer_beside_an_adapter_is_that_of_its_model(is_alone: bool, tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    (tmp_path / "base" / "added_tokens.json").write_text('{"<old>": 96}')
    lora, rows = resized(tmp_path, "lora", "<new>")
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": f"{tmp_path}/base"}))

    found = merged(tmp_path, str(lora) if is_alone else f"{tmp_path}/base+{lora}")

    assert share_correct(found["model.embed_tokens.weight"], rows) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 98
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (lora / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "added_tokens.json").exists()
    assert stockflow.verify(tmp_path / "out", inputs=True, sample="100%").is_sound


def test_tokens_of_several_adapters_are_merged_by_token(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    both = [resized(tmp_path, name, f"<{name}>") for name in ("one", "two")]
    models = [{"model": f"{tmp_path}/base+{folder}", "parameters": {"weight": 1}} for folder, _ in both]

    found = merged(tmp_path, "", merge_method="linear", models=models, tokenizer_source="union")

    (_, first), (_, second) = both
    expected = np.concatenate([(first[:97] + second[:97]) / 2, first[97:], second[97:]])
    assert share_correct(found["model.embed_tokens.weight"], expected) >= LEAST_CORRECT
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 99


def test_a_token_of_an_adapter_without_a_row_is_said(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES))
    (tmp_path / "lora" / "tokenizer.json").write_text(token_files.tokenizer_json([f"t{n}" for n in range(98)]))

    plan = stockflow.plan(
        {"merge_method": "passthrough", "models": [f"{tmp_path}/base+{tmp_path}/lora"]}, tmp_path / "o"
    )

    assert isinstance(plan, PlanResult)
    assert [remark.code for remark in plan.plan.remarks if "tokens" in remark.code] == ["tokens-beyond-rows"]


def test_an_adapter_alone_is_read_with_the_base_that_it_names(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES)
    adapter = adapters.linear(SHAPES)
    write_adapter(tmp_path / "lora", adapter, base_model_name_or_path=str(tmp_path / "base"))

    found = merged(tmp_path, str(tmp_path / "lora"))

    for name, values in adapter.of(base).items():
        assert share_correct(found[name], values) >= LEAST_CORRECT
    (opened,) = Inputs.open(load_recipe(str(tmp_path / "recipe.yaml"))).checkpoints
    (said,) = [each for each in opened.remarks if each.code == "adapter-base"]
    assert str(said) == (
        f"{tmp_path}/lora holds an adapter: it is merged as {tmp_path}/base + {tmp_path}/lora, whose base "
        "adapter_config.json names"
    )


def test_an_adapter_that_adds_nothing_is_said(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base, SHAPES)
    names = ("idle", "trained", "trained elsewhere", "scaled by nothing")
    for seed, name in enumerate(names):
        made = adapters.linear(SHAPES, seed=seed, lora_alpha=0 if name == names[3] else adapters.ALPHA)
        for key in (key for key in made.tensors if name in names[::2] and ".lora_B." in key):
            made.tensors[key] *= 0
        if name == "trained elsewhere":
            made.tensors["base_model.model.model.norm.weight"] = torch.ones(SHAPES["model.norm.weight"])
            made.config["modules_to_save"] = ["norm"]
        write_adapter(tmp_path / name, made)

    recipe = {"merge_method": "linear", "models": [
        {"model": f"{base}+{tmp_path / name}", "parameters": {"weight": 1.0}}
        for name in names
    ]}  # fmt: skip
    said = [remark for remark in stockflow.plan(recipe, tmp_path / "out").plan.remarks if remark.code == "zeros"]

    assert len(said) == 2
    assert said[0].text.startswith(f"{tmp_path / 'idle'} has nothing but zeros")
    assert said[1].text.startswith(f"{tmp_path / names[3]} says `lora_alpha: 0`, by which its factors add nothing")


def test_a_copy_of_an_adapter_on_the_same_model_is_said(tmp_path: Path) -> None:
    for name in ("base", "other"):
        write_base(tmp_path / name, SHAPES)
    for name, seed in (("one", 1), ("copy", 1), ("two", 2)):
        write_adapter(tmp_path / name, adapters.linear(SHAPES, seed=seed))
    places = [f"{tmp_path}/{each}" for each in ("base+{}/one", "base+{}/copy", "base+{}/two", "other+{}/one")]
    models = [{"model": each.format(tmp_path), "parameters": {"weight": 1.0}} for each in places]

    plan = stockflow.plan({"merge_method": "linear", "models": models}, tmp_path / "out").plan

    said = [each for each in plan.remarks if each.code == "same-samples" and "the same factors" in each.text]
    assert [each.models for each in said] == [tuple(f"{tmp_path}/base + {tmp_path}/{name}" for name in ("one", "copy"))]


@pytest.mark.parametrize("form", ["plain factors", "modules saved whole"])
def test_factors_that_were_drawn_apart_are_no_strangers(form: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    for name, scale in (("a", 1.0), ("b", -1.0)):
        adapter = FORMS[form][0](SHAPES)
        write_adapter(tmp_path / name, replace(adapter, tensors={k: scale * v for k, v in adapter.tensors.items()}))
    models = [{"model": f"{tmp_path}/base+{tmp_path}/{name}", "parameters": {"weight": 1.0}} for name in "ab"]

    planned = stockflow.plan({"merge_method": "linear", "models": models}, tmp_path / "out")

    assert isinstance(planned, PlanResult)
    assert [remark.text for remark in planned.plan.remarks if remark.severity != "note"] == []


@pytest.mark.parametrize("alone", [True, False])
def test_no_secret_in_the_name_of_a_base_is_shown(alone: bool, tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    secret = "https://me:hunter2@127.0.0.1:9/llama?X-Amz-Signature=abcdef99"
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES), base_model_name_or_path=secret)

    if alone:
        shown = refusal(tmp_path, f"{tmp_path}/lora", NotFoundError)
    else:
        merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")
        shown = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".md", ".json"))

    assert "127.0.0.1:9/llama" in shown
    assert not any(word in shown for word in ("hunter2", "abcdef99"))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"weight": (torch.uint8, (1152, 1)), "weight.absmax": (torch.float32, (36,))}, "bitsandbytes (NF4)"),
        (
            {"qweight": (torch.int32, (6, 48)), "scales": (torch.float16, (1, 48)), "g_idx": (torch.int32, (48,))},
            "GPTQ",
        ),
    ],
)
def test_codes_that_are_not_read_take_no_adapter(
    codes: dict[str, tuple[torch.dtype, tuple[int, ...]]], expected: str, tmp_path: Path
) -> None:
    module = "model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.{name}": torch.ones(shape, dtype=dtype) for name, (dtype, shape) in codes.items()}
    write_checkpoint(tmp_path / "base", tensors | {"model.norm.weight": torch.ones(48)}, config=CONFIG)
    write_adapter(tmp_path / "lora", adapters.linear({f"{module}.weight": (48, 48)}))

    assert f"holds {expected} weights, such as '{module}." in refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")


@pytest.mark.parametrize("name", ["default", "sft"])
def test_keys_may_bear_the_name_of_one_adapter(name: str, tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", SHAPES), adapters.linear(SHAPES)
    plain = dict(adapter.tensors)
    adapter.tensors = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in plain.items()}
    write_adapter(tmp_path / "lora", adapter)

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert all(share_correct(found[name], values) >= LEAST_CORRECT for name, values in adapter.of(base).items())
    adapter.tensors |= {key: tensor.clone() for key, tensor in plain.items()}
    write_adapter(tmp_path / "lora", adapter)
    with pytest.raises(CheckpointError, match="are two of one tensor; remove one"):
        merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("org/Llama-3-8B", "hf://org/Llama-3-8B@main", "one"),
        ("org/Llama-3-8B", "/mnt/a/llama-3-8b", "one"),
        ("/mnt/a/Llama-3-8B/", "/mnt/a/Llama-3-8B", "one"),
        ("mirror/Llama-3-8B", "org/Llama-3-8B", "one"),
        ("org/Qwen3", f"/hub/models--org--Qwen3/snapshots/{'a1' * 20}", "one"),
        ("https://huggingface.co/org/Qwen3", "org/Qwen3", "one"),
        (r"C:\models\Qwen3", "org/Qwen3", "one"),
        ("org/final", "org/final", "one"),
        ("/mnt/a/Llama-3-8B", "/home/b/Llama-3-8B", "alike"),
        ("/mnt/a/Llama-3-8B", "s3://models/Llama-3-8B", "alike"),
        ("/mnt/a/opt-125m", "/mnt/b/opt-125m", "alike"),
        ("/data/alice/llama-sft/checkpoint-500", "/data/bob/mistral-sft/checkpoint-500", "apart"),
        ("alice/final", "bob/final", "apart"),
        *((f"/a/{name}", f"/b/{name}", "apart") for name in ("final", "merged", "output", "model", "base", "last")),
        *((f"/a/{name}", f"/b/{name}", "apart") for name in ("best_model", "epoch3", "global_step1000", "v2", "1")),
        ("org/base", "/a/base", "apart"),
        ("org/one", "org/another", "apart"),
    ],
)
def test_bases_are_one_by_their_place_or_by_a_name_that_tells(one: str, other: str, expected: str) -> None:
    assert likeness(one, other) == likeness(other, one) == expected


def test_a_base_behind_a_link_is_the_one_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "final")

    assert likeness(f"{tmp_path}/linked", f"{tmp_path}/final") == "one"


def test_a_relative_base_is_the_folder_that_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    assert likeness("./Base", f"{tmp_path}/here/Base") == "one"
    assert likeness("../final", f"{tmp_path}/final") == "one"
    assert likeness("./Base", f"{tmp_path}/Base") == "apart"


@pytest.mark.parametrize(
    ("named", "is_said"),
    [
        ("org/Qwen3@main", False),
        ("org/another", True),
        (None, False),
        ("./base", False),
        ("runs/base", False),
        ("./other/base", True),
    ],
)
def test_an_adapter_that_names_another_model_than_the_one_it_is_put_on_is_said(
    named: str | None, is_said: bool, tmp_path: Path
) -> None:
    base, lora = tmp_path / "runs" / ("base" if named and "base" in named else "qwen3"), tmp_path / "runs/lora"
    write_base(base, SHAPES)
    write_adapter(lora, adapters.linear(SHAPES), base_model_name_or_path=named)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{lora}"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    (opened,) = Inputs.open(load_recipe(str(tmp_path / "recipe.yaml"))).checkpoints

    assert ("adapter-elsewhere" in {each.code for each in opened.remarks}) is is_said


def refusal(root: Path, model: str, error: type[UserError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        merged(root, model)
    assert not (root / "out" / "manifest.json").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"peft_type": "LOKR"}, "an adapter of the type 'LOKR'"),
        ({"peft_type": None}, "it has no `peft_type`: no adapter of PEFT"),
        ({"peft_type": None, "fine_tune_type": "lora"}, "Merge it with mlx_lm.fuse first"),
        ({"init_lora_weights": "pissa"}, "it began as 'pissa', which changes the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "it began as 'pissa_niter_16', which changes the base"),
        ({"init_lora_weights": "olora"}, "it began as 'olora', which changes the base"),
        ({"init_lora_weights": "loftq"}, "it began as 'loftq', which changes the base"),
        ({"init_lora_weights": "corda"}, "it began as 'corda', which changes the base"),
        ({"init_lora_weights": "lora_ga"}, "it began as 'lora_ga', which changes the base"),
        ({"init_lora_weights": "newest"}, "it began as 'newest' (`init_lora_weights`), which is not known here"),
        ({"use_qalora": True}, "it asks for QALoRA (`use_qalora`)"),
        ({"use_bdlora": {"nblocks": 2}}, "it asks for BD-LoRA (`use_bdlora`)"),
        ({"alora_invocation_tokens": [1]}, "an activated LoRA (aLoRA) (`alora_invocation_tokens`)"),
        ({"arrow_config": {"top_k": 3}}, "it asks for Arrow's routing (`arrow_config`)"),
        ({"kasa_config": {"beta": 1}}, "it asks for KaSA (`kasa_config`)"),
        ({"layer_replication": [[0, 2]]}, "it asks for layers that are replicated (`layer_replication`)"),
        ({"use_new_thing": True}, "it has the key 'use_new_thing', which is not known here"),
        ({"r": 0}, "`r`: expected a positive integer, found 0"),
        ({"r": True}, "`r`: expected a positive integer, found True"),
        ({"lora_alpha": "8"}, "`lora_alpha`: expected a finite number, found '8'"),
        ({"lora_alpha": None}, "it has no `lora_alpha`, which PEFT writes"),
        ({"use_dora": True}, "the config says `use_dora`, and no tensor is a `lora_magnitude_vector`"),
        (
            {"modules_to_save": ["embed_tokens"]},
            "'embed_tokens' is saved whole (`modules_to_save`), and no tensor is of",
        ),
        ({"rank_pattern": {"(": 3}}, "`rank_pattern`: expected regular expressions that neither look around nor back"),
        ({"alpha_pattern": {"(?!q)k_proj": 3}}, "invalid perl operator: (?!"),
        ({"alpha_pattern": {str(n): 1 for n in range(10_001)}}, "`alpha_pattern`: expected at most 10,000 patterns"),
        ({"rank_pattern": [3]}, "`rank_pattern`: expected numbers by pattern"),
        ({"use_rslora": "yes"}, "`use_rslora`: expected true or false"),
        ({"trainable_token_indices": {"embed_tokens": "x"}}, "expected ids of tokens"),
        ({"r": 6}, "have the rank 5, and adapter_config.json says 6"),
    ],
)
def test_what_is_not_read_is_refused_by_name(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES), **said)

    assert expected in refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")


def test_lengths_that_the_config_does_not_speak_of_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapters.with_lengths(SHAPES), use_dora=False)

    assert "the config does not say `use_dora`, and some tensors" in refusal(
        tmp_path, f"{tmp_path}/base+{tmp_path}/lora"
    )


def remarks(root: Path) -> dict[str, str]:
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{root}/base+{root}/lora"}]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (opened,) = Inputs.open(load_recipe(str(root / "recipe.yaml"))).checkpoints
    return {each.code: str(each) for each in opened.remarks}


def test_modules_that_were_trained_are_there_or_missed(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES, ["q_proj"]), target_modules=["q_proj"])
    assert "adapter-part" not in remarks(tmp_path)

    write_adapter(tmp_path / "lora", adapters.linear(SHAPES, ["q_proj"]), target_modules=["q_proj", "down_proj"])
    num = sum(name.endswith("q_proj.weight") for name in SHAPES)
    expected = (
        f"says that {2 * num} weights of {tmp_path}/base were trained (its `target_modules`, or other experts), "
        f"and has nothing for {num}"
    )
    assert expected in remarks(tmp_path)["adapter-part"]

    narrowed = {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["down_proj"]}
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES, ["q_proj"]), **narrowed)
    assert "adapter-part" not in remarks(tmp_path)


@pytest.mark.parametrize("file", ["non_lora_trainables.bin", "new_embeddings.safetensors"])
def test_weights_beside_an_adapter_that_were_trained_with_it_are_refused_until_accepted(
    file: str, tmp_path: Path
) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES, ["q_proj"]), target_modules=["q_proj"])
    (tmp_path / "lora" / file).write_bytes(b"PK")

    assert (
        "has weights that were trained with it (LLaVA's projector, rows of new tokens)"
        in remarks(tmp_path)["adapter-part"]
    )


def test_experts_are_not_missed_among_the_modules_that_were_trained(tmp_path: Path) -> None:
    own = {f"{EXPERTS}.{e}.{name}.weight": (17, 21) for e in range(3) for name in ("gate_proj", "up_proj")}
    own |= {f"{EXPERTS}.{e}.down_proj.weight": (21, 17) for e in range(3)}
    write_base(tmp_path / "base", SHAPES | own)
    adapter = adapters.of_experts(EXPERTS, FUSED, list(FUSED))
    layers = adapters.linear(SHAPES)
    both = replace(adapter, tensors={**adapter.tensors, **layers.tensors})
    write_adapter(tmp_path / "lora", both, target_modules=list(adapters.PROJECTIONS))
    assert "adapter-part" not in remarks(tmp_path)

    write_adapter(tmp_path / "lora", layers, target_modules=list(adapters.PROJECTIONS))
    assert "adapter-part" not in remarks(tmp_path)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("said", [list(adapters.PROJECTIONS), "all-linear"])
def test_experts_that_have_nothing_beside_others_are_missed(said: Any, is_fused: bool, tmp_path: Path) -> None:
    own = {f"{EXPERTS}.{e}.{name}.weight": (17, 21) for e in range(3) for name in ("gate_proj", "up_proj")}
    own |= {f"{EXPERTS}.{e}.down_proj.weight": (21, 17) for e in range(3)}
    write_base(tmp_path / "base", SHAPES | (MOE if is_fused else own))
    whole = adapters.linear({**own, **SHAPES})
    write_adapter(tmp_path / "lora", whole, target_modules=said)
    assert "adapter-part" not in remarks(tmp_path)

    lost, part = f"{EXPERTS}.1.up_proj", without(without(whole, ".1.up_proj.lora_A.weight"), ".1.up_proj.lora_B.weight")
    write_adapter(tmp_path / "lora", part, target_modules=said)
    assert f"has nothing for 1 of them, such as '{lost}.weight'" in remarks(tmp_path)["adapter-part"]


@pytest.mark.parametrize("said", ["all", "lora_only"])
def test_biases_that_were_trained_are_there_or_missed(said: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES | BIASES)
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES), bias=said)
    assert f"biases were trained (`bias: {said}`), as 'model.layers.0." in refusal(
        tmp_path, f"{tmp_path}/base+{tmp_path}/lora"
    )
    write_base(tmp_path / "base", SHAPES)

    assert "neither it nor" in remarks(tmp_path)["adapter-biases"]


@pytest.mark.parametrize(
    ("task", "head", "of_class", "expected"),
    [
        ("SEQ_CLS", "score", "LlamaForCausalLM", "loaded as that, the output is without 'score.weight' [3, 48]"),
        ("TOKEN_CLS", "classifier", "LlamaForCausalLM", "the output is without 'classifier.weight' [3, 48]"),
        ("QUESTION_ANS", "qa_outputs", "LlamaForCausalLM", "the output is without 'qa_outputs.weight' [3, 48]"),
        ("CAUSAL_LM", "v_head.summary", "LlamaForCausalLM", "is without 'v_head.summary.weight' [3, 48]"),
        (None, "score", "LlamaForCausalLM", "does not say for which task it was trained, and "),
        ("SEQ_CLS", "score", None, "names no class: loaded by its type alone, the output is without 'score.weight'"),
        ("SEQ_CLS", None, "LlamaForCausalLM", "the head that was trained is not there"),
        ("SEQ_CLS", "score", "LlamaForSequenceClassification", None),
        ("SEQ_CLS", None, "LlamaForSequenceClassification", None),
        ("CAUSAL_LM", None, "LlamaForCausalLM", None),
        ("CAUSAL_LM", "lm_head", "LlamaForCausalLM", None),
    ],
)
def test_an_adapter_for_a_class_with_another_head_is_refused_until_accepted(
    task: str | None, head: str | None, of_class: str | None, expected: str | None, tmp_path: Path
) -> None:
    write_base(tmp_path / "base", TIED, architectures=[of_class] if of_class else None, tie_word_embeddings=True)
    adapter = adapters.linear(TIED, ["q_proj"], task_type=task, modules_to_save=[head] if head else None)
    if head:
        adapter.draw(
            f"{head}.weight", SHAPES["lm_head.weight"] if head == "lm_head" else (3, 48), np.random.default_rng(1)
        )
    write_adapter(tmp_path / "lora", adapter)
    model = f"{tmp_path}/base+{tmp_path}/lora"

    if expected:
        assert expected in refusal(tmp_path, model, UserError)
    accepted = {"stockflow": {"accept": ["adapter-task"]}} if expected else {}
    found = merged(tmp_path, model, **accepted)

    assert (
        not head
        or share_correct(found[f"{head}.weight"], adapter.tensors[f"{adapters.PREFIX}{head}.weight"].numpy()) == 1
    )


def test_a_head_of_more_labels_than_the_base_names_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES | {"score.weight": (2, 48)}, architectures=["LlamaForSequenceClassification"])
    adapter = Adapter(config={"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    adapter.draw("score.weight", (3, 48), np.random.default_rng(1))
    write_adapter(tmp_path / "lora", adapter)

    assert "'base_model.model.score.weight' is [3, 48], expected [2, 48] for 'score.weight'" in refusal(
        tmp_path, f"{tmp_path}/base+{tmp_path}/lora"
    )


def test_what_lies_beside_an_adapter_is_said_unless_it_is_the_base_s(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    folder = write_adapter(tmp_path / "lora", adapters.linear(SHAPES))
    assert not remarks(tmp_path).keys() & {"left-out", "adapter-tokenizer"}
    for path in (tmp_path / "base").glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("# mine")
    assert not remarks(tmp_path).keys() & {"left-out", "adapter-tokenizer"}

    own = token_files.tokenizer_json([f"mine {number}" for number in range(SHAPES["model.embed_tokens.weight"][0])])
    (folder / "tokenizer.json").write_text(own)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_bytes(b"state")

    said = remarks(tmp_path)
    assert "1 file of training" in said["left-out"]
    assert said["adapter-tokenizer"].startswith("'chat_template.jinja', 'tokenizer.json' of ")
    merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == own
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "'chat_template.jinja' of" in remarks(tmp_path)["not-taken"]


def test_patterns_that_others_go_back_in_for_years_take_no_time(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES)
    adapter = adapters.linear(SHAPES)
    hostile = {r"((\w|\.)+)+!": 7, r"(.*)*(.*)*(.*)*(.*)*x": 9, r"(a|aa|l|.|..)+$!": 3}
    write_adapter(tmp_path / "lora", adapter, rank_pattern=hostile, alpha_pattern=hostile, target_modules="((.+)+)+!")

    found = merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    for name, values in adapter.of(base).items():
        assert share_correct(found[name], values) >= LEAST_CORRECT


def without(adapter: Adapter, end: str) -> Adapter:
    return replace(adapter, tensors={key: t for key, t in adapter.tensors.items() if not key.endswith(end)})


def test_every_tensor_of_an_adapter_has_a_place_or_is_named(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    adapter = adapters.linear(SHAPES)
    for number, key in enumerate(("model.layers.9.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.strange", "extra")):
        adapter.draw(key, (5, 48 + number), np.random.default_rng(0))
    write_adapter(tmp_path / "lora", without(adapter, "layers.0.mlp.up_proj.lora_B.weight"))

    said = refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert f"4 tensors of {len(adapter.tensors) - 1} have no place in {tmp_path}/base: " in said
    for key in ("layers.9.mlp.up_proj.lora_A.weight", "layers.0.mlp.up_proj.lora_A.weight", "strange", "extra"):
        assert key in said


def test_factors_that_do_not_fit_their_weight_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    wide = {name: (shape[0], shape[1] + 1) for name, shape in SHAPES.items() if "up_proj" in name}
    write_adapter(tmp_path / "lora", adapters.linear(wide))

    said = refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert (
        "lora_A.weight' [5, 49] and 'base_model.model.model.layers.0.mlp.up_proj.lora_B.weight' [80, 5] make no" in said
    )
    assert "change of 'model.layers.0.mlp.up_proj.weight' [80, 48]" in said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"peft_version": None}, "is not said; trainers differ there with equal shapes"),
        ({"auto_mapping": {"unsloth_fixed": True}}, "is that of 'unsloth'; trainers differ"),
    ],
)
def test_factors_of_experts_in_a_layout_that_is_not_said_are_refused(
    said: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write_base(tmp_path / "base", SHAPES | MOE)
    adapter = adapters.of_experts(EXPERTS, FUSED, list(FUSED))
    write_adapter(tmp_path / "lora", adapter, **said)

    assert expected in refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")
    write_adapter(tmp_path / "lora", adapter, **said, moe_lora_layout="peft")
    assert merged(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"), "kohya's sd-scripts such as 'lora_unet_x."),
        (("unet.x.lora.down.weight", "unet.x.lora.up.weight"), "(diffusers: `load_lora_weights(FILE)`, `fuse_lora()`"),
        (("lora_unet_x.lokr_w1", "lora_unet_x.lokr_w2"), "(LyCORIS: `tools/merge.py BASE FILE OUTPUT`), and name the"),
        (("q.lora_A.weight", "q.lora_B.weight"), "adapter_config.json, which says their scale, is not there: fetch it"),
    ],
)
@pytest.mark.parametrize("named", ["", "/x.safetensors"])
def test_an_adapter_of_another_format_is_named_with_what_merges_it(
    tmp_path: Path, names: tuple[str, str], expected: str, named: str
) -> None:
    write_base(tmp_path / "base", SHAPES)
    (tmp_path / "lora").mkdir()
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "lora" / "x.safetensors")

    said = refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora{named}")

    assert f"{tmp_path}/lora/x.safetensors holds 2 factors of adapters of " in said
    assert expected in said


def test_an_adapter_of_mlx_is_named_with_what_merges_it(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    (tmp_path / "lora").mkdir()
    save_file({"q.lora_a": torch.ones(2, 2), "q.lora_b": torch.ones(2, 2)}, tmp_path / "lora" / "adapters.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}')

    assert "Merge it with mlx_lm.fuse first" in refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")


def test_places_without_an_adapter_say_what_is_there(tmp_path: Path) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES))
    (tmp_path / "empty").mkdir()
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    assert "there is no adapter at" in refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/empty", NotFoundError)
    write_adapter(tmp_path / "empty" / "checkpoint-9", Adapter())
    model = f"{tmp_path}/base+{tmp_path}/empty"
    assert "or the folder below it that has one ('checkpoint-9')" in refusal(tmp_path, model, NotFoundError)
    assert "has no tensors: it was saved without" in refusal(tmp_path, f"{model}/checkpoint-9")
    assert "and no adapter_model.safetensors; fetch it" in refusal(
        tmp_path, f"{tmp_path}/base+{tmp_path}/hollow", NotFoundError
    )
    said = refusal(tmp_path, str(tmp_path / "lora"))
    assert said == (
        f"the adapter at {tmp_path}/lora does not say what its base is; name both: `model: BASE+{tmp_path}/lora`"
    )
    write_adapter(tmp_path / "lora", adapters.linear(SHAPES), base_model_name_or_path="/data/of/another/machine")
    assert "/data/of/another/machine" in refusal(tmp_path, str(tmp_path / "lora"), NotFoundError)


def drawn_with(key: str, tensor: torch.Tensor) -> Adapter:
    adapter = adapters.linear(SHAPES)
    adapter.tensors[f"{adapters.PREFIX}{key}"] = tensor
    return adapter


@pytest.mark.parametrize(
    ("key", "tensor", "expected"),
    [
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(5, 48, dtype=torch.int8), "is of I8, expected plain"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(240), "make no change of"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(()), "make no change of"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(0, 48), "make no change of"),
        ("model.layers.0.mlp.up_proj.lora_A.default.weight", torch.ones(5, 48), "are two of one tensor; remove one"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", torch.ones(3), "scales the columns of"),
        ("layers.0.mlp.up_proj.weight", torch.ones(80, 48), "are both 'model.layers.0.mlp.up_proj.weight' in"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(1, 48), "expected [0, 48] for"),
    ],
)
def test_tensors_that_make_no_sense_are_told_in_a_sentence(
    key: str, tensor: torch.Tensor, expected: str, tmp_path: Path
) -> None:
    write_base(tmp_path / "base", SHAPES)
    write_adapter(tmp_path / "lora", drawn_with(key, tensor))

    said = refusal(tmp_path, f"{tmp_path}/base+{tmp_path}/lora")

    assert expected in said
    assert "\n" not in said


def test_exactly_as_many_elements_are_kept_as_asked_for(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES)
    models = [
        {"model": f"{tmp_path}/base+{write_adapter(tmp_path / f'lora{seed}', adapters.linear(SHAPES, seed=seed))}"}
        for seed in range(3)
    ]
    given = {"base_model": f"{tmp_path}/base", "parameters": {"select_topk": 0.3}}

    found = merged(tmp_path, "", merge_method="sce", models=models, **given)

    for name in adapters.linear(SHAPES).changes:
        num_changed = int((found[name].array.reshape(base[name].shape) != base[name]).sum())
        assert num_changed == int(0.3 * base[name].size), name
    # A plan without this word ranks in float32, which gives other bytes.
    assert '"ranked": "as decoded"' in next((tmp_path / "out").glob("_stockflow/*/plan.json")).read_text()
    assert stockflow.verify(str(tmp_path / "out"), sample="100%").findings == ()
