"""What the functions of the Python API return for a plan and a merge, and what the command line prints of them."""

from stockflow.results.merges import MergeResult
from stockflow.results.plans import PlanResult

__all__ = ["MergeResult", "PlanResult"]
