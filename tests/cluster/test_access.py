"What an administrator applies, on a real control plane: accepted, and nobody can do more than is meant"

import copy
import json
import os
import re
import shlex
import subprocess
import threading
from dataclasses import replace

import pytest

from gpuml.base.errors import GpumlError
from gpuml.base.loading import load
from gpuml.cluster import jobs as c
from gpuml.cluster.manifest import Source, manifest
from tests.cluster.administer import Administrator, may
from tests.cluster.api import Api, ApiError
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.cluster.plane import USERS, Plane
from tests.cluster.site import Site
from tests.conftest import ROOT
from tests.manifests import OVERLAYS, WITH_IDLE, find, kubectl, pod_of, prepared, render_all
from tests.policies import RESOURCES, Request, refusals

IMAGE = "registry.example.com/gpuml-train:0.1.0"
PAGE, USERS_PAGE = ((ROOT / "docs" / name).read_text() for name in ("administrator.md", "cluster-user.md"))
GOLDEN = ROOT / "tests" / "golden" / "access.md"
BASE = ("Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ResourceQuota", "LimitRange",
        "ServiceAccount", "NetworkPolicy", "ConfigMap")  # fmt: skip
UNKNOWN = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}  # before 1.30
KUEUE = {"ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}  # no Kueue here


@pytest.fixture(scope="module")
def administrator(cluster):
    return Administrator(cluster.plane)


@pytest.fixture(scope="module")
def overlays(tmp_path_factory):
    "Every overlay, rendered"
    return render_all(tmp_path_factory.mktemp("administrator"))


@pytest.fixture(scope="module")
def team(cluster, administrator, overlays):
    "The team's overlay, applied: all but what would start servers; policies too, where the server knows them"
    manifests = overlays[WITH_IDLE]
    mine = [m for m in manifests if m["kind"] in (*BASE, *UNKNOWN) and administrator.knows(m)]
    for m in mine:
        administrator.apply(m)
    for namespace in ("gpuml-dev", "gpuml-prod"):
        cluster.wait(lambda n=namespace: cluster.plane.has_service_account(n), 30)
        cluster.wait(lambda n=namespace: quotas_are_known(cluster, n), 30, f"the quotas of {namespace}")
    yield manifests
    for name in ("gpuml-dev", "gpuml-prod", "gpuml-system"):
        cluster.remove_namespace(name)
    for m in mine:
        if m["kind"] != "PriorityClass" and "namespace" not in m["metadata"]:
            administrator.remove(m)


def quotas_are_known(cluster, namespace):
    found = cluster.admin.get("resourcequotas", namespace)["items"]
    return len(found) == 2 and all(q.get("status", {}).get("hard") for q in found)


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


@pytest.mark.parametrize("overlay", [*OVERLAYS, WITH_IDLE])
def test_accepted(overlay, overlays, team, cluster, administrator):
    "Every object of every overlay, but for the kinds that this server does not know"
    left_out = {m["kind"] for m in overlays[overlay] if not administrator.knows(m)}
    expected = (UNKNOWN if cluster.plane.version < (1, 30) else set()) | KUEUE
    assert left_out == expected & {m["kind"] for m in overlays[overlay]}
    for m in overlays[overlay]:
        if administrator.knows(m):
            administrator.apply(m, trial=True)


def test_what_is_wrong_is_not_accepted(team, administrator):
    "A field that does not exist, a value that is not possible"
    mlflow = copy.deepcopy(find(team, "Deployment", "mlflow"))
    mlflow["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(ApiError, match="volumeMount"):
        administrator.apply(mlflow, trial=True)
    mlflow = copy.deepcopy(find(team, "Deployment", "mlflow"))
    mlflow["spec"]["selector"]["matchLabels"] = {"app": "other"}
    with pytest.raises(ApiError, match="does not match"):
        administrator.apply(mlflow, trial=True)


def test_the_administrator_s_own_commands(tmp_path):
    "As docs/administrator.md has them, on a control plane without nodes: apply, again, diff, who may, delete"
    plane, copied = Plane(tmp_path), prepared(tmp_path)
    overlay = copied / "overlays" / "without-policies"

    def run(*command):
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": str(plane.kubeconfig())}
        return subprocess.run([kubectl(), *map(str, command)], env=env, capture_output=True, text=True)

    try:
        plane.start()
        first = run("apply", "-k", overlay)
        assert "statefulset.apps/postgres created" in first.stdout, first.stderr
        if first.returncode:  # a namespace's own account came between two requests: the page says, apply again
            errors = [line for line in first.stderr.splitlines() if line.startswith("Error")]
            assert errors and all('serviceaccounts "default" already exists' in line for line in errors), first.stderr
            assert run("apply", "-k", overlay).returncode == 0
        again = run("apply", "-k", overlay)
        changed = [line for line in again.stdout.splitlines() if not line.endswith(" unchanged")]
        assert changed == [f"statefulset.apps/{name} configured" for name in ("jupyter", "postgres")]  # diff says no
        assert (found := run("diff", "-k", overlay)).returncode == 0, found.stdout
        for upgrading in ("scale", "patch"):  # MLflow; the overlay, applied again, sets it right
            (line,) = re.findall(rf"^kubectl (-n gpuml-system {upgrading} deployment/mlflow .+)$", PAGE, re.M)
            assert (done := run(*shlex.split(line))).returncode == 0, done.stderr
            assert run("diff", "-k", overlay).returncode == 1
            assert "deployment.apps/mlflow configured" in run("apply", "-k", overlay).stdout
        assert (found := run("diff", "-k", overlay)).returncode == 0, found.stdout
        asked = ["auth", "can-i", "use", "priorityclass/gpuml-prod", "-n", "gpuml-prod", "--as", "ada", "--as-group"]
        assert [run(*asked, group).stdout.strip() for group in ("gpuml-prod", "gpuml-dev")] == ["yes", "no"]
        if plane.version < (1, 30):
            refused = run("apply", "-k", copied / "overlays" / "team")
            assert 'no matches for kind "ValidatingAdmissionPolicy"' in refused.stderr
        gone = run("delete", "-k", overlay, "--timeout=90s")
        assert gone.returncode == 0, gone.stderr
        left = {n["metadata"]["name"] for n in plane.api().get("namespaces")["items"]}
        assert not left & {"gpuml-dev", "gpuml-prod", "gpuml-system"}
    finally:
        plane.stop()


# Who may do what: d the development user, p the production submitter, o an outsider, j a development job's own account,
# q a production job's, n JupyterLab's, i that of k8s/idle. A dot where not.
MATRIX = """
create jobs.batch gpuml-dev                         d....n.
get    jobs.batch gpuml-dev                         d....ni
list   jobs.batch gpuml-dev                         d....n.
watch  jobs.batch gpuml-dev                         d....n.
delete jobs.batch gpuml-dev                         d....n.
update jobs.batch gpuml-dev                         .......
patch  jobs.batch gpuml-dev                         ......i
deletecollection jobs.batch gpuml-dev               .......
list   pods gpuml-dev                               d....ni
watch  pods gpuml-dev                               d....n.
get    pods/log gpuml-dev                           d....n.
list   events gpuml-dev                             d....n.
list   resourcequotas gpuml-dev                     d....n.
create pods gpuml-dev                               .......
delete pods gpuml-dev                               .......
patch  pods gpuml-dev                               .......
create pods/exec gpuml-dev                          .......
create pods/attach gpuml-dev                        .......
create pods/portforward gpuml-dev                   .......
create pods/eviction gpuml-dev                      .......
create pods/binding gpuml-dev                       .......
get    pods/proxy gpuml-dev                         .......
update jobs.batch/status gpuml-dev                  .......
update pods/ephemeralcontainers gpuml-dev           .......
get    secrets gpuml-dev                            .......
list   secrets gpuml-dev                            .......
create secrets gpuml-dev                            .......
update configmaps gpuml-dev                         .......
update resourcequotas gpuml-dev                     .......
update limitranges gpuml-dev                        .......
create serviceaccounts gpuml-dev                    .......
create serviceaccounts/token gpuml-dev              .......
create cronjobs.batch gpuml-dev                     .......
create deployments.apps gpuml-dev                   .......
create statefulsets.apps gpuml-dev                  .......
create poddisruptionbudgets.policy gpuml-dev        .......
create rolebindings.rbac.authorization.k8s.io gpuml-dev .......
bind   clusterroles.rbac.authorization.k8s.io gpuml-dev .......
use    priorityclasses.scheduling.k8s.io=gpuml-prod gpuml-dev .......
create jobs.batch gpuml-prod                        .p.....
get    jobs.batch gpuml-prod                        .p.....
list   jobs.batch gpuml-prod                        .p.....
watch  jobs.batch gpuml-prod                        .p.....
delete jobs.batch gpuml-prod                        .p.....
patch  jobs.batch gpuml-prod                        .......
patch  statefulsets.apps/scale gpuml-dev            .......
list   pods gpuml-prod                              .p.....
watch  pods gpuml-prod                              .p.....
get    pods/log gpuml-prod                          .p.....
list   events gpuml-prod                            .p.....
list   resourcequotas gpuml-prod                    .p.....
create pods gpuml-prod                              .......
create pods/exec gpuml-prod                         .......
get    secrets gpuml-prod                           .......
update configmaps gpuml-prod                        .......
update resourcequotas gpuml-prod                    .......
use    priorityclasses.scheduling.k8s.io=gpuml-prod gpuml-prod .p.....
use    priorityclasses.scheduling.k8s.io=system-cluster-critical gpuml-prod .......
create jobs.batch gpuml-system                      .......
list   pods gpuml-system                            ......i
get    secrets gpuml-system                         .......
create pods/exec gpuml-system                       .......
create pods/portforward=jupyter-0 gpuml-system      d......
get    pods/portforward=jupyter-0 gpuml-system      d......
create pods/portforward=postgres-0 gpuml-system     .......
get    pods=jupyter-0 gpuml-system                  d......
create pods gpuml-system                            .......
create events gpuml-system                          ......i
patch  configmaps=gpuml-idle gpuml-system           ......i
patch  configmaps=bucket-policies gpuml-system      .......
get    statefulsets.apps=jupyter gpuml-system       d......
patch  statefulsets.apps=jupyter gpuml-system       .......
patch  statefulsets.apps/scale=jupyter gpuml-system d.....i
patch  statefulsets.apps/scale=postgres gpuml-system .......
patch  statefulsets.apps/scale gpuml-system         .......
patch  jobs.batch gpuml-system                      .......
patch  statefulsets.apps gpuml-system               .......
patch  deployments.apps gpuml-system                .......
create jobs.batch default                           .......
list   pods default                                 .......
use    priorityclasses.scheduling.k8s.io=gpuml-prod default .......
use    priorityclasses.scheduling.k8s.io=gpuml-prod - .......
get    nodes -                                      dp...n.
list   nodes -                                      dp...n.
patch  nodes -                                      .......
get    nodes/proxy -                                .......
list   pods -                                       .......
list   secrets -                                    .......
get    priorityclasses.scheduling.k8s.io -          dp...n.
list   priorityclasses.scheduling.k8s.io -          .......
create priorityclasses.scheduling.k8s.io -          .......
create namespaces -                                 .......
patch  namespaces -                                 .......
create clusterrolebindings.rbac.authorization.k8s.io - .......
impersonate users -                                 .......
impersonate groups -                                .......
"""


def test_who_may_do_what(team, cluster, administrator):
    "Each asks for itself, with its own token; the answers are exactly these"
    plane = cluster.plane
    users = {letter: plane.api(user) for letter, user in {"d": "dev-user", "p": "prod-user", "o": "outsider"}.items()}
    accounts = {"j": ("gpuml-dev", "default"), "q": ("gpuml-prod", "default"), "n": ("gpuml-system", "notebook")}
    accounts |= {"i": ("gpuml-system", "idle")}
    for letter, account in accounts.items():
        users[letter] = Api(plane.url, administrator.token(*account), str(plane.certificate))
    wrong, rows = [], [line.rsplit(None, 1) for line in MATRIX.strip().splitlines()]
    for row, expected in rows:
        verb, resource, namespace = row.split()
        resource, _, name = resource.partition("=")
        namespace = "" if namespace == "-" else namespace
        found = "".join(u if may(api, verb, resource, namespace, name) else "." for u, api in users.items())
        if found != expected:
            wrong.append(f"{row}: {found}, expected {expected}")
    assert len(rows) >= 30 and not wrong, "\n".join(wrong)


def test_a_jupyterlab_that_was_stopped_is_started_by_its_users(team, cluster, administrator, tmp_path):
    "By the command of docs/cluster-user.md, with kubectl, as a development user; once, not many times"
    (command,) = set(re.findall(r"`kubectl (-n gpuml-system scale [^`]+)`", USERS_PAGE))

    def run(user, *words):
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": str(cluster.plane.kubeconfig(user))}
        return subprocess.run([kubectl(), *words], env=env, capture_output=True, text=True)

    def pods():
        return [p["metadata"]["name"] for p in cluster.admin.get("pods", "gpuml-system")["items"]]

    lab = copy.deepcopy(find(team, "StatefulSet", "jupyter"))
    lab["spec"]["replicas"] = 0
    administrator.apply(lab)
    try:
        refused = run("outsider", *shlex.split(command))
        assert 'User "outsider" cannot get resource "statefulsets"' in refused.stderr, refused
        started = run("dev-user", *shlex.split(command))
        assert started.returncode == 0 and started.stdout == "statefulset.apps/jupyter scaled\n", started
        cluster.wait(lambda: pods() == ["jupyter-0"], 30, "its pod")
    finally:
        administrator.remove(lab)
        cluster.remove_pod("gpuml-system", "jupyter-0")
    refusal = "gpuml-notebooks: dev-user may start jupyter with --replicas=1, and not stop it: others work in it"
    for user, groups, expected in (
        ("dev-user", cluster_groups("dev-user"), [[refusal], [], [refusal]]),
        ("system:serviceaccount:gpuml-system:idle", [], [[], [], []]),
        ("somebody", ["system:masters"], [[], [], []]),
    ):
        for replicas in (0, 1, 2):
            scale = {"replicas": replicas} if replicas else {}  # as the API server has it
            asked, how = {"kind": "Scale", "metadata": {"name": "jupyter"}, "spec": scale}, {"operation": "UPDATE"}
            said = evaluate(team, administrator, user, groups, asked, "gpuml-system", part="scale", **how)
            assert said == expected[replicas], (user, replicas)


def test_a_single_node_notebook_may_submit_to_production(overlays, team, administrator, cluster):
    "That overlay binds JupyterLab's account to production; the team's does not"
    extra = [m for m in overlays["single-node"] if m["kind"] == "RoleBinding" and m not in overlays["team"]]
    assert {m["metadata"]["name"] for m in extra} == {"gpuml-notebook", "gpuml-notebook-production"}
    api = Api(cluster.plane.url, administrator.token("gpuml-system", "notebook"), str(cluster.plane.certificate))
    asked = [("create", "jobs.batch", ""), ("use", "priorityclasses.scheduling.k8s.io", "gpuml-prod")]
    assert [may(api, verb, resource, "gpuml-prod", name) for verb, resource, name in asked] == [False, False]
    try:
        for m in extra:
            administrator.apply(m)
        cluster.wait(
            lambda: [may(api, verb, resource, "gpuml-prod", name) for verb, resource, name in asked] == [True, True], 10
        )
    finally:
        for m in extra:
            administrator.remove(m)


def made(config: str, *overrides: str, run: str = "") -> dict:
    config = load(
        config,
        [f"compute.image={IMAGE}", "compute.cpu=100m", "compute.memory=1Gi", "compute.disk=1Gi", *overrides],
        start=ROOT,
    )
    return manifest(config, run or f"{config.name}-0f2a9c11d4-1", Source("0f2a9c11d4", "s3://m/b", "a.ipynb"))


def pod_or_refusal(cluster, namespace: str, name: str) -> str:
    "Empty when the Job's pod is made, else why it is not"

    def look():
        if cluster.pods(namespace, name):
            return "made"
        return next((m for why, m in cluster.events(namespace, name) if why == "FailedCreate"), None)

    found = cluster.wait(look, 30, f"a pod of {name}, or why there is none")
    return "" if found == "made" else found


@pytest.mark.parametrize("config, user", [("dev", "dev-user"), ("prod", "prod-user")])
def test_gpuml_s_own_jobs_are_admitted(config, user, team, tidy, cluster, administrator):
    "By the server for the user's own token, by the quotas for its pod, by the policies"
    job = made(config)
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    cluster.plane.api(user).create("jobs", namespace, job)
    assert pod_or_refusal(cluster, namespace, name) == ""
    (pod,) = cluster.pods(namespace, name)
    assert evaluate(team, administrator, user, cluster_groups(user), job, namespace) == []
    made_pod = {"kind": "Pod", "metadata": pod["metadata"], "spec": pod["spec"]}
    by = "system:kube-controller-manager"
    assert evaluate(team, administrator, by, [], made_pod, namespace, operation="UPDATE") == []


def cluster_groups(user: str) -> list[str]:
    return [*USERS[user], "system:authenticated"]


def evaluate(manifests, administrator, user, groups, body, namespace, **more) -> list[str]:
    "What the policies say, with the server's own roles as their authorizer"
    request = Request(user, body, namespace, groups=groups, **more)
    return refusals(manifests, request, lambda who, asked: administrator.allowed(who, groups, asked))


def pod_spec(**changes) -> dict:
    return pod_of(made("dev")) | changes


def a_job(namespace="gpuml-dev", labels=None, **changes) -> dict:
    job = made("dev")
    job["metadata"] |= {"namespace": namespace, "labels": job["metadata"]["labels"] | (labels or {})}
    job["spec"]["template"]["spec"] |= changes
    return job


def an_object(version, kind, spec=None, namespace="gpuml-dev", **more) -> dict:
    metadata = {"name": "bypass"} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata} | ({"spec": spec} if spec else {}) | more


PROD = {"priorityClassName": "gpuml-prod"}
TEMPLATE = {"metadata": {"labels": {"a": "b"}}, "spec": pod_spec(**PROD)}
TOKEN = [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]
STRANGER = [{"name": "train", "image": "docker.io/someone/miner:1", "command": ["true"]}]
EVERY_GPU = [pod_spec()["containers"][0] | {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}]
SUBJECT = {"kind": "User", "name": "dev-user", "apiGroup": "rbac.authorization.k8s.io"}
ROLE = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}


def attempts(version: tuple) -> dict:
    "What a development user tries: an object to make, or (method, path, body) of another request"
    batch = "batch/v1" if version >= (1, 21) else "batch/v1beta1"
    policy = "policy/v1" if version >= (1, 21) else "policy/v1beta1"
    dev = "/api/v1/namespaces/gpuml-dev"
    bindings = "rbac.authorization.k8s.io/v1"
    binding = {"subjects": [SUBJECT], "roleRef": ROLE}
    apps = {"selector": {"matchLabels": {"a": "b"}}, "template": TEMPLATE}
    return {
        "Job with production's class": a_job(**PROD),
        "the same in gpuml-prod": a_job("gpuml-prod", **PROD),
        "the same in namespace default": a_job("default", **PROD),
        "CronJob with production's class": an_object(
            batch,
            "CronJob",
            {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": {"spec": TEMPLATE["spec"]}}}},
        ),
        "Pod with production's class": an_object("v1", "Pod", pod_spec(**PROD)),
        "Deployment with production's class": an_object("apps/v1", "Deployment", apps),
        "Job without a class": a_job(priorityClassName=""),
        "Job with system-cluster-critical": a_job(priorityClassName="system-cluster-critical"),
        "Job with an integer priority": a_job(priority=100000),
        "Job that preempts after all": a_job(preemptionPolicy="PreemptLowerPriority"),
        "Job with Kueue's production priority": a_job(labels={"kueue.x-k8s.io/priority-class": "gpuml-prod"}),
        "Job bound to a node by name": a_job(nodeName="gpu-1"),
        "Job that takes a day to end": a_job(terminationGracePeriodSeconds=86400),
        "Job with a token": a_job(automountServiceAccountToken=True),
        "Job with a token as a volume": a_job(volumes=[*pod_spec()["volumes"], *TOKEN]),
        "Job with JupyterLab's account": a_job(serviceAccountName="notebook"),
        "Job with an image from elsewhere": a_job(containers=STRANGER),
        "Job that sees every GPU of its node": a_job(containers=EVERY_GPU),
        "a budget that forbids disruption": an_object(
            policy, "PodDisruptionBudget", {"minAvailable": 1, "selector": {}}
        ),
        "a PriorityClass of one's own": an_object("scheduling.k8s.io/v1", "PriorityClass", namespace="", value=200000),
        "change a Job that is there": (
            "PATCH",
            "/apis/batch/v1/namespaces/gpuml-dev/jobs/x",
            {"spec": {"parallelism": 9}},
        ),
        "change a pod": ("PATCH", f"{dev}/pods/x", {"metadata": {"labels": {"a": "b"}}}),
        "add a container to a pod": ("PATCH", f"{dev}/pods/x/ephemeralcontainers", {"ephemeralContainers": STRANGER}),
        "a shell in a pod": ("POST", f"{dev}/pods/x/exec?command=sh", None),
        "bind a pod to a node": ("POST", f"{dev}/pods/x/binding", {"target": {"kind": "Node", "name": "gpu-1"}}),
        "read the S3 keys": ("GET", f"{dev}/secrets/gpuml-s3", None),
        "read production's S3 keys": ("GET", "/api/v1/namespaces/gpuml-prod/secrets/gpuml-s3", None),
        "a token for JupyterLab's account": (
            "POST",
            "/api/v1/namespaces/gpuml-system/serviceaccounts/notebook/token",
            {"spec": {}},
        ),
        "cancel a production job": ("DELETE", "/apis/batch/v1/namespaces/gpuml-prod/jobs/x", None),
        "more GPUs in the quota": (
            "PATCH",
            f"{dev}/resourcequotas/gpus",
            {"spec": {"hard": {"requests.nvidia.com/gpu": "99"}}},
        ),
        "no quota": ("DELETE", f"{dev}/resourcequotas/only-gpuml-dev", None),
        "another policy": ("PATCH", f"{dev}/configmaps/gpuml-policy", {"data": {"graceSeconds": "86400"}}),
        "a namespace without policies": (
            "PATCH",
            "/api/v1/namespaces/gpuml-dev",
            {"metadata": {"labels": {"gpuml.io/tier": None}}},
        ),
        "a role for oneself": an_object(bindings, "RoleBinding", **binding),
        "a role for oneself everywhere": an_object(bindings, "ClusterRoleBinding", namespace="", **binding),
        "speak as production": (
            "GET",
            "/apis/batch/v1/namespaces/gpuml-prod/jobs",
            None,
            {"Impersonate-User": "prod-user"},
        ),
    }


def attempt(what, cluster, administrator) -> str:
    "What the server does with it for the development user: who refuses, or nothing"
    api = cluster.plane.api("dev-user")
    made = ("POST", administrator.path(what, named=False), what) if isinstance(what, dict) else what
    method, path, body, *headers = made
    try:
        send(api, method, path, body, *headers)
    except ApiError as error:
        assert error.status in (403, 422), error
        by_role = re.search('User "dev-user" (cannot .*?) in API group', error.message)
        return f"role: {by_role[1]}" if by_role else error.message
    assert what["kind"] == "Job", "only Jobs may be made at all"
    refused = pod_or_refusal(cluster, "gpuml-dev", what["metadata"]["name"])
    return f"no pod: {reason(refused)}" if refused else ""


def send(api: Api, method: str, path: str, body, headers=None):
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    sent = {"Authorization": f"Bearer {api.token}", "Content-Type": kind} | (headers or {})
    answer = api.http.request(method, api.url + path, body=None if body is None else json.dumps(body), headers=sent)
    if answer.status >= 400:
        raise ApiError(answer.status, json.loads(answer.data)["message"])


def reason(event: str) -> str:
    "The part of an event that says why, without names that change"
    text = event.split("is forbidden: ")[-1] if "is forbidden: " in event else event
    return text.split(", requested:")[0].removeprefix("Error creating: ")


def test_development_can_not_act_as_production(team, tidy, cluster, administrator):
    "Each attempt is refused on this server, or, where it takes a policy, by the policy's own expressions. The table: golden/access.md"
    rows, through = [], []
    for number, (name, what) in enumerate(attempts(cluster.plane.version).items()):
        if isinstance(what, dict):
            what["metadata"]["name"] = f"attempt-{number}"
        by_server, by_policies = attempt(what, cluster, administrator), []
        if isinstance(what, dict) and what["kind"] in RESOURCES:
            by_policies = evaluate(
                team, administrator, "dev-user", cluster_groups("dev-user"), what, what["metadata"]["namespace"]
            )
        if not by_server and not by_policies:
            through.append(name)
        rows.append((name, by_server or "(accepted)", "; ".join(said.split(";")[0] for said in by_policies)))
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    head = (
        "What a development user tried with its own token, what Kubernetes 1.20 said to it, and what the policies say, which are\n"
        f"there from 1.30 on. {len(rows)} attempts, {len(through)} went through.\n\n"
        "| attempt | roles, quotas, admission | policies |\n|---|---|---|\n"
    )
    assert not through
    if os.environ.get("GPUML_GOLDEN"):
        GOLDEN.write_text(f"{head}{table}\n")
    if cluster.plane.version == (1, 20):
        assert f"{head}{table}\n" == GOLDEN.read_text()


def test_nothing_but_production_in_its_namespace(team, tidy, cluster):
    "A production submitter's job of another class gets no pod there either"
    job = made("prod", "compute.priority_class=gpuml-dev", run="prod-other-1")
    cluster.plane.api("prod-user").create("jobs", "gpuml-prod", job)
    assert "exceeded quota: only-gpuml-prod" in pod_or_refusal(cluster, "gpuml-prod", "prod-other-1")


def test_production_leaves_a_floor(team, tidy, cluster):
    "With a quota of one GPU of two, a second production job waits, and development runs beside the first"
    cluster.admin.patch("resourcequotas", "gpuml-prod", "gpus", {"spec": {"hard": {"requests.nvidia.com/gpu": "1"}}})

    def known():
        hard = cluster.admin.get("resourcequotas", "gpuml-prod", "gpus")["status"].get("hard", {})
        return hard.get("requests.nvidia.com/gpu") == "1"

    cluster.wait(known, 20)
    cluster.agent.add_node("gpu-2")
    try:
        for name in ("first", "second"):
            body = sleeper(name, "gpuml-prod")
            cluster.plane.api("prod-user").create("jobs", "gpuml-prod", body)
            if name == "first":
                cluster.wait_pod("gpuml-prod", name, phase("Running"))
        assert (
            "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1"
            in pod_or_refusal(cluster, "gpuml-prod", "second")
        )
        cluster.plane.api("dev-user").create("jobs", "gpuml-dev", sleeper("dev", "gpuml-dev"))
        cluster.wait_pod("gpuml-dev", "dev", phase("Running"))
    finally:
        cluster.agent.remove_node("gpu-2")
        cluster.admin.patch(
            "resourcequotas", "gpuml-prod", "gpus", {"spec": {"hard": {"requests.nvidia.com/gpu": "6"}}}
        )


def sleeper(name: str, priority: str) -> dict:
    return holder(name, "exec sleep 600", priority=priority, grace=1, image=IMAGE)


@pytest.fixture
def site(team, tidy, cluster, project, s3, monkeypatch):
    "A project whose jobs go to gpuml-dev, and whose user is the development user"
    site = Site(cluster, "gpuml-dev", project, s3, monkeypatch)
    site.write("dev", "gpuml-dev", 1)
    monkeypatch.setenv("KUBECONFIG", str(cluster.plane.kubeconfig("dev-user", "gpuml-dev")))
    yield site
    cluster.admin.delete("secrets", "gpuml-dev", "gpuml-s3")


def test_a_development_user_works_with_gpuml(site, cluster, team, monkeypatch):
    "Submits, follows, lists, cancels; and asks for exactly what the roles give, no more and no less"
    image = f"compute.image={IMAGE}"
    with cluster.plane.requests_of("dev-user") as asked:
        job = replace(
            site.submit(image, "train.epochs=200", of="dev"), watch_seconds=3
        )  # the audit log has a watch when it has ended
        follower = threading.Thread(target=lambda: job.logs(follow=True))
        follower.start()
        site.why(job, "running", 60)
        cluster.wait(lambda: "training" in job.logs(), 120)
        production = site.config(image, "compute.namespace=gpuml-prod")  # which this user may not see
        ((listed, _),) = c.jobs([site.config(image, of="dev"), production])
        assert listed.run_id == job.run_id
        waiting = site.submit(image, "train.epochs=201", of="dev")
        site.why(waiting, "GPU")
        waiting.cancel()
        job.cancel()
        assert job.wait(120).phase == "cancelled"
        follower.join(60)
    roles = [find(team, "ClusterRole", name)["rules"] for name in ("gpuml-jobs", "gpuml-cluster-reader")]
    granted = {
        (verb, what)
        for rules in roles
        for rule in rules
        if rule["apiGroups"] != ["resource.k8s.io"]  # these are asked in test_dra
        for verb in rule["verbs"]
        for what in rule["resources"]
    }
    everybody = {("create", "selfsubjectaccessreviews"), ("get", "")}  # may ask what they may, and /version
    assert asked - everybody - {("list", "deviceclasses")} == granted


def test_jobs_that_nobody_lets_one_see(site):
    "Where none of the namespaces may be seen, that is said"
    with pytest.raises(GpumlError, match="jobs in gpuml-prod: not permitted"):
        c.jobs([site.config(f"compute.image={IMAGE}", "compute.namespace=gpuml-prod")])


def test_a_development_user_is_told_at_once(site, cluster):
    "What quotas and roles would refuse later, the checks before submitting say"
    with pytest.raises(
        GpumlError, match="gpuml-prod may not be used in gpuml-dev: quota only-gpuml-dev allows none of its pods"
    ):
        site.submit(f"compute.image={IMAGE}", "compute.priority_class=gpuml-prod", of="dev")
    with pytest.raises(
        GpumlError, match="you may not create jobs, get jobs, list pods, get pods/log in the namespace gpuml-prod"
    ):
        site.submit(
            f"compute.image={IMAGE}", "compute.namespace=gpuml-prod", "compute.priority_class=gpuml-prod", of="dev"
        )
    assert not cluster.admin.get("jobs", "gpuml-dev")["items"]
