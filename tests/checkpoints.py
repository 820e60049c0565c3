"""Real checkpoints on disk, in the Hugging Face layout, written by the safetensors library."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

Shape = tuple[int, ...]

ZOO: dict[str, Shape] = {
    "model.embed_tokens.weight": (129, 1025),
    "model.layers.0.input_layernorm.weight": (1023,),
    "model.layers.0.mlp.down_proj.weight": (3, 1023),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 33, 65),
    "model.layers.0.self_attn.q_proj.weight": (65, 64),
    "model.layers.1.input_layernorm.weight": (1024,),
    "model.layers.1.mlp.down_proj.weight": (1024, 3),
    "model.layers.1.post_attention_layernorm.weight": (1025,),
    "odd.column": (1025, 1),
    "odd.conv": (5, 3, 7, 7),
    "odd.empty": (0,),
    "odd.empty_columns": (3, 0),
    "odd.empty_rows": (0, 7),
    "odd.just_over_2_17": (131073,),
    "odd.just_under_2_17": (131071,),
    "odd.one": (1,),
    "odd.one_long_row": (1, 131073),
    "odd.scalar": (),
}
"""Float tensors at the edges: of a Gram block (1,024), of 2**17, of what a shape can be. 0.7 M elements."""

BUFFERS: dict[str, torch.Tensor] = {
    "model.causal_mask": torch.tril(torch.ones(9, 9, dtype=torch.bool)),
    "model.position_ids": torch.arange(77).reshape(1, 77),
    "odd.steps": torch.tensor(12345),
}
"""Tensors that are not merged, equal in every checkpoint."""

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

SIDE_FILES: dict[str, str] = {
    "tokenizer.json": json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "stock": 1}},
        }
    ),
    "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}),
    "generation_config.json": json.dumps({"_from_model_config": True}),
}  # fmt: skip


def llama_shapes(config: Mapping[str, Any] = LLAMA_CONFIG) -> dict[str, Shape]:
    """Return the tensors that transformers expects of a Llama model with this config."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{part}.weight": shape
            for part, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    num_shards: int = 1,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    side_files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        folder: created if it does not exist.
        tensors: by name; they need not be contiguous.
        num_shards: 1 gives ``model.safetensors``, more give shards and an index; every shard gets a tensor.
        seed: decides which tensor lies in which shard.
        config: ``config.json``; a small Llama's with the dtype of the first float tensor if None.
        side_files: text by file name; those of a small tokenizer if None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(folder, stored, _dealt(sorted(stored), num_shards, seed))
    if config is None:
        dtypes = [tensor.dtype for tensor in stored.values() if tensor.is_floating_point()]
        dtype = str(dtypes[0] if dtypes else torch.float32).removeprefix("torch.")
        config = LLAMA_CONFIG | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, text in (SIDE_FILES if side_files is None else side_files).items():
        (folder / name).write_text(text)
    return folder


def _dealt(names: Sequence[str], num_shards: int, seed: int) -> list[list[str]]:
    if not 1 <= num_shards <= len(names):
        raise ValueError(f"{len(names)} tensors cannot fill {num_shards} shards")
    shuffled = np.random.default_rng(seed).permutation(np.array(names, dtype=object))
    return [sorted(shuffled[shard::num_shards]) for shard in range(num_shards)]


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: Sequence[Sequence[str]]) -> None:
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Family:
    """A base and the models tuned from it, as folders."""

    base: Path
    tuned: tuple[Path, ...]


def make_tensors(
    name: str,
    shape: Shape,
    num_tuned: int,
    *,
    delta_scale: float = 1e-3,
    base_scale: float = 0.02,
    cosine: float = 0.5,
    heavy_tailed: bool = False,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return base and tuned tensors in float64; the same for the same name, shape and arguments.

    Task vectors are ``delta_scale`` times a common direction and noise of their own, mixed so that all
    pairwise cosines are about ``cosine``, from -1 / (N - 1) to 1. ``base_scale`` 0 leaves them
    exact at any scale. Heavy-tailed elements follow Student's t with three degrees of freedom.
    """
    if not (num_tuned == 1 or -1.0 / (num_tuned - 1) <= cosine <= 1.0):
        raise ValueError(f"{num_tuned} vectors cannot have pairwise cosines of {cosine}")
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def draw() -> np.ndarray[Any, np.dtype[np.float64]]:
        drawn = random.standard_t(3, size=shape) if heavy_tailed else random.standard_normal(size=shape)
        return np.asarray(drawn, dtype=np.float64)

    base = base_scale * draw()
    noise = [draw() for _ in range(num_tuned)]
    # The symmetric square root of the N x N matrix with 1 on the diagonal and the cosine elsewhere.
    own = (1.0 - cosine) ** 0.5 if num_tuned > 1 else 1.0
    common = (max(1.0 + (num_tuned - 1) * cosine, 0.0) ** 0.5 - own) / num_tuned if num_tuned > 1 else 0.0
    tuned = [base + delta_scale * (own * drift + common * sum(noise)) for drift in noise]
    return [torch.from_numpy(np.asarray(values)) for values in (base, *tuned)]


def make_family(
    folder: Path,
    num_tuned: int,
    shapes: Mapping[str, Shape] = ZOO,
    dtype: torch.dtype = torch.bfloat16,
    *,
    base_dtype: torch.dtype | None = None,
    num_shards: int = 1,
    buffers: bool = True,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    **drawn: Any,
) -> Family:
    """Write a base and models tuned from it, each sharded its own way, to ``base``, ``tuned-1`` ... there.

    Args:
        folder: gets a folder for each checkpoint.
        num_tuned: N.
        shapes: of the float tensors.
        dtype: of the float tensors.
        base_dtype: of the base's, where it differs.
        num_shards: of the base; unless it is 1, every next model has one more, as far as the tensors go.
        buffers: whether to add ``BUFFERS``.
        config: as for ``write_checkpoint``.
        seed: of weights and layout.
        drawn: passed on to ``make_tensors``: delta_scale, base_scale, cosine, heavy_tailed.
    """
    models: list[dict[str, torch.Tensor]] = [dict(BUFFERS) if buffers else {} for _ in range(num_tuned + 1)]
    for name, shape in shapes.items():
        for number, tensor in enumerate(make_tensors(name, shape, num_tuned, seed=seed, **drawn)):
            models[number][name] = tensor.to(base_dtype or dtype if number == 0 else dtype)
    folders = [
        write_checkpoint(
            folder / (f"tuned-{number}" if number else "base"),
            tensors,
            num_shards=1 if num_shards == 1 else min(num_shards + number, len(tensors)),
            seed=seed + number,
            config=config,
        )
        for number, tensors in enumerate(models)
    ]
    return Family(folders[0], tuple(folders[1:]))


def write_recipe(
    path: Path,
    method: str,
    family: Family,
    *,
    per_model: Mapping[str, Sequence[Any]] | None = None,
    parameters: Mapping[str, Any] | None = None,
    with_base: bool = True,
    **top_level: Any,
) -> Path:
    """Write a recipe in mergekit's words and return its path.

    Args:
        path: of the YAML file.
        method: ``merge_method``.
        family: its base is ``base_model``, its tuned models are ``models``.
        per_model: by parameter name, one value per model: ``{"weight": [0.3, 0.7]}``.
        parameters: shared ones: ``{"filter_wise": True}``.
        with_base: whether to name the base.
        top_level: any other key: ``dtype="bfloat16"``, ``stockflow={"on_negative": "extrapolate"}``.
    """
    models: list[dict[str, Any]] = [{"model": str(folder)} for folder in family.tuned]
    for name, values in (per_model or {}).items():
        for model, value in zip(models, values, strict=True):
            model.setdefault("parameters", {})[name] = value
    recipe: dict[str, Any] = {"merge_method": method}
    if with_base:
        recipe["base_model"] = str(family.base)
    recipe["models"] = models
    if parameters:
        recipe["parameters"] = dict(parameters)
    path.write_text(yaml.safe_dump(recipe | top_level, sort_keys=False))
    return path
