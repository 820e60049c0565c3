"""What KubeRay 1.7.0 refuses although its schema allows it: `ValidateRayJobSpec` and its like, for what we use.

Source: ray-project/kuberay, tag v1.7.0, ray-operator/controllers/ray/utils/validation.go. The operator says it as an
event on the RayJob, minutes after `kubectl apply` said "created". Below that, what nobody refuses and nothing can ever
serve: pods too large for their machine, labels that no node has before it is there.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_NAME = 47
AUTH_SINCE = (2, 52)
PRIORITY_SINCE = (2, 56)
START_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}

OPERATOR_LABELS = (
    {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
    {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
)
"""of the operator's pod: by the chart (templates/deployment.yaml), by kustomize (ray-operator/config/manager)"""

EARLY_LABELS = {
    "node.kubernetes.io/instance-type",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
}
"""what a node autoscaler knows of a node that is not there yet; GPU Feature Discovery's are written when it is"""


def refusals(job: Any) -> list[str]:
    """Return what the operator would refuse."""
    return [*_job(job), *_deletion(job["spec"]), *_cluster(job["spec"].get("rayClusterSpec"))]


def _job(job: Any) -> Iterator[str]:
    name, spec = job["metadata"]["name"], job["spec"]
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name!r} is not a DNS-1035 label of at most {MAX_NAME} characters"
    by_selector = bool(spec.get("clusterSelector"))
    if not by_selector and "rayClusterSpec" not in spec:
        yield "neither rayClusterSpec nor clusterSelector"
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if by_selector and (spec.get("suspend") or mode == "SidecarMode" or retries):
        yield "clusterSelector excludes suspend, SidecarMode and backoffLimit"
    if mode == "InteractiveMode" and retries:
        yield "InteractiveMode excludes backoffLimit"
    if mode == "SidecarMode" and spec.keys() & {"submitterPodTemplate", "submitterConfig"}:
        yield "SidecarMode excludes a submitter of one's own"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} must be positive"
    if retries < 0:
        yield "backoffLimit must not be negative"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _deletion(spec: Any) -> Iterator[str]:
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules", [])
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules exclude shutdownAfterJobFinishes, and so a TTL"
    if rules and strategy.keys() & {"onSuccess", "onFailure"}:
        yield "deletionRules exclude onSuccess and onFailure"
    if not rules and not {"onSuccess", "onFailure"} <= strategy.keys():
        yield "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    policies = [strategy.get(end, {}).get("policy") for end in ("onSuccess", "onFailure")]
    policies += [rule["policy"] for rule in rules]
    if "DeleteWorkers" in policies and spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"):
        yield "DeleteWorkers excludes autoscaling"


def _cluster(cluster: Any) -> Iterator[str]:
    if cluster is None:
        return
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
    autoscaling = bool(cluster.get("enableInTreeAutoscaling"))
    # Version 2 is what an autoscaler is if nothing is said, from Ray 2.47.
    is_v2 = autoscaling and cluster.get("autoscalerOptions", {}).get("version", "v2") == "v2"
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token" and version < AUTH_SINCE:
        yield f"token authentication needs rayVersion 2.52, not {cluster.get('rayVersion')}"
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for a RayJob"
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy is not for a RayJob"
    for gated in cluster.keys() & {"networkPolicy", "tlsOptions", "historyServerOptions"}:
        yield f"{gated} needs a feature gate that is off"
    groups = [("head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    for name, group in groups:
        yield from _group(name, group, is_v2=is_v2)
    for name, group in groups[1:]:
        yield from _workers(name, group, autoscaling=autoscaling)
        if group.get("priority") and not (is_v2 and version >= PRIORITY_SINCE):
            yield f"{name}: priority needs the autoscaler v2 and Ray 2.56"
        if "idleTimeoutSeconds" in group and not is_v2:
            yield f"{name}: idleTimeoutSeconds needs the autoscaler v2"


def _group(name: str, group: Any, *, is_v2: bool) -> Iterator[str]:
    pod, params = group["template"]["spec"], group.get("rayStartParams", {})
    if not pod.get("containers"):
        yield f"{name}: no container"
    if is_v2 and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: the autoscaler v2 needs restartPolicy Never"
    if "labels" in params:
        yield f"{name}: labels belong beside rayStartParams"
    if group.get("resources") and START_RESOURCES & params.keys():
        yield f"{name}: resources in rayStartParams and beside it"
    if not all(isinstance(value, str) for value in params.values()):
        yield f"{name}: rayStartParams are strings"


def _workers(name: str, group: Any, *, autoscaling: bool) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not autoscaling and (least is None or most is None):
        yield f"{name}: without autoscaling minReplicas and maxReplicas must be given"
    if (least or 0) < 0 or (most or 0) < 0 or (least or 0) > (most if most is not None else 2**31):
        yield f"{name}: 0 <= minReplicas <= maxReplicas does not hold"
    if not (least or 0) <= group.get("replicas", least or 0) <= (most if most is not None else 2**31):
        yield f"{name}: replicas are not between minReplicas and maxReplicas"
    if group.get("suspend") and autoscaling:
        yield f"{name}: suspend excludes autoscaling"


def allocatable(cpus: int, memory_gib: int) -> tuple[float, float]:
    """Return the CPUs and GiB that pods may ask for on an empty machine.

    As GKE reserves (docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes), the most of the clouds we
    name; besides, 2 % of memory for the kernel and 0.25 of both for the pods that every node runs.
    """
    cpu_steps = ((1, 0.06), (1, 0.01), (2, 0.005), (cpus, 0.0025))
    memory_steps = ((4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06), (memory_gib, 0.02))
    memory_kept = _kept(memory_gib, memory_steps) + 0.1 + 0.02 * memory_gib
    return cpus - _kept(cpus, cpu_steps) - 0.25, memory_gib - memory_kept - 0.25


def _kept(total: int, steps: tuple[tuple[int, float], ...]) -> float:
    kept = 0.0
    for size, share in steps:
        part = min(size, total)
        kept, total = kept + share * part, total - part
    return kept


def asked(containers: list[Any]) -> tuple[float, float]:
    """Return the CPUs and GiB that containers of one pod ask for together."""
    requests = [container["resources"]["requests"] for container in containers]
    return sum(_cpus(request["cpu"]) for request in requests), sum(_gib(request["memory"]) for request in requests)


def _cpus(text: str) -> float:
    return int(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


def _gib(text: str) -> float:
    return int(text.removesuffix("Mi")) / 1024 if text.endswith("Mi") else float(text.removesuffix("Gi"))


def late_labels(pod: Any) -> list[str]:
    """Return the labels that a pod asks of its node and that no autoscaler can know before the node is there."""
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    expressions = [entry for term in affinity.get("nodeSelectorTerms", []) for entry in term["matchExpressions"]]
    wanted = {*pod.get("nodeSelector", {}), *(entry["key"] for entry in expressions)}
    return sorted(wanted - EARLY_LABELS)
