"""The part of kustomize that `deploy/kustomize` uses, so that its overlays are checked where there is no kubectl.

Resources, components, JSON6902 patches and `images`. A test holds it against `kubectl kustomize` where there is one.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

KNOWN_KEYS = {"apiVersion", "kind", "resources", "components", "patches", "images"}


def render(folder: Path) -> list[Any]:
    """Return the documents of a kustomization."""
    return _apply(folder.resolve(), [])


def _apply(folder: Path, documents: list[Any]) -> list[Any]:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization.keys() <= KNOWN_KEYS, f"{folder}: this renderer does not know {set(kustomization)}"
    for name in kustomization.get("resources", ()):
        path = (folder / name).resolve()
        documents = documents + (render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text())))
    for name in kustomization.get("components", ()):
        documents = _apply((folder / name).resolve(), documents)
    for patch in kustomization.get("patches", ()):
        operations = yaml.safe_load((folder / patch["path"]).read_text())
        targets = [document for document in documents if document["kind"] == patch["target"]["kind"]]
        assert targets, f"{folder}: {patch} has no target"
        for target in targets:
            for operation in operations:
                apply_operation(target, operation)
    for image in kustomization.get("images", ()):
        for container in _containers(documents):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return documents


def apply_operation(document: Any, operation: Any) -> None:
    """Apply one operation of a JSON patch (RFC 6902); what it names must be there."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part]
    match operation["op"], document:
        case "add", list() if last == "-":
            document.append(deepcopy(operation["value"]))
        case "add", list():
            document.insert(int(last), deepcopy(operation["value"]))
        case "add", dict():
            document[last] = deepcopy(operation["value"])
        case ("replace" | "remove" | "test") as verb, _:
            key = int(last) if isinstance(document, list) else last
            found = document[key]
            if verb == "replace":
                document[key] = deepcopy(operation["value"])
            elif verb == "remove":
                del document[key]
            else:
                assert found == operation["value"], f"{operation['path']} is {found!r}"
        case verb, _:
            raise ValueError(f"{verb} is no operation that is used here")


def _containers(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            yield from _containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from _containers(value)
