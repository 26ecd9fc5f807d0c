"""Several processes train one model: one progress, one stop, one error, and nobody is left behind.

Two workers on a CPU train the tiny model. A second node is a second project on this machine.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpuml.base.errors import DataError, Exit, GpumlError, OutputError, Preempted, TrainError
from gpuml.base.files import write_json
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training import attempts
from gpuml.training.fit import fit
from gpuml.training.last_word import reason
from gpuml.training.processes import Processes, Timing
from gpuml.training.record import read_record
from gpuml.training.stop import StopRequest
from gpuml.training.task import TASK
from gpuml.training.workers import run_workers
from tests.conftest import ENDLESS, free_port, runs_in
from tests.standing import STANDING
from tests.waiting import until

FAULTY = f"""
{STANDING}
if os.environ.get("RANK") == "1":
    import torch
    from torch.nn.modules import module

    kind, number = os.environ["FAULT"].split(":")
    batches = 0
    if kind == "stands":
        stand_still_in(int(number), os.environ["GO_ON"])
    if kind == "orphan" and os.fork() == 0:
        os.execvp("sleep", ["sleep", number])

    def before(layer, arguments):
        if kind == "memory" and isinstance(layer, torch.nn.Embedding) and torch.is_grad_enabled():
            if arguments[0].numel() > int(number):
                raise torch.OutOfMemoryError("CUDA out of memory.")

    def after(layer, arguments, output):
        global batches
        batches += type(layer).__name__.endswith("ForSequenceClassification") and torch.is_grad_enabled()
        if kind == "nan" and batches >= int(number) and isinstance(output, torch.Tensor):
            return output * float("nan")

    module.register_module_forward_pre_hook(before)
    module.register_module_forward_hook(after)
"""
OVERRIDES = ["train.epochs=3", "train.checkpoint_updates=2"]  # 9 updates
# Processes, the update that is seen when they are stopped, and where one of them stands still until then. Three updates are an
# epoch, whose end and first update are shown at once: it is stopped at 3 to 5, at 7 to 12, and behind 12
STOPS = [(4, 3, "stands:4"), (2, 7, "stands:6"), (1, 13, "none:0")]
LONG = [ENDLESS, "train.checkpoint_updates=2"]
AGENT = """
import os, sys
from gpuml.training.launch import serve
from gpuml.training.processes import processes_of
sys.exit(serve(processes_of(None), os.environ))
"""


@pytest.fixture
def real_pair(monkeypatch):
    "Two processes on this machine, each with a Python of its own"
    monkeypatch.setenv("GPUML_GPUS", "2")


@pytest.fixture
def pair(real_pair, forking):
    "Two processes on this machine, which have imported everything already"


@pytest.fixture
def fault(tmp_path, pair, monkeypatch):
    """Something goes wrong in the second process: `memory:TOKENS` it has room for, `nan:BATCHES` after which it computes none,
    `orphan:SECONDS` of a process that it starts and leaves behind, or `stands:UPDATE` in which it stands still until it is
    stopped, or the file in GO_ON is there"""
    folder = tmp_path / "faulty"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("GO_ON", str(folder / "go on"))
    return partial(monkeypatch.setenv, "FAULT")


def workers(parent=None):
    "The worker processes of one, by their rank"
    ranks = {}
    for process in psutil.Process(parent).children():
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


def test_stopped_and_resumed(store, fault):
    shown = []
    fault("stands:4")
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
    fault("none:0")
    done = fit(load("dev", OVERRIDES), resume="latest")
    assert done.folder == folder and (folder / "certificate.json").exists() and done.metrics["updates"] == 9
    assert [a.exit_code for a in attempts.read(Storage(), str(folder))] == [75, 0]
    (run,) = runs_in(store)
    assert run.info.status == "FINISHED"


def test_one_of_them_is_killed(store, pair):
    def kill():
        workers()[1].kill()

    with pytest.raises(Preempted, match=r"process 2 of 2 was killed \(signal 9\)"):
        fit(load("dev", LONG), watch=act_at(5, kill))
    assert not workers()
    (folder,) = (store.parent / "outputs").iterdir()
    assert read_record(folder).status == "KILLED"
    assert list((folder / "checkpoints").iterdir())


def test_one_that_shares_the_model_is_killed(store, fault, monkeypatch):
    "Its part of weights and averages is gone with it; all go on from the checkpoint, to the end"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = ["train.epochs=20", "train.checkpoint_updates=2", "train.shard=always"]  # 60 updates
    fault("stands:7")
    with pytest.raises(Preempted, match=r"process 2 of 2 was killed \(signal 9\)"):
        fit(load("dev", line), watch=act_at(5, lambda: workers()[1].kill()))
    assert not workers()
    fault("none:0")
    done = fit(load("dev", line), resume="latest")
    assert done.metrics["updates"] == 60 and (done.folder / "certificate.json").exists()


def test_rank_0_is_killed(store, pair):
    "Its record is closed all the same"
    with pytest.raises(Preempted, match="process 1 of 2 was killed"):
        fit(load("dev", LONG), watch=act_at(5, lambda: workers()[0].kill()))
    assert not workers()
    (folder,) = (store.parent / "outputs").iterdir()
    assert read_record(folder).status == "KILLED"


def test_a_run_that_lacks_only_its_certificate_waits_for_nobody(store, fault, monkeypatch):
    "Neither for a second process, nor for another node"
    fault("stands:4")

    def stand_in_the_way():
        next((store.parent / "outputs").iterdir()).joinpath("metrics.json").mkdir()
        Path(os.environ["GO_ON"]).touch()

    with pytest.raises(OutputError, match=r"metrics\.json"):
        fit(load("dev", OVERRIDES), watch=act_at("evaluating", stand_in_the_way))
    next((store.parent / "outputs").glob("*/metrics.json")).rmdir()
    for name, value in {"GPUML_NODES": "2", "GPUML_HOST": "x", "GPUML_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    sizes = set()
    done = fit(load("dev", OVERRIDES), watch=lambda p: sizes.add(len(workers())), resume="latest")
    assert done.metrics["updates"] == 9 and max(sizes) == 1
    assert "all updates were done before: one process writes the results" in done.metrics["notes"]


def test_ctrl_c_twice(store, pair):
    def stop():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Preempted, match="stopped at once"):
        fit(load("dev", LONG), watch=act_at(5, stop))
    assert not workers()
    (folder,) = (store.parent / "outputs").iterdir()
    assert read_record(folder).status == "KILLED"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_them_hangs(rank, store, real_pair, monkeypatch):
    "For longer than a process on a busy machine may be silent that does not hang"
    monkeypatch.setenv("GPUML_SILENCE", "20")
    with pytest.raises(Preempted) as e:
        fit(load("dev", LONG), watch=act_at(5, lambda: workers()[rank].suspend()))
    assert f"process {rank + 1} of 2 gave no sign of life for 20 seconds" in str(e.value)
    assert not workers()


def test_bad_data(store, pair):
    with open("data/a.csv", "a") as f:
        f.write("a text without a label\n")
    with pytest.raises(DataError, match=r"a\.csv"):
        fit(load("dev", OVERRIDES))
    assert not workers()


def test_memory_of_one_of_them_is_short(store, fault):
    "It computes its part in smaller pieces, and nobody else does: the updates are the same"
    line = [*OVERRIDES, "model.dropout=0", "output=calm"]
    fault("memory:1000")
    calm = fit(load("dev", line))
    fault("memory:12")
    short = fit(load("dev", [*line, "output=short"]))
    np.testing.assert_allclose(
        [e["loss"] for e in short.metrics["history"]], [e["loss"] for e in calm.metrics["history"]], rtol=1e-5
    )


def test_memory_of_one_of_them_has_no_room_for_a_text(store, fault):
    fault("memory:2")
    with pytest.raises(GpumlError, match=r"out of memory with one example of \d+ tokens") as e:
        fit(load("dev", OVERRIDES))
    assert e.value.exit_code == Exit.FAILED and not workers()


def test_a_loss_of_one_of_them_is_no_number(store, fault):
    "The update is nobody's"
    fault("nan:6")
    with pytest.raises(TrainError, match=r"the loss is nan at update \d \(training rows .*a\.csv") as e:
        fit(load("dev", [*OVERRIDES, "train.checkpoint_updates=1"]))
    assert e.value.exit_code == Exit.FAILED and not workers()
    (folder,) = (store.parent / "outputs").iterdir()
    last = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    assert last < int(re.search(r"at update (\d)", str(e.value))[1]) and read_record(folder).status == "FAILED"


def test_what_one_of_them_leaves_behind_is_not_waited_for(store, fault):
    "A process that holds what its worker spoke through"
    number = str(3600 + os.getpid())  # of this test's own
    fault(f"orphan:{number}")
    assert fit(load("dev", OVERRIDES)).metrics["updates"] == 9
    orphans = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", number]]
    assert orphans
    for orphan in orphans:
        orphan.kill()


def test_one_that_ends_before_they_have_met(tmp_path, forking):
    "Rank 0 can't read its task, as where it has another version of the package; the other one waits for it no longer"
    write_json(tmp_path / TASK, {"config": {}, "origin": {"root": str(tmp_path)}})
    words = run_workers(
        Processes(per_node=2),
        tmp_path,
        Timing(gather=600),
        StopRequest("stopped"),
        lambda content: None,
        "the next one",
    )
    codes = {word.rank: word.code for word in words}
    assert codes in ({0: 1, 1: 75}, {0: 1, 1: 1}), codes  # it has met rank 0, and has its word, or has not
    assert "KeyError: 'name'" in reason(words).message and not any("came within" in word.message for word in words)


def test_nobody_else_gets_the_port_at_which_they_meet(tmp_path, fault):
    "Rank 0 stands still before it listens there"
    fault("none:0")
    (tmp_path / "faulty" / "sitecustomize.py").write_text("import time\ntime.sleep(3600)\n")
    stop, words = StopRequest("stopped"), []

    def run():
        words.extend(
            run_workers(Processes(per_node=2), tmp_path, Timing(shutdown=0), stop, lambda content: None, "the next")
        )

    runner = threading.Thread(target=run)
    runner.start()
    try:
        until(lambda: 0 in workers())
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", int(workers()[0].environ()["MASTER_PORT"])))
    finally:
        stop.signal = "SIGTERM"
        runner.join(600)
    assert [word.code for word in words] == [75, 75]


def test_one_that_is_stopped_before_they_have_met(tmp_path):
    "On a node whose first one is not there yet: the other one of its node stops too"
    processes = Processes(nodes=2, node=1, per_node=2, port=free_port())
    words = []

    def run():
        stop = StopRequest("stopped")
        words.extend(run_workers(processes, tmp_path, Timing(gather=600), stop, lambda content: None, "the next one"))

    runner = threading.Thread(target=run)
    runner.start()
    until(lambda: len([one for one in workers().values() if catches_sigterm(one)]) == 2)
    workers()[2].terminate()
    runner.join(600)
    assert not runner.is_alive() and [word.code for word in words] == [75, 75]


def catches_sigterm(process):
    "Whether Python has come so far in it"
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1


def test_whoever_started_them_is_killed(store, real_pair):
    command = [sys.executable, "-m", "gpuml", "train", "dev", *LONG]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("training loss" in line for line in process.stderr), process.wait()
            left = workers(process.pid)
            assert len(left) == 2
        finally:
            process.kill()
    until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in left.values()))


@contextmanager
def node_1(project, monkeypatch):
    "A second node, whose project is a copy; yields its folder, and a function that waits for its agent's exit code"
    names = {"GPUML_NODES": "2", "GPUML_GPUS": "1", "GPUML_HOST": "127.0.0.1", "GPUML_PORT": str(free_port())}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    folder = project.parent / f"{project.name}-node-1"
    shutil.copytree(project, folder)
    environ = {**os.environ, "JOB_COMPLETION_INDEX": "1"}
    agent = subprocess.Popen([sys.executable, "-c", AGENT], cwd=folder, env=environ)
    try:
        yield folder, agent
    finally:
        agent.terminate()
        try:
            agent.wait(600)
        finally:
            agent.kill()


def test_two_nodes(store, forking, monkeypatch):
    "A notebook may train twice, and an error of node 1 is raised here; its agent goes on in the next pod"
    with node_1(store.parent, monkeypatch) as (folder, agent):
        for _ in range(2):
            assert fit(load("dev", OVERRIDES)).metrics["updates"] == 9
        with open(folder / "data" / "a.csv", "a") as f:
            f.write("a text without a label\n")
        with pytest.raises(DataError, match=r"a\.csv"):
            fit(load("dev", OVERRIDES))
        assert agent.wait(600) == Exit.INTERRUPTED


def test_a_node_that_does_not_come(store, forking, monkeypatch):
    for name, value in {"GPUML_NODES": "2", "GPUML_HOST": "x", "GPUML_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPUML_GATHER_MINUTES", "0.02")
    with pytest.raises(Preempted, match="only 1 of 2 processes came"):
        fit(load("dev", OVERRIDES))
    with pytest.raises(GpumlError, match="GPUML_HOST"):
        monkeypatch.setenv("GPUML_HOST", "")
        fit(load("dev", OVERRIDES))
