"""Adapters, and models with what they add."""
