"""Interrupted, repeated and conflicting runs: nothing half-written counts, nothing finished is redone."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stockflow
from stockflow.engine.worker import WorkerSpec
from stockflow.errors import InputChangedError, NumericsError, OutputConflictError, PlanError
from stockflow.events import OnEvent
from stockflow.output import claims
from stockflow.output.claims import Claim
from stockflow.output.keys import CLAIM_FILE
from stockflow.output.manifest import Manifest
from stockflow.output.publish import commit
from stockflow.output.receipts import Receipt
from stockflow.output.shards import valid_receipts
from stockflow.planning.plan import NUMERICS, ShardPlan
from stockflow.recipe import load_recipe
from stockflow.results.merges import result_lines
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import ShardWork, in_this_process, receipt_of
from stockflow.storage import LocalStore, Stamp, StorageConfig, Store, open_store
from tests import oracle, runs
from tests.checkpoints import Family, make_family, write_checkpoint, write_recipe
from tests.runs import MIB
from tests.waiting import HANG_S

SLOW = {f"model.layers.{index}.weight": (400, 1000) for index in range(60)}
"""Sixty shards, each in its own file and slow to make: enough to be stopped between two of them."""
SMALL = {f"model.layers.{index}.weight": (20, 50) for index in range(8)}
OPTIONS = ("--shard-size", "800kB", "--memory", "600MiB", "--workers", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def slow_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    return write_recipe(folder / "recipe.yaml", "model_stock", make_family(folder, 2, SLOW, num_shards=2))


@pytest.fixture(scope="module")
def undisturbed(slow_recipe: Path) -> dict[str, str]:
    output = slow_recipe.parent / "undisturbed"
    assert runs.merge_here(slow_recipe, output, shard_size=800_000).num_resumed == 0
    return runs.shard_digests(output)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "family", 2, SMALL)


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", family)


def merge_until_a_receipt(recipe: Path, output: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a merge, send it a signal as soon as it has written a receipt, and return its exit code and its words."""
    process = runs.start_and_stop("merge", recipe, output, "--quiet", *OPTIONS)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=HANG_S)
    return process.returncode, said


def test_a_killed_merge_resumes_to_the_same_bytes(
    slow_recipe: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"

    code, said = merge_until_a_receipt(slow_recipe, output, signal.SIGKILL)
    was_published = (output / "manifest.json").exists() or (output / "config.json").exists()
    num_receipts = len(runs.receipts(output))
    resumed = runs.merge_elsewhere(slow_recipe, output, *OPTIONS)

    assert code == -signal.SIGKILL, said
    assert not was_published
    assert 1 <= num_receipts < len(undisturbed)
    assert resumed["outcome"] == "merged"
    assert resumed["resumed_shards"] == num_receipts
    assert undisturbed == resumed["shards"] == runs.shard_digests(output)


def test_a_terminated_merge_leaves_nothing_half_written_and_resumes(
    slow_recipe: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"

    code, said = merge_until_a_receipt(slow_recipe, output, signal.SIGTERM)
    left_behind = runs.leftovers(output)
    was_published = (output / "manifest.json").exists()
    resumed = runs.merge_elsewhere(slow_recipe, output, *OPTIONS)

    assert code == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; run the same command again to resume" in said
    assert "Traceback" not in said
    assert left_behind == []
    assert not was_published
    assert resumed["resumed_shards"] >= 1
    assert undisturbed == resumed["shards"] == runs.shard_digests(output)


def test_a_shard_that_changed_after_its_receipt_is_made_again(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=5_000)
    digests = runs.shard_digests(output)
    (output / "manifest.json").unlink()
    damaged, missing, touched = sorted(output.glob("model-*.safetensors"))[:3]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    missing.unlink()
    os.utime(touched, (1, 1))

    resumed = runs.merge_here(recipe, output, shard_size=5_000)

    assert resumed.num_resumed == len(digests) - 2
    assert digests == runs.shard_digests(output)


def test_only_a_merge_of_one_run_says_a_rate(recipe: Path, tmp_path: Path) -> None:
    """What earlier runs read and wrote counts in the summary; their seconds do not."""
    output = tmp_path / "out"
    undisturbed = runs.merge_here(recipe, output, shard_size=5_000)
    (output / "manifest.json").unlink()
    min(output.glob("model-*.safetensors")).unlink()

    resumed = runs.merge_here(recipe, output, shard_size=5_000)

    assert sum("B/s" in line for line in result_lines(undisturbed)) == 1
    assert not any("B/s" in line for line in result_lines(resumed))


def test_receipts_are_read_side_by_side_and_come_in_order(recipe: Path, tmp_path: Path) -> None:
    """One after the other, 4,900 of them at 30 ms each would keep all workers waiting for two and a half minutes."""
    merged = runs.merge_here(recipe, tmp_path / "out", shard_size=5_000)
    files = [shard.file for shard in merged.plan.shards]
    together = threading.Barrier(len(files))

    class Store(LocalStore):
        def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
            together.wait(HANG_S)
            return super().read_head(key, num_bytes)

    found = valid_receipts(Store(str(tmp_path / "out")), merged.plan)

    assert 1 < len(files) == len(found)
    assert files == [*found]


def test_a_finished_output_says_so_without_torch(recipe: Path, tmp_path: Path) -> None:
    runs.merge_here(recipe, tmp_path / "out")
    script = (
        "import sys; from stockflow.cli import app\n"
        f"app(['merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}, '--json', '--quiet'], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'pyarrow'} & sys.modules.keys()), file=sys.stderr)"
    )

    again = subprocess.run(
        [sys.executable, "-c", script], cwd=runs.REPOSITORY, capture_output=True, text=True, check=True
    )

    assert json.loads(again.stdout)["outcome"] == "already_finished"
    assert again.stderr.strip() == "[]"


def test_another_plan_is_refused_and_overwrite_replaces_it(family: Family, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=5_000)
    old_layout = sorted(path.name for path in output.glob("*.safetensors"))
    other = write_recipe(tmp_path / "other.yaml", "linear", family, per_model={"weight": [0.3, 0.7]}, with_base=False)

    refused = runs.invoke("merge", other, output, "--quiet")
    replaced = runs.merge_here(other, output, overwrite=True)

    assert len(old_layout) > 1
    assert refused.exit_code == 2
    assert "holds the finished output of another plan" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert replaced.outcome == "merged"
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not (output / "model.safetensors.index.json").exists()
    assert [path.parent.parent.name for path in output.glob("_stockflow/*/receipts/*")] == [replaced.plan.plan_id]
    assert oracle.load_checkpoint(output).keys() == SMALL.keys() | oracle.load_checkpoint(family.base).keys()


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_finished_output_that_lost_a_shard_gets_it_again(recipe: Path, tmp_path: Path, *, is_cut: bool) -> None:
    whole = runs.merge_here(recipe, tmp_path / "out", shard_size=4_000)
    before = runs.shard_digests(tmp_path / "out")
    shard = tmp_path / "out" / whole.plan.shards[1].file
    if is_cut:
        shard.write_bytes(b"cut")
    else:
        shard.unlink()

    again = runs.merge_here(recipe, tmp_path / "out", shard_size=4_000)

    assert (again.outcome, again.num_resumed) == ("merged", len(whole.plan.shards) - 1)
    assert runs.shard_digests(tmp_path / "out") == before
    assert stockflow.verify(str(tmp_path / "out")).findings == ()
    assert runs.merge_here(recipe, tmp_path / "out", shard_size=4_000).outcome == "already_finished"


def test_an_unfinished_output_of_another_plan_is_refused(family: Family, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output)
    (output / "manifest.json").unlink()
    other = write_recipe(tmp_path / "other.yaml", "linear", family, per_model={"weight": [0.3, 0.7]}, with_base=False)

    refused = runs.invoke("merge", other, output, "--quiet")

    assert refused.exit_code == 2
    assert "is claimed by an unfinished run of another plan" in refused.stderr


@pytest.mark.parametrize("finished", [True, False])
def test_an_output_of_other_numerics_is_refused_and_named(
    finished: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards are rounded otherwise: none of them may end up beside ours."""
    with monkeypatch.context() as earlier_version:
        for module in ("stockflow.planning.plan", "stockflow.output.publish"):
            earlier_version.setattr(sys.modules[module], "NUMERICS", 2)
        runs.merge_here(recipe, tmp_path / "out")
    if not finished:
        (tmp_path / "out" / "manifest.json").unlink()

    refused = runs.invoke("merge", recipe, tmp_path / "out", "--quiet")

    assert refused.exit_code == 2
    ours = f"this version of stockflow has {NUMERICS} and gives other bytes"
    assert f"it was made with numerics 2, {ours}" in refused.stderr


def test_foreign_files_are_not_touched_without_overwrite(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")

    refused = runs.invoke("merge", recipe, output, "--quiet")

    assert refused.exit_code == 2
    assert "is not empty and not an output of stockflow (it has 'thesis.txt')" in refused.stderr
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_foreign_files_in_folders_of_the_output_are_not_touched_either(family: Family, tmp_path: Path) -> None:
    (family.base / "additional_chat_templates").mkdir()
    (family.base / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    recipe, output = write_recipe(tmp_path / "templates.yaml", "model_stock", family), tmp_path / "out"
    (output / "additional_chat_templates").mkdir(parents=True)
    (output / "additional_chat_templates" / "mine.jinja").write_text("years of work")

    refused = runs.invoke("merge", recipe, output, "--quiet")

    assert refused.exit_code == 2
    assert "is not empty and not an output of stockflow (it has 'additional_chat_templates')" in refused.stderr


def test_overwrite_says_what_goes_and_what_stays(family: Family, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (family.base / "added_tokens.json").write_text("{}")
    runs.merge_here(recipe, output, shard_size=5_000)
    (family.base / "added_tokens.json").unlink()
    shards = sorted(path.name for path in output.glob("model-*.safetensors"))
    strangers = ("chat_template.jinja", "thesis.txt", "1_Pooling/config.json", "x.bin", "other/_stockflow/claim.json")
    for key in (*strangers, "draft.safetensors", ".hidden"):
        (output / key).parent.mkdir(parents=True, exist_ok=True)
        (output / key).write_text("{}")

    planned = runs.invoke("plan", recipe, output, "--overwrite")
    merged = runs.invoke("merge", recipe, output, "--overwrite", "--quiet", "--device", "cpu")

    assert planned.exit_code == 0, planned.stderr
    gone = ", ".join(
        f"'{key}'" for key in ("added_tokens.json", "draft.safetensors", *shards, "model.safetensors.index.json")
    )
    left = (
        "what stockflow did not write: '1_Pooling/config.json', 'chat_template.jinja', 'thesis.txt', 'x.bin'; "
        "loaders of the output may read '1_Pooling/config.json', 'chat_template.jinja', 'x.bin': remove"
    )
    assert f"--overwrite would remove {gone}" in planned.stdout
    assert f"--overwrite would leave {left}" in planned.stdout
    assert merged.exit_code == 0, merged.stderr
    assert all((output / key).exists() for key in strangers)
    assert not any((output / key.strip("'")).exists() for key in gone.split(", "))


@pytest.mark.parametrize("inside", ["", "merged", "a/b"])
def test_an_output_in_an_input_is_refused(inside: str, family: Family, recipe: Path) -> None:
    before = sorted(family.tuned[0].rglob("*"))

    refused = runs.invoke("merge", recipe, family.tuned[0] / inside, "--quiet", "--overwrite")

    assert refused.exit_code == 2
    assert "is, or lies in, the input" in refused.stderr
    assert before == sorted(family.tuned[0].rglob("*"))


NONFINITE = [("model_stock", 0, float("nan")), ("model_stock", 2, float("inf")), ("linear", 1, float("nan"))]


@pytest.mark.parametrize(("method", "broken", "value"), NONFINITE)
def test_nan_and_infinity_are_named_with_tensor_checkpoint_and_index(
    method: str, broken: int, value: float, tmp_path: Path
) -> None:
    shapes = {"fine": (10, 10), "large": (3, 70_000)}
    family = make_family(tmp_path, 2, shapes)
    folder = (family.base, *family.tuned)[broken]
    spoil(folder, "large", 150_001, value)
    per_model = {"weight": [0.3, 0.7]} if method == "linear" else None
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, per_model=per_model)

    with pytest.raises(NumericsError) as failure:
        runs.merge_here(recipe, tmp_path / "out")

    assert failure.value.exit_code == 2
    assert f"tensor 'large' of {folder} has NaN or infinity at flat index 150,001" in str(failure.value)
    assert "on_nonfinite: propagate" in str(failure.value)
    assert not list((tmp_path / "out").glob("*.safetensors")) + runs.leftovers(tmp_path / "out")


def test_nan_goes_through_if_asked(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"fine": (10, 10), "broken": (3, 7)})
    spoil(family.tuned[0], "broken", 8, float("nan"))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", "model_stock", family, parameters={"filter_wise": True},
        stockflow={"on_nonfinite": "propagate"},
    )  # fmt: skip

    runs.merge_here(recipe, tmp_path / "out")

    merged = oracle.load_checkpoint(tmp_path / "out")
    assert np.isfinite(merged["fine"].array).all()
    assert np.isnan(merged["broken"].array).all(axis=1).tolist() == [False, True, False]
    assert runs.tensor_facts(tmp_path / "out")["broken"]["base_norm"] is None


def test_an_output_that_overflows_is_an_error(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"w": (10, 10)}, torch.float32, base_scale=1e30, delta_scale=1e29)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family, out_dtype="float16")

    with pytest.raises(NumericsError, match="rounded to F16, of 'w' overflows between elements 0 and 100"):
        runs.merge_here(recipe, tmp_path / "out")


def test_integers_that_differ_are_an_error(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"w": (10, 10)})
    tensors = {"w": torch.zeros(10, 10, dtype=torch.bfloat16), "model.position_ids": torch.arange(77).reshape(1, 77)}
    for number, folder in enumerate((family.base, *family.tuned)):
        write_checkpoint(folder, tensors | {"model.position_ids": tensors["model.position_ids"] + number // 2})
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    with pytest.raises(PlanError) as failure:
        runs.merge_here(recipe, tmp_path / "out")

    differs = "'model.position_ids' is not equal in all models"
    for part in (differs, str(family.base), str(family.tuned[1]), "`action: copy`"):
        assert part in str(failure.value)


def test_an_input_that_changes_after_planning_is_an_error(family: Family, recipe: Path, tmp_path: Path) -> None:
    inputs = Inputs.open(load_recipe(str(recipe)))
    weights = family.tuned[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the same bytes, but who is to know
    options = MergeOptions(600 * MIB + runs.grown_bytes(), 1, "cpu")

    with pytest.raises(InputChangedError, match="changed since it was planned") as failure:
        merge(inputs, str(tmp_path / "out"), options, in_this_process)

    assert failure.value.exit_code == 2
    assert str(weights) in str(failure.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def spoil(folder: Path, name: str, index: int, value: float) -> None:
    """Put a value into a tensor of a checkpoint in one file."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[index] = value
    write_checkpoint(folder, tensors)


@pytest.mark.parametrize("rival", ["takes the prefix", "replaces a shard"])
def test_a_run_that_lost_its_prefix_publishes_nothing(rival: str, recipe: Path, tmp_path: Path) -> None:
    """Another driver with --overwrite takes the prefix while this one is still writing."""
    output = tmp_path / "out"

    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        yield from in_this_process(spec, shards, on_event)
        if rival == "takes the prefix":
            (output / CLAIM_FILE).write_bytes(claims.encode(Claim.now("f" * 64, "their run")))
        else:
            shard = output / shards[0].file
            shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")

    options = MergeOptions(1024 * MIB + runs.grown_bytes(), 2, "cpu", 5_000)
    with pytest.raises(OutputConflictError, match="nothing was published"):
        merge(Inputs.open(load_recipe(str(recipe))), str(output), options, execute)

    assert not (output / "manifest.json").exists()


def test_overwrite_leaves_nothing_of_the_output_before(family: Family, recipe: Path, tmp_path: Path) -> None:
    """A tokenizer of another model, left beside new weights, would be loaded without a word."""
    output = tmp_path / "out"
    (family.base / "added_tokens.json").write_text("{}")
    runs.merge_here(recipe, output)
    (family.base / "added_tokens.json").unlink()

    runs.merge_here(recipe, output, overwrite=True)

    assert (output / "tokenizer_config.json").exists()
    assert not (output / "added_tokens.json").exists()


def test_overwrite_mends_a_damaged_output_of_the_same_plan(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=5_000)
    digests = runs.shard_digests(output)
    damaged = sorted(output.glob("model-*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")

    mended = runs.merge_here(recipe, output, shard_size=5_000, overwrite=True)

    assert mended.num_resumed == len(digests) - 1
    assert digests == runs.shard_digests(output)


def test_the_driver_holds_no_coefficients(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By row there are as many as rows times models: 6 GB for a large mixture of experts, had it to hold them all."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family, parameters={"filter_wise": True})
    held: list[Receipt] = []

    def commit_and_tell(output: Store, inputs: Any, recipe: Any, plan: Any, receipts: Sequence[Receipt]) -> Manifest:
        held[:] = receipts
        return commit(output, inputs, recipe, plan, receipts)

    monkeypatch.setattr("stockflow.output.publish.commit", commit_and_tell)
    output = tmp_path / "out"

    for num_resumed in (0, 3):
        result = runs.merge_here(recipe, output, shard_size=5_000)

        rows = [row for receipt in held for row in receipt.tensors]
        assert (result.num_resumed, {row.coefficients for row in rows}) == (num_resumed, {None})
        assert sum(len(row["coefficients"] or ()) for row in runs.tensor_facts(output).values()) == 8 * 20
        (output / "manifest.json").unlink()
        (output / held[0].file).unlink()


@pytest.mark.parametrize("change", [None, "shard", "receipt", "class"])
def test_a_shard_that_a_lost_worker_finished_is_not_merged_again(
    recipe: Path, tmp_path: Path, change: str | None
) -> None:
    """It had written the receipt when it died, and the driver had not heard."""
    output, works = tmp_path / "out", []

    def again(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        yield from in_this_process(spec, shards, on_event)
        works.append((ShardWork(spec), shards[0]))

    options = MergeOptions(1024 * MIB + runs.grown_bytes(), 2, "cpu", 5_000)
    merge(Inputs.open(load_recipe(str(recipe))), str(output), options, again)
    ((work, shard),) = works
    (receipt,) = output.glob(f"_stockflow/*/receipts/{shard.file}.json")
    if change == "shard":
        (output / shard.file).write_bytes(bytes((output / shard.file).stat().st_size))
    elif change == "receipt":
        receipt.unlink()
    elif change == "class":
        work.worker._session.device.numerics_class = "cpu-of-another-kind"  # type: ignore[misc]
        (output / "_stockflow" / receipt.parts[-3] / "numerics" / "000000.json").unlink()
    written: list[int] = []

    answer = work(shard, lambda num_read, num_written: written.append(num_written), 0)

    plan_id = receipt.parts[-3]
    assert shard.file == receipt_of(answer, open_store(str(output), StorageConfig()), plan_id).file
    assert (sum(written) > 0) == (change is not None)
