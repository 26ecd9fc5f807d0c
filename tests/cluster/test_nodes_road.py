"The whole road on real nodes, as an administrator, a developer and production go it: nothing of it is played"

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.cluster.jobs import find
from gpuml.cluster.sending import submit
from gpuml.training.attempts import newest_checkpoint, read
from tests.cluster.cluster import phase
from tests.cluster.nodes import faults
from tests.cluster.nodes.road import GRACE, gpus_of, undisturbed
from tests.cluster.nodes.scene import TAINT, own_nodes, power_off
from tests.standing import make_calm


def facts_of(job):
    "What the notebook's last cell has found in the container"
    notebook = json.loads(job.notebook().read_text())
    texts = ["".join(o.get("text", "")) for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return json.loads(next(text for text in texts if text.startswith("FACTS")).removeprefix("FACTS"))


def test_the_whole_road(real, road):
    begun = time.monotonic()
    seconds = {}

    def passed(what):
        seconds[what] = round(time.monotonic() - begun, 1)

    make_calm(road.notebook, 0.5)
    dev = submit(load("dev"), road.notebook)
    passed("development submitted")
    real.wait_pod("gpuml-dev", dev.run_id, phase("Running"))
    passed("its container runs")
    log = open(road.folder / "followed.txt", "w+")
    command = [sys.executable, "-m", "gpuml", "logs", dev.run_id, "--follow"]
    follower = subprocess.Popen(command, cwd=road.folder, stdout=log, stderr=subprocess.STDOUT)
    real.wait(lambda: "update" in dev.status.progress and "update 0" not in dev.status.progress, 120)
    passed("it trains")
    containers = real.nodes["node-1"].ctr("containers", "ls").stdout + real.nodes["node-1"].ctr("tasks", "ls").stdout
    by_kubelet = real.kubectl("logs", f"job/{dev.run_id}", namespace="gpuml-dev").stdout
    prod = submit(load("prod", ["train.epochs=2"]), road.notebook)
    passed("production submitted")
    real.wait_pod("gpuml-prod", prod.run_id, phase("Running"), GRACE + 10)
    passed("production's container runs")
    assert prod.wait(600).phase == "succeeded", prod.logs()
    passed("production is done")
    assert dev.wait(600).phase == "succeeded", dev.logs()
    passed("development is done")
    assert follower.wait(600) == 0
    log.seek(0)
    followed = log.read()
    print(json.dumps(seconds, indent=1), containers, followed, sep="\n")

    for job in (dev, prod):
        assert Storage(road.endpoint).info(f"{job.place}/certificate.json")
        facts = facts_of(job)
        print(facts)
        assert (facts["user"], facts["group"], facts["groups"]) == (10001, 10001, [10001])
        assert facts["CapEff"] == facts["CapBnd"] == "0000000000000000"
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
        assert facts["root"] == "Read-only file system" and facts["work"] is None
        assert not facts["token"] and facts["gpu"] == "gpu-0" and facts["mlflow"] == "OK"
        assert facts["shm"] == 2**30 and facts["pid 1"] == "gpuml"
    assert dev.outcome()["attempt"] == 2 and prod.outcome()["attempt"] == 1
    assert dev.status.attempts == 2
    assert any(reason == "Preempted" for reason, _ in real.events("gpuml-dev"))
    assert (dev.run.folder / "model" / "model.safetensors").read_bytes() == undisturbed(road)
    assert "SIGTERM: the kernel is told" in followed and "with a checkpoint (exit code 75)" in followed
    assert followed.count(": reading data") == 2  # once in each attempt
    printed = [line for line in by_kubelet.splitlines() if not line.startswith("{")]  # progress is for gpuml to draw
    assert printed and set(printed) <= set(followed.splitlines())
    assert find(dev.run_id, [load("dev")]).status.phase == "succeeded"


@pytest.fixture
def doomed(real, road):
    "A node with the one GPU of the cluster; that of node-1 comes back"
    gpus = real.nodes["node-1"].gpus
    gpus.set(0)
    try:
        with own_nodes(real, 1, gpus=1) as (node,):
            real.wait(lambda: gpus_of(real, "node-1") == "0")
            yield node
    finally:
        gpus.set(1)


def test_the_node_of_a_training_is_lost(real, road, doomed):
    "It is off, at once: gpuml says that it does not answer, with the cure; with that the training goes on elsewhere"
    begun = time.monotonic()
    states = []

    def passed(what):
        print(f"{time.monotonic() - begun:.1f} s: {what}")

    def says(part):
        states.append(str(job.status))
        return part in states[-1]

    words = ["train.epochs=6", "train.checkpoint_updates=2", f"compute.tolerations=[{TAINT}]"]
    make_calm(road.notebook, 1)
    job = submit(load("dev", words), road.notebook)
    storage = Storage(road.endpoint)
    real.wait(lambda: newest_checkpoint(storage, job.place), 120, "a checkpoint")
    (pod,) = real.pods("gpuml-dev", job.run_id)
    assert pod["spec"]["nodeName"] == doomed.name
    power_off(real, doomed)
    saved = newest_checkpoint(storage, job.place)
    passed(f"the node is off; there is a checkpoint of update {saved}")
    real.nodes["node-1"].gpus.set(1)
    real.wait(lambda: says("does not answer"), 60, "a word of the node")
    passed(states[-1])
    sentence = (
        rf"waiting: node {doomed.name} does not answer since .+; if it is lost, an administrator says so: kubectl (.+)"
    )
    real.kubectl(*shlex.split(re.fullmatch(sentence, states[-1])[1]))
    real.wait(lambda: says("running"), 90, "the next attempt")
    passed(states[-1])
    assert job.wait(600).phase == "succeeded", job.logs()
    passed(f"it is done; it was {list(dict.fromkeys(states))}")
    first, second = read(storage, job.place)
    assert (first.node, first.exit_code, first.checkpoint) == (doomed.name, None, saved)
    assert (second.node, second.exit_code) == ("node-1", 0) and job.status.attempts == 2
    assert f": training, update {saved} of 18," in job.logs().rpartition(": reading data")[2]
    assert storage.info(f"{job.place}/certificate.json")


def test_two_nodes_go_on_after_each_fault(real, road, pair):
    "Production takes one GPU, later a pod is killed: both pods come again each time, and the bits are those of no disturbance"
    length = ["train.epochs=60", "train.checkpoint_updates=10"]  # far more work than one attempt gets done
    job = submit(load("dev", [*pair, *length, "compute.disk=4Gi"]), road.notebook)
    storage = Storage(road.endpoint)
    seen = faults.Seen(real, "gpuml-dev", job.run_id)

    def newest():
        return newest_checkpoint(storage, job.place) or 0

    real.wait(lambda: len(seen.running()) == 2 and newest(), 120, "the first attempt's checkpoint")
    prod = submit(load("prod", ["train.epochs=1"]), road.notebook)
    real.wait(lambda: seen.look() and job.status.attempts == 2, 200, "the second attempt")
    assert prod.wait(600).phase == "succeeded", prod.logs()
    preempted_at = newest()
    real.wait(lambda: len(seen.running()) == 2 and newest() > preempted_at, 200, "the second attempt's checkpoint")
    faults.send([faults.main_process(real, seen.running()[1])], signal.SIGKILL)
    states = []
    real.wait(lambda: seen.look() and states.append(str(job.status)) or job.status.over, 300, "its end")
    real.wait(
        lambda: seen.look() and 0 in [code for number, code, _ in seen.ends() if number == 0], 120, "its last pod"
    )
    print(preempted_at, seen.ends(), *dict.fromkeys(states), sep="\n")
    assert job.status.phase == "succeeded", job.logs()
    ends = seen.ends()
    assert [code for number, code, _ in ends if number == 0] == [75, 75, 0]
    assert 137 in [code for number, code, _ in ends if number == 1]
    assert any(by == "PreemptionByScheduler" and code == 75 for _, code, by in ends)
    assert any("node 1" in state and "killed, though not by its own memory limit" in state for state in states)
    weights = (job.run.folder / "model" / "model.safetensors").read_bytes()
    assert weights == undisturbed(road, "train.slots=2", *length, GPUML_GPUS="2")
    assert storage.info(f"{job.place}/certificate.json")


def test_two_nodes_that_lack_memory(real, road, pair):
    "The job ends, with one sentence: another attempt would lack it, too"
    job = submit(load("dev", [*pair, "compute.memory=400Mi", "compute.retries=0"]), road.notebook)
    seen = faults.Seen(real, "gpuml-dev", job.run_id)
    real.wait(lambda: seen.look() and job.status.over, 120, "its end")
    print(seen.ends(), job.status)
    assert job.status.phase == "failed" and job.status.exit_code in (71, 137)
    assert "killed: it needed more memory than compute.memory=400Mi" in job.why()
