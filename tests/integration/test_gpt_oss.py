"""gpt-oss: MXFP4 in blocks beside tunes that are transposed 16-bit numbers, as transformers writes them; numpy decides.

Codes lie row by row, gate and up by turns; plain numbers column by column. Down is square here, as it is there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stockflow.errors import PlanError
from stockflow.planning import file as plan_file
from tests import oracle, quantised, runs
from tests.adapters import of_experts, write_adapter
from tests.checkpoints import write_checkpoint
from tests.quantised import Tensors

NUM_EXPERTS, HIDDEN, INNER = 3, 64, 64
SAID = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
STEM = "model.layers.0.mlp.experts"
Numbers = Mapping[str, np.ndarray]
"""By role: [experts, out, in]."""


def drawn(seed: int) -> dict[str, np.ndarray]:
    """A base, or a tune of it."""
    shapes = {"gate": (NUM_EXPERTS, INNER, HIDDEN), "up": (NUM_EXPERTS, INNER, HIDDEN)}
    shapes["down"] = (NUM_EXPERTS, HIDDEN, INNER)
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    found = {}
    for role, shape in shapes.items():
        found[role] = 0.02 * base.standard_normal(shape)
        found[role] += 0.006 * own.standard_normal(shape) if seed else 0
    return found


def by_turns(numbers: Numbers) -> np.ndarray:
    return np.stack([numbers["gate"], numbers["up"]], 2).reshape(NUM_EXPERTS, 2 * INNER, HIDDEN)


def parted(gate_up: np.ndarray, down: np.ndarray) -> dict[str, np.ndarray]:
    return {"gate": gate_up[:, 0::2], "up": gate_up[:, 1::2], "down": down}


def blocks(numbers: Numbers) -> tuple[Tensors, Numbers]:
    """As gpt-oss is published."""
    made = {name: quantised.mxfp4_blocks(each, name) for name, each in _both(numbers).items()}
    tensors = {f"{STEM}.{own}": tensor for each in made.values() for own, tensor in each.tensors.items()}
    return tensors, parted(made["gate_up_proj"].values, made["down_proj"].values)


def transposed(numbers: Numbers, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, Numbers]:
    """As transformers saves it."""
    both = {name: torch.from_numpy(each).to(dtype) for name, each in _both(numbers).items()}
    tensors = {f"{STEM}.{name}": each.transpose(1, 2).contiguous() for name, each in both.items()}
    return tensors, parted(*(each.double().numpy() for each in both.values()))


def one_by_one(numbers: Numbers, form: str = "I8") -> tuple[Tensors, Numbers]:
    """As DeepSeek-V4 has MXFP4, or Kimi-K3 (``packed``)."""
    tensors, found = Tensors(), {role: np.empty_like(each) for role, each in numbers.items()}
    for role, each in numbers.items():
        for number, matrix in enumerate(each):
            made = quantised.mxfp4(matrix, form)
            found[role][number] = made.values
            tensors |= {f"{STEM}.{number}.{role}_proj.{own}": tensor for own, tensor in made.tensors.items()}
    return tensors, found


def _both(numbers: Numbers) -> dict[str, np.ndarray]:
    return {"gate_up_proj": by_turns(numbers), "down_proj": numbers["down"]}


FORMS = {"blocks": blocks, "transposed": transposed, "I8": one_by_one}


def rest(seed: int, *, has_biases: bool) -> Tensors:
    biases = {
        f"{STEM}.gate_up_proj_bias": torch.full((NUM_EXPERTS, 2 * INNER), 0.5 + seed).bfloat16(),
        f"{STEM}.down_proj_bias": torch.full((NUM_EXPERTS, HIDDEN), 0.25 + seed).bfloat16(),
    }
    return {"model.norm.weight": torch.ones(7).bfloat16()} | (biases if has_biases else {})


def write(folder: Path, forms: Sequence[str]) -> tuple[list[Path], list[Numbers]]:
    models, values = [], []
    for number, form in enumerate(forms):
        tensors, numbers = FORMS[form](drawn(number))
        config: dict[str, Any] = {"model_type": "gpt_oss", "hidden_size": HIDDEN}
        config |= {"quantization_config": SAID} if form == "blocks" else {}
        tensors = rest(number, has_biases=True) | tensors
        models.append(write_checkpoint(folder / f"m{number}", tensors, config=config, side_files={}))
        values.append(numbers)
    return models, values


def merge(folder: Path, models: Sequence[Path | str], **top: Any) -> Path:
    recipe: dict[str, Any] = {"merge_method": "model_stock", "base_model": str(models[0])}
    recipe["models"] = [{"model": str(each)} for each in models[1:]]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | top))
    runs.merge_here(folder / "recipe.yaml", folder / "out", memory_bytes=600 * runs.MIB)
    return folder / "out"


def expected(values: Sequence[Numbers]) -> Numbers:
    """Every projection of every expert decided alone."""
    base, *tuned = values
    return {
        role: np.stack([
            oracle.model_stock(each[number], [one[role][number] for one in tuned]).out for number in range(NUM_EXPERTS)
        ])
        for role, each in base.items()
    }  # fmt: skip


def share(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found == wanted).mean())


MIXED = {
    "tunes in 16 bits": (("blocks", "transposed", "transposed"), ()),
    "all in blocks": (("blocks",) * 3, ()),
    "one tune in 16 bits": (("blocks", "transposed", "blocks"), ()),
    "tunes one by one": (("blocks", "I8", "transposed"), ()),
    "tunes in codes": (("transposed", "blocks", "blocks"), ("quantised-tunes",)),
}


@pytest.mark.parametrize("mixture", MIXED)
def test_what_is_written_in_16_bits_is_transposed_and_right_for_every_projection(mixture: str, tmp_path: Path) -> None:
    forms, accepted = MIXED[mixture]
    models, values = write(tmp_path, forms)

    out = merge(tmp_path, models, dtype="bfloat16", stockflow={"accept": list(accepted)})

    found, wanted = load_file(out / "model.safetensors"), expected(values)
    shapes = {name: tuple(each.shape) for name, each in found.items()}
    assert shapes == {
        **{name: tuple(each.shape) for name, each in transposed(drawn(0))[0].items()},
        **{name: tuple(each.shape) for name, each in rest(0, has_biases=True).items()},
    }
    for name, numbers in _both(wanted).items():
        stored = found[f"{STEM}.{name}"].transpose(1, 2)
        right = torch.from_numpy(np.asarray(numbers, np.float32)).bfloat16()
        assert share(stored.float().numpy(), right.float().numpy()) >= 0.9999, name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("mixture", [mixture for mixture in MIXED if mixture != "tunes in codes"])
def test_what_is_kept_in_blocks_is_coded_as_numpy_codes_it(mixture: str, tmp_path: Path) -> None:
    forms, _ = MIXED[mixture]
    models, values = write(tmp_path, forms)

    out = merge(tmp_path, models)

    found = load_file(out / "model.safetensors")
    again = blocks({role: np.asarray(each, np.float32).astype(float) for role, each in expected(values).items()})[0]
    assert found.keys() == {*again, *rest(0, has_biases=True)}
    for name, tensor in again.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        pairs = [each.numpy().astype(int) for each in (found[name], tensor)]
        if name.endswith("_blocks"):
            pairs = [np.stack([np.where(half == 8, 0, half) for half in (each & 15, each >> 4)]) for each in pairs]
        assert share(*pairs) >= 0.9995, name
    assert json.loads((out / "config.json").read_text())["quantization_config"] == SAID


def test_copies_come_out_byte_for_byte(tmp_path: Path) -> None:
    models, _ = write(tmp_path, ("blocks",))
    copies = [*models, tmp_path / "one", tmp_path / "two"]
    stored = load_file(models[0] / "model.safetensors")
    for folder in copies[1:]:
        config = json.loads((models[0] / "config.json").read_text())
        write_checkpoint(folder, stored, config=config, side_files={})

    out = merge(tmp_path, copies, stockflow={"accept": ["same-samples"]})

    found = load_file(out / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], each) for name, each in stored.items())


def test_an_output_is_the_same_for_every_memory_and_is_verified(tmp_path: Path) -> None:
    models, _ = write(tmp_path, ("blocks", "transposed", "transposed"))
    out = merge(tmp_path, models)
    digests = runs.shard_digests(out)

    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "little", memory_bytes=306 * runs.MIB, num_threads=1)
    verified = runs.invoke("verify", out, "--inputs", "--sample", "1.0")

    assert runs.shard_digests(tmp_path / "little") == digests
    assert verified.exit_code == 0, verified.stdout + verified.stderr
    (path,) = out.glob("_stockflow/*/plan.json")
    recorded = plan_file.parse(path.read_bytes(), "plan.json")
    assert recorded.plan_id == recorded.digest == recorded.plan.plan_id
    assert recorded.merge_id == recorded.copies_digest


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"stockflow": {"experts": "separate"}}, "one by one, as no model has them"),
        ({"stockflow": {"scope": "leading"}}, "some models store them one by one"),
        ({"dtype": "bfloat16", "stockflow": {"scope": "leading"}}, "whose plain numbers are stored transposed"),
    ],
)
def test_what_would_lie_as_in_no_model_is_refused(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    models, _ = write(tmp_path, ("blocks", "transposed", "transposed"))

    with pytest.raises(PlanError, match=said):
        merge(tmp_path, models, **asked)


def test_tunes_in_codes_of_a_base_in_16_bits_are_refused(tmp_path: Path) -> None:
    models, _ = write(tmp_path, ("transposed", "blocks", "blocks"))

    with pytest.raises(PlanError, match="quantised-tunes"):
        merge(tmp_path, models)


@pytest.mark.parametrize("form", ["blocks", "transposed"])
def test_adapters_on_all_experts_are_parted_like_what_they_are_added_to(form: str, tmp_path: Path) -> None:
    """Beside a whole model; factors of gate and up go by turns, and those of square matrices the right way round."""
    models, values = write(tmp_path, (form, "transposed"))
    shapes = {"gate_up_proj": (NUM_EXPERTS, 2 * INNER, HIDDEN), "down_proj": (NUM_EXPERTS, HIDDEN, INNER)}
    adapter = of_experts(STEM, shapes, list(shapes))
    write_adapter(tmp_path / "lora", adapter)
    tuned = adapter.of({f"{STEM}.{name}": each for name, each in _both(values[0]).items()})

    out = merge(tmp_path, [models[0], f"{models[0]}+{tmp_path}/lora", models[1]], dtype="bfloat16")

    found = load_file(out / "model.safetensors")
    with_adapter = parted(*(tuned[f"{STEM}.{name}"] for name in shapes))
    for name, numbers in _both(expected([values[0], with_adapter, values[1]])).items():
        right = torch.from_numpy(np.asarray(numbers, np.float32)).bfloat16()
        assert share(found[f"{STEM}.{name}"].transpose(1, 2).float().numpy(), right.float().numpy()) >= 0.9995, name
