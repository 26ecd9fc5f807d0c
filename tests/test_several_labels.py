"Texts that may have several labels, or none: read, trained, resumed, predicted, evaluated, recorded"

import csv
import json
import os
import re
import signal

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from gpuml.base.config import Config
from gpuml.base.errors import ConfigError, DataError, GpumlError, Preempted, TrainError
from gpuml.base.loading import load
from gpuml.data import reading
from gpuml.data.frames import with_frame
from gpuml.train import load_run
from gpuml.training import origin
from gpuml.training.fit import fit
from tests.conftest import runs_in
from tests.own_code import cell

SEVERAL = ["data.label_separator=|", "data.validation_fraction=0.25"]
WORDS = {"billing": "invoice card charged", "delivery": "parcel courier late", "urgent": "again when not"}


def labelled(count: int = 48) -> list[tuple[str, list[str]]]:
    "Texts with words of each of their labels: none, one, two or all three"
    made = []
    for i in range(count):
        labels = [label for place, label in enumerate(WORDS) if i % 8 >> place & 1]
        words = [word for label in labels for word in WORDS[label].split()[i % 2 :]]
        made.append((" ".join([*words, "my", str(i)]), labels))
    return made


@pytest.fixture
def sets(project):
    "The project's data has several labels a text, each row's in another order"
    with open(project / "data" / "a.csv", "w", newline="") as f:
        rows = [(text, " | ".join(labels[:: 1 - 2 * (i % 2)])) for i, (text, labels) in enumerate(labelled())]
        csv.writer(f).writerows([("text", "label"), *rows])
    return project


@pytest.fixture
def run(sets, store):
    "A finished run"
    return fit(load("dev", [*SEVERAL, "train.epochs=6", "train.learning_rate=5e-3", "tracking.log_model=true"]))


def weights(run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def test_every_source_has_the_same_sets(sets, tmp_path):
    "CSV with a separator, lists in JSON lines, Parquet and a DataFrame: one content, whatever the order in a row"
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = load("dev", SEVERAL)
    data = reading.read(config)
    assert data.labels == ["billing", "delivery", "urgent"]
    assert data.train.sets.names == data.validation.sets.names and "" in data.train.sets.names
    texts = {
        **dict(zip(data.train.texts(), data.train.labels)),
        **dict(zip(data.validation.texts(), data.validation.labels)),
    }
    assert texts == {text: "|".join(sorted(labels)) for text, labels in labelled()}
    table = {"text": [text for text, _ in labelled()], "label": [labels for _, labels in labelled()]}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": l}) + "\n" for t, l in labelled()))
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert reading.read(load("dev", [*SEVERAL, f"data.train={tmp_path / name}"])).fingerprint == data.fingerprint
    assert reading.read(with_frame(config, pd.DataFrame(table))).fingerprint == data.fingerprint
    with pytest.raises(DataError, match="'label' is a list, not a text"):
        reading.read(with_frame(load("dev"), pd.DataFrame(table)))


def test_classes_of_numbers_in_lists_get_their_names(sets, tmp_path):
    "As HuggingFace's `datasets` leaves them"
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = {"label": {"feature": {"names": [*WORDS], "_type": "ClassLabel"}, "_type": "List"}}
    places = [[[*WORDS].index(label) for label in labels] for _, labels in labelled()]
    table = pa.table({"text": [text for text, _ in labelled()], "label": places})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kind}})}), tmp_path / "n.parquet"
    )
    named = reading.read(load("dev", [*SEVERAL, f"data.train={tmp_path / 'n.parquet'}"]))
    assert named.fingerprint == reading.read(load("dev", SEVERAL)).fingerprint


def test_bad_sets_are_refused_or_skipped(sets):
    "Each with its line; the same in a list"
    bad = ["x,billing||urgent", "x,billing|", "x,urgent|urgent"]
    (sets / "data" / "a.csv").open("a").write("\n".join(bad) + "\n")
    with pytest.raises(DataError) as e:
        reading.read(load("dev", SEVERAL))
    assert str(e.value).count("a label is missing beside '|'") == 2 and "'urgent' stands twice" in str(e.value)
    data = reading.read(load("dev", [*SEVERAL, "data.on_bad_row=skip"]))
    assert (data.skips, len(data.train) + len(data.validation)) == (3, 48)
    (sets / "b.jsonl").write_text('{"text": "a", "label": ["billing", "a|b"]}\n{"text": "b", "label": {"x": 1}}\n')
    with pytest.raises(DataError) as e:
        reading.read(load("dev", [*SEVERAL, "data.train=b.jsonl"]))
    assert "b.jsonl:1: 'label' is a list with" in str(e.value) and "b.jsonl:2: 'label' is an object" in str(e.value)
    with pytest.raises(DataError, match="the label 'urgnet' is not in data.labels; did you mean 'urgent'?"):
        (sets / "data" / "a.csv").write_text("text,label\na,billing|urgnet\nb,urgent\n")
        reading.read(load("dev", [*SEVERAL, "data.labels=[billing,urgent]"]))


def test_every_label_is_on_both_sides(sets):
    "Rare sets do not swell validation, and a label that is often with others has its share"
    rare = [(f"text {i}", f"tag {i % 40}|billing" if i % 3 else "billing") for i in range(600)]
    (sets / "data" / "a.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rare))
    data = reading.read(load("dev", ["data.label_separator=|"]))
    train, validation = data.train.counts(), data.validation.counts()
    assert train.min() > 0 and validation.min() > 0
    assert 0.15 < len(data.validation) / 600 < 0.25


def test_without_a_separator_nothing_changed(sets):
    "Names of caches, and whose labels look like several in one is told so"
    from gpuml.base.files import fingerprint
    from gpuml.base.storage import Storage
    from gpuml.data.cache import rows_folder
    from gpuml.data.shards import CACHE_VERSION

    config, file = load("dev"), Storage().info(sets / "data" / "a.csv")
    d = config.data
    key = fingerprint(CACHE_VERSION, file.url, file.size, file.version, d.text, d.label, d.delimiter)
    assert rows_folder(file, config).name == key[:32] != rows_folder(file, load("dev", SEVERAL)).name
    (sets / "data" / "a.csv").write_text(
        "text,label\n" + "".join(f"{i},{['a|b', 'a', 'b|c', 'a|c'][i % 4]}\n" for i in range(24))
    )
    (note,) = (note for note in reading.read(config).notes if "label_separator" in note)
    assert note.startswith("3 labels look like several in one, such as 'a|b'")


HINT = "\nrows without a label may be texts that have none of several: 3 labels look like several in one, such as 'a|b'"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_missing_label_may_be_none_of_several(kind, project):
    "Whether the separator is told goes by the labels that the other rows have, of the same file and of others"
    labels = ["a|b", "a", "b|c", "a|c"]

    def lines(labels):
        rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
        if kind == "csv":
            return "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
        return "".join(json.dumps(row) + "\n" for row in rows)

    def refusal(*files):
        for number, labels in enumerate(files):
            (project / f"part-{number}.{kind}").write_text(lines(labels))
        with pytest.raises(DataError, match="the label is missing") as e:
            reading.look(load("dev", [f"data.train=part-*.{kind}"]))
        return str(e.value)

    assert HINT in refusal([*labels, "", *labels]) and HINT in refusal(["", *labels])
    assert HINT in refusal(["a", ""], labels)
    for many in (1, 2):  # the second file was read before
        assert HINT in refusal(labels, ["a", ""]), many
    assert "several" not in refusal(["a", "", "b", "a, however", "b, however"], ["b"])


def test_a_run(run):
    "Scores, report, predictions and mistakes say what is so"
    import torch
    from transformers import pipeline

    metrics = run.metrics
    assert {"accuracy", "macro_f1", "micro_f1", "pairs"} <= metrics.keys() and "confusion" not in metrics
    count = metrics["rows"]
    assert count > 10
    assert "exact match" in repr(run) and "threshold" in repr(run) and "accuracy" not in repr(run)
    assert "exact match" in run._repr_html_() and (run.folder / "confusion.svg").read_text().startswith("<svg")
    config = json.loads((run.model_folder / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and config["label_separator"] == "|"
    assert config["label_thresholds"] == {label: row["threshold"] for label, row in metrics["classes"].items()}
    (certificate,) = (json.loads((run.folder / "certificate.json").read_text()),)
    assert certificate["evaluation"]["micro_f1"] == pytest.approx(metrics["micro_f1"])

    texts = ["invoice card charged my", "parcel courier late again when not my", "my"]
    predicted = run.predict(texts)
    has = predicted.probabilities >= run.decision.thresholds
    assert predicted.labels == ["|".join(np.array(run.labels)[row]) for row in has]
    frame = predicted.to_frame()
    assert [*frame.columns] == ["text", "label", "probability", "p_billing", "p_delivery", "p_urgent"]
    chances = np.where(has, predicted.probabilities, 1 - predicted.probabilities)
    assert np.allclose(frame.probability, chances.prod(1))
    answers = pipeline("text-classification", model=str(run.model_folder), top_k=None, device=torch.device("cpu"))(
        texts
    )
    for row, answer in zip(predicted.probabilities, answers, strict=True):
        assert {a["label"]: a["score"] for a in answer} == pytest.approx(dict(zip(run.labels, row)), abs=1e-5)

    with open(run.folder / "predictions.csv", newline="") as f:
        wrong = [row for row in csv.DictReader(f) if row["label"] != row["predicted"]]
    assert len(run.mistakes(99)) == len(wrong) and metrics["accuracy"] == pytest.approx(1 - len(wrong) / count)
    with pytest.raises(GpumlError, match="none of the classes"):
        run.mistakes(label="delivery|urgent")


def test_files_and_evaluations(run, sets):
    (sets / "new.csv").write_text("id,text\n1,invoice card charged my\n2,my\n3,parcel courier late again when not my\n")
    done = run.predict_file("new.csv", "out.csv", keep=["id"])
    with open("out.csv", newline="") as f:
        rows = [*csv.DictReader(f)]
    predicted = run.predict(["invoice card charged my", "my", "parcel courier late again when not my"]).labels
    assert [(row["id"], row["label"]) for row in rows] == [*zip("123", predicted)]
    counts = {label: sum(label in answer for answer in predicted) for label in run.labels}
    assert {**dict.fromkeys(counts, 0), **done.counts} == {**counts, "(no label)": predicted.count("")} and len(
        done
    ) == 3

    (sets / "test.csv").write_text("text,label\n" + "".join(f"{t} new,{';'.join(l)}\n" for t, l in labelled(16)))
    evaluation = run.evaluate("test.csv", ["data.label_separator=;"])
    assert evaluation.rows == 16 and {"accuracy", "macro_f1", "micro_f1", "loss"} == evaluation.intervals.keys()
    assert sum(n for _, _, n, _, _ in evaluation.bins) == 48  # labels of texts
    assert "of all labels of all texts" in repr(evaluation) and "exact match" in evaluation._repr_html_()
    assert [row["score"] for row in evaluation.values()][:3] == ["exact match", "macro-F1", "micro-F1"]
    frame = pd.DataFrame({"text": ["my parcel"], "label": [["delivery"]]})
    assert run.evaluate(frame, name="frame").rows == 1
    with pytest.raises(DataError, match="the label 'urgnet' is not in data.labels"):
        (sets / "test.csv").write_text("text,label\na,urgnet\n")
        run.evaluate("test.csv")


def test_mlflow_has_scores_by_label_and_a_model_that_says_them(run, store):
    import mlflow

    (recorded,) = runs_in(store)
    assert recorded.data.metrics["micro_f1"] == pytest.approx(run.metrics["micro_f1"])
    assert {"f1/billing", "f1/delivery", "f1/urgent"} <= recorded.data.metrics.keys()
    assert "exact match" in recorded.data.tags["mlflow.note.content"]
    assert "3 labels, of which a text may have several" in recorded.data.tags["mlflow.note.content"]
    model = mlflow.pyfunc.load_model(f"runs:/{recorded.info.run_id}/{run.id}")
    answers = model.predict(["parcel courier late again when not my", "my"])
    probabilities = run.predict(["parcel courier late again when not my", "my"]).probabilities
    assert [*answers.columns] == ["label", "probability", *(f"p_{label}" for label in run.labels)]
    assert answers.label.tolist() == run.predict(["parcel courier late again when not my", "my"]).labels
    assert np.allclose(answers[[f"p_{label}" for label in run.labels]], probabilities, atol=1e-5)


def test_a_run_goes_on_bit_by_bit(sets, store):
    "Stopped and resumed, with weights of labels: the bits of one that was not"
    options = [*SEVERAL, "train.class_weights=balanced", "model.dropout=0.1"]
    whole = fit(load("dev", options))

    left = [4]  # updates after which it is stopped

    def stop(progress):
        if left and progress.step >= left[0]:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        fit(load("dev", options), watch=stop)
    again = fit(load("dev", options), resume="latest")
    assert weights(again) == weights(whole) and again.metrics["classes"] == whole.metrics["classes"]
    plain = fit(load("dev", options[:-2] + ["model.dropout=0.1"]))
    assert weights(plain) != weights(whole)


def test_two_processes_have_the_bits_of_one(sets, store, forking, monkeypatch):
    options = [*SEVERAL, "train.slots=2", "train.epochs=1"]
    one = fit(load("dev", options))
    monkeypatch.setenv("GPUML_GPUS", "2")
    two = fit(load("dev", options))
    assert weights(two) == weights(one)
    assert two.metrics["classes"] == one.metrics["classes"]


def test_a_model_with_other_labels_forgets_its_thresholds(run):
    (run.folder.parents[1] / "one.csv").write_text(
        "text,label\n" + "".join(f"my {i},{[*WORDS][i % 2]}\n" for i in range(24))
    )
    again = fit(load("dev", ["train.epochs=1", "data.train=one.csv", f"model.name={run.model_folder}"]))
    config = json.loads((again.model_folder / "config.json").read_text())
    assert "label_thresholds" not in config and config["problem_type"] == "single_label_classification"
    with pytest.raises(ConfigError, match="was trained with one label a text"):
        again.evaluate("one.csv", ["data.label_separator=|"])


def test_what_does_not_fit_together():
    def config(**data):
        return Config(data={"train": "a.csv", "label_separator": "|", **data})

    assert config().data.label_separator == "|"
    for separator in ("a", "1", '"', "\n"):
        with pytest.raises(ValueError, match="must be a sign"):
            config(label_separator=separator)
    with pytest.raises(ValueError, match="needs a data.order other than early"):
        config(order="early", labels=["a", "b"])
    with pytest.raises(ValueError, match="micro_f1 is the accuracy"):
        Config(data={"train": "a.csv"}, train={"best_metric": "micro_f1"})


def test_windows_and_rows_without_padding_train_the_same(sets, store):
    "The other orders and shapes take sets as they take classes"
    options = [*SEVERAL, "train.epochs=1", "model.dropout=0"]
    padded = fit(load("dev", [*options, "train.rows=padded"]))
    packed = fit(load("dev", [*options, "train.rows=packed"]))
    assert packed.metrics["curve"][-1][1] == pytest.approx(padded.metrics["curve"][-1][1], abs=1e-4)
    windows = fit(load("dev", [*options, "data.order=windows"]))
    assert windows.metrics["updates"] == padded.metrics["updates"]


def test_a_server_says_sets(run):
    from gpuml.ui.web import answer_of, health_of

    texts = ["invoice card charged my", "my"]
    predicted = run.predict(texts)
    answers = answer_of(run.id, predicted).predictions
    assert [(a.label, a.probability) for a in answers] == [(label, round(p, 6)) for label, p in predicted]
    assert {"exact match", "macro-F1", "micro-F1", "validation loss"} == health_of(run).scores.keys()
    thresholds = {label: row["threshold"] for label, row in run.metrics["classes"].items()}
    assert health_of(run).thresholds == thresholds


def test_the_code_of_the_card_goes_by_the_thresholds(run):
    card = (run.model_folder / "README.md").read_text()
    assert "| class | precision | recall | F1 | threshold | rows |" in card
    text = "invoice card charged my"
    *lines, last = (
        re.search(r"```python\n(.*?)```", card, re.S)[1].replace('"a text"', f'"{text}"').strip().splitlines()
    )
    lines = "\n".join(lines).replace('model="."', f'model="{run.model_folder}", device="cpu"')
    values = {}
    exec(lines, values)
    (labels,) = eval(last, values)
    assert sorted(labels) == sorted(filter(None, run.predict(text).labels[0].split("|")))


SAME = """\
from transformers import AutoModelForSequenceClassification

FOLDER = "@"


def make_model(config, labels):
    options = {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    return AutoModelForSequenceClassification.from_pretrained(FOLDER, **options)


def scores(labels, probabilities, classes):
    assert labels.shape == probabilities.shape and classes == ["billing", "delivery", "urgent"]
    return {"labels-a-text": labels.sum() / len(labels), "missed": ((probabilities < 0.5) & (labels == 1)).sum()}
"""


def test_a_model_of_ones_own_that_is_the_same_learns_the_same(sets, store):
    "Weights, thresholds and scores are those of the built-in model, bit by bit; it is loaded, evaluated and predicts alike"
    options = [*SEVERAL, "train.epochs=3", "train.learning_rate=5e-3", "data.test=data", "tracking.log_model=true"]
    made = cell(SAME.replace("@", str(origin.locate(load("dev")))))
    plain = fit(load("dev", options))
    own = fit(load("dev", [*options, "train.best_metric=macro_f1"]), model=made["make_model"], metrics=made["scores"])
    first, second = (load_file(run.model_folder / "model.safetensors") for run in (plain, own))
    assert {n: t.tobytes() for n, t in first.items()} == {n: t.tobytes() for n, t in second.items()}
    assert own.decision.thresholds.tolist() == plain.decision.thresholds.tolist()
    alike = ("loss", "accuracy", "macro_f1", "micro_f1", "classes", "pairs")
    assert {key: own.metrics[key] for key in alike} == {key: plain.metrics[key] for key in alike}
    again = load_run(str(own.folder))
    texts = [text for text, _ in labelled()]
    assert list(again.predict(texts)) == list(plain.predict(texts))
    expected = sum(len(labels) for _, labels in labelled()) / len(labelled())
    assert again.evaluate("data/a.csv").scores["own"]["labels-a-text"] == pytest.approx(expected)
    assert {"labels-a-text", "missed"} == set(own.metrics["own"])


def test_a_score_that_wants_one_label_a_text_is_refused(sets, store):
    source = "def wrong(labels, probabilities):\n    return {'x': (probabilities.argmax(1) != labels).mean()}\n"
    with pytest.raises(TrainError, match="wrong: ValueError: operands could not be broadcast"):
        fit(load("dev", SEVERAL), metrics=cell(source)["wrong"])
