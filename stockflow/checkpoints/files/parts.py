"""Files that each have a part of every matrix of one model, as tensor parallelism holds it: told by their headers."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

from stockflow.checkpoints.files.candidates import alike_but_for_a_number
from stockflow.checkpoints.files.layout import HeaderCache, read_header, unheard
from stockflow.errors import UserError
from stockflow.storage import Store
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.remarks import Remark

NUM_NAMED = 4
MAX_OPENED = 8
MOSTLY = 0.5
"""of the tensors of a file: no layers of a model are in two of its shards, and norms or a tied head may be"""
OF_RANKS = (
    "each file has what one process held of every matrix (tensor parallelism: vLLM's sharded state, TensorRT-LLM, "
    "DeepSeek's and Meta's own layout); take the model it was made from"
)
OF_SAVERS = (
    "each file has what one process wrote of the matrices (PyTorch's DCP: `HuggingFaceStorageWriter` without "
    "`enable_consolidation=True`); join them with `consolidate_safetensors_files(FOLDER, OUTPUT, {name: 1 for name in "
    "NAMES})` of torch.distributed.checkpoint._consolidate_hf_safetensors, NAMES those of all tensors, and put config "
    "and tokenizer beside"
)


def hold_the_same(store: Store, files: Sequence[str]) -> bool:
    """Whether two of the first files hold tensors of mostly the same names; what cannot be read holds none."""
    names = [_names(store, file) for file in files[:MAX_OPENED]]
    return any(len(one & other) > MOSTLY * min(len(one), len(other)) for one, other in combinations(names, 2))


def _names(store: Store, file: str) -> set[str]:
    try:
        return {each.spec.name for each in read_header(store, file, HeaderCache(), unheard)[0].tensors}
    except UserError:
        return set()


def on_siblings(store: Store, files: Collection[str]) -> Iterator[Remark]:
    """Yield that the one file that was named may be a part of a model: numbered ones beside it hold the same names."""
    alike = alike_but_for_a_number(store.only, files) if store.only else []
    if alike and hold_the_same(store, [store.only, *(file for file in alike if file != store.only)][:2]):
        text = (
            f"{store.where()}/{in_a_line(store.only)} is one of {len(alike)} files that hold the same names "
            f"({some(alike, NUM_NAMED, in_a_line)}): if they are what each of several processes held of one model "
            "(tensor parallelism), it is a part of every matrix and no model; take the model that they were made from"
        )
        yield Remark("part-of-a-model", text, "warning", (store.url,))
