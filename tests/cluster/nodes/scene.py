"Jobs as gpuml makes them, in a namespace of the real cluster, with a command of the test in the place of `gpuml run`"

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from gpuml.base.config import Config
from gpuml.cluster.api import Api
from gpuml.cluster.manifest import Source, manifest
from gpuml.cluster.remote import ClusterJob, cluster_job
from gpuml.jobs.handle import State
from tests.cluster.nodes import machine, network
from tests.cluster.nodes.devices import HOST
from tests.cluster.nodes.image import TRAIN
from tests.cluster.nodes.node import Node
from tests.cluster.nodes.real import Real

TAINT = "gpuml.test/scene"  # keeps others' pods from nodes that a test has made for itself
COMPUTE = {  # a device that every node has a hundred of, so that many scenes are played at once
    "gpu_resource": HOST, "gpus": 1, "cpu": "20m", "memory": "128Mi", "disk": "64Mi", "shared_memory": "16Mi", "grace": 2,
    "retries": 0, "s3_secret": None, "image": TRAIN, "priority_class": "gpuml-dev", "tolerations": [TAINT],
}  # fmt: skip


class Scene:
    "What gpuml makes of a config, and what it says of it"

    def __init__(self, real: Real, namespace: str, output: str):
        self.real, self.namespace, self.output = real, namespace, output

    def start(self, name: str, command: str | list[str], edit: Callable[[dict], object] | None = None, **compute):
        "A Job; a command as text is run by sh; `edit` changes the pod's spec, as an administrator's webhook does"
        settings = COMPUTE | {"namespace": self.namespace} | compute
        config = Config(data={"train": "a.csv"}, compute=settings, output=self.output)
        made = manifest(config, name, Source("0f2a9c11d4", f"{self.output}/x.tar.gz", "train.ipynb"))
        pod = made["spec"]["template"]["spec"]
        pod["containers"][0]["command"] = ["sh", "-c", command] if isinstance(command, str) else command
        if edit:
            edit(pod)
        return cluster_job(self.real.admin.create("jobs", self.namespace, made), Api(), None)

    def says(self, job: ClusterJob, part: str, seconds: float = 30) -> State:
        "The first state whose phase and sentence have a part in them"
        states = []

        def look():
            states.append(job.status)
            return part in str(states[-1]) or states[-1].over

        begun = time.monotonic()
        with suppress(AssertionError):
            self.real.wait(look, seconds)
        assert part in str(states[-1]), list(dict.fromkeys(map(str, states)))
        print(f"{job.run_id}: {time.monotonic() - begun:.1f} s: {states[-1]}")
        return states[-1]

    def ends(self, job: ClusterJob, seconds: float = 60) -> State:
        "The state in which a job is over"
        states = []

        def look():
            states.append(job.status)
            return states[-1].over

        self.real.wait(look, seconds, f"{job.run_id} to be over")
        print(f"{job.run_id}: {states[-1]}")
        return states[-1]


@contextmanager
def own_nodes(real: Real, count: int, gpus: int = 0, **kubelet) -> Iterator[list[Node]]:
    "Nodes for one test, with settings of their kubelets; others' pods don't come, and they go at the end"
    nodes = real.add_nodes(*[gpus] * count, **kubelet)
    try:
        for node in nodes:
            real.kubectl("taint", "node", node.name, f"{TAINT}=:NoSchedule")
        yield nodes
    finally:
        for node in nodes:
            power_off(real, node)
            real.kubectl("delete", "node", node.name, "--ignore-not-found", "--wait=false", check=False)


def on(node: Node) -> dict:
    "Settings of `compute` for a job that is to run on a node"
    return {"node_selector": {"kubernetes.io/hostname": node.name}}


def power_off(real: Real, node: Node) -> None:
    "Kubelet, containerd, shims and containers of a node end with SIGKILL, all at once"

    def is_off():
        pids = network.processes_in(real.network.namespace(node.index)) | machine.processes_in(node.group)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    real.wait(is_off, 20, f"{node.name} to be off")
