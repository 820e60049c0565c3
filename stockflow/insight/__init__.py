"""Insight: what a merge will do to each tensor, and what an earlier one did."""
