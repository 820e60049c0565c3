"""Checks of recipes whose output is an adapter: what would need a base's elements, or means nothing there."""

from collections.abc import Iterator

from stockflow.recipe.document import Path, Problem
from stockflow.recipe.model import Recipe
from stockflow.recipe.options import Options

METHODS_OF_ADAPTERS = ("linear", "task_arithmetic")
"""Methods whose result differs from the base by a sum of products of low rank."""
_OF_MODELS = ("slices", "modules", "tokenizer_source", "tokenizer", "chat_template")
_OPTIONS_OF_MODELS = ("rules", "output_format", "experts", "routers", "side_files_from")


def adapter_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with a recipe for an output that is an adapter, or with a rank where it is none."""
    options = recipe.stockflow
    if options.output == "model":
        if options.rank is not None:
            yield ("stockflow", "rank"), "it cuts the factors of an adapter; add `output: adapter`, or remove it"
        return
    if recipe.merge_method not in METHODS_OF_ADAPTERS:
        yield (
            ("merge_method",),
            f"`{recipe.merge_method}` makes no adapter of adapters, as it looks at elements; take `linear` or "
            "`task_arithmetic`, or remove `output: adapter` to merge the models",
        )
    for path in _misplaced(recipe):
        yield path, "it is of models, found `output: adapter`; remove one of the two"
    if recipe.has_gradients:
        yield ("parameters",), "values over the layers need the base, found `output: adapter`; give one by `filter`"


def _misplaced(recipe: Recipe) -> Iterator[Path]:
    yield from ((name,) for name in _OF_MODELS if getattr(recipe, name))
    for name in _OPTIONS_OF_MODELS:
        if getattr(recipe.stockflow, name) != Options.model_fields[name].default:
            yield ("stockflow", name)
