"Training itself: what an update is, what is repeatable, what is recorded, what an interruption leaves"

import csv
import io
import json
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gpuml.base.config import TrainConfig
from gpuml.base.errors import DataError, GpumlError, ModelError, Preempted, TrainError
from gpuml.base.loading import load
from gpuml.data import reading
from gpuml.data.encoder import tokenise
from gpuml.data.updates import pad, plan_epoch
from gpuml.training.evaluation import logits_of
from gpuml.training.feed import Update
from gpuml.training.fit import fit
from gpuml.training.loss import summed_loss
from gpuml.training.model import load_classifier, load_tokenizer, save
from gpuml.training.origin import locate
from gpuml.training.prediction_file import prediction_csv
from gpuml.training.results import Run, load_run
from gpuml.training.row import bucket
from tests.conftest import ENDLESS, OFFLINE, gpuml, runs_in


@pytest.fixture
def encoder(project):
    "Folder, tokenizer and token ids of 16 texts of very different lengths"
    config = load("dev")
    tokenizer = load_tokenizer(locate(config))
    words = ["where", "is", "my", "parcel", "it", "was", "due", "on", "monday", "and", "nobody", "answers", "phone"]
    texts = [" ".join(words[: 1 + (7 * i) % 13] * (1 + i % 3)) for i in range(16)]
    return locate(config), tokenizer, tokenise(texts, tokenizer, 64)


def one_update(encoder, cuts, prepare=lambda classifier: None, packed=False, max_tokens=2**40, loss=summed_loss):
    "Loss, gradient norm and weights after one update of 16 examples in the given micro-batches"
    from gpuml.training.learner import Learner
    from gpuml.training.loop import seed_all, take

    folder, tokenizer, tokens = encoder
    seed_all(0)
    classifier = load_classifier(folder, ["a", "b"], dropout=0.0)
    prepare(classifier)
    config = TrainConfig(epochs=1, learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0)
    learner = Learner(config, classifier.train(), 0, packed=packed, max_tokens=max_tokens, loss=loss)
    rows = SimpleNamespace(tokens=tokens, classes=np.arange(16) % 2)
    step = take(learner, Update(1, 0.0, 1.0, rows, cuts))
    weights = np.concatenate([p.detach().numpy().ravel() for p in classifier.parameters()])
    return step.loss, step.grad_norm, weights


@pytest.mark.parametrize("size", [8, 4, 3, 1])
def test_how_an_update_is_split_does_not_change_it(encoder, size):
    rows = np.argsort(-encoder[2].lengths, kind="stable")
    whole = one_update(encoder, [rows])
    parts = one_update(encoder, np.split(rows, range(size, 16, size)))
    assert abs(parts[0] - whole[0]) < 1e-4
    assert abs(parts[1] / whole[1] - 1) < 1e-4
    assert np.abs(parts[2] - whole[2]).max() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_class_weights_multiply_each_texts_loss(encoder, packed):
    "Whatever the cut: an update of the weighted texts is the weighted sum of the classes' own updates"
    import torch

    from gpuml.training.packing import use_packed

    rows = np.argsort(-encoder[2].lengths, kind="stable")

    def prepare(classifier):
        assert not packed or use_packed(classifier, *pad(encoder[2], rows[:3], 0)) == ""

    def loss(weights, cuts):
        return one_update(
            encoder, cuts, prepare, packed=packed, loss=partial(summed_loss, weights=torch.tensor(weights))
        )[0]

    first, second = loss([1.0, 0.0], [rows]), loss([0.0, 1.0], [rows])
    assert first > 0 and second > 0
    for cuts in ([rows], np.split(rows, [3, 9])):
        assert abs(loss([0.5, 3.0], cuts) - (0.5 * first + 3.0 * second)) < 1e-4


@pytest.mark.parametrize("max_tokens", [2**40, 100])
def test_without_padding_an_update_is_the_same(encoder, max_tokens):
    "One row of all texts, as on a GPU, and rows of at most 100 tokens: padded or not, it is the same update"
    from gpuml.training.packing import use_packed

    seen, rows = [], np.argsort(-encoder[2].lengths, kind="stable")

    def prepare(classifier):
        assert use_packed(classifier, *pad(encoder[2], rows[:3], 0)) == ""
        classifier.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)

    whole = one_update(encoder, [rows])
    packed = one_update(encoder, [rows], prepare, packed=True, max_tokens=max_tokens)
    assert sum(seen) == sum(bucket(n) for n in seen) and max(seen) <= bucket(max_tokens)
    assert (len(seen) > 1) == (max_tokens == 100)
    assert abs(packed[0] - whole[0]) < 1e-4 and abs(packed[1] / whole[1] - 1) < 1e-4
    assert np.abs(packed[2] - whole[2]).max() < 1e-4


def test_update_is_torchs_own(encoder):
    "The loss and the gradient norm of an update are those of one padded batch in plain torch"
    import torch

    from gpuml.training.loop import seed_all

    folder, tokenizer, tokens = encoder
    rows = np.argsort(-tokens.lengths, kind="stable")
    loss, norm, _ = one_update(encoder, np.split(rows, [5, 11]))
    seed_all(0)
    classifier = load_classifier(folder, ["a", "b"], dropout=0.0).train()
    ids, mask = map(torch.from_numpy, pad(tokens, np.arange(16), 0))
    expected = torch.nn.functional.cross_entropy(classifier(ids, mask).logits, torch.arange(16) % 2)
    expected.backward()
    total = torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1e9)
    assert abs(loss - expected.item()) < 1e-5
    assert abs(norm / total.item() - 1) < 1e-4


@pytest.mark.parametrize("count,size", [(1, 4), (4, 4), (103, 16), (64, 100), (500, 96)])
def test_plan_has_every_example_once(count, size):
    lengths = np.random.default_rng(count).integers(3, 300, count)
    plan = plan_epoch(lengths, size, seed=7, epoch=2)
    updates = [plan.update(i) for i in range(len(plan))]
    assert sorted(np.concatenate([m for u in updates for m in u])) == list(range(count))
    assert [sum(map(len, u)) for u in updates] == [size] * (count // size) + [count % size] * (count % size > 0)
    for micro in (m for u in updates for m in u):
        assert len(micro) and (np.diff(lengths[micro]) <= 0).all()


def test_plan_wastes_less_than_a_padded_batch():
    lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(40), 0.7, 4096).astype(int) + 2, 256)
    plan = plan_epoch(lengths, 32, seed=0, epoch=0)
    padded = sum(lengths[m].max() * len(m) for i in range(len(plan)) for m in plan.update(i))
    whole = sum(lengths[np.concatenate(plan.update(i))].max() * 32 for i in range(len(plan)))
    assert lengths.sum() / padded > 0.85
    assert whole / padded > 1.8


def test_plan_keeps_within_a_token_budget():
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    plan = plan_epoch(lengths, 32, seed=0, epoch=0, max_tokens=512)
    assert max(lengths[m].max() * len(m) for i in range(len(plan)) for m in plan.update(i) if len(m) > 1) <= 512


def test_prediction_keeps_the_order_of_the_texts(encoder):
    folder, tokenizer, tokens = encoder
    classifier = load_classifier(folder, ["a", "b"])
    together = logits_of(classifier, tokens, 0)
    for i in range(len(together)):
        alone = tokens.take(np.array([i]))
        assert np.abs(logits_of(classifier, alone, 0)[0] - together[i]).max() < 1e-5


def test_same_config_same_result(store):
    first, second = fit(load("dev")), fit(load("dev"))
    assert first.metrics["curve"] == second.metrics["curve"]
    assert first.metrics["loss"] == second.metrics["loss"]
    other = fit(load("dev", ["train.seed=1"]))
    assert other.metrics["curve"] != first.metrics["curve"]


@pytest.mark.parametrize("model", [OFFLINE])
def test_what_a_run_records(store, model):
    run = fit(load("dev", ["train.epochs=3", "tracking.log_model=true"]))
    (recorded,) = runs_in(store)
    params, metrics = recorded.data.params, recorded.data.metrics
    assert recorded.info.status == "FINISHED" and recorded.info.run_name == run.id
    assert (
        params["train.epochs"] == "3"
        and params["model.name"].startswith("package:")
        and params["data.train_rows"] == "20"
    )
    assert len(params) < 80
    assert metrics["accuracy"] == run.metrics["history"][-1]["accuracy"]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store}")
    losses = client.get_metric_history(recorded.info.run_id, "loss")
    assert [m.step for m in losses] == list(range(1, 10))
    assert len(client.get_metric_history(recorded.info.run_id, "validation_loss")) == 3
    names = {a.path for a in client.list_artifacts(recorded.info.run_id)}
    assert {"config.yaml", "metrics.json", "certificate.json", "figures"} <= names
    assert recorded.data.tags["version.torch"] and recorded.info.run_id in run.url
    assert len(recorded.inputs.dataset_inputs) == 1 and metrics["system/system_memory_usage_percentage"] > 0
    assert {f"f1/{label}" for label, of in run.metrics["classes"].items() if of["f1"] is not None} <= set(metrics)
    mlflow.set_tracking_uri(f"sqlite:///{store}")
    logged = client.get_logged_model(recorded.outputs.model_outputs[0].model_id)
    assert logged.name == run.id  # and not as the models of all other runs
    place = logged.artifact_location.removeprefix("file://")
    assert mlflow.models.Model.load(place).load_input_example(place)
    answer = mlflow.transformers.load_model(f"models:/{recorded.outputs.model_outputs[0].model_id}")(["parcel late"])
    assert answer[0]["label"] == run.predict(["parcel late"]).labels[0]


def test_what_a_run_leaves(store):
    run = fit(load("dev"))
    certificate = json.loads((run.folder / "certificate.json").read_text())
    assert certificate["planned_updates"] == certificate["done_updates"] == 6
    again = load_run(run.folder)
    assert again.config.train == load("dev").train and again.config.data.train == str(store.parent / "data")
    assert again.metrics == run.metrics and load_run(run.id).metrics == run.metrics
    assert run.predict(["card charged", "parcel late"])[1] == list(run.predict(["card charged", "parcel late"]))[1]
    with pytest.raises(GpumlError, match="dev-1: not a finished run"):
        load_run("dev-1")
    assert len((run.folder / "predictions.csv").read_text().splitlines()) == 5
    assert [path.name for path in run.folder.glob(".*")] == [".lock"]  # nothing half-written
    for shown in (repr(run), run._repr_html_(), run.mistakes()._repr_html_(), run.predict(["<b>"])._repr_html_()):
        assert "billing" in shown or shown == "no mistakes"
    assert "<b></td>" not in run.predict(["<b>"])._repr_html_()  # a text is shown, not rendered


def test_many_labels_and_long_texts_leave_a_table_readable():
    import numpy as np

    from gpuml.training.answers import Mistakes, Predictions

    text, few, many = (
        "a long text " * 40,
        ["a", "a-label-of-many-words-and-no-spaces"],
        [f"label {i}" for i in range(20)],
    )
    shown = Predictions([text], np.array([[0.75, 0.25]]), few)._repr_html_()
    assert f"title='{text}'" in shown and f">{text[:199]}…<" in shown and "min-width:18em" in shown
    assert shown.count("max-width:16em;overflow-wrap:break-word") == 4  # two heads with their cells: no word is broken
    probabilities = np.arange(20)[None] / 190
    shown = Predictions(["short"], probabilities, many)._repr_html_()
    assert "title=" not in shown and "label 18 0.095, label 17 0.089" in shown and "label 14" not in shown
    wrong = dict(text=text, label=few[1], predicted="a", probability="0.9", file="a.csv", line="2")
    shown = Mistakes([wrong])._repr_html_()
    assert f"title='{text}'" in shown and "min-width:18em" in shown and "overflow-wrap:anywhere" in shown


def test_best_epoch_is_kept(store):
    "A learning rate that ruins the model late: the epoch with the best loss is the one that was saved"
    run = fit(load("dev", ["train.epochs=4", "train.best_metric=loss", "train.schedule=constant"]))
    best = min(run.metrics["history"], key=lambda e: e["loss"])
    assert run.metrics["epoch"] == best["epoch"] and run.metrics["loss"] == best["loss"]
    texts = reading.read(load("dev")).validation
    likely = run.predict(texts.texts()).probabilities[
        np.arange(len(texts)), [run.labels.index(l) for l in texts.labels]
    ]
    assert abs(-np.log(likely).mean() - best["loss"]) < 1e-4


def test_a_tie_keeps_the_lower_loss(store):
    "Of epochs that are equally good by `best_metric`, the one that is surer; the report says which"
    run = fit(load("dev", ["train.epochs=6", "train.schedule=constant"]))
    history = run.metrics["history"]
    ties = [e for e in history if e["macro_f1"] == max(e["macro_f1"] for e in history)]
    best = min(ties, key=lambda e: e["loss"])
    assert len(ties) > 1 and best is not ties[0]  # else this test shows nothing
    assert run.metrics["epoch"] == best["epoch"] and run.metrics["loss"] == best["loss"]
    for shown in (repr(run), run._repr_html_()):
        assert f"weights of epoch {best['epoch']} of 6, the best macro-F1" in shown


def test_early_stopping(store):
    run = fit(load("dev", ["train.epochs=50", "train.early_stopping=1", "train.learning_rate=1e-9"]))
    assert len(run.metrics["history"]) == 2  # a tie is no better, though the surer weights are kept
    assert any("stopped after epoch 2" in note for note in run.metrics["notes"])
    assert json.loads((run.folder / "certificate.json").read_text())["stopped_early"] is True


def test_second_run_reads_the_token_cache(store):
    config = load("dev")
    fit(config)
    (folder,) = (store.parent / "cache" / "tokens").iterdir()  # training and validation rows are from one file
    before = (folder / "ids").stat().st_mtime_ns
    fit(config)
    assert (folder / "ids").stat().st_mtime_ns == before


def test_skipped_rows_are_listed(store):
    with open(store.parent / "data" / "a.csv", "a") as f:
        f.write('late,"again",delivery\n')
    with pytest.raises(DataError):
        fit(load("dev"))
    run = fit(load("dev", ["data.on_bad_row=skip"]))
    assert (run.folder / "skipped.csv").read_text().splitlines() == [
        "file,line,reason",
        "data/a.csv,26,\"3 fields where the header has 2; a text with ',' in it needs quotes\"",
    ]
    assert any("1 malformed row was skipped" in note for note in run.metrics["notes"])


def test_predictions_of_many_rows_have_the_wrong_texts_only(store):
    data, notes = reading.read(load("dev")), []
    likeliest = np.eye(len(data.labels))[[0] * len(data.validation)]
    content = b"".join(prediction_csv(data, likeliest, notes.append, most_texts=1)).decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    wrong = [row for row in rows if row["label"] != row["predicted"]]
    assert len(rows) == 4 and sum(bool(row["text"]) for row in rows) == 1 == bool(wrong[0]["text"])
    assert notes == ["predictions.csv has the texts of wrong rows only, 1 of 4"]


def test_data_that_changes_while_it_trains_costs_the_texts_only(store):
    def watch(progress):
        if progress.phase == "training":
            (store.parent / "data" / "a.csv").write_text("text,label\n")

    run = fit(load("dev"), watch=watch)
    with open(run.folder / "predictions.csv", newline="") as f:
        assert [row["text"] for row in csv.DictReader(f)] == [""] * 4
    assert any("predictions.csv lacks texts" in note for note in run.metrics["notes"])


def test_duplicates_are_counted(project):
    file = project / "data" / "a.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[1], lines[2].replace("delivery", "billing")]) + "\n")
    (project / "v.csv").write_text("\n".join([lines[0], lines[5], "new,billing", "newer,delivery"]) + "\n")
    notes = reading.read(load("dev", ["data.validation=v.csv"])).notes
    assert [note.split(" (")[0] for note in notes] == [
        "1 training rows repeat another one",
        "1 training rows repeat another one with a different label",
        "1 validation rows stand in training too",
    ]


def test_stop_button_saves_a_checkpoint(store):
    "A KeyboardInterrupt in the middle, as the stop button sends it"
    import _thread

    def watch(progress):
        if progress.step >= 2 and not fired.is_set():
            fired.set()
            _thread.interrupt_main()

    fired = threading.Event()
    with pytest.raises(Preempted, match="stopped at update"):
        fit(load("dev", [ENDLESS]), watch=watch)
    (recorded,) = runs_in(store)
    assert recorded.info.status == "KILLED"
    (folder,) = (store.parent / "outputs").iterdir()
    assert list((folder / "checkpoints").glob("step-*")) and not (folder / "certificate.json").exists()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_changes_nothing(where, encoder):
    "A model that runs out of memory with more than three examples at once: the same update, in smaller parts"
    import torch

    rows = np.argsort(-encoder[2].lengths, kind="stable")
    whole = one_update(encoder, [rows])
    tried = []

    def short_of_memory(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            short_of_memory(len(grad))
            return grad

    def prepare(classifier):
        if where == "forward":
            classifier.register_forward_pre_hook(lambda m, a, k: short_of_memory(len(k["input_ids"])), with_kwargs=True)
        else:  # in the middle of the backward pass: the classifier's gradients are there already, the encoder's are not
            classifier.base_model.register_forward_hook(failing)

    def failing(module, arguments, out):
        out["pooler_output"] = Fails.apply(out["pooler_output"])
        return out

    parts = one_update(encoder, [rows], prepare)
    assert max(tried) == 16 and sum(size > 3 for size in tried) >= 2
    assert abs(parts[0] - whole[0]) < 1e-4 and abs(parts[1] / whole[1] - 1) < 1e-4
    assert np.abs(parts[2] - whole[2]).max() < 1e-4


def test_out_of_memory_with_one_example_ends_the_run(encoder):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(TrainError, match="out of memory with one example of .* tokens"):
        one_update(encoder, [np.arange(16)], lambda classifier: classifier.register_forward_pre_hook(full))


def test_weights_that_are_not_finite_train_nothing(store):
    "A model with a weight that is not a number, as a run that diverged leaves it: found before the first update"
    folder = locate(load("dev"))
    classifier, tokenizer = load_classifier(folder, ["billing", "delivery"]), load_tokenizer(folder)
    classifier.base_model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    save(classifier, tokenizer, store.parent / "broken")
    with pytest.raises(ModelError, match=r"./broken: its logits are no finite numbers: its weights are damaged"):
        fit(load("dev", ["model.name=./broken"]))
    assert runs_in(store) == [] and not (store.parent / "outputs").exists()


def test_watch_is_called_at_most_four_times_a_second(store):
    times, phases = [], []

    def watch(progress):
        times.append(time.monotonic())
        phases.append(progress.phase)

    fit(load("dev", ["train.epochs=4"]), watch=watch)
    steps = [t for t, phase in zip(times, phases, strict=True) if phase == "training"]
    changes = sum(a != b for a, b in zip(phases, phases[1:], strict=False))
    assert len(steps) <= 4 * (times[-1] - times[0]) + changes + 1


def test_command_trains(project):
    done = gpuml("train", "dev", "train.epochs=1", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "macro-F1" in done.stdout and "billing" in done.stdout
    (folder,) = (project / "outputs").iterdir()
    assert f"outputs/{folder.name}/model" in done.stdout
    assert isinstance(load_run(folder), Run)
    assert "1 of 3" not in done.stderr and "Traceback" not in done.stderr
    assert "no MLflow server at" in done.stderr


def test_training_needs_no_accelerate(project):
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "from gpuml.base.loading import load\nfrom gpuml.training.fit import fit\n"
        "import transformers.utils; assert not transformers.utils.is_accelerate_available()\n"
        "print(fit(load('dev', ['train.epochs=1'])).metrics['updates'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["3"], done.stderr
