"""Every error stockflow raises on purpose, grouped by what its reader must do.

    StockflowError                      exit code
    |- UserError                        2   change the recipe, the inputs or the budget; nothing was published
    |  |- RecipeError                       the recipe does not say what it should
    |  |- CheckpointError                   an input is not a valid checkpoint
    |  |  `- HeaderError                    ... its safetensors header is malformed
    |  |- PlanError                         the recipe and these inputs do not fit together
    |  |- BudgetError                       the memory budget is too small for any plan
    |  |- NotFoundError                     an input or output location does not exist
    |  |- AccessDeniedError                 the credentials at hand may not do this
    |  |- LinkError                         a link in a folder leads where it is not followed, or nowhere
    |  |- InputChangedError                 an input is no longer what was planned
    |  |- MissingLibraryError               an option needs a library that is not installed
    |  |- NumericsError                     NaN, infinity or a geometry without an answer
    |  `- OutputConflictError               the output prefix belongs to something else
    |- StorageError                     3   storage failed after retries: run again
    |  |- LostUploadError                   an upload broke at an answer that is asked for once
    |  `- AlreadyExistsError                an exclusive creation found the key taken
    |- DamagedOutputError               4   what an output says of itself is not what was published
    |- ComputeLostError                 5   workers, capacity, deadline or memory were lost
    `- InterruptedRunError              130 / 143   stopped by a signal; clean, a merge resumable

Each class also derives from the builtin a caller would catch, and takes one message string, so that it
survives pickling between processes. Anything else that escapes is our bug (exit code 70).
"""

from collections.abc import Sequence
from typing import ClassVar

EXIT_DIFFERENT = 1
"""Of `diff`: the checkpoints differ, which is no error. A merge never returns it: Ray ends a process so."""
EXIT_USER = 2
EXIT_STORAGE = 3
EXIT_FINDINGS = 4
EXIT_COMPUTE_LOST = 5
EXIT_BUG = 70
EXIT_INTERRUPTED = 130


class StockflowError(Exception):
    """Base of every deliberate error; ``exit_code`` is what the command line returns for it."""

    exit_code: ClassVar[int] = EXIT_BUG


class UserError(StockflowError):
    """The reader must change the recipe, the inputs or the budget."""

    exit_code = EXIT_USER


class RecipeError(UserError, ValueError):
    """The recipe does not say what it should; the message gives the place in the file."""


class CheckpointError(UserError, ValueError):
    """An input is not a valid checkpoint."""


class HeaderError(CheckpointError):
    """A safetensors header breaks the format's rules."""


class PlanError(UserError, ValueError):
    """The recipe and the checkpoints it names do not fit together."""

    def __init__(self, text: str, remarks: Sequence[object] = ()) -> None:
        """Take the message, and all that a plan would have remarked, what stands against it too."""
        super().__init__(text)
        self.remarks = remarks


class BudgetError(UserError, MemoryError):
    """Not even the smallest unit of work fits the memory budget."""


class NotFoundError(UserError, FileNotFoundError):
    """A location does not exist."""


class AccessDeniedError(UserError, PermissionError):
    """The credentials at hand may not do this."""


class LinkError(UserError):
    """A link in a folder is not followed, or leads nowhere; what is no plain file is not read either."""


class InputChangedError(UserError):
    """An input is no longer the object the plan was made from."""


class MissingLibraryError(UserError, ImportError):
    """A library of an extra is not installed; the message has the command that installs it."""


class NumericsError(UserError, ArithmeticError):
    """NaN, infinity or a degenerate geometry, in an input or an output."""


class OutputConflictError(UserError, FileExistsError):
    """The output prefix is taken by another plan or by foreign files."""


class StorageError(StockflowError, OSError):
    """Storage failed after retries; running again may succeed, and a merge resumes."""

    exit_code = EXIT_STORAGE

    def of_tries(self, what: str, times: int) -> "StorageError":
        """Return the error of what was tried so often, of which this ended the last time."""
        return type(self)(f"{what} was tried {times} times, the last time: {self}")


class LostUploadError(StorageError):
    """An upload ended at an answer that its client asks for once; written again, the object may arrive."""


class AlreadyExistsError(StorageError, FileExistsError):
    """An exclusive creation found the key already there."""


class DamagedOutputError(StockflowError, ValueError):
    """An output's own records are not what was published, and what was asked for needs them."""

    exit_code = EXIT_FINDINGS


class ComputeLostError(StockflowError, RuntimeError):
    """Workers, capacity, a deadline or memory were lost for good."""

    exit_code = EXIT_COMPUTE_LOST


class InterruptedRunError(StockflowError):
    """The run was stopped by a signal; what is published is whole, and a merge can be resumed."""

    exit_code = EXIT_INTERRUPTED


def exit_code_of(error: BaseException) -> int:
    """Return what the command line returns for whatever ended a run; what is no ``Exception`` is a wish to end it."""
    if isinstance(error, StockflowError):
        return error.exit_code
    return EXIT_BUG if isinstance(error, Exception) else EXIT_INTERRUPTED
