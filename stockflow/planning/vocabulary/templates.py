"""Which chat template goes out."""

from collections import Counter
from collections.abc import Sequence

from stockflow.checkpoints.tokens.tokenizers import Tokenizer
from stockflow.errors import PlanError
from stockflow.recipe import Recipe, resolve_location
from stockflow.recipe.templates import BUILTIN
from stockflow.text.strictjson import shown


def chosen_template(recipe: Recipe, tokenizers: Sequence[Tokenizer]) -> str | None:
    """Return the chat template that a recipe asks for; None if it asks for none, or for the one of the tokenizer.

    Raises:
        PlanError: it is that of a model which has none.
    """
    asked = recipe.chat_template
    if asked is None:
        return None
    if "{" in asked:
        return asked.strip()
    if asked in BUILTIN:
        return BUILTIN[asked]
    if asked == "auto":
        counts = Counter(each.template for each in tokenizers[: len(recipe.checkpoints)] if each.template)
        return counts.most_common(1)[0][0] if counts else None
    found = tokenizers[recipe.checkpoints.index(resolve_location(asked))].template
    if found is None:
        raise PlanError(f"`chat_template` names {shown(asked)}, which has none; name another model")
    return found
