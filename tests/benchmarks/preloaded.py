"""``stockflow merge`` with stockflow and its libraries imported before the clock starts: what a merge takes by itself.

What numba loads when a kernel first runs stays within the clock. Run as a program with the words that follow
``stockflow``, it prints seconds, CPU seconds, the report of ``--json`` and the packages that were imported late.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

NEEDED = (
    "pyarrow.parquet",
    "stockflow.cli",
    "stockflow.output.publish",
    "stockflow.results.plans",
    "stockflow.results.merges",
    "stockflow.run.driver",
    "stockflow.run.places",
    "stockflow.recipe",
    "stockflow.progress.display",
    "stockflow.engine.worker",
)
NEEDED_ON_OBJECT_STORAGE = ("obstore.store", "s3fs", "stockflow.storage.objects", "stockflow.storage.s3fs_client")
NEEDED_ON_CUDA = ("stockflow.engine.cuda",)


def main() -> None:
    """Merge once on the local disk."""
    words = sys.argv[1:]
    load(NEEDED + (NEEDED_ON_CUDA if "cuda" in words else ()))
    before = set(sys.modules)
    facts = clocked(lambda: {"report": stockflow(words)})
    late = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(json.dumps(facts | {"imported_late": sorted(late)}))


def load(modules: Sequence[str]) -> None:
    """Import modules."""
    for module in modules:
        import_module(module)


def clocked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns, with the seconds and CPU seconds it took."""
    started, cpu = time.perf_counter(), time.process_time()
    facts = work()
    return {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, **facts}


def stockflow(words: Sequence[str]) -> dict[str, Any]:
    """Run a command of stockflow with ``--json`` in this process and return what it prints.

    Raises:
        SystemExit: it failed.
    """
    from stockflow.cli import app

    printed = io.StringIO()
    with redirect_stdout(printed):
        exit_code = app(list(words), standalone_mode=False)
    if exit_code:
        raise SystemExit(exit_code)
    report: dict[str, Any] = json.loads(printed.getvalue())
    return report


if __name__ == "__main__":
    main()
