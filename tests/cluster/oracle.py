"The tests' real kube-scheduler as the judge of `plan`: random small clusters side by side on one control plane"

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gpuml.cluster.plan import Plan, plan
from gpuml.cluster.snapshot import snapshot_of
from tests.cluster.api import ApiError, address
from tests.cluster.plane import Plane

FAST = {"kube-api-qps": 3000, "kube-api-burst": 3000}
SERVERS = (
    "etcd",
    "kube-apiserver",
    "kube-scheduler",
)  # nobody else acts: pods that are told to end stay until the judge ends them
ADMISSION = "ServiceAccount,TaintNodesByCondition"
GPU, PLACE, CLUSTER = "nvidia.com/gpu", "default", "cluster"
CLASSES = {"low": -1000, "mid": 0, "high": 1000, "top": 100_000, "meek": 1000}  # the last preempts nobody
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)


@dataclass
class Case:
    "A random cluster, and a job for it"

    name: str
    nodes: list[dict[str, Any]]
    pods: list[dict[str, Any]]  # with a node
    waiting: list[dict[str, Any]]
    budgets: list[dict[str, Any]]
    job: dict[str, Any]


def resources(cpu: int, gpus: int, memory: int = 1) -> dict[str, str]:
    return {"cpu": str(cpu), "memory": f"{memory}Gi"} | ({GPU: str(gpus)} if gpus else {})


def pod_spec(rng: random.Random, case: str, priority_class: str, gpus: int, cpu: int) -> dict[str, Any]:
    "Of a pod that asks for so much, within its cluster"
    asked = resources(cpu, gpus, rng.choice([1, 1, 2, 8]))
    container = {
        "name": "train",
        "image": "none",
        "resources": {"requests": asked, "limits": {GPU: asked[GPU]} if gpus else {}},
    }
    spec = {"containers": [container], "priorityClassName": priority_class, "nodeSelector": {CLUSTER: case}}
    if rng.random() < 0.15:
        spec["nodeSelector"]["type"] = rng.choice("ab")
    if rng.random() < 0.2:
        spec["tolerations"] = [{"key": "team", "operator": "Exists"}]
    return spec


def random_case(seed: int) -> Case:
    "The case of a seed: the same every time"
    rng = random.Random(seed)
    name = f"c{seed}"
    nodes = [random_node(rng, name, i) for i in range(rng.randint(1, rng.choice([3, 6, 12])))]
    pods = [pod for node in nodes for pod in random_pods(rng, name, node)]
    waiting = []
    for i in range(rng.choice([0, 0, 0, 1, 1, 2, 3])):
        spec = pod_spec(rng, name, rng.choice([*CLASSES]), rng.choice([0, 1, 2, 4, 8]), rng.choice([1, 2, 8]))
        waiting.append({"metadata": {"name": f"{name}-w{i}", "labels": {CLUSTER: name}}, "spec": spec})
    budgets = [random_budget(rng, name, i) for i in range(rng.choice([0, 0, 1, 2]))]
    spec = pod_spec(
        rng,
        name,
        rng.choices([*CLASSES, "none"], [2, 2, 4, 6, 2, 0.3])[0],
        rng.choice([0, 1, 1, 2, 2, 4, 4, 8]),
        rng.choice([1, 2, 4, 16]),
    )
    template = {"metadata": {"labels": {CLUSTER: name, "job": "yes"}}, "spec": spec}
    job = {
        "metadata": {"namespace": PLACE, "name": name},
        "spec": {"completions": rng.choice([1, 1, 1, 1, 2, 2, 3, 4]), "template": template},
    }
    return Case(name, nodes, pods, waiting, budgets, job)


def random_node(rng: random.Random, case: str, number: int) -> dict[str, Any]:
    gpus = rng.choice([0, 1, 2, 4, 4, 8, 8, 8])
    amounts = resources(rng.choice([4, 8, 16, 32]), gpus, rng.choice([8, 32, 64])) | {
        "pods": str(rng.choice([3, 6, 20, 110]))
    }
    spec = {"taints": [{"key": "team", "value": "x", "effect": "NoSchedule"}]} if rng.random() < 0.12 else {}
    if rng.random() < 0.05:
        spec["unschedulable"] = True
    labels = {CLUSTER: case, "type": rng.choice("ab")}
    status = {"capacity": amounts, "allocatable": amounts}
    return {"metadata": {"name": f"{case}-n{number}", "labels": labels}, "spec": spec, "status": status}


def random_pods(rng: random.Random, case: str, node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    "What holds a node, to a random degree: of several priorities, ages and sizes; some are ending"
    have = node["status"]["allocatable"]
    free = {"cpu": int(have["cpu"]), GPU: int(have.get(GPU, 0)), "memory": int(have["memory"].removesuffix("Gi"))}
    fill = rng.choice([0.3, 0.9, 1, 1])
    favourite = rng.choice([*CLASSES])
    for i in range(min(int(have["pods"]), 8)):
        gpus, cpu = rng.choice([0, 1, 1, 2, 4]), rng.choice([1, 1, 2, 4])
        spec = pod_spec(rng, case, rng.choice([favourite, *CLASSES]), gpus, cpu)
        memory = int(spec["containers"][0]["resources"]["requests"]["memory"].removesuffix("Gi"))
        if rng.random() > fill or gpus > free[GPU] or cpu > free["cpu"] or memory > free["memory"]:
            continue
        free = {"cpu": free["cpu"] - cpu, GPU: free[GPU] - gpus, "memory": free["memory"] - memory}
        started = BEGIN + timedelta(minutes=rng.choice([0, rng.randrange(10_000), rng.randrange(10_000)]))
        labels = {CLUSTER: case, "app": rng.choice("xyz")}
        yield {
            "metadata": {"name": f"{node['metadata']['name']}-p{i}", "labels": labels},
            "spec": spec | {"nodeName": node["metadata"]["name"]},
            "status": {"phase": "Running", "startTime": started.strftime("%Y-%m-%dT%H:%M:%SZ")},
            "ends": rng.random() < 0.03,
        }  # fmt: skip


def random_budget(rng: random.Random, case: str, number: int) -> dict[str, Any]:
    labels = {CLUSTER: case, "app": rng.choice("xyz")}
    status = {
        "disruptionsAllowed": rng.choice([0, 0, 1, 2]),
        "currentHealthy": 3,
        "desiredHealthy": 3,
        "expectedPods": 3,
    }
    spec = {"minAvailable": 3, "selector": {"matchLabels": labels}}
    return {"metadata": {"name": f"{case}-b{number}"}, "spec": spec, "status": status | {"observedGeneration": 1}}


@dataclass(frozen=True)
class Verdict:
    "What was predicted for a case, and what the scheduler did"

    case: Case
    plan: Plan
    answer: str
    victims: frozenset[str]
    nodes: frozenset[str]

    @property
    def is_class_right(self) -> bool:
        return self.plan.answer == self.answer

    @property
    def predicted_victims(self) -> set[frozenset[str]]:
        "The sets of pods that would be told to end; who is ending already is not"
        return {frozenset(v.name for v in victims if not v.is_ending) for victims in self.plan.alternatives} or {
            frozenset()
        }

    @property
    def are_victims_right(self) -> bool:
        return self.victims in self.predicted_victims

    def __str__(self):
        job = self.case.job["spec"]
        asked = job["template"]["spec"]["containers"][0]["resources"]["requests"]
        sets = sorted(map(sorted, self.predicted_victims))
        return (
            f"{self.case.name}: {job['completions']} × {asked}, {job['template']['spec']['priorityClassName']}: "
            f"predicted {self.plan.answer} {sets[:4]}, was {self.answer} {sorted(self.victims)} on {sorted(self.nodes)}"
        )


class Judge:
    "A control plane without controllers, on which random clusters are judged"

    def __init__(self, folder: Path):
        flags = {"disable-admission-plugins": ADMISSION, "max-requests-inflight": 2000}
        self.plane = Plane(folder, apiserver_flags=flags, scheduler_flags=FAST)
        self.admin = self.plane.api()

    def start(self) -> "Judge":
        self.plane.start(SERVERS)
        for name, value in CLASSES.items():
            policy = {"preemptionPolicy": "Never"} if name == "meek" else {}
            self.admin.create("priorityclasses", "", {"metadata": {"name": name}, "value": value, **policy})
        return self

    def stop(self) -> None:
        self.plane.stop()

    def judge(self, cases: list[Case]) -> list[Verdict]:
        "Build the clusters, predict, submit, and see"
        self._build(cases)
        before = self._state()
        plans = {case.name: plan(self._snapshot(case, before), case.job) for case in cases}
        refused = self._submit(cases)
        after = self._settled()
        seen = {case.name: self._outcome(case, after) for case in cases}
        waits = [case for case in cases if seen[case.name][0] == "waits" and case.name not in refused]
        ever = self._empty(waits)
        verdicts = []
        for case in cases:
            answer, victims, nodes = seen[case.name]
            if case.name in refused or (answer == "waits" and case.name not in ever):
                answer = "never"
            verdicts.append(Verdict(case, plans[case.name], answer, victims, nodes))
        self._clear()
        return verdicts

    def _each(self, act: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(act, items))

    def _build(self, cases: list[Case]) -> None:
        self._each(lambda node: self.admin.create("nodes", "", node), [n for case in cases for n in case.nodes])
        self._each(self._make_pod, [pod for case in cases for pod in case.pods])
        self._each(self._make_budget, [budget for case in cases for budget in case.budgets])
        time.sleep(1)  # the scheduler's view
        self._each(lambda pod: self.admin.create("pods", PLACE, pod), [pod for case in cases for pod in case.waiting])
        self._settled()

    def _make_pod(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        self.admin.create("pods", PLACE, {"metadata": pod["metadata"], "spec": pod["spec"]})
        self.admin.patch("pods", PLACE, name, {"status": pod["status"]}, "status")
        if pod["ends"]:
            self.admin.delete("pods", PLACE, name, gracePeriodSeconds=3600)

    def _make_budget(self, budget: dict[str, Any]) -> None:
        path = f"/apis/policy/v1/namespaces/{PLACE}/poddisruptionbudgets"
        self.admin.request("POST", path, {**budget, "status": {}})
        self.admin.request(
            "PATCH",
            f"{path}/{budget['metadata']['name']}/status",
            {"status": budget["status"]},
            kind="application/merge-patch+json",
        )

    def _submit(self, cases: list[Case]) -> set[str]:
        "The jobs' pods, one after the other; the names of cases whose pods are not let in"

        def submit(case: Case) -> str:
            for i in range(case.job["spec"]["completions"]):
                template = case.job["spec"]["template"]
                metadata = template["metadata"] | {"name": f"{case.name}-j{i}"}
                try:
                    self.admin.create("pods", PLACE, {"metadata": metadata, "spec": template["spec"]})
                except ApiError as e:
                    assert e.status == 403, e
                    return case.name
            return ""

        return set(self._each(submit, cases)) - {""}

    def _state(self) -> dict[str, list[dict[str, Any]]]:
        budgets = self.admin.request("GET", "/apis/policy/v1/poddisruptionbudgets").json()["items"]
        return {
            "nodes": self.admin.get("nodes")["items"],
            "pods": self.admin.get("pods", PLACE)["items"],
            "budgets": budgets,
        }

    def _settled(self, seconds: float = 600) -> dict[str, list[dict[str, Any]]]:
        "The state once the scheduler has looked at every pod, and did nothing for three seconds"
        end, last, quiet = time.monotonic() + seconds, None, 0
        while time.monotonic() < end:
            state = self._state()
            waiting = [p for p in state["pods"] if not p["spec"].get("nodeName")]
            looked = all(any(c["type"] == "PodScheduled" for c in p["status"].get("conditions") or ()) for p in waiting)
            now = sorted((p["metadata"]["name"], p["metadata"]["resourceVersion"]) for p in state["pods"])
            quiet = quiet + 1 if looked and now == last else 0
            if quiet == 3:
                return state
            last = now
            time.sleep(1)
        raise AssertionError(f"the scheduler is not done within {seconds:.0f} s")

    def _snapshot(self, case: Case, state: dict[str, list[dict[str, Any]]]):
        ours = {
            kind: [o for o in state[kind] if (o["metadata"].get("labels") or {}).get(CLUSTER) == case.name]
            for kind in ("nodes", "pods")
        }
        names = {budget["metadata"]["name"] for budget in case.budgets}
        budgets = tuple(b for b in state["budgets"] if b["metadata"]["name"] in names)
        classes = {name: {"value": value} for name, value in CLASSES.items()} | {"none": None}
        classes["meek"]["preemptionPolicy"] = "Never"
        return replace(snapshot_of(ours["nodes"], ours["pods"]), budgets=budgets, classes=classes)

    def _outcome(
        self, case: Case, state: dict[str, list[dict[str, Any]]]
    ) -> tuple[str, frozenset[str], frozenset[str]]:
        "Starts, preempts or waits; the pods that the scheduler ended for the job; the nodes that it has"
        pods = [p for p in state["pods"] if p["metadata"]["labels"].get(CLUSTER) == case.name]
        ours = [p for p in pods if "job" in p["metadata"]["labels"]]
        victims = frozenset(
            p["metadata"]["name"] for p in pods if self._preemptor(p) & {p["metadata"]["uid"] for p in ours}
        )
        nodes = [p["spec"].get("nodeName") or p["status"].get("nominatedNodeName") or "" for p in ours]
        answer = "starts" if all(p["spec"].get("nodeName") for p in ours) else "preempts" if all(nodes) else "waits"
        return answer, victims, frozenset(filter(None, nodes))

    def _preemptor(self, pod: dict[str, Any]) -> set[str]:
        "The uids of pods for which a pod was ended, by the events about it"
        if "deletionTimestamp" not in pod["metadata"]:
            return set()
        of_pod = f"involvedObject.name={pod['metadata']['name']},reason=Preempted"
        events = self.admin.get("events", PLACE, fieldSelector=of_pod)["items"]
        return {word for event in events for word in event["message"].split()}

    def _empty(self, cases: list[Case]) -> set[str]:
        "End all other pods of these clusters: the names of the cases whose job then has its nodes"
        names = {case.name for case in cases}
        pods = [p for p in self._state()["pods"] if p["metadata"]["labels"][CLUSTER] in names]
        others = [p["metadata"]["name"] for p in pods if "job" not in p["metadata"]["labels"]]
        self._each(lambda name: self.admin.delete("pods", PLACE, name, gracePeriodSeconds=0), others)
        nodes = [case.nodes for case in cases]
        self._each(
            lambda n: self.admin.patch("nodes", "", n, {"spec": {"unschedulable": False}}),
            [n["metadata"]["name"] for ns in nodes for n in ns if n["spec"].get("unschedulable")],
        )
        time.sleep(12)  # pods that failed are looked at again after 10 s at most
        placed: dict[str, bool] = {}
        for pod in self._settled()["pods"]:
            if "job" in pod["metadata"]["labels"]:
                name = pod["metadata"]["labels"][CLUSTER]
                placed[name] = placed.get(name, True) and bool(pod["spec"].get("nodeName"))
        return {name for name in names if placed.get(name)}

    def _clear(self) -> None:
        "Nothing is there any more"
        for path in (
            address("pods", PLACE),
            f"/apis/policy/v1/namespaces/{PLACE}/poddisruptionbudgets",
            address("events", PLACE),
        ):
            self.admin.request("DELETE", path, {"gracePeriodSeconds": 0})
        self.admin.request("DELETE", address("nodes"))
        end = time.monotonic() + 600
        while any(self._state().values()):
            assert time.monotonic() < end, "something stays"
            time.sleep(0.5)
