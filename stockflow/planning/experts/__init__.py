"""Experts: tensors that hold many, and the units in which they are decided."""
