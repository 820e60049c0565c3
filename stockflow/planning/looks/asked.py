"""What the recipe asks for, perhaps unaware: left out tensors, an unlisted base, promoted dtypes."""

from collections.abc import Iterator, Sequence

from stockflow.checkpoints.beside.side_files import CONFIGS_OF_LIBRARIES, is_tokenizer_or_template
from stockflow.checkpoints.modules import MODULES_FILE
from stockflow.checkpoints.pipelines import PIPELINE_FILE
from stockflow.planning.looks.proposal import Proposal
from stockflow.recipe.slices import slices_of
from stockflow.storage import halves_of, redact, scheme_of
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted


def skipped_tensors(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors rules leave out, and which of them models have beside the donor's."""
    names, donor = proposal.skipped, proposal.donor.specs
    if names:
        holders = {name: [redact(each.url) for each in proposal.checkpoints if name in each.specs] for name in names}
        beside = [name for name in names if holders[name] and name not in donor]
        models = tuple(dict.fromkeys(url for name in beside for url in holders[name]))
        text = f"{counted(len(names), 'tensor')} {are(len(names))} left out by rules: {_first_of(names)}"
        if beside:
            text += f"; only {', '.join(models)} {'has' if len(models) == 1 else 'have'} {_first_of(beside)}"
        yield Remark("skipped", text, "note", models, tuple(names))


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(map(in_a_line, names[:3])) + " ..." * (len(names) > 3)


def snapshots(proposal: Proposal) -> Iterator[Remark]:
    """Yield which snapshots are read of folders of the hub's cache."""
    for location, checkpoint in zip(proposal.recipe.checkpoints, proposal.checkpoints, strict=True):
        given, found = halves_of(location), halves_of(checkpoint.url)
        for one, read in zip(given, found, strict=True) if len(given) == len(found) else ():
            if scheme_of(one) in ("file", "hf") and scheme_of(read) == "file" and read != one:
                where = "is a folder of the hub's cache" if scheme_of(one) == "file" else "is read offline"
                text = f"{one} {where}; read is its snapshot {read}"
                yield Remark("snapshot", text, "note", (checkpoint.url,))


def over_http(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models are read where a bit may flip on the way, and none the wiser."""
    urls = tuple(dict.fromkeys(redact(each.url) for each in proposal.checkpoints if each.over_http))
    if urls:
        text = (
            f"{counted(len(urls), 'model')} {are(len(urls))} read over http://, where nothing notices a bit that flips "
            f"in a range of a file: {', '.join(urls[:3])}{' ...' if len(urls) > 3 else ''}; "
            "--verify-inputs reads each twice and compares, https:// guards them"
        )
        yield Remark("over-http", text, "note", urls)


def missing_tokenizer(proposal: Proposal) -> Iterator[Remark]:
    """Yield which files of a tokenizer the recipe leaves out."""
    if not proposal.recipe.stockflow.copy_tokenizer and proposal.recipe.vocabulary is None:
        left = [key for key in proposal.side_files_donor.side_files if is_tokenizer_or_template(key)]
        yield Remark(
            "not-copied", f"the tokenizer is not copied, as the recipe says: {', '.join(left) or 'none'}", "note"
        )


def missing_config(proposal: Proposal) -> Iterator[Remark]:
    """Yield that there is no config to publish."""
    of_others = (PIPELINE_FILE, MODULES_FILE, *CONFIGS_OF_LIBRARIES)
    if proposal.donor.config is None and not any(key in proposal.donor.side_files for key in of_others):
        url = redact(proposal.donor.url)
        yield Remark("no-config", f"{url} has no config.json, so the output will have none", models=(url,))


def unlisted_base(proposal: Proposal) -> Iterator[Remark]:
    """Yield what becomes of a base that is not among the models of a method which needs none."""
    recipe = proposal.recipe
    method = recipe.method_for(None)
    if method.base != "ignored" or not recipe.base_model:
        return
    base, counts = redact(recipe.base_model), any(each.recipe.base_counts(method) for each in slices_of(recipe))
    if recipe.lists_base and not counts:
        return
    if counts:
        names = " and ".join(f"`{name}`" for name in method.required_per_model)
        given = f", with the recipe's own {names}" if names else ""
        own = f" or give each model its own {names}" if names else ""
        text = (
            f"the base {base} is not among the models, and `{method.name}` merges it in like them{given}, as mergekit "
            f"does; to leave it out, remove base_model{own}"
        )
    else:
        text = (
            f"the base {base} is not among the models, so `{method.name}` does not merge it in; it gives names, "
            "config and tokenizer"
        )
    yield Remark("base-not-listed", text, models=(base,))


def promoted_dtypes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors are written in another dtype than some of their sources, because these differ."""
    if proposal.recipe.output_dtype:
        return
    names: dict[tuple[str, str], list[str]] = {}
    for job in proposal.jobs:
        dtypes = job.reading.dtypes
        if dtypes.count(dtypes[0]) < len(dtypes) and not job.is_copy and not job.result.rule:
            key = " and ".join(sorted(set(dtypes))), job.output.dtype
            names.setdefault(key, []).append(job.output.name)
    for (found, written), tensors in names.items():
        which = f"{counted(len(tensors), 'tensor')} {are(len(tensors))}"
        text = f"{which} of {found} and written as {written}, which holds them all; `dtype` names another"
        yield Remark(
            "dtypes-differ", text, "note", tensors=tuple(tensors), values={"sources": found, "output": written}
        )
