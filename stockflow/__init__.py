"""stockflow: exact, streaming merges of checkpoints too large for one machine.

    import stockflow

    print(stockflow.plan("recipe.yaml", "out"))
    stockflow.merge("recipe.yaml", "out")

``plan``, ``merge``, ``verify``, ``report``, ``diff``, ``inspect``, ``audit`` and ``extract`` do what the commands of
these names do; `docs/recipes.md#python` has examples.
Names are loaded when they are first used, so that the import itself takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from stockflow.version import __version__

if TYPE_CHECKING:
    from stockflow.adapters.combination import CombinationPlan
    from stockflow.adapters.combining import CombinedAdapter
    from stockflow.adapters.findings import Extraction
    from stockflow.adapters.record import AdapterRecord, ExtractedTensor
    from stockflow.api import audit, diff, extract, inspect, merge, plan, report, verify
    from stockflow.errors import (
        AccessDeniedError,
        AlreadyExistsError,
        BudgetError,
        CheckpointError,
        ComputeLostError,
        DamagedOutputError,
        HeaderError,
        InputChangedError,
        InterruptedRunError,
        LinkError,
        LostUploadError,
        MissingLibraryError,
        NotFoundError,
        NumericsError,
        OutputConflictError,
        PlanError,
        RecipeError,
        StockflowError,
        StorageError,
        UserError,
    )
    from stockflow.events import Begun, Cost, Done, Dropped, Event, Moved, Note, Retry, Run, Stage, Workers
    from stockflow.insight.difference import CheckpointDifference, GroupDifference, TensorDifference
    from stockflow.insight.inspection import Inspection
    from stockflow.insight.verdict import Audit, Verdict
    from stockflow.output.receipts import TensorFacts
    from stockflow.reports.report import Report
    from stockflow.results import MergeResult, PlanResult
    from stockflow.settings import (
        DiffSettings,
        ExtractSettings,
        MergeSettings,
        PlanSettings,
        ReadSettings,
        SurveySettings,
    )
    from stockflow.verification.verify import Finding, Verification

_HOMES = {
    "adapters.combination": ("CombinationPlan",),
    "adapters.combining": ("CombinedAdapter",),
    "adapters.findings": ("Extraction",),
    "adapters.record": ("AdapterRecord", "ExtractedTensor"),
    "api": ("audit", "diff", "extract", "inspect", "merge", "plan", "report", "verify"),
    "insight.difference": ("CheckpointDifference", "GroupDifference", "TensorDifference"),
    "errors": (
        "AccessDeniedError", "AlreadyExistsError", "BudgetError", "CheckpointError", "ComputeLostError",
        "DamagedOutputError", "HeaderError", "InputChangedError", "InterruptedRunError", "LinkError", "LostUploadError",
        "MissingLibraryError", "NotFoundError", "NumericsError", "OutputConflictError", "PlanError", "RecipeError",
        "StockflowError", "StorageError", "UserError",
    ),
    "events": ("Begun", "Cost", "Done", "Dropped", "Event", "Moved", "Note", "Retry", "Run", "Stage", "Workers"),
    "insight.verdict": ("Audit", "Verdict"),
    "insight.inspection": ("Inspection",),
    "output.receipts": ("TensorFacts",),
    "reports.report": ("Report",),
    "results": ("MergeResult", "PlanResult"),
    "settings": ("DiffSettings", "ExtractSettings", "MergeSettings", "PlanSettings", "ReadSettings", "SurveySettings"),
    "verification.verify": ("Finding", "Verification"),
}  # fmt: skip
"""Public names by the module they are in; the same as above."""
_PUBLIC = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  # as in _HOMES
    "__version__",
    "MergeResult", "PlanResult", "audit", "diff", "extract", "inspect", "merge", "plan", "report", "verify",
    "CheckpointDifference", "GroupDifference", "TensorDifference",
    "AdapterRecord", "CombinationPlan", "CombinedAdapter", "ExtractedTensor", "Extraction",
    "AccessDeniedError", "AlreadyExistsError", "BudgetError", "CheckpointError", "ComputeLostError",
    "DamagedOutputError", "HeaderError", "InputChangedError", "InterruptedRunError", "LinkError", "LostUploadError",
    "MissingLibraryError", "NotFoundError",
    "NumericsError", "OutputConflictError", "PlanError", "RecipeError", "StockflowError", "StorageError", "UserError",
    "Begun", "Cost", "Done", "Dropped", "Event", "Moved", "Note", "Retry", "Run", "Stage", "Workers",
    "Audit", "Verdict",
    "Inspection",
    "TensorFacts",
    "DiffSettings", "ExtractSettings", "MergeSettings", "PlanSettings", "ReadSettings", "SurveySettings",
    "Finding", "Report", "Verification",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
