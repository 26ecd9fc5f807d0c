"""`gpuml.job()`: loops of a notebook's own are stopped and killed at steps, and end in the same bits; what can't go well is refused.

A loop stops itself: it asks its runner, or kills its kernel, so that no test depends on how fast anything is.
"""

import hashlib
import json
import os
import pickle
import re
import signal
from pathlib import Path

import numpy as np
import pytest

import gpuml
from gpuml.base.errors import ConfigError, DataError, Exit, GpumlError, Preempted, TrainError
from gpuml.base.loading import load
from gpuml.training import kept_state
from gpuml.training.fit import fit
from gpuml.training.own_job import OwnJob
from gpuml.training.own_run import own_run
from gpuml.training.results import load_run
from gpuml.training.run_list import read_rows
from gpuml.ui.job import packages_of
from tests.conftest import gpuml as command
from tests.conftest import runs_in
from tests.test_run import PARAMETERS, Attempt, write_notebook
from tests.test_stored import kept, move  # noqa: F401

STOP = """\
import os, signal, time

def disturb(step):
    "At the step that the test names, ask the runner to stop, or kill the kernel"
    how, _, at = os.environ.get("DISTURB", "").partition(" ")
    if at == str(step):
        if how == "kill":
            job.keeper.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGTERM)
        while not job.stop.signal:
            time.sleep(0.01)
"""
TORCH = """\
import random, gpuml, numpy as np, torch

def begin():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}

with gpuml.job("train.checkpoint_updates=1") as job:
    state = job.restore(begin())
    model, optimizer = state["model"], state["optimizer"]
    for step in job.steps(range(1, 13)):
        x = torch.from_numpy(np.random.rand(16, 4).astype(np.float32)) + random.random()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        job.log(loss=loss)
        job.score(accuracy=1 / (1 + loss.item()))
        disturb(step)
        job.save(state)
"""
SKLEARN = """\
import gpuml, numpy as np
from sklearn.linear_model import SGDClassifier

with gpuml.job("train.checkpoint_updates=1") as job:
    model = job.restore(SGDClassifier(loss="log_loss"))
    for step in job.steps(range(1, 13)):
        x = np.random.rand(32, 4)
        model.partial_fit(x, x.sum(1) > 2, classes=[False, True])
        disturb(step)
        job.save(model)
"""
DISTURBED = [
    ("stop 3", Exit.INTERRUPTED),
    ("kill 6", Exit.CRASHED),
    ("stop 7", Exit.INTERRUPTED),
    ("kill 12", Exit.CRASHED),
]


def values(state) -> list:
    "All numbers of a state"
    if isinstance(state, dict):
        import torch

        assert isinstance(state["optimizer"], torch.optim.AdamW)
        tensors = {
            **state["model"].state_dict(),
            **{f"{i}": v["exp_avg"] for i, v in enumerate(state["optimizer"].state.values())},
        }
        return [(name, tensor.tolist()) for name, tensor in tensors.items()]
    return [state.coef_.tolist(), state.intercept_.tolist(), state.t_]


@pytest.mark.parametrize("loop", [TORCH, SKLEARN], ids=["torch", "sklearn"])
def test_disturbed_at_steps_it_ends_in_the_same_bits(loop, project, store):
    write_notebook(project / "nbs" / "n.ipynb", PARAMETERS, "%load_ext gpuml", STOP, loop, "print('behind the loop')")
    about = {"format": 1, "notebook": "nbs/n.ipynb", "config": "dev", "root": ".", "path": [".", "nbs"]}
    (project / "bundle.json").write_text(json.dumps(about))
    calm = Attempt(project, "calm")
    assert calm.end() == 0, calm.said
    for how, code in DISTURBED:
        attempt = Attempt(project, DISTURB=how)
        assert attempt.end() == code, (how, attempt.said)
        assert "Traceback (most recent call last):" not in attempt.said
        assert ("stopped at step 3 of 12, with a checkpoint" in attempt.said) == (how == "stop 3")
        assert not (project / "outputs" / "job-1" / "certificate.json").exists()
    last = Attempt(project)
    assert last.end() == 0 and "behind the loop" in last.said, last.said
    run, other = (load_run(project / "outputs" / name) for name in ("job-1", "calm"))
    assert values(run.state()) == values(other.state())
    proof = run.certificate
    assert (proof["done_updates"], proof["planned_updates"], proof["attempts"]) == (12, 12, 5)
    assert proof["state"]["sha256"] == hashlib.sha256((run.folder / "state" / "state.pkl").read_bytes()).hexdigest()
    assert ("scikit-learn" in proof["versions"]) == (loop == SKLEARN) and proof["data_files"][0][1] == "a.csv"
    assert not (run.folder / "checkpoints").exists()
    check_record(store, has_loss=loop == TORCH)
    again = Attempt(project)
    assert again.end() == 0 and "its steps are not done again" in again.said, again.said
    assert load_run(project / "outputs" / "job-1").certificate == proof


def check_steps(store: Path, metric: str, last: int, name: str = "") -> None:
    "Each step is in MLflow's only run of this name exactly once, in its order"
    import mlflow

    (run,) = [r for r in runs_in(store) if name in ("", r.info.run_name)]
    history = mlflow.MlflowClient(f"sqlite:///{store}").get_metric_history(run.info.run_id, metric)
    assert [m.step for m in history] == list(range(1, last + 1)), metric


def check_record(store: Path, has_loss: bool) -> None:
    "One MLflow run, whose steps never repeat or go back"
    import mlflow

    (run,) = [r for r in runs_in(store) if r.info.run_name == "job-1"]
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    for metric in ("step_seconds", "loss") if has_loss else ("step_seconds",):
        check_steps(store, metric, 12, "job-1")
    assert (run.info.status, run.data.tags["gpuml.loop"]) == ("FINISHED", "own")
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"certificate.json", "code.txt", "config.yaml"}


# ---- by hand


def count(*words, resume=False, stop_at=None, last=5, number=signal.SIGTERM):
    "A loop that adds up its steps; it stops itself"
    with gpuml.job(*words, resume=resume) as job:
        state = job.restore({"sum": 0})
        for step in job.steps(range(1, last + 1)):
            state["sum"] += step
            if step == stop_at:
                os.kill(os.getpid(), number)
            job.save(state)
    return load_run(job.setting.start.folder)


def test_stopped_by_hand_it_goes_on_where_it_is_asked_to(store):
    with pytest.raises(
        Preempted, match=r"stopped at step 3 of 5; the same cell with `gpuml.job\(resume=True\)` goes on there"
    ):
        count(stop_at=3, number=signal.SIGINT)
    done = count(resume=True)
    assert (done.state(), done.certificate["attempts"]) == ({"sum": 15}, 2)
    assert count(resume=True).id != done.id  # nothing was interrupted: a new one
    with pytest.raises(ConfigError, match="is finished; load_run"):
        count(resume=done.id)
    with pytest.raises(ConfigError, match="no run 'dev-1'"):
        count(resume="dev-1")


def test_a_notebook_goes_on_with_its_own_run(store, monkeypatch):
    "Two notebooks of one config: each takes up what it has begun, unless another is named"
    monkeypatch.setenv("JPY_SESSION_NAME", str(store.parent / "nbs" / "first.ipynb"))
    with pytest.raises(Preempted):
        count(stop_at=3)
    (folder,) = (store.parent / "outputs").iterdir()
    monkeypatch.setenv("JPY_SESSION_NAME", str(store.parent / "nbs" / "second.ipynb"))
    other = count(resume=True)
    assert (other.certificate["attempts"], other.id == folder.name) == (1, False)
    named = count(resume=folder.name)
    assert "was begun by nbs/first.ipynb, and goes on in nbs/second.ipynb" in str(named.metrics["notes"])


def test_a_record_that_is_damaged_is_none(store):
    with pytest.raises(Preempted):
        count(stop_at=3)
    (record,) = store.parent.glob("outputs/*/tracking.json")
    record.write_text("{")
    with pytest.raises(ConfigError, match="tracking.json is damaged; start a new run"):
        count(resume=record.parent.name)
    assert count(resume=True).certificate["attempts"] == 1


def test_another_machine_goes_on_with_what_is_on_s3(kept, store, monkeypatch):  # noqa: F811
    with pytest.raises(Preempted):
        count(stop_at=3)
    move(monkeypatch)
    done = count(resume=True)
    assert (done.state(), done.certificate["attempts"], done.place) == ({"sum": 15}, 2, f"{kept}/{done.id}")
    check_steps(store, "step_seconds", 5)
    move(monkeypatch)
    assert load_run(f"{kept}/{done.id}").state() == {"sum": 15}


def test_runs_of_two_kinds_do_not_take_each_other_up(store):
    with pytest.raises(Preempted):
        count(stop_at=3)
    (folder,) = (store.parent / "outputs").iterdir()
    with pytest.raises(ConfigError, match="no interrupted run"):
        fit(load("dev"), resume="latest")
    with pytest.raises(
        ConfigError, match=rf"not trained this way; `gpuml.job\(resume='{folder.name}'\)` goes on with it"
    ):
        fit(load("dev"), resume=folder.name)
    (row,) = read_rows([load("dev")]).rows
    assert (row.state, row.updates) == ("interrupted", 3)


def test_changed_data_and_config_are_refused(store):
    with pytest.raises(Preempted):
        count(stop_at=3)
    with pytest.raises(ConfigError, match="started with another config(?s:.*)train.seed: 42 → 7"):
        count("train.seed=7", resume=True)
    with open(store.parent / "data" / "a.csv", "a") as f:
        f.write("one more,billing\n")
    with pytest.raises(ConfigError, match=r"the data changed since the checkpoint of dev-.*a.csv"):
        count(resume=True)


def test_a_damaged_checkpoint_is_passed_over(store):
    with pytest.raises(Preempted):
        count("train.checkpoint_updates=1", stop_at=4)
    *_, newest = sorted(store.parent.glob("outputs/*/checkpoints/step-*/state.pkl"))
    newest.write_bytes(b"")
    done = count(resume=True)
    assert done.state() == {"sum": 15} and any("is damaged" in note for note in done.metrics["notes"])


def test_a_loop_that_is_left_early(store):
    with gpuml.job() as job:
        state = job.restore([])
        for step in job.steps(range(10)):
            if step == 4:
                break
            state.append(step)
            job.log(loss=1 / (1 + step))
            job.save(state)
        job.score(accuracy=0.75)
    run = load_run(job.setting.start.folder)
    assert run.state() == [0, 1, 2, 3] and run.certificate["stopped_early"]
    assert (run.certificate["done_updates"], run.certificate["evaluation"]) == (4, {"accuracy": 0.75})
    assert "4 of 10 steps" in repr(run) and "<table" in run._repr_html_()
    shown = command("runs", run.id, cwd=store.parent)
    assert "4 of 10 steps" in shown.stdout, shown.stdout + shown.stderr
    with pytest.raises(GpumlError, match="a loop of its notebook's own has trained it"):
        run.predict(["a text"])
    with pytest.raises(GpumlError, match="a loop of its notebook's own has trained it"):
        run.evaluate("a.csv", name="spring")


def test_without_steps_and_state_it_is_certified_for_what_it_is(store):
    with gpuml.job(data=False) as job:
        (job.model_folder / "answer.txt").write_text("42")
    run = load_run(job.setting.start.folder)
    proof = run.certificate
    assert (proof["state"], proof["done_updates"], proof["data_files"]) == (None, 0, None)
    assert run.state() is None and (run.model_folder / "answer.txt").read_text() == "42"


def test_a_stop_before_the_loop_ends_the_cell_at_once(store):
    with pytest.raises(Preempted, match="stopped; no state was saved, so the same cell"), gpuml.job() as job:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError(job)


def test_steps_that_save_nothing_are_done_again(store):
    with pytest.raises(Preempted, match="stopped at step 2 of 5; no state was saved"), gpuml.job() as job:
        for step in job.steps(range(1, 6)):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)


REFUSED = {
    "state['f'], a function, can't be saved": lambda job: [job.save({"f": lambda: 0}) for _ in job.steps([1])],
    "step 1 was saved already": lambda job: [(job.save(0), job.log(loss=1)) for _ in job.steps([1, 2])],
    "loss is a str, and not a number": lambda job: job.log(loss="low"),
    "does not say how many steps it has; add total=": lambda job: job.steps(iter([1])),
    "a job has one loop of steps": lambda job: (job.steps([1]), job.steps([1])),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_leaves_nothing(message, store):
    with pytest.raises(TrainError, match=re.escape(message)), gpuml.job() as job:
        REFUSED[message](job)
    assert not list(store.parent.glob("outputs/*/certificate.json"))


def test_who_goes_on_has_to_restore(store):
    with pytest.raises(Preempted):
        count(stop_at=3)
    with pytest.raises(TrainError, match=r"goes on where it was; call job.restore"), gpuml.job(resume=True) as job:
        job.steps(range(5))


# ---- stops at other places than in a step


class Signals:
    "A value that is read by asking its process to stop"

    def __reduce__(self):
        return os.kill, (os.getpid(), signal.SIGTERM)


def test_a_stop_while_the_state_is_read_is_a_stop(store):
    with pytest.raises(Preempted, match="stopped at step 1 of 3"), gpuml.job() as job:
        for _ in job.steps(range(3)):
            job.stop.signal = "SIGTERM"
            job.save({"slow": Signals()})
    with pytest.raises(Preempted, match="goes on there"), gpuml.job(resume=True) as job:
        job.restore()


def test_a_stop_while_a_state_is_written_behind_the_steps_ends_the_cell(store):
    with pytest.raises(Preempted, match="stopped; the same cell"), gpuml.job() as job:
        with job.stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            job.keep(1)
        raise AssertionError(job)


def test_a_stop_in_a_step_that_is_left_is_heeded_behind_it(store):
    with pytest.raises(Preempted, match="stopped at step 1 of 5"), gpuml.job() as job:
        for step in job.steps(range(1, 6)):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                break
            job.save(step)
        job.score(accuracy=1)
        raise AssertionError(job)


def drawn(resume=False, stop_at=None):
    "What a loop sums up whose items are drawn as they are needed"
    with gpuml.job(resume=resume) as job:
        state = job.restore([])
        items = (np.random.rand() for _ in range(6))
        for number, item in enumerate(job.steps(items, total=6), len(state) + 1):
            state.append((item, np.random.rand()))
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            job.save(state)
        state = [*state, np.random.rand()]
    return state


def test_items_that_are_drawn_are_the_same_again(store):
    calm = drawn()
    with pytest.raises(Preempted):
        drawn(stop_at=4)
    assert drawn(resume=True) == calm


def test_a_tensor_of_a_device_that_is_not_here_comes_into_memory():
    import torch

    storage = torch.UntypedStorage(4)
    places = ["cpu", f"cuda:{torch.cuda.device_count()}"]
    assert [kept_state._moved(storage, place) is None for place in places] == [True, False]


def test_files_in_folders_of_the_model_come_back_from_s3(kept, store, monkeypatch):  # noqa: F811
    with own_run(load("dev"), job=OwnJob("nightly")) as job:
        for step in job.steps([1]):
            (job.model_folder / "folds" / "0").mkdir(parents=True)
            (job.model_folder / "folds" / "0" / "weights.txt").write_text("7")
            job.save({"step": step})
    move(monkeypatch)
    run = load_run(f"{kept}/nightly")
    assert (run.model_folder / "folds" / "0" / "weights.txt").read_text() == "7"
    move(monkeypatch)
    with own_run(load("dev"), job=OwnJob("nightly")) as job:
        assert (job.restore(), [*job.steps([1])]) == ({"step": 1}, [])


def test_a_state_that_is_not_the_certified_one_is_not_read(store):
    run = count()
    (run.folder / "state" / "state.pkl").write_bytes(pickle.dumps({"sum": 1000}))
    with pytest.raises(DataError, match="is not the state that certificate.json names"):
        run.state()


def test_steps_that_are_done_again_are_recorded_once(store):
    "After an error four steps behind the only checkpoint"
    with pytest.raises(ZeroDivisionError), gpuml.job() as job:
        state = job.restore({"sum": 0})
        for step in job.steps(range(1, 6)):
            state["sum"] += step // (step != 5)
            job.log(loss=step)
            job.save(state)
    done = count(resume=True)
    assert (done.state(), done.certificate["done_updates"], done.certificate["attempts"]) == ({"sum": 15}, 5, 2)
    check_steps(store, "step_seconds", 5)


class Proxy:
    "A value that can't be asked for anything yet, as a web framework's `request`"

    def __getattribute__(self, name):
        raise RuntimeError("outside of a request")


def test_a_variable_that_answers_nothing_is_passed_over():
    assert packages_of({"request": Proxy(), "np": np, "test": pytest.fixture}) == ("numpy", "pytest")
