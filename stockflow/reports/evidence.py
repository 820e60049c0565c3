"""What an output's records say, read with suspicion: every word of them may be a stranger's."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from string import ascii_uppercase

from stockflow.errors import CheckpointError, DamagedOutputError, NotFoundError, UserError
from stockflow.methods import METHODS
from stockflow.methods.parameters import FROM_BASE
from stockflow.output import manifest as manifest_file
from stockflow.output import receipts
from stockflow.output.keys import MANIFEST_FILE, receipt_key
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.planning.plan import CheckpointRef, MergePlan, merged_among
from stockflow.run.inputs import collector_paused
from stockflow.storage import StorageConfig, open_store, redact
from stockflow.text.redaction import without_secrets
from stockflow.text.remarks import Remark
from stockflow.verification.files import Output
from stockflow.verification.records import read_plan, read_rows
from stockflow.verification.unfinished import what_is_there
from stockflow.verification.verify import Finding

NUM_READERS = 16
TOKENIZER = "tokenizer"
"""The role of an input of which nothing else is read."""
MAX_RECEIPTS = 20_000
"""A checkpoint of a trillion parameters in shards of 256 MB has 8,000."""


@dataclass(frozen=True, slots=True)
class Model:
    """An input, as the report speaks of it."""

    letter: str
    """A, B ...; the base is 0"""
    name: str
    """the last part of its place"""
    url: str
    role: str
    pin: str
    """how its reads were held to the stamps"""
    num_files: int
    """of weights"""
    num_bytes: int
    stamps: str
    """digest of the states of all its files"""


@dataclass(frozen=True, slots=True)
class MethodUse:
    """How some of the tensors were merged."""

    method: str
    scope: str
    parameters: str
    """in words; empty if there are none, or the plan cannot be read"""
    num_tensors: int


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was looked at, and what came of it."""

    what: str
    is_good: bool


@dataclass(frozen=True)
class Evidence:
    """The records of a finished output."""

    url: str
    """redacted"""
    manifest: Manifest
    rows: tuple[TensorFacts, ...]
    receipts: tuple[Receipt, ...]
    """those that are of the published shards, in the manifest's order, without their tensors"""
    num_shards: int
    plan: MergePlan | None
    models: tuple[Model, ...]
    methods: tuple[MethodUse, ...]
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]

    @property
    def has_base(self) -> bool:
        """Whether the first input is what the others were tuned from."""
        return bool(self.models) and self.models[0].letter == "0"

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What was said of recipe and inputs, without what must not be seen."""
        return tuple(
            replace(
                each,
                text=without_secrets(each.text),
                models=tuple(map(redact, each.models)),
                values={without_secrets(key): without_secrets(value) for key, value in each.values.items()},
                place=without_secrets(each.place),
            )
            for each in self.manifest.remarks
        )

    @property
    def merged(self) -> tuple[Model, ...]:
        """The inputs that were merged, the base among them."""
        return tuple(model for model in self.models if model.role != TOKENIZER)

    @property
    def tuned(self) -> tuple[Model, ...]:
        """The inputs that task vectors belong to: all but the first."""
        return self.merged[1:]

    @property
    def counted(self) -> tuple[Model, ...]:
        """The models that a method counts, from 1, in the names of its facts."""
        return self.tuned if self.has_base else self.merged


def gather(location: str, config: StorageConfig, on_bytes: Callable[[int], None]) -> Evidence:
    """Return what the records of an output say.

    Raises:
        NotFoundError: there is no finished output; the message says what there is.
        DamagedOutputError: manifest or table are not what was published.
        StorageError: reading failed after retries.
    """
    output = Output(open_store(location, config), on_bytes)
    manifest = _read_manifest(output)
    shards = [key for key in manifest.files if key.endswith(".safetensors")]
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="report") as pool, collector_paused():
        reading = pool.map(lambda file: _read_receipt(output, manifest, file), shards[:MAX_RECEIPTS])
        rows = read_rows(output, manifest)
        recorded = read_plan(output, manifest)
        found = list(reading)
    plan = None if isinstance(recorded, Finding) else recorded.plan
    sound = tuple(receipt for receipt in found if isinstance(receipt, Receipt))
    findings = [*([recorded] if isinstance(recorded, Finding) else []), *(one for one in found if _is_finding(one))]
    return Evidence(
        url=redact(output.store.url),
        manifest=manifest,
        rows=rows,
        receipts=sound,
        num_shards=len(shards),
        plan=plan,
        models=tuple(_models(manifest, has_base=_has_base(rows, plan))),
        methods=tuple(_methods(rows, plan)),
        checks=tuple(_checks(rows, plan, len(sound), len(shards))),
        findings=tuple(finding for finding in findings if isinstance(finding, Finding)),
    )


def _has_base(rows: Sequence[TensorFacts], plan: MergePlan | None) -> bool:
    """Return whether the first input is a base; of methods that can do without one, only the plan knows."""
    if plan is not None:
        return any(job.result.declared.has_anchor(job.result.parameters) for job in plan.jobs)
    return any(METHODS[row.method].base == "required" for row in rows if row.method in METHODS)


def _is_finding(found: object) -> bool:
    return isinstance(found, Finding)


def _read_manifest(output: Output) -> Manifest:
    where = redact(output.store.url)
    try:
        return manifest_file.read(output)
    except NotFoundError:
        raise NotFoundError(f"{where} has no {MANIFEST_FILE}: {what_is_there(output, 'ask for the report')}") from None
    except CheckpointError as error:
        raise DamagedOutputError(f"{error}") from None


def _read_receipt(output: Output, manifest: Manifest, file: str) -> Receipt | Finding | None:
    """Return the receipt of a shard; None if it is gone, which is no fault."""
    key, published = receipt_key(manifest.plan_id, file), manifest.files[file]
    try:
        receipt = receipts.read(output, manifest.plan_id, file)
    except NotFoundError:
        return None
    except (UserError, ValueError) as error:
        return Finding(key, f"cannot be used: {error}")
    if (receipt.plan_id, receipt.file, receipt.size, receipt.sha256) != (
        manifest.plan_id, file, published.size, published.sha256,
    ):  # fmt: skip
        return Finding(key, "is stale: it is of another shard, or of another state of it, than the published one")
    return replace(receipt, tensors=())


def _models(manifest: Manifest, *, has_base: bool) -> Iterator[Model]:
    letters, num_merged = iter(ascii_uppercase), len(merged_among(manifest.inputs))
    for index, ref in enumerate(manifest.inputs):
        is_base = has_base and index == 0
        url = redact(ref.url)
        weights = [stamp.size for key, stamp in ref.files.items() if key.endswith(".safetensors")]
        yield Model(
            letter="0" if is_base else next(letters, str(index + (0 if has_base else 1))),
            name=url.rstrip("/").rsplit("/", 1)[-1] or url,
            url=url,
            role="base" if is_base else "model" if index < num_merged else TOKENIZER,
            pin=manifest.pins[index] if index < len(manifest.pins) else "",
            num_files=len(weights),
            num_bytes=sum(weights),
            stamps=_stamps_digest(ref),
        )


def _stamps_digest(ref: CheckpointRef) -> str:
    states = sorted((key, stamp.size, stamp.version) for key, stamp in ref.files.items())
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:12]


def _methods(rows: Sequence[TensorFacts], plan: MergePlan | None) -> Iterator[MethodUse]:
    """Yield who was merged how, the most frequent first."""
    uses: Counter[tuple[str, str, str]] = Counter()
    if plan is None:
        uses.update((row.method, row.scope, "") for row in rows)
    else:
        words: dict[int, str] = {}  # many jobs share one object of parameters
        for job in plan.jobs:
            given = job.result.parameters
            shared = {name: value for name, value in given.shared.items() if name != FROM_BASE}
            text = words.setdefault(id(given), _in_words(shared, given.per_model))
            uses[job.result.method, job.reading.scope, text] += 1
    for (method, scope, parameters), count in uses.most_common():
        yield MethodUse(method, scope, parameters, count)


def _in_words(shared: Mapping[str, object], per_model: Mapping[str, Sequence[float]]) -> str:
    words = [f"{name} {value}" for name, value in shared.items()]
    words += [f"{name} {', '.join(f'{value:g}' for value in values)}" for name, values in per_model.items()]
    return "; ".join(words)


def _checks(rows: Sequence[TensorFacts], plan: MergePlan | None, num_receipts: int, num_shards: int) -> Iterator[Check]:
    yield Check("manifest.json is as it was written (seal)", is_good=True)
    yield Check(f"the table of {len(rows):,} tensors is the published one (sha256)", is_good=True)
    what = "the plan is the one its id names (sha256 of its contents)"
    yield Check(what if plan else "the plan cannot be used", is_good=plan is not None)
    yield Check(
        f"{num_receipts:,} of {num_shards:,} shards have a receipt of their published state",
        is_good=num_receipts == num_shards,
    )
