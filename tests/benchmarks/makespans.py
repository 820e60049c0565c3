"""What merges of 10**12 parameters would take on many workers: ``make makespans``.

The shards are those of the product's planner for synthetic headers of an expert model (61 layers of 384 experts); who
does which one when is decided by the product's scheduler (``tests.simulation``), in virtual time. Only
the seconds of a shard are assumed: what it reads over the rate of a worker, and a fixed time. Nothing is read.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.make import SHARDS_PER_WORKER, make_plan
from stockflow.planning.plan import MergePlan
from stockflow.recipe import parse_recipe
from stockflow.run.inputs import collector_paused
from stockflow.storage import Stamp
from tests.benchmarks.report import print_table
from tests.simulation import Preemptions, SimulatedRun, Stragglers, simulate

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INNER = 61, 384, 7168, 2048
VOCABULARY = 163_840
TENSORS_PER_FILE = 1000


def main() -> None:
    """Plan, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tuned", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--shards-per-worker", type=int, default=SHARDS_PER_WORKER, help="at least")
    parser.add_argument("--rate", type=float, default=500e6, help="bytes a second that one worker reads and merges")
    parser.add_argument("--shard-s", type=float, default=1.0, help="fixed seconds of a shard: requests, publishing")
    parser.add_argument("--startup-s", type=float, default=20.0, help="from a place to the first shard")
    parser.add_argument("--slow", type=float, default=0.02, help="share of workers that are slow")
    parser.add_argument("--slowdown", type=float, default=2.0, help="how much slower these are")
    parser.add_argument("--preemptions", type=float, default=1.0, help="per worker and hour")
    parser.add_argument("--replacement-s", type=float, default=180.0, help="until there is another place")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    stragglers = Stragglers(arguments.slow, arguments.slowdown)
    preemptions = Preemptions(arguments.preemptions, arguments.replacement_s)
    rows = []
    for num_tuned in arguments.tuned:
        for num_workers in arguments.workers:
            plan = plan_for(num_tuned, num_workers, arguments.shards_per_worker)
            sizes = [shard.source_bytes for shard in plan.shards]

            def run(
                seed: int,
                stragglers: Stragglers = stragglers,
                preemptions: Preemptions = preemptions,
                sizes: Sequence[int] = sizes,
                num_workers: int = num_workers,
            ) -> SimulatedRun:
                return simulate(
                    sizes,
                    num_workers,
                    duration=lambda num_bytes: arguments.shard_s + num_bytes / arguments.rate,
                    startup_s=arguments.startup_s,
                    stragglers=stragglers,
                    preemptions=preemptions,
                    seed=seed,
                )

            seeds = range(arguments.seeds)
            calm = [run(0, Stragglers(), Preemptions())]
            slow = [run(seed, stragglers, Preemptions()) for seed in seeds]
            rows.append(
                (
                    str(num_tuned),
                    str(num_workers),
                    str(len(sizes)),
                    f"{plan.num_output_bytes / len(sizes) / 1e9:.2f}",
                    *columns_of(calm),
                    *columns_of(slow),
                    *columns_of([run(seed) for seed in seeds]),
                )
            )
    what = f"{plan.num_output_bytes / 2e12:.2f} x 10**12 parameters of BF16, {arguments.rate / 1e9:g} GB/s per worker"
    titles = ("N", "workers", "shards", "GB each", *_titles(""), *_titles("slow "), *_titles("spot "))
    print_table(f"{what}: undisturbed; with slow workers; with these and pre-emptions", titles, rows)


def _titles(kind: str) -> Iterator[str]:
    return (f"{kind}{name}" for name in ("time", "eff.", "tail s"))


def columns_of(runs: Sequence[SimulatedRun]) -> tuple[str, str, str]:
    """Return makespan, efficiency and tail: medians."""
    makespan, efficiency, tail = (
        statistics.median(getattr(run, name) for run in runs) for name in ("makespan_s", "efficiency", "tail_s")
    )
    return clock(makespan), f"{efficiency:.3f}", f"{tail:.0f}"


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def plan_for(num_tuned: int, num_workers: int, shards_per_worker: int) -> MergePlan:
    """Return the plan with the default shard size, or with a smaller one where workers would get fewer than that."""
    with collector_paused():
        checkpoints = make_checkpoints(num_tuned + 1)
        models = "".join(f"- model: s3://models/{number}\n" for number in range(1, num_tuned + 1))
        recipe = parse_recipe(f"merge_method: model_stock\nbase_model: s3://models/0\nmodels:\n{models}", "made here")
        plan = make_plan(recipe, checkpoints)
        if len(plan.shards) < shards_per_worker * num_workers:
            size = plan.num_output_bytes // (shards_per_worker * num_workers)
            plan = make_plan(recipe, checkpoints, shard_size=size)
        return plan


def make_checkpoints(number: int) -> list[Checkpoint]:
    """Return what the headers of so many equal checkpoints would say."""
    specs, extents, files = {}, {}, {}
    ends: dict[str, int] = {}
    for index, spec in enumerate(tensors()):
        file = f"model-{index // TENSORS_PER_FILE:05d}.safetensors"
        specs[spec.name] = spec
        extents[spec.name] = Extent(file, ends.get(file, 0))
        ends[file] = ends.get(file, 0) + spec.num_bytes
    for file, size in ends.items():
        files[file] = Stamp(size, "made here")
    return [
        Checkpoint(f"s3://models/{index}", specs, extents, files, {"torch_dtype": "bfloat16"}, {}, ())
        for index in range(number)
    ]


def tensors() -> Iterator[TensorSpec]:
    """Yield the tensors of a model of 1.03 x 10**12 parameters, nearly all in experts."""
    yield TensorSpec("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))
    for layer in range(NUM_LAYERS):
        start = f"model.layers.{layer}"
        yield TensorSpec(f"{start}.input_layernorm.weight", "BF16", (HIDDEN,))
        yield TensorSpec(f"{start}.self_attn.o_proj.weight", "BF16", (HIDDEN, HIDDEN))
        for expert in range(NUM_EXPERTS):
            for part in ("gate_proj", "up_proj"):
                yield TensorSpec(f"{start}.mlp.experts.{expert}.{part}.weight", "BF16", (INNER, HIDDEN))
            yield TensorSpec(f"{start}.mlp.experts.{expert}.down_proj.weight", "BF16", (HIDDEN, INNER))
    yield TensorSpec("lm_head.weight", "BF16", (VOCABULARY, HIDDEN))


if __name__ == "__main__":
    main()
