"""Tokenizers beside each other: ids that mean different tokens, tokens without a row, words that are no tune's."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stockflow.checkpoints.tokens.reading import Vocabulary
from stockflow.checkpoints.tokens.token_rows import has_input_rows, vocabulary_tensors
from stockflow.checkpoints.tokens.vocabularies import FAST, Ids
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.looks.words import CHOOSES
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

NUM_SHOWN = 3
"""tokens in a sentence"""
NUM_VALUES = 20
"""tokens in what programs read"""
REMEDY = "Rows of different tokens would be mixed; `tokenizer_source: base` or `union` merges them by token"
WRITES_FAST = "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a tokenizer.json, which says it"
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
                yield from _missing(mine, other, found, _unites(proposal))


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
        examples = some(ids, NUM_SHOWN, lambda number: f"{number} is {found.meanings(number)}")
        mean = "means" if len(ids) == 1 else "mean"
        text = (
            f"{counted(len(ids), 'id')} of {counted(len(mine.vocabulary.ids), 'token')} {mean} something else in "
            f"{mine.named} than in {other.named}: {examples}. "
        )
        severity = _severity(mine, other)
        text += REMEDY if severity == "refusal" else "Their rows are not mixed, what comes after them is"
        values = {str(number): found.meanings(number) for number in ids[:NUM_VALUES]}
        yield Remark("vocabularies-differ", text, severity, models=(*mine.models, *other.models), values=values)


def _unites(proposal: Proposal) -> str:
    """Return what keeps tokens that the tokenizer which goes out lacks."""
    is_fast = FAST in proposal.side_files_donor.side_files
    return UNITES if is_fast else f"{WRITES_FAST}, and {UNITES}"


def _missing(mine: _Group, published: _Group, found: TokenDifferences, unites: str) -> Iterator[Remark]:
    """Yield which tokens are in one of the vocabularies only, or may be, where code adds some to the other."""
    for having, lacking, tokens, hint in (
        (mine, published, found.added, f", and the tokenizer that goes out does not know them; {unites}"),
        (published, mine, found.lacking, ""),
    ):
        if tokens and lacking.vocabulary.is_open and min(tokens) >= len(lacking.vocabulary.ids):
            text = (
                f"whether {lacking.named} has {_tokens(tokens)} of {having.named} cannot be told: code of its "
                f"tokenizer's class may add tokens to what its files say; {WRITES_FAST}"
            )
            yield Remark("tokens-missing", text, "note", (*mine.models, *published.models), values=_values(tokens))
        elif tokens:
            lack = "lacks" if len(lacking.models) == 1 else "lack"
            text = (
                f"{lacking.named} {lack} {_tokens(tokens)} of {having.named}: what is merged in their rows was never "
                f"trained there{hint}"
            )
            yield Remark("tokens-missing", text, models=(*mine.models, *published.models), values=_values(tokens))


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
            yield Remark("tokens-beyond-rows", text, models=group.models, values=_values(tokens))


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


def _urls(proposal: Proposal, indices: Sequence[int]) -> tuple[str, ...]:
    return tuple(redact(proposal.checkpoints[index].url) for index in indices)


def _listed(models: Sequence[str]) -> str:
    return ", ".join(models)


def _tokens(tokens: Mapping[int, str]) -> str:
    examples = some([*tokens.items()], NUM_SHOWN, lambda each: f"{shown(each[1])} ({each[0]})")
    return f"{counted(len(tokens), 'token')}: {examples}"


def _values(tokens: Mapping[int, str]) -> dict[str, str]:
    return {str(number): shown(token) for number, token in list(tokens.items())[:NUM_VALUES]}


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else shown(token)
