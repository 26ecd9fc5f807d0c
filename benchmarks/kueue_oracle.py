"""Whether gpuml says beforehand what Kueue does with a job: its real controller answers for random queues and jobs.

    python -m benchmarks.kueue_oracle --jobs 600 --seed 1

Each world has its own queues, cohorts, flavors and rules. Jobs come one after the other; of each it is said whether it
gets its quota, whom Kueue evicts for it, or that it waits, and then looked at what Kueue did. An evicted job is removed,
as its owner would do it. Only Workloads are made: no node, no pod. Needs the programs of the tests (`make servers`)."""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from gpuml.cluster.pod import condition
from gpuml.cluster.pools import pools_of
from gpuml.cluster.quota_answer import Outcome, QuotaAnswer, Request, quota_answer
from gpuml.cluster.reservations import Reservations, requests_of, workload_of
from tests.cluster.administer import Administrator
from tests.cluster.api import Api
from tests.cluster.kueue import API, Kueue
from tests.cluster.plane import Plane

FLAVORS = ("fast", "slow")
PRIORITIES = ((-1000, -1000, 0), (0, 100, 100_000, 100_000))  # of a world's first jobs, and of the others
SECONDS = {"quiet": 0.5, "after a change": 1.8, "at most": 20.0}  # Kueue looks at its queues again once in a second


class Worlds:
    "Random queues and jobs on a control plane with Kueue"

    def __init__(self, plane: Plane, seed: int):
        self.api: Api = plane.api()
        self.administrator = Administrator(plane)
        self.random = random.Random(seed)
        for name in FLAVORS:
            self.make("ResourceFlavor", name, {"nodeLabels": {"kind": name}})

    def make(self, kind: str, name: str, spec: dict, **metadata: str) -> None:
        metadata = {"name": name, **metadata}
        self.administrator.apply(
            {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": metadata, "spec": spec}
        )

    def make_world(self, world: str) -> list[str]:
        "Its queues"
        flavors = FLAVORS[: self.random.choice((1, 2))]
        cohorts = [f"{world}-a"]
        if self.random.random() < 0.35:
            cohorts.append(f"{world}-b")
            own = self._groups(flavors, lambda: {"nominalQuota": str(self.random.randint(0, 3))})
            self.make("Cohort", f"{world}-root", own if self.random.random() < 0.5 else {})
            for cohort in cohorts:
                self.make("Cohort", cohort, {"parentName": f"{world}-root"})
        queues = [f"{world}-q{i}" for i in range(self.random.randint(1, 4))]
        for name in queues:
            cohort = self.random.choice(cohorts) if self.random.random() < 0.85 else ""
            self.make("ClusterQueue", name, self._queue(flavors, cohort))
            self.make("LocalQueue", name, {"clusterQueue": name}, namespace="default")
        return queues

    def _queue(self, flavors: tuple[str, ...], cohort: str) -> dict:
        choose = self.random.choice
        rules = {"withinClusterQueue": choose(("Never", *["LowerPriority"] * 3, "LowerOrNewerEqualPriority"))}
        rules["reclaimWithinCohort"] = choose(("Never", "LowerPriority", "LowerPriority", "Any"))
        if cohort and rules["reclaimWithinCohort"] != "Never" and self.random.random() < 0.4:
            threshold = {"maxPriorityThreshold": choose((-100, 0, 100))} if self.random.random() < 0.5 else {}
            rules["borrowWithinCohort"] = {"policy": "LowerPriority", **threshold}
        spec = {"namespaceSelector": {}, "preemption": rules}
        spec["queueingStrategy"] = choose((*["BestEffortFIFO"] * 3, "StrictFIFO"))
        if cohort:
            spec["cohortName"] = cohort
        if self.random.random() < 0.4:
            words = ("MayStopSearch", "TryNextFlavor")
            spec["flavorFungibility"] = {"whenCanBorrow": choose(words), "whenCanPreempt": choose(words)}
        return spec | self._groups(flavors, lambda: self._quota(bool(cohort)))

    def _groups(self, flavors: tuple[str, ...], quota) -> dict:
        of_flavors = [{"name": flavor, "resources": [{"name": "gpu", **quota()}]} for flavor in flavors]
        return {"resourceGroups": [{"coveredResources": ["gpu"], "flavors": of_flavors}]}

    def _quota(self, has_cohort: bool) -> dict:
        nominal = self.random.choice((0, 2, 3, 4, 6))
        quota = {"nominalQuota": str(nominal)}
        if has_cohort and self.random.random() < 0.3:
            quota["borrowingLimit"] = str(self.random.randint(0, 4))
        if has_cohort and self.random.random() < 0.3:
            quota["lendingLimit"] = str(self.random.randint(0, nominal))
        return quota

    def submit(self, name: str, queue: str, priority: int) -> dict:
        "The Workload that was made"
        container = {"name": "main", "image": "x"}
        container["resources"] = {"requests": {"gpu": str(self.random.choice((1, 1, 2, 2, 3, 4)))}}
        template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
        pods = {"name": "main", "count": self.random.choice((1, 1, 1, 2)), "template": template}
        spec = {"queueName": queue, "priority": priority, "podSets": [pods]}
        body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "metadata": {"name": name}, "spec": spec}
        return json.loads(self.api.request("POST", f"{API}/namespaces/default/workloads", body).data)

    def remove(self, workload: dict) -> None:
        path = f"{API}/namespaces/default/workloads/{workload['metadata']['name']}"
        self.api.request("DELETE", path, {"gracePeriodSeconds": 0})
        if workload["metadata"].get("finalizers"):
            body = {"metadata": {"finalizers": None}}
            self.api.request("PATCH", path, body, kind="application/merge-patch+json")

    def items(self, kind: str, world: str, namespaced: bool = False) -> list[dict]:
        items = json.loads(self.api.request("GET", f"{API}/{'namespaces/default/' * namespaced}{kind}").data)["items"]
        return [item for item in items if item["metadata"]["name"].startswith(f"{world}-")]

    def wait(self, workload: dict, check) -> None:
        "Until a Workload is so, or some seconds have gone"
        path = f"{API}/namespaces/default/workloads/{workload['metadata']['name']}"
        end = time.monotonic() + SECONDS["at most"]
        while not check(json.loads(self.api.request("GET", path).data)) and time.monotonic() < end:
            time.sleep(0.1)

    def settled(self, world: str, quiet: float) -> list[dict]:
        "The world's Workloads, once nothing has changed for so many seconds"
        versions: list[str] = []
        start = since = time.monotonic()
        while time.monotonic() - since < quiet and time.monotonic() - start < SECONDS["at most"]:
            workloads = self.items("workloads", world, namespaced=True)
            latest = [workload["metadata"]["resourceVersion"] for workload in workloads]
            if latest != versions:
                versions, since = latest, time.monotonic()
            time.sleep(0.12)
        return workloads


def said(worlds: Worlds, world: str, before: list[dict], new: dict) -> QuotaAnswer:
    "What gpuml says of a new job"
    pools = pools_of(worlds.items("clusterqueues", world), worlds.items("cohorts", world))
    jobs = [(workload_of(workload, workload["spec"]["queueName"]), workload) for workload in before]
    waiting = [Request(job, requests_of(workload)) for job, workload in jobs if not (job.reserved or job.is_evicted)]
    request = Request(workload_of(new, new["spec"]["queueName"]), requests_of(new))
    return quota_answer(Reservations(pools, [job for job, _ in jobs]), waiting, request)


def happened(before: list[dict], after: list[dict], name: str) -> tuple[str, list[str]]:
    "(what became of the new job, who was evicted)"
    earlier = {workload["metadata"]["name"] for workload in before if condition(workload, "Evicted")}
    named = {workload["metadata"]["name"]: workload for workload in after}
    evicted = sorted(other for other, w in named.items() if condition(w, "Evicted") and other not in earlier)
    if condition(named[name], "QuotaReserved"):
        return "reserved", evicted
    return ("evicts" if evicted else "waits"), evicted


def play(worlds: Worlds, world: str, tally: Counter) -> list[str]:
    "One world's jobs; what was said and happened with each is counted, and where that differs it is in the result"
    queues = worlds.make_world(world)
    has_changed = True
    misses = []
    for i in range(worlds.random.randint(6, 14)):
        before = worlds.settled(world, SECONDS["after a change" if has_changed else "quiet"])
        priority = worlds.random.choice(PRIORITIES[i > 5])
        new = worlds.submit(f"{world}-j{i}", worlds.random.choice(queues), priority)
        answer = said(worlds, world, before, new)
        worlds.wait(new, is_looked_at)
        after = worlds.settled(world, SECONDS["quiet"])
        kind, evicted = happened(before, after, new["metadata"]["name"])
        expected = KINDS.get(answer.outcome, "waits")
        victims = sorted(victim.name for victim in answer.victims)
        tally[expected, kind] += 1
        if kind == expected == "evicts":
            tally["victims right" if evicted == victims else "victims wrong"] += 1
        if (expected, victims) != (kind, evicted):
            words = f"said {answer.outcome.name} {victims}; happened: {kind} {evicted}"
            misses.append(f"{new['metadata']['name']}: {words}")
        gone = [w for w in after if w["metadata"]["name"] in evicted]
        if worlds.random.random() < 0.15:
            at_work = [w for w in after if condition(w, "QuotaReserved") and w not in gone]
            gone += worlds.random.sample(at_work, min(1, len(at_work)))
        for workload in gone:
            worlds.remove(workload)
        if kind == "evicts":
            worlds.wait(new, has_quota)
        has_changed = bool(gone)
    return misses


KINDS = {Outcome.RESERVED: "reserved", Outcome.EVICTS: "evicts"}


def is_looked_at(workload: dict) -> bool:
    "Whether Kueue has said anything of its quota; of who is behind another in a strict queue it says nothing"
    return any(c["type"] == "QuotaReserved" for c in workload.get("status", {}).get("conditions", []))


def has_quota(workload: dict) -> bool:
    return bool(condition(workload, "QuotaReserved"))


def table(tally: Counter) -> str:
    "What was said against what happened"
    kinds = ("reserved", "evicts", "waits")
    lines = ["said \\ happened  " + "".join(f"{kind:>10}" for kind in kinds)]
    lines += [f"{kind:16}" + "".join(f"{tally[kind, other]:>10}" for other in kinds) for kind in kinds]
    total = sum(tally[pair] for pair in tally if isinstance(pair, tuple))
    right = sum(tally[kind, kind] for kind in kinds)
    named = tally["victims right"] + tally["victims wrong"]
    lines.append(f"class right: {right} of {total} ({right / max(1, total):.2%})")
    lines.append(f"victims right: {tally['victims right']} of {named} ({tally['victims right'] / max(1, named):.2%})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=600, help="that are submitted")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpuml-kueue-"))
    (folder / "kueue").mkdir()
    plane = Plane(folder).start()
    kueue = Kueue(plane, folder / "kueue").start()
    tally: Counter = Counter()
    worlds, number = Worlds(plane, given.seed), 0
    try:
        while sum(tally[pair] for pair in tally if isinstance(pair, tuple)) < given.jobs:
            number += 1
            for miss in play(worlds, f"w{number}", tally):
                print(miss, flush=True)
    finally:
        kueue.down()
        plane.stop()
    print(f"{number} worlds, seed {given.seed}\n{table(tally)}")


if __name__ == "__main__":
    main()
