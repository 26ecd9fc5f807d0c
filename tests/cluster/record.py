"""Records what a real control plane says of jobs, change by change, from their submission to their end.

    python -m tests.cluster.record [SCENARIO ...]      writes tests/recordings/SCENARIO.json; without names, all of them

tests/test_recordings.py holds `explain` against every moment of a recording. The Job is the one that gpuml makes; in the
place of training a shell script says what `gpuml run` would say, and leaves the record of its attempts.
A recording is a list of changes, oldest first: (seconds, kind, key, JSON merge patch; null where the object is gone).
"""

import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import urllib3

from gpuml.base.loading import load
from gpuml.cluster.manifest import Source, manifest
from gpuml.training.attempts import Attempt, content, now
from tests.cluster.api import ApiError
from tests.cluster.cluster import AgentCluster, phase
from tests.cluster.cluster import job as holder
from tests.cluster.plane import Plane
from tests.cluster.worker import Worker
from tests.conftest import ROOT

FOLDER = ROOT / "tests" / "recordings"
RUN = "spring-model"
TRAINS = """\
leave() { printf '%s\\n%s' "$1" "$2" > /work/word.new; mv /work/word.new /work/word; }
leave '' ''
save() { sleep $GRACE_USED; leave 75 'stopped at update 6 of 270, with a checkpoint'
         printf 'stopped at update 6 of 270, with a checkpoint' > /dev/termination-log; sleep 0.3; exit 75; }
finish() { leave $1 "$2"; printf "$2" > /dev/termination-log; sleep 0.3; exit $1; }
trap save TERM
GRACE_USED=1
"""  # what `gpuml run` says is found in the pod's folder /work by the recorder, which is the storage here


class Scenario:
    "One job in a namespace of its own, and what is done to it"

    def __init__(self, cluster: AgentCluster, name: str):
        self.cluster, self.name = cluster, name
        self.namespace = cluster.make_namespace(f"r-{name}")
        self.began = time.monotonic()
        self.changes, self.objects, self.lock = [], {}, threading.Lock()
        self.words, self.attempts, self.over = {}, {}, threading.Event()
        for kind in ("jobs", "pods", "events"):
            threading.Thread(target=self._watch, args=(kind, self.namespace), daemon=True).start()
        threading.Thread(target=self._watch, args=("nodes", ""), daemon=True).start()
        threading.Thread(target=self._read_words, daemon=True).start()

    def submit(self, script: str, *words: str, run: str = RUN, gates: list | None = None, **spec) -> None:
        "The Job that gpuml makes, with a script in the place of training"
        settings = ["compute.image=gpuml-train:0.1.0", "compute.s3_secret=null", "compute.gpus=0", "compute.cpu=100m"]
        settings += [
            "compute.memory=1Gi",
            "compute.disk=1Gi",
            f"compute.namespace={self.namespace}",
            "compute.grace=20",
        ]
        config = load("prod", [*settings, *words], start=ROOT)
        body = manifest(config, run, Source("0f2a9c11d4", "s3://b/x.tar.gz", "train.ipynb", "Ada"))
        body["spec"] |= spec
        pod = body["spec"]["template"]["spec"]
        pod["containers"][0]["command"] = ["sh", "-c", TRAINS + script]
        pod |= {"schedulingGates": gates} if gates else {}
        self.cluster.admin.create("jobs", self.namespace, body)

    def wait_pod(self, wanted: str = "Running", job: str = RUN, seconds: float = 90) -> dict:
        return self.cluster.wait_pod(self.namespace, job, phase(wanted), seconds)

    def wait_attempt(self, number: int, seconds: float = 120) -> None:
        "Until the script of that attempt runs"
        self.cluster.wait(lambda: len(self.attempts) >= number, seconds, f"attempt {number}")

    def cancel(self, policy: str = "Foreground") -> None:
        self.cluster.admin.delete("jobs", self.namespace, RUN, propagationPolicy=policy)

    def wait_gone(self) -> None:
        def is_gone():
            pods = self.cluster.admin.get("pods", self.namespace)["items"]
            return not pods and not self.cluster.admin.get("jobs", self.namespace)["items"]

        self.cluster.wait(is_gone, 60, "the job to be gone")

    def end(self) -> None:
        "Write the recording"
        time.sleep(1)
        self.over.set()
        with self.lock:
            lines = ",\n".join(json.dumps(change, separators=(",", ":")) for change in self.changes)
        (FOLDER / f"{self.name}.json").write_text(f"[\n{lines}\n]\n")

    def note(self, kind: str, key: str, value: dict | None) -> None:
        "Note what has changed of an object"
        with self.lock:
            before = self.objects.get((kind, key))
            if value == before or self.over.is_set():
                return
            seconds = round(time.monotonic() - self.began, 3)
            self.changes.append((seconds, kind, key, value if None in (before, value) else difference(before, value)))
            self.objects[kind, key] = value

    def _watch(self, kind: str, namespace: str) -> None:
        while not self.over.is_set():
            with suppress(ApiError, urllib3.exceptions.HTTPError):
                for change, item in self.cluster.admin.watch(kind, namespace):
                    value = None if change == "DELETED" else SHORT.get(kind, dict)(item)
                    if kind != "events" or change != "DELETED":
                        self.note(kind, item["metadata"]["name"], value)

    def _read_words(self) -> None:
        "What the scripts say, as the files of their attempts"
        while not self.over.wait(0.02):
            for worker in list(self.cluster.agent.workers.values()):
                if worker.namespace == self.namespace and re.fullmatch(rf"{RUN}-\w{{5}}", worker.name):
                    with suppress(OSError):
                        self._take(worker, (worker.folder / "volumes" / "work" / "word").read_text())

    def _take(self, worker: Worker, word: str) -> None:
        pod = worker.name
        if self.words.get(pod) == word:
            return
        self.words[pod] = word
        code, _, reason = word.partition("\n")
        number, began = self.attempts.setdefault(pod, (len(self.attempts) + 1, now()))
        finished = now() if code else ""
        code = int(code) if code else None
        saved = 6 if code == 75 else None
        where = {"host": pod, "node": worker.node}
        attempt = Attempt(RUN, number, code, reason, None, began, finished, **where, updates=saved, planned_updates=270)
        self.note("attempts", str(number), json.loads(content(attempt)) | {"checkpoint": saved})


def difference(before: dict, after: dict) -> dict:
    "A JSON merge patch"
    changed = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        if value != before.get(key):
            both = isinstance(value, dict) and isinstance(before.get(key), dict)
            changed[key] = difference(before[key], value) if both else value
    return changed


META = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "labels",
        "annotations", "ownerReferences", "finalizers")  # fmt: skip
POD = ("containers", "initContainers", "nodeName", "priorityClassName", "schedulingGates", "restartPolicy")
CONTAINER = ("name", "image", "resources", "restartPolicy")


def _part(item: dict, names: tuple[str, ...]) -> dict:
    return {name: item[name] for name in names if name in item}


def _short_spec(spec: dict) -> dict:
    lists = {
        name: [_part(c, CONTAINER) for c in spec[name]] for name in ("containers", "initContainers") if name in spec
    }
    return _part(spec, POD) | lists


def _short_pod(pod: dict) -> dict:
    return {"metadata": _part(pod["metadata"], META), "spec": _short_spec(pod["spec"]), "status": pod["status"]}


def _short_job(job: dict) -> dict:
    template = {"spec": _short_spec(job["spec"]["template"]["spec"])}
    return {
        "metadata": _part(job["metadata"], META),
        "spec": job["spec"] | {"template": template},
        "status": job["status"],
    }


def _short_event(event: dict) -> dict:
    names = ("reason", "message", "involvedObject", "firstTimestamp", "lastTimestamp", "eventTime", "count", "type")
    meta = {"metadata": _part(event["metadata"], ("name", "creationTimestamp"))}
    return meta | {name: event[name] for name in names if event.get(name) is not None}


def _short_node(node: dict) -> dict:
    ready = [_part(c, ("type", "status", "lastTransitionTime")) for c in node["status"].get("conditions", ())]
    status = {
        "allocatable": node["status"].get("allocatable", {}),
        "conditions": [c for c in ready if c["type"] == "Ready"],
    }
    return {
        "metadata": _part(node["metadata"], ("name", "labels")),
        "spec": _part(node["spec"], ("taints", "unschedulable")),
        "status": status,
    }


SHORT = {"pods": _short_pod, "jobs": _short_job, "events": _short_event, "nodes": _short_node}


# The scenarios


def success(s: Scenario) -> None:
    s.submit("sleep 1; finish 0 'all cells are done'")
    s.cluster.wait_job(s.namespace, RUN)


def bad_data(s: Scenario) -> None:
    s.submit("sleep 1; finish 65 'data/a.csv:3: bad row'")
    s.cluster.wait_job(s.namespace, RUN)


def killed(s: Scenario) -> None:
    s.submit("while :; do sleep 0.1; done")
    s.wait_attempt(1)
    time.sleep(1)
    worker = next(w for w in s.cluster.agent.workers.values() if w.namespace == s.namespace)
    worker.main.kill()
    s.cluster.wait_job(s.namespace, RUN)


def retries(s: Scenario) -> None:
    "Twice a code that counts, with one retry; beside it another run whose name begins alike"
    s.submit("finish 65 'of another run'", run=f"{RUN}-2")
    s.submit("sleep 1; finish 70 'the kernel died in cell 3'", "compute.retries=1")
    s.cluster.wait_job(s.namespace, RUN)


def deadline(s: Scenario) -> None:
    s.submit("GRACE_USED=3; while :; do sleep 0.1; done", activeDeadlineSeconds=10)
    s.cluster.wait_job(s.namespace, RUN)


def deadline_unstarted(s: Scenario) -> None:
    "No node takes it until its deadline"
    s.submit("sleep 9", "compute.node_selector={never: there}", activeDeadlineSeconds=3)
    s.cluster.wait_job(s.namespace, RUN)


def deadline_between(s: Scenario) -> None:
    "The deadline comes while Kubernetes waits with the next attempt"
    s.submit("sleep 1; finish 75 'S3 did not answer for 150 s'", activeDeadlineSeconds=12)
    s.cluster.wait_job(s.namespace, RUN)


def cancelled(s: Scenario) -> None:
    s.submit("GRACE_USED=2; while :; do sleep 0.1; done")
    s.wait_attempt(1)
    s.cancel()
    s.wait_gone()


def cancelled_unstarted(s: Scenario) -> None:
    s.submit("sleep 9", "compute.node_selector={never: there}")
    s.wait_pod("Pending")
    time.sleep(1)
    s.cancel()
    s.wait_gone()


def cancelled_between(s: Scenario) -> None:
    s.submit("sleep 1; finish 75 'S3 did not answer for 150 s'")
    s.wait_pod("Failed")
    time.sleep(1)
    s.cancel()
    s.wait_gone()


def deleted_in_background(s: Scenario) -> None:
    "As `kubectl delete job` does"
    s.submit("GRACE_USED=2; while :; do sleep 0.1; done")
    s.wait_attempt(1)
    s.cancel("Background")
    s.wait_gone()


def suspended(s: Scenario) -> None:
    "Stopped by suspend, and let on"
    s.submit("GRACE_USED=2; n=0; while [ $n -lt 20 ]; do sleep 0.1; n=$((n+1)); done; finish 0 'all cells are done'")
    s.wait_attempt(1)
    s.cluster.admin.patch("jobs", s.namespace, RUN, {"spec": {"suspend": True}})
    s.cluster.wait(lambda: not s.cluster.pods(s.namespace, RUN))
    time.sleep(2)
    s.cluster.admin.patch("jobs", s.namespace, RUN, {"spec": {"suspend": False}})
    s.cluster.wait_job(s.namespace, RUN)


def queued(s: Scenario) -> None:
    "Suspended from the beginning, as a queue has it, then cancelled"
    s.submit("sleep 1; finish 0 'all cells are done'", "compute.queue=team-a", suspend=True)
    time.sleep(2)
    s.cancel()
    s.wait_gone()


def managed(s: Scenario) -> None:
    s.submit("sleep 1", managedBy="example.com/other")
    time.sleep(3)


def gated(s: Scenario) -> None:
    "Something that admits pods holds its pod back, and lets it go"
    s.submit("sleep 1; finish 0 'all cells are done'", gates=[{"name": "example.com/quota"}])
    pod = s.wait_pod("Pending")
    time.sleep(1)
    s.cluster.admin.patch("pods", s.namespace, pod["metadata"]["name"], {"spec": {"schedulingGates": None}})
    s.cluster.wait_job(s.namespace, RUN)


def preempted(s: Scenario) -> None:
    "Preempted, held up by production, goes on; then its kernel dies, and the next attempt ends well"
    node = s.cluster.agent.add_node(f"gpu-{s.name}", labels={"only": s.name})
    where = f"compute.node_selector={{only: {s.name}}}"
    s.submit("GRACE_USED=2; while :; do sleep 0.1; done", "compute.gpus=1", where, "compute.priority_class=gpuml-dev")
    s.wait_attempt(1)
    spec = {"priority": "gpuml-prod", "grace": 1, "nodeSelector": {"only": s.name}}
    s.cluster.admin.create("jobs", s.namespace, holder("prod", "exec sleep 600", **spec))
    s.wait_pod("Running", "prod")
    s.wait_pod("Pending")
    time.sleep(2)
    s.cluster.admin.delete("jobs", s.namespace, "prod", propagationPolicy="Background")
    s.wait_attempt(2)
    worker = next(w for w in s.cluster.agent.workers.values() if w.namespace == s.namespace and RUN in w.name)
    (worker.folder / "volumes" / "work" / "word").write_text("70\nthe kernel died in cell 3")
    (worker.folder / "termination-log").write_text("the kernel died in cell 3")
    time.sleep(0.3)
    worker.end_as = {"exitCode": 70}
    worker.main.kill()
    s.wait_attempt(3)
    time.sleep(1)
    s.cluster.agent.remove_node(node)


def preempted_and_done(s: Scenario) -> None:
    "Training ends well while it is preempted"
    node = s.cluster.agent.add_node(f"gpu-{s.name}", labels={"only": s.name})
    where = f"compute.node_selector={{only: {s.name}}}"
    script = "trap 'finish 0 \"all cells are done\"' TERM; while :; do sleep 0.1; done"
    s.submit(script, "compute.gpus=1", where, "compute.priority_class=gpuml-dev")
    s.wait_attempt(1)
    spec = {"priority": "gpuml-prod", "grace": 1, "nodeSelector": {"only": s.name}}
    s.cluster.admin.create("jobs", s.namespace, holder("prod", "exec sleep 600", **spec))
    s.cluster.wait_job(s.namespace, RUN)
    time.sleep(1)
    s.cluster.agent.remove_node(node)


def pod_deleted(s: Scenario) -> None:
    "Somebody deletes its pod; the next attempt ends well"
    s.submit("n=0; while [ $n -lt 20 ]; do sleep 0.1; n=$((n+1)); done; finish 0 'all cells are done'")
    s.wait_attempt(1)
    pod = s.wait_pod()
    s.cluster.admin.delete("pods", s.namespace, pod["metadata"]["name"])
    s.cluster.wait_job(s.namespace, RUN)


def evicted(s: Scenario) -> None:
    "Evicted by its node; the next attempt ends well"
    s.submit("n=0; while [ $n -lt 20 ]; do sleep 0.1; n=$((n+1)); done; finish 0 'all cells are done'")
    s.wait_attempt(1)
    s.cluster.agent.evict(s.namespace, s.wait_pod()["metadata"]["name"])
    s.cluster.wait_job(s.namespace, RUN)


def node_lost(s: Scenario) -> None:
    "The node is lost, then removed; the next attempt goes on elsewhere"
    nodes = [s.cluster.agent.add_node(f"{s.name}-1", 0, labels={"only": s.name})]
    s.submit(
        "n=0; while [ $n -lt 40 ]; do sleep 0.1; n=$((n+1)); done; finish 0 'all cells are done'",
        f"compute.node_selector={{only: {s.name}}}",
    )
    s.wait_attempt(1)
    s.cluster.agent.vanish(nodes[0])
    s.cluster.wait(lambda: s.cluster.pods(s.namespace, RUN)[0]["metadata"].get("deletionTimestamp"), 60)
    nodes.append(s.cluster.agent.add_node(f"{s.name}-2", 0, labels={"only": s.name}))
    time.sleep(2)
    s.cluster.admin.delete("nodes", "", nodes[0])
    s.cluster.wait_job(s.namespace, RUN, 240)
    s.cluster.agent.remove_node(nodes[1])


def quota(s: Scenario) -> None:
    "A quota refuses its pod, and then does not"
    spec = {"hard": {"pods": "0"}}
    s.cluster.admin.create("resourcequotas", s.namespace, {"metadata": {"name": "gpuml-dev"}, "spec": spec})
    s.cluster.wait(
        lambda: s.cluster.admin.get("resourcequotas", s.namespace, "gpuml-dev").get("status", {}).get("hard")
    )
    s.submit("sleep 1; finish 0 'all cells are done'")
    s.cluster.wait_event(s.namespace, "FailedCreate")
    time.sleep(1)
    s.cluster.admin.delete("resourcequotas", s.namespace, "gpuml-dev")
    s.cluster.wait_job(s.namespace, RUN, 240)


def image(s: Scenario) -> None:
    s.submit("sleep 1", "compute.image=no-such-image:1")
    s.wait_pod("Pending")
    time.sleep(3)
    s.cancel()
    s.wait_gone()


SCENARIOS: dict[str, Callable[[Scenario], None]] = {
    f.__name__.replace("_", "-"): f
    for f in (success, bad_data, killed, retries, deadline, deadline_unstarted, deadline_between, cancelled,
              cancelled_unstarted, cancelled_between, deleted_in_background, suspended, queued, managed, gated, preempted,
              preempted_and_done, pod_deleted, evicted, node_lost, quota, image)
}  # fmt: skip


def record(cluster: AgentCluster, name: str) -> None:
    "Play a scenario, and write it down"
    scenario = Scenario(cluster, name)
    try:
        SCENARIOS[name](scenario)
        print(f"{name}: {len(scenario.changes)} changes in {time.monotonic() - scenario.began:.0f} s", flush=True)
    except Exception as e:
        print(f"{name}: {type(e).__name__}: {str(e)[:2000]}", flush=True)
    scenario.end()
    cluster.remove_namespace(scenario.namespace)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp())
    (work / "plane").mkdir()
    plane = Plane(work / "plane").start()
    cluster = AgentCluster(plane, work / "pods")
    cluster.agent.add_node("cpu-1", 0)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda name: record(cluster, name), sys.argv[1:] or SCENARIOS))
    finally:
        cluster.stop()
        plane.stop()
        shutil.rmtree(work, ignore_errors=True)
