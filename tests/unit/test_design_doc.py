"""The tables of docs/design.md are true: rooms are those of the tree, numerics end with today's."""

import re

from stockflow.planning.plan import NUMERICS
from tests.pages import REPOSITORY, section

PACKAGE = REPOSITORY / "stockflow"


def rooms() -> set[str]:
    """Return every folder of modules, by its name and a slash, and every module beside them."""
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    return folders | {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}


def test_every_room_has_one_row() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]+ \|$", section("design.md", "Rooms, upward"), re.MULTILINE)

    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]

    assert sorted(listed) == sorted(rooms())


def test_every_number_of_the_arithmetic_is_explained() -> None:
    rows = re.findall(r"^\| (\d+) \|", section("design.md", "Numerics classes"), re.MULTILINE)

    assert [int(row) for row in rows] == list(range(1, NUMERICS + 1))
