"""Models for sentence embeddings on disk, in the layout of sentence-transformers: a chain of modules in folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import LLAMA_CONFIG, Family, Shape, make_family, make_tensors

POOLING = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
DENSE = {"in_features": 24, "out_features": 10, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
TYPES = {"1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
SHAPES: dict[str, Shape] = {"embeddings.word_embeddings.weight": (50, 24), "pooler.dense.weight": (24, 24)}
DENSE_SHAPES: dict[str, Shape] = {"linear.weight": (10, 24), "linear.bias": (10,)}


def make_sentence_family(folder: Path, num_tuned: int = 2, **drawn: Any) -> Family:
    """Write a base and models tuned from it, as ``make_family`` does, each with pooling and a dense layer."""
    drawn = {"config": LLAMA_CONFIG | {"tie_word_embeddings": True}} | drawn
    family = make_family(folder, num_tuned, SHAPES, buffers=False, **drawn)
    for number, model in enumerate((family.base, *family.tuned)):
        dense = {name: make_tensors(f"dense.{name}", shape, num_tuned)[number] for name, shape in DENSE_SHAPES.items()}
        add_modules(model, {name: tensor.to(torch.float32) for name, tensor in dense.items()})
    return family


def add_modules(model: Path, dense: dict[str, torch.Tensor]) -> None:
    """Put the modules beside a checkpoint."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (path, name) in enumerate(TYPES.items(), start=1):
        entries.append(
            {"idx": number, "name": f"{number}", "path": path, "type": f"sentence_transformers.models.{name}"}
        )
    (model / "modules.json").write_text(json.dumps(entries, indent=2))
    (model / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {}, "similarity_fn_name": "cosine"})
    )
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    for path, config in (("1_Pooling", POOLING), ("2_Dense", DENSE)):
        (model / path).mkdir()
        (model / path / "config.json").write_text(json.dumps(config))
    save_file(dense, model / "2_Dense" / "model.safetensors")
