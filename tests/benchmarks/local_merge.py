"""Time and memory of local merges against the I/O floor: ``make bench ARGS='--gb 0.8 --tuned 4 --method ties'``.

Every case and yardstick once per round, interleaved, each in a process of its own; medians. What each is:
docs/benchmarks.md.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from tests.benchmarks.cases import (
    Case,
    add_case_options,
    add_sweep_options,
    sweep_from,
    told_apart,
    workplace,
)
from tests.benchmarks.local import LocalBench, timed
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record, spread

YARDSTICKS = ("floor", "alone", "process")


def main() -> None:
    """Make the inputs, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser)
    add_sweep_options(parser)
    add_run_options(parser, "local")
    arguments = parser.parse_args()
    try:
        cases = sweep_from(arguments)
    except ValueError as error:
        parser.error(str(error))
    with workplace(cases, arguments.folder, keep=arguments.keep) as work:
        benches = [LocalBench(case, arguments.folder, work / str(number)) for number, case in enumerate(cases)]
        for bench in benches:
            bench.measure_memory()
        measures = {
            (bench.case.label, name): measure
            for bench in benches
            for name, measure in zip(YARDSTICKS, (bench.floor, bench.merge_alone, bench.merge), strict=True)
        }
        small = {("start-up", name): partial(timed, command) for name, command in benches[0].small_commands().items()}
        runs = interleaved(measures | small, arguments.rounds)
    found = [result(bench, {name: runs[bench.case.label, name] for name in YARDSTICKS}) for bench in benches]
    show(found)
    starts = {name: runs["start-up", name] for _, name in small}
    print_table("start-up", ("command", "s"), [(name, spread(these, "s")) for name, these in starts.items()])
    record(arguments, {"cases": found, "start_up": {name: medians(these) for name, these in starts.items()}})


def result(bench: LocalBench, runs: dict[str, list[Facts]]) -> dict[str, Any]:
    """Return medians, ratios and all runs of a case."""
    middle = {name: medians(these) for name, these in runs.items()}
    floor_s, alone_s = middle["floor"]["s"], middle["alone"]["s"]
    return {
        "case": asdict(bench.case),
        "tensors": bench.plan["tensors"],
        "shards": len(bench.plan["shards"]),
        "source_bytes": bench.plan["source_bytes"],
        "medians": middle,
        "memory": bench.memory,
        "ratios": {
            "alone_to_floor": alone_s / floor_s,
            "smallest_alone_to_floor": min(run["s"] for run in runs["alone"]) / min(run["s"] for run in runs["floor"]),
            "process_to_floor": middle["process"]["s"] / floor_s,
            "alone_ns_per_input_byte": 1e9 * alone_s / bench.plan["source_bytes"],
            "pss_to_projected": bench.memory["peak_pss_mib"] / bench.memory["projected_mib"],
        },
        "runs": runs,
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print the cases side by side."""

    def row(words: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (words, *(value(case) for case in found))

    def seconds(words: str, yardstick: str, name: str = "s") -> tuple[str, ...]:
        return row(words, lambda case: spread(case["runs"][yardstick], name))

    def number(words: str, group: str, name: str, form: str) -> tuple[str, ...]:
        return row(words, lambda case: format(case[group][name], form))

    def three(words: str, name: str, form: str) -> tuple[str, ...]:
        return row(words, lambda case: "; ".join(format(case["medians"][key][name], form) for key in YARDSTICKS))

    def nanoseconds(case: dict[str, Any]) -> float:
        return float(case["ratios"]["alone_ns_per_input_byte"])

    def floor_parts(case: dict[str, Any]) -> str:
        return " + ".join(f"{case['medians']['floor'][name]:.2f}" for name in ("read_s", "hash_s", "write_s"))

    rows = [
        row("input, GB; tensors", lambda case: f"{case['source_bytes'] / 1e9:.2f}; {case['tensors']:,}"),
        seconds("floor, s", "floor"),
        row("  read + hash + write, s", floor_parts),
        seconds("merge alone, s", "alone"),
        seconds("whole process, s", "process"),
        seconds("  merge by its own clock, s", "process", "merge_s"),
        number("merge alone : floor", "ratios", "alone_to_floor", ".2f"),
        number("  of the smallest", "ratios", "smallest_alone_to_floor", ".2f"),
        number("whole process : floor", "ratios", "process_to_floor", ".2f"),
        number("merge alone, ns per input byte", "ratios", "alone_ns_per_input_byte", ".3f"),
        row("  : that of the first case", lambda case: f"{nanoseconds(case) / nanoseconds(found[0]):.2f}"),
        three("CPU of floor; alone; process, s", "cpu_s", ".2f"),
        three("CPU of all else meanwhile, s", "others_cpu_s", ".2f"),
        three("read from the disk meanwhile, MB", "disk_read_mb", ".0f"),
        number("peak memory projected, MiB", "memory", "projected_mib", ".0f"),
        number("  PSS of the process tree, MiB", "memory", "peak_pss_mib", ".0f"),
        row("  VmHWM by the receipts, MiB", lambda case: f"{case['medians']['process']['peak_receipts_mib']:.0f}"),
        number("PSS : projected", "ratios", "pss_to_projected", ".2f"),
    ]
    common, own = told_apart([Case(**case["case"]) for case in found])
    print_table(f"{common}: medians (smallest-largest)", ("", *own), rows)


if __name__ == "__main__":
    main()
