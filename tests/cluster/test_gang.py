"A job of two nodes on the tests' control plane: its pods are processes of this machine, and meet on loopback"

import os
import subprocess
import sys

import pytest

from gpuml.base.storage import Storage
from gpuml.cluster import jobs as c
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.conftest import free_port

SERVICE = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app.kubernetes.io/managed-by": "gpuml"}}


@pytest.fixture
def two(site):
    "Two nodes with a GPU each, and the Service of k8s/namespace"
    site.cluster.agent.add_node("gpu-2")
    site.cluster.admin.create("services", site.namespace, {"metadata": {"name": "gpuml"}, "spec": SERVICE})
    meeting = f"compute.env={{GPUML_HOST: 127.0.0.1, GPUML_PORT: '{free_port()}'}}"
    yield ["compute.nodes=2", "train.slots=2", meeting]
    site.cluster.agent.remove_node("gpu-2")


def undisturbed(site, epochs):
    "The weights that two processes of this machine make, where nothing interferes"
    words = [f"output={site.folder / 'quiet'}", f"tracking.uri=sqlite:///{site.folder / 'quiet.db'}"]
    words += [f"train.epochs={epochs}", "train.slots=2"]
    environment = {**os.environ, "GPUML_GPUS": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpuml", "train", "dev", *words]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return next((site.folder / "quiet").glob("*/model/model.safetensors")).read_bytes()


def test_preempted_on_one_node_it_goes_on_with_both(site, two):
    "Production takes the GPU of one pod: both save and end with 75, and both come again; the weights are those of no disturbance"
    epochs = 24
    site.write("dev", "gpuml-dev", epochs)
    job = site.submit(*two, of="dev")
    site.wait_update(job)
    ((listed, state),) = c.jobs([site.config(of="dev")])
    assert (state.phase, listed.facts["gpus"]) == ("running", "2")
    production = holder("prod", "exec sleep 10", priority="gpuml-prod", grace=1)
    with site.standing(job):
        site.cluster.admin.create("jobs", site.namespace, production)
    site.cluster.wait_pod(site.namespace, "prod", phase("Running"), 60)
    seen = []
    site.cluster.wait(lambda: seen.append(str(job.status)) or job.status.over, 200)
    said = list(dict.fromkeys(seen))
    assert job.status.phase == "succeeded", (said, job.logs())
    assert (job.status.attempts, job.outcome()["attempt"]) == (2, 2), said
    assert any("preempted" in each for each in said) and any("gathering" in each for each in said), said
    storage = Storage(site.s3.endpoint)
    assert storage.info(f"{job.place}/certificate.json") and len(storage.find(f"{job.place}/logs/*.txt")) == 2
    assert (job.run.folder / "model" / "model.safetensors").read_bytes() == undisturbed(site, epochs)
