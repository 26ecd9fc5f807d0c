"What a test works with: the control plane, with an agent or without, and short ways to say what is wanted of them"

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.agent import Agent
from tests.cluster.api import ApiError
from tests.cluster.plane import Plane

PATIENCE = 5  # times the seconds in which a machine with nothing else to do is there, before a wait is given up
CLASSES = {"gpuml-prod": (100_000, "PreemptLowerPriority"), "gpuml-dev": (-1000, "Never")}


class Cluster:
    "A control plane with gpuml's PriorityClasses, and what all tests do with it"

    def __init__(self, plane: Plane):
        self.plane, self.admin = plane, plane.api()
        for name, (value, policy) in CLASSES.items():
            body = {"metadata": {"name": name}, "value": value, "preemptionPolicy": policy}
            self.admin.create("priorityclasses", "", body)

    def make_namespace(self, name: str | None = None) -> str:
        "A namespace in which pods can be made"
        name = name or f"t-{uuid.uuid4().hex[:8]}"
        self.admin.create("namespaces", "", {"metadata": {"name": name}})
        self.wait(lambda: self.plane.has_service_account(name), 30, f"the ServiceAccount of namespace {name}")
        return name

    def remove_namespace(self, name: str) -> None:
        "With all its pods, at once; the namespace itself goes a little later"
        self.admin.delete("namespaces", "", name)  # first: from here on no Job makes another pod
        for pod in self.admin.get("pods", name)["items"]:
            self.remove_pod(name, pod["metadata"]["name"])

    def remove_pod(self, namespace: str, name: str) -> None:
        "At once"
        try:
            self.admin.delete("pods", namespace, name, gracePeriodSeconds=0)
        except ApiError as error:
            if error.status != 404:
                raise

    def secret(self, namespace: str, name: str, **values: str) -> None:
        "A Secret with these keys, such as the S3 keys of `gpuml-s3`"
        self.admin.create("secrets", namespace, {"metadata": {"name": name}, "stringData": values})

    def wait(self, check: Callable, seconds: float = 60, what: str = ""):
        "The first answer of `check` that is true"
        end = time.monotonic() + seconds * PATIENCE
        while not (answer := check()):
            assert time.monotonic() < end, f"not within {seconds * PATIENCE:.0f} s: {what or check.__name__}"
            time.sleep(0.05)
        return answer

    def pods(self, namespace: str, job: str) -> list[dict]:
        "A Job's pods, oldest first"
        pods = self.admin.get("pods", namespace, labelSelector=f"job-name={job}")["items"]
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def wait_pod(self, namespace: str, job: str, check: Callable[[dict], bool], seconds: float = 60) -> dict:
        "The Job's first pod of which `check` is true"
        end = time.monotonic() + seconds * PATIENCE
        while time.monotonic() < end:
            pods = self.pods(namespace, job)
            if found := next((pod for pod in pods if check(pod)), None):
                return found
            time.sleep(0.05)
        said = "\n".join([json.dumps(pod["status"]) for pod in pods] + [" ".join(e) for e in self.events(namespace)])
        raise AssertionError(f"no such pod of Job {job} within {seconds * PATIENCE:.0f} s:\n{said}")

    def wait_job(self, namespace: str, job: str, seconds: float = 90) -> str:
        "Complete or Failed, when the Job is"

        def condition():
            conditions = self.admin.get("jobs", namespace, job)["status"].get("conditions", [])
            return next(
                (c["type"] for c in conditions if c["status"] == "True" and c["type"] in ("Complete", "Failed")), None
            )

        return self.wait(condition, seconds, f"Job {job} to end")

    def events(self, namespace: str, name: str = "") -> list[tuple[str, str]]:
        "Reason and message of a namespace's events, or of one object's"
        events = self.admin.get("events", namespace)["items"]
        return [(e["reason"], e["message"]) for e in events if name in ("", e["involvedObject"]["name"])]

    def wait_event(self, namespace: str, reason: str, seconds: float = 60) -> str:
        "The message of the first event with a reason"

        def find():
            return next((message for why, message in self.events(namespace) if why == reason), None)

        return self.wait(find, seconds, f"event {reason}")


class AgentCluster(Cluster):
    "A cluster with one node, `gpu-1`, of one GPU, and a node without, `control`, that takes no pods and is never lost"

    def __init__(self, plane: Plane, folder: Path):
        super().__init__(plane)
        self.agent = Agent(plane, folder).start()
        self.agent.add_node(
            "control", 0, taints=[{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]
        )
        self.agent.add_node("gpu-1")

    def stop(self) -> None:
        self.agent.stop()

    def service(self, name: str) -> str:
        "An address of this machine that pods know by this name: a server can listen there, on its usual port"
        if not self.agent.isolated:
            pytest.skip("names of services need namespaces of Linux: run as root")
        number = len(self.agent.services) + 2
        process = os.getpid()  # so that two test runs do not meet
        return self.agent.services.setdefault(name, f"127.{64 + process // 250 % 128}.{1 + process % 250}.{number}")


def job(name: str, command: list[str] | str, *, gpus: int = 1, grace: int = 5, retries: int = 0, **more) -> dict:
    """A Job of one pod, whose container is called `main`; a command as text is run by sh.

    more: `env` (a list), `memory` (its limit), `image`, `priority` (a class), and any other field of the pod's spec"""
    command = ["sh", "-c", command] if isinstance(command, str) else command
    resources = {"nvidia.com/gpu": gpus} if gpus else {}
    resources |= {"memory": more.pop("memory")} if "memory" in more else {}
    container = {"name": "main", "image": more.pop("image", "gpuml"), "command": command, "env": more.pop("env", [])}
    container |= {"resources": {"limits": resources, "requests": resources}}
    spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": grace}
    spec |= {"priorityClassName": more.pop("priority")} if "priority" in more else {}
    spec |= {"automountServiceAccountToken": False, **more}
    return {"metadata": {"name": name}, "spec": {"backoffLimit": retries, "template": {"spec": spec}}}


def phase(wanted: str) -> Callable[[dict], bool]:
    "A check for `wait_pod`"
    return lambda pod: pod["status"]["phase"] == wanted


def state(pod: dict) -> dict:
    "What the container waits for, since when it runs, or how it ended"
    statuses = pod["status"].get("containerStatuses") or [{"state": {}}]
    return next(iter(statuses[0]["state"].values()), {})
