"""Side files: what does not come along, of the model that gives them and of the others, and what is named in vain."""

from collections.abc import Callable, Iterator

from stockflow.checkpoints.beside.side_files import code_files, is_of_tokenizer, is_tokenizer_or_template
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
    kept = {*donor.side_files, *donor.omitted_side_files}
    holders: dict[tuple[str, ...], list[str]] = {}
    for number, each in enumerate(proposal.checkpoints):
        known = _is_compared(proposal, number)
        if keys := tuple(key for key in each.side_files if key not in kept and not known(key)):
            holders.setdefault(keys, []).append(redact(each.url))
    for keys, urls in holders.items():
        text = (
            f"{some(keys)} of {', '.join(urls)} will not be copied: side files come from {redact(donor.url)}, which "
            "has none of that name; `stockflow: {side_files_from: ...}` names another model"
        )
        yield Remark("not-taken", text, "note", tuple(urls), values={"files": some(keys)})


def _is_compared(proposal: Proposal, number: int) -> Callable[[str], bool]:
    """Return what tells files whose contents are compared, or are in another file of the donor's."""
    donor = proposal.recipe.side_files_donor
    both = [proposal.tokenizers[index].templates for index in (number, donor) if index < len(proposal.tokenizers)]
    is_known = len(both) == len(("own", "published")) and both[0] == both[1]
    return is_tokenizer_or_template if is_known else is_of_tokenizer
