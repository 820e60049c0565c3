"""Verification: every published byte read again and held against manifest, index and headers."""

import json
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from stockflow.budget import gb
from stockflow.checkpoint import INDEX_FILE, SINGLE_FILE
from stockflow.errors import CheckpointError, NotFoundError, UserError
from stockflow.header import LENGTH_BYTES, PlacedTensor, header_bytes, parse_header
from stockflow.manifest import MANIFEST_FILE, Manifest, read_manifest, tensors_key
from stockflow.plan import CheckpointRef
from stockflow.prefix import sha256_of
from stockflow.storage import Stamp, StorageConfig, Store, check_key, open_store, read_small, redact

NUM_READERS = 4
MAX_TABLE_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as the manifest says."""

    where: str
    problem: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return "; ".join(line.strip() for line in f"{self.where}: {self.problem}".splitlines())


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying an output."""

    output_url: str
    plan_id: str
    num_files: int
    num_tensors: int
    num_bytes: int
    findings: tuple[Finding, ...]


def verify(
    output: str,
    config: StorageConfig,
    *,
    inputs: bool = False,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Read every published file again.

    Args:
        output: the output's location.
        config: how to reach it.
        inputs: whether to compare the inputs' stamps too.
        on_bytes: told of bytes read, from several threads.

    Raises:
        NotFoundError: there is no manifest, so there is nothing to verify.
        StorageError: reading failed after retries.
    """
    store = open_store(output, config)
    try:
        manifest = read_manifest(store)
    except NotFoundError:
        raise NotFoundError(
            f"{redact(store.url)} has no {MANIFEST_FILE}: it is not a finished output of stockflow; "
            "run the merge again to finish it"
        ) from None
    except CheckpointError as error:
        return Verification(store.url, "", 0, 0, 0, (Finding(MANIFEST_FILE, str(error)),))
    findings = list(_check_files(store, manifest, on_bytes))
    # What is in a file with the wrong digest says nothing more.
    intact = manifest.files.keys() - {finding.where for finding in findings}
    placed, header_findings = _read_headers(store, manifest, intact)
    findings += header_findings
    findings += _check_coverage(store, manifest, placed, intact)
    findings += _check_strangers(store, manifest)
    if inputs:
        findings += [finding for ref in manifest.inputs for finding in _check_input(ref, config)]
    return Verification(
        store.url,
        manifest.plan_id,
        len(manifest.files),
        sum(len(tensors) for tensors in placed.values()),
        sum(file.size for file in manifest.files.values()),
        tuple(findings),
    )


def _check_files(store: Store, manifest: Manifest, on_bytes: Callable[[int], None]) -> Iterator[Finding]:
    """Sizes and digests of every published file."""

    def check(key: str) -> Finding | None:
        expected = manifest.files[key]
        try:
            stamp = store.stamp(check_key(key))
            if stamp.size != expected.size:
                return Finding(key, f"is {stamp.size:,} bytes long, expected {expected.size:,}")
            digest = sha256_of(store, key, stamp)
        except UserError as error:
            return Finding(key, str(error))
        on_bytes(stamp.size)
        if digest != expected.sha256:
            return Finding(key, f"has sha256 {digest[:16]}..., expected {expected.sha256[:16]}...")
        return None

    with ThreadPoolExecutor(NUM_READERS) as pool:
        yield from (finding for finding in pool.map(check, manifest.files) if finding)


def _shards(manifest: Manifest) -> list[str]:
    return [key for key in manifest.files if key.endswith(".safetensors")]


def _read_headers(
    store: Store, manifest: Manifest, intact: Set[str]
) -> tuple[dict[str, list[PlacedTensor]], list[Finding]]:
    placed: dict[str, list[PlacedTensor]] = {}
    findings = []
    for key in _shards(manifest):
        if key not in intact:
            continue
        try:
            first, stamp = store.read_head(key, LENGTH_BYTES)
            head, _ = store.read_head(key, header_bytes(first, stamp.size, key))
            placed[key] = parse_header(head, stamp.size, key)
            if "://" not in store.url:
                _open_with_library(f"{store.url}/{key}")
        except (UserError, ValueError) as error:
            findings.append(Finding(key, str(error)))
    return placed, findings


def _open_with_library(path: str) -> None:
    """Have the safetensors library accept the file too: a second opinion that shares no code with ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"the safetensors library refuses it: {error}") from None


def _check_coverage(
    store: Store, manifest: Manifest, placed: dict[str, list[PlacedTensor]], intact: Set[str]
) -> Iterator[Finding]:
    """Headers against the index and against the table of tensors: every tensor once, where it should be."""
    found: dict[str, str] = {}
    for key, tensors in placed.items():
        for tensor in tensors:
            if tensor.spec.name in found:
                yield Finding(key, f"holds {tensor.spec.name!r}, which {found[tensor.spec.name]} holds too")
            found[tensor.spec.name] = key
    shards = _shards(manifest)
    if shards != [SINGLE_FILE] and (INDEX_FILE in intact or INDEX_FILE not in manifest.files):
        yield from _compare(INDEX_FILE, _read_index(store), found, set(placed) == set(shards))
    table_key = tensors_key(manifest.plan_id)
    if table_key in manifest.files and table_key not in intact:
        return
    table = _read_table(store, table_key)
    if isinstance(table, Finding):
        yield table
        return
    stated_shards = {name: str(row["shard"]) for name, row in table.items()}
    yield from _compare(table_key, stated_shards, found, set(placed) == set(shards))
    for key, tensors in placed.items():
        for tensor in tensors:
            row = table.get(tensor.spec.name)
            stated = (row["dtype"], row["shape"]) if row else None
            if stated and stated != (tensor.spec.dtype, list(tensor.spec.shape)):
                yield Finding(
                    key,
                    f"{tensor.spec.name!r} is {tensor.spec.dtype} {tensor.spec.shape}, the table says {stated}",
                )


def _compare(where: str, stated: dict[str, str] | Finding, found: dict[str, str], complete: bool) -> Iterator[Finding]:
    if isinstance(stated, Finding):
        yield stated
        return
    for name, file in stated.items():
        if found.get(name) != file and (complete or name in found):
            yield Finding(where, f"says {name!r} is in {file}, found it in {found.get(name, 'no shard')}")
    for name in found.keys() - stated.keys():
        yield Finding(where, f"does not list {name!r} of {found[name]}")


def _read_index(store: Store) -> dict[str, str] | Finding:
    try:
        index = json.loads(read_small(store, INDEX_FILE, max_bytes=MAX_TABLE_BYTES))
        return {str(name): str(file) for name, file in index["weight_map"].items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Finding(INDEX_FILE, f"cannot be read: {error}")


def _read_table(store: Store, key: str) -> dict[str, dict[str, object]] | Finding:
    from stockflow.tables import decode_tensors

    try:
        rows = decode_tensors(read_small(store, key, max_bytes=MAX_TABLE_BYTES))
        return {str(row["name"]): row for row in rows}
    except UserError as error:
        return Finding(key, f"cannot be read: {error}")


def _check_strangers(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """Weight files that loaders might pick up although the manifest does not know them."""
    for key in store.list_top():
        if key.endswith(".safetensors") and key not in manifest.files:
            yield Finding(key, "is not in the manifest; remove it, or loaders may read it")


def _check_input(ref: CheckpointRef, config: StorageConfig) -> Iterator[Finding]:
    store = open_store(ref.url, config)
    for key, expected in ref.files.items():
        where = f"{redact(ref.url)}/{key}"
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


def summary_lines(result: Verification) -> Sequence[str]:
    """Return the result for people, one line per finding."""
    if result.findings:
        count = "1 finding" if len(result.findings) == 1 else f"{len(result.findings)} findings"
        return [*map(str, result.findings), f"{count} in {redact(result.output_url)}"]
    return [
        f"verified {redact(result.output_url)}: {result.num_files} files, {result.num_tensors} tensors, "
        f"{gb(result.num_bytes)}, all as the manifest says"
    ]
