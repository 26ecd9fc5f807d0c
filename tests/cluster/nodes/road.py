"A person's project on the real cluster, and what its training gives where nothing interferes: fixtures"

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gpuml.base.storage import Storage
from tests.cluster.nodes import services
from tests.cluster.nodes.image import REGISTRY
from tests.cluster.nodes.real import TEAM
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
def road(real, system, project, monkeypatch):
    "A person's project: data on S3, `dev` and `prod` in the namespaces of k8s/, and the login of someone in both groups"
    keys_in_environment(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", system)
    monkeypatch.setenv("KUBECONFIG", str(real.plane.kubeconfig(TEAM)))
    set_gpus(real, "node-2", 0)  # one GPU in all
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
    set_gpus(real, "node-2", 1)


def undisturbed(road, *words, **environment):
    "The weights of the development run where nothing interferes, on this machine"
    words = [f"output={road.folder / 'quiet'}", f"tracking.uri=sqlite:///{road.folder / 'quiet.db'}", *words]
    command = [sys.executable, "-m", "gpuml", "train", "dev", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=road.folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return next((road.folder / "quiet").glob("*/model/model.safetensors")).read_bytes()


def gpus_of(real, name):
    "How many a node has to give, as the API server has it: its kubelet says so a moment after they are there"
    return real.admin.get("nodes", "", name)["status"]["allocatable"]["nvidia.com/gpu"]


def set_gpus(real, name, count):
    "So many, and its kubelet has said so: else what it said before could still be taken for it"
    real.nodes[name].gpus.set(count)
    real.wait(lambda: gpus_of(real, name) == str(count), 30, f"{count} GPUs of {name}")


@pytest.fixture
def pair(real, road):
    "Two nodes with a GPU each"
    set_gpus(real, "node-2", 1)
    real.wait(lambda: [gpus_of(real, name) for name in ("node-1", "node-2")] == ["1", "1"])
    return ["compute.nodes=2", "train.slots=2", "compute.cpu=100m"]
