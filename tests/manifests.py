"What an administrator applies, rendered as plain dicts"

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from tests.cluster.environment import expand, variables
from tests.conftest import ROOT, free_port
from tests.waiting import until

OVERLAYS = sorted(folder.name for folder in (ROOT / "k8s" / "overlays").iterdir() if folder.is_dir())
WITH_IDLE = "team with idle"
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "Pod")


def prepared(folder: Path) -> Path:
    "A copy of k8s/ with secrets, as an administrator has it"
    copy = folder / "k8s"
    shutil.copytree(ROOT / "k8s", copy, ignore=shutil.ignore_patterns("*.env"))
    for name in ("single-node", "team"):
        subprocess.run([copy / "secrets.sh", name], capture_output=True)
    for file in copy.glob("overlays/*/secrets/*.env"):
        file.write_text(file.read_text().replace("FILL-IN", "filled-in"))
    return copy


def render(copy: Path, overlay: str) -> list[dict]:
    "What `kubectl apply -k` would send"
    text = subprocess.check_output([kubectl(), "kustomize", copy / "overlays" / overlay], text=True)
    return [found for found in YAML(typ="safe").load_all(text) if found]


def render_all(folder: Path) -> dict[str, list[dict]]:
    "Every overlay, and the team's with what is applied beside it"
    copy = prepared(folder)
    found = {name: render(copy, name) for name in OVERLAYS}
    return found | {WITH_IDLE: [*found["team"], *render(copy, "../idle"), *render(copy, "../after")]}


def kubectl() -> str:
    "The one beside this Python, whose version is pinned"
    return os.path.join(os.path.dirname(sys.executable), "kubectl")


def pod_of(manifest: dict) -> dict | None:
    "The spec of the pods that an object makes"
    spec = manifest.get("spec", {})
    if manifest["kind"] == "CronJob":
        return spec["jobTemplate"]["spec"]["template"]["spec"]
    return spec if manifest["kind"] == "Pod" else spec["template"]["spec"] if manifest["kind"] in WORKLOADS else None


def containers(pod: dict) -> list[dict]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def find(manifests: list[dict], kind: str, name: str, namespace: str | None = None) -> dict:
    return next(
        m
        for m in manifests
        if (m["kind"], m["metadata"]["name"]) == (kind, name) and namespace in (None, m["metadata"].get("namespace"))
    )


def matches(selector: dict, labels: dict) -> bool:
    "Whether a label selector chooses an object; an empty one chooses all"
    how = {
        "In": lambda have, values: have in values,
        "NotIn": lambda have, values: have not in values,
        "Exists": lambda have, values: have is not None,
        "DoesNotExist": lambda have, values: have is None,
    }
    expressions = selector.get("matchExpressions", [])
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        how[e["operator"]](labels.get(e["key"]), e.get("values")) for e in expressions
    )


class Rendered:
    "Answers what a kubelet asks the API server for, from manifests"

    def __init__(self, manifests: list[dict]):
        self.manifests = manifests

    def get(self, resource: str, namespace: str, name: str) -> dict:
        return find(self.manifests, {"secrets": "Secret", "configmaps": "ConfigMap"}[resource], name, namespace)


def started_as(manifests: list[dict], kind: str, name: str, here: dict[str, str], command: list[str] | None = None):
    "Command and environment of a pod's container, as a kubelet makes them; `here`: what stands for a value's part here"
    made = find(manifests, kind, name)
    pod = {"metadata": made["metadata"], "spec": pod_of(made)}
    (container,) = pod["spec"]["containers"]
    environment = variables(Rendered(manifests), pod, {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin"})
    for there, place in here.items():
        environment = {key: value.replace(there, place) for key, value in environment.items()}
    words = command or [*container["command"], *container.get("args", [])]
    return [expand(word, environment) for word in words], environment


@contextmanager
def mlflow_server(manifests: list[dict], folder: Path, here: dict[str, str], workers: int = 2):
    "An overlay's MLflow server, by its own command line and environment, until its pod would be ready; its port"
    port, probe = free_port(), pod_of(find(manifests, "Deployment", "mlflow"))["containers"][0]["readinessProbe"]
    command, environment = started_as(manifests, "Deployment", "mlflow", here)
    command = [word.replace("0.0.0.0", "127.0.0.1").replace("5000", str(port)) for word in command]
    command[command.index("--workers=2")] = f"--workers={workers}"
    with open(folder / "mlflow.log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        until(
            lambda: server.poll() is not None or ready(f"http://127.0.0.1:{port}{probe['httpGet']['path']}"), pause=0.2
        )
        assert server.poll() is None, (folder / "mlflow.log").read_text()
        yield port
        server.terminate()
        server.wait(600)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
