"The real cluster: a control plane on a bridge of this machine, real nodes, and CoreDNS"

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.cluster.administer import Administrator
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import dns, footprint, machine
from tests.cluster.nodes.certificate import sign
from tests.cluster.nodes.image import write_images
from tests.cluster.nodes.network import Network
from tests.cluster.nodes.node import Node
from tests.cluster.plane import USERS, Plane
from tests.cluster.programs import missing, program, remedy

PROGRAMS = [
    "kubelet",
    "kube-proxy",
    "kubectl",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "coredns",
    "kube-router",
]
PROGRAMS += ["gpu-plugin"]
MOST = 12  # nodes: the accounts of all are made at the start
TEAM = "team-user"  # who develops, and submits to production
LOST = "30s"  # after so long without a sign of life a node counts as lost
ROUTER = [  # what kube-router reads
    {"apiGroups": [""], "resources": ["namespaces", "pods", "services", "nodes", "endpoints"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
]  # fmt: skip


def lacks() -> str:
    "Why there can be no real nodes, in a line; empty where they can be"
    names = missing(PROGRAMS)
    return remedy(names) if names else machine.lacks()


class Real(Cluster):
    "Nodes by name, each with a GPU that can be taken away: `nodes['node-2'].gpus.set(0)`"

    def __init__(self, plane: Plane, network: Network, folder: Path):
        super().__init__(plane)
        self.network, self.folder, self.nodes = network, folder, {}
        self.administrator, self.images = Administrator(plane), write_images(folder)
        self._allow_router()

    def add_nodes(self, *gpus: int, **kubelet) -> list[Node]:
        "One for each number of GPUs, ready for pods; settings of their kubelets may differ"
        first, others = len(self.nodes) + 1, [node.index for node in self.nodes.values()]
        new = [Node(self.plane, self.network, self.folder, first + i, n, **kubelet) for i, n in enumerate(gpus)]
        for node in new:
            node.launch(others)
            others.append(node.index)
            self.nodes[node.name] = node
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.load(self.images), new))
        for node in new:  # in this thread: programs end with the thread that started them
            node.join()
        for node in new:
            node.programs.wait("kubelet", node.is_ready)
            node.start_router()
        return new

    def start_dns(self) -> None:
        "Names of Services, for all pods"
        for manifest in dns.manifests(self.network.service(10)):
            self.administrator.apply(manifest)
        self.wait(lambda: self._available("kube-system", dns.NAME), 60, "CoreDNS")

    def kubectl(self, *arguments: str, check: bool = True, namespace: str = "") -> subprocess.CompletedProcess:
        "As the administrator"
        line = [program("kubectl"), "--kubeconfig", str(self.plane.kubeconfig()), *arguments]
        line += ["--namespace", namespace] if namespace else []
        done = subprocess.run(line, capture_output=True, text=True)
        assert not (check and done.returncode), f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    def namespaces(self) -> set[str]:
        return {item["metadata"]["name"] for item in self.admin.get("namespaces")["items"]}

    def stop(self) -> None:
        for node in self.nodes.values():
            node.programs.stop_all()

    def _available(self, namespace: str, deployment: str) -> bool:
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}"
        return json.loads(self.admin.request("GET", path).data)["status"].get("availableReplicas", 0) > 0

    def _allow_router(self) -> None:
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kube-router"}
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "kube-router"}
        named = {"metadata": {"name": "kube-router"}}
        self.admin.create("clusterroles", "", {**named, "rules": ROUTER})
        self.admin.create("clusterrolebindings", "", {**named, "roleRef": role, "subjects": [subject]})


def make_plane(folder: Path, network: Network) -> Plane:
    "A control plane that nodes reach, and that knows them"
    nodes = {f"system:node:node-{i}": ["system:nodes"] for i in range(1, MOST + 1)}
    users = {**USERS, **nodes, "system:kube-proxy": [], "kube-router": []}
    controllers = {"node-monitor-grace-period": LOST}
    plane = Plane(
        folder,
        controller_flags=controllers,
        address=network.host,
        services=str(network.services),
        users=users,
        port=6443,  # which NetworkPolicies name: they see where a Service leads
    )
    certificate, key = sign(plane, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    plane.apiserver_flags |= {
        "advertise-address": network.host,
        "endpoint-reconciler-type": "lease",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        "kubelet-certificate-authority": plane.certificate,
        "kubelet-client-certificate": certificate,
        "kubelet-client-key": key,
    }
    return plane


@contextmanager
def start() -> Iterator[Real]:
    "The whole cluster, with two nodes of a GPU each; in the end nothing is left of it"
    folder, network = footprint.begin()
    with ExitStack() as end:
        end.callback(footprint.clear, folder)
        network.start()
        (folder / "plane").mkdir()
        plane = make_plane(folder / "plane", network)
        end.callback(plane.stop)
        real = Real(plane.start(), network, folder)
        end.callback(real.stop)
        real.add_nodes(1, 1)
        real.start_dns()
        yield real
