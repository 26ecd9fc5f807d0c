"What MLflow shows of a run: the scores of the weights that were kept, and what it refuses"

import json

import pytest

from gpuml.base.loading import load
from gpuml.training.record import read_record, this_host
from gpuml.training.sync import behind
from gpuml.training.tracking import open_run
from tests.conftest import runs_in
from tests.models import folder_of, model_of, tokenizer_of

EPOCHS = [(3, 0.9, 0.31), (6, 0.7, 0.361), (9, 1.2, 0.162)]  # update, validation loss, macro-F1


def certified(folder, epochs, kept):
    "Write what a training leaves that ends after these epochs and keeps the weights of one of them"
    history = [
        {"epoch": i + 1, "step": step, "loss": loss, "accuracy": f1, "macro_f1": f1}
        for i, (step, loss, f1) in enumerate(epochs)
    ]
    (folder / "metrics.json").write_text(
        json.dumps({**history[kept - 1], "updates": history[-1]["step"], "history": history})
    )
    (folder / "certificate.json").write_text("{}")


def record(project, epochs, kept, name="a"):
    "Record a training of these epochs; returns what MLflow has of it"
    run = open_run(load("dev", ["tracking.log_model=true", "tracking.register=tickets"]), name, project / name)
    for step, loss, f1 in epochs:
        run.log({"validation_loss": loss, "accuracy": f1, "macro_f1": f1}, step, "evaluation")
    folder_of(project / name / "model", model_of("bert"), tokenizer_of(pad=0))
    certified(project / name, epochs, kept)
    assert run.close("FINISHED") == ""
    return run.record


@pytest.fixture(autouse=True)
def elsewhere(project, monkeypatch):
    "Not in the project's folder, and another store is MLflow's default one"
    (project / "nbs").mkdir()
    monkeypatch.chdir(project / "nbs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/nbs/other.db")


def client_of(store):
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{store}")


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_latest_scores_are_those_of_the_kept_weights(store, project, kept):
    "Sorting by a score picks the run by what it kept, not by its last epoch"
    client = client_of(store)
    made = record(project, EPOCHS, kept)
    (found,) = runs_in(store)
    _, loss, f1 = EPOCHS[kept - 1]
    wanted = {"validation_loss": loss, "accuracy": f1, "macro_f1": f1, "kept_epoch": kept}
    assert found.data.metrics == wanted
    history = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "macro_f1")]
    assert history == [(step, f1) for step, _, f1 in EPOCHS] + ([(10, f1)] if kept < 3 else [])
    model = client.get_logged_model(made.sent.model.removeprefix("models:/"))
    assert {m.key: m.value for m in model.metrics} == {k: v for k, v in wanted.items() if k != "kept_epoch"}


def test_a_longer_training_of_the_same_run_replaces_its_scores_and_its_model(store, project):
    client = client_of(store)
    first = record(project, EPOCHS[:2], 1)
    second = record(project, EPOCHS, 2)
    (found,) = runs_in(store)
    assert found.data.metrics["macro_f1"] == 0.361 and found.data.metrics["kept_epoch"] == 2
    history = [m.step for m in client.get_metric_history(found.info.run_id, "macro_f1")]
    assert history == [3, 6, 7, 9, 10]
    assert first.sent.model != second.sent.model and [first.sent.version, second.sent.version] == ["1", "2"]


def test_a_run_of_an_older_version_has_fewer_scores(store, project):
    "What it has is sent; a score that it has not got is left out"
    run = open_run(load("dev"), "a", project / "a")
    run.log({"validation_loss": 0.9, "accuracy": 0.3}, 3, "evaluation")
    run.log({"validation_loss": 1.2, "accuracy": 0.2}, 6, "evaluation")
    history = [
        {"epoch": e, "step": 3 * e, "loss": loss, "accuracy": a} for e, loss, a in ((1, 0.9, 0.3), (2, 1.2, 0.2))
    ]
    (project / "a" / "metrics.json").write_text(json.dumps({**history[0], "updates": 6, "history": history}))
    (project / "a" / "certificate.json").write_text("{}")
    assert run.close("FINISHED") == ""
    (found,) = runs_in(store)
    assert found.data.metrics == {"validation_loss": 0.9, "accuracy": 0.3, "kept_epoch": 1}


DATA = {"data.fingerprint": "0f2a9c11", "data.train_rows": 20, "data.validation_rows": 4, "data.classes": 2}


def test_the_page_of_a_run_says_on_what_data_it_was_and_what_came_of_it(store, project):
    "Once, whatever the number of attempts; what a person writes there stays"
    client, epochs = client_of(store), [{"epoch": 1, "step": 3, "loss": 0.9, "accuracy": 0.3, "macro_f1": 0.31}]
    classes = {"billing/card": {"f1": 0.5}, "delivery": {"f1": 0.12}, "never": {"f1": None}}
    for status in ("KILLED", "FINISHED", "FINISHED"):
        run = open_run(load("dev", ["tracking.log_model=false"]), "a", project / "a", DATA)
        run.log({"validation_loss": 0.9, "accuracy": 0.3, "macro_f1": 0.31}, 3, "evaluation")
        if status == "FINISHED":
            content = {**epochs[0], "updates": 3, "history": epochs, "classes": classes}
            (project / "a" / "metrics.json").write_text(json.dumps(content))
            (project / "a" / "certificate.json").write_text("{}")
        assert run.close(status) == ""
        if status == "KILLED":
            (made,) = runs_in(store)
            client.set_tag(made.info.run_id, "mlflow.note.content", f"mine\n\n{made.data.tags['mlflow.note.content']}")
    (made,) = runs_in(store)
    (dataset,) = made.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("data", "0f2a9c11", "training")
    assert json.loads(dataset.dataset.source) == {"uri": "data"}
    said, name = made.data.tags["mlflow.note.content"], load("dev").model.name
    assert said == (
        f"mine\n\n`{name}` on `data`: 20 training and 4 validation rows, 2 classes. "
        "accuracy 0.300, macro-F1 0.310, validation loss 0.900 after 3 updates."
    )
    assert {k: v for k, v in made.data.metrics.items() if "f1/" in k} == {"f1/billing_card": 0.5, "f1/delivery": 0.12}
    assert [m.step for m in client.get_metric_history(made.info.run_id, "f1/delivery")] == [3]
    assert not [key for key in made.data.params if key.startswith("compute.")]
    assert made.data.tags["mlflow.user"] and made.data.tags["mlflow.source.type"] == "LOCAL"


def test_a_job_says_what_it_asked_of_the_cluster_and_which_notebook_it_ran(store, project):
    open_run(load("dev"), "a", project / "a", bundle="0f2a").close("FINISHED")
    (made,) = runs_in(store)
    assert made.data.params["compute.gpus"] == "1"
    notebook = f"{project / 'a'}/notebook.ipynb"
    assert (made.data.tags["mlflow.source.type"], made.data.tags["mlflow.source.name"]) == ("NOTEBOOK", notebook)


@pytest.mark.parametrize(("left", "output", "status"), [
    (["certificate.json"], "outputs", "FINISHED"), ([], "outputs", "KILLED"),
    (["certificate.json"], "s3://models/x", "KILLED"), (["certificate.json", ".stored"], "s3://models/x", "FINISHED"),
])  # fmt: skip
def test_end_of_a_process_that_is_gone(store, project, left, output, status):
    "What was certified before its process died is no killed run; on S3, what is stored there"
    run = open_run(load("dev"), "a", project / "a")
    run.close("KILLED")
    told = {"status": "RUNNING", "told": "RUNNING", "tags": {"gpuml.output": output}}
    path = project / "a" / "tracking.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told, "process": [this_host(), 2**22 + 1, 0.0]}))
    for name in left:
        (project / "a" / name).write_text("{}")
    assert behind(project) == [project / "a"] and read_record(project / "a").status == status


def test_the_same_data_is_recorded_the_same_however_it_is_named(project):
    names = ["data", "./data/", str(project / "data"), "config/../data"]
    runs = [load("dev", [f"data.train={name}"]) for name in names]
    records = [open_run(config, f"dev-{i}", project / f"run-{i}").record for i, config in enumerate(runs)]
    assert [record.params["data.train"] for record in records] == ["data"] * 4
