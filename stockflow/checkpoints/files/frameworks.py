"""Files of weights that say which framework wrote them, where another lays tensors out in another way."""

from collections.abc import Collection, Iterator, Mapping

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

_KERNELS = {"flax": "Flax", "tf": "TensorFlow"}
MAX_TENSORS = 10_000
"""names that one remark holds"""


def on_formats(where: str, formats: Collection[str], specs: Mapping[str, TensorSpec]) -> Iterator[Remark]:
    """Yield that files say that their tensors lie as another framework has them, which an output does not say."""
    of_others = _KERNELS.keys() & set(formats)
    if of_others:
        format_ = min(of_others)
        text = (
            f"{where} says that its tensors are {_KERNELS[format_]}'s (`format: {format_}`), whose names and "
            "kernels are not PyTorch's, and a merge is written as PyTorch's, so that loaders find nothing of it; load "
            f"it with transformers 4 (`from_{format_}=True`) as the class that its config names, and save it before"
        )
        yield Remark("other-framework", text, "refusal", (where,))
    deep = [name for name, spec in specs.items() if len(spec.shape) > 2] if "mlx" in formats else []
    if deep:
        text = (
            f"{where} says that its tensors lie as MLX has them (`format: mlx`), and a merge is written without "
            f"that: loaders that go by it turn convolutions such as {shown(deep[0])}, and PyTorch does not"
        )
        yield Remark("other-framework", text, "warning", (where,), tuple(deep[:MAX_TENSORS]))
