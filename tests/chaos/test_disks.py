"""A disk that is full, read-only or gone while a merge writes to it: exit 3, no manifest, and the next run resumes.

A small file system in memory stands for the disk; mounting one takes root.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stockflow.errors import StorageError
from stockflow.events import Event, Stage
from tests.checkpoints import make_family, write_recipe
from tests.runs import command, leftovers, merge_here, receipts, run, shard_digests

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root"),
]

SHAPES = {f"model.layers.{index}.weight": (500, 400) for index in range(6)}
SHARD_SIZE = 500_000
"""one tensor of 400 kB in each"""
ROOM = "64m"


class Disk:
    """A file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, *options: str) -> None:
        self.folder.mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder))

    def change(self, *options: str) -> None:
        _run("mount", "-o", ",".join(("remount", *options)), str(self.folder))

    def unmount(self) -> None:
        _run("umount", "--lazy", str(self.folder))


def _run(*words: str) -> None:
    finished = subprocess.run(words, capture_output=True, text=True, check=False)
    if finished.returncode:
        pytest.skip(f"cannot {words[0]} here: {finished.stderr.strip()}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disks")
    return write_recipe(folder / "recipe.yaml", "model_stock", make_family(folder, 2, SHAPES))


@pytest.fixture(scope="module")
def digests(recipe: Path) -> dict[str, str]:
    merge_here(recipe, recipe.parent / "out", shard_size=SHARD_SIZE)
    return shard_digests(recipe.parent / "out")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mounted = Disk(tmp_path / "disk")
    mounted.mount(f"size={ROOM}")
    yield mounted
    mounted.unmount()


def arguments(recipe: Path, output: Path) -> tuple[object, ...]:
    options = ("--shard-size", SHARD_SIZE, "--device", "cpu", "--workers", 1, "--memory", "1GiB", "--quiet")
    return ("merge", recipe, output, *options)


def used_bytes(folder: Path) -> int:
    """Return what a file system holds, in whole pages."""
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(recipe: Path, disk: Disk, share: float) -> None:
    output, needed = disk.folder / "out", _needed(recipe, disk)
    disk.unmount()
    disk.mount(f"size={max(int(share * needed) // 4096, 1) * 4096}")

    refused = run(*arguments(recipe, output))

    assert refused.returncode == 2, refused.stderr
    assert f"{output} has no room for this output" in refused.stderr
    assert list(disk.folder.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.985, 0.998])
def test_a_full_disk_ends_the_merge_and_room_lets_it_resume(
    recipe: Path, digests: dict[str, str], disk: Disk, share: float
) -> None:
    """Filled by another after the first look: when merging begins, within a shard, at a receipt, in small files."""
    output = disk.folder / "out"
    needed = _needed(recipe, disk)

    def fill(event: Event) -> None:
        if isinstance(event, Stage) and event.name == "merging":
            disk.change(f"size={max(int(share * needed), used_bytes(disk.folder)) // 4096 * 4096}")

    with pytest.raises(StorageError) as failed:
        merge_here(recipe, output, shard_size=SHARD_SIZE, on_event=fill)
    left = leftovers(output)
    finished = receipts(output)
    is_published = (output / "manifest.json").exists()
    disk.change(f"size={ROOM}")
    resumed = run(*arguments(recipe, output), "--json")

    assert str(failed.value).endswith("No space left on device; free space on the disk and run again to resume")
    assert f"cannot write {output}" in str(failed.value).replace("cannot create", "cannot write")
    assert left == []
    assert not is_published
    assert resumed.returncode == 0, resumed.stderr
    assert f'"resumed_shards": {len(finished)}' in resumed.stdout
    assert shard_digests(output) == digests


def _needed(recipe: Path, disk: Disk) -> int:
    """Return what a disk holds after the merge, which is removed again."""
    merge_here(recipe, disk.folder / "out", shard_size=SHARD_SIZE)
    needed = used_bytes(disk.folder)
    shutil.rmtree(disk.folder / "out")
    return needed


def test_a_target_that_is_read_only_is_said_at_once(recipe: Path, disk: Disk) -> None:
    disk.change("ro")

    refused = run(*arguments(recipe, disk.folder / "out"))

    assert refused.returncode == 2
    assert "its file system is read-only. Choose another output" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_target_that_becomes_read_only_ends_the_merge_and_it_resumes(
    recipe: Path, digests: dict[str, str], disk: Disk
) -> None:
    """As a disk does that has met an error."""
    output = disk.folder / "out"
    with subprocess.Popen([*command(*arguments(recipe, output))], stderr=subprocess.PIPE, text=True) as merging:
        while merging.poll() is None and not (output / "_stockflow").exists():
            time.sleep(0.001)
        is_changed = False
        while merging.poll() is None and not is_changed:
            # Busy while a file is open for writing, and so tried until the moment between two.
            is_changed = not subprocess.run(
                ["mount", "-o", "remount,ro", str(disk.folder)], capture_output=True, check=False
            ).returncode
        _, said = merging.communicate()
    is_published = (output / "manifest.json").exists()
    disk.change("rw")
    resumed = run(*arguments(recipe, output))

    assert is_changed
    assert merging.returncode == 3, said
    assert "the file system is read-only" in said
    assert not is_published
    assert resumed.returncode == 0, resumed.stderr
    assert shard_digests(output) == digests
