"""What is said in place of a filter that no name contains: it is for as much as was meant, or no filter at all."""

from pathlib import Path

import torch

from tests.plans import Merge

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_up_proj", "mlp.down_proj")
PATTERN = " (a filter is a part of a name, no pattern; `*` alone is all)"
MEANT = {
    r"layers\.0\.mlp": f"{PATTERN}; did you mean 'layers.0.mlp'?",
    "MLP": "; did you mean 'mlp'?",
    "*.self_attn.*": f"{PATTERN}; did you mean '.self_attn'?",
    "layers.*.mlp": f"{PATTERN}; did you mean '.mlp'?",
    "^layers.[0-1].mlp": f"{PATTERN}; did you mean a filter each for 'layers.0.mlp', 'layers.1.mlp'?",
    "(q_proj|k_proj)": f"{PATTERN}; did you mean a filter each for 'q_proj', 'k_proj'?",
    ".*": f"{PATTERN}; did you mean '*'?",
    "mpl": "; did you mean 'mlp'?",
    "self_atn": "; did you mean 'self_attn'?",
    "layer.1.mlp.": "; did you mean 'layers.1.mlp.'?",
    "layers.1.self_atn.q_proj": "; did you mean 'layers.1.self_attn.q_proj'?",
    "layers.40.mlp": "; names go along with it up to 'layers.', as ",
    "layersnorm": "; names go along with it up to 'layers', as ",
    "gate_proj": "; names go along with it up to 'gate_', as ",
    "v_proj": "; correct it, or remove it",
    "conv2": "; names go along with it up to 'conv', as 'conv1.weight' does",
}
"""Filters and what is said of them; none is far broader than what was written."""


def said_of(merge: Merge, filters: list[str], **options: object) -> dict[str, str]:
    values = [{"filter": text, "value": 1.0} for text in filters]
    plan = merge.plan(
        merge_method="task_arithmetic",
        parameters={"weight": [*values, {"value": 0.5}]},
        stockflow={"accept": ["matches-nothing"], **options},
    )
    found = [each for each in plan.remarks if each.code == "matches-nothing"]
    return {each.values["filter"]: each.text.partition("the filter of a value")[2] for each in found}


def test_what_is_proposed_is_for_about_as_much_as_was_meant(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors |= {f"layers.{layer}.{part}.weight": torch.ones(2, 2) for layer in range(2) for part in PARTS}
        tensors["conv1.weight"] = torch.ones(2, 2)

    said = said_of(merge.write(), list(MEANT))

    assert said.keys() == MEANT.keys()
    assert [text for text, told in MEANT.items() if not said[text].startswith(told)] == []


def test_filters_for_one_expert_among_fused_ones_name_the_option_with_which_they_act(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors |= {
            "layers.0.mlp.experts.gate_up_proj": torch.ones(4, 12, 8),
            "layers.0.mlp.experts.down_proj": torch.ones(4, 8, 6),
        }
    merge.write()

    said = said_of(merge, ["experts.3."])

    assert "with `stockflow: {experts: separate}` they are written one by one" in said["experts.3."]
    assert said_of(merge, ["experts.3."], experts="separate") == {}
    separate = said_of(merge, ["experts.gate_up_proj"], experts="separate")
    assert "with `stockflow: {experts: fused}` those of a layer are one tensor" in separate["experts.gate_up_proj"]
