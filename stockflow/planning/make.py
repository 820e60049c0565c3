"""Planning: from a recipe and what the checkpoints' headers say to a plan. Pure; refuses what does not fit together."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from stockflow.checkpoints.candidates import SINGLE_FILE
from stockflow.checkpoints.header import TensorSpec
from stockflow.checkpoints.layout import Extent, folder_of
from stockflow.checkpoints.modules import MODULE_WEIGHTS
from stockflow.checkpoints.naming import holds_fused_experts
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.samples import Samples
from stockflow.checkpoints.tokenizers import Tokenizer
from stockflow.errors import PlanError
from stockflow.planning.config import output_config
from stockflow.planning.depths import depths_of
from stockflow.planning.job import COPY, COPY_EQUAL, Operand, TensorJob, copying, merging, stored
from stockflow.planning.looks import remarks_on
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.misfits import THEM, Misfit, told
from stockflow.planning.packed import unread_models
from stockflow.planning.plan import CheckpointRef, MergePlan, ShardPlan, SideFile
from stockflow.planning.views import other_layout, under_names_of
from stockflow.recipe import Recipe
from stockflow.storage import redact
from stockflow.text.remarks import objections
from stockflow.text.sizes import counted

NUM_PROBLEMS_SHOWN = 20
SHARDS_PER_WORKER = 4
"""So that the last shards leave few workers idle: at most a quarter of the time of one each."""
GOOD_SHARDS_PER_WORKER, LEAST_GOOD_SHARD_BYTES = 16, 250_000_000
"""With so many the last, half-empty round weighs little (docs/clusters.md#measured) if one takes well over a second."""

PACKED_REMEDY = (
    f"FP8 and packed formats are not merged yet; convert the checkpoint, or name {THEM} in a rule with `action: copy`"
)


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
    """Return the plan for a recipe and its opened checkpoints, in the order of ``recipe.checkpoints``.

    Args:
        recipe: what to merge how.
        checkpoints: what their headers say.
        tokenizers: what their tokenizers say, where they were read.
        shard_size: largest shard in bytes; default from the recipe, else from the output's size.
        strict: whether warnings are refused, too.
        accepted: codes of refusals that are accepted, beside those of the recipe.
        samples: a few numbers of each checkpoint, if they are to be looked at, too.

    Raises:
        PlanError: names, shapes or dtypes do not fit together, or a remark stands against it; all are listed.
    """
    unread = unread_models(recipe, checkpoints)
    if unread:
        raise PlanError(_all_problems(unread))
    accepted = {*recipe.stockflow.accept, *accepted}
    checkpoints = [under_names_of(checkpoints[recipe.donor], each, accepted) for each in checkpoints]
    jobs, skipped, problems = _planned(recipe, checkpoints)
    config = output_config(recipe, checkpoints, jobs)
    remarks = remarks_on(Proposal(recipe, checkpoints, jobs, skipped, config, tokenizers, samples))
    problems = objections(remarks, accepted, strict=strict) + problems
    if problems:
        raise PlanError(_all_problems(problems))
    donor = checkpoints[recipe.donor]
    if not jobs:
        reason = "the rules skip every tensor" if skipped else f"{redact(donor.url)} holds no tensors"
        raise PlanError(f"nothing is left to write: {reason}")
    size = shard_size or recipe.stockflow.shard_size or default_shard_size(jobs)
    side_donor = checkpoints[recipe.side_files_donor]
    return MergePlan(
        checkpoints=tuple(CheckpointRef(checkpoint.url, checkpoint.files) for checkpoint in checkpoints),
        donor=recipe.donor,
        shards=_cut_shards(jobs, size, donor.extents),
        side_files=tuple(SideFile(recipe.side_files_donor, *item) for item in side_donor.side_files.items()),
        config=config,
        on_nonfinite=recipe.stockflow.on_nonfinite,
        skipped=tuple(skipped),
        remarks=remarks,
    )


def _planned(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> tuple[list[TensorJob], list[str], list[str]]:
    """Return the jobs in the donor's order, the names that rules skip, and what stands against the rest."""
    donor = checkpoints[recipe.donor]
    depths = depths_of(recipe, donor)
    layouts = {index: said for index, each in enumerate(checkpoints) if (said := other_layout(donor, each))}
    jobs, misfits = [], list(_unplanned_tensors(recipe, checkpoints, layouts))
    skipped = [name for name in donor.specs if _action(recipe, name) == "skip"]
    for spec in donor.specs.values():
        if _action(recipe, spec.name) != "skip":
            planned = _plan_tensor(recipe, checkpoints, spec, depths.get(spec.name, 0.0), layouts)
            if isinstance(planned, TensorJob):
                jobs.append(planned)
            else:
                misfits.extend(planned)
    problems = list(layouts.values())
    if misfits:
        problems += told(misfits, {name: spec for each in checkpoints for name, spec in each.specs.items()})
    return jobs, skipped, problems


def default_shard_size(jobs: Iterable[TensorJob]) -> int:
    """Return a shard size in bytes that depends on the output alone: a 256th of it, from 256 MB to 5 GB."""
    total = sum(job.result.num_bytes for job in jobs)
    return min(max(total // 256, 256_000_000), 5_000_000_000)


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
    largest = max(job.result.num_bytes for job in jobs)
    return [f"{said}, and the largest tensor has {_two_digits(largest)}; ask for fewer workers"]


def _two_digits(num_bytes: int) -> str:
    """A size that ``--shard-size`` takes, rounded down."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes // size}{unit}" if num_bytes >= 10 * size else f"{num_bytes * 10 // size / 10:g}{unit}"
    return str(num_bytes)


def _action(recipe: Recipe, name: str) -> str | None:
    rule = recipe.rule_for(name)
    return rule.action if rule else None


def _unplanned_tensors(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], explained: Collection[int]
) -> Iterator[Misfit]:
    """Yield tensors that some checkpoint has and the donor lacks, unless a rule skips them or that is said already."""
    donor = checkpoints[recipe.donor]
    lacking = f"but not in {redact(donor.url)}, which gives the output its names"
    remedy = f"a rule with `action: skip` leaves {THEM} out"
    holders: dict[str, list[int]] = {}
    for index, checkpoint in enumerate(checkpoints):
        for name in checkpoint.specs.keys() - donor.specs.keys() if index not in explained else ():
            holders.setdefault(name, []).append(index)
    for name in sorted(holders):
        if _action(recipe, name) != "skip":
            yield Misfit(name, f"in {_names(checkpoints, holders[name])} {lacking}", remedy, "skip")


def _plan_tensor(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], spec: TensorSpec, depth: float, explained: Collection[int]
) -> TensorJob | list[Misfit]:
    """The job for one tensor of the donor, or what stands against it and is not explained by a checkpoint's layout."""
    name, rule = spec.name, recipe.rule_for(spec.name)

    if rule is not None and rule.action == "copy":
        return copying(spec, _operands(checkpoints, name, (recipe.donor,)), COPY)
    method = recipe.method_for(rule)
    indices = recipe.sources(method)
    absent = [index for index in range(len(checkpoints)) if name not in checkpoints[index].specs]
    if absent:
        donor = redact(checkpoints[recipe.donor].url)
        remedy = f"a rule with `action: copy` takes {THEM} from {donor}, `action: skip` leaves {THEM} out"
        told_of = [index for index in absent if index not in explained]
        return [Misfit(name, f"missing in {_names(checkpoints, told_of)}", remedy, "copy")] if told_of else []
    if recipe.carries_over(spec.name, spec.dtype, depth):
        return copying(spec, _operands(checkpoints, name, indices), COPY)
    alike = spec.kind != "packed" and all(checkpoints[index].specs[name] == spec for index in indices)
    problems = [] if alike else _mismatches(checkpoints, spec, (recipe.donor, *indices))
    if problems:
        return problems
    if spec.kind != "float":
        donor_first = dict.fromkeys((recipe.donor, *indices))
        return copying(spec, _operands(checkpoints, name, donor_first), COPY_EQUAL)
    dtype = recipe.output_dtype or (
        spec.dtype if alike else promoted(checkpoints[index].specs[name].dtype for index in indices)
    )
    output = TensorSpec(name, dtype, spec.shape)
    is_fused = holds_fused_experts(name, len(spec.shape))
    if not output.num_elems:
        return copying(output, _operands(checkpoints, name, (recipe.donor,)), COPY)
    return merging(
        output,
        _operands(checkpoints, name, indices),
        method.name,
        recipe.parameters_for(method, name, rule, depth),
        recipe.scope_for(method, name, rule, depth, default="leading" if is_fused else "tensor"),
    )


def _operands(checkpoints: Sequence[Checkpoint], name: str, indices: Iterable[int]) -> tuple[Operand, ...]:
    found = [(index, checkpoints[index]) for index in indices]
    return tuple([stored(index, each.specs[name], each.extents[name]) for index, each in found])


def promoted(dtypes: Iterable[str]) -> str:
    """Return the least float dtype that holds all of these exactly: F32 for BF16 beside F16."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "F64" if "F64" in distinct else "F32"


def _mismatches(checkpoints: Sequence[Checkpoint], spec: TensorSpec, indices: Sequence[int]) -> list[Misfit]:
    donor_url = redact(checkpoints[indices[0]].url)

    def unlike(where: str, found: object, expected: object) -> Misfit:
        return Misfit(spec.name, f"{found} in {where}, expected {expected} as in {donor_url}")

    misfits = []
    for index in indices:
        found, where = checkpoints[index].specs[spec.name], redact(checkpoints[index].url)
        if found.kind == "packed":
            misfits.append(Misfit(spec.name, f"{found.dtype} in {where}", PACKED_REMEDY))
        elif found.shape != spec.shape:
            misfits.append(unlike(where, list(found.shape), list(spec.shape)))
        elif found.kind != spec.kind or (spec.kind != "float" and found.dtype != spec.dtype):
            misfits.append(unlike(where, found.dtype, spec.dtype))
    return list(dict.fromkeys(misfits))


def _names(checkpoints: Sequence[Checkpoint], indices: Sequence[int]) -> str:
    return ", ".join(redact(checkpoints[index].url) for index in indices)


def _all_problems(problems: Sequence[str]) -> str:
    shown = "\n  ".join(problems[:NUM_PROBLEMS_SHOWN])
    hidden = len(problems) - NUM_PROBLEMS_SHOWN
    more = f"\n  ... and {hidden} more" if hidden > 0 else ""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"these checkpoints cannot be merged as they are, {count}:\n  {shown}{more}"


def _cut_shards(jobs: Sequence[TensorJob], shard_size: int, extents: Mapping[str, Extent]) -> tuple[ShardPlan, ...]:
    """Fill shards in order up to ``shard_size``; what lies in a folder of its own gets one file there."""
    by_folder: dict[str, list[TensorJob]] = {"": []}
    for job in jobs:
        by_folder.setdefault(folder_of(extents[job.output.name].file), []).append(job)
    contents = list(_filled(by_folder.pop(""), shard_size))
    modules = (ShardPlan(f"{folder}/{MODULE_WEIGHTS}", tuple(each)) for folder, each in by_folder.items())
    names = (f"model-{index:05d}-of-{len(contents):05d}.safetensors" for index in range(1, len(contents) + 1))
    own = map(ShardPlan, [SINGLE_FILE] if len(contents) == 1 else names, map(tuple, contents))
    return (*own, *modules)


def _filled(jobs: Iterable[TensorJob], shard_size: int) -> Iterator[list[TensorJob]]:
    """Yield the contents of shards; a tensor larger than ``shard_size`` is one alone."""
    content: list[TensorJob] = []
    filled = 0
    for job in jobs:
        num_bytes = job.result.num_bytes
        if filled and filled + num_bytes > shard_size:
            yield content
            content, filled = [], 0
        content.append(job)
        filled += num_bytes
    if content:
        yield content


def _num_shards(jobs: Iterable[TensorJob], shard_size: int) -> int:
    return sum(1 for _ in _filled(jobs, shard_size))
