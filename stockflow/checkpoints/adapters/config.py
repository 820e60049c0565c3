"""adapter_config.json: what PEFT writes beside an adapter, held strictly, as what is overlooked changes the result.

Source: https://huggingface.co/docs/peft/package_reference/lora, and ``LoraConfig`` of PEFT 0.21.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from stockflow.errors import CheckpointError
from stockflow.text.patterns import fitting
from stockflow.text.strictjson import shown

CONFIG_KEY, WEIGHTS_KEY = "adapter_config.json", "adapter_model.safetensors"
MAX_PATTERNS = 10_000
Value = TypeVar("Value")

_NO_MATTER = frozenset({
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "bias", "modules_to_save", "layers_to_transform",
    "layers_pattern", "megatron_config", "megatron_core", "ensure_weight_tying", "runtime_config", "eva_config",
    "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size", "enable_lora", "merge_weights",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias",
    "init_lora_weights", "trainable_token_indices", "target_parameters", "moe_lora_layout",
})  # fmt: skip
"""Keys that are read here, or that say how an adapter was trained and nothing of what its tensors mean."""
_VARIANTS = {
    "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "arrow_config": "Arrow's routing", "kasa_config": "KaSA", "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA", "layer_replication": "layers that are replicated",
}  # fmt: skip
_OWN_BASE = re.compile(r"(pissa(_niter_\d+)?|corda|olora|loftq|lora_ga)", re.IGNORECASE)
_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Those that leave the base as it is; True and False do, too."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What decides the meaning of an adapter's tensors."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    """whether its linear layers store weights as ``[in, out]``"""
    has_lengths: bool
    """whether it is of DoRA, which stores the lengths of rows beside the factors"""
    biases: str
    """which were trained along: ``none``, ``lora_only`` or ``all``"""
    targets: tuple[str, ...]
    """which modules were trained, by the ends of their names; none where it is a pattern that says so, or layers"""
    modules_to_save: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    """by the name of a module, the rows that are replaced"""
    target_parameters: tuple[str, ...]
    version: tuple[int, ...]
    """of PEFT; empty if it is not said"""
    expert_layout: str | None
    """what is said of the layout of tensors that adapt all experts of a layer; ``unsloth`` where that trained it"""
    keeps_ties: bool
    """whether what is done to an embedding is done to the head that is tied to it, too"""
    base: str | None
    """what it calls the model it belongs to"""
    task: str | None
    """that the model was wrapped for"""

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the rows of a module that are replaced."""
        alike = (indices for name, indices in self.token_indices.items() if _ends_with(module, name))
        return next(alike, next(iter(self.token_indices.values()), ()))

    def parameters_of(self, module: str) -> set[str]:
        """Return the parameters of a module that are adapted by themselves: all matrices of a layer's experts.

        Of targets that PEFT made of an older model's modules only the parameter is named.
        """
        named = (target.rpartition(".") for target in self.target_parameters)
        return {parameter for owner, _, parameter in named if _ends_with(module, owner or "experts")}

    def saves(self, module: str) -> bool:
        """Return whether a module is saved whole."""
        return any(_ends_with(module, name) for name in self.modules_to_save)


def _ends_with(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _is_of_unsloth(given: Mapping[str, object]) -> bool:
    mapping = given.get("auto_mapping")
    return isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))


class ModuleScales:
    """Rank and scale of modules: a pattern is a module's name or its end, at a dot, and tried on all at once."""

    def __init__(self, config: AdapterConfig, modules: Iterable[str]) -> None:
        """Take the modules that will be asked for, as far as they are known; others take their time."""
        self._config = config
        self._ranks: dict[str, set[int]] = {}
        self._alphas: dict[str, float] = {}
        self._look_up(list(modules))

    def ranks_of(self, module: str) -> set[int]:
        """Return the ranks that may be meant for a module: files have patterns in another order than trainers."""
        if module not in self._ranks:
            self._look_up([module])
        return self._ranks[module]

    def scale_of(self, module: str, rank: int) -> float:
        """Return what multiplies the product of a module's factors: of alphas, the first that is meant counts."""
        if module not in self._alphas:
            self._look_up([module])
        alpha = self._alphas[module]
        return alpha / math.sqrt(rank) if self._config.is_rank_stabilised else alpha / rank

    def _look_up(self, modules: Sequence[str]) -> None:
        config = self._config
        self._ranks |= {module: {config.rank} for module in modules}
        for pattern, rank in config.rank_pattern.items():
            for module in _meant(pattern, modules):
                self._ranks[module].add(rank)
        self._alphas |= dict.fromkeys(modules, config.alpha)
        for pattern, alpha in reversed(list(config.alpha_pattern.items())):
            self._alphas |= dict.fromkeys(_meant(pattern, modules), alpha)


def _meant(pattern: str, modules: Sequence[str]) -> set[str]:
    return fitting(rf"(.*\.)?({pattern})", modules)


def parse_adapter_config(given: object, where: str) -> AdapterConfig:
    """Return what adapter_config.json says.

    Raises:
        CheckpointError: it is no LoRA, asks for what is not known here, or is malformed; in one sentence.
    """
    try:
        return _parsed(given)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _parsed(given: object) -> AdapterConfig:
    if not isinstance(given, dict):
        raise ValueError(f"expected a mapping, found {shown(given)}")
    _refuse_others(given)
    base, revision = given.get("base_model_name_or_path"), given.get("revision")
    is_pinned = isinstance(revision, str) and revision not in ("", "main")
    return AdapterConfig(
        rank=_read(given, "r", _positive, 8),
        alpha=_read(given, "lora_alpha", _number, 0.0),
        is_rank_stabilised=_read(given, "use_rslora", _flag, False),
        rank_pattern=_read(given, "rank_pattern", _patterns(_positive), dict[str, int]()),
        alpha_pattern=_read(given, "alpha_pattern", _patterns(_number), dict[str, float]()),
        fan_in_fan_out=_read(given, "fan_in_fan_out", _flag, False),
        has_lengths=_read(given, "use_dora", _flag, False),
        biases=_read(given, "bias", _text, "none"),
        targets=_targets(given),
        modules_to_save=_read(given, "modules_to_save", _names, ()),
        token_indices=_read(given, "trainable_token_indices", _tokens, {}),
        target_parameters=_read(given, "target_parameters", _names, ()),
        version=tuple(map(int, re.findall(r"\d{1,6}", str(given.get("peft_version") or ""))[:3])),
        expert_layout=_read(given, "moe_lora_layout", _text, "unsloth" if _is_of_unsloth(given) else "") or None,
        keeps_ties=_read(given, "ensure_weight_tying", _flag, False),
        base=f"{base}@{revision}" if base and is_pinned else base if base and isinstance(base, str) else None,
        task=_read(given, "task_type", _text, "") or None,
    )


def _targets(given: Mapping[str, object]) -> tuple[str, ...]:
    is_narrowed = any(given.get(key) not in (None, []) for key in ("layers_to_transform", "exclude_modules"))
    targets = given.get("target_modules")
    return () if is_narrowed or not isinstance(targets, list) else tuple(map(str, targets))


def _refuse_others(given: Mapping[str, object]) -> None:
    if given.get("lora_alpha") is None and given.get("peft_type") == "LORA":
        raise ValueError("it has no `lora_alpha`, which PEFT writes and no tensor shows: the scale of its factors")
    kind = given.get("peft_type")
    if kind is None:
        of_mlx = "mlx_lm.fuse" if "fine_tune_type" in given or "lora_parameters" in given else "what made it"
        raise ValueError(
            f"it has no `peft_type`: no adapter of PEFT, which alone are read. Merge it with {of_mlx} first"
        )
    if kind != "LORA":
        raise ValueError(f"it holds an adapter of the type {shown(kind)}; only LORA is read. Merge it with PEFT first")
    for key, name in _VARIANTS.items():
        if given.get(key) not in (None, False, [], {}):
            raise ValueError(f"it asks for {name} (`{key}`), which is not read; merge it with PEFT first")
    start = given.get("init_lora_weights", True)
    if isinstance(start, str) and _OWN_BASE.fullmatch(start):
        raise ValueError(
            f"it began as {shown(start)}, which changes the base it is trained on: its tensors do not belong to the "
            "base as it is published. Save it converted (PEFT: path_initial_model_for_weight_conversion)"
        )
    if not isinstance(start, bool) and start is not None and str(start).lower() not in _INITIALISATIONS:
        raise ValueError(f"it began as {shown(start)} (`init_lora_weights`), which is not known here")
    unknown = [key for key, value in given.items() if key not in _NO_MATTER | _VARIANTS.keys() and value]
    if unknown:
        raise ValueError(
            f"it has the key {shown(unknown[0])}, which is not known here and may change what its tensors mean; "
            "remove it if it does not, or merge the adapter with what made it"
        )


def _read(given: Mapping[str, object], key: str, read: Callable[[object], Value], default: Value) -> Value:
    value = given.get(key)
    if value is None:
        return default
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"`{key}`: expected {error}, found {shown(value)}") from None


def _positive(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("a positive integer")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(float(str(value))):
        raise ValueError("a finite number")
    return float(str(value))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("a list of names")
    return tuple(value)


def _patterns(read: Callable[[object], Value]) -> Callable[[object], dict[str, Value]]:
    def reading(value: object) -> dict[str, Value]:
        if not isinstance(value, dict):
            raise ValueError("numbers by pattern")
        if len(value) > MAX_PATTERNS:
            raise ValueError(f"at most {MAX_PATTERNS:,} patterns")
        for pattern in value:
            try:
                _meant(pattern, [""])
            except ValueError as error:
                raise ValueError(f"regular expressions that neither look around nor back ({error})") from None
        return {pattern: read(each) for pattern, each in value.items()}

    return reading


def _tokens(value: object) -> dict[str, tuple[int, ...]]:
    by_module = cast(dict[str, list[int]], value if isinstance(value, dict) else {"embed_tokens": value})
    for indices in by_module.values():
        if not isinstance(indices, list) or not all(type(each) is int and each >= 0 for each in indices):
            raise ValueError("ids of tokens, or such by module")
    return {name: tuple(indices) for name, indices in by_module.items()}
