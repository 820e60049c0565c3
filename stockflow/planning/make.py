"""Planning: from a recipe and what the checkpoints' headers say to a plan. Pure; refuses what does not fit together."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby
from typing import NamedTuple

from stockflow.checkpoints.files.candidates import written_stem
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent, folder_of
from stockflow.checkpoints.modules import published_as
from stockflow.checkpoints.naming import holds_fused_experts, is_router, projection_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.samples import Samples
from stockflow.checkpoints.tokens.tokenizers import Tokenizer
from stockflow.errors import PlanError
from stockflow.methods.parameters import Parameters
from stockflow.planning.anchors import with_shared_reads
from stockflow.planning.columns import by_columns
from stockflow.planning.config.published import output_config
from stockflow.planning.experts.projections import Experts, part_of, seen_one_by_one, unlike_parts
from stockflow.planning.experts.units import unlike_members, with_layers_together
from stockflow.planning.fixed import are_known, carried_over, is_fixed
from stockflow.planning.formats import (
    ADD_FORMAT,
    cannot_be_kept,
    carried,
    in_codes,
    is_coded,
    static_scales,
    unlike_codes,
    with_codes_only,
    written,
)
from stockflow.planning.job import COPY, TensorJob, copying, merging
from stockflow.planning.looks import one_file, remarks_on
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.misfits import THEM, Misfit, extra_tensors, mismatches, of_missing, told
from stockflow.planning.operands import Operand, operand_of
from stockflow.planning.optional import OptionalParts
from stockflow.planning.packed import unread_models
from stockflow.planning.plan import CheckpointRef, MergePlan, ShardPlan
from stockflow.planning.precision import kept_above, kept_dtype
from stockflow.planning.recomputed import without_recomputed
from stockflow.planning.targets import Outline, OutputTensor, outline_of
from stockflow.planning.ties import with_tied_heads
from stockflow.planning.views import other_layout, under_names_of
from stockflow.planning.vocabulary.files import published_tokenizer
from stockflow.planning.vocabulary.rows import (
    OutputVocabulary,
    output_vocabulary,
    rows_of_zeros,
    rows_remedy,
    unlike_rows,
)
from stockflow.planning.vocabulary.token_ids import following
from stockflow.recipe import Recipe, Rule
from stockflow.storage import redact
from stockflow.text.remarks import objections
from stockflow.text.sizes import counted, gb

NUM_PROBLEMS_SHOWN = 20
LEAST_SHARD_BYTES = 256_000_000
SHARDS_PER_WORKER = 4
"""So that the last shards leave few workers idle: at most a quarter of the time of one each."""
GOOD_SHARDS_PER_WORKER, LEAST_GOOD_SHARD_BYTES = 16, 250_000_000
"""With so many the last, half-empty round weighs little (docs/clusters.md#measured) if one takes well over a second."""

PASSTHROUGH, UNSCALED = "passthrough", Parameters(per_model={"scale": (1.0,)})
"""What takes over the numbers that codes stand for."""


def make_plan(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    *,
    tokenizers: Sequence[Tokenizer] = (),
    shard_size: int | None = None,
    strict: bool = False,
    accepted: Collection[str] = (),
    samples: Samples = (),
) -> MergePlan:
    """Return the plan for a recipe and its opened checkpoints, in the order of ``recipe.locations``.

    Args:
        recipe: what to merge how.
        checkpoints: what their headers say; behind those that are merged, what gives its tokenizer alone.
        tokenizers: what the tokenizers of all of them say, where they were read.
        shard_size: largest shard in bytes; default from the recipe, else from the output's size.
        strict: whether warnings are refused, too.
        accepted: codes of refusals that are accepted, beside those of the recipe.
        samples: a few numbers of each checkpoint, if they are to be looked at, too.

    Raises:
        PlanError: names, shapes or dtypes do not fit together, or a remark stands against it; all are listed.
    """
    num_merged = len(recipe.checkpoints)
    checkpoints, beside = checkpoints[:num_merged], checkpoints[num_merged:]
    accepted = {*recipe.stockflow.accept, *accepted}
    experts, checkpoints = _named_alike(recipe, checkpoints)
    vocabulary = output_vocabulary(recipe, [*checkpoints, *beside], tokenizers)
    if vocabulary is not None:
        checkpoints = [vocabulary.reshaped(each) for each in checkpoints]
    outline = outline_of(recipe, checkpoints)
    by_token = vocabulary.tensors if vocabulary else frozenset[str]()
    by_row = rows_remedy(checkpoints, tokenizers)
    jobs, skipped, problems = _planned(recipe, checkpoints, outline, experts, by_token, by_row)
    jobs = _as_read(jobs, vocabulary, checkpoints, recipe.donor)
    config = output_config(recipe, checkpoints, jobs, outline.stackings, vocabulary.num_rows if vocabulary else None)
    followed = following(recipe, config, checkpoints, tokenizers, vocabulary)
    stacked = outline.left_out, outline.stackings
    of_merged = tokenizers[:num_merged]
    remarks = remarks_on(Proposal(recipe, checkpoints, jobs, skipped, config, of_merged, samples, *stacked, followed))
    in_one = one_file.is_read_from_one(donor := checkpoints[recipe.donor])
    size = shard_size or recipe.stockflow.shard_size or default_shard_size(jobs, in_one=in_one)
    remarks += tuple(one_file.cut(donor, _num_shards(jobs, size))) if in_one else ()
    remarks += (*followed.remarks, *rows_of_zeros(vocabulary, jobs), *chain(*(each.remarks for each in beside)))
    problems = objections(remarks, accepted, strict=strict) + problems
    if problems:
        raise PlanError(_all_problems(problems), remarks)
    if not jobs:
        reason = "the rules skip every tensor" if skipped else f"{redact(donor.url)} holds no tensors"
        raise PlanError(f"nothing is left to write: {reason}")
    side_files, written = published_tokenizer(
        recipe, [*checkpoints, *beside], tokenizers, vocabulary, followed.generation
    )
    return MergePlan(
        checkpoints=tuple(CheckpointRef(each.url, each.files) for each in (*checkpoints, *beside)),
        donor=recipe.donor,
        shards=_cut_shards(jobs, size, donor.extents, written_stem(donor.files)),
        side_files=with_codes_only(side_files, jobs),
        written_files=written,
        config=followed.config,
        on_nonfinite=recipe.stockflow.on_nonfinite,
        skipped=tuple(skipped),
        remarks=remarks,
        is_stacked=outline.is_stacked,
    )


def _named_alike(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> tuple[Experts, Sequence[Checkpoint]]:
    """Return how experts are seen, and the checkpoints by the donor's names: experts one by one, heads tied or not.

    Raises:
        PlanError: a model is in a form that is not read.
    """
    if unread := unread_models(recipe, checkpoints):
        raise PlanError(_all_problems(unread))
    experts = seen_one_by_one(recipe, without_recomputed(recipe, checkpoints))
    named = [under_names_of(experts.checkpoints[recipe.donor], each) for each in experts.checkpoints]
    return experts, with_tied_heads(recipe, named)


def _as_read(
    jobs: Sequence[TensorJob], vocabulary: OutputVocabulary | None, checkpoints: Sequence[Checkpoint], donor: int
) -> list[TensorJob]:
    """Return jobs as they are read and written: what is decided as one together, scales of a donor's codes last."""
    mapped = list(jobs) if vocabulary is None else [vocabulary.mapped(job) for job in jobs]
    found = with_layers_together(with_shared_reads(by_columns(mapped), checkpoints))
    if checkpoints[donor].static_scales and any(map(in_codes, found)):
        found += static_scales(checkpoints[donor], donor)
    return found


def _planned(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    outline: Outline,
    experts: Experts,
    by_token: Collection[str],
    by_row: str,
) -> tuple[list[TensorJob], list[str], list[str]]:
    """Return the jobs in the order of the output, the names that rules skip, and what stands against the rest."""
    donor = checkpoints[recipe.donor]
    layouts = {index: other_layout(donor, each) for index, each in enumerate(checkpoints)}
    explained = {index: said for index, said in layouts.items() if said is not None}
    left_out = {each.spec.name: None for each in outline.unplanned if _action(recipe, each.spec.name) == "skip"}
    beside = (each for each in outline.unplanned if each.spec.name not in left_out)
    misfits = list(extra_tensors(beside, explained))
    jobs, skipped = list[TensorJob](), dict[str, None]()
    known = _Known(explained, kept_above(recipe, checkpoints), OptionalParts(donor), by_token, by_row)
    for target in outline.targets:
        whole = experts.whole(target.names[0], target.spec.name) if experts.wholes else None
        stored_name = whole.numbers.name if whole else target.spec.name
        if _action(recipe, stored_name) == "skip":
            skipped[stored_name] = None
            continue
        for planned in _plan_tensor(target, stored_name, known):
            if isinstance(planned, TensorJob):
                jobs.append(part_of(planned, whole) if whole else planned)
            else:
                misfits.append(replace(planned, remedy="", action="") if whole else planned)
    skipped |= left_out
    problems = [*explained.values(), *unlike_parts(jobs), *unlike_members(jobs)]
    if outline.is_stacked:
        problems += [*unlike_codes(recipe, checkpoints, outline.givers), *unlike_rows(jobs)]
    if misfits:
        specs = [each.spec for each in outline.unplanned] + [each.spec for each in outline.targets]
        problems += told(misfits, {spec.name: spec for spec in specs})
    return jobs, list(skipped), problems


def default_shard_size(jobs: Iterable[TensorJob], *, in_one: bool = False) -> int:
    """Return a shard size in bytes that depends on the output alone: a 256th of it, from 256 MB to 5 GB, or all."""
    total = sum(job.result.num_bytes for job in jobs)
    return max(total, 1) if in_one else min(max(total // 256, LEAST_SHARD_BYTES), 5_000_000_000)


def few_shards_note(plan: MergePlan, num_workers: int | None) -> list[str]:
    """Return what to say if so many workers share so few shards that many will idle at the end; else nothing."""
    if num_workers is None or len(plan.shards) >= SHARDS_PER_WORKER * num_workers:
        return []
    few = f"with fewer than {SHARDS_PER_WORKER} each, some idle at the end"
    said = f"{counted(len(plan.shards), 'shard')} for {counted(num_workers, 'worker')}: {few}"
    enough = SHARDS_PER_WORKER * num_workers
    jobs = list(plan.jobs)
    good = plan.num_output_bytes // (GOOD_SHARDS_PER_WORKER * num_workers)
    sizes = [good] if good >= LEAST_GOOD_SHARD_BYTES else []
    for size in (*sizes, plan.num_output_bytes // enough, plan.num_output_bytes // enough // 2):
        if size and _num_shards(jobs, size) >= enough:
            return [f"{said}; --shard-size {_two_digits(size)} gives enough"]
    largest = max(sum(each.num_bytes for each in job.wholes or job.result.outputs) for job in jobs)
    return [f"{said}, and the largest tensor has {gb(largest)}; ask for fewer workers"]


def _two_digits(num_bytes: int) -> str:
    """A size that ``--shard-size`` takes, rounded down."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes // size}{unit}" if num_bytes >= 10 * size else f"{num_bytes * 10 // size / 10:g}{unit}"
    return str(num_bytes)


def _action(recipe: Recipe, name: str) -> str | None:
    rule = recipe.rule_for(name)
    return rule.action if rule else None


class _Known(NamedTuple):
    """What is known of the checkpoints beyond single tensors."""

    explained: Collection[int]
    """which have another layout"""
    above: Sequence[int]
    """how many bits are meant finer, per checkpoint"""
    optional: OptionalParts
    by_token: Collection[str]
    """names of tensors whose rows follow a vocabulary; what is in codes there is written as numbers"""
    by_row: str
    """what to do where models have rows for different numbers of tokens"""


def _plan_tensor(target: OutputTensor, stored_name: str, known: _Known) -> Sequence[TensorJob] | Sequence[Misfit]:
    """The jobs for one tensor of the output, or what stands against it, unless a checkpoint's layout explains it."""
    stretch, spec, names, stand = target
    recipe, checkpoints, name = stretch.recipe, stretch.checkpoints, spec.name
    rule, is_part = recipe.rule_for(stored_name), stored_name != name
    keeps_codes = recipe.keeps_codes and name not in known.by_token
    if _is_copied(recipe, rule, name):
        return _as_it_is(target, recipe.donor, keeps_codes=keeps_codes, is_part=is_part)
    method = recipe.method_for(rule)
    indices = stretch.sources[method.name]
    absent = [index for index, own in enumerate(names) if own not in checkpoints[index].specs]
    if absent and known.optional.is_lacked(names[0], [checkpoints[index] for index in absent]):
        return _as_it_is(target, recipe.donor, keeps_codes=keeps_codes, is_part=is_part)
    if absent:
        remedy = f"a rule with `action: copy` takes {THEM} from {stretch.urls([0])}"
        told_of = [index for index in absent if stretch.numbers[index] not in known.explained]
        missing = Misfit(name, f"missing in {stretch.urls(told_of)}", remedy, "copy")
        return [of_missing(missing, stretch, told_of)] if told_of else []
    if recipe.carries_over(stored_name, spec.dtype, stand):
        return _as_it_is(target, *indices, keeps_codes=keeps_codes, is_part=is_part)
    alike = spec.kind != "packed" and target.is_alike(indices)
    donor_first = tuple(dict.fromkeys((recipe.donor, *indices)))
    if (spec.kind != "float" or is_fixed(target)) and (alike or are_known(target, donor_first)):
        carried = carried_over(target, dict(zip(donor_first, _operands(target, donor_first), strict=True)))
        return [carried] if isinstance(carried, TensorJob) else carried
    problems = [] if alike else mismatches(target, donor_first, known.by_row)
    if problems:
        return problems
    asked = kept_dtype(target, indices, known.above) or recipe.output_dtype
    dtype = asked or (spec.dtype if alike else promoted(target.source(index).dtype for index in indices))
    output = TensorSpec(name, dtype, spec.shape)
    is_fused = holds_fused_experts(name, len(spec.shape))
    if not output.num_elems:
        return [copying(output, _operands(target, (recipe.donor,)), COPY)]
    scope = recipe.scope_for(method, stored_name, rule, stand, default="leading" if is_fused else "tensor")
    job = merging(
        output,
        _operands(target, indices),
        method.name,
        recipe.parameters_for(method, stored_name, rule, stand),
        "tensor" if scope == "layer" and not projection_of(name) else scope,
    )
    held = checkpoints[0].stored.get(names[0])
    if held is not None and keeps_codes and cannot_be_kept(held):
        return [Misfit(name, f"{held.decode.words} in {stretch.urls([0])}, which is read and not written", ADD_FORMAT)]
    if name in known.by_token:
        return [job]
    return written(recipe, checkpoints[0], stretch.numbers[0], names[0], job, is_part=is_part)


def _as_it_is(target: OutputTensor, index: int, *, keeps_codes: bool, is_part: bool) -> list[TensorJob]:
    """The jobs that take a tensor over: its bytes, codes and scales alike; or what these stand for, if that is asked.

    Of a tensor that is stored in parts, these follow each other. What is a part itself has its codes made again, which
    gives the same as nothing changed.
    """
    spec, operands, recipe = target.spec, _operands(target, (index,)), target.stretch.recipe
    number, checkpoint = target.stretch.numbers[index], target.stretch.checkpoints[index]
    held = checkpoint.stored.get(target.names[index])
    if held is None:
        return [copying(spec, operands, COPY)]
    if keeps_codes and is_coded(held.decode) and not is_part:
        return carried(spec, held, checkpoint, number)
    output = spec._replace(dtype=recipe.output_dtype or spec.dtype)
    job = merging(output, operands, PASSTHROUGH, UNSCALED, "tensor")
    donor, own_name = target.stretch.checkpoints[0], target.names[0]
    return written(recipe, donor, target.stretch.numbers[0], own_name, job, is_part=True) if is_part else [job]


def _is_copied(recipe: Recipe, rule: Rule | None, name: str) -> bool:
    """Return whether a tensor is the donor's, as the recipe says."""
    if rule is not None:
        return rule.action == "copy"
    return recipe.stockflow.routers == "copy" and is_router(name)


def _operands(target: OutputTensor, indices: Iterable[int]) -> tuple[Operand, ...]:
    numbers, checkpoints, names = target.stretch.numbers, target.stretch.checkpoints, target.names
    found = [(numbers[index], checkpoints[index], names[index]) for index in indices]
    return tuple([operand_of(number, each, name) for number, each, name in found])


def promoted(dtypes: Iterable[str]) -> str:
    """Return the least float dtype that holds all of these exactly: F32 for BF16 beside F16."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "F64" if "F64" in distinct else "F32"


def _all_problems(problems: Sequence[str]) -> str:
    shown = "\n  ".join(problems[:NUM_PROBLEMS_SHOWN])
    hidden = len(problems) - NUM_PROBLEMS_SHOWN
    more = f"\n  ... and {hidden} more" if hidden > 0 else ""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"these checkpoints cannot be merged as they are, {count}:\n  {shown}{more}"


def _cut_shards(
    jobs: Sequence[TensorJob], shard_size: int, extents: Mapping[str, Extent], stem: str
) -> tuple[ShardPlan, ...]:
    """Fill shards in order up to ``shard_size``; what lies in a folder of its own gets one file there."""
    by_file: dict[str, list[TensorJob]] = {"": []}
    place = lru_cache(maxsize=None)(published_as)
    for job in jobs:
        extent = extents.get(job.output.name)  # layers that are stacked may be more than the donor has
        is_own = not extent or "/" not in extent.file or not job.output.name.startswith(f"{folder_of(extent.file)}/")
        by_file.setdefault("" if is_own or not extent else place(extent.file), []).append(job)
    contents = list(_filled(by_file.pop(""), shard_size))
    modules = (ShardPlan(file, tuple(each)) for file, each in by_file.items())
    names = (f"{stem}-{index:05d}-of-{len(contents):05d}.safetensors" for index in range(1, len(contents) + 1))
    own = map(ShardPlan, [f"{stem}.safetensors"] if len(contents) == 1 else names, map(tuple, contents))
    return (*own, *modules)


def _filled(jobs: Iterable[TensorJob], shard_size: int) -> Iterator[list[TensorJob]]:
    """Yield the contents of shards; a tensor larger than ``shard_size`` is one alone."""
    content: list[TensorJob] = []
    filled = 0
    for _, parts in groupby(jobs, key=lambda job: job.decided_in or job.wholes or id(job)):
        tensor = list(parts)
        num_bytes = sum([job.result.num_bytes for job in tensor])
        if filled and filled + num_bytes > shard_size:
            yield content
            content, filled = [], 0
        content += tensor
        filled += num_bytes
    if content:
        yield content


def _num_shards(jobs: Iterable[TensorJob], shard_size: int) -> int:
    return sum(1 for _ in _filled(jobs, shard_size))
