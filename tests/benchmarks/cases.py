"""What is merged in a benchmark: cases from the command line, their checkpoints on disk, their recipes."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.processes import run

LAYOUTS = ("dense", "moe", "huge")
DTYPES = ("bfloat16", "float16", "float32")
METHOD_PARAMETERS: dict[str, dict[str, float]] = {
    "linear": {"weight": 1.0},
    "slerp": {"t": 0.5},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "nearswap": {"t": 0.001},
}
"""of the methods that need any"""
BASE_FREE = ("linear",)
"""methods whose models are all equal: the base is listed as one of them"""


@dataclass(frozen=True)
class Family:
    """Checkpoints of one make: a base and models tuned from it. Equal families share their files."""

    layout: str
    gb: float
    dtype: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Return where its checkpoints lie."""
        return root / f"{self.layout}-{self.gb:g}GB-{self.dtype}-seed{self.seed}"


@dataclass(frozen=True)
class Case:
    """One merge to measure."""

    layout: str = "dense"
    gb: float = 0.8
    """size of each checkpoint, in 10**9 bytes"""
    tuned: int = 4
    """N, the number of models besides the base"""
    dtype: str = "bfloat16"
    seed: int = 0
    method: str = "model_stock"
    scope: str = "tensor"
    memory: str = "1GiB"
    threads: int = len(os.sched_getaffinity(0))
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse words that no part of the harness knows."""
        for name, known in (("layout", LAYOUTS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.gb <= 0 or self.tuned < 1:
            raise ValueError(f"a case needs at least one tuned model and a size, not {self.tuned} and {self.gb} GB")

    @property
    def family(self) -> Family:
        """The checkpoints it needs."""
        return Family(self.layout, self.gb, self.dtype, self.seed)

    @property
    def words(self) -> tuple[str, ...]:
        """What tells it from other cases."""
        inputs = (self.layout, f"1 + {self.tuned} x {self.gb:g} GB", self.dtype)
        return (*inputs, self.method, self.scope, self.memory, f"{self.threads} threads", self.device)

    @property
    def label(self) -> str:
        """Its words on one line."""
        return ", ".join(self.words)

    def folders(self, root: Path) -> list[Path]:
        """Return the folders of its checkpoints, base first."""
        return checkpoint_folders(self.family.folder(root), self.tuned)

    @property
    def options(self) -> list[str]:
        """What ``stockflow merge`` and ``stockflow plan`` are told beside recipe and output."""
        return ["--memory", self.memory, "--workers", str(self.threads), "--device", self.device, "--quiet", "--json"]


STOCKFLOW = (sys.executable, "-m", "stockflow")

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "sizes": ({"gb": 0.2, "tuned": 4}, {"gb": 0.8, "tuned": 4}, {"gb": 3.2, "tuned": 4}),
    "tuned": tuple({"tuned": tuned} for tuned in (2, 4, 8, 16)),
    "methods": ({"scope": "tensor"}, {"scope": "row"}, {"method": "ties"}),
    "layouts": tuple({"layout": layout} for layout in LAYOUTS),
}
"""Sweeps: 1, 4 and 16 GB of input; N at equal tensor sizes; scopes and methods; kinds of checkpoints."""


def checkpoint_folders(family_folder: Path, num_tuned: int) -> list[Path]:
    """Return the folders of a family's checkpoints, base first."""
    return [family_folder / "base", *(family_folder / f"tuned-{index}" for index in range(1, num_tuned + 1))]


def add_case_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add one option per field of a case; ``defaults`` are those of this benchmark."""
    default = Case(**defaults)
    choices = {"layout": LAYOUTS, "dtype": DTYPES}
    for field in fields(Case):
        value = getattr(default, field.name)
        parser.add_argument(f"--{field.name}", type=type(value), default=value, choices=choices.get(field.name))


def case_from(arguments: argparse.Namespace) -> Case:
    """Return the case that the options describe."""
    return Case(**{field.name: getattr(arguments, field.name) for field in fields(Case)})


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add what makes several cases of one: presets, and cases that differ from the options in some words."""
    parser.add_argument("--preset", choices=PRESETS, help="measure several cases, interleaved")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="WORD=VALUE,...",
        help="a case that differs from the options in these words, such as gb=1,method=ties; may be repeated",
    )


def sweep_from(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases to measure: those of the preset and of ``--case``, else the one the options describe."""
    default = case_from(arguments)
    differences = [*PRESETS.get(arguments.preset, ()), *(parse_difference(text) for text in arguments.case)]
    return list(dict.fromkeys(replace(default, **difference) for difference in differences)) or [default]


def told_apart(cases: Sequence[Case]) -> tuple[str, list[str]]:
    """Return what all cases have in common, and for each one what it has of its own."""
    words = [case.words for case in cases]
    is_common = [len(set(column)) == 1 for column in zip(*words, strict=True)]
    common = ", ".join(word for word, same in zip(words[0], is_common, strict=True) if same)
    own = [", ".join(word for word, same in zip(row, is_common, strict=True) if not same) for row in words]
    return common, own


def parse_difference(text: str) -> dict[str, Any]:
    """Return the words of ``gb=1,method=ties`` with values of their types.

    Raises:
        ValueError: a word is none of a case's.
    """
    types = {name: type(value) for name, value in asdict(Case()).items()}
    found: dict[str, Any] = {}
    for pair in text.split(","):
        word, _, value = pair.partition("=")
        if word not in types:
            raise ValueError(f"--case {text}: {word!r} is none of {', '.join(types)}")
        found[word] = types[word](value)
    return found


@contextmanager
def workplace(cases: Sequence[Case], root: Path, *, keep: bool) -> Iterator[Path]:
    """Make the checkpoints of all cases below ``root``, give an empty folder there, and remove both at the end.

    ``keep`` leaves the checkpoints for the next run, which takes those it finds.
    """
    needed: dict[Family, int] = {}
    for case in cases:
        needed[case.family] = max(needed.get(case.family, 0), case.tuned)
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=root))
    try:
        for family, num_tuned in needed.items():
            _make(family, num_tuned, root)
        os.sync()
        yield work
    finally:
        shutil.rmtree(work)
        for family in () if keep else needed:
            shutil.rmtree(family.folder(root), ignore_errors=True)


def _make(family: Family, num_tuned: int, root: Path) -> None:
    """Make what is missing of a family, in a process of its own: torch would make this one large."""
    folder = family.folder(root)
    missing = [path for path in checkpoint_folders(folder, num_tuned) if not path.exists()]
    outputs = 2  # one that is written, one that the disk has not given back yet
    needed, free = int(family.gb * 1e9) * (len(missing) + outputs), shutil.disk_usage(root).free
    if free < needed:
        raise SystemExit(f"{root} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; see --folder")
    if missing:
        command = [sys.executable, "-m", "tests.benchmarks.synthetic", str(folder), "--tuned", str(num_tuned)]
        options = [word for name, value in asdict(family).items() for word in (f"--{name}", str(value))]
        subprocess.run([*command, *options], check=True)


def recipe_of(case: Case, locations: Sequence[str], storage: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the recipe of a case.

    Args:
        case: what to merge, and how.
        locations: of base and tuned checkpoints, at least as many as the case needs.
        storage: options by URL prefix.
    """
    base, *tuned = locations[: 1 + case.tuned]
    models = [base, *tuned] if case.method in BASE_FREE else tuned
    recipe: dict[str, Any] = {"merge_method": case.method, "models": [{"model": model} for model in models]}
    if case.method not in BASE_FREE:
        recipe["base_model"] = base
    if case.method in METHOD_PARAMETERS:
        recipe["parameters"] = dict(METHOD_PARAMETERS[case.method])
    ours: dict[str, Any] = {"scope": case.scope} if case.scope != "tensor" else {}
    ours |= {"storage": storage} if storage else {}
    return recipe | ({"stockflow": ours} if ours else {})


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def planned(recipe: Path, output: Path | str, options: Sequence[str]) -> dict[str, Any]:
    """Return what ``stockflow plan`` says: shards, bytes, projected memory."""
    found: dict[str, Any] = json.loads(run([*STOCKFLOW, "plan", str(recipe), str(output), *options]).stdout)
    return found
