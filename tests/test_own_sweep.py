"A sweep with a notebook's own model and scores: it goes on with its own code, and its own score says which run is the best"

import json
import os
import signal

import pytest

from gpuml.base.errors import ConfigError, Preempted
from gpuml.base.line import parse_words
from gpuml.base.loading import load
from gpuml.training.fit import fit
from gpuml.training.results import load_run
from gpuml.training.sweep_rows import find_sweep
from gpuml.ui.run_table import project_runs
from gpuml.ui.sweep_line import train_line
from gpuml.ui.sweep_table import SweepTable
from tests.conftest import gpuml, runs_in
from tests.own_code import CELL, cell
from tests.test_local import shipped  # noqa: F401
from tests.test_own_model import weights
from tests.test_run import PARAMETERS, write_notebook

RATES = "train.learning_rate=1e-3,1e-2"
BEST = "train.best_metric=-sure"


def train(*words, watch=None, halving=False, **own):
    "What a line comes to, with functions of the notebook"
    return train_line(parse_words(["dev", *words]), lambda: watch, halving, say=lambda text: None, own=own)


def own_of(made):
    "The functions of a cell, as `train_line` takes them"
    return {"model": made["make_model"], "metrics": made["scores"]}


def test_it_goes_on_with_its_own_code(project, store):
    made = cell()

    def stop(progress):
        if progress.sweep.startswith("2 ") and progress.step >= 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="run 2 of 2"):
        train(RATES, BEST, watch=stop, **own_of(made))
    changed = cell(CELL.replace("Dropout(0.1)", "Dropout(0.2)"))
    with pytest.raises(ConfigError, match=r"was begun with make_model and scores \(\w+\), and the line names"):
        train("--resume", **own_of(changed))
    table = train("--resume")  # with its own
    assert [row.state for row in table.rows] == ["finished"] * 2
    runs = [load_run(run) for run in table.file.sweep.runs]
    assert weights(runs[1]) == weights(fit(load("dev", ["train.learning_rate=1e-2", BEST]), **own_of(made)))
    low = min(runs, key=lambda run: run.metrics["own"]["sure"])
    assert table.best.id == low.id and table.notes()[-1].endswith(f", sure {low.metrics['own']['sure']:.3f}: {low.id}")
    assert "sure" in repr(table).splitlines()[0]
    parent = next(run for run in runs_in(store) if run.info.run_name == table.file.sweep.id)
    assert parent.data.metrics["sure"] == pytest.approx(low.metrics["own"]["sure"])
    assert "by sure" in parent.data.tags["mlflow.note.content"]
    listed = project_runs([load("dev")], sort="sure")
    assert listed.key == "own:-sure" and listed[0].scores["sure"] == low.metrics["own"]["sure"]
    shown = gpuml("runs", table.file.sweep.id, cwd=project)
    assert shown.returncode == 0 and shown.stdout.splitlines()[-1] == table.notes()[-1]


def test_halving_leaves_out_the_worse_by_it(project, store):
    table = train("train.learning_rate=1e-3,3e-3,1e-2", "train.epochs=4", BEST, halving=True, **own_of(cell()))
    assert [row.state for row in table.rows] == ["finished", "paused", "paused"]
    after_one = {run: load_epochs(project / "outputs" / run)[0]["sure"] for run in table.file.sweep.runs}
    worst = max(after_one, key=after_one.get)
    assert table.file.outcomes[worst].epochs == 1 and len(load_epochs(table.best.folder)) == 4
    assert all("sure" in outcome.scores for outcome in table.file.outcomes.values())


def load_epochs(folder):
    "The evaluations of a run, also of one that paused"
    states = sorted(folder.glob("checkpoints/*/state.json")) or [folder / "metrics.json"]
    state = json.loads(states[-1].read_text())
    return state.get("evaluations") or state["history"]


def test_a_score_that_nobody_computes_is_refused_before_anything_starts(project, store):
    with pytest.raises(ConfigError, match="train.best_metric: sure: no such score"):
        train("train.seed=0,1", "train.best_metric=sure", model=cell()["make_model"])
    assert not list((project / "outputs").glob("*")) + list((project / "outputs").glob(".sweeps/*"))


def test_without_own_code_nothing_of_it_is_written(project, store):
    table = train("train.seed=0,1", "train.epochs=1")
    values = json.loads((project / "outputs" / ".sweeps" / f"{table.file.sweep.id}.json").read_text())
    assert set(values) == {"id", "name", "config", "choices", "halving", "as_jobs", "outcomes"}
    assert all(set(outcome["scores"]) == {"loss", "accuracy", "macro_f1"} for outcome in values["outcomes"].values())


def test_as_local_jobs_each_takes_it_along(shipped, project):  # noqa: F811
    line = "run = %gpu_train --model make_model --metrics scores"
    write_notebook(shipped, PARAMETERS, "%load_ext gpuml", CELL, line)
    ended = gpuml("submit", "dev", "--local", "--wait", "--name", "own", RATES, BEST, "train.epochs=1", cwd=project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = SweepTable(find_sweep("own", [load("dev")]))
    low = min(table.file.sweep.runs, key=lambda run: load_run(run).metrics["own"]["sure"])
    assert table.best_row.run == low and ", sure 0." in table.notes()[-1]
    assert all((project / "outputs" / run / "own_code.py").exists() for run in table.file.sweep.runs)
