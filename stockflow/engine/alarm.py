"""What is said of numbers that cannot be merged: where they are, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass

from stockflow.engine.pieces import LoadedPiece
from stockflow.errors import NumericsError
from stockflow.kernels.floats import first_nonfinite
from stockflow.planning.job import Reading
from stockflow.planning.plan import CheckpointRef, OnNonfinite
from stockflow.storage import redact


@dataclass(frozen=True)
class Alarm:
    """Names tensor, checkpoint and index of what is wrong."""

    checkpoints: Sequence[CheckpointRef]
    """the inputs, to be named in messages"""
    on_nonfinite: OnNonfinite
    """whether NaN and infinity are errors"""

    def refuse_nonfinite(self, span: LoadedPiece, result: str) -> None:
        """Name the first NaN or infinity in the operands of a span, or the result that overflowed.

        Raises:
            NumericsError: unless the recipe lets them pass.
        """
        if self.on_nonfinite == "propagate":
            return
        name = span.reading.name
        advice = (
            "mend the checkpoint, or name what is no weight in a rule with `action: copy`; with "
            "`stockflow: {on_nonfinite: propagate}` NaN is published"
        )
        for number, (operand, dtype) in enumerate(zip(span.reading.operands, span.dtypes, strict=True)):
            index = first_nonfinite(span.operand(number), dtype)
            if index is not None:
                raise NumericsError(
                    f"tensor {name!r} of {self._url(operand.checkpoint)} has NaN or infinity at flat index "
                    f"{span.start + index:,}; {advice}"
                )
        raise NumericsError(
            f"{result} of {name!r} overflows between elements {span.start:,} and {span.stop:,}; {advice}"
        )

    def refuse_unequal(self, reading: Reading, index: int, dtype: str) -> None:
        """Say that operand ``index`` does not hold the bytes of the first.

        Raises:
            NumericsError: always.
        """
        donor, other = (self._url(reading.operands[number].checkpoint) for number in (0, index))
        raise NumericsError(
            f"tensor {reading.name!r} holds {dtype}, which is not averaged, and differs between "
            f"{donor} and {other}; name it in a rule with `action: copy` to take the former's"
        )

    def refuse_uncoded(self, name: str, words: str) -> None:
        """Say that a result holds numbers that its format has no code for.

        Raises:
            NumericsError: always.
        """
        raise NumericsError(
            f"tensor {name!r} has NaN or infinity, which {words} cannot say; mend the checkpoint, or name a `dtype` "
            "that is written"
        )

    def _url(self, checkpoint: int) -> str:
        return redact(self.checkpoints[checkpoint].url)
