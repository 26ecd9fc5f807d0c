"""Updates in rows without padding, by graphs, with steps that are read late: as on a GPU, where a graph is a call.

What differs on a GPU is tested there.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from gpuml.base.config import TrainConfig
from gpuml.base.errors import ConfigError, Preempted, TrainError
from gpuml.base.loading import load
from gpuml.data.orders import Global
from gpuml.data.tokens import join
from gpuml.training.fit import fit
from tests.test_interrupt import OVERRIDES, check_steps, result, runs_in, stop_at

CALM_MODEL = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
LENGTHS = np.random.default_rng(0).integers(3, 40, 30)


def rows_of(lengths=LENGTHS):
    "Texts of random tokens with these lengths"
    rng = np.random.default_rng(1)
    tokens = join([(rng.integers(5, 99, n).astype(np.uint16), np.array([n])) for n in lengths])
    places = [("a.csv", 2 + i) for i in range(len(lengths))]
    return SimpleNamespace(
        tokens=tokens, classes=np.arange(len(lengths)) % 3, places=lambda rows: [places[i] for i in rows]
    )


def learner_of(choice="packed", late=0, **more):
    "A small DistilBERT with its dropout, tuned as a training does it"
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, set_seed

    from gpuml.training.learner import Learner
    from gpuml.training.tune import tune

    set_seed(0)
    sizes = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=99, num_labels=3)
    classifier = DistilBertForSequenceClassification(DistilBertConfig(**sizes, **more.pop("model", {})))
    config = TrainConfig(batch_size=8, learning_rate=1e-3, warmup=0.0, rows=choice, epochs=2)
    learner = Learner(config, classifier, 0, longest=40, **more)
    if choice == "packed":
        assert tune(learner, rows_of()).notes == []
    learner.late = late
    return learner


def trained(learner, rows=None):
    "Losses, norms, and weights after all updates of two epochs"
    from gpuml.training.feed import Feed
    from gpuml.training.loop import updates

    feed = Feed(Global(rows or rows_of()), 8, 42, 2)
    steps = []
    while feed.epochs_done < 2:
        steps += updates(learner, feed)
    weights = np.concatenate([p.detach().numpy().ravel() for p in learner.classifier.parameters()])
    return np.array([(step.loss, step.grad_norm) for step in steps]), weights, steps


def test_rows_train_as_padded_texts_do():
    calm = dict(model=CALM_MODEL)
    padded, packed = trained(learner_of("padded", **calm)), trained(learner_of(**calm))
    assert len(packed[2]) == 8 and np.abs(packed[0] / padded[0] - 1).max() < 1e-4
    assert np.abs(packed[1] - padded[1]).max() < 1e-4


def test_positions_that_start_behind_the_padding():
    "RoBERTa counts positions from the padding's index on: in a row as in padded texts, to the last position that it has"
    from transformers import RobertaConfig, RobertaForSequenceClassification, set_seed

    from gpuml.training.learner import Learner
    from gpuml.training.tune import tune

    results = []
    for choice in ("padded", "packed"):
        set_seed(0)
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
        calm = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=2 + 38)
        classifier = RobertaForSequenceClassification(RobertaConfig(**sizes, **calm, num_labels=3, pad_token_id=1))
        config = TrainConfig(batch_size=8, learning_rate=1e-3, warmup=0.0, rows=choice, epochs=2)
        learner = Learner(config, classifier, 1, longest=38)
        if choice == "packed":
            tune(learner, rows_of())
        results.append(trained(learner)[0])
    assert LENGTHS.max() == 38 and np.abs(results[1] / results[0] - 1).max() < 1e-4


def test_a_graph_does_what_python_does():
    "With dropout: what is drawn is the same, too"
    plain = learner_of()
    plain.unrecord()
    (found, weights, _), (expected, wanted, _) = trained(learner_of()), trained(plain)
    assert np.array_equal(found, expected) and np.array_equal(weights, wanted)


@pytest.mark.parametrize("late", [1, 3, 16])
def test_steps_that_come_late_are_the_same(late):
    calm, steps = trained(learner_of()), []
    again = trained(learner_of(late=late))
    assert np.array_equal(again[0], calm[0]) and np.array_equal(again[1], calm[1])
    steps = again[2]
    assert [step.update.number for step in steps] == list(range(1, 9))
    assert [step.update.number for step in steps if step.settled] == [4, 8]  # at the end of each epoch


def test_nothing_begins_behind_an_update_that_is_waited_for():
    from gpuml.training.feed import Feed
    from gpuml.training.loop import updates

    feed = Feed(Global(rows_of()), 8, 42, 2)
    for step in updates(learner_of(late=16), feed, lambda number: number == 2):
        if step.settled:
            break
    assert step.update.number == 2 and (feed.number, feed.position) == (2, (0, 0, 2))


def test_no_weight_changes_behind_a_loss_that_is_no_number():
    "The third update's loss is no number; the step says so when the fourth was begun long ago"
    import torch

    calls = []

    def spoil(module, arguments, output):
        calls.append(1)
        if len(calls) == 3:
            return output * torch.nan
        weights.append([p.detach().clone() for p in learner.classifier.parameters()])

    learner = learner_of(late=16)
    learner.unrecord()
    weights = []
    learner.classifier.classifier.register_forward_hook(spoil)
    with pytest.raises(TrainError, match=r"the loss is nan at update 3 \(training rows a.csv"):
        trained(learner)
    assert len(calls) > 3
    third, last = weights[2], list(learner.classifier.parameters())  # before the fourth update, and at the end
    assert all(torch.equal(a, b) for a, b in zip(third, last, strict=True))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_row_that_does_not_fit_is_split(recorded):
    import torch

    def full(module, arguments, options):
        if options["input_ids"].numel() > 128:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    calm = dict(model=CALM_MODEL)
    whole, learner = trained(learner_of(**calm)), learner_of(**calm)
    if not recorded:
        learner.unrecord()
    learner.classifier.base_model.register_forward_pre_hook(full, with_kwargs=True)
    learner.max_tokens = 512
    found = trained(learner)
    assert learner.max_tokens < 128
    assert np.abs(found[0] / whole[0] - 1).max() < 1e-4 and np.abs(found[1] - whole[1]).max() < 1e-4


def test_fewer_graphs_than_shapes_change_nothing():
    from gpuml.training.graph import Graphs

    few = learner_of()
    few.replay.rows = Graphs(few.add_row, few.world.device, most=1)
    (found, weights, _), (expected, wanted, _) = trained(few), trained(learner_of())
    assert np.array_equal(found, expected) and np.array_equal(weights, wanted) and len(few.replay.rows) == 1


PACKED = [*OVERRIDES, "train.rows=packed"]
CALM = []


@pytest.fixture
def undisturbed(store):
    if not CALM:
        CALM.append(result(fit(load("dev", [*PACKED, "output=undisturbed", "tracking.experiment=undisturbed"]))))
    return CALM[0]


@pytest.mark.parametrize("moments", [(1,), (4,), ("evaluating",), (2, 5, 8)])
def test_stopped_and_gone_on(moments, store, undisturbed):
    for number, moment in enumerate(moments):
        with pytest.raises(Preempted):
            fit(load("dev", PACKED), watch=stop_at(moment), resume="latest" if number else None)
    done = fit(load("dev", PACKED), resume="latest")
    assert result(done) == undisturbed
    (run,) = [r for r in runs_in(store) if r.data.params.get("tracking.experiment") == "test"]
    check_steps(store, run)
    choices = json.loads((done.folder / "machine.json").read_text())
    assert choices["packed"] and choices["graphs"] and run.data.params["machine.packed"] == "True"


def test_padded_texts_give_nearly_the_same(store):
    more = ["model.dropout=0", "train.epochs=2"]
    packed, padded = (fit(load("dev", [*more, f"train.rows={rows}"])) for rows in ("packed", "padded"))
    assert packed.metrics["loss"] == pytest.approx(padded.metrics["loss"], rel=1e-4)


def test_a_model_that_can_not_is_refused_where_rows_are_asked_for():
    learner = learner_of("padded")
    learner.classifier.config.gpuml_padding = "none"
    learner.config = learner.config.model_copy(update={"rows": "packed"})
    from gpuml.training.tune import tune

    with pytest.raises(ConfigError, match="train.rows: packed: batches of equal length have no padding .*; use auto"):
        tune(learner, rows_of())


def test_a_later_attempt_cuts_updates_as_the_first_one(store, undisturbed):
    "Even where the first one made no checkpoint: what it had found counts, whatever would be found now"
    with pytest.raises(Preempted):
        fit(load("dev", PACKED), watch=stop_at(1))
    (folder,) = (store.parent / "outputs").iterdir()
    shutil.rmtree(folder / "checkpoints")
    path = folder / "machine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_tokens": 32}))
    done = fit(load("dev", PACKED), resume="latest")
    assert json.loads(path.read_text())["max_tokens"] == 32
    assert result(done) != undisturbed  # parts of 32 tokens draw otherwise
