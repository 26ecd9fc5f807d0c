"What holds of every forecast of a start: exact where nothing is left to chance, never later with more GPUs, as often right as it says"

import math

import numpy as np
import pytest

from gpuml.cluster.calibration import Forecast, calibrated, forecast_of
from gpuml.cluster.durations import Durations, recent_durations
from gpuml.cluster.simulation import Scene, simulate


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
