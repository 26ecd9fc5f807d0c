"Kueue's own controller, as a process beside the control plane: its CRDs and webhooks are applied, and removed at the end"

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import urllib3
import yaml

from tests.cluster.administer import Administrator
from tests.cluster.api import ApiError
from tests.cluster.cluster import PATIENCE
from tests.cluster.plane import Plane
from tests.cluster.programs import manifests, program
from tests.conftest import free_port

KINDS = ("Namespace", "CustomResourceDefinition", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
GROUPS = {"batch", "kueue.x-k8s.io"}  # of what its webhooks are for, here
FINALIZED = ("workloads", "localqueues", "clusterqueues", "cohorts", "resourceflavors", "admissionchecks", "topologies")
API = "/apis/kueue.x-k8s.io/v1beta2"
# it wants a certificate in /etc/kueue for metrics, also where there are none: it gets an /etc of its own
OWN_ETC = 'mount --bind "$1" /etc && shift && exec "$@"'


class Kueue:
    "The controller; `start` it, and `stop` removes everything of it, as a start that fails does. It dies with the thread that started it"

    def __init__(self, plane: Plane, folder: Path):
        self.plane, self.folder, self.administrator = plane, folder, Administrator(plane)
        self.port, self.health = free_port(), free_port()
        self.applied: list[dict] = []
        self.process: subprocess.Popen | None = None

    def start(self) -> "Kueue":
        try:
            self._apply()
            self._run()
        except BaseException:
            self._take_back()  # webhooks that nobody answers stand in the way of all later jobs
            raise
        return self

    def stop(self) -> None:
        "What it holds by finalizers goes first, while it lets go of it; then its kinds and webhooks, then itself"
        for resource in FINALIZED:
            self._wait(lambda r=resource: self._is_empty(r), 60, f"the end of all {resource}")
        self._take_back()

    def log(self) -> str:
        file = self.folder / "kueue.log"
        return file.read_text() if file.is_file() else ""

    def down(self) -> None:
        "As if its machine had failed"
        if self.process:
            self.process.kill()
            self.process.wait(600)

    def up(self) -> None:
        self._run()

    def _apply(self) -> None:
        known = yaml.load_all(manifests("kueue.yaml").read_text(), Loader=yaml.CSafeLoader)
        chosen = sorted((m for m in known if m["kind"] in KINDS), key=lambda m: KINDS.index(m["kind"]))
        for manifest in chosen:
            self._call_by_url(manifest)
            self.applied.append(manifest)
            self.administrator.apply(manifest)
        self._wait(lambda: all(map(self._is_served, chosen)), 30, "its kinds to be served")

    def _take_back(self) -> None:
        "Remove what was applied, the webhooks first, and end it"
        for manifest in reversed(self.applied):
            self.administrator.remove(manifest)
        for manifest in self.applied:
            self._wait(lambda m=manifest: not self._is_there(m), 60, f"the end of {manifest['metadata']['name']}")
        self.down()

    def _call_by_url(self, manifest: dict) -> None:
        "Webhooks are called on this machine, and only for what is here"
        if manifest["kind"] == "CustomResourceDefinition":
            hooks = [manifest["spec"].get("conversion", {}).get("webhook")]
        else:
            named = manifest.get("webhooks", [])
            manifest |= {"webhooks": [w for w in named if _groups(w) <= GROUPS]} if named else {}
            hooks = manifest.get("webhooks", [])
        authority = base64.b64encode(self.plane.certificate.read_bytes()).decode()
        for hook in filter(None, hooks):
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"https://127.0.0.1:{self.port}{path}", "caBundle": authority}

    def _run(self) -> None:
        etc = self.folder / "etc" / "kueue"
        for certificates in (etc, etc / "metrics" / "certs"):
            certificates.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.plane.certificate, certificates / "tls.crt")
            shutil.copy(self.plane.key, certificates / "tls.key")
        (etc / "config.yaml").write_text(json.dumps(self._configuration()))
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", OWN_ETC, "sh", etc.parent]
        command += [program("kueue"), "--config=/etc/kueue/config.yaml", "--feature-gates=VisibilityOnDemand=false"]
        environment = {**os.environ, "KUBECONFIG": str(self.plane.kubeconfig()), "POD_NAMESPACE": "kueue-system"}
        with open(self.folder / "kueue.log", "a") as log:
            self.process = subprocess.Popen(
                [*map(str, command)], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._wait(self._is_ready, 60, "Kueue to be ready")

    def _configuration(self) -> dict:
        return {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self.health}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"port": self.port, "host": "127.0.0.1", "certDir": "/etc/kueue"},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "integrations": {"frameworks": ["batch/job"]},
        }

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"Kueue ended; its log ends\n{self.log()[-3000:]}"
        try:
            answer = urllib3.request("GET", f"http://127.0.0.1:{self.health}/readyz", retries=False, timeout=5)
        except urllib3.exceptions.HTTPError:
            return False
        return answer.status == 200

    def _is_served(self, manifest: dict) -> bool:
        "Whether objects of a kind can be made, in all its versions"
        if manifest["kind"] != "CustomResourceDefinition":
            return True
        spec = manifest["spec"]
        for version in (v["name"] for v in spec["versions"] if v["served"]):
            try:
                self.plane.api().request("GET", f"/apis/{spec['group']}/{version}/{spec['names']['plural']}")
            except ApiError:
                return False
        return True

    def _is_empty(self, resource: str) -> bool:
        "Whether there are no objects of a kind, anywhere; those that are there are deleted"
        found = json.loads(self.plane.api().request("GET", f"{API}/{resource}").data)["items"]
        for item in found:
            if "deletionTimestamp" not in item["metadata"]:
                self.administrator.remove(item | {"kind": item["kind"], "apiVersion": item["apiVersion"]})
        return not found

    def _is_there(self, manifest: dict) -> bool:
        if manifest["kind"] == "Namespace":
            return False  # it goes in its own time
        try:
            self.plane.api().request("GET", self.administrator.path(manifest))
        except ApiError:
            return False
        return True

    def _wait(self, check, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds * PATIENCE
        while not check():
            late = f"not within {seconds * PATIENCE:.0f} s: {what}"
            assert time.monotonic() < end, f"{late}; Kueue's log ends\n{self.log()[-3000:]}"
            time.sleep(0.1)


def _groups(webhook: dict) -> set[str]:
    return {group for rule in webhook["rules"] for group in rule["apiGroups"]}
