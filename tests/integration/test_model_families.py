"""Small models of real architectures: how many outputs are the correctly rounded ones (docs/promises.md#exactness)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle, runs
from tests.checkpoints import Family, write_recipe

NUM_TUNED = 3
SHARE_MOVED = 0.02
"""Task vectors relative to the spread of a tensor; those of zeros and ones, as in norms, are as large as 0.02."""
LEAST_SHARE = 0.9999


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=192, n_head=4, vocab_size=2000, n_positions=128))


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    sides = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sides | {"vocab_size": 2000, "max_position_embeddings": 77}
    vision = sides | {"image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, num_labels=100, **size))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=2000, **size))


ARCHITECTURES: dict[str, Callable[[], Any]] = {"GPT-2": gpt2, "CLIP": clip, "ViT": vit, "T5": t5}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model_stock": ({}, {}),
    "model_stock by row": ({"stockflow": {"scope": "row"}}, {"scope": "row"}),
    "linear": ({"parameters": {"weight": 1.0}, "with_base": False}, {"weights": [1.0] * NUM_TUNED}),
    "task_arithmetic": ({"per_model": {"weight": [0.5153, 0.3121, 0.2333]}}, {"weights": [0.5153, 0.3121, 0.2333]}),
    "ties": (
        {"per_model": {"weight": [0.5153, 0.3121, 0.2333], "density": [0.3, 0.5, 0.7]}},
        {"weights": [0.5153, 0.3121, 0.2333], "densities": [0.3, 0.5, 0.7]},
    ),
}


def family_of(make: Callable[[], Any], folder: Path) -> Family:
    """A randomly initialised model, and models that share a part of what they learnt; all in F32."""
    torch.manual_seed(11)
    model = make()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = {name: torch.randn_like(tensor) for name, tensor in start.items() if tensor.is_floating_point()}
    folders = [folder / "base", *(folder / f"tuned-{number}" for number in range(1, NUM_TUNED + 1))]
    for number, place in enumerate(folders):
        moved = dict(start)
        for name in shared if number else ():
            spread = float(start[name].std()) if start[name].numel() > 1 else 0.0
            scale = SHARE_MOVED * (spread if spread > 0 else 1.0)
            moved[name] = start[name] + scale * (shared[name] + torch.randn_like(start[name]))
        model.load_state_dict(moved)
        model.save_pretrained(place, safe_serialization=True)
    return Family(folders[0], tuple(folders[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_almost_every_output_is_the_correctly_rounded_one(architecture: str, out: str, tmp_path: Path) -> None:
    family = family_of(ARCHITECTURES[architecture], tmp_path)
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[out]
    shares = {}
    for title, (asked, expected) in METHODS.items():
        method = title.split()[0]
        recipe = write_recipe(tmp_path / "recipe.yaml", method, family, out_dtype=out, **asked)
        runs.merge_here(recipe, tmp_path / title)
        base = None if method == "linear" else family.base
        wanted = oracle.merge_folder(method, base, family.tuned, out_dtype=dtype, **expected)
        found = oracle.load_checkpoint(tmp_path / title)
        num_elems = num_correct = 0
        for name, want in wanted.items():
            if want.dtype == dtype:
                num_elems += want.bits.size
                num_correct += int((oracle.ulp_distance(dtype, _bits(dtype, found[name]), want.bits) == 0).sum())
        shares[title] = num_correct / num_elems
    print(f"FIGURES {architecture} {out} {num_elems:,}:", {title: f"{share:.6%}" for title, share in shares.items()})
    assert min(shares.values()) >= LEAST_SHARE


def _bits(dtype: str, stored: oracle.Stored) -> np.ndarray:
    return oracle.round_to(dtype, stored.array)
