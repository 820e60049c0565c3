"""PEFT's files: adapter_config.json and the keys of adapter_model.safetensors, as PEFT 0.21 reads them.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint, and ``set_peft_model_state_dict`` of PEFT 0.21.2.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stockflow.checkpoints.adapters.keys import PREFIX
from stockflow.checkpoints.configs import Config
from stockflow.storage import redact

VERSION = "0.21.2"
"""of PEFT, in whose layout factors of parameters are"""
MAX_PATTERNS = 4000
"""About how many patterns of ranks are written; readers try each on every module."""
_HUB = re.compile(r"(hf://)?(?P<name>[^/@:]+/[^/@]+)(@(?P<revision>[^/]+))?")


@dataclass(frozen=True)
class AdapterDescription:
    """What is said of an adapter besides its tensors. The scale of every product is 1."""

    base: str | None
    """location of the base"""
    ranks: Mapping[str, int]
    """of every module that has factors"""
    candidates: Collection[str] | None
    """all modules of the base that have tensors; None: they are not known"""
    saved: Sequence[str] = ()
    """modules that are saved whole"""
    has_biases: bool = False
    is_turned: bool = False
    """whether linear layers store weights as ``[in, out]``"""
    task: str | None = None
    """that PEFT wraps the model for"""
    parameters: Sequence[str] = ()
    """names of tensors of all experts of a layer that have factors, of ``own_rank``"""
    own_rank: int | None = None

    @property
    def rank(self) -> int:
        """The rank that most modules have, the larger one of several."""
        if self.own_rank is not None:
            return self.own_rank
        counts = Counter(self.ranks.values())
        return max(counts, key=lambda rank: (counts[rank], rank))

    def encode(self) -> bytes:
        """Return adapter_config.json."""
        others = patterns({name: rank for name, rank in self.ranks.items() if rank != self.rank})
        named = _HUB.fullmatch(self.base or "")
        said = {
            "base_model_name_or_path": named["name"] if named else self.base and redact(self.base),
            "bias": "all" if self.has_biases else "none",
            "fan_in_fan_out": self.is_turned,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.rank,
            "alpha_pattern": others,
            "lora_dropout": 0.0,
            "modules_to_save": list(self.saved) or None,
            "peft_type": "LORA",
            **({"peft_version": VERSION} if self.parameters else {}),
            "r": self.rank,
            "rank_pattern": others,
            "revision": named["revision"] if named else None,
            "target_modules": target_modules(self.ranks, self.candidates) or None,
            "target_parameters": list(self.parameters) or None,
            "task_type": self.task,
            "use_dora": False,
            "use_rslora": False,
        }
        return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def patterns(ranks: Mapping[str, int]) -> Mapping[str, int]:
    """Return ranks by pattern, of several names each where there are many."""
    together = -(-len(ranks) // MAX_PATTERNS)
    found: dict[str, int] = {}
    for rank in sorted(set(ranks.values())):
        names = [re.escape(name) for name, own in ranks.items() if own == rank]
        for first in range(0, len(names), together):
            some = names[first : first + together]
            found[f"^{some[0]}" if len(some) == 1 else f"^({'|'.join(some)})"] = rank
    return found


def task_of(config: Config | None) -> str | None:
    """Return the task that PEFT wraps a model for."""
    found = (config or {}).get("architectures")
    classes = found if isinstance(found, list) else []
    return "CAUSAL_LM" if any(str(name).endswith("ForCausalLM") for name in classes) else None


def target_modules(targets: Collection[str], candidates: Iterable[str] | None) -> list[str]:
    """Return the modules as PEFT takes them: the last part of a name where all that end in it are targets."""
    chosen = set(targets)
    if candidates is None:
        return sorted(chosen)
    uneven = {_last(name) for name in candidates if name not in chosen}
    return sorted({name if _last(name) in uneven else _last(name) for name in chosen})


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def factor_keys(module: str, *, is_embedding: bool) -> tuple[str, str]:
    """Return the keys of both factors, A before B."""
    if is_embedding:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def key_of_whole(name: str) -> str:
    """Return the key of a tensor of a module that is saved, or of a bias of one without factors."""
    return f"{PREFIX}{name}"


def key_of_bias(module: str, *, has_factors: bool) -> str:
    """Return the key of the bias of a linear layer."""
    return f"{PREFIX}{module}{'.base_layer' if has_factors else ''}.bias"
