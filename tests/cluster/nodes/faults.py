"What happens to the pods of a training: their processes, and how they ended"

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tests.cluster.nodes import machine
from tests.cluster.nodes.image import HOLDS
from tests.cluster.nodes.real import Real


def processes(real: Real, pod: dict) -> dict[int, str]:
    "The processes of a pod's containers by their ids here, with their command lines; without the one that holds its network"
    group = real.nodes[pod["spec"]["nodeName"]].group
    roots = machine.groups()
    folders = {path.relative_to(root) for root in roots for path in (root / group).rglob(f"*{pod['metadata']['uid']}")}
    lines = {}
    for pid in set().union(*(machine.processes_in(str(folder)) for folder in folders)):
        with suppress(OSError):  # it has ended
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return {pid: line for pid, line in lines.items() if line != " ".join(HOLDS)}


def main_process(real: Real, pod: dict) -> int:
    "Process 1 of the container"
    return next(pid for pid in processes(real, pod) if _inner_pid(pid) == 1)


def _inner_pid(pid: int) -> int:
    "The id that a process has in its own namespace"
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("NSpid")).split()[-1])


def send(pids: Iterable[int], number: signal.Signals) -> None:
    "A signal to each that is still there"
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Seen:
    "All pods that a job has had, as they were last seen: those that were deleted, too"

    def __init__(self, real: Real, namespace: str, job: str):
        self.real, self.namespace, self.job = real, namespace, job
        self.by_uid: dict[str, dict] = {}

    def look(self) -> list[dict]:
        "Those that are there, by number"
        pods = self.real.pods(self.namespace, self.job)
        self.by_uid |= {pod["metadata"]["uid"]: pod for pod in pods}
        return sorted(pods, key=number)

    def running(self) -> list[dict]:
        "Those that run and are to go on, by number"
        pods = self.look()
        return [p for p in pods if p["status"]["phase"] == "Running" and not p["metadata"].get("deletionTimestamp")]

    def ends(self) -> list[tuple[int, int | None, str]]:
        "Number, exit code, and who ended it from outside, of each, oldest first"
        pods = sorted(self.by_uid.values(), key=lambda pod: pod["metadata"]["creationTimestamp"])
        return [(number(pod), _exit_code(pod), _disruption(pod)) for pod in pods]


def number(pod: dict) -> int:
    "Of a pod among those of its job"
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def _exit_code(pod: dict) -> int | None:
    "None where nobody knows it, or it runs"
    (status,) = pod["status"].get("containerStatuses") or [{}]
    return status.get("state", {}).get("terminated", {}).get("exitCode")


def _disruption(pod: dict) -> str:
    reasons = [c["reason"] for c in pod["status"].get("conditions", ()) if c["type"] == "DisruptionTarget"]
    deleted = ["deleted"] if pod["metadata"].get("deletionTimestamp") else []
    return next(iter(reasons + deleted), "")
