"""The plan: the recipe made exact. What is read, how it is merged, what is written where.

Nothing of memory, workers, device, executor or clock is in a plan: equal plans give equal bytes.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal

from stockflow.checkpoints.beside.side_files import is_tokenizer_or_template
from stockflow.checkpoints.decodes.records import described
from stockflow.checkpoints.decodes.stored import Decode, RowRuns
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed, is_beside
from stockflow.checkpoints.files.candidates import index_of
from stockflow.checkpoints.files.header import TensorSpec, encode_header
from stockflow.checkpoints.files.layout import folder_of
from stockflow.methods.protocol import Elementwise, Scope
from stockflow.planning.job import TensorJob
from stockflow.planning.operands import Operand
from stockflow.planning.working_precision import float_bits_of
from stockflow.storage import Stamp, redact
from stockflow.text.records import as_plain
from stockflow.text.remarks import Remark

NUMERICS = 6
"""Bumped with any change of a golden digest."""
IN_ROWS = "rows"
"""Where a plan says whether columns are by turns: rows are."""
SHARD_METADATA = {"format": "pt"}

OnNonfinite = Literal["error", "propagate"]


@dataclass(frozen=True)
class ShardPlan:
    """One output file: the unit of work of an executor."""

    file: str
    jobs: tuple[TensorJob, ...]

    @property
    def outputs(self) -> Iterator[TensorSpec]:
        """The tensors of the file, in order."""
        last = None
        for job in self.jobs:
            if not job.wholes:
                yield from job.result.outputs
            elif job.whole != last:
                yield from job.wholes
            last = job.whole

    @property
    def folder(self) -> str:
        """Of the module whose weights these are, empty for the model's own."""
        return folder_of(self.file)

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file, in which tensors of a module have the names that they have within it."""
        inside = f"{self.folder}/"
        stored = (spec._replace(name=spec.name.removeprefix(inside)) for spec in self.outputs)
        return encode_header(stored if self.folder else self.outputs, SHARD_METADATA)

    @cached_property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(job.result.num_bytes for job in self.jobs)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of all sources, each counted once."""
        return sum(job.reading.num_bytes for job in self.jobs)


@dataclass(frozen=True)
class CheckpointRef:
    """An input of the merge and the state of its files."""

    url: str
    files: Mapping[str, Stamp]


def merged_among(checkpoints: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Return the inputs of a merge, but for one of which only the tokenizer is read."""
    return tuple(each for each in checkpoints if not all(map(is_tokenizer_or_template, each.files)))


@dataclass(frozen=True)
class SideFile:
    """A file the output takes over from an input."""

    checkpoint: int
    key: str
    stamp: Stamp


@dataclass(frozen=True)
class WrittenFile:
    """A small file of the output that is made while planning."""

    key: str
    size: int
    sha256: str
    payload: bytes = field(default=b"", repr=False, compare=False)
    """none in a plan that was read back"""

    @classmethod
    def of(cls, key: str, payload: bytes) -> "WrittenFile":
        """Return the file that holds these bytes."""
        return cls(key, len(payload), hashlib.sha256(payload).hexdigest(), payload)


@dataclass(frozen=True)
class MergePlan:
    """Everything that decides the bytes of the output."""

    checkpoints: tuple[CheckpointRef, ...]
    donor: int
    """index of the checkpoint that gave names, order and config"""
    shards: tuple[ShardPlan, ...]
    side_files: tuple[SideFile, ...]
    config: Mapping[str, object] | None
    on_nonfinite: OnNonfinite
    skipped: tuple[str, ...]
    """tensors left out because a rule says so"""
    remarks: tuple[Remark, ...] = ()
    """what the user should know before starting"""
    is_stacked: bool = False
    """whether tensors have other names in the inputs than in the output"""
    written_files: tuple[WrittenFile, ...] = ()

    @property
    def models(self) -> Sequence[CheckpointRef]:
        """The checkpoints that are merged."""
        return merged_among(self.checkpoints)

    @property
    def indexed(self) -> tuple[ShardPlan, ...]:
        """The shards that an index lists: none if the model is one file; those of modules are in none."""
        own = tuple(shard for shard in self.shards if not shard.folder)
        return own if len(own) > 1 else ()

    @property
    def index_file(self) -> str:
        """Name of the index that lists them."""
        return index_of(self.indexed[0].file)

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks in words."""
        return tuple(map(str, self.remarks))

    @cached_property
    def plan_id(self) -> str:
        """sha256 of everything that decides the output bytes, inputs with their locations and stamps."""
        return canonical_digest(self._canonical(with_inputs=True))

    @cached_property
    def merge_id(self) -> str:
        """The same without locations and stamps: equal for the same merge of copies elsewhere.

        It knows nothing of the inputs' contents: other models of the same shapes share it.
        """
        return canonical_digest(self._canonical(with_inputs=False))

    @cached_property
    def num_output_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def num_source_bytes(self) -> int:
        """Bytes of all sources, each counted once."""
        return sum(shard.source_bytes for shard in self.shards)

    @property
    def jobs(self) -> Iterable[TensorJob]:
        """All output tensors in order."""
        return (job for shard in self.shards for job in shard.jobs)

    def to_json(self) -> dict[str, object]:
        """Return the plan as plain JSON, what it is made of and what it is known by."""
        return {
            "plan_id": self.plan_id,
            "merge_id": self.merge_id,
            "donor": self.donor,
            "skipped": list(self.skipped),
            "notes": list(self.notes),
            "remarks": [as_plain(remark) for remark in self.remarks],
            **self._canonical(with_inputs=True),
        }

    def _canonical(self, *, with_inputs: bool) -> dict[str, object]:
        settings, maps = _Settings(), _Maps()
        written = [[file.key, file.size, file.sha256] for file in self.written_files]
        place = _place_of(with_inputs=with_inputs, is_stacked=self.is_stacked)
        shards = [
            {
                "file": shard.file,
                "num_bytes": shard.num_bytes,
                "tensors": [_canonical_job(job, settings, maps, place) for job in shard.jobs],
                **({"wholes": wholes} if (wholes := _canonical_wholes(shard)) else {}),
            }
            for shard in self.shards
        ]
        return {
            "numerics": NUMERICS,
            "on_nonfinite": self.on_nonfinite,
            "checkpoints": [canonical_checkpoint(checkpoint) for checkpoint in self.checkpoints]
            if with_inputs
            else len(self.checkpoints),
            "side_files": [
                [side.checkpoint, side.key, *((side.stamp.size, side.stamp.version) if with_inputs else ())]
                for side in self.side_files
            ],
            "settings": [json.loads(text) for text in settings.texts],
            "metadata": SHARD_METADATA,
            "config": self.config,
            "shards": shards,
            **({"stacked": True} if self.is_stacked else {}),
            **({"rows": maps.rows} if maps.rows else {}),
            **({"decodes": maps.decodes} if maps.decodes else {}),
            **({"ranked": "as decoded"} if maps.decodes and any(map(_ranks_as_decoded, self.jobs)) else {}),
            **({"written_files": written} if written else {}),
        }


class _Settings:
    """The distinct ways tensors are merged, numbered in order of appearance."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self._by_identity: dict[tuple[str, Scope, int], int] = {}

    def number(self, job: TensorJob) -> int:
        result, scope = job.result, job.reading.scope
        key = (result.method, scope, id(result.parameters))  # tensors with equal parameters mostly share one object
        if key not in self._by_identity:
            given = result.parameters
            setting = [result.method, scope, dict(given.shared), dict(given.per_model)]
            text = json.dumps(setting, sort_keys=True)
            self._by_identity[key] = self.texts.setdefault(text, len(self.texts))
        return self._by_identity[key]


Place = Callable[[Operand], tuple[object, ...]]
"""What is said of an operand: where it lies and, if layers are stacked, its name there, which is the same of copies."""


def _place_of(*, with_inputs: bool, is_stacked: bool) -> Place | None:
    if with_inputs and is_stacked:
        return lambda operand: (operand.checkpoint, *operand.extents[0], operand.name, *operand.extents[1:])
    if with_inputs:
        return lambda operand: (operand.checkpoint, *operand.extents[0], *operand.extents[1:])
    return (lambda operand: (operand.checkpoint, operand.name)) if is_stacked else None


class _Maps:
    """The distinct maps of rows and ways of storing other than plain numbers, numbered in order of appearance."""

    def __init__(self) -> None:
        self.rows: list[object] = []
        self.decodes: list[object] = []
        self._numbers: dict[int, int] = {}
        self._decode_numbers: dict[Decode, int] = {}

    def stored_as(self, operand: Operand) -> object:
        """Return the dtype of an operand, with the numbers of its map of rows and of its decode if it has them."""
        if not operand.decode.is_plain:
            return [operand.decode.dtype, self._map_number(operand.rows), self.decode_number(operand.decode)]
        if operand.rows is None:
            return operand.decode.dtype
        return [operand.decode.dtype, self._map_number(operand.rows)]

    def _map_number(self, rows: RowRuns | None) -> int | None:
        if rows is None:
            return None
        if id(rows) not in self._numbers:
            self._numbers[id(rows)] = len(self.rows)
            self.rows.append([rows.num_source_rows, rows.runs, rows.fills])
        return self._numbers[id(rows)]

    def decode_number(self, decode: Decode) -> int:
        """Return the number of a way of storing codes."""
        if decode not in self._decode_numbers:
            self._decode_numbers[decode] = len(self.decodes)
            self.decodes.append(described(decode))
        return self._decode_numbers[decode]


def _canonical_job(job: TensorJob, settings: _Settings, maps: _Maps, place: Place | None) -> list[object]:
    result, output, reading = job.result, job.output, job.reading
    dtypes: object = reading.dtypes if reading.is_plain else list(map(maps.stored_as, reading.operands))
    written: object = output.dtype
    name, shape = output.name, output.shape
    if result.rule:
        written = [result.rule, maps.decode_number(result.encode), result.outputs]
        name, shape = reading.name, reading.shape
    row: list[object] = [name, written, shape, settings.number(job), dtypes]
    return row + [place(operand) for operand in reading.operands] if place else row


def _ranks_as_decoded(job: TensorJob) -> bool:
    """Whether magnitudes are ranked finer than what is stored is wide, as codes or factors are decoded so."""
    finer = [each for each in job.results if each.float_bits > 32 and isinstance(each.declared.rule, Elementwise)]
    return bool(finer) and float_bits_of((job.output.dtype, *job.reading.dtypes)) == 32


def with_beside(jobs: Iterable[TensorJob], names: Collection[str]) -> Iterator[TensorJob]:
    """Yield the jobs that write tensors of these names, with those that are stored beside or decided with them."""
    jobs, beside = list(jobs), list[TensorJob]()
    layers = {job.decided_in for job in jobs if job.decided_in and job.output.name in names}
    for job in jobs:
        encode = job.result.encode
        beside.append(job)
        if not is_beside(encode) or encode.number + 1 == encode.num_beside:
            yield from beside if any(each.output.name in names or each.decided_in in layers for each in beside) else ()
            beside = []


def with_offsets(jobs: Iterable[TensorJob]) -> Iterator[tuple[TensorJob, int]]:
    """Yield jobs, each with the number of elements that jobs before it write of the same tensor."""
    last, offset = None, 0
    for job in jobs:
        offset = offset if job.whole is not None and job.whole == last else 0
        yield job, offset
        last, offset = job.whole, offset + job.output.num_elems


def _canonical_wholes(shard: ShardPlan) -> list[list[object]]:
    """The stored tensors that several jobs write: name, shape, number of the first job and of jobs, and the layout.

    That is how many of them are stored beside each other column by column, and whether by turns; nothing if none is.
    Of codes, how jobs write them says that, and the tensors of their scales follow.
    """
    runs: list[list[object]] = []
    for wholes, numbered in groupby(enumerate(shard.jobs), key=lambda pair: pair[1].wholes):
        if wholes:
            jobs = list(numbered)
            (first, job), *_ = jobs
            (whole, *scales), encode = wholes, job.result.encode
            runs.append([whole.name, whole.shape, first, len(jobs), *([] if scales else _beside(encode)), *scales])
    return runs


def _beside(encode: Decode) -> list[object]:
    if isinstance(encode, Transposed):
        return [encode.num_beside, encode.by_turns]
    return [encode.num_beside, IN_ROWS] if isinstance(encode, ByRows) else []


def canonical_checkpoint(checkpoint: CheckpointRef) -> dict[str, object]:
    """Return place and state of a checkpoint as plain JSON."""
    files = {key: [stamp.size, stamp.version] for key, stamp in sorted(checkpoint.files.items())}
    return {"url": redact(checkpoint.url), "files": files}


def canonical_digest(canonical: object) -> str:
    """Return the sha256 of a JSON value, the same for every order of keys."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
