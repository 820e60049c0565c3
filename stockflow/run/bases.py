"""The base of an adapter that a recipe names alone: what adapter_config.json calls it, as a recipe would."""

from stockflow.errors import NotFoundError, RecipeError
from stockflow.recipe.locations import resolve_location
from stockflow.storage import StorageConfig, Store, joined, open_model, pin_revision, redact
from stockflow.text.strictjson import shown


def with_base(store: Store, base: str, *, storage: StorageConfig) -> Store:
    """Return the place of an adapter and the base that it names.

    Raises:
        NotFoundError: nothing can be meant by that name here.
    """
    try:
        return open_model(joined(pin_revision(resolve_location(base)), store.url), storage)
    except (RecipeError, NotFoundError) as error:
        where = store.where()
        raise NotFoundError(
            f"the adapter at {where} names {shown(redact(base))} as its base: {error}; name both: `model: BASE+{where}`"
        ) from None
