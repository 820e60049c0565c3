"""Files beside an adapter: which of them go before its base's, and what stays in its folder."""

from collections.abc import Iterator, Mapping

from stockflow.checkpoints.adapters.opening import Adapter
from stockflow.checkpoints.beside.left_out import files_remark, left_out
from stockflow.checkpoints.beside.side_files import is_tokenizer_or_template
from stockflow.checkpoints.files.tree import list_tree
from stockflow.storage import JoinedStore, Stamp, Store, key_of_adapter, read_small, redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark

MAX_COMPARED_BYTES = 64_000_000


def remarks_on_files(store: JoinedStore, adapter: Adapter, of_base: Mapping[str, Stamp]) -> Iterator[Remark]:
    """Yield what is the adapter's own of a tokenizer and its templates, and what does not come along.

    Args:
        store: the adapter and its base.
        adapter: as it was read.
        of_base: the side files of its base.
    """
    where, tree, taken = redact(store.adapter.url), list_tree(store.adapter, store.adapter.listing()), adapter.tokenizer
    own = [key for key in tree.files if "/" not in key and is_tokenizer_or_template(key)]
    read = [key for key in tree.files if key_of_adapter(key) in adapter.files]
    yield from files_remark(where, left_out(tree, {*read, *own}), tree.cut)
    if others := [key for key in own if key in taken and not _is_of_base(store, key, taken[key], of_base.get(key))]:
        theirs = some(sorted(others))
        text = f"{theirs} of {redact(store.url)} are the adapter's own, and not as its base has them"
        yield Remark("adapter-tokenizer", text, "note", (redact(store.url),), values={"files": theirs})
    if untaken := [key for key in own if key not in taken]:
        theirs = some(sorted(untaken))
        text = f"{theirs} of {where} will not be copied: there is no vocabulary beside it"
        yield Remark("not-taken", text, "note", (redact(store.url),), values={"files": theirs})


def _is_of_base(store: JoinedStore, key: str, stamp: Stamp, of_base: Stamp | None) -> bool:
    if of_base is None or of_base.size != stamp.size or stamp.size > MAX_COMPARED_BYTES:
        return False

    def payload(half: Store) -> bytes:
        return read_small(half, key, max_bytes=stamp.size)

    return payload(store.adapter) == payload(store.model)
