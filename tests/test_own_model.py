"A model and scores of a notebook's own: trained, stopped, continued, shared, saved and loaded as any other"

import json
from pathlib import Path

import numpy as np
import pytest

from gpuml.base.errors import ConfigError, ModelError, Paused, TrainError
from gpuml.base.loading import load
from gpuml.train import load_run
from gpuml.training.fit import fit
from gpuml.training.recipe import recipe_of
from gpuml.training.setting import Limits
from tests.conftest import gpuml, rows, runs_in
from tests.own_code import CELL, cell
from tests.test_run import PARAMETERS, write_notebook

QUICK = ["train.epochs=3", "train.learning_rate=1e-2"]


def weights(run):
    return (run.model_folder / "model.safetensors").read_bytes()


def test_it_is_trained_and_loaded(project, store):
    made = cell()
    run = fit(
        load("dev", [*QUICK, "tracking.log_model=true", "data.test=data"]),
        model=made["make_model"],
        metrics=made["scores"],
    )
    assert set(run.metrics["own"]) == {"sure", "classes-seen"} and run.history[0]["classes-seen"] == 2
    assert "sure 0." in repr(run) and "sure" in run._repr_html_()
    assert run.metrics["accuracy"] > 0.6
    again = load_run(str(run.folder))
    assert again.predict(["good film"])[0][0] in again.labels
    predicted = again.predict_file("data/a.csv", "out.csv")
    assert len(predicted) == 24
    evaluated = again.evaluate("data/a.csv")
    assert evaluated.rows == 24 and evaluated.scores["own"]["sure"] == pytest.approx(predicted_sure(again), abs=1e-6)
    assert (
        "sure 0." in evaluated.line()
        and {"score": "classes-seen", "value": 2.0, "low": None, "high": None} in evaluated.values()
    )
    certificate = json.loads((run.folder / "certificate.json").read_text())
    assert certificate["code"]["file"] == "own_code.py" and certificate["evaluation"]["classes-seen"] == 2
    assert certificate["test"]["sure"] == evaluated.scores["own"]["sure"]
    [kept] = runs_in(store)
    assert kept.data.metrics["test/sure"] == kept.data.metrics["a/sure"] == certificate["test"]["sure"]
    assert kept.data.metrics["sure"] == pytest.approx(run.metrics["own"]["sure"])
    assert kept.data.params["model.code"].startswith("make_model and scores (")
    assert "class Bag" in (run.model_folder / "own_code.py").read_text()


def predicted_sure(run):
    "What the score `sure` is of all texts"
    return run.predict([text for text, _ in rows()]).probabilities.max(1).mean()


CALLS = """\
import numpy as np
from pathlib import Path

WORTH = [0.0, 0.2, 0.9, 0.5, 0.4]


def judge(labels, probabilities):
    calls = len(Path("calls").read_text()) if Path("calls").exists() else 0
    Path("calls").write_text("." * (calls + 1))
    return {"worth": WORTH[calls], "cost": 5 + WORTH[calls]}
"""


@pytest.mark.parametrize(("metric", "epoch", "epochs"), [("worth", 2, 4), ("-cost", 1, 3)])
def test_its_score_picks_the_epoch_and_ends_the_training(metric, epoch, epochs, project, store):
    "The first call, on answers that are made up, comes before the epochs"
    words = ["train.epochs=6", f"train.best_metric={metric}", "train.early_stopping=2"]
    run = fit(load("dev", words), metrics=cell(CALLS)["judge"])
    assert len(run.history) == epochs
    kept = json.loads((run.folder / "certificate.json").read_text())["evaluation"]
    assert kept == run.history[epoch - 1] and kept["cost"] == run.metrics["own"]["cost"]
    assert run.metrics["weights"] == f"weights of epoch {epoch} of {epochs}, the best {metric.removeprefix('-')}"


@pytest.mark.parametrize(
    ("metric", "metrics", "sentence"),
    [
        ("-money", "scores", "train.best_metric: -money: no such score; there are macro_f1, .* loss, and scores has sure, classes-seen"),
        ("surely", "scores", "did you mean 'sure'"),
        ("cost", "", "there are macro_f1, .* loss, and other ones are computed by a function of yours"),
    ],
)  # fmt: skip
def test_a_score_that_nobody_computes_is_refused(metric, metrics, sentence, project, store):
    with pytest.raises(ConfigError, match=sentence):
        fit(load("dev", [f"train.best_metric={metric}"]), metrics=cell().get(metrics))
    assert not list((project / "outputs").glob("*/progress.json"))


def test_a_score_that_fails_later_costs_no_training(project, store):
    "It takes the answers that were made up, two of each class, and no others"
    failing = cell(CELL.replace('    return {"sure"', '    1 / (len(labels) == 4)\n    return {"sure"'))["scores"]
    options = [*QUICK, "data.validation_fraction=0.3"]
    run = fit(load("dev", options), metrics=failing)
    [note] = [note for note in run.metrics["notes"] if "scores" in note and "left out" in note]
    assert note.startswith("scores: ZeroDivisionError: division by zero, in `1 / (len(labels) == 4)`")
    assert len(run.history) == 3 and "own" not in run.metrics and weights(run) == weights(fit(load("dev", options)))
    evaluated = run.evaluate("data/a.csv")
    assert "own" not in evaluated.scores and any("ZeroDivisionError" in note for note in evaluated.notes)


def test_it_goes_on_to_the_same_weights(project, store):
    made = cell()
    whole = fit(load("dev", QUICK), model=made["make_model"])
    with pytest.raises(Paused):
        fit(load("dev", QUICK), model=made["make_model"], limits=Limits(epochs=1))
    changed = cell(CELL.replace("Dropout(0.1)", "Dropout(0.2)"))["make_model"]
    with pytest.raises(ConfigError, match=r"was begun with make_model \(\w{12}\), and the line names make_model"):
        fit(load("dev"), model=changed, resume="latest")
    resumed = fit(load("dev"), resume="latest")  # with its own code
    assert weights(whole) == weights(resumed)
    with pytest.raises(Paused):
        fit(load("dev", QUICK), limits=Limits(epochs=1))
    with pytest.raises(ConfigError, match="was begun without make_model"):
        fit(load("dev"), model=made["make_model"], resume="latest")


def test_several_processes_train_it(project, store, forking, monkeypatch):
    made, words = cell(), [*QUICK, "train.slots=2", "train.epochs=1"]
    alone = fit(load("dev", words), model=made["make_model"], metrics=made["scores"])
    monkeypatch.setenv("GPUML_GPUS", "2")
    together = fit(load("dev", words), model=made["make_model"], metrics=made["scores"])
    assert weights(alone) == weights(together)
    assert alone.metrics["own"] == together.metrics["own"]


WRONG = {
    "no module": ("return Bag(len(tokenizer), len(labels))", "return 3", ModelError, "returns a int; it should return a torch.nn.Module"),
    "an error": ("return Bag(len(tokenizer), len(labels))", "return Bag(config.words, 2)", ModelError, r"make_model: AttributeError: .*words.*, in `return Bag\(config.words, 2\)`"),
    "one class too many": ("len(labels))", "3)", ModelError, r"returns a tensor of float32 \[1, 3\]; it should be logits, float \[1, 2\]"),
    "no logits": ("return self.head(", "return str(", ModelError, "returns a str without .logits"),
    "no number": ("return self.head(", "return float('nan') * self.head(", ModelError, "make_model: its logits are no finite numbers"),
    "nothing to train": ("return Bag(len(tokenizer), len(labels))", "return nn.Dropout()", ModelError, "has no weights that can be trained"),
    "an error with ids": ("self.words(ids)", "self.words(ids + 9999)", ModelError, "make_model: this make_model model fails with a text of"),
    "texts that see each other": ("return self.head(", "return len(ids) + 0 * self.head(", ModelError, "depends on the texts before or beside it"),
    "a name of gpuml's": ('"classes-seen": len(classes)', '"rows": 1.0', TrainError, "'rows' is gpuml's own name"),
    "a score that is none": ('"classes-seen": len(classes)', '"loss": 1.0', TrainError, "'loss' is gpuml's own name"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_sentence(name, project, store):
    old, new, kind, sentence = WRONG[name]
    assert old in CELL
    made = cell(CELL.replace(old, new))
    with pytest.raises(kind, match=sentence):
        fit(load("dev", QUICK), model=made["make_model"], metrics=made["scores"])
    assert not list((project / "outputs").glob("*/certificate.json"))


PARAMETERS_OF = {
    "a third one": ("(labels, probabilities, classes):", "(labels, probabilities, weights):"),
    "too few": ("(labels, probabilities, classes):", "(labels):"),
    "another order": ("(labels, probabilities, classes):", "(classes, labels, probabilities):"),
}


@pytest.mark.parametrize("name", PARAMETERS_OF)
def test_wrong_parameters_are_refused_before_a_run_begins(name, project, store):
    made = cell(CELL.replace(*PARAMETERS_OF[name]))
    with pytest.raises(ConfigError, match=r"metrics: def scores\(.*; write def scores\(labels, probabilities\) or"):
        fit(load("dev", QUICK), metrics=made["scores"])
    made = cell(CELL.replace("(config, labels, tokenizer):", "(config, names, words):"))
    with pytest.raises(ConfigError, match=r"model: def make_model\(config, names, words\): it gets config and labels,"):
        fit(load("dev", QUICK), model=made["make_model"])
    assert not list((project / "outputs").glob("*"))


def test_its_file_is_named(project, store):
    "Where its parameters are wrong, and where it raises"
    module = project / "mine.py"
    module.write_text(CELL.replace("probabilities, classes):", "probabilities, weights):"))
    ended = gpuml("train", "--metrics", "mine:scores", cwd=project)
    assert ended.returncode == 78 and "in mine.py, line 23: it gets labels" in ended.stderr, ended.stderr
    raises = CELL.replace("probabilities.max(1)", "probabilities.max(axis=2)")
    module.write_text(raises)  # of another size: within a second Python would take it for the module that it compiled
    ended = gpuml("train", "--metrics", "mine:scores", cwd=project)
    assert ended.returncode == 1 and "scores (mine.py, line 23): AxisError: " in ended.stderr, ended.stderr
    assert "it got labels (int64 [4]), probabilities (float64 [4, 2]), classes (2 names)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_rows_without_padding_are_refused(project, store):
    with pytest.raises(ConfigError, match="train.rows: packed: a model of the notebook's own is given padded texts"):
        fit(load("dev", ["train.rows=packed"]), model=cell()["make_model"])


def test_a_notebook_trains_it_in_a_job(project, store):
    "The same cells as at a desk; another attempt finds it done"
    line = "run = %gpu_train --model make_model --metrics scores train.epochs=1"
    write_notebook(project / "nbs" / "n.ipynb", PARAMETERS, "%load_ext gpuml", CELL, line, "run.predict(['good'])")
    facts = {"format": 1, "notebook": "nbs/n.ipynb", "config": "dev", "root": ".", "path": ["."]}
    (project / "bundle.json").write_text(json.dumps(facts))
    for _ in range(2):
        ended = gpuml("run", str(project), "--run", "job-1", cwd=project)
        assert ended.returncode == 0, ended.stderr
    run = load_run(str(project / "outputs" / "job-1"))
    assert run.metrics["own"]["classes-seen"] == 2
    ended = gpuml("predict", "job-1", "data/a.csv", "out.csv", cwd=project)
    assert ended.returncode == 0, ended.stderr
    assert len(Path("out.csv").read_text().splitlines()) == 25
    assert np.isfinite(run.metrics["loss"])


def test_it_is_exported_to_onnx(project, store):
    pytest.importorskip("onnxscript")
    from gpuml.training.onnx_file import export_onnx

    run = fit(load("dev", [*QUICK, "train.epochs=1"]), model=cell()["make_model"])
    exported = export_onnx(run, project / "onnx")
    assert json.loads((project / "onnx" / "config.json").read_text())["id2label"] == dict(
        zip(("0", "1"), run.labels, strict=True)
    )
    assert exported


def test_the_command_takes_it_from_a_module(project, store):
    "The text is a cell's with the same content; without the module the run is still loaded, and goes on with its own code"
    package = project / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("from . import own\n")
    (package / "own.py").write_text(CELL)
    own = ["--model", "mine.own:make_model", "--metrics", "mine.own:scores"]
    ended = gpuml("train", *QUICK, "train.best_metric=sure", *own, cwd=project)
    assert ended.returncode == 0, ended.stderr
    assert "sure 0." in ended.stdout and "Warning" not in ended.stderr
    [folder] = (path.parent for path in (project / "outputs").glob("*/certificate.json"))
    made = cell()
    same = recipe_of(made["make_model"], made["scores"])
    assert (folder / "own_code.py").read_text() == same.content()
    (package / "own.py").unlink()
    ended = gpuml("predict", folder.name, "data/a.csv", "out.csv", cwd=project)
    assert ended.returncode == 0, ended.stderr
    ended = gpuml("train", *own, cwd=project)
    assert ended.returncode == 78 and "--model mine.own:make_model: mine.own can't be read in" in ended.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("mine:make_model", "mine is a package (ROOT/mine), and functions are taken from its modules; write mine.own:make_model"),
        ("mine:scored", "mine is a package (ROOT/mine), and functions are taken from its modules; write mine.MODULE:scored"),
        ("mime.own:make_model", "there is no mime/own.py in ROOT, and no package that is installed has it"),
        ("mine.owm:make_model", "there is no mine/owm.py in ROOT, and no package that is installed has it; did you mean 'mine.own'?"),
        ("mine.broken:make_model", "mine.broken can't be read in ROOT: ModuleNotFoundError: No module named 'no_such_package'"),
        ("bare:make_model", "bare is a package (ROOT/bare), and functions are taken from its modules; write bare.MODULE:make_model"),
    ],
)  # fmt: skip
def test_a_module_that_is_none(words, sentence, project):
    for folder in ("mine", "bare"):
        (project / folder).mkdir()
    (project / "mine" / "__init__.py").write_text("")
    (project / "mine" / "__main__.py").write_text("raise SystemExit('this is not what is meant')\n")
    (project / "mine" / "own.py").write_text(CELL)
    (project / "mine" / "broken.py").write_text("import no_such_package\n")
    ended = gpuml("train", "--model", words, cwd=project)
    assert ended.returncode == 78 and "Traceback" not in ended.stderr
    text = " ".join(ended.stderr.split())
    assert f"gpuml: --model {words}: {sentence.replace('ROOT', str(project))}" in text, text
