"""Configs of all models held against each other: facts that shapes do not show, which the published one decides."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
    comparable,
    further_keys,
    says_nothing,
    sections,
    size_keys,
    token_keys,
    trait,
)
from stockflow.checkpoints.heads import is_of_language
from stockflow.planning.looks.promises import missing_layers
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.looks.sizes import broken_sizes
from stockflow.storage import redact
from stockflow.text.remarks import Remark, Severity
from stockflow.text.strictjson import shown

MAX_ITEMS_SHOWN = 6
"""of a list; of longer ones those that differ"""


class Disagreement(NamedTuple):
    """A fact of which the models say different things."""

    name: str
    values: Mapping[str, object]
    """by location, of those that say something"""


def missing_configs(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models besides the one that gives the config have none."""
    urls = [redact(each.url) for each in proposal.checkpoints if each.config is None and each is not proposal.donor]
    if urls and proposal.donor.config is not None:
        text = f"{', '.join(urls)} {'has' if len(urls) == 1 else 'have'} no config.json to hold against the others'"
        yield Remark("no-config", text, "note", tuple(urls))


def other_architectures(proposal: Proposal) -> Iterator[Remark]:
    """Yield that models are not of one architecture."""
    for found in _disagreements(proposal, ARCHITECTURE):
        means = "tensors of equal names and shapes need not be used alike"
        yield _remark(proposal, "architecture-differs", "refusal", found, means)


def other_heads(proposal: Proposal) -> Iterator[Remark]:
    """Yield that models cut tensors of equal shapes into other heads."""
    for found in _disagreements(proposal, HEADS):
        means = "the same rows belong to other heads, and no average of them is a model"
        yield _remark(proposal, "heads-differ", "refusal", found, means)


def other_meanings(proposal: Proposal) -> Iterator[Remark]:
    """Yield what else gives equal tensors another meaning."""
    for found in _disagreements(proposal, MEANING):
        means = "the merged weights will run with the published one, some were trained with another"
        yield _remark(proposal, "config-differs", "warning", found, means)


def meanings_of_some(proposal: Proposal) -> Iterator[Remark]:
    """Yield what some models alone say, where it is no default of most classes; a warning if it is not published."""
    donor = redact(proposal.donor.url)
    of_tokens = _traits(proposal, token_keys) if proposal.recipe.vocabulary is None else []
    for name, said, silent in _said_by_some(proposal, [*MEANING, *of_tokens]):
        values = {url: shown(value) for url, value in said.items()}
        text = (
            f"{name} is said by some models only: {_said(proposal, Disagreement(name, said))}; not by "
            f"{', '.join(silent)}{' (published)' * (donor in silent)}: loaders take what the class of a model has by "
            "default, which need not be that"
        )
        severity: Severity = "warning" if donor in silent and name.rpartition(".")[2] not in FOUND_LATER else "note"
        yield Remark("config-differs", text, severity, (*said, *silent), values=values)


def other_tokens(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tokens configs speak of by other ids, if the models' tokens keep theirs."""
    for found in _disagreements(proposal, _traits(proposal, token_keys)) if proposal.recipe.vocabulary is None else ():
        means = "models that were trained with another token there meet the published one"
        yield _remark(proposal, "config-differs", "warning", found, means)


def other_sizes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which sizes configs disagree on though the tensors are of one shape: loaders go by the published one."""
    if proposal.stackings or proposal.recipe.vocabulary is not None:
        return
    differing = list(_disagreements(proposal, _traits(proposal, size_keys)))
    if not differing or _copies_differ(proposal):
        return
    said = {key for look in (broken_sizes, missing_layers) for each in look(proposal) for key in each.values}
    for found in differing:
        if found.name not in said:
            means = "their tensors have equal shapes, so that one of them is wrong, and loaders go by the published one"
            yield _remark(proposal, "promise-unkept", "warning", found, means)


def _copies_differ(proposal: Proposal) -> bool:
    """Whether models have tensors of several shapes, of which one is copied or none is written."""
    names = [*(job.output.name for job in proposal.jobs if job.is_copy), *proposal.skipped]
    specs = [each.specs for each in proposal.checkpoints]
    return any(len({each[name].shape for each in specs if name in each}) > 1 for name in names)


def other_contexts(proposal: Proposal) -> Iterator[Remark]:
    """Yield that models are said to take texts of different lengths."""
    for found in _disagreements(proposal, CONTEXT):
        yield _remark(proposal, "context-length-differs", "note", found, "no tensor depends on it")


def other_keys(proposal: Proposal) -> Iterator[Remark]:
    """Yield which keys differ that stockflow does not know."""
    traits = _traits(proposal, further_keys)
    found = [*_disagreements(proposal, traits)]
    found += [Disagreement(name, said) for name, said, _ in _said_by_some(proposal, traits)]
    if found:
        said = "; ".join(f"{shown(each.name)}: {_said(proposal, each)}" for each in found)
        text = f"configs differ in keys that are not known to give weights another meaning: {said}"
        yield Remark("config-keys-differ", text, "note", values={each.name: _said(proposal, each) for each in found})


def _traits(proposal: Proposal, keys_of: Callable[[Config], Iterable[str]]) -> list[Trait]:
    """Facts of single keys that any config has."""
    sections_of_all = (each for config in _configs(proposal).values() for each in config.values())
    return [trait(key) for key in sorted({key for section in sections_of_all for key in keys_of(section)})]


def _remark(proposal: Proposal, code: str, severity: str, found: Disagreement, means: str) -> Remark:
    values = {url: shown(value) for url, value in _telling(found.values).items()}
    text = f"{found.name} differs: {_said(proposal, found)}; {means}"
    return Remark(code, text, severity, tuple(found.values), values=values)  # type: ignore[arg-type]


def _said(proposal: Proposal, found: Disagreement) -> str:
    """Every value with the models that have it, the published one first."""
    donor = redact(proposal.donor.url)
    owners: dict[str, list[str]] = {}
    for url, value in sorted(_telling(found.values).items(), key=lambda item: item[0] != donor):
        owners.setdefault(shown(value), []).append(url)
    said = [f"{value} in {', '.join(urls)}{' (published)' * (donor in urls)}" for value, urls in owners.items()]
    return ", ".join(said)


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


def _configs(proposal: Proposal) -> dict[str, dict[str, Config]]:
    """Sections by path, by location of the models that have a config."""
    found, published = {}, _language_path(proposal.donor.config)
    for number, each in enumerate(proposal.checkpoints):
        if each.config is not None:
            nums = {stacking.num_layers.get(number) for stacking in proposal.stackings}
            own = {path: _as_one(section, nums) for path, section in sections(each.config)}
            found[redact(each.url)] = _language_at(published, own, _language_path(each.config))
    return found


def _language_path(config: Config | None) -> str:
    """Return where a config says what its language model is: at the top, or within."""
    return max((path for path, _ in sections(config or {}) if is_of_language(path)), key=len)


def _language_at(path: str, own: dict[str, Config], here: str) -> dict[str, Config]:
    """Return sections with that of the language model at another path; what class it is stays where it was said."""
    if path == here:
        return own
    of_class = {key for each in ARCHITECTURE for key in each.keys}
    at_top = {key: value for key, value in own.get("", {}).items() if key in of_class}
    language = {key: value for key, value in own[here].items() if key not in of_class}
    moved = {**{key: each for key, each in own.items() if key not in ("", here)}, path: language}
    return {**moved, "": {**moved.get("", {}), **at_top}}


def _as_one(section: Config, nums: Collection[int | None]) -> Config:
    """A section without what it lists per layer, of models whose layers are stacked: that follows the layers."""
    per_layer = [key for key, value in section.items() if isinstance(value, list) and len(value) in nums]
    return {key: comparable(value) for key, value in section.items() if key not in per_layer}


def _disagreements(proposal: Proposal, traits: Iterable[Trait]) -> Iterator[Disagreement]:
    configs = _configs(proposal)
    paths = dict.fromkeys(path for config in configs.values() for path in config)
    for path in paths if len(configs) > 1 else ():
        own = {url: config[path] for url, config in configs.items() if path in config}
        for each in traits:
            for asked in (each, *map(trait, each.aliases)):
                found = _values(asked, own)
                if any(value != next(iter(found.values())) for value in found.values()):
                    yield Disagreement(path + asked.name, found)
                    break


def _said_by_some(proposal: Proposal, traits: Sequence[Trait]) -> Iterator[tuple[str, dict[str, object], list[str]]]:
    """Yield what some models say in one voice and others do not say: its name, the values, and who is silent."""
    configs = _configs(proposal)
    paths = dict.fromkeys(path for config in configs.values() for path in config)
    for path in paths if len(configs) > 1 else ():
        own = {url: config[path] for url, config in configs.items() if path in config}
        for each in traits:
            values = {url: each.read(section) for url, section in own.items()} if each.default is None else {}
            said = {url: value for url, value in values.items() if not says_nothing(value)}
            others = FOUND_LATER.difference(each.keys) if FOUND_LATER.intersection(each.keys) else frozenset[str]()
            silent = [url for url, value in values.items() if value is None and others.isdisjoint(own[url])]
            is_one_voice = all(value == next(iter(said.values())) for value in said.values())
            if said and silent and is_one_voice and not NEVER_ALONE.intersection(each.keys):
                yield path + each.name, said, silent


def _values(each: Trait, own: Mapping[str, Config]) -> dict[str, object]:
    given = {url: each.read(section) for url, section in own.items()}
    if all(value is None for value in given.values()):
        return {}
    filled = {url: each.default if value is None else value for url, value in given.items()}
    return {url: value for url, value in filled.items() if value is not None}
