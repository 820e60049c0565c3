"""Decodes: how logical tensors are stored. Pure values of the plan."""
