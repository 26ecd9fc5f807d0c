"""When will it start: a public trace of GPU jobs replayed, and each wait forecast when its job is submitted.

    python benchmarks/queue_waits.py philly.csv[.xz] openb_pods.csv[.xz] [--jobs 500] [--draws 500] [--waits 0.3] [--clusters 8]
        [--processes 2]

A trace has a line for each job: timestamp, duration (seconds), num_gpus, cluster. Microsoft's Philly (82,247 jobs, 2017) is in
that form in the repository siasosp23/artifacts, `sia-simulator/traces/philly.csv`. Or it has a line for each pod: creation_time,
scheduled_time and deletion_time in seconds, num_gpu, as Alibaba's openb (8,152 pods, 2023) in the repository alibaba/clusterdata,
`cluster-trace-gpu-v2023/csv/openb_pod_list_default.csv`; pods without a GPU, or that never began, are left out, and a part of a GPU
counts as one. Neither is shipped here. The largest clusters of
a trace are taken. Who waited there is not used: each cluster is given the fewest nodes of 8 GPUs with which at most a share
`--waits` of its jobs waits, all of its jobs are placed by kube-scheduler's rule (first by age, what does not fit keeps nobody,
the pods of a job of more than 8 GPUs take nodes one by one), written down here in plain Python, and every k-th of those that
wait is forecast from what was known when it came: `--jobs` of each cluster. Who waits is what `plan` would say; of the product it
runs `durations`, `simulation` and `calibration`.

Known of durations, in rows: *exact*: all to the second, which nobody knows: what is missed is due to who comes later; *all*: within
10 % of those that run and those that wait, as gpuml has it of runs that say how far they are, and of configs that ran before;
*running*: only of those that run; *none*: nothing but how long earlier jobs took. The trace's durations, with a factor of 10 % that
the forecast does not know, stand in for what gpuml knows. Each row's intervals are
corrected by the cluster's own waits that were over when the job came; of a cluster's first 30 nothing is counted.

Two baselines, forecast in the same run: jobs before it × mean duration / GPUs (with the same correction for its interval), and a
plan with the limits that users give, as schedulers make it: limits are taken to be the duration, rounded up to 1, 4, 12, 24, 48 h,
or 1, 2, 4, … weeks, and its one answer has no interval. Prints, of all waits and by cluster, how often the 90 % interval held, the
share of starts within 1 and within 10 minutes of the median, the interval's median width, and milliseconds for a forecast.
"""

import argparse
import csv
import heapq
import lzma
import sys
import time
from collections import defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpuml.cluster.calibration import FEWEST, Forecast, calibrated, forecast_of  # noqa: E402
from gpuml.cluster.durations import Durations, recent_durations  # noqa: E402
from gpuml.cluster.simulation import Scene, simulate  # noqa: E402

NODE = 8  # GPUs
ROWS = ("exact", "all", "running", "none", "position × mean", "user limits")
LIMITS = np.array([1, 4, 12, 24, 48, 168, 336, 672, 1344, 2688]) * 3600.0


class Job(NamedTuple):
    "A job of the trace"

    submitted: float
    duration: float
    gpus: int

    @property
    def pods(self) -> tuple[int, int]:
        "How many, and GPUs of each"
        count = -(-self.gpus // NODE)
        return count, -(-self.gpus // count)


def job_of(row: dict[str, str]) -> tuple[str, Job] | None:
    "Cluster and job of a line; none of a pod that held no GPU"
    if "creation_time" not in row:
        begin = datetime.fromisoformat(row["timestamp"]).timestamp()
        return row["cluster"], Job(begin, float(row["duration"]), int(row["num_gpus"]))
    begin, gpus = row["scheduled_time"], int(row["num_gpu"])
    if not gpus or not begin:
        return None
    return "openb", Job(float(row["creation_time"]), float(row["deletion_time"]) - float(begin), gpus)


def read_trace(path: Path) -> dict[str, list[Job]]:
    "The jobs of each cluster by time, the largest clusters first"
    clusters = defaultdict(list)
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt") as lines:
        for name, job in filter(None, map(job_of, csv.DictReader(lines))):
            clusters[name].append(job)
    return {name: sorted(jobs) for name, jobs in sorted(clusters.items(), key=lambda item: -len(item[1]))}


@dataclass
class Pool:
    "Nodes, who holds them and who waits, at a moment of the replay"

    jobs: list[Job]
    nodes: int
    free: list[int] = field(init=False)
    held: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # job → node of each pod placed
    starts: dict[int, float] = field(default_factory=dict)
    running: dict[int, None] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)  # job → pods without a node, by age
    ended: list[float] = field(default_factory=list)  # durations of those that are over

    def __post_init__(self):
        self.free = [NODE] * self.nodes
        self.queues = defaultdict(deque)  # GPUs of a pod → jobs
        self.ends = []

    def submit(self, number: int) -> None:
        "A job comes: its pods take the nodes with most room"
        count, gpus = self.jobs[number].pods
        self.waiting[number] = count
        for _ in range(count):
            node = max(range(self.nodes), key=self.free.__getitem__)
            if self.free[node] >= gpus:
                self.place(number, node, self.jobs[number].submitted)
            else:
                self.queues[gpus].append(number)

    def place(self, number: int, node: int, now: float) -> None:
        "A pod gets a node"
        self.free[node] -= self.jobs[number].pods[1]
        self.held[number].append(node)
        self.waiting[number] -= 1
        if not self.waiting[number]:
            del self.waiting[number]
            self.starts[number] = now
            self.running[number] = None
            heapq.heappush(self.ends, (now + self.jobs[number].duration, number))

    def advance(self, until: float) -> None:
        "What ends until then, and who gets it"
        while self.ends and self.ends[0][0] <= until:
            now, number = heapq.heappop(self.ends)
            self.running.pop(number)
            self.ended.append(self.jobs[number].duration)
            nodes, gpus = self.held.pop(number), self.jobs[number].pods[1]
            for node in nodes:
                self.free[node] += gpus
            for node in nodes:
                self.fill(node, now)

    def fill(self, node: int, now: float) -> None:
        "The oldest that fit get the node"
        while fitting := [q for gpus, q in self.queues.items() if q and gpus <= self.free[node]]:
            self.place(min(fitting, key=lambda q: q[0]).popleft(), node, now)


def starts_of(jobs: list[Job], nodes: int) -> np.ndarray:
    "When each job starts; never: infinite"
    pool = Pool(jobs, nodes)
    for number, job in enumerate(jobs):
        pool.advance(job.submitted)
        pool.submit(number)
    pool.advance(np.inf)
    return np.array([pool.starts.get(number, np.inf) for number in range(len(jobs))])


def nodes_for(jobs: list[Job], share: float) -> int:
    "The fewest nodes with which at most so large a share of the jobs waits"
    submitted = np.array([job.submitted for job in jobs])
    nodes = max(job.pods[0] for job in jobs)
    while (starts_of(jobs, nodes) > submitted).mean() > share:
        nodes += max(1, nodes // 20)
    return nodes


class Look:
    "What is known when a job comes, as the simulation takes it"

    def __init__(self, pool: Pool, number: int, rng: np.random.Generator):
        jobs, self.now = pool.jobs, pool.jobs[number].submitted
        self.running, self.waiting = list(pool.running), [*pool.waiting, number]
        self.elapsed = np.array([self.now - pool.starts[n] for n in self.running])
        self.log = Durations(np.array(pool.ended[-1000:]))
        self.left = np.array([jobs[n].duration for n in self.running]) - self.elapsed
        self.whole = np.array([jobs[n].duration for n in self.waiting])
        holders = [(node, jobs[n].pods[1], i) for i, n in enumerate(self.running) for node in pool.held[n]]
        partial = [(node, jobs[n].pods[1], -1) for n in pool.waiting for node in pool.held[n]]
        nodes, gpus, self.owners = np.array(holders + partial, int).reshape(-1, 3).T
        lacking = pool.waiting | {number: jobs[number].pods[0]}
        pods = [(jobs[n].pods[1], i) for i, n in enumerate(self.waiting) for _ in range(lacking[n])]
        sizes, owners = np.array(pods, int).T
        self.rate, later = self._later(jobs, number, rng)
        self.coming = len(later)
        owners = np.append(owners, len(self.waiting) + np.arange(self.coming))
        numbers = np.arange(len(sizes), len(sizes) + self.coming)
        self.scene = Scene(np.array(pool.free), nodes, gpus, np.append(sizes, later).astype(int), owners, numbers)

    def _later(self, jobs: list[Job], number: int, rng: np.random.Generator) -> tuple[float, list[int]]:
        "How many a second come that may overtake it, because they are smaller; and the GPUs of some"
        before = jobs[max(0, number - 500) : number]
        smaller = [job.pods[1] for job in before if job.pods[1] < jobs[number].pods[1]]
        if not smaller:
            return 1.0, []
        span = max(1.0, self.now - before[0].submitted)
        return len(smaller) / span, rng.choice(smaller, min(40, len(smaller))).tolist()

    def starts(self, row: str, draws: int, rng: np.random.Generator) -> np.ndarray:
        "Seconds until the last job starts, by what a row knows"
        held, waits = len(self.running), len(self.waiting)
        left = self.log.remaining(self.elapsed, draws, rng) if row == "none" else _about(self.left, draws, rng)
        whole = recent_durations(self.log, waits + self.coming, draws, rng)
        if row == "all":
            whole[:, :waits] = _about(self.whole, draws, rng)
        if row == "exact":
            left, whole[:, :waits] = np.repeat(self.left[None], draws, 0), self.whole
        if row == "user limits":
            draws, arrivals = 1, None
            limits = LIMITS[np.searchsorted(LIMITS, self.left + self.elapsed).clip(max=len(LIMITS) - 1)]
            left = np.maximum(limits - self.elapsed, 0.0)[None]
            whole = LIMITS[np.searchsorted(LIMITS, self.whole).clip(max=len(LIMITS) - 1)][None]
            whole = np.hstack([whole, np.ones((1, self.coming))])
            arrivals = np.full((1, self.coming), np.inf)
        else:
            arrivals = np.cumsum(rng.exponential(1 / self.rate, (draws, self.coming)), axis=1)
        left = np.hstack([left[:, :held], np.full((draws, 1), np.inf)])  # of pods whose job still gathers
        return simulate(self.scene, left[:, self.owners], whole, [waits - 1], arrivals)[:, 0]


def _about(seconds: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    "Draws of durations that are known within 10 %"
    believed = seconds * np.exp(rng.normal(0, 0.1, len(seconds)))
    return believed * np.exp(rng.normal(0, 0.1, (draws, len(seconds))))


class Outcome(NamedTuple):
    "A forecast of one wait, and what came"

    submitted: float
    waited: float
    forecast: Forecast
    milliseconds: float


def forecast_cluster(jobs: list[Job], nodes: int, most: int, draws: int) -> dict[str, list[Outcome]]:
    "Forecasts of every k-th job that waits"
    starts, rng = starts_of(jobs, nodes), np.random.default_rng(7)
    waits = [n for n, job in enumerate(jobs) if job.submitted < starts[n] < np.inf]
    chosen = set(waits[:: max(1, len(waits) // most)])
    pool, outcomes = Pool(jobs, nodes), {row: [] for row in ROWS}
    for number, job in enumerate(jobs):
        pool.advance(job.submitted)
        if number in chosen:
            look, waited = Look(pool, number, rng), starts[number] - job.submitted
            for row in ROWS:
                begun = time.perf_counter()
                if row == "position × mean":
                    seconds = len(look.waiting) * (look.log.seconds.mean() if len(look.log.seconds) else 3600.0)
                    answer = Forecast(
                        *[seconds * sum(jobs[n].gpus for n in look.waiting) / len(look.waiting) / (nodes * NODE)] * 3
                    )
                else:
                    answer = forecast_of(look.starts(row, draws, rng)) or Forecast(0.0, 1e8, np.inf)
                outcomes[row].append(Outcome(job.submitted, waited, answer, 1e3 * (time.perf_counter() - begun)))
        pool.submit(number)
    return outcomes


class Score(NamedTuple):
    "What a corrected forecast came to"

    is_held: bool
    error: float  # seconds, of the median
    width: float  # seconds
    milliseconds: float


def score(outcomes: list[Outcome], corrects: bool) -> list[Score]:
    "Each forecast, corrected by the waits that were over before it was made"
    by_end = sorted(outcomes, key=lambda o: o.submitted + o.waited)
    scores = []
    for outcome in outcomes:
        over = [(o.forecast, o.waited, np.inf) for o in by_end if o.submitted + o.waited <= outcome.submitted]
        if len(over) < FEWEST:
            continue
        site, waited = calibrated(over), outcome.waited
        if not corrects:
            scores.append(Score(False, abs(waited - outcome.forecast.median), np.nan, outcome.milliseconds))
            continue
        low, median, high = (site.seconds(outcome.forecast, level) for level in (0.05, 0.5, 0.95))
        scores.append(Score(low <= waited <= high, abs(waited - median), high - low, outcome.milliseconds))
    return scores


def line(name: str, scores: list[Score], has_interval: bool) -> str:
    "A row of the table"
    held, errors, widths, times = np.array(scores, float).reshape(-1, 4).T
    interval = f"{held.mean():>9.1%}{np.median(widths) / 60:>12.1f}" if has_interval else f"{'–':>9}{'–':>12}"
    within = f"{(errors <= 60).mean():>9.0%}{(errors <= 600).mean():>9.0%}"
    return f"{name:<18}{len(scores):>7}{interval}{within}{times.mean():>8.1f}{times.max():>7.0f}"


def work(task: tuple[str, list[Job], float, int, int]) -> tuple[str, int, float, dict[str, list[Outcome]]]:
    "One cluster"
    name, jobs, share, most, draws = task
    nodes = nodes_for(jobs, share)
    waits = (starts_of(jobs, nodes) > np.array([job.submitted for job in jobs])).mean()
    return name, nodes, waits, forecast_cluster(jobs, nodes, most, draws)


def speed(draws: int, repeats: int = 5) -> float:
    "Milliseconds for a forecast of a job that asks for a whole one of 64 full nodes, with 100 holders and 50 that wait: the median"
    rng = np.random.default_rng(0)
    nodes = np.append(np.arange(64), rng.integers(0, 64, 36))
    gpus = NODE // np.bincount(nodes)[nodes]
    free = NODE - np.bincount(nodes, gpus).astype(int)
    scene = Scene(free, nodes, gpus, np.append(rng.choice([1, 1, 2, 4, 8], 49), 8), np.arange(50))
    log, times = Durations(rng.lognormal(8, 1.5, 500)), []
    for _ in range(repeats):
        begun = time.perf_counter()
        ends = log.remaining(rng.exponential(3600, 100), draws, rng)
        forecast_of(simulate(scene, ends, recent_durations(log, 50, draws, rng), [49])[:, 0])
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times))


def play(trace: Path, pool: ProcessPoolExecutor, arguments: argparse.Namespace) -> None:
    "Print the tables of a trace: of each cluster, and of all"
    clusters = list(read_trace(trace).items())[: arguments.clusters]
    tasks = [(name, jobs, arguments.waits, arguments.jobs, arguments.draws) for name, jobs in clusters]
    head = f"{'':<18}{'waits':>7}{'90 % held':>10}{'width, min':>11}{'≤ 1 min':>9}{'≤ 10 min':>9}{'ms':>8}{'most':>7}"
    pooled = {row: [] for row in ROWS}
    for (name, jobs, *_), (_, nodes, waits, outcomes) in zip(tasks, pool.map(work, tasks), strict=True):
        print(f"\n{name}: {len(jobs):,} jobs, {nodes} nodes of {NODE} GPUs, {waits:.0%} wait\n{head}")
        for row, listed in outcomes.items():
            scores = score(listed, row != "user limits")
            pooled[row] += scores
            if scores:
                print(line(row, scores, row != "user limits"), flush=True)
    print(f"\nall of {trace.name}\n{head}")
    for row, scores in pooled.items():
        print(line(row, scores, row != "user limits"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--waits", type=float, default=0.3)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    for draws in (1000, 2000, 4000):
        print(f"64 nodes of 8 GPUs, 100 holders, 50 waiting, {draws:,} draws: {speed(draws):.0f} ms", flush=True)
    with ProcessPoolExecutor(arguments.processes) as pool:
        for trace in arguments.traces:
            play(trace, pool, arguments)


if __name__ == "__main__":
    main()
