"""plan.json: the plan as it lies in an output, and read back from there."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from stockflow.checkpoints.decodes.joined import Joined
from stockflow.checkpoints.decodes.low_rank import reads_anchor
from stockflow.checkpoints.decodes.records import recorded
from stockflow.checkpoints.decodes.stored import Decode, Plain, RowFill, RowRun, RowRuns, plain
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed, placed_beside, within_rows
from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.scale_rules import RULES
from stockflow.errors import CheckpointError
from stockflow.methods import METHODS, Method
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Scope
from stockflow.planning.experts.projections import Whole, part_of
from stockflow.planning.experts.units import unlike_members
from stockflow.planning.formats import coded
from stockflow.planning.job import COPIES, COPY, TensorJob, copying, merging
from stockflow.planning.operands import Operand
from stockflow.planning.plan import (
    IN_ROWS,
    CheckpointRef,
    MergePlan,
    ShardPlan,
    SideFile,
    WrittenFile,
    canonical_digest,
)
from stockflow.storage import Stamp
from stockflow.text.records import MAX_COUNT, Place, RecordKind, count, parse_record, text
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

UNDIGESTED = ("plan_id", "merge_id", "donor", "skipped", "notes", "remarks")
"""Fields of plan.json that do not enter ``plan_id``: they decide no byte."""
MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class RecordedPlan:
    """A plan read back, and what its file says of itself."""

    plan: MergePlan
    plan_id: str
    merge_id: str
    numerics: int
    """of the version that made it"""
    digest: str
    """what ``plan_id`` must be, computed from the file"""
    copies_digest: str
    """what ``merge_id`` must be"""


def encode(plan: MergePlan) -> bytes:
    """Return plan.json."""
    return json.dumps({"format": KIND.format, **plan.to_json()}, ensure_ascii=False).encode()


def _decode(fields: Mapping[str, Any]) -> RecordedPlan:
    try:
        canonical = {name: value for name, value in fields.items() if name not in UNDIGESTED}
        return RecordedPlan(
            plan=_plan(fields),
            plan_id=text(fields["plan_id"]),
            merge_id=text(fields["merge_id"]),
            numerics=count(fields["numerics"]),
            digest=canonical_digest(canonical),
            copies_digest=canonical_digest(_without_places(canonical)),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        words = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(words[:300]) from None


KIND = RecordKind(
    noun="a plan",
    decode=_decode,
    format="stockflow-plan-1",
    max_bytes=512_000_000,
    max_values=20_000_000,  # 92,000 tensors of nine checkpoints take 5 million
    allows_constants=True,  # as configs do, of which it has one
)
parse = KIND.parse


def read(store: Place, key: str) -> RecordedPlan:
    """Return the plan that an output has under ``key``.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read as one.
    """
    return KIND.read(store, key)


def check_mergeable(jobs: Sequence[TensorJob], where: str) -> None:
    """Hold jobs read back from a file against the declarations of their methods, before anything merges them.

    Raises:
        CheckpointError: one is none that a recipe of this version can lead to.
    """
    for job in jobs:
        problem = _problem(job)
        if problem:
            raise CheckpointError(f"{where} asks for {shown(job.output.name)} what no recipe can: {problem}")
    for problem in unlike_members(jobs):
        raise CheckpointError(f"{where} asks for what no recipe can: {problem}")


def _problem(job: TensorJob) -> str | None:
    """What stands against merging a job, None if nothing does."""
    reading, result = job.reading, job.result
    if job.is_copy:
        return None if _is_copyable(job) else "copies of unlike tensors"
    if result.method not in METHODS:
        return f"the method {shown(result.method)}"
    method = METHODS[result.method]
    num_tuned = len(reading.operands) - method.has_anchor(result.parameters)
    if not method.min_tuned <= num_tuned <= (method.max_tuned or num_tuned):
        return f"{method.name} of {len(reading.operands)} models"
    numbers = [operand.decode.dtype for operand in reading.operands if isinstance(operand.decode, Plain | Joined)]
    if any(DTYPES[dtype].kind != "float" for dtype in (result.dtype, *numbers)):
        return "arithmetic on something else than floating-point numbers"
    if reading.scope not in method.scopes or not reading.num_elems:
        return f"{method.name} with the scope {reading.scope!r} of {reading.num_elems} elements"
    return _wrong_parameter(method, result.parameters, num_tuned) or method.refuses(result.parameters)


def _is_copyable(job: TensorJob) -> bool:
    """Return whether the sources may hold the bytes of the output. Of an empty tensor, a float of any width does."""
    output, operands = job.output, job.reading.operands
    is_empty_float = output.kind == "float" and not output.num_elems
    alike = all(
        dtype == output.dtype or (is_empty_float and DTYPES[dtype].kind == "float") for dtype in job.reading.dtypes
    )
    return alike and (len(operands) == 1 or job.result.method != COPY)


def _wrong_parameter(method: Method, given: Parameters, num_tuned: int) -> str | None:
    shared = {parameter.name: parameter for parameter in method.parameters if not parameter.per_model}
    per_model = {parameter.name for parameter in method.parameters if parameter.per_model}
    if given.shared.keys() != shared.keys() or given.per_model.keys() != per_model:
        return f"{method.name} with the parameters {shown(sorted({*given.shared, *given.per_model}))}"
    for name, values in given.per_model.items():
        if len(values) != num_tuned or not all(map(math.isfinite, values)):
            return f"{method.name} with {len(values)} values of {name!r} for {num_tuned} models"
    wrong = [name for name, parameter in shared.items() if not _fits(parameter, given.shared[name])]
    return f"{method.name} with {wrong[0]!r} = {shown(given.shared[wrong[0]])}" if wrong else None


def _fits(parameter: Parameter, value: object) -> bool:
    if parameter.kind == "flag":
        return isinstance(value, bool) or value in parameter.choices
    if parameter.kind == "word":
        return value in parameter.choices
    if parameter.kind == "integer":
        return type(value) is int and abs(value) <= MAX_COUNT
    return type(value) in (int, float) and abs(float(str(value))) < math.inf


def _plan(fields: Mapping[str, Any]) -> MergePlan:
    settings = [_setting(*setting) for setting in fields["settings"]]
    checkpoints = tuple(map(_checkpoint, fields["checkpoints"]))
    rows = [_row_map(*each) for each in fields.get("rows", ())]
    maps = _Tables(checkpoints, rows, list(map(recorded, fields.get("decodes", ()))))
    if fields["on_nonfinite"] not in ("error", "propagate"):
        raise ValueError(f"on_nonfinite is {fields['on_nonfinite']!r}")
    return MergePlan(
        checkpoints=checkpoints,
        donor=count(fields["donor"]),
        shards=tuple(_shard(shard, settings, maps) for shard in fields["shards"]),
        side_files=tuple(
            SideFile(_below(number, len(checkpoints)), text(key), Stamp(count(size), text(version)))
            for number, key, size, version in fields["side_files"]
        ),
        written_files=tuple(
            WrittenFile(text(key), count(size), text(digest)) for key, size, digest in fields.get("written_files", ())
        ),
        config=fields["config"],
        on_nonfinite=fields["on_nonfinite"],
        skipped=tuple(map(text, fields["skipped"])),
        remarks=tuple(parse_record(Remark, each) for each in fields.get("remarks", ())),
        is_stacked=fields.get("stacked") is True,
    )


Setting = tuple[str, Any, Parameters]
"""Method, scope and parameters."""


def _setting(method: str, scope: str, shared: Mapping[str, Any], per_model: Mapping[str, Sequence[float]]) -> Setting:
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}")
    values = {text(name): tuple(map(float, each)) for name, each in per_model.items()}
    return text(method), scope, Parameters(dict(shared.items()), values)


def _checkpoint(fields: Mapping[str, Any]) -> CheckpointRef:
    files = {key: Stamp(count(size), text(version)) for key, (size, version) in fields["files"].items()}
    return CheckpointRef(text(fields["url"]), files)


def _row_map(num_rows: int, runs: Sequence[Sequence[int]], fills: Sequence[Any]) -> RowRuns:
    filled = tuple(RowFill(count(start), count(stop), tuple(map(count, of))) for start, stop, of in fills)
    return RowRuns(count(num_rows), tuple(RowRun(*map(count, run)) for run in runs), filled)


def _shard(
    fields: Mapping[str, Any],
    settings: Sequence[Setting],
    maps: "_Tables",
) -> ShardPlan:
    jobs = [_job(row, settings, maps) for row in fields["tensors"]]
    for whole in fields.get("wholes", ()):
        _join(jobs, *whole)
    shard = ShardPlan(text(fields["file"]), tuple(jobs))
    if fields["num_bytes"] != shard.num_bytes:
        raise ValueError(f"{shard.file!r} takes {shard.num_bytes:,} bytes, num_bytes says {fields['num_bytes']!r}")
    return shard


@dataclass(frozen=True, slots=True)
class _Tables:
    """What operands refer to by number."""

    checkpoints: Sequence[CheckpointRef]
    rows: Sequence[RowRuns]
    decodes: Sequence[Decode]


def _join(
    jobs: list[TensorJob], name: object, shape: Sequence[object], first: object, num: object, *layout: object
) -> None:
    """Have jobs write one tensor, run by run or beside each other; of codes, that and the one of their scales."""
    start, stop = count(first), count(first) + count(num)
    parts = jobs[start:stop]
    scales = [TensorSpec(text(own), text(dtype), tuple(map(count, sizes))) for own, dtype, sizes in _lists(layout)]
    wholes = (TensorSpec(text(name), parts[0].output.dtype, tuple(map(count, shape))), *scales)
    written = list(zip(*(job.result.outputs for job in parts), strict=True))
    held = [({output.dtype for output in each}, sum(output.num_bytes for output in each)) for each in written]
    expected = [({whole.dtype}, whole.num_bytes) for whole in wholes]
    if held != expected or len(parts) != stop - start or any(job.whole for job in parts):
        raise ValueError(f"the {stop - start} tensors from number {start} on do not make up {wholes}")
    if scales:
        jobs[start:stop] = [part_of(job, Whole(wholes[0], codes=wholes)) for job in _in_turn(parts)]
        return
    jobs[start:stop] = [
        part_of(job, Whole(wholes[0], encode)) for job, encode in zip(parts, _encodes(parts, *layout), strict=True)
    ]


def _lists(values: Sequence[object]) -> list[list[Any]]:
    return [each for each in values if isinstance(each, list)]


def _in_turn(jobs: Sequence[TensorJob]) -> Sequence[TensorJob]:
    """Return jobs that write codes of one tensor.

    Raises:
        ValueError: they are stored in several ways, or not beside those that they say.
    """
    encodes = [job.result.encode for job in jobs]
    num = placed_beside(encodes[:1])[1] or 1
    first = encodes[0]
    in_turn = [replace(first, number=number) if isinstance(first, ByRows) else first for number in range(num)]
    is_whole = len(jobs) % num == 0 and len({job.reading.shape for job in jobs}) == 1 and bool(jobs[0].result.rule)
    if not is_whole or encodes != in_turn * (len(jobs) // num):
        raise ValueError(f"{len(jobs)} tensors are not stored in turn as {encodes[0]!r}"[:300])
    return jobs


def _encodes(jobs: Sequence[TensorJob], *layout: object) -> Sequence[Transposed | ByRows | None]:
    """Return how jobs store what they write of one tensor.

    Raises:
        ValueError: no matrices of one shape can be stored so.
    """
    if not layout:
        return [None] * len(jobs)
    num_beside, by_turns = layout
    each = count(num_beside)
    is_possible = each >= 1 and len(jobs) % each == 0 and len({job.output.shape for job in jobs}) == 1
    is_possible = is_possible and len(jobs[0].output.shape) == 2
    if is_possible and by_turns == IN_ROWS:
        return [ByRows(plain(job.output.dtype), number % each, each) for number, job in enumerate(jobs)]
    if not is_possible or not isinstance(by_turns, bool):
        raise ValueError(f"{len(jobs)} tensors are not stored beside each other as {layout!r}")
    return [Transposed(job.output.dtype, number % each, each, by_turns) for number, job in enumerate(jobs)]


def _job(row: Sequence[Any], settings: Sequence[Setting], maps: _Tables) -> TensorJob:
    name, written, shape, number, stored_as, *places = row
    rule, encode, outputs = written if isinstance(written, list) else ("", None, [])
    dtype = written if encode is None else "F32"
    sizes = tuple(map(count, shape))
    given = [each if isinstance(each, list) else (each,) for each in stored_as]
    dtypes = {source_dtype for source_dtype, *_ in given}
    if len(sizes) > MAX_DIMENSIONS or not {dtype, *dtypes} <= DTYPES.keys() or not dtypes:
        raise ValueError(f"tensor {name!r} has the dtypes {stored_as!r} and {dtype!r} and {len(sizes)} dimensions")
    method, scope, parameters = settings[_below(number, len(settings))]
    operands = tuple(
        _operand(TensorSpec(text(name), source_dtype, sizes), numbers, place, maps, len(places))
        for (source_dtype, *numbers), place in zip(given, places, strict=True)
    )
    if reads_anchor(operands[0].decode) or any(each.rows and reads_anchor(each.decode) for each in operands):
        raise ValueError(f"tensor {name!r} has an anchor that is read as another operand, or by rows of its own")
    output = TensorSpec(name, dtype, sizes)
    if method in COPIES and all(isinstance(operand.decode, Plain | Joined) for operand in operands):
        return copying(output, operands, method)
    job = merging(output, operands, method, parameters, scope)
    if encode is None:
        return job
    return _coded(job, text(rule), maps.decodes[_below(encode, len(maps.decodes))], outputs)


def _coded(job: TensorJob, rule: str, encode: Decode, outputs: Sequence[Any]) -> TensorJob:
    specs = tuple(TensorSpec(text(name), text(dtype), tuple(map(count, shape))) for name, dtype, shape in outputs)
    sizes = [found.stop for found in within_rows(encode).ranges(job.reading.shape, 0, job.reading.num_elems)]
    if rule not in RULES or not {spec.dtype for spec in specs} <= DTYPES.keys():
        raise ValueError(f"{job.output.name!r} is written in codes by {rule!r} as {outputs!r}")
    if [spec.num_bytes for spec in specs] != sizes:
        raise ValueError(f"{job.output.name!r} has codes and scales of {sizes} bytes, the outputs are {outputs!r}")
    return coded(job, specs, encode, rule)


def _operand(
    spec: TensorSpec, numbers: Sequence[int | None], place: Sequence[Any], maps: _Tables, num_operands: int
) -> Operand:
    rows_number, decode_number = (*numbers, None, None)[:2]
    rows = None if rows_number is None else maps.rows[_below(rows_number, len(maps.rows))]
    decode = plain(spec.dtype) if decode_number is None else maps.decodes[_below(decode_number, len(maps.decodes))]
    checkpoint, file, start, *more = place
    own, others = [each for each in more if isinstance(each, str)], [each for each in more if isinstance(each, list)]
    shape = spec.shape
    if rows is not None:
        ends = [run.to + run.stop - run.start for run in rows.runs[-1:]] + [fill.stop for fill in rows.fills[-1:]]
        if max((*ends, 0)) > shape[0] or any(max(fill.of) >= num_operands for fill in rows.fills):
            raise ValueError(f"tensor {spec.name!r} has rows beyond its {shape[0]:,}, or of models beyond its own")
        shape = (rows.num_source_rows, *shape[1:])
    if isinstance(decode, Joined) and decode.ends[-1] != math.prod(shape):
        raise ValueError(f"tensor {spec.name!r} has {math.prod(shape):,} elements, and {decode.ends[-1]:,} are read")
    extents = tuple(Extent(text(key), count(at)) for key, at in ([file, start], *others))
    files = maps.checkpoints[_below(checkpoint, len(maps.checkpoints))].files
    for extent, needed in zip(extents, decode.ranges(shape, 0, math.prod(shape)), strict=True):
        size = files[extent.file].size
        if extent.start + needed.stop > size:
            raise ValueError(f"tensor {spec.name!r} ends beyond the {size:,} bytes of {extent.file!r}")
    return Operand(checkpoint, text(*own) if own else spec.name, extents, decode, rows)


def _without_places(canonical: Mapping[str, Any]) -> dict[str, object]:
    """What ``merge_id`` is the digest of: the same without locations and stamps."""
    shards = [{**shard, "tensors": list(map(_without_place, shard["tensors"]))} for shard in canonical["shards"]]
    return {
        **canonical,
        "checkpoints": len(canonical["checkpoints"]),
        "side_files": [side[:2] for side in canonical["side_files"]],
        "shards": shards,
    }


def _without_place(row: Sequence[Any]) -> list[object]:
    """A job's row without files and offsets; the names that operands of stacked layers have stay."""
    named = [[place[0], *(each for each in place[3:] if isinstance(each, str))] for place in row[5:]]
    return [*row[:5], *(place for place in named if len(place) > 1)]


def _below(value: object, stop: int) -> int:
    number = count(value)
    if number >= stop:
        raise IndexError(f"{number} is not below {stop}")
    return number
