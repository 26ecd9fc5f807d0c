"A made-up day on three nodes, by `plan` and the ledger: no GPU is held twice, and all time adds up (benchmarks/fleet.py)"

from copy import deepcopy

import numpy as np
import pytest

from benchmarks.fleet import POLICIES, PROD, Fleet, check, runs_of
from benchmarks.queue_waits import Job
from gpuml.training.account import account_of


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(0, 20_000, 80))
    sizes = rng.choice([1, 1, 2, 4, 8, 16], 80)
    return runs_of(
        [Job(float(t), float(rng.integers(1, 4000)), int(n)) for t, n in zip(times, sizes, strict=True)], 0, 0.3
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_gpu_hour_is_accounted_for(runs, policy):
    fleet = Fleet(deepcopy(runs), policy, nodes=3)
    fleet.play()
    accounts = [account_of(run.attempts) for run in fleet.runs]
    check(fleet, accounts)
    assert all(run.attempts[-1].exit_code == 0 for run in fleet.runs)
    interrupted = sum(account.interruptions for account in accounts)
    assert (interrupted > 0) == policy.preempts
    assert all(not a.interruptions for r, a in zip(fleet.runs, accounts, strict=True) if r.priority_class == PROD)
    lost = sum(account.spent.lost for account in accounts)
    assert lost <= 16_000 * interrupted if policy.saves else lost > 0
    assert any(account.spent.saving for account in accounts) == (policy.preempts and policy.saves)
    if policy.advised:
        assert fleet.counts["waited for"] > 0


def test_what_does_not_add_up_is_noticed(runs):
    fleet = Fleet(deepcopy(runs), POLICIES[0], nodes=3)
    fleet.play()
    accounts = [account_of(run.attempts) for run in fleet.runs]
    gpu, start, end = fleet.used[0]
    fleet.used.append((gpu, start + 1, end))
    with pytest.raises(AssertionError, match="held twice"):
        check(fleet, accounts)
