"""What users find on a cluster that an administrator has made with `k8s/`: namespaces, policies, quotas, MLflow and S3.

`k8s/` is applied as it is, with an overlay of the tests: the services' programs come from this machine, SeaweedFS stands
in MinIO's place, and their volumes are folders of this machine.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.administer import watch_config_maps
from tests.cluster.nodes.devices import HOST
from tests.cluster.nodes.image import REGISTRY
from tests.cluster.nodes.real import Real
from tests.cluster.programs import program
from tests.conftest import ROOT, free_port
from tests.s3 import BUCKETS, KEY, SECRET, write_keys

NAMESPACES = {"gpuml-dev", "gpuml-prod", "gpuml-system"}
CLAIMS = {"mlflow": "20Gi", "data-minio-0": "200Gi"}  # of volumes
BASES = ["cluster", "development", "production", "policies", "mlflow", "minio"]
WEED = ["mini", "-dir=/data", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-master.telemetry=false", "-s3.port=9000"]
WEED += ["-s3.config=/keys/s3.json", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false"]
WEED += ["-admin.ui=false", f"-bucket={BUCKETS}"]
INSIDE = "http://minio:9000"  # the S3 server as pods know it


@contextmanager
def applied(real: Real) -> Iterator[None]:
    "All of it, ready; in the end it is gone"
    folder = real.folder / "k8s"
    shutil.copytree(ROOT / "k8s", folder, ignore=shutil.ignore_patterns("*.env"))
    overlay = folder / "overlays" / "tests"
    overlay.mkdir()
    _write(overlay / "volumes.json", _volumes(real.folder))
    write_keys(overlay / "s3.json")
    _write(overlay / "kustomization.yaml", _kustomization())
    watch_config_maps(real.plane)
    await_end(real)
    try:
        real.kubectl("apply", "-k", str(overlay))
        for name in ("statefulset/minio", "deployment/mlflow"):
            real.kubectl("rollout", "status", name, "--timeout=600s", namespace="gpuml-system")
        yield
    finally:
        for namespace in ("gpuml-dev", "gpuml-prod"):  # a Job's pod that waits for its replacement holds its namespace
            real.kubectl("delete", "jobs", "--all", namespace=namespace)
        real.kubectl("delete", "namespaces", "--wait=false", *NAMESPACES)
        kinds = "validatingadmissionpolicies,validatingadmissionpolicybindings"
        names = real.kubectl("get", kinds, "--output=name").stdout.split()
        real.kubectl("delete", *(name for name in names if "/gpuml-" in name))
        real.kubectl("delete", "persistentvolumes", "--wait=false", *CLAIMS)
        await_end(real)
        shutil.rmtree(folder)
        shutil.rmtree(real.folder / "volumes", ignore_errors=True)


def await_end(real: Real) -> None:
    "Until namespaces that were removed are gone, with all that was in them"
    real.wait(lambda: not NAMESPACES & real.namespaces(), 120, "namespaces of another test to be gone")


@contextmanager
def storage_from_outside(real: Real) -> Iterator[str]:
    "The endpoint of the S3 server as a person reaches it: `kubectl port-forward`"
    port = free_port()
    line = [program("kubectl"), "--kubeconfig", str(real.plane.kubeconfig()), "-n", "gpuml-system", "port-forward"]
    process = subprocess.Popen([*line, "service/minio", f"{port}:9000"], stdout=subprocess.PIPE, text=True)
    try:
        assert "Forwarding" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(600)


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))  # JSON is YAML


def _kustomization() -> dict:
    keys = [f"AWS_ACCESS_KEY_ID={KEY}", f"AWS_SECRET_ACCESS_KEY={SECRET}"]
    places = [f"MLFLOW_S3_ENDPOINT_URL={INSIDE}", "MLFLOW_ARTIFACTS_DESTINATION=s3://mlflow"]
    secrets = [{"name": "gpuml-s3", "namespace": f"gpuml-{tier}", "literals": keys} for tier in ("dev", "prod")]
    secrets += [{"name": "mlflow", "namespace": "gpuml-system", "literals": keys + places}]
    secrets += [{"name": "minio", "namespace": "gpuml-system", "files": ["s3.json"]}]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [*(f"../../{base}" for base in BASES), "volumes.json"],
        "generatorOptions": {"disableNameSuffixHash": True},
        "secretGenerator": secrets,
        "patches": [
            _patch("Deployment", "mlflow", _from_host()),
            _patch("StatefulSet", "minio", _weed()),
            {"patch": '{"apiVersion": "batch/v1", "kind": "Job", "$patch": "delete", "metadata": {"name": "buckets", "namespace": "gpuml-system"}}'},
        ],
    }  # fmt: skip


def _patch(kind: str, name: str, operations: list[dict]) -> dict:
    return {"target": {"kind": kind, "name": name}, "patch": json.dumps(operations)}


def _from_host() -> list[dict]:
    "The program is this machine's"
    container = "/spec/template/spec/containers/0"
    path = f"{container}/resources/limits/{HOST.replace('/', '~1')}"
    return [{"op": "add", "path": path, "value": 1}, {"op": "replace", "path": f"{container}/image", "value": REGISTRY}]


def _weed() -> list[dict]:
    "SeaweedFS in MinIO's place"
    container = "/spec/template/spec/containers/0"
    volume = {"name": "keys", "secret": {"secretName": "minio"}}
    return [
        *_from_host(),
        {"op": "add", "path": f"{container}/command", "value": [str(Path(sys.prefix) / "bin" / "weed")]},
        {"op": "replace", "path": f"{container}/args", "value": WEED},
        {"op": "replace", "path": f"{container}/envFrom", "value": []},
        {"op": "replace", "path": f"{container}/readinessProbe", "value": {"tcpSocket": {"port": "s3"}, "periodSeconds": 1}},
        {"op": "remove", "path": f"{container}/livenessProbe"},
        {"op": "add", "path": f"{container}/volumeMounts/-", "value": {"name": "keys", "mountPath": "/keys"}},
        {"op": "add", "path": "/spec/template/spec/volumes/-", "value": volume},
    ]  # fmt: skip


def _volumes(folder: Path) -> dict:
    "A folder of this machine for each claim"
    volumes = []
    for claim, size in CLAIMS.items():
        place = folder / "volumes" / claim
        place.mkdir(parents=True)
        place.chmod(0o777)
        reference = {"namespace": "gpuml-system", "name": claim}
        spec = {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": str(place)}}
        metadata = {"name": claim}
        spec |= {"claimRef": reference, "persistentVolumeReclaimPolicy": "Retain", "storageClassName": ""}
        volumes.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec})
    return {"apiVersion": "v1", "kind": "List", "items": volumes}
