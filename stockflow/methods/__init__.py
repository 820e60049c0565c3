"""Merge methods: one file each, found by being here. README.md in this folder shows how to add one."""

from importlib import import_module
from pkgutil import iter_modules

from stockflow.methods.protocol import REGISTRY, Method

for _module in iter_modules(__path__):
    if _module.name != "protocol":
        import_module(f"{__name__}.{_module.name}")

METHODS: dict[str, Method] = dict(sorted(REGISTRY.items()))
"""All methods by their name in a recipe."""

__all__ = ["METHODS", "Method"]
