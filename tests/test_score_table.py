"What an evaluation's scores are called, everywhere that they come out"

import json
import os
import re
import shutil
import subprocess
import sys
import typing
from types import SimpleNamespace

import pytest

from gpuml.base.config import TrainConfig
from gpuml.jobs.exporter import Metrics, numbers
from gpuml.training.best import Best
from gpuml.training.headway import Headway
from gpuml.training.history import History
from gpuml.training.progress import Progress
from gpuml.training.report import class_table, report_html, report_text
from gpuml.training.score_table import LOSS, MAIN, SCORES
from gpuml.training.words import facts
from gpuml.ui.cli import main
from gpuml.ui.commands import print_run
from gpuml.ui.comparison import Comparison
from gpuml.ui.metrics import charts
from gpuml.ui.panel_compare import CompareTab
from tests.conftest import ROOT, runs_in

EVALUATION = {"loss": 0.21, "accuracy": 0.9, "macro_f1": 0.876}
CLASSES = {"a": {"precision": 0.5, "recall": 1.0, "f1": None, "support": 4}}


def finished(**scores):
    "A finished run with these scores"
    counts = {"updates": 1200, "seconds": 4.2, "confusion": [[4]], "weights": "weights of epoch 2 of 2, the latest"}
    history = [{"step": 1200, "epoch": 1, **EVALUATION}]
    metrics = {"classes": CLASSES, "notes": [], "history": history, "curve": [[1, 0.7]], **counts, **scores}
    links = {"url": "", "url_note": "", "place": "outputs/dev-1"}
    values = {**links, "id": "dev-1", "labels": ["a"], "metrics": metrics, "account": "", "confused_texts": dict}
    return SimpleNamespace(**values, evaluations=[], classes=lambda: class_table(CLASSES))


def evaluated(**scores):
    "How far a run is that was evaluated once"
    return Headway("dev-1", "training", epochs=2, evaluation={"step": 1, "epoch": 1, **scores})


def test_report():
    text = report_text(finished(**EVALUATION)).splitlines()
    assert text[0] == "dev-1: accuracy 0.900, macro-F1 0.876, loss 0.210 on validation data"
    assert next(line.split() for line in text if "macro" in line[:9]) == ["macro", "average", "0.876", "4"]
    assert report_html(finished(**EVALUATION)).startswith(
        "<div><b>dev-1</b> · accuracy <b>0.900</b> · macro-F1 <b>0.876</b>"
        " · validation loss 0.210 · 1,200 updates in 4 s</div>"
    )


def test_terminal(capsys):
    print_run(finished(**EVALUATION))
    wanted = "accuracy 0.900   macro-F1 0.876   validation loss 0.210   1,200 updates in 4 s\nweights  of epoch 2 of 2"
    assert wanted in capsys.readouterr().out


def test_headway():
    assert facts(evaluated(**EVALUATION))[1:] == ["accuracy 0.900, macro-F1 0.876"]
    history = History(Progress(step=1), Best("macro_f1"))
    history.add_evaluation(EVALUATION | {"classes": CLASSES})
    assert json.dumps(history.progress.evaluations) == json.dumps([{"step": 1, "epoch": 1, **EVALUATION}])


def test_exporter():
    wanted = [
        ("gpuml_validation_loss", "Loss of the latest evaluation"),
        ("gpuml_validation_accuracy", "Accuracy of the latest evaluation"),
        ("gpuml_validation_macro_f1", "Macro-F1 of the latest evaluation"),
        ("gpuml_validation_micro_f1", "Micro-F1 of the latest evaluation"),
    ]
    families = [(family.name, family.documentation) for family in Metrics().collect()]
    assert families[-5:-1] == wanted
    plotted = [(name, value) for name, value in numbers(evaluated(**EVALUATION)).items() if "validation" in name]
    assert plotted == [("validation_loss", 0.21), ("validation_accuracy", 0.9), ("validation_macro_f1", 0.876)]


def test_comparison(project):
    "Rows, and curves of the losses and the score that counts first"
    folder = project / "outputs" / "dev-1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text((project / "config" / "dev.yaml").read_text())
    (folder / "metrics.json").write_text(json.dumps(EVALUATION | {"updates": 1200, "seconds": 4.2}))
    comparison, tab = Comparison([folder, folder]), CompareTab()
    cells = [(row[0], row[1]) for row in comparison.rows()]
    scores = [("accuracy", "0.9"), ("macro-F1", "0.876"), ("validation loss", "0.21")]
    assert cells == [*scores, ("updates", "1,200"), ("seconds", "4.2")]
    tab.look()
    assert tab.runs.options[0][0].startswith("dev-1  interrupted")
    points = {"loss": 0.5, "validation_loss": 0.21, "accuracy": 0.9, "macro_f1": 0.876}
    (folder / "metrics.jsonl").write_text(json.dumps([0, 3, "evaluation", points]) + "\n")
    titles = re.findall("<figcaption>(.*?):", comparison._repr_html_())
    assert titles == ["training loss", "validation loss", "macro-F1"]
    (folder / "metrics.json").write_text(json.dumps({"accuracy": 0.9, "updates": 1200}))
    assert [row[1] for row in comparison.rows()] == ["0.9", "", "", "1,200", ""]


def test_curves():
    series = {"loss": [(1, 0.5)], "validation_loss": [(1, 0.21)], "accuracy": [(1, 0.9)], "macro_f1": [(1, 0.876)]}
    captions = [re.sub("<.*?>", "", c) for c in re.findall("<figcaption>(.*?)</figcaption>", charts(series))]
    assert captions == ["loss: ● training 0.5 ● validation 0.21", "scores: ● accuracy 0.9 ● macro-F1 0.876"]


def test_a_run_without_a_score(capsys):
    "An older version's run shows a dash, and is the worst by that score"
    older = finished(loss=0.21, accuracy=0.9)
    assert report_text(older).startswith("dev-1: accuracy 0.900, macro-F1 –, loss 0.210 on")
    assert "macro-F1 <b>–</b> · validation loss 0.210" in report_html(older)
    print_run(older)
    assert "accuracy 0.900   macro-F1 –   validation loss 0.210" in capsys.readouterr().out
    assert facts(evaluated(loss=0.21, accuracy=0.9))[1:] == ["accuracy 0.900, macro-F1 –"]
    assert "validation_macro_f1" not in numbers(evaluated(loss=0.21))
    assert Best("macro_f1").score_of({"loss": 0.21}) < Best("macro_f1").score_of({"macro_f1": 0.0})


def test_a_list_of_runs_without_a_score(project):
    folder = project / "outputs" / "dev-1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text((project / "config" / "dev.yaml").read_text())
    (folder / "metrics.json").write_text(json.dumps({"accuracy": 0.9, "updates": 1200}))
    tab = CompareTab()
    tab.look()
    (line,) = [line for line, _ in tab.runs.options]
    assert line.split() == ["dev-1", "interrupted", "accuracy", "macro-F1", "loss"]  # no number beside a title


def test_what_cannot_read_the_table():
    "The config's values and the dashboard, whose names are the exporter's"
    field = TrainConfig.model_fields["best_metric"]
    names, *_ = typing.get_args(field.annotation)
    assert set(typing.get_args(names)) == {score.key for score in SCORES} and field.default == MAIN.key
    drawn = set(re.findall(r"gpuml_validation_\w+", (ROOT / "k8s" / "monitoring" / "gpuml.json").read_text()))
    assert drawn == {f"gpuml_validation_{score.key}" for score in (LOSS, MAIN)}
    assert drawn <= {family.name for family in Metrics().collect()}


ROW = '    Score("recall", "validation_recall", "mean recall", form=".1%"),\n'
COMPUTATION = '        "recall": float(np.nanmean(measures[1])),\n'
LOOK = """
import sys
from pathlib import Path
from gpuml.training.results import load_run
from gpuml.jobs.exporter import Metrics
from gpuml.ui.comparison import Comparison
folders = [Path(name) for name in sys.argv[1:]]
for folder in folders: print(repr(load_run(folder)).splitlines()[0], load_run(folder)._repr_html_()[:200])
print(*(row for row in Comparison(folders).rows() if row[0] == "mean recall"))
print(*(family.documentation for family in Metrics().collect()))
"""


def with_row(folder):
    "The package with one score more, in a folder: a row, and its computation"
    shutil.copytree(ROOT / "gpuml", folder / "gpuml", ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, lines in (
        ("score_table", '    Score("macro_f1"', ROW),
        ("scores", '        "loss": float(', COMPUTATION),
    ):
        file = folder / "gpuml" / "training" / f"{name}.py"
        text = file.read_text()
        assert text.count(before) == 1
        file.write_text(text.replace(before, lines + before))
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_row_and_its_computation_are_a_score(store, tmp_path_factory):
    "It is in table, report, record and MLflow; the run from before has a dash, and its MLflow run no such metric"
    assert main(["train", "dev"]) == 0
    (before,) = (store.parent / "outputs").iterdir()
    environment = with_row(tmp_path_factory.mktemp("more"))

    def python(*arguments):
        ended = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    printed = python("-m", "gpuml", "train", "dev")
    (after,) = {*(store.parent / "outputs").iterdir()} - {before}
    metrics = json.loads((after / "metrics.json").read_text())
    shown = f"mean recall {metrics['recall']:.1%}"
    assert shown in printed
    assert [*metrics["history"][0]] == ["step", "epoch", "loss", "accuracy", "recall", "macro_f1"]
    kept = next(e for e in metrics["history"] if e["epoch"] == metrics["epoch"])
    assert json.loads((after / "certificate.json").read_text())["evaluation"] == kept
    latest, first = runs_in(store)
    assert latest.data.metrics["validation_recall"] == pytest.approx(metrics["recall"])
    assert "validation_recall" not in first.data.metrics and first.data.metrics["macro_f1"] > 0
    looked = python("-c", LOOK, str(before), str(after))
    assert "mean recall –" in looked and "mean recall <b>–</b>" in looked and shown in looked
    assert f"('mean recall', '', '{metrics['recall']:,.4g}')" in looked
    assert "Mean recall of the latest evaluation" in looked
