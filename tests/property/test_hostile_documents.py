"""What others wrote is accepted or refused by a typed error: no other exception, no long message, no long time."""

import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.errors import CheckpointError, RecipeError
from stockflow.output import manifest
from stockflow.output.keys import plan_key
from stockflow.output.ownership import earlier_plan
from stockflow.planning.file import check_mergeable
from stockflow.planning.job import COPY, copying
from stockflow.planning.operands import stored
from stockflow.storage import StorageConfig, check_key, open_store
from tests.fuzz.readers import MANIFEST, NASTY, READERS, SHARD, Reader, attempt, places

JSON_READERS = ("index", "config", "manifest", "receipt", "plan", "claim")
BRIEFLY = settings(max_examples=150, derandomize=True)
WORDS = (b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"[" * 2000, b"{", b'"', b"1e999", b"//")
MOST_CHARACTERS = 3500
"""of a message: twenty problems of a recipe"""


def changed(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None], replacement: Any) -> Any:
    """Return the document with ``change(parent, key)`` done at a place, or the replacement of the whole."""
    document = json.loads(json.dumps(document))
    if not path:
        return replacement
    parent = document
    for step in path[:-1]:
        parent = parent[step]
    change(parent, path[-1])
    return document


@st.composite
def documents(draw: st.DrawFn, reader: Reader) -> bytes:
    document = json.loads(reader.document)
    for _ in range(draw(st.integers(1, 2))):
        value = draw(st.sampled_from(NASTY))
        path = draw(st.sampled_from(places(document)))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))

        def change(parent: Any, key: Any, kind: str = kind, value: Any = value) -> None:
            if kind == "replace":
                parent[key] = value
            elif kind == "remove" or isinstance(parent, list):
                del parent[key]
            elif kind == "add":
                parent[str(value)[:400] if not isinstance(value, int) else "n"] = parent[key]
            else:
                parent["renamed" if not isinstance(value, str) else value] = parent.pop(key)

        document = changed(document, path, change, value)
        if not isinstance(document, dict | list):
            break
    payload = json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(payload)))
        word = draw(st.sampled_from(WORDS))
        payload = payload[:place] + word + payload[place + draw(st.integers(0, 3)) :]
    return payload


@pytest.mark.parametrize("name", READERS)
def test_the_documents_to_begin_with_are_accepted(name: str) -> None:
    assert attempt(READERS[name], READERS[name].document) is None


@pytest.mark.parametrize("name", JSON_READERS)
def test_no_change_of_a_document_raises_anything_else(name: str) -> None:
    reader = READERS[name]

    @BRIEFLY
    @given(documents(reader))
    def try_it(payload: bytes) -> None:
        assert len(attempt(reader, payload) or "") < MOST_CHARACTERS

    try_it()


@pytest.mark.parametrize("name", READERS)
def test_no_damage_to_bytes_raises_anything_else(name: str) -> None:
    """Flipped, cut, doubled and exchanged bytes; most documents must be refused, or the damage reaches nothing."""
    reader, source = READERS[name], random.Random(f"damage {name}")
    outcomes = Counter[bool]()
    for _ in range(300 if name == "recipe" else 600):
        payload = bytearray(reader.document)
        for _ in range(source.randrange(1, 4)):
            place, other = sorted(source.randrange(len(payload) + 1) for _ in range(2))
            match source.randrange(4):
                case 0:
                    payload[place : place + 1] = bytes([source.randrange(256)])
                case 1:
                    del payload[place : place + source.randrange(9)]
                case 2:
                    payload[place:place] = payload[place:other][:50]
                case 3:
                    del payload[other:]
        reason = attempt(reader, bytes(payload))
        outcomes[reason is None] += 1
        assert len(reason or "") < MOST_CHARACTERS

    assert outcomes[False] > 100, outcomes


# --- found by these and by `make fuzz`; each ended in a traceback, a hang or a message of megabytes ------------------

NESTED = b'{"x":' * 960 + b"1" + b"}" * 960
CRASHERS: dict[str, tuple[str, bytes]] = {
    "a claim of nested lists": ("claim", b"[" * 5000),
    "a claim seen in the year 10**400": ("claim", b'{"run": "b", "plan_id": "a", "heartbeat": 1' + b"0" * 400 + b"}"),
    "a claim seen never": ("claim", b'{"run": "b", "plan_id": "a", "heartbeat": NaN}'),
    "a claim of a list": ("claim", b'{"run": "b", "plan_id": [], "heartbeat": 1}'),
    "half of a surrogate pair as bytes, in a config": ("config", b'{"x": "\xed\xa0\x80"}'),
    "UTF-16 with half of a surrogate pair, in a config": ("config", '{"x": "\\ud800"}'.encode("utf-16")),
    "a config that can be read and not written": ("config", NESTED),
    "half of a surrogate pair as bytes, in an index": ("index", b'{"weight_map": {"\xed\xa0\x80": "a"}}'),
    "a file name of 5,000 letters": ("index", b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}'),
    "a file name with an escape sequence": ("index", b'{"weight_map": {"a": "\\u001b[31m"}}'),
    "a tensor name of a megabyte": ("index", b'{"weight_map": {"' + b"x" * 1_000_000 + b'": 1}}'),
    "an index that names a tensor twice": (
        "index", f'{{"weight_map": {{"a": "x", "a": "{SHARD}", "b": "{SHARD}"}}}}'.encode(),
    ),
    "a receipt with tensors of an unknown dtype": ("receipt", READERS["receipt"].document.replace(b"BF16", b"BF17")),
    "a receipt with retries in words": ("receipt", READERS["receipt"].document.replace(b'"read": 1', b'"read": "1"')),
    "a receipt with a tensor without a name": (
        "receipt", READERS["receipt"].document.replace(b'"name": "model.embed_tokens.weight"', b'"name": null'),
    ),
    "a receipt with a size beyond 63 bits": (
        "receipt", READERS["receipt"].document.replace(b'"num_elems": 4656', b'"num_elems": 9223372036854775808'),
    ),
    "a manifest with a field of a megabyte": (
        "manifest", b'{"format": "stockflow-manifest-1", "' + b"x" * 10**6 + b'": 1}',
    ),
    "a manifest whose versions are a list": ("manifest", READERS["manifest"].document.replace(b'"2.9"', b"[]")),
    "a header with a name of a megabyte": ("header", (lambda body: len(body).to_bytes(8, "little") + body)(
        b'{"' + b"x" * 1_000_000 + b'":1}')),
    "a number of 5,000 hexadecimal digits": ("recipe", b"0x" + b"f" * 4000),
    "a number of base 60 with 500,000 digits": ("recipe", b"a: 1" + b":1" * 500_000),
    "a URL of many colons": ("recipe", b"base_model: 's3" + b"://a:x" * 20_000 + b"'"),
    "a value of many question marks": ("recipe", b"dtype: 's3://" + b"?" * 100_000 + b" x'"),
    "a key of a megabyte": ("recipe", b"? " + b"a" * 900_000 + b"\n: 1"),
    "an alias of a megabyte": ("recipe", b"a: *" + b"b" * 900_000),
    "fifteen thousand models": ("recipe", b"merge_method: linear\nmodels:\n" + b"- {model: org/a}\n" * 15_000),
    "many rules for many models": (
        "recipe",
        b"merge_method: linear\nmodels:\n" + b"".join(b"- {model: org/a%d}\n" % n for n in range(1000))
        + b"stockflow:\n  rules:\n" + b"  - {filter: x, merge_method: linear}\n" * 2600,
    ),
    "billions of laughs": (
        "recipe",
        b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10))
                                                     for n in range(ord("b"), ord("z"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("crasher", CRASHERS)
def test_what_was_found_is_refused_in_words(crasher: str) -> None:
    name, payload = CRASHERS[crasher]

    reason = attempt(READERS[name], payload)

    assert reason
    assert len(reason) < 1000
    assert reason.isprintable() or name == "recipe"


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/x", "a/../../x", "..", "", "a\\b", "..\\x", "\\\\host\\x", "C:\\x", "a\0b", "a\nb", "\x7f", "\ud800",
        "x" * 256, "a/" * 600 + "a", "a//b", "./a", "a/", "\u202ea",
    ],
)  # fmt: skip
def test_a_name_that_leaves_its_prefix_is_refused_wherever_it_comes_from(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_key(name)
    assert str(caught.value).isprintable()

    index = json.dumps({"weight_map": {"a": name}}).encode()
    assert attempt(READERS["index"], index)

    published = json.loads(manifest.encode(MANIFEST))
    published["files"] = {name: {"size": 1, "sha256": ""}}
    store = open_store(str(tmp_path), StorageConfig())
    try:
        names = manifest.parse(json.dumps(published).encode(), "out").files
    except CheckpointError:
        return
    for key in names:
        for touch in (store.stamp, lambda key: store.put(key, b""), lambda key: store.delete([key])):
            with pytest.raises(RecipeError):
                touch(key)
    assert list(tmp_path.iterdir()) == []


def test_a_large_recipe_is_read() -> None:
    """The most of everything: 256 models, 2,000 rules, a megabyte."""
    models = "".join(f"- {{model: org/a{number}, parameters: {{weight: 1}}}}\n" for number in range(256))
    rules = "".join(f"  - {{filter: x{number}, merge_method: linear}}\n" for number in range(2000))
    text = f"merge_method: linear\nmodels:\n{models}stockflow:\n  rules:\n{rules}"
    text += "#" * ((1 << 20) - len(text))

    assert attempt(READERS["recipe"], text.encode()) is None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda plan: plan["settings"][0].__setitem__(0, "galaxy"), "the method 'galaxy'"),
        (lambda plan: plan["settings"][0].__setitem__(1, "leading"), None),
        (lambda plan: plan["settings"][2].__setitem__(1, "row"), "ties with the scope 'row'"),
        (lambda plan: plan["settings"][0][2].pop("on_negative"), "model_stock with the parameters"),
        (lambda plan: plan["settings"][0][2].update(t=0.5), "model_stock with the parameters"),
        (lambda plan: plan["settings"][0][2].update(on_negative="explode"), "'on_negative' = 'explode'"),
        (lambda plan: plan["settings"][0][2].update(filter_wise=1), "'filter_wise' = 1"),
        (lambda plan: plan["settings"][2][2].update({"lambda": 10**400}), "'lambda' = "),
        (lambda plan: plan["settings"][2][2].update({"lambda": [1]}), "'lambda' = "),
        (lambda plan: plan["settings"][2][3].update(weight=[1, 2]), "2 values of 'weight' for 1 models"),
        (lambda plan: plan["settings"][2][3].update(weight=[float("inf")]), "1 values of 'weight'"),
        (lambda plan: plan["settings"][2][3].update(weight=[10**400]), "is not a plan of stockflow: Overflow"),
        (lambda plan: plan["shards"][0]["tensors"][0].__setitem__(4, ["BF16"]), "is not a plan of stockflow"),
        (
            lambda plan: (plan["shards"][0]["tensors"][0].__setitem__(4, ["BF16"]),
                          plan["shards"][0]["tensors"][0].__delitem__(slice(6, None))),
            "model_stock of 1 models",
        ),
        (lambda plan: plan["shards"][0]["tensors"][0].__setitem__(4, ["BF16", "I16", "BF16"]), "floating-point"),
        (lambda plan: plan["shards"][1]["tensors"][0].__setitem__(4, ["F64"]), "copies of unlike tensors"),
    ],
)  # fmt: skip
def test_a_plan_that_no_recipe_leads_to_is_not_merged_again(spoil: Callable[[Any], object], told: str | None) -> None:
    """Of an output that somebody made up: `verify --sample` would carry it out."""
    plan = json.loads(READERS["plan"].document)
    spoil(plan)

    reason = attempt(READERS["plan"], json.dumps(plan).encode())

    assert (reason is None) == (told is None)
    assert told is None or told in str(reason)


@pytest.mark.parametrize(
    ("source", "output", "is_possible"),
    [
        (("F64", (0, 7)), ("BF16", (0, 7)), True),
        (("F64", (1, 7)), ("BF16", (1, 7)), False),
        (("I64", (0, 7)), ("BF16", (0, 7)), False),
        (("F64", (0, 7)), ("I64", (0, 7)), False),
    ],
)
def test_only_an_empty_tensor_is_copied_to_another_dtype(
    source: tuple[str, tuple[int, ...]], output: tuple[str, tuple[int, ...]], is_possible: bool
) -> None:
    copied = stored(0, TensorSpec("a", *source), Extent("model.safetensors", 300))
    job = copying(TensorSpec("a", *output), (copied,), COPY)

    with nullcontext() if is_possible else pytest.raises(CheckpointError, match="copies of unlike tensors"):
        check_mergeable([job], "plan.json")


@pytest.mark.parametrize(
    "payload", [b"[" * 100_000, b"[" + b"[]," * 100, b'{"checkpoints": [{"url": 1}]}', b"\xff", b""]
)
def test_a_plan_that_cannot_be_read_says_nothing_of_earlier_states(tmp_path: Path, payload: bytes) -> None:
    """A merge looks at the plan of another one that holds its prefix, to say which inputs changed."""
    store = open_store(str(tmp_path), StorageConfig())
    store.put(plan_key("a" * 64), payload)

    assert earlier_plan(store, "a" * 64) is None


def test_the_states_of_a_plan_that_can_be_read_are_known(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), StorageConfig())
    store.put(plan_key("a" * 64), READERS["plan"].document)

    found = earlier_plan(store, "a" * 64)

    assert found is not None
    urls = [checkpoint.url for checkpoint in found.plan.checkpoints]
    assert urls == ["s3://bucket/b", "s3://bucket/c", "s3://bucket/d"]
