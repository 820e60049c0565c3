"""Configs of all models held against each other: facts that shapes do not show, which the published one decides."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from stockflow.checkpoints.configs import (
    ARCHITECTURE,
    CONTEXT,
    FOUND_LATER,
    HEADS,
    MEANING,
    NEVER_ALONE,
    Config,
    Trait,
    computing_keys,
    further_keys,
    is_of_tokens,
    says_nothing,
    sections,
    size_keys,
    token_keys,
    trait,
)
from stockflow.checkpoints.defaults import default_of, is_of_own_code
from stockflow.checkpoints.heads import is_of_language, said_of_language
from stockflow.checkpoints.spellings import COUNTED, comparable, layer_types, reworded
from stockflow.checkpoints.tokens.said import END, ids_as_sets
from stockflow.checkpoints.tokens.tokenizers import GENERATION_CONFIG
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.remarks import Remark, Severity
from stockflow.text.strictjson import shown

MAX_ITEMS_SHOWN = 6
"""of a list; of longer ones those that differ"""
Sections = Mapping[str, Config]
"""of a config by path, or of one path by model"""
_OTHER_WAY = "the merged weights will run with the published one, some were trained with another"
_KINDS: Sequence[tuple[str, Severity, Sequence[Trait], str]] = (
    ("architecture-differs", "refusal", ARCHITECTURE, "tensors of equal names and shapes need not be used alike"),
    ("heads-differ", "refusal", HEADS, "the same rows belong to other heads, and no average of them is a model"),
    (
        "config-differs", "warning", MEANING,
        _OTHER_WAY,
    ),
    ("context-length-differs", "note", CONTEXT, "no tensor depends on it"),
)  # fmt: skip
_ELSEWHERE = "_language_elsewhere"
"""Key of a section whose language model is held against one within others."""
_NOT_SAID = " (which its config does not say: its class takes that)"
_OF_GENERATION = f"{GENERATION_CONFIG}: "
"""A path beside those of config.json."""
_OTHER_TOKEN = "models that were trained with another token there meet the published one"
_OTHER_FILLING = "classifiers look before it, and in kin of RoBERTa positions are counted from it"
_OTHER_SIZE = "their tensors have equal shapes, so that one of them is wrong, and loaders go by the published one"


class Disagreement(NamedTuple):
    """A fact of which the models say different things."""

    name: str
    values: Mapping[str, object]
    """by location, of those that say something, or whose class does"""
    assumed: Collection[str] = ()
    """those that do not say it, and take what their class does"""

    def shown(self) -> dict[str, str]:
        """Return each value as messages have it, and whether no file says it."""
        differ = any(value != next(iter(self.values.values())) for value in self.values.values())
        given = _telling(self.values) if differ else self.values
        return {url: f"{shown(value)}{_NOT_SAID if url in self.assumed else ''}" for url, value in given.items()}


class Configs(NamedTuple):
    """Those of all models, or of one component of theirs."""

    published: str
    """location of the model whose config goes out"""
    sections: Mapping[str, Sections]
    """by location of the models that have one"""
    generating: Sections = MappingProxyType({})
    """generation_config.json by location, into which newer versions move keys"""

    def traits(self, keys_of: Callable[[Config], Iterable[str]]) -> list[Trait]:
        """Return facts of single keys that any config has."""
        of_all = (section for each in self.sections.values() for section in each.values())
        return [trait(key) for key in sorted({key for section in of_all for key in keys_of(section)})]

    def by_path(self) -> Iterator[tuple[str, Sections]]:
        """Yield each path with what the models have there, if there are several models."""
        paths = dict.fromkeys(path for each in self.sections.values() for path in each)
        for path in paths if len(self.sections) > 1 else ():
            yield path, _with_listed_layers({url: each[path] for url, each in self.sections.items() if path in each})

    def disagreements(self, traits: Iterable[Trait]) -> Iterator[Disagreement]:
        """Yield the facts of which models say different things."""
        for path, own in self.by_path():
            for each in traits:
                for asked in (each, *map(trait, each.aliases)):
                    found = _values(asked, own)
                    if any(value != next(iter(found.values())) for value in found.values()):
                        yield Disagreement(path + asked.name, found, _silent(asked, own))
                        break

    def said_by_some(self, traits: Sequence[Trait]) -> Iterator[tuple[Disagreement, list[str]]]:
        """Yield what some models say in one voice and others do not say, and which are these."""
        own_code = {url for url, each in self.sections.items() if is_of_own_code(each.get("", {}))}
        for path, own in self.by_path():
            for each in traits:
                is_asked = each.default is None and any(each.read(section) is not None for section in own.values())
                values = {url: _value(each, section) for url, section in own.items()} if is_asked else {}
                is_open = each in MEANING and any(url in own_code and value is None for url, value in values.items())
                said = {
                    url: value
                    for url, value in values.items()
                    if each.is_said(value) or (is_open and value is not None)
                }
                others = FOUND_LATER.difference(each.keys) if FOUND_LATER.intersection(each.keys) else frozenset[str]()
                silent = [
                    url
                    for url, value in values.items()
                    if value is None
                    and others.isdisjoint(own[url])
                    and each.name not in self.sections[url].get(_OF_GENERATION, ())
                    and self.generating.get(url, {}).get(each.name, ...) not in said.values()
                ]
                is_one_voice = all(value == next(iter(said.values())) for value in said.values())
                if said and silent and is_one_voice and not NEVER_ALONE.intersection(each.keys):
                    yield Disagreement(path + each.name, said, _silent(each, own)), silent

    def told(self, found: Disagreement) -> str:
        """Return every value with the models that have it, the published one first."""
        owners: dict[str, list[str]] = {}
        for url, value in sorted(found.shown().items(), key=lambda item: item[0] != self.published):
            owners.setdefault(value, []).append(self.named(url))
        return ", ".join(f"{value} in {', '.join(urls)}" for value, urls in owners.items())

    def named(self, url: str) -> str:
        """Return a location, and whether what is said there is published."""
        return f"{url} (published)" if url == self.published else url


def missing_configs(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models besides the one that gives the config have none."""
    urls = [redact(each.url) for each in proposal.checkpoints if each.config is None and each is not proposal.donor]
    if urls and proposal.donor.config is not None:
        text = f"{', '.join(urls)} {'has' if len(urls) == 1 else 'have'} no config.json to hold against the others'"
        yield Remark("no-config", text, "note", tuple(urls))


def differing_configs(proposal: Proposal, said: Collection[str]) -> Iterator[Remark]:
    """Yield what configs disagree on, those of the models and those of components that are merged.

    Args:
        proposal: what is looked at.
        said: keys of the published config of which it is said that no tensor keeps what they promise.
    """
    keeps_ids = proposal.recipe.vocabulary is None
    models, *components = _of_models(proposal), *_of_components(proposal)
    for configs in (models, *components):
        of_tokens = configs.traits(token_keys) if keeps_ids else []
        further: Sequence[tuple[str, Severity, Sequence[Trait], str]] = (
            ("config-differs", "warning", of_tokens, _OTHER_TOKEN),
            ("config-differs", "warning", configs.traits(computing_keys), _OTHER_WAY),
        )
        for code, severity, traits, means in (*_KINDS, *further):
            for found in configs.disagreements(traits):
                yield _differing(configs, code, severity, found, means)
        for found, silent in configs.said_by_some([*MEANING, *of_tokens]):
            yield _said_by_some(configs, found, silent)
    for found, silent in models.said_by_some(models.traits(computing_keys)):
        yield replace(_said_by_some(models, found, silent), severity="note")
    yield from _other_sizes(proposal, models, said)
    yield from _other_keys(models, keeps_ids, proposal.recipe.side_files_donor == proposal.recipe.donor)


def _differing(configs: Configs, code: str, severity: Severity, found: Disagreement, means: str) -> Remark:
    filling = f"; {_OTHER_FILLING}" if means == _OTHER_TOKEN and found.name.endswith("pad_token_id") else ""
    text = f"{found.name} differs: {configs.told(found)}; {means}{filling}"
    return Remark(code, text, severity, tuple(found.values), values=found.shown())


def _said_by_some(configs: Configs, found: Disagreement, silent: Sequence[str]) -> Remark:
    """Say what is no default of most classes; a warning if it is not published."""
    text = (
        f"{found.name} is said by some models only: {configs.told(found)}; not by "
        f"{', '.join(map(configs.named, silent))}: loaders take what the class of a model has by default, which need "
        "not be that"
    )
    key = found.name.rpartition(".")[2]
    tells = is_of_tokens(key) or not all(map(says_nothing, found.values.values()))
    is_lost = configs.published in silent and key not in FOUND_LATER and tells
    values = found.shown()
    return Remark("config-differs", text, "warning" if is_lost else "note", (*values, *silent), values=values)


def _other_sizes(proposal: Proposal, configs: Configs, said: Collection[str]) -> Iterator[Remark]:
    """Yield which sizes configs disagree on though the tensors are of one shape: loaders go by the published one."""
    if proposal.stackings or proposal.recipe.vocabulary is not None:
        return
    differing = [each for each in configs.disagreements(configs.traits(size_keys)) if each.name not in said]
    for found in differing if differing and not _copies_differ(proposal) else ():
        yield _differing(configs, "promise-unkept", "warning", found, _OTHER_SIZE)


def _copies_differ(proposal: Proposal) -> bool:
    """Whether models have tensors of several shapes, of which one is copied or none is written."""
    names = [*(job.output.name for job in proposal.jobs if job.is_copy), *proposal.skipped]
    specs = [each.specs for each in proposal.checkpoints]
    return any(len({each[name].shape for each in specs if name in each}) > 1 for name in names)


def _other_keys(configs: Configs, keeps_ids: bool, keeps_end: bool) -> Iterator[Remark]:
    """Yield which keys differ that stockflow does not know, or that are of tokens which need not begin or end texts."""
    traits = [each for each in configs.traits(further_keys) if keeps_ids or not is_of_tokens(each.name)]
    traits = [each for each in traits if keeps_end or each.name != END]
    told = {each.name for each in configs.traits(computing_keys)}
    open_ones = [each for each in traits if each.name not in told]
    both = [*((each, ()) for each in configs.disagreements(open_ones)), *configs.said_by_some(open_ones)]
    found = [each for each, silent in both if not _is_filling_of_some(configs, each, silent)]
    if found:
        said = "; ".join(f"{shown(each.name)}: {configs.told(each)}" for each in found)
        text = f"configs differ in keys that are not known to give weights another meaning: {said}"
        yield Remark("config-keys-differ", text, "note", values={each.name: configs.told(each) for each in found})


def _is_filling_of_some(configs: Configs, found: Disagreement, silent: Collection[str]) -> bool:
    """Whether only some models fill texts with another token than the published one, which no weight knows."""
    own = found.values.get(configs.published)
    agreeing = silent if configs.published in silent else [url for url, each in found.values.items() if each == own]
    is_shared = configs.published in agreeing and len(agreeing) > 1
    return is_shared and found.name.rpartition(".")[2] == "pad_token_id"


def _telling(values: Mapping[str, object]) -> Mapping[str, object]:
    """What tells values apart: of mappings and lists the items that differ, so that none is cut away."""
    if all(isinstance(value, list) and len(value) > MAX_ITEMS_SHOWN for value in values.values()):
        return _telling({url: {f"[{i}]": item for i, item in enumerate(_items(v))} for url, v in values.items()})
    if not all(isinstance(value, dict) for value in values.values()):
        return values
    keys = dict.fromkeys(key for value in values.values() for key in _pairs(value))
    found: dict[str, dict[str, object]] = {url: {} for url in values}
    for key in keys:
        own = {url: _pairs(value).get(key) for url, value in values.items()}
        if any(value != next(iter(own.values())) for value in own.values()):
            for url, value in _telling(own).items():
                found[url][key] = value
    return found


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def _pairs(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _of_models(proposal: Proposal) -> Configs:
    """Return config.json of all models, with what generation_config.json says of tokens."""
    found, published = dict[str, Sections](), _language_path(proposal.donor.config)
    generation = _of_generation(proposal)
    donors = {path: _as_one(section, ()) for path, section in sections(proposal.donor.config or {})}
    for number, each in enumerate(proposal.checkpoints):
        if each.config is not None:
            nums = {stacking.num_layers.get(number) for stacking in proposal.stackings}
            own = {path: _as_one(section, nums) for path, section in sections(each.config)}
            found[redact(each.url)] = {
                **_language_at(published, own, _language_path(each.config), donors),
                **{path: _as_one(section, nums) for path, section in _halves(each.config)},
                **generation[number],
            }
    models = zip(proposal.checkpoints, proposal.tokenizers, strict=False)
    return Configs(redact(proposal.donor.url), found, {redact(each.url): own.generation or {} for each, own in models})


def _with_listed_layers(own: Sections) -> Sections:
    """Return sections that all list the kinds of their layers if any does: others count them, which says the same."""
    listed = {url: layer_types(section) for url, section in own.items()}
    if not any("layer_types" in section for section in own.values()) or not all(listed.values()):
        return own
    uncounted = {url: {key: own[url][key] for key in own[url] if key not in COUNTED} for url in own}
    return {url: {**uncounted[url], "layer_types": kinds} for url, kinds in listed.items()}


def _halves(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield the configs of encoder and decoder, of models that are put together of two."""
    for key in ("encoder", "decoder"):
        if isinstance(own := config.get(key), dict):
            yield f"{key}.", own


def _of_generation(proposal: Proposal) -> Sequence[dict[str, Config]]:
    """Return what generation_config.json of each model says of tokens, if any has one: else loaders ask config.json."""
    given = [each.generation for each in proposal.tokenizers]
    if not any(given):
        return [{}] * len(proposal.checkpoints)
    models = zip(proposal.checkpoints, given, strict=False)
    said = [said_of_language(each.config) if own is None else own for each, own in models]
    return [{_OF_GENERATION: ids_as_sets({key: own[key] for key in own if is_of_tokens(key)})} for own in said]


def _of_components(proposal: Proposal) -> Iterator[Configs]:
    """Yield the configs of each component and module of which tensors are merged."""
    published = redact(proposal.side_files_donor.url)
    for key in proposal.merged_configs:
        models = zip(proposal.checkpoints, proposal.tokenizers, strict=False)
        given = {redact(each.url): own.uses[key] for each, own in models if key in own.uses}
        own_sections = {url: sections(own, f"{key}: ") for url, own in given.items()}
        yield Configs(
            published, {url: {path: _as_one(own, ()) for path, own in each} for url, each in own_sections.items()}
        )


def _language_path(config: Config | None) -> str:
    """Return where a config says what its language model is: at the top, or within."""
    return max((path for path, _ in sections(config or {}) if is_of_language(path)), key=len)


def _language_at(path: str, own: dict[str, Config], here: str, donors: Sections) -> dict[str, Config]:
    """Return sections with that of the language model at another path; what class it is stays where it was said.

    The type of a language model that is alone goes with it, as what its class takes by default does, unless it is that
    of the donor's whole model. Tokens of images and the like are taken where the donor names them.
    """
    if path == here:
        return own
    top, whole, theirs = own.get("", {}), donors.get("", {}), donors.get(path, {})
    of_class = {key for each in ARCHITECTURE for key in each.keys}
    at_top = {key: value for key, value in top.items() if key in of_class}
    kept = {"model_type"} if own.keys() == {""} and top.get("model_type") != whole.get("model_type") else set[str]()
    language = {key: value for key, value in own[here].items() if key in kept or key not in of_class}
    tokens = {key: top[key] for key in token_keys(top) if here or key in whole}
    if here == "":
        language = {key: value for key, value in language.items() if key not in tokens or theirs.get(key) is not None}
    else:
        language |= {key: value for key, value in tokens.items() if path == "" and language.get(key) is None}
    moved = {**{key: each for key, each in own.items() if key not in ("", here)}, path: language}
    mark = {_ELSEWHERE: path, **tokens} if here == "" else {}
    return {**moved, "": {**moved.get("", {}), **at_top, **mark}}


def _as_one(section: Config, nums: Collection[int | None]) -> Config:
    """A section without what it lists per layer, of models whose layers are stacked: that follows the layers."""
    per_layer = [key for key, value in section.items() if isinstance(value, list) and len(value) in nums]
    own = {key: comparable(value) for key, value in section.items() if key not in per_layer}
    return reworded(ids_as_sets(own))


def _value(each: Trait, section: Config) -> object:
    """Return what a section says, or what its class takes where it says nothing."""
    said = each.read(section)
    if said is None and _ELSEWHERE in section:
        return None
    return default_of(each.name, section, each.usual(section)) if said is None else said


def _silent(each: Trait, own: Mapping[str, Config]) -> list[str]:
    """Return which models leave a fact to their class; a null may say that it is switched off."""
    return [url for url, section in own.items() if each.read(section) is None and _value(each, section) != "null"]


def _values(each: Trait, own: Mapping[str, Config]) -> dict[str, object]:
    filled = {url: _value(each, section) for url, section in own.items()}
    return {url: value for url, value in filled.items() if value is not None}
