"""Empty environments of some Python and some pip, what pip chooses for them, and what runs in them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests import runs

OLDEST_PIP = "22.3"
"""what Python 3.11.0 came with; no supported Python comes with an older one"""
RESOLVE_S = 180.0
_LEAST = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)")
_FILE = re.compile(r"([A-Za-z0-9_.]+)-(\d[A-Za-z0-9_.+!]*?)(?:-\S*?\.whl|\.tar\.gz)")


@dataclass(frozen=True, slots=True)
class Choice:
    """What pip would install, and how it came to that."""

    versions: dict[str, str]
    """by name"""
    looked_at: dict[str, set[str]]
    """the versions whose metadata was read, by name"""
    seconds: float

    def __str__(self) -> str:
        """Say what it took."""
        files = sum(map(len, self.looked_at.values()))
        return f"{len(self.versions)} packages in {self.seconds:.0f} s; {files} files looked at"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, empty but for pip."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, python: str = sys.executable, pip: str = "pip") -> "Environment":
        """Return a new one with the pip that is asked for, the newest there is unless a version is given."""
        subprocess.run([python, "-m", "venv", folder], check=True)
        made = cls(folder)
        made.run("pip", "install", "--quiet", "--upgrade", pip)
        return made

    def run(
        self, program: str, *arguments: object, timeout_s: float = 900, code: int = 0
    ) -> "subprocess.CompletedProcess[str]":
        """Run one of its programs and return what it said; it must end with ``code``."""
        done = subprocess.run(
            [self.folder / "bin" / program, *map(str, arguments)],
            cwd=self.folder, env=_environment(), capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{program} {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def choose(self, requirement: str, *options: object) -> Choice:
        """Return what pip would install, within three minutes."""
        began, report = time.monotonic(), self.folder / "report.json"
        arguments = ("--dry-run", "--ignore-installed", "--report", report, *options, requirement)
        said = self.run("pip", "install", *arguments, timeout_s=RESOLVE_S).stdout
        seconds = time.monotonic() - began
        looked_at: dict[str, set[str]] = defaultdict(set)
        for name, version in _FILE.findall(said):
            looked_at[name.lower().replace(".", "_")].add(version)
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        return Choice({item["name"]: item["version"] for item in chosen}, looked_at, seconds)

    def install(self, *requirements: object) -> None:
        """Install without constraints."""
        self.run("pip", "install", "--quiet", *requirements)

    def has(self, module: str) -> bool:
        """Return whether Python finds a module there."""
        asked = self.run("python", "-c", f"from importlib.util import find_spec; print(bool(find_spec({module!r})))")
        return asked.stdout.strip() == "True"

    @property
    def mib(self) -> int:
        """What it takes of the disk, as `du` counts."""
        return int(subprocess.check_output(["du", "-sm", self.folder], text=True).split()[0])


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this repository, with the tools that pyproject.toml names, and return it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, runs.REPOSITORY]
    subprocess.run(command, check=True, env=_environment())
    (wheel,) = folder.glob("stockflow-*.whl")
    return wheel


def oldest_libraries() -> list[str]:
    """Return the oldest version of each library that pyproject.toml allows, as constraints for pip."""
    asked = tomllib.loads((runs.REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = [_LEAST.match(each) for each in asked]
    return [f"{least[1]}=={least[2]}" for least in oldest if least]


def find_python(version: str) -> str | None:
    """Return an interpreter of a version (``3.12``): one on the PATH, or one that pyenv keeps."""
    on_path = shutil.which(f"python{version}")
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in [on_path, *map(str, reversed(kept))]:
        if candidate and _version(candidate) == version:
            return candidate
    return None


def _version(python: str) -> str:
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()


def _environment() -> dict[str, str]:
    """This one's without constraints for pip, and without another place for modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PIP_CONSTRAINT", "PYTHONPATH")}
