"Who may do what on a cluster as an administrator sets it up, by the server's own answers; and what users can do with gpuml there"

import copy
import os
import re
import shlex
import subprocess
import threading
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from gpuml.base.errors import GpumlError
from gpuml.cluster import jobs as c
from tests.cluster import programs
from tests.cluster.administer import Administrator, may
from tests.cluster.api import Api, ApiError
from tests.cluster.applied import IMAGE, trial
from tests.cluster.site import Site
from tests.conftest import ENDLESS, ROOT
from tests.manifests import OVERLAYS, WITH_IDLE, find, kubectl, pod_of, prepared, render

KUEUE = {"ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}  # no Kueue here
USERS_PAGE = (ROOT / "docs" / "cluster-user.md").read_text()


@pytest.mark.parametrize("overlay", [*OVERLAYS, WITH_IDLE])
def test_accepted(overlay, overlays, team, administrator):
    "Every object of every overlay, but for Kueue's own kinds"
    left_out = {m["kind"] for m in overlays[overlay] if not administrator.knows(m)}
    assert left_out == (KUEUE if overlay == "kueue" else set())
    for m in overlays[overlay]:
        if administrator.knows(m):
            administrator.apply(m, trial=True)


def a_pod(made: dict) -> dict:
    "As a controller makes one of it, with something in the place of its claims"
    claims = made["spec"].get("volumeClaimTemplates", [])
    volumes = [{"name": claim["metadata"]["name"], "emptyDir": {}} for claim in claims]
    spec = pod_of(made) | {"volumes": [*pod_of(made).get("volumes", []), *volumes]}
    metadata = {"name": "x", "namespace": made["metadata"]["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@pytest.mark.parametrize("overlay", [*OVERLAYS, WITH_IDLE])
def test_pods_keep_the_standard(overlay, overlays, team, administrator):
    "Pod Security `restricted`, which the namespaces enforce: the pods that Kubernetes would make of each object"
    tried = [a_pod(m) for m in overlays[overlay] if pod_of(m)]
    for body in tried:
        assert trial(administrator, administrator.api, body) == ""
    tried[0]["spec"]["hostPID"] = True
    assert "violates PodSecurity" in trial(administrator, administrator.api, tried[0])


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


@pytest.fixture
def operator(team, administrator, cluster):
    "The kinds of Prometheus' operator that k8s/monitoring is made of; an administrator who knows them"
    read = YAML(typ="safe").load
    names = ("podmonitors", "prometheusrules")
    kinds = [read(programs.manifests(f"prometheus-operator/monitoring.coreos.com_{name}.yaml")) for name in names]
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "monitoring"}}
    for m in (space, *kinds):
        administrator.apply(m)
    path = "/apis/monitoring.coreos.com/v1/namespaces/monitoring"
    cluster.wait(lambda: all(is_served(cluster.admin, f"{path}/{name}") for name in names), 30)
    yield Administrator(cluster.plane)
    for m in (*kinds, space):
        administrator.remove(m)


def is_served(api: Api, path: str) -> bool:
    try:
        return api.request("GET", path).status == 200
    except ApiError:
        return False


def test_monitoring_is_accepted(operator, tmp_path):
    "Rules, alerts and what collects, by the operator's own schemas; a field that does not exist is not"
    manifests = render(prepared(tmp_path), "../monitoring")
    assert {"PrometheusRule", "PodMonitor", "NetworkPolicy", "ConfigMap"} == {m["kind"] for m in manifests}
    for m in manifests:
        operator.apply(m, trial=True)
    wrong = copy.deepcopy(find(manifests, "PodMonitor", "gpuml"))
    wrong["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    with pytest.raises(ApiError, match="intervall"):
        operator.apply(wrong, trial=True)
    wrong = copy.deepcopy(find(manifests, "PrometheusRule", "gpuml"))
    wrong["spec"]["groups"][0]["rules"][0]["expr"] = ["up"]
    with pytest.raises(ApiError, match="expr"):
        operator.apply(wrong, trial=True)


# Who may do what: d the development user, p the production submitter, o an outsider, j a development job's own account,
# q a production job's, n JupyterLab's, i that of k8s/idle, a that of k8s/after. A dot where not.
MATRIX = """
create jobs.batch gpuml-dev                         d....n..
get    jobs.batch gpuml-dev                         d....n.a
list   jobs.batch gpuml-dev                         d....nia
watch  jobs.batch gpuml-dev                         d....n..
delete jobs.batch gpuml-dev                         d....n..
update jobs.batch gpuml-dev                         ........
patch  jobs.batch gpuml-dev                         ......ia
deletecollection jobs.batch gpuml-dev               ........
list   pods gpuml-dev                               d....ni.
watch  pods gpuml-dev                               d....n..
get    pods/log gpuml-dev                           d....n..
list   events gpuml-dev                             d....n..
list   resourcequotas gpuml-dev                     d....n..
create pods gpuml-dev                               ........
delete pods gpuml-dev                               ........
patch  pods gpuml-dev                               ........
create pods/exec gpuml-dev                          ........
create pods/attach gpuml-dev                        ........
create pods/portforward gpuml-dev                   ........
create pods/eviction gpuml-dev                      ........
create pods/binding gpuml-dev                       ........
get    pods/proxy gpuml-dev                         ........
update jobs.batch/status gpuml-dev                  ........
update pods/ephemeralcontainers gpuml-dev           ........
get    secrets gpuml-dev                            ........
list   secrets gpuml-dev                            ........
create secrets gpuml-dev                            ........
update configmaps gpuml-dev                         ........
update resourcequotas gpuml-dev                     ........
update limitranges gpuml-dev                        ........
create serviceaccounts gpuml-dev                    ........
create serviceaccounts/token gpuml-dev              ........
create cronjobs.batch gpuml-dev                     ........
create deployments.apps gpuml-dev                   ........
create statefulsets.apps gpuml-dev                  ........
create poddisruptionbudgets.policy gpuml-dev        ........
create rolebindings.rbac.authorization.k8s.io gpuml-dev ........
bind   clusterroles.rbac.authorization.k8s.io gpuml-dev ........
create resourceclaimtemplates.resource.k8s.io gpuml-dev d....n..
create resourceclaimtemplates.resource.k8s.io gpuml-prod .p......
update resourceclaimtemplates.resource.k8s.io gpuml-dev ........
delete resourceclaimtemplates.resource.k8s.io gpuml-dev ........
create resourceclaims.resource.k8s.io gpuml-dev     ........
create deviceclasses.resource.k8s.io -              ........
use    priorityclasses.scheduling.k8s.io=gpuml-prod gpuml-dev ........
create jobs.batch gpuml-prod                        .p......
get    jobs.batch gpuml-prod                        .p.....a
list   jobs.batch gpuml-prod                        .p.....a
watch  jobs.batch gpuml-prod                        .p......
delete jobs.batch gpuml-prod                        .p......
patch  jobs.batch gpuml-prod                        .......a
patch  statefulsets.apps/scale gpuml-dev            ........
list   pods gpuml-prod                              .p......
watch  pods gpuml-prod                              .p......
get    pods/log gpuml-prod                          .p......
list   events gpuml-prod                            .p......
list   resourcequotas gpuml-prod                    .p......
create pods gpuml-prod                              ........
create pods/exec gpuml-prod                         ........
get    secrets gpuml-prod                           ........
update configmaps gpuml-prod                        ........
update resourcequotas gpuml-prod                    ........
use    priorityclasses.scheduling.k8s.io=gpuml-prod gpuml-prod .p......
use    priorityclasses.scheduling.k8s.io=system-cluster-critical gpuml-prod ........
get    leases.coordination.k8s.io=gpuml-after gpuml-dev d....n..
get    leases.coordination.k8s.io=gpuml-after gpuml-prod .p......
get    leases.coordination.k8s.io gpuml-dev         ........
patch  leases.coordination.k8s.io=gpuml-after gpuml-dev .......a
patch  leases.coordination.k8s.io=gpuml-after gpuml-prod .......a
patch  leases.coordination.k8s.io=gpuml-after gpuml-system ........
create leases.coordination.k8s.io gpuml-dev         ........
create jobs.batch gpuml-system                      ........
list   pods gpuml-system                            ......i.
get    secrets gpuml-system                         ........
create pods/exec gpuml-system                       ........
create pods/portforward=jupyter-0 gpuml-system      d.......
get    pods/portforward=jupyter-0 gpuml-system      d.......
create pods/portforward=postgres-0 gpuml-system     ........
get    pods=jupyter-0 gpuml-system                  d.......
create pods gpuml-system                            ........
create events gpuml-system                          ......i.
patch  configmaps=gpuml-idle gpuml-system           ......i.
patch  configmaps=bucket-policies gpuml-system      ........
get    statefulsets.apps=jupyter gpuml-system       d.......
patch  statefulsets.apps=jupyter gpuml-system       ........
patch  statefulsets.apps/scale=jupyter gpuml-system d.....i.
patch  statefulsets.apps/scale=postgres gpuml-system ........
patch  statefulsets.apps/scale gpuml-system         ........
patch  jobs.batch gpuml-system                      ........
patch  statefulsets.apps gpuml-system               ........
patch  deployments.apps gpuml-system                ........
create jobs.batch default                           ........
list   pods default                                 ........
use    priorityclasses.scheduling.k8s.io=gpuml-prod default ........
use    priorityclasses.scheduling.k8s.io=gpuml-prod - ........
get    nodes -                                      dp...n..
list   nodes -                                      dp...n..
patch  nodes -                                      ........
get    nodes/proxy -                                ........
list   pods -                                       ........
list   secrets -                                    ........
get    priorityclasses.scheduling.k8s.io -          dp...n..
list   priorityclasses.scheduling.k8s.io -          ........
create priorityclasses.scheduling.k8s.io -          ........
create namespaces -                                 ........
patch  namespaces -                                 ........
create clusterrolebindings.rbac.authorization.k8s.io - ........
impersonate users -                                 ........
impersonate groups -                                ........
"""


def test_who_may_do_what(team, cluster, administrator):
    "Each asks for itself, with its own token; the answers are exactly these"
    plane = cluster.plane
    users = {letter: plane.api(user) for letter, user in {"d": "dev-user", "p": "prod-user", "o": "outsider"}.items()}
    accounts = {"j": ("gpuml-dev", "default"), "q": ("gpuml-prod", "default"), "n": ("gpuml-system", "notebook")}
    accounts |= {"i": ("gpuml-system", "idle"), "a": ("gpuml-system", "after")}
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


def test_a_jupyterlab_is_not_stopped_by_its_users(team, cluster, administrator):
    "Only its idle GPU's controller and administrators do"
    lab = copy.deepcopy(find(team, "StatefulSet", "jupyter"))
    lab["spec"]["replicas"] = 0
    administrator.apply(lab)
    refusal = "dev-user may start jupyter with --replicas=1, and not stop it: others work in it"
    idle = Api(cluster.plane.url, administrator.token("gpuml-system", "idle"), str(cluster.plane.certificate))
    path, user = f"{administrator.path(lab)}/scale", cluster.plane.api("dev-user")

    def answer(api, replicas):
        "What the server says against so many; empty where it takes it"
        body, query = {"spec": {"replicas": replicas}}, {"dryRun": "All"}
        try:
            api.request("PATCH", path, body, query, kind="application/merge-patch+json")
        except ApiError as error:
            return error.message
        return ""

    try:
        cluster.wait(lambda: answer(user, 0).endswith(refusal), 30, "the policy")
        for api, expected in (
            (user, [refusal, "", refusal]),
            (idle, ["", "", ""]),
            (cluster.admin, ["", "", ""]),
        ):
            for replicas, end in enumerate(expected):
                said = answer(api, replicas)
                assert said.endswith(end) and bool(said) == bool(end), said
    finally:
        administrator.remove(lab)


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
    image, before = f"compute.image={IMAGE}", len(cluster.plane.audited())

    def watched():
        "What was watched, by watches that have ended"
        events = [event for event in cluster.plane.audited()[before:] if event["user"]["username"] == "dev-user"]
        ended = [event for event in events if (event["verb"], event["stage"]) == ("watch", "ResponseComplete")]
        return {event["objectRef"]["resource"] for event in ended}

    with cluster.plane.requests_of("dev-user") as asked:
        job = site.submit(image, ENDLESS, of="dev")
        job = replace(job, watch_seconds=3)  # the audit log has a watch when it has ended
        follower = threading.Thread(target=lambda: job.logs(follow=True))
        follower.start()
        site.why(job, "running", 60)
        cluster.wait(lambda: "training" in job.logs(), 120)
        production = site.config(image, "compute.namespace=gpuml-prod")  # which this user may not see
        ((listed, _),) = c.jobs([site.config(image, of="dev"), production])
        assert listed.run_id == job.run_id
        waiting = site.submit(image, "train.epochs=9999", of="dev")
        site.why(waiting, "GPU")
        waiting.cancel()
        cluster.wait(lambda: watched() >= {"jobs", "pods"}, 60, "the end of its first watches")
        job.cancel()
        assert job.wait(600).phase == "cancelled"
        follower.join(600)
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
    elsewhere = {
        ("get", "services"),
        ("get", "leases"),
    }  # asked for jobs of several nodes, and in test_after for --after
    assert asked - everybody - {("list", "deviceclasses")} == granted - elsewhere


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
