"""The records beside the weights: manifest against plan, receipts against both, and what does not belong there."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict

from stockflow.errors import CheckpointError, DamagedOutputError, UserError
from stockflow.output import numerics, receipts
from stockflow.output.files import loaders_read, planned_files, strangers
from stockflow.output.keys import (
    MANIFEST_FILE,
    RECORDS,
    numerics_folder,
    numerics_key,
    plan_folder,
    plan_key,
    receipt_folder,
    receipted_file,
    tensors_key,
)
from stockflow.output.manifest import Manifest, PublishedFile
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.planning import file as plan_file
from stockflow.planning.file import RecordedPlan
from stockflow.planning.plan import CheckpointRef
from stockflow.storage import Stamp, StorageConfig, open_model, redact
from stockflow.text.records import parse_record
from stockflow.verification.contents import MAX_TABLE_BYTES, MAX_UNPLANNED_ROWS, Table
from stockflow.verification.files import Output
from stockflow.verification.findings import Finding, quoted
from stockflow.verification.table import decode_apart

RecordedCoefficients = Mapping[str, tuple[tuple[float, ...], ...]]
"""Coefficients per group, by the tensor's name."""


def read_plan(output: Output, manifest: Manifest) -> RecordedPlan | Finding:
    """Return the plan of an output, or why it is not the one of the manifest."""
    key = plan_key(manifest.plan_id)
    try:
        recorded = plan_file.read(output, key)
    except UserError as error:
        return Finding(key, f"cannot be read: {error}")
    if not recorded.plan_id == recorded.digest == manifest.plan_id:
        return Finding(
            key,
            f"is plan {recorded.digest[:16]}... by its contents and {quoted(recorded.plan_id[:16])} by its own word, "
            f"expected {manifest.plan_id[:16]}...",
        )
    return recorded


def read_rows(output: Output, manifest: Manifest) -> tuple[TensorFacts, ...]:
    """Return the table of tensors, if it is the published one.

    Raises:
        DamagedOutputError: it is not, or cannot be read.
    """
    key = tensors_key(manifest.plan_id)
    try:
        payload = output.read(key, MAX_TABLE_BYTES)
        if PublishedFile.of(payload) != manifest.files.get(key):
            raise CheckpointError("is not as the manifest says: its size or sha256 differs")
        return tuple(parse_record(TensorFacts, row) for row in decode_apart(payload, MAX_UNPLANNED_ROWS))
    except (UserError, ValueError) as error:
        raise DamagedOutputError(
            f"{Finding(key, str(error))}. Without this table there is nothing to report; `stockflow verify` lists "
            "everything that is damaged, and the same command with --overwrite makes it anew"
        ) from None


def check_manifest(manifest: Manifest, recorded: RecordedPlan) -> Iterator[Finding]:
    """Hold the manifest against the plan: files, sizes that are known beforehand, inputs."""
    plan = recorded.plan
    if not manifest.merge_id == recorded.merge_id == recorded.copies_digest:
        yield Finding(
            MANIFEST_FILE, f"says merge_id {quoted(manifest.merge_id)}, the plan gives {recorded.copies_digest}"
        )
    if manifest.numerics != recorded.numerics:
        yield Finding(MANIFEST_FILE, f"says numerics {manifest.numerics!r}, the plan says {recorded.numerics}")
    if _places(manifest.inputs) != _places(plan.checkpoints):
        yield Finding(MANIFEST_FILE, "names other inputs, or other states of them, than the plan")
    planned = planned_files(plan, manifest.plan_id)
    for key in sorted(planned.keys() - manifest.files.keys()):
        yield Finding(MANIFEST_FILE, f"does not list {quoted(key)}, which the plan says was published")
    for key in sorted(manifest.files.keys() - planned.keys()):
        yield Finding(MANIFEST_FILE, f"lists {quoted(key)}, which the plan does not know")
    for key, size in planned.items():
        if size is not None and key in manifest.files and manifest.files[key].size != size:
            yield Finding(key, f"is {manifest.files[key].size:,} bytes long by the manifest, {size:,} by the plan")


def _places(inputs: tuple[CheckpointRef, ...]) -> list[tuple[str, dict[str, Stamp]]]:
    return [(redact(ref.url), dict(ref.files)) for ref in inputs]


def check_receipts(
    output: Output,
    manifest: Manifest,
    table: Table,
    wanted: Set[str],
    coefficients: dict[str, tuple[tuple[float, ...], ...]],
) -> Iterator[Finding]:
    """Hold receipts against the manifest and the table, and name records that belong to neither.

    A receipt that is gone is no finding: it is for resuming, and nobody needs it once the output is whole.

    Args:
        output: where they lie.
        manifest: what was published.
        table: the facts of all tensors; empty if it cannot be read.
        wanted: tensors whose recorded coefficients are asked for.
        coefficients: receives them.
    """
    folder = receipt_folder(manifest.plan_id)
    ours = plan_folder(manifest.plan_id)
    try:
        keys = output.list(RECORDS)
    except CheckpointError as error:
        yield Finding(RECORDS, str(error))
        return
    for key in keys:
        if key.startswith(folder):
            yield from _check_receipt(output, key, manifest, table, wanted, coefficients)
        elif key.startswith(numerics_folder(manifest.plan_id)):
            yield from _check_numerics(output, key, manifest)
        elif not key.startswith(ours) and "/" in key.removeprefix(RECORDS):
            yield Finding(
                key, "is a record of another run than the one that was published; nothing needs it: remove it"
            )


def _check_numerics(output: Output, key: str, manifest: Manifest) -> Iterator[Finding]:
    """Hold a numerics class that workers agreed on against those of the shards; earlier ones may have given way."""
    number = key.removeprefix(numerics_folder(manifest.plan_id)).removesuffix(".json")
    if not number.isdigit() or key != numerics_key(manifest.plan_id, int(number)):
        yield Finding(key, "is no record of a numerics class: its name is that of none; remove it")
        return
    try:
        found = numerics.KIND.read(output, key).numerics_class
    except UserError as error:
        yield Finding(key, f"cannot be read: {error}")
        return
    if found not in manifest.numerics_classes and not _gave_way(output, manifest, int(number)):
        yield Finding(key, f"says {quoted(found)}, the shards are of {quoted(', '.join(manifest.numerics_classes))}")


def _gave_way(output: Output, manifest: Manifest, number: int) -> bool:
    """Whether a later class was agreed on, which is what counts."""
    return numerics_key(manifest.plan_id, number + 1) in output.list(numerics_folder(manifest.plan_id))


def _check_receipt(
    output: Output,
    key: str,
    manifest: Manifest,
    table: Table,
    wanted: Set[str],
    coefficients: dict[str, tuple[tuple[float, ...], ...]],
) -> list[Finding]:
    file = receipted_file(manifest.plan_id, key)
    if file is None:
        return [Finding(key, "is no receipt: its name is that of none; remove it")]
    try:
        receipt = receipts.read(output, manifest.plan_id, file)
        if found := list(_judge(key, receipt, manifest, table)):
            return found
        rows = {row.name: row for row in receipt.tensors}
        kept = {name: _coefficients(rows[name]) for name in wanted & rows.keys()}
    except (UserError, ValueError, TypeError, AttributeError) as error:
        return [Finding(key, f"cannot be read: {error}")]
    coefficients.update({name: groups for name, groups in kept.items() if groups})
    return []


def _judge(key: str, receipt: Receipt, manifest: Manifest, table: Table) -> Iterator[Finding]:
    published = manifest.files.get(receipt.file)
    if published is None or receipt.file != receipted_file(manifest.plan_id, key):
        yield Finding(key, f"is stale: it is of {quoted(receipt.file)}, which was not published under this name")
    elif receipt.numerics_class not in manifest.numerics_classes:
        yield Finding(
            key, f"is of the numerics class {quoted(receipt.numerics_class)}, which the manifest does not name"
        )
    elif (receipt.plan_id, receipt.size, receipt.sha256) != (manifest.plan_id, published.size, published.sha256):
        yield Finding(key, "is stale: it is of another state of the shard than the one that was published")
    else:
        yield from _compare_facts(key, receipt, table)


def _compare_facts(where: str, receipt: Receipt, table: Table) -> Iterator[Finding]:
    for facts in receipt.tensors:
        row = table.get(facts.name)
        if row is None:
            if table:
                yield Finding(where, f"tells of {quoted(facts.name)}, which the table of tensors does not have")
            continue
        for column, value in asdict(facts).items():
            plain = list(value) if isinstance(value, tuple) else value
            if column != "coefficients" and row[column] != plain:
                yield Finding(
                    where,
                    f"says {column} of {quoted(facts.name)} is {quoted(plain)}, the table says {quoted(row[column])}",
                )


def _coefficients(facts: TensorFacts) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float.fromhex, group)) for group in facts.coefficients or ())


def check_strangers(output: Output, manifest: Manifest) -> Iterator[Finding]:
    """Yield files that loaders might pick up although the manifest does not know them, in subfolders too."""
    try:
        keys = output.list()
    except CheckpointError as error:
        yield Finding(redact(output.store.url), str(error))
        return
    for key in strangers(list(keys), {*manifest.files, MANIFEST_FILE}):
        if loaders_read(key):
            yield Finding(key, "is not in the manifest; remove it, or loaders may read it")


def check_input(ref: CheckpointRef, config: StorageConfig, files: Set[str]) -> Iterator[Finding]:
    """Yield the files of an input that are no longer what was merged."""
    try:
        store = open_model(ref.url, config)
    except UserError as error:
        yield Finding(redact(ref.url), str(error))
        return
    for key in sorted(files):
        where, expected = f"{redact(ref.url)}/{key}", ref.files[key]
        try:
            found: Stamp = store.stamp(key)
        except UserError as error:
            yield Finding(where, str(error))
            continue
        if found != expected:
            yield Finding(
                where,
                f"changed since the merge: {found.size:,} bytes, {found.version}; "
                f"expected {expected.size:,} bytes, {expected.version}",
            )
