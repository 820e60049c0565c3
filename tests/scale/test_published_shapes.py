"""As many tensors as DeepSeek-V3 and Kimi-K2 have, in their formats, merged from S3 to S3 on Ray: ``make test-scale``.

Rows are tiny. ``ARGS='-s tests/scale/test_published_shapes.py'`` runs only this, and prints what it measures.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import boto3
import numpy as np
import pytest
import torch
import yaml

from tests import oracle, runs
from tests.quantised import grouped, nibbles, spread

MOST_DRIVER_BYTES = 1152 * runs.MIB
"""1 GiB is aimed at: with Kimi's tensors 1,101 MiB were measured."""
WORKER_MEMORY = "1GiB"
EXPERT = "model.layers.20.mlp.experts.100.up_proj"
MIB = runs.MIB

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1800)]


class Stored(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes


class Published(NamedTuple):
    """How a family stores its models."""

    tensors: Callable[[int], Iterator[Stored]]
    """of the model of a number"""
    num_files: int
    shard_size: str
    """for as many shards of the output"""
    config: Mapping[str, object]
    decode: Callable[[Sequence[bytes]], tuple[oracle.Floats, oracle.Floats]]
    """numbers of codes with their scales, and what a code may be beside"""
    suffixes: Sequence[str]
    """of what an expert has"""


def changed(codes: np.ndarray, model: int, drawn: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    """A tenth of the codes anew in all tunes, and a tenth in each: their task vectors are alike by half."""
    for seed in (77, 77 + model) if model else ():
        random = np.random.default_rng(seed)
        codes = np.where(random.random(codes.shape) < 0.1, drawn(random), codes)
    return codes


def bf16(values: np.ndarray) -> bytes:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().tobytes()


def around(model: int, prefix: str, num_layers: int) -> Iterator[Stored]:
    random = np.random.default_rng(model)
    for layer in range(num_layers):
        for name, shape in (("input_layernorm", (4,)), ("mlp.gate", (4, 4))):
            full = f"{prefix}model.layers.{layer}.{name}.weight"
            yield Stored(full, "BF16", shape, bf16(random.standard_normal(shape)))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield Stored(f"{prefix}{name}", "BF16", (8, 8), bf16(random.standard_normal((8, 8))))


def deepseek(model: int) -> Iterator[Stored]:
    """92,520 matrices of 132 rows, so that the second block is ragged; each block has the largest code there is."""

    def drawn(random: np.random.Generator) -> np.ndarray:
        return (random.integers(0, 0x7F, (92_520, 264)) | random.integers(0, 2, (92_520, 264)) << 7).astype(np.uint8)

    codes = changed(drawn(np.random.default_rng(1)), model, drawn)
    codes[:, 0] = codes[:, -1] = 0x7E
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(61) for name in attention]
    names += experts("", range(3, 62), 521)
    scales = np.full(2, 1e-3, "<f4").tobytes()
    yield from around(model, "", 62)
    for name, own in zip(names, codes, strict=False):
        yield Stored(f"{name}.weight", "F8_E4M3", (132, 2), own.tobytes())
        yield Stored(f"{name}.weight_scale_inv", "F32", (2, 1), scales)


def kimi(model: int) -> Iterator[Stored]:
    """69,120 projections of experts, of three tensors each."""

    def drawn(random: np.random.Generator) -> np.ndarray:
        return random.integers(1, 16, (69_120 * 4, 32))

    codes = changed(drawn(np.random.default_rng(1)), model, drawn)
    codes[:, 0] = 15
    packed = nibbles(codes, 8).reshape(69_120, -1)
    scales, shape = bf16(np.full(4, 0.01)), np.array([4, 32], "<i4").tobytes()
    yield from around(model, "language_model.", 61)
    for name, own in zip(experts("language_model.", range(1, 61), 384), packed, strict=True):
        yield Stored(f"{name}.weight_packed", "I32", (4, 4), own.tobytes())
        yield Stored(f"{name}.weight_scale", "BF16", (4, 1), scales)
        yield Stored(f"{name}.weight_shape", "I32", (2,), shape)


def experts(prefix: str, layers: range, num_experts: int) -> list[str]:
    return [
        f"{prefix}model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
        for layer in layers
        for expert in range(num_experts)
        for name in ("gate", "up", "down")
    ]


def fp8_numbers(stored: Sequence[bytes]) -> tuple[oracle.Floats, oracle.Floats]:
    codes = torch.frombuffer(bytearray(stored[0]), dtype=torch.float8_e4m3fn).view(132, 2).double().numpy()
    scales = torch.frombuffer(bytearray(stored[1]), dtype=torch.float32).view(2, 1)
    over = spread(scales, (132, 2), (128, 128)).double().numpy()
    return codes * over, np.maximum(np.abs(codes) / 16, 2.0**-10) * over


def int4_numbers(stored: Sequence[bytes]) -> tuple[oracle.Floats, oracle.Floats]:
    halves = np.frombuffer(stored[0], np.uint8).reshape(4, 16)
    codes = np.stack([halves & 15, halves >> 4], axis=-1).reshape(4, 32).astype(np.float64) - 8
    scales = torch.frombuffer(bytearray(stored[1]), dtype=torch.bfloat16).double().view(4, 1).numpy()
    over = grouped(scales, 32, 32)
    return codes * over, 0.5 * over


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
FAMILIES = {
    "deepseek": Published(
        deepseek,
        163,
        "160kB",
        {"model_type": "deepseek_v3", "quantization_config": FP8},
        fp8_numbers,
        (f"{EXPERT}.weight", f"{EXPERT}.weight_scale_inv"),
    ),
    "kimi": Published(
        kimi,
        62,
        "90kB",
        {"model_type": "kimi_k25", "text_config": {"quantization_config": INT4}},
        int4_numbers,
        [f"language_model.{EXPERT}.weight_{part}" for part in ("packed", "scale", "shape")],
    ),
}


def files_of(family: Published, model: int) -> Iterator[tuple[str, bytes]]:
    tensors, weight_map = list(family.tensors(model)), {}
    per_file = -(-len(tensors) // family.num_files)
    for number in range(family.num_files):
        file = f"model-{number + 1:05d}-of-{family.num_files:05d}.safetensors"
        part, header, end = tensors[number * per_file : (number + 1) * per_file], {}, 0
        for each in part:
            begin, end = end, end + len(each.payload)
            header[each.name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        yield file, len(text).to_bytes(8, "little") + text + b"".join(each.payload for each in part)
        weight_map |= {each.name: file for each in part}
    yield "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    yield "config.json", json.dumps(family.config).encode()


def tensors_of(body: bytes, names: Sequence[str]) -> list[bytes]:
    """The bytes of those tensors that a file has."""
    begin = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(body[8:begin])
    places = [header[name]["data_offsets"] for name in names if name in header]
    return [body[begin + start : begin + stop] for start, stop in places]


@pytest.mark.parametrize("name", FAMILIES)
def test_from_s3_to_s3_on_ray(name: str, tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    family, s3 = FAMILIES[name], boto3.client("s3", endpoint_url=s3_endpoint)
    sources = []
    for model in range(3):
        for key, body in files_of(family, model):
            s3.put_object(Bucket=s3_bucket, Key=f"{model}/{key}", Body=body)
            sources += [stored] if len(stored := tensors_of(body, family.suffixes) if "-of-" in key else []) else []
    models = [f"s3://{s3_bucket}/{model}" for model in range(3)]
    recipe = {
        "merge_method": "model_stock",
        "base_model": models[0],
        "models": [{"model": url} for url in models[1:]],
        "stockflow": {"storage": {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ("--executor", "ray", "--workers", 2, "--memory", WORKER_MEMORY, "--shard-size", family.shard_size)
    out = f"s3://{s3_bucket}/out"

    result, driver_bytes = runs.merge_and_watch("merge", tmp_path / "recipe.yaml", out, "--quiet", "--json", *options)
    verified = runs.run("verify", out, "--recipe", tmp_path / "recipe.yaml")

    worker_bytes, seconds = result["summary"]["peak_memory_bytes"], result["seconds"]
    print(f"\nFIGURES {name}: {seconds:.0f} s, driver {driver_bytes / MIB:.0f}, worker {worker_bytes / MIB:.0f} MiB")
    print(result["summary"])
    assert verified.returncode == 0, verified.stderr
    assert_experts_are_right(family, sources, list(shards_of(s3, s3_bucket)))
    assert worker_bytes <= 2**30
    assert driver_bytes <= MOST_DRIVER_BYTES


def shards_of(s3: "boto3.client", bucket: str) -> Iterator[bytes]:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="out/model-"):
        for found in page["Contents"]:
            yield s3.get_object(Bucket=bucket, Key=found["Key"])["Body"].read()


def assert_experts_are_right(family: Published, sources: Sequence[list[bytes]], shards: Sequence[bytes]) -> None:
    """One expert has codes of the family's own format, the nearest to what the oracle finds."""
    (found,) = [stored for body in shards if (stored := tensors_of(body, family.suffixes))]
    base, *tuned = (family.decode(stored)[0] for stored in sources)
    expected = oracle.model_stock(base, tuned)
    numbers, half_steps = family.decode(found)

    assert expected.facts["ratio"][0] > 0.1
    assert [len(each) for each in found] == [len(each) for each in sources[0]]
    assert (np.abs(numbers - expected.out) <= half_steps * (1 + 2.0**-6)).all()
