"""Interruptions: what is stopped goes on exactly, what is damaged is noticed, what is unfinished is never shown as done.

Runs are killed in processes of their own, forked from a server that has imported everything.
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from gpuml.base.errors import ConfigError, Exit, Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training import attempts
from gpuml.training.fit import fit
from gpuml.training.results import load_run
from tests import forked
from tests.conftest import ENDLESS, gpuml, runs_in
from tests.standing import hold_imports
from tests.waiting import until

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["gpuml.training.fit", "torch", "gpuml.training.loop", "mlflow", "sklearn.metrics", "tests.conftest"]
)
OVERRIDES = ["train.epochs=3", "train.checkpoint_updates=2"]  # 9 updates


def result(run):
    "All that an interruption must not change, as one text"
    m = run.metrics
    weights = hashlib.sha256((run.model_folder / "model.safetensors").read_bytes()).hexdigest()
    keep = ("loss", "accuracy", "macro_f1", "train_loss", "history", "curve", "confusion", "epoch", "updates")
    return json.dumps([weights, {k: m[k] for k in keep}, (run.folder / "predictions.csv").read_text()])


CALM = []


@pytest.fixture
def undisturbed(store):
    "What the config gives when nothing interferes; the same in every project, so it is computed once"
    if not CALM:
        CALM.append(result(fit(load("dev", [*OVERRIDES, "output=undisturbed", "tracking.experiment=undisturbed"]))))
    return CALM[0]


def recorded(store):
    "The runs of the experiment under test"
    return [r for r in runs_in(store) if r.data.params.get("tracking.experiment") == "test"]


def check_steps(store, run):
    "Each step is in MLflow exactly once"
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store}")
    for key, steps in (("loss", list(range(1, 10))), ("validation_loss", [3, 6, 9])):
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == steps, key


def finish(store, attempts=10):
    "Resume until it is done"
    for _ in range(attempts):
        try:
            return fit(load("dev", OVERRIDES), resume="latest")
        except Preempted:
            continue
    raise AssertionError("never done")


def stop_at(*moments):
    "A watch that sends SIGTERM once at each moment: a number of updates, or a phase"
    left = list(moments)

    def watch(progress):
        if left and (progress.phase == left[0] if isinstance(left[0], str) else progress.step >= left[0]):
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.mark.parametrize("moment", ["training", 1, 3, 4, 8, "evaluating", "saving"])
def test_sigterm_then_resume_changes_nothing(moment, store, undisturbed):
    with pytest.raises(Preempted) as e:
        fit(load("dev", OVERRIDES), watch=stop_at(moment))
    assert e.value.exit_code == Exit.INTERRUPTED
    (run,) = recorded(store)
    assert run.info.status == "KILLED"
    (folder,) = (store.parent / "outputs").iterdir()
    assert not (folder / "certificate.json").exists()
    (stopped,) = attempts.read(Storage(), str(folder))
    assert (stopped.exit_code, stopped.finished > "") == (75, True) and stopped.checkpoint == stopped.updates
    done = fit(load("dev", OVERRIDES), resume="latest")
    assert done.folder == folder and result(done) == undisturbed
    first, last = attempts.read(Storage(), str(folder))
    assert first == stopped and (last.exit_code, last.updates, last.gpus) == (0, 9, 0) and last.owner
    (run,) = recorded(store)
    assert run.info.status == "FINISHED"
    check_steps(store, run)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("moment", ["data", "model"])
def test_sigterm_before_training_leaves_nothing(moment, store):
    with pytest.raises(Preempted, match="before the first update"):
        fit(load("dev", OVERRIDES), watch=stop_at(moment))
    assert not (store.parent / "outputs").exists() and not recorded(store)


def test_several_interruptions(store, undisturbed):
    for moment in (2, 5, "evaluating"):
        with pytest.raises(Preempted):
            fit(load("dev", OVERRIDES), watch=stop_at(moment), resume="latest" if moment != 2 else None)
    assert result(finish(store)) == undisturbed


def test_a_tie_across_an_interruption(store):
    "Which of equally good epochs is kept does not depend on attempts; and progress goes on where it was"
    more = [*OVERRIDES, "train.best_metric=accuracy", "train.learning_rate=1e-6"]  # every epoch is a tie
    calm = fit(load("dev", [*more, "output=calm"]))
    with pytest.raises(Preempted):
        fit(load("dev", more), watch=stop_at(4))
    epochs = []
    done = fit(load("dev", more), resume="latest", watch=lambda p: p.phase == "training" and epochs.append(p.epoch))
    assert len({e["accuracy"] for e in calm.metrics["history"]}) == 1
    assert result(done) == result(calm) and epochs[0] > 1


def train_in_child(folder, resume, started, more=(), environment=()):
    os.environ.update(environment)  # the fork server's is that of the first test
    os.chdir(folder)
    started.set()
    try:
        fit(load("dev", [*OVERRIDES, *more]), resume=resume)
    except Preempted:
        os._exit(75)
    os._exit(0)


def kill_after(folder, seconds, number, resume):
    "Train in a process of its own, and send it a signal; returns its exit code"
    started = CONTEXT.Event()
    child = CONTEXT.Process(target=train_in_child, args=(str(folder), resume, started, (), dict(os.environ)))
    child.start()
    started.wait(600)
    child.join(seconds)
    if child.is_alive():
        os.kill(child.pid, number)
    child.join(600)
    return child.exitcode


@pytest.mark.parametrize("seed", range(3))
def test_kill_at_random_moments(seed, store, undisturbed):
    "SIGKILL at moments spread over the run, up to three times, then on to the end"
    rng = random.Random(seed)
    for _ in range(1 + seed):
        known = list((store.parent / "outputs").glob("*/tracking.json"))
        code = kill_after(store.parent, rng.uniform(0.1, 2.5), signal.SIGKILL, "latest" if known else None)
        assert code in (-9, 0)
        folders = list((store.parent / "outputs").glob("*/certificate.json"))
        if folders:  # nothing is left to go on with; it may have been killed after that all the same
            break
    if folders:
        done = load_run(folders[0].parent)
    elif list((store.parent / "outputs").glob("*/tracking.json")):
        done = finish(store)
    else:
        done = fit(load("dev", OVERRIDES))
    assert result(done) == undisturbed
    gpuml("sync", cwd=store.parent)
    (run,) = recorded(store)
    assert run.info.status == "FINISHED"
    check_steps(store, run)


def interrupted(store, at=7):
    "The folder of a run that was stopped, with two checkpoints"
    with pytest.raises(Preempted):
        fit(load("dev", [*OVERRIDES, "train.checkpoint_updates=1"]), watch=stop_at(at))
    (folder,) = (store.parent / "outputs").iterdir()
    return folder, sorted((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped byte", "cut off", "gone"])
def test_damaged_checkpoint_is_passed_over(file, how, store, undisturbed):
    folder, saved = interrupted(store)
    assert len(saved) == 2
    path = saved[-1] / file
    raw = bytearray(path.read_bytes())
    if how == "flipped byte":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif how == "cut off":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        path.unlink()
    done = fit(load("dev", OVERRIDES), resume="latest")
    assert result(done) == undisturbed
    assert any(f"the checkpoint {saved[-1].name} is damaged" in note for note in done.metrics["notes"])


def test_all_checkpoints_damaged_starts_over_and_says_so(store, undisturbed):
    _, saved = interrupted(store)
    for path in saved:
        (path / "manifest.json").write_text("{")
    done = fit(load("dev", OVERRIDES), resume="latest")
    assert result(done) == undisturbed
    assert sum("is damaged" in note for note in done.metrics["notes"]) == 2


@pytest.mark.parametrize(
    "change", ["train.epochs=4", "train.learning_rate=1e-4", "train.seed=1", "train.batch_size=4", "data.max_length=20"]
)
def test_changed_config_is_refused(change, store):
    interrupted(store, at=2)
    with pytest.raises(ConfigError, match="was started with another config") as e:
        fit(load("dev", [*OVERRIDES, change]), resume="latest")
    assert change.split("=")[0] in str(e.value) and e.value.exit_code == Exit.BAD_CONFIG


def test_harmless_changes_are_not(store, undisturbed):
    interrupted(store, at=2)
    other = ["train.checkpoint_updates=9", "tracking.log_model=false", "compute.gpus=0"]
    assert result(fit(load("dev", [*OVERRIDES, *other]), resume="latest")) == undisturbed


def test_changed_data_is_refused(store):
    interrupted(store, at=2)
    with open(store.parent / "data" / "a.csv", "a") as f:
        f.write("one more,billing\n")
    with pytest.raises(ConfigError, match="the data changed since the checkpoint .*rows: .* → "):
        fit(load("dev", OVERRIDES), resume="latest")


def test_nothing_to_resume(store):
    with pytest.raises(ConfigError, match="no interrupted run of the config 'dev'"):
        fit(load("dev"), resume="latest")
    with pytest.raises(ConfigError, match="no run 'dev-20260101-000000-0000'"):
        fit(load("dev"), resume="dev-20260101-000000-0000")
    done = fit(load("dev", ["train.epochs=1"]))
    with pytest.raises(ConfigError, match="is finished"):
        fit(load("dev", ["train.epochs=1"]), resume=done.id)


def test_dead_run_is_closed_by_the_next_command(store):
    "SIGKILL leaves RUNNING in MLflow; the next training sees it, and says the truth"
    started = CONTEXT.Event()
    child = CONTEXT.Process(target=train_in_child, args=(str(store.parent), None, started, [ENDLESS]))
    child.start()
    until(lambda: not child.is_alive() or [r for r in recorded(store) if r.data.metrics])
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert recorded(store)[0].info.status == "RUNNING"
    assert gpuml("sync", cwd=store.parent).returncode == 0
    assert recorded(store)[0].info.status == "KILLED"
    assert recorded(store)[0].data.tags["gpuml.reason"] == "its process ended without a word"
    (folder,) = (store.parent / "outputs").iterdir()
    (killed,) = attempts.read(Storage(), str(folder))
    assert killed.is_open and killed.exit_code is None


def test_command_ends_with_75_and_resumes(store):
    "The process as a scheduler sees it: SIGTERM, exit 75, the same command with --resume, exit 0"
    import subprocess

    command = [forked.python(), "-m", "gpuml", "train", "dev", *OVERRIDES, ENDLESS]
    process = subprocess.Popen(command, cwd=store.parent, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if re.search(r"update [1-9]", line):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == Exit.INTERRUPTED and "--resume` goes on there" in said and "Traceback" not in said
    gpuml("sync", cwd=store.parent)  # a busy machine has not imported MLflow by then
    (run,) = recorded(store)
    assert run.info.status == "KILLED"


def test_sigterm_while_importing(store):
    import subprocess
    import sys

    for delay in (0.0, 0.5, 1.5, 3.0):  # from the moment when the command listens; before it, there is nothing to lose
        command = [sys.executable, "-m", "gpuml", "train", "dev", ENDLESS]
        process = subprocess.Popen(command, cwd=store.parent, stderr=subprocess.PIPE, text=True)
        status = Path(f"/proc/{process.pid}/status")
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=600)[1]
        assert process.returncode == Exit.INTERRUPTED, said
        assert "Traceback" not in said


@pytest.mark.parametrize("module, told", [("pydantic_core", "gpuml: interrupted"), ("torch.nn", "nothing was lost")])
def test_ctrl_c_while_importing(module, told, store, tmp_path, monkeypatch):
    import subprocess
    import sys

    command = [str(Path(sys.executable).with_name("gpuml")), "train", "dev"]
    importing = hold_imports(tmp_path, monkeypatch, module, "gpuml train")
    process = subprocess.Popen(command, cwd=store.parent, stderr=subprocess.PIPE, text=True)
    importing.wait()
    process.send_signal(signal.SIGINT)
    importing.release()
    said = process.communicate(timeout=600)[1]
    assert process.returncode == Exit.INTERRUPTED and said.endswith(f"{told}\n") and "Traceback" not in said, said


def test_registered_once_and_only_when_certified(store):
    import mlflow

    overrides = [*OVERRIDES, "tracking.register=tickets"]
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    with pytest.raises(Preempted):
        fit(load("dev", overrides), watch=stop_at("saving"))
    assert not client.search_registered_models()
    done = fit(load("dev", overrides), resume="latest")
    (version,) = client.search_model_versions("name = 'tickets'")
    assert version.run_id == recorded(store)[0].info.run_id
    assert Path(done.folder / "certificate.json").exists()
    record = json.loads(
        (done.folder / "tracking.json").read_text()
    )  # as if it had been killed right before it noted that
    (done.folder / "tracking.json").write_text(json.dumps({**record, "registered": None, "told": "RUNNING"}))
    assert gpuml("sync", cwd=store.parent).returncode == 0
    assert len(client.search_model_versions("name = 'tickets'")) == 1
