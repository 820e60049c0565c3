"""Publishing: everything beside the shards, in the order that makes a half-finished output impossible."""

import json
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import metadata

from stockflow.checkpoints.files.header import DTYPES
from stockflow.checkpoints.opening import CONFIG_FILE
from stockflow.errors import AlreadyExistsError, NotFoundError, OutputConflictError
from stockflow.output import manifest as manifest_file
from stockflow.output.card import model_card
from stockflow.output.keys import CARD_FILE, MANIFEST_FILE, plan_key, tensors_key
from stockflow.output.kinship import proved
from stockflow.output.manifest import Manifest, PublishedFile
from stockflow.output.ownership import check_still_ours
from stockflow.output.receipts import Receipt, TensorFacts, total_gram
from stockflow.output.rounding import proved_of_tensors
from stockflow.output.tables import encode_tensors
from stockflow.planning import file as plan_file
from stockflow.planning.plan import NUMERICS, MergePlan, SideFile
from stockflow.recipe import Recipe
from stockflow.storage import Store, check_stamp, redact
from stockflow.text.remarks import Remark
from stockflow.version import __version__

NUM_PUBLISHERS = 8
"""Small files that are written at the same time: on object storage each takes two or three round trips."""
_ENCODING = threading.Lock()
"""One large file at a time, however many are published: encoding holds the interpreter, and takes twice its bytes."""
HF_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
DTYPE_KEYS = ("torch_dtype", "dtype")
COUNTED = ("zeroed", "subnormal", "collapsed", "below_zero")
"""Facts of tensors that are elements of a kind: they are added up."""
RECORDED_VERSIONS = ("torch", "numpy", "safetensors", "obstore", "fsspec", "s3fs", "ray", "pyarrow")


def commit(
    output: Store, inputs: Sequence[Store], recipe: Recipe, plan: MergePlan, receipts: Sequence[Receipt]
) -> Manifest:
    """Publish everything beside the shards, the manifest last and exclusively.

    Args:
        output: the prefix that holds the shards.
        inputs: one store per checkpoint, for the side files.
        recipe: goes into card and manifest.
        plan: what was merged.
        receipts: one per shard, in the plan's order.

    Raises:
        OutputConflictError: another run took the prefix meanwhile.
        StorageError: writing failed; running again resumes.
    """
    twin = _published_meanwhile(output, plan.plan_id)
    if twin is not None:
        return twin
    rows = [row for receipt in receipts for row in receipt.tensors]
    shards = {receipt.file: PublishedFile(receipt.size, receipt.sha256) for receipt in receipts}
    published = shards | _publish(output, plan, _files_in_order(inputs, recipe, plan, rows))
    manifest = Manifest(
        plan_id=plan.plan_id,
        merge_id=plan.merge_id,
        recipe=recipe.text,
        inputs=plan.checkpoints,
        pins=tuple(store.pin for store in inputs),
        files=dict(sorted(published.items())),
        numerics=NUMERICS,
        numerics_classes=tuple(sorted({receipt.numerics_class for receipt in receipts})),
        versions=versions(),
        summary=summarize(receipts),
        gram=total_gram(receipts),
        remarks=(*plan.remarks, *proved_by(plan, receipts)),
    )
    check_still_ours(output, plan, receipts)
    return put_manifest(output, manifest)


def proved_by(plan: MergePlan, receipts: Sequence[Receipt]) -> tuple[Remark, ...]:
    """Return what is to be said of a merge that only shows when all of it has been read."""
    rows = [row for receipt in receipts for row in receipt.tensors]
    return (*proved(plan, total_gram(receipts)), *proved_of_tensors(plan, rows))


def _publish(
    output: Store, plan: MergePlan, in_order: Iterable[Mapping[str, Callable[[], bytes]]]
) -> dict[str, PublishedFile]:
    """Write files, those together that may appear at the same time; none that a faster run has published meanwhile."""

    def publish(encode_as: tuple[str, Callable[[], bytes]]) -> tuple[str, PublishedFile]:
        key, encode = encode_as
        payload = encode()
        # With other versions of libraries its bytes may be others.
        if _published_meanwhile(output, plan.plan_id) is None:
            output.put(key, payload)
        return key, PublishedFile.of(payload)

    with ThreadPoolExecutor(NUM_PUBLISHERS, thread_name_prefix="commit") as pool:
        return {key: file for files in in_order for key, file in pool.map(publish, files.items())}


def put_manifest(output: Store, manifest: Manifest) -> Manifest:
    """Publish a manifest exclusively; return it, or that of a faster run of the same plan.

    Raises:
        OutputConflictError: another plan was faster, or another run replaces the output.
        StorageError: writing failed.
    """
    try:
        output.put_new(MANIFEST_FILE, manifest_file.encode(manifest))
    except AlreadyExistsError:
        twin = _published_meanwhile(output, manifest.plan_id)
        if twin is None:
            raise OutputConflictError(
                f"{redact(output.url)}/{MANIFEST_FILE} came and went while this run published: another one replaces "
                "this output. End it, then run again"
            ) from None
        return twin
    return manifest


def _files_in_order(
    inputs: Sequence[Store], recipe: Recipe, plan: MergePlan, rows: Sequence[TensorFacts]
) -> Iterator[dict[str, Callable[[], bytes]]]:
    """Yield the files beside the shards and what makes their bytes: those that may appear at the same time together."""
    yield {
        plan_key(plan.plan_id): _alone(lambda: plan_file.encode(plan)),
        tensors_key(plan.plan_id): _alone(lambda: encode_tensors(rows)),
        CARD_FILE: _alone(lambda: model_card(recipe, plan, rows).encode()),
        **{side.key: partial(_read_side_file, inputs[side.checkpoint], side) for side in plan.side_files},
        **{file.key: partial(bytes, file.payload) for file in plan.written_files},
    }
    if plan.indexed:
        yield {plan.index_file: lambda: encode_index(plan)}
    config = plan.config
    if config is not None:
        yield {CONFIG_FILE: lambda: encode_config(config, rows)}


def _alone(encode: Callable[[], bytes]) -> Callable[[], bytes]:
    def encode_alone() -> bytes:
        with _ENCODING:
            return encode()

    return encode_alone


def _published_meanwhile(output: Store, plan_id: str) -> Manifest | None:
    """Return the manifest of a run of the same plan that was faster, None if nothing is published yet.

    Raises:
        OutputConflictError: another plan was faster.
    """
    try:
        existing = manifest_file.read(output)
    except NotFoundError:
        return None
    if existing.plan_id != plan_id:
        raise OutputConflictError(
            f"{redact(output.url)} was published by another plan ({existing.plan_id[:12]}) while this one ran; "
            "choose another output"
        )
    return existing


def encode_index(plan: MergePlan) -> bytes:
    """Return the index of a sharded checkpoint, as the ecosystem writes it."""
    stored = {output: shard.file for shard in plan.indexed for output in shard.outputs}
    total = sum(output.num_bytes for output in stored)
    weight_map = {output.name: file for output, file in stored.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def encode_config(config: Mapping[str, object], rows: Sequence[TensorFacts]) -> bytes:
    """Return config.json with its dtype key, and those of its sub-configs, stating what was written."""
    sizes: dict[str, int] = {}
    for row in rows:
        if DTYPES[row.dtype].kind == "float" and not {"copied", "scales"} & set(row.flags):
            sizes[row.dtype] = sizes.get(row.dtype, 0) + row.num_elems
    written = HF_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None
    stated = _with_dtype(config, written) if written else dict(config)
    if written and not any(key in stated for key in DTYPE_KEYS):
        stated[DTYPE_KEYS[0]] = written
    return (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode()


def _with_dtype(config: Mapping[str, object], written: str) -> dict[str, object]:
    return {
        key: written
        if key in DTYPE_KEYS
        else (_with_dtype(value, written) if isinstance(value, dict) and key.endswith("_config") else value)
        for key, value in config.items()
    }


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of what made the output; asked once, as each package's metadata is parsed as a mail."""
    found = {"stockflow": __version__, "python": platform.python_version()}
    for name in RECORDED_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summarize(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Return the totals of a merge."""
    rows = [row for receipt in receipts for row in receipt.tensors]
    stages = sorted({stage for receipt in receipts for stage in receipt.seconds})
    return {
        "tensors": sum("scales" not in row.flags for row in rows),
        "parameters": sum(row.num_parameters for row in rows),
        "bytes_read": sum(receipt.bytes_read for receipt in receipts),
        "bytes_written": sum(receipt.size for receipt in receipts),
        "clamped_tensors": sum("clamped" in row.flags for row in rows),
        "zero_delta_tensors": sum("zero_delta" in row.flags for row in rows),
        "copied_tensors": sum("copied" in row.flags for row in rows),
        "retries": sum(count for receipt in receipts for count in receipt.retries.values()),
        "peak_memory_bytes": max((receipt.peak_memory_bytes for receipt in receipts), default=0),
        **{
            f"{name}_elements": sum(row.facts[name] for row in rows if name in row.facts)
            for name in COUNTED
            if any(name in row.facts for row in rows)
        },
        **{f"seconds_{stage}": sum(receipt.seconds.get(stage, 0.0) for receipt in receipts) for stage in stages},
    }


def _read_side_file(store: Store, side_file: SideFile) -> bytes:
    payload = bytearray(side_file.stamp.size)
    store.read_into(side_file.key, 0, memoryview(payload), side_file.stamp)
    if store.pin == "stat":
        check_stamp(store, side_file.key, side_file.stamp)
    return bytes(payload)
