"""Words: what says how a model is talked to, and goes out although tunes say something else."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.heads import said_of_language
from stockflow.checkpoints.tokens.said import DEFAULT, END, ids_as_sets
from stockflow.checkpoints.tokens.vocabularies import Ids
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.vocabulary.templates import chosen_template
from stockflow.storage import redact
from stockflow.text.chat_templates import fault_in, markers_in
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.remarks import Remark, Severity
from stockflow.text.strictjson import shown

NUM_SHOWN = 3
"""markers in a sentence"""
CHOOSES = "`stockflow: {side_files_from: MODEL}` takes another model's"
CHOOSES_TOKENIZER = "`tokenizer_source: MODEL` takes another model's"
CHOOSES_TEMPLATE = "`chat_template: auto` or MODEL takes theirs"
CHOOSES_ANOTHER = "`chat_template: MODEL` takes another model's"


def words_of_no_tune(proposal: Proposal) -> Iterator[Remark]:
    """Yield what goes out of templates, tokens and generation config although tunes have something else."""
    recipe = proposal.recipe
    tunes = [
        index
        for index, location in enumerate(recipe.checkpoints)
        if location != recipe.base_model and proposal.tokenizers
    ]
    found = False
    for what, word in WORDS.items():
        if (what in TEMPLATES and recipe.chat_template is not None) or (what == _EOS_ID and found):
            continue
        donor = _giver(proposal, what, word)
        if donor >= len(proposal.tokenizers):  # a model that is asked for its tokenizer alone
            continue
        if word.role and proposal.tokenizers[donor].has_none:  # of which it is said that there is none
            continue
        others = {index: _taken(proposal, index, word) for index in tunes if index != donor}
        own = _own(proposal, donor, word, others.values()) if tunes else None
        unlike = {index: each for index, each in others.items() if each and each != own}
        is_of_none = any(others.values()) and own not in others.values()
        if is_of_none or (unlike and word.is_said_of_one):
            found = found or is_of_none
            yield _other_word(proposal, donor, what, own, others if is_of_none else unlike, is_of_none)


def _other_word(
    proposal: Proposal, donor: int, what: str, own: object, others: Mapping[int, object], is_of_none: bool
) -> Remark:
    """Say what goes out and which tunes have another; a note of what some have, or of what matters little."""
    url, models = redact(proposal.checkpoints[donor].url), _urls(proposal, list(others))
    theirs = CHOOSES_TEMPLATE if is_of_none else CHOOSES_ANOTHER
    asked = proposal.recipe.vocabulary
    is_fixed = bool(WORDS[what].role) and asked is not None and asked.source != "union"
    advice = theirs if what == TEMPLATES[0] else CHOOSES_TOKENIZER if is_fixed else CHOOSES
    is_made = what == "generation config" and proposal.tokenizers[donor].generation is None
    said = f"none, so that loaders take {_brief(own)} of its config.json" if is_made and own else _brief(own)
    having = "every tune has" if is_of_none else f"{', '.join(models)} {'has' if len(models) == 1 else 'have'}"
    text = f"the {what} of {url} goes out ({said}), and {having} another; {advice}"
    values = {url: _brief(own), **dict(zip(models, map(_brief, others.values()), strict=True))}
    severity: Severity = "warning" if is_of_none and not WORDS[what].is_minor else "note"
    return Remark("side-files-differ", text, severity, models=(url,), values=values)


@dataclass(frozen=True, slots=True)
class _Word:
    """Something that a model says of how it is talked to."""

    of: Callable[[Proposal, int], object]
    is_said_of_one: bool = False
    """where one tune has another, and not only where all have"""
    is_minor: bool = False
    role: str = ""
    """of a token"""


def _giver(proposal: Proposal, what: str, word: _Word) -> int:
    """Return which model's word goes out."""
    recipe = proposal.recipe
    if what in ("generation config", _EOS_ID):
        return recipe.side_files_donor
    says_it = word.role and recipe.roles_donor < len(proposal.tokenizers) and word.of(proposal, recipe.roles_donor)
    return recipe.roles_donor if says_it else recipe.vocabulary_donor


def _token(role: str, **flags: bool) -> _Word:
    return _Word(lambda proposal, index: proposal.tokenizers[index].roles.get(role), role=role, **flags)


def _own(proposal: Proposal, donor: int, word: _Word, others: Collection[object]) -> object:
    """Return what goes out; of a token that no file of the donor names, what its class or its config takes."""
    said = word.of(proposal, donor)
    assumed = proposal.tokenizers[donor].assumed.get(word.role, ()) if said is None else ()
    return next((token for token in assumed if token in others), next(iter(assumed), said))


def _taken(proposal: Proposal, index: int, word: _Word) -> object:
    """Return what a tune says; that texts are filled with their end says nothing."""
    said, own = word.of(proposal, index), proposal.tokenizers[index]
    return None if word.role == "pad_token" and said == own.eos else said


_EOS_ID = "end token's id"
TEMPLATES = ("chat template", "set of further chat templates")
WORDS: Mapping[str, _Word] = {
    TEMPLATES[0]: _Word(lambda proposal, index: proposal.tokenizers[index].template, is_said_of_one=True),
    TEMPLATES[1]: _Word(lambda proposal, index: _further_templates(proposal, index)),
    "end token": _token("eos_token", is_said_of_one=True),
    "generation config": _Word(lambda proposal, index: _generation(proposal, index)),
    _EOS_ID: _Word(lambda proposal, index: _eos_id(proposal, index)),
    "first token": _token("bos_token", is_said_of_one=True),
    "filling token": _token("pad_token", is_minor=True),
    "mask token": _token("mask_token", is_minor=True),
}
"""The end token's id only where those before it are silent: it stands in one of two files."""


def _further_templates(proposal: Proposal, index: int) -> Mapping[str, str] | None:
    """Return the templates that are asked for by name."""
    return {name: text for name, text in proposal.tokenizers[index].templates.items() if name != DEFAULT} or None


def templates_going_out(proposal: Proposal) -> Iterator[Remark]:
    """Yield that the chat template which goes out cannot be read, or writes markers that are no tokens."""
    recipe, tokenizers, donor = proposal.recipe, proposal.tokenizers, proposal.recipe.vocabulary_donor
    if not tokenizers or not recipe.stockflow.copy_tokenizer:
        return
    own = tokenizers[donor] if donor < len(tokenizers) else None
    url = redact(proposal.checkpoints[donor].url if own else recipe.locations[donor])
    template = chosen_template(recipe, tokenizers) or (own.template if own else None)
    if template and (fault := fault_in(template)):
        text = f"the chat template that goes out cannot be read: {in_a_line(fault)}; {CHOOSES_TEMPLATE}"
        yield Remark("template-unread", text, models=(url,), values={"fault": fault})
    known = ids_going_out(proposal)
    if template and known and (strange := [each for each in markers_in(template) if each not in known]):
        are_none = "is no token" if len(strange) == 1 else "are no tokens"
        is_union = recipe.vocabulary is not None and recipe.vocabulary.source == "union"
        whose = "the vocabulary that is written" if is_union else f"{url}, whose tokenizer goes out"
        text = (
            f"the chat template that goes out writes {some(strange, NUM_SHOWN)}, which {are_none} of "
            f"{whose}: a model reads several tokens there"
        )
        yield Remark("template-unread", text, "note", (url,), values=dict.fromkeys(strange, "no token"))


def ids_going_out(proposal: Proposal) -> Ids | None:
    """Return the ids of the vocabulary that is written, where they are known; that of all models if no row moves."""
    if proposal.followed and proposal.followed.ids:
        return proposal.followed.ids
    donor = proposal.recipe.vocabulary_donor
    vocabulary = proposal.tokenizers[donor if donor < len(proposal.tokenizers) else proposal.recipe.donor].vocabulary
    return vocabulary.ids if vocabulary and not vocabulary.problem else None


def _generation(proposal: Proposal, index: int) -> Config | None:
    """Return generation_config.json, or what loaders make of config.json if only others have that file."""
    files = [each.generation for each in proposal.tokenizers]
    own = files[index]
    if own is None and files[proposal.recipe.side_files_donor] is None and any(files):
        own = said_of_language(proposal.checkpoints[index].config)
    asked = {key for each in files for key in each or ()}
    return (
        None
        if own is None
        else ids_as_sets({key: own[key] for key in sorted(asked & own.keys()) if own[key] is not None})
    )


def _eos_id(proposal: Proposal, index: int) -> object:
    generation = proposal.tokenizers[index].generation or {}
    config = said_of_language(proposal.checkpoints[index].config)
    return ids_as_sets({END: generation.get(END, config.get(END))})[END]


def _urls(proposal: Proposal, indices: Collection[int]) -> tuple[str, ...]:
    return tuple(redact(proposal.checkpoints[index].url) for index in indices)


def _brief(found: object) -> str:
    return "none" if found is None else shown(found)
