"""Small models of families that are published in codes, from S3 to S3 on Ray, in their own codes; and loaded again."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file

from stockflow.engine.worker import WorkerSpec
from stockflow.events import OnEvent
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.executors.ray import RayOptions, connected
from stockflow.run.inputs import Inputs
from tests import quantised, runs
from tests.checkpoints import write_checkpoint
from tests.quantised import Maker, Quantised, Tensors
from tests.waiting import HANG_S

transformers = pytest.importorskip("transformers")

CODED = re.compile(r"(self_attn|mlp(\.experts\.\d+|\.shared_experts)?)\.\w+_proj(_with_mqa)?\.weight")
EXPERTS = re.compile(r"mlp\.experts\.\d+\.\w+_proj\.weight")
SIDES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
    "v_head_dim": 64, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 128, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
}  # fmt: skip


def fp8(weight: torch.Tensor) -> Quantised:
    return quantised.fp8(weight, (128, 128))


def int4(weight: torch.Tensor) -> Quantised:
    return quantised.int4(weight.double().numpy())


def coded(weights: Tensors, which: re.Pattern[str], make: Maker) -> Tensors:
    """Weights as they are published: what matches in codes, the rest in BF16."""
    tensors: Tensors = {}
    for name, weight in weights.items():
        if which.search(name):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{own}": tensor for own, tensor in make(weight.float()).tensors.items()}
        else:
            tensors[name] = weight if weight.dtype == torch.float32 and "bias" in name else weight.bfloat16()
    return tensors


class Family:
    """A base and two tunes of it, in codes on disk and in a bucket."""

    def __init__(self, root: Path, which: re.Pattern[str], make: Maker, said: Any) -> None:
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(**SIDES)
        self.model = transformers.DeepseekV3ForCausalLM(config).eval()
        self.model.save_pretrained(root / "plain")
        weights = load_file(root / "plain" / "model.safetensors")
        written = json.loads((root / "plain" / "config.json").read_text()) | {"quantization_config": said}
        self.places = []
        for number in range(3):
            random = torch.Generator().manual_seed(number)
            tuned = {
                name: weight + 0.1 * number * weight.std() * torch.randn(weight.shape, generator=random)
                if weight.dim() > 1
                else weight
                for name, weight in weights.items()
            }
            self.places.append(root / f"m{number}")
            tensors = coded(tuned, which, make)
            write_checkpoint(self.places[-1], tensors, num_shards=2, config=written, side_files={})
        self.root = root

    def recipe(self, places: list[str], **asked: Any) -> Path:
        path = self.root / f"{len(list(self.root.iterdir()))}.yaml"
        recipe = {"merge_method": "model_stock", "base_model": places[0], "models": [{"model": p} for p in places[1:]]}
        path.write_text(yaml.safe_dump(recipe | asked))
        return path

    def merged(self, name: str, **asked: Any) -> Path:
        runs.merge_here(self.recipe([str(place) for place in self.places], **asked), self.root / name)
        return self.root / name


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("deepseek"), CODED, fp8, FP8)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("kimi"), EXPERTS, int4, INT4)


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[str]:
    del s3_endpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(RayOptions(num_workers=2), 2):
            yield ray.get_runtime_context().gcs_address


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek", "kimi"])
def test_a_family_goes_from_s3_to_s3_on_ray_in_its_own_codes(
    name: str, cluster: str, s3_endpoint: str, request: pytest.FixtureRequest
) -> None:
    del cluster
    family: Family = request.getfixturevalue(name)
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.create_bucket(Bucket=name)
    for place in family.places:
        for path in place.iterdir():
            s3.put_object(Bucket=name, Key=f"{place.name}/{path.name}", Body=path.read_bytes())
    local = runs.merge_here(
        family.recipe([str(place) for place in family.places]), family.root / "local", shard_size=2_000_000
    )

    storage = {f"s3://{name}/": {"endpoint": s3_endpoint}}
    recipe = load_recipe(
        str(family.recipe([f"s3://{name}/{place.name}" for place in family.places], stockflow={"storage": storage}))
    )
    options = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", 2_000_000)

    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], told: OnEvent) -> Iterator[Receipt]:
        return places.on_ray(spec, shards, told, RayOptions(num_workers=2, no_worker_timeout_s=HANG_S))

    result = merge(Inputs.open(recipe), f"s3://{name}/out", options, execute)

    on_s3, on_disk = runs.expected_digests([result])[0], runs.expected_digests([local])[0]
    assert on_s3 == on_disk
    assert headers(family.root / "local") == headers(family.places[0])


def headers(folder: Path) -> dict[str, tuple[Any, ...]]:
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: (tensor.dtype, tensor.shape) for shard in shards for name, tensor in shard.items()}


@pytest.mark.slow
def test_what_is_kept_in_fp8_loads_and_speaks_like_its_twin_in_bf16(deepseek: Family) -> None:
    tokens = torch.arange(90).reshape(3, 30)
    logits = {}
    for name, asked in (("kept", {}), ("twin", {"dtype": "bfloat16"})):
        model = transformers.AutoModelForCausalLM.from_pretrained(deepseek.merged(name, **asked), dtype=torch.bfloat16)
        with torch.no_grad():
            logits[name] = model.eval()(tokens).logits.float()
    with torch.no_grad():
        apart = deepseek.model(tokens).logits.float()

    error = float((logits["kept"] - logits["twin"]).norm() / logits["twin"].norm())
    assert error < 0.1, error  # every weight is within 2.7 % of the twin's
    assert np.isfinite(float(logits["kept"].norm()))
    assert float((apart - logits["twin"]).norm() / apart.norm()) > error  # which is less than what merging changed
