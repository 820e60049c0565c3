"""Names that strangers chose: no terminal, card, page or table takes anything in them for its own."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import Result

from stockflow.events import Note
from stockflow.progress.lines import PlainLines
from stockflow.text.escaping import code_block, code_cell, in_a_line, printable
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe

HOSTILE = (
    "w`|\x1b[31m\x1b]0;owned\x07\n| forged | row |\nstockflow: forged\r\x9b2J\u202e<script>alert(1)</script>\u2066"
)
"""Ends code, a cell and a row; commands a terminal, twice; makes up lines; turns text around; would run on a page."""
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
FOLDER = "mo`d|el<script>*[x](y)``"
"""What the names of a folder may hold."""


def lines_of(finished: Result) -> list[str]:
    """What a terminal would show; nothing in it commands the terminal, or begins a line that is not ours."""
    text = finished.stdout + finished.stderr
    assert not COMMANDS.search(text), repr(COMMANDS.search(text))
    assert "\nstockflow: forged" not in text
    assert "\n| forged" not in text
    return text.splitlines()


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Tensors with hostile names that are merged, and one that the models disagree on."""
    shapes = {HOSTILE: (8, 4), f"model.layers.0.{HOSTILE}.mlp.weight": (6, 4), "lm_head.weight": (4, 4)}
    made = make_family(tmp_path / "models", 2, shapes, buffers=False)
    return Family(made.base.rename(made.base.with_name(FOLDER)), made.tuned)


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", family)


def test_no_command_lets_a_tensors_name_speak_for_it(family: Family, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    page = tmp_path / "report.html"
    commands: list[tuple[object, ...]] = [
        ("plan", recipe, output),
        ("merge", recipe, output, "--memory", "4GiB", "--log-level", "debug"),
        ("inspect", recipe),
        ("audit", recipe),
        ("audit", recipe, output),
        ("audit", output),
        ("diff", family.base, family.tuned[0]),
        ("verify", output, "--sample", "100%"),
        ("report", output),
        ("report", output, "--html", page),
        ("status", output),
    ]
    for command in commands:
        finished = runs.invoke(*command)
        assert finished.exit_code == (1 if command[0] == "diff" else 0), finished.output
        assert lines_of(finished)
    assert in_a_line(HOSTILE) in runs.invoke("diff", family.base, family.tuned[0]).stdout

    html = page.read_text()
    assert not COMMANDS.search(html)
    assert "<script>alert" not in html
    assert "alert(1)" in html, "the name itself is shown"


def test_errors_quote_what_they_name(family: Family, recipe: Path, tmp_path: Path) -> None:
    other = make_family(tmp_path / "other", 1, {f"{HOSTILE}-too": (8, 4)}, buffers=False).tuned[0]
    mixed = write_recipe(tmp_path / "mixed.yaml", "model_stock", Family(family.base, (family.tuned[0], other)))

    for command in (("plan", mixed, tmp_path / "out"), ("inspect", mixed), ("diff", family.base, other)):
        finished = runs.invoke(*command)
        assert finished.exit_code in (1, 2), finished.output
        assert "forged" in "".join(lines_of(finished)), "the tensor is named"


def test_files_with_hostile_names_are_named_and_stay_where_they_are(
    family: Family, recipe: Path, tmp_path: Path
) -> None:
    bad = HOSTILE.replace("/", "_")
    for name in (f"{bad}.jinja", f"{bad}.txt", f"{bad}.safetensors", f"\udcff{bad}.model"):
        (family.base / name).write_text("x")

    for command in (("plan", recipe, tmp_path / "out"), ("merge", recipe, tmp_path / "out", "--memory", "4GiB")):
        finished = runs.invoke(*command)
        assert finished.exit_code == 0, finished.output
        assert "forged" in "".join(lines_of(finished)), "they are named"
    assert not [path for path in (tmp_path / "out").rglob("*") if "forged" in path.name]

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / f"{bad}.bin").write_text("x")
    finished = runs.invoke("diff", empty, family.base)
    assert finished.exit_code == 2
    assert lines_of(finished)


@pytest.mark.parametrize("letter", ["\n", "\x1b[31m", "\u202e", "\x07"])
def test_a_place_whose_name_commands_is_refused(letter: str, family: Family, tmp_path: Path) -> None:
    folder = family.tuned[0].rename(tmp_path / f"tuned{letter}x")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(family.base, (place, family.tuned[1])))

        for finished in (
            runs.invoke("plan", recipe, tmp_path / "out"),
            runs.invoke("merge", recipe, tmp_path / f"out{letter}x"),
            runs.invoke("verify", f"s3://bucket/{letter}"),
        ):
            assert finished.exit_code == 2, finished.output
            assert "control characters" in "".join(lines_of(finished))


def test_nothing_in_a_card_is_taken_for_the_cards_own(family: Family, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    path.write_text(
        path.read_text() + "# ```\n# | 9 | forged | row |\n#\n# ````yaml <script>alert(1)</script> \u202e\n"
    )
    result = runs.merge_here(path, tmp_path / "out")

    card = (tmp_path / "out" / "README.md").read_text()

    assert not COMMANDS.search(card)
    before, block, after = re.split(r"^`````(?:yaml)?$", card, flags=re.MULTILINE)
    assert "forged" in block
    assert "forged" not in before + after
    rows = [line for line in before.splitlines() if line.startswith("| 0 |")]
    assert rows == [f"| 0 | {code_cell(str(family.base))} | base |"]
    assert "mo`d\\|el<script>" in rows[0]
    assert "\n## Summary\n" in after
    recorded = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert recorded["recipe"] == path.read_text() == result.manifest.recipe, "the manifest has it as it was"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("plain", "`plain`"),
        ("a|b", "`a\\|b`"),
        ("a`b", "``a`b``"),
        ("`a``", "``` `a`` ```"),
        ("", "`  `"),
        ("a\nb\x1b", "`a\\nb\\x1b`"),
    ],
)
def test_a_cell_of_code_ends_where_it_should(text: str, cell: str) -> None:
    assert code_cell(text) == cell


def test_texts_keep_their_lines_and_nothing_else_that_is_not_seen() -> None:
    assert printable("a\n\tb\r\nc\rd\x1b[0m \u202e é 漢 \udcff") == "a\n\tb\nc\\rd\\x1b[0m \\u202e é 漢 \\udcff"
    assert in_a_line("a\n\tb") == "a\\n\\tb"
    assert code_block("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"


def test_notes_on_standard_error_are_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainLines(sys.stderr) as lines:
        lines(Note(f"a worker said {HOSTILE}"))

    assert not COMMANDS.search(capsys.readouterr().err)


def test_a_tensor_that_a_rule_leaves_out_is_named_on_one_line(family: Family, tmp_path: Path) -> None:
    rules = [{"filter": "forged", "action": "skip"}]
    recipe = write_recipe(tmp_path / "skip.yaml", "model_stock", family, stockflow={"rules": rules})

    finished = runs.invoke("plan", recipe, tmp_path / "out")

    (line,) = [line for line in lines_of(finished) if "left out by rules" in line]
    assert "forged" in line
