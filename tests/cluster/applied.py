"The team's overlay on the tests' cluster, as an administrator applies it: fixtures"

import json
import time

import pytest

from gpuml.base.loading import load
from gpuml.cluster.manifest import Source, manifest
from tests.cluster.administer import Administrator, watch_config_maps
from tests.cluster.api import Api, ApiError
from tests.cluster.cluster import job as holder
from tests.conftest import ROOT
from tests.manifests import WITH_IDLE, pod_of, render_all

IMAGE = "registry.example.com/gpuml-train:0.1.0"
LEFT_OUT = {"Deployment", "StatefulSet", "Job", "PersistentVolumeClaim", "Secret"}  # starts servers, or is for them
NAMESPACES = ("gpuml-dev", "gpuml-prod", "gpuml-system")
MAKER = "maker"  # may make anything in these namespaces, but has no verb `use` on production's class
MAKES = [
    {"apiGroups": [""], "resources": ["pods", "pods/ephemeralcontainers", "replicationcontrollers"], "verbs": ["*"]},
    {"apiGroups": ["apps", "batch", "resource.k8s.io"], "resources": ["*"], "verbs": ["*"]},
    {"apiGroups": ["scheduling.k8s.io"], "resources": ["podgroups"], "verbs": ["*"]},
]


def made(config: str, *overrides: str, run: str = "") -> dict:
    "A Job that gpuml makes, small enough for a node of the tests"
    small = ["compute.cpu=100m", "compute.memory=1Gi", "compute.disk=1Gi"]
    resolved = load(config, [f"compute.image={IMAGE}", *small, *overrides], start=ROOT)
    return manifest(resolved, run or f"{config}-0f2a9c11d4-1", Source("0f2a9c11d4", "s3://m/b", "a.ipynb"))


def job_as(priority: str, name: str, command: str = "exec sleep 6000") -> dict:
    "A job with a GPU, as Pod Security wants it"
    user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    job = holder(name, command, priority=priority, grace=1, image=IMAGE, securityContext=user)
    (container,) = pod_of(job | {"kind": "Job"})["containers"]
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return job


def holding(spec: dict, kind: str, name: str = "x", namespace: str = "gpuml-dev") -> dict:
    "An object of a kind that makes pods of this spec"
    template = {"metadata": {"labels": {"a": "b"}}, "spec": spec}
    job = {"template": template}
    version, body = {
        "Pod": ("v1", spec),
        "Job": ("batch/v1", job),
        "CronJob": ("batch/v1", {"schedule": "* * * * *", "jobTemplate": {"spec": job}}),
        "Deployment": ("apps/v1", {"selector": {"matchLabels": {"a": "b"}}, "template": template}),
    }[kind]
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": body}


@pytest.fixture(scope="module")
def administrator(cluster):
    return Administrator(cluster.plane)


@pytest.fixture(scope="module")
def overlays(tmp_path_factory):
    "Every overlay, rendered"
    return render_all(tmp_path_factory.mktemp("administrator"))


@pytest.fixture(scope="module")
def team(cluster, administrator, overlays, watching):
    "The team's overlay, applied: all but what would start servers"
    manifests = [*overlays[WITH_IDLE], *rights(MAKER)]
    mine = [m for m in manifests if m["kind"] not in LEFT_OUT]
    cluster.wait(lambda: not ours(cluster), 120, "the namespaces of an earlier module to be gone")
    for m in mine:
        administrator.apply(m)
    for namespace in ("gpuml-dev", "gpuml-prod"):
        cluster.wait(lambda n=namespace: cluster.plane.has_service_account(n), 30)
        cluster.wait(lambda n=namespace: quotas_are_known(cluster, n), 30, f"the quotas of {namespace}")
    cluster.wait(lambda: policies_hold(administrator), 30, "the policies")
    yield manifests
    for name in NAMESPACES:
        cluster.remove_namespace(name)
    for m in mine:
        if m["kind"] != "PriorityClass" and m["metadata"].get("namespace", "default") == "default":
            administrator.remove(m)


@pytest.fixture
def tidy(cluster, team):
    "No jobs are left for the next test"
    yield
    for namespace in ("gpuml-dev", "gpuml-prod"):
        for job in cluster.admin.get("jobs", namespace)["items"]:
            cluster.admin.delete("jobs", namespace, job["metadata"]["name"], propagationPolicy="Background")
        for pod in cluster.admin.get("pods", namespace)["items"]:
            cluster.remove_pod(namespace, pod["metadata"]["name"])
        cluster.wait(lambda n=namespace: not cluster.admin.get("pods", n)["items"], 30)


@pytest.fixture(scope="module")
def maker(team, administrator) -> Api:
    return acting(administrator, MAKER)


def acting(administrator: Administrator, user: str, *groups: str) -> Api:
    "The requests of somebody, made by an administrator who acts as them"
    headers = {"Impersonate-User": user} | ({"Impersonate-Group": ",".join(groups)} if groups else {})
    plane = administrator.plane
    return Api(plane.url, plane.tokens["admin"], str(plane.certificate), headers=headers)


def trial(administrator: Administrator, api: Api, body: dict) -> str:
    "What the server says against an object that somebody would make; empty where it takes it"
    try:
        api.request("POST", administrator.path(body, named=False), body, {"dryRun": "All"})
    except ApiError as error:
        return error.message
    return ""


def ours(cluster) -> set[str]:
    "The namespaces of k8s/ that are there"
    return {n["metadata"]["name"] for n in cluster.admin.get("namespaces")["items"]} & set(NAMESPACES)


@pytest.fixture(scope="session")
def watching(cluster) -> None:
    "Policies that are applied after others were removed know their values"
    watch_config_maps(cluster.plane)


def quotas_are_known(cluster, namespace: str) -> bool:
    quotas = cluster.admin.get("resourcequotas", namespace)["items"]
    return len(quotas) == 2 and all(q.get("status", {}).get("hard") for q in quotas)


def policies_hold(administrator: Administrator) -> bool:
    "A server asks policies a moment after they were made: whether each refuses what it is there for"
    api = acting(administrator, MAKER)
    refused = [
        holding(pod_of(made("prod")), "Pod", namespace=namespace)
        for namespace in ("gpuml-dev", "gpuml-prod", "default")
    ]
    claim = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": "x"}}
    claim["spec"] = {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "other"}}]}}
    refused += [claim | {"metadata": {"name": "x", "namespace": name}} for name in ("gpuml-dev", "gpuml-prod")]
    return all("ValidatingAdmissionPolicy" in trial(administrator, api, body) for body in refused)


def rights(user: str) -> list[dict]:
    "A role for somebody, and where it holds"
    rbac = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": user}, "rules": MAKES}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "subjects": [{"kind": "User", "name": user, "apiGroup": rbac}],
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": user},
    }
    places = (*NAMESPACES, "default")
    return [role] + [binding | {"metadata": {"name": user, "namespace": name}} for name in places]


def failures(plane, audit: str) -> list[str]:
    "What the audit log says that policies had against a request, all of it: `POLICY: message`"
    end = time.monotonic() + 10  # it is written when the answer is, not before
    while not (events := [event for event in plane.audited() if event["auditID"] == audit]):
        if time.monotonic() > end:
            return []
        time.sleep(0.05)
    text = events[0].get("annotations", {}).get("validation.policy.admission.k8s.io/validation_failure", "[]")
    return sorted(f"{failure['policy']}: {failure['message']}" for failure in json.loads(text))
