"""FP8 of all experts of a layer in one tensor, beside FP8 and plain numbers one by one and together; numpy decides."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stockflow.errors import PlanError
from tests import oracle, quantised, runs
from tests.checkpoints import write_checkpoint
from tests.quantised import Quantised, Tensors

STEM, NUM, HIDDEN, BLOCK = "model.layers.0.mlp.experts", 3, 64, (32, 32)
SAID = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
ROLES = ("gate", "up", "down")
Projections = Mapping[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Made:
    tensors: Tensors
    values: Projections


def drawn(seed: int, inner: int) -> dict[str, torch.Tensor]:
    """A base, or a tune of it: [experts, out, in] by role."""
    shapes = {"gate": (NUM, inner, HIDDEN), "up": (NUM, inner, HIDDEN), "down": (NUM, HIDDEN, inner)}
    found = {}
    for place, (role, shape) in enumerate(shapes.items()):
        base, own = (torch.Generator().manual_seed(100 * place + number) for number in (0, seed))
        found[role] = 0.02 * torch.randn(shape, generator=base)
        found[role] += 0.006 * torch.randn(shape, generator=own) if seed else 0
    return found


def parted(gate_up: np.ndarray, down: np.ndarray) -> Projections:
    gates, ups = np.split(gate_up, 2, axis=1)
    return {(n, role): each[n] for role, each in zip(ROLES, (gates, ups, down), strict=True) for n in range(NUM)}


def fp8(weight: torch.Tensor) -> Quantised:
    return quantised.fp8(weight, BLOCK)


def fused_fp8(weights: Mapping[str, torch.Tensor]) -> Made:
    made = {"gate_up_proj": fp8(torch.cat([weights["gate"], weights["up"]], 1)), "down_proj": fp8(weights["down"])}
    tensors = {
        f"{STEM}.{name}{own.removeprefix('weight')}": tensor
        for name, each in made.items()
        for own, tensor in each.tensors.items()
    }
    return Made(tensors, parted(made["gate_up_proj"].values, made["down_proj"].values))


def single_fp8(weights: Mapping[str, torch.Tensor]) -> Made:
    made = {(n, role): fp8(weights[role][n]) for role in ROLES for n in range(NUM)}
    tensors = {
        f"{STEM}.{n}.{role}_proj.{own}": tensor
        for (n, role), each in made.items()
        for own, tensor in each.tensors.items()
    }
    return Made(tensors, {key: each.values for key, each in made.items()})


def single(weights: Mapping[str, torch.Tensor]) -> Made:
    made = {(n, role): weights[role][n].bfloat16() for role in ROLES for n in range(NUM)}
    tensors = {f"{STEM}.{n}.{role}_proj.weight": each for (n, role), each in made.items()}
    return Made(tensors, {key: each.double().numpy() for key, each in made.items()})


def fused(weights: Mapping[str, torch.Tensor]) -> Made:
    values = single(weights).values
    gate_up, down = torch.cat([weights["gate"], weights["up"]], 1).bfloat16(), weights["down"].bfloat16()
    return Made({f"{STEM}.gate_up_proj": gate_up, f"{STEM}.down_proj": down}, values)


def turned(weights: Mapping[str, torch.Tensor]) -> Made:
    made = fused(weights)
    return Made({name: each.transpose(1, 2).contiguous() for name, each in made.tensors.items()}, made.values)


FORMS: dict[str, Callable[[Mapping[str, torch.Tensor]], Made]] = {
    each.__name__: each for each in (fused_fp8, single_fp8, single, fused, turned)
}


def family(root: Path, forms: Sequence[str], inner: int) -> tuple[list[Path], list[Projections]]:
    models, values = [], []
    for number, form in enumerate(forms):
        made = FORMS[form](drawn(number, inner))
        config = {"hidden_size": HIDDEN} | ({"quantization_config": SAID} if "fp8" in form else {})
        tensors = {"model.norm.weight": torch.ones(7).bfloat16(), **made.tensors}
        models.append(write_checkpoint(root / f"m{number}", tensors, config=config, side_files={}))
        values.append(made.values)
    return models, values


def merge(root: Path, models: Sequence[Path], **top: Any) -> Tensors:
    recipe: dict[str, Any] = {"merge_method": "model_stock", "base_model": str(models[0])}
    recipe["models"] = [{"model": str(each)} for each in models[1:]]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | top))
    runs.merge_here(root / "recipe.yaml", root / "out", memory_bytes=600 * runs.MIB)
    return load_file(root / "out" / "model.safetensors")


def read(found: Tensors) -> Projections:
    """What an output stands for, projection by projection."""
    if f"{STEM}.gate_up_proj" in found:
        both = [_numbers(found, f"{STEM}.{name}", "_scale_inv") for name in ("gate_up_proj", "down_proj")]
        both = [each.swapaxes(1, 2) for each in both] if both[1].shape[1] != HIDDEN else both
        return parted(*both)
    keys = itertools.product(range(NUM), ROLES)
    return {(n, role): _numbers(found, f"{STEM}.{n}.{role}_proj.weight", "_scale_inv") for n, role in keys}


def _numbers(found: Tensors, name: str, end: str) -> np.ndarray:
    codes = found[name]
    if codes.dtype != torch.float8_e4m3fn:
        return codes.double().numpy()
    return (codes.double() * quantised.spread(found[f"{name}{end}"].double(), tuple(codes.shape), BLOCK)).numpy()


def wanted(values: Sequence[Projections]) -> Projections:
    base, *tuned = values
    return {key: np.asarray(oracle.model_stock(each, [one[key] for one in tuned]).out) for key, each in base.items()}


def assert_right(found: Tensors, expected: Projections, *, in_codes: bool) -> None:
    ours = read(found)
    for key, each in expected.items():
        right = fp8(torch.from_numpy(each.astype(np.float32))).values if in_codes else each
        if not in_codes:
            right = torch.from_numpy(each.astype(np.float32)).bfloat16().double().numpy()
        assert (np.abs(ours[key] - right) <= 1e-6 * np.abs(right).max()).mean() >= 0.9995, key


MIXTURES = [
    *(("fused_fp8", each, each) for each in FORMS),
    *((each, "fused_fp8", "fused_fp8") for each in FORMS if each != "fused_fp8"),
    ("fused_fp8", "single", "turned"),
]
ASKED: Mapping[str, Mapping[str, Any]] = {
    "kept": {},
    "numbers": {"dtype": "bfloat16"},
    "one by one": {"stockflow": {"experts": "separate"}},
}
CASES = [
    *((forms, 32, "kept") for forms in MIXTURES),
    *((MIXTURES[-1], inner, asked) for inner in (32, 48) for asked in ("numbers", "one by one")),
    *((MIXTURES[place], 48, "numbers") for place in (0, 1, 7)),
    *((MIXTURES[place], 48, "kept") for place in (5, 6, 8)),
]
"""Inner sizes of which blocks are parts, and of which they are not."""


@pytest.mark.parametrize(
    ("forms", "inner", "asked"), CASES, ids=lambda each: "-".join(each) if each in MIXTURES else ""
)
def test_codes_of_all_experts_merge_with_every_layout(
    forms: Sequence[str], inner: int, asked: str, tmp_path: Path
) -> None:
    models, values = family(tmp_path, forms, inner)
    stockflow = {"accept": ["quantised-tunes"], **ASKED[asked].get("stockflow", {})}

    found = merge(tmp_path, models, **{**ASKED[asked], "stockflow": stockflow})

    in_codes = "fp8" in forms[0] and asked != "numbers"
    assert_right(found, wanted(values), in_codes=in_codes)
    layout = "single" if "experts" in stockflow else forms[0].removesuffix("_fp8")
    like = FORMS[f"{layout}_fp8" if in_codes else layout](drawn(0, inner)).tensors
    assert {name: (each.dtype, each.shape) for name, each in found.items() if name != "model.norm.weight"} == {
        name: (each.dtype, each.shape) for name, each in like.items()
    }


def test_blocks_that_reach_from_gate_into_up_are_kept_where_all_models_have_them_as_one(tmp_path: Path) -> None:
    models, values = family(tmp_path, ("fused_fp8", "fused", "fused_fp8"), 48)
    both = [np.stack([np.concatenate([each[n, "gate"], each[n, "up"]]) for n in range(NUM)]) for each in values]

    found = merge(tmp_path, models)

    expected = np.asarray(oracle.model_stock(both[0], both[1:], scope="leading").out, np.float32)
    again = fp8(torch.from_numpy(expected)).values
    ours = _numbers(found, f"{STEM}.gate_up_proj", "_scale_inv")
    assert (np.abs(ours - again) <= 1e-6 * np.abs(again).max()).mean() >= 0.9995
    (path,) = (tmp_path / "out").glob("_stockflow/*/plan.json")
    assert "gate and up of an expert are decided together" in path.read_text()


def test_blocks_that_reach_from_gate_into_up_are_refused_where_models_store_experts_otherwise(tmp_path: Path) -> None:
    models, _ = family(tmp_path, ("fused_fp8", "single_fp8", "turned"), 48)

    with pytest.raises(PlanError, match=r"(?s)reach from one projection.*m1, .*m2 do not.*experts: separate.*bfloat16"):
        merge(tmp_path, models)


def test_transposed_codes_are_decided_expert_by_expert_and_never_silently_so(tmp_path: Path) -> None:
    models, _ = family(tmp_path, ("turned",) * 3, 64)
    for folder in models:
        tensors = load_file(folder / "model.safetensors")
        norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
        coded = {name: fp8(each.float()).tensors for name, each in tensors.items()}
        found = {f"{n}{own.removeprefix('weight')}": t for n, each in coded.items() for own, t in each.items()}
        write_checkpoint(folder, norm | found, config={"hidden_size": HIDDEN}, side_files={})

    found = merge(tmp_path, models)

    assert found[f"{STEM}.gate_up_proj"].shape == (NUM, HIDDEN, 128)
    (path,) = (tmp_path / "out").glob("_stockflow/*/plan.json")
    assert "codes of all experts that are not taken apart" in path.read_text()
    with pytest.raises(PlanError, match="leave `experts: separate` out"):
        merge(tmp_path, models, stockflow={"experts": "separate"})
