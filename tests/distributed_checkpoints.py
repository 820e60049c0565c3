"""Checkpoints of ``torch.distributed.checkpoint`` as ranks write them, made by PyTorch's own writer in one process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Chunk = tuple[tuple[int, ...], torch.Tensor]
"""Where a part of a tensor begins, and the part."""


class _Planner:
    """What the writer asks for the data of an item."""

    def __init__(self, chunks: Mapping[tuple[str, tuple[int, ...]], Any]) -> None:
        self._chunks = chunks

    def resolve_data(self, item: WriteItem) -> Any:
        offset = item.index.offset
        return self._chunks[item.index.fqn, tuple(offset) if offset is not None else ()]


def rows(tensor: torch.Tensor, num_ranks: int) -> list[Chunk]:
    """Return what each rank has of a tensor that is sharded along its first dimension; some may have nothing."""
    if not tensor.dim():
        return [((), tensor)]
    parts, chunks, at = tensor.chunk(num_ranks), [], 0
    for part in parts:
        chunks.append(((at, *(0,) * (tensor.dim() - 1)), part))
        at += len(part)
    return chunks


def save_distributed(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    num_ranks: int = 3,
    *,
    chunks: Mapping[str, Sequence[Chunk]] | None = None,
    values: Mapping[str, bytes] | None = None,
    around: Sequence[str] = (),
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        folder: created if it does not exist.
        tensors: by name.
        num_ranks: every rank writes one file.
        chunks: what tensors are cut into, rank by rank; the others along their first dimension.
        values: bytes by name, as optimizers and extra states have them.
        around: keys under which the tensors are saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items, data = [list[WriteItem]() for _ in range(num_ranks)], dict[tuple[str, tuple[int, ...]], Any]()
    paths = dict[str, tuple[str, ...]]()
    for number, (name, tensor) in enumerate(tensors.items()):
        key = ".".join((*around, name))
        paths[key] = (*around, name)
        for rank, (offsets, part) in enumerate((chunks or {}).get(name) or rows(tensor, num_ranks)):
            chunk = ChunkStorageMetadata(torch.Size(offsets), part.size())
            written = TensorWriteData(chunk, TensorProperties.create_from_tensor(part), tensor.size())
            index = MetadataIndex(key, torch.Size(offsets), rank)
            items[(rank + number) % num_ranks].append(WriteItem(index, WriteItemType.SHARD, tensor_data=written))
            data[key, tuple(offsets)] = part
    for key, value in (values or {}).items():
        import io

        items[0].append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        data[key, ()] = io.BytesIO(value)
        paths[key] = tuple(key.split("/"))
    writer, planner = FileSystemWriter(folder), _Planner(data)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan([SavePlan(each) for each in items])
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, planner).wait() for plan in plans]  # type: ignore[arg-type]
    metadata.planner_data = paths
    writer.finish(metadata, results)
    return folder
