"""Modules import only downwards, and each heavy library has one home: policy, held by reading the imports."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests import runs
from tests.checkpoints import make_family, write_recipe

PACKAGE = runs.REPOSITORY / "stockflow"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "__main__",
        "cli",
        "api demo",
        "results wiring",
        "adapters",
        "insight reports forecast",
        "run verification",
        "engine progress",
        "output",
        "planning",
        "settings",
        "recipe checkpoints",
        "storage",
        "methods",
        "kernels",
        "text interruption extras",
        "errors events ahead version",
    )
)
"""From the top down; a room, which is a folder of modules, is one name. Neighbours do not import each other."""

HOMES = {
    "torch": {"engine", "demo"},
    "numba": {"kernels"},
    "ray": {"run"},
    "pyarrow": {"output", "text"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "obstore": {"storage"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "huggingface_hub": {"storage"},
    "safetensors": {"demo", "verification"},
    "yaml": {"recipe"},
    "pydantic": {"recipe"},
    "typer": {"cli"},
    "jinja2": {"reports", "text"},
    "markupsafe": {"reports"},
    "rich": {"progress"},
    "prometheus_client": {"progress"},
}


MAX_LINES, MAX_MODULE_LINES, MAX_NAMES = 75, 400, 30
"""Of a function, of a module; names at the top of the package."""


@cache
def modules() -> Sequence[tuple[str, Path]]:
    """Return every module of the product: its name below ``stockflow``, and its file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__") for path in paths)
    return [(name.removesuffix("."), path) for name, path in zip(names, paths, strict=True) if name]


def unit(module: str) -> str:
    """Return the name of a module in LAYERS and HOMES: its folder, or its own."""
    return module.split(".")[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> Sequence[tuple[int, str]]:
    """Return line and dotted name of everything a file imports at run time, in functions too."""
    only_for_types = {
        id(inner)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return list(_imports(path, [node for node in ast.walk(parsed(path)) if id(node) not in only_for_types]))


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Return the modules of ours that a file imports, in functions and for types too."""
    known = {name for name, _ in modules()}
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stockflow":
            home = node.module.removeprefix("stockflow").removeprefix(".")
            names = (f"{home}.{alias.name}".removeprefix(".") for alias in node.names)
            found |= {name if name in known else home for name in names}
    return frozenset(found)


def _imports(path: Path, nodes: Sequence[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            if node.module == "stockflow":
                yield from ((node.lineno, f"stockflow.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def level(name: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if name in layer]
    assert found, f"stockflow/{name}* has no place in LAYERS: say what it may import"
    return found[0]


def test_modules_import_only_downwards() -> None:
    upward = []
    for module, path in modules():
        importer = unit(module)
        for line, name in imports(path):
            imported = name.removeprefix("stockflow.").split(".")[0]
            is_ours = name.startswith("stockflow.") and imported != importer
            if is_ours and level(imported) <= level(importer):
                upward.append(f"{path}:{line}: {importer} imports {imported}, which is not below it")

    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Types and imports in functions count too; what imports nothing that is left is taken away until nothing goes."""
    left = {module: imported_modules(path) for module, path in modules()}
    assert sum(map(len, left.values())) > 500, "the imports were read"

    while leaves := {module for module, found in left.items() if not found & left.keys()}:
        left = {module: found for module, found in left.items() if module not in leaves}

    assert {module: sorted(found & left.keys()) for module, found in left.items()} == {}


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for module, path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)

    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_functions_and_modules_are_short() -> None:
    long_modules = [module for module, path in modules() if path.read_text().count("\n") > MAX_MODULE_LINES]
    long_functions = [
        f"{module}.{node.name}"
        for module, path in modules()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        if node.end_lineno - node.lineno >= MAX_LINES
    ]

    assert long_functions == []
    assert long_modules == []
    assert len(list(PACKAGE.glob("[!_.]*"))) <= MAX_NAMES


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    strays = [
        f"{path}:{line}"
        for module, path in modules()
        for line, name in imports(path)
        if name.split(".")[0] == library and unit(module) not in HOMES[library]
    ]

    assert strays == []


def test_ray_is_known_to_its_own_executor_only() -> None:
    users = {module for module, path in modules() for _, name in imports(path) if name.split(".")[0] == "ray"}

    assert all(module.startswith("run.executors.ray") for module in users)


@pytest.mark.parametrize("command", ["import", "plan", "schema"])
def test_what_needs_no_heavy_library_starts_without_them(command: str, tmp_path: Path) -> None:
    """Planning works on a laptop: torch alone takes longer to import than a plan takes to make."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (10, 10)}))
    arguments = {"plan": ["plan", str(recipe), str(tmp_path / "out"), "--json"], "schema": ["schema"]}
    script = (
        "import contextlib, io, json, sys\n"
        "from stockflow.cli import app\n"
        "arguments = json.loads(sys.argv[1])\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    arguments and app(arguments, standalone_mode=False)\n"
        "print(json.dumps(sorted({'torch', 'ray', 'pyarrow', 'fsspec', 'obstore', 'botocore'} & sys.modules.keys())))"
    )

    finished = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments.get(command))],
        cwd=runs.REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert json.loads(finished.stdout) == []
