"""The command line: what it prints where, its exit codes, and that no mistake of a user ever shows a traceback."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import Result

from stockflow import __version__
from stockflow.cli import app
from stockflow.cli.exits import exit_codes
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.runs import REPOSITORY, command, run
from tests.waiting import HANG_S

SHAPES = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "lm_head.weight": (40, 16)}
COMMANDS = ("merge", "plan", "lint", "verify", "diff", "extract", "demo", "schema")


def cli(*arguments: object) -> Result:
    """Run a command in this process."""
    result = runs.invoke(*arguments)
    assert "Traceback" not in result.output
    return result


class World:
    """A family of checkpoints and a recipe for it, to be spoilt."""

    def __init__(self, root: Path, family: Family, recipe: Path) -> None:
        self.root = root
        self.base, (self.one, self.two) = family.base, family.tuned
        self.recipe = recipe
        self.output = root / "out"

    def merged(self) -> "World":
        assert cli("merge", self.recipe, self.output, "--quiet").exit_code == 0
        return self

    def with_recipe(self, text: str) -> "World":
        self.recipe.write_text(text)
        return self


@pytest.fixture
def world(tmp_path: Path) -> World:
    family = make_family(tmp_path, 2, SHAPES, buffers=False)
    return World(tmp_path, family, write_recipe(tmp_path / "recipe.yaml", "model_stock", family))


# -------------------------------------------------------------------------------------- help and entry points


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = cli(name, "--help")

    assert result.exit_code == 0
    assert re.search(rf"^Usage: \S+ {name} ", result.stdout)
    parameters = {parameter.name: parameter for parameter in typer.main.get_command(app).commands[name].params}  # type: ignore[attr-defined]
    assert all(parameter.help for parameter in parameters.values())
    assert typer.main.get_command(app).commands[name].help  # type: ignore[attr-defined]


def test_the_list_of_commands_is_complete() -> None:
    registered = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]

    assert set(COMMANDS) <= registered
    for text in (cli("--help").stdout, cli().output):
        assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in registered)
        assert "Exit codes" in text


def test_help_imports_nothing_heavy() -> None:
    """So it is quick, on any machine."""
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
        heavy = {"torch", "ray", "numpy", "yaml", "fsspec", "s3fs", "obstore", "pyarrow", "safetensors"}
        if len(arguments) == 1:
            heavy.add("pydantic")  # typer itself imports it to show the options of a command
        assert modules_after(*arguments) & heavy == set()


def modules_after(*arguments: object) -> set[str]:
    """Top-level modules that a command has imported when it ends."""
    code = (
        "import sys\nfrom stockflow.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    code = end.code or 0\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\nsys.exit(code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(finished.stderr.splitlines()[-1].split())


def test_planning_verifying_and_finished_merges_need_neither_torch_nor_ray(world: World) -> None:
    world.merged()

    for arguments in (
        ["plan", world.recipe, world.root / "elsewhere"],
        ["plan", world.recipe, world.output, "--json"],
        ["merge", world.recipe, world.output],
        ["verify", world.output, "--inputs"],
        ["schema"],
    ):
        assert modules_after(*arguments) & {"torch", "ray"} == set(), arguments


def test_the_version_is_the_packages() -> None:
    assert cli("--version").stdout == f"stockflow {__version__}\n"
    assert run("--version").stdout == f"stockflow {__version__}\n"


def test_the_console_script_is_the_command_line() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    installed = Path(sys.executable).with_name("stockflow")
    start = "import sys; from stockflow.cli import main; sys.argv[0] = 'stockflow'; main()"

    assert scripts == {"stockflow": "stockflow.cli:main"}
    for program in ([installed],) if installed.exists() else ([sys.executable, "-c", start],):
        finished = subprocess.run([*program, "--version"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert finished.stdout == f"stockflow {__version__}\n"


def test_the_schema_is_json() -> None:
    schema = json.loads(cli("schema").stdout)

    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "merge_method" in schema["properties"]


# --------------------------------------------------------------------------------------------- what is printed


def test_plan_prints_what_will_happen_and_writes_nothing(world: World) -> None:
    before = sorted(world.root.rglob("*"))

    lines = cli("plan", world.recipe, world.output).stdout

    assert f"input   {world.base}: 1 file," in lines
    assert "tensors 3: 3 by model_stock; 0 skipped" in lines
    for word in ("output", "read", "requests", "passes", "memory"):
        assert word in lines
    assert before == sorted(world.root.rglob("*"))


def test_plan_says_when_workers_would_idle(world: World) -> None:
    """Three tensors of 1,280, 32 and 1,280 bytes."""
    on_ray = ("--executor", "ray", "--memory", "1GiB")

    one = cli("plan", world.recipe, world.output, *on_ray, "--workers", 1).stdout
    enough = cli("plan", world.recipe, world.output, *on_ray, "--workers", 1, "--shard-size", "10").stdout

    assert (
        "1 shard for 1 worker: with fewer than 4 each, some idle at the end, and the largest tensor has 1.28 kB" in one
    )
    assert "3 shards for 1 worker" in enough
    assert "some idle at the end" not in cli("plan", world.recipe, world.output, "--workers", 1).stdout


def test_plan_as_json(world: World) -> None:
    plan = json.loads(cli("plan", world.recipe, world.output, "--json", "--shard-size", "2000").stdout)

    assert plan.keys() >= {
        "plan_id", "merge_id", "checkpoints", "shards", "tensors", "methods", "skipped", "side_files", "source_bytes",
        "bytes_to_read", "bytes_to_write", "requests", "passes", "projected_memory_bytes", "notes",
    }  # fmt: skip
    assert plan["tensors"] == sum(shard["tensors"] for shard in plan["shards"]) == 3
    assert plan["bytes_to_write"] == sum(shard["bytes"] for shard in plan["shards"])
    assert plan["source_bytes"] == plan["bytes_to_read"] == 3 * 2 * (40 * 16 * 2 + 16)
    assert [str(world.base), str(world.one), str(world.two)] == [entry["url"] for entry in plan["checkpoints"]]
    assert len(plan["shards"]) == 2
    assert plan["passes"] == {"1": 3}


def test_merge_as_json_agrees_with_plan_and_verify(world: World) -> None:
    world.recipe.write_text(world.recipe.read_text() + "\nstockflow: {copy_tokenizer: false}\n")
    plan = json.loads(cli("plan", world.recipe, world.output, "--json").stdout)

    first = cli("merge", world.recipe, world.output, "--json")
    again = cli("merge", world.recipe, world.output, "--json")
    verified = cli("verify", world.output, "--inputs", "--json")

    result = json.loads(first.stdout)
    assert result["outcome"] == "merged"
    assert result["output"] == str(world.output)
    assert (result["plan_id"], result["merge_id"]) == (plan["plan_id"], plan["merge_id"])
    assert result["resumed_shards"] == 0
    assert list(result["shards"]) == ["model.safetensors"]
    assert result["summary"]["tensors"] == 3
    assert result["remarks"] == plan["remarks"]
    assert [remark["code"] for remark in result["remarks"]] == ["not-copied"]
    assert json.loads(again.stdout) | {"seconds": 0, "resumed_shards": 0} == result | {
        "seconds": 0, "outcome": "already_finished",
    }  # fmt: skip
    assert json.loads(verified.stdout) == {"output": str(world.output), "plan_id": plan["plan_id"], "findings": []}
    assert "merging 1 shard" in first.stderr


def test_merge_prints_a_summary_and_where_to_go_next(world: World) -> None:
    first = cli("merge", world.recipe, world.output)
    again = cli("merge", world.recipe, world.output)

    assert "merged 3 tensors" in first.stdout
    assert "peak memory" in first.stdout
    assert first.stdout.splitlines()[-2:] == [f"output: {world.output}", f"next: stockflow verify {world.output}"]
    assert "already finished" in again.stdout
    assert first.exit_code == again.exit_code == 0
    assert "verified" in cli("verify", world.output).stdout


def test_quiet_prints_nothing(world: World) -> None:
    for arguments in (["merge", world.recipe, world.output], ["verify", world.output]):
        assert cli(*arguments, "--quiet").output == ""


def test_a_recipe_from_standard_input(world: World) -> None:
    finished = subprocess.run(
        command("plan", "-", world.output),
        cwd=REPOSITORY,
        input=world.recipe.read_bytes(),
        capture_output=True,
        check=True,
    )

    assert b"3 by model_stock" in finished.stdout


def test_as_a_process_it_merges_and_verifies(world: World) -> None:
    merged = run("merge", world.recipe, world.output, "--memory", "1GiB", "--workers", 1, "--device", "cpu")

    assert merged.returncode == 0, merged.stderr
    assert "opening checkpoints" in merged.stderr
    assert re.sub(r"checking .*: for \d+ s\n", "", cli("verify", world.output).stderr) == ""  # a busy machine
    assert load_file(world.output / "model.safetensors").keys() == SHAPES.keys()


# ----------------------------------------------------------------------------------------------- exit code 2


def spoil(name: str, payload: bytes) -> Callable[[World], None]:
    def change(world: World) -> None:
        (world.one / name).write_bytes(payload)

    return change


def other_shape(world: World) -> None:
    tensors = load_file(world.one / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(17, dtype=torch.bfloat16)}, world.one / "model.safetensors")


def not_a_number(world: World) -> None:
    tensors = load_file(world.one / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, world.one / "model.safetensors")


def empty_folder(world: World) -> None:
    for path in world.two.iterdir():
        path.unlink()


def no_recipe(world: World) -> None:
    world.recipe.unlink()


def folder_as_recipe(world: World) -> None:
    world.recipe.unlink()
    world.recipe.mkdir()


def another_merge(world: World) -> None:
    world.merged()
    world.recipe.write_text(world.recipe.read_text() + "dtype: float32\n")


def foreign_file(world: World) -> None:
    world.output.mkdir()
    (world.output / "thesis.tex").write_text("")


def foreign_manifest(world: World) -> None:
    world.output.mkdir()
    (world.output / "manifest.json").write_text('{"name": "my web app"}')


MISTAKES: dict[str, tuple[Callable[[World], object], str]] = {
    "no model folder": (
        lambda world: shutil.rmtree(world.two), r"there is no checkpoint at .*/tuned-2: the folder does not exist",
    ),
    "an empty model folder": (
        empty_folder, "does not exist or is empty",
    ),
    "no such recipe": (no_recipe, "cannot read .*/recipe.yaml: no such file"),
    "a folder as recipe": (
        folder_as_recipe, "recipe.yaml is a folder; expected a YAML file",
    ),
    "an empty recipe": (lambda world: world.with_recipe(""), "recipe.yaml:1:1: expected a mapping"),
    "no YAML": (lambda world: world.with_recipe("a: [1\n"), "recipe.yaml:1:4: not valid YAML: the `.` here"),
    "no UTF-8": (lambda world: world.recipe.write_bytes(b"a: \xff\n"), "recipe.yaml:1:4: expected UTF-8"),
    "an unknown key": (
        lambda world: world.with_recipe(world.recipe.read_text() + "stockflow: {scpoe: row}\n"),
        "unknown key; did you mean `scope`",
    ),
    "a typo in the method": (
        lambda world: world.with_recipe(world.recipe.read_text().replace("model_stock", "model_stonk")),
        "unknown method 'model_stonk'; did you mean `model_stock`",
    ),
    "a truncated weight file": (
        lambda world: os.truncate(world.one / "model.safetensors", 100), r"tuned-1/model.safetensors .*truncated",
    ),
    "weights that are a pickle": (spoil("model.safetensors", b"PK\x03\x04" * 99), "is a PyTorch file"),
    "a malformed config": (
        lambda world: (world.base / "config.json").write_text("{"), "base/config.json is not valid JSON",
    ),
    "another shape": (other_shape, r"'model.norm.weight' is \[17\] in .*/tuned-1, expected \[16\] as in .*/base"),
    "a file as output": (lambda world: world.output.write_text(""), "out is a file. Choose another output"),
}  # fmt: skip
MERGE_MISTAKES: dict[str, tuple[Callable[[World], object], str]] = {
    "NaN in an input": (not_a_number, r"'model.norm.weight'.*tuned-1.*3"),
    "an output of another plan": (another_merge, "finished output of another plan .*--overwrite"),
    "an output full of other things": (foreign_file, "not empty .*thesis.tex.*--overwrite"),
    "an output with a foreign manifest": (foreign_manifest, "not a manifest of stockflow.*--overwrite"),
}


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    begun = ("opening checkpoints", "planning", "warning: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(begun)]
    assert lines[0].startswith("stockflow: ") or lines[0].startswith(("looking", "merging"))
    assert re.search(message, result.stderr, re.DOTALL), result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_planning_finds(world: World, mistake: str) -> None:
    spoil_it, message = MISTAKES[mistake]
    spoil_it(world)

    assert_refused(cli("plan", world.recipe, world.output), message)
    assert_refused(cli("merge", world.recipe, world.output), message)
    assert not world.output.is_dir()


@pytest.mark.parametrize("mistake", MERGE_MISTAKES)
def test_mistakes_that_merging_finds(world: World, mistake: str) -> None:
    spoil_it, message = MERGE_MISTAKES[mistake]
    spoil_it(world)
    before = sorted(world.output.glob("*.safetensors"))

    assert_refused(cli("merge", world.recipe, world.output), message)

    assert before == sorted(world.output.glob("*.safetensors"))


@pytest.mark.parametrize("mistake", ["another_merge", "foreign_file", "foreign_manifest"])
def test_overwrite_replaces_what_was_refused(world: World, mistake: str) -> None:
    {"another_merge": another_merge, "foreign_file": foreign_file, "foreign_manifest": foreign_manifest}[mistake](world)

    assert cli("merge", world.recipe, world.output, "--overwrite", "--quiet").exit_code == 0

    assert cli("verify", world.output).exit_code == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("{base}", "is, or lies in, the input"),
        ("{base}/merged", "is, or lies in, the input"),
        ("{one}/../tuned-1/x", "is, or lies in, the input"),
        ("{root}/link/x", "is, or lies in, the input"),
        ("{root}", "lies in the output {root}, of which loaders and `verify` would take it for a part"),
        ("http://example.com/x", "http://, which stockflow only reads"),
        ("hf://org/name", "hf://, which stockflow only reads"),
        ("s3:/bucket/x", "'s3:/bucket/x' is no URL; did you mean 's3://bucket/x'"),
        ("s4://bucket/x", "s4:// is no scheme of a store; did you mean s3://"),
    ],
)
def test_outputs_that_cannot_be(world: World, output: str, message: str) -> None:
    (world.root / "link").symlink_to(world.two)
    place = output.format(root=world.root, base=world.base, one=world.one)

    assert_refused(cli("plan", world.recipe, place), message.format(root=world.root))
    assert_refused(cli("merge", world.recipe, place), message.format(root=world.root))


def test_a_url_that_lost_a_slash_is_no_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family = {"base": world.base, "one": world.one, "out": world.output, "recipe": world.recipe}
    for words in (
        "status {}", "verify {}", "clean {}", "report {}", "diff {} {one}", "diff {one} {}", "plan {} {out}",
        "audit {recipe} {}", "extract {base} {} {out}", "extract {base} {one} {} --rank 2", "lint {}", "demo {}",
        "merge {recipe} {}", "mergekit-yaml {recipe} {}", "calibrate --folder {}", "calibrate --out {}",
        "submit {recipe} {} --address http://127.0.0.1:9",
    ):  # fmt: skip
        result = cli(*(word.format("s3:/b/x", **family) for word in words.split()))

        assert result.exit_code == 2, words
        assert "is no URL; did you mean 's3://b/x'? A folder of that name is './s3:/b/x'" in result.output, words
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "much"], "--memory: expected a size such as 5GB"),
        (["--memory", "0"], "--memory: expected a size"),
        (["--memory", ""], "--memory: expected a size"),
        (
            ["--memory", "100MB"],
            "needs at least 304 MiB of memory, which compiling .* is 95 MiB. Raise",
        ),
        (["--memory", "100"], "the limit is 100 bytes, as a number without a unit counts bytes. Raise --memory"),
        (["--shard-size", "-5GB"], "--shard-size: expected a size"),
    ],
)
def test_options_that_cannot_be(world: World, options: list[str], message: str) -> None:
    assert_refused(cli("plan", world.recipe, world.output, *options), message)
    assert_refused(cli("merge", world.recipe, world.output, *options), message)


def test_a_label_that_is_none(world: World) -> None:
    result = cli("merge", world.recipe, world.output, "--executor", "ray", "--label", "spot")

    assert_refused(result, "--label spot: expected KEY=VALUE, such as pool=spot")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["plan"],
        ["plan", "recipe.yaml"],
        ["plan", "recipe.yaml", "out", "--workers", "0"],
        ["plan", "recipe.yaml", "out", "--workers", "two"],
        ["plan", "recipe.yaml", "out", "--device", "tpu"],
        ["plan", "recipe.yaml", "out", "--memroy", "1GB"],
        ["plan", "recipe.yaml", "out", "too many"],
        ["verify"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = cli(*arguments)

    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "--help" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(world: World) -> None:
    result = cli("merge", world.recipe, world.output, "--device", "cuda")

    assert_refused(result, "--device cuda: torch sees no CUDA device here")
    assert not world.output.exists()


def test_verifying_what_is_no_output(world: World) -> None:
    (world.root / "file").write_text("")
    (world.root / "empty").mkdir()

    for place, said in (
        ("nowhere", "there is nothing. Check the place"), ("file", "there is nothing"), ("empty", "there is nothing"),
        ("base", "it is a checkpoint that stockflow did not make"),
    ):  # fmt: skip
        assert_refused(cli("verify", world.root / place), f"{place} has no manifest.json: {said}")


@pytest.mark.parametrize("command", ["plan", "merge", "mergekit-yaml"])
def test_a_recipe_in_the_place_of_the_output(world: World, command: str) -> None:
    assert_refused(cli(command, world.output, world.recipe), "RECIPE and OUTPUT changed places: .*recipe.yaml looks")


def test_a_demo_where_it_cannot_be(world: World) -> None:
    (world.root / "file").write_text("")

    assert_refused(cli("demo", world.base), "base is not an empty folder; name a new one")
    assert_refused(cli("demo", world.root / "file"), "file is not an empty folder; name a new one")


# ------------------------------------------------------------------------------------------- other exit codes


def test_a_limit_on_the_size_of_files_is_2_and_running_without_it_finishes(world: World) -> None:
    arguments = ("merge", world.recipe, world.output, "--device", "cpu")
    failed = subprocess.run(
        command(*arguments),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)),
    )

    assert failed.returncode == 2, failed.stderr
    assert re.search(r"stockflow: cannot write .*: File too large; .*smaller --shard-size", failed.stderr)
    assert "Traceback" not in failed.stderr
    assert list(world.output.glob("*.safetensors")) == []
    assert cli(*arguments).exit_code == 0
    assert cli("verify", world.output).exit_code == 0


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, ("merge", "-", "out")), (signal.SIGTERM, ("inspect", "-"))]
)
def test_a_signal_is_128_and_its_number(number: signal.Signals, words: tuple[str, ...]) -> None:
    """What has not begun, and what begins anew, does not promise to resume."""
    run = command(*words, "--progress", "json")
    waiting = subprocess.Popen(run, cwd=REPOSITORY, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    assert json.loads(waiting.stderr.readline())["stage"] == "opening checkpoints"
    assert waiting.stdin is not None
    waiting.stdin.write("#" * 200_000)  # more than a pipe holds: part of it has been read when this returns
    waiting.stdin.flush()

    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=HANG_S)

    assert waiting.returncode == 128 + number
    assert json.loads(said.splitlines()[-1])["message"] == f"stopped by {number.name}; run the same command again"


def test_a_finding_is_4(world: World) -> None:
    world.merged()
    (world.output / "extra.safetensors").write_bytes(b"")

    result = cli("verify", world.output, "--quiet")

    assert result.exit_code == 4
    assert "extra.safetensors: is not in the manifest" in result.stdout


def test_a_bug_is_70_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, exit_codes():
        raise RuntimeError("the unforeseen")

    assert caught.value.exit_code == 70
    assert "the unforeseen" in capsys.readouterr().err.replace("Traceback", "")


@pytest.mark.parametrize("arguments", [["schema"], ["--help"]])
def test_a_reader_that_goes_away_is_no_error_of_ours(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(command(*arguments), cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)

    assert b"Traceback" not in finished.stderr
    assert finished.returncode != 70
