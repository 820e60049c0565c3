"""Tokenizers beside each other: families as they are published, and what a plan says of each pair of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stockflow.errors import PlanError
from stockflow.planning.plan import MergePlan
from stockflow.recipe import parse_recipe
from stockflow.run.inputs import Inputs
from tests.token_files import (
    LETTERS,
    added,
    ids_of,
    model_with,
    sentencepiece_model,
    tekken_json,
    tiktoken_lines,
    tokenizer_json,
)

Files = Mapping[str, str | bytes]


def fast(tokens: Sequence[str] | Mapping[str, int], kind: str = "BPE", more: Sequence[dict[str, Any]] = ()) -> Files:
    return {"tokenizer.json": tokenizer_json(tokens, kind, more)}


FAST = fast(LETTERS)
BYTES = [bytes([letter]) for letter in b"abcdefgh"] + [b" a", b" b"]
PIECES = ["<unk>", "<s>", "</s>", "▁stock", "▁merge", "s"]
BYTE_LETTERS = [f"<{byte}>" for byte in range(256)]
XLM = {
    "sentencepiece.bpe.model": sentencepiece_model(PIECES),
    "tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizer"}',
}


def bartpho(dictionary: str) -> Files:
    return {"spiece.model": sentencepiece_model(PIECES), "dict.txt": dictionary}


WORDS = ["[PAD]", "[UNK]", "stock", "##s"]
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n"
CHATML, LLAMA = (
    "{% for m in messages %}<im_start>{{ m.role }}{% endfor %}",
    "{{ bos_token }}[INST]{% for m in messages %}{{ m.content }}{% endfor %}",
)


def renamed(tokens: list[str], **places: str) -> list[str]:
    """Tokens with others at some places: ``_3="x"``."""
    return [places.get(f"_{number}", token) for number, token in enumerate(tokens)]


def config(**settings: Any) -> Files:
    return FAST | {"tokenizer_config.json": json.dumps(settings)}


def decoder(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(entry["id"]): entry for entry in entries}}


class Models:
    """A base and two tunes; what is said of the second tune is what the first one is, unless it is given."""

    def __init__(self, root: Path, base: Files, one: Files, two: Files | None = None, rows: int = 12) -> None:
        self.folders = [root / name for name in ("base", "one", "two")]
        given = (base, one, one if two is None else two)
        for number, (folder, files) in enumerate(zip(self.folders, given, strict=True)):
            model_with(folder, files, rows=rows if number else 12, seed=number)

    @classmethod
    def of(cls, folders: list[Path]) -> "Models":
        """Models that were written already."""
        models = cls.__new__(cls)
        models.folders = folders
        return models

    def plan(self, *, accept: tuple[str, ...] = (), **top_level: Any) -> MergePlan:
        recipe: dict[str, Any] = {
            "merge_method": "model_stock",
            "base_model": str(self.folders[0]),
            "models": [{"model": str(folder)} for folder in self.folders[1:]],
            "stockflow": {"accept": list(accept), **top_level.pop("stockflow", {})},
        }
        return Inputs.open(parse_recipe(json.dumps(recipe | top_level), "recipe.yaml")).plan()

    def said(self, **top_level: Any) -> dict[str, str]:
        """Severity by code, refusals accepted."""
        codes = ("vocabularies-differ", "vocabularies-unread")
        return {remark.code: remark.severity for remark in self.plan(accept=codes, **top_level).remarks}


AGREEING: dict[str, tuple[Files, Files]] = {
    "the same file": (FAST, FAST),
    "written in another way": (FAST, {"tokenizer.json": json.dumps(json.loads(tokenizer_json(LETTERS)), indent=2)}),
    "GPT-2's slow form beside the fast one": (
        FAST,
        {"vocab.json": json.dumps(ids_of(LETTERS)), "merges.txt": "#version: 0.2\n"},
    ),
    "the first GPT-2's names": ({"encoder.json": json.dumps(ids_of(LETTERS)), "vocab.bpe": ""}, FAST),
    "BERT's lines beside WordPiece": ({"vocab.txt": "\n".join(WORDS) + "\n"}, fast(WORDS, "WordPiece")),
    "Llama 2's SentencePiece beside its fast form": (
        {
            "tokenizer.model": sentencepiece_model(PIECES),
            "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}',
        },
        fast(PIECES),
    ),
    "T5's spiece.model beside Unigram": ({"spiece.model": sentencepiece_model(PIECES)}, fast(PIECES, "Unigram")),
    "Qwen's tiktoken beside byte-level BPE": ({"qwen.tiktoken": tiktoken_lines(BYTES)}, FAST),
    "Llama 3's tiktoken under SentencePiece's name": ({"tokenizer.model": tiktoken_lines(BYTES)}, FAST),
    "Mistral's tekken": ({"tekken.json": tekken_json(BYTES[:9], ["<unk>"], room=10)}, fast(["<unk>", *LETTERS[:9]])),
    "added tokens in a file of their own": (
        FAST | {"added_tokens.json": '{"<|im_end|>": 10}'},
        fast(LETTERS, more=added("<|im_end|>", start=10)),
    ),
    "added tokens in the tokenizer's config": (
        fast(LETTERS, more=added("<|x|>", start=10)),
        config(**decoder(*added("<|x|>", start=10))),
    ),
    "XLM-R's numbering in all of them": (XLM, XLM),
    "PhoBERT's lines from fairseq beside a fast form": (
        {"vocab.txt": "a 90\nb 5\n"},
        fast(["<s>", "<pad>", "</s>", "<unk>", "a", "b"]),
    ),
    "PhoBERT's mask behind all others": (
        {"vocab.txt": "a 90\nb 5\n", "special_tokens_map.json": '{"mask_token": "<mask>", "pad_token": "<pad>"}'},
        fast(["<s>", "<pad>", "</s>", "<unk>", "a", "b"], more=added("<mask>", start=6))
        | {"tokenizer_config.json": '{"mask_token": "<mask>", "pad_token": "<pad>"}'},
    ),
    "PhoBERT's lines with other counts": ({"vocab.txt": "a 90\nb 5\n"}, {"vocab.txt": "a 7\nb 3\n"}),
    "BARTpho's dictionary": (bartpho("a 1\n"), bartpho("a 1\n")),
    "a dictionary that is left beside a fast form": (FAST | {"dict.txt": "a 1\n"}, FAST),
    "a dictionary that no code of this class reads": (XLM | {"dict.txt": "a 1\n"}, XLM),
    "a form that nobody reads, the same bytes": ({"dict.txt": "a 9\nb 5\n"}, {"dict.txt": "a 9\nb 5\n"}),
    "none at all": ({}, {}),
    "byte models without files": ({"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}, {}),
}


@pytest.mark.parametrize("case", AGREEING)
def test_nothing_is_said_of_vocabularies_that_agree(case: str, tmp_path: Path) -> None:
    base, tuned = AGREEING[case]

    assert Models(tmp_path, base, tuned).said() == {}
    assert Models(tmp_path / "turned", tuned, base).said() == {}


RESERVED = added("<|begin|>", "<|reserved_0|>", start=10)
DIFFERING: dict[str, tuple[Files, Files, str]] = {
    "a reserved token that was renamed": (
        fast(LETTERS, more=RESERVED),
        fast(LETTERS, more=added("<|begin|>", "<|im_start|>", start=10)),
        r"1 id of 12 tokens means something else in \S+/one, \S+/two than in \S+/base: "
        r"11 is '<\|im_start\|>' here and '<\|reserved_0\|>' there\. Rows",
    ),
    "another order": (FAST, fast(LETTERS[::-1]), "10 ids of 10 tokens mean .* and 7 more"),
    "another family of the same size": (
        FAST,
        fast([*PIECES, *"xyzw"], "Unigram"),
        "10 ids of 10 tokens",
    ),
    "one token that moved": (
        FAST,
        fast(ids_of(LETTERS[:9]) | {LETTERS[9]: 11}),
        "2 ids of 10 tokens mean .*: 9 is nothing here and 'Ġb' there, 11 is 'Ġb' here and nothing there",
    ),
    "Unigram pieces swapped": (
        fast(PIECES, "Unigram"),
        fast([*PIECES[:3], *PIECES[:2:-1]], "Unigram"),
        "3 is 's' here and '▁stock' there",
    ),
    "BERT cased and uncased": (
        {"vocab.txt": "\n".join(WORDS)},
        {"vocab.txt": "\n".join(renamed(WORDS, _2="Stock"))},
        "2 is 'Stock' here",
    ),
    "slow forms with other ids": (
        {"vocab.json": json.dumps(ids_of(LETTERS))},
        {"vocab.json": json.dumps(ids_of(renamed(LETTERS, _0="z")))},
        "0 is 'z' here and 'a' there",
    ),
    "SentencePiece models": (
        {"tokenizer.model": sentencepiece_model(PIECES)},
        {"tokenizer.model": sentencepiece_model(renamed(PIECES, _5="t"))},
        "5 is 't' here and 's' there",
    ),
    "tiktoken of two generations": (
        {"qwen.tiktoken": tiktoken_lines(BYTES)},
        {"tiktoken.model": tiktoken_lines(BYTES[::-1])},
        "0 is 'Ġb' here",
    ),
    "added tokens in a file of their own": (
        FAST | {"added_tokens.json": '{"<pad>": 10}'},
        FAST | {"added_tokens.json": '{"<|im_end|>": 10}'},
        r"10 is '<\|im_end\|>' here and '<pad>' there",
    ),
    "an added token in the place of one of a slow form": (
        {"vocab.json": json.dumps(ids_of(LETTERS))},
        {"vocab.json": json.dumps(ids_of(LETTERS)), "added_tokens.json": '{"a": 11}'},
        "2 ids of .*: 0 is nothing here and 'a' there, 11 is 'a' here",
    ),
    "tokens that only their names put behind the others": (
        {"vocab.json": json.dumps(ids_of(LETTERS)), "special_tokens_map.json": '{"pad_token": "<p>"}'},
        {
            "vocab.json": json.dumps(ids_of(LETTERS)),
            "special_tokens_map.json": '{"additional_special_tokens": [{"content": "<|im_end|>"}], "eos_token": "a"}',
        },
        r"10 is '<\|im_end\|>' here and '<p>' there",
    ),
    "PhoBERT's lines in another order": (
        {"vocab.txt": "a 90\nb 5\n"},
        {"vocab.txt": "b 90\na 5\n"},
        "4 is 'b' here and 'a' there",
    ),
    "a token that would command a terminal": (
        FAST,
        fast(renamed(LETTERS, _0="\x1b[31m\n")),
        r"0 is '\\x1b\[31m\\n' here",
    ),
    "half of a surrogate pair": (
        FAST,
        {"tokenizer.json": json.dumps(json.loads(tokenizer_json(renamed(LETTERS, _0="\ud83d"))))},
        r"'\\ud83d' here",
    ),
}


@pytest.mark.parametrize("case", DIFFERING)
def test_ids_that_mean_different_tokens_are_refused(case: str, tmp_path: Path) -> None:
    base, tuned, sentence = DIFFERING[case]
    models = Models(tmp_path, base, tuned)

    with pytest.raises(PlanError, match=sentence) as caught:
        models.plan()

    assert "accept it: `stockflow: {accept: [vocabularies-differ]}`" in str(caught.value)
    assert models.said()["vocabularies-differ"] == "refusal"


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "embeddings",
        "transformer.word_embedding.weight",
        "embed_prompts.weight",
        "semantic.input_embeds_layer.weight",
        "words.table",
    ],
)
def test_what_is_as_long_as_the_vocabulary_has_a_row_per_token(name: str, tmp_path: Path) -> None:
    folders = [tmp_path / each for each in ("base", "one", "two")]
    for number, folder in enumerate(folders):
        model_with(folder, fast(LETTERS[::-1] if number == 1 else LETTERS), rows=10, seed=number, embedding=name)

    with pytest.raises(PlanError, match=r"10 ids of 10 tokens mean something else in \S+/one than in \S+/base, "):
        Models.of(folders).plan()


def test_an_embedding_and_a_head_of_other_lengths_are_not_gathered_by_token(tmp_path: Path) -> None:
    """Llama 3.2's vision models have eight rows more in the embedding."""
    folders = [tmp_path / each for each in ("base", "one", "two")]
    for number, folder in enumerate(folders):
        model_with(folder, fast(BYTE_LETTERS[:: -1 if number == 1 else 1]), rows=256, seed=number)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = torch.randn(264, 4).bfloat16()
        save_file(tensors, folder / "model.safetensors")

    with pytest.raises(PlanError, match=r"'lm_head\.weight' has 256 rows in \S+/base where .* of 264 in 'model\.embed"):
        Models.of(folders).plan(tokenizer_source="base")


def test_a_size_that_layers_have_too_tells_no_rows(tmp_path: Path) -> None:
    folders = [tmp_path / each for each in ("base", "one", "two")]
    for number, folder in enumerate(folders):
        tokens = fast(LETTERS[:4][:: -1 if number == 1 else 1])
        model_with(folder, tokens, rows=4, seed=number, embedding="features.weight")

    assert Models.of(folders).said() == {}


UNREAD: dict[str, tuple[Files, Files, str]] = {
    "XLM-R's numbering beside another": (XLM, fast(PIECES), "XLMRobertaTokenizer numbers tokens anew"),
    "BARTpho's dictionary": (bartpho("a 1\nb 1\n"), bartpho("b 1\na 1\n"), "dict.txt numbers tokens anew, not"),
    "BARTpho's dictionary in one": (
        bartpho("a 1\n"),
        {"spiece.model": bartpho("")["spiece.model"]},
        "dict.txt numbers",
    ),
    "BARTpho's dictionary beside XLM-R's numbering": (
        {"sentencepiece.bpe.model": XLM["sentencepiece.bpe.model"], "dict.txt": "a 1\n"},
        XLM,
        "XLMRobertaTokenizer and dict.txt number",
    ),
    "the other vocabulary of Marian": (
        {"vocab.json": json.dumps(ids_of(LETTERS)), "target_vocab.json": '{"a": 0, "b": 1}'},
        {"vocab.json": json.dumps(ids_of(LETTERS)), "target_vocab.json": '{"b": 0, "a": 1}'},
        "target_vocab.json numbers",
    ),
    "entities of LUKE": (
        FAST | {"entity_vocab.json": '{"[PAD]": 0, "x": 1}'},
        FAST | {"entity_vocab.json": '{"[PAD]": 0, "y": 1}'},
        "entity_vocab.json numbers",
    ),
    "a form that nobody reads": (
        {"dict.txt": "a 9\n"},
        {"dict.txt": "b 9\n"},
        "dict.txt is of no form that is read here",
    ),
    "a vocabulary of code beside the model": (
        {"rwkv_vocab_v20230424.txt": "1 'a' 1\n2 'b' 1\n"},
        {"rwkv_vocab_v20230424.txt": "1 'b' 1\n2 'a' 1\n"},
        "rwkv_vocab_v20230424.txt is of no form that is read here",
    ),
    "a dictionary per language": (
        {"dict.en.txt": "a 9\nb 5\n"},
        {"dict.en.txt": "b 9\na 5\n"},
        "dict.en.txt is of no form that is read here",
    ),
    "two vocabularies in one model": (
        {"vocab-src.json": "{}", "vocab-tgt.json": "{}"},
        {"vocab-src.json": "{}", "vocab-tgt.json": '{"a": 0}'},
        "vocab-src.json",
    ),
    "a vocabulary per language": (
        {"vocab.json": '{"eng": {"a": 0}}'},
        {"vocab.json": '{"eng": {"b": 0}}'},
        "vocab.json: expected tokens with their ids",
    ),
    "a pointer instead of a file": (FAST, {"tokenizer.json": LFS_POINTER}, "tokenizer.json is a git-lfs pointer"),
    "half a file": (FAST, {"tokenizer.json": FAST["tokenizer.json"][:-40]}, "tokenizer.json: "),
    "added tokens that are none": (FAST, FAST | {"added_tokens.json": "[]"}, "it is not a JSON object"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_vocabularies_that_cannot_be_compared_are_refused(case: str, tmp_path: Path) -> None:
    base, tuned, reason = UNREAD[case]
    models = Models(tmp_path, base, tuned)

    with pytest.raises(PlanError, match=rf"cannot be compared: .*{reason}.*accept: \[vocabularies-unread\]"):
        models.plan()


PLAIN_TOKEN = [added("<a>", start=10)[0] | {"special": False}]
OF_TRANSFORMERS = (
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}"
)
TOKEN = fast(LETTERS, more=added("<|im_end|>", start=10))
OTHER = fast(LETTERS, more=added("<pad>", start=10))
BEYOND = fast(LETTERS, more=added("<pad>", start=12))
RESCALED = {"image_processor_type": "CLIPImageProcessor", "do_rescale": True, "rescale_factor": 0.00392156862745098}
UNCHOSEN = {
    "model_type": "SentenceTransformer",
    "similarity_fn_name": "cosine",
    "prompts": {"query": "", "document": ""},
}
FORCED = FAST | {"config.json": '{"model_type": "llama", "vocab_size": 12, "forced_bos_token_id": 0}'}
DEFAULT = {"name": "default", "template": CHATML}
(FLAGGED,) = (each | {"special": not each.get("special")} for each in added("<|im_end|>", start=10))
SAID: dict[str, tuple[tuple[Files, ...], dict[str, str]]] = {
    "tunes with a token in a padded row": ((FAST, TOKEN), {"tokens-missing": "warning"}),
    "one tune with a token": ((FAST, TOKEN, FAST), {"tokens-missing": "warning"}),
    "a base with a token": ((TOKEN, FAST), {"tokens-missing": "warning"}),
    "two tunes with two tokens in one row": (
        (FAST, TOKEN, OTHER),
        {"tokens-missing": "warning", "vocabularies-differ": "refusal"},
    ),
    "a token without a row": ((FAST, BEYOND), {"tokens-missing": "warning", "tokens-beyond-rows": "warning"}),
    "a token without a row in all of them": ((BEYOND, BEYOND), {"tokens-beyond-rows": "warning"}),
    "a tune without a tokenizer": ((FAST, {}, FAST), {"no-tokenizer": "note"}),
    "a base without a tokenizer": (({}, FAST), {"no-tokenizer": "warning"}),
    "a template of the tunes": ((FAST, config(chat_template=CHATML)), {"side-files-differ": "warning"}),
    "a template of one tune": (
        (config(chat_template=LLAMA), config(chat_template=CHATML), FAST),
        {"side-files-differ": "warning"},
    ),
    "the template of a tune": ((config(chat_template=CHATML), config(chat_template=CHATML), FAST), {}),
    "a template in a file of its own": (
        (FAST | {"chat_template.jinja": CHATML + "\n"}, config(chat_template=CHATML)),
        {},
    ),
    "a template beside a processor": (
        (FAST | {"chat_template.json": json.dumps({"chat_template": CHATML})}, config(chat_template=CHATML)),
        {},
    ),
    "several templates": (
        (config(chat_template=[{"name": "default", "template": CHATML}]), config(chat_template=CHATML)),
        {},
    ),
    "no template but the base's": ((config(chat_template=CHATML), FAST), {}),
    "a template of one tune that the other has not": (
        (config(chat_template=LLAMA), config(chat_template=CHATML), config(chat_template=LLAMA)),
        {"side-files-differ": "note"},
    ),
    "a template with the line ends of another system": (
        (config(chat_template="{{ a }}\r\n{{ b }}"), config(chat_template="{{ a }}\n{{ b }}\n")),
        {},
    ),
    "a template in a file before that of the config": (
        (config(chat_template=LLAMA) | {"chat_template.jinja": CHATML}, config(chat_template=CHATML)),
        {"tokens-disagree": "warning"},
    ),
    "several templates, and the same in files": (
        (
            config(chat_template=[DEFAULT, {"name": "rag", "template": LLAMA}]),
            FAST | {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": LLAMA},
        ),
        {},
    ),
    "several templates, and another of them in a file": (
        (
            config(chat_template=[DEFAULT, {"name": "rag", "template": LLAMA}]),
            FAST | {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": CHATML},
        ),
        {"side-files-differ": "warning", "not-taken": "note"},
    ),
    "another of several templates in the config": (
        tuple(config(chat_template=[DEFAULT, {"name": "rag", "template": each}]) for each in (CHATML, LLAMA)),
        {"side-files-differ": "warning"},
    ),
    "another first token": ((config(bos_token="a"), config(bos_token="b")), {"side-files-differ": "warning"}),
    "a first token of the base alone": ((config(bos_token="a"), config(bos_token=None)), {}),
    "an end token of one tune": (
        (config(eos_token="a"), config(eos_token="b"), config(eos_token="a")),
        {"side-files-differ": "note"},
    ),
    "a filling of the tunes": ((config(), config(pad_token="b")), {"side-files-differ": "note"}),
    "a filling of one tune": ((config(pad_token="a"), config(pad_token="b"), config(pad_token="a")), {}),
    "a filling of the special tokens": (
        (config(pad_token={"content": "b"}), FAST | {"special_tokens_map.json": '{"pad_token": "b"}'}),
        {},
    ),
    "a length that texts are cut to": (
        (config(model_max_length=2048), config(model_max_length=8192)),
        {"tokenizers-differ": "note"},
    ),
    "no length, in two spellings": (
        (config(model_max_length=10**30), config(model_max_length=1000000000000000019884624838656)),
        {},
    ),
    "a length that does not go out": ((config(model_max_length=1e30), config(model_max_length=8192)), {}),
    "a length that one says": ((FAST, config(model_max_length=8192)), {}),
    "an added token with other flags in the config": (
        (
            TOKEN | {"tokenizer_config.json": json.dumps(decoder(*added("<|im_end|>", start=10)))},
            TOKEN | {"tokenizer_config.json": json.dumps(decoder(FLAGGED))},
        ),
        {"tokenizers-differ": "note"},
    ),
    "another of several templates": (
        tuple(FAST | {"additional_chat_templates/rag.jinja": each} for each in (CHATML, LLAMA)),
        {"side-files-differ": "warning"},
    ),
    "another end token": ((config(eos_token="a"), config(eos_token="b")), {"side-files-differ": "warning"}),
    "an end token written as a mapping": (
        (config(eos_token="a"), config(eos_token={"content": "a", "lstrip": False})),
        {},
    ),
    "an end token of the special tokens": (
        (config(eos_token="a"), FAST | {"special_tokens_map.json": '{"eos_token": "a"}'}),
        {},
    ),
    "another generation config": (
        (
            FAST | {"generation_config.json": '{"eos_token_id": 1}'},
            FAST | {"generation_config.json": '{"eos_token_id": [1, 2]}'},
        ),
        {"side-files-differ": "warning", "config-keys-differ": "note"},
    ),
    "a first token that one tune begins with": (
        tuple(
            FAST | {"generation_config.json": json.dumps({"top_k": 5} | ids)} for ids in ({}, {"bos_token_id": 1}, {})
        ),
        {"config-keys-differ": "note"},
    ),
    "a token that one tune forces": (
        (FAST, FAST | {"generation_config.json": '{"forced_bos_token_id": 0}'}, FAST),
        {"config-differs": "warning", "not-taken": "note"},
    ),
    "a token that one tune forces by a file and the others by their config": (
        (FORCED, FORCED | {"generation_config.json": '{"forced_bos_token_id": 0}'}, FORCED),
        {"not-taken": "note"},
    ),
    "a generation config that says what the base's config does": (
        (FORCED, FORCED | {"generation_config.json": '{"forced_bos_token_id": 0, "_from_model_config": true}'}),
        {"not-taken": "note"},
    ),
    "a token that the base's config forces and the tunes' generation config alone": (
        (FORCED, FAST | {"generation_config.json": '{"forced_bos_token_id": 0}'}),
        {"not-taken": "note"},
    ),
    "a generation config that says more than the base's config": (
        (FORCED, FORCED | {"generation_config.json": '{"forced_bos_token_id": 0, "temperature": 0.6}'}),
        {"not-taken": "note", "side-files-differ": "warning"},
    ),
    "code that only a tokenizer names, where no code is there": (
        (config(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}),) * 2,
        {"missing-files": "warning"},
    ),
    "code that only a processor names": (
        (FAST | {"processor_config.json": '{"auto_map": {"AutoProcessor": "processing_x.XP"}}'},) * 2,
        {"missing-files": "warning"},
    ),
    "a template that breaks off": (
        (FAST | {"chat_template.jinja": CHATML[:-6]}, FAST | {"chat_template.jinja": CHATML[:-6]}),
        {"template-unread": "warning"},
    ),
    "a template with blocks of transformers": (
        (config(chat_template=OF_TRANSFORMERS), config(chat_template=OF_TRANSFORMERS)),
        {},
    ),
    "a template that writes what is no token": (
        (config(chat_template="<|im_end|>{{ eos_token }}"), config(chat_template="<|im_end|>{{ eos_token }}")),
        {"template-unread": "note"},
    ),
    "a template of the tokens that there are": (
        (TOKEN | {"chat_template.jinja": "<|im_end|>"}, TOKEN | {"chat_template.jinja": "<|im_end|>"}),
        {},
    ),
    "a token with another id beside it": (
        (TOKEN | {"added_tokens.json": '{"<|im_end|>": 11}'}, TOKEN),
        {"tokens-disagree": "warning"},
    ),
    "a token with another id in the config of a tune": (
        (TOKEN, TOKEN | {"tokenizer_config.json": json.dumps(decoder({"id": 3, "content": "<|im_end|>"}))}),
        {"tokens-disagree": "note"},
    ),
    "what Mistral's own loader reads beside it": (
        (fast(["<unk>", *LETTERS[:9]]) | {"tekken.json": tekken_json(BYTES[:9], ["<unk>"], room=10)},) * 2,
        {},
    ),
    "another order in what Mistral's own loader reads": (
        (
            fast(["<unk>", *LETTERS[:9]]) | {"tekken.json": tekken_json(BYTES[8::-1], ["<unk>"], room=10)},
            fast(["<unk>", *LETTERS[:9]]),
        ),
        {"tokens-disagree": "warning"},
    ),
    "a token that Mistral's own loader has in another's place": (
        (
            fast(["<|im_end|>", *LETTERS[:9]]) | {"tekken.json": tekken_json(BYTES[:9], ["<unk>"], room=10)},
            fast(["<|im_end|>", *LETTERS[:9]]),
        ),
        {"tokens-disagree": "warning"},
    ),
    "a token in the place of another": (
        (TOKEN | {"tokenizer_config.json": json.dumps(decoder({"id": 10, "content": "<tool>"}))}, TOKEN),
        {"tokens-disagree": "warning", "tokens-missing": "warning"},
    ),
    "an end token that is none": (
        (config(eos_token="<|end|>"), FAST),
        {"tokens-disagree": "warning"},
    ),
    "an end beyond the rows": (
        (FAST | {"generation_config.json": '{"eos_token_id": [1, 12]}'},) * 2,
        {"promise-unkept": "warning"},
    ),
    "an end that is not the tokenizer's": (
        (config(eos_token="b") | {"generation_config.json": '{"eos_token_id": 0}'},) * 2,
        {"tokens-disagree": "note"},
    ),
    "an end that is the tokenizer's among others": (
        (config(eos_token="b") | {"generation_config.json": '{"eos_token_id": [0, 1]}'},) * 2,
        {},
    ),
    "a token that is special in one model": (
        (fast(LETTERS, more=[added("<a>", start=10)[0] | {"special": True}]), fast(LETTERS, more=PLAIN_TOKEN)),
        {"tokenizers-differ": "note"},
    ),
    "images of another size": (
        (FAST | {"preprocessor_config.json": '{"size": 224}'}, FAST | {"preprocessor_config.json": '{"size": 336}'}),
        {"side-files-differ": "warning"},
    ),
    "images of another size in one tune": (
        (
            FAST | {"preprocessor_config.json": '{"size": 224, "_name_or_path": "x"}'},
            FAST | {"preprocessor_config.json": '{"size": 336}'},
            FAST | {"preprocessor_config.json": '{"size": 224}'},
        ),
        {"side-files-differ": "note"},
    ),
    "another module behind the others": (
        (
            FAST | {"modules.json": '[{"path": "", "type": "x.Transformer"}]'},
            FAST | {"modules.json": '[{"path": "", "type": "x.Transformer"}, {"path": "1", "type": "x.Normalize"}]'},
        ),
        {"side-files-differ": "warning", "missing-files": "warning"},
    ),
    "what sentence-transformers writes where nothing was chosen": (
        (
            FAST | {"config_sentence_transformers.json": '{"default_prompt_name": null}'},
            FAST | {"config_sentence_transformers.json": json.dumps(UNCHOSEN)},
        ),
        {},
    ),
    "sizes and types as older versions write them": (
        (
            FAST | {"preprocessor_config.json": '{"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}'},
            FAST | {"preprocessor_config.json": json.dumps(RESCALED | {"size": {"shortest_edge": 224}})},
        ),
        {},
    ),
    "images of another size than an older version writes": (
        (
            FAST | {"preprocessor_config.json": '{"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}'},
            FAST | {"preprocessor_config.json": json.dumps(RESCALED | {"size": {"shortest_edge": 336}})},
        ),
        {"side-files-differ": "warning"},
    ),
    "a prompt that tunes were trained with": (
        (
            FAST | {"config_sentence_transformers.json": '{"prompts": {}}'},
            FAST | {"config_sentence_transformers.json": json.dumps(UNCHOSEN | {"prompts": {"query": "query: "}})},
        ),
        {"side-files-differ": "warning"},
    ),
    "a generation config of another version": (
        (
            FAST | {"generation_config.json": '{"transformers_version": "4.40"}'},
            FAST | {"generation_config.json": "{}"},
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_differs_beside_the_ids_is_said(case: str, tmp_path: Path) -> None:
    files, expected = SAID[case]

    assert Models(tmp_path, *files).said() == expected


def test_tokens_that_no_sound_is_read_by_need_no_row(tmp_path: Path) -> None:
    for number, folder in enumerate(("base", "one", "two")):
        model_with(tmp_path / folder, fast(LETTERS), seed=number, rows=8, embedding="lm_head.weight")

    assert Models.of([tmp_path / folder for folder in ("base", "one", "two")]).said() == {}


def test_what_differs_is_said_by_its_name(tmp_path: Path) -> None:
    special = fast(LETTERS, more=[added("<a>", start=10)[0] | {"special": True}])
    models = Models(tmp_path, special, fast(LETTERS, more=PLAIN_TOKEN))

    (text,) = (remark.text for remark in models.plan().remarks if remark.code == "tokenizers-differ")

    assert text.endswith("what differs: the added token '<a>' (no flag there, special here)")


def test_a_merge_without_rows_per_token_is_not_asked_for_its_tokenizers(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "one", "two")):
        files = {"vocab.txt": f"token {number}\n"}
        model_with(tmp_path / name, files, seed=number, embedding="vit.embeddings.patch_embeddings.projection.weight")

    assert Models.of([tmp_path / name for name in ("base", "one", "two")]).said() == {}


def test_rows_that_are_copied_mix_nothing(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, fast(LETTERS[::-1]))
    rules = [{"filter": "embed_tokens", "action": "copy"}, {"filter": "lm_head", "action": "copy"}]

    (said,) = models.plan(stockflow={"rules": rules}).remarks

    assert (said.code, said.severity) == ("vocabularies-differ", "note")
    assert "Their rows are not mixed" in said.text


def test_embeddings_of_other_lengths_are_refused_with_the_tokens_that_differ(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, OTHER, TOKEN, rows=11)

    with pytest.raises(PlanError, match=r"(?s)10 is '<\|im_end\|>' here and '<pad>' there.* is \[11, 4\] in"):
        models.plan()


def test_another_model_may_give_tokenizer_and_template(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, TOKEN | dict(config(chat_template=CHATML)) | TOKEN)

    assert models.said() == {"tokens-missing": "warning", "side-files-differ": "warning"}
    assert models.said(stockflow={"side_files_from": str(models.folders[1])}) == {"tokens-missing": "warning"}


def test_what_programs_read_has_every_token_and_who_has_it(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, fast(renamed(LETTERS, _3="é", _7="\x07")))

    (said,) = models.plan(accept=("vocabularies-differ",)).remarks

    assert said.values == {"3": "'é' here and 'd' there", "7": "'\\x07' here and 'h' there"}
    assert said.models == tuple(map(str, (*models.folders[1:], models.folders[0])))


def step(**parts: Any) -> Files:
    return {"tokenizer.json": json.dumps(json.loads(tokenizer_json(LETTERS)) | parts)}


@pytest.mark.parametrize(("eos", "is_said"), [([0, 3], False), (0, True)])
def test_a_template_whose_turns_end_where_generation_does_not_is_said(
    tmp_path: Path, eos: object, is_said: bool
) -> None:
    tokens = fast({"</s>": 0, "b": 1, "<|im_start|>": 2, "<|im_end|>": 3})
    files = tokens | {"generation_config.json": json.dumps({"eos_token_id": eos})}

    remarks = Models(tmp_path, files, files).plan(chat_template="chatml").remarks

    said = [each for each in remarks if "ends turns with '<|im_end|>' (3)" in each.text]
    assert [(each.code, each.severity) for each in said] == [("tokens-disagree", "warning")] * is_said


def test_turns_that_go_on_behind_their_parts_end_as_their_template_says(tmp_path: Path) -> None:
    tokens = fast({"a": 0, "<|start|>": 1, "<|end|>": 2, "<|return|>": 3})
    files = tokens | {"generation_config.json": json.dumps({"eos_token_id": 3})}
    harmony = "<|start|>{{ messages[0].thinking }}<|end|><|start|>{{ messages[0].content }}<|return|>"

    remarks = Models(tmp_path, files, files).plan(chat_template=harmony).remarks

    assert [each.text for each in remarks if "ends turns with" in each.text] == []


def of_model(**options: Any) -> Files:
    document = json.loads(tokenizer_json(LETTERS))
    return {"tokenizer.json": json.dumps(document | {"model": document["model"] | options})}


def slow(merges: str) -> Files:
    return {"vocab.json": json.dumps(ids_of(LETTERS)), "merges.txt": f"#version: 0.2\n{merges}\n"}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CUT: dict[str, tuple[Files, Files, str, str]] = {
    "normalizer": (FAST, step(normalizer={"type": "Lowercase"}), "warning", "normalizer"),
    "pre-tokenizer": (step(pre_tokenizer=BYTE_LEVEL), step(pre_tokenizer={"type": "Whitespace"}), "warning", "pre_tok"),
    "around": (FAST, step(post_processor={"type": "BertProcessing", "sep": ["a", 0]}), "warning", "post_processor"),
    "decoder": (FAST, step(decoder={"type": "ByteLevel"}), "note", "decoder"),
    "merges": (FAST, of_model(merges=[["a", "b"]]), "warning", "merges"),
    "merges of slow forms": (slow("a b\nc d"), slow("c d\na b"), "warning", "merges"),
    "merges of both forms": (of_model(merges=[["a", "b"]]), slow("a c"), "warning", "merges"),
    "merges of PhoBERT": (
        {"vocab.txt": "a 9\n", "bpe.codes": "a b 9\n"},
        {"vocab.txt": "a 9\n", "bpe.codes": "b a 9\n"},
        "warning",
        "bpe.codes",
    ),
    "scores of pieces": (
        {"spiece.model": sentencepiece_model(PIECES)},
        {"spiece.model": sentencepiece_model(PIECES, -3.0)},
        "warning",
        "scores of pieces",
    ),
    "fallback": (FAST, of_model(byte_fallback=True), "warning", "model"),
    "side": (FAST | config(padding_side="left"), FAST | config(padding_side="right"), "note", "padding_side"),
    "class": (
        FAST | config(tokenizer_class="LlamaTokenizerFast"),
        FAST | config(tokenizer_class="Qwen2Tokenizer"),
        "note",
        "tokenizer_class",
    ),
    "length": (
        step(truncation={"max_length": 8}),
        step(truncation=None),
        "warning",
        "truncation of every text (none",
    ),
    "filling": (
        step(padding={"strategy": {"Fixed": 8}}),
        FAST,
        "warning",
        "padding of every text (none there, 8",
    ),
    "begin": (FAST | config(add_bos_token=True), FAST | config(add_bos_token=False), "warning", "add_bos_token"),
}


@pytest.mark.parametrize("case", CUT)
def test_tokenizers_that_cut_texts_in_other_ways_are_said(tmp_path: Path, case: str) -> None:
    base, one, severity, part = CUT[case]

    (said,) = [each for each in Models(tmp_path, base, one).plan().remarks if each.code == "tokenizers-differ"]

    assert said.severity == severity
    assert said.models == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert part in said.text


SAME_CUT: dict[str, tuple[Files, Files]] = {
    "merges as pairs": (of_model(merges=["a b"]), of_model(merges=[["a", "b"]])),
    "merges of both forms": (of_model(merges=[["a", "b"]]), slow("a b")),
    "what newer versions write": (
        step(pre_tokenizer=BYTE_LEVEL),
        step(pre_tokenizer={**BYTE_LEVEL, "use_regex": True}, padding={"strategy": "BatchLongest"}),
    ),
    "a length that does not go out": (FAST, step(truncation={"max_length": 8}, padding={"strategy": {"Fixed": 8}})),
    "options that are off": (FAST, of_model(ignore_merges=False, dropout=None, byte_fallback=False)),
    "a prefix in two spellings": (
        step(decoder={"type": "Metaspace", "replacement": "_", "add_prefix_space": True}),
        step(decoder={"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}),
    ),
    "a class by its other name": (
        FAST | config(tokenizer_class="LlamaTokenizerFast"),
        FAST | config(tokenizer_class="LlamaTokenizer"),
    ),
    "any class": (
        FAST | config(tokenizer_class="LlamaTokenizerFast"),
        FAST | config(tokenizer_class="PreTrainedTokenizerFast"),
    ),
    "a flag that one says": (FAST, config(add_bos_token=True)),
}


@pytest.mark.parametrize("case", SAME_CUT)
def test_tokenizers_that_cut_alike_are_quiet(tmp_path: Path, case: str) -> None:
    plan = Models(tmp_path, *SAME_CUT[case]).plan()

    assert [each for each in plan.remarks if each.code == "tokenizers-differ"] == []
