"What model/README.md says: the run's own scores and data, readable for the hub, and no folder of the machine"

import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from gpuml.base.loading import load
from gpuml.training.fit import fit
from gpuml.training.results import Run
from tests.conftest import rows
from tests.test_predict import trained  # noqa: F401  a fixture


@pytest.fixture
def scored(project, store, tmp_path_factory):
    "A run with test data elsewhere on this machine, some of which was trained on, and an odd label"
    elsewhere = tmp_path_factory.mktemp("else where") / "test.csv"
    lines = [f"{text},{label}\n" for text, label in rows(26)]
    (project / "data" / "a.csv").write_text("text,label\n" + "".join(lines[:24]).replace("billing", "bill|<i>ing"))
    elsewhere.write_text("text,label\n" + "".join(lines[20:]).replace("billing", "bill|<i>ing"))
    return fit(load("dev", [f"data.test={elsewhere}", "train.class_weights=balanced"])), elsewhere


def test_a_card_has_the_scores_of_its_run(scored):
    run, elsewhere = scored
    card = ModelCard.load(run.model_folder / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-classification", "transformers")
    assert (card.data.get("language"), card.data.get("base_model"), card.data.get("license")) == (None, None, None)
    (test,) = run.evaluations
    for split, scores in (("validation", run.metrics), ("test", test.scores)):
        results = {r.metric_type: r.metric_value for r in card.data.eval_results if r.dataset_split == split}
        assert results == pytest.approx(
            {"accuracy": scores["accuracy"], "f1": scores["macro_f1"], "loss": scores["loss"]}, abs=1e-6
        )
    assert f"| test | {test.scores['accuracy']:.3f} |" in card.text
    assert "| bill\\|&lt;i&gt;ing |" in card.text and "bill|" not in card.text
    assert re.search(r"- \d of 6 test texts are in the training data, too \(the first: test.csv:\d+\)", card.text)
    assert "| `train.class_weights` | balanced |" in card.text


def test_a_card_names_no_folder_of_the_machine(scored, project):
    run, elsewhere = scored
    text = (run.model_folder / "README.md").read_text()
    assert "`data`, text in `text`, label in `label`" in text
    assert "rows of `test.csv`" in text
    assert json.loads((run.folder / "certificate.json").read_text())["data_fingerprint"] in text
    for folder in (project, elsewhere.parent, elsewhere.parent.name, run.config.model.name):
        assert str(folder) not in text
    assert "/tmp" not in text and "/root" not in text


def test_its_code_runs_and_answers_as_the_run_does(trained):  # noqa: F811
    run = Run(trained)
    code = re.search(r"```python\n(.*?)```", (run.model_folder / "README.md").read_text(), re.S)[1]
    code = code.replace('classify(["a text"]', 'print(classify(["late parcel"]').rstrip() + ")"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run.model_folder, capture_output=True, text=True, check=True
    )
    assert f"'label': '{run.predict('late parcel').labels[0]}'" in done.stdout


def test_a_table_of_the_notebook_is_called_what_it_is(project, store):
    data = [{"text": text, "label": label} for text, label in rows()]
    run = fit(load("dev", ["train.epochs=1"]), data=data)
    text = (run.model_folder / "README.md").read_text()
    assert "- Data: `list`, text in `text`" in text
    assert ".jsonl" not in text


def test_its_code_cuts_where_the_model_ends(store):
    "data.max_length may be more than a model reads, and its pipeline fails there"
    run = fit(load("dev", ["train.epochs=1", "data.max_length=4096"]))
    assert "truncation=True, max_length=512)" in (run.model_folder / "README.md").read_text()
