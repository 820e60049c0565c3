"""Ids of tokens in configs: they follow the output's vocabulary, token by token."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stockflow.checkpoints.configs import TOKEN_IDS, Config
from stockflow.checkpoints.heads import LANGUAGE_PARTS, said_of_language
from stockflow.checkpoints.opening import CONFIG_FILE, Checkpoint
from stockflow.checkpoints.tokens.said import END
from stockflow.checkpoints.tokens.tokenizers import GENERATION_CONFIG, Tokenizer
from stockflow.checkpoints.tokens.vocabularies import Ids
from stockflow.planning.vocabulary.rows import OutputVocabulary
from stockflow.recipe import Recipe
from stockflow.text.examples import such
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

NUM_SHOWN, MAX_NAMED = 3, 20
"""tokens in a sentence, and in what programs read"""
_KEY = re.compile(TOKEN_IDS)


@dataclass
class Renumbering:
    """From the ids of one model to those of the output."""

    old: Mapping[int, str]
    new: Ids
    moved: dict[str, tuple[int, int]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    """ids by token, of those that the output does not have"""

    @classmethod
    def between(cls, model: Ids, output: Ids) -> "Renumbering":
        """Return what leads from the tokens of a model to those of the output."""
        return cls({number: token for token, number in model.items()}, output)

    def of(self, config: Config) -> dict[str, object]:
        """Return a config with the ids of the output, in the configs within it too."""
        return {key: self._of_key(key, value) for key, value in config.items()}

    def _of_key(self, key: str, value: object) -> object:
        if key == "forced_decoder_ids" and isinstance(value, list):  # pairs of a place and an id
            return [[*each[:1], *map(self._value, each[1:])] if isinstance(each, list) else each for each in value]
        if key in ("lang_to_id", "task_to_id") and isinstance(value, dict):
            return {token: self._value(number) for token, number in value.items()}
        return self._value(value) if _KEY.fullmatch(key) else self._within(value)

    def _within(self, value: object) -> object:
        return self.of(value) if isinstance(value, dict) else value

    def _value(self, value: object) -> object:
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if type(value) is not int or value not in self.old:
            return value
        token = self.old[value]
        number = self.new.get(token)
        if number is None:
            self.lost[token] = value
            return value
        if number != value:
            self.moved[token] = (value, number)
        return number

    def remarks(self, file: str) -> Iterator[Remark]:
        """Yield what became of the ids of a file."""
        if self.moved:
            said = ", ".join(f"{shown(token)} {old} to {new}" for token, (old, new) in self.moved.items())
            text = f"ids of tokens in {file} follow the vocabulary: {said}"
            yield Remark("token-ids", text, "note", values={token: str(new) for token, (_, new) in self.moved.items()})
        if self.lost:
            said = ", ".join(f"{shown(token)} ({number})" for token, number in self.lost.items())
            text = f"{file} names tokens by their ids that the output does not have: {said}; correct it in the output"
            yield Remark("token-ids", text, values={token: str(number) for token, number in self.lost.items()})


def _changed_tokens(vocabulary: OutputVocabulary) -> Iterator[Remark]:
    """Yield which tokens of the models have no row in the output, and which of its tokens no model has."""
    merged = {token: number for ids in vocabulary.own for token, number in ids.items()}
    dropped = sorted(merged.keys() - vocabulary.ids.keys())
    if dropped:
        text = f"{_such(dropped)} of the models are not in the vocabulary that is written: their rows are dropped"
        yield Remark("tokens-missing", text, "note", values=dict.fromkeys(dropped[:MAX_NAMED], "dropped"))
    unknown = sorted(vocabulary.ids.keys() - merged.keys() - vocabulary.defaults.keys())
    if unknown:
        text = f"{_such(unknown)} are in none of the merged models: their rows are zeros, and were never trained"
        yield Remark("tokens-missing", text, values=dict.fromkeys(unknown[:MAX_NAMED], "zeros"))


def _such(tokens: Sequence[str]) -> str:
    return such(tokens, "token", most=NUM_SHOWN)


@dataclass(frozen=True, slots=True)
class Followed:
    """Configs that follow the output's vocabulary."""

    config: Config | None
    generation: Config | None = None
    """generation_config.json where it says something else then"""
    remarks: tuple[Remark, ...] = ()
    ids: Ids | None = None
    """the output's, where rows move"""


def following(
    recipe: Recipe,
    config: Config | None,
    checkpoints: Sequence[Checkpoint],
    tokenizers: Sequence[Tokenizer],
    vocabulary: OutputVocabulary | None,
) -> Followed:
    """Return the config that is published, and the one for generating, with the ids that tokens have in the output.

    Which id ends texts the model says whose side files are taken.
    """
    end = said_of_language(checkpoints[recipe.side_files_donor].config).get(END)
    ends: Config | None = None if end is None or recipe.side_files_donor == recipe.donor else {END: end}
    if vocabulary is None:
        return Followed(_with_ends(config, ends))
    base = tokenizers[recipe.donor].vocabulary
    remarks = list(_changed_tokens(vocabulary))

    def renumbered(given: Config | None, donor: int, file: str) -> Config | None:
        known = tokenizers[donor].vocabulary or base
        if given is None or known is None:
            return given
        renumbering = Renumbering.between(known.ids, vocabulary.ids)
        made: Config = renumbering.of(given)
        remarks.extend(renumbering.remarks(file))
        return made

    followed = renumbered(config, recipe.donor, CONFIG_FILE)
    ends = renumbered(ends, recipe.side_files_donor, CONFIG_FILE)
    own = tokenizers[recipe.side_files_donor].generation
    generation = renumbered(own, recipe.side_files_donor, GENERATION_CONFIG)
    generation = None if generation == own else generation
    return Followed(_with_ends(followed, ends), generation, tuple(remarks), vocabulary.ids)


def _with_ends(config: Config | None, ends: Config | None) -> Config | None:
    """Return a config with the id that ends texts, in the sections of its language model that say one."""
    if config is None or not ends:
        return config
    parts = ((key, config.get(key)) for key in LANGUAGE_PARTS)
    made: dict[str, object] = {key: _with_ends(part, ends) for key, part in parts if isinstance(part, dict)}
    return {**config, **made, **{key: ends[key] for key in ends if key in config}}
