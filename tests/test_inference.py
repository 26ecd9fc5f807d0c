"Logits in rows by graphs, read late: what padded batches give, whatever the texts, the memory and the weights"

import csv

import numpy as np
import pytest
import torch

from gpuml.base.errors import Preempted, TrainError
from gpuml.base.loading import load
from gpuml.data.tokens import join
from gpuml.training import evaluation
from gpuml.training.failure import BatchError, NotFinite
from gpuml.training.fit import fit
from gpuml.training.inference import Inference, inference_for
from gpuml.training.packing import take_rows
from gpuml.training.row_model import LATE, next_row, up_to
from tests.rows import classifier_of
from tests.tiny import WORDS

LENGTHS = np.random.default_rng(0).integers(1, 60, 80)


def texts_of(lengths=LENGTHS):
    "Texts of random tokens with these lengths"
    rng = np.random.default_rng(1)
    return join([(rng.integers(5, 99, n).astype(np.uint16), np.array([n])) for n in lengths])


def switched(kind="distilbert", **options):
    "A classifier that takes rows, and its `Inference`"
    classifier = classifier_of(kind)
    assert take_rows(classifier, texts_of(), 1, None) == ""
    return classifier, Inference(classifier, 1, packed=True, **options)


def padded(classifier, tokens):
    return evaluation.logits_of(classifier, tokens, 1)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "modernbert", "gpt2", "qwen3"])
def test_rows_give_what_padded_batches_give(kind):
    "In the texts' order; and what a text's logits are does not depend on what else is in its row"
    tokens = texts_of()
    classifier, inference = switched(kind)
    found = inference.logits_of(tokens)
    assert np.abs(found - padded(classifier, tokens)).max() < 1e-5 * np.abs(found).max()
    assert np.abs(found).std(0).min() > 1e-3  # texts differ
    few = np.array([7, 3, 60])
    assert np.allclose(inference.logits_of(tokens.take(few)), found[few], atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_rows_have_room(seed):
    "For all of the texts that come into them, and for texts of padding no longer than the longest of these"
    rng = np.random.default_rng(seed)
    most = 2 ** int(rng.integers(5, 12))
    lengths = -np.sort(-np.minimum(rng.lognormal(3, rng.uniform(0.1, 1.5), 300).astype(int) + 1, 5000))
    shapes = set()
    while len(lengths):
        count, shape = next_row(lengths, most)
        size, longest = int(lengths[:count].sum()), int(lengths[0])
        assert count >= 1 and size <= shape.tokens and (count == 1 or size <= most)
        assert count + -(-(shape.tokens - size) // longest) <= shape.texts <= shape.tokens
        assert longest <= up_to(shape) < max(5, 2 * longest)
        shapes.add(shape)
        lengths = lengths[count:]
    assert len(shapes) <= 16


@pytest.mark.parametrize("most", [16, 64, 256])
def test_many_rows_are_read_late(most):
    "More of them than are under way, and than are written ahead"
    calls = []
    classifier, inference = switched(most=most)
    found = inference.logits_of(texts_of(), lambda: calls.append(1))
    assert len(calls) > LATE + 4 and np.allclose(found, padded(classifier, texts_of()), atol=1e-5)


def test_weights_that_change_in_place_are_seen_by_the_same_graphs():
    classifier, inference = switched(most=256)
    first = inference.logits_of(texts_of())
    recorded = len(inference.model.graphs)
    other = classifier_of("distilbert", initializer_range=0.2)
    classifier.load_state_dict(other.state_dict())
    second = inference.logits_of(texts_of())
    assert len(inference.model.graphs) == recorded > 1
    assert np.allclose(second, padded(classifier, texts_of()), atol=1e-5) and np.abs(second - first).max() > 0.1


def test_dropout_is_off_and_training_goes_on():
    classifier, inference = switched()
    assert classifier.config.dropout > 0
    expected = padded(classifier, texts_of())
    classifier.train()
    assert np.allclose(inference.logits_of(texts_of()), expected, atol=1e-5) and classifier.training
    torch.nn.functional.cross_entropy(classifier(torch.tensor([[5, 6]])).logits, torch.tensor([1])).backward()


def test_a_row_that_does_not_fit_is_halved():
    def full(module, arguments, options):
        if options["input_ids"].numel() > 128:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    classifier, inference = switched()
    expected = padded(classifier, texts_of())
    hook = classifier.base_model.register_forward_pre_hook(full, with_kwargs=True)
    assert inference.most > 128
    assert np.allclose(inference.logits_of(texts_of()), expected, atol=1e-5) and inference.most <= 128
    long = texts_of([300, 5])
    with pytest.raises(TrainError, match="out of memory with one example of 300 tokens"):
        inference.logits_of(long)
    hook.remove()


def test_texts_that_fail_are_named():
    classifier, inference = switched(most=64)
    lengths = np.full(40, 16)
    tokens = texts_of(lengths)
    tokens.parts[7][3] = 4
    with torch.no_grad():
        classifier.get_input_embeddings().weight[4] = torch.nan
    with pytest.raises(NotFinite) as e:
        inference.logits_of(tokens)
    assert e.value.rows.tolist() == [7] and "the logits are not finite" in str(e.value)
    tokens.parts[7][3] = 99  # no token of its vocabulary
    with pytest.raises(BatchError, match="the model raised IndexError") as e:
        inference.logits_of(tokens)
    assert 7 in e.value.rows and len(e.value.rows) == 4
    with pytest.raises(BatchError, match="the tokenizer makes no token of it"):
        inference.logits_of(texts_of([3, 0]))


def test_a_stop_leaves_nothing_behind():
    def stop():
        raise Preempted("stopped")

    classifier, inference = switched()
    classifier.train()
    with pytest.raises(Preempted):
        inference.logits_of(texts_of(), stop)
    assert classifier.training and np.allclose(
        inference.logits_of(texts_of()), padded(classifier, texts_of()), atol=1e-5
    )


def test_a_graph_that_is_wrong_is_not_used():
    "Something that changes from call to call; then a recording that fails"
    notes, calls = [], []
    classifier, inference = switched(most=256, note=notes.append)
    expected = padded(classifier, texts_of())

    def drift(module, arguments, output):
        calls.append(1)
        return output * (2 if len(calls) in (2, 3) else 1)  # the first graph's

    hook = classifier.classifier.register_forward_hook(drift)
    assert np.allclose(inference.logits_of(texts_of()), expected, atol=1e-5)
    (note,) = notes
    assert note.startswith("evaluations run without graphs: a graph's logits differ by 1.0e+00 of their size")
    assert inference.model.graphs is None
    hook.remove()

    def refuse(module, arguments, output):
        calls.append(1)
        if len(calls) == 4:  # behind one by Python and two of the first graph
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    calls.clear()
    again = Inference(classifier, 1, packed=True, most=256, note=notes.append)
    classifier.classifier.register_forward_hook(refuse)
    assert np.allclose(again.logits_of(texts_of()), expected, atol=1e-5)
    assert notes[1:] == ["evaluations run without graphs: operation not permitted when stream is capturing"]


def test_a_finished_run_computes_as_it_was_trained():
    classifier, tokens = classifier_of("bert"), texts_of()
    assert inference_for(classifier, 1, "bf16", "auto", tokens).model is None  # on a CPU
    assert inference_for(classifier, 1, "fp32", "packed", tokens).model is not None
    assert inference_for(classifier, 1, "fp32", "padded", tokens).model is None
    assert inference_for(classifier_of("deberta-v2"), 1, "fp32", "packed", tokens).model is None  # it takes no rows


def write(file, words, count):
    rng = np.random.default_rng(count)
    labels = [list(WORDS)[i % 2] for i in range(count)]
    lines = [f"{' '.join(rng.choice(WORDS[label].split(), words))},{label}" for label in labels]
    file.write_text("\n".join(["text,label", *lines]) + "\n")


def test_a_whole_run_and_its_predictions(store):
    "With validation texts longer than any that it was trained with"
    project = store.parent
    (project / "long").mkdir()
    write(project / "data" / "a.csv", 4, 24)
    write(project / "long" / "b.csv", 18, 30)
    more = ["data.validation=long", "model.dropout=0"]
    packed, plain = (fit(load("dev", [*more, f"train.rows={rows}", f"output={rows}"])) for rows in ("packed", "padded"))
    for e, f in zip(packed.metrics["history"], plain.metrics["history"], strict=True):
        assert e["loss"] == pytest.approx(f["loss"], rel=1e-4)
    assert not any("graphs" in note for note in packed.metrics["notes"])
    packed.predict_file("long/b.csv", "out.csv", ["data.cache=cache"])
    columns = []
    for file in ("out.csv", packed.folder / "predictions.csv"):
        with open(file, newline="") as f:
            columns.append([(r.get("predicted") or r["label"], float(r["probability"])) for r in csv.DictReader(f)])
    (said, chances), (stored, kept) = (zip(*rows, strict=True) for rows in columns)
    assert said == stored and np.allclose(chances, kept, atol=2e-6)
