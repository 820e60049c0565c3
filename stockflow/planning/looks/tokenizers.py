"""Tokenizers beside each other: ids that mean different tokens, tokens without a row, words that are no tune's."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass

from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.heads import said_of_language
from stockflow.checkpoints.tokens.said import DEFAULT
from stockflow.checkpoints.tokens.token_rows import has_input_rows, vocabulary_tensors
from stockflow.checkpoints.tokens.tokenizers import Vocabulary
from stockflow.checkpoints.tokens.vocabularies import Ids
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.vocabulary.templates import chosen_template
from stockflow.storage import redact
from stockflow.text.chat_templates import fault_in, markers_in
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

NUM_SHOWN = 3
"""tokens in a sentence"""
NUM_VALUES = 20
"""tokens in what programs read"""
REMEDY = "Rows of different tokens would be mixed; `tokenizer_source: base` or `union` merges them by token"
CHOOSES = "`stockflow: {side_files_from: MODEL}` takes another model's"
CHOOSES_TOKENIZER = "`tokenizer_source: MODEL` takes another model's"
CHOOSES_TEMPLATE = "`chat_template: auto` or MODEL takes theirs"
CHOOSES_ANOTHER = "`chat_template: MODEL` takes another model's"
UNITES = "`tokenizer_source: union` keeps them"


@dataclass(frozen=True, slots=True)
class TokenDifferences:
    """How a vocabulary differs from another one."""

    here: Mapping[int, str]
    """by id, the tokens that the other one has not, or under another id"""
    there: Mapping[int, str]
    """by id, those of the other one"""
    contested: Sequence[int]
    """ids that mean one token here and another there, or whose token has another id there"""

    @property
    def added(self) -> dict[int, str]:
        """What is only here, under ids that the other one does not use."""
        return {number: self.here[number] for number in sorted(self.here.keys() - {*self.contested, *self.there})}

    @property
    def lacking(self) -> dict[int, str]:
        """What is only there."""
        return {number: self.there[number] for number in sorted(self.there.keys() - {*self.contested, *self.here})}

    def meanings(self, number: int) -> str:
        """Return what a contested id means here and there."""
        return f"{_quoted(self.here.get(number))} here and {_quoted(self.there.get(number))} there"


@dataclass(frozen=True, slots=True)
class _Change:
    """What a vocabulary has that the first one has not, and the other way round: little, mostly."""

    gained: Ids
    lost: Ids

    @classmethod
    def between(cls, first: Vocabulary, vocabulary: Vocabulary) -> "_Change":
        if first is vocabulary:
            return cls({}, {})
        return cls(_only(vocabulary.ids, first.ids), _only(first.ids, vocabulary.ids))

    def only_here(self, other: "_Change") -> Ids:
        """Return what a vocabulary has that another one has not."""
        return _only(self.gained, other.gained) | _only(other.lost, self.lost)


def _only(ids: Ids, others: Ids) -> Ids:
    return {token: number for token, number in ids.items() if others.get(token) != number}


def _token_differences(mine: _Change, other: _Change) -> TokenDifferences:
    only_here, only_there = mine.only_here(other), other.only_here(mine)
    moved = only_here.keys() & only_there.keys()
    ids = {only_here[token] for token in moved} | {only_there[token] for token in moved}
    ours, theirs = ({number: token for token, number in only.items()} for only in (only_here, only_there))
    return TokenDifferences(ours, theirs, sorted(ids | (ours.keys() & theirs.keys())))


@dataclass(frozen=True, slots=True)
class _Group:
    """Models of one vocabulary."""

    vocabulary: Vocabulary
    models: tuple[str, ...]
    num_rows: int
    """of the longest embedding among them"""
    is_merged: bool
    """whether rows of theirs go out, or the tokenizer that they belong to"""

    @property
    def named(self) -> str:
        return _listed(self.models)


def differing_vocabularies(proposal: Proposal) -> Iterator[Remark]:
    """Yield how the vocabularies of models whose rows are merged differ from the one that goes out, and each other."""
    merged = _merged(proposal)
    others = [index for index in range(len(proposal.tokenizers)) if index not in merged] if merged else []
    groups = _groups(proposal, [*merged, *others], set(merged))
    changes = [_Change.between(groups[0].vocabulary, group.vocabulary) for group in groups]
    for number, mine in enumerate(groups):
        for place, other in enumerate(groups[:number]):
            if mine.vocabulary.numbering != other.vocabulary.numbering:
                yield _incomparable(mine, other)
                continue
            found = _token_differences(changes[number], changes[place])
            yield from _contested(mine, other, found)
            if other is groups[0] and mine.is_merged:
                yield from _missing(mine, other, found)


def _merged(proposal: Proposal) -> list[int]:
    """Return the models whose rows go into tensors with a row per token, after the one whose tokenizer goes out."""
    if not proposal.tokenizers or proposal.recipe.vocabulary is not None:
        return []
    rows = proposal.tokenizers[proposal.recipe.donor].num_rows
    names = [name for name in vocabulary_tensors(proposal.donor.specs, rows) if name not in proposal.skipped]
    everyone = range(len(proposal.checkpoints))
    found: dict[int, None] = {proposal.recipe.side_files_donor: None}
    for name in names:
        job = proposal.written.get(name)
        found |= dict.fromkeys([operand.checkpoint for operand in job.reading.operands] if job else everyone)
    return list(found) if names else []


def _groups(proposal: Proposal, indices: Sequence[int], merged: Collection[int] = ()) -> list[_Group]:
    """Return models by vocabulary, in order; those without one are in none."""
    by_vocabulary: list[tuple[Vocabulary, list[int]]] = []
    for index in indices:
        vocabulary = proposal.tokenizers[index].vocabulary
        known = [models for each, models in by_vocabulary if each is vocabulary or each == vocabulary]
        if known:
            known[0].append(index)
        elif vocabulary is not None:
            by_vocabulary.append((vocabulary, [index]))
    return [
        _Group(
            each,
            _urls(proposal, models),
            max(proposal.tokenizers[model].num_rows for model in models),
            any(model in merged for model in models),
        )
        for each, models in by_vocabulary
    ]


def _incomparable(mine: _Group, other: _Group) -> Remark:
    parts = {part.partition("=")[0] for each in (mine, other) for part in each.vocabulary.numbering.split()}
    numbers = (
        f"{' and '.join(sorted(parts))} {'numbers' if len(parts) == 1 else 'number'} tokens anew, not alike in both"
    )
    reason = mine.vocabulary.problem or other.vocabulary.problem or numbers
    text = f"the tokens of {mine.named} and {other.named} cannot be compared: {reason}; make sure that their ids agree"
    return Remark("vocabularies-unread", text, _severity(mine, other), models=(*mine.models, *other.models))


def _severity(mine: _Group, other: _Group) -> Severity:
    return "refusal" if mine.is_merged and other.is_merged else "note"


def _contested(mine: _Group, other: _Group, found: TokenDifferences) -> Iterator[Remark]:
    """Yield which ids with a row in both mean different tokens."""
    num_rows = min(mine.num_rows, other.num_rows)
    ids = [number for number in found.contested if number < num_rows]
    if ids:
        examples = ", ".join(f"{number} is {found.meanings(number)}" for number in ids[:NUM_SHOWN])
        mean = "means" if len(ids) == 1 else "mean"
        text = (
            f"{counted(len(ids), 'id')} of {counted(len(mine.vocabulary.ids), 'token')} {mean} something else in "
            f"{mine.named} than in {other.named}: {examples}{_more(ids)}. "
        )
        severity = _severity(mine, other)
        text += REMEDY if severity == "refusal" else "Their rows are not mixed, what comes after them is"
        values = {str(number): found.meanings(number) for number in ids[:NUM_VALUES]}
        yield Remark("vocabularies-differ", text, severity, models=(*mine.models, *other.models), values=values)


def _missing(mine: _Group, published: _Group, found: TokenDifferences) -> Iterator[Remark]:
    """Yield which tokens are in one of the vocabularies only."""
    for having, lacking, tokens, hint in (
        (mine, published, found.added, f", and the tokenizer that goes out does not know them; {UNITES}"),
        (published, mine, found.lacking, ""),
    ):
        if tokens:
            lack = "lacks" if len(lacking.models) == 1 else "lack"
            text = (
                f"{lacking.named} {lack} {_tokens(tokens)} of {having.named}: what is merged in their rows was never "
                f"trained there{hint}"
            )
            values = {str(number): shown(token) for number, token in list(tokens.items())[:NUM_VALUES]}
            yield Remark("tokens-missing", text, models=(*mine.models, *published.models), values=values)


def tokens_beyond_rows(proposal: Proposal) -> Iterator[Remark]:
    """Yield the tokens for which the embedding of a model has no row."""
    for group in _groups(proposal, range(len(proposal.tokenizers))):
        tokens = {number: token for token, number in group.vocabulary.ids.items() if number >= group.num_rows}
        if group.num_rows and tokens and has_input_rows(proposal.donor.specs):
            tokens = dict(sorted(tokens.items()))
            text = (
                f"the {group.num_rows:,} rows of the embedding of {group.named} end before {_tokens(tokens)}: a text "
                "with them cannot be read by the model"
            )
            values = {str(number): shown(token) for number, token in list(tokens.items())[:NUM_VALUES]}
            yield Remark("tokens-beyond-rows", text, models=group.models, values=values)


def missing_tokenizers(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models have no tokenizer while others do."""
    without = [index for index, each in enumerate(proposal.tokenizers) if each.vocabulary is None]
    if not without or len(without) == len(proposal.tokenizers):
        return
    models, donor = _urls(proposal, without), proposal.recipe.side_files_donor
    if donor in without:
        text = f"{redact(proposal.side_files_donor.url)} has no tokenizer, so the output will have none; {CHOOSES}"
        yield Remark("no-tokenizer", text, models=models)
    others = _urls(proposal, [index for index in without if index != donor])
    if others:
        text = f"{_listed(others)} without a tokenizer: the ids are taken for those of the other models"
        yield Remark("no-tokenizer", text, "note", models=others)


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
        own = word.of(proposal, donor) if tunes else None
        others = {index: word.of(proposal, index) for index in tunes if index != donor}
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
    is_fixed = WORDS[what].is_role and asked is not None and asked.source != "union"
    advice = theirs if what == TEMPLATES[0] else CHOOSES_TOKENIZER if is_fixed else CHOOSES
    is_made = what == "generation config" and proposal.tokenizers[donor].generation is None
    said = f"none, so that loaders take {_brief(own)} of its config.json" if is_made and own else _brief(own)
    having = "every tune has" if is_of_none else f"{_listed(models)} {'has' if len(models) == 1 else 'have'}"
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
    is_role: bool = False
    """of a token"""


def _giver(proposal: Proposal, what: str, word: _Word) -> int:
    """Return which model's word goes out."""
    recipe = proposal.recipe
    if what in ("generation config", _EOS_ID):
        return recipe.side_files_donor
    says_it = word.is_role and recipe.roles_donor < len(proposal.tokenizers) and word.of(proposal, recipe.roles_donor)
    return recipe.roles_donor if says_it else recipe.vocabulary_donor


def _token(role: str, **flags: bool) -> _Word:
    return _Word(lambda proposal, index: proposal.tokenizers[index].roles.get(role), is_role=True, **flags)


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
    recipe, donor = proposal.recipe, proposal.recipe.vocabulary_donor
    if donor >= len(proposal.tokenizers) or not recipe.stockflow.copy_tokenizer:
        return
    tokenizer, url = proposal.tokenizers[donor], redact(proposal.checkpoints[donor].url)
    template = chosen_template(recipe, proposal.tokenizers) or tokenizer.template
    if template and (fault := fault_in(template)):
        text = f"the chat template that goes out cannot be read: {in_a_line(fault)}; {CHOOSES_TEMPLATE}"
        yield Remark("template-unread", text, models=(url,), values={"fault": fault})
    vocabulary = tokenizer.vocabulary
    known = vocabulary.ids if vocabulary and not vocabulary.problem and not recipe.vocabulary else None
    if template and known and (strange := [each for each in markers_in(template) if each not in known]):
        some, are_none = (
            ", ".join(map(shown, strange[:NUM_SHOWN])),
            "is no token" if len(strange) == 1 else "are no tokens",
        )
        text = (
            f"the chat template that goes out writes {some}{_more(strange)}, which {are_none} of {url}, whose "
            "tokenizer goes out: a model reads several tokens there"
        )
        yield Remark("template-unread", text, "note", (url,), values=dict.fromkeys(strange, "no token"))


def _generation(proposal: Proposal, index: int) -> Config | None:
    """Return generation_config.json, or what loaders make of config.json if only others have that file."""
    files = [each.generation for each in proposal.tokenizers]
    own = files[index]
    if own is None and files[proposal.recipe.side_files_donor] is None and any(files):
        own = said_of_language(proposal.checkpoints[index].config)
    asked = {key for each in files for key in each or ()}
    return None if own is None else {key: own[key] for key in sorted(asked & own.keys()) if own[key] is not None}


def _eos_id(proposal: Proposal, index: int) -> object:
    generation = proposal.tokenizers[index].generation or {}
    config = said_of_language(proposal.checkpoints[index].config)
    return generation.get("eos_token_id", config.get("eos_token_id"))


def _urls(proposal: Proposal, indices: Sequence[int]) -> tuple[str, ...]:
    return tuple(redact(proposal.checkpoints[index].url) for index in indices)


def _listed(models: Sequence[str]) -> str:
    return ", ".join(models)


def _tokens(tokens: Mapping[int, str]) -> str:
    examples = ", ".join(f"{shown(token)} ({number})" for number, token in list(tokens.items())[:NUM_SHOWN])
    return f"{counted(len(tokens), 'token')}: {examples}{_more(tokens)}"


def _more(found: Sized) -> str:
    return f" and {len(found) - NUM_SHOWN:,} more" if len(found) > NUM_SHOWN else ""


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else shown(token)


def _brief(found: object) -> str:
    return "none" if found is None else shown(found)
