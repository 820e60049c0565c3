"""Links in folders that others packed: followed inside and nowhere else, by every command; refused ones are named."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import Result

import stockflow
from stockflow.errors import LinkError
from stockflow.events import Event, Note
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe

SECRET = "aws_secret_access_key = wJalrXUtnFEMI"
SHAPES = {"model.layers.0.mlp.up_proj.weight": (32, 24), "model.norm.weight": (24,)}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", 2, SHAPES, num_shards=2)


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", family)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / ".aws" / "credentials"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"key": SECRET}))
    return path


def replaced(file: Path, target: object) -> Path:
    """Put a link in the place of a file, if it is there."""
    file.unlink(missing_ok=True)
    file.symlink_to(str(target))
    return file


def moved(file: Path, folder: Path) -> Path:
    """Move a file elsewhere, and leave a link to it; return where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    target = Path(shutil.move(file, folder / f"{file.parent.name}-{file.name}"))
    file.symlink_to(target)
    return target


def reading(recipe: Path, family: Family, output: Path) -> list[Sequence[object]]:
    """Every command that reads a model's folder."""
    return [
        ("plan", recipe, output),
        ("merge", recipe, output, "--memory", "4GiB"),
        ("inspect", recipe),
        ("audit", recipe),
        ("diff", family.base, family.tuned[0]),
    ]


def assert_refused(finished: Result, link: Path, *said: str) -> None:
    assert finished.exit_code == 2, finished.output
    assert finished.stdout == ""
    message = finished.stderr.split("stockflow: ")[-1]
    assert str(link) in message
    assert all(each in message for each in said), message
    assert SECRET not in finished.output


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def published(output: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file())


# ------------------------------------------------------------------------------------------------------ refused


def test_a_key_that_a_tokenizer_links_to_is_never_published(
    family: Family, recipe: Path, secret: Path, tmp_path: Path
) -> None:
    """A checkpoint unpacked from a tar would else put its victim's credentials into a public bucket."""
    link = replaced(family.base / "tokenizer_config.json", os.path.relpath(secret, family.base))

    refused = runs.invoke("merge", recipe, tmp_path / "out", "--memory", "4GiB")

    assert_refused(refused, link, str(secret), "outside of its folder", "a copy of the file there, or remove the link")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "model.safetensors.index.json", "LICENSE", "modeling_x.py", "model-1"],
)
def test_every_command_refuses_every_file_that_leads_elsewhere(
    name: str, family: Family, recipe: Path, secret: Path, tmp_path: Path
) -> None:
    config = json.loads((family.base / "config.json").read_text())
    (family.base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    name = shards(family.base)[0].name if name == "model-1" else name
    link = replaced(family.base / name, secret)

    for command in reading(recipe, family, tmp_path / "out"):
        assert_refused(runs.invoke(*command), link, str(secret))
    assert not (tmp_path / "out").exists()


def test_a_link_among_folders_counts_as_well(family: Family, recipe: Path, secret: Path, tmp_path: Path) -> None:
    index = family.base / "model.safetensors.index.json"
    (family.base / "sub").symlink_to(secret.parent)
    link = replaced(family.base / "tokenizer.json", "sub/credentials")

    assert_refused(runs.invoke("plan", recipe, tmp_path / "out"), link, str(secret))

    replaced(link, "model.safetensors.index.json")
    assert runs.invoke("plan", recipe, tmp_path / "out").exit_code == 0
    assert index.exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.json", "there is no such file; restore it, or remove the link"),
        ("/nowhere/at/all", "outside of its folder"),
        ("tokenizer.json", "it leads back to itself"),
        (".git/config", "it is not followed, lest it is published"),
    ],
)
def test_links_that_lead_nowhere_or_in_a_circle_or_to_what_is_hidden_are_named(
    target: str, said: str, family: Family, recipe: Path, tmp_path: Path
) -> None:
    (family.base / ".git").mkdir()
    (family.base / ".git/config").write_text("url = https://user:token@example.com")
    link = replaced(family.base / "tokenizer.json", target)

    for command in reading(recipe, family, tmp_path / "out"):
        assert_refused(runs.invoke(*command), link, said)


def test_a_side_file_that_becomes_a_link_after_planning_is_not_published(
    family: Family, recipe: Path, secret: Path, tmp_path: Path
) -> None:
    def swap(event: Event) -> None:
        if getattr(event, "name", "") == "publishing":
            replaced(family.base / "tokenizer.json", secret)

    with pytest.raises(LinkError, match=r"tokenizer\.json is, or lies behind, a link to"):
        stockflow.merge(str(recipe), tmp_path / "out", memory="8GiB", on_event=swap)

    assert not (tmp_path / "out" / "manifest.json").exists()
    assert SECRET.encode() not in published(tmp_path / "out")


def test_links_that_no_loader_needs_do_not_matter(family: Family, recipe: Path, secret: Path, tmp_path: Path) -> None:
    for name, target in (("id_rsa", secret), ("data", secret.parent), ("log.txt", "gone"), ("circle", "circle")):
        (family.base / name).symlink_to(target)

    finished = runs.invoke("merge", recipe, tmp_path / "out", "--memory", "4GiB")

    assert finished.exit_code == 0, finished.output
    assert (
        f"not copied from {family.base}, as nobody here knows whether a loader needs it: 'circle', 'id_rsa', 'log.txt'"
        in finished.stderr
    )
    assert SECRET.encode() not in published(tmp_path / "out")
    assert not (tmp_path / "out" / "id_rsa").exists()


def test_fsspecs_name_of_the_disk_follows_no_more_links(family: Family, secret: Path, tmp_path: Path) -> None:
    link = replaced(family.base / "config.json", secret)

    for scheme in ("local", "file", "asynclocal"):
        assert_refused(runs.invoke("diff", f"{scheme}://{family.base}", family.tuned[0]), link, str(secret))


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(family: Family, recipe: Path, tmp_path: Path) -> None:
    file = shards(family.base)[0]
    file.unlink()
    os.mkfifo(file)

    assert "is no plain file" in runs.invoke("plan", recipe, tmp_path / "out").stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", "LICENSE", "modules.json"])
def test_a_pipe_in_the_place_of_a_side_file_is_refused(family: Family, recipe: Path, tmp_path: Path, name: str) -> None:
    file = family.base / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)

    assert f"{file} is no plain file but a pipe" in runs.invoke("plan", recipe, tmp_path / "out").stderr


# ----------------------------------------------------------------------------------------------------- followed


def test_the_hubs_cache_is_merged_as_it_lies(family: Family, tmp_path: Path) -> None:
    """Every file of a snapshot is a link to ``../../blobs/<hash>``; the cache itself may be a link."""
    repository = tmp_path / "disk" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(family.base.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    cached = Family(tmp_path / "cache" / "models--org--name" / "snapshots" / "0123abcd", family.tuned)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", cached)
    plain = runs.merge_here(write_recipe(tmp_path / "plain.yaml", "model_stock", family), tmp_path / "plain")

    merged = runs.merge_here(recipe, tmp_path / "out")

    assert merged.plan.merge_id == plain.plan.merge_id
    assert {
        key: merged.manifest.files[key].sha256 for key in ("model.safetensors", "tokenizer.json", "config.json")
    } == {key: plain.manifest.files[key].sha256 for key in ("model.safetensors", "tokenizer.json", "config.json")}
    assert runs.invoke("verify", tmp_path / "out", "--inputs", "--sample", "100%").exit_code == 0


@pytest.mark.parametrize("layout", ["a link as blobs", "no cache", "no revision"])
def test_what_only_looks_like_the_hubs_cache_is_none(layout: str, family: Family, secret: Path, tmp_path: Path) -> None:
    repository = tmp_path / ("other" if layout == "no cache" else "models--org--name")
    folder = repository / "snapshots" / ("" if layout == "no revision" else "0123abcd")
    shutil.copytree(family.base, folder)
    if layout == "a link as blobs":
        (repository / "blobs").symlink_to(secret.parent)
    else:
        (repository / "blobs").mkdir()
        shutil.copy(secret, repository / "blobs" / "credentials")
    link = replaced(folder / "tokenizer.json", repository / "blobs" / "credentials")
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(folder, family.tuned))

    assert_refused(runs.invoke("plan", recipe, tmp_path / "out"), link, "credentials")


def test_links_inside_a_folder_and_to_it_are_followed(family: Family, tmp_path: Path) -> None:
    (family.base / "files").mkdir()
    for name in ("tokenizer.json", "config.json", shards(family.base)[0].name):
        shutil.move(family.base / name, family.base / "files" / name)
        (family.base / name).symlink_to(f"files/{name}")
    (tmp_path / "link").symlink_to(family.base)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(tmp_path / "link", family.tuned))

    runs.merge_here(recipe, tmp_path / "out")

    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (family.base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


# --------------------------------------------------------------------------------------------- weights elsewhere


def test_weights_that_lie_elsewhere_are_read_where_that_is_allowed_and_said(
    family: Family, recipe: Path, tmp_path: Path
) -> None:
    plain = runs.merge_here(recipe, tmp_path / "plain")
    targets = [moved(shard, tmp_path / "store" / "deep") for shard in shards(family.base)]
    targets += [moved(shards(family.tuned[0])[0], tmp_path / "second")]
    trusted = ["--follow-links", tmp_path / "store", "--follow-links", tmp_path / "second"]
    output = tmp_path / "out"

    for command in reading(recipe, family, output):
        refused = runs.invoke(*command, "--follow-links", tmp_path / "second")
        assert_refused(refused, shards(family.base)[0], f"--follow-links '{tmp_path / 'store' / 'deep'}'")

    for command in [*reading(recipe, family, output), ("verify", output, "--inputs"), ("audit", output)]:
        finished = runs.invoke(*command, *trusted)
        assert finished.exit_code == (1 if command[0] == "diff" else 0), finished.output
        for target in targets:
            assert f"is read from '{target}', where its link leads (--follow-links)" in finished.stderr, command[0]
    merged = json.loads((output / "manifest.json").read_text())
    assert merged["merge_id"] == plain.manifest.merge_id
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert runs.invoke("verify", output, "--sample", "100%", *trusted).exit_code == 0
    assert runs.invoke("verify", output, "--inputs").exit_code == 4
    assert (
        runs.invoke("plan", recipe, output, *trusted)
        .stdout.splitlines()[-1]
        .endswith(f"{output} --follow-links {tmp_path / 'store'} --follow-links {tmp_path / 'second'}")
    )


def test_python_follows_them_and_tells_where_they_lead(family: Family, recipe: Path, tmp_path: Path) -> None:
    target = moved(shards(family.base)[0], tmp_path / "store")
    notes: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with pytest.raises(LinkError, match="--follow-links"):
        stockflow.plan(str(recipe), tmp_path / "out")
    stockflow.merge(str(recipe), tmp_path / "out", memory="8GiB", follow_links=[tmp_path / "store"], on_event=hear)

    assert any(str(target) in note for note in notes)


def test_what_is_no_weights_is_not_read_even_there(family: Family, recipe: Path, secret: Path, tmp_path: Path) -> None:
    """A home folder may be named for the sake of the weights in it: its keys are still not published."""
    link = replaced(family.base / "tokenizer_config.json", secret)

    refused = runs.invoke("merge", recipe, tmp_path / "out", "--follow-links", secret.parent.parent)

    assert_refused(refused, link, "it is not followed, lest it is published")


def test_a_recipe_cannot_say_which_links_are_followed(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "model_stock", family, stockflow={"follow_links": [str(tmp_path)]})

    assert runs.invoke("plan", recipe, tmp_path / "out").exit_code == 2


def test_a_folder_to_follow_links_into_must_be_one(recipe: Path, tmp_path: Path) -> None:
    refused = runs.invoke("plan", recipe, tmp_path / "out", "--follow-links", tmp_path / "none")

    assert refused.exit_code == 2
    assert "expected a folder that links may lead into" in refused.stderr


@pytest.mark.cluster
def test_workers_of_ray_follow_them_too(
    family: Family, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runs.merge_here(recipe, tmp_path / "plain")
    moved(shards(family.base)[0], tmp_path / "store")
    trusted = [tmp_path / "store"]

    stockflow.merge(str(recipe), tmp_path / "out", executor="ray", workers=1, memory="4GiB", follow_links=trusted)

    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------- the output


@pytest.fixture
def output(recipe: Path, tmp_path: Path) -> Path:
    runs.merge_here(recipe, tmp_path / "out")
    return tmp_path / "out"


def test_records_that_lead_elsewhere_are_neither_read_nor_written_nor_removed(
    output: Path, recipe: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (output / "_stockflow").rename(elsewhere)
    (output / "_stockflow").symlink_to(elsewhere)
    left = elsewhere / ".claim.json.0123abcd.stockflow-partial"
    left.write_text("half")
    os.utime(left, (1, 1))
    before = sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*"))

    commands: list[Sequence[object]] = [
        ("status", output),
        ("clean", output, "--yes"),
        ("audit", output),
        ("merge", recipe, output, "--overwrite", "--memory", "4GiB"),
    ]
    for command in commands:
        finished = runs.invoke(*command)
        assert finished.exit_code == 2, finished.output
        assert "_stockflow" in finished.stderr, command[0]
        assert "outside of" in finished.stderr, command[0]
    assert runs.invoke("report", output).exit_code in (2, 4)
    assert runs.invoke("verify", output).exit_code == 4
    assert sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*")) == before


def test_a_link_that_lies_in_an_output_is_not_written_through(output: Path, recipe: Path, secret: Path) -> None:
    replaced(output / "tokenizer.json", secret)
    before = secret.read_bytes()

    finished = runs.invoke("merge", recipe, output, "--overwrite", "--memory", "4GiB")

    assert finished.exit_code == 0, finished.output
    assert secret.read_bytes() == before
    assert not (output / "tokenizer.json").is_symlink()


def test_shards_that_lie_elsewhere_are_verified_where_that_is_allowed(output: Path, tmp_path: Path) -> None:
    target = moved(output / "model.safetensors", tmp_path / "store")

    refused = runs.invoke("verify", output)
    allowed = runs.invoke("verify", output, "--follow-links", tmp_path / "store")

    assert refused.exit_code == 4
    assert f"model.safetensors: is a link to {target}, outside of the output" in refused.stdout
    assert allowed.exit_code == 0, allowed.output
    assert f"is read from '{target}'" in allowed.stderr
