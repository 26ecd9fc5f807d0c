"A cluster of many nodes that are only played: KWOK in the place of their kubelets, on a control plane of its own"

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import yaml

from gpuml.base.config import Config
from gpuml.cluster.manifest import Source, manifest
from tests.cluster.cluster import PATIENCE
from tests.cluster.plane import Plane
from tests.cluster.programs import manifests, program
from tests.conftest import free_port

GPUS = 8  # of each node
FAST = {"kube-api-qps": 3000, "kube-api-burst": 3000}
PATIENT = {"node-monitor-grace-period": "24h", "concurrent-job-syncs": 20}  # nodes are not asked whether they live
COMMAND = ["setpriv", "--pdeathsig", "KILL"]


class ManyNodes:
    "A control plane and so many ready nodes of 8 GPUs; `start` it, and `stop` kills it"

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.plane = Plane(folder, controller_flags=FAST | PATIENT, scheduler_flags=FAST)
        self.admin = self.plane.api()
        self.log = folder / "pod.log"  # what every pod has printed
        self.log.write_text("training\n")

    def start(self) -> "ManyNodes":
        self.plane.start()
        for name, value in (("gpuml-prod", 100_000), ("gpuml-dev", -1000)):
            self.admin.create("priorityclasses", "", {"metadata": {"name": name}, "value": value})
        self._play()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: self.admin.create("nodes", "", node(f"node-{i:04}")), range(self.count)))
        self.wait(lambda: self._ready() == self.count, 120, "nodes to be ready")
        return self

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(600)
        self.plane.stop()

    def make_namespace(self, name: str) -> None:
        self.admin.create("namespaces", "", {"metadata": {"name": name}})
        self.wait(lambda: self.plane.has_service_account(name), 60, f"the ServiceAccount of {name}")

    def fill(self, namespace: str, pods: int, gpus: int = 1) -> None:
        "So many pods of somebody else's, each with so many GPUs; on nodes once `wait_running` says so"
        container = {
            "name": "main",
            "image": "other",
            "resources": {"limits": {"nvidia.com/gpu": gpus} if gpus else {}},
        }
        labels, spec = {"app": "other"}, {"containers": [container], "priorityClassName": "gpuml-dev"}
        template = {"metadata": {"labels": labels}, "spec": spec}
        body = {"replicas": pods, "selector": {"matchLabels": labels}, "template": template}
        self.admin.create("replicasets", namespace, {"metadata": {"name": "other"}, "spec": body})

    def submit(self, config: Config, start: str, count: int) -> list[str]:
        "So many Jobs as gpuml makes them; their names, which begin so"
        jobs = [
            manifest(config, f"{start}-{i:05}", Source(f"{i:05}", "s3://m/b", "a.ipynb", "ada")) for i in range(count)
        ]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda job: self.admin.create("jobs", config.compute.namespace, job), jobs))
        return [job["metadata"]["name"] for job in jobs]

    def phases(self, namespace: str) -> Counter:
        "Of a namespace's pods"
        return Counter(
            pod["status"]["phase"] for pod in self.admin.get("pods", namespace, resourceVersion="0")["items"]
        )

    def wait_running(self, namespace: str, pods: int, seconds: float = 300) -> None:
        self.wait(lambda: self.phases(namespace)["Running"] >= pods, seconds, f"{pods} pods in {namespace} to run", 1.0)

    def wait(self, check, seconds: float, what: str, pause: float = 0.2) -> None:
        end = time.monotonic() + seconds * PATIENCE
        while not check():
            assert time.monotonic() < end, f"not within {seconds * PATIENCE:.0f} s: {what}"
            time.sleep(pause)

    def _ready(self) -> int:
        nodes = self.admin.get("nodes", resourceVersion="0")["items"]
        conditions = [c for node in nodes for c in node["status"].get("conditions", [])]
        return sum((c["type"], c["status"]) == ("Ready", "True") for c in conditions)

    def _play(self) -> None:
        "Start KWOK: pods run at once and for ever, and are gone at once when they are deleted"
        files = [manifests("kwok") / name for name in ("node-fast.yaml", "pod-fast.yaml")]
        stages = [stage for file in files for stage in yaml.safe_load_all(file.read_text())]
        stages = [stage for stage in stages if stage["metadata"]["name"] != "pod-complete"]
        logs = {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "ClusterLogs", "metadata": {"name": "logs"}}
        logs["spec"] = {"logs": [{"logsFile": str(self.log)}]}
        settings = self.folder / "kwok.yaml"
        settings.write_text(yaml.safe_dump_all([*stages, logs]))
        port = free_port()
        command = [*COMMAND, program("kwok"), f"--kubeconfig={self.plane.kubeconfig()}", f"--config={settings}"]
        command += ["--manage-all-nodes=true", "--node-lease-duration-seconds=0", "--node-ip=127.0.0.1"]
        command += [f"--node-port={port}", f"--server-address=127.0.0.1:{port}"]
        command += [f"--tls-cert-file={self.plane.certificate}", f"--tls-private-key-file={self.plane.key}"]
        with open(self.folder / "kwok.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def node(name: str) -> dict:
    "As its kubelet would register it"
    resources = {"cpu": "128", "memory": "2Ti", "pods": "110", "ephemeral-storage": "10Ti", "nvidia.com/gpu": str(GPUS)}
    metadata = {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}}
    return {"metadata": metadata, "status": {"capacity": resources, "allocatable": resources}}


@contextmanager
def idle_gpus(pods: list[str]) -> Iterator[str]:
    "The address of what answers as Prometheus does where no pod's GPU has worked"

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            query = {
                name: float(values[0])
                for name, values in parse_qs(urlsplit(self.path).query).items()
                if name != "query"
            }
            points = [[query["end"] - i * query["step"], "0"] for i in range(20, -1, -1)]
            data = json.dumps({"data": {"result": [{"metric": {"pod": pod}, "values": points} for pod in pods]}})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
