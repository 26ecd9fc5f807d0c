"What `plan` says of random clusters is what the real kube-scheduler does; benchmarks/queue_oracle.py asks it of a thousand"

from collections import Counter

import pytest

from tests.cluster.oracle import Judge, random_case
from tests.cluster.programs import missing

SERVERS = ["etcd", "kube-apiserver", "kube-scheduler"]
pytestmark = pytest.mark.skipif(bool(missing(SERVERS)), reason="no servers for a cluster: `make servers` builds them")
CASES = 50


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    judge = Judge(tmp_path_factory.mktemp("judge"))
    try:
        yield judge.start().judge([random_case(seed) for seed in range(CASES)])
    finally:
        judge.stop()


def test_answers(verdicts):
    "Starts, preempts, waits or never: each comes, and as it was predicted"
    assert [str(v) for v in verdicts if not v.is_class_right] == []
    assert min(Counter(v.answer for v in verdicts)[answer] for answer in ("starts", "preempts", "waits", "never")) >= 4


def test_victims_and_nodes(verdicts):
    "The pods that are ended are one of the sets that were predicted, and a job starts on nodes on which it may"
    submitted = [v for v in verdicts if v.plan.answer != "never"]
    assert [str(v) for v in submitted if not v.are_victims_right] == []
    assert all(v.nodes <= {*v.plan.nodes} for v in submitted if v.answer == "starts")
