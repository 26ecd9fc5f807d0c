"The manifest of a job: against the published schemas, the API's documented rules, and a golden file"

import os
from pathlib import Path

import pytest

from gpuml.base.errors import Exit
from gpuml.base.loading import load
from gpuml.cluster.device_claim import claim_template
from gpuml.cluster.manifest import Source, manifest, run_id, yaml
from tests.conftest import ROOT
from tests.schemas import validate  # noqa: F401  a fixture

GOLDEN = Path(__file__).parent / "golden" / "job.yaml"
VERSIONS = [f"1.{minor}" for minor in range(33, 38)]
EVERYTHING = [
    "compute.image=registry.example.com/gpuml-train@sha256:" + "0" * 64,
    "compute.image_pull_secrets=[registry]",
    "compute.queue=research",
    "compute.gpus=2",
    "compute.gpu_resource=nvidia.com/mig-1g.10gb",
    "compute.node_selector={gpu: h100}",
    "compute.tolerations=['gpu=h100:NoSchedule', 'spot:NoExecute', dedicated]",
    "compute.s3_endpoint=http://minio:9000",
    "compute.env={HF_HUB_OFFLINE: '1'}",
    "compute.grace=90",
]
SEVERAL = ["compute.nodes=2", "compute.gpus=8", "compute.topology=cloud.provider.com/rack", "compute.queue=research"]
CLAIMED = ["compute.device_class=gpu.nvidia.com", "compute.gpus=2"]
SOURCE = Source(
    "0f2a9c11d4e5aa01",
    "s3://models/production/.bundles/0f2a9c11d4e5aa01.tar.gz",
    "nbs/train.ipynb",
    "Ada L.",
    commit="c0ffee",
)


def made(*overrides: str) -> dict:
    config = load("prod", ["compute.image=gpuml-train:0.1.0", *overrides], start=ROOT)
    return manifest(config, run_id("prod", SOURCE.bundle, 1), SOURCE)


def test_golden():
    "What is sent changes on purpose only: GPUML_GOLDEN=1 writes the file anew"
    text = yaml([made(), made(*EVERYTHING), made(*CLAIMED), made(*SEVERAL)])
    if os.environ.get("GPUML_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_valid_by_the_schema_of(version, validate):  # noqa: F811
    for job in (made(), made(*EVERYTHING), made(*CLAIMED), made(*SEVERAL)):
        assert validate(version, yaml([job])) == [None]
    job = made()
    job["spec"]["podFailurePolicies"] = job["spec"].pop("podFailurePolicy")
    assert "podFailurePolicies" in validate(version, yaml([job]))[0]


def test_rules_of_the_job_api():
    "What the API server demands beyond the schema (batch/v1, podFailurePolicy)"
    job = made(*EVERYTHING)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and spec["podReplacementPolicy"] == "Failed"
    rules = spec["podFailurePolicy"]["rules"]
    assert len(rules) <= 20
    names = {c["name"] for c in pod["containers"]}
    for rule in rules:
        assert ("onPodConditions" in rule) != ("onExitCodes" in rule)
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] in names and codes["operator"] == "In"
            assert (
                0 not in codes["values"]
                and codes["values"] == sorted(set(codes["values"]))
                and len(codes["values"]) <= 255
            )
    assert len(job["metadata"]["name"]) <= 63
    assert all(len(value) <= 63 for value in job["metadata"]["labels"].values())


def test_numbers_of_exit_codes():
    "They are a contract with jobs that run, their podFailurePolicy, and scripts of users"
    assert {code.name: int(code) for code in Exit} == {
        "DONE": 0,
        "FAILED": 1,
        "MISUSED": 2,
        "BAD_DATA": 65,
        "NOT_FOUND": 66,
        "UNREACHABLE": 69,
        "CRASHED": 70,
        "OUT_OF_MEMORY": 71,
        "NOT_WRITTEN": 73,
        "INTERRUPTED": 75,
        "NOT_PERMITTED": 77,
        "BAD_CONFIG": 78,
        "NO_COMMAND": 127,
        "KILLED": 137,
    }


def test_restricted():
    "The Pod Security Standard `restricted`, field by field"
    pod = made()["spec"]["template"]["spec"]
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("hostPath" not in volume for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False


def test_gpus_of_a_device_class_are_claimed():
    "The container names its claim, the pod its template, and no GPU stands in the limits"
    pod = made(*CLAIMED)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["claims"] == [{"name": pod["resourceClaims"][0]["name"]}]
    assert not any("/" in resource for resource in container["resources"]["limits"])
    config = load("prod", CLAIMED, start=ROOT)
    assert pod["resourceClaims"][0]["resourceClaimTemplateName"] == claim_template(config.compute)["metadata"]["name"]
    without = made("compute.device_class=gpu.nvidia.com", "compute.gpus=0")["spec"]["template"]["spec"]
    assert "resourceClaims" not in without and "claims" not in without["containers"][0]["resources"]


def test_no_secret_in_it(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret-5f2c")
    assert "marked-secret" not in yaml([made(*EVERYTHING)])


def test_prometheus_finds_the_metrics_only_where_a_port_is_set():
    job = made("compute.metrics_port=9464")
    pod = job["spec"]["template"]
    notes = pod["metadata"]["annotations"].items()
    assert {"prometheus.io/scrape": "true", "prometheus.io/port": "9464"}.items() <= notes
    (container,) = pod["spec"]["containers"]
    assert container["ports"] == [{"name": "metrics", "containerPort": 9464}]
    assert {"name": "GPUML_METRICS_PORT", "value": "9464"} in container["env"]
    silent = yaml([made("compute.metrics_port=null")])
    assert "prometheus" not in silent and "ports:" not in silent and "METRICS" not in silent
