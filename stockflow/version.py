"""The version, where everything that records it finds it."""

__version__ = "0.1.0"
