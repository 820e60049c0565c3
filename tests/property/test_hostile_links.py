"""Links of every shape: what is opened is what the system says they lead to, if that may be read, and nothing else."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stockflow.errors import LinkError, NotFoundError, StockflowError
from stockflow.storage import LocalStore

NAMES = ("a.safetensors", "b.json", "sub/c.json", "sub/d.safetensors", "link/c.json", "deep/down/e.json", "up/b.json")
"""``sub`` and ``deep/down`` are folders; ``link`` and ``up`` are links to folders"""
TARGETS = (
    "b.json", "./sub/../b.json", "sub/c.json", "../b.json", "../../outside/secret.json", "../outside/secret.json",
    "../store/w.safetensors", "../outside", ".hidden/token", "sub", "nowhere", "a.safetensors", "link/c.json",
    "up/outside/secret.json", "up/root/b.json", "{top}/root/b.json", "{top}/outside/secret.json", "/dev/null",
    "{top}/root-beside/x.json", "deep/../../root/sub/c.json", ".", "..", "b.json/x",
)  # fmt: skip


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp()).resolve()
    yield folder
    shutil.rmtree(folder)


def fill(top: Path) -> Path:
    shutil.rmtree(top)
    root = top / "root"
    for file in (
        "root/b.json", "root/sub/c.json", "root/.hidden/token", "root/deep/down/e.json", "root-beside/x.json",
        "outside/secret.json", "store/w.safetensors",
    ):  # fmt: skip
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).write_text(file)
    (root / "link").symlink_to("sub")
    (root / "up").symlink_to("..")
    return root


@given(
    links=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(TARGETS), max_size=4),
    folder_links=st.dictionaries(st.sampled_from(["link", "deep/down", "sub"]), st.sampled_from(TARGETS), max_size=2),
    key=st.sampled_from((*NAMES, "model.safetensors")),
)
@example({"sub/c.json": ".", "link/c.json": "b.json"}, {"link": "sub/c.json"}, "a.safetensors")
@settings(max_examples=150)
def test_nothing_is_read_but_where_links_may_lead(
    top: Path, links: dict[str, str], folder_links: dict[str, str], key: str
) -> None:
    root = fill(top)
    for name, target in {**folder_links, **links}.items():
        path = root / name
        if Path(os.path.realpath(path.parent)).is_relative_to(root) and path.parent.is_dir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if path.parent.is_dir():  # what was there may have been a part of the way to it
                path.symlink_to(target.format(top=top))
    store = LocalStore(str(root), (str(top / "store"),))

    real = Path(os.path.realpath(root / key))
    is_weights = key.endswith(".safetensors")
    is_link = real != root / key
    allowed = real.is_relative_to(root) and (is_weights or not is_link or ".hidden" not in real.parts)
    allowed |= is_weights and real.is_relative_to(top / "store")
    if allowed and real.is_file():
        payload, stamp = store.read_head(key, 100)
        assert payload == real.read_bytes()
        assert stamp == store.stamp(key)
        buffer = bytearray(stamp.size)
        store.read_into(key, 0, memoryview(buffer), stamp)
        assert buffer == payload
        return
    with pytest.raises(StockflowError) as refused:
        store.read_head(key, 100)
    assert refused.value.exit_code == 2, refused.value
    if is_link:
        assert isinstance(refused.value, LinkError | NotFoundError)
        assert str(root / key) in str(refused.value)
    for listed in (store.list_top(), store.list()):  # names what is there, and never fails
        assert "b.json" in listed or not (root / "b.json").is_file()
