"""stockflow: exact, streaming merges of checkpoints too large for one machine."""

__version__ = "0.1.0"
