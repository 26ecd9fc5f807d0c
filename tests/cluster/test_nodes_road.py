"The whole road on real nodes, as an administrator, a developer and production go it: nothing of it is played"

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.cluster.jobs import find
from gpuml.cluster.sending import submit
from gpuml.training.attempts import newest_checkpoint, read
from tests.cluster.cluster import phase
from tests.cluster.nodes import faults, services
from tests.cluster.nodes.image import REGISTRY
from tests.cluster.nodes.real import TEAM
from tests.cluster.nodes.scene import TAINT, own_nodes, power_off
from tests.cluster.site import PROD
from tests.conftest import OFFLINE, ROOT, rows
from tests.s3 import keys_in_environment

EPOCHS, GRACE = 12, 120
WHERE = """\
import json, os, pathlib
import urllib.request
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
def refusal(path):
    try:
        pathlib.Path(path, "probe").write_text("")
    except OSError as error:
        return error.strerror
facts = {name: status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
facts |= {"user": os.getuid(), "group": os.getgid(), "groups": os.getgroups(), "root": refusal("/"), "work": refusal("/work")}
facts |= {"shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize, "pid 1": open("/proc/1/comm").read().strip()}
facts |= {"token": os.path.exists("/var/run/secrets/kubernetes.io"), "gpu": os.environ["NVIDIA_VISIBLE_DEVICES"]}
facts["mlflow"] = urllib.request.urlopen("http://mlflow:5000/health").read().decode()
print("FACTS", json.dumps(facts))
"""


@pytest.fixture(scope="module")
def system(real):
    "`k8s/` applied, and the S3 server as a person reaches it"
    with services.applied(real), services.storage_from_outside(real) as endpoint:
        yield endpoint


@pytest.fixture
def team(real, system, project, monkeypatch):
    "A person's project: data on S3, `dev` and `prod` in the namespaces of k8s/, and the login of someone in both groups"
    keys_in_environment(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", system)
    monkeypatch.setenv("KUBECONFIG", str(real.plane.kubeconfig(TEAM)))
    real.nodes["node-2"].gpus.set(0)  # one GPU in all
    notebook = json.loads((ROOT / "nbs" / "train.ipynb").read_text())
    cell = {"cell_type": "code", "id": "where", "metadata": {}, "source": WHERE, "outputs": [], "execution_count": None}
    notebook["cells"].append(cell)
    (project / "nbs").mkdir()
    (project / "nbs" / "train.ipynb").write_text(json.dumps(notebook))
    text = "text,label\n" + "".join(f"{t},{label}\n" for t, label in rows())
    Storage(system).put_bytes(text.encode(), "s3://datasets/road/a.csv")
    for name in ("dev", "prod"):
        config = PROD.format(
            data="s3://datasets/road/", endpoint=system, cache=project / "cache", model=OFFLINE, epochs=EPOCHS,
            tracking="http://mlflow:5000", namespace=f"gpuml-{name}", priority=f"gpuml-{name}", output="s3://models/road",
        )  # fmt: skip
        config = config.replace("grace: 60", f"grace: {GRACE}")
        config = config.replace("gpuml-train:test", f"{REGISTRY}\n  s3_endpoint: {services.INSIDE}")
        (project / "config" / f"{name}.yaml").write_text(config)
    yield SimpleNamespace(folder=project, notebook=project / "nbs" / "train.ipynb", endpoint=system)
    real.nodes["node-2"].gpus.set(1)


def undisturbed(team, *words, **environment):
    "The weights of the development run where nothing interferes, on this machine"
    words = [f"output={team.folder / 'quiet'}", f"tracking.uri=sqlite:///{team.folder / 'quiet.db'}", *words]
    command = [sys.executable, "-m", "gpuml", "train", "dev", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=team.folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return next((team.folder / "quiet").glob("*/model/model.safetensors")).read_bytes()


def facts_of(job):
    "What the notebook's last cell has found in the container"
    notebook = json.loads(job.notebook().read_text())
    texts = ["".join(o.get("text", "")) for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return json.loads(next(text for text in texts if text.startswith("FACTS")).removeprefix("FACTS"))


def test_the_whole_road(real, team):
    begun = time.monotonic()
    seconds = {}

    def passed(what):
        seconds[what] = round(time.monotonic() - begun, 1)

    dev = submit(load("dev"), team.notebook)
    passed("development submitted")
    real.wait_pod("gpuml-dev", dev.run_id, phase("Running"))
    passed("its container runs")
    log = open(team.folder / "followed.txt", "w+")
    command = [sys.executable, "-m", "gpuml", "logs", dev.run_id, "--follow"]
    follower = subprocess.Popen(command, cwd=team.folder, stdout=log, stderr=subprocess.STDOUT)
    real.wait(lambda: "update" in dev.status.progress and "update 0" not in dev.status.progress, 120)
    passed("it trains")
    containers = real.nodes["node-1"].ctr("containers", "ls").stdout + real.nodes["node-1"].ctr("tasks", "ls").stdout
    by_kubelet = real.kubectl("logs", f"job/{dev.run_id}", namespace="gpuml-dev").stdout
    prod = submit(load("prod", ["train.epochs=2"]), team.notebook)
    passed("production submitted")
    real.wait_pod("gpuml-prod", prod.run_id, phase("Running"), GRACE + 10)
    passed("production's container runs")
    assert prod.wait(300).phase == "succeeded", prod.logs()
    passed("production is done")
    assert dev.wait(600).phase == "succeeded", dev.logs()
    passed("development is done")
    assert follower.wait(60) == 0
    log.seek(0)
    followed = log.read()
    print(json.dumps(seconds, indent=1), containers, followed, sep="\n")

    for job in (dev, prod):
        assert Storage(team.endpoint).info(f"{job.place}/certificate.json")
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
    assert (dev.run.folder / "model" / "model.safetensors").read_bytes() == undisturbed(team)
    assert "SIGTERM: the kernel is told" in followed and "with a checkpoint (exit code 75)" in followed
    assert followed.count(": reading data") == 2  # once in each attempt
    printed = [line for line in by_kubelet.splitlines() if not line.startswith("{")]  # progress is for gpuml to draw
    assert printed and set(printed) <= set(followed.splitlines())
    assert find(dev.run_id, [load("dev")]).status.phase == "succeeded"


@pytest.fixture
def doomed(real, team):
    "A node with the one GPU of the cluster; that of node-1 comes back"
    gpus = real.nodes["node-1"].gpus
    gpus.set(0)
    try:
        with own_nodes(real, 1, gpus=1) as (node,):
            real.wait(lambda: gpus_of(real, "node-1") == "0")
            yield node
    finally:
        gpus.set(1)


def gpus_of(real, name):
    "How many a node has to give, as the API server has it: its kubelet says so a moment after they are there"
    return real.admin.get("nodes", "", name)["status"]["allocatable"]["nvidia.com/gpu"]


def test_the_node_of_a_training_is_lost(real, team, doomed):
    "It is off, at once: gpuml says that it does not answer, with the cure; with that the training goes on elsewhere"
    begun = time.monotonic()
    states = []

    def passed(what):
        print(f"{time.monotonic() - begun:.1f} s: {what}")

    def says(part):
        states.append(str(job.status))
        return part in states[-1]

    words = ["train.epochs=6", "train.checkpoint_updates=2", f"compute.tolerations=[{TAINT}]"]
    job = submit(load("dev", words), team.notebook)
    storage = Storage(team.endpoint)
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
    assert job.wait(300).phase == "succeeded", job.logs()
    passed(f"it is done; it was {list(dict.fromkeys(states))}")
    first, second = read(storage, job.place)
    assert (first.node, first.exit_code, first.checkpoint) == (doomed.name, None, saved)
    assert (second.node, second.exit_code) == ("node-1", 0) and job.status.attempts == 2
    assert f": training, update {saved} of 18," in job.logs().rpartition(": reading data")[2]
    assert storage.info(f"{job.place}/certificate.json")


@pytest.fixture
def pair(real, team):
    "Two nodes with a GPU each"
    real.nodes["node-2"].gpus.set(1)
    real.wait(lambda: [gpus_of(real, name) for name in ("node-1", "node-2")] == ["1", "1"])
    return ["compute.nodes=2", "train.slots=2", "compute.cpu=100m"]


def test_two_nodes_go_on_after_each_fault(real, team, pair):
    "Production takes one GPU, later a pod is killed: both pods come again each time, and the bits are those of no disturbance"
    job = submit(load("dev", pair), team.notebook)
    seen = faults.Seen(real, "gpuml-dev", job.run_id)

    def trains(attempt):
        "Whether both pods of the attempt run, and it has done an update"
        state = job.status
        is_at_work = state.attempts == attempt and state.progress.startswith("training")
        return is_at_work and "update 0 " not in state.progress and len(seen.running()) == 2

    real.wait(lambda: trains(1), 120, "the first attempt's updates")
    prod = submit(load("prod", ["train.epochs=1"]), team.notebook)
    real.wait(lambda: seen.look() and job.status.attempts == 2, 200, "the second attempt")
    real.wait(lambda: trains(2), 200, "the second attempt's updates")
    assert prod.status.phase == "succeeded", prod.logs()
    faults.send([faults.main_process(real, seen.running()[1])], signal.SIGKILL)
    states = []
    real.wait(lambda: seen.look() and states.append(str(job.status)) or job.status.over, 300, "its end")
    print(seen.ends(), *dict.fromkeys(states), sep="\n")
    assert job.status.phase == "succeeded", job.logs()
    ends = seen.ends()
    assert [code for number, code, _ in ends if number == 0] == [75, 75, 0]
    assert 137 in [code for number, code, _ in ends if number == 1]
    assert any(by == "PreemptionByScheduler" and code == 75 for _, code, by in ends)
    assert any("node 1" in state and "killed, though not by its own memory limit" in state for state in states)
    weights = (job.run.folder / "model" / "model.safetensors").read_bytes()
    assert weights == undisturbed(team, "train.slots=2", GPUML_GPUS="2")
    assert Storage(team.endpoint).info(f"{job.place}/certificate.json")


def test_two_nodes_that_lack_memory(real, team, pair):
    "The job ends, with one sentence: another attempt would lack it, too"
    job = submit(load("dev", [*pair, "compute.memory=400Mi", "compute.retries=0"]), team.notebook)
    seen = faults.Seen(real, "gpuml-dev", job.run_id)
    real.wait(lambda: seen.look() and job.status.over, 120, "its end")
    print(seen.ends(), job.status)
    assert job.status.phase == "failed" and job.status.exit_code in (71, 137)
    assert "killed: it needed more memory than compute.memory=400Mi" in job.why()
