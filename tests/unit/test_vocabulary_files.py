"""Files of a tokenizer to which tokens are added: loaders give them the ids that the plan has for their rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from stockflow.errors import CheckpointError, PlanError
from stockflow.planning import file as plan_file
from stockflow.planning.plan import MergePlan
from stockflow.recipe import parse_recipe
from stockflow.run.inputs import Inputs
from tests.token_files import LETTERS, added, ids_of, model_with, sentencepiece_model, tokenizer_json

ENGLISH, GERMAN = ["the stock of models", "a model of stock"], ["die alte Brücke", "der Fluß ist alt"]


def trained(kind: str, corpus: list[str], token: str) -> Tokenizer:
    """A real tokenizer of the tokenizers library, with a token added to it."""
    model, trainer = {
        "BPE": (models.BPE(), trainers.BpeTrainer(vocab_size=80)),
        "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=["[UNK]"])),
        "WordLevel": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=["[UNK]"])),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"])),
    }[kind]
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens(["<|end|>", token])
    return made


def plan_of(root: Path, *files: dict[str, Any], rows: int = 12, **top_level: Any) -> MergePlan:
    names = ("base", "one", "two")[: len(files)]
    folders = [
        model_with(root / name, own, rows=rows, seed=seed)
        for seed, (name, own) in enumerate(zip(names, files, strict=True))
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folders[0]), "parameters": {"weight": 1.0}}
    recipe |= {"models": [{"model": str(folder)} for folder in folders[1:]], "tokenizer_source": "union"}
    return Inputs.open(parse_recipe(json.dumps(recipe | top_level), "recipe.yaml")).plan()


def written(plan: MergePlan, key: str = "tokenizer.json") -> str:
    return next(file.payload for file in plan.written_files if file.key == key).decode()


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_loaders_give_added_tokens_the_ids_of_their_rows(kind: str, tmp_path: Path) -> None:
    base, other = trained(kind, ENGLISH, "<|x|>"), trained(kind, GERMAN, "<|y|>")
    rows = max(base.get_vocab_size(), other.get_vocab_size())
    plan = plan_of(tmp_path, {"tokenizer.json": base.to_str()}, {"tokenizer.json": other.to_str()}, rows=rows)

    ids = Tokenizer.from_str(written(plan)).get_vocab(with_added_tokens=True)

    assert ids.items() >= base.get_vocab(with_added_tokens=True).items()
    assert ids.keys() == {*base.get_vocab(with_added_tokens=True), *other.get_vocab(with_added_tokens=True)}
    assert sorted(ids.values()) == list(range(len(ids)))
    (embedding,) = (job for job in plan.jobs if "embed_tokens" in job.output.name)
    of_other = embedding.reading.operands[1].rows
    assert embedding.output.shape[0] == len(ids)
    assert of_other is not None
    found = {run.to + step: run.start + step for run in of_other.runs for step in range(run.stop - run.start)}
    assert found == {ids[token]: own for token, own in other.get_vocab(with_added_tokens=True).items()}


def test_tokens_of_older_forms_are_added_too(tmp_path: Path) -> None:
    base = {"tokenizer.json": tokenizer_json(LETTERS)}
    slow = {
        "vocab.json": json.dumps(ids_of([*LETTERS[:9], "z"])),
        "merges.txt": "",
        "added_tokens.json": '{"<|s|>": 10}',
    }

    plan = plan_of(tmp_path, base, slow)

    ids = Tokenizer.from_str(written(plan)).get_vocab(with_added_tokens=True)
    assert ids == ids_of([*LETTERS, "z", "<|s|>"])


def test_what_held_the_vocabulary_in_an_older_form_is_not_published(tmp_path: Path) -> None:
    entries = added("<|x|>", start=10)
    settings = {"added_tokens_decoder": {"10": {"content": "<|x|>", "special": True}}, "eos_token": "a"}
    base = {
        "tokenizer.json": tokenizer_json(LETTERS, more=entries),
        "vocab.json": json.dumps(ids_of(LETTERS)),
        "merges.txt": "",
        "tokenizer_config.json": json.dumps(settings),
        "special_tokens_map.json": "{}",
        "generation_config.json": "{}",
    }
    other = {"tokenizer.json": tokenizer_json(LETTERS, more=added("<|y|>", start=10))}

    plan = plan_of(tmp_path, base, other)

    assert {side.key for side in plan.side_files} == {"special_tokens_map.json", "generation_config.json"}
    assert {file.key for file in plan.written_files} == {"tokenizer.json", "tokenizer_config.json"}
    found = json.loads(written(plan, "tokenizer_config.json"))
    assert {key: entry["content"] for key, entry in found["added_tokens_decoder"].items()} == {
        "10": "<|x|>",
        "11": "<|y|>",
    }
    assert found["eos_token"] == "a"


def test_letters_of_a_ctc_tokenizer_are_written_in_its_one_file(tmp_path: Path) -> None:
    settings = {"tokenizer_config.json": '{"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "a"}'}
    base, other = (settings | {"vocab.json": json.dumps(ids_of(letters))} for letters in (LETTERS, [*LETTERS, "ß"]))

    plan = plan_of(tmp_path, base, other)

    assert json.loads(written(plan, "vocab.json")) == ids_of([*LETTERS, "ß"])
    assert {side.key for side in plan.side_files} == {"tokenizer_config.json"}


@pytest.mark.parametrize(
    ("base", "other", "problem"),
    [
        (
            {"vocab.json": json.dumps(ids_of(LETTERS))},
            {"vocab.json": '{"z": 0}'},
            "has no tokenizer.json, and 1 token would be",
        ),
        ({}, {"tokenizer.json": tokenizer_json(LETTERS)}, "has no tokenizer, and neither has the base"),
        ({"tokenizer.json": tokenizer_json(LETTERS)}, {"dict.txt": "a 1"}, "dict.txt is of no form that is read here"),
        (
            {"tokenizer.json": tokenizer_json(LETTERS)},
            {
                "sentencepiece.bpe.model": sentencepiece_model(LETTERS),
                "tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizer"}',
            },
            "XLMRobertaTokenizer numbers the pieces of its model anew",
        ),
        (
            {"tokenizer.json": tokenizer_json(LETTERS[:4], "Unigram", more=added("<|x|>", start=9))},
            {"tokenizer.json": tokenizer_json(LETTERS)},
            "leaves ids out between its pieces and its added tokens",
        ),
    ],
)
def test_a_tokenizer_that_cannot_hold_them_is_refused_by_name(
    base: dict[str, Any], other: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=problem):
        plan_of(tmp_path, base, other)


def test_a_plan_with_rows_is_read_back_as_it_was(tmp_path: Path) -> None:
    other = {"tokenizer.json": tokenizer_json(LETTERS[::-1], more=added("<|y|>", start=10))}
    plan = plan_of(tmp_path, {"tokenizer.json": tokenizer_json(LETTERS)}, other)

    read = plan_file.parse(plan_file.encode(plan), "plan.json")

    assert (read.plan.plan_id, read.digest, read.copies_digest) == (plan.plan_id, plan.plan_id, plan.merge_id)
    assert list(read.plan.jobs) == list(plan.jobs)
    assert read.plan.written_files == plan.written_files


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 10**6),
        (0, -1),
        (1, [[0, 1, 10**6]]),
        (1, [[0, 10**6, 0]]),
        (1, [[3, 2, 0]]),
        (1, [["0", 1, 0]]),
        (1, [[0, 1]]),
        (2, [[0, 1, [7]]]),
        (2, [[0, 10**6, [0]]]),
        (2, [[0, 1, []]]),
        (2, [[1, 1, [0]]]),
        (2, "x"),
    ],
)
def test_rows_that_no_plan_can_have_are_refused(place: int, value: object, tmp_path: Path) -> None:
    other = {"tokenizer.json": tokenizer_json(LETTERS[::-1], more=added("<|y|>", start=10))}
    plan = plan_of(tmp_path, {"tokenizer.json": tokenizer_json(LETTERS)}, other)
    fields = json.loads(plan_file.encode(plan))
    fields["rows"][-1][place] = value

    with pytest.raises(CheckpointError):
        plan_file.parse(json.dumps(fields).encode(), "plan.json")
