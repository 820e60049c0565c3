"""Adapters that are made here: of the difference of two checkpoints, and of other adapters; written as PEFT does."""
