"A real MLflow server that is down, comes, goes, hangs and refuses: training does not notice, and nothing is lost or doubled"

import os
import subprocess
import sys
import threading
import time

import mlflow
import pytest
import requests

from gpuml.base.errors import ConfigError
from gpuml.base.loading import load
from gpuml.training.fit import fit
from gpuml.training.record import read_record
from gpuml.training.store import find_store
from gpuml.training.tracking import open_run
from gpuml.ui.cli import main
from tests.conftest import free_port, gpuml
from tests.tracking import Gate, tracking_server
from tests.waiting import until


@pytest.fixture(scope="module")
def server(tmp_path_factory, mlflow_template):
    "The port of a real server"
    with tracking_server(tmp_path_factory.mktemp("server"), mlflow_template) as port:
        yield port


@pytest.fixture
def gate(server):
    "What stands before it; shut at first"
    gate = Gate(server)
    yield gate
    gate.shut()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "Clients give up quickly, whatever ran before in this process"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


@pytest.fixture
def config(project, gate, request):
    "A function of the number of epochs: a config of this test's experiment, behind the gate"

    def make(epochs):
        words = [f"tracking.uri={gate.uri}", f"tracking.experiment={request.node.name}", f"train.epochs={epochs}"]
        return load("dev", words)

    return make


def losses(server, experiment):
    "What the server has of its only run: the run, and the steps"
    client = mlflow.MlflowClient(f"http://127.0.0.1:{server}")
    known = client.get_experiment_by_name(experiment)
    (recorded,) = (known and client.search_runs([known.experiment_id])) or [None]
    return recorded, [m.step for m in client.get_metric_history(recorded.info.run_id, "loss")] if recorded else []


def check(server, config, run, updates):
    "Every point is there once, with the status"
    recorded, steps = losses(server, config.tracking.experiment)
    assert recorded.info.status == "FINISHED" and recorded.info.run_name == run.id
    assert steps == list(range(1, updates + 1))
    client = mlflow.MlflowClient(f"http://127.0.0.1:{server}")
    assert {a.path for a in client.list_artifacts(recorded.info.run_id)} >= {"config.yaml", "certificate.json"}


def test_down_all_the_time(config, server, gate, capsys):
    run = fit(config(3))
    assert any("no answer from MLflow" in note for note in run.metrics["notes"])
    capsys.readouterr()
    assert main(["sync", "dev"]) == 1
    said = capsys.readouterr().err
    assert "did not take it" in said and "Traceback" not in said
    gate.open()
    assert main(["sync", "dev"]) == 0
    check(server, config(3), run, 9)
    capsys.readouterr()
    assert main(["sync", "dev"]) == 0 and capsys.readouterr().out == ""  # nothing is left to tell


def test_comes_and_goes_while_training(config, server, gate):
    "Up at the start, gone in the middle, back before the end"
    wanted = config(120)
    gate.open()
    moments = {50: lambda: wait_and_shut(gate, server, wanted), 200: lambda: wait_and_open(gate)}

    def interfere(progress):
        for step in [step for step in moments if progress.step >= step]:
            moments.pop(step)()

    run = fit(wanted, watch=interfere)
    assert not moments
    assert main(["sync", "dev"]) == 0, "the server is back"
    check(server, wanted, run, 360)


def wait_and_shut(gate, server, config):
    "Once the server has had the first points"
    until(lambda: losses(server, config.tracking.experiment)[1])
    gate.shut()


def wait_and_open(gate):
    "Once some points could not be sent: that is tried every second"
    time.sleep(3)
    gate.open()


def test_hangs_all_the_time(config, server, gate, monkeypatch):
    "A server that takes connections and never answers: who waited for it would not get far"
    limit = 900
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(limit))
    gate.be_silent()
    started = time.monotonic()
    run = fit(config(3))
    assert time.monotonic() - started < limit
    gate.shut()
    gate.open()
    assert main(["sync", "dev"]) == 0
    check(server, config(3), run, 9)


@pytest.fixture
def unsent(config, server, gate, project):
    "A run that was stopped while MLflow was silent, with a thread that goes on telling it; the config, and the thread"
    gate.be_silent()
    before = set(threading.enumerate())
    run = open_run(config(1), "a", project / "outputs" / "a", store=(gate.uri, ""))
    (sender,) = (thread for thread in set(threading.enumerate()) - before if thread.name == "gpuml-tracking")
    run.log({"loss": 0.5}, 1)
    assert "`gpuml sync` sends what is missing later" in run.close("KILLED", "interrupted", hurry=lambda: True)
    assert sender.is_alive()
    return config(1), sender


def test_a_run_that_ended_and_was_moved_is_not_written_anew(unsent, gate, project):
    "What did not reach MLflow in time is told later, but not of a folder that is not there any more"
    _, sender = unsent
    (project / "outputs").rename(project / "elsewhere")
    gate.shut()
    gate.open()
    sender.join(600)
    assert not sender.is_alive() and not (project / "outputs").exists()
    assert read_record(project / "elsewhere" / "a").status == "KILLED"


def test_a_run_that_ended_is_gone_on_with_in_the_same_process(unsent, server, gate, project):
    "The first attempt's end is not written over the second one's work"
    config, sender = unsent
    again = open_run(config, "a", project / "outputs" / "a")
    again.log({"loss": 0.4}, 2)
    gate.shut()
    gate.open()
    sender.join(600)
    assert not sender.is_alive() and read_record(project / "outputs" / "a").status == "RUNNING"
    assert again.close("FINISHED", patience=600) == ""
    recorded, steps = losses(server, config.tracking.experiment)
    assert recorded.info.status == "FINISHED" and steps == [1, 2]


def test_refuses_a_name_and_a_deleted_experiment(project, server):
    "A name that the server was not told, and a deleted experiment; while a run is recorded too"
    uri = f"http://127.0.0.1:{server}"
    good = load("dev", [f"tracking.uri={uri}"])
    assert find_store(good) == (uri, "")
    other = load("dev", [f"tracking.uri=http://localhost:{server}"])
    with pytest.raises(
        ConfigError, match=rf"refuses the name localhost:{server}: start it with `mlflow server --allowed-hosts"
    ):
        find_store(other)
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.create_experiment("test"))
    with pytest.raises(ConfigError, match="'test' was deleted in MLflow: `MLFLOW_TRACKING_URI=http"):
        find_store(good)
    run = open_run(good, "a", project / "a", store=(uri, ""))
    run.log({"loss": 0.5}, 1)
    assert run.close("FINISHED", hurry=lambda: True).startswith("MLflow refuses what was recorded (ConfigError: ")


def test_ui_shows_the_projects_runs(config, project, store):
    "`gpuml ui` serves the local store, says where its runs are, and ends with its servers when it is stopped; links follow it"
    run = fit(load("dev", ["train.epochs=1"]))
    port = free_port()
    command = [sys.executable, "-m", "gpuml", "ui", "--no-browser", "--port", str(port)]
    with open(project / "ui.log", "w") as log:
        process = subprocess.Popen(command, cwd=project, stdout=log, stderr=log, start_new_session=True)
    api = f"http://127.0.0.1:{port}/api/2.0/mlflow"
    try:
        until(lambda: "MLflow answers at" in (project / "ui.log").read_text())
        found = requests.get(f"{api}/experiments/get-by-name?experiment_name=test", timeout=600).json()
        runs = requests.post(
            f"{api}/runs/search", json={"experiment_ids": [found["experiment"]["experiment_id"]]}, timeout=600
        ).json()
        assert [r["info"]["run_name"] for r in runs["runs"]] == [run.id]
        experiment = found["experiment"]["experiment_id"]
        page = f"http://localhost:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        lines = ["MLflow starts; Ctrl-C stops it", f"MLflow answers at {page}"]
        assert (project / "ui.log").read_text().splitlines() == lines  # and no line about a request
        runs_page = f"http://localhost:{port}/#/experiments/{experiment}/runs/{runs['runs'][0]['info']['run_id']}"
        assert (run.url, run.url_note) == (runs_page, "")
        again = gpuml("ui", "--no-browser", cwd=project)
        assert (again.returncode, again.stdout) == (0, f"MLflow already answers at {page}\n")
        process.terminate()
        assert process.wait(600) == 0
        with pytest.raises(requests.RequestException):
            requests.get(f"{api}/experiments/search?max_results=1", timeout=2)
        assert "`gpuml ui` starts it" in run.url_note and run.url_note in repr(run)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
