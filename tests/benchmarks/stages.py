"""Where the time of a local merge goes: ``make profile ARGS='--gb 0.8 --method ties'``.

First by stage, as the receipts tell (medians of the rounds, nothing else measured); then by line of stockflow, as
py-spy samples it in one more run. Its stacks are kept as a file for speedscope.app or flamegraph.pl.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.cases import Case, add_case_options, add_sweep_options, sweep_from, workplace
from tests.benchmarks.local import LocalBench, remove
from tests.benchmarks.processes import warm
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record

STACKS = Path(__file__).parents[2] / ".bench" / "stacks"
SAMPLES_PER_S = 100
SHOWN_SHARE = 0.01
IMPORTING = "_find_and_load"
MAIN_THREAD = "MainThread"
THREAD = re.compile(r"thread \(\w+\): ([^;]+?)(?:_\d+)?;")
"""its name, without the number it has in its pool; py-spy does not know the main thread's at first"""
FRAME = re.compile(r"(?P<function>.*) \((?P<file>\S+\.py):(?P<line>\d+)\)$")


def main() -> None:
    """Make the inputs, run the rounds and the sampled runs, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser)
    add_sweep_options(parser)
    add_run_options(parser, "profile")
    parser.add_argument("--stacks", type=Path, default=STACKS, help="folder for sampled stacks")
    parser.add_argument("--native", action="store_true", help="sample C++ frames too: slower, and times are distorted")
    arguments = parser.parse_args()
    try:
        cases = sweep_from(arguments)
    except ValueError as error:
        parser.error(str(error))
    sampler = shutil.which("py-spy", path=Path(sys.executable).parent)
    found = []
    with workplace(cases, arguments.folder, keep=arguments.keep) as work:
        benches = [LocalBench(case, arguments.folder, work / str(number)) for number, case in enumerate(cases)]
        for bench in benches:
            bench.measure_memory()
        runs = interleaved({bench.case.label: bench.merge for bench in benches}, arguments.rounds)
        for bench in benches:
            middle = medians(runs[bench.case.label])
            show_stages(bench.case, middle, bench.plan["source_bytes"])
            found.append({"case": asdict(bench.case), "source_bytes": bench.plan["source_bytes"], "merge": middle})
            if sampler is not None:
                stacks = sampled(bench, sampler, arguments.stacks, native=arguments.native)
                show_lines(bench.case, stacks)
                found[-1]["stacks"] = str(stacks)
    if sampler is None:
        print("no py-spy beside this Python (pip install py-spy): lines are not sampled")
    record(arguments, {"cases": found})


def show_stages(case: Case, middle: Facts, source_bytes: int) -> None:
    """Print the stages of a merge: work first, then who waited for what."""
    stages = {name.removeprefix("seconds_"): value for name, value in middle.items() if name.startswith("seconds_")}
    del stages["total"]  # of all shards; one is published while the next is merged
    wall = middle["merge_s"]
    by_time = sorted(stages, key=lambda stage: (stage.startswith("wait"), -stages[stage]))
    work = sum(value for stage, value in stages.items() if not stage.startswith("wait"))
    rows = [stage_row(stage, stages[stage], middle["parameters"], source_bytes, wall) for stage in by_time]
    rows += [
        stage_row("all work", work, middle["parameters"], source_bytes, wall),
        stage_row("merge, wall clock", wall, middle["parameters"], source_bytes, wall),
        stage_row("process, wall clock", middle["s"], middle["parameters"], source_bytes, wall),
        stage_row("process, CPU", middle["cpu_s"], middle["parameters"], source_bytes, wall),
    ]
    columns = ("stage", "thread-seconds", "ns per output element", "ns per input byte", "% of the merge's wall clock")
    print_table(f"{case.label}: stages by the receipts, medians", columns, rows)


def stage_row(words: str, seconds: float, num_elems: float, num_bytes: int, wall: float) -> tuple[str, ...]:
    """Return one line of the table of stages."""
    per_elem, per_byte = 1e9 * seconds / num_elems, 1e9 * seconds / num_bytes
    return (words, f"{seconds:.3f}", f"{per_elem:.3f}", f"{per_byte:.3f}", f"{100 * seconds / wall:.1f}")


def sampled(bench: LocalBench, sampler: str, folder: Path, *, native: bool) -> Path:
    """Run one merge under py-spy and return the file of its stacks, one line each, with the number of samples."""
    warm(bench.folders)
    folder.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    stacks = folder / f"{when}-{re.sub('[^a-z0-9.]+', '-', bench.case.label.lower())}.txt"
    options = ["--format", "raw", "--rate", str(SAMPLES_PER_S), "--threads", "--subprocesses", "--output", str(stacks)]
    command = [sampler, "record", *options, *(["--native"] if native else []), "--", *bench.command]
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if finished.returncode or not stacks.exists():
        raise SystemExit(f"py-spy failed with {finished.returncode}:\n{finished.stderr[-2000:]}")
    remove(bench.output)
    return stacks


def show_lines(case: Case, stacks: Path) -> None:
    """Print the lines of stockflow that were running, by kind of thread."""
    counts = lines_running(stacks.read_text().splitlines())
    total = counts.total()
    rows = [
        (thread, place, f"{count / SAMPLES_PER_S:.2f}", f"{100 * count / total:.1f}")
        for (thread, place), count in counts.most_common()
        if count >= SHOWN_SHARE * total
    ]
    shown = sum(float(row[2]) for row in rows)
    rows.append(("", "less than 1 % each", f"{total / SAMPLES_PER_S - shown:.2f}", ""))
    columns = ("thread", "line of stockflow that runs, or calls what runs", "s", "% of all samples")
    print_table(f"{case.label}: {total / SAMPLES_PER_S:.1f} thread-seconds sampled", columns, rows, words=2)
    print(f"stacks, for speedscope.app or flamegraph.pl: {stacks}\n")


def lines_running(stacks: Iterable[str]) -> Counter[tuple[str, str]]:
    """Return samples by kind of thread and innermost line of stockflow.

    Args:
        stacks: as py-spy writes them: ``frame;frame;... samples``, outermost first; processes and threads are frames.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for stack in stacks:
        frames, _, count = stack.rpartition(" ")
        named = THREAD.findall(frames)
        counts[named[-1] if named else MAIN_THREAD, place_of(frames.split(";"))] += int(count)
    return counts


def place_of(frames: list[str]) -> str:
    """Return the innermost line of stockflow; imports are one place, and a pool's idle threads another."""
    if any(frame.startswith(IMPORTING) for frame in frames):
        return "imports"
    for frame in reversed(frames):
        if (match := FRAME.search(frame)) and match["file"].startswith("stockflow/"):
            return f"{match['file']}:{match['line']} {match['function']}"
    if "concurrent/futures/thread.py" in frames[-1]:
        return "between two jobs of its pool"
    return "outside stockflow"


if __name__ == "__main__":
    main()
