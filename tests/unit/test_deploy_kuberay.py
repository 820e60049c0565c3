"""The manifests of `deploy/`, as far as they can be checked without Kubernetes: shape, rules, rights, resources."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from typer.main import get_command

from stockflow import __version__
from stockflow.cli import app
from tests import kustomize
from tests.kuberay_rules import OPERATOR_LABELS, allocatable, asked, late_labels, refusals

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
OVERLAYS = sorted((DEPLOY / "kustomize" / "overlays").iterdir())
COMPONENTS = sorted((DEPLOY / "kustomize" / "components").iterdir())
SCHEMAS = [folder / "shared" / "kuberay" / "rayjob.schema.json" for folder in REPOSITORY.parents]
"""where it may be: beside this repository, or beside the folder of its worktrees"""
CONSTRAINTS = dict(
    line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
)
KUBERNETES = "1.33"

Documents = dict[str, Any]


def by_kind(documents: list[Any]) -> Documents:
    return {document["kind"]: document for document in documents}


def with_component(component: Path) -> Documents:
    """An overlay on the base that takes one component and nothing else."""
    base = kustomize.render(DEPLOY / "kustomize" / "base")
    return by_kind(kustomize._apply(component, base))


RENDERED: dict[str, Documents] = {
    "rayjob.yaml": by_kind(list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text()))),
    **{folder.name: by_kind(kustomize.render(folder)) for folder in OVERLAYS},
}
MONITOR = list(yaml.safe_load_all((DEPLOY / "kustomize" / "components" / "podmonitor" / "podmonitor.yaml").read_text()))
VARIANTS = RENDERED | {folder.name: with_component(folder) for folder in COMPONENTS}


@pytest.fixture(params=RENDERED)
def documents(request: pytest.FixtureRequest) -> Documents:
    """The flat sample and every overlay."""
    return RENDERED[request.param]


@pytest.fixture
def job(documents: Documents) -> Any:
    return documents["RayJob"]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Documents:
    """The same, and the base with every component."""
    return VARIANTS[request.param]


def pods(job: Any) -> Iterator[Any]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def workers(job: Any) -> Any:
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def containers(job: Any) -> list[Any]:
    return [container for pod in pods(job) for container in pod["containers"]]


def option(job: Any, name: str) -> str | None:
    """Return what follows an option in the entrypoint."""
    words = shlex.split(job["spec"]["entrypoint"])
    return words[words.index(name) + 1] if name in words else None


def variable(container: Any, name: str) -> str:
    (value,) = (entry["value"] for entry in container["env"] if entry["name"] == name)
    return str(value)


def test_there_is_an_overlay_for_every_way_to_run() -> None:
    assert {folder.name for folder in OVERLAYS} == {"cpu-smoke", "cpu-spot", "gpu-ondemand", "gpu-spot", "kueue"}
    assert {folder.name for folder in COMPONENTS} >= {"identity-eks", "identity-gke", "identity-azure"}


def test_the_flat_sample_is_an_overlay_rendered() -> None:
    """Nothing holds two copies together but this."""
    assert RENDERED["rayjob.yaml"] == RENDERED["gpu-ondemand"]


@pytest.mark.parametrize("name", RENDERED)
def test_workers_with_gpus_have_the_image_with_torch(name: str) -> None:
    for group in RENDERED[name]["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        uses_gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert uses_gpus != container["image"].endswith("-cpu")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)
def test_kubectl_renders_what_these_tests_look_at(overlay: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here; the overlays are rendered by tests/kustomize.py alone")
    command = ["kubectl", "kustomize", str(overlay)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert by_kind(list(yaml.safe_load_all(done.stdout))) == RENDERED[overlay.name]


def validator() -> Any:
    found = [path for path in SCHEMAS if path.exists()]
    if not found:
        pytest.skip(f"KubeRay's schema is not at {SCHEMAS[0]}; it is Apache-2.0 data that is not in this repository")
    return jsonschema.Draft202012Validator(json.loads(found[0].read_text()))


def test_the_job_has_the_shape_that_kuberay_declares(variant: Documents) -> None:
    validator().validate(variant["RayJob"])


def test_the_schema_notices_a_misspelt_field() -> None:
    job = deepcopy(RENDERED["gpu-spot"]["RayJob"])
    job["spec"]["backofLimit"] = 1

    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        validator().validate(job)


def test_the_rest_has_the_shape_that_kubernetes_declares(variant: Documents) -> None:
    for kind in ("ServiceAccount", "NetworkPolicy"):
        kubernetes_validate.validate(variant[kind], KUBERNETES, strict=True)


def test_the_pods_have_the_shape_that_kubernetes_declares(variant: Documents) -> None:
    """Affinities, tolerations and security contexts, by Kubernetes' own schema."""
    for pod in pods(variant["RayJob"]):
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_kubernetes_schema_notices_a_misspelt_field() -> None:
    policy = deepcopy(RENDERED["gpu-spot"]["NetworkPolicy"])
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")

    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        kubernetes_validate.validate(policy, KUBERNETES, strict=True)


def test_the_operator_refuses_nothing(variant: Documents) -> None:
    assert refusals(variant["RayJob"]) == []


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "name": ("/metadata/name", {"value": "stockflow-merge-of-very-many-checkpoints-of-a-model"}),
    "DNS-1035": ("/metadata/name", {"value": "7-models"}),
    "rayClusterSpec nor": ("/spec/rayClusterSpec", {"op": "remove"}),
    "ttlSecondsAfterFinished": ("/spec/shutdownAfterJobFinishes", {"value": False}),
    "deletionRules exclude shutdown": (
        "/spec/deletionStrategy",
        {"value": {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]}},
    ),
    "both onSuccess and onFailure": (
        "/spec/deletionStrategy",
        {"value": {"onSuccess": {"policy": "DeleteSelf"}}},
    ),
    "DeleteWorkers excludes": (
        "/spec/deletionStrategy",
        {"value": {"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteSelf"}}},
    ),
    "clusterSelector excludes": ("/spec/clusterSelector", {"value": {"ray.io/cluster": "mine"}}),
    "InteractiveMode": ("/spec/submissionMode", {"value": "InteractiveMode"}),
    "SidecarMode": ("/spec", {"merge": {"submissionMode": "SidecarMode", "submitterConfig": {"backoffLimit": 1}}}),
    "activeDeadlineSeconds": ("/spec/activeDeadlineSeconds", {"value": 0}),
    "backoffLimit must": ("/spec/backoffLimit", {"value": -1}),
    "runtimeEnvYAML": ("/spec/runtimeEnvYAML", {"value": "- a list"}),
    "needs rayVersion 2.52": ("/spec/rayClusterSpec/rayVersion", {"value": "2.51.2"}),
    "enableK8sTokenAuth": ("/spec/rayClusterSpec/authOptions/enableK8sTokenAuth", {"value": True}),
    "upgradeStrategy": ("/spec/rayClusterSpec/upgradeStrategy", {"value": {"type": "None"}}),
    "networkPolicy needs": ("/spec/rayClusterSpec/networkPolicy", {"value": {"mode": "DenyAll"}}),
    "must be given": ("/spec/rayClusterSpec/enableInTreeAutoscaling", {"value": False, "without": "minReplicas"}),
    "minReplicas <= maxReplicas": ("/spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", {"value": 9}),
    "not between": ("/spec/rayClusterSpec/workerGroupSpecs/0/replicas", {"value": 9}),
    "suspend excludes": ("/spec/rayClusterSpec/workerGroupSpecs/0/suspend", {"value": True}),
    "idleTimeoutSeconds needs": (
        "/spec/rayClusterSpec/workerGroupSpecs/0/idleTimeoutSeconds",
        {"value": 60, "autoscaler": "v1"},
    ),
    "priority needs": ("/spec/rayClusterSpec/workerGroupSpecs/0/priority", {"value": 1, "autoscaler": "v1"}),
    "no container": ("/spec/rayClusterSpec/headGroupSpec/template/spec/containers", {"value": []}),
    "restartPolicy": ("/spec/rayClusterSpec/headGroupSpec/template/spec/restartPolicy", {"value": "Always"}),
    "labels belong": ("/spec/rayClusterSpec/headGroupSpec/rayStartParams/labels", {"value": "a=b"}),
    "beside it": ("/spec/rayClusterSpec/headGroupSpec/resources", {"value": {"CPU": "0"}}),
    "strings": ("/spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", {"value": 0}),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_what_the_operator_would_refuse_is_noticed(rule: str) -> None:
    """A lint that finds nothing anywhere would pass every other test."""
    job = deepcopy(RENDERED["gpu-ondemand"]["RayJob"])
    path, change = BROKEN[rule]
    if "merge" in change:
        job["spec"].update(change["merge"])
    else:
        kustomize.apply_operation(job, {"op": "add", "path": path, **change})
    if "autoscaler" in change:
        job["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = change["autoscaler"]
    if "without" in change:
        del workers(job)[change["without"]]

    assert any(rule in refusal for refusal in refusals(job)), refusals(job)


def test_a_run_ends_by_itself_and_is_tried_again(job: Any) -> None:
    spec = job["spec"]

    assert spec["submissionMode"] == "HTTPMode"
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_ray_is_the_version_that_was_tested(job: Any) -> None:
    cluster = job["spec"]["rayClusterSpec"]

    assert cluster["rayVersion"] == CONSTRAINTS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert all(f":{__version__}-ray{CONSTRAINTS['ray']}-" in container["image"] for container in containers(job))


def test_the_head_computes_nothing_and_is_not_on_a_spot_node(job: Any) -> None:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    affinity = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]

    assert head["rayStartParams"]["num-cpus"] == "0"
    assert all(expression["operator"] == "NotIn" for expression in term["matchExpressions"])
    assert len(term["matchExpressions"]) == 4, "two on Amazon, Google, Azure"


def test_workers_come_when_they_are_asked_for(documents: Documents) -> None:
    cluster, group = documents["RayJob"]["spec"]["rayClusterSpec"], workers(documents["RayJob"])
    if "kueue.x-k8s.io/queue-name" in documents["RayJob"]["metadata"]["labels"]:
        assert documents["RayJob"]["spec"]["suspend"] is True, "Kueue lets it go"
        assert not cluster.keys() & {"enableInTreeAutoscaling", "autoscalerOptions"}, "Kueue wants a fixed size"
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    else:
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert group["minReplicas"] == group["replicas"] == 0


def test_kueue_gives_gpus_back_with_their_quota() -> None:
    """The quota is free when the merge is over; without an autoscaler the pods stay until the cluster is deleted."""
    assert RENDERED["kueue"]["RayJob"]["spec"]["ttlSecondsAfterFinished"] <= 60


def test_workers_of_gpus_are_waited_for(job: Any) -> None:
    """15 minutes, thrice, would end a job for a shortage of an hour; Kueue admits only what is there."""
    patience_s = int(option(job, "--worker-timeout") or 900)
    if option(job, "--gpus-per-worker") and "suspend" not in job["spec"]:
        assert patience_s >= 3600
    assert job["spec"]["activeDeadlineSeconds"] > 2 * patience_s or "smoke" in job["metadata"]["name"]


def test_nodes_may_come_from_nothing(variant: Documents) -> None:
    for pod in pods(variant["RayJob"]):
        assert late_labels(pod) == []


def test_labels_that_only_a_running_node_has_are_noticed() -> None:
    term = {"matchExpressions": [{"key": "nvidia.com/gpu.present", "operator": "In", "values": ["true"]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    pod = {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-A10G"}, "affinity": affinity}

    assert late_labels(pod) == ["nvidia.com/gpu.present", "nvidia.com/gpu.product"]


@pytest.mark.parametrize("name", ["cpu-spot", "gpu-spot"])
def test_spot_workers_go_to_spot_nodes_of_any_cloud(name: str) -> None:
    pod = workers(RENDERED[name]["RayJob"])["template"]["spec"]
    head = next(pods(RENDERED[name]["RayJob"]))
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    wanted = pod["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"]
    shunned = head["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"][0]["matchExpressions"]

    assert [term["matchExpressions"] for term in wanted] == [
        [expression | {"operator": "In"}] for expression in shunned
    ], "one of the terms is enough; the head shuns them all"


def test_pods_get_what_they_ask_for_and_no_more(job: Any) -> None:
    sidecar = job["spec"]["rayClusterSpec"].get("autoscalerOptions")
    for container in [*containers(job), *([sidecar] if sidecar else [])]:
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_pods_fit_on_the_machines_they_are_meant_for(job: Any) -> None:
    """Of what a machine has, Kubernetes keeps some: a pod that asks for all of it waits for ever."""
    smoke = "smoke" in job["metadata"]["name"]
    head, worker = pods(job)
    sidecar = job["spec"]["rayClusterSpec"].get("autoscalerOptions")
    on_head = [*head["containers"], *([sidecar] if sidecar else [])]

    for containers_, machine in (
        (on_head, (2, 8) if smoke else (4, 16)),
        (worker["containers"], (2, 8) if smoke else (8, 32)),
    ):
        (cpus, memory), (free_cpus, free_memory) = asked(containers_), allocatable(*machine)
        assert cpus <= free_cpus, machine
        assert memory <= free_memory, machine


def test_workers_that_are_asked_for_fill_the_pods_and_their_memory_fits(job: Any) -> None:
    group = workers(job)
    (container,) = group["template"]["spec"]["containers"]
    (cpus, memory), num_workers = asked([container]), int(option(job, "--workers") or 0)
    per_pod = 1 if option(job, "--gpus-per-worker") else int(cpus)

    assert num_workers == group["maxReplicas"] * per_pod
    assert per_pod * float((option(job, "--memory") or "").removesuffix("GiB")) <= memory - 2


def test_no_machine_has_all_its_memory_for_pods() -> None:
    for gib, free in ((8, 5.7), (16, 12.7), (32, 27.5)):
        assert allocatable(8, gib)[1] == pytest.approx(free, abs=0.1)
    assert allocatable(4, 16)[0] == pytest.approx(3.92 - 0.25)


def test_a_node_that_must_go_has_time_to_drain(variant: Documents) -> None:
    worker = workers(variant["RayJob"])["template"]["spec"]
    drain_s = int(variable(worker["containers"][0], "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"))

    assert worker["terminationGracePeriodSeconds"] > drain_s > 0


def test_a_short_notice_is_enough_on_google_and_azure() -> None:
    """GKE gives pods 15 of the 30 seconds."""
    assert workers(VARIANTS["short-notice"]["RayJob"])["template"]["spec"]["terminationGracePeriodSeconds"] <= 15


def test_pods_run_without_privileges_under_a_service_account_that_is_there(variant: Documents) -> None:
    job = variant["RayJob"]
    for pod in pods(job):
        assert pod["serviceAccountName"] == variant["ServiceAccount"]["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert workers(job)["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("component", "annotation"),
    [
        ("identity-eks", "eks.amazonaws.com/role-arn"),
        ("identity-gke", "iam.gke.io/gcp-service-account"),
        ("identity-azure", "azure.workload.identity/client-id"),
    ],
)
def test_the_service_account_has_a_role_in_every_cloud(component: str, annotation: str) -> None:
    assert [*VARIANTS[component]["ServiceAccount"]["metadata"]["annotations"]] == [annotation]


def test_azure_gives_its_identity_to_labelled_pods() -> None:
    cluster = VARIANTS["identity-azure"]["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"


def test_the_network_policy_is_about_the_pods_of_the_job(variant: Documents) -> None:
    """A label that no pod has would leave every port open."""
    policy, cluster = variant["NetworkPolicy"]["spec"], variant["RayJob"]["spec"]["rayClusterSpec"]
    selected = policy["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert selected.items() <= group["template"]["metadata"]["labels"].items()

    assert policy["policyTypes"] == ["Ingress", "Egress"]
    entrances = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", ())}
    exits = {port["port"] for rule in policy["egress"] for port in rule.get("ports", ())}
    assert {8265, 8080} <= entrances, "the operator polls the job, Prometheus scrapes"
    assert not entrances & {6379, 10001}, "of other pods nobody needs the GCS or Ray Client"
    assert {53, 443} <= exits
    unlimited = [rule for rule in policy["ingress"] if "ports" not in rule]
    assert [rule["from"] for rule in unlimited] == [[{"podSelector": policy["podSelector"]}]]


def test_names_storage_and_kubernetes_are_reached_wherever_they_are(variant: Documents) -> None:
    """A resolver on the node is no pod; an API server on a node is no address to some network plugins."""
    for port in (53, 443, 6443):
        rules = [rule for rule in variant["NetworkPolicy"]["spec"]["egress"] if port in ports_of(rule)]
        assert any("to" not in rule for rule in rules), port


def ports_of(rule: Any) -> set[int]:
    return {port["port"] for port in rule.get("ports", ())}


@pytest.mark.parametrize("labels", OPERATOR_LABELS, ids=lambda labels: labels["app.kubernetes.io/name"])
def test_the_operator_may_submit_however_it_was_installed(variant: Documents, labels: dict[str, str]) -> None:
    (rule,) = (rule for rule in variant["NetworkPolicy"]["spec"]["ingress"] if 8265 in ports_of(rule))
    (peer,) = rule["from"]

    assert peer["podSelector"]["matchLabels"].items() <= labels.items()


def test_prometheus_finds_the_port_that_the_driver_serves(variant: Documents) -> None:
    """By annotations, by the monitor of the operator, and through the network policy."""
    words = shlex.split(variant["RayJob"]["spec"]["entrypoint"])
    head = variant["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    monitor = by_kind(MONITOR)["PodMonitor"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (swap,) = endpoint["relabelings"]
    port = words[words.index("--metrics-port") + 1]
    policy = variant["NetworkPolicy"]["spec"]
    (let_in,) = (rule for rule in policy["ingress"] if {"port": int(port), "protocol": "TCP"} in rule.get("ports", ()))

    assert head["metadata"]["annotations"]["prometheus.io/port"] == port
    assert head["metadata"]["annotations"]["prometheus.io/path"] == endpoint["path"] == "/metrics"
    assert let_in["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    selected = monitor["spec"]["selector"]["matchLabels"]
    assert selected.items() <= (head["metadata"]["labels"] | {"ray.io/node-type": "head"}).items(), "KubeRay's label"
    assert (swap["sourceLabels"], swap["targetLabel"]) == (["__address__"], "__address__")
    for address in ("10.0.0.7", "[fd00::7]"):
        template = swap["replacement"].replace("$1", r"\1")
        assert re.sub(f"^(?:{swap['regex']})$", template, f"{address}:8080") == f"{address}:{port}"


def test_the_head_declares_no_port(variant: Documents) -> None:
    """KubeRay makes the head's service from declared ports; with one of ours it would lack Ray's (GCS, dashboard)."""
    head = variant["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]

    assert all("ports" not in container for container in head["containers"])


def test_the_entrypoint_is_plain_words_that_the_command_line_takes(job: Any) -> None:
    """It passes through a shell; and an option that is gone would cost a cluster to find out."""
    words = shlex.split(job["spec"]["entrypoint"])
    command: Any = get_command(app)
    options = command.commands["merge"].make_context("merge", words[2:]).params
    group = workers(job)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]

    assert words == job["spec"]["entrypoint"].split()
    assert words[:2] == ["stockflow", "merge"]
    assert options["executor"] == "ray"
    assert options["metrics_port"] == 9464
    if options["gpus_per_worker"]:
        slots = int(limits["nvidia.com/gpu"]) / options["gpus_per_worker"]
    else:
        slots = int(limits["cpu"])
        assert "nvidia.com/gpu" not in limits
    assert options["workers"] == group["maxReplicas"] * slots


def test_a_worker_fits_into_its_pod(job: Any) -> None:
    """/dev/shm counts as memory of the pod, and Ray's own processes take some."""
    words = shlex.split(job["spec"]["entrypoint"])
    memory = int(words[words.index("--memory") + 1].removesuffix("GiB"))
    limit = int(workers(job)["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
    store = int(workers(job)["rayStartParams"]["object-store-memory"]) / 2**30

    assert memory + store + 1 <= limit


def test_gpus_get_the_image_that_can_use_them(job: Any) -> None:
    """Under torch for processors they would stand idle, and nothing would fail."""
    for container in containers(job):
        assert container["image"].endswith("-cpu") == (option(job, "--gpus-per-worker") is None)


def test_a_first_try_and_the_merge_do_not_meet() -> None:
    """The merge would find the finished output of another plan."""
    smoke, merge = (RENDERED[name]["RayJob"] for name in ("cpu-smoke", "gpu-spot"))
    tried, real = places(smoke), places(merge)

    assert not {*tried} & {*real}
    assert not any(a.startswith(f"{b}/") or b.startswith(f"{a}/") for a in tried for b in real)
    assert smoke["metadata"]["name"] != merge["metadata"]["name"]


def places(job: Any) -> list[str]:
    """Return recipe and output."""
    return shlex.split(job["spec"]["entrypoint"])[2:4]


def test_recipe_and_output_are_where_the_role_has_rights(job: Any) -> None:
    statements = json.loads((DEPLOY / "s3-policy.json").read_text())["Statement"]
    recipe, output = (place.replace("s3://", "arn:aws:s3:::") for place in places(job))
    for action, key in (("s3:GetObject", recipe), ("s3:PutObject", f"{output}/manifest.json")):
        about = [statement["Action"] for statement in statements if fnmatchcase(key, statement["Resource"])]
        assert any(action in actions for actions in about), (action, key)


def test_the_driver_has_time_to_end_when_the_job_is_stopped(job: Any) -> None:
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]

    assert [*environment] == ["RAY_JOB_STOP_WAIT_TIME_S"], "whoever may list jobs can read the others"
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 10


def test_no_secret_is_written_down() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert not re.search(r"AKIA|SECRET_ACCESS_KEY|SESSION_TOKEN|auth_token: ", path.read_text()), path
