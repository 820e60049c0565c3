"""Every reader under a coverage-guided fuzzer: ``make fuzz``; FUZZ_SECONDS for each (60), FUZZ_SEED to repeat."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS
from tests.runs import REPOSITORY

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "20251"))


@pytest.mark.parametrize("name", READERS)
def test_nothing_but_typed_errors_comes_out(name: str, tmp_path: Path) -> None:
    """Within 10 s and 2 GiB for each input."""
    pytest.importorskip("atheris", reason="pip install 'stockflow[fuzz]'")
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, str(SECONDS), str(SEED)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    }

    fuzzed = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace",
        timeout=SECONDS + 300, check=False,
    )  # fmt: skip

    found = sorted(path.name for path in tmp_path.iterdir())
    assert (fuzzed.returncode, found) == (0, []), f"seed {SEED}, {tmp_path}: {fuzzed.stderr[-4000:]}"
    (tried,) = re.findall(r"stat::number_of_executed_units:\s*(\d+)", fuzzed.stderr)
    (memory,) = re.findall(r"stat::peak_rss_mb:\s*(\d+)", fuzzed.stderr)
    (slowest,) = re.findall(r"stat::slowest_unit_time_sec:\s*(\d+)", fuzzed.stderr)
    print(f"{name}: {int(tried):,} inputs, at most {memory} MiB and {slowest} s, seed {SEED}")
    assert int(tried) > 100
