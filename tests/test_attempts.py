"What attempts leave behind: a file each, from their beginning on, on a disk and on S3"

import collections
import dataclasses
import json
from datetime import datetime

import pytest

from gpuml.base.errors import DataError
from gpuml.base.storage import Storage
from gpuml.training import attempts
from gpuml.training.attempts import Attempt
from tests.faults import SLOW_DOWN, Proxy
from tests.waiting import Passing

FIRST = Attempt(
    *("dev-1", 1, 75, "stopped by SIGTERM", 3, "2026-01-01T08:00", "2026-01-01T09:00", "node-7", "ada"),
    **dict(namespace="gpuml-dev", gpus=2, updates=40, checkpoint=40),
)
SILENT = dataclasses.replace(FIRST, attempt=2, exit_code=None, reason="", finished="", alive="2026-01-01T08:30", gpus=4)
TIMES = dict(spent=dict(starting=1000, useful=9000, lost=0, saving=0, idle=0), resumed=40, marks=[[80, 7000]])
LAST = dataclasses.replace(
    FIRST, attempt=3, exit_code=0, reason="all cells are done", owner="bob", updates=100, **TIMES
)


@pytest.fixture(params=["a disk", "S3"])
def place(request, tmp_path):
    return request.getfixturevalue("s3").url("runs/dev-1") if request.param == "S3" else str(tmp_path / "dev-1")


def keep(place, *made):
    for attempt in made:
        Storage().put_bytes(attempts.content(attempt), f"{place}/attempts/{attempt.attempt}.json")


def gpu_hours(history):
    "GPU-hours by owner, as a ledger folds them"
    hours = collections.Counter()
    for attempt in history:
        started, finished = map(datetime.fromisoformat, (attempt.started, attempt.finished or attempt.alive))
        hours[attempt.owner] += attempt.gpus * (finished - started).total_seconds() / 3600
    return hours


def test_a_ledger_folds_over_them(place):
    keep(place, LAST, FIRST, SILENT)
    history = attempts.read(Storage(), place)
    assert history == [FIRST, SILENT, LAST]
    assert gpu_hours(history) == {"ada": 2 * 1 + 4 * 0.5, "bob": 2}


def test_a_silent_end_is_written_down_by_the_next(place):
    keep(place, FIRST, SILENT)
    Storage().put_bytes(b"{}", f"{place}/checkpoints/step-00000060/manifest.json")
    assert attempts.outcome(Storage(), place)["attempt"] == 1  # the newest that said how it ended
    assert attempts.close_silent(Storage(), place, 2) == []  # it is the one at work
    assert attempts.close_silent(Storage(), place, 3) == [2] and attempts.close_silent(Storage(), place, 4) == []
    first, second = attempts.read(Storage(), place)
    assert first == FIRST and (second.exit_code, second.finished, second.checkpoint) == (None, "2026-01-01T08:30", 60)
    assert "without a word" in second.reason and second.reason.endswith("2026-01-01T08:30")
    assert attempts.outcome(Storage(), place)["attempt"] == 1


def test_keys_of_a_later_version_are_left_out(tmp_path):
    text = json.dumps({**dataclasses.asdict(FIRST), "colour": "red"})
    assert attempts.attempt_of(text.encode()) == FIRST


def test_a_server_that_is_away_is_waited_for_as_long_as_said(s3):
    passing = Passing()
    with Proxy(s3.endpoint, lambda request: SLOW_DOWN) as proxy, pytest.raises(DataError):
        storage = Storage(proxy.endpoint, patience=1.0, clock=passing.clock)
        attempts.newest_checkpoint(storage, s3.url("runs/dev-1"))
    assert passing.seconds <= 1.01
