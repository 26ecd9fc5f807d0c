"What holds of every forecast of a start: exact where nothing is left to chance, never later with more GPUs, as often right as it says"

import math
from datetime import UTC, datetime

import numpy as np
import pytest

from gpuml.cluster.calibration import Forecast, calibrated, forecast_of
from gpuml.cluster.durations import Durations, recent_durations
from gpuml.cluster.forecast import Past, forecasts
from gpuml.cluster.simulation import Scene, simulate
from gpuml.cluster.snapshot import snapshot_of
from gpuml.training.headway import Headway


def scene(nodes, per_node, rng, waits=12, biggest=4, full=True):
    "Full nodes, and jobs of one pod that wait"
    gpus = np.concatenate([_parts(per_node, rng) for _ in range(nodes)] if full else [np.empty(0, int)])
    ends = np.cumsum(gpus)
    holder_nodes = (ends - 1) // per_node
    return Scene(
        np.zeros(nodes, int) if full else np.full(nodes, per_node),
        holder_nodes.astype(int),
        gpus.astype(int),
        rng.integers(1, biggest + 1, waits),
        np.arange(waits),
    )


def _parts(total, rng):
    parts = []
    while sum(parts) < total:
        parts.append(int(rng.integers(1, total - sum(parts) + 1)))
    return np.array(parts)


def one_by_one(scene, ends, durations):
    "The same rule written down plainly, for one draw of jobs of one pod"
    free, waiting = list(scene.free), list(range(len(scene.gpus)))
    running = [(end, node, gpus) for end, node, gpus in zip(ends, scene.holder_nodes, scene.holder_gpus, strict=True)]
    starts, now = [math.inf] * len(waiting), 0.0
    while True:
        for pod in list(waiting):
            node = max(range(len(free)), key=lambda n: free[n])
            if free[node] >= scene.gpus[pod]:
                free[node] -= scene.gpus[pod]
                waiting.remove(pod)
                starts[pod] = now
                running.append((now + durations[pod], node, scene.gpus[pod]))
        if not running:
            return starts
        running.sort(key=lambda run: run[0])
        now, node, gpus = running.pop(0)
        free[node] += gpus


@pytest.mark.parametrize("seed", range(20))
def test_draws_go_as_a_plain_simulation_does(seed):
    rng = np.random.default_rng(seed)
    moment = scene(int(rng.integers(1, 5)), 4, rng, full=bool(seed % 4))
    ends = rng.exponential(1000, (5, len(moment.holder_gpus)))
    durations = rng.exponential(1000, (5, len(moment.gpus)))
    drawn = simulate(moment, ends, durations, range(len(moment.gpus)))
    plain = [one_by_one(moment, *row) for row in zip(ends, durations, strict=True)]
    np.testing.assert_allclose(drawn, plain)


def test_one_gpu_with_a_known_end_is_exact():
    moment = Scene(np.array([0]), np.array([0]), np.array([1]), np.array([1, 1]), np.array([0, 1]))
    drawn = simulate(moment, np.full((100, 1), 90.0), np.full((100, 2), 600.0), [0, 1])
    assert forecast_of(drawn[:, 0]) == Forecast(90, 90, 90)
    assert forecast_of(drawn[:, 1]) == Forecast(690, 690, 690)


def test_more_gpus_are_not_later_in_the_mean():
    rng = np.random.default_rng(1)
    moment = scene(4, 4, rng)
    ends = rng.exponential(1000, (2000, len(moment.holder_gpus)))
    durations = rng.exponential(1000, (2000, 12))
    last = [
        simulate(
            Scene(
                np.append(moment.free, [4] * more), moment.holder_nodes, moment.holder_gpus, moment.gpus, moment.jobs
            ),
            ends,
            durations,
            [11],
        ).mean()
        for more in range(4)
    ]
    assert last == sorted(last, reverse=True)
    assert last[0] > last[-1]


def test_what_never_fits_has_no_forecast():
    moment = Scene(np.array([4, 4]), *np.empty((2, 0), int), np.array([8]), np.array([0]))
    starts = simulate(moment, np.empty((50, 0)), np.ones((50, 1)), [0])
    assert forecast_of(starts[:, 0]) is None


def test_pods_keep_to_nodes_that_are_open_to_them():
    open_nodes = np.array([[False, True], [True, True]])
    moment = Scene(*map(np.array, ([0, 0], [0, 1], [1, 1], [1, 1], [0, 1])), open_nodes=open_nodes)
    starts = simulate(moment, np.array([[10.0, 50.0]]), np.ones((1, 2)), [0, 1])
    assert starts.tolist() == [[50, 10]]


def test_draws_of_a_seed_are_the_same():
    log = Durations(np.random.default_rng(5).lognormal(7, 2, 400))
    first, second = (
        [log.remaining([10, 1e5], 50, rng), recent_durations(log, 4, 50, rng)]
        for rng in (np.random.default_rng(9), np.random.default_rng(9))
    )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one > 0).all()


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9, 0.95])
def test_a_level_is_held_as_often_as_it_says(level):
    "Whatever the forecasts are made of: here they lie beside the truth by a factor, and are far too sure"
    rng = np.random.default_rng(11)
    medians = rng.lognormal(7, 1.5, 3000)
    waits = [(Forecast(m * 0.9, m, m * 1.2), m * 1.7 * math.exp(rng.standard_t(3)), math.inf) for m in medians]
    hits = 0
    for start in range(0, 3000, 300):  # a fresh calibration for each hundred
        site = calibrated(waits[start : start + 200])
        hits += sum(seconds <= site.seconds(f, level) for f, seconds, _ in waits[start + 200 : start + 300])
    # of a thousand waits and ten calibrations of 200 each
    sd = math.sqrt(level * (1 - level) * (1 / 1000 + 1 / 2000))
    assert abs(hits / 1000 - level) < 4 * sd


def test_promises_that_came_true_are_counted():
    forecast = Forecast(50, 100, 200)
    site = calibrated([(forecast, 90.0, 150.0), (forecast, 151.0, 150.0), (forecast, 10.0, math.inf)])
    assert (site.held, site.promised) == (2, 3)


NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


def pod(name, node="", gpus=1, priority=0, **status):
    "A pod of the Job NAME"
    container = {"resources": {"requests": {"nvidia.com/gpu": gpus}}}
    owners = [{"kind": "Job", "name": name.partition(".")[0], "controller": True}]
    meta = {"name": name, "namespace": "dev", "ownerReferences": owners, "creationTimestamp": "2026-11-28T11:00:00Z"}
    spec = {"nodeName": node, "containers": [container], "priority": priority, "terminationGracePeriodSeconds": 60}
    return {"metadata": meta, "spec": spec, "status": {"phase": "Running", **status}}


def node(name, gpus, **spec):
    return {"metadata": {"name": name}, "spec": spec, "status": {"allocatable": {"nvidia.com/gpu": gpus}}}


def ends(**seconds):
    return {("dev", name): Headway(run=name, seconds_left=left) for name, left in seconds.items()}


def test_a_gang_that_holds_one_node_waits_for_the_other():
    pods = [pod("a", "one", 4), pod("b.0", "two", 4), pod("b.1", "", 4), pod("c", "", 4)]
    moment = snapshot_of([node("one", 4), node("two", 4)], pods)
    answers = forecasts(moment, "nvidia.com/gpu", NOON, None, ends(a=1000.0))
    assert 950 < answers["dev", "b"].median < 1050
    assert answers["dev", "c"].low > answers["dev", "b"].median  # no node is free before the gang has ended


def test_the_more_important_one_goes_first():
    moment = snapshot_of([node("one", 4)], [pod("a", "one", 4), pod("low", "", 4), pod("high", "", 4, 9)])
    answers = forecasts(moment, "nvidia.com/gpu", NOON, None, ends(a=1000.0))
    assert answers["dev", "high"].median < 1050 < answers["dev", "low"].low


def test_a_cordoned_node_is_not_waited_for():
    moment = snapshot_of([node("one", 4, unschedulable=True)], [pod("a", "one", 4), pod("b", "", 4)])
    assert forecasts(moment, "nvidia.com/gpu", NOON, None, ends(a=10.0)) == {}


def test_jobs_that_come_later_overtake_only_larger_ones():
    moment = snapshot_of([node("one", 4)], [pod("a", "one", 2), pod("b", "one", 2), pod("c", "", 4)])
    known, log = ends(a=600.0, b=1200.0), Durations(np.full(300, 3600.0))
    alone, small, large = (
        forecasts(moment, "nvidia.com/gpu", NOON, None, known, Past(log, 0.01, coming))["dev", "c"]
        for coming in ((), ((1, 0),), ((4, 0),))
    )
    assert alone == large
    assert small.median > alone.median + 1800
