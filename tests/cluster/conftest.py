"""A real Kubernetes control plane, and an agent that runs pods as processes of this machine: fixtures.

    def test_it(cluster, namespace):
        cluster.admin.create("jobs", namespace, job("j", "echo $GREETING", env=[{"name": "GREETING", "value": "hello"}]))
        assert cluster.wait_job(namespace, "j") == "Complete"
        (pod,) = cluster.pods(namespace, "j")
        assert cluster.admin.logs(namespace, pod["metadata"]["name"]) == "hello\\n"

plane      (session) the control plane; where its servers are missing, all these tests are skipped
    plane.version                           such as (1, 37)
    plane.kubeconfig(user, namespace)       a file for KUBECONFIG; users: admin, prod-user, dev-user, team-user, outsider
    plane.api(user)                         an `Api`: that user's requests, as plain dicts
    plane.url, plane.tokens[user], plane.certificate
    with plane.requests_of(user) as asked       then `asked` has what that user was allowed: ("get", "pods/log"), ...
    plane.down("kube-apiserver"), plane.up("kube-apiserver")      or another server: an outage
cluster    (session) the plane, an agent with the nodes `gpu-1` (one GPU) and `control` (takes no pods), the
           PriorityClasses gpuml-prod (100000) and gpuml-dev (-1000, never preempts)
    cluster.admin                           the `Api` of the administrator:
        .get("pods", namespace, name)  .get("pods", namespace, labelSelector="a=b")["items"]
        .create("jobs", namespace, body)  .patch("jobs", namespace, name, body)  .watch("pods", namespace)
        .delete("pods", namespace, name, gracePeriodSeconds=0)  .logs(namespace, pod, follow="true", tailLines=1)
        raises ApiError(status, message); namespace "" for what has none
    cluster.wait(check, seconds, what)      the first true answer of `check`
    cluster.wait_job(namespace, job)        "Complete" or "Failed"
    cluster.wait_pod(namespace, job, check) the first pod of a Job of which `check(pod)` is true, such as phase("Running")
    cluster.wait_event(namespace, reason)   the message of the first event with that reason
    cluster.pods(namespace, job)            a Job's pods, oldest first
    cluster.events(namespace, name)         [(reason, message)]
    cluster.secret(namespace, "gpuml-s3", AWS_ACCESS_KEY_ID="...", AWS_SECRET_ACCESS_KEY="...")
    cluster.service("mlflow")               an address of this machine that pods know as `mlflow`: start a server there, on
                                            its usual port; skips the test where pods get no /etc/hosts of their own
    cluster.make_namespace(name), cluster.remove_namespace(name)  a name is free again some seconds after its removal
    cluster.remove_pod(namespace, name)                           at once, with SIGKILL
    cluster.agent.add_node(name, gpus=1, cpu="16", memory="64Gi", labels={}, taints=[]), .remove_node(name)
    cluster.agent.vanish(node), .come_back(node)      a lost node: taken for lost after 20 s, its pods deleted 3 s later
    cluster.agent.evict(namespace, pod)               as a kubelet that runs out of memory
    cluster.agent.worker(namespace, pod)              `.folder` (with home/, tmp/, work/), `.main` (a psutil.Process)
    cluster.agent.image["HF_HUB_OFFLINE"] = "1"       environment that every pod finds, as from its image
    cluster.agent.isolated                            pods have their own processes, mounts, host name and /etc/hosts
namespace  the name of a namespace that is this test's alone
site       a project whose `prod` is that namespace, with data and output on a real S3 server: `site.submit(…)`
team, maker, administrator, overlays, tidy          the team's overlay of k8s/, applied: tests/cluster/applied.py
mlflow     (session) a tracking server that pods know as http://mlflow:5000: the file of its database
real       (session) a control plane of its own with two real nodes, `node-1` and `node-2`: kubelet, containerd, kube-proxy,
           kube-router, a device plugin with one GPU, each in a network of its own, and CoreDNS. As root only. It has what
           `cluster` has but for the agent and `service`, and
    real.nodes["node-1"]                    .gpus.set(2), .gpus.set(0, unhealthy=1), .ctr("containers", "ls").stdout,
                                            .programs.stop("kubelet"), .start_kubelet(), .folder with logs and settings
    real.add_nodes(1, memorySwap={...})     another one, with a GPU and settings of its kubelet (tests.cluster.nodes.node)
    real.kubectl("get", "pods", namespace=...).stdout      real.administrator.apply(manifest)
    real.network.host, .service(20)         this machine as pods reach it; an address for a Service
           Its image is `gpuml-train:test` (other names: tests.cluster.nodes.image): busybox, and for a container that asks for
           a GPU or for `gpuml.test/host: 1` this machine's Python, with gpuml, at the same places
real_namespace  a namespace of `real` that is this test's alone
scene      (module) Jobs as gpuml makes them in a namespace of `real`, with a command in the place of `gpuml run`:
           `scene.start("a", "sleep 5", memory="64Mi")`, `.says(job, "running")`, `.ends(job)` (tests.cluster.nodes.scene)
road       a person's project on `real`, with k8s/ applied, data on S3, `dev` and `prod`: `.folder`, `.notebook`, `.endpoint`
pair       words for a job of both nodes of `real`
job(name, command, gpus=1, grace=5, retries=0, env=[...], memory="1Gi", image="...", priority="gpuml-dev", ...), phase(name),
state(pod) are in tests.cluster.cluster. An image whose name contains `no-such-image` can't be pulled.
A memory limit is kept for the whole process tree; what exceeds it ends with 137, OOMKilled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.applied import administrator, maker, overlays, team, tidy, watching  # noqa: F401  fixtures
from tests.cluster.cluster import AgentCluster
from tests.cluster.nodes import real as real_cluster
from tests.cluster.nodes.road import pair, road, system  # noqa: F401  fixtures
from tests.cluster.nodes.scene import Scene
from tests.cluster.plane import READY, Plane
from tests.cluster.programs import missing, remedy
from tests.cluster.site import Site


def pytest_collection_modifyitems(items):
    "A file stays in one process, and all files on real nodes do; where there are no servers, one line for each file says so"
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            name = item.path.stem
            item.add_marker(pytest.mark.xdist_group("nodes" if name.startswith("test_nodes") else name))
    if names := missing(READY):
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=remedy(names)))


@pytest.fixture(scope="session")
def plane(tmp_path_factory):
    plane = Plane(tmp_path_factory.mktemp("plane"))
    yield plane.start()
    plane.stop()


@pytest.fixture(scope="session")
def cluster(plane, tmp_path_factory):
    cluster = AgentCluster(plane, tmp_path_factory.mktemp("pods"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def real():
    if reason := real_cluster.lacks():
        pytest.skip(reason)
    with real_cluster.start() as cluster:
        yield cluster


@pytest.fixture
def real_namespace(real):
    name = real.make_namespace()
    yield name
    real.remove_namespace(name)


@pytest.fixture(scope="module")
def scene(real, tmp_path_factory):
    name = real.make_namespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(real.plane.kubeconfig("admin", name)))
        yield Scene(real, name, str(tmp_path_factory.mktemp("output")))
    real.remove_namespace(name)


@pytest.fixture
def namespace(cluster):
    name = cluster.make_namespace()
    yield name
    cluster.remove_namespace(name)


@pytest.fixture
def site(cluster, namespace, project, s3, monkeypatch):
    return Site(cluster, namespace, project, s3, monkeypatch)


@pytest.fixture(scope="session")
def mlflow(cluster, tmp_path_factory):
    from gpuml.training.store import answers

    address, folder = cluster.service("mlflow"), tmp_path_factory.mktemp("mlflow")
    database = folder / "server.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--host", address, "--port", "5000", "--workers", "1", "--artifacts-destination", str(folder / "files")]
    command += ["--allowed-hosts", f"mlflow:5000,{address}:5000"]
    with open(folder / "mlflow.log", "w") as log:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        cluster.wait(lambda: answers(f"http://{address}:5000"), 120)
        yield database
    finally:
        os.killpg(server.pid, 15)
        server.wait(600)
