"""Print what an image needs: the dependencies of pyproject.toml, and those of the extras that EXTRAS names."""

import os
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """Return requirements as pip reads them.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


if __name__ == "__main__":
    print(*requirements(os.environ["EXTRAS"].split()), sep="\n")
