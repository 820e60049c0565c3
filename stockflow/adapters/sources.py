"""Adapters that are merged with each other: opened where a recipe names them, on one base, which is not opened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import ml_dtypes
import numpy as np

from stockflow.checkpoints.adapters.bases import likeness
from stockflow.checkpoints.adapters.config import ModuleScales
from stockflow.checkpoints.adapters.keys import by_module
from stockflow.checkpoints.adapters.names import unwrapped
from stockflow.checkpoints.adapters.opening import Adapter, read_adapter
from stockflow.checkpoints.files.header import TensorSpec, width_of
from stockflow.checkpoints.files.layout import HeaderCache
from stockflow.errors import CheckpointError, NotFoundError, NumericsError
from stockflow.events import Done, OnEvent
from stockflow.kernels.arrays import Floats
from stockflow.recipe import Recipe
from stockflow.storage import StorageConfig, Store, halves_of, open_model, own_key, pin_revision, redact
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

Parts = Mapping[str, str]
"""Keys of a module, by what they are there."""
_NUMPY = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that is merged with others."""

    store: Store
    adapter: Adapter
    base: str | None
    """what the model is called that it belongs to"""

    @property
    def where(self) -> str:
        """What it is called in messages."""
        return self.store.where()

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Its own name of every module, by the one without wrappers, which is the same in all adapters.

        Raises:
            CheckpointError: two modules differ in wrappers alone.
        """
        found: dict[str, str] = {}
        for module in self._modules:
            if (other := found.setdefault(unwrapped(module), module)) != module:
                raise CheckpointError(f"{self.where}: {shown(other)} and {shown(module)} differ in wrappers alone")
        return found

    @cached_property
    def _modules(self) -> Mapping[str, Parts]:
        try:
            return by_module(self.adapter.specs)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from None

    @cached_property
    def scales(self) -> ModuleScales:
        """Ranks and scales of its modules, by its own names."""
        return ModuleScales(self.adapter.config, self._modules)

    def parts(self, module: str) -> Parts:
        """Return what it has of a module, named without wrappers."""
        return self._modules[self.names[module]] if module in self.names else {}

    def spec(self, key: str) -> TensorSpec:
        """Return what is known of a tensor.

        Raises:
            CheckpointError: it holds no plain numbers.
        """
        spec = self.adapter.specs[key]
        if spec.kind != "float":
            raise CheckpointError(f"{self.where}: {shown(key)} is of {spec.dtype}, expected plain numbers")
        return spec

    def numbers(self, key: str, start: int = 0, stop: int | None = None) -> Floats:
        """Return elements of a tensor, read where they are.

        Raises:
            InputChangedError: the file is no longer the one that was opened.
            NumericsError: an element is NaN or infinite.
            StorageError: reading failed after retries.
        """
        spec, extent = self.spec(key), self.adapter.extents[key]
        width = width_of(spec.dtype)
        buffer = bytearray(((spec.num_elems if stop is None else stop) - start) * width)
        first = extent.start + start * width
        self.store.read_into(own_key(extent.file), first, memoryview(buffer), self.adapter.files[extent.file])
        found = np.frombuffer(buffer, _NUMPY[spec.dtype]).astype(np.float64)
        if not np.isfinite(found).all():
            raise NumericsError(f"{self.where}: {shown(key)} has NaN or infinity; mend the adapter")
        return found

    def matrix(self, key: str) -> Floats:
        """Return a matrix."""
        return self.numbers(key).reshape(self.spec(key).shape)


def open_sources(recipe: Recipe, storage: StorageConfig, on_event: OnEvent) -> list[AdapterSource | None]:
    """Return the adapter at each of a recipe's locations, None where it is the base itself.

    Raises:
        UserError: one is no adapter.
        StorageError: reading failed after retries.
    """
    cache = HeaderCache()
    return [
        None if location == recipe.base_model else _opened(location, storage, cache, on_event)
        for location in recipe.checkpoints
    ]


def _opened(location: str, storage: StorageConfig, cache: HeaderCache, on_event: OnEvent) -> AdapterSource:
    *model, place = halves_of(location)
    store = open_model(pin_revision(place), storage)
    try:
        adapter = read_adapter(store, cache, lambda file: on_event(Done(file)))
    except NotFoundError as error:
        raise NotFoundError(f"{error}; with `output: adapter` every model but `base_model` is one") from None
    base = model[0] if model else adapter.config.base
    return AdapterSource(store, adapter, base and redact(base))


def remarks_on(recipe: Recipe, sources: Sequence[AdapterSource | None]) -> Iterator[Remark]:
    """Yield what is to be known of a recipe of adapters, of each of them, and of the bases that they name."""
    yield from recipe.remarks
    found = [source for source in sources if source]
    for source in found:
        yield from source.adapter.remarks
    told = {source.base: source.where for source in found if source.base}
    told |= {recipe.base_model: "the recipe"} if recipe.base_model else {}
    said = {base: f"{redact(base)} (of {where})" for base, where in told.items()}
    pairs = {likeness(one, other): f"{said[one]} and {said[other]}" for one, other in combinations(said, 2)}
    way_on = "If these are the same weights, name one for all: `model: BASE+ADAPTER`"
    if apart := pairs.get("apart"):
        text = f"these adapters belong to several bases: {apart}. {way_on}"
        yield Remark("adapter-elsewhere", text, "refusal", tuple(source.where for source in found))
    elif alike := pairs.get("alike"):
        text = f"these adapters name bases in several places: {alike}. {way_on}"
        yield Remark("adapter-elsewhere", text, "note", tuple(source.where for source in found))
