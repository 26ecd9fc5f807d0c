"A model that raises, or answers with what is no number: the rows are named, and what was good before is kept"

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gpuml.base.errors import DataError, GpumlError, TrainError
from gpuml.base.loading import load
from gpuml.training.fit import fit
from gpuml.training.model import load_classifier, load_tokenizer, save
from gpuml.training.results import Run, load_run
from gpuml.ui.cli import main
from tests.conftest import runs_in
from tests.test_interrupt import OVERRIDES, result, undisturbed  # noqa: F401
from tests.test_predict import CACHE, run, trained, write_csv  # noqa: F401


class Ruin(torch.autograd.Function):
    "Passes on, and gives gradients that are not numbers"

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def raises(error):
    def fault(logits):
        raise error

    return fault


def nan(logits):
    return logits * float("nan")


def one_infinite(logits):
    return logits.index_fill(0, torch.tensor([0]), float("inf"))


@contextmanager
def going_wrong(fault, when):
    "Let every classifier go wrong in its forward pass, where `when` says so of its mode"

    def hook(module, arguments, out):
        if type(module).__name__.endswith("ForSequenceClassification") and when(module):
            out.logits = fault(out.logits)
        return out

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


RAISED = r"the model raised IndexError: index out of range in self, "
REMEDY = "; a lower train.learning_rate is the usual remedy"
KEPT = r"; the weights of epoch {0} of {0}, the best macro-F1, are kept in outputs/dev-.*/model, without a certificate$"
ALL = r"at 4 of 4 validation rows \(data/a.csv:8, data/a.csv:9, data/a.csv:18, data/a.csv:23\)"

CASES = {  # what goes wrong, in training or not, after so many updates and evaluations → what is said; the epoch that is kept
    "forward raises at once": (raises(IndexError("index out of range in self\nmore")), True, 0, 0, RAISED + r"at update 1 \(training rows data/a.csv:", 0),
    "forward raises in epoch 2": (raises(IndexError("index out of range in self")), True, 4, 1, RAISED + r"at update 5 \(training rows data/a.csv:", 1),
    "forward raises without a word": (raises(AssertionError()), True, 0, 0, r"the model raised AssertionError, at update 1 \(", 0),
    "the loss is none in epoch 2": (nan, True, 4, 1, r"the loss is nan at update 5 \(training rows data/a.csv:\d+, .*\)" + REMEDY, 1),
    "the last gradients of an epoch are none": (Ruin.apply, True, 2, 0, r"the gradients are not finite at update 3 \(training rows data/a.csv:\d+, .*\)" + REMEDY, 0),
    "an evaluation raises": (raises(IndexError("index out of range in self")), False, 6, 1, RAISED + "in the evaluation of epoch 2, " + ALL, 1),
    "the first evaluation is no number": (nan, False, 3, 0, "the logits are not finite, in the evaluation of epoch 1, " + ALL + REMEDY, 0),
    "a late evaluation is no number (spaCy#10217)": (nan, False, 9, 2, "the logits are not finite, in the evaluation of epoch 3, " + ALL + REMEDY, 2),
    "one row's answer is infinite": (one_infinite, False, 6, 1, r"the logits are not finite, in the evaluation of epoch 2, at 1 of 4 validation rows \(data/a.csv:\d+\)" + REMEDY, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_ends_with_the_rows_and_keeps_the_best(case, store):
    fault, training, updates, evaluations, message, kept = CASES[case]
    seen = []

    def when(module):
        p = seen[-1]
        there = p.phase in ("training", "evaluating") and p.step >= updates and len(p.evaluations) >= evaluations
        return there and module.training == training

    with going_wrong(fault, when), pytest.raises(TrainError, match=message) as e:
        fit(load("dev", ["train.epochs=4", "train.learning_rate=1e-2"]), watch=seen.append)
    assert e.value.exit_code == 1 and seen[-1].phase == "failed"
    (recorded,) = runs_in(store)
    assert recorded.info.status == "FAILED" and recorded.data.tags["gpuml.reason"] == f"TrainError: {e.value}"
    if not kept:
        assert not (store.parent / "outputs").exists() and "kept" not in str(e.value)
        return
    e.match(KEPT.format(kept))
    (folder,) = (store.parent / "outputs").iterdir()
    classifier = load_classifier(folder / "model")
    assert all(p.isfinite().all() for p in classifier.parameters()) and load_tokenizer(folder / "model")
    with pytest.raises(GpumlError, match="not a finished run"):
        load_run(folder)


def test_the_weights_that_are_kept_are_those_of_the_epoch(store):
    "A run that fails in its second epoch keeps what a run that is stopped after its first one has"
    words = ["train.schedule=constant", "train.warmup=0", "train.best_metric=null"]
    calm, seen = fit(load("dev", ["train.epochs=1", "output=calm", *words])), []
    with going_wrong(nan, lambda module: len(seen[-1].evaluations) == 1), pytest.raises(TrainError):
        fit(load("dev", ["train.epochs=2", *words]), watch=seen.append)
    (folder,) = (store.parent / "outputs").iterdir()
    weights = [p / "model" / "model.safetensors" for p in (calm.folder, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_failed_goes_on(store, undisturbed):  # noqa: F811
    "What was kept is not in the way of an attempt that does not fail"
    seen = []
    with (
        going_wrong(nan, lambda module: len(seen[-1].evaluations) == 2),
        pytest.raises(TrainError, match="are kept in"),
    ):
        fit(load("dev", OVERRIDES), watch=seen.append)
    assert result(fit(load("dev", OVERRIDES), resume="latest")) == undisturbed


def test_predictions_name_what_failed(run, project, capsys):  # noqa: F811
    texts = ["late parcel", "card charged", "refund"]
    write_csv("a.csv", texts)
    file = ["predict", str(run.folder), "a.csv", "out.csv", *CACHE]
    for fault, in_memory, in_file in [
        (raises(ValueError("no such shape")), "the model raised ValueError: no such shape, at text 0, 1, 2", "at a.csv:2, a.csv:3, a.csv:4"),
        (nan, "the logits are not finite, at text 0, 1, 2; its weights may be damaged", "at a.csv:2, a.csv:3, a.csv:4; its weights"),
        (one_infinite, "the logits are not finite, at text 0; its weights may be damaged", "at a.csv:2; its weights"),
    ]:  # fmt: skip
        with going_wrong(fault, lambda module: True):
            with pytest.raises(TrainError) as e:
                Run(run.folder).predict(texts)
            assert str(e.value) == in_memory
            assert main(file) == 1
        error = capsys.readouterr().err
        assert in_file in error and "Traceback" not in error and not Path("out.csv").exists()


def test_weights_that_are_no_numbers_predict_nothing(run, tmp_path):  # noqa: F811
    shutil.copytree(run.folder, tmp_path / "sick")
    classifier = load_classifier(run.model_folder)
    classifier.classifier.bias.data[0] = float("inf")
    save(classifier, load_tokenizer(run.model_folder), tmp_path / "sick" / "model")
    with pytest.raises(TrainError, match="the logits are not finite, at text 0, 1; its weights may be damaged"):
        load_run(tmp_path / "sick").predict(["late parcel", "refund"])


def test_texts_that_leave_no_token(store, tiny, tmp_path):
    "A tokenizer that adds nothing, and drops what the text consists of: no division by zero, and no answer from nothing"
    project, bare = store.parent, shutil.copytree(tiny, tmp_path / "bare")
    for name, change in (
        ("tokenizer", {"post_processor": None}),
        ("tokenizer_config", {"tokenizer_class": "TokenizersBackend"}),
    ):
        stored = json.loads((bare / f"{name}.json").read_text())
        (bare / f"{name}.json").write_text(json.dumps(stored | change))
    words = [f"model.name={bare}", "train.epochs=1"]
    made = fit(load("dev", words))
    for texts, place in ((["\u200b"], "text 0"), (["late parcel", ""], "text 1")):
        with pytest.raises(TrainError, match=f"the tokenizer makes no token of it, at {place}"):
            made.predict(texts)
    write_csv("b.csv", ["late parcel", "\u200b"])
    with pytest.raises(TrainError, match="the tokenizer makes no token of it, at b.csv:3"):
        made.predict_file("b.csv", "out.csv", CACHE)
    with open(project / "data" / "a.csv", "a") as f:
        f.write("\u200b,billing\n")
    with pytest.raises(DataError, match="data/a.csv:26: the tokenizer makes no token of this text"):
        fit(load("dev", words))
