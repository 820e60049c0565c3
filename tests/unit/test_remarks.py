"""Remarks: what a plan says of its inputs, what stands against a merge, and how one of them is accepted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import PlanError, RecipeError
from stockflow.planning import file as plan_file
from stockflow.planning.make import make_plan
from stockflow.recipe import parse_recipe
from stockflow.storage import open_store
from stockflow.text.remarks import AS_ASKED, CODES, Remark, objections
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.plans import Merge

NOTE, WARNING, REFUSAL = (
    Remark("skipped", "one", "note"),
    Remark("no-config", "two", "warning", place="r.yaml:7:3"),
    Remark("not-copied", "three", "refusal"),
)


def test_refusals_stand_against_a_merge_until_they_are_accepted() -> None:
    assert objections([NOTE, WARNING, REFUSAL], (), strict=False) == [
        "three; or accept it: `stockflow: {accept: [not-copied]}`"
    ]
    assert objections([NOTE, WARNING, REFUSAL], ["not-copied"], strict=False) == []


def test_strict_refuses_all_that_is_neither_accepted_nor_asked_for() -> None:
    found = [NOTE, WARNING, Remark("left-out", "four", "note"), Remark("skipped", "five", "warning")]
    assert objections(found, (), strict=True) == [
        "r.yaml:7:3: two [no-config, refused by --strict]; or accept it: `stockflow: {accept: [no-config]}`",
        "four [left-out, refused by --strict]; or accept it: `stockflow: {accept: [left-out]}`",
        "five [skipped, refused by --strict]; or accept it: `stockflow: {accept: [skipped]}`",
    ]
    assert objections(found, ["no-config", "left-out", "skipped"], strict=True) == []
    assert objections(found, (), strict=False) == []


def test_the_documentation_names_what_strict_lets_pass() -> None:
    page = (runs.REPOSITORY / "docs" / "recipes.md").read_text()
    assert ", ".join(f"`{code}`" for code in sorted(AS_ASKED)) in page


@pytest.mark.parametrize("wrong", [{"code": "nonsense"}, {"severity": "loud"}], ids=str)
def test_a_remark_has_a_code_and_a_severity_that_are_known(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is no"):
        Remark(**({"code": "skipped", "text": "x"} | wrong))  # type: ignore[arg-type]


def test_a_recipe_accepts_only_known_codes(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    with pytest.raises(RecipeError, match="unknown code 'no-confg'; did you mean `no-config`"):
        merge.plan(stockflow={"accept": ["no-confg"]})


def test_a_strict_plan_refuses_what_it_is_warned_of(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    (merge.folders[0] / "config.json").unlink()
    recipe = parse_recipe(json.dumps(merge.recipe), "recipe.yaml")
    checkpoints = open_checkpoints([open_store(location, recipe.storage) for location in recipe.checkpoints])
    plan = make_plan(recipe, checkpoints)
    assert [remark.code for remark in plan.remarks] == ["no-config"]

    with pytest.raises(PlanError, match=r"one problem:\n  \S+/base has no config.json.* \[no-config, refused by"):
        make_plan(recipe, checkpoints, strict=True)

    accepting = parse_recipe(json.dumps(merge.recipe | {"stockflow": {"accept": ["no-config"]}}), "recipe.yaml")
    assert make_plan(accepting, checkpoints, strict=True).plan_id == plan.plan_id


def test_tensors_that_rules_leave_out_are_said_whichever_model_has_them(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[1]["drafts.weight"] = torch.ones(3, dtype=torch.bfloat16)
    merge.models[2] |= {f"drafts.{name}": torch.ones(3, dtype=torch.bfloat16) for name in ("weight", "bias")}
    rules = [{"filter": each, "action": "skip"} for each in ("scalar", "drafts")]

    plan = merge.write().plan(stockflow={"rules": rules})

    one, two = map(str, merge.folders[1:])
    (said,) = (remark for remark in plan.remarks if remark.code == "skipped")
    assert said.tensors == plan.skipped == ("scalar", "drafts.bias", "drafts.weight")
    assert (said.severity, said.models) == ("note", (two, one))
    left_out = "3 tensors are left out by rules: scalar, drafts.bias, drafts.weight"
    assert said.text == f"{left_out}; only {two}, {one} have drafts.bias, drafts.weight"


def test_remarks_are_in_the_plan_its_file_the_manifest_and_the_card(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    plan = merge.plan(stockflow={"rules": [{"filter": "scalar", "action": "skip"}]})
    assert plan_file.parse(plan_file.encode(plan), "plan.json").plan.remarks == plan.remarks
    assert {remark.code: remark.tensors for remark in plan.remarks}["skipped"] == ("scalar",)

    family = make_family(tmp_path / "family", 2)
    (family.base / "config.json").unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    runs.merge_here(recipe, tmp_path / "out")

    (said,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["remarks"]
    assert (said["code"], said["severity"], said["models"]) == ("no-config", "warning", [str(family.base)])
    assert said["text"] in (tmp_path / "out" / "README.md").read_text()


def test_the_command_line_refuses_warnings_and_accepts_what_is_unmerged(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 2)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", "model_stock", family, stockflow={"rules": [{"filter": "*", "action": "copy"}]}
    )
    (family.base / "config.json").unlink()

    refused = runs.invoke("plan", recipe, tmp_path / "out")
    assert (refused.exit_code, "nothing is merged" in refused.stderr, refused.stdout) == (2, True, "")
    typed = runs.invoke("plan", recipe, tmp_path / "out", "--json")
    found = json.loads(typed.stdout)
    assert found["error"] == {
        "type": "PlanError",
        "exit_code": 2,
        "message": typed.stderr.strip()[len("stockflow: ") :],
    }
    assert [(each["code"], each["severity"]) for each in found["remarks"]] == [
        ("unmerged", "refusal"),
        ("no-config", "warning"),
    ]
    for unread in ("plan", "merge", "inspect"):
        missing = runs.invoke(unread, tmp_path / "none.yaml", *[tmp_path / "out"] * (unread != "inspect"), "--json")
        assert json.loads(missing.stdout)["error"]["type"] == "NotFoundError"
    strict = runs.invoke("plan", recipe, tmp_path / "out", "--allow-unmerged", "--strict")
    assert (strict.exit_code, "[no-config, refused by --strict]" in strict.stderr) == (2, True)
    merged = runs.invoke("merge", recipe, tmp_path / "out", "--allow-unmerged")
    assert merged.exit_code == 0, merged.stderr
    said = [each["code"] for each in json.loads((tmp_path / "out" / "manifest.json").read_text())["remarks"]]
    assert said == ["unmerged", "no-config"]


def test_what_shows_only_when_all_was_read_stops_a_strict_merge_before_it_is_published(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 2)
    shutil.copytree(family.tuned[0], tmp_path / "copy")
    models = [{"model": str(folder)} for folder in (*family.tuned, tmp_path / "copy")]
    known = sorted(CODES.keys() - {"copy"})
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family, models=models, stockflow={"accept": known})
    output, shards = tmp_path / "out", ("--shard-size", "5KB")

    refused = runs.invoke("merge", recipe, output, "--strict", "--json", *shards)
    kept = runs.shard_digests(output)
    write_recipe(recipe, "model_stock", family, models=models, stockflow={"accept": [*known, "copy"]})
    merged = runs.invoke("merge", recipe, output, "--strict", "--json", *shards)
    write_recipe(recipe, "model_stock", family, models=models, stockflow={"accept": known})
    published = runs.invoke("merge", recipe, output, "--strict", *shards)

    assert (refused.exit_code, merged.exit_code, published.exit_code) == (2, 0, 2), merged.stderr
    told = "all shards are merged and kept, but not published, as --strict refuses what came up when all was read"
    assert told in refused.stderr
    assert "[copy, refused by --strict]; or accept it: `stockflow: {accept: [copy]}`" in refused.stderr
    assert "copy" in [remark["code"] for remark in json.loads(refused.stdout)["remarks"]]
    found = json.loads(merged.stdout)
    assert (found["resumed_shards"], found["shards"]) == (len(kept), kept)
    assert "out is published, and --strict refuses what came up when all was read" in published.stderr


def test_every_code_is_explained_in_the_documentation() -> None:
    page = (runs.REPOSITORY / "docs" / "recipes.md").read_text()
    assert [code for code, about in CODES.items() if f"| `{code}` | {about} |" not in page] == []
