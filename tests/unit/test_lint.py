"""`stockflow lint`: verdicts on recipe files without any model, in words and as JSON, and its exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import Result

from tests import runs
from tests.unit.test_recipes_in_the_wild import FORMS, ROWS

FINE = "merge_method: model_stock\nbase_model: org/base\nmodels: [{model: org/a}, {model: org/b}]\n"
FILES = {
    "a_fine.yaml": FINE,
    "b_warned.yaml": FINE + "normalize: true\n",
    "c_refused.yml": FINE + "dtype: bf16\nname: it\n",
    "d_unsupported.yaml": FINE.replace("org/a", "./a.ckpt"),
    "e_stages.yaml": f"name: one\n{FINE}---\n{FINE}",
    "f_moe.yaml": "base_model: org/a\nexperts: [{source_model: org/a}]\n",
    "g_no.yaml": "a: [1\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def lint(*words: object) -> Result:
    return runs.invoke("lint", *words)


def facts(*words: object) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = json.loads(lint(*words, "--json").stdout)
    return found


def test_a_recipe_with_nothing_to_say_about_is_fine(folder: Path) -> None:
    result = lint(folder / "a_fine.yaml")

    assert (result.exit_code, result.stdout) == (0, f"{folder}/a_fine.yaml: fine\n1 recipe: 1 fine\n")


def test_warnings_are_no_errors_unless_strict(folder: Path) -> None:
    result = lint(folder / "b_warned.yaml")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[1] == (
        f"  {folder}/b_warned.yaml:4:1: `normalize` has no effect here; `model_stock` has no parameter of this name; "
        "remove it (warning)"
    )
    assert lint(folder / "b_warned.yaml", "--strict").exit_code == 2
    assert lint(folder / "a_fine.yaml", "--strict").exit_code == 0


def test_the_errors_of_one_file_do_not_stop_the_others(folder: Path) -> None:
    result = lint(folder / "g_no.yaml", folder / "missing.yaml", folder / "a_fine.yaml", folder / "c_refused.yml")

    assert result.exit_code == 2
    assert result.stderr == ""
    assert [line.rpartition(": ")[2] for line in result.stdout.splitlines() if not line.startswith("  ")] == [
        "refused", "refused", "fine", "refused", "1 fine, 3 refused"
    ]  # fmt: skip


def test_a_folder_stands_for_its_recipes_and_what_is_missing_here_is_counted_apart(folder: Path) -> None:
    (folder / "notes.txt").write_text("no recipe")
    found = facts(folder)

    assert [each["verdict"] for each in found["recipes"]] == [
        "fine", "warned", "refused", "unsupported", "unsupported", "unsupported", "refused"
    ]  # fmt: skip
    assert found["counts"] == {"fine": 1, "warned": 1, "unsupported": 3, "refused": 2}
    assert lint(folder).stdout.splitlines()[-1] == (
        "7 recipes: 1 fine, 1 with warnings, 3 not supported yet, 2 refused"
    )


def test_json_has_places_texts_and_codes(folder: Path) -> None:
    (refused,) = facts(folder / "c_refused.yml")["recipes"]
    (broken,) = facts(folder / "g_no.yaml")["recipes"]

    assert refused["problems"] == [
        {
            "place": f"{folder}/c_refused.yml:4:1",
            "text": (
                "dtype: expected one of bfloat16, float16, float32, float64, found 'bf16'; did you mean `bfloat16`?"
            ),
        }
    ]
    assert [(each["code"], each["place"]) for each in refused["remarks"]] == [  # type: ignore[attr-defined]
        ("unknown-key", f"{folder}/c_refused.yml:5:1")
    ]
    assert broken["problems"][0]["place"] == f"{folder}/g_no.yaml:1:4"  # type: ignore[index]


def test_a_recipe_comes_from_standard_input_too() -> None:
    result = runs.invoke("lint", "-", stdin=FILES["b_warned.yaml"])

    assert result.stdout.startswith("<stdin>: with warnings\n  <stdin>:4:1: `normalize` has no effect here")


def test_all_published_forms_are_told_of_at_once(tmp_path: Path) -> None:
    for row in ROWS:
        (tmp_path / row["file"]).write_text((FORMS / row["file"]).read_text().replace("{dir}", "/nowhere"))
    found = {Path(str(each["recipe"])).name: each for each in facts(tmp_path)["recipes"]}

    assert found.keys() == {row["file"] for row in ROWS}
    assert {str(each["verdict"]) for each in found.values()} == {"fine", "warned", "refused", "unsupported"}
    assert {name for name, each in found.items() if each["verdict"] == "refused"} == {
        "28_slerp_base_is_a_third.yaml",
        "60_linear_one_model_four_ranges.yaml",
    }
    for row in ROWS:
        for word in filter(None, (row["words"] or "").split(",")):
            told = json.dumps(found[row["file"]])
            assert word in told or found[row["file"]]["verdict"] == "unsupported", row["file"]
