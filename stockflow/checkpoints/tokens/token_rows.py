"""Token rows: which tensors of a model have a row per token of its vocabulary, as names, sizes and configs tell."""

import re
from collections.abc import Collection, Iterator, Mapping

from stockflow.checkpoints.configs import Config, sections
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import is_in_a_layer
from stockflow.checkpoints.naming import kind_of

_INPUT_ROWS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|token_embeddings?|tokens_embed|embed_in|embeddings?|emb"
    r"|embed|shared)(\.weight|$)"
)
_OUTPUT_ROWS = re.compile(r"(^|\.)(output_layer|proj_out)\.")
_NO_TOKENS = re.compile(r"position|token_type|(^|\.)wpe(\.|$)|patch|visual|vision|segment|(^|[._])(pos|rel)_|rotary")


def vocabulary_rows(specs: Mapping[str, TensorSpec], sizes: Collection[int] = ()) -> int:
    """Return how many rows the input embedding has; 0 if there is none.

    Args:
        specs: of a model.
        sizes: of its vocabulary, by one of which what has a row per token is known where no name tells an embedding.
    """
    found = [spec.shape[0] for name, spec in specs.items() if _is_input(name, spec)]
    if found or not sizes:
        return max(found, default=0)
    alike = {name: spec.shape[0] for name, spec in specs.items() if spec.shape and spec.shape[0] in sizes}
    return max((rows for name, rows in alike.items() if has_tokens(name)), default=max(alike.values(), default=0))


def has_input_rows(specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether ids are looked up in an embedding that is named as one."""
    return any(_is_input(name, spec) for name, spec in specs.items())


def vocabulary_tensors(specs: Mapping[str, TensorSpec], num_rows: int, spare: int = 0) -> tuple[str, ...]:
    """Return the tensors that have a row per token: as long as the input embedding, or ``spare`` rows more or less.

    Where layers have tensors of that length, too, it is also another size of the model, and only names tell.
    """
    lengths = range(max(num_rows - spare, 1), num_rows + spare + 1)
    alike = [name for name, spec in specs.items() if spec.shape and spec.shape[0] in lengths]
    is_told = has_tokens if any(map(is_in_a_layer, alike)) else may_have_tokens
    return tuple(filter(is_told, alike))


def _is_input(name: str, spec: TensorSpec) -> bool:
    may_be = "emb" in name or "wte" in name or "shared" in name
    return may_be and len(spec.shape) == 2 and bool(_INPUT_ROWS.search(name)) and may_have_tokens(name)


def has_tokens(name: str) -> bool:
    """Return whether a tensor of this name has a row per token."""
    named = kind_of(name) in ("embedding", "head") or _INPUT_ROWS.search(name) or _OUTPUT_ROWS.search(name)
    return bool(named) and may_have_tokens(name)


def may_have_tokens(name: str) -> bool:
    """Return whether no part of a name says that rows are of something else, such as places in a text."""
    return _NO_TOKENS.search(name) is None


def stated_sizes(config: Config | None) -> Iterator[int]:
    """Yield the sizes of vocabularies that a config states, ``vocab_size`` and its like, in those within it too."""
    for _, section in sections(config or {}):
        yield from (size for key, size in section.items() if key.endswith("vocab_size") and type(size) is int)
