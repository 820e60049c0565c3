"""One tensor of 40 GB in 2 GiB of memory: ``make test-scale``.

The checkpoints repeat a period of 64 MiB; on a file system that shares blocks (XFS on a loop device, root only) all
three take 200 MB of disk. The output, which shares nothing, takes 40 GB in the temporary folder.
"""

import fcntl
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import oracle, runs
from tests.checkpoints import Family, write_recipe

NUM_BYTES = 40 * 10**9
MEMORY_BYTES = 2 * 2**30
PERIOD_BYTES = 64 * 2**20
PERIOD = PERIOD_BYTES // 2
NUM_PERIODS = NUM_BYTES // PERIOD_BYTES
COLUMNS = 4096
HEADER_BYTES = 4096
"""The sharing of blocks needs offsets on block boundaries."""
FICLONERANGE = 0x4020940D

pytestmark = [
    pytest.mark.scale,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("mkfs.xfs"), reason="mounts an XFS image: needs root and xfsprogs"
    ),
]


@pytest.fixture
def shared_blocks(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that shares blocks."""
    image, folder = tmp_path / "xfs.img", tmp_path / "xfs"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(2 * 2**30)
    subprocess.check_call(["mkfs.xfs", "-q", "-m", "reflink=1", image])
    subprocess.check_call(["mount", "-o", "loop", image, folder])
    try:
        yield folder
    finally:
        subprocess.check_call(["umount", folder])


def drawn_period(index: int) -> oracle.Floats:
    """Base, or base and two equal parts of task vector, one of them common: cosines of about 0.5."""

    def noise(stream: int) -> oracle.Floats:
        return np.random.default_rng(stream).standard_normal(PERIOD)

    values = noise(0) * 0.02
    if index:
        values += (noise(1) + noise(1 + index)) * 1e-3
    return values


def write(folder: Path, period: oracle.Array) -> None:
    folder.mkdir()
    spec = {"dtype": "BF16", "shape": [NUM_PERIODS * PERIOD // COLUMNS, COLUMNS]}
    entry = {"weight": spec | {"data_offsets": [0, NUM_PERIODS * PERIOD_BYTES]}}
    header = json.dumps(entry).encode().ljust(HEADER_BYTES - 8)
    with (folder / "model.safetensors").open("w+b") as file:
        file.write(struct.pack("<Q", len(header)) + header + period.tobytes())
        file.flush()
        os.fsync(file.fileno())
        done = 1
        while done < NUM_PERIODS:
            count = min(done, NUM_PERIODS - done)
            span = (HEADER_BYTES, count * PERIOD_BYTES, HEADER_BYTES + done * PERIOD_BYTES)
            fcntl.ioctl(file, FICLONERANGE, struct.pack("qQQQ", file.fileno(), *span))
            done += count


def test_a_tensor_of_40_gb_is_merged_in_2_gib(shared_blocks: Path, tmp_path: Path) -> None:
    periods = [oracle.round_to("BF16", drawn_period(index)) for index in range(3)]
    folders = [shared_blocks / name for name in ("base", "tuned-1", "tuned-2")]
    for folder, period in zip(folders, periods, strict=True):
        write(folder, period)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(folders[0], tuple(folders[1:])))
    arguments = (recipe, tmp_path / "out", "--memory", f"{MEMORY_BYTES}", "--json")
    planned = json.loads(runs.run("plan", *arguments).stdout)

    merged = runs.run("merge", *arguments, "--quiet")

    report = json.loads(merged.stdout)
    peak = report["summary"]["peak_memory_bytes"]
    [row] = runs.tensor_facts(tmp_path / "out").values()
    base, *tuned = (oracle.widen("BF16", period) for period in periods)
    expected = oracle.model_stock(base, tuned)
    cosine_error = abs(row["mean_cosine"] - float(expected.facts["mean_cosine"][0]))
    wanted = oracle.round_to("BF16", expected.out)
    wrong = 0
    spots = np.random.default_rng(9).integers(0, NUM_PERIODS, 20)
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        for spot in spots.tolist():
            file.seek(8 + header_bytes + spot * PERIOD_BYTES)
            wrong += int((np.frombuffer(file.read(PERIOD_BYTES), np.uint16) != wanted).sum())
    share = 1 - wrong / (len(spots) * PERIOD)
    projected = planned["projected_memory_bytes"]
    print(
        f"{report['seconds']:,.0f} s, peak {peak / runs.MIB:,.0f} MiB of {projected / runs.MIB:,.0f} projected, "
        f"|cos error| {cosine_error:.2e}, correctly rounded {share:.6f}"
    )
    assert peak <= projected <= MEMORY_BYTES
    assert peak >= 0.85 * projected
    assert 0.4 < row["mean_cosine"] < 0.6
    assert cosine_error <= 1e-7
    assert share >= 0.9999
