"""Models to and from folders in the Hugging Face layout, written with the safetensors library itself."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stockflow.demo import corpus
from stockflow.demo.language_model import LanguageModel, ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def save_model(model: LanguageModel, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write a model as shards with an index, its config and tokenizer files beside them.

    Args:
        model: the model; its weights are rounded to ``dtype``.
        folder: created where it does not exist.
        dtype: the type of every stored tensor.
        max_shard_bytes: weights per file; a larger tensor gets a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(dtype) for name, weight in model.state_dict().items()}
    shards = _split(weights, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total_bytes = sum(weight.nbytes for weight in weights.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    _write_json(folder / "config.json", _llama_config(model.config, dtype))
    _write_json(folder / "generation_config.json", {"eos_token_id": corpus.END_OF_FILE, "pad_token_id": 0})
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0})


def load_model(folder: Path) -> LanguageModel:
    """Return the float32 model in a folder, whether it is a single file or sharded."""
    config = json.loads((folder / "config.json").read_text())
    model = LanguageModel(ModelConfig(**{field.name: config[field.name] for field in fields(ModelConfig)}))
    weights: dict[str, Tensor] = {}
    for file_name in _weight_files(folder):
        weights |= load_file(folder / file_name)
    model.load_state_dict(weights)
    return model


def _split(weights: dict[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = []
    free_bytes = 0
    for name, weight in weights.items():
        if not shards or weight.nbytes > free_bytes:
            shards.append({})
            free_bytes = max_shard_bytes
        shards[-1][name] = weight
        free_bytes -= weight.nbytes
    return shards


def _weight_files(folder: Path) -> list[str]:
    if not (folder / INDEX).exists():
        return [SINGLE]
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return sorted(set(weight_map.values()))


def _llama_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": corpus.END_OF_FILE,
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
