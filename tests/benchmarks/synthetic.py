"""Checkpoints of any size, made fast and chunk by chunk: a base and models tuned from it, each sharded differently.

Elements come from one pool of normal noise, read from another place for every tensor and part: ``base``, or ``base +
common + own``, where the common and the own part of a task vector have equal norms (cosines are about 0.5). In a
tensor larger than the pool the noise repeats. Run as a program, it makes one family.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stockflow.checkpoints.files.header import TensorSpec, encode_header
from tests.benchmarks.cases import DTYPES, LAYOUTS, checkpoint_folders

Shapes = dict[str, tuple[int, ...]]

POOL_ELEMS = 15_485_863
"""a prime: tensors, whose sizes have many small factors, do not begin at the same few places"""
CHUNK_ELEMS = 1 << 21
BASE_SCALE = 0.02
DELTA_SCALE = 1e-3
STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

VOCABULARY = 32_000
HEAD_ELEMS = 64
MOE_HIDDEN, MOE_INNER, NUM_EXPERTS = 512, 64, 64
HUGE_COLUMNS = 4096


def main() -> None:
    """Make one family of checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--gb", type=float, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tuned", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_elems = int(arguments.gb * 1e9) // (4 if arguments.dtype == "float32" else 2)
    shapes, config = LAYOUT_MAKERS[arguments.layout](num_elems)
    noise = Noise(arguments.seed)
    for index, folder in enumerate(checkpoint_folders(arguments.folder, arguments.tuned)):
        if not folder.exists():
            write_checkpoint(folder, shapes, config | {"torch_dtype": arguments.dtype}, index, noise)


# Layouts


def dense(num_elems: int) -> tuple[Shapes, dict[str, Any]]:
    """Return a Llama of about ``num_elems`` that transformers and mergekit accept: shapes and config."""
    vocabulary = VOCABULARY if num_elems > 1_000 * VOCABULARY else VOCABULARY // 100
    widths = (128, 256, 512, 1024, 2048, 4096)
    fitting = [width for width in widths if 4 * _layer_elems(width) + 2 * vocabulary * width < num_elems]
    hidden = max(fitting, default=64)
    inner, keys = _inner(hidden), hidden // 8
    num_layers = max(1, round((num_elems - 2 * vocabulary * hidden) / _layer_elems(hidden)))
    per_layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = {
        f"model.layers.{layer}.{part}.weight": shape for layer in range(num_layers) for part, shape in per_layer.items()
    }
    ends = {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(8, hidden // HEAD_ELEMS),
        "num_key_value_heads": max(8, hidden // HEAD_ELEMS) // 8,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    return {"model.embed_tokens.weight": (vocabulary, hidden), **layers, **ends}, config


def _inner(hidden: int) -> int:
    return hidden * 11 // 4


def _layer_elems(hidden: int) -> int:
    return hidden * (2 * hidden + 2 * hidden // 8 + 3 * _inner(hidden) + 2)


def moe(num_elems: int) -> tuple[Shapes, dict[str, Any]]:
    """Return many small experts, each with as many tiny vectors as matrices: 160 tensors to 10 MB of BF16."""
    expert = {
        "gate_proj.weight": (MOE_INNER, MOE_HIDDEN),
        "gate_proj.bias": (MOE_INNER,),
        "up_proj.weight": (MOE_INNER, MOE_HIDDEN),
        "up_proj.bias": (MOE_INNER,),
        "down_proj.weight": (MOE_HIDDEN, MOE_INNER),
        "down_proj.bias": (MOE_HIDDEN,),
    }
    layer = {
        "input_layernorm.weight": (MOE_HIDDEN,),
        "self_attn.o_proj.weight": (MOE_HIDDEN, MOE_HIDDEN),
        "mlp.gate.weight": (NUM_EXPERTS, MOE_HIDDEN),
        **{f"mlp.experts.{number}.{part}": shape for number in range(NUM_EXPERTS) for part, shape in expert.items()},
    }
    num_layers = max(1, round(num_elems / sum(math.prod(shape) for shape in layer.values())))
    shapes = {f"model.layers.{index}.{part}": shape for index in range(num_layers) for part, shape in layer.items()}
    return shapes, {"model_type": "synthetic_moe"}


def huge(num_elems: int) -> tuple[Shapes, dict[str, Any]]:
    """Return one tensor that is nearly everything, and a norm."""
    rows = max(1, num_elems // HUGE_COLUMNS)
    return {"model.embed_tokens.weight": (rows, HUGE_COLUMNS), "model.norm.weight": (HUGE_COLUMNS,)}, {
        "model_type": "synthetic_huge"
    }


LAYOUT_MAKERS = {"dense": dense, "moe": moe, "huge": huge}


# Elements and files


class Noise:
    """A pool of normal numbers, read in a circle."""

    def __init__(self, seed: int) -> None:
        """Draw the pool."""
        self._seed = seed
        pool = torch.randn(POOL_ELEMS, generator=torch.Generator().manual_seed(seed))
        self._pool = torch.cat((pool, pool[:CHUNK_ELEMS]))

    def chunks(self, tensor: int, part: int, num_elems: int) -> Iterator[torch.Tensor]:
        """Yield ``num_elems`` numbers, ``CHUNK_ELEMS`` at a time; the same for the same part of a tensor."""
        start = self._seed * 1_000_003 + tensor * 7_368_787 + part * 1_299_709
        for done in range(0, num_elems, CHUNK_ELEMS):
            begin = (start + done) % POOL_ELEMS
            yield self._pool[begin : begin + min(CHUNK_ELEMS, num_elems - done)]


def write_checkpoint(folder: Path, shapes: Shapes, config: dict[str, Any], index: int, noise: Noise) -> None:
    """Write the base (``index`` 0) or the tuned model ``index``, in 2 + ``index`` shards; it appears whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    numbers = {name: number for number, name in enumerate(shapes)}
    per_shard = -(-len(shapes) // (2 + index))
    num_shards = -(-len(shapes) // per_shard)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        names = list(shapes)[shard * per_shard : (shard + 1) * per_shard]
        specs = [TensorSpec(name, STORED_AS[config["torch_dtype"]], shapes[name]) for name in names]
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        with (partial / file).open("wb") as opened:
            opened.write(encode_header(specs, {"format": "pt"}))
            for spec in specs:
                for chunk in elements(noise, numbers[spec.name], spec.num_elems, index):
                    stored = chunk.to(getattr(torch, config["torch_dtype"]))
                    opened.write(stored.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(names, file)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    partial.rename(folder)


def elements(noise: Noise, tensor: int, num_elems: int, index: int) -> Iterator[torch.Tensor]:
    """Yield the elements of one tensor of the base or a tuned model, in float32."""
    for base, common, own in zip(*(noise.chunks(tensor, part, num_elems) for part in (0, 1, 1 + index)), strict=True):
        values = base * BASE_SCALE
        yield values.add_(common, alpha=DELTA_SCALE).add_(own, alpha=DELTA_SCALE) if index else values


if __name__ == "__main__":
    main()
