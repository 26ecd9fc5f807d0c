"A GPU by Dynamic Resource Allocation on a real node: a driver offers it, a claim gets it, a container finds it"

import pytest

from gpuml.base.config import ComputeConfig
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.cluster.device_claim import claim_template
from gpuml.cluster.sending import submit
from tests.cluster.cluster import phase
from tests.cluster.dra import claiming, device_class
from tests.cluster.nodes import services
from tests.cluster.nodes.driver import NAME, VARIABLE, Driver
from tests.cluster.nodes.image import REGISTRY
from tests.cluster.nodes.real import TEAM
from tests.cluster.site import PROD
from tests.conftest import OFFLINE, ROOT, rows
from tests.s3 import keys_in_environment

CLASS = "real-gpu"


@pytest.fixture(scope="module")
def driver(real):
    "Two devices of node-1"
    real.admin.create("deviceclasses", "", device_class(CLASS, NAME))
    driver = Driver(real.nodes["node-1"], 2).start()
    real.wait(lambda: offered(real) == {"node-1": 2}, 60, "a ResourceSlice")
    yield driver
    driver.stop()
    real.admin.delete("deviceclasses", "", CLASS)


def offered(real):
    "Node → how many devices its slices have"
    slices = real.admin.get("resourceslices")["items"]
    return {s["spec"]["nodeName"]: len(s["spec"].get("devices") or []) for s in slices if s["spec"]["driver"] == NAME}


def test_a_container_finds_what_it_claimed(real, real_namespace, driver):
    "By CDI: the device's name, and what the driver mounts; when the pod is gone the device is free again"
    template = claim_template(ComputeConfig(device_class=CLASS, namespace=real_namespace))
    real.admin.create("resourceclaimtemplates", real_namespace, template)
    command = f"echo ${VARIABLE}; python -c 'import gpuml; print(gpuml.__name__)'"
    body = claiming("claims", template["metadata"]["name"], command, image="gpuml-train:test")
    real.admin.create("jobs", real_namespace, body)
    assert real.wait_job(real_namespace, "claims") == "Complete", real.events(real_namespace)
    lines = real.kubectl("logs", "job/claims", namespace=real_namespace).stdout.split()
    assert lines[0] in ("gpu-0", "gpu-1") and lines[1] == "gpuml"
    real.admin.delete("jobs", real_namespace, "claims", propagationPolicy="Background")
    real.wait(lambda: not real.admin.get("resourceclaims", real_namespace)["items"], 30, "no claim that is left")


def test_a_device_that_is_gone_is_offered_no_more(real, driver):
    driver.set(1, unhealthy=1)
    try:
        real.wait(lambda: offered(real) == {"node-1": 1}, 20, "one device")
    finally:
        driver.set(2)
    real.wait(lambda: offered(real) == {"node-1": 2}, 20, "two devices")


@pytest.fixture
def endpoint(real, driver):
    "`k8s/` applied, with the class that may be claimed, in policy and quota; and the S3 server as a person reaches it"
    with services.applied(real), services.storage_from_outside(real) as endpoint:
        real.admin.patch("configmaps", "gpuml-dev", "gpuml-policy", {"data": {"deviceClasses": CLASS}})
        hard = {f"{CLASS}.deviceclass.resource.k8s.io/devices": "1"}
        real.admin.patch("resourcequotas", "gpuml-dev", "gpus", {"spec": {"hard": hard}})
        yield endpoint


def test_a_job_trains_by_a_claim(real, endpoint, project, monkeypatch):
    "As user 10001 with a read-only root, under the policies of k8s/; a second one waits for the quota of the class"
    keys_in_environment(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("KUBECONFIG", str(real.plane.kubeconfig(TEAM)))
    notebook = project / "nbs" / "train.ipynb"
    notebook.parent.mkdir()
    notebook.write_text((ROOT / "nbs" / "train.ipynb").read_text())
    text = "text,label\n" + "".join(f"{t},{label}\n" for t, label in rows())
    Storage(endpoint).put_bytes(text.encode(), "s3://datasets/claim/a.csv")
    config = PROD.format(
        data="s3://datasets/claim/", endpoint=endpoint, cache=project / "cache", model=OFFLINE, epochs=4,
        tracking="http://mlflow:5000", namespace="gpuml-dev", priority="gpuml-dev", output="s3://models/claim",
    )  # fmt: skip
    config = config.replace("gpuml-train:test", f"{REGISTRY}\n  s3_endpoint: {services.INSIDE}")
    (project / "config" / "dev.yaml").write_text(config)
    words = [f"compute.device_class={CLASS}"]
    job = submit(load("dev", words), notebook)
    real.wait_pod("gpuml-dev", job.run_id, phase("Running"), 90)
    second = submit(load("dev", [*words, "train.epochs=5"]), notebook)
    real.wait(lambda: "quota gpus: 1 of 1 GPUs used" in second.status.why, 60, "a word of the quota")
    second.cancel()
    state = job.wait(600)
    assert (state.phase, state.attempts) == ("succeeded", 1), f"{state}\n{job.logs()}"

    def claims():
        return real.admin.get("resourceclaims", "gpuml-dev")["items"]

    real.wait(lambda: not any("allocation" in claim.get("status", {}) for claim in claims()), 30, "a free device")
