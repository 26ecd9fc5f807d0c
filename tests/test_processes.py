"""Several processes train one model: one progress, one stop, one error, and nobody is left behind.

Two workers on a CPU, each with a Python of its own, train the tiny model.
"""

import os
import signal
from contextlib import suppress

import psutil
import pytest

from gpuml.base.errors import Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training import attempts
from gpuml.training.fit import fit
from gpuml.training.record import read_record
from tests.conftest import runs_in

OVERRIDES = ["train.epochs=3", "train.checkpoint_updates=2"]  # 9 updates


@pytest.fixture(autouse=True)
def pair(monkeypatch):
    "Two processes"
    monkeypatch.setenv("GPUML_GPUS", "2")


def workers():
    "The worker processes of this one, by their rank"
    ranks = {}
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if "gpuml.training.worker" in process.cmdline():
                ranks[int(process.environ()["RANK"])] = process
    return ranks


def act_at(moment, act):
    "A watch that acts once at a moment: a number of updates, or a phase"
    left = [moment]

    def watch(progress):
        if left and (progress.phase == moment if isinstance(moment, str) else progress.step >= moment):
            left.clear()
            act()

    return watch


def test_stopped_and_resumed(store):
    shown = []
    stop = act_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def watch(progress):
        shown.append((progress.phase, progress.step, len(progress.losses)))
        stop(progress)

    with pytest.raises(Preempted, match="stopped at update"):
        fit(load("dev", OVERRIDES), watch=watch)
    assert shown[-1][0] == "stopped" and all(step == losses for _, step, losses in shown)
    assert not workers()
    (folder,) = (store.parent / "outputs").iterdir()
    assert read_record(folder).status == "KILLED"
    done = fit(load("dev", OVERRIDES), resume="latest")
    assert done.folder == folder and (folder / "certificate.json").exists() and done.metrics["updates"] == 9
    assert [a.exit_code for a in attempts.read(Storage(), str(folder))] == [75, 0]
    (run,) = runs_in(store)
    assert run.info.status == "FINISHED"
