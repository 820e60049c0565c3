"""What an output says of its tensors, in four places: headers, index, table, plan. Every tensor once, everywhere."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from stockflow.ahead import map_ahead
from stockflow.checkpoints.files.header import PlacedTensor, TensorSpec, header_bytes, parse_header
from stockflow.checkpoints.files.index import MAX_INDEX_BYTES
from stockflow.checkpoints.files.layout import FIRST_READ_BYTES, folder_of, in_folder
from stockflow.errors import UserError
from stockflow.planning.plan import MergePlan
from stockflow.text.strictjson import check_num_values
from stockflow.verification.files import Output
from stockflow.verification.findings import Finding, quoted
from stockflow.verification.table import Row, decode_apart

MAX_TABLE_BYTES = 256_000_000
MAX_INDEX_VALUES = 4_000_000
MAX_UNPLANNED_ROWS = 1_000_000
"""Rows of a table whose plan cannot be read."""

Placed = Mapping[str, Sequence[PlacedTensor]]
"""Tensors by file."""
Table = Mapping[str, Row]
"""Rows of tensors.parquet by the tensor's name."""


def read_headers(
    output: Output, shards: Sequence[str], pool: ThreadPoolExecutor, num_ahead: int
) -> tuple[Placed, list[Finding]]:
    """Return the tensors of every shard whose header is sound, and what is wrong with the others."""

    def read(key: str) -> list[PlacedTensor] | Finding:
        try:
            return _read_header(output, key)
        except (UserError, ValueError) as error:
            return Finding(key, str(error))

    found = dict(zip(shards, map_ahead(pool, num_ahead, read, shards), strict=True))
    placed = {key: tensors for key, tensors in found.items() if not isinstance(tensors, Finding)}
    return placed, [finding for finding in found.values() if isinstance(finding, Finding)]


def _read_header(output: Output, key: str) -> list[PlacedTensor]:
    head, stamp = output.store.read_head(key, FIRST_READ_BYTES)
    needed = header_bytes(head, stamp.size, key)
    if needed > len(head):
        head, _ = output.store.read_head(key, needed)
    tensors = parse_header(head[:needed], stamp.size, key)
    if output.is_local:
        _open_with_library(output.path(key))
    return in_folder(folder_of(key), tensors)


def _open_with_library(path: str) -> None:
    """Have the safetensors library accept the file too: a second opinion that shares no code with ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"the safetensors library refuses it: {error}") from None


def check_doubles(placed: Placed) -> Iterator[Finding]:
    """Yield the tensors that more than one shard holds."""
    holder: dict[str, str] = {}
    for key, tensors in placed.items():
        for tensor in tensors:
            name = tensor.spec.name
            if name in holder:
                yield Finding(key, f"holds {quoted(name)}, which {holder[name]} holds too")
            holder[name] = key


def by_job(placed: Placed, plan: MergePlan) -> Placed:
    """Return the tensors as the jobs of a plan write them: what several write one after the other, run by run."""
    runs: dict[TensorSpec, list[TensorSpec]] = {}
    for job in plan.jobs:
        for whole, output in zip(job.wholes, job.result.outputs, strict=bool(job.wholes)):
            runs.setdefault(whole, []).append(output)
    if not runs:
        return placed
    return {key: [part for each in tensors for part in _runs(each, runs)] for key, tensors in placed.items()}


def _runs(tensor: PlacedTensor, runs: Mapping[TensorSpec, Sequence[TensorSpec]]) -> Iterator[PlacedTensor]:
    start = tensor.start
    for spec in runs.get(tensor.spec, (tensor.spec,)):
        yield PlacedTensor(spec, start)
        start += spec.num_bytes


def files_by_tensor(placed: Placed) -> dict[str, str]:
    """Return where each tensor was found."""
    return {tensor.spec.name: key for key, tensors in placed.items() for tensor in tensors}


def check_index(output: Output, key: str, found: Mapping[str, str], *, complete: bool) -> Iterator[Finding]:
    """Hold the index against the headers.

    Args:
        output: where it lies.
        key: of the index.
        found: the file of every tensor, by name.
        complete: whether every shard's header could be read.
    """
    try:
        payload = output.read(key, MAX_INDEX_BYTES)
        check_num_values(payload, MAX_INDEX_VALUES)
        index = json.loads(payload)
        stated = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield Finding(key, f"cannot be read: {error}")
        return
    yield from _compare(key, stated, found, complete=complete)


def read_table(output: Output, key: str, plan: MergePlan | None) -> Table | Finding:
    """Return the table of tensors, or why it cannot be read."""
    most = sum(len(job.result.outputs) for job in plan.jobs) if plan else MAX_UNPLANNED_ROWS
    try:
        rows = decode_apart(output.read(key, MAX_TABLE_BYTES), most)
    except UserError as error:
        return Finding(key, f"cannot be read: {error}")
    table = {str(row["name"]): row for row in rows}
    if len(table) < len(rows):
        return Finding(key, f"cannot be read: {len(rows) - len(table):,} of its rows have the name of another")
    return table


def check_table(where: str, table: Table, placed: Placed, *, complete: bool) -> Iterator[Finding]:
    """Hold the table against the headers."""
    stated = {name: str(row["shard"]) for name, row in table.items()}
    yield from _compare(where, stated, files_by_tensor(placed), complete=complete)
    for key, tensors in placed.items():
        for tensor in tensors:
            row, spec = table.get(tensor.spec.name), tensor.spec
            if row and (row["dtype"], row["shape"]) != (spec.dtype, list(spec.shape)):
                yield Finding(
                    key,
                    f"{quoted(spec.name)} is {spec.dtype} {spec.shape}, the table says {(row['dtype'], row['shape'])}",
                )


def check_planned(where: str, table: Table, plan: MergePlan) -> Iterator[Finding]:
    """Hold the table against the plan."""
    unplanned = dict(table)
    for shard in plan.shards:
        for job, spec in ((each, spec) for each in shard.jobs for spec in each.result.outputs):
            row = unplanned.pop(spec.name, None)
            if row is None:
                yield Finding(where, f"has no row for {quoted(spec.name)}, which the plan has")
                continue
            planned = {
                "shard": shard.file, "dtype": spec.dtype, "shape": list(spec.shape),
                "num_elems": spec.num_elems, "method": job.result.method, "scope": job.reading.scope,
            }  # fmt: skip
            for column, value in planned.items():
                if row[column] != value:
                    yield Finding(
                        where,
                        f"says {column} of {quoted(spec.name)} is {quoted(row[column])}, the plan says {quoted(value)}",
                    )
    for name in unplanned:
        yield Finding(where, f"has a row for {quoted(name)}, which the plan does not have")


def check_placed(plan: MergePlan, placed: Placed) -> Iterator[Finding]:
    """Hold the headers against the plan, where there is no table to do both."""
    for shard in plan.shards:
        if shard.file not in placed:
            continue
        found = {tensor.spec for tensor in placed[shard.file]}
        planned = {output for job in shard.jobs for output in job.result.outputs}
        for spec in sorted(planned - found):
            yield Finding(
                shard.file, f"lacks {quoted(spec.name)} of {spec.dtype} {spec.shape}, which the plan puts there"
            )
        for spec in sorted(found - planned):
            yield Finding(
                shard.file, f"holds {quoted(spec.name)} of {spec.dtype} {spec.shape}, which the plan does not"
            )


def _compare(where: str, stated: Mapping[str, str], found: Mapping[str, str], *, complete: bool) -> Iterator[Finding]:
    for name, file in stated.items():
        if found.get(name) != file and (complete or name in found):
            place = found.get(name, "no shard")
            yield Finding(where, f"says {quoted(name)} is in {quoted(file)[1:-1]}, found it in {place}")
    for name in found.keys() - stated.keys():
        yield Finding(where, f"does not list {quoted(name)} of {found[name]}")
