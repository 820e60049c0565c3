"""Uses: what says how a model is fed, and goes out although no tune was fed so; files that contradict each other."""

from collections.abc import Iterator, Mapping
from itertools import chain

from stockflow.checkpoints.configs import Config, computing_keys, further_keys, says_nothing
from stockflow.checkpoints.files.layout import folder_of
from stockflow.checkpoints.heads import said_of_language
from stockflow.checkpoints.opening import CONFIG_FILE
from stockflow.checkpoints.tokens.said import END
from stockflow.checkpoints.tokens.tokenizers import GENERATION_CONFIG
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.looks.words import CHOOSES, ids_going_out
from stockflow.planning.vocabulary.templates import chosen_template
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

NUM_SHOWN = 3
"""of tokens"""
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|end_of_turn|>")
"""Tokens that chat templates write behind what one side says."""
_WRITTEN = {
    "include_prompt": True,
    "model_type": "SentenceTransformer",
    "similarity_fn_name": "cosine",
    "prompts": {"query": "", "document": ""},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_convert_rgb": True,
}
"""What sentence-transformers 5, and image processors of transformers, write where nothing was chosen."""
_TYPES = ("image_processor_type", "feature_extractor_type")
"""Keys of which older files have the second, and newer ones the first."""


def uses_of_no_tune(proposal: Proposal) -> Iterator[Remark]:
    """Yield what goes out of processors and poolings although some or all tunes have something else."""
    recipe, donor = proposal.recipe, proposal.recipe.side_files_donor
    if donor >= len(proposal.tokenizers):
        return
    url = redact(proposal.checkpoints[donor].url)
    for key, whole in proposal.tokenizers[donor].uses.items():
        is_compared = key in proposal.merged_configs  # by what it says of weights; the rest is looked at here
        telling = further_keys if is_compared else dict
        own = telling(whole)
        told = {*computing_keys(whole)} if is_compared else set[str]()
        tunes = {
            redact(each.url): telling(tokenizer.uses.get(key, whole))
            for each, tokenizer, location in zip(
                proposal.checkpoints, proposal.tokenizers, recipe.checkpoints, strict=False
            )
            if location != recipe.base_model and each.url != proposal.checkpoints[donor].url
        }
        unlike = {model: _unlike(own, theirs) - (told & theirs.keys()) for model, theirs in tunes.items()}
        others = {model: tunes[model] for model, names in unlike.items() if names}
        if others:
            names = {name for each in unlike.values() for name in each}
            values = {model: _brief(theirs, names) for model, theirs in {url: own, **others}.items()}
            said = ", ".join(f"{value} in {model}" for model, value in values.items() if model != url)
            text = f"{in_a_line(key)} of {url} goes out, with {values[url]}; {said}; {CHOOSES}"
            is_known = telling is dict or any(names & own.keys() & theirs.keys() for theirs in others.values())
            severity: Severity = "warning" if is_known and len(others) == len(tunes) else "note"
            yield Remark("side-files-differ", text, severity, (url,), values=values)


def _unlike(one: Config, other: Config) -> set[str]:
    """Return the keys of which two say different things, where what one does not say is as loaders take it then."""
    pairs = {name: (one.get(name), other.get(name)) for name in {*one, *other}}
    return {name for name, (own, theirs) in pairs.items() if own != theirs and not _are_alike(name, own, theirs)}


def _are_alike(name: str, own: object, theirs: object) -> bool:
    """Return whether loaders take one for the other: nothing and what is written for it, a size and those of edges."""
    for one, other in ((own, theirs), (theirs, own)):
        if one in (None, {}):
            return says_nothing(other) or other == _WRITTEN.get(name) or name in _TYPES
        if isinstance(one, int) and isinstance(other, dict) and other:
            return all(edge == one for edge in other.values())
    return False


def vocabularies_of_parts(proposal: Proposal) -> Iterator[Remark]:
    """Yield that parts of models, which have folders and tokenizers of their own, give ids to other tokens."""
    if not proposal.tokenizers:
        return
    donor, url = proposal.tokenizers[0], redact(proposal.checkpoints[0].url)
    for each, tokenizer in zip(proposal.checkpoints, proposal.tokenizers, strict=False):
        for key in donor.below.keys() & tokenizer.below.keys():
            own, theirs = donor.below[key], tokenizer.below[key]
            tokens = {number: token for token, number in own.items()}
            other = [token for token, number in theirs.items() if tokens.get(number, token) != token]
            part = folder_of(key).replace("tokenizer", "text_encoder")  # as pipelines call what reads its tokens
            if own is not theirs and other and proposal.folders.get(part, True):
                text = (
                    f"{counted(len(other), 'id')} of {in_a_line(key)} mean something else in {redact(each.url)} than "
                    f"in {url}, such as {theirs[other[0]]:,}, which is {shown(other[0])} there: rows of different "
                    "tokens would be mixed, and `tokenizer_source` reaches no folders; copy that part by a rule"
                )
                yield Remark("vocabularies-differ", text, "refusal", (url, redact(each.url)))


def ends_of_texts(proposal: Proposal) -> Iterator[Remark]:
    """Yield that generation would end at a token without a row, or that files name different ends of texts."""
    recipe, donor = proposal.recipe, proposal.recipe.side_files_donor
    if donor >= len(proposal.tokenizers):
        return
    tokenizer, url = proposal.tokenizers[donor], redact(proposal.checkpoints[donor].url)
    (generation, config), stated = _going_out(proposal), _stated_end(proposal)
    if recipe.vocabulary is None and (beyond := [each for each in _ids(stated) if each >= tokenizer.num_rows > 0]):
        rows = f"the embedding has {tokenizer.num_rows:,} rows"
        text = f"generation ends at token {beyond[0]:,} by the files of {url}, and {rows}: it would not end"
        yield Remark("promise-unkept", text, "warning", (url,), values={END: str(stated)})
        return
    named = {
        f"{GENERATION_CONFIG} of {url}": _ids(generation.get(END)),
        f"{CONFIG_FILE} of {redact(proposal.donor.url)}": _ids(config.get(END)),
        **_ends_of_tokenizer(proposal),
    }
    told = {where: ids for where, ids in named.items() if ids}
    obeyed = next(iter(told.values()), [])  # the config for generating goes first
    if any(not {*obeyed} & {*other} for other in told.values()):
        said = ", ".join(f"{' and '.join(map(str, ids))} by {where}" for where, ids in told.items())
        is_made = len({recipe.donor, donor, recipe.vocabulary_donor, recipe.roles_donor}) > 1
        advice = f"; {CHOOSES}, for all of these" if is_made and recipe.vocabulary_donor != donor else ""
        text = (
            f"the files that go out name different ends of texts: {said}. Loaders differ in which they believe{advice}"
        )
        yield Remark("tokens-disagree", text, "warning" if is_made else "note", (url,), values=_shown(told))


def _going_out(proposal: Proposal) -> tuple[Config, Config]:
    """Return what says how texts are generated: the config for that, and what config.json says of the language."""
    own, followed = proposal.tokenizers[proposal.recipe.side_files_donor].generation, proposal.followed
    generation = (followed.generation if followed else None) or own or {}
    return generation, said_of_language((followed.config if followed else None) or proposal.config)


def _stated_end(proposal: Proposal) -> object:
    """Return the id, or ids, at which generation ends by these."""
    generation, config = _going_out(proposal)
    return generation.get(END, config.get(END))


def _ends_of_tokenizer(proposal: Proposal) -> dict[str, list[int]]:
    """Return the id of the token that ends texts by the tokenizer that goes out."""
    recipe, tokenizers = proposal.recipe, proposal.tokenizers
    givers = [index for index in (recipe.roles_donor, recipe.vocabulary_donor) if index < len(tokenizers)]
    giver = next((index for index in givers if tokenizers[index].eos), None)
    if giver is None:
        return {}
    token, vocabulary = tokenizers[giver].eos or "", tokenizers[giver].vocabulary
    ids = (proposal.followed.ids if proposal.followed else None) or (vocabulary.ids if vocabulary else {})
    where = f"the tokenizer of {redact(proposal.checkpoints[giver].url)} ({shown(token)})"
    return {where: [ids[token]]} if token in ids else {}


def _ids(stated: object) -> list[int]:
    return [each for each in (stated if isinstance(stated, list) else [stated]) if type(each) is int and each >= 0]


def _shown(told: Mapping[str, list[int]]) -> dict[str, str]:
    return {where: ", ".join(map(str, ids)) for where, ids in told.items()}


def ends_of_turns(proposal: Proposal) -> Iterator[Remark]:
    """Yield that the template which the recipe chooses ends turns with a token at which generation does not end."""
    asked = chosen_template(proposal.recipe, proposal.tokenizers) if proposal.tokenizers else None
    ids = ids_going_out(proposal) if asked else None
    if not asked or not ids:
        return
    stated, url = _stated_end(proposal), redact(proposal.side_files_donor.url)
    turns = [token for token in END_OF_TURN if token in asked and token in ids]
    ends = {*_ids(stated), *chain(*_ends_of_tokenizer(proposal).values())}
    if turns and ends and not any(token in asked for token, number in ids.items() if number in ends):
        said = ", ".join(f"{shown(token)} ({ids[token]})" for token in turns)
        stops = ", ".join(sorted(map(str, ends)))
        text = (
            f"the chat template of the recipe ends turns with {said}, and by the files of {url} generation ends at "
            f"{stops}: it would go on behind a turn; add that id to eos_token_id of generation_config.json"
        )
        yield Remark("tokens-disagree", text, "warning", (url,), values={END: shown(stated)})


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


def contradicting_templates(proposal: Proposal) -> Iterator[Remark]:
    """Yield the models whose templates are others in files of their own than in a config beside these."""
    for number, (each, tokenizer) in enumerate(zip(proposal.checkpoints, proposal.tokenizers, strict=False)):
        goes_out = number == proposal.recipe.vocabulary_donor
        if tokenizer.contested and not (goes_out and proposal.recipe.chat_template):
            url, names = redact(each.url), ", ".join(map(shown, tokenizer.contested))
            text = (
                f"the chat template {names} of {url} is another in a file of its own than in its config: newer loaders "
                f"take the file, those before transformers 4.43 the config"
                f"{'; `chat_template: MODEL` publishes one alone' if goes_out else ''}"
            )
            values = dict.fromkeys(tokenizer.contested, "differs")
            yield Remark("tokens-disagree", text, "warning" if goes_out else "note", (url,), values=values)


def _brief(document: Mapping[str, object], keys: set[str]) -> str:
    return shown({key: document[key] for key in sorted(keys) if key in document})
