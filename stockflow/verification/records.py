"""The records beside the weights: manifest against plan, receipts against both, and what does not belong there."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict

from stockflow.checkpoints.candidates import INDEX_FILE
from stockflow.checkpoints.opening import CONFIG_FILE
from stockflow.errors import CheckpointError, UserError
from stockflow.output import receipts
from stockflow.output.keys import (
    CARD_FILE,
    MANIFEST_FILE,
    RECORDS,
    plan_folder,
    plan_key,
    receipt_folder,
    receipted_file,
    tensors_key,
)
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.planning import file as plan_file
from stockflow.planning.file import RecordedPlan
from stockflow.planning.plan import CheckpointRef, MergePlan
from stockflow.storage import Stamp, StorageConfig, open_model, redact
from stockflow.verification.contents import Table
from stockflow.verification.files import Output
from stockflow.verification.findings import Finding, quoted

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


def planned_files(plan: MergePlan, plan_id: str) -> dict[str, int | None]:
    """Return every file a plan publishes, with its size where the plan knows it."""
    files: dict[str, int | None] = {shard.file: shard.num_bytes for shard in plan.shards}
    files |= {side.key: side.stamp.size for side in plan.side_files}
    files |= dict.fromkeys((CARD_FILE, plan_key(plan_id), tensors_key(plan_id)))
    if plan.indexed:
        files[INDEX_FILE] = None
    if plan.config is not None:
        files[CONFIG_FILE] = None
    return files


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
        elif not key.startswith(ours) and "/" in key.removeprefix(RECORDS):
            yield Finding(
                key, "is a record of another run than the one that was published; nothing needs it: remove it"
            )


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
    """Yield weight files that loaders might pick up although the manifest does not know them."""
    try:
        keys = output.list()
    except CheckpointError as error:
        yield Finding(redact(output.store.url), str(error))
        return
    for key in keys:
        if key.endswith(".safetensors") and key not in manifest.files:
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
