"""Everything that reads what others wrote: valid documents, and readers that must refuse by a typed error."""

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stockflow.checkpoints.files import torch_files
from stockflow.checkpoints.files.candidates import INDEX_FILE, SINGLE_FILE
from stockflow.checkpoints.files.header import TensorSpec, encode_header
from stockflow.checkpoints.files.layout import Extent, HeaderCache
from stockflow.checkpoints.files.pickles import read_pickle
from stockflow.checkpoints.opening import open_checkpoint
from stockflow.errors import CheckpointError, RecipeError, StockflowError
from stockflow.methods.parameters import Parameters
from stockflow.output import claims, manifest, receipts
from stockflow.output.claims import Claim
from stockflow.output.keys import CLAIM_FILE
from stockflow.output.manifest import Manifest, PublishedFile
from stockflow.output.publish import encode_config, summarize
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.output.tables import decode_tensors, encode_tensors
from stockflow.planning import file as plan_file
from stockflow.planning.file import check_mergeable
from stockflow.planning.job import copying, merging
from stockflow.planning.operands import stored
from stockflow.planning.plan import CheckpointRef, MergePlan, ShardPlan, SideFile
from stockflow.recipe import parse_recipe
from stockflow.storage import Stamp, StorageConfig, open_store
from stockflow.text.remarks import Remark
from stockflow.verification.records import planned_files
from tests.fuzz import headers

STAMP = Stamp(120, "mtime_ns=1700000000000000000")
SHARD = "model-00001-of-00002.safetensors"
TENSORS = (
    TensorFacts(
        "model.embed_tokens.weight", (97, 48), "BF16", SHARD, "model_stock", "tensor", 4656,
        mean_cosine=0.5, min_cosine=0.5, max_cosine=0.5, ratio=0.75, legacy_ratio=0.7, base_norm=3.5,
        delta_norms=(0.1, 0.2), flags=("clamped",), facts={"groups": 97.0}, coefficients=(("0x1.8p-1", "0x1.0p-2"),),
    ),
    TensorFacts("größe", (), "F32", SHARD, "copy", "tensor", 1, flags=("copied",)),
)  # fmt: skip
RECEIPT = Receipt(
    "a" * 64,
    SHARD,
    9360,
    "b" * 64,
    STAMP,
    "cpu-AVX512",
    28_000,
    {"total": 0.5, "hash": 0},
    {"read": 1},
    2**29,
    TENSORS,
    memory_bytes=2**31,
    gram=((12.25, 0.0, 0.0), (0.0, 0.01, 0.01), (0.0, 0.01, 0.04)),
    began=1.7e9,
    ended=1.7e9 + 4.5,
    worker="node-7:4711",
)
MANIFEST = Manifest(
    "a" * 64, "c" * 64, "merge_method: model_stock\n",
    (CheckpointRef("s3://bucket/base", {"model.safetensors": STAMP}),),
    ("if-match",), {SHARD: PublishedFile(9360, "b" * 64), "config.json": PublishedFile(2, "d" * 64)}, 1,
    ("cpu-AVX512",), {"stockflow": "1.0", "torch": "2.9"}, {"tensors": 2, "seconds_total": 0.5}, (),
)  # fmt: skip
SPEC, BUFFER = TensorSpec("model.embed_tokens.weight", "BF16", (97, 48)), TensorSpec("größe", "I64", ())
PLAN = MergePlan(
    tuple(CheckpointRef(f"s3://bucket/{name}", {"model.safetensors": Stamp(9999, '"e"')}) for name in "bcd"), 0,
    (
        ShardPlan(SHARD, (merging(
            SPEC, tuple(stored(number, SPEC, Extent("model.safetensors", 300)) for number in range(3)), "model_stock",
            Parameters({"filter_wise": False, "on_negative": "clamp"}), "tensor",
        ),)),
        ShardPlan(SHARD.replace("1-", "2-"), (
            copying(BUFFER, (stored(0, BUFFER, Extent("model.safetensors", 292)),), "copy"),
            merging(
                SPEC._replace(name="w"), (stored(0, SPEC, Extent("model.safetensors", 300)),) * 2, "ties",
                Parameters(
                    {"lambda": 1.0, "normalize": True, "rescale": False}, {"weight": (0.5,), "density": (0.3,)}
                ), "tensor",
            ),
        )),
    ),
    (SideFile(0, "tokenizer.json", STAMP),), {"model_type": "llama"}, "error", ("a",),
    (Remark("skipped", "one note", "note", (), ("a",)),),
)  # fmt: skip
RECIPE = """\
merge_method: model_stock
base_model: s3://models/base
models:
  - model: s3://models/a
    parameters: {weight: 0.5}
  - &second {model: org/b@main}
parameters:
  filter_wise: [{filter: mlp, value: true}, {value: false}]
dtype: bfloat16
stockflow:
  on_negative: clamp
  shard_size: 5GB
  storage:
    s3://models/: {endpoint: "http://minio:9000", anonymous: false, region: eu}
  rules:
    - {filter: lm_head, action: copy}
    - filter: norm
      merge_method: linear
      parameters: {weight: 1.0e-3}
"""
HEADER = encode_header([TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "U8", ())], {"format": "pt"})


TORCH_NAME = "pytorch_model.bin"
TORCH_PICKLE = (
    b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
    b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08K\x03"
    b"K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0dX\x01\x00\x00\x00bq\x0eK\x05u."
)
"""of a tensor and a number, as PyTorch writes them"""


def _torch_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", TORCH_PICKLE)
        archive.writestr("x/byteorder", b"little")
        archive.writestr("x/data/0", bytes(24))
    return file.getvalue()


@dataclass(frozen=True)
class Reader:
    """A reader, what it reads, and how it may refuse."""

    read: Callable[[bytes], object]
    """returns None if the document is refused by one of ``errors``, and uses what it accepts as the product would"""
    document: bytes
    errors: tuple[type[StockflowError], ...] = (CheckpointError,)


def _read_header(file: bytes) -> object:
    return headers.parse(file)


def _in_a_folder(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Return what writes a file of a checkpoint or an output and reads it from there."""

    def write_and_read(payload: bytes) -> object:
        with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload)
            return read(Path(folder))

    return write_and_read


def _scratch() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _open(folder: Path) -> object:
    if not (folder / INDEX_FILE).exists():
        (folder / SINGLE_FILE).write_bytes(HEADER + bytes(25))
    else:
        (folder / SHARD).write_bytes(HEADER + bytes(25))
    checkpoint = open_checkpoint(open_store(str(folder), StorageConfig()), HeaderCache())
    json.dumps([checkpoint.config, *checkpoint.specs], ensure_ascii=False, sort_keys=True).encode()
    return checkpoint


def _open_torch_file(folder: Path) -> object:
    checkpoint = open_checkpoint(open_store(str(folder), StorageConfig()), HeaderCache())
    size = (folder / TORCH_NAME).stat().st_size
    for name, extent in checkpoint.extents.items():
        assert 0 <= extent.start <= size - checkpoint.specs[name].num_bytes
    return checkpoint


def _read_pickle(payload: bytes) -> object:
    return read_pickle(payload, torch_files.ALLOWED, 10_000, "x.bin")


def _read_manifest(payload: bytes) -> object:
    found = manifest.parse(payload, "out/manifest.json")
    assert manifest.parse(manifest.encode(found), "again") == found
    assert all(file.size >= 0 for file in found.files.values())
    return found


def _read_receipt(payload: bytes) -> object:
    """What a resumed merge takes from a receipt goes into the table, the config and the manifest."""
    receipt = receipts.parse(payload, "receipts/x.json")
    assert receipts.parse(receipts.encode(receipt), "again") == receipt
    encode_tensors(receipt.tensors)
    encode_config({"torch_dtype": "float32"}, receipt.tensors)
    json.dumps(summarize([receipt]))
    return receipt


def _read_plan(payload: bytes) -> object:
    """What verify takes from a plan: its files and digests, and from those it may merge again, all of it."""
    recorded = plan_file.parse(payload, "plan.json")
    f"{recorded.plan_id[:16]} {recorded.digest} {recorded.copies_digest}".encode()
    planned_files(recorded.plan, recorded.plan_id)
    jobs = list(recorded.plan.jobs)
    check_mergeable(jobs, "plan.json")
    for job in jobs:
        assert job.num_statistic_passes >= 0
        assert job.reading.num_groups * job.reading.group_elems == job.reading.num_elems
    return recorded


def _read_claim(folder: Path) -> object:
    store = open_store(str(folder), StorageConfig())
    claim = claims.read(store)
    f"{claim.plan_id[:12]}, last seen {claim.heartbeat:,.0f}".encode()
    return claim


def _read_recipe(payload: bytes) -> object:
    recipe = parse_recipe(payload.decode(errors="replace"), "r.yaml")
    json.dumps(recipe.canonical()).encode()
    recipe.text.encode()
    return recipe


def _read_table(payload: bytes) -> object:
    return decode_tensors(payload)


READERS: Mapping[str, Reader] = {
    "header": Reader(_read_header, HEADER + bytes(25)),
    "pickle": Reader(_read_pickle, TORCH_PICKLE),
    "torch file": Reader(_in_a_folder(TORCH_NAME, _open_torch_file), _torch_file()),
    "index": Reader(
        _in_a_folder(INDEX_FILE, _open),
        json.dumps({"metadata": {"total_size": 25}, "weight_map": {"a": SHARD, "b": SHARD}}).encode(),
    ),
    "config": Reader(
        _in_a_folder("config.json", _open),
        b'{"model_type": "llama", "limits": [0.0, Infinity], "text_config": {"torch_dtype": "bfloat16", "n": null}}',
    ),
    "manifest": Reader(_read_manifest, manifest.encode(MANIFEST)),
    "receipt": Reader(_read_receipt, receipts.encode(RECEIPT)),
    "claim": Reader(_in_a_folder(CLAIM_FILE, _read_claim), claims.encode(Claim("a" * 64, 1.7e9, "b" * 16))),
    "plan": Reader(_read_plan, plan_file.encode(PLAN)),
    "recipe": Reader(_read_recipe, RECIPE.encode(), (RecipeError,)),
    "table": Reader(_read_table, encode_tensors(TENSORS)),
}


NASTY: tuple[object, ...] = (
    None, True, False, 0, 1, -1, -0.0, 2**31, 2**63, 2**64, 10**400, 10**4000, 1.5, 1e308, float("nan"), float("inf"),
    "", ".", "..", "../../etc/passwd", "/etc/passwd", "a\\b", "C:\\x", "a\0b", "a\nb", "\x1b[31m", "x" * 300,
    "x" * 100_000, "\u202egnp.exe", "s3://u:p@b/x", "\U0001f917", [], {}, [[]], [{}], {"": {}}, {"a": [1]}, ["a"],
    "0" * 64, "BF16", "F31", "stockflow-receipt-1", "stockflow-manifest-1", "0x1p-1",
)  # fmt: skip
"""Values in the place of others."""


def places(node: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a document, its own included."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in inside for place in places(child, (*path, key)))]


def attempt(reader: Reader, payload: bytes) -> str | None:
    """Return why a document is refused, None if it is accepted; anything but the reader's errors escapes."""
    try:
        reader.read(payload)
    except reader.errors as error:
        return str(error)
    return None
