"""What files of a tokenizer say beside its ids: chat templates, and which tokens have a part to play."""

from collections.abc import Mapping, Sequence

TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
TEMPLATES = "additional_chat_templates/"
"""Where templates lie that are asked for by name."""
DEFAULT = "default"
"""What the template is called that is taken where none is asked for."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
END = "eos_token_id"
"""the id, or ids, at which texts end"""
_SETS = (END, "suppress_tokens", "begin_suppress_tokens")
"""keys of ids, at any of which something happens"""
_FURTHER = ("additional_special_tokens", "extra_special_tokens")


def templates_of(files: Mapping[str, str], *documents: Mapping[str, object]) -> dict[str, str]:
    """Return chat templates by name as loaders take them, without what makes no difference to what they write.

    Source: transformers 5: templates in files of their own go before all that a config says.

    Args:
        files: what these hold, by their keys.
        documents: configs that may have templates, the first one that has any is taken.
    """
    if files:
        named = {key.removeprefix(TEMPLATES).removesuffix(".jinja"): text for key, text in files.items()}
        found = {DEFAULT if key == TEMPLATE_FILE.removesuffix(".jinja") else key: text for key, text in named.items()}
    else:
        found = _within(next(filter(None, (each.get("chat_template") for each in documents)), None))
    return {name: text.replace("\r\n", "\n").strip() for name, text in found.items()}


def is_template(key: str) -> bool:
    """Return whether a file is a chat template of its own."""
    return key == TEMPLATE_FILE or (key.startswith(TEMPLATES) and key.endswith(".jinja"))


def _within(said: object) -> dict[str, str]:
    if isinstance(said, str):
        return {DEFAULT: said}
    entries = [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []
    named = {str(each.get("name")): each.get("template") for each in entries}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def roles_of(*documents: Mapping[str, object]) -> dict[str, str]:
    """Return which tokens begin texts, end them, fill them and so on, as the first document says that says it."""
    found = {role: next(filter(None, (content_of(each.get(role)) for each in documents)), None) for role in ROLES}
    return {role: token for role, token in found.items() if token is not None}


def named_tokens(*documents: Mapping[str, object]) -> list[str]:
    """Return the tokens that configs name as special, those with a part to play first."""
    given = [each.get(key) for each in documents for key in _FURTHER]
    named = [entry for said in given for entry in (said.values() if isinstance(said, dict) else _list(said))]
    return [*roles_of(*documents).values(), *filter(None, map(content_of, named))]


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def content_of(token: object) -> str | None:
    """Return the text of a token as configs write it: itself, or a mapping with settings of its own."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def ids_as_sets(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return a config with ids of which the order says nothing in order, and one alone as itself."""
    sets = {key: config[key] for key in _SETS if isinstance(config.get(key), list)}
    plain = {key: ids for key, ids in sets.items() if isinstance(ids, list) and all(type(each) is int for each in ids)}
    in_order = {key: sorted({*ids}) for key, ids in plain.items()}
    return {**config, **{key: ids[0] if len(ids) == 1 else ids for key, ids in in_order.items()}}
