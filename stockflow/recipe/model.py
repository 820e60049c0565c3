"""The recipe as the user describes it, and what it answers about a tensor."""

from collections.abc import Mapping
from functools import cached_property

from pydantic import Field, PrivateAttr, model_validator

from stockflow.methods import METHODS
from stockflow.methods.parameters import FROM_BASE, Parameters
from stockflow.methods.protocol import Method, Scope
from stockflow.recipe.document import Document, Path, read_yaml
from stockflow.recipe.locations import Location
from stockflow.recipe.options import Options, Rule
from stockflow.recipe.resolve import OUTSIDE, Resolver, Slot, Stand, find_slots
from stockflow.recipe.settings import Part, Settings, matches
from stockflow.recipe.tokens import WORDS, ChatTemplate, TokenizerEntry, VocabularySource
from stockflow.recipe.values import (
    OUTPUT_DTYPES,
    DType,
    LayerRange,
    MethodName,
    text_around_layer,
)
from stockflow.storage import StorageConfig, StoreOptions
from stockflow.text.redaction import redact_urls
from stockflow.text.remarks import Remark


class ModelEntry(Part):
    """One listed model."""

    model: Location = Field(description="local folder, URL, or org/name[@revision] on the Hugging Face hub")
    parameters: Settings = Field(default={}, description="values of this model only, such as `weight`")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: object) -> object:
        return {"model": given} if isinstance(given, str) else given


class SourceEntry(ModelEntry):
    """A run of layers of one model."""

    layer_range: LayerRange = Field(description="number of the first layer, and of the one behind the last")


class SliceEntry(Part):
    """A run of layers of the output, and the layers that are merged into it."""

    sources: tuple[SourceEntry, ...] = Field(min_length=1, max_length=256, description="as many layers of each model")
    base_model: Location | None = Field(default=None, description="the base of this slice, instead of the recipe's")
    parameters: Settings = Field(default={}, description="values of this slice, before the recipe's")


class ModuleEntry(Part):
    """A part of a model, such as its text decoder; `default` is all of a model that has one part."""

    models: tuple[ModelEntry, ...] = Field(default=(), max_length=256, description="the models to merge")
    slices: tuple[SliceEntry, ...] = Field(default=(), max_length=2000, description="or runs of layers, in order")
    parameters: Settings = Field(default={}, description="values of this module, before the recipe's")


class Recipe(Part):
    """A merge as the user describes it, checked; made by ``parse_recipe`` or ``load_recipe``."""

    merge_method: MethodName = Field(description="how to merge")
    base_model: Location | None = Field(default=None, description="the model the others were tuned from")
    models: tuple[ModelEntry, ...] = Field(default=(), max_length=256, description="the models to merge, whole")
    slices: tuple[SliceEntry, ...] = Field(default=(), max_length=2000, description="or runs of layers, in order")
    modules: dict[str, ModuleEntry] = Field(default={}, description="or models or slices of each part of a model")
    parameters: Settings = Field(default={}, description="parameters of the method, for all models")
    dtype: DType | None = Field(default=None, description="output dtype unless `out_dtype` is given")
    out_dtype: DType | None = Field(default=None, description="dtype of the merged tensors; else one that holds all")
    tokenizer_source: VocabularySource | None = Field(
        default=None, description="whose tokens: `base`, `union`, a model"
    )
    tokenizer: TokenizerEntry | None = Field(default=None, description="the same, with rows of tokens and padding")
    chat_template: ChatTemplate | None = Field(default=None, description="`auto`, a name, a model or a template")
    stockflow: Options = Field(default=Options(), description="what mergekit has no word for")

    _text: str = PrivateAttr("")
    _remarks: tuple[Remark, ...] = PrivateAttr(())
    _filters: dict[str, str] = PrivateAttr({})
    _names: dict[str, str] = PrivateAttr({})

    def model_post_init(self, context: object, /) -> None:
        """Keep the text the recipe was made from, which comes as the context of the validation.

        It is published: what a comment quotes of a URL with credentials is not.
        """
        if isinstance(context, str):
            self._text = redact_urls(context)

    @property
    def text(self) -> str:
        """The recipe as it was written, URLs without credentials and queries."""
        return self._text

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What has no effect, or another than it seems, each with its place."""
        return self._remarks

    def with_remarks(self, remarks: tuple[Remark, ...]) -> "Recipe":
        """Return the recipe with what is to be said of it."""
        self._remarks = remarks
        return self

    def with_filters(self, places: Mapping[str, str]) -> "Recipe":
        """Return the recipe with the places of its filters."""
        self._filters = dict(places)
        return self

    def with_names(self, names: Mapping[str, str]) -> "Recipe":
        """Return the recipe with the names that it has for its models, by location."""
        self._names = dict(names)
        return self

    def name_of(self, location: str) -> str:
        """Return the first name that the recipe has for a model."""
        return self._names.get(location, location)

    @property
    def filters(self) -> Mapping[str, str]:
        """Where the recipe first has each filter, as ``recipe.yaml:7:3``."""
        return self._filters

    def canonical(self) -> dict[str, object]:
        """Return the recipe as plain JSON values, locations resolved and defaults filled in."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def output_dtype(self) -> str | None:
        """The safetensors name of the output dtype; None where each tensor's sources decide."""
        name = self.out_dtype or self.dtype or self.stockflow.output_format or ""
        return OUTPUT_DTYPES.get(name)

    @property
    def keeps_codes(self) -> bool:
        """Whether what the donor has in codes is written in codes."""
        asked = self.stockflow.output_format
        return asked == "keep" or (asked is None and self.output_dtype is None)

    @property
    def storage(self) -> StorageConfig:
        """Storage options by URL prefix."""
        entries = self.stockflow.storage.items()
        return StorageConfig({prefix: StoreOptions(**entry.model_dump()) for prefix, entry in entries})

    @cached_property
    def checkpoints(self) -> tuple[str, ...]:
        """Locations: the base first if there is one, then the other models as listed."""
        listed = [entry.model for entry in self.entries]
        return tuple(dict.fromkeys([self.base_model, *listed] if self.base_model else listed))

    @cached_property
    def locations(self) -> tuple[str, ...]:
        """Those of all that is read: the checkpoints, and behind them a model that gives its tokenizer alone."""
        source = self.vocabulary.source if self.vocabulary else WORDS[0]
        return self.checkpoints if source in (*WORDS, *self.checkpoints) else (*self.checkpoints, source)

    @property
    def all_slices(self) -> tuple[SliceEntry, ...]:
        """The slices of the recipe and of its modules."""
        return (*self.slices, *(each for module in self.modules.values() for each in module.slices))

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Everything that is listed, wherever that is."""
        of_modules = (each for module in self.modules.values() for each in module.models)
        of_slices = (each for entry in self.all_slices for each in entry.sources)
        return (*self.models, *of_modules, *of_slices)

    def line(self, path: Path) -> int:
        """Return the line of the text that a path leads to."""
        return self._document.line(path)

    @cached_property
    def _document(self) -> Document:
        return read_yaml(self.text, "")

    @property
    def around_layers(self) -> tuple[str, str] | None:
        """What stands before and behind the number of a layer in names; None for the common patterns."""
        return text_around_layer(self.stockflow.layers) if self.stockflow.layers else None

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods in use, the recipe's own first."""
        names = dict.fromkeys((self.merge_method, *(rule.merge_method for rule in self.stockflow.rules)))
        return tuple(METHODS[name] for name in names if name)

    @cached_property
    def listed(self) -> tuple[ModelEntry, ...]:
        """The models, each once."""
        first: dict[str, ModelEntry] = {}
        for entry in self.models:
            first.setdefault(entry.model, entry)
        return tuple(first.values())

    @property
    def donor(self) -> int:
        """Which checkpoint gives names and order: the base, else the first model."""
        return 0

    @cached_property
    def vocabulary(self) -> TokenizerEntry | None:
        """What is said of the output's vocabulary; None: it is that of all models."""
        return TokenizerEntry(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    @property
    def vocabulary_donor(self) -> int:
        """Which of the locations gives the tokenizer's files."""
        if self.vocabulary is None:
            return self.side_files_donor
        return self.donor if self.vocabulary.source in WORDS else self.locations.index(self.vocabulary.source)

    @property
    def side_files_donor(self) -> int:
        """Which checkpoint gives config, tokenizer and other small files."""
        chosen = self.stockflow.side_files_from
        return self.checkpoints.index(chosen) if chosen else self.donor

    @property
    def roles_donor(self) -> int:
        """Which of the locations says what tokens begin texts, end them and so on, as far as it says it."""
        is_union = self.vocabulary is not None and self.vocabulary.source == "union"
        return self.side_files_donor if is_union else self.vocabulary_donor

    def sources(self, method: Method) -> tuple[int, ...]:
        """Return the checkpoints a method reads, its anchor first."""
        counted = [self.checkpoints.index(entry.model) for entry in self.counted(method)]
        return (0, *counted) if self.anchors(method) else tuple(counted)

    def rule_for(self, tensor_name: str) -> Rule | None:
        """Return the first rule that matches a tensor."""
        for rule in self.stockflow.rules:
            if matches(rule.filter, tensor_name):
                return rule
        return None

    def spares(self, checkpoint: int, tensor_name: str) -> bool:
        """Return whether rules settle that a checkpoint need not hold a tensor: left out, or copied from the donor."""
        rule = self.rule_for(tensor_name)
        return rule is not None and (rule.action == "skip" or (rule.action == "copy" and checkpoint != self.donor))

    def method_for(self, rule: Rule | None) -> Method:
        """Return the method of a rule, or the recipe's own."""
        return METHODS[(rule.merge_method if rule else None) or self.merge_method]

    # Not a PrivateAttr: pydantic 2.14 takes 3 us to find one, and this is asked for every tensor.
    @cached_property
    def resolvers(self) -> dict[tuple[str, int | None], Resolver]:
        """Answers of ``parameters_for`` so far, by method and position of the rule."""
        return {}

    @property
    def levels(self) -> tuple[Settings, ...]:
        """The places where parameters are given."""
        found = [self.parameters, *(each.parameters for each in self.entries)]
        found += [each.parameters for each in self.all_slices]
        found += [each.parameters for each in self.modules.values()]
        return (*found, *(each.parameters for each in self.stockflow.rules))

    @cached_property
    def has_gradients(self) -> bool:
        """Whether a value depends on the layer."""
        return any(len(item.value) > 1 for level in self.levels for items in level.values() for item in items)

    def parameters_for(self, method: Method, tensor_name: str, rule: Rule | None, stand: Stand = OUTSIDE) -> Parameters:
        """Return a method's parameters for a tensor: of the rule, else model, else recipe, else the defaults.

        Equal results are one object, except across methods and rules.

        Raises:
            RecipeError: a required value is missing for this tensor, or its values do not go together.
            ValueError: the rule is of another recipe.
        """
        key = (method.name, self._position(rule))
        resolver = self.resolvers.get(key)
        if resolver is None:
            resolver = self.resolvers[key] = Resolver(method.name, self.slots(method, rule))
        return resolver.resolve(tensor_name, stand)

    def scope_for(
        self, method: Method, tensor_name: str, rule: Rule | None, stand: Stand = OUTSIDE, *, default: Scope = "tensor"
    ) -> Scope:
        """Return what gets its own decision in a tensor; a whole tensor where the method lacks the scope.

        Args:
            method: what merges it.
            tensor_name: as filters see it.
            rule: that it falls under.
            stand: as for ``parameters_for``.
            default: what the recipe need not ask for.
        """
        if method.asks_for_rows(self.parameters_for(method, tensor_name, rule, stand)):
            return "row"
        asked = self.stockflow.scope or default
        return asked if asked in method.scopes else "tensor"

    def slots(self, method: Method, rule: Rule | None) -> tuple[Slot, ...]:
        """Return the values a method needs under a rule, each with what the recipe offers for it."""
        return find_slots(
            method,
            fixed={
                "on_negative": self.stockflow.on_negative,
                "seed": self.stockflow.seed,
                FROM_BASE: self.anchors(method),
            },
            rule=rule.parameters if rule else {},
            models=[(entry.model, entry.parameters) for entry in self.counted(method)],
            recipe=self.parameters,
        )

    def carries_over(self, tensor_name: str, dtype: str, stand: Stand = OUTSIDE) -> bool:
        """Return whether the method of a tensor leaves its only source as it is stored, in whatever format."""
        rule = self.rule_for(tensor_name)
        method = self.method_for(rule)
        if method.copies is None or self.output_dtype not in (None, dtype):
            return False
        return method.copies(self.parameters_for(method, tensor_name, rule, stand))

    def anchors(self, method: Method) -> bool:
        """Return whether a method measures the models from the base."""
        return method.base == "required" or (method.base == "optional" and self.base_model is not None)

    def counted(self, method: Method) -> list[ModelEntry]:
        """Return the models a method counts: all of them, or those besides the base."""
        if self.anchors(method):
            return [entry for entry in self.listed if entry.model != self.base_model]
        return [*self.listed, *([self._base_entry] if self.base_counts(method) else [])]

    @property
    def lists_base(self) -> bool:
        """Whether the base is among the models."""
        return any(entry.model == self.base_model for entry in self.entries)

    def base_counts(self, method: Method) -> bool:
        """Return whether a method that ignores the base counts one that is not listed, as mergekit does.

        It does if the recipe gives every model what each must have. Where each has its own weight, mergekit stops;
        rules are ours.
        """
        return (
            method.base == "ignored"
            and method.name == self.merge_method
            and self.base_model is not None
            and bool(self.models)
            and not self.lists_base
            and all(name in self.parameters for name in method.required_per_model)
        )

    @cached_property
    def _base_entry(self) -> ModelEntry:
        assert self.base_model is not None
        return ModelEntry.model_construct(model=self.base_model, parameters={})

    def _position(self, rule: Rule | None) -> int | None:
        """Return a rule's place among the rules; found by identity, as pydantic compares field by field."""
        if rule is None:
            return None
        for position, known in enumerate(self.stockflow.rules):
            if known is rule:
                return position
        raise ValueError(f"the rule with the filter {rule.filter!r} is not one of this recipe's")
