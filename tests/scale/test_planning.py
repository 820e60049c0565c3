"""Planning 92,000 names in 163 files of nine checkpoints, on disk and on S3: ``make test-scale ARGS=-s``."""

import json
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from safetensors.numpy import save

NUM_NAMES = 92_000
NUM_FILES = 163
NUM_CHECKPOINTS = 9
MOST_BYTES = 2**30

pytestmark = [pytest.mark.scale, pytest.mark.timeout(900)]


def expert_names() -> list[str]:
    projections = ("gate_proj", "up_proj", "down_proj")
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for layer in range(61)
        for expert in range(500)
        for projection in projections
    ]
    return [*names, *(f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(NUM_NAMES - len(names)))]


def files_of_a_checkpoint() -> dict[str, bytes]:
    """Real headers over tensors of one element each, BF16 as the format knows it."""
    names = expert_names()
    per_file = -(-len(names) // NUM_FILES)
    files, weight_map = {}, {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        part = names[number * per_file : (number + 1) * per_file]
        content = save({name: np.zeros((1, 1), np.float16) for name in part}, {"format": "pt"})
        files[file] = content.replace(b'"dtype":"F16"', b'"dtype":"BF16"')
        if len(files[file]) != len(content):  # the longer name moved the data: mend the length of the header
            header = len(files[file]) - 8 - 2 * len(part)
            padding = -header % 8
            body = files[file][8 : 8 + header] + b" " * padding
            files[file] = len(body).to_bytes(8, "little") + body + bytes(2 * len(part))
        weight_map |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = b'{"torch_dtype": "bfloat16"}'
    return files


def of_model(number: int, content: bytes) -> bytes:
    """Return a file of one of the models: the last element tells them apart."""
    return content[:-2] + (16_000 + number).to_bytes(2, "little")


def recipe_over(folders: list[str], path: Path) -> Path:
    models = "".join(f"- model: {folder}\n" for folder in folders[1:])
    path.write_text(f"merge_method: model_stock\nbase_model: {folders[0]}\nmodels:\n{models}")
    return path


def plan(recipe: Path, output: str) -> None:
    """Plan in a process of its own; print how long it took and how much memory, and hold the latter to the bound."""
    command = [sys.executable, "-m", "stockflow", "plan", str(recipe), output, "--memory", "4GiB"]
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    wrapper = f"import subprocess, sys; subprocess.run({command!r}, check=True, stdout=sys.stderr); {peak}"
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", wrapper], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    seconds, num_bytes = time.perf_counter() - started, int(finished.stdout)
    print(f"\n{recipe.stem}: {seconds:.1f} s, {num_bytes / 2**20:.0f} MiB\n{finished.stderr}")

    assert f"tensors {NUM_NAMES}" in finished.stderr
    assert num_bytes <= MOST_BYTES


def test_on_disk(tmp_path: Path) -> None:
    files = files_of_a_checkpoint()
    folders = [tmp_path / str(number) for number in range(NUM_CHECKPOINTS)]
    for folder in folders:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(of_model(int(folder.name), content) if "-of-" in name else content)

    plan(recipe_over([str(folder) for folder in folders], tmp_path / "disk.yaml"), str(tmp_path / "out"))


def test_on_s3(tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    files = files_of_a_checkpoint()
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    for number in range(NUM_CHECKPOINTS):
        for name, content in files.items():
            body = of_model(number, content) if "-of-" in name else content
            s3.put_object(Bucket=s3_bucket, Key=f"{number}/{name}", Body=body)
    folders = [f"s3://{s3_bucket}/{number}" for number in range(NUM_CHECKPOINTS)]
    recipe = recipe_over(folders, tmp_path / "s3.yaml")
    recipe.write_text(
        f"{recipe.read_text()}stockflow: {{storage: {{'s3://{s3_bucket}/': {{endpoint: '{s3_endpoint}'}}}}}}\n"
    )

    plan(recipe, f"s3://{s3_bucket}/out")
