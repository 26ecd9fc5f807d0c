"Kueue's own controller on the tests' cluster: the overlay `kueue` as an administrator applies it, and gpuml's jobs in its queues"

import time
from collections import Counter
from contextlib import suppress

import pytest

from benchmarks.kueue_oracle import Worlds, play
from gpuml.base.errors import GpumlError
from gpuml.base.storage import Storage
from gpuml.cluster import jobs as c
from gpuml.cluster.outlook import outlook_of
from tests.cluster.administer import Administrator
from tests.cluster.api import ApiError
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.cluster.kueue import Kueue
from tests.cluster.programs import missing
from tests.cluster.site import Site
from tests.cluster.test_preemption import undisturbed
from tests.conftest import ENDLESS
from tests.manifests import find, prepared, render

IMAGE = "registry.example.com/gpuml-train:0.1.0"
KEPT_OUT = ("Deployment", "StatefulSet", "Job", "PersistentVolumeClaim", "Secret")  # tried, but not kept here
DEV, PROD = "gpuml-dev", "gpuml-prod"
pytestmark = pytest.mark.skipif(bool(missing(["kueue"])), reason="no kueue for a cluster: `make servers` builds it")


@pytest.fixture(scope="module")
def kueue(cluster, tmp_path_factory):
    started = Kueue(cluster.plane, tmp_path_factory.mktemp("kueue")).start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def overlay(kueue, cluster, watching, tmp_path_factory):
    "The overlay, applied: all but what would start servers. Production has the only GPU, and lends it"
    manifests, administrator = (
        render(prepared(tmp_path_factory.mktemp("administrator")), "kueue"),
        Administrator(cluster.plane),
    )
    mine = [m for m in manifests if m["kind"] not in KEPT_OUT]
    cluster.wait(lambda: not names(cluster) & {DEV, PROD}, 120, "the namespaces of an earlier module to be gone")
    for m in mine:
        cluster.wait(lambda m=m: applied(administrator, m), 30, f"{m['kind']} {m['metadata']['name']} to be accepted")
    for name, count in ((PROD, 1), (DEV, 0)):
        give(cluster, name, count)
    for namespace in (DEV, PROD):
        cluster.wait(lambda n=namespace: cluster.plane.has_service_account(n), 30)
        cluster.wait(lambda n=namespace: is_active(cluster, n), 30, f"the queue of {namespace}")
    yield manifests
    for name in (DEV, PROD, "gpuml-system"):
        cluster.remove_namespace(name)
    for m in mine:
        if m["kind"] != "PriorityClass" and "namespace" not in m["metadata"]:
            administrator.remove(m)


def applied(administrator, manifest):
    "Whether it is accepted; a quota or a namespace may take a moment to be known"
    try:
        administrator.apply(manifest)
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return True


def names(cluster):
    return {n["metadata"]["name"] for n in cluster.admin.get("namespaces")["items"]}


def give(cluster, name, gpus):
    "The quota of a ClusterQueue, as an administrator sets it"
    queue = cluster.admin.get("clusterqueues", "", name)
    for resource in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]:
        if resource["name"] == "nvidia.com/gpu":
            resource["nominalQuota"] = str(gpus)
    cluster.admin.patch("clusterqueues", "", name, {"spec": queue["spec"]})


def is_active(cluster, namespace, name="gpuml"):
    queue = cluster.admin.get("localqueues", namespace, name)
    return any(c["type"] == "Active" and c["status"] == "True" for c in queue.get("status", {}).get("conditions") or [])


@pytest.fixture
def as_user(cluster, monkeypatch):
    "Whoever asks from now on"
    return lambda user: monkeypatch.setenv("KUBECONFIG", str(cluster.plane.kubeconfig(user, DEV)))


@pytest.fixture
def site(overlay, cluster, project, s3, monkeypatch, as_user):
    "A project whose `dev` goes to gpuml-dev and whose `prod` to gpuml-prod, each into its queue; no jobs are left"
    site = Site(cluster, DEV, project, s3, monkeypatch)
    site.calm(0.3)
    cluster.secret(PROD, "gpuml-s3", **secret_of(cluster))
    for name, epochs in (("dev", 16), ("prod", 2)):
        site.write(name, f"gpuml-{name}", epochs)
        file = site.folder / "config" / f"{name}.yaml"
        text = file.read_text().replace(f"namespace: {DEV}", f"namespace: gpuml-{name}")
        file.write_text(text.replace("image: gpuml-train:test", f"image: {IMAGE}\n  queue: gpuml"))
    as_user("dev-user")
    yield site
    for namespace in (DEV, PROD):
        for job in cluster.admin.get("jobs", namespace)["items"]:
            with suppress(ApiError):  # one that was cancelled may be gone by now
                cluster.admin.delete("jobs", namespace, job["metadata"]["name"], propagationPolicy="Background")
        for pod in cluster.admin.get("pods", namespace)["items"]:
            cluster.remove_pod(namespace, pod["metadata"]["name"])
        for kind in ("pods", "workloads"):
            cluster.wait(lambda n=namespace, k=kind: not cluster.admin.get(k, n)["items"], 30, f"the end of all {kind}")
        cluster.admin.delete("secrets", namespace, "gpuml-s3")


def secret_of(cluster):
    from tests.s3 import KEY, SECRET

    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.fixture
def held(site, cluster):
    "The only GPU is lent to a development job"
    cluster.admin.create("jobs", DEV, queued("holder"))
    cluster.wait_pod(DEV, "holder", phase("Running"))


def make(cluster, kind, name, spec, **metadata):
    "An object of Kueue's, as an administrator makes it"
    body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}
    Administrator(cluster.plane).apply(body)


def next_second(cluster):
    "Kueue puts jobs in order by the seconds in which they were made"
    cluster.wait(lambda at=time.time(): time.time() > at + 1, 5)


def queued(name, queue="gpuml", **labels):
    "A Job in a queue that is not gpuml's"
    user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    body = holder(name, "exec sleep 6000", priority=DEV, grace=1, image=IMAGE, securityContext=user)
    (container,) = body["spec"]["template"]["spec"]["containers"]
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    labels = {"kueue.x-k8s.io/queue-name": queue} | {f"kueue.x-k8s.io/{k}": v for k, v in labels.items()}
    body["metadata"]["labels"] = labels
    return body


def test_the_overlay_is_accepted_whole(overlay, cluster):
    "By the API server and by Kueue's webhooks, once more"
    administrator = Administrator(cluster.plane)
    for m in overlay:
        assert administrator.knows(m), m["kind"]
        administrator.apply(m, trial=True)
    wrong = find(overlay, "ClusterQueue", DEV)
    wrong = {**wrong, "spec": {**wrong["spec"], "namespaceSelector": {"matchLabels": {"a": "-"}}}}
    with pytest.raises(ApiError, match="namespaceSelector"):
        administrator.apply(wrong, trial=True)


def test_production_takes_back_what_it_has_lent_and_nothing_is_lost(site, mlflow, cluster, as_user):
    "Submitted into the queue, admitted on a GPU that production lends, suspended for production, resumed; bit-equal"
    dev = site.submit(of="dev")
    site.wait_update(dev)
    with site.standing(dev):
        as_user("admin")
        said = str(outlook_of(site.config(of="prod")))
        assert said.startswith("starts within about ") and f"preempts {dev.run_id} (" in said, said
        as_user("prod-user")
        said = str(outlook_of(site.config(of="prod")))
        assert said == "starts once Kueue has preempted others, which you may not see; of the queue gpuml-dev"
        prod = site.submit(of="prod")
    pod = cluster.wait_pod(PROD, prod.run_id, phase("Running"), 90)
    production = cluster.agent.worker(PROD, pod["metadata"]["name"])
    production.freeze()  # until all has been looked at that is so while it runs
    as_user("dev-user")
    quota = "(Kueue: couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu"
    said = site.why(dev, quota)
    assert said.startswith("waiting: ") and "waits in the queue gpuml, the first of its namespace: " in said
    assert "preempted by a queue that takes back what it has lent" in said
    assert cluster.admin.get("jobs", DEV, dev.run_id)["spec"]["suspend"]
    cluster.wait(lambda: not cluster.pods(DEV, dev.run_id))
    production.thaw()
    as_user("prod-user")
    assert prod.wait(600).phase == "succeeded", f"{prod}\n{prod.logs()}"
    as_user("dev-user")
    assert dev.wait(600).phase == "succeeded", f"{dev}\n{dev.logs()}"
    assert dev.outcome()["attempt"] == 2 and len(Storage(site.s3.endpoint).find(f"{dev.place}/logs/*.txt")) == 2
    assert (dev.run.folder / "model" / "model.safetensors").read_bytes() == undisturbed(site, 16)


def test_why_jobs_wait_behind_others(site, held, cluster):
    "Their places, what the queue has, the same in the list; cancelled while they wait"
    first = site.submit(of="dev")
    has = "gpuml-dev has 0, and 1 are in use, 1 of them lent by others, and its cohort has no more to lend; it starts when others end (Kueue: couldn't"
    said = site.why(first, f"waits in the queue gpuml, the first of its namespace: needs 1 nvidia.com/gpu; {has}")
    assert said.startswith("pending: ")
    next_second(cluster)
    second = site.submit(ENDLESS, of="dev")
    site.why(second, "waits in the queue gpuml, 1 before it: needs 1 nvidia.com/gpu")
    listed = {job.run_id: state.why for job, state in c.jobs([site.config(of="dev")])}
    assert listed[second.run_id] == second.status.why and "1 before it" in listed[second.run_id]
    assert first.cancel().phase == "cancelled"
    site.why(second, "the first of its namespace")
    cluster.admin.delete("jobs", DEV, "holder", propagationPolicy="Background")
    site.why(second, "running", 60)


@pytest.mark.parametrize("kind", ["localqueues", "clusterqueues"])
def test_a_queue_that_is_stopped(site, cluster, kind):
    "No job of it starts, a deadline does not run, and it goes on where an administrator lets it"
    at = (kind, DEV if kind == "localqueues" else "", "gpuml" if kind == "localqueues" else DEV)
    words = "the queue gpuml is stopped" if kind == "localqueues" else "the ClusterQueue gpuml-dev is stopped"
    cluster.admin.patch(*at, {"spec": {"stopPolicy": "Hold"}})
    try:
        cluster.wait(lambda: not is_active(cluster, DEV), 30)
        job = site.submit("compute.deadline=0.004", of="dev")  # 15 s
        begun = time.monotonic()
        site.why(job, f"pending: {words}; it starts once an administrator lets")
        cluster.wait(lambda: time.monotonic() > begun + 16, 30)
        assert words in str(job.status) and job.status.phase == "pending"
        cluster.admin.patch("jobs", DEV, job.run_id, {"spec": {"activeDeadlineSeconds": 600}})  # from now on it runs
    finally:
        cluster.admin.patch(*at, {"spec": {"stopPolicy": "None"}})
    site.why(job, "running", 60)


def test_a_queue_that_goes_away_and_one_that_gives_too_little(site, cluster):
    "Said before it is sent; and where the queue changes later, by the job's state"
    make(cluster, "ClusterQueue", "cpus", {"namespaceSelector": {}, "resourceGroups": []})
    for name, of in (("cpus", "cpus"), ("research", DEV)):
        make(cluster, "LocalQueue", name, {"clusterQueue": of}, namespace=DEV)
    cluster.wait(lambda: is_active(cluster, DEV, "cpus"), 30)
    with pytest.raises(GpumlError, match="there is no LocalQueue nowhere in gpuml-dev; there is cpus, gpuml, research"):
        site.submit("compute.queue=nowhere", of="dev")
    with pytest.raises(
        GpumlError, match="gpuml never fits, by its ClusterQueue gpuml-dev: 350 of cpu, where it gives 300"
    ):
        site.submit("compute.cpu=350", of="dev")  # production may lend 200, and its own are 100
    without = site.submit("compute.queue=cpus", of="dev")
    site.why(without, "cpus has no quota of cpu, ephemeral-storage, memory, nvidia.com/gpu; cancel it and name another")
    cluster.admin.patch("localqueues", DEV, "research", {"spec": {"stopPolicy": "Hold"}})
    gone = site.submit("compute.queue=research", "train.epochs=3", of="dev")
    site.why(gone, "the queue research is stopped")
    cluster.admin.delete("localqueues", DEV, "research")
    site.why(gone, "there is no LocalQueue research in gpuml-dev; cancel it and name another queue by compute.queue")
    for job in (without, gone):
        assert job.cancel().phase == "cancelled"
    cluster.admin.delete("localqueues", DEV, "cpus")
    cluster.admin.delete("clusterqueues", "", "cpus")


def test_priorities_of_workloads(site, held, cluster):
    "A job may tell Kueue the priority of its namespace, and no other, whoever makes it"
    cluster.admin.create("jobs", DEV, queued("plain"))
    next_second(cluster)
    site.why(waiting := site.submit(of="dev"), "1 before it")
    cluster.admin.create("jobs", DEV, queued("named", **{"priority-class": DEV}))
    cluster.wait(lambda: len(workloads(cluster)) == 4, 30)
    priorities = {w["metadata"]["ownerReferences"][0]["name"]: w["spec"]["priority"] for w in workloads(cluster)}
    assert priorities == dict.fromkeys(("holder", "plain", "named", waiting.run_id), -1000)
    for user in ("admin", "dev-user"):
        with pytest.raises(ApiError, match=f"priority other than {DEV}|may not use PriorityClass {PROD}"):
            cluster.plane.api(user).create("jobs", DEV, queued("sly", **{"priority-class": PROD}))


def workloads(cluster):
    return cluster.admin.get("workloads", DEV)["items"]


def test_who_may_not_read_workloads_is_told_what_the_job_says(site, held, cluster, overlay):
    "And the roles are exactly what is asked"
    with cluster.plane.requests_of("dev-user") as asked:
        job = site.submit(ENDLESS, of="dev")
        site.why(job, "the first of its namespace")
    names = ("gpuml-queues", "gpuml-cluster-queues")
    rules = [rule for name in names for rule in find(overlay, "ClusterRole", name)["rules"]]
    granted = {(verb, what) for rule in rules for verb in rule["verbs"] for what in rule["resources"]}
    assert granted == {(verb, what) for verb, what in asked if what in {w for _, w in granted}}
    cluster.admin.delete("rolebindings", DEV, "gpuml-queues")
    try:
        site.why(job, "pending: waits in the queue gpuml; its Workload says why, which you may not read")
        cluster.admin.delete("jobs", DEV, "holder", propagationPolicy="Background")
        site.wait_update(job)
        cluster.admin.patch("clusterqueues", "", DEV, {"spec": {"stopPolicy": "HoldAndDrain"}})
        site.why(job, "waiting: stopped by Kueue: The ClusterQueue is stopped; waits in the queue gpuml", 60)
    finally:
        cluster.admin.patch("clusterqueues", "", DEV, {"spec": {"stopPolicy": "None"}})
        Administrator(cluster.plane).apply(find(overlay, "RoleBinding", "gpuml-queues", DEV))


def test_cancelled_while_it_waits_after_a_preemption(site, cluster):
    "The checkpoint stays"
    job = site.submit(ENDLESS, of="dev")
    site.wait_update(job)
    worker = site.worker(job)
    worker.freeze()
    cluster.admin.patch("localqueues", DEV, "gpuml", {"spec": {"stopPolicy": "HoldAndDrain"}})
    try:
        site.why(job, "stopping: saves a checkpoint; stopped by Kueue: its queue was stopped")
        worker.thaw()
        site.why(job, "waiting: stopped by Kueue: its queue was stopped; the queue gpuml is stopped", 120)
        state = job.cancel()
        assert state.phase == "cancelled" and f"its checkpoint stays in {job.place}" in state.why
        assert Storage(site.s3.endpoint).find(f"{job.place}/checkpoints/*/*")
    finally:
        cluster.admin.patch("localqueues", DEV, "gpuml", {"spec": {"stopPolicy": "None"}})


def test_a_job_of_two_nodes_is_admitted_whole(site, held, cluster):
    "What it never gets is said before; and while only one of two GPUs is free, none of its pods is made"
    cluster.agent.add_node("gpu-2")
    try:
        with pytest.raises(GpumlError, match="2 × 1 of nvidia.com/gpu, where it gives 1 at most"):
            site.submit("compute.nodes=2", of="dev")
        give(cluster, PROD, 2)
        gang = site.submit("compute.nodes=2", of="dev")
        said = site.why(gang, "needs 2 nvidia.com/gpu")
        assert said.startswith("pending: waits in the queue gpuml") and not cluster.pods(DEV, gang.run_id)
        cluster.admin.delete("jobs", DEV, "holder", propagationPolicy="Background")
        cluster.wait(lambda: len(cluster.pods(DEV, gang.run_id)) == 2, 60)
        gang.cancel()
    finally:
        give(cluster, PROD, 1)
        cluster.agent.remove_node("gpu-2")


def test_what_it_does_with_a_job_is_said_before(kueue, cluster):
    "The rules of `quota_answer` against Kueue's own, in some random worlds; benchmarks/kueue_oracle.py plays hundreds"
    worlds = Worlds(cluster.plane, seed=5)
    tally = Counter()
    assert [miss for world in ("a", "b", "c") for miss in play(worlds, f"said-{world}", tally)] == []
    assert tally["reserved", "reserved"] and tally["waits", "waits"]
