"""Verification: every published byte read again and held against manifest, plan, index and headers."""

from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from stockflow.ahead import map_ahead
from stockflow.checkpoints.files.candidates import index_of
from stockflow.checkpoints.files.layout import folder_of
from stockflow.checkpoints.opening import link_notes
from stockflow.errors import CheckpointError, NotFoundError, PlanError, UserError
from stockflow.events import Done, Moved, Note, OnEvent, Stage, ignore
from stockflow.output import manifest as manifest_file
from stockflow.output.keys import MANIFEST_FILE, plan_key, tensors_key
from stockflow.output.manifest import Manifest
from stockflow.planning.file import RecordedPlan
from stockflow.storage import Stamp, StorageConfig, open_model, open_store, redact
from stockflow.text import notebook
from stockflow.text.redaction import command_line
from stockflow.text.sizes import counted, gb
from stockflow.verification import contents, records
from stockflow.verification.files import NUM_LOCAL_READERS, NUM_OBJECT_READERS, Output
from stockflow.verification.findings import Finding, Findings
from stockflow.verification.sample import Groups, Sampled, SampleOptions, choose, sampled_line
from stockflow.verification.unfinished import what_is_there

__all__ = ["Finding", "SampleOptions", "Sampled", "Verification", "summary_lines", "verify"]

NUM_FILES_AT_ONCE = 4
PLAN_ID_DIGITS = 64


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying an output."""

    output_url: str
    plan_id: str
    num_files: int
    num_tensors: int
    num_bytes: int
    findings: tuple[Finding, ...]
    sampled: Sampled | None = None
    is_adapter: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    def facts(self) -> dict[str, object]:
        """Return the result for programs."""
        return {
            "output": self.output_url,
            "plan_id": self.plan_id,
            **({"sampled": asdict(self.sampled)} if self.sampled else {}),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        return "\n".join(summary_lines(self))

    def _repr_html_(self) -> str:
        number = len(self.findings)
        return notebook.block(
            f"verify: {number or 'no'} finding{'' if number == 1 else 's'}",
            notebook.facts(
                {
                    "output": redact(self.output_url),
                    "files": self.num_files,
                    "tensors": self.num_tensors,
                    "size": gb(self.num_bytes),
                    "plan": self.plan_id[:12] or None,
                    "sample": sampled_line(self.sampled) if self.sampled else None,
                }
            ),
            notebook.table(("where", "what"), [(finding.where, finding.problem) for finding in self.findings]),
        )


def verify(
    location: str,
    config: StorageConfig,
    *,
    inputs: bool = False,
    sample: SampleOptions | None = None,
    on_event: OnEvent = ignore,
) -> Verification:
    """Read every published file again, and merge a sample of the tensors again if asked for.

    The output may be anyone's: nothing outside of it is read unless ``inputs`` or ``sample`` ask for the
    inputs that it names.

    Args:
        location: the output's.
        config: how to reach it, and its inputs.
        inputs: whether to compare the inputs' stamps too.
        sample: which share of the tensors to compute again from the inputs.
        on_event: told how it goes, from several threads.

    Raises:
        NotFoundError: there is no manifest, so there is nothing to verify.
        StorageError: reading failed after retries.
        UserError: the sample cannot be computed here, see ``recompute``.
    """
    output = Output(open_store(location, config))
    url = output.store.url
    try:
        manifest = manifest_file.read(output)
        _check_plan_id(manifest)
        _check_sample(url, manifest, sample)
    except NotFoundError:
        raise NotFoundError(f"{redact(url)} has no {MANIFEST_FILE}: {what_is_there(output, 'verify')}") from None
    except CheckpointError as error:
        return Verification(url, "", 0, 0, 0, (Finding(MANIFEST_FILE, str(error)),))
    verifier = _Verifier(output, manifest, config)
    sampled = verifier.run(inputs=inputs, sample=sample, on_event=on_event)
    return Verification(
        url,
        manifest.plan_id,
        len(manifest.files),
        sum(map(len, verifier.placed.values())),
        sum(file.size for file in manifest.files.values()),
        verifier.findings.all(),
        sampled,
        is_adapter=manifest.is_adapter,
    )


def _check_sample(url: str, manifest: Manifest, sample: SampleOptions | None) -> None:
    """Refuse to merge a sample of what no merge made.

    Raises:
        PlanError: it is of an adapter.
    """
    if manifest.is_adapter and sample:
        raise PlanError(
            f"{redact(url)} is an adapter, of which no sample is merged again: the command that made it gives the "
            "same bytes at another output, on a processor of this kind; without --sample every byte is held against "
            "the manifest"
        )


def _check_plan_id(manifest: Manifest) -> None:
    if len(manifest.plan_id) != PLAN_ID_DIGITS or set(manifest.plan_id) - set("0123456789abcdef"):
        raise CheckpointError(f"has the plan_id {manifest.plan_id[:80]!r}, which is no sha256")


class _Verifier:
    """One output on its way through all checks."""

    def __init__(self, output: Output, manifest: Manifest, config: StorageConfig) -> None:
        self.findings = Findings()
        self.placed: contents.Placed = {}
        self._output = output
        self._manifest = manifest
        self._config = config
        self._stamps: dict[str, Stamp] = {}
        self._damaged: set[str] = set()
        self._num_readers = NUM_LOCAL_READERS if output.is_local else NUM_OBJECT_READERS

    def run(self, *, inputs: bool, sample: SampleOptions | None, on_event: OnEvent) -> Sampled | None:
        manifest, output, findings = self._manifest, self._output, self.findings
        num_bytes = sum(file.size for file in manifest.files.values())
        self._say_links(on_event, with_inputs=inputs or sample is not None)
        on_event(Stage("verifying", total_bytes=num_bytes, num_items=len(manifest.files), unit="files"))
        self._check_files(on_event)
        on_event(Stage("checking the records"))
        recorded = None if manifest.is_adapter else self._read_plan()
        if recorded:
            findings.add(records.check_manifest(manifest, recorded))
        self._read_headers()
        table = {} if manifest.is_adapter else self._check_tensors(recorded)
        chosen = choose(recorded.plan, sample) if recorded and sample else frozenset[str]()
        coefficients: dict[str, Groups] = {}
        findings.add(records.check_receipts(output, manifest, table, chosen, coefficients))
        findings.add(records.check_strangers(output, manifest))
        if inputs:
            on_event(Stage("looking at the inputs", num_items=len(manifest.inputs), unit="inputs"))
            for ref in manifest.inputs:
                findings.add(records.check_input(ref, self._config, ref.files.keys()))
                on_event(Done(redact(ref.url)))
        if not sample or not recorded:
            return None
        return self._recompute(recorded, table, coefficients, chosen, sample, on_event)

    def _say_links(self, on_event: OnEvent, *, with_inputs: bool) -> None:
        """Tell where shards, and weights of the inputs if they are read, lie because links may lead there."""
        if not self._config.trusted:
            return
        places = [(self._output.store, self._shards)]
        if with_inputs:
            places += [(open_model(ref.url, self._config), list(ref.files)) for ref in self._manifest.inputs]
        for store, files in places:
            for note in link_notes(store, files):
                on_event(Note(note))

    def _check_files(self, on_event: OnEvent) -> None:
        """Hold size and digest of every published file against the manifest, the largest first."""
        files = self._manifest.files
        ahead = max(self._num_readers // NUM_FILES_AT_ONCE, self._num_readers // max(len(files), 1))

        with (
            ThreadPoolExecutor(NUM_FILES_AT_ONCE, thread_name_prefix="verify") as pool,
            ThreadPoolExecutor(self._num_readers, thread_name_prefix="read") as readers,
        ):

            def check(key: str) -> Finding | None:
                expected = files[key]
                try:
                    self._output.check(key)
                    stamp = self._output.store.stamp(key)
                    if stamp.size != expected.size:
                        return Finding(key, f"is {stamp.size:,} bytes long, expected {expected.size:,}")
                    digest = self._output.sha256(key, stamp, readers, ahead, lambda size: on_event(Moved(size)))
                except UserError as error:
                    return Finding(key, str(error))
                on_event(Done(key))
                self._stamps[key] = stamp
                if digest != expected.sha256:
                    return Finding(key, f"has sha256 {digest[:16]}..., expected {expected.sha256[:16]}...")
                return None

            largest_first = sorted(files, key=lambda key: -files[key].size)
            found = [finding for finding in map_ahead(pool, 2 * NUM_FILES_AT_ONCE, check, largest_first) if finding]
        self.findings.add(sorted(found, key=lambda finding: finding.where))
        self._damaged = {finding.where for finding in found}

    def _is_intact(self, key: str) -> bool:
        """Whether what a file says is worth reading: with a wrong digest it says nothing more."""
        return key not in self._damaged

    def _read_plan(self) -> RecordedPlan | None:
        if not self._is_intact(plan_key(self._manifest.plan_id)):
            return None
        recorded = records.read_plan(self._output, self._manifest)
        if isinstance(recorded, Finding):
            self.findings.add([recorded])
            return None
        return recorded

    def _read_headers(self) -> None:
        intact = [key for key in self._shards if self._is_intact(key)]
        with ThreadPoolExecutor(self._num_readers) as pool:
            self.placed, findings = contents.read_headers(self._output, intact, pool, self._num_readers)
        self.findings.add(findings)

    @property
    def _shards(self) -> list[str]:
        return [key for key in self._manifest.files if key.endswith(".safetensors")]

    def _check_tensors(self, recorded: RecordedPlan | None) -> contents.Table:
        """Hold headers, index, table and plan against each other; return the table, empty if it cannot be read."""
        findings = self.findings
        findings.add(contents.check_doubles(self.placed))
        complete = self.placed.keys() == set(self._shards)
        own = [key for key in self._shards if not folder_of(key)]
        index = index_of(own[0]) if own else ""
        if own not in ([], [index.removesuffix(".index.json")]) and self._is_intact(index):
            found = contents.files_by_tensor({key: self.placed[key] for key in own if key in self.placed})
            findings.add(contents.check_index(self._output, index, found, complete=complete))
        key = tensors_key(self._manifest.plan_id)
        plan = recorded.plan if recorded else None
        self.placed = contents.by_job(self.placed, plan) if plan else self.placed
        table = contents.read_table(self._output, key, plan) if self._is_intact(key) else {}
        if isinstance(table, Finding):
            findings.add([table])
            table = {}
        if table:
            findings.add(contents.check_table(key, table, self.placed, complete=complete))
            findings.add(contents.check_planned(key, table, plan) if plan else ())
        elif plan:
            findings.add(contents.check_placed(plan, self.placed))
        return table

    def _recompute(
        self,
        recorded: RecordedPlan,
        table: contents.Table,
        coefficients: Mapping[str, Groups],
        chosen: Set[str],
        sample: SampleOptions,
        on_event: OnEvent,
    ) -> Sampled:
        from stockflow.verification.recompute import Records, recompute

        evidence = Records(self._output, self._manifest, recorded, table, self.placed, self._stamps, coefficients)
        sampled, findings = recompute(evidence, chosen, sample, self._config, on_event)
        self.findings.add(findings)
        return sampled


def summary_lines(result: Verification) -> Sequence[str]:
    """Return the result for people, one line per finding."""
    sampled = [sampled_line(result.sampled)] if result.sampled else []
    if result.findings:
        return [
            *map(str, result.findings),
            *sampled,
            f"{counted(len(result.findings), 'finding')} in {redact(result.output_url)}",
            "next: restore what is named above from a copy, or merge again with --overwrite; then verify again",
        ]
    again = command_line("stockflow", "verify", result.output_url, "--sample", "5%")
    return [
        f"verified {redact(result.output_url)}: {counted(result.num_files, 'file')}, "
        f"{counted(result.num_tensors, 'tensor')}, {gb(result.num_bytes)}, all as the manifest says",
        *(sampled or ([] if result.is_adapter else [f"next: {again}  # merges a share again"])),
    ]
