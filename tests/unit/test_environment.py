"""What the user's machine does not give: one sentence, the right code, before the first byte where it can be seen."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stockflow.cli.exits import environment_at_fault
from stockflow.errors import PlanError, RecipeError, StorageError
from stockflow.output import target
from stockflow.output.target import check_room, check_target
from stockflow.planning.plan import MergePlan
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, merge, output_notes, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import LocalStore
from stockflow.storage.local_faults import named
from tests.checkpoints import make_family, write_recipe
from tests.runs import REPOSITORY

MEMORY_BYTES = 2 << 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("models")
    family = make_family(folder, 2, {"a.weight": (8, 8)})
    return Inputs.open(load_recipe(str(write_recipe(folder / "r.yaml", "model_stock", family))))


@pytest.fixture(scope="module")
def plan(inputs: Inputs) -> MergePlan:
    return plan_merge(inputs, "/tmp/nowhere/out", MergeOptions(MEMORY_BYTES, 1, "cpu"))[0]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "config.json", "_stockflow/claim.json"])
def test_a_folder_where_a_file_will_be_is_seen_before_the_first_byte(
    tmp_path: Path, plan: MergePlan, inputs: Inputs, name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)

    with pytest.raises(PlanError, match=rf"{name} is a folder there, and a file of the output"):
        check_target(LocalStore(str(tmp_path)), plan)
    with pytest.raises(PlanError, match=name):
        list(output_notes(inputs, str(tmp_path), plan, overwrite=True))


def test_a_hard_link_of_an_input_is_not_replaced(tmp_path: Path, plan: MergePlan, inputs: Inputs) -> None:
    family, out = make_family(tmp_path, 2, {"a.weight": (8, 8)}), tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", "model_stock", family)
    out.mkdir()
    file, source = out / "model.safetensors", next(family.tuned[0].glob("*.safetensors"))
    file.touch()
    (tmp_path / "elsewhere").hardlink_to(file)
    list(output_notes(inputs, str(out), plan, overwrite=True))
    file.unlink()
    file.hardlink_to(source)
    linked = Inputs.open(load_recipe(str(recipe)))

    with pytest.raises(PlanError, match=f"{file} is a hard link of {source}, a file of an input"):
        list(output_notes(linked, str(out), plan, overwrite=True))
    with pytest.raises(PlanError, match="remove the 1 link in "):
        merge(linked, str(out), MergeOptions(MEMORY_BYTES, 1, "cpu", overwrite=True), lambda *_: iter(()))


def test_a_file_where_a_folder_will_be_is_seen_too(tmp_path: Path, plan: MergePlan) -> None:
    (tmp_path / "_stockflow").touch()
    (tmp_path / "file").touch()

    with pytest.raises(PlanError, match="_stockflow is a file there, and a folder of the output"):
        check_target(LocalStore(str(tmp_path)), plan)
    with pytest.raises(PlanError, match=r"file is a file\. Choose another output"):
        check_target(LocalStore(str(tmp_path / "file/deep/out")), plan)
    with pytest.raises(PlanError, match="file name too long"):
        check_target(LocalStore(str(tmp_path / ("n" * 300))), plan)
    check_target(LocalStore(str(tmp_path / "new/out")), plan)


def test_a_target_without_room_is_refused_with_what_is_missing(
    tmp_path: Path, plan: MergePlan, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path / "out"))
    check_room(store, plan)
    monkeypatch.setattr(target, "free_bytes", lambda folder: 100)
    (tmp_path / "out").mkdir()

    with pytest.raises(PlanError, match=r"no room for this output: .*B more are needed than are free there"):
        check_room(store, plan)
    with pytest.raises(PlanError, match="no room for this output"):
        list(output_notes(inputs, store.folder, plan, overwrite=False))
    for file in ("model.safetensors", *(side.key for side in plan.side_files)):
        (tmp_path / "out" / file).write_bytes(bytes(9_000_000))
    check_room(store, plan)


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.EFBIG, RecipeError, "smaller --shard-size"),
        (errno.ENAMETOOLONG, RecipeError, "choose a shorter name"),
        (errno.ENOSPC, StorageError, "free space"),
        (errno.EIO, StorageError, "run again"),
    ],
)
def test_what_never_passes_is_not_called_a_failure_of_storage(number: int, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=rf"cannot write /x: {os.strerror(number)}; .*{told}"), named("/x", "write"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "raise `ulimit -v`"),
        (RuntimeError("can't start new thread"), "raise `ulimit -v`"),
        (ImportError("libarrow.so: failed to map segment from shared object"), "raise `ulimit -v`"),
        (ImportError("libx.so: No space left on device"), "a library cannot be loaded"),
        (OSError("Could not find/load shared object file 'libllvmlite.so'"), "a library cannot be loaded"),
        (OSError(errno.ENOSPC, "No space left on device"), "free space"),
        (OSError(errno.EMFILE, "Too many open files"), "`ulimit -n`"),
    ],
)
def test_what_the_machine_does_not_give_is_no_bug_of_ours(error: Exception, told: str) -> None:
    assert told in (environment_at_fault(error) or "")


@pytest.mark.parametrize("error", [ModuleNotFoundError("stockflow.nothing"), OSError(errno.EIO, "x"), KeyError("x")])
def test_what_may_be_ours_keeps_its_traceback(error: Exception) -> None:
    assert environment_at_fault(error) is None


@pytest.mark.parametrize(
    ("shell", "told"),
    [
        ("plan {recipe} out > /dev/full", "stockflow: cannot write to standard output: No space left on device\n"),
        ("plan {recipe} out >&-", "stockflow: cannot write to standard output: it is closed\n"),
        ("schema >&-", "stockflow: cannot write to standard output: it is closed\n"),
        ("--help >&-", "stockflow: cannot write to standard output: it is closed\n"),
        ("merge --help >&-", "stockflow: cannot write to standard output: it is closed\n"),
        ("--help > /dev/full", "stockflow: cannot write to standard output: No space left on device\n"),
        ("plan r.yaml out", "stockflow: 'r.yaml' is relative to the current folder, which was removed"),
    ],
)
def test_streams_and_folders_that_are_gone_are_told_in_a_sentence(
    tmp_path: Path, inputs: Inputs, shell: str, told: str
) -> None:
    (tmp_path / "gone").mkdir()
    recipe = Path(inputs.stores[0].url).parent / "r.yaml"
    leave = "rmdir ../gone; " if "r.yaml" in shell else ""
    command = f"{leave}exec {sys.executable} -m stockflow {shell.format(recipe=recipe)}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}

    ended = subprocess.run(
        command, shell=True, cwd=tmp_path / "gone", env=environment, capture_output=True, text=True, check=False
    )

    said = [line for line in ended.stderr.splitlines(keepends=True) if line.startswith("stockflow: ")]
    assert (ended.returncode, [line.startswith(told) for line in said]) == (2, [True]), ended.stderr


def test_letters_that_a_terminal_does_not_have_are_spelt_out(tmp_path: Path) -> None:
    (tmp_path / "\u00e9.yaml").write_text("merge_method: linear\nmodels: []\n")
    words = [sys.executable, "-m", "stockflow", "lint", "\u00e9.yaml"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}

    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert (ended.returncode, "\\xe9.yaml: refused" in ended.stdout) == (2, True), ended.stderr
