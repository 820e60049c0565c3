"""Uses: what says how a model is fed, and goes out although no tune was fed so; files that contradict each other."""

from collections.abc import Iterator, Mapping

from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

NUM_SHOWN = 3
"""of tokens"""
CHOOSES = "`stockflow: {side_files_from: MODEL}` takes another model's"


def uses_of_no_tune(proposal: Proposal) -> Iterator[Remark]:
    """Yield what goes out of processors and poolings although some or all tunes have something else."""
    recipe, donor = proposal.recipe, proposal.recipe.side_files_donor
    if donor >= len(proposal.tokenizers):
        return
    url = redact(proposal.checkpoints[donor].url)
    for key, own in proposal.tokenizers[donor].uses.items():
        tunes = {
            redact(each.url): tokenizer.uses.get(key, own)
            for each, tokenizer, location in zip(
                proposal.checkpoints, proposal.tokenizers, recipe.checkpoints, strict=False
            )
            if location != recipe.base_model and each.url != proposal.checkpoints[donor].url
        }
        others = {model: theirs for model, theirs in tunes.items() if theirs != own}
        if others:
            telling = {
                name for theirs in others.values() for name in {*own, *theirs} if own.get(name) != theirs.get(name)
            }
            values = {model: _brief(theirs, telling) for model, theirs in {url: own, **others}.items()}
            said = ", ".join(f"{value} in {model}" for model, value in values.items() if model != url)
            text = f"{in_a_line(key)} of {url} goes out, with {values[url]}; {said}; {CHOOSES}"
            severity: Severity = "warning" if len(others) == len(tunes) else "note"
            yield Remark("side-files-differ", text, severity, (url,), values=values)


def contradicting_files(proposal: Proposal) -> Iterator[Remark]:
    """Yield the tokens of which the files of one tokenizer say different things."""
    for number, (each, tokenizer) in enumerate(zip(proposal.checkpoints, proposal.tokenizers, strict=False)):
        if tokenizer.doubts:
            url, doubts = redact(each.url), tokenizer.doubts
            said = "; ".join(f"{shown(token)} {in_a_line(doubt)}" for token, doubt in list(doubts.items())[:NUM_SHOWN])
            more = f"; and {len(doubts) - NUM_SHOWN:,} more" if len(doubts) > NUM_SHOWN else ""
            goes_out = number == proposal.recipe.vocabulary_donor
            text = (
                f"the files of the tokenizer of {url} contradict each other on {counted(len(doubts), 'token')}: "
                f"{said}{more}. Loaders differ in which they believe{'; mend it there' if goes_out else ''}"
            )
            yield Remark("tokens-disagree", text, "warning" if goes_out else "note", (url,), values=doubts)


def _brief(document: Mapping[str, object], keys: set[str]) -> str:
    return shown({key: document[key] for key in sorted(keys) if key in document})
