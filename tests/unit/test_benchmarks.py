"""The benchmark harness: what it counts, and that it counts the right thing."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks import stages, synthetic
from tests.benchmarks.cases import LAYOUTS, Case, checkpoint_folders, parse_difference, recipe_of, told_apart
from tests.benchmarks.processes import MIB, process_tree, run
from tests.benchmarks.report import interleaved, medians
from tests.checkpoints import llama_shapes, make_family, write_recipe


def test_words_of_a_case_have_their_types():
    assert parse_difference("gb=1,method=ties,tuned=2") == {"gb": 1.0, "method": "ties", "tuned": 2}


@pytest.mark.parametrize("text", ["size=1", "gb", "tuned=many"])
def test_unknown_words_of_a_case_are_refused(text: str):
    with pytest.raises(ValueError, match=r"size|could not convert|invalid literal"):
        parse_difference(text)


def test_cases_are_told_apart_by_what_differs():
    common, own = told_apart([Case(tuned=2), Case(tuned=4, scope="row")])
    assert own == ["1 + 2 x 0.8 GB, tensor", "1 + 4 x 0.8 GB, row"]
    assert "dense" in common
    assert "tensor" not in common


def test_a_round_measures_everything_before_the_next_begins():
    order: list[str] = []

    def measure(name: str) -> dict[str, float]:
        order.append(name)
        return {"s": float(len(order))}

    runs = interleaved({"floor": lambda: measure("floor"), "merge": lambda: measure("merge")}, 3)

    assert order == ["floor", "merge"] * 3
    assert medians(runs["merge"]) == {"s": 4.0}


def test_memory_of_a_process_is_sampled_with_its_children():
    child = f"import time; held = bytearray({64 * MIB}); time.sleep(2)"
    parent = f"import subprocess, sys; held = bytearray({32 * MIB}); subprocess.run([sys.executable, '-c', {child!r}])"

    finished = run([sys.executable, "-c", parent], sampled=True)

    assert finished.peak_anonymous_mib is not None
    assert 96 < finished.peak_anonymous_mib < 160
    assert finished.seconds > 2


def test_cpu_seconds_are_the_commands_own():
    busy = run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"])
    idle = run([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert idle.cpu_seconds < 0.3 <= busy.cpu_seconds


def test_a_command_that_fails_ends_the_benchmark_with_its_words():
    with pytest.raises(SystemExit, match=r"exit code 3(.|\n)*no such model"):
        run([sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"])


def test_a_process_is_in_its_own_tree():
    assert os.getpid() in process_tree(os.getppid())


def test_the_floor_reads_and_writes_what_it_is_told(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * 3_000_000)
    command = [sys.executable, "-m", "tests.benchmarks.floor", str(tmp_path / "out")]

    finished = run([*command, "--inputs", str(tmp_path / "base"), "--sizes", "2500000", "7"])

    assert sorted(path.stat().st_size for path in (tmp_path / "out").iterdir()) == [7, 2_500_000]
    facts = json.loads(finished.stdout)
    assert facts["s"] == pytest.approx(facts["read_s"] + facts["hash_s"] + facts["write_s"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_size_asked_for(layout: str):
    shapes, _ = synthetic.LAYOUT_MAKERS[layout](400_000_000)
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(400_000_000, rel=0.1)


def test_half_of_the_tensors_of_a_mixture_of_experts_are_tiny():
    shapes, _ = synthetic.moe(400_000_000)
    assert sum(math.prod(shape) <= 512 for shape in shapes.values()) > 0.49 * len(shapes) > 4_000


def test_checkpoints_repeat_and_task_vectors_have_half_their_direction_in_common(tmp_path: Path):
    shapes = {"a": (300, 512), "b": (512,), "c": (synthetic.CHUNK_ELEMS + 3,)}
    for make in ("first", "second"):
        noise = synthetic.Noise(seed=3)
        for index, folder in enumerate(checkpoint_folders(tmp_path / make, 2)):
            synthetic.write_checkpoint(folder, shapes, {"torch_dtype": "float32"}, index, noise)

    base, one, two = (tensors(folder) for folder in checkpoint_folders(tmp_path / "first", 2))
    for name, shape in shapes.items():
        assert base[name].shape == shape
        cosine = torch.cosine_similarity((one[name] - base[name]).flatten(), (two[name] - base[name]).flatten(), dim=0)
        assert cosine == pytest.approx(0.5, abs=0.1)
    for number, folder in enumerate(checkpoint_folders(tmp_path / "second", 2)):
        again = tensors(folder)
        assert all(torch.equal(again[name], (base, one, two)[number][name]) for name in shapes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_recipe_names_what_the_method_needs():
    recipe = recipe_of(Case(tuned=2, method="ties"), ["/base", "/one", "/two", "/three"])
    assert recipe["base_model"] == "/base"
    assert recipe["models"] == [{"model": "/one"}, {"model": "/two"}]
    assert recipe["parameters"]["density"] == 0.5


def test_samples_are_counted_by_thread_and_innermost_line():
    stacks = [
        'process 1:"python -m stockflow";thread (1);<module> (stockflow/x.py:1);_find_and_load (<frozen>:1) 5',
        "thread (2): compute_0;run (threading.py:1);load_rows (stockflow/kernels.py:64);helper (torch/x.py:9) 3",
        "thread (3): compute_1;run (threading.py:1);load_rows (stockflow/kernels.py:64) 4",
        "thread (4): read_0;_worker (concurrent/futures/thread.py:81) 2",
    ]
    assert stages.lines_running(stacks) == {
        ("MainThread", "imports"): 5,
        ("compute", "stockflow/kernels.py:64 load_rows"): 7,
        ("read", "between two jobs of its pool"): 2,
    }


@pytest.mark.slow
def test_a_merge_alone_imports_nothing_heavy_within_its_clock(tmp_path: Path):
    family = make_family(tmp_path, num_tuned=2, shapes=llama_shapes())
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    command = [sys.executable, "-m", "tests.benchmarks.preloaded", "merge", str(recipe), str(tmp_path / "out")]

    found = json.loads(run([*command, "--device", "cpu", "--json", "--quiet"]).stdout)

    assert found["report"]["outcome"] == "merged"
    assert not {"torch", "ray", "pyarrow", "rich", "yaml", "obstore", "s3fs"} & set(found["imported_late"])


@pytest.mark.slow
def test_the_cost_of_safety_is_measured(tmp_path: Path):
    command = [sys.executable, "-m", "tests.benchmarks.safety", "--gb", "0.004", "--rounds", "1"]

    found = json.loads(run([*command, "--folder", str(tmp_path / "work")]).stdout)

    assert found["medians_s"]["without both"] > 0
    assert found["within fsync"] > 0
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_one_whole_benchmark(tmp_path: Path):
    """Merges, floors and start-up are measured and one line is appended."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "tests.benchmarks.local_merge", "--rounds", "1", "--gb", "0.004", "--tuned", "2"]

    printed = run([*command, "--folder", str(tmp_path / "work"), "--results", str(results)]).stdout

    assert "merge alone : floor" in printed
    (line,) = results.read_text().splitlines()
    (found,) = json.loads(line)["cases"]
    floor, alone, process = (found["medians"][name] for name in ("floor", "alone", "process"))
    assert process["s"] > process["merge_s"] > 0
    assert found["ratios"]["alone_to_floor"] == pytest.approx(alone["s"] / floor["s"], rel=0.01)
    assert found["memory"]["peak_pss_mib"] > 100
    assert not list((tmp_path / "work").iterdir())
