"""Nodes, and an agent in the place of their kubelets: it runs a pod's command as a process of this machine.

What a kubelet does and this does too: environment from Secrets and ConfigMaps, volumes, statuses and events, SIGTERM and
the grace period, logs through the API server, the termination message, memory limits, image pull errors.
Where it may (as root on Linux), the process is number 1 of namespaces of its own, with the pod's name as its host name,
its volumes mounted, its user, a root folder that is read-only if the pod says so, and an /etc/hosts that names the
cluster's services. Its image is this machine: the project and its environment are where they are here.
Elsewhere `isolated` is False: the process leads a session of its own, and mount paths, users and names are not real.
HOME, TMPDIR and the working folder are the pod's in both cases.
What it leaves out: images, probes, more than one container, restarts in place (it takes every pod for one with
`restartPolicy: Never`), and volumes other than emptyDir, Secret and ConfigMap, which are empty folders.
"""

import datetime
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import urllib3

from tests.cluster.api import ApiError
from tests.cluster.logs import log_server
from tests.cluster.worker import ISOLATED, ROOT, Worker

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HEARTBEAT = 2.0  # seconds; the control plane takes a node for lost after 20
BROKEN = (ApiError, urllib3.exceptions.HTTPError)


class Agent:
    "The nodes, and the workers of the pods that are bound to them"

    def __init__(self, plane, folder: Path):
        self.api, self.folder = plane.api(patience=60), folder
        self.nodes, self.vanished, self.workers = set(), set(), {}  # names; names; by the pod's uid
        self.services = {}  # addresses that pods know by name, such as {"mlflow": "127.1.2.3"}
        self.image = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "PYTHONPATH": str(ROOT)}  # as an image's ENV
        self.entrypoint = []  # as an image's ENTRYPOINT: for containers without `command`
        self.isolated = _may_isolate()  # may be set to False, for the pods that start from then on
        self.logs = log_server(self, plane.certificate, plane.key)
        self.stopping, self.following = threading.Event(), threading.Lock()

    def start(self) -> "Agent":
        for task in (self._watch, self._beat, self.logs.serve_forever):
            threading.Thread(target=task, daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self.logs.shutdown()
        for worker in list(self.workers.values()):
            worker.abandon()

    def add_node(self, name: str, gpus: int = 1, cpu="16", memory="64Gi", labels: dict | None = None, taints=()) -> str:
        "A node, ready for pods"
        resources = {"cpu": cpu, "memory": memory, "pods": "110", "ephemeral-storage": "100Gi"}
        resources |= {"nvidia.com/gpu": str(gpus)} if gpus else {}
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **(labels or {})}
        self.api.create("nodes", "", {"metadata": {"name": name, "labels": labels}, "spec": {"taints": list(taints)}})
        self.nodes.add(name)
        self._renew_lease(name)
        self._report_ready(name, capacity=resources, allocatable=resources)
        return name

    def remove_node(self, name: str) -> None:
        "The node and its pods are gone at once"
        self.vanish(name)
        for worker in self._workers_on(name):
            worker.delete()
        self.api.delete("nodes", "", name)
        self.nodes.discard(name)
        self.vanished.discard(name)

    def vanish(self, name: str) -> None:
        "The node is lost: its processes end, and nothing more is heard of it"
        self.vanished.add(name)
        for worker in self._workers_on(name):
            worker.abandon()

    def come_back(self, name: str) -> None:
        "A lost node is there again, and says that what ran on it has ended"
        self._renew_lease(name)
        self._report_ready(name)
        for worker in self._workers_on(name):
            worker.report_after_loss()
        with self.following:
            self.vanished.discard(name)
            for pod in self.api.get("pods", fieldSelector=f"spec.nodeName={name}")["items"]:
                self._follow(pod)

    def evict(self, namespace: str, name: str) -> None:
        "As a kubelet does whose node runs out of memory: the pod has failed, and its object stays"
        self.worker(namespace, name).evict()

    def worker(self, namespace: str, name: str) -> Worker | None:
        "What runs a pod: it has the pod's `folder`, and the psutil process `main`"
        return next((w for w in list(self.workers.values()) if (w.namespace, w.name) == (namespace, name)), None)

    def _workers_on(self, node: str) -> list[Worker]:
        return [worker for worker in list(self.workers.values()) if worker.node == node]

    def _report_ready(self, name: str, **resources: dict) -> None:
        states = {"Ready": "True", "MemoryPressure": "False", "DiskPressure": "False", "PIDPressure": "False"}
        conditions = [
            {"type": t, "status": s, "reason": "TestAgent", "lastHeartbeatTime": now()} for t, s in states.items()
        ]
        addresses = [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}]
        port = {"kubeletEndpoint": {"Port": self.logs.server_address[1]}}
        status = {"conditions": conditions, "addresses": addresses, "daemonEndpoints": port, **resources}
        self.api.patch("nodes", "", name, {"status": status}, "status", kind="strategic")

    def _renew_lease(self, name: str) -> None:
        "The heartbeat"
        at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        lease = {"metadata": {"name": name}, "spec": {"holderIdentity": name, "renewTime": at}}
        try:
            self.api.patch("leases", "kube-node-lease", name, lease)
        except ApiError as error:
            if error.status != 404:
                raise
            self.api.create("leases", "kube-node-lease", lease)

    def _beat(self) -> None:
        while not self.stopping.wait(HEARTBEAT):
            for name in self.nodes - self.vanished:
                try:
                    self._renew_lease(name)
                except BROKEN:
                    pass  # there is a next time

    def _watch(self) -> None:
        "All pods as they are, then their changes, and all again where the connection breaks"
        while not self.stopping.is_set():
            try:
                listed = self.api.get("pods")
                for uid in self.workers.keys() - {pod["metadata"]["uid"] for pod in listed["items"]}:
                    self._forget(uid)
                for pod in listed["items"]:
                    with self.following:
                        self._follow(pod)
                for change, pod in self.api.watch("pods", resourceVersion=listed["metadata"]["resourceVersion"]):
                    with self.following:
                        self._forget(pod["metadata"]["uid"]) if change == "DELETED" else self._follow(pod)
            except BROKEN:
                self.stopping.wait(0.2)

    def _forget(self, uid: str) -> None:
        "The pod's object is gone"
        if worker := self.workers.pop(uid, None):
            worker.abandon()
            worker.join(5)
            shutil.rmtree(worker.folder, ignore_errors=True)

    def _follow(self, pod: dict) -> None:
        "What the pod as it is now means for its worker"
        uid = pod["metadata"]["uid"]
        if pod["spec"].get("nodeName") not in self.nodes - self.vanished:
            return
        if uid not in self.workers and pod["status"]["phase"] == "Pending":
            self.workers[uid] = Worker(self, pod)
            self.workers[uid].start()
        if uid in self.workers and "deletionTimestamp" in pod["metadata"]:
            self.workers[uid].terminate(pod["metadata"]["deletionGracePeriodSeconds"])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _may_isolate() -> bool:
    "Whether processes can be given namespaces and mounts of their own here"
    probe = [*ISOLATED, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0
