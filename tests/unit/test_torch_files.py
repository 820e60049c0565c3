"""Files of ``torch.save``: every byte where PyTorch finds it, and what cannot be read is refused."""

import io
import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.errors import CheckpointError
from stockflow.storage import LocalStore, StorageConfig, open_model

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def opened(path: Path) -> Checkpoint:
    [checkpoint] = open_checkpoints([open_model(str(path), StorageConfig())])
    return checkpoint


def save(folder: Path, tensors: Any, file: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / file, **options)
    return folder


def stored(folder: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the bytes at the places that were found."""
    return {
        name: (folder / extent.file).read_bytes()[extent.start :][: checkpoint.specs[name].num_bytes]
        for name, extent in checkpoint.extents.items()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def words(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_dtype_lies_where_pytorch_finds_it(protocol: int, tmp_path: Path) -> None:
    bits = torch.arange(1, 25, dtype=torch.uint8)
    tensors = {name: bits.clone().view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    tensors |= {"BOOL": torch.tensor([True, False]), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}

    folder = save(tmp_path, tensors, pickle_protocol=protocol)
    checkpoint = opened(folder)

    assert stored(folder, checkpoint) == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert {name: spec.dtype for name, spec in checkpoint.specs.items() if name in DTYPES} == {n: n for n in DTYPES}
    assert checkpoint.specs["empty"].shape == (0, 3)
    assert checkpoint.specs["scalar"].shape == ()


def test_parameters_tied_tensors_and_views_lie_in_their_storages(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    rows = torch.arange(40.0).reshape(8, 5)
    tensors = OrderedDict(module.state_dict())
    tensors |= {
        "parameter": torch.nn.Parameter(rows),
        "tied": rows,
        "rows": rows[2:5],
        "row": rows[7],
        "cell": rows[3, 4],
    }
    tensors |= {"flat": rows.view(-1), "column": rows[:, :1][:1], "turned": rows[:1].t()}

    folder = save(tmp_path, tensors)
    checkpoint = opened(folder)

    assert stored(folder, checkpoint) == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert checkpoint.extents["tied"] == checkpoint.extents["parameter"] == checkpoint.extents["flat"]
    assert list(checkpoint.extents.values()) == sorted(checkpoint.extents.values()), "in the order of their bytes"
    assert checkpoint.specs["1.num_batches_tracked"].dtype == "I64"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda rows: rows.t(), "of shape [5, 8] and strides [1, 5]"),
        (lambda rows: rows[:, 1:3], "of shape [8, 2] and strides [5, 1]"),
        (lambda rows: rows[:1].expand(3, 5), "of shape [3, 5] and strides [0, 1]"),
    ],
)
def test_tensors_that_are_no_run_of_bytes_are_refused_by_name(
    make: Callable[[torch.Tensor], torch.Tensor], said: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, {"good": torch.ones(2), "bad.weight": make(torch.arange(40.0).reshape(8, 5))})

    message = words(folder)

    assert f"1 tensor is stored transposed, expanded or with gaps, such as 'bad.weight' {said}" in message
    assert ".contiguous()" in message


def test_values_that_are_no_tensors_are_left_out_and_said(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": torch.ones(2), "epoch": 3, "note": "text", "none": None})

    checkpoint = opened(folder)

    assert list(checkpoint.specs) == ["a"]
    [said] = [remark for remark in checkpoint.remarks if remark.code == "no-tensors"]
    assert "3 values that are no tensor of the model, such as 'epoch'" in said.text
    assert said.tensors == ("epoch", "note", "none")


def test_numbered_files_are_read_by_their_index(tmp_path: Path) -> None:
    parts = {
        "pytorch_model-00001-of-00002.bin": {"a": torch.ones(3)},
        "pytorch_model-00002-of-00002.bin": {"b": torch.zeros(2)},
    }
    for file, tensors in parts.items():
        save(tmp_path, tensors, file)
    index = {name: file for file, tensors in parts.items() for name in tensors}

    without = opened(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    checkpoint = opened(tmp_path)

    assert checkpoint.specs == without.specs
    assert {name: extent.file for name, extent in checkpoint.extents.items()} == index
    assert {*checkpoint.files} == {*parts, "pytorch_model.bin.index.json"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "the index names pytorch_model-00002-of-00002.bin, which is not there" in words(tmp_path)


def test_safetensors_win_and_a_file_may_be_named(tmp_path: Path) -> None:
    folder = save(tmp_path, {"old": torch.ones(2)})
    named = opened(folder / "pytorch_model.bin")
    save_file({"variant": torch.ones(2)}, folder / "model.fp16.safetensors")
    beside_variant = opened(folder)
    save_file({"new": torch.ones(2)}, folder / "model.safetensors")
    both = opened(folder)

    assert [list(each.specs) for each in (named, beside_variant, both)] == [["old"], ["old"], ["new"]]
    assert any("pytorch_model.bin is read, and nothing that is in it is run" in str(each) for each in named.remarks)
    left = next(remark for remark in both.remarks if remark.code == "left-out")
    assert left.values["weights in other formats"] == "pytorch_model.bin"


def test_what_is_called_otherwise_is_weights_only_where_it_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": torch.ones(2)}, "training_args.bin")
    save(folder, {"b": torch.ones(2)}, "any.bin")

    with pytest.raises(Exception, match=r"which are read if they are called pytorch_model\.bin, .* name the file if"):
        opened(folder)
    assert list(opened(folder / "any.bin").specs) == ["b"]


# --- what cannot be read


def repacked(folder: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """Write a file of two tensors again with other members."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(folder / "pytorch_model.bin", "w", **options) as new:
        for name in old.namelist():
            if (payload := change(name, old.read(name))) is not None:
                new.writestr(name, payload)
    return folder


def replaced(ending: str, payload: bytes | None) -> Callable[[str, bytes], bytes | None]:
    return lambda name, old: payload if name.endswith(ending) else old


def test_a_file_of_another_zip_writer_is_read(tmp_path: Path) -> None:
    folder = repacked(tmp_path, lambda _, payload: payload)

    assert stored(folder, opened(folder)) == {"a": bytes_of(torch.arange(6.0)), "b": bytes_of(torch.ones(2))}


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    folder = repacked(tmp_path, lambda _, payload: payload, compression=zipfile.ZIP_DEFLATED)

    assert "is compressed or encrypted, and cannot be read by range; load it with PyTorch" in words(folder)


DAMAGED = {
    "no pickle": (replaced("data.pkl", None), "it has no data.pkl"),
    "no member": (replaced("data/1", None), "lies in the member data/1, which is not there"),
    "a short member": (replaced("data/0", bytes(20)), "which has 20 bytes: expected 24"),
    "other order of bytes": (replaced("byteorder", b"big"), "its bytes are in the order b'big', expected little"),
    "a program": (lambda name, old: old.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor__"), "names"),
    "a list": (replaced("data.pkl", b"\x80\x02]."), "holds no mapping from names to tensors"),
    "a number as name": (replaced("data.pkl", b"\x80\x02}K\x01Ns."), "expected each tensor under a name of its own"),
    "half a surrogate": (replaced("data.pkl", b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns."), "under a name of its own"),
    "a name twice": (
        replaced("data.pkl", b"\x80\x02}X\x01\x00\x00\x00aNsX\x01\x00\x00\x00aNs."),
        "under a name of its own, found 'a'",
    ),
    "a cut pickle": (lambda name, old: old[:-9] if name.endswith("data.pkl") else old, "its pickle is damaged at byte"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_contents_that_are_no_model_are_errors(change: Any, message: str, tmp_path: Path) -> None:
    assert message in words(repacked(tmp_path, change))


def described(*arguments: bytes) -> bytes:
    """Return a pickle of one tensor, made from these arguments."""
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + b"".join(arguments) + b"tRs."


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
FOUR = b"\x8a\x08" + struct.pack("<q", 2**62)
TENSORS = {
    "a tensor": (described(STORAGE, b"K\x00", b"K\x06\x85", b"K\x01\x85"), ""),
    "beyond its storage": (described(STORAGE, b"K\x01", b"K\x06\x85", b"K\x01\x85"), "expected 28 there"),
    "far beyond": (described(STORAGE, FOUR, b"K\x06\x85", b"K\x01\x85"), "there"),
    "a huge shape": (described(STORAGE, b"K\x00", (b"(" + FOUR * 60 + b"t"), (b"(" + FOUR * 60 + b"t")), "gaps"),
    "a huge size": (described(STORAGE, b"K\x00", FOUR + b"\x85", b"K\x01\x85"), "there"),
    "many dimensions": (described(STORAGE, b"K\x00", (b"(" + b"K\x01" * 65 + b"t") * 2), "what makes no tensor"),
    "a negative offset": (described(STORAGE, b"J\xff\xff\xff\xff", b"K\x06\x85", b"K\x01\x85"), "what makes no tensor"),
    "a negative size": (described(STORAGE, b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "what makes no tensor"),
    "a true size": (described(STORAGE, b"K\x00", b"\x88\x85", b"K\x01\x85"), "what makes no tensor"),
    "a size of text": (described(STORAGE, b"K\x00", b"X\x01\x00\x00\x006\x85", b"K\x01\x85"), "what makes no tensor"),
    "too few strides": (described(STORAGE, b"K\x00", b"K\x02K\x03\x86", b"K\x01\x85"), "what makes no tensor"),
    "no storage": (described(b"N", b"K\x00", b"K\x06\x85", b"K\x01\x85"), "made by '_rebuild_tensor_v2'"),
    "an id of text": (described(b"X\x01\x00\x00\x00aQ", b"K\x00", b"K\x06\x85", b"K\x01\x85"), "what makes no tensor"),
    "no arguments": (described(), "what makes no tensor"),
    "a function as storage": (
        described(STORAGE.replace(b"ctorch\nFloatStorage", b"ctorch._utils\n_rebuild_tensor"), *[b"K\x00"] * 3),
        "what makes no tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("payload", "message"), TENSORS.values(), ids=TENSORS)
def test_descriptions_of_tensors_are_held_against_their_storages(payload: bytes, message: str, tmp_path: Path) -> None:
    folder = repacked(tmp_path, replaced("data.pkl", payload))

    if message:
        assert message in words(folder)
    else:
        assert stored(folder, opened(folder)) == {"a": bytes_of(torch.arange(6.0))}


def test_tensors_one_level_down_are_refused_by_their_key(tmp_path: Path) -> None:
    folder = save(tmp_path, {"epoch": 1, "model": {"a": torch.ones(2)}})

    assert "tensors lie one level down, under 'model'" in words(folder)


def test_a_state_dict_within_a_file_is_the_model(tmp_path: Path) -> None:
    folder = save(tmp_path, {"epoch": torch.tensor(1), "state_dict": OrderedDict(a=torch.arange(3.0)), "lr": 0.1})

    checkpoint = opened(folder)

    assert stored(folder, checkpoint) == {"a": bytes_of(torch.arange(3.0))}
    assert [each.tensors for each in checkpoint.remarks if each.code == "no-tensors"] == [("epoch", "lr")]


def test_files_of_before_pytorch_1_6_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)

    assert "was written by a PyTorch of before 1.6, in a form that cannot be read by range; load" in words(folder)


def test_a_program_of_torchscript_is_called_so(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "pytorch_model.bin")

    assert "is a program of TorchScript" in words(tmp_path)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"GGUF" + bytes(99), "is a GGUF file"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "is no file of `torch.save`"),
    ],
)
def test_what_lies_under_the_name_is_called_what_it_is(payload: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(payload)

    assert message in words(tmp_path)


# --- the archive


@pytest.fixture
def archive(tmp_path: Path) -> bytearray:
    save(tmp_path, {"a": torch.arange(6.0), "b": torch.ones(2)})
    return bytearray((tmp_path / "pytorch_model.bin").read_bytes())


def test_an_archive_cut_anywhere_is_an_error(archive: bytearray, tmp_path: Path) -> None:
    for length in range(4, len(archive), 41):
        (tmp_path / "pytorch_model.bin").write_bytes(archive[:length])
        assert "fetch it again" in words(tmp_path)


def test_a_changed_byte_never_ends_in_another_error_or_in_bytes_outside(archive: bytearray, tmp_path: Path) -> None:
    path, random = tmp_path / "pytorch_model.bin", np.random.default_rng(0)
    structure = [*range(1100), *range(len(archive) - 900, len(archive))]
    for place in random.choice(structure, 200, replace=False):
        changed = bytearray(archive)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            checkpoint = opened(tmp_path)
        except CheckpointError:
            continue
        for name, extent in checkpoint.extents.items():
            assert 0 <= extent.start <= len(archive) - checkpoint.specs[name].num_bytes


def edited(archive: bytearray, signature: bytes, offset: int, layout: str, value: int) -> bytes:
    changed = bytearray(archive)
    struct.pack_into(layout, changed, changed.rindex(signature) + offset, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("signature", "offset", "layout", "value", "message"),
    [
        (b"PK\5\6", 10, "<H", 3, "its two ends say different things"),
        (b"PK\5\6", 12, "<L", 9, "its two ends say different things"),
        (b"PK\5\6", 16, "<L", 2**31, "its two ends say different things"),
        (b"PK\6\6", 32, "<Q", 3, "its two ends say different things"),
        (b"PK\5\6", 20, "<H", 5, "bytes follow its end"),
        (b"PK\1\2", 8, "<H", 1, "compressed or encrypted"),
        (b"PK\1\2", 10, "<H", 8, "is not where it should be"),
        (b"PK\1\2", 20, "<L", 7, "compressed or encrypted"),
        (b"PK\1\2", 42, "<L", 0, "is not where it should be"),
        (b"PK\1\2", 42, "<L", 2**31, "a member lies beyond its end"),
        (b"PK\1\2", 24, "<L", 2**32 - 1, "a large member has no size"),
        (b"PK\1\2", 28, "<H", 60_000, "its directory"),
    ],
)
def test_directories_that_lie_are_errors(
    archive: bytearray, signature: bytes, offset: int, layout: str, value: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(edited(archive, signature, offset, layout, value))

    assert message in words(tmp_path)


def test_members_may_not_share_bytes(archive: bytearray, tmp_path: Path) -> None:
    """An entry that claims the bytes of its neighbours, as archives that unpack to petabytes have them."""
    place = archive.rindex(b"data/0") - 46 - archive[: archive.rindex(b"data/0")].rindex(b"PK\1\2") % 1
    start = archive.rindex(b"PK\1\2", 0, place + 46)
    size = struct.unpack_from("<L", archive, start + 24)[0] + 64
    for offset in (20, 24):
        struct.pack_into("<L", archive, start + offset, size)
    (tmp_path / "pytorch_model.bin").write_bytes(archive)

    assert "overlaps what follows it" in words(tmp_path)


def test_archives_with_sizes_of_64_bits_are_read(tmp_path: Path) -> None:
    """As every file of more than 4 GiB has them; Python writes them where it is told to."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as member:
                member.write(old.read(name))
    path = tmp_path / "pytorch_model.bin"
    payload = bytearray(path.read_bytes())
    end = payload.rindex(b"PK\5\6")
    count, num_bytes, start = struct.unpack_from("<H2L", payload, end + 10)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, num_bytes, start)
    struct.pack_into("<2H2L", payload, end + 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    path.write_bytes(payload[:end] + wide + locator + payload[end:])

    assert stored(tmp_path, opened(tmp_path)) == {"a": bytes_of(torch.arange(6.0))}
    path.write_bytes(payload[:end] + wide.replace(b"PK\6\6", b"PK\6\0") + locator + payload[end:])
    assert "not where it is said to be" in words(tmp_path)


def test_many_members_take_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, {f"model.layers.{number}.weight": torch.ones(4) for number in range(2000)})
    reads: list[int] = []
    read = LocalStore.read_into
    monkeypatch.setattr(LocalStore, "read_into", lambda *given: (reads.append(given[3].nbytes), read(*given))[1])

    assert len(opened(folder).specs) == 2000
    assert len(reads) < 10
    assert max(reads) < 2**20
