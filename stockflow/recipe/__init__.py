"""The user's YAML, in mergekit's words, as a Recipe: read strictly, refused with every problem at once.

What mergekit has and stockflow lacks is refused by name. Keys that it passes over are remarked on.
Imports go one way: wording, document, values and locations, settings, resolve, model, checks and structure, dead_keys
and repeats, reading, amending and lint.
"""

from stockflow.recipe.amending import amended
from stockflow.recipe.locations import resolve_location
from stockflow.recipe.model import ModelEntry, Recipe
from stockflow.recipe.options import Options, Rule, StorageEntry
from stockflow.recipe.reading import RecipeLike, load_recipe, parse_recipe, recipe_of, recipe_schema
from stockflow.recipe.settings import Conditional
from stockflow.recipe.values import OUTPUT_DTYPES, parse_size

__all__ = [
    "OUTPUT_DTYPES",
    "Conditional",
    "ModelEntry",
    "Options",
    "Recipe",
    "RecipeLike",
    "Rule",
    "StorageEntry",
    "amended",
    "load_recipe",
    "parse_recipe",
    "parse_size",
    "recipe_of",
    "recipe_schema",
    "resolve_location",
]
