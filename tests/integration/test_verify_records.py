"""Records that agree among themselves and lie: stale receipts, rows, and what only the plan still knows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stockflow.output.tables import encode_tensors, read_facts
from stockflow.text.sealed import seal
from tests import runs
from tests.checkpoints import llama_shapes, make_family, write_recipe
from tests.integration.test_verify import INDEX, edit_manifest, endorse, findings, manifest, receipts, shards

NAME = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("records")
    family = make_family(root, 2, llama_shapes(), buffers=False)
    runs.merge_here(write_recipe(root / "recipe.yaml", "model_stock", family), root / "out", shard_size=40_000)
    return root / "out"


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("000000.json", {"numerics_class": "cuda-sm90", "run": "x"}, "says 'cuda-sm90', the shards are of 'cpu'"),
        ("000001.json", {"numerics_class": "cuda-sm90", "run": "x"}, "says 'cuda-sm90', the shards are of 'cpu'"),
        ("000000.json", {"numerics_class": 5, "run": "x"}, "cannot be read: "),
        ("000000.json", {}, "cannot be read: "),
        ("000000.json", "cpu", "cannot be read: "),
        ("0.json", {"numerics_class": "cpu", "run": "x"}, "is no record of a numerics class"),
        ("x.json", {"numerics_class": "cpu", "run": "x"}, "is no record of a numerics class"),
    ],
)
def test_an_altered_record_of_numerics(output: Path, name: str, content: object, words: str) -> None:
    (record,) = output.glob("_stockflow/*/numerics/000000.json")
    (record.parent / name).write_text(json.dumps(content))

    [(where, problem)] = findings(output)

    assert where.endswith(f"/numerics/{name}")
    assert problem.startswith(words)


def test_a_numerics_class_that_gave_way_to_that_of_the_shards_is_none(output: Path) -> None:
    (record,) = output.glob("_stockflow/*/numerics/000000.json")
    shutil.copy(record, record.parent / "000001.json")
    record.write_text(json.dumps({"numerics_class": "cuda-sm90", "run": "x"}))

    assert findings(output) == []


def change_receipt(output: Path, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((output / key).read_text())
    del fields["seal"]
    change(fields)
    (output / key).write_bytes(seal(json.dumps(fields)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda receipt: receipt.update(sha256="0" * 64), "is stale: it is of another state of the shard"),
        (lambda receipt: receipt.update(size=1), "is stale: it is of another state of the shard"),
        (lambda receipt: receipt.update(plan_id="0" * 64), "is stale: it is of another state of the shard"),
        (
            lambda receipt: receipt.update(file="config.json"),
            "is stale: it is of 'config.json', which was not published",
        ),
        (
            lambda receipt: receipt.update(numerics_class="cuda-sm90"),
            "is of the numerics class 'cuda-sm90', which the manifest",
        ),
        (lambda receipt: receipt.update(file="../x"), "is stale: it is of '../x', which was not published"),
        (lambda receipt: receipt["tensors"][0].update(ratio=0.5), "says ratio of "),
        (lambda receipt: receipt["tensors"][0].update(flags=["clamped"]), "says flags of "),
        (lambda receipt: receipt["tensors"][0].update(name="x"), "tells of 'x', which the table of tensors does not"),
        (lambda receipt: receipt.update(format="?"), "cannot be read: "),
        (lambda receipt: receipt.update(tensors=[5]), "cannot be read: "),
        (lambda receipt: receipt.update(file=["x"]), "cannot be read: "),
    ],
)
def test_a_stale_or_lying_receipt(output: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    key = receipts(output)[1]
    change_receipt(output, key, change)

    [(where, problem)] = findings(output)

    assert where == key
    assert words in problem


def test_a_receipt_altered_by_hand(output: Path) -> None:
    key = receipts(output)[0]
    (output / key).write_text((output / key).read_text().replace('"wait_read": ', '"wait_read": 1', 1))

    [(where, problem)] = findings(output)

    assert where == key
    assert "is not as it was written" in problem


def test_receipts_under_each_others_names(output: Path) -> None:
    first, second, *_ = receipts(output)
    (output / first).rename(output / "x")
    (output / second).rename(output / first)
    (output / "x").rename(output / second)

    assert [where for where, _ in findings(output)] == [first, second]


def test_receipts_that_are_gone_are_no_finding(output: Path) -> None:
    shutil.rmtree((output / receipts(output)[0]).parent)

    assert findings(output) == []


def test_records_of_another_plan(output: Path) -> None:
    key = f"_stockflow/{'ab' * 32}/receipts/model.safetensors.json"
    (output / key).parent.mkdir(parents=True)
    shutil.copy(output / receipts(output)[0], output / key)

    [(where, problem)] = findings(output)

    assert where == key
    assert "is a record of another run" in problem


def test_a_tensor_that_vanished_from_shard_index_and_table_alike(output: Path) -> None:
    """Everything agrees, every digest fits; only the plan knows that there was one more."""
    index = json.loads((output / INDEX).read_text())
    shard = index["weight_map"].pop(NAME)
    (output / INDEX).write_text(json.dumps(index))
    tensors = load_file(output / shard)
    del tensors[NAME]
    save_file(tensors, output / shard)
    [table] = output.glob("_stockflow/*/tensors.parquet")
    table.write_bytes(encode_tensors(row for row in read_facts(table) if row.name != NAME))
    shutil.rmtree((output / receipts(output)[0]).parent)
    key = str(table.relative_to(output))
    endorse(output, shard, INDEX, key)

    found = findings(output)

    assert (key, f"has no row for {NAME!r}, which the plan has") in found
    assert {where for where, _ in found} == {key, shard}  # the shard by its size


@pytest.mark.parametrize(
    ("column", "value"),
    [("method", "linear"), ("scope", "row"), ("num_elems", 7), ("dtype", "F16"), ("shape", (7,)), ("shard", "x")],
)
def test_a_row_that_contradicts_the_plan(output: Path, column: str, value: object) -> None:
    [table] = output.glob("_stockflow/*/tensors.parquet")
    rows = read_facts(table)
    object.__setattr__(next(row for row in rows if row.name == NAME), column, value)
    table.write_bytes(encode_tensors(rows))
    endorse(output, key := str(table.relative_to(output)))

    assert any(f"says {column} of {NAME!r} is " in problem for where, problem in findings(output) if where == key)


def test_rows_the_plan_does_not_have_and_rows_twice(output: Path) -> None:
    [table] = output.glob("_stockflow/*/tensors.parquet")
    rows = read_facts(table)
    for lying in ([*rows, rows[0]], [*rows[1:], rows[1]]):
        table.write_bytes(encode_tensors(lying))
        endorse(output, key := str(table.relative_to(output)))

        [(where, problem)] = findings(output)

        assert where == key
        assert "cannot be read: " in problem


@pytest.mark.parametrize("change", ["merge_id", "inputs", "numerics"])
def test_a_manifest_that_contradicts_the_plan(output: Path, change: str) -> None:
    def forge(fields: dict[str, Any]) -> None:
        if change == "inputs":
            fields["inputs"][0]["files"]["model.safetensors"]["size"] += 1
        else:
            fields[change] = 99 if change == "numerics" else "0" * 64

    edit_manifest(output, forge)

    [(where, problem)] = findings(output)

    assert where == "manifest.json"
    assert change in problem


def test_without_a_table_the_headers_are_held_against_the_plan(output: Path) -> None:
    shard = next(key for key in shards(output) if NAME in load_file(output / key))
    tensors = load_file(output / shard)
    tensors["new"] = tensors.pop(NAME)
    save_file(tensors, output / shard)
    [table] = output.glob("_stockflow/*/tensors.parquet")
    table.write_bytes(b"PAR1")
    endorse(output, shard)

    found = [problem for where, problem in findings(output) if where == shard]

    assert f"lacks {NAME!r} of BF16 (48,), which the plan puts there" in found
    assert "holds 'new' of BF16 (48,), which the plan does not" in found


def test_a_plan_that_is_gone(output: Path) -> None:
    key = f"_stockflow/{manifest(output)['plan_id']}/plan.json"
    (output / key).unlink()

    [(where, problem)] = findings(output)

    assert where == key
    assert "no such file" in problem
