"""Four hours of a cluster with eight GPUs, made up: what its exporters would have said, as OpenMetrics with times.

Lines have the labels that they have on the pages beside this file; a job's own metrics are written by gpuml itself.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import exp

from prometheus_client.parser import text_string_to_metric_families

from gpuml.jobs.exporter import Metrics
from gpuml.training.headway import Headway
from tests.conftest import ROOT

MINUTES, PREEMPTED, LOADING, LATER = 240, 90, 2, 10**6
FORM = {}  # metric → labels of its first line on the pages
for path in (ROOT / "tests" / "monitoring").glob("*.prom"):
    text = path.read_text().replace("CREATED", "0").replace("COUNT", "0")
    for sample in [s for family in text_string_to_metric_families(text) for s in family.samples]:
        FORM.setdefault(sample.name, sample.labels)


@dataclass
class Pod:
    "One attempt of a job; times are minutes from the beginning"

    run: str
    owner: str
    gpus: range  # of the eight; a node has four
    created: int
    started: int = LATER
    ended: int = LATER
    outcome: str = "Succeeded"  # or Failed; Preempted: the pod is removed
    takes: int = 0  # minutes of training, of all attempts together; if not said, it trains to its end
    before: int = 0  # minutes of them in earlier attempts

    def __post_init__(self):
        self.takes = self.takes or self.ended - self.started - LOADING - 1
        self.config = self.run.split("-")[0]
        self.place = f"gpuml-{self.config}"  # namespace and class
        letters = random.Random(f"{self.run} {self.created}").choices("bcdfghjklmnpqrstvwxz2456789", k=5)
        self.name = f"{self.run}-{''.join(letters)}"

    def phase(self, minute: int) -> str:
        return "Pending" if minute < self.started else "Running" if minute < self.ended else self.outcome


PODS = [
    Pod("dev-3b8e61f0c2-1", "ada", range(4, 5), -40, -40, 78),
    Pod("dev-91be02aa17-1", "bob", range(5, 6), 5, 5, 112),
    Pod("prod-0f2a9c11d4-1", "ada", range(0, 2), 14, 14, 150),
    Pod("dev-5e02f7b961-1", "cleo", range(6, 7), 30, 30, takes=90),  # then its notebook goes on and does nothing
    Pod("dev-d81f33e04a-1", "ada", range(7, 8), 44, 44, 126),
    Pod("dev-c47d19a5b3-1", "bob", range(2, 4), 58, 58, 92, "Preempted", takes=130),
    Pod("dev-20c9b46e7d-1", "cleo", range(4, 5), 66, 78, 182),
    Pod("dev-8840ce7b1f-1", "ada", range(5, 6), 74, 112, 171, "Failed", takes=140),
    Pod("prod-77aa01c3d9-1", "cleo", range(2, 4), PREEMPTED, 92, takes=230),  # all GPUs are held: it preempts
    Pod("dev-c47d19a5b3-1", "bob", range(0, 2), 92, 150, takes=130, before=32),
    Pod("dev-f615a80d29-1", "bob", range(7, 8), 98, 126, takes=150),
    Pod("dev-a3d70e5c88-1", "cleo", range(5, 6), 107, 171, takes=80),
    Pod("dev-6b94e7720e-1", "ada", range(4, 5), 140, 182, takes=95),
    Pod("dev-b9186fe2a0-1", "bob", range(6, 7), 228, takes=60),
]


def training(pod: Pod, minute: int, noise: random.Random) -> Headway:
    "How far the run is then"
    if minute < pod.started + LOADING:
        return Headway(pod.run, "model")
    of_run = random.Random(pod.run)
    epochs, floor, best = max(3, pod.takes // 20), of_run.uniform(0.2, 0.5), of_run.uniform(0.82, 0.93)
    planned, speed = pod.takes * 120, of_run.uniform(700, 1100) * len(pod.gpus)
    share = min(1, (pod.before + minute - pod.started - LOADING) / pod.takes)
    loss = floor + (1.7 - floor) * exp(-5 * share)
    if share < 1:  # from then on it says the same
        loss *= noise.uniform(0.93, 1.07)
        speed *= noise.uniform(0.97, 1.03)
    learnt, evaluation = exp(-5 * int(epochs * share) / epochs), None
    if epochs * share >= 1:
        evaluation = {"loss": 1.1 * floor + (1.7 - floor) * learnt, "macro_f1": best - (best - 0.2) * learnt}
    return Headway(
        pod.run,
        "training" if share < 1 else "done",
        update=round(planned * share),
        updates=planned,
        epoch=epochs * share,
        epochs=epochs,
        loss=loss,
        evaluation=evaluation,
        examples_per_second=speed,
        seconds_left=60 * (1 - share) * pod.takes,
    )


def kubernetes(pod: Pod, phase: str, created: float) -> Iterator[tuple]:
    "What kube-state-metrics says of a pod: (metric, value, labels), …"
    names = {"namespace": pod.place, "pod": pod.name, "uid": pod.name[-5:]}
    node = {"node": "" if phase == "Pending" else f"gpu-{pod.gpus[0] // 4 + 1}"}
    whose = {f"label_gpuml_io_{key}": getattr(pod, key) for key in ("run", "owner", "config")}
    yield "kube_pod_info", 1, names | node | {"priority_class": pod.place, "created_by_name": pod.run}
    yield "kube_pod_labels", 1, names | whose
    yield "kube_pod_created", created, names
    for each in ("Pending", "Running", "Succeeded", "Failed", "Unknown"):
        yield "kube_pod_status_phase", each == phase, names | {"phase": each}
    requested = {"resource": "nvidia_com_gpu", "unit": "integer"}
    yield "kube_pod_container_resource_requests", len(pod.gpus), names | node | requested
    if phase == "Failed":
        yield "kube_job_failed", 1, {"namespace": pod.place, "job_name": pod.run, "condition": "true"}


def graphics(gpu: int, pod: Pod | None, headway: Headway | None, noise: random.Random) -> Iterator[tuple]:
    "What the DCGM exporter says of a GPU"
    node, number = divmod(gpu, 4)
    names = {"gpu": f"{number}", "device": f"nvidia{number}", "UUID": f"GPU-{gpu}", "Hostname": f"gpu-{node + 1}"}
    names |= {"namespace": pod.place, "pod": pod.name} if pod else {"namespace": "", "pod": "", "container": ""}
    of_pod, busy = random.Random(pod and pod.name), 0.0
    memory, usual = of_pod.randrange(18_000, 70_000), of_pod.uniform(0.75, 0.95)
    if headway and headway.phase == "training":
        evaluates = headway.epoch % 1 < 0.05
        busy = usual * noise.uniform(0.97, 1.03) * (0.8 if evaluates else 1)
    yield "DCGM_FI_DEV_GPU_UTIL", round(100 * busy), names
    yield "DCGM_FI_PROF_GR_ENGINE_ACTIVE", busy, names
    yield "DCGM_FI_DEV_FB_USED", memory if pod else 4, names


def said(minute: int, end: float, noise: random.Random) -> Iterator[tuple]:
    "What all exporters say in a minute"
    running = {}  # GPU → its pod, and how far the run is
    for node in ("gpu-1", "gpu-2"):
        yield "kube_node_status_allocatable", 4, {"node": node}
    yield "scheduler_preemption_victims_sum", 3 + (minute >= PREEMPTED), {}
    yield "kube_job_failed", 1, {"namespace": "web", "job_name": "backup", "condition": "true"}  # another team's
    for pod in [p for p in PODS if p.created <= minute and p.phase(minute) != "Preempted"]:
        yield from kubernetes(pod, pod.phase(minute), end - 60 * (MINUTES - pod.created))
        if pod.phase(minute) == "Running":
            assert not running.keys() & set(pod.gpus), "two pods on a GPU"
            metrics, headway = Metrics(), training(pod, minute, noise)
            running |= dict.fromkeys(pod.gpus, (pod, headway))
            metrics.learn({"content": {"metadata": {"gpuml": asdict(headway)}}})
            for s in [s for family in metrics.collect() for s in family.samples]:
                yield s.name, s.value, s.labels | {"namespace": pod.place, "pod": pod.name}  # as a PodMonitor adds them
    for gpu in range(8):
        yield from graphics(gpu, *running.get(gpu, (None, None)), noise)


def page(
    end: float,  # seconds since 1970, of the last minute
    seed: int = 0,
) -> str:
    "What they said, minute by minute"
    noise, lines = random.Random(seed), defaultdict(list)
    for minute in range(MINUTES + 1):
        for name, value, labels in said(minute, end, noise):
            assert name.startswith("gpuml_") or labels.keys() <= FORM[name].keys(), f"{name} has no such labels"
            text = ",".join(f'{k}="{v}"' for k, v in (FORM.get(name, {}) | labels).items())
            lines[name].append(f"{name}{{{text}}} {value:.12g} {end - 60 * (MINUTES - minute):.0f}")
    return "\n".join([*itertools.chain(*lines.values()), "# EOF\n"])
