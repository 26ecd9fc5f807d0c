"""What is promised of two nodes with two processes each, tried on two real nodes; pytest finds it only by its name:

    [JOBS=10] python -m pytest tests/cluster/nodes/matrix.py -n 0 -s [-k dead]      JOBS of three random moments each

Each row is a job that something happens to: on a quiet machine of two cores about a minute for each attempt. A row prints
what happened, when, and how each pod ended; the weights have to be those of four processes that nothing happens to.
"""

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.cluster.sending import submit
from gpuml.training.attempts import newest_checkpoint
from tests.cluster.nodes import faults, machine
from tests.cluster.nodes.road import gpus_of, set_gpus, undisturbed
from tests.cluster.nodes.scene import TAINT, own_nodes, power_off

LENGTH = ["train.epochs=24", "train.checkpoint_updates=10", "train.slots=4"]
FOUR = [
    *LENGTH,
    "compute.nodes=2",
    "compute.gpus=2",
    "compute.cpu=100m",
    "compute.disk=4Gi",
    f"compute.tolerations=[{TAINT}]",
]
NAMESPACE = "gpuml-dev"
WORKER = "gpuml.training.worker"
KNOWN = {}  # the undisturbed weights, once they are made


@pytest.fixture(scope="module")
def pair_of_nodes(real, system):
    "Two nodes with two GPUs each, without S3 and MLflow on them"
    with own_nodes(real, 2, gpus=2) as nodes:
        real.wait(lambda: [gpus_of(real, node.name) for node in nodes] == ["2", "2"])
        yield nodes


@pytest.fixture
def training(real, road, pair_of_nodes):
    "A job of both nodes that has a checkpoint, and what is known of it"
    for name in ("node-1", "node-2"):
        set_gpus(real, name, 0)
    job = submit(load("dev", FOUR), road.notebook)
    watch = Watch(real, road, job)
    watch.await_checkpoint()
    yield watch
    for name in ("node-1", "node-2"):
        set_gpus(real, name, 1)


class Watch:
    "A job on two nodes, and all that is seen of it"

    def __init__(self, real, road, job):
        self.real, self.road, self.job = real, road, job
        self.pods, self.begun = faults.Seen(real, NAMESPACE, job.run_id), time.monotonic()

    def newest(self) -> int:
        return newest_checkpoint(Storage(self.road.endpoint), self.job.place) or 0

    def await_checkpoint(self, after: int = 0) -> None:
        "Until both pods run, and there is a checkpoint that is newer"
        self.real.wait(lambda: self.job.status.over or self.newest() > after, 300, "a checkpoint")

    def report(self, what: str) -> None:
        "A line with the time, the state and the newest checkpoint"
        state = self.job.status
        print(
            f"  {time.monotonic() - self.begun:6.1f} s  {what}  [{state}; {state.progress}; checkpoint {self.newest()}]",
            flush=True,
        )

    def await_end(self) -> list[str]:
        "All states until the job is over"
        states = []
        self.real.wait(
            lambda: self.pods.look() and states.append(str(self.job.status)) or self.job.status.over, 600, "its end"
        )
        self.report(f"over, after {self.job.status.attempts} attempts: {self.pods.ends()}")
        return list(dict.fromkeys(states))

    def certified(self) -> None:
        "It is, and its weights are those of a run that nothing happened to"
        assert self.job.status.phase == "succeeded", self.job.logs()
        assert Storage(self.road.endpoint).info(f"{self.job.place}/certificate.json")
        weights = (self.job.run.folder / "model" / "model.safetensors").read_bytes()
        if "weights" not in KNOWN:
            KNOWN["weights"] = undisturbed(self.road, *LENGTH, GPUML_GPUS="4")
        assert weights == KNOWN["weights"]
        print("  certified, and the bits are equal", flush=True)


def workers(watch: Watch, pod: dict) -> list[int]:
    "The processes that train in a pod"
    return [pid for pid, line in faults.processes(watch.real, pod).items() if WORKER in line]


def evict(watch: Watch, pod: dict, chance: random.Random) -> None:
    name = pod["metadata"]["name"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
    watch.real.admin.create("pods", NAMESPACE, body, name, "eviction")


def remove_by_force(watch: Watch, pod: dict, chance: random.Random) -> None:
    watch.real.remove_pod(NAMESPACE, pod["metadata"]["name"])


def kill_pod(watch: Watch, pod: dict, chance: random.Random) -> None:
    faults.send([faults.main_process(watch.real, pod)], signal.SIGKILL)


def signal_worker(number: signal.Signals) -> Callable:
    def send(watch: Watch, pod: dict, chance: random.Random) -> None:
        faults.send(chance.sample(workers(watch, pod), 1), number)

    return send


def stop_pod(watch: Watch, pod: dict, chance: random.Random) -> None:
    faults.send(faults.processes(watch.real, pod), signal.SIGSTOP)


FAULTS = {
    "evicted": evict,
    "deleted by force": remove_by_force,
    "SIGKILL to the pod": kill_pod,
    "SIGTERM to a worker": signal_worker(signal.SIGTERM),
    "SIGKILL to a worker": signal_worker(signal.SIGKILL),
    "SIGSTOP to a worker": signal_worker(signal.SIGSTOP),
    "SIGSTOP to the pod": stop_pod,
}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_goes_on_after(training, fault, index):
    before = training.newest()
    FAULTS[fault](training, training.pods.running()[index], random.Random(0))
    training.report(f"pod {index}: {fault}, after checkpoint {before}")
    training.await_end()
    training.certified()


@pytest.mark.parametrize("seconds", [20, 150])
def test_goes_on_after_a_cut_network(real, training, pair_of_nodes, seconds):
    "A node's cable is out for so long: it sees neither the other one nor the API server nor S3"
    cable = f"gv{real.network.number}-{pair_of_nodes[1].index}"
    machine.run("ip", "link", "set", cable, "down")
    training.report(f"{pair_of_nodes[1].name} is cut off")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        training.pods.look()
        time.sleep(2)
    training.report("about to be connected again")
    machine.run("ip", "link", "set", cable, "up")
    print(*training.await_end(), sep="\n")
    training.certified()


def test_ends_where_memory_is_short(real, road, pair_of_nodes):
    "The job ends with one sentence, in both pods"
    for name in ("node-1", "node-2"):
        set_gpus(real, name, 0)
    job = submit(load("dev", [*FOUR, "compute.memory=500Mi", "compute.retries=0"]), road.notebook)
    watch = Watch(real, road, job)
    watch.await_end()
    assert job.status.phase == "failed" and job.status.exit_code in (71, 137)
    print(job.why())


@pytest.mark.parametrize("seed", range(int(os.environ.get("JOBS", 10))))
def test_random_moments(training, seed):
    "Three faults at random moments, also of a start"
    chance = random.Random(seed)
    happened = []
    while not training.job.status.over and len(happened) < 3:
        fault, index = chance.choice(list(FAULTS)), chance.randrange(2)
        time.sleep(chance.uniform(0, 8))
        pods = training.pods.running()
        before = training.newest()
        if len(pods) < 2 or training.job.status.over:
            continue
        try:
            FAULTS[fault](training, pods[index], chance)
        except (ValueError, StopIteration):  # no worker runs at this moment
            continue
        happened.append((fault, index))
        training.report(f"pod {index}: {fault}, after checkpoint {before}")
        attempts = training.job.status.attempts
        training.real.wait(
            lambda attempts=attempts: training.job.status.over or training.job.status.attempts > attempts,
            400,
            "the next attempt",
        )
        if chance.random() < 0.7:  # else also while it starts
            training.await_checkpoint(training.newest() - 1)
    training.await_end()
    training.certified()
    print(f"  {len(happened)} faults: {happened}")


def test_goes_on_elsewhere_after_a_dead_node(real, training, pair_of_nodes):
    "Its node is off; an administrator says so; a third one takes its place"
    with own_nodes(real, 1, gpus=2) as (third,):
        (pod,) = [p for p in training.pods.running() if p["spec"]["nodeName"] == pair_of_nodes[1].name]
        power_off(real, pair_of_nodes[1])
        training.report(f"{pair_of_nodes[1].name} is off, with pod {faults.number(pod)}")
        real.wait(lambda: "does not answer" in str(training.job.status), 120, "a word of the node")
        training.report("said")
        real.kubectl("taint", "node", pair_of_nodes[1].name, "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
        training.await_end()
        nodes = {pod["spec"].get("nodeName") for pod in training.pods.by_uid.values()}
        assert third.name in nodes
        training.certified()
