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
        measures: dict[tuple[str, str], Callable[[], Facts]] = {}
        for bench in benches:
            measures[bench.case.label, "floor"] = bench.floor
            measures[bench.case.label, "merge"] = bench.merge
        small = {("start-up", name): partial(timed, command) for name, command in benches[0].small_commands().items()}
        runs = interleaved(measures | small, arguments.rounds)
    found = [result(bench, runs[bench.case.label, "floor"], runs[bench.case.label, "merge"]) for bench in benches]
    show(found)
    starts = {name: runs["start-up", name] for _, name in small}
    print_table("start-up", ("command", "s"), [(name, spread(these, "s")) for name, these in starts.items()])
    record(arguments, {"cases": found, "start_up": {name: medians(these) for name, these in starts.items()}})


def result(bench: LocalBench, floors: list[Facts], merges: list[Facts]) -> dict[str, Any]:
    """Return medians, ratios and all runs of a case."""
    floor, merge = medians(floors), medians(merges)
    return {
        "case": asdict(bench.case),
        "tensors": bench.plan["tensors"],
        "shards": len(bench.plan["shards"]),
        "source_bytes": bench.plan["source_bytes"],
        "floor": floor,
        "merge": merge,
        "memory": bench.memory,
        "ratios": {
            "shards_to_floor": merge["shards_s"] / floor["s"],
            "merge_to_floor": merge["merge_s"] / floor["s"],
            "process_to_floor": merge["s"] / floor["s"],
            "shards_ns_per_input_byte": 1e9 * merge["shards_s"] / bench.plan["source_bytes"],
            "pss_to_projected": bench.memory["peak_pss_mib"] / bench.memory["projected_mib"],
        },
        "runs": {"floor": floors, "merge": merges},
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print the cases side by side."""

    def row(words: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (words, *(value(case) for case in found))

    def seconds(words: str, yardstick: str, name: str = "s") -> tuple[str, ...]:
        return row(words, lambda case: spread(case["runs"][yardstick], name))

    def number(words: str, group: str, name: str, form: str) -> tuple[str, ...]:
        return row(words, lambda case: format(case[group][name], form))

    def nanoseconds(case: dict[str, Any]) -> float:
        return float(case["ratios"]["shards_ns_per_input_byte"])

    rows = [
        row("input, GB; tensors", lambda case: f"{case['source_bytes'] / 1e9:.2f}; {case['tensors']:,}"),
        seconds("floor, s", "floor"),
        row(
            "  read + hash + write, s",
            lambda case: " + ".join(f"{case['floor'][name]:.2f}" for name in ("read_s", "hash_s", "write_s")),
        ),
        seconds("whole process, s", "merge"),
        seconds("  merge by its own clock, s", "merge", "merge_s"),
        seconds("  shards alone, s", "merge", "shards_s"),
        number("shards alone : floor", "ratios", "shards_to_floor", ".2f"),
        number("merge by its own clock : floor", "ratios", "merge_to_floor", ".2f"),
        number("whole process : floor", "ratios", "process_to_floor", ".2f"),
        number("shards alone, ns per input byte", "ratios", "shards_ns_per_input_byte", ".3f"),
        row("  : that of the first case", lambda case: f"{nanoseconds(case) / nanoseconds(found[0]):.2f}"),
        row("CPU of floor; of process, s", lambda case: f"{case['floor']['cpu_s']:.2f}; {case['merge']['cpu_s']:.2f}"),
        number("peak memory projected, MiB", "memory", "projected_mib", ".0f"),
        number("  PSS of the process tree, MiB", "memory", "peak_pss_mib", ".0f"),
        number("  VmHWM by the receipts, MiB", "merge", "peak_receipts_mib", ".0f"),
        number("PSS : projected", "ratios", "pss_to_projected", ".2f"),
        row(
            "read from disk by floor; by process, MB",
            lambda case: f"{case['floor']['disk_read_mb']:.0f}; {case['merge']['disk_read_mb']:.0f}",
        ),
    ]
    common, own = told_apart([Case(**case["case"]) for case in found])
    print_table(f"{common}: medians (smallest-largest)", ("", *own), rows)


if __name__ == "__main__":
    main()
