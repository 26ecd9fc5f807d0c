"Who reaches whom, from real connections between pods on real nodes, by the NetworkPolicies of k8s/: tests/golden/network.md"

import json
import os
import re
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from tests.cluster.applied import IMAGE, NAMESPACES, made
from tests.cluster.nodes.devices import HOST
from tests.cluster.nodes.machine import run
from tests.cluster.programs import program
from tests.conftest import ROOT
from tests.manifests import find, prepared, render

GOLDEN = ROOT / "tests" / "golden" / "network.md"
APPLIED = ("Namespace", "Service", "NetworkPolicy")
FOLDERS = ("overlays/single-node", "overlays/team", "idle", "monitoring")
CLIENT, SERVER = "node-1", "node-2"
HEAD = """\
Who reaches whom on a cluster with `k8s/`: real connections between pods on two nodes (kube-router holds the rules), from the
pods above to what is on the left. Without the rules all of them connect. The API server listens on 6443.

"""
CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def connects(target):
    try:
        socket.create_connection(target, timeout=3).close()
        return True
    except OSError:
        return False
targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps(list(pool.map(connects, map(tuple, targets)))))
"""


@dataclass(frozen=True)
class Place:
    "Pods of one kind: what they are called here, where they are, and where they listen"

    name: str
    namespace: str
    labels: dict
    ports: dict = field(default_factory=dict)  # by name

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-").replace("'", "")


def labels_of_job(*config: str) -> dict:
    "Of the pods of a job that gpuml makes"
    return made(*config)["spec"]["template"]["metadata"]["labels"]


def labels_of(manifests: list[dict], kind: str, name: str) -> dict:
    return find(manifests, kind, name)["spec"]["template"]["metadata"]["labels"]


def places(manifests: list[dict]) -> list[Place]:
    "Every kind of pod that k8s/ knows, with the labels that it really has"
    jobs = [labels_of_job(config) for config in ("dev", "prod")]
    several = [labels_of_job(config, "compute.nodes=2") for config in ("dev", "prod")]
    system = "gpuml-system"
    return [
        Place("development job", "gpuml-dev", jobs[0], {"metrics": 9464, "other": 8888}),
        Place("production job", "gpuml-prod", jobs[1], {"metrics": 9464, "other": 8888}),
        Place(
            "development job of 2 nodes", "gpuml-dev", several[0], {"metrics": 9464, "meeting": 29400, "other": 8888}
        ),
        Place(
            "production job of 2 nodes", "gpuml-prod", several[1], {"metrics": 9464, "meeting": 29400, "other": 8888}
        ),
        Place("JupyterLab", system, labels_of(manifests, "StatefulSet", "jupyter"), {"http": 8888}),
        Place("MLflow", system, labels_of(manifests, "Deployment", "mlflow"), {"http": 5000}),
        Place("MinIO", system, labels_of(manifests, "StatefulSet", "minio"), {"s3": 9000, "console": 9001}),
        Place("buckets", system, labels_of(manifests, "Job", "buckets")),
        Place("PostgreSQL", system, labels_of(manifests, "StatefulSet", "postgres"), {"postgres": 5432}),
        Place("idle", system, labels_of(manifests, "Deployment", "idle")),
        Place("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}, {"web": 9090}),
        Place("Grafana", "monitoring", {"app.kubernetes.io/name": "grafana"}),
        Place("another team's pod", "default", {"app": "other"}, {"http": 8080}),
    ]


def pod(place: Place, node: str, serves: bool) -> dict:
    "As Pod Security wants it; a server listens, a client waits for what it shall connect to"
    servers = "".join(f"httpd -f -p {port} & " for port in place.ports.values()) if serves else ""
    container = {
        "name": "main",
        "image": IMAGE,
        "command": ["sh", "-c", f"{servers}exec sleep 3600"],
        "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if serves:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in place.ports.items()]
    else:
        container["resources"]["limits"][HOST] = 1
    spec = {
        "containers": [container],
        "nodeName": node,
        "tolerations": [{"operator": "Exists"}],  # a node of a busy machine may count as lost for a moment
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    name = f"{place.slug}-{'server' if serves else 'client'}"
    return {"metadata": {"name": name, "labels": place.labels}, "spec": spec}


class Outside:
    "Servers of this machine, at an address of the internet's, one of a cloud's metadata, and one of a private network"

    def __init__(self, network):
        low = f"{network.block // 250}.{1 + network.block % 250}"
        self.internet, self.metadata, self.private = f"198.18.{low}", f"169.254.{low}", network.host
        self.sockets = []
        for address in (self.internet, self.metadata):
            run("ip", "addr", "add", f"{address}/32", "dev", network.bridge)
        for address, port in (
            (self.internet, 443),
            (self.internet, 80),
            (self.metadata, 80),
            (self.metadata, 443),
            (self.private, 443),
            (self.private, 5432),
        ):
            listener = socket.create_server((address, port))
            self.sockets.append(listener)
            threading.Thread(target=self._accept, args=[listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    def close(self) -> None:
        for listener in self.sockets:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@dataclass
class Site:
    "What is on the cluster, and how to ask"

    real: object  # of tests.cluster.nodes
    places: list[Place]
    outside: Outside

    def address(self, place: Place) -> str:
        return self.real.admin.get("pods", place.namespace, f"{place.slug}-server")["status"]["podIP"]

    def targets(self) -> dict[str, tuple[str, int]]:
        "By name: services by theirs, as gpuml asks for them; jobs and what no Service has by the pod's address"
        at = {place.name: self.address(place) for place in self.places if place.ports}
        system = "gpuml-system.svc.cluster.local"
        return {
            "a name (DNS)": ("kube-dns.kube-system.svc.cluster.local", 53),
            "MLflow": (f"mlflow.{system}", 5000),
            "S3 (MinIO)": (f"minio.{system}", 9000),
            "MinIO's console": (at["MinIO"], 9001),
            "PostgreSQL": (f"postgres.{system}", 5432),
            "JupyterLab": (f"jupyter.{system}", 8888),
            "development job's metrics": (at["development job"], 9464),
            "its other ports": (at["development job"], 8888),
            "production job's metrics": (at["production job"], 9464),
            "its other ports ": (at["production job"], 8888),
            "development job of 2 nodes": (at["development job of 2 nodes"], 29400),
            "its other ports  ": (at["development job of 2 nodes"], 8888),
            "its metrics": (at["development job of 2 nodes"], 9464),
            "production job of 2 nodes": (at["production job of 2 nodes"], 29400),
            "its other ports   ": (at["production job of 2 nodes"], 8888),
            "Prometheus": ("prometheus-operated.monitoring.svc.cluster.local", 9090),
            "another team's pod": (at["another team's pod"], 8080),
            "the API server": ("kubernetes.default.svc.cluster.local", 443),
            "https outside": (self.outside.internet, 443),
            "http outside": (self.outside.internet, 80),
            "https in a private network": (self.outside.private, 443),
            "a database in a private network": (self.outside.private, 5432),
            "the cloud's metadata": (self.outside.metadata, 80),
            "the same by https": (self.outside.metadata, 443),
        }

    def connects(self, place: Place, targets: list[tuple[str, int]]) -> list[bool]:
        "From a place's client, at the same time"
        line = ["exec", "--namespace", place.namespace, f"{place.slug}-client", "--", "python", "-c", CONNECT]
        return json.loads(self.real.kubectl(*line, json.dumps(targets)).stdout)

    def matrix(self) -> dict[str, dict[str, bool]]:
        "Of every kind of pod, whether it reaches each target"
        targets = self.targets()

        def ask(place: Place) -> dict[str, bool]:
            return dict(zip(targets, self.connects(place, list(targets.values())), strict=True))

        with ThreadPoolExecutor(len(self.places)) as pool:
            return dict(zip([place.name for place in self.places], pool.map(ask, self.places), strict=True))


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> list[dict]:
    "Of what an administrator applies: namespaces, services, network rules; and what they are for"
    copy, rendered = prepared(tmp_path_factory.mktemp("administrator")), {}
    for folder in FOLDERS:
        for m in render(copy, f"../{folder}" if "/" not in folder else folder.removeprefix("overlays/")):
            rendered.setdefault((m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]), m)
    return list(rendered.values())


@pytest.fixture(scope="module")
def site(real, manifests):
    "All pods, connected, before a rule holds"
    for m in manifests:
        if m["kind"] in ("Namespace", "Service"):
            real.administrator.apply(m)
    real.admin.create("namespaces", "", {"metadata": {"name": "monitoring"}})
    service = {"clusterIP": "None", "selector": {"app.kubernetes.io/name": "prometheus"}, "ports": [{"port": 9090}]}
    real.admin.create("services", "monitoring", {"metadata": {"name": "prometheus-operated"}, "spec": service})
    kinds = places(manifests)
    for space in {place.namespace for place in kinds}:
        real.wait(lambda s=space: real.plane.has_service_account(s), 30)
    outside = Outside(real.network)
    for place in kinds:
        real.admin.create("pods", place.namespace, pod(place, CLIENT, serves=False))
        if place.ports:
            real.admin.create("pods", place.namespace, pod(place, SERVER, serves=True))
    for place in kinds:
        real.wait(lambda p=place: all(is_ready(pod) for pod in real.admin.get("pods", p.namespace)["items"]), 180)
    yield Site(real, kinds, outside)
    outside.close()
    for place in kinds:
        for part in ("client", "server") if place.ports else ("client",):
            real.remove_pod(place.namespace, f"{place.slug}-{part}")
    for name in (*NAMESPACES, "monitoring"):
        real.remove_namespace(name)


def is_ready(pod: dict) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def table(matrix: dict[str, dict[str, bool]]) -> str:
    "Rows are targets, columns who connects: there are fewer"
    head = f"| | {' | '.join(matrix)} |\n|---|{'---|' * len(matrix)}\n"
    targets = next(iter(matrix.values()))
    return head + "".join(
        f"| {target.strip()} | {' | '.join('yes' if reached[target] else '' for reached in matrix.values())} |\n"
        for target in targets
    )


@pytest.fixture(scope="module")
def ruled(site, manifests, real):
    "Everybody reaches everything, and then the rules are applied"
    lacks = []

    def are_all_reached() -> bool:
        rows = site.matrix().items()
        lacks.append([(name, target) for name, row in rows for target, reached in row.items() if not reached])
        return not lacks[-1]

    try:
        real.wait(are_all_reached, 60)
    except AssertionError:
        assert not lacks[-1]
    for m in manifests:
        if m["kind"] == "NetworkPolicy":
            real.administrator.apply(m)
    return site


def test_who_reaches_whom(ruled, real):
    "Exactly this, written from the connections: golden/network.md"
    expected, seen = GOLDEN.read_text() if GOLDEN.exists() else "", [""]

    def settled() -> bool:  # kube-router takes up one rule after the other
        seen.append(HEAD + table(ruled.matrix()))
        return seen[-1] == (seen[-2] if os.environ.get("GPUML_GOLDEN") else expected)

    try:
        real.wait(settled, 120)
    except AssertionError:
        assert seen[-1] == expected
    if os.environ.get("GPUML_GOLDEN"):
        GOLDEN.write_text(seen[-1])


def test_two_pods_of_one_node(ruled, real):
    "The rules hold between neighbours, too"
    job, server = (place for place in ruled.places if place.ports and place.name in ("development job", "MLflow"))
    neighbour = Place("neighbour", "default", {"app": "other"})
    real.admin.create("pods", neighbour.namespace, pod(neighbour, SERVER, serves=False))
    try:
        real.wait(lambda: is_ready(real.admin.get("pods", neighbour.namespace, f"{neighbour.slug}-client")), 60)
        targets = [(ruled.address(job), 9464), (ruled.address(server), 5000)]
        assert ruled.connects(neighbour, targets) == [False, False]
    finally:
        real.remove_pod(neighbour.namespace, f"{neighbour.slug}-client")


def test_jupyterlab_by_port_forward(ruled, real):
    "Nobody's pod reaches it, and who may forward its port does"
    words = [
        "--kubeconfig",
        str(real.plane.kubeconfig()),
        "-n",
        "gpuml-system",
        "port-forward",
        "pod/jupyterlab-server",
    ]
    line = [program("kubectl"), *words, ":8888"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as forward:
        try:
            (port,) = re.findall(r"127.0.0.1:(\d+)", forward.stdout.readline())
            with pytest.raises(urllib.error.HTTPError, match="404"):  # the server's own answer: it has no page
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30)
        finally:
            forward.kill()
