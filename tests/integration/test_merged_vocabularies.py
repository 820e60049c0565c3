"""Vocabularies by token: unions of real tokenizers, merged, against rows put together here and a float64 oracle."""

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import stockflow
from stockflow.errors import NotFoundError, PlanError
from stockflow.recipe import load_recipe
from stockflow.run.inputs import Inputs
from tests import oracle, quantised, runs
from tests.checkpoints import LLAMA_CONFIG, llama_shapes, make_tensors, write_checkpoint

CORPORA = (
    ["the stock of models is a model", "merging models is stock taking"] * 3,
    ["die Brücke über den Fluß ist alt", "eine alte Brücke, ein neuer Fluß"] * 3,
)
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
HEAD_TIED = ("lm_head.weight", "tied")
HIDDEN = LLAMA_CONFIG["hidden_size"]


def trained(corpus: Sequence[str], added: Sequence[str] = (), size: int = 290) -> Tokenizer:
    """A byte-level BPE tokenizer as the tokenizers library trains it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    made.add_special_tokens(["<|end|>", *added])
    return made


@cache
def english(*added: str) -> Tokenizer:
    """One that is trained once."""
    return trained(CORPORA[0], added)


class Models:
    """A base and two tunes, each with a tokenizer of its own."""

    def __init__(
        self,
        root: Path,
        tokenizers: Sequence[Tokenizer],
        padding: Sequence[int] = (6, 0, 2),
        heads: Sequence[str] = ("own", "own", "own"),
    ) -> None:
        self.root, self.tokenizers = root, tokenizers
        self.folders = [root / name for name in ("base", "one", "two")]
        self.ids = [made.get_vocab(with_added_tokens=True) for made in tokenizers]
        self.tensors = []
        for number, (folder, made) in enumerate(zip(self.folders, tokenizers, strict=True)):
            rows = len(self.ids[number]) + padding[number]
            config = LLAMA_CONFIG | {"vocab_size": rows, "torch_dtype": "bfloat16"}
            drawn = {name: make_tensors(name, shape, 2)[number] for name, shape in llama_shapes(config).items()} | {
                name: self._rows(name, number, rows) for name in ROWS
            }
            self.tensors.append({name: tensor.bfloat16() for name, tensor in drawn.items()})
            config["tie_word_embeddings"] = heads[number] != "own"
            if heads[number] != "own":
                self.tensors[-1][ROWS[1]] = self.tensors[-1][ROWS[0]].clone()
            stored = {name: each for name, each in self.tensors[-1].items() if (name, heads[number]) != HEAD_TIED}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
            files = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(settings)}
            write_checkpoint(folder, stored, config=config, side_files=files)

    def _rows(self, name: str, number: int, num_rows: int) -> torch.Tensor:
        """Rows that are much the same for a token in every model, wherever it stands there."""
        made = np.zeros((num_rows, HIDDEN))
        for token, row in self.ids[number].items():
            common = np.random.default_rng(zlib.crc32((name + token).encode())).standard_normal(HIDDEN)
            made[row] = 0.02 * common
        return torch.from_numpy(made + 0.002 * np.random.default_rng(number).standard_normal(made.shape))

    def recipe(self, method: str, **top_level: Any) -> Path:
        models: list[dict[str, Any]] = [{"model": str(folder)} for folder in self.folders[1:]]
        if method == "linear":
            models = [{**entry, "parameters": {"weight": 0.25 + number}} for number, entry in enumerate(models)]
        recipe = {"merge_method": method, "models": models, **top_level}
        if method != "linear":
            recipe["base_model"] = str(self.folders[0])
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def merged(self, method: str, *, name: str = "out", memory_bytes: int = 2**30, **top_level: Any) -> Path:
        runs.merge_here(self.recipe(method, **top_level), self.root / name, memory_bytes=memory_bytes)
        return self.root / name


def by_token(
    models: Models, name: str, ids: Mapping[str, int], num_rows: int, merged: Sequence[int], forced: Mapping[str, int]
) -> list[oracle.Floats]:
    """Rows of every merged model by token string, defaults included: the only one's, the base's, else the mean.

    A row that is no token's is, likewise, the row of equal number of the models where it is no token's either.
    """
    stored = {index: models.tensors[index][name].double().numpy() for index in merged}
    spare = {index: set(range(len(stored[index]))) - set(models.ids[index].values()) for index in merged}
    made = [np.zeros((num_rows, HIDDEN)) for _ in merged]

    def fill(row: int, rows: Mapping[int, int], forced_row: oracle.Floats | None = None) -> None:
        own = {index: stored[index][number] for index, number in rows.items()}
        default = own[0] if 0 in own else np.mean(list(own.values()), axis=0) if own else np.zeros(HIDDEN)
        for place, index in enumerate(merged):
            made[place][row] = own.get(index, default) if forced_row is None else forced_row

    for token, row in ids.items():
        source = forced.get(token)
        row_of = {index: models.ids[index][token] for index in merged if token in models.ids[index]}
        fill(row, row_of, None if source is None else stored[source][models.ids[source][token]])
    for row in set(range(num_rows)) - set(ids.values()):
        fill(row, {index: row for index in merged if row in spare[index]})
    return made


def expected_of(method: str, arrays: Sequence[oracle.Floats]) -> oracle.Floats:
    if method == "linear":
        return (0.25 * arrays[0] + 1.25 * arrays[1]) / 1.5
    if method == "model_stock":
        return np.asarray(oracle.model_stock(arrays[0], list(arrays[1:])).out)
    return np.asarray(oracle.task_arithmetic(arrays[0], list(arrays[1:]), [1.0, 1.0]).out)


def assert_rows(models: Models, out: Path, method: str, forced: Mapping[str, int] | None = None) -> dict[str, int]:
    """Hold every row of the output against its token's; return the output's ids, as the tokenizers library has them."""
    ids: dict[str, int] = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True)
    written = load_file(str(out / "model.safetensors"))
    merged = [1, 2] if method == "linear" else [0, 1, 2]
    written_rows = [name for name in ROWS if name in written]
    for name in written_rows:
        found = written[name]
        arrays = by_token(models, name, ids, found.shape[0], merged, forced or {})
        expected = expected_of(method, arrays)
        bits = found.view(torch.uint16).numpy()
        distance = oracle.ulp_distance("BF16", bits, oracle.round_to("BF16", expected))
        assert (distance == 0).mean() >= 0.9995, name
        assert distance.max() <= 1, name
    config = json.loads((out / "config.json").read_text())
    assert {written[name].shape[0] for name in written_rows} == {config["vocab_size"]}
    return ids


@pytest.fixture
def three(tmp_path: Path) -> Models:
    """A base, a tune with two more tokens, one of another language with a token of its own."""
    english = trained(CORPORA[0])
    return Models(
        tmp_path, [english, trained(CORPORA[0], ["<|tool|>", "<|x|>"]), trained(CORPORA[1], ["<|tool|>", "<|y|>"])]
    )


@pytest.mark.parametrize("method", ["model_stock", "task_arithmetic", "linear"])
def test_a_union_has_every_token_and_each_row_is_its_tokens(three: Models, method: str) -> None:
    given = {"parameters": {"weight": 1.0}} if method == "task_arithmetic" else {}

    out = three.merged(method, tokenizer_source="union", **given)

    ids = assert_rows(three, out, method)
    merged = three.ids[1:] if method == "linear" else three.ids
    assert ids.keys() == {token for each in merged for token in each}
    assert ids.items() >= merged[0].items()
    assert sorted(ids.values()) == list(range(len(ids)))


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_rows_in_codes_are_taken_by_token_and_written_as_numbers(tmp_path: Path, form: str) -> None:
    """Though the output has as many rows as the base, whose codes would fit it."""
    three = Models(tmp_path, [english(), english("<|tool|>"), trained(CORPORA[1], ["<|tool|>"])], padding=(0, 0, 0))
    for folder, tensors in zip(three.folders, three.tensors, strict=True):
        stored = dict(tensors)
        for name in ROWS:
            weight = stored.pop(name).float()
            made = (
                quantised.fp8(weight, tuple(weight.shape), name="weight_scale")
                if form == "fp8"
                else quantised.int4(weight.double().numpy(), HIDDEN)
            )
            stored |= {f"{name.removesuffix('weight')}{own}": tensor for own, tensor in made.tensors.items()}
            tensors[name] = torch.from_numpy(made.values)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    assert_rows(three, three.merged("model_stock", tokenizer_source="base"), "model_stock")


@pytest.mark.parametrize("source", ["base", "one", "two"])
def test_the_vocabulary_of_one_model_is_taken(three: Models, source: str) -> None:
    location = source if source == "base" else str(three.root / source)

    out = three.merged("model_stock", tokenizer_source=location)

    assert assert_rows(three, out, "model_stock") == three.ids[["base", "one", "two"].index(source)]
    assert (out / "tokenizer.json").read_bytes() == (three.root / source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("source", ["union", "base"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 1)], ids=["base-fewer", "base-more", "equal"])
@pytest.mark.parametrize(
    ("heads", "writes_head", "is_tied"),
    [
        (("tied", "twice", "tied"), False, True),
        (("twice", "tied", "tied"), True, True),
        (("tied", "tied", "tied"), False, True),
        (("own", "tied", "twice"), True, False),
        (("tied", "own", "twice"), True, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_head_has_its_tokens_rows_however_each_model_stores_it(
    tmp_path: Path, heads: tuple[str, ...], writes_head: bool, is_tied: bool, order: tuple[int, ...], source: str
) -> None:
    made = english(), english("<|tool|>", "<|x|>"), english("<|tool|>", "<|x|>", "<|y|>", "<|z|>")
    models = Models(tmp_path, [made[number] for number in order], heads=heads)
    accepting = {} if is_tied else {"stockflow": {"accept": ["head-untied"]}}

    out = models.merged("model_stock", tokenizer_source=source, **accepting)

    assert_rows(models, out, "model_stock")
    written = load_file(str(out / "model.safetensors"))
    assert (ROWS[1] in written) is writes_head
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert not (writes_head and is_tied) or torch.equal(written[ROWS[0]], written[ROWS[1]])


def test_a_head_that_no_embedding_could_stand_for_is_said_so(tmp_path: Path) -> None:
    models = Models(tmp_path, [english()] * 3, heads=("tied", "twice", "tied"))
    narrow = {name: tensor[:, :8].clone() if name in ROWS else tensor for name, tensor in models.tensors[1].items()}
    config = json.loads((models.folders[1] / "config.json").read_text())
    write_checkpoint(models.folders[1], narrow, config=config, side_files={})

    with pytest.raises(PlanError) as refused:
        Inputs.open(load_recipe(str(models.recipe("model_stock", tokenizer_source="union")))).plan()

    assert "no embedding there has rows as long" in str(refused.value)
    assert "its config says that it has a head of its own" not in str(refused.value)


def test_wrapped_names_are_read_as_such_whatever_the_number_of_tokens(tmp_path: Path) -> None:
    models = Models(tmp_path, [english(), english("<|x|>"), english()])
    config = json.loads((models.folders[1] / "config.json").read_text())
    files = {"tokenizer.json": models.tokenizers[1].to_str()}
    wrapped = {name.replace("model.", "model.language_model."): each for name, each in models.tensors[1].items()}
    write_checkpoint(models.folders[1], wrapped, config=config, side_files=files)

    assert_rows(models, models.merged("model_stock", tokenizer_source="union"), "model_stock")


def test_a_forced_token_has_one_row_in_all_models(three: Models) -> None:
    entry = {"source": str(three.folders[2]), "force": True}

    out = three.merged("model_stock", tokenizer={"source": "union", "tokens": {"<|tool|>": entry, "<|end|>": entry}})

    ids = assert_rows(three, out, "model_stock", {"<|tool|>": 2, "<|end|>": 2})
    row = load_file(str(out / "model.safetensors"))[ROWS[0]][ids["<|tool|>"]]
    assert torch.equal(row, three.tensors[2][ROWS[0]][three.ids[2]["<|tool|>"]])


@pytest.mark.parametrize(("source", "row"), [({"token": "Ġ"}, None), ({"token_id": 7}, 7)], ids=["token", "token_id"])
def test_a_new_token_has_the_row_of_another_token(three: Models, source: dict[str, Any], row: int | None) -> None:
    entry = {"source": {"kind": "model_token", "model": str(three.folders[2]), **source}}

    tokens = {"<|new|>": entry, "<|end|>": {**entry, "force": True}}
    out = three.merged("model_stock", tokenizer={"source": "union", "tokens": tokens})

    written = load_file(str(out / "model.safetensors"))
    ids = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True)
    for name in ROWS:
        expected = three.tensors[2][name][three.ids[2]["Ġ"] if row is None else row]
        for token in tokens:
            assert torch.equal(written[name][ids[token]], expected)


@pytest.mark.parametrize(
    ("token", "source", "said"),
    [
        ("<|new|>", {"token": "no such token"}, "the row of 'no such token' from .*/two, which has no such token"),
        ("<|new|>", {"token_id": 100_000}, r"takes row 100,000 for '<\|new\|>' from .*/two, which has \d+ rows"),
        ("<|y|>", {"token_id": 1}, "which has the token itself and keeps its own row: say `force: true`"),
    ],
)
def test_a_row_that_is_not_there_is_refused(three: Models, token: str, source: dict[str, Any], said: str) -> None:
    entry = {"source": {"kind": "model_token", "model": str(three.folders[2]), **source}}
    recipe = three.recipe("model_stock", tokenizer={"source": "union", "tokens": {token: entry}})

    with pytest.raises(PlanError, match=said):
        Inputs.open(load_recipe(str(recipe))).plan()


@pytest.mark.parametrize("with_base", [True, False])
def test_what_two_of_three_have_is_the_bases_row_in_the_third_or_their_mean(three: Models, with_base: bool) -> None:
    """So it is in mergekit, whose base is one where the recipe names it, of methods without a base, too."""
    folders = [str(folder) for folder in reversed(three.folders)]
    base = {"base_model": folders.pop()} if with_base else {}
    recipe = {"merge_method": "linear", "models": folders, "parameters": {"weight": 1}, "tokenizer_source": "union"}

    stockflow.merge(recipe | base, str(three.root / "out"))

    ids = Tokenizer.from_file(str(three.root / "out" / "tokenizer.json")).get_vocab(with_added_tokens=True)
    found = load_file(str(three.root / "out" / "model.safetensors"))[ROWS[0]].double()
    shared = sorted((three.ids[0].keys() & three.ids[1].keys()) - three.ids[2].keys())
    assert shared
    for token in shared:
        first, second = (three.tensors[number][ROWS[0]][three.ids[number][token]].double() for number in (0, 1))
        default = first if with_base else (first + second) / 2
        assert torch.allclose(found[ids[token]], (first + second + default) / 3, rtol=2**-7, atol=1e-9)


def tokens_of_another(models: Models, made: Tokenizer) -> Path:
    """A folder with a tokenizer and nothing else."""
    other = models.root / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(made.to_str())
    (other / "chat_template.jinja").write_text("{{ 'of the other' }}")
    (other / "notes.txt").write_text("mine")
    return other


def test_the_tokenizer_of_a_model_that_is_not_merged(three: Models) -> None:
    made = trained(CORPORA[1] + CORPORA[0], ["<|tool|>", "<|nobody|>"], size=300)
    other = tokens_of_another(three, made)

    out = three.merged("model_stock", tokenizer_source=str(other))

    assert assert_rows(three, out, "model_stock") == made.get_vocab(with_added_tokens=True)
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (other / file).read_bytes()
    assert not (out / "notes.txt").exists()
    assert not load_file(str(out / "model.safetensors"))[ROWS[0]][made.token_to_id("<|nobody|>")].any()
    manifest = json.loads((out / "manifest.json").read_text())
    dropped, unknown = (each for each in manifest["remarks"] if each["code"] == "tokens-missing")
    assert (dropped["severity"], unknown["severity"]) == ("note", "warning")
    assert "<|nobody|>" in unknown["values"]
    assert f"{other}` | tokenizer |" in (out / "README.md").read_text()
    assert not stockflow.verify(out, inputs=True, sample=1.0, memory=2**30 + runs.grown_bytes()).findings
    seen = stockflow.inspect(three.root / "recipe.yaml", device="cpu")
    assert [ref.url for ref in seen.checkpoints] == [str(folder) for folder in three.folders]


def test_ids_of_tokens_in_configs_follow_the_vocabulary(three: Models) -> None:
    """The base's end and a token of its own, in lists and within, and what is no token of it."""
    three.recipe("model_stock")
    own = three.ids[0]
    ids = {"eos_token_id": [own["<|end|>"], own["Ġ"]], "text_config": {"pad_token_id": own["Ġ"]}, "bos_token_id": None}
    config = json.loads((three.folders[0] / "config.json").read_text()) | ids | {"image_token_index": 10**6}
    (three.folders[0] / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": own["<|end|>"], "suppress_tokens": [own["Ġ"]], "top_k": own["Ġ"]}
    generation |= {"forced_decoder_ids": [[1, own["Ġ"]], [2, None]], "lang_to_id": {"<|en|>": own["Ġ"]}}
    (three.folders[0] / "generation_config.json").write_text(json.dumps(generation))

    out = three.merged("model_stock", tokenizer_source=str(three.folders[2]))

    new = three.ids[2]
    assert new["<|end|>"] != own["<|end|>"] or new["Ġ"] != own["Ġ"]
    written = json.loads((out / "config.json").read_text())
    assert written["eos_token_id"] == [new["<|end|>"], new["Ġ"]]
    assert (written["text_config"]["pad_token_id"], written["image_token_index"]) == (new["Ġ"], 10**6)
    found = json.loads((out / "generation_config.json").read_text())
    assert (found.pop("forced_decoder_ids"), found.pop("lang_to_id")) == (
        [[1, new["Ġ"]], [2, None]],
        {"<|en|>": new["Ġ"]},
    )
    assert found == {"eos_token_id": new["<|end|>"], "suppress_tokens": [new["Ġ"]], "top_k": own["Ġ"]}
    assert not stockflow.verify(out).findings


def test_a_token_that_configs_name_and_the_output_lacks_is_said(three: Models) -> None:
    config = json.loads((three.folders[0] / "config.json").read_text())
    (token, number), *_ = ((token, number) for token, number in three.ids[0].items() if token not in three.ids[2])
    (three.folders[0] / "config.json").write_text(json.dumps(config | {"pad_token_id": number}))

    plan = Inputs.open(load_recipe(str(three.recipe("model_stock", tokenizer_source=str(three.folders[2]))))).plan()

    (said,) = [each for each in plan.remarks if each.code == "token-ids" and each.severity == "warning"]
    assert dict(said.values) == {token: str(number)}


def test_a_tokenizer_that_is_not_there_or_damaged_is_refused(three: Models) -> None:
    other = tokens_of_another(three, english())
    recipe = load_recipe(str(three.recipe("model_stock", tokenizer_source=str(other))))
    for payload in (b"<!DOCTYPE html><html></html>", b'{"model": '):
        (other / "tokenizer.json").write_bytes(payload)
        with pytest.raises(PlanError, match=r"tokenizer\.json"):
            Inputs.open(recipe).plan()
    (other / "tokenizer.json").unlink()
    (other / "chat_template.jinja").unlink()
    with pytest.raises(NotFoundError, match="has no tokenizer: expected tokenizer"):
        Inputs.open(recipe)


def test_a_row_of_a_model_that_is_not_merged_is_refused(three: Models) -> None:
    tokenizer = {"source": "base", "tokens": {"<|end|>": {"source": str(three.folders[0]), "force": True}}}
    recipe = three.recipe("linear", base_model=str(three.folders[0]), tokenizer=tokenizer)

    with pytest.raises(PlanError, match=r"'<\|end\|>' from a model that is not merged there"):
        Inputs.open(load_recipe(str(recipe))).plan()


def test_padding_is_that_of_the_models_then_zeros_and_a_zero_token_is_zeros(three: Models) -> None:
    tokens = {"<|new|>": {"source": {"kind": "zero"}}}

    out = three.merged("model_stock", tokenizer={"source": "base", "tokens": tokens, "pad_to_multiple_of": 64})

    ids = assert_rows(three, out, "model_stock")
    rows = load_file(str(out / "model.safetensors"))[ROWS[0]]
    assert ids["<|new|>"] == len(three.ids[0])
    assert rows.shape[0] % 64 == 0
    assert not rows[ids["<|new|>"]].any()
    assert torch.equal(rows[len(ids) : len(three.tensors[0][ROWS[0]])], three.tensors[0][ROWS[0]][len(ids) :])
    assert not rows[max(len(each[ROWS[0]]) for each in three.tensors) :].any()
    remarks = json.loads((out / "manifest.json").read_text())["remarks"]
    said = [each for each in remarks if each["code"] == "padding-of-zeros"]
    assert {name for each in said for name in each["tensors"]} == {*ROWS}
    assert f"{int((rows == 0).all(dim=1).sum()) - 1} rows of padding" in said[0]["text"]


def test_two_plans_of_a_union_are_the_same_and_memory_changes_no_byte(three: Models) -> None:
    wide = three.merged("model_stock", name="wide", tokenizer_source="union")
    narrow = three.merged("model_stock", name="narrow", tokenizer_source="union", memory_bytes=200 * 2**20)

    assert runs.shard_digests(wide) == runs.shard_digests(narrow)
    plans = [json.loads(next(out.glob("_stockflow/*/plan.json")).read_text())["plan_id"] for out in (wide, narrow)]
    assert plans[0] == plans[1]


def test_a_union_is_verified_and_audited_from_its_own_plan(three: Models) -> None:
    out = three.merged("model_stock", tokenizer_source="union")

    verified = runs.invoke("verify", out, "--sample", "100%", "--json")

    assert verified.exit_code == 0, verified.stdout + verified.stderr


def test_when_vocabularies_agree_nothing_but_files_moves(tmp_path: Path) -> None:
    english = trained(CORPORA[0])
    models = Models(tmp_path, [english, english, english], padding=(6, 6, 6))

    plain = Inputs.open(load_recipe(str(models.recipe("model_stock")))).plan()
    union = Inputs.open(load_recipe(str(models.recipe("model_stock", tokenizer_source="union")))).plan()

    assert plain.plan_id == union.plan_id
    assert all(job.reading.is_plain for job in union.jobs)


def test_padding_alone_is_dropped(tmp_path: Path) -> None:
    english = trained(CORPORA[0])
    models = Models(tmp_path, [english, english, english], padding=(6, 0, 2))
    with pytest.raises(PlanError, match="`tokenizer_source: base` or `union` merges rows by token"):
        Inputs.open(load_recipe(str(models.recipe("model_stock")))).plan()

    out = models.merged("model_stock", tokenizer_source="base")

    assert len(assert_rows(models, out, "model_stock")) == len(models.ids[0])


def test_rows_that_rules_copy_move_by_token_too(three: Models) -> None:
    rules = {"rules": [{"filter": "lm_head", "action": "copy"}]}

    out = three.merged("model_stock", tokenizer_source="union", stockflow=rules)

    ids = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True)
    head = load_file(str(out / "model.safetensors"))["lm_head.weight"]
    for token, row in ids.items():
        own = three.ids[0].get(token)
        assert torch.equal(head[row], torch.zeros(HIDDEN).bfloat16() if own is None else three.tensors[0][ROWS[1]][own])


def test_transformers_loads_a_union_and_gives_the_ids_of_the_plan(three: Models) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = three.merged("model_stock", tokenizer_source="union", chat_template="chatml")

    tokenizer = AutoTokenizer.from_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = assert_rows(three, out, "model_stock")
    assert tokenizer.get_vocab() == ids
    assert loaded.get_input_embeddings().weight.shape[0] == len(ids)
    for text in ("the stock of models <|end|>", "eine Brücke<|y|>"):
        base = AutoTokenizer.from_pretrained(three.folders[0])(text.replace("<|y|>", ""))["input_ids"]
        assert tokenizer(text)["input_ids"][: len(base)] == base, "what the base knows is cut as it was"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    said = tokenizer.apply_chat_template([{"role": "user", "content": "stock"}], tokenize=False)
    assert said == "<|im_start|>user\nstock<|im_end|>\n"
    assert loaded(**tokenizer("the stock", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("auto", "{{ 'two models say this' }}"),
        ("{{ messages[0].content }} and more", "{{ messages[0].content }} and more"),
        ("two", "{{ 'two models say this' }}"),
        ("llama3", "<|start_header_id|>"),
    ],
)
def test_a_template_alone_changes_files_and_no_weight(tmp_path: Path, template: str, expected: str) -> None:
    english = trained(CORPORA[0])
    models = Models(tmp_path, [english, english, english], padding=(6, 6, 6))
    for folder, own in zip(models.folders, ["base", "two models say this", "two models say this"], strict=True):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": f"{{{{ {own!r} }}}}"}))
    plain = models.merged("model_stock", name="plain")
    if template == "two":
        template = str(models.folders[2])

    out = models.merged("model_stock", chat_template=template)

    assert runs.shard_digests(out) == runs.shard_digests(plain)
    assert expected in (out / "chat_template.jinja").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
    }


@pytest.mark.parametrize(
    "names",
    [
        ("lm_head.weight", "lm_head.bias"),
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias"),
        ("embeddings", "weights"),
    ],
)
def test_rows_of_tokens_are_known_by_their_number(tmp_path: Path, names: tuple[str, str]) -> None:
    letters = [*"|etaonis"]
    orders, entries = (letters, letters[::-1]), []
    tensors = [{name: torch.randn((8, 5)[: 2 - k]) for k, name in enumerate(names)} for _ in orders]
    for number, order in enumerate(orders):
        vocabulary = {"vocab.json": json.dumps({letter: place for place, letter in enumerate(order)})}
        layer = {"encoder.layers.0.weight": torch.ones(5, 5)}
        write_checkpoint(tmp_path / str(number), tensors[number] | layer, side_files=vocabulary, config={})
        entries.append({"model": str(tmp_path / str(number)), "parameters": {"weight": 0.5}})
    recipe = {"merge_method": "linear", "models": entries, "tokenizer_source": "base"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        one, two = (each[name].double() for each in tensors)
        assert torch.equal(merged[name], (0.5 * one + 0.5 * two.flip(0)).float())


def test_a_template_is_for_models_without_rows_too(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("base", "one", "two")]
    for number, folder in enumerate(folders):
        write_checkpoint(folder, {"vit.layer.0.weight": torch.randn(3, 4) + number}, side_files={})
    recipe = {"merge_method": "model_stock", "base_model": str(folders[0]), "chat_template": "chatml"}
    models = [{"model": str(folder)} for folder in folders[1:]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "models": models, "tokenizer_source": "union"}))

    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_inspect_and_audit_see_rows_by_token(three: Models) -> None:
    recipe, out = three.recipe("model_stock", tokenizer_source="union"), three.root / "out"
    runs.merge_here(recipe, out)
    facts = runs.tensor_facts(out)

    seen = runs.invoke("inspect", recipe, "--out", three.root / "seen", "--device", "cpu")
    audited = runs.invoke("audit", out, "--out", three.root / "found", "--device", "cpu")

    assert seen.exit_code == 0, seen.stderr
    assert audited.exit_code == 0, audited.stdout + audited.stderr
    assert facts[ROWS[0]]["ratio"] > 0.1
