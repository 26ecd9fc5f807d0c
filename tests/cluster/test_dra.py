"GPUs that come by Dynamic Resource Allocation: claimed, explained, never refused where a node has them"

import time

import pytest
from ruamel.yaml import YAML

from gpuml.base.errors import GpumlError
from gpuml.cluster import jobs as c
from gpuml.cluster.device_claim import claim_template
from gpuml.cluster.submission import prepare
from tests.cluster.api import ApiError
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.cluster.dra import NAMED, claiming, offer
from tests.conftest import ENDLESS, ROOT

PLAIN = "compute.device_class=plain-gpu"
QUOTAS = {("list", "resourcequotas")}
DEVICES = 2  # of each class, on the one node that has some


@pytest.fixture(scope="module", autouse=True)
def driven(cluster):
    "A node with devices of two classes"
    cluster.agent.add_node("dra-1", gpus=0)
    made = offer(cluster.admin, "dra-1", DEVICES)
    yield
    for kind, name in made:
        cluster.admin.delete(kind, "", name)
    cluster.agent.remove_node("dra-1")


@pytest.fixture
def template(site):
    "The name of the template of which jobs of the namespace get one device"
    body = claim_template(site.config(PLAIN).compute)
    site.cluster.admin.create("resourceclaimtemplates", site.namespace, body)
    return body["metadata"]["name"]


def hold(site, body):
    "A Job that runs until it is removed"
    site.cluster.admin.create("jobs", site.namespace, body)
    site.cluster.wait_pod(site.namespace, body["metadata"]["name"], phase("Running"))


def claims(site):
    return site.cluster.admin.get("resourceclaims", site.namespace)["items"]


def test_a_job_by_its_claim(site, template):
    "It waits for who holds all, runs, and what it claimed goes with its pod"
    for number in range(DEVICES):
        hold(site, claiming(f"holder-{number}", template, priority="gpuml-dev", grace=1))
    job = site.submit(PLAIN)
    sentence = site.why(job, "GPU")
    assert f"needs 1 GPU: none of {DEVICES} is free; held by {DEVICES} development jobs; it starts when" in sentence
    assert sentence.endswith("by DRA, where the scheduler preempts nobody")
    ((_, state),) = c.jobs([site.config()])
    assert "by DRA" in state.why and job.facts["gpus"] == "1"
    for number in range(DEVICES):
        site.cluster.admin.delete("jobs", site.namespace, f"holder-{number}", propagationPolicy="Background")
    state = job.wait(600)
    assert (state.phase, state.attempts) == ("succeeded", 1), f"{state}\n{job.logs()}"
    site.cluster.admin.delete("jobs", site.namespace, job.run_id, propagationPolicy="Background")
    site.cluster.wait(lambda: not claims(site), 30, "no claim that is left")
    assert len(site.cluster.admin.get("resourceclaimtemplates", site.namespace)["items"]) == 1


def verdict(pod):
    "What the scheduler says of a pod; first that its claim is to be made, maybe"
    return "".join(condition.get("message", "") for condition in pod["status"].get("conditions", ())[:1])


def test_production_preempts_nobody(site, template):
    "What the checks say is what the scheduler does: neither for a claim nor for a limit that a class serves"
    named = {"limits": {NAMED: DEVICES}, "requests": {NAMED: DEVICES}}
    hold(site, claiming("low", template, priority="gpuml-dev"))
    hold(site, claiming("low-too", template, priority="gpuml-dev"))
    low = holder("low-named", "exec sleep 6000", gpus=0, priority="gpuml-dev")
    high = holder("high-named", "exec sleep 6000", gpus=0, priority="gpuml-prod")
    for body in (low, high):
        body["spec"]["template"]["spec"]["containers"][0]["resources"] = named
    hold(site, low)
    site.cluster.admin.create("jobs", site.namespace, high)
    site.cluster.admin.create("jobs", site.namespace, claiming("high", template, priority="gpuml-prod"))
    for name in ("high", "high-named"):
        pod = site.cluster.wait_pod(site.namespace, name, lambda pod: "cannot allocate all claims" in verdict(pod))
        assert "Preemption is not helpful" in verdict(pod), verdict(pod)
    time.sleep(3)
    pods = site.cluster.admin.get("pods", site.namespace)["items"]
    assert not any("deletionTimestamp" in pod["metadata"] for pod in pods)
    assert sorted(p["metadata"]["labels"]["job-name"] for p in pods if p["spec"].get("nodeName")) == [
        "low", "low-named", "low-too",
    ]  # fmt: skip


def test_a_limit_that_a_class_serves(site):
    "No node has the resource by a device plugin"
    planned = prepare(site.config(f"compute.gpu_resource={NAMED}", "compute.gpus=2"), site.notebook)
    (finding,) = [finding for finding in planned.findings if finding.subject == "GPUs"]
    assert finding.good and finding.text.startswith(f"2 of {DEVICES} {NAMED}; by DRA"), finding
    job = site.submit(f"compute.gpu_resource={NAMED}", "compute.gpus=2", ENDLESS)
    site.why(job, "running", 60)
    (claim,) = claims(site)
    assert len(claim["status"]["allocation"]["devices"]["results"]) == 2
    waiting = site.submit(f"compute.gpu_resource={NAMED}", "train.epochs=9999")
    assert "none of 2 is free; held by 1 production job" in site.why(waiting, "by DRA")
    waiting.cancel()
    job.cancel()
    assert job.wait(600).phase == "cancelled"


def test_a_class_by_the_name_that_kubernetes_gives_it(site):
    resource = "deviceclass.resource.kubernetes.io/plain-gpu"
    job = site.submit(f"compute.gpu_resource={resource}", ENDLESS)
    site.why(job, "running", 60)
    job.cancel()


REFUSED = {
    "never fits": ([PLAIN, "compute.gpus=3"], "compute.gpus: 3 never fit: the largest node, dra-1, has 2"),
    "never fits by its name": (
        [f"compute.gpu_resource={NAMED}", "compute.gpus=3"],
        "compute.gpus: 3 never fit: the largest node, dra-1, has 2",
    ),
    "no such class": (
        ["compute.device_class=other"],
        "the cluster has no DeviceClass other; it has named-gpu, plain-gpu; compute.device_class names one",
    ),
    "a class without a name": (
        ["compute.gpu_resource=gpuml.test/gpu"],
        "no node has any gpuml.test/gpu; GPUs of a DeviceClass are asked for by compute.device_class, "
        "and there is named-gpu, plain-gpu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(site, case):
    overrides, sentence = REFUSED[case]
    with pytest.raises(GpumlError) as refused:
        site.submit(*overrides)
    assert sentence in str(refused.value), refused.value
    assert not site.cluster.admin.get("resourceclaimtemplates", site.namespace)["items"]


def test_a_quota_counts_claims(site, template):
    "By its class, and by the name that the class gives: what is claimed and what stands in limits together"
    per_class = "plain-gpu.deviceclass.resource.k8s.io/devices"
    quota = {"metadata": {"name": "gpus"}, "spec": {"hard": {per_class: "1", f"requests.{NAMED}": "1"}}}
    site.cluster.admin.create("resourcequotas", site.namespace, quota)

    def used():
        return site.cluster.admin.get("resourcequotas", site.namespace, "gpus").get("status", {}).get("used", {})

    site.cluster.wait(used, 30, "a quota that is known")
    hold(site, claiming("holder", template, grace=1))
    job = site.submit(PLAIN)
    assert "quota gpus: 1 of 1 GPUs used; it starts when others end" in site.why(job, "quota")
    assert used()[per_class] == "1"
    job.cancel()
    named = {"devices": {"requests": [{"name": "a", "exactly": {"deviceClassName": "named-gpu", "count": 2}}]}}
    with pytest.raises(ApiError, match=f"exceeded quota: gpus, requested: requests.{NAMED}=2"):
        site.cluster.admin.create("resourceclaims", site.namespace, {"metadata": {"name": "many"}, "spec": named})


def test_a_template_that_is_gone(site):
    "The next attempt says so, and the same submission makes it again"
    job = site.submit(PLAIN, ENDLESS)
    site.cluster.wait(lambda: "training" in job.logs(), 180)  # it can save from then on
    (kept,) = site.cluster.admin.get("resourceclaimtemplates", site.namespace)["items"]
    site.cluster.admin.delete("resourceclaimtemplates", site.namespace, kept["metadata"]["name"])
    (pod,) = site.cluster.pods(site.namespace, job.run_id)
    site.cluster.admin.delete("pods", site.namespace, pod["metadata"]["name"])
    site.why(job, f"the ResourceClaimTemplate {kept['metadata']['name']} is gone; submitting the same", 90)
    assert site.submit(PLAIN, ENDLESS).run_id == job.run_id
    site.why(job, "running", 90)
    job.cancel()


def test_what_is_asked_for_is_what_the_roles_grant(site, monkeypatch):
    "k8s/cluster/access.yaml: enough to claim, and to be told why one waits; and no more"
    roles = list(YAML(typ="safe").load_all((ROOT / "k8s" / "cluster" / "access.yaml").read_text()))
    api, namespace = site.cluster.admin, site.namespace
    user = [{"kind": "User", "name": "dev-user", "apiGroup": "rbac.authorization.k8s.io"}]
    granted = set()
    for name, kind, where in (
        ("gpuml-jobs", "rolebindings", namespace),
        ("gpuml-cluster-reader", "clusterrolebindings", ""),
    ):
        rules = next(m["rules"] for m in roles if (m["kind"], m["metadata"]["name"]) == ("ClusterRole", name))
        granted |= {(v, r) for rule in rules if "resource.k8s.io" in rule["apiGroups"]
                    for v in rule["verbs"] for r in rule["resources"]}  # fmt: skip
        body = {"metadata": {"name": f"dra-{name}"}, "rules": rules}
        api.create("clusterroles", "", body)
        role = {"kind": "ClusterRole", "name": f"dra-{name}", "apiGroup": "rbac.authorization.k8s.io"}
        api.create(kind, where, {"metadata": {"name": f"dra-{name}"}, "roleRef": role, "subjects": user})
    try:
        monkeypatch.setenv("KUBECONFIG", str(site.cluster.plane.kubeconfig("dev-user", namespace)))
        with site.cluster.plane.requests_of("dev-user") as asked:
            job = site.submit(PLAIN, "compute.gpus=2", ENDLESS)
            site.why(job, "running", 60)
            waiting = site.submit(PLAIN, "compute.gpus=2", "train.epochs=9999")
            assert "held by 1 production job" in site.why(waiting, "none of 2 is free")
            waiting.cancel()
            job.cancel()
            job.wait(600)
        assert {(verb, kind) for verb, kind in asked if kind.startswith(("resource", "device"))} - QUOTAS == granted
    finally:
        api.delete("clusterrolebindings", "", "dra-gpuml-cluster-reader")
        for name in ("gpuml-jobs", "gpuml-cluster-reader"):
            api.delete("clusterroles", "", f"dra-{name}")
