"A sweep: refused before anything starts, stopped and continued, halved without a bit's difference, one family in MLflow"

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from gpuml.base.errors import ConfigError, Preempted
from gpuml.base.line import parse_words
from gpuml.base.loading import load, load_all
from gpuml.base.storage import Storage
from gpuml.cluster.sweep_jobs import current_sweep, watch_sweep
from gpuml.training.attempts import Attempt, content
from gpuml.training.fit import fit
from gpuml.training.results import load_run
from gpuml.training.run_list import read_rows
from gpuml.training.sweep import SweepFile
from gpuml.training.sweep_rows import find_sweep
from gpuml.ui.sweep_line import sweep_of, train_line
from gpuml.ui.sweep_table import open_sweep
from tests import forked
from tests.conftest import ENDLESS, gpuml, runs_in
from tests.test_local import shipped  # noqa: F401
from tests.test_run import PARAMETERS, write_notebook
from tests.waiting import until

RATES = "train.learning_rate=1e-3,4e-3"


def train(*words, watch=None, halving=False):
    "What a line comes to, watched by one watch for all runs"
    return train_line(parse_words(["dev", *words]), lambda: watch, halving, say=lambda text: None)


def stop_in(run: int):
    "A watch that stops the sweep at an update of this run"
    asked = []

    def watch(progress):
        if progress.sweep.startswith(f"{run} ") and progress.step >= 2 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))

    return watch


def test_a_bad_value_is_refused_before_anything_starts(project):
    done = gpuml("train", "train.learning_rate=1e-3,4", "train.seed=0,1", cwd=project)
    assert done.returncode == 78 and "train.learning_rate=4: train.learning_rate: must be at most 1" in done.stderr
    other = project / "config" / "none"
    done = gpuml("train", f"model.name={load('dev').model.name},{other}", cwd=project)
    assert done.returncode == 66 and "no such folder" in done.stderr
    assert not (project / "outputs").exists()


def test_stopped_and_continued(project, store):
    with pytest.raises(Preempted, match=r"run 2 of 4: stopped at update \d of 6"):
        train(RATES, "train.seed=0,1", watch=stop_in(2))
    first = next(row for row in read_rows(load_all()).rows if row.state == "finished")
    certificate = project / "outputs" / first.run / "certificate.json"
    before = certificate.stat().st_mtime_ns
    statuses = {run.info.run_name: run.info.status for run in runs_in(store)}
    assert sorted(statuses.values()) == ["FINISHED", "KILLED", "KILLED"]  # a run, the stopped one, the sweep

    with pytest.raises(ConfigError, match="no interrupted sweep of these values"):
        train("train.seed=0,1", "--resume")
    begun = []
    how = "train.checkpoint_updates=7"  # no result depends on it: what goes on takes it from the line
    table = train("--resume", how, watch=lambda p: p.phase == "training" and begun.append(p.sweep))
    assert [load_run(run).config.train.checkpoint_updates for run in table.file.sweep.runs[1:]] == [50, 7, 7]
    assert set(begun) == {"2 of 4", "3 of 4", "4 of 4"} and certificate.stat().st_mtime_ns == before
    assert [row.state for row in table.rows] == ["finished"] * 4 and table.file.is_over
    assert table.best.id == table.best_row.run and [len(group.rows) for group in table.seeds] == [2, 2]
    whole = fit(load("dev", ["train.learning_rate=1e-3", "train.seed=1"]))
    assert weights(load_run(table.file.sweep.runs[1])) == weights(whole)
    assert {row.sweep for row in read_rows(load_all()).rows} == {table.file.sweep.id, ""}

    runs = {run.info.run_name: run for run in runs_in(store)}
    parent = runs[table.file.sweep.id]
    children = [run for run in runs.values() if "mlflow.parentRunId" in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert len(children) == 4 and parent.info.status == "FINISHED"
    assert parent.data.metrics["macro_f1"] == max(run.data.metrics["macro_f1"] for run in children)


def weights(run) -> dict[str, bytes]:
    "A run's weights, as bytes by name"
    tensors = load_file(run.folder / "model" / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["Reviews_of_2026", "all-reviews-of-the-second-half-of-2026"])
def test_any_name_of_a_config(name, project):
    shutil.copy(project / "config" / "dev.yaml", project / "config" / f"{name}.yaml")
    new = sweep_of(parse_words([name, "train.seed=" + ",".join(map(str, range(120)))]))
    assert len(set(new.sweep.runs)) == 120 and max(map(len, new.sweep.runs)) <= 52
    new.save()
    assert sweep_of(parse_words([name, "--resume"])).sweep.id == new.sweep.id


def test_halving_goes_on_exactly(project, store):
    line = ["train.learning_rate=1e-4,1e-3,4e-3", "train.epochs=4"]
    epochs = []

    def watch(progress):
        if progress.phase in ("paused", "done"):
            epochs.append((progress.sweep, len(progress.evaluations)))

    table = train(*line, halving=True, watch=watch)
    assert [part for part in epochs if part[1] == 1] == [("1 of 3", 1), ("2 of 3", 1), ("3 of 3", 1)]
    assert [e for _, e in epochs] == [1, 1, 1, 2, 2, 4]
    best, *others = table.rows
    assert best.state == "finished" and {row.state for row in others} == {"paused"}
    assert all(row.scores for row in others)
    assert sorted(row.state for row in read_rows(load_all()).rows) == ["finished", "paused", "paused"]
    value = best.config["train.learning_rate"]
    plain = fit(load("dev", [f"train.learning_rate={value}", "train.epochs=4"]))
    assert weights(table.best) == weights(plain)
    parent = next(run for run in runs_in(store) if run.info.run_name == table.file.sweep.id)
    assert parent.info.status == "FINISHED"
    left_out = train_line(parse_words(["--resume", others[0].run]), lambda: None)
    assert len(left_out.metrics["history"]) == 4  # no work is lost: it can still be trained to its end


def test_one_sweep_in_the_list_and_by_name(project, store):
    table = train("train.seed=0,1", "train.epochs=1")
    sweep = table.file.sweep.id
    shown = gpuml("runs", sweep, cwd=project)
    assert shown.returncode == 0 and f"over 2 seeds; its best run is {table.best_row.run}" in shown.stdout
    assert sweep in gpuml("runs", cwd=project).stdout
    text = (project / "config" / "dev.yaml").read_text()
    prod = project / "config" / "prod.yaml"
    prod.write_text(text.replace("output: outputs", "output: s3://models/production"))  # whose keys nobody has here
    for name in (sweep, table.best_row.run):
        shown = gpuml("runs", name, cwd=project)
        assert shown.returncode == 0 and table.best_row.run in shown.stdout, shown.stderr
    assert gpuml("delete", table.best_row.run, "--dry-run", cwd=project).returncode == 0
    prod.unlink()
    shutil.rmtree(project / "outputs" / table.file.sweep.runs[0])
    assert "not begun" in gpuml("runs", sweep, cwd=project).stdout
    file = project / "outputs" / ".sweeps" / f"{sweep}.json"
    whole = file.read_text()
    for damaged in (whole[:-9], whole.replace('"train": {', '"train": {"key_of_tomorrow": 1, ')):
        file.write_text(damaged)
        shown = gpuml("runs", sweep, cwd=project)
        assert shown.returncode == 65 and "damaged, or written by another version" in shown.stderr
        assert gpuml("train", "--resume", sweep, cwd=project).returncode == 65
        assert "no interrupted run" in gpuml("train", "--resume", cwd=project).stderr
    file.write_text(whole)
    gone = gpuml("delete", sweep, "--yes", cwd=project)
    assert gone.returncode == 0 and not list((project / "outputs").glob(f"{sweep}*"))
    assert gpuml("runs", sweep, cwd=project).returncode == 66


def test_a_cancelled_sweep_sends_no_more_of_its_jobs(shipped, project):  # noqa: F811
    words = ["submit", "dev", "--local", "--name", "spring", "train.seed=0,1,2", ENDLESS]
    command = [forked.python(), "-m", "gpuml", *words]
    with subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as submitted:
        spool = project / "outputs" / "spring-1-seed-0" / "metrics.jsonl"
        until(lambda: spool.exists() or submitted.poll() is not None)
        done = gpuml("cancel", "spring", cwd=project)
        assert done.returncode == 0 and "spring-1-seed-0: " in done.stdout, done.stderr
        assert "spring: 2 of its 3 runs were not sent yet, and are not sent now" in done.stdout
        text = submitted.communicate(timeout=600)[0]
    assert submitted.returncode == 75 and "3 cancelled; submitting the same again goes on" in text, text
    assert not (project / "outputs" / "spring-2-seed-1").exists()
    other = gpuml("cancel", train("train.seed=0,1", "train.epochs=1").file.sweep.id, cwd=project)
    assert other.returncode == 78 and "its runs are no jobs" in other.stderr


def test_a_sweep_whose_jobs_are_over_is_not_cancelled(project, store):
    "It stays as it is, and who wants to cancel it hears so"
    file = SweepFile(replace(train("train.seed=0,1", "train.epochs=1").file.sweep, as_jobs=True))
    file.save()
    before = Path(file.place).read_bytes()
    done = gpuml("cancel", file.sweep.id, cwd=project)
    assert done.returncode == 0 and "all of its 2 runs are over, and there is nothing to cancel" in done.stdout, done
    assert Path(file.place).read_bytes() == before


def test_who_waits_for_a_sweep_hears_of_jobs_that_are_gone_and_of_those_that_come(project):
    "How one ended that its TTL has removed its record says; one that was not sent yet is waited for, until nobody sends it"
    sweep = replace(sweep_of(parse_words(["dev", "train.seed=0,1"])).sweep, as_jobs=True)
    first, second = sweep.runs
    SweepFile(sweep, sent="2026-11-29T12:00:00+00:00").save()
    ended = Attempt(first, 1, 65, "a.csv:26: x", 2, "2026-11-29T12:01:00+00:00", "2026-11-29T12:05:00+00:00", "")
    Storage().put_bytes(content(ended), project / "outputs" / first / "attempts" / "1.json")
    looks = watch_sweep(sweep, seconds=0, patience=60, clock=iter(range(0, 600, 20)).__next__)
    states = [[state.phase for _, state in listed] for listed in looks]
    assert len(states) > 2 and set(map(tuple, states)) == {("failed", "pending")}
    table = open_sweep(current_sweep(SweepFile(sweep)))
    assert table.exit_code == 65 and [row.state for row in table.rows] == ["failed", "not begun"]
    done = replace(ended, run=second, exit_code=0, reason="")
    Storage().put_bytes(content(done), project / "outputs" / second / "attempts" / "1.json")
    assert [[state.phase for _, state in listed] for listed in watch_sweep(sweep)] == [["failed", "succeeded"]]


def test_a_job_leaves_off_where_the_others_are_better(shipped, project, store):  # noqa: F811
    rates = "train.learning_rate=4e-3,1e-9"  # the first learns, the second does not
    words = ["submit", "dev", "--local", "--halving", "--name", "autumn", rates, "train.epochs=4", "train.seed=0"]
    done = gpuml(*words, cwd=project)
    assert done.returncode == 0, done.stderr
    sweep = find_sweep("autumn", load_all()).sweep
    first, second = (load_run(project / "outputs" / run) for run in sweep.runs)
    assert (len(first.history), len(second.history)) == (4, 2)
    assert "stopped after epoch 2: 1 of the sweep's 1 other runs that came so far" in " ".join(second.metrics["notes"])
    shown = gpuml("runs", "autumn", cwd=project).stdout
    assert "left off before epoch 4, where more than half of the others were better: 2 after epoch 2" in shown
    assert "best: learning_rate=4e-3" in shown
    parent = next(run for run in runs_in(store) if run.info.run_name == "autumn")
    assert parent.info.status == "FINISHED"
    assert gpuml(*words, cwd=project).stdout.count("done before") == 2
    other = gpuml(*(word for word in words if word != "--halving"), cwd=project)
    assert other.returncode == 78 and "another sweep has this name" in other.stderr and "--halving" in other.stderr
    assert gpuml("delete", "autumn", "--yes", cwd=project).returncode == 0
    assert not list((project / "outputs").rglob("*autumn*"))


def test_another_machine_goes_on_with_a_sweep_on_s3(s3, project, store):
    text = (project / "config" / "dev.yaml").read_text().replace("output: outputs", f"output: {s3.url('out')}")
    (project / "config" / "dev.yaml").write_text(text.replace("data:\n", f"data:\n  endpoint: {s3.endpoint}\n", 1))
    with pytest.raises(Preempted):
        train(RATES, "train.epochs=4", watch=stop_in(1), halving=True)
    (project / "cache").rename(project / "other")
    table = train("--resume", "data.cache=elsewhere")  # all that it has is on S3
    assert [row.state for row in table.rows] == ["finished", "paused"] and not (project / "cache").exists()
    assert len(table.best.history) == 4 and table.best.place.startswith(s3.url("out"))
    shown = gpuml("runs", table.file.sweep.id, cwd=project)
    assert (
        shown.returncode == 0 and f"best: learning_rate={table.best_row.config['train.learning_rate']}" in shown.stdout
    )
    assert gpuml("delete", table.file.sweep.id, "--yes", cwd=project).returncode == 0
    assert not list(Storage(s3.endpoint).find(s3.url("out")))


def test_a_run_that_fails_ends_no_other(project, store):
    file = project / "data" / "a.csv"
    file.write_text((whole := file.read_text()) + "a row with no label\n")
    done = gpuml("train", "data.on_bad_row=refuse,skip", "train.epochs=1", cwd=project)
    sweep = next((project / "outputs" / ".sweeps").glob("*.json")).stem
    run, reason = f"{sweep}-1-on-bad-row-refuse", "a.csv:26: "
    assert done.returncode == 65 and f"{run} failed: " in done.stdout and reason in done.stdout, done.stderr
    assert "best: on_bad_row=skip" in done.stdout and f"1 of 2 runs failed; `--resume {sweep}` tries" in done.stdout
    runs = {run.info.run_name: run for run in runs_in(store)}
    assert [runs[name].info.status for name in sorted(runs)] == ["FINISHED", "FAILED", "FINISHED"]
    assert "1 failed" in runs[sweep].data.tags["mlflow.note.content"]
    assert reason in runs[run].data.tags["gpuml.reason"]
    file.write_text(whole)
    again = gpuml("train", "--resume", sweep, cwd=project)
    assert again.returncode == 0 and "failed" not in again.stdout, again.stderr
    assert "failed" not in next(r for r in runs_in(store) if r.info.run_name == sweep).data.tags["mlflow.note.content"]


def test_a_sweep_whose_runs_all_fail_ends_with_their_code(project):
    done = gpuml("train", "data.train=none.csv", "train.seed=0,1", cwd=project)
    assert done.returncode == 66 and "all 2 runs failed; the first one: " in done.stderr


READ = """
import sys
from gpuml.base.grid import grid_of
from gpuml.base.loading import load
from gpuml.cluster.submission import prepare
from gpuml.cluster.sweep_jobs import prepare_sweep
reads = []
sys.addaudithook(lambda event, values: reads.append(1) if event == "open" and str(values[0]).endswith("helper.py") else None)
prepare(load("dev", ["train.seed=0"]), "nbs/n.ipynb", local=True)
once = len(reads)
prepare_sweep("dev", grid_of(["train.seed=0,1,2"]), "nbs/n.ipynb", {"--local": True})
print(once, len(reads) - once)
"""


def test_each_of_its_jobs_is_prepared_once(project):
    "By how often the project's code is read, which each of them executes"
    write_notebook(project / "nbs" / "n.ipynb", PARAMETERS, "%load_ext gpuml", "import helper", "run = %gpu_train")
    (project / "helper.py").write_text("answer = 42\n")
    done = subprocess.run([sys.executable, "-c", READ], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, three = map(int, done.stdout.split())
    assert once and three == 3 * once
