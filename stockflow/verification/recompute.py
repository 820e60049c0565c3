"""Sampled verification: tensors merged again from the inputs, compared with what was written and recorded."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

from stockflow.checkpoints.decodes.transposed import is_beside
from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.engine.devices import Device, open_device
from stockflow.engine.session import Session
from stockflow.engine.shard import ShardMerger
from stockflow.errors import CheckpointError, NumericsError, PlanError
from stockflow.events import Moved, OnEvent, Stage
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Linear, Tolerance
from stockflow.output.keys import plan_key, receipt_key, tensors_key
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import TensorFacts
from stockflow.planning.file import RecordedPlan, check_mergeable
from stockflow.planning.job import WEIGHTED, TensorJob, adding
from stockflow.planning.operands import Operand
from stockflow.planning.plan import NUMERICS, MergePlan, ShardPlan, with_beside
from stockflow.storage import Stamp, StorageConfig
from stockflow.verification.bits import Difference
from stockflow.verification.contents import Placed, Table
from stockflow.verification.facts import coefficients_agree, differing_facts
from stockflow.verification.files import CHUNK_BYTES, Output, Range
from stockflow.verification.findings import Finding, quoted
from stockflow.verification.records import check_input
from stockflow.verification.sample import Groups, RecordedCoefficients, Sampled, SampleOptions

NUM_AHEAD = 4
"""Portions of the output read ahead of their comparison."""


@dataclass(frozen=True)
class Records:
    """What an output says of itself, as far as it was found to be sound."""

    output: Output
    manifest: Manifest
    recorded: RecordedPlan
    table: Table
    placed: Placed
    stamps: Mapping[str, Stamp]
    coefficients: RecordedCoefficients


@dataclass(frozen=True)
class Target:
    """A job, and where the output has what it must give."""

    job: TensorJob
    tensor: str
    """the output's tensor that it is, or is a part of"""
    place: Range
    """codes and the scales behind them are one range, if these follow at once"""
    scales: Range | None = None
    """of codes in a tensor of all experts, whose scales are another tensor"""
    first: int = 0
    """flat index in the tensor of its first element"""


def recompute(
    evidence: Records,
    chosen: Collection[str],
    options: SampleOptions,
    config: StorageConfig,
    on_event: OnEvent,
) -> tuple[Sampled, list[Finding]]:
    """Merge the chosen tensors again and compare statistics, coefficients and bytes.

    Raises:
        PlanError: the output was made with other numerics than this version's.
        BudgetError: the memory is too small.
        InputChangedError: an input changes while it is read.
        StorageError: reading failed after retries.
    """
    if evidence.recorded.numerics != NUMERICS:
        raise PlanError(
            f"--sample: the output was made with numerics {evidence.recorded.numerics}, this version of stockflow "
            f"has {NUMERICS}; take the version that made it ({evidence.manifest.versions.get('stockflow')})"
        )
    return _Recomputation(evidence, options, config, on_event).run(chosen)


class _Recomputation:
    """One sample on its way."""

    def __init__(self, evidence: Records, options: SampleOptions, config: StorageConfig, on_event: OnEvent) -> None:
        self._evidence = evidence
        self._options = options
        self._config = config
        self._on_event = on_event
        made_on_cpu = all(name.startswith("cpu") for name in evidence.manifest.numerics_classes)
        self._device: Device = "cpu" if made_on_cpu else "auto"
        ours = open_device(self._device).numerics_class
        self._same_class = tuple(evidence.manifest.numerics_classes) == (ours,)
        self._findings: list[Finding] = []
        self._shard_of = {job.output.name: shard.file for shard in self._plan.shards for job in shard.jobs}

    @property
    def _plan(self) -> MergePlan:
        return self._evidence.recorded.plan

    def run(self, chosen: Collection[str]) -> tuple[Sampled, list[Finding]]:
        jobs = list(with_beside(self._plan.jobs, chosen))
        sampled = Sampled(self._options.seed, len(self._shard_of), 0, same_class=self._same_class)
        plan_file = plan_key(self._evidence.manifest.plan_id)
        try:
            check_mergeable(jobs, plan_file)
        except CheckpointError as error:
            return replace(sampled, num_left_out=len(chosen)), [Finding(plan_file, str(error))]
        targets = self._usable(jobs)
        try:
            facts, differences = self._merge(targets)
            again = self._judge(targets, facts, differences)
            _, differing_again = self._merge([part for target in again for part in _with_coefficients(*target)])
            for target, _ in again:
                self._judge_bytes(target, differing_again.get(target.tensor), exact=True)
        except NumericsError as error:
            self._findings.append(
                Finding(tensors_key(self._evidence.manifest.plan_id), f"cannot be recomputed: {error}")
            )
            return replace(sampled, num_left_out=len(chosen)), self._findings
        kinds = [self._kind(target.job) for target in targets]
        return (
            replace(
                sampled,
                num_bytes=sum(target.place.num_bytes for target in targets),
                num_recorded=kinds.count("recorded"),
                num_decided=kinds.count("decided"),
                num_copied=kinds.count("copied"),
                num_left_out=len(set(chosen) - {target.tensor for target in targets}),
            ),
            self._findings,
        )

    def _usable(self, jobs: Sequence[TensorJob]) -> list[Target]:
        """The jobs whose inputs are still there and whose results can be found in the output."""
        files: dict[int, set[str]] = {}
        for job in jobs:
            for checkpoint, file in job.reading.files:
                files.setdefault(checkpoint, set()).add(file)
        changed: set[tuple[int, str]] = set()
        for number, keys in sorted(files.items()):
            for key in sorted(keys):
                found = list(check_input(self._plan.checkpoints[number], self._config, {key}))
                self._findings += found
                changed |= {(number, key)} if found else set()
        places = {
            tensor.spec: (key, tensor.start) for key, tensors in self._evidence.placed.items() for tensor in tensors
        }
        usable = [
            _target(job, places)
            for job in jobs
            if places.keys() >= set(job.result.outputs)
            and job.output.name in self._evidence.table
            and not job.reading.files & changed
        ]
        planned, left = (Counter(job.decided_in for job in each) for each in (jobs, [each.job for each in usable]))
        whole = {"", *(name for name in left if left[name] == planned[name])}
        return [each for each in usable if each.job.decided_in in whole]

    def _merge(self, targets: Sequence[Target]) -> tuple[dict[str, TensorFacts], dict[str, Difference]]:
        """Merge into a comparison instead of a file; return facts by job and differences by tensor."""
        if not targets:
            return {}, {}
        shard = ShardPlan("sample", tuple(target.job for target in targets))
        written = list(_as_written(targets))
        differences: dict[str, Difference] = {}
        session = self._session()
        try:
            with ThreadPoolExecutor(NUM_AHEAD, thread_name_prefix="compare") as pool:
                published = self._evidence.output.read_ahead(
                    (target.place for target in written), self._evidence.stamps.__getitem__, pool, NUM_AHEAD
                )
                sink = _ComparingSink(len(shard.header), written, published, differences)
                self._on_event(Stage("merging a sample again", total_bytes=shard.source_bytes))
                facts = self._merge_into(sink, shard, session)
        finally:
            session.close()
        return {each.name: each for each in facts}, differences

    def _merge_into(self, sink: "_ComparingSink", shard: ShardPlan, session: Session) -> list[TensorFacts]:
        merger = ShardMerger(session, self._plan.checkpoints, self._plan.on_nonfinite)
        session.sources.check(shard.jobs)
        merger.prepare(shard.jobs)
        workspace = session.divide(shard.jobs)
        run = merger.merge(shard, workspace, sink, lambda num_read, _: self._on_event(Moved(num_read)))
        session.sources.check(shard.jobs)
        return run.facts

    def _session(self) -> Session:
        return Session(
            self._plan.checkpoints,
            self._config,
            memory_bytes=self._options.memory_bytes - NUM_AHEAD * CHUNK_BYTES,
            num_threads=self._options.num_threads,
            device=self._device,
        )

    def _judge(
        self, targets: Sequence[Target], facts: Mapping[str, TensorFacts], differences: Mapping[str, Difference]
    ) -> list[tuple[Target, Groups]]:
        """Compare what was found again with the records; return what must be combined with other coefficients.

        Those are the tensors whose recorded coefficients differ from what this machine decides in the last bits.
        """
        combine_again = []
        for target in targets:
            name = target.tensor
            self._judge_facts(target, facts[name])
            recorded, where = self._on_record(target.job)
            found = _groups(facts[name])
            if recorded and found and not _equal(recorded, found):
                if not _needs_gram(target.job) or not coefficients_agree(recorded, found, _tolerance_of(target.job)):
                    self._findings.append(
                        Finding(
                            where,
                            f"says the coefficients of {quoted(name)} are {quoted(recorded)}, "
                            f"the inputs give {quoted(found)}",
                        )
                    )
                if not is_beside(target.job.result.encode):  # whose groups lie in no run of bytes
                    combine_again.append((target, recorded))
                    continue
            exact = self._same_class or self._kind(target.job) != "decided" or not _needs_gram(target.job)
            self._judge_bytes(target, differences.get(name), exact=exact)
        return combine_again

    def _judge_facts(self, target: Target, found: TensorFacts) -> None:
        name, tolerance = target.tensor, _tolerance_of(target.job)
        row = self._evidence.table[name]
        where = tensors_key(self._evidence.manifest.plan_id)
        for fact in differing_facts(row, found, tolerance, same_class=self._same_class):
            self._findings.append(
                Finding(where, f"says {fact.column} of {quoted(name)} is {quoted(fact.stated)}, "
                        f"the inputs give {quoted(fact.found)}")
            )  # fmt: skip

    def _judge_bytes(self, target: Target, difference: Difference | None, *, exact: bool) -> None:
        if difference is None or not difference.num_elems or (difference.is_close and not exact):
            return
        self._findings.append(
            Finding(
                self._shard_of[target.tensor],
                f"{quoted(target.tensor)} is not what the inputs give: {difference.num_elems:,} of "
                f"{target.job.output.num_elems:,} elements differ, the first at flat index {difference.first:,}",
            )
        )

    def _kind(self, job: TensorJob) -> str:
        if job.is_copy:
            return "copied"
        if not isinstance(job.result.declared.rule, Linear):
            return "decided"
        # Without a Gram the parameters in the plan are the coefficients.
        return "recorded" if self._on_record(job)[0] or not _needs_gram(job) else "decided"

    def _on_record(self, job: TensorJob) -> tuple[Groups | None, str]:
        """The coefficients on record and where they stand: in the receipt, or as the ratio of the only group."""
        name = job.output.name
        if name in self._evidence.coefficients:
            plan_id = self._evidence.manifest.plan_id
            return self._evidence.coefficients[name], receipt_key(plan_id, self._shard_of[name])
        where = tensors_key(self._evidence.manifest.plan_id)
        ratio, num_tuned = self._evidence.table[name]["ratio"], len(job.reading.operands) - 1
        if job.result.method == "model_stock" and job.reading.num_groups == 1 and isinstance(ratio, float):
            return ((ratio / num_tuned,) * num_tuned,), where
        return None, where


def _target(job: TensorJob, places: Mapping[TensorSpec, tuple[str, int]]) -> Target:
    codes, *scales = (Range(*places[output], output.num_bytes) for output in job.result.outputs)
    if len(job.wholes) > 1:
        return Target(job, job.output.name, codes, scales[0])
    return Target(job, job.output.name, codes._replace(num_bytes=job.result.num_bytes))


def _as_written(targets: Sequence[Target]) -> Iterator[Target]:
    """Yield targets in the order of their bytes: scales of all experts follow the codes of all."""
    for _, run in groupby(targets, key=lambda target: target.job.wholes or id(target)):
        together = list(run)
        yield from together
        yield from (replace(each, place=each.scales) for each in together if each.scales)


def _needs_gram(job: TensorJob) -> bool:
    rule = job.result.declared.rule
    return isinstance(rule, Linear) and rule.needs_gram


def _tolerance_of(job: TensorJob) -> Tolerance:
    return job.result.declared.tolerance


def _groups(facts: TensorFacts) -> Groups | None:
    return tuple(tuple(map(float.fromhex, group)) for group in facts.coefficients) if facts.coefficients else None


def _equal(left: Groups, right: Groups) -> bool:
    """Whether coefficients are the same numbers; NaN, which ``on_nonfinite: propagate`` lets through, equals itself."""
    pairs = [pair for groups in zip(left, right, strict=False) for pair in zip(*groups, strict=False)]
    return list(map(len, left)) == list(map(len, right)) and all(a == b or (a != a and b != b) for a, b in pairs)


def _with_coefficients(target: Target, groups: Groups) -> Iterator[Target]:
    """Yield the jobs that combine a tensor, group by group, with given coefficients instead of its method's."""
    reading, output = target.job.reading, target.job.output
    if target.job.result.rule or not reading.is_plain:
        yield from _with_one_group(target, groups)
        return
    num_elems, width = reading.group_elems, target.job.output_width
    for number, weights in enumerate(groups):
        first = number * num_elems
        yield Target(
            job=adding(
                TensorSpec(f"{output.name} group {number}", output.dtype, (num_elems,)),
                tuple(_part(operand, first) for operand in reading.operands),
                weights,
                anchored=len(weights) == len(reading.operands) - 1,
            ),
            tensor=target.tensor,
            place=Range(target.place.key, target.place.start + width * first, width * num_elems),
            first=first,
        )


def _with_one_group(target: Target, groups: Groups) -> Iterator[Target]:
    """Yield the same for a tensor of which no part can be taken alone: codes share scales."""
    if len(groups) == 1:
        anchored = len(groups[0]) == len(target.job.reading.operands) - 1
        parameters = Parameters({"anchored": anchored}, {"weight": groups[0]})
        result = replace(target.job.result, method=WEIGHTED, parameters=parameters)
        yield replace(target, job=replace(target.job, results=(result,)))


def _part(operand: Operand, first: int) -> Operand:
    """Return what of a plain operand begins at element ``first``."""
    (extent,), (width,) = operand.extents, operand.decode.widths
    return operand._replace(extents=(extent._replace(start=extent.start + width * first),))


class _ComparingSink:
    """Takes the bytes of a shard in order and compares those of its tensors with published ones."""

    def __init__(
        self,
        num_header_bytes: int,
        targets: Iterable[Target],
        published: Iterator[memoryview],
        differences: dict[str, Difference],
    ) -> None:
        self._num_header_bytes = num_header_bytes
        self._targets = (target for target in targets if target.place.num_bytes)
        self._published = published
        self._differences = differences
        self._target: Target | None = None
        self._num_done = 0
        """bytes of the present target"""
        self._portion = memoryview(b"")

    def write(self, payload: memoryview | bytes, /) -> object:
        """Compare all of ``payload``."""
        rest = memoryview(payload)
        skipped = min(self._num_header_bytes, len(rest))
        self._num_header_bytes -= skipped
        rest = rest[skipped:]
        while rest:
            target = self._target = self._target or next(self._targets)
            self._portion = self._portion or next(self._published)
            num_bytes = min(len(rest), len(self._portion))
            dtype = "U8" if target.job.result.rule else target.job.output.dtype  # of codes and scales, bytes
            width = max(DTYPES[dtype].bits // 8, 1)
            first = target.first + self._num_done // width
            difference = self._differences.setdefault(target.tensor, Difference())
            difference.add(dtype, first, rest[:num_bytes], self._portion[:num_bytes])
            rest, self._portion = rest[num_bytes:], self._portion[num_bytes:]
            self._num_done += num_bytes
            if self._num_done == target.place.num_bytes:
                self._target, self._num_done = None, 0
        return None

    def sync(self) -> None:
        """Do nothing: nothing is written."""
