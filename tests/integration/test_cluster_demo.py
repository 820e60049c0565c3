"""`make cluster-demo` says the truth, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ray_nodes, runs

pytestmark = pytest.mark.cluster


def test_the_demo_of_a_cluster_ends_well_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """It checks itself: the token, the lost node, the exit code, verify, the same bytes as on one machine."""
    command, environment = [sys.executable, "-m", "tests.cluster_demo"], os.environ | {"TMPDIR": str(tmp_path)}

    done = subprocess.run(
        command, env=environment, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for words in (
        " was lost, another does model-",
        "exit code of stockflow 0, 24 receipts",
        "the same sha256 for every shard",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_in_which_something_fails_leaves_nothing_behind_either() -> None:
    with pytest.raises(ZeroDivisionError), ray_nodes.cluster(os.environ) as cluster:  # noqa: PT012
        cluster.start_head()
        assert cluster.nodes[0].processes()
        raise ZeroDivisionError

    assert cluster.nodes[0].processes() == []
    assert cluster.nodes[0].process.poll() is not None
    assert not cluster.folder.exists()
