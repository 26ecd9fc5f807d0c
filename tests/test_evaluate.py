"A test set: scored once by the weights that were kept, never used to choose them, and what may be wrong is said"

import csv
import json

import mlflow
import numpy as np
import pandas as pd
import pytest

from gpuml.base.errors import DataError, Preempted
from gpuml.base.loading import load, load_all
from gpuml.data.testset import read_testset
from gpuml.training.chunks import TOGETHER
from gpuml.training.fit import fit
from gpuml.training.intervals import intervals
from gpuml.training.model import load_tokenizer
from gpuml.training.predict import finished_model
from gpuml.training.results import Run
from gpuml.training.run_list import find_row
from gpuml.training.testing import compute_logits
from gpuml.ui.cli import main
from gpuml.ui.run_columns import run_columns
from gpuml.ui.run_table import RunTable, project_runs
from tests.conftest import rows, runs_in
from tests.test_interrupt import OVERRIDES, stop_at
from tests.test_predict import CACHE, pair, predictors, trained  # noqa: F401

NEW = [(f"again {text}", label) for text, label in rows(10)]
TEST = ["data.test=test.csv"]


def write_rows(path, pairs):
    "A CSV file of texts and labels"
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("text", "label"), *pairs])


@pytest.fixture
def test_file(project):
    "Ten new texts, and two that are in the training or the validation data"
    write_rows(project / "test.csv", NEW + rows(2))
    return project / "test.csv"


def certificate(run):
    return json.loads((run.folder / "certificate.json").read_text())


def test_it_is_scored_once_at_the_end(store, test_file):
    plain = fit(load("dev"))
    run = fit(load("dev", TEST))
    weights = [each.model_folder / "model.safetensors" for each in (plain, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert certificate(plain)["test"] is None and plain.evaluations == []
    (evaluation,) = run.evaluations
    expected = run.predict([text for text, _ in NEW + rows(2)])
    right = np.mean([label == said for (_, label), said in zip(NEW + rows(2), expected.labels, strict=True)])
    assert evaluation.scores["accuracy"] == right and evaluation.rows == 12 and evaluation.files == ["test.csv"]
    proof = certificate(run)
    assert proof["test"]["accuracy"] == right and proof["test"]["fingerprint"] == evaluation.fingerprint
    assert proof["evaluation"] == certificate(plain)["evaluation"]
    (recorded,) = [each for each in runs_in(store) if each.info.run_name == run.id]
    assert recorded.data.metrics["test/accuracy"] == right
    assert recorded.data.metrics["test/accuracy_low"] <= right <= recorded.data.metrics["test/accuracy_high"]
    overlap = [note for note in run.metrics["notes"] if "data, too" in note]
    assert sum(int(note.split()[0]) for note in overlap) == 2 and evaluation.notes == overlap
    table = project_runs(load_all())
    score = f"{evaluation.scores['macro_f1']:.3f}"
    columns = {column.title: [column.text(row) for row in table.rows] for column in run_columns(table.rows)}
    assert sorted(columns["test macro-F1"]) == ["", score] and "test macro-F1" in repr(table)
    assert [row.run for row in project_runs(load_all(), "test-macro-F1").rows] == [run.id, plain.id]
    assert "test macro-F1" not in repr(RunTable((find_row(plain.id, load_all()),)))
    assert "test: accuracy" in repr(run) and "test: accuracy" in run._repr_html_() and overlap[0] in repr(evaluation)


def test_bad_test_data_is_refused_before_training(store, test_file):
    write_rows(test_file, [*NEW, ("a text", "biling"), ("", "billing")])
    phases = []
    with pytest.raises(DataError) as e:
        fit(load("dev", TEST), watch=lambda p: phases.append(p.phase))
    assert "test.csv:12: the label 'biling' is not in data.labels; did you mean 'billing'?" in str(e.value)
    assert "test.csv:13: the text is empty" in str(e.value) and "training" not in phases
    with pytest.raises(DataError, match="data.test: no such file or folder: nowhere.csv"):
        fit(load("dev", ["data.test=nowhere.csv"]))


@pytest.mark.parametrize("order", ["early", "windows"])
def test_other_orders_score_it_too(store, test_file, order):
    run = fit(load("dev", [*TEST, f"data.order={order}", 'data.labels=["billing", "delivery"]']))
    (evaluation,) = run.evaluations
    assert evaluation.rows == 12 and sum("data, too" in note for note in run.metrics["notes"]) >= 1


def test_a_stop_before_the_results_scores_it_later(store, test_file):
    with pytest.raises(Preempted):
        fit(load("dev", [*OVERRIDES, *TEST]), watch=stop_at("saving"))
    run = fit(load("dev", [*OVERRIDES, *TEST]), resume="latest")
    assert certificate(run)["test"]["rows"] == 12


def test_a_stop_is_heeded_between_draws():
    draws = []

    def check():
        draws.append(len(draws))
        if len(draws) == 3:
            raise Preempted("stopped")

    with pytest.raises(Preempted):
        intervals(np.eye(2), np.arange(2), check=check)
    assert len(draws) == 3


def test_a_finished_run_is_evaluated(store, test_file, capsys):
    run = fit(load("dev"))
    evaluation = run.evaluate("test.csv", CACHE)
    assert (evaluation.name, evaluation.rows) == ("test", 12)
    assert sum(int(note.split()[0]) for note in evaluation.notes if "data, too" in note) == 2
    table = pd.DataFrame(NEW, columns=["body", "topic"])
    of_frame = run.evaluate(table, [*CACHE, "data.text=body", "data.label=topic"], name="test")
    assert of_frame.rows == 10 and of_frame.name.startswith("test-") and of_frame.files == ["DataFrame"]
    assert of_frame.notes == []
    assert [each.name for each in run.evaluations] == ["test", of_frame.name]
    (recorded,) = runs_in(store)
    assert recorded.data.metrics[f"{of_frame.name}/accuracy"] == of_frame.scores["accuracy"]
    assert main(["evaluate", run.id, "test.csv", *CACHE, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["scores"] == evaluation.scores and again["intervals"] == evaluation.intervals
    assert main(["runs", run.id]) == 0 and "test: accuracy" in capsys.readouterr().out
    (store.parent / "data" / "a.csv").write_text("text,label\nother,billing\nnew,delivery\n" * 8)
    (note,) = run.evaluate("test.csv", CACHE).notes
    assert "whether some of the texts were trained on is not known" in note


def test_wrong_test_data_ends_with_a_sentence(trained, project, capsys):  # noqa: F811
    write_rows("other.csv", [("a text", "praise")])
    run = Run(trained)
    assert main(["evaluate", str(run.folder), "other.csv", *CACHE]) == 65
    assert "other.csv:2: the label 'praise' is not in data.labels" in capsys.readouterr().err
    assert main(["evaluate", str(run.folder), "none.csv"]) == 66
    assert main(["evaluate", str(run.folder), "other.csv", "train.epochs=3"]) == 78
    assert not run.evaluations


def test_mlflow_that_is_away_costs_nothing(store, test_file):
    run = fit(load("dev"))
    record = json.loads((run.folder / "tracking.json").read_text())
    record["uri"] = "http://127.0.0.1:9"
    (run.folder / "tracking.json").write_text(json.dumps(record))
    notes = []
    run.evaluate("test.csv", CACHE, watch=lambda p: notes.extend(p.notes))
    assert any("did not take the scores" in note for note in notes) and len(run.evaluations) == 1
    assert mlflow.active_run() is None


def test_several_processes_score_the_same(trained, project, pair):  # noqa: F811
    write_rows("many.csv", rows(TOGETHER["cpu"] + 20))
    run, counts = Run(trained), []
    config = run.config.at(project)
    tokenizer = load_tokenizer(run.model_folder)
    test = read_testset(config, "many.csv", run.labels, tokenizer, 24, "input")
    alone = compute_logits(finished_model(run), test, lambda: None)
    together = compute_logits(finished_model(run), test, lambda: counts.append(len(predictors())), pair)
    assert max(counts) == 2 and not predictors()
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_training_of_several_processes_scores_it_too(store, test_file, forking, monkeypatch):
    alone = fit(load("dev", [*TEST, "train.slots=2"]))
    monkeypatch.setenv("GPUML_GPUS", "2")
    together = fit(load("dev", [*TEST, "train.slots=2"]))
    assert certificate(together)["test"] == certificate(alone)["test"]
    assert alone.evaluations[0].scores == together.evaluations[0].scores
