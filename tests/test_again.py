"A name that is used again: the same work is done already, other work is refused, and nothing old is taken for new"

import json
import re
import shutil
import sys

import pytest

from gpuml.base.errors import ConfigError, Exit, GpumlError, Preempted
from gpuml.base.loading import load
from gpuml.cluster import jobs as c
from gpuml.cluster import local
from gpuml.cluster.manifest import PREFIX
from gpuml.cluster.sending import submit
from gpuml.cluster.state import Seen, explain
from gpuml.cluster.submission import prepare
from gpuml.training.fit import fit
from gpuml.training.own_job import OwnJob
from tests import forked
from tests.conftest import ROOT, gpuml
from tests.standing import stand_still
from tests.test_interrupt import OVERRIDES, stop_at

NEW = "one more parcel,delivery\n"


def attempt(bundle="a" * 16, submission="1", name="nightly", stop=lambda p: None):
    "Train as an attempt of a job does, each in a process of its own; the run, and whether anything was trained"
    job, phases = OwnJob(name, bundle, submission), []
    run = fit(load("dev", OVERRIDES), watch=lambda p: [phases.append(p.phase), stop(p)], job=job)
    return run, "training" in phases


def add_rows(file="data/a.csv"):
    with open(file, "a") as f:
        f.write(NEW)


def test_what_a_job_finds_under_its_name(store):
    "Its own certificate ends it as done, whatever the data is by now; another job's does where code and data are the same"
    done, trained = attempt()
    assert trained
    files = json.loads((done.folder / "certificate.json").read_text())["data_files"]
    assert [row[:2] for row in files] == [["data.train", "a.csv"]]
    text = (store.parent / "data" / "a.csv").read_text()
    again, trained = attempt(submission="2")
    assert not trained and again.metrics == done.metrics
    with pytest.raises(ConfigError, match=r"certified already: code: bundle a{16} → bundle b{16}; give this job"):
        attempt(bundle="b" * 16, submission="2")
    add_rows()
    assert not attempt()[1]  # another pod of the same job
    size = len(text) + len(NEW)
    with pytest.raises(ConfigError, match=rf"data.train: a.csv: {len(text):,} bytes.* → {size:,} bytes.*another name"):
        attempt(submission="2")
    (store.parent / "data" / "a.csv").write_text(text)
    assert not attempt(submission="2")[1]


def test_the_same_rows_in_other_files_are_the_same_data(store):
    attempt()
    data = store.parent / "data"
    shutil.move(data / "a.csv", data / "b.csv")
    assert not attempt(submission="2")[1]


def test_a_checkpoint_of_other_code(store):
    "An interrupted job's name with other code is refused; with the same it goes on"
    with pytest.raises(Preempted):
        attempt(stop=stop_at(4))
    with pytest.raises(ConfigError, match="was begun by another job: code: bundle a{16} → bundle b{16}"):
        attempt(bundle="b" * 16)
    assert attempt(submission="2")[1]


@pytest.fixture
def shipped(store, monkeypatch):
    "The shipped notebook in a small project on the tiny model"
    monkeypatch.setattr(sys, "executable", forked.python())  # which a job's processes are started with
    notebook = store.parent / "nbs" / "train.ipynb"
    notebook.parent.mkdir()
    notebook.write_text((ROOT / "nbs" / "train.ipynb").read_text())
    yield notebook
    for job, state in c.jobs([load("dev")]):
        if not state.over:
            job.cancel()


def test_a_name_that_is_submitted_again(shipped):
    "Here: the same is done and says so; other rows or code are refused before anything is sent, or get a name of their own"
    project, config = shipped.parent.parent, load("dev", ["train.epochs=1"])

    def submitted(*overrides, **more):
        return submit(load("dev", ["train.epochs=1", *overrides]), shipped, "nightly", local=True, **more)

    go_on = stand_still(shipped, "nightly", 2)
    first = submitted()
    assert submitted().run_id == "nightly" and "at work already" in submitted().note
    go_on.touch()
    assert first.wait(600).phase == "succeeded" and not first.done_before, first.logs()
    for forgotten in (False, True):  # as a Job that its TTL has removed
        if forgotten:
            shutil.rmtree(local.jobs_folder(config))
        same = submitted()
        assert same.done_before and same.status.phase == "succeeded"
        assert re.match("nothing is trained: nightly was trained and certified 20.* with the same code", same.note)
    said = gpuml("submit", "dev", "train.epochs=1", "--local", "--wait", "--name", "nightly", cwd=project)
    assert said.returncode == 0 and "nothing is trained: nightly" in said.stdout and "macro-F1" not in said.stdout
    add_rows()
    for overrides, what in (((), "data.train: a.csv: "), (("train.epochs=2",), "code: bundle ")):
        with pytest.raises(GpumlError, match=f"✗ name: --name nightly: is there already, with .*{what}") as refused:
            submitted(*overrides)
        assert refused.value.exit_code == Exit.BAD_CONFIG and not (project / "outputs" / "nightly-again-1").exists()
    planned = prepare(config, shipped, "nightly", local=True, again=True)
    assert planned.standing.run == planned.manifest["metadata"]["name"] == "nightly-again-1"
    assert "✓ name: nightly is there already; this is nightly-again-1" in repr(planned)


def test_what_submitting_a_cancelled_job_again_does_depends_on_whether_its_name_was_chosen(shipped):
    "Not on what the name looks like"
    stopped = {"exit_code": 75, "updates": 6, "planned_updates": 270, "checkpoint": 6}
    config = load("dev", ["train.epochs=1"])

    goes_on, begins = "submitting the same or `gpuml train", "submitting the same begins anew"
    for name, words in (("dev-0123456789-1", goes_on), (None, begins)):
        made = prepare(config, shipped, name, local=True).manifest
        made["metadata"]["deletionTimestamp"] = "2026-11-29T12:00:00Z"
        cause = explain(Seen(made, [], record=stopped)).why
        assert f"stays in {made['metadata']['annotations'][f'{PREFIX}/output']}, {words}" in cause


def test_a_job_that_failed_is_made_anew_under_its_name(shipped):
    "Its training is not done again, and no failed job passes for a finished one"
    shipped.write_text(shipped.read_text().replace("run.mistakes(8)", "1 / len(run.labels[2:])"))
    config = load("dev", ["train.epochs=1"])
    for attempts in (1, 2):
        job = submit(config, shipped, "nightly", local=True)
        assert not job.done_before and job.wait(600).phase == "failed", job.logs()
        assert ("nothing is trained" in job.logs()) == (attempts == 2), job.logs()
    assert "executed once more" in job.note
