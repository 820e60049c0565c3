"""Classes of tokenizers: which tokens they take where their files say none, and which they add behind their pieces.

Source: transformers 5.23, what ``__init__`` of these classes takes by default; 4.57 agrees.
"""

import re
from collections.abc import Mapping

from stockflow.checkpoints.tokens.said import ROLES
from stockflow.checkpoints.tokens.vocabularies import Ids

RENUMBERED = re.compile(
    r"(XLMRoberta|Camembert|Barthez|XGLM|XLMProphetNet|MBart(50)?|Nllb|Pegasus|ChatGLM|FNet|PLBart|SeamlessM4T|LayoutXLM"
    r"|MLuke)Tokenizer(Fast)?"
)
"""classes whose code numbers the pieces of a SentencePiece model anew"""
_T5 = ("t5", "mt5", "umt5", "longt5", "switchtransformers")
_EXTRA = "<extra_id_{}>"
_NUM_EXTRA = 100
"""of T5's tokens for gaps in a text"""
_END = "<|endoftext|>"
_ROBERTA = ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")
_KIN: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "bert", "distilbert", "electra", "convbert", "mobilebert", "layoutlm", "nomicbert", "ernie", "roformer",
            "squeezebert", "megatronbert", "lxmert", "rembert",
        ),
        ("", "", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"),
    ),
    (
        (
            "roberta", "xlmroberta", "camembert", "bart", "mbart", "longformer", "led", "blenderbot", "phobert",
            "bertweet", "layoutlmv3", "luke", "data2vectext", "nllb", "barthez",
        ),
        _ROBERTA,
    ),
    (("mpnet",), ("<s>", "</s>", "[UNK]", "</s>", "<pad>", "<s>", "<mask>")),
    (("deberta", "debertav2"), ("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")),
    (("gpt2", "codegen", "gptneo", "gptj", "gptbigcode", "starcoder2"), (_END, _END, _END)),
    (("gptneox", "olmo", "olmoe", "mamba", "mamba2"), (_END, _END, _END, "", "<|padding|>")),
    (("qwen2", "qwen2moe", "qwen3", "qwen3moe"), ("", _END, _END, "", _END)),
    (("llama", "codellama", "mistral", "mixtral"), ("<s>", "</s>", "<unk>")),
    (("gemma", "gemma2", "gemma3", "gemma3text"), ("<bos>", "<eos>", "<unk>", "", "<pad>", "", "<mask>")),
    (_T5, ("", "</s>", "<unk>", "", "<pad>")),
    (("pegasus",), ("", "</s>", "<unk>", "", "<pad>", "", "<mask_2>")),
    (("albert", "fnet"), ("[CLS]", "[SEP]", "<unk>", "[SEP]", "<pad>", "[CLS]", "[MASK]")),
    (("xlnet",), ("<s>", "</s>", "<unk>", "<sep>", "<pad>", "<cls>", "<mask>")),
    (("bigbird",), ("<s>", "</s>", "<unk>", "[SEP]", "<pad>", "[CLS]", "[MASK]")),
)  # fmt: skip
"""Tokens by what they are for, in the order of ``ROLES``, of classes and of the models that have these."""
_BY_KIN = {name: dict(zip(ROLES, tokens, strict=False)) for names, tokens in _KIN for name in names}


def kin_of(settings: Mapping[str, object], config: Mapping[str, object] | None) -> str:
    """Return what a class of tokenizers is called, of a model that names none by its type; empty if it is not known.

    Args:
        settings: tokenizer_config.json.
        config: config.json.
    """
    named = settings.get("tokenizer_class") or (config or {}).get("model_type")
    stem = str(named).removesuffix("Fast").removesuffix("Tokenizer").lower().replace("-", "").replace("_", "")
    return stem if stem in _BY_KIN else ""


def roles_of_kin(kin: str) -> dict[str, str]:
    """Return the tokens that a class takes where its files name none, by what they are for."""
    return {role: token for role, token in _BY_KIN.get(kin, {}).items() if token}


def roles_of_ids(config: Mapping[str, object], ids: Ids) -> dict[str, str]:
    """Return the tokens that a config names by their ids."""
    said = {role: config.get(f"{role}_id") for role in ("bos_token", "eos_token", "pad_token")}
    numbers = {role: number for role, number in said.items() if type(number) is int}
    tokens = {number: token for token, number in ids.items() if number in numbers.values()} if numbers else {}
    return {role: tokens[number] for role, number in numbers.items() if number in tokens}


def tokens_for_gaps(kin: str, settings: Mapping[str, object], ids: Ids) -> Ids:
    """Return the tokens for gaps in a text that T5's class adds behind its pieces, the last one first."""
    said = settings.get("extra_ids")
    number = said if type(said) is int else _NUM_EXTRA
    if kin not in _T5 or _EXTRA.format(0) in ids or f"▁{_EXTRA.format(0)}" in ids:
        return {}
    last = len(ids) + number - 1
    return {_EXTRA.format(place): last - place for place in range(number)}
