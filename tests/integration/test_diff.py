"""``stockflow diff``: whole checkpoints against numpy in float64; what is missing, other, empty, foreign."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import Result

from stockflow.checkpoints.files.header import TensorSpec, encode_header
from stockflow.errors import BudgetError
from stockflow.events import Done, Event, Moved, Stage
from stockflow.insight.comparison import compare_checkpoints
from stockflow.insight.difference import CheckpointDifference
from stockflow.insight.surveys import SurveyOptions
from stockflow.planning.budget import LEAST_MEMORY_BYTES
from stockflow.run.places import survey_in_this_process
from stockflow.storage import StorageConfig
from tests import runs
from tests.checkpoints import BUFFERS, ZOO, make_family, write_checkpoint

LARGE = {"large": (3, 2**18 + 77), "small": (5,)}


def compare(a: str, b: str, options: SurveyOptions) -> CheckpointDifference:
    return compare_checkpoints(a, b, StorageConfig(), options, survey_in_this_process)


def diff(*arguments: object) -> Result:
    result = runs.invoke("diff", *arguments)
    assert "Traceback" not in result.output
    return result


def found(a: object, b: object, *options: object) -> dict[str, Any]:
    result = diff(a, b, "--json", *options)
    facts: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result.exit_code == (0 if facts["is_equal"] else 1)
    facts["by_name"] = {tensor["name"]: tensor for tensor in facts["tensors"]}
    return facts


def two(folder: Path, a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> tuple[Path, Path]:
    places = []
    for name, tensors in (("a", a), ("b", b)):
        places.append(write_checkpoint(folder / name, {key: tensor.clone() for key, tensor in tensors.items()}))
    return places[0], places[1]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")])
def test_a_zoo_of_tensors_against_float64(dtypes: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = (getattr(torch, name) for name in dtypes)
    family = make_family(tmp_path, 1, ZOO, tuned, base_dtype=base, num_shards=3)

    facts = found(family.base, family.tuned[0])

    left, right = all_tensors(family.base), all_tensors(family.tuned[0])
    assert facts["by_name"].keys() == left.keys() == right.keys()
    for name in ZOO:
        stated = facts["by_name"][name]
        a, b = (side[name].double().numpy().ravel() for side in (left, right))
        change = np.abs(b - a)
        assert stated["shape"] == list(ZOO[name])
        assert stated["num_elems"] == a.size
        assert stated["num_differing"] == np.count_nonzero(change)
        if not a.size:
            assert (stated["relative_distance"], stated["cosine"], stated["largest_at"]) == (0.0, None, None)
            continue
        assert stated["relative_distance"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
        cosine = (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
        assert stated["cosine"] == pytest.approx(cosine, abs=1e-14)
        assert (stated["largest_change"], stated["largest_at"]) == (change.max(), change.argmax())
        assert sum(stated["roundings"]) == a.size
    for name in BUFFERS:
        assert facts["by_name"][name]["is_equal"]


def test_equal_checkpoints_are_equal_however_they_are_cut(tmp_path: Path) -> None:
    one = make_family(tmp_path / "one", 1, num_shards=1)
    four = make_family(tmp_path / "four", 1, num_shards=4)

    result = diff(one.tuned[0], four.tuned[0])

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("equal: 21 tensors of")
    assert found(one.base, one.base)["is_equal"]
    assert diff(one.base, one.tuned[0], "--quiet").stdout == ""


def test_names_shapes_and_dtypes_that_differ_are_listed(tmp_path: Path) -> None:
    same = torch.arange(6, dtype=torch.float32)
    a, b = two(
        tmp_path,
        {"gone": same, "turned": same.reshape(2, 3), "retyped": same.int(), "same": same, "narrowed": same},
        {"new": same, "turned": same.reshape(3, 2), "retyped": same.long(), "same": same, "narrowed": same.half()},
    )

    facts, lines = found(a, b), diff(a, b).stdout

    assert (facts["only_in_a"], facts["only_in_b"]) == (["gone"], ["new"])
    assert {each["name"] for each in facts["unmatched"]} == {"turned", "retyped"}
    narrowed = facts["by_name"]["narrowed"]
    assert (narrowed["dtype_a"], narrowed["dtype_b"], narrowed["num_differing"]) == ("F32", "F16", 0)
    assert not narrowed["is_equal"]
    assert facts["by_name"]["same"]["is_equal"]
    for words in ("turned: F32 [2, 3] against F32 [3, 2]", "F32 against F16, equal numbers", f"only in {a}", "next: "):
        assert words in lines


def test_numbers_that_are_none_are_counted_and_leave_the_others_alone(tmp_path: Path) -> None:
    a = torch.arange(1, 1301, dtype=torch.bfloat16)
    b = a.clone()
    a[3] = b[3] = math.nan
    a[4], b[4] = math.inf, -math.inf
    b[900] = math.nan
    b[1200] *= 2

    tensor = found(*two(tmp_path, {"w": a}, {"w": b}))["by_name"]["w"]

    usable = torch.isfinite(a) & torch.isfinite(b)
    left, right = a[usable].double().numpy(), b[usable].double().numpy()
    assert (tensor["num_nonfinite"], tensor["num_differing"], tensor["first_differing"]) == (3, 3, 4)
    assert tensor["relative_distance"] == pytest.approx(np.linalg.norm(right - left) / np.linalg.norm(left), rel=1e-12)
    assert (tensor["largest_change"], tensor["largest_at"]) == (float(a[1200]), 1200)
    assert sum(tensor["roundings"]) == 1297


BITS = {
    "bool": torch.tensor([True, False, True]),
    "int8": torch.arange(-4, 4, dtype=torch.int8),
    "uint16": torch.arange(5).to(torch.uint16),
    "int64": torch.arange(2**18 + 5, dtype=torch.int64),
    "float8": torch.linspace(-2, 2, 9).to(torch.float8_e4m3fn),
    "complex": torch.ones(3, dtype=torch.complex64),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, dtype=torch.int32),
}


@pytest.mark.parametrize("name", BITS)
def test_what_is_no_float_is_compared_by_bits(name: str, tmp_path: Path) -> None:
    a = BITS[name]
    b = a.clone()
    if b.numel():
        b.reshape(-1).view(torch.uint8)[-1] ^= 1
    facts = found(*two(tmp_path, {"w": a, "v": a}, {"w": b, "v": a}))

    changed = facts["by_name"]["w"]
    assert facts["by_name"]["v"]["is_equal"]
    assert changed["num_elems"] == a.numel()
    assert changed["num_differing"] == min(a.numel(), 1)
    assert changed["first_differing"] == (a.numel() - 1 if a.numel() else None)
    assert (changed["relative_distance"], changed["cosine"], changed["largest_change"]) == (None, None, None)


def test_elements_smaller_than_a_byte_are_counted_in_bytes(tmp_path: Path) -> None:
    for name, data in (("a", bytes(12)), ("b", bytes(11) + b"\x10")):
        (tmp_path / name).mkdir()
        specs = [TensorSpec("four", "F4", (3, 4)), TensorSpec("six", "F6_E2M3", (8,))]
        (tmp_path / name / "model.safetensors").write_bytes(encode_header(specs, {}) + data)

    facts = found(tmp_path / "a", tmp_path / "b")["by_name"]

    assert (facts["four"]["num_elems"], facts["four"]["num_differing"]) == (6, 0)
    assert (facts["six"]["num_elems"], facts["six"]["num_differing"], facts["six"]["first_differing"]) == (6, 1, 5)


def test_numbers_do_not_depend_on_memory_and_threads(tmp_path: Path) -> None:
    family = make_family(tmp_path, 1, LARGE)
    places = str(family.base), str(family.tuned[0])

    several = [
        compare(*places, SurveyOptions(memory_bytes, threads, "cpu")).tensors
        for memory_bytes, threads in ((LEAST_MEMORY_BYTES + runs.grown_bytes(), 1), (2**33, 1), (2**33, 3))
    ]

    assert several[0] == several[1] == several[2]
    with pytest.raises(BudgetError, match="Raise --memory"):
        compare(*places, SurveyOptions(LEAST_MEMORY_BYTES - 1, 1, "cpu"))


def test_layers_and_kinds_are_their_tensors_together(tmp_path: Path) -> None:
    family = make_family(tmp_path, 1)

    facts = found(family.base, family.tuned[0])

    left, right = all_tensors(family.base), all_tensors(family.tuned[0])
    names = [name for name in left if "layernorm" in name]
    a, b = (torch.cat([side[name].double() for name in names]).numpy() for side in (left, right))
    norms = next(group for group in facts["kinds"] if group["name"] == "norm")
    assert (norms["num_tensors"], norms["num_elems"]) == (len(names), a.size)
    assert norms["num_differing"] == np.count_nonzero(a != b)
    assert norms["relative_distance"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert norms["largest_change"] == np.abs(b - a).max()
    for groups in (facts["kinds"], facts["layers"]):
        assert sum(group["num_tensors"] for group in groups) == len(left)


def test_from_an_object_store_it_is_the_same(s3_bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, 1, LARGE, num_shards=2)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in family.tuned[0].iterdir():
        client.upload_file(str(path), s3_bucket, f"tuned/{path.name}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - model: {family.base}\n  - model: {family.tuned[0]}\n"
        f"parameters: {{weight: 1.0}}\nstockflow:\n  storage:\n    s3://{s3_bucket}: {{endpoint: {s3_endpoint}}}\n"
    )

    facts = found(family.base, f"s3://{s3_bucket}/tuned", "--recipe", recipe)

    assert facts["tensors"] == found(family.base, family.tuned[0])["tensors"]


MISTAKES = {
    "no such folder": (["{root}/a", "{root}/nothing"], "there is no checkpoint at .*nothing"),
    "no memory": (["{root}/a", "{root}/b", "--memory", "much"], "--memory: expected a size"),
    "no recipe": (["{root}/a", "{root}/b", "--recipe", "{root}/nothing.yaml"], "nothing.yaml: no such file"),
    "a secret": (["{root}/a", "s3://key:word@bucket/x"], "carries a user and a password"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_two_and_never_one(mistake: str, tmp_path: Path) -> None:
    two(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    arguments, message = MISTAKES[mistake]

    result = diff(*(argument.format(root=tmp_path) for argument in arguments))

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("stockflow: ")
    assert "key:word" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_each_byte_and_each_tensor_is_told_once(tmp_path: Path) -> None:
    a, b = two(tmp_path, {"x": torch.zeros(5), "y": torch.ones(3)}, {"x": torch.ones(5), "y": torch.ones(3)})
    events: list[Event] = []
    comparing = Stage("comparing", total_bytes=64, num_items=2, unit="tensors")
    options = SurveyOptions(LEAST_MEMORY_BYTES + runs.grown_bytes(), 1, "cpu")

    compare_checkpoints(str(a), str(b), StorageConfig(), options, survey_in_this_process, on_event=events.append)

    (begun,) = [number for number, event in enumerate(events) if event == comparing]
    told = events[begun + 1 :]
    assert sum(event.num_read for event in told if isinstance(event, Moved)) == 2 * 4 * (5 + 3)
    assert sorted(event.item for event in told if isinstance(event, Done)) == ["x", "y"]
    assert {type(event) for event in told} == {Moved, Done}
