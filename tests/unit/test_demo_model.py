"""The demo's model is a Llama as transformers understands it, and its checkpoints are real ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stockflow.demo import corpus
from stockflow.demo.checkpoints import INDEX, load_model, save_model
from stockflow.demo.language_model import LanguageModel, ModelConfig, initialize
from stockflow.demo.training import Schedule, fixed_threads, train

TINY = ModelConfig(
    vocab_size=corpus.VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MAX_SHARD_BYTES = 20_000


def tiny_model(seed: int = 0) -> LanguageModel:
    model = LanguageModel(TINY)
    initialize(model, seed)
    # Norms at one would hide a norm applied in the wrong place.
    with torch.no_grad():
        for index, (name, weight) in enumerate(model.named_parameters()):
            if "norm" in name:
                weight.copy_(torch.linspace(0.5, 1.5 + 0.1 * index, len(weight)))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path, dtype=torch.float32, max_shard_bytes=MAX_SHARD_BYTES)
    return tmp_path


@pytest.mark.slow  # transformers takes seconds to import
def test_logits_equal_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens_BT = torch.randint(TINY.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        expected_BTV = reference(tokens_BT).logits
        logits_BTV = tiny_model()(tokens_BT)

    assert type(reference).__name__ == "LlamaForCausalLM"
    assert list(reference.state_dict()) == list(tiny_model().state_dict())
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


def test_tokens_are_those_of_the_tokenizer_in_the_folder(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def é():\n    return 1\n"

    expected = [byte + corpus.FIRST_BYTE for byte in text.encode()] + [corpus.END_OF_FILE]

    assert expected == tokenizer(text).input_ids
    assert len(tokenizer) == corpus.VOCAB_SIZE


def test_a_model_saved_in_shards_loads_bit_for_bit(folder: Path) -> None:
    expected = tiny_model().state_dict()

    loaded = load_model(folder).state_dict()

    assert list(expected) == list(loaded)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_the_index_names_the_shard_of_every_tensor(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            stored.update(dict.fromkeys(shard.keys(), path.name))

    assert stored == weight_map
    assert set(tiny_model().state_dict()) == set(stored)
    assert len(set(stored.values())) > 2


def test_a_single_file_loads_as_well(tmp_path: Path) -> None:
    """The merged checkpoint may be one file without an index."""
    save_model(tiny_model(), tmp_path, dtype=torch.bfloat16, max_shard_bytes=MAX_SHARD_BYTES)
    for path in [*tmp_path.glob("*.safetensors"), tmp_path / INDEX]:
        path.unlink()
    weights = {name: weight.bfloat16() for name, weight in tiny_model().state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = load_model(tmp_path).state_dict()

    assert all(torch.equal(weights[name].float(), loaded[name]) for name in weights)


@pytest.mark.slow
def test_training_twice_gives_the_same_weights() -> None:
    def trained() -> LanguageModel:
        model = tiny_model()
        train(model, corpus.tuning_text("formats"), Schedule(5, 1e-3, seed=7), lambda _: None)
        return model

    with fixed_threads():
        expected, again = trained().state_dict(), trained().state_dict()

    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert not torch.equal(again["lm_head.weight"], tiny_model().state_dict()["lm_head.weight"])


@pytest.mark.parametrize("theme", corpus.THEMES)
def test_no_training_text_contains_a_held_out_file(theme: str) -> None:
    """Otherwise the printed losses would be those of memory."""
    held_out = set(corpus._sources(theme)[:: corpus._HELD_OUT_EVERY])
    read = {source for other in corpus.THEMES for source in corpus._sources(other)} - held_out

    assert held_out
    assert held_out.isdisjoint(read | set(corpus._library().glob("*.py")))
    assert len(corpus.held_out_text(theme)) < len(corpus.tuning_text(theme)) / 3
