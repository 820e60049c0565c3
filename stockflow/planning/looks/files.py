"""Side files: what does not come along, of the model that gives them and of the others, and what is named in vain."""

from collections.abc import Iterator, Sequence

from stockflow.checkpoints.beside.side_files import code_files, is_of_tokenizer, is_tokenizer_or_template
from stockflow.checkpoints.tokens.said import TEMPLATE_FILE, TEMPLATE_JSON
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown


def omitted_files(proposal: Proposal) -> Iterator[Remark]:
    """Yield which side files cannot be copied."""
    donor = proposal.side_files_donor
    for key in donor.omitted_side_files:
        why = "it is larger than 64 MB, or not every store takes its name beside the others"
        text = f"{shown(key)} will not be copied: {why}"
        yield Remark("not-copied", text, models=(redact(donor.url),))


def missing_files(proposal: Proposal) -> Iterator[Remark]:
    """Yield which code and which modules the configs that go out name although they are not there."""
    for donor in {id(each): each for each in (proposal.donor, proposal.side_files_donor)}.values():
        names = (*donor.missing_files, *(_missing_code(proposal) if donor is proposal.side_files_donor else ()))
        if names:
            url = redact(donor.url)
            text = (
                f"configs or code of {url} name {some(names)}, which loaders will look for and which are not there, or "
                "are links to folders; put them there, or name a whole model in `stockflow: {side_files_from: ...}`"
            )
            yield Remark("missing-files", text, models=(url,), values={"names": some(names)})


def _missing_code(proposal: Proposal) -> Iterator[str]:
    """Yield the code that tokenizers and processors name, where no code is copied at all: else it is missed by now."""
    donor, index = proposal.side_files_donor, proposal.recipe.side_files_donor
    if index < len(proposal.tokenizers) and not any(key.endswith(".py") for key in donor.side_files):
        own = proposal.tokenizers[index]
        of_processors = [said.get("auto_map") for key, said in own.uses.items() if "/" not in key]
        said = {"auto_map": [own.settings.get("auto_map"), of_processors]}
        yield from code_files((), said, (), lambda _: None, lambda _: "")[1]


def untaken_files(proposal: Proposal) -> Iterator[Remark]:
    """Yield which side files only models have that do not give them; of tokenizers, what they hold is compared."""
    donor = proposal.side_files_donor
    kept = {*donor.side_files, *donor.omitted_side_files, *_given_with_tokens(proposal)}
    holders: dict[tuple[str, ...], list[str]] = {}
    for number, each in enumerate(proposal.checkpoints):
        keys = [key for key in each.side_files if key not in kept and not _is_compared(proposal, number, key)]
        for given_apart in (False, True):
            if alike := tuple(key for key in keys if _is_given_apart(proposal, key) == given_apart):
                holders.setdefault(alike, []).append(redact(each.url))
    for files, urls in holders.items():
        text = f"{some(files)} of {', '.join(urls)} will not be copied: {_why_not(proposal, files)}"
        yield Remark("not-taken", text, "note", tuple(urls), values={"files": some(files)})


def _is_given_apart(proposal: Proposal, key: str) -> bool:
    """Return whether a file is a template where the recipe says whose tokenizer goes out, and templates with it."""
    return proposal.recipe.vocabulary is not None and is_tokenizer_or_template(key)


def _why_not(proposal: Proposal, keys: Sequence[str]) -> str:
    recipe = proposal.recipe
    if not _is_given_apart(proposal, keys[0]):
        advice = "`stockflow: {side_files_from: ...}` names another model"
        return f"side files come from {redact(proposal.side_files_donor.url)}, which has none of that name; {advice}"
    can_be_chosen = any(key in (TEMPLATE_FILE, TEMPLATE_JSON) for key in keys)
    advice = "`chat_template: auto` or MODEL takes theirs" if can_be_chosen else "put them into the output by hand"
    return f"templates come with the tokenizer, from {redact(recipe.locations[recipe.vocabulary_donor])}; {advice}"


def _given_with_tokens(proposal: Proposal) -> Iterator[str]:
    """Yield the templates that come along with the tokenizer that is published, of whichever model."""
    donor = proposal.recipe.vocabulary_donor
    if donor < len(proposal.checkpoints):
        yield from filter(is_tokenizer_or_template, proposal.checkpoints[donor].side_files)


def _is_compared(proposal: Proposal, number: int, key: str) -> bool:
    """Return whether a file's contents are compared, are in another file that goes out, or are chosen by the recipe."""
    recipe, tokenizers = proposal.recipe, proposal.tokenizers
    if is_of_tokenizer(key) or not is_tokenizer_or_template(key):
        return is_of_tokenizer(key)
    is_main = key in (TEMPLATE_FILE, TEMPLATE_JSON)
    if is_main and recipe.chat_template is not None:
        return True
    if max(number, recipe.vocabulary_donor) >= len(tokenizers):
        return False
    own, published = tokenizers[number], tokenizers[recipe.vocabulary_donor]
    is_said = is_main and own.template is not None and recipe.checkpoints[number] != recipe.base_model
    return own.templates == published.templates or is_said
