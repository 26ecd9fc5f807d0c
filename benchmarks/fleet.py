"""A week of a public trace on 64 nodes of 8 GPUs, decided by gpuml's own `plan` and accounted by its own ledger; and the plan's growth.

    python benchmarks/fleet.py philly.csv[.xz] [--start 2017-10-09] [--production 0.2] [--seed 0] [--processes 2] | --growth

The trace is that of `queue_waits.py`, which says where it can be had; all of its clusters together here. The jobs of the
seven days from `--start` come to an empty cluster, and time goes on until the last one has ended. A random fifth
(`--production`, drawn by `--seed`) is of the class gpuml-prod, the others of gpuml-dev. Jobs of more than 8 GPUs are jobs of several nodes.

Simulated are the clock, people and pods. Whom the scheduler gives GPUs is what `plan` says of each job's own manifest, the
most important first, then the oldest; what does not fit keeps nobody; of nodes, and of pods that may be preempted, that are as
good as each other for `plan`, that with most room is taken, and a random one. Before, GPUs are counted: where there are too few, `plan`
is asked of a sample only, to see that it agrees. Pods of a job of several nodes start together. Every attempt begins with 60 s of
starting, which come on top of the trace's duration, trains with an update a second, and keeps gpuml's own timesheet. In rows:

    FIFO                   one class for all: nobody is preempted
    preempt + restart      production preempts development, which is killed at once and begins anew
    preempt + checkpoint   production preempts development, which saves for 15 s and goes on from there: gpuml
    advice followed        the same; and where the plan says who would be preempted, or who else, and all pods of one of these sets
                           say that they end within 10 minutes (which they know within 10 %), the owner does not submit: once
                           those have ended the job is planned again, and submitted, or kept back once more

Prints of each class the minutes waited, before the first attempt and in all (median, 90 %), how often attempts were interrupted, and its
ledger; of all, how much of the GPU time held in those seven days was useful, and of what the cluster has. Checked while it
runs: every GPU has one holder at a time; what the ledger has in its parts is the time that GPUs were held, to the
millisecond, by class and by week too; waiting and attempts of a run are the time from submission to end; a job that preempted
starts once its victims have ended. `--growth` prints the milliseconds of CPU of `plan` by nodes and pods, of jobs of development
and production of some pods × GPUs, and the ratio of the slowest to what Python's `json` takes to parse those nodes and pods.
"""

import argparse
import heapq
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.queue_waits import Job, read_trace  # noqa: E402
from gpuml.base.loading import load  # noqa: E402
from gpuml.cluster.manifest import Source, manifest  # noqa: E402
from gpuml.cluster.plan import Plan, plan  # noqa: E402
from gpuml.cluster.snapshot import Holding, holding_of, snapshot_of  # noqa: E402
from gpuml.training.account import Account, account_of  # noqa: E402
from gpuml.training.attempts import Attempt  # noqa: E402
from gpuml.training.headway import Headway  # noqa: E402
from gpuml.training.ledger import WEEK, ledger_rows, spent_between  # noqa: E402
from gpuml.training.spent import PARTS, Spent  # noqa: E402
from gpuml.training.timesheet import Timesheet, with_times  # noqa: E402

NODE, GPU = 8, "nvidia.com/gpu"
PROD, DEV = "gpuml-prod", "gpuml-dev"
CLASSES = {PROD: {"value": 100_000}, DEV: {"value": -1000, "preemptionPolicy": "Never"}}
SAME = {name: {"value": 0, "preemptionPolicy": "Never"} for name in CLASSES}
START, SAVE, UPDATE = 60_000, 15_000, 1_000  # milliseconds
PATIENCE = 600_000  # milliseconds for which who follows advice waits rather than preempts
SAMPLE = 200  # of so many jobs for which GPUs are too few, `plan` is asked of one


@dataclass(frozen=True)
class Policy:
    "A row of the table"

    name: str
    preempts: bool = True
    saves: bool = True
    advised: bool = False


POLICIES = (
    Policy("FIFO", preempts=False),
    Policy("preempt + restart", saves=False),
    Policy("preempt + checkpoint"),
    Policy("advice followed", advised=True),
)


def text_of(milliseconds: int) -> str:
    "A moment as an attempt has it"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def node_object(name: str) -> dict[str, Any]:
    "As the API server has it"
    amounts = {"cpu": "96", "memory": "768Gi", "ephemeral-storage": "8Ti", "pods": "110", GPU: str(NODE)}
    ready = {"type": "Ready", "status": "True"}
    meta = {"name": name, "labels": {"kubernetes.io/hostname": name}}
    return {"metadata": meta, "spec": {}, "status": {"allocatable": amounts, "conditions": [ready]}}


@cache
def job_object(priority_class: str, gpus: int, nodes: int) -> dict[str, Any]:
    "The manifest of a job, as gpuml sends it"
    overrides = (f"compute.{key}" for key in (f"gpus={gpus}", f"nodes={nodes}", f"priority_class={priority_class}"))
    config = load("dev", ["compute.image=gpuml", "compute.cpu=1", *overrides], start=ROOT)
    return manifest(config, "job", Source("bundle", "s3://models/bundle", "train.ipynb"))


def pod_object(job: dict[str, Any], name: str, node: str, started: str, priority: int) -> dict[str, Any]:
    "A pod of a Job: it runs on a node, or waits until one is cleared for it"
    owner = {"kind": "Job", "name": name, "uid": name, "controller": True}
    meta = {"name": name, "namespace": DEV, "creationTimestamp": started, "ownerReferences": [owner]}
    spec = {**job["spec"]["template"]["spec"], "priority": priority}
    status = {"phase": "Running", "startTime": started}
    return {"metadata": meta, "spec": {**spec, "nodeName": node} if node else spec, "status": status}


@dataclass
class Run:
    "A job of the trace, and what became of it"

    number: int
    submitted: int  # milliseconds, as all times here
    job: Job
    priority_class: str
    believed: float  # its remaining time, by what it says of itself, in parts of the true one
    queued: int = 0
    updates: int = 0  # that last
    begun: int = 0  # of its attempt
    tries: int = 0
    is_ending: bool = False
    nodes: list[str] = field(default_factory=list)  # of its pods that run, or that are to
    gpus: list[tuple[str, int]] = field(default_factory=list)  # that it holds: node, number
    victims: set[int] = field(default_factory=set)  # that have to end before it starts
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def planned(self) -> int:
        "Updates"
        return max(1, round(self.job.duration))

    @property
    def end(self) -> int:
        "When it is done, if nobody stops it"
        return self.begun + START + (self.planned - self.updates) * UPDATE

    @property
    def key(self) -> tuple[str, int, int]:
        "Class, pods, and GPUs of each: jobs with the same have the same manifest"
        return self.priority_class, *self.job.pods

    @property
    def rank(self) -> tuple[int, int, int]:
        "Who comes first is lower"
        return CLASSES[self.priority_class]["value"] * -1, self.queued, self.number


class Fleet:
    "The cluster, who holds what of it and who waits, at a moment"

    def __init__(self, runs: list[Run], policy: Policy, nodes: int = 64):
        self.runs, self.policy, self.now = runs, policy, 0
        self.classes = CLASSES if policy.preempts else SAME
        names = [f"gpu-{i:03}" for i in range(nodes)]
        self.snapshot = replace(snapshot_of([*map(node_object, names)]), classes=self.classes)
        self.nodes = {node.name: node for node in self.snapshot.nodes}
        self.free = {name: set(range(NODE)) for name in names}
        self.yielding = Counter()  # node → GPUs of those who give way to production
        self.promised = Counter()  # node → GPUs for those whose victims are ending
        self.promises: dict[int, tuple[Holding, ...]] = {}
        self.awaited: dict[int, set[int]] = {}  # who waits for whom to end, as its owner wants it
        self.lines: dict[tuple, deque[int]] = {}
        self.stuck: set[tuple] = set()
        self.used: list[tuple[tuple[str, int], int, int]] = []  # GPU, from when, until when
        self.events = [(run.submitted, 0, run.number, 0) for run in runs]
        heapq.heapify(self.events)
        self.rng = np.random.default_rng(1)
        self.counts = Counter()

    def play(self) -> None:
        "Until all have ended"
        while self.events:
            self.now, kind, number, attempt = heapq.heappop(self.events)
            run = self.runs[number]
            if kind == 0:
                self.queue(run)
            elif run.tries == attempt and run.gpus and (run.is_ending or kind == 1):
                self.over(run, is_done=kind == 1 and not run.is_ending)
            if not self.events or self.events[0][0] > self.now:
                self.schedule()
        assert not any(self.lines.values()) and not self.promises, "somebody waits for ever"

    def queue(self, run: Run) -> None:
        run.queued = self.now
        self.lines.setdefault(self.line_of(run), deque()).append(run.number)

    def line_of(self, run: Run) -> tuple:
        return run.key if self.policy.preempts else ("all", *run.key[1:])

    def rank(self, run: Run) -> tuple:
        return run.rank if self.policy.preempts else run.rank[1:]

    def schedule(self) -> None:
        "Whoever can starts, or has nodes cleared, the first in the line first"
        while heads := [self.runs[q[0]] for key, q in self.lines.items() if q and key not in self.stuck]:
            run = min(heads, key=self.rank)
            line = self.line_of(run)
            answer = self.ask(run)
            if answer is None or answer.answer == "waits":
                self.stuck.add(line)
                continue
            assert answer.answer in ("starts", "preempts"), answer
            self.lines[line].popleft()
            if answer.answer == "starts":
                self.start(run, self.choose(run, answer.nodes, {}))
            else:
                self.preempt(run, answer)

    def room(self, run: Run, name: str, yielding: int = 0) -> int:
        "Pods of a job for which a node has GPUs, once so many more are free"
        return max(0, len(self.free[name]) + yielding - self.promised[name]) // run.job.pods[1]

    def ask(self, run: Run) -> Plan | None:
        "What the plan says of a job; none where there are too few GPUs for it in any case"
        pods, gpus = run.job.pods
        goes_first = self.policy.preempts and run.priority_class == PROD
        fits = sum(self.room(run, name, self.yielding[name] if goes_first else 0) for name in self.nodes) >= pods
        self.counts["too few"] += not fits
        if not fits and self.counts["too few"] % SAMPLE:
            return None
        waiting = tuple(holding for holdings in self.promises.values() for holding in holdings)
        moment = replace(self.snapshot, nodes=tuple(self.nodes.values()), waiting=waiting)
        answer = plan(moment, job_object(run.priority_class, gpus, pods))
        self.counts["plans"] += 1
        assert fits or answer.answer == "waits", answer
        return answer

    def choose(self, run: Run, names: tuple[str, ...], ending: Mapping[str, int]) -> list[str]:
        "A node for each pod: one after the other takes that with most room"
        room = {name: self.room(run, name, ending.get(name, 0)) for name in names}
        chosen = []
        for _ in range(run.job.pods[0]):
            name = max(room, key=lambda name: (room[name], len(self.free[name]) + ending.get(name, 0)))
            assert room[name] > 0, (run, names)
            room[name] -= 1
            chosen.append(name)
        return chosen

    def hold(self, run: Run, name: str) -> Holding:
        "A pod of a run, on a node or waiting for it"
        pods, gpus = run.job.pods
        started = text_of(self.now)[:19] + "Z"
        priority = self.classes[run.priority_class]["value"]
        job = job_object(run.priority_class, gpus, pods)
        return holding_of(pod_object(job, f"{run.number}", name, started, priority))

    def start(self, run: Run, nodes: list[str]) -> None:
        "An attempt begins"
        run.nodes, run.begun, run.tries = nodes, self.now, run.tries + 1
        for name in nodes:
            numbers = sorted(self.free[name])[: run.job.pods[1]]
            assert len(numbers) == run.job.pods[1], f"{name} has too few GPUs"
            self.free[name].difference_update(numbers)
            run.gpus += [(name, number) for number in numbers]
            self.yielding[name] += len(numbers) * (run.priority_class == DEV)
            node = self.nodes[name]
            self.nodes[name] = replace(node, holdings=(*node.holdings, self.hold(run, name)))
            assert self.nodes[name].free(GPU) == len(self.free[name]), f"the snapshot of {name} is wrong"
        heapq.heappush(self.events, (run.end, 1, run.number, run.tries))

    def preempt(self, run: Run, answer: Plan) -> None:
        "Victims are told to end, and a job has the nodes once they have; or its owner waits for them"
        sets = [[self.runs[int(v.name)] for v in victims] for victims in answer.alternatives]
        soonest = min(sets, key=self.says_left)
        if self.policy.advised and self.says_left(soonest) <= PATIENCE:
            self.counts["waited for"] += 1
            self.awaited[run.number] = {victim.number for victim in soonest}
            return
        chosen = answer.alternatives[self.rng.integers(len(sets))]
        victims = {int(v.name): self.runs[int(v.name)] for v in chosen}
        ending = Counter(name for v in victims.values() for name, _ in v.gpus)
        names = tuple(dict.fromkeys([*(v.node for v in chosen), *self.nodes]))
        fitting = [name for name in names if self.room(run, name, ending[name])]
        run.nodes = self.choose(run, tuple(fitting), ending)
        needed = {v.number for v in victims.values() if {*v.nodes} & {*run.nodes}}
        run.victims = needed
        for name in run.nodes:
            self.promised[name] += run.job.pods[1]
        self.promises[run.number] = tuple(_nominated(self.hold(run, ""), name) for name in run.nodes)
        for victim in victims.values():
            if not victim.is_ending:
                self.stop(victim)
        if not run.victims:
            self.keep_promises()

    def says_left(self, runs: list[Run]) -> float:
        "Milliseconds until all of them end, by what they say; one that starts says nothing"
        says = ((run.end - self.now) * run.believed if self.now > run.begun + START else np.inf for run in runs)
        return max(SAVE if run.is_ending else left for run, left in zip(runs, says, strict=True))

    def stop(self, run: Run) -> None:
        "A run is told to end: it saves, or it does not"
        run.is_ending = True
        self.counts["interrupted"] += 1
        for name in {*run.nodes}:
            node = self.nodes[name]
            changed = (replace(h, is_ending=True) if h.name == f"{run.number}" else h for h in node.holdings)
            self.nodes[name] = replace(node, holdings=tuple(changed))
        saves = self.policy.saves and self.now > run.begun + START
        heapq.heappush(self.events, (self.now + SAVE * saves, 2, run.number, run.tries))
        run.queued = self.now  # when it was told

    def over(self, run: Run, is_done: bool) -> None:
        "An attempt has ended"
        run.attempts.append(attempt_of(run, self.now, is_done, self.policy.saves))
        for name, number in run.gpus:
            self.free[name].add(number)
            self.yielding[name] -= run.priority_class == DEV
            self.used.append(((name, number), run.begun, self.now))
        for name in {*run.nodes}:
            node = self.nodes[name]
            others = tuple(h for h in node.holdings if h.name != f"{run.number}")
            self.nodes[name] = replace(node, holdings=others)
        run.gpus, run.nodes = [], []
        if not is_done:
            run.updates = run.attempts[-1].checkpoint or 0
            run.is_ending = False
            self.queue(run)
        self.stuck.clear()
        for number in [number for number, others in self.awaited.items() if run.number in others]:
            self.awaited[number].discard(run.number)
            if not self.awaited[number]:
                del self.awaited[number]
                self.lines[self.line_of(self.runs[number])].appendleft(number)
        self.keep_promises(run.number)

    def keep_promises(self, ended: int = -1) -> None:
        "Who waited for victims starts once all have ended"
        for number in [*self.promises]:
            run = self.runs[number]
            run.victims.discard(ended)
            if not run.victims:
                nodes = run.nodes
                for name in nodes:
                    self.promised[name] -= run.job.pods[1]
                del self.promises[number]
                answer = self.ask(run)
                self.counts["promises"] += 1
                self.counts["kept"] += answer is not None and answer.answer == "starts"
                self.start(run, nodes)


def _nominated(holding: Holding, node: str) -> Holding:
    "A pod for which a node is being cleared"
    return replace(holding, pod={**holding.pod, "status": {"phase": "Pending", "nominatedNodeName": node}})


def attempt_of(run: Run, now: int, is_done: bool, saves: bool) -> Attempt:
    "What an attempt leaves, its timesheet kept by the product's own"
    moments = [run.begun]
    sheet = Timesheet(clock=lambda: moments[-1] / 1000)

    def report(at: int, phase: str, update: int, **more: Any) -> None:
        moments.append(at)
        sheet.take(Headway(phase=phase, update=update, epochs=1, **more))

    told = run.queued if run.is_ending else now
    done = run.updates + max(0, told - run.begun - START) // UPDATE
    if told > run.begun + START:
        report(run.begun + START, "training", run.updates)
    if done > run.updates:
        report(run.begun + START + UPDATE, "training", run.updates + 1)
        report(run.begun + START + (done - run.updates) * UPDATE, "training", done)
    saved = None
    if is_done:
        report(now, "done", done)
    elif saves and told > run.begun + START:
        report(told, "saving", done)
        report(now, "saving", done, checkpoint=done, checkpoint_time=text_of(now))
        saved = done
    elif saves:
        saved = run.updates
    moments.append(now)
    pods, gpus = run.job.pods
    attempt = Attempt(
        run=f"{run.number}",
        attempt=run.tries,
        exit_code=0 if is_done else 75 if saves else None,
        reason="",
        cell=None,
        started=text_of(run.begun),
        finished=text_of(now),
        host=f"{run.number}-{run.tries}",
        namespace=DEV,
        priority_class=run.priority_class,
        gpus=gpus,
        updates=done,
        planned_updates=run.planned,
        checkpoint=saved,
        nodes=pods,
        submitted=text_of(run.submitted),
    )
    return with_times(attempt, sheet.times())


def runs_of(jobs: list[Job], start: float, production: float, seed: int = 0) -> list[Run]:
    "The jobs of seven days, with a class each"
    jobs = [job for job in jobs if start <= job.submitted < start + WEEK / 1000]
    rng = np.random.default_rng(seed)
    prod = rng.random(len(jobs)) < production
    believed = np.exp(rng.normal(0, 0.1, len(jobs)))
    return [
        Run(n, round(1000 * job.submitted), job, PROD if prod[n] else DEV, believed[n]) for n, job in enumerate(jobs)
    ]


def check(fleet: Fleet, accounts: list[Account]) -> None:
    "What has to add up does"
    held = sum(end - start for _, start, end in fleet.used)
    for (gpu, _, end), (other, start, _) in pairwise(sorted(fleet.used)):
        assert gpu != other or end <= start, f"{gpu} was held twice"
    for by in ("class", "week", "run"):
        rows = ledger_rows(accounts, by)
        assert sum((row.spent for row in rows), Spent()).total == held, f"the ledger by {by} does not add up"
    for run, account in zip(fleet.runs, accounts, strict=True):
        last = account.stretches[-1].end
        whole = account.waited + sum(stretch.spent.total for stretch in account.stretches)
        assert whole == last - run.submitted, f"the time of {run} does not add up"
        assert sum(s.spent.useful for s in account.stretches) <= run.planned * UPDATE, run
    assert fleet.counts["kept"] == fleet.counts["promises"], fleet.counts


def simulate_week(task: tuple[Policy, list[Run], int]) -> tuple[str, float]:
    "A policy's rows of the table, and how long that took"
    policy, runs, start = task
    begun = time.perf_counter()
    fleet = Fleet(deepcopy(runs), policy)
    fleet.play()
    accounts = [account_of(run.attempts) for run in fleet.runs]
    check(fleet, accounts)
    lines = []
    for name in (PROD, DEV):
        own = [(r, a) for r, a in zip(fleet.runs, accounts, strict=True) if r.priority_class == name]
        first = [(a.stretches[0].start - r.submitted) / 60_000 for r, a in own]
        waited = [a.waited / 60_000 for _, a in own]
        waits = "".join(f"{np.quantile(values, q):>9,.1f}" for values in (first, waited) for q in (0.5, 0.9))
        row = next(row for row in ledger_rows(accounts, "class") if row.key == name)
        parts = "".join(f"{getattr(row.spent, part) / row.spent.total:>9.1%}" for part in PARTS)
        counted = f"{len(own):>8,}{sum(a.interruptions for _, a in own):>8,}"
        lines.append(f"{policy.name:<21}{name:<11}{counted}{waits}{row.spent.total / 3.6e6:>10,.0f}{parts}")
    week = spent_between(accounts, start, start + WEEK)
    capacity = len(fleet.nodes) * NODE * WEEK
    counts = f"{fleet.counts['plans']:,} plans, {fleet.counts['promises']:,} of them kept after victims had ended"
    advised = f", {fleet.counts['waited for']:,} times waited for who ends soon" if policy.advised else ""
    lines.append(
        f"  goodput of the seven days: {week.useful / week.total:.1%} of {week.total / 3.6e6:,.0f} GPU-hours held, "
        f"{week.useful / capacity:.1%} of the {capacity / 3.6e6:,.0f} that there are; {counts}{advised}"
    )
    return "\n".join(lines), time.perf_counter() - begun


def growth(repeats: int = 3) -> None:
    "How the time of a plan grows"
    kinds = ((DEV, 1, 1), (PROD, 1, 1), (PROD, 8, 1), (PROD, 8, 4))
    heads = "".join(f"{f'{name[6:]} {pods} × {gpus}':>12}" for name, gpus, pods in kinds)
    print(f"{'nodes':>6}{'pods':>8}{'waiting':>9}{heads}{'JSON':>9}{'ratio':>8}   (ms of CPU, median of {repeats})")
    for count in (10, 100, 1000):
        for pods in (100, 10_000):
            nodes = [node_object(f"gpu-{i:04}") for i in range(count)]
            listed = crowd(nodes, pods)
            text = json.dumps([nodes, listed])
            times = {kind: [] for kind in (*kinds, "json")}
            for _ in range(repeats):
                begun = time.process_time()
                parsed = json.loads(text)
                times["json"].append(time.process_time() - begun)
                for kind in kinds:
                    moment = replace(snapshot_of(*parsed), classes=CLASSES)
                    begun = time.process_time()
                    answer = plan(moment, job_object(*kind))
                    times[kind].append(time.process_time() - begun)
                    assert answer.answer in ("starts", "preempts", "waits", "never"), answer
            medians = [1000 * median(values) for values in times.values()]
            plans = "".join(f"{value:>12.1f}" for value in medians[:-1])
            waiting = sum("nodeName" not in pod["spec"] for pod in listed)
            ratio = max(medians[:-1]) / medians[-1]
            print(f"{count:>6,}{pods:>8,}{waiting:>9,}{plans}{medians[-1]:>9.1f}{ratio:>8.2f}", flush=True)


def crowd(nodes: list[dict[str, Any]], pods: int) -> list[dict[str, Any]]:
    "Pods of development: of one GPU each while there are some, of none while nodes take more pods; others wait for a GPU"
    job, bare = job_object(DEV, 1, 1), job_object(DEV, 0, 1)
    listed = []
    for i in range(pods):
        turn, number = divmod(i, len(nodes))
        node = nodes[number]["metadata"]["name"] if turn < 90 else ""
        started = datetime.fromtimestamp(1_800_000_000 + 7919 * i % 86_400, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        pod = pod_object(bare if NODE <= turn < 90 else job, f"{i}", node, started, CLASSES[DEV]["value"])
        if not node:
            pod["status"] = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False"}]}
        listed.append(pod)
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--start", default="2017-10-09")
    parser.add_argument("--production", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--growth", action="store_true")
    arguments = parser.parse_args()
    if arguments.growth or arguments.trace is None:
        growth()
        return
    start = datetime.fromisoformat(arguments.start).timestamp()
    jobs = sorted(job for jobs in read_trace(arguments.trace).values() for job in jobs)
    runs = runs_of(jobs, start, arguments.production, arguments.seed)
    hours = sum(run.job.gpus * run.job.duration for run in runs) / 3600
    print(f"{len(runs):,} jobs, {hours:,.0f} GPU-hours; minutes waited, before the first attempt and in all")
    waits = f"{'median':>9}{'90 %':>9}{'median':>9}{'90 %':>9}"
    parts = "".join(f"{part:>9}" for part in PARTS)
    print(f"{'':<21}{'':<11}{'jobs':>8}{'stopped':>8}{waits}{'GPU-hours':>10}{parts}", flush=True)
    with ProcessPoolExecutor(arguments.processes) as pool:
        tasks = [(policy, runs, round(1000 * start)) for policy in POLICIES]
        for text, seconds in pool.map(simulate_week, tasks):
            print(f"{text}; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
