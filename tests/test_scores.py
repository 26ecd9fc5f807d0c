"Scores of classes that do not occur, are not predicted, or both"

import json

import numpy as np
import pytest

from gpuml.training.results import load_run
from gpuml.training.score_table import as_text
from gpuml.training.scores import evaluate, left_out
from gpuml.ui.cli import main

LABELS = ["a", "b", "c"]

CASES = {  # right classes, predicted ones → macro-F1; precision, recall and F1 of class c; what the note names
    "all there": ([0, 1, 2], [0, 1, 2], 1.0, (1.0, 1.0, 1.0), ""),
    "perfect, one class absent (torchmetrics#300)": ([0, 0, 1], [0, 0, 1], 1.0, (None, None, None), "c"),
    "absent, but predicted": ([0, 0, 1], [0, 2, 1], (2 / 3 + 1 + 0) / 3, (0.0, None, 0.0), ""),
    "there, and never predicted": ([0, 1, 2], [0, 1, 1], (1 + 2 / 3 + 0) / 3, (None, 0.0, 0.0), ""),
    "one class only": ([0, 0], [0, 0], 1.0, (None, None, None), "b, c"),
    "all wrong": ([0, 0], [1, 1], 0.0, (None, None, None), "c"),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_of_classes(case):
    right, predicted, macro_f1, of_c, names = CASES[case]
    scores = evaluate(np.eye(3)[predicted], np.array(right), LABELS)
    assert scores["macro_f1"] == pytest.approx(macro_f1)
    assert tuple(scores["classes"]["c"][k] for k in ("precision", "recall", "f1")) == of_c
    assert sum(measures["support"] for measures in scores["classes"].values()) == len(right)
    assert left_out(scores).endswith(f": {names}") if names else left_out(scores) == ""
    json.dumps(scores, allow_nan=False)


def test_undefined_is_a_dash():
    assert [as_text(x) for x in (None, 0.0, 0.12345)] == ["–", "0.000", "0.123"]


def test_a_class_without_validation_rows(store, capsys):
    "It is shown with dashes and left out of macro-F1, in report, table, record and note"
    project = store.parent
    (project / "v.csv").write_text("text,label\ncard charged,billing\nparcel late,delivery\n")
    with open(project / "data" / "a.csv", "a") as f:
        f.write("fax me,fax\n")
    assert main(["train", "dev", "train.epochs=4", "train.learning_rate=1e-2", "data.validation=v.csv"]) == 0
    (folder,) = (project / "outputs").iterdir()
    run, printed = load_run(folder), capsys.readouterr().out
    assert run.metrics["classes"]["fax"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    defined = [c["f1"] for c in run.metrics["classes"].values() if c["f1"] is not None]
    assert len(defined) == 2 and run.metrics["macro_f1"] == pytest.approx(np.mean(defined))
    note = "macro-F1 is the mean over 2 of 3 classes; these neither occur in validation nor are predicted: fax"
    assert note in run.metrics["notes"]
    for shown in (repr(run), run._repr_html_()):
        assert "–" in shown and note in shown
    assert "–" in printed
