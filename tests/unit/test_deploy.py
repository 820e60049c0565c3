"""What `deploy/` promises, as far as it can be checked without Kubernetes, Docker and AWS."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from stockflow import __version__
from stockflow.storage.faults import _ACTIONS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
SCHEMA = REPOSITORY.parent / "shared" / "kuberay" / "rayjob.schema.json"
CONSTRAINTS = dict(
    line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
)


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())}


@pytest.fixture(scope="module")
def job() -> Any:
    return documents()["RayJob"]


def pods(job: Any) -> Iterator[Any]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def containers(job: Any) -> list[Any]:
    return [container for pod in pods(job) for container in pod["containers"]]


def seconds_of(pod: Any, name: str) -> int:
    values = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    return int(values[name])


def test_the_job_has_the_shape_that_kuberay_declares(job: Any) -> None:
    if not SCHEMA.exists():
        pytest.skip(f"KubeRay's schema is not at {SCHEMA}; it is Apache-2.0 data that is not part of this repository")

    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(job)


def test_the_schema_notices_a_misspelt_field(job: Any) -> None:
    if not SCHEMA.exists():
        pytest.skip(f"KubeRay's schema is not at {SCHEMA}")
    misspelt = {**job, "spec": {**job["spec"], "backofLimit": 1}}

    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(misspelt)


def test_the_job_follows_the_operators_unwritten_rules(job: Any) -> None:
    """The operator refuses or ignores these at run time; no schema says so (ray.md 3.2, KubeRay 1.7.0)."""
    spec = job["spec"]

    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True, "ttlSecondsAfterFinished needs it"
    assert spec["ttlSecondsAfterFinished"] > 0
    assert not {"deletionStrategy", "clusterSelector", "suspend", "submitterPodTemplate"} & spec.keys()


def test_ray_is_the_version_that_was_tested(job: Any) -> None:
    cluster = job["spec"]["rayClusterSpec"]

    assert cluster["rayVersion"] == CONSTRAINTS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert all(f":{__version__}-ray{CONSTRAINTS['ray']}-" in container["image"] for container in containers(job))


def test_the_head_computes_nothing_and_workers_come_when_they_are_asked_for(job: Any) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]

    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert all(pod["restartPolicy"] == "Never" for pod in pods(job)), "the autoscaler v2 demands it"


def test_pods_get_what_they_ask_for_and_no_more(job: Any) -> None:
    assert all(container["resources"]["limits"] == container["resources"]["requests"] for container in containers(job))


def test_a_node_that_must_go_has_time_to_drain(job: Any) -> None:
    _, worker = pods(job)

    assert worker["terminationGracePeriodSeconds"] > seconds_of(worker, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")


def test_pods_run_without_privileges_under_a_service_account_that_is_there(job: Any) -> None:
    for pod in pods(job):
        assert pod["serviceAccountName"] == documents()["ServiceAccount"]["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_entrypoint_is_plain_words_that_the_command_line_takes(job: Any) -> None:
    """It passes through a shell; and an option that is gone would cost a cluster to find out."""
    from typer.main import get_command

    from stockflow.cli import app

    words = shlex.split(job["spec"]["entrypoint"])
    command: Any = get_command(app)
    merge = command.commands["merge"]
    options = merge.make_context("merge", words[2:]).params

    assert words == job["spec"]["entrypoint"].split()
    assert words[:2] == ["stockflow", "merge"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert options["workers"] * options["gpus_per_worker"] == group["maxReplicas"] * gpus


def test_no_secret_is_written_down() -> None:
    for path in DEPLOY.iterdir():
        assert not re.search(r"AKIA|SECRET_ACCESS_KEY|SESSION_TOKEN|secretKeyRef", path.read_text()), path


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


def test_the_image_pins_its_base_and_its_packages() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    by_name: dict[str, list[str]] = {}
    for name, rest in instructions:
        by_name.setdefault(name, []).append(rest)

    assert by_name["ARG"] == [f"BASE_IMAGE=rayproject/ray:{CONSTRAINTS['ray']}-py311"]
    assert {source.split()[0] for source in by_name["FROM"]} == {"${BASE_IMAGE}"}
    assert by_name["USER"] == ["1000"]
    installs = [line for line in by_name["RUN"] if "pip install" in line]
    assert installs
    assert all("--constraint /tmp/constraints.txt" in line for line in installs)
    assert by_name["RUN"][-1].startswith("stockflow --version")


def test_the_image_is_built_from_files_that_exist_and_are_sent() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sources = {
        word.removeprefix("./")
        for line in (DEPLOY / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    }

    assert {"constraints.txt", "pyproject.toml", "stockflow"} <= sources
    assert all((REPOSITORY / source).exists() and f"!{source}" in ignored for source in sources)
