"""Checkpoints of torch.distributed: every element where PyTorch finds it, and what cannot be read is refused."""

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _extension
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from stockflow.checkpoints.decodes.joined import Joined
from stockflow.checkpoints.files.layout import Extent, Pieces
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.errors import CheckpointError, NotFoundError, UserError
from stockflow.storage import LocalStore, StorageConfig, open_model
from tests.distributed_checkpoints import Chunk, rows, save_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = {
    "layers.0.weight": torch.arange(42.0).reshape(7, 6),
    "norm": torch.arange(5).to(torch.bfloat16),
    "steps": torch.arange(10),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


def opened(folder: Path) -> Checkpoint:
    [checkpoint] = open_checkpoints([open_model(str(folder), StorageConfig())])
    return checkpoint


def stored(folder: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the bytes at the places that were found, run by run."""
    found = {}
    for name, spec in checkpoint.specs.items():
        pieces = checkpoint.joined.get(name)
        if pieces is None:
            extent = checkpoint.extents[name]
            found[name] = (folder / extent.file).read_bytes()[extent.start :][: spec.num_bytes]
            continue
        ranges = pieces.decode.ranges(spec.shape, 0, spec.num_elems)
        found[name] = b"".join(
            (folder / extent.file).read_bytes()[extent.start + first : extent.start + last]
            for extent, (first, last) in zip(pieces.extents, ranges, strict=True)
        )
    return found


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: each.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, each in tensors.items()}


def words(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder)
    return str(caught.value)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 50])
def test_every_element_lies_where_pytorch_finds_it(num_ranks: int, tmp_path: Path) -> None:
    folder = save_distributed(tmp_path, TENSORS, num_ranks)
    read = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(read, checkpoint_id=folder, no_dist=True)

    checkpoint = opened(folder)

    assert stored(folder, checkpoint) == bytes_of(TENSORS) == bytes_of(read)
    assert {name: spec.shape for name, spec in checkpoint.specs.items()} == {n: t.shape for n, t in TENSORS.items()}
    assert all(len(each.extents) > 1 for each in checkpoint.joined.values())


def test_what_pytorch_saves_by_itself_is_read(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(7, 6)}}, "param_groups": [{"lr": 0.1}]}
    state = {"model": dict(TENSORS), "optimizer": optimizer, "step": 5, "rng_state": torch.arange(3)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)

    checkpoint = opened(tmp_path)

    assert stored(tmp_path, checkpoint) == bytes_of(TENSORS)
    [said] = [remark for remark in checkpoint.remarks if remark.code == "no-tensors"]
    assert set(said.tensors) == {"optimizer.state.0.exp_avg", "optimizer.param_groups.0.lr", "step", "rng_state"}
    assert "4 values that are no tensor of the model" in said.text


def test_extra_states_are_left_out_and_said(tmp_path: Path) -> None:
    tensors = TENSORS | {"decoder.attn._extra_state": torch.ones(4, dtype=torch.uint8)}
    checkpoint = opened(save_distributed(tmp_path, tensors, values={"decoder.mlp._extra_state/shard_0_1": b"x"}))

    assert checkpoint.specs.keys() == TENSORS.keys()
    [said] = [remark for remark in checkpoint.remarks if remark.code == "no-tensors"]
    assert "2 values that are no tensor of the model" in said.text


@pytest.mark.parametrize(
    ("around", "names"),
    [((), "layers.0.weight"), (("model",), "layers.0.weight"), (("app", "model"), "layers.0.weight"),
     (("ema",), "ema.layers.0.weight"), (("state_dict",), "layers.0.weight")],
)  # fmt: skip
def test_tensors_have_the_names_that_they_have_in_the_model(
    around: tuple[str, ...], names: str, tmp_path: Path
) -> None:
    assert names in opened(save_distributed(tmp_path, TENSORS, around=around)).specs


@pytest.mark.parametrize("flat", [False, True])
def test_keys_beside_the_model_are_left_out_and_said(flat: bool, tmp_path: Path) -> None:
    """As torchtitan, accelerate and Megatron save them."""
    names = ("optimizer.state.exp_avg.layers.0.weight", "chained_0.optimizer.state.step.x")
    beside = {name: torch.ones(2) for name in names}
    if flat:
        folder = save_distributed(tmp_path, TENSORS | beside)
    else:
        dcp.save({"app": {"model": dict(TENSORS), "optim": {"x": torch.ones(2)}}, "ema": dict(TENSORS), "epoch": 3},
                 checkpoint_id=tmp_path, no_dist=True)  # fmt: skip
        folder = tmp_path

    checkpoint = opened(folder)

    assert checkpoint.specs.keys() == TENSORS.keys()
    [said] = [remark for remark in checkpoint.remarks if remark.code == "no-tensors"]
    assert len(said.tensors) == (len(beside) if flat else 2 + len(TENSORS))


def test_names_of_modules_are_no_keys_of_a_run(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3) for name in ("scheduler.weight", "step.bias", "optimizer.weight", "model.step")}

    assert opened(save_distributed(tmp_path, tensors)).specs.keys() == tensors.keys()


@pytest.mark.parametrize("cut", ["a.weight", "a.weight_scale_inv", "a.input_scale"])
def test_codes_and_scales_in_shards_are_refused_by_name(cut: str, tmp_path: Path) -> None:
    """Those that are whole are read."""
    tensors = {
        "a.weight": torch.ones(256, 128).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 1),
        "a.input_scale": torch.ones(2),
    }
    whole: dict[str, list[Chunk]] = {name: [((0,) * each.dim(), each)] for name, each in tensors.items()}
    checkpoint = opened(save_distributed(tmp_path / "whole", tensors, chunks=whole))

    assert checkpoint.stored.keys() == {"a.weight"}
    message = words(save_distributed(tmp_path / "cut", tensors, chunks={k: v for k, v in whole.items() if k != cut}))
    assert "in shards, which is not read; join them" in message


def columns(tensor: torch.Tensor) -> list[Chunk]:
    return [((0, 0), tensor[:, :2].contiguous()), ((0, 2), tensor[:, 2:].contiguous())]


def test_tensors_in_columns_are_refused_by_name(tmp_path: Path) -> None:
    weight = TENSORS["layers.0.weight"]
    message = words(save_distributed(tmp_path, TENSORS, chunks={"layers.0.weight": columns(weight)}))

    assert "tensor 'layers.0.weight' of shape [7, 6] is in 2 chunks such as [7, 2] at [0, 0]" in message
    assert "dcp_to_torch" in message


@pytest.mark.parametrize(
    "chunks",
    [
        lambda tensor: rows(tensor, 3)[:-1],
        lambda tensor: rows(tensor, 3)[1:],
        lambda tensor: [*rows(tensor, 3)[:-1], ((5, 0), tensor[5:])],
        lambda tensor: [((0, 0), tensor[:3]), ((4, 0), tensor[4:])],
    ],
    ids=["no end", "no beginning", "twice", "a gap"],
)
def test_tensors_that_are_not_whole_are_refused_by_name(chunks: Callable[..., Any], tmp_path: Path) -> None:
    weight = TENSORS["layers.0.weight"]
    message = words(save_distributed(tmp_path, TENSORS, chunks={"layers.0.weight": chunks(weight)}))

    assert "tensor 'layers.0.weight' of shape [7, 6] is in" in message
    assert "not its elements one after the other" in message


def test_single_elements_and_planes_are_runs_too(tmp_path: Path) -> None:
    """Of a tensor of three dimensions, cut in the second one where the first is of one."""
    cube, matrix = torch.arange(24.0).reshape(1, 6, 4), torch.arange(6.0).reshape(2, 3)
    chunks: dict[str, list[Chunk]] = {
        "cube": [((0, 0, 0), cube[:, :2].contiguous()), ((0, 2, 0), cube[:, 2:].contiguous())],
        "matrix": [((i, j), matrix[i : i + 1, j : j + 1].contiguous()) for i in range(2) for j in range(3)],
    }
    folder = save_distributed(tmp_path, {"cube": cube, "matrix": matrix}, 6, chunks=chunks)

    assert stored(folder, opened(folder)) == bytes_of({"cube": cube, "matrix": matrix})


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    folder = save_distributed(tmp_path, TENSORS)
    (folder / "__1_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes()[:2000])
    cut = words(folder)
    (folder / "__1_0.distcp").unlink()

    assert "__1_0.distcp is 2,000 bytes long, and the metadata says that" in cut
    assert "it was cut: fetch it again" in cut
    assert "the metadata names __1_0.distcp, which is not there; with parts of tensors such as" in words(folder)


def test_files_of_other_checkpoints_are_found_out(tmp_path: Path) -> None:
    ours = save_distributed(tmp_path / "ours", TENSORS)
    others = save_distributed(tmp_path / "others", {"layers.0.weight": torch.ones(7, 6, dtype=torch.float64), **TENSORS}
                              | {"layers.0.weight": torch.arange(42).reshape(7, 6).to(torch.int32)})  # fmt: skip
    (ours / "__0_0.distcp").write_bytes((others / "__0_0.distcp").read_bytes())

    assert "where the metadata says that it is F32 [3, 6] of 'layers.0.weight'; fetch the folder again" in words(ours)


# --- metadata


def changed(folder: Path, change: Callable[[Metadata], object]) -> Path:
    """Write the metadata of a checkpoint again."""
    metadata = pickle.loads((save_distributed(folder, TENSORS) / ".metadata").read_bytes())
    found = change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(found if found is not None else metadata))
    return folder


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    "put",
    [
        lambda metadata, bad: bad,
        lambda metadata, bad: metadata.storage_data.update({MetadataIndex("x"): bad}),
        lambda metadata, bad: metadata.state_dict_metadata.update({"x": bad}),
        lambda metadata, bad: replace(metadata, storage_meta=bad),
        lambda metadata, bad: replace(metadata, planner_data={"x": (bad,)}),
    ],
)
def test_nothing_that_metadata_names_is_run(put: Callable[..., Any], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = changed(tmp_path / "model", lambda metadata: put(metadata, Hostile(f"touch {marker}")))

    assert ".metadata: its pickle names 'posix.system', which is not part of" in words(folder)
    assert not marker.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert marker.exists(), "it was hostile"


def of(metadata: Metadata, name: str = "layers.0.weight") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def set_in(name: str, value: object) -> Callable[[Metadata], None]:
    return lambda metadata: setattr(of(metadata), name, value)


def first_chunk(metadata: Metadata, **fields: Any) -> None:
    chunks = metadata.state_dict_metadata["layers.0.weight"].chunks
    chunks[0] = ChunkStorageMetadata(**({"offsets": chunks[0].offsets, "sizes": chunks[0].sizes} | fields))


LIES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a file elsewhere": (set_in("relative_path", "../other/__0_0.distcp"), "names the file '../other/__0_0.distcp'"),
    "an absolute file": (set_in("relative_path", "/etc/passwd"), "names the file '/etc/passwd'"),
    "a file of none": (set_in("relative_path", "x.distcp"), "names x.distcp, which is not there"),
    "a place beyond": (set_in("offset", 2**40), "it was cut: fetch it again"),
    "a negative place": (set_in("offset", -1), "describes no checkpoint that is known"),
    "no size": (set_in("length", 0), "is empty"),
    "a size too short": (set_in("length", 500), "is a damaged zip archive"),
    "a place within": (set_in("offset", 5), "is no file of `torch.save`"),
    "a compressed chunk": (
        set_in("transform_descriptors", [_extension.ZStandard.registry_name()]), "are compressed or changed"
    ),
    "a chunk elsewhere": (lambda metadata: first_chunk(metadata, offsets=torch.Size((1, 0))), "not its elements one"),
    "a chunk too large": (lambda metadata: first_chunk(metadata, sizes=torch.Size((9, 6))), "not its elements one"),
    "a chunk of other rank": (lambda metadata: first_chunk(metadata, sizes=torch.Size((18,))), "not its elements"),
    "a chunk that nobody wrote": (
        lambda metadata: metadata.storage_data.pop(MetadataIndex("norm", torch.Size((2,)))), "describes no checkpoint"
    ),
    "another shape": (
        lambda metadata: setattr(metadata.state_dict_metadata["norm"], "size", torch.Size((6,))), "not its elements one"
    ),
    "another dtype": (
        lambda metadata: setattr(metadata.state_dict_metadata["norm"].properties, "dtype", torch.float16),
        "where the metadata says that it is F16",
    ),
    "a dtype of none": (
        lambda metadata: setattr(metadata.state_dict_metadata["norm"].properties, "dtype", torch.complex128),
        "'norm' is of torch.complex128, which safetensors do not have",
    ),
    "a list": (lambda metadata: [1, 2], "describes no checkpoint that is known"),
    "no storage": (lambda metadata: replace(metadata, storage_data=None), "describes no checkpoint that is known"),
    "names that are none": (lambda metadata: metadata.state_dict_metadata.update({3: None}), "describes no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_metadata_that_lies_is_an_error(change: Callable[[Metadata], Any], message: str, tmp_path: Path) -> None:
    def applied(metadata: Metadata) -> object:
        found = change(metadata)
        return found if isinstance(found, list | Metadata) else None

    assert message in words(changed(tmp_path, applied))


def test_metadata_cut_or_changed_anywhere_is_never_another_error(tmp_path: Path) -> None:
    folder = save_distributed(tmp_path, TENSORS)
    payload = (folder / ".metadata").read_bytes()
    for place in range(0, len(payload), 97):
        for damaged in (payload[:place], payload[:place] + bytes([payload[place] ^ 4]) + payload[place + 1 :]):
            (folder / ".metadata").write_bytes(damaged)
            try:
                checkpoint = opened(folder)
            except (CheckpointError, NotFoundError):
                continue
            assert stored(folder, checkpoint).keys() <= {*bytes_of(TENSORS), *checkpoint.specs}


def test_files_without_metadata_are_no_checkpoint(tmp_path: Path) -> None:
    folder = save_distributed(tmp_path, TENSORS)
    (folder / ".metadata").unlink()

    assert "__0_0.distcp and 2 more are of a distributed checkpoint of PyTorch (DCP), and its .metadata is" in words(
        folder
    )


def test_many_chunks_take_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_distributed(tmp_path, {f"layers.{number}.weight": torch.ones(8, 4) for number in range(300)}, 2)
    reads: list[int] = []
    read = LocalStore.read_into
    monkeypatch.setattr(LocalStore, "read_into", lambda *given: (reads.append(given[3].nbytes), read(*given))[1])

    assert len(opened(folder).joined) == 300
    assert len(reads) < 10
    assert max(reads) <= 2**20


# --- what joins them


def test_runs_of_elements_are_found_in_their_extents() -> None:
    joined = Joined("BF16", (3, 3, 10, 11))

    assert joined.ranges((11,), 0, 11) == ((0, 6), (0, 0), (0, 14), (0, 2))
    assert joined.ranges((11,), 2, 4) == ((4, 6), (0, 0), (0, 2), (0, 0))
    assert joined.ranges((11,), 5, 5) == ((0, 0),) * 4
    assert replace(joined, is_verbatim=True).ranges((22,), 5, 8) == ((5, 6), (0, 0), (0, 2), (0, 0))
    for start in range(11):
        for stop in range(start, 12):
            found = [
                number * 100 + at for number, first, last in joined.within(start, stop) for at in range(first, last)
            ]
            assert found == [*range(3), *range(200, 207), 300][start:stop]


def test_a_part_of_what_is_joined_is_joined() -> None:
    pieces = Pieces(Joined("F32", (4, 8, 12)), (Extent("a", 100), Extent("b", 7), Extent("c", 0)))

    assert pieces.part(2, 9) == Pieces(Joined("F32", (2, 6, 7)), (Extent("a", 108), Extent("b", 7), Extent("c", 0)))
    assert pieces.part(4, 8) == Pieces(Joined("F32", (4,)), (Extent("b", 7),))


def _rank(rank: int, world: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    tensors = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor
        for name, tensor in TENSORS.items()
    }
    dcp.save({"model": tensors}, checkpoint_id=folder)
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_ranks_of_gloo_save_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.multiprocessing.spawn(_rank, args=(3, str(folder)), nprocs=3)

    checkpoint = opened(folder)

    assert stored(folder, checkpoint) == bytes_of(TENSORS)
    assert "layers.0.weight" in checkpoint.joined
