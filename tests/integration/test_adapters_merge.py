"""Merges of adapters on one base: against the oracle, and the same bytes wherever and however they are made."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stockflow.forecast.amounts import survey
from stockflow.insight.comparison import compare_checkpoints
from stockflow.planning import file as plan_file
from stockflow.planning.factors import factor_bytes
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import MergeOptions, merge, plan_merge
from stockflow.run.executors.ray import RayOptions, connected
from stockflow.run.inputs import Inputs
from stockflow.run.places import survey_in_this_process
from stockflow.storage import StorageConfig
from stockflow.verification.sample import SampleOptions
from stockflow.verification.verify import verify
from tests import adapters, oracle, runs
from tests.adapters import Adapter, write_adapter
from tests.checkpoints import write_checkpoint
from tests.integration.test_audit import audited, options

MODULE = "model.layers.0.mlp"
SHAPES = {
    f"{MODULE}.up_proj.weight": (701, 416),
    f"{MODULE}.down_proj.weight": (33, 701),
    f"{MODULE}.gate_proj.weight": (3, 1),
    "model.layers.1.mlp.up_proj.weight": (5, 64),
    "model.norm.weight": (17,),
}
"""One of several spans, ragged in every block of a kernel; small ones; and one that no adapter changes."""
LENGTHY = f"{MODULE}.down_proj.weight"
LEAST_CORRECT = 0.9999


def tuned(number: int) -> Adapter:
    """Return the number-th adapter; the first two have rows of given lengths in one tensor."""
    made = adapters.linear(SHAPES, seed=number, r=7 - number)
    if number == 2:
        lengthy = adapters.with_lengths({LENGTHY: SHAPES[LENGTHY]})
        made.config["use_dora"] = True
        made.tensors |= {key: t for key, t in lengthy.tensors.items() if "lora_magnitude" in key}
        lengths = next(t for key, t in made.tensors.items() if "lora_magnitude" in key).double().numpy()
        plain = made.changes[LENGTHY]

        def scaled(w: adapters.Floats) -> adapters.Floats:
            summed = plain(w)
            return lengths[:, np.newaxis] * summed / np.linalg.norm(summed, axis=1, keepdims=True)

        made.changes[LENGTHY] = scaled
    return made


class Models:
    """A base, three adapters on it, and what they are in float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        random = torch.Generator().manual_seed(5)
        base = {name: (0.05 * torch.randn(shape, generator=random)).bfloat16() for name, shape in SHAPES.items()}
        write_checkpoint(folder / "base", base, num_shards=2)
        self.adapters = [tuned(number) for number in range(3)]
        for number, adapter in enumerate(self.adapters):
            write_adapter(folder / f"lora{number}", adapter)
        self.base = {name: tensor.double().numpy() for name, tensor in base.items()}
        self.sources = [adapter.of(self.base) for adapter in self.adapters]

    def recipe(self, method: str, root: str | None = None, **top_level: Any) -> Path:
        place = root or str(self.folder)
        models: list[dict[str, Any]] = [{"model": f"{place}/base+{place}/lora{number}"} for number in range(3)]
        if method in ("linear", "task_arithmetic"):
            for model, weight in zip(models, (0.5, 0.3, -0.2), strict=True):
                model["parameters"] = {"weight": weight}
        with_base = {} if method == "linear" else {"base_model": f"{place}/base"}
        recipe = {"merge_method": method, "models": models, "dtype": "bfloat16", **with_base, **top_level}
        path = self.folder / f"{method}-{abs(hash(str(recipe)))}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def expected(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The digests of Model Stock, merged in place."""
    output = tmp_path_factory.mktemp("expected") / "out"
    runs.merge_here(models.recipe("model_stock"), output, shard_size=300_000)
    return runs.shard_digests(output)


def share_correct(found: oracle.Stored, expected: oracle.Floats) -> float:
    right = oracle.widen(found.dtype, oracle.round_to(found.dtype, expected)).reshape(found.array.shape)
    return float((found.array == right).mean())


def by_oracle(method: str, base: oracle.Floats, sources: list[oracle.Floats]) -> oracle.Floats:
    if method == "model_stock":
        return oracle.model_stock(base, sources).out
    if method == "linear":
        return oracle.linear(sources, (0.5, 0.3, -0.2)).out
    if method == "task_arithmetic":
        return oracle.task_arithmetic(base, sources, (0.5, 0.3, -0.2)).out
    return oracle.ties(base, sources, densities=(1.0, 1.0, 1.0), weights=(1.0, 1.0, 1.0)).out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["model_stock", "linear", "task_arithmetic"])
def test_a_merge_of_adapters_is_that_of_the_models_they_make(
    method: str, dtype: str, models: Models, tmp_path: Path
) -> None:
    runs.merge_here(models.recipe(method, dtype=dtype), tmp_path / "out")

    found = oracle.load_checkpoint(tmp_path / "out")
    total = correct = 0.0
    for name, base in models.base.items():
        right = by_oracle(method, base, [source[name] for source in models.sources])
        correct += base.size * share_correct(found[name], right)
        total += base.size
    assert correct / total >= LEAST_CORRECT


def read_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stockflow.engine.inputs.ReadsInPlace", type("NoStore", (), {}))
    monkeypatch.setattr("stockflow.run.driver.ReadsInPlace", type("NoStore", (), {}))


@pytest.mark.parametrize(("num_threads", "memory"), [(1, 320), (3, 420), (2, 1024)])
@pytest.mark.parametrize("is_direct", [True, False], ids=["in place", "in slabs"])
def test_neither_threads_nor_memory_nor_how_it_is_read_change_a_bit(
    models: Models,
    expected: Mapping[str, str],
    num_threads: int,
    memory: int,
    is_direct: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_direct:
        read_in_slabs(monkeypatch)
    recipe, memory_bytes = models.recipe("model_stock"), memory * runs.MIB
    runs.merge_here(recipe, tmp_path / "out", memory_bytes=memory_bytes, num_threads=num_threads, shard_size=300_000)

    assert runs.shard_digests(tmp_path / "out") == expected


@pytest.mark.parametrize("room", [2**20, 120_000, 60_000, 0])
def test_factors_are_read_once_where_there_is_room_for_them(
    room: int,
    models: Models,
    expected: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_in_slabs(monkeypatch)
    monkeypatch.setattr("stockflow.planning.budget.FACTOR_BYTES", room)
    monkeypatch.setattr("stockflow.planning.budget.LEAST_FACTOR_BYTES", min(room, 1))
    monkeypatch.setattr("stockflow.planning.budget.CHUNK_SPANS", (1,))
    recipe, options = models.recipe("model_stock"), MergeOptions(1024 * runs.MIB, 2, "cpu", 300_000)
    announced = survey(*plan_merge(Inputs.open(load_recipe(str(recipe))), str(tmp_path / "out"), options))

    made = runs.merge_here(recipe, tmp_path / "out", shard_size=300_000)

    known = [each for each in made.plan.jobs if each.has_known_changes]
    once = sum(each.reading.num_bytes for each in made.plan.jobs)
    again = sum(size for size in map(factor_bytes, known) if size > room)
    found = made.manifest.summary["bytes_read"]
    if again:
        assert found >= once + again
    else:
        assert found == once == announced.num_bytes_read
    assert runs.shard_digests(tmp_path / "out") == expected


def test_a_plan_is_read_back_as_it_was_and_its_merge_verified(models: Models, tmp_path: Path) -> None:
    plan = runs.merge_here(models.recipe("model_stock"), tmp_path / "out").plan

    (path,) = (tmp_path / "out" / "_stockflow").glob("*/plan.json")
    found = plan_file.parse(path.read_bytes(), "plan.json")
    assert (found.plan_id, found.digest, found.copies_digest) == (plan.plan_id, plan.plan_id, plan.merge_id)
    assert [job.reading for job in found.plan.jobs] == [job.reading for job in plan.jobs]
    verified = verify(
        str(tmp_path / "out"), StorageConfig(), sample=SampleOptions(1.0, 1, 1024 * runs.MIB + runs.grown_bytes(), 1)
    )
    assert not verified.findings


def test_an_adapter_that_changes_after_planning_is_noticed(models: Models, tmp_path: Path) -> None:
    plan = runs.merge_here(models.recipe("linear"), tmp_path / "out").plan

    for reference in plan.checkpoints:
        assert {"+adapter_config.json", "+adapter_model.safetensors"} <= reference.files.keys()


def test_a_killed_merge_resumes_to_the_same_bytes(models: Models, expected: Mapping[str, str], tmp_path: Path) -> None:
    recipe, output = models.recipe("model_stock"), tmp_path / "out"

    def stopped(spec: Any, shards: Any, on_event: Any) -> Any:
        yield next(iter(places.in_this_process(spec, shards, on_event)))
        raise KeyboardInterrupt

    options = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", 300_000)
    with pytest.raises(KeyboardInterrupt):
        merge(Inputs.open(load_recipe(str(recipe))), str(output), options, stopped)

    assert runs.merge_here(recipe, output, shard_size=300_000).num_resumed in (1, 2)
    assert runs.shard_digests(output) == expected


@pytest.mark.slow
def test_from_s3_to_s3_on_ray_the_bytes_are_those_on_disk(
    models: Models, expected: Mapping[str, str], s3_endpoint: str
) -> None:
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.create_bucket(Bucket="adapters")
    for path in (each for each in models.folder.rglob("*") if each.is_file()):
        s3.put_object(Bucket="adapters", Key=str(path.relative_to(models.folder)), Body=path.read_bytes())
    options = {"storage": {"s3://adapters/": {"endpoint": s3_endpoint, "region": "us-east-1"}}}
    recipe = models.recipe("model_stock", "s3://adapters", stockflow=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray_options = RayOptions(num_workers=2)
        with connected(ray_options, 2):
            given = MergeOptions(900 * runs.MIB, 1, "cpu", 300_000, holds_plan=False)
            on_ray = partial(places.on_ray, options=ray_options)
            merge(Inputs.open(load_recipe(str(recipe))), "s3://adapters/out", given, on_ray)

    listed = s3.list_objects_v2(Bucket="adapters", Prefix="out/model-", MaxKeys=1000)
    found = {each["Key"].removeprefix("out/") for each in listed["Contents"]}
    assert found == expected.keys() - {"model.safetensors.index.json"}
    runs.merge_here(recipe, models.folder / "from-s3", shard_size=300_000)
    assert runs.shard_digests(models.folder / "from-s3") == expected


def test_changes_of_low_rank_are_known_from_factors_and_the_base_is_read_once(models: Models, tmp_path: Path) -> None:
    result = runs.merge_here(models.recipe("model_stock"), tmp_path / "out")

    facts = runs.tensor_facts(tmp_path / "out")
    jobs = {job.output.name: job for job in result.plan.jobs}
    for name, base in models.base.items():
        sources = [source[name] for source in models.sources]
        right = oracle.model_stock(base, sources).facts
        is_known = name != LENGTHY
        assert jobs[name].num_statistic_passes == int(not is_known)
        if name != "model.norm.weight":
            assert facts[name]["ratio"] == pytest.approx(float(right["ratio"][0]), abs=1e-9 if is_known else 1e-4)
        assert facts[name]["base_norm"] == pytest.approx(float(np.linalg.norm(base)), rel=1e-12)
        norms = [float(np.linalg.norm(source - base)) for source in sources]
        assert facts[name]["delta_norms"] == pytest.approx(norms, rel=1e-9 if is_known else 1e-4)
    (receipt,) = runs.receipts(tmp_path / "out")
    base_bytes = sum(2 * values.size for values in models.base.values())
    factors = sum(4 * tensor.numel() for adapter in models.adapters for tensor in adapter.tensors.values())
    assert receipt["bytes_read"] >= base_bytes + factors
    again = jobs[f"{MODULE}.up_proj.weight"].reading.run_bytes * 2
    assert receipt["bytes_read"] <= base_bytes + jobs[LENGTHY].reading.num_bytes + 3 * factors + again
    told = sum(
        4 * tensor.numel() for each in models.adapters for key, tensor in each.tensors.items() if "down_proj" not in key
    )
    assert [str(each) for each in result.plan.remarks if each.code == "adapters"] == [
        f"4 of 5 tensors take no statistics pass: their changes are products of low rank, and {told / 1000:.1f} kB of "
        "factors tell their geometry. What models have of one base is read once"
    ]


@pytest.mark.parametrize("method", ["model_stock", "task_arithmetic"])
def test_adapters_that_add_nothing_leave_every_bit_of_the_base(method: str, tmp_path: Path) -> None:
    """The sign of its zeros, too."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (9, 70)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    base[::2, ::3], base[1::2, ::3] = -0.0, 0.0
    write_checkpoint(tmp_path / "base", {name: base})
    for number in range(2):
        adapter = adapters.linear({name: shape}, seed=number)
        adapter.tensors |= {key: 0 * tensor for key, tensor in adapter.tensors.items() if number or "lora_B" in key}
        write_adapter(tmp_path / f"lora{number}", adapter)
    models = [{"model": f"{tmp_path}/base+{tmp_path}/lora{n}", "parameters": {"weight": 0.7}} for n in range(2)]
    recipe = {"merge_method": method, "base_model": f"{tmp_path}/base", "models": models, "dtype": "bfloat16"}
    recipe |= {"stockflow": {"accept": ["same-samples"]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name].view(torch.int16), base.view(torch.int16))


@pytest.mark.parametrize("method", ["ties", "slerp", "nuslerp", "karcher"])
def test_other_methods_take_what_adapters_make_of_the_base(method: str, models: Models, tmp_path: Path) -> None:
    given: dict[str, Any] = {"parameters": {"t": 0.5}} if method == "slerp" else {}
    recipe = yaml.safe_load(models.recipe(method).read_text()) | given
    if method == "karcher":
        del recipe["base_model"]
    recipe["models"] = recipe["models"][:1] if method == "slerp" else recipe["models"]
    recipe["models"] = recipe["models"][:2] if method == "nuslerp" else recipe["models"]
    for model in recipe["models"] if method in ("ties", "nuslerp") else ():
        model["parameters"] = {"weight": 0.5, **({"density": 0.6} if method == "ties" else {})}
    whole = []
    for number, source in enumerate(models.sources):
        folder = tmp_path / f"whole{number}"
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in source.items()}
        whole.append(str(write_checkpoint(folder, {name: tensor.float() for name, tensor in tensors.items()})))
    dense = recipe | {"models": [each | {"model": model} for each, model in zip(recipe["models"], whole, strict=False)]}
    for name, content in (("adapted", recipe), ("dense", dense)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        runs.merge_here(tmp_path / f"{name}.yaml", tmp_path / name)

    found, expected = (oracle.load_checkpoint(tmp_path / name) for name in ("adapted", "dense"))
    for name, (_, values) in expected.items():
        assert (found[name].array == values).mean() >= 0.999, name


def test_audit_and_diff_look_at_what_adapters_make_of_the_base(models: Models, tmp_path: Path) -> None:
    runs.merge_here(models.recipe("model_stock"), tmp_path / "out")
    whole = {name: torch.from_numpy(np.ascontiguousarray(values)).float() for name, values in models.sources[0].items()}
    write_checkpoint(tmp_path / "whole", whole)

    found = audited(models.recipe("model_stock"), tmp_path / "out")
    adapted = f"{models.folder}/base + {models.folder}/lora0"
    differing = compare_checkpoints(
        str(tmp_path / "whole"), adapted, StorageConfig(), options(), survey_in_this_process
    )

    for row in found.rows:
        assert row["equal_share"] >= 0.999, row["name"]
    for each in differing.tensors:
        assert each.distance <= 1e-6 * each.norm_a, each.name
