"""The table of rooms in docs/design.md is the tree's."""

import re

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
