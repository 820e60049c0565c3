"""Output formats: a merged tensor as plain numbers, or in codes: those of the donor, or FP8 in blocks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from stockflow.checkpoints.decodes.stored import BlockScaled, Decode, GroupScaled
from stockflow.checkpoints.decodes.transposed import ByRows, within_rows
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.packed import packed_weights
from stockflow.checkpoints.quantised import BLOCKS, Stored
from stockflow.checkpoints.scale_rules import AMAX, kind_of, usual_rule
from stockflow.planning.job import COPY, Reading, Result, TensorJob, copying
from stockflow.planning.operands import stored
from stockflow.planning.plan import SideFile
from stockflow.planning.working_precision import float_bits_of
from stockflow.recipe import Recipe
from stockflow.storage import redact

QUANTIZATION_FILE = "hf_quant_config.json"
CODE_NAMES = ("weight_packed", BLOCKS)
CONTAINERS = ("I8", "U8")
"""Of codes of four bits that have the name of a weight."""
FP8_BLOCK = BlockScaled("F8_E4M3", "F32", (128, 128))
ADD_FORMAT = "say what to write: `stockflow: {output_format: bfloat16}`"
_MULTIPLIED = re.compile(r"(_proj|\.w[123]|\.w[qkvo](_[ab])?|\.wkv|query_key_value|dense\w*|fc\d)\.weight$")
"""Matrices that inputs are multiplied by: embeddings, heads, norms and routers stay as they are."""
_KEPT_PLAIN = re.compile(r"(embed|lm_head|norm|router|vision|visual|audio|projector|eh_proj|(^|\.)mlp\.gate\.)")


def coded(job: TensorJob, outputs: tuple[TensorSpec, ...], encode: Decode, rule: str) -> TensorJob:
    """Return a job whose result is written in codes, these first and their scales behind them.

    Raises:
        ValueError: there are no such codes.
    """
    bits = float_bits_of(job.reading.dtypes)
    read, made, codes = job.reading, job.result, within_rows(encode)
    if not isinstance(codes, BlockScaled | GroupScaled):
        raise ValueError(f"no codes are stored as {encode!r}")
    band = codes.band_elems(read.shape)
    reading = Reading(read.name, read.shape, read.operands, read.scope, bits, read.whole_rows, band)
    return TensorJob(reading, (Result(outputs, encode, made.method, made.parameters, bits, bits, rule),))


def written(
    recipe: Recipe, donor: Checkpoint, number: int, own_name: str, job: TensorJob, *, is_part: bool = False
) -> list[TensorJob]:
    """Return the jobs that write a merged tensor in the format that is asked for.

    Args:
        recipe: says the format.
        donor: whose format is kept.
        number: of the donor among the plan's checkpoints.
        own_name: of the tensor in the donor.
        job: which merges it, to be written as plain numbers.
        is_part: whether it becomes a part of a tensor that is stored like the donor's.
    """
    held = donor.stored.get(own_name)
    encode = codes_of(held.decode) if held and recipe.keeps_codes else None
    if held and encode and _fits(encode, held, job.output):
        parts = held.parts[: len(encode.widths)]
        outputs = tuple(part._replace(name=_renamed(part.name, job.output.name)) for part in parts)
        rule = donor.rules.get(kind_of(own_name)) if donor.rules else None
        stored_as = _in_rows_of(held.decode, encode) if is_part else encode
        kept = coded(job, outputs, stored_as, rule or usual_rule(encode))
        return [kept, *(_copying(job.output, part, donor, number) for part in held.beside)]
    if recipe.stockflow.output_format == "fp8_block" and _is_multiplied(job.output):
        scale = TensorSpec(f"{job.output.name}_scale_inv", "F32", FP8_BLOCK.grid(job.output.shape))
        return [coded(job, (job.output._replace(dtype="F8_E4M3"), scale), FP8_BLOCK, AMAX)]
    return [job]


def carried(output: TensorSpec, held: Stored, donor: Checkpoint, number: int) -> list[TensorJob]:
    """Return the jobs that carry codes and scales over as they are."""
    return [_copying(output, part, donor, number) for part in (*held.parts, *held.beside)]


def static_scales(donor: Checkpoint, number: int) -> Iterator[TensorJob]:
    """Yield the jobs that carry over the fixed scales of activations."""
    for name, spec in donor.static_scales.items():
        yield copying(spec, (stored(number, spec, donor.extents[name]),), COPY)


def outputs_of(jobs: Iterable[TensorJob]) -> dict[str, TensorSpec]:
    """Return all tensors that jobs write, by name."""
    return {output.name: output for job in jobs for output in job.result.outputs}


def has_codes(jobs: Sequence[TensorJob]) -> bool:
    """Return whether anything that jobs write is codes, of whatever format."""
    return any(job.result.rule for job in jobs) or bool(packed_weights(outputs_of(jobs)))


def in_codes(job: TensorJob) -> bool:
    """Return whether a job writes codes that need scales."""
    output = job.output
    is_container = output.dtype in CONTAINERS and output.name.endswith(".weight")
    return bool(job.result.rule) or output.kind == "packed" or output.name.endswith(CODE_NAMES) or is_container


def with_codes_only(side_files: tuple[SideFile, ...], jobs: Iterable[TensorJob]) -> tuple[SideFile, ...]:
    """Return the files beside an output: what speaks of codes, only where there are some."""
    without = tuple(file for file in side_files if file.key != QUANTIZATION_FILE)
    return side_files if len(without) == len(side_files) or any(map(in_codes, jobs)) else without


def unlike_codes(recipe: Recipe, checkpoints: Sequence[Checkpoint], givers: Iterable[int]) -> Iterator[str]:
    """Yield which models of a stack give layers in codes that the published config, the donor's, is not of.

    Args:
        recipe: names the donor.
        checkpoints: all models.
        givers: those whose names and formats layers of the output have.
    """
    donor = checkpoints[recipe.donor]
    known = {_format(codes) for held in donor.stored.values() if (codes := codes_of(held.decode))}
    published = f"the config that goes out, that of {redact(donor.url)}"
    for number in givers if recipe.keeps_codes else ():
        url, stored = redact(checkpoints[number].url), checkpoints[number].stored.values()
        found = (codes for held in stored if (codes := codes_of(held.decode)))
        if other := next((codes for codes in found if _format(codes) not in known), None):
            blocks = f" in blocks of {list(other.block)}" if isinstance(other, BlockScaled) else ""
            yield f"{url} gives layers in {other.words}{blocks}, of which {published}, does not speak; {ADD_FORMAT}"
        elif donor.static_scales and number != recipe.donor:
            yield f"{url} gives layers, for which {published}, has no fixed scales of activations; {ADD_FORMAT}"


def _format(codes: BlockScaled | GroupScaled) -> object:
    """Return what a config says of codes: their kind and what has a scale of its own."""
    if isinstance(codes, BlockScaled):
        return codes.dtype, codes.block
    return codes.codes, codes.group, codes.whole


def codes_of(decode: Decode) -> BlockScaled | GroupScaled | None:
    """Return how the codes are stored that a decode is of, also within what adds to them; None for plain numbers."""
    while not is_coded(decode) and hasattr(decode, "inner"):
        decode = decode.inner
    return decode if isinstance(decode, BlockScaled | GroupScaled) else None


def _in_rows_of(decode: Decode, encode: Decode) -> Decode:
    """Return how codes are stored among rows of others, if those of a decode are."""
    return replace(decode, inner=encode) if isinstance(decode, ByRows) and decode.by_turns else encode


def is_coded(decode: Decode) -> bool:
    """Return whether a decode is one of codes, and of nothing else."""
    return isinstance(decode, BlockScaled | GroupScaled)


def cannot_be_kept(held: Stored) -> bool:
    """Return whether the donor's codes are only read: a scale of a whole tensor is not known before its end."""
    encode = codes_of(held.decode)
    return isinstance(encode, GroupScaled) and bool(encode.whole)


def _fits(encode: BlockScaled | GroupScaled, held: Stored, output: TensorSpec) -> bool:
    """Return whether the donor's codes have the shape of what is written: rows by token may be others."""
    return encode.num_code_bytes(output.shape) == held.parts[0].num_bytes


def _copying(output: TensorSpec, part: TensorSpec, donor: Checkpoint, number: int) -> TensorJob:
    spec = part._replace(name=_renamed(part.name, output.name))
    return copying(spec, (stored(number, part, donor.extents[part.name]),), COPY)


def _renamed(part: str, output: str) -> str:
    """Return the name of a part of a tensor that has another name in the output."""
    return f"{output.rpartition('.')[0]}.{part.rpartition('.')[2]}".removeprefix(".")


def _is_multiplied(output: TensorSpec) -> bool:
    is_matrix = len(output.shape) == 2 and output.kind == "float"
    return is_matrix and bool(_MULTIPLIED.search(output.name)) and not _KEPT_PLAIN.search(output.name)
