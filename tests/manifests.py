"What an administrator applies, rendered as plain dicts"

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from tests.conftest import ROOT

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
    return found | {WITH_IDLE: [*found["team"], *render(copy, "../idle")]}


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
