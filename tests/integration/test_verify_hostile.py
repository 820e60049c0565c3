"""`verify` of an output that somebody made to hurt: a finding or a typed error, within bounded memory and time."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stockflow.output.tables import TENSORS_SCHEMA
from stockflow.storage import StorageConfig
from stockflow.text.sealed import check_seal, seal
from stockflow.text.strictjson import check_num_values
from stockflow.verification.findings import MAX_FINDINGS, Finding
from stockflow.verification.verify import verify
from tests import runs
from tests.checkpoints import llama_shapes, make_family, write_recipe
from tests.integration.test_verify import edit_manifest, endorse, manifest

MIB = 2**20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    family = make_family(root, 2, llama_shapes(), buffers=False)
    runs.merge_here(write_recipe(root / "recipe.yaml", "model_stock", family), root / "out", shard_size=60_000)
    return root / "out"


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out", symlinks=True))


def found_in(output: Path) -> dict[str, str]:
    findings = verify(str(output), StorageConfig()).findings
    for finding in findings:
        assert str(finding).isprintable()
        assert len(str(finding)) <= 1000
    return {finding.where: finding.problem for finding in findings}


def record(output: Path, name: str) -> str:
    return f"_stockflow/{manifest(output)['plan_id']}/{name}"


def replace(output: Path, key: str, payload: bytes) -> None:
    """Put bytes in the place of a published file, and make the manifest agree."""
    (output / key).write_bytes(payload)
    endorse(output, key)


def first_shard(output: Path) -> str:
    return min(key for key in manifest(output)["files"] if key.endswith(".safetensors"))


# --------------------------------------------------------------------------------------------------- names, sizes


@pytest.mark.parametrize(
    "key",
    ["../secret", "/etc/hostname", "a/../../secret", "a\\b", "a\0b", "", "x" * 300, "y/" * 600 + "z", "./x"],
)
def test_a_key_that_leaves_the_output_or_names_nothing_is_not_read(output: Path, key: str) -> None:
    secret = output.parent / "secret"
    secret.write_bytes(b"secret")
    entry = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}

    def add(fields: dict[str, Any]) -> None:
        fields["files"][key] = entry

    fields = json.loads((output / "manifest.json").read_text())
    del fields["seal"]
    add(fields)
    (output / "manifest.json").write_bytes(seal(json.dumps(fields)))  # json.dumps escapes what is no Unicode

    found = found_in(output)

    assert key in found
    assert any(words in found[key] for words in ("leaves its folder", "too long", "not valid Unicode"))
    assert "which the plan does not know" in found["manifest.json"]


@pytest.mark.parametrize("digits", [str(2**62), str(2**63), "1" + "0" * 30, "1" + "0" * 5000, "-1", "1.5", "1e400"])
def test_an_absurd_size_is_a_finding(output: Path, digits: str) -> None:
    text = (output / "manifest.json").read_text()
    entry = manifest(output)["files"]["config.json"]
    body = text[: text.rindex(",")].replace(f'"size": {entry["size"]},', f'"size": {digits},', 1) + "}"
    (output / "manifest.json").write_bytes(seal(body))

    assert found_in(output)


def test_terminals_are_safe_from_names(output: Path) -> None:
    edit_manifest(output, lambda fields: fields["files"].update({"\x1b[2J\x9b": {"size": 0, "sha256": "\x07"}}))

    result = runs.invoke("verify", output)

    assert result.exit_code == 4
    assert "\\x1b[2J\\x9b: " in result.stdout
    assert str(Finding("a\nb", "c\r\x1b")) == "a; b: c; \\x1b"


def test_twenty_thousand_lies_are_counted(output: Path) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    edit_manifest(output, lambda fields: fields["files"].update({f"no-{n}": entry for n in range(20_000)}))

    findings = verify(str(output), StorageConfig()).findings

    assert len(findings) <= MAX_FINDINGS + 20
    assert any(finding.where == "everywhere" for finding in findings)


# ----------------------------------------------------------------------------------------------------------- links


def test_a_link_out_of_the_output_is_not_followed(output: Path) -> None:
    elsewhere = output.parent / "elsewhere"
    elsewhere.mkdir()
    for key in (first_shard(output), "config.json", record(output, "plan.json"), "manifest.json"):
        (output / key).rename(elsewhere / Path(key).name)
        (output / key).symlink_to(elsewhere / Path(key).name)

        found = found_in(output)

        assert f"is a link to {elsewhere / Path(key).name}, outside of the output" in found[key]
        (output / key).unlink()
        (elsewhere / Path(key).name).rename(output / key)
    assert found_in(output) == {}


def test_a_folder_that_is_a_link_out_of_the_output(output: Path) -> None:
    (output / "_stockflow").rename(output.parent / "records")
    (output / "_stockflow").symlink_to(output.parent / "records")

    found = found_in(output)

    assert "outside of the output" in found[record(output, "plan.json")]
    assert "outside of the output" in found[record(output, "tensors.parquet")]


def test_links_inside_the_output_and_to_it_are_followed(output: Path) -> None:
    (output / "blobs").mkdir()
    key = first_shard(output)
    (output / key).rename(output / "blobs/0")
    (output / key).symlink_to("blobs/0")
    (output.parent / "link").symlink_to(output)

    assert found_in(output) == found_in(output.parent / "link") == {}


@pytest.mark.parametrize("kind", ["pipe", "zero", "loop", "broken"])
def test_what_is_no_plain_file_is_not_opened(output: Path, kind: str) -> None:
    """A pipe that nobody writes to would keep its reader waiting for ever."""
    make: Callable[[Path], object] = {
        "pipe": os.mkfifo,
        "zero": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path.name),
        "broken": lambda path: path.symlink_to("nothing"),
    }[kind]
    receipt = record(output, f"receipts/{first_shard(output)}.json")
    keys = [first_shard(output), "model.safetensors.index.json", record(output, "plan.json")]
    for key in (*keys, record(output, "tensors.parquet"), receipt, "manifest.json"):
        (output / key).rename(output / "kept")
        make(output / key)

        if (key, kind) == ("manifest.json", "broken"):
            assert runs.run("verify", output).returncode == 2
        elif (key, kind) != (receipt, "broken"):  # as good as gone
            found = found_in(output)
            assert key in found or (kind == "loop" and "Too many levels of symbolic links" in found["_stockflow/"])
        (output / key).unlink()
        (output / "kept").rename(output / key)
    assert found_in(output) == {}


# ----------------------------------------------------------------------------------------------------------- bombs


MEASURE = (
    "import json, resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
    "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "print(json.dumps([done.returncode, used.ru_maxrss // 1024, done.stdout]))"
)
"""Run from a small process: what is forked from this one begins with its size."""


def peak_of_verify(output: Path) -> tuple[int, int, str]:
    """Return exit code, peak memory of the largest process in MiB, and what was said."""
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *runs.command("verify", output, "--quiet")],
        cwd=runs.REPOSITORY,
        capture_output=True,
        check=True,
    )
    code, peak_mib, said = json.loads(measured.stdout)
    return code, peak_mib, said


BOMBS: dict[str, Callable[[], bytes]] = {
    "values": lambda: b"[" + b"[]," * 16_000_000 + b"[]]",
    "depth": lambda: b"[" * 5_000_000,
    "numbers": lambda: b"[" + b"1e400," * 4_000_000 + b"1]",
    "text": lambda: b'"' + b"x" * 20_000_000 + b'"',
}


@pytest.mark.parametrize(
    ("key", "bomb"),
    [
        ("plan.json", "numbers"),
        ("manifest.json", "values"),
        *(pytest.param("plan.json", bomb, marks=pytest.mark.slow) for bomb in ("values", "depth", "text")),
        *(pytest.param(key, "values", marks=pytest.mark.slow) for key in ("index", "receipt")),
    ],
)
def test_json_that_grows_is_refused_before_it_is_parsed(output: Path, key: str, bomb: str) -> None:
    receipt = record(output, f"receipts/{first_shard(output)}.json")
    plan = record(output, "plan.json")
    key = {"plan.json": plan, "index": "model.safetensors.index.json", "receipt": receipt}.get(key, key)
    (output / key).write_bytes(BOMBS[bomb]())
    if key not in (receipt, "manifest.json"):
        endorse(output, key)

    code, peak_mib, _ = peak_of_verify(output)

    assert code == 4
    assert peak_mib < 800


def test_a_sparse_terabyte_is_not_read_into_memory(output: Path) -> None:
    receipt = record(output, f"receipts/{first_shard(output)}.json")
    for key in ("manifest.json", receipt):
        kept = (output / key).read_bytes()
        os.truncate(output / key, 2**40)

        code, peak_mib, *_ = peak_of_verify(output)

        assert (code, peak_mib < 1200) == (4, True), peak_mib
        (output / key).write_bytes(kept)


def bomb_table(**columns: pa.Array) -> bytes:
    num_rows = len(next(iter(columns.values())))
    arrays = [columns.get(field.name, pa.nulls(num_rows, field.type)) for field in TENSORS_SCHEMA]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=TENSORS_SCHEMA), buffer, compression="zstd")
    payload: bytes = buffer.getvalue().to_pybytes()
    return payload


def many_rows() -> bytes:
    return bomb_table(num_elems=pa.array([0] * 5_000_000, pa.int64()))


def one_long_text_in_every_row() -> bytes:
    """Fifteen rows of one text of 100 MB: a dictionary page of it, and 15 numbers."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 15, pa.int32()), ["x" * 100_000_000])
    return bomb_table(name=texts.cast(pa.string()))


def one_long_list() -> bytes:
    values = pa.array([0.0]).take(pa.array([0] * 30_000_000, pa.int32()))
    return bomb_table(delta_norms=pa.ListArray.from_arrays(pa.array([0, 30_000_000], pa.int32()), values))


SLOW_TABLES = [pytest.param(make, marks=pytest.mark.scale) for make in (one_long_text_in_every_row, one_long_list)]


@pytest.mark.parametrize("make", [many_rows, *SLOW_TABLES], ids=lambda make: make.__name__)
def test_a_table_that_grows_is_a_finding(output: Path, make: Callable[[], bytes]) -> None:
    key = record(output, "tensors.parquet")
    payload = make()
    replace(output, key, payload)
    assert len(payload) < 8 * MIB

    code, peak_mib, said = peak_of_verify(output)

    assert f"{key}: cannot be read: " in said
    assert (code, peak_mib < 1500) == (4, True), peak_mib


# --------------------------------------------------------------------------------------------------- header, index


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length(output: Path, length: int) -> None:
    key = first_shard(output)
    payload = (output / key).read_bytes()
    replace(output, key, length.to_bytes(8, "little") + payload[8:])

    assert key in found_in(output)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}},
        {"x": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 4]}},
        {f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(30_000)},
        {"../../../etc/passwd": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_lies_about_its_tensors(output: Path, header: dict[str, Any]) -> None:
    key = first_shard(output)
    body = json.dumps(header).encode()
    replace(output, key, len(body).to_bytes(8, "little") + body + bytes(4 * ("x" in header or len(header) == 1)))

    found = found_in(output)

    assert key in found
    assert len(found) < 20


def test_an_index_that_names_foreign_files_opens_none(output: Path) -> None:
    index = json.loads((output / "model.safetensors.index.json").read_text())
    foreign = ["/etc/hostname", "../secret.safetensors", "\x1b[2J", "x" * 10_000]
    index["weight_map"].update({f"new{number}": file for number, file in enumerate(foreign)})
    replace(output, "model.safetensors.index.json", json.dumps(index).encode())
    os.mkfifo(output.parent / "secret.safetensors")  # whoever opened it would wait for ever

    findings = verify(str(output), StorageConfig()).findings

    assert [finding.where for finding in findings] == ["model.safetensors.index.json"] * 4
    assert "says 'new0' is in /etc/hostname, found it in no shard" in str(findings[0])


# ------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("shards"),
        lambda plan: plan.update(format="stockflow-plan-2"),
        lambda plan: plan["shards"][0].update(num_bytes=1),
        lambda plan: plan["shards"][0]["tensors"][0].__setitem__(2, [2**70]),
        lambda plan: plan["shards"][0]["tensors"][0].__setitem__(2, [1] * 100),
        lambda plan: plan["shards"][0]["tensors"][0].__setitem__(3, 7),
        lambda plan: plan["shards"][0]["tensors"][0].__setitem__(3, -1),
        lambda plan: plan["shards"][0]["tensors"][0].__setitem__(4, []),
        lambda plan: plan["shards"][0]["tensors"][0].__setitem__(4, ["F7"] * 3),
        lambda plan: plan["shards"][0]["tensors"][0][5].__setitem__(0, 99),
        lambda plan: plan["shards"][0]["tensors"][0][5].__setitem__(2, 2**62),
        lambda plan: plan["shards"][0]["tensors"][0][5].__setitem__(1, "../../etc/passwd"),
        lambda plan: plan.update(checkpoints=None),
        lambda plan: plan.update(settings=[["model_stock", "galaxy", {}, {}]]),
        lambda plan: plan.update(plan_id="0" * 64),
        lambda plan: plan["checkpoints"][0].update(url="/etc"),
        lambda plan: plan.update(on_nonfinite="perhaps"),
    ],
)
def test_a_plan_that_lies_is_a_finding(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    key = record(output, "plan.json")
    plan = json.loads((output / key).read_text())
    change(plan)
    replace(output, key, json.dumps(plan, ensure_ascii=False).encode())

    found = found_in(output)

    assert found.keys() == {key}
    assert found[key].startswith(("cannot be read: ", "is plan "))


# ------------------------------------------------------------------------------------------------------ the inputs


def test_inputs_are_contacted_only_when_asked_for(output: Path) -> None:
    """A manifest can name any place; only `--inputs` and `--sample` go there."""
    edit_manifest(output, lambda fields: fields["inputs"][0].update(url="nonsense://somewhere"))

    without, asked = verify(str(output), StorageConfig()), verify(str(output), StorageConfig(), inputs=True)

    assert [finding.where for finding in without.findings] == ["manifest.json"]
    assert "nonsense://somewhere" in {finding.where for finding in asked.findings}


# ------------------------------------------------------------------------------------------------------------ seals


def test_a_seal_covers_every_byte_and_is_json() -> None:
    sealed = seal(json.dumps({"a": 1, "b": "ü"}, ensure_ascii=False))

    assert json.loads(sealed)["a"] == 1
    check_seal(sealed, "here")
    for place in range(len(sealed)):
        with pytest.raises(ValueError, match="here is not as it was written"):
            check_seal(sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :], "here")
    for cut in (b"", sealed[:-1], sealed[1:], sealed + b"\n"):
        with pytest.raises(ValueError, match="here is not as it was written"):
            check_seal(cut, "here")


def test_values_are_never_more_than_counted() -> None:
    for value in ([], {}, [[]], {"a": [1, 2, {"b": None}]}, [1, [2, [3]], {"x": {}}], "a,b[", 5):
        text = json.dumps(value).encode()
        check_num_values(text, 1 + text.count(b",") + text.count(b"[") + text.count(b"{"))
    with pytest.raises(ValueError, match="it holds up to 5 values; at most 4 are read"):
        check_num_values(b"[1,2,3,4]", 4)
