"The panel: real widgets, real configs, real trainings in processes of their own"

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import ipykernel.ipkernel  # noqa: F401  where widgets register; imported later, it would not know those made before
import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances as alive_widgets

from gpuml.base import charts, keys, process
from gpuml.base.errors import ConfigError, GpumlError
from gpuml.base.files import write_json
from gpuml.base.loading import load, load_all
from gpuml.base.person import person_mark
from gpuml.cluster.jobs import JobList, JobRow, jobs
from gpuml.cluster.local import LocalJob
from gpuml.cluster.manifest import Source, manifest
from gpuml.jobs.handle import State
from gpuml.training.progress import Progress
from gpuml.ui.beside import Training, find_training, start_training
from gpuml.ui.comparison import compare
from gpuml.ui.executed import notebook_html
from gpuml.ui.lines import magic_line
from gpuml.ui.metrics import MetricsFile
from gpuml.ui.panel import panel as open_panel
from gpuml.ui.panel_fields import typed
from gpuml.ui.panel_jobs import job_part, jobs_html
from gpuml.ui.panel_train import training_html
from gpuml.ui.views import VIEW_CHARACTERS, FileView, progress_html
from tests import forked
from tests.conftest import JOB_FACTS, OFFLINE, ROOT, runs_in
from tests.test_answers import KUBECONFIG, Server
from tests.waiting import until

LIVE = ("loss", "validation_loss", "accuracy", "macro_f1", "micro_f1")  # what the panel draws of a training


@pytest.fixture
def quick(monkeypatch):
    "What a panel starts is a fork of a process that has imported everything"
    monkeypatch.setattr(sys, "executable", forked.python())


@pytest.fixture
def panel(project, quick):
    "An open panel of the small project"
    made = open_panel()
    yield made
    made.close()
    if (left := find_training()) and left.alive():
        os.kill(json.loads((left.folder / "process.json").read_text())["process"][0], signal.SIGKILL)


def show(form, section: str):
    form.fields.section.value = section
    return form.fields.inputs


def test_a_change_gives_the_line_that_does_the_same(panel):
    form = panel.tabs["Train"].form
    show(form, "train")["train.epochs"].value = "5"
    form.fields.inputs["train.schedule"].value = "cosine"
    show(form, "tracking")["tracking.log_model"].value = True
    show(form, "data")["data.train"].value = "my data"
    line = "run = %gpu_train dev train.epochs=5 train.schedule=cosine tracking.log_model=true 'data.train=my data'"
    assert line.replace("'", "&#x27;") in form.summary.value
    assert form.config == load("dev", form.words[1:])
    assert (
        "differences from dev" in form.summary.value
        and "<td>train.epochs</td><td>2</td><td>5</td>" in form.summary.value
    )
    assert "gpuml-changed" in form.fields.inputs["train.epochs"]._dom_classes
    form.fields.inputs["train.epochs"].value = "2"  # what the file says is no change
    assert "train.epochs" not in " ".join(form.words)
    assert "gpuml-changed" not in form.fields.inputs["train.epochs"]._dom_classes


@pytest.mark.parametrize(
    "key, value",
    [("train.epochs", "0"), ("train.learning_rate", "0.0"), ("train.early_stopping", "soon"), ("data.text", ""),
     ("data.validation_fraction", "1.5"), ("compute.memory", "much"), ("model.dropout", "1.5"), ("data.labels", "[a, a]"),
     ("compute.namespace", "Not A Name"), ("tracking.uri", "http://me:secret@host")],
)  # fmt: skip
def test_a_wrong_value_gives_the_sentence_of_the_line(panel, key, value):
    form = panel.tabs["Train"].form
    show(form, key.split(".")[0])[key].value = value
    with pytest.raises(ConfigError) as e:
        load("dev", form.words[1:])
    assert form.wrong == str(e.value) and form.wrong.startswith(f"{key}=")
    assert "gpuml-wrong" in form.fields.inputs[key]._dom_classes
    assert panel.tabs["Train"].start.disabled and form.saving.button.disabled


def test_every_field_has_an_input_with_the_configs_words(panel):
    from gpuml.base.keys import describe, fields

    form = panel.tabs["Train"].form
    for key, info in fields().items():
        one = show(form, key.split(".")[0])[key]
        assert "`" not in one.description
        assert info.description.split("`")[0] in describe(key) and describe(key) in one.tooltip
        assert keys.parse_override(f"{key}={typed(one)}")[1] == form.fields.values[key], key
    assert form.wrong == "" and form.words == ["dev"]


def test_several_values_are_a_sweep(panel, store):
    tab = panel.tabs["Train"]
    assert tab.halving.layout.display == "none"
    inputs = show(tab.form, "train")
    inputs["train.epochs"].value = "1"
    inputs["train.seed"].value = "0, 1"
    assert tab.start.description == "Train 2 runs" and tab.halving.layout.display == ""
    assert "sweep = %gpu_train dev train.epochs=1 train.seed=0,1" in tab.form.summary.value
    assert "<td>train.seed</td><td>42</td><td>0, 1</td>" in tab.form.summary.value
    tab.halving.value = True
    tab.start.click()
    assert "--halving: compares runs before their end" in tab.view.value  # of one epoch there is no half
    inputs["train.seed"].value = "0, x"
    assert tab.start.disabled and "train.seed=x" in tab.form.wrong and tab.start.description == "Train"
    inputs["train.seed"].value = "0,1"
    tab.start.click()
    until(lambda: "its best run is" in tab.view.value)
    name = tab.training.sweep
    assert f"sweep = %gpu_runs {name}" in tab.view.value and "✓ done" in tab.view.value
    assert {run.info.run_name for run in runs_in(store)} == {name, f"{name}-1-seed-0", f"{name}-2-seed-1"}
    until(lambda: not tab.start.disabled)


def test_files_and_columns_can_be_chosen(panel, project):
    fields = panel.tabs["Train"].form.fields
    assert fields.section.value == "data" and fields.inputs["data.train"].value  # on the data first
    (project / "data").mkdir(exist_ok=True)
    (project / "data" / "new.csv").write_text("body;kind;day\nlate;delivery;1\n")
    fields.inputs["data.delimiter"].value = ";"
    fields.inputs["data.train"].value = "data/nothing.csv"  # what is not there leaves the list as it is
    fields.inputs["data.train"].value = "data"
    files = fields.choices["data.train"].list
    assert {"data", "data/new.csv"} <= set(files.options)
    files.value = "data/new.csv"
    assert fields.inputs["data.train"].value == "data/new.csv" and files.value == ""
    fields.choices["data.text"].list.value = "body"
    assert fields.choices["data.label"].list.options == ("", "body", "kind", "day")
    assert fields.changes == {"data.delimiter": ";", "data.train": "data/new.csv", "data.text": "body"}


def test_resume_waits_for_something_to_resume(panel, project):
    tab = panel.tabs["Train"]
    assert tab.resume.disabled and not tab.start.disabled
    run = project / "outputs" / "dev-20260103-080000-1a2b"
    run.mkdir(parents=True)
    (run / "tracking.json").write_text("{}")
    tab.form.pick()
    assert not tab.resume.disabled
    (run / "certificate.json").write_text("{}")
    tab.form.pick()
    assert tab.resume.disabled


def test_the_line_reaches_the_magic_as_it_was_clicked(panel):
    "Through IPython's own expansion of $name and {expression}, and the magic's splitting"
    from IPython.core.interactiveshell import InteractiveShell

    from gpuml.ui.line_words import split_line

    form, heard = panel.tabs["Train"].form, []
    for key, text in {
        "data.text": "it's $HOME {1 + 1}",
        "compute.env": '{"A": "x y"}',
        "data.label": 'a "b" ?',
    }.items():
        show(form, key.split(".")[0])[key].value = text
    shell = InteractiveShell()
    shell.register_magic_function(lambda line: heard.extend(split_line(line)), "line", "gpu_train")
    shell.run_cell(magic_line([form.magic, *form.words]))
    assert heard == form.words


def test_save_as_keeps_comments(panel, project):
    dev = project / "config" / "dev.yaml"
    dev.write_text(dev.read_text().replace("epochs: 2", "epochs: 2  # enough for the sample") + "\n# the end\n")
    form = panel.tabs["Train"].form
    form.pick()
    show(form, "train")["train.epochs"].value = "7"
    show(form, "model")["model.dropout"].value = "0"
    form.saving.name.value = "long"
    form.saving.button.click()
    text = (project / "config" / "long.yaml").read_text()
    assert "epochs: 7  # enough for the sample" in text and text.rstrip().endswith("# the end")
    assert form.name.value == "long" and form.words == ["long"] and load("long").train.epochs == 7
    form.saving.name.value = "long"
    form.saving.button.click()
    assert "config/long.yaml: is there already" in form.saving.status.value
    form.saving.name.value = "../x"
    form.saving.button.click()
    assert "is no name for a config" in form.saving.status.value and not (project / "x.yaml").exists()


def test_backticks_are_code_in_html_and_stay_in_text(panel, project):
    said = "`gpuml sync` sends what is missing < later"
    shown = "<code>gpuml sync</code> sends what is missing &lt; later"
    listed = JobList([(LocalJob("dev-1", "", None, JOB_FACTS), State("pending", said))])
    for html in (
        progress_html(Progress("dev-1", notes=[said])),
        jobs_html(listed),
        listed._repr_html_(),
    ):
        assert shown in html
    assert said in repr(listed)
    (project / "config" / "dev.yaml").write_text("- a\n")
    panel.tabs["Train"].form.pick()
    assert "such as <code>train:</code>" in panel.tabs["Train"].form.summary.value


def views_of_a_long_training(folder, size, run="dev-20261129-234705-9a8c", **changes):
    "The panel's and the notebook's HTML of one whose losses go up and down by so much"
    rng = np.random.default_rng(4)
    series = {name: [(200 * i, y) for i, y in enumerate(rng.random(3000))] for name in LIVE}
    series |= {name: [(at, 0.5 + size * y) for at, y in series[name]] for name in ("loss", "validation_loss")}
    losses = array("d", 0.5 + size * rng.random(599_800))
    scores = {"accuracy": 0.5, "macro_f1": 0.25, "micro_f1": 0.4}
    progress = Progress(
        *(run, "training", len(losses), 600_000, 9996.7, 10_000, losses),
        [{"step": at, "loss": y, **scores} for at, y in series["validation_loss"]],
        **{"examples_per_second": 12_345.6, "seconds_left": 1e5, "processes": 16},
        notes=["runs are tracked in this project's own `mlflow.db`; `gpuml ui` shows it; " * 3] * 4,
    )
    vars(progress).update(changes)
    FileView(folder / "progress.json")(progress)
    write_json(folder / "process.json", {"process": process.identity(os.getpid())})
    series |= {f"gpu_utilisation_{i}": [(1, 99.9)] for i in range(progress.gpus or 0)}
    training = Training(folder, metrics=MetricsFile(folder / run / "metrics.jsonl", series))
    return (training_html(training), 5), (progress_html(progress), 1)


@pytest.mark.parametrize("size", [0.02, 1.0, 50.0])
def test_a_long_training_is_shown_in_two_kilobytes(project, size):
    "Its curves have the points for which names, scores and notes leave room, and reach from end to end"
    for view, curves in views_of_a_long_training(project, size):
        paths = re.findall(r" d='M(\d+) \d+l([^']*)'", view)
        assert len(view) <= VIEW_CHARACTERS == 2000 and len(paths) == curves, view
        for first, steps in paths:
            across = [int(x) for x in steps.split()[::2]]
            assert len(across) >= 7 and int(first) < 60 and int(first) + sum(across) > 270, view


def test_whatever_there_is_to_say_a_view_has_two_kilobytes(project):
    "Notes and what is waited for are cut, and a note without room for a few words is left out"
    said = {"notes": ["'<`a`>' & " * 99] * 4, "doing": "S3 at 'http://minio' does not answer; " * 9, "gpus": 16}
    for view, curves in views_of_a_long_training(project, 1e5, run=f"a{'-model' * 8}-01", sweep="512 of 1,000", **said):
        assert len(view) <= VIEW_CHARACTERS and len(re.findall(r" d='M\d+ \d+l", view)) == curves, view
        assert "S3 at &#x27;http://minio" in view and view.count("<div") == view.count("</div>")


def test_a_broken_config_says_why(panel, project):
    (project / "config" / "dev.yaml").write_text("train:\n  epoch: 3\n")
    panel.tabs["Train"].form.pick()
    assert "config/dev.yaml:2: train.epoch: unknown key; did you mean" in panel.tabs["Train"].form.summary.value
    assert panel.tabs["Train"].start.disabled


@pytest.mark.parametrize("model", [OFFLINE])  # whose updates take as long as a user's, so that its curve is as long
def test_train_stop_and_resume(panel, store):
    tab = panel.tabs["Train"]
    show(tab.form, "train")["train.epochs"].value = "10000"
    tab.start.click()
    assert tab.start.disabled and not tab.stop.disabled
    until(lambda: "aria-label='loss'" in tab.view.value and "left" in tab.view.value)
    updates, shown, before = [], [], time.monotonic()
    tab.view.observe(lambda change: updates.append(len(change.new)), "value")
    tab.view.observe(lambda change: shown.append(change.new), "value")
    with pytest.raises(GpumlError, match="is at work here already; stop it first"):
        start_training(["dev"])
    until(lambda: len(updates) > 4)
    count = len(updates)  # before the time is taken
    assert count <= 4 * (time.monotonic() - before) + 1 and max(updates[:count]) <= 2000
    assert "training loss" in tab.view.value
    tab.stop.click()
    assert any("stopping: finishes this update" in html for html in shown) and tab.stop.disabled
    until(lambda: "stopped at update" in tab.view.value and not tab.start.disabled)
    assert "Resume goes on there" in tab.view.value and "the same line" not in tab.view.value
    assert "stopping" not in tab.view.value
    (run,) = runs_in(store)
    assert run.info.status == "KILLED"
    stopped = tab.training.headway.update
    show(tab.form, "train")["train.epochs"].value = "300"
    tab.resume.click()
    until(lambda: "was started with another config" in tab.view.value)
    assert "starting" not in tab.view.value and "<progress" not in tab.view.value
    until(lambda: not tab.resume.disabled)
    tab.form.pick()  # as after the kernel was restarted: the form has what the file says
    assert not tab.form.overrides
    tab.resume.click()
    until(lambda: tab.training.headway.update > stopped)
    assert tab.training.words[-1] == "--resume"
    tab.stop.click()
    until(lambda: not tab.training.alive())
    assert len(runs_in(store)) == 1


def test_a_finished_training_shows_the_run_and_another_panel_finds_it(panel, store):
    from gpuml.training.results import load_run

    tab = panel.tabs["Train"]
    tab.start.click()
    until(lambda: "confusion matrix" in tab.view.value)
    assert "validation loss" in tab.view.value
    name = tab.training.headway.run
    assert f"load_run(&#x27;{name}&#x27;)" in tab.view.value
    assert load_run(name).metrics["updates"] == tab.training.headway.updates
    again = open_panel()  # as after a restart of the kernel: only the files are left
    assert again.tabs["Train"].view.value == tab.view.value
    static = again._repr_html_()
    assert "confusion matrix" in static and "<input" not in static and "run = %gpu_train dev" in repr(again)
    again.close()


def test_what_goes_wrong_in_a_training_is_said(panel, project):
    (project / "data" / "a.csv").write_text("text,label\nonly one field\n")
    tab = panel.tabs["Train"]
    tab.start.click()
    until(lambda: "data/a.csv:2" in tab.view.value)
    until(lambda: not tab.start.disabled)
    tab.training.folder.joinpath("progress.json").write_text(json.dumps({"phase": "training"}))
    assert "ended without a word" in tab.training.error


@pytest.fixture
def with_notebook(project, store, quick):
    "A panel of a project with the shipped notebook and a config `prod`"
    shutil.copy(ROOT / "nbs" / "train.ipynb", project / "train.ipynb")
    (project / "config" / "prod.yaml").write_text((project / "config" / "dev.yaml").read_text())
    made = open_panel(project / "train.ipynb")
    yield made
    for one, state in jobs(load_all()):
        if not state.over:
            one.cancel()
            one.wait(600)
    made.close()


def choose(panel, name: str):
    panel.tab.selected_index = panel.tab.titles.index(name)
    return panel.tabs[name]


def test_production_checks_submits_and_jobs_follow(with_notebook):
    tab = choose(with_notebook, "Production")
    tab.local.value = True
    tab.name.value = "spring"
    show(tab.form, "train")["train.epochs"].value = 3
    assert "job = %submit_prod prod train.epochs=3 --name=spring --local" in tab.form.summary.value
    tab.check.click()
    until(lambda: "<summary>process</summary>" in tab.view.value)
    assert "✓ <b>data</b>" in tab.view.value and "nothing keeps it from being submitted" in tab.view.value
    assert "gpuml run" in tab.view.value and not jobs(load_all())
    tab.submit.click()
    until(lambda: "job = %gpu_jobs spring" in tab.view.value)
    seen = choose(with_notebook, "Jobs")
    until(lambda: seen.list.names.options == ("spring",))
    assert "state" in seen.list.table.value and seen.list.names.value is None
    seen.list.names.value = "spring"
    until(lambda: "spring: " in seen.opened.content.value)  # of its log
    until(lambda: "gpuml-succeeded" in seen.list.table.value)
    seen.opened.part.value = "metrics"
    until(lambda: "aria-label='loss'" in seen.opened.content.value)
    seen.opened.part.value = "notebook"
    until(lambda: "iframe" in seen.opened.content.value and "confusion matrix" in seen.opened.content.value)
    assert "job = %gpu_jobs spring" in seen.opened.facts.value
    static = with_notebook._repr_html_()
    assert "spring" in static and "succeeded" in static


def test_a_job_of_ones_own_can_be_waited_for(project, tmp_path, monkeypatch):
    "Offered are the person's jobs that have not ended; what is chosen is in the line, and in what is checked and sent"

    def cluster(request):
        is_list = urlsplit(request.path).path.endswith("/gpuml-prod/jobs")
        values = {"kind": "List", "items": listed if is_list else [], "status": {"allowed": True}, "value": 1}
        request.send(404 if "/leases/" in request.path else 200, "application/json", json.dumps(values).encode())

    shutil.copy(ROOT / "nbs" / "train.ipynb", project / "train.ipynb")
    dev = (project / "config" / "dev.yaml").read_text()
    (project / "config" / "prod.yaml").write_text(
        dev + "compute:\n  image: registry.example.com/a:1\n  namespace: gpuml-prod\n"
    )
    notes = {"mine": {}, "another": {"person": "somebody"}, "done": {"ended": "Complete"}, "both": {}}
    listed = [a_job(f"{name}-1", **more) for name, more in notes.items()]
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with Server(cluster) as server:
        (tmp_path / "kubeconfig").write_text(KUBECONFIG.format(server=server.url, user="{token: a}"))
        made = open_panel(project / "train.ipynb")
        tab = choose(made, "Production")
        until(lambda: len(tab.after.list.options) > 1)
        assert [name for _, name in tab.after.list.options] == ["", "mine-1", "both-1"]
        tab.after.list.value = "mine-1"
        assert "job = %submit_prod prod --after=mine-1" in tab.form.summary.value
        tab.check.click()
        until(lambda: "<summary>manifest</summary>" in tab.view.value)
        assert "<b>after</b> --after: nothing starts jobs that wait in or for gpuml-prod" in tab.view.value
    tab.local.value = True
    assert "--after" not in tab.form.summary.value and tab.after.list.disabled
    made.close()


def a_job(name, person=None, ended=None):
    "A Job of gpuml as the API server has it"
    source = Source("0f2a9c11d4", "s3://b/x.tar.gz", "train.ipynb", "ada", person or person_mark())
    made = manifest(load("prod"), name, source)
    made["metadata"] |= {"uid": name, "creationTimestamp": "2026-11-29T12:00:00Z"}
    conditions = [{"type": ended, "status": "True"}] if ended else []
    return made | {"status": {"conditions": conditions}}


def test_another_notebook_submits_the_projects(project, store, monkeypatch):
    "As `gpuml submit` does; and the line says so too"
    from gpuml.ui import magics

    (project / "nbs").mkdir()
    (project / "config" / "prod.yaml").write_text((project / "config" / "dev.yaml").read_text())
    shutil.copy(ROOT / "nbs" / "train.ipynb", project / "nbs")
    (project / "scratch.ipynb").write_text(
        json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    monkeypatch.setenv("JPY_SESSION_NAME", str(project / "scratch.ipynb"))
    made = magics.panel()
    tab = choose(made, "Production")
    assert "submits nbs/train.ipynb" in tab.view.value
    assert tab.form.words == ["prod", "--notebook=nbs/train.ipynb"] and not tab.submit.disabled
    made.close()


def test_what_is_wrong_is_said_before_anything_is_sent(with_notebook, project):
    tab = choose(with_notebook, "Production")
    tab.local.value = True
    (project / "data" / "a.csv").write_text("text,label\nonly one field\n")
    tab.check.click()
    until(lambda: "gpuml-bad" in tab.view.value)
    assert "it would not be submitted" in tab.view.value and "data/a.csv:2" in tab.view.value
    tab.submit.click()
    until(lambda: "not submitted" in tab.view.value)
    assert "<li class='gpuml-good'>✓" in tab.view.value and "<li class='gpuml-bad'>✗" in tab.view.value
    assert not jobs(load_all())
    tab.local.value = False
    tab.check.click()
    until(lambda: "no kubeconfig" in tab.view.value or "no answer" in tab.view.value)


def test_cancel_asks_first(with_notebook, project):
    "Of a job that is at its first cell for long, and so has no metrics yet"
    notebook = json.loads((project / "train.ipynb").read_text())
    notebook["cells"][1]["source"] = "import time; time.sleep(3600)"
    (project / "train.ipynb").write_text(json.dumps(notebook))
    tab = choose(with_notebook, "Production")
    tab.local.value = True
    show(tab.form, "train")["train.epochs"].value = 4000
    tab.submit.click()
    until(lambda: "%gpu_jobs" in tab.view.value)
    seen = choose(with_notebook, "Jobs")
    seen.list.names.value = until(lambda: seen.list.names.options)[0]
    until(lambda: "gpuml-running" in seen.list.table.value)
    assert seen.opened.cancel in seen.opened.bar.children
    seen.opened.cancel.click()
    assert seen.opened.yes in seen.opened.bar.children and seen.opened.cancel not in seen.opened.bar.children
    seen.opened.no.click()
    assert seen.opened.cancel in seen.opened.bar.children and not seen.opened.job.status.over
    seen.opened.cancel.click()
    seen.opened.yes.click()
    until(lambda: "gpuml-cancelled" in seen.list.table.value)
    assert "no metrics<" in job_part(seen.opened.job, "metrics")
    seen.opened.hide.click()
    assert seen.opened.view.children == () and seen.list.names.value is None


def test_compare_runs(panel, store):
    from gpuml.training.fit import fit

    made = []
    for rate in ("1e-4", "3e-4"):
        time.sleep(1)  # runs of one second have no order
        made.append(fit(load("dev", [f"train.learning_rate={rate}", "train.epochs=1"])))
    tab = choose(panel, "Compare")
    assert "choose two" in tab.view.value
    assert [folder.name for _, folder in tab.runs.options] == [run.id for run in reversed(made)]
    tab.runs.value = [run.folder for run in made]
    assert "<th scope='row'>train.learning_rate</th><td>1e-4</td><td>3e-4</td>" in tab.view.value
    assert "train.epochs" not in tab.view.value
    for title in ("training loss", "validation loss", "macro-F1"):
        assert f"aria-label='{title}'" in tab.view.value
    assert tab.view.value.count("class='line'") == 6
    text = repr(compare(*made))
    assert "train.learning_rate" in text and made[0].id in text and "macro-F1" in text
    assert compare(made[0].id).folders == [made[0].folder]
    tab.runs.value = [made[0].folder]
    assert "choose two" in tab.view.value and "svg" not in tab.view.value
    assert "learning_rate 3e-4" in tab.runs.options[0][0] and "finished" in tab.runs.options[0][0]
    tab.order.value = "train.learning_rate"
    assert [folder for _, folder in tab.runs.options] == [run.folder for run in made]
    tab.runs.value = []
    for words in ("finished 3e-4", "0.0003"):
        tab.words.value = words
        assert [folder for _, folder in tab.runs.options] == [made[1].folder] and "1 of 2 runs" in tab.note.value


def test_compared_runs_keep_their_colours_and_one_path_is_one(project, store, monkeypatch):
    "Where a run has no values for a chart, and where a config says ~ for a folder that another spells out"
    from gpuml.training.fit import fit

    monkeypatch.setenv("HOME", str(project))
    same = ["train.epochs=1", "data.cache=~/cache"], ["train.epochs=1", f"output={project}/outputs"]
    made = [fit(load("dev", words)) for words in same]
    text = repr(compare(*made))
    assert "data.cache" not in text and "output" not in text
    metrics = made[0].folder / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n" for line in metrics.read_text().splitlines() if "validation" not in line))
    shown = compare(*made)._repr_html_()
    for title, colours in {"training loss": [0, 1], "validation loss": [1]}.items():
        svg = re.search(rf"<svg[^>]*aria-label='{title}'.*?</svg>", shown)[0]
        assert re.findall(r"class='line' stroke='([^']*)'", svg) == [charts.COLOURS[i] for i in colours]


def test_five_hundred_jobs(project):
    "One table and one list of names; a state that changes is one message"
    queued = State("pending", "needs 1 GPU")
    many = JobList((LocalJob(f"dev-{i:010x}-1", "", None, JOB_FACTS), queued) for i in range(500))
    html = jobs_html(many)
    assert html.count("<tr>") == 501 and html.count("needs 1 GPU</td>") == 500


@dataclass(frozen=True)
class RowWithPod(JobRow):
    "A row with one more column"

    pod: str = field(default="", metadata={"head": "its pod"})

    @classmethod
    def of(cls, job, state, now):
        return cls(**vars(JobRow.of(job, state, now)), pod=state.pod)


class ListWithPods(JobList):
    "A list whose rows have one more column"

    row_type = RowWithPod


def test_a_column_is_added_where_a_row_is_defined():
    job = LocalJob("dev-1", "", None, JOB_FACTS)
    listed = ListWithPods([(job, State("running", "`why` it runs", pod="dev-1-abc"))])
    heads, line = repr(listed).splitlines()
    assert heads.endswith("its pod") and line.endswith("dev-1-abc") and "`why` it runs" in line
    for html in (listed._repr_html_(), jobs_html(listed)):
        assert ">its pod</th>" in html and ">dev-1-abc</td>" in html and "<code>why</code> it runs" in html
    names = re.findall("<th scope='col'>(.*?)</th>", jobs_html(listed))
    assert names == ["job", "state", "progress", "left", "why", "priority", "GPUs", "age", "owner", "its pod"]


def test_an_executed_notebook_runs_nothing(tmp_path):
    bad = "<script>alert(1)</script><img src='https://example.com/x.png' onerror='alert(2)'>"
    out = [
        {"output_type": "display_data", "data": {"text/html": bad}},
        {"output_type": "stream", "text": "\x1b[31mred"},
    ]
    cells = [
        {"cell_type": "markdown", "source": "<b onclick='x'>a</b>"},
        {"cell_type": "code", "source": "1 < 2", "outputs": out},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    html = notebook_html(tmp_path / "a.ipynb")
    assert html.count("<") == 2 and " sandbox " in html and "default-src &#x27;none&#x27;" in html.replace("&amp;", "&")
    assert "red" in html and "\x1b" not in html and "1 &amp;lt; 2" in html


def test_opened_and_closed_a_hundred_times(project):
    def left():
        return len(alive_widgets), sum(t.name.startswith("gpuml-panel") for t in threading.enumerate())

    until(lambda: not left()[1])  # of earlier tests' panels
    before = left()
    for _ in range(100):
        made = open_panel()
        for tab in range(len(made.tabs)):
            made.tab.selected_index = tab
        show(made.tabs["Train"].form, "data")
    made.close()
    until(lambda: left() == before)


def test_the_panel_imports_nothing_heavy(project):
    code = """
import sys
import gpuml
panel = gpuml.panel()
for tab in range(4): panel.tab.selected_index = tab
panel.close()
print(*(set(sys.modules) & {"torch", "transformers", "mlflow", "kubernetes", "papermill", "nbformat", "pandas"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
