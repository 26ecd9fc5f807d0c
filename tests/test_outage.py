"A real MLflow server that is down, comes, goes and hangs: training does not notice, and nothing is lost or doubled"

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests

from gpuml.base.loading import load
from gpuml.training.fit import fit
from tests.conftest import free_port, gpuml

HOST = "127.0.0.2"  # this machine, but not by a name that gpuml takes for a server that nobody started


class Server:
    "An MLflow tracking server that can be started and stopped"

    def __init__(self, folder, host=HOST, allowed="*"):
        self.folder, self.port, self.process = folder, free_port(), None
        self.host, self.allowed = host, allowed
        self.uri = f"http://{host}:{self.port}"

    def start(self):
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
        ]
        command += [
            "--artifacts-destination",
            str(self.folder / "artifacts"),
            "--host",
            self.host,
            "--port",
            str(self.port),
        ]
        command += ["--workers", "1", "--allowed-hosts", self.allowed]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        for _ in range(240):
            try:
                if requests.get(f"{self.uri}/health", timeout=1).ok:
                    return
            except requests.RequestException:
                time.sleep(0.25)
        raise TimeoutError((self.folder / "server.log").read_text()[-2000:])

    def stop(self):
        if self.process:
            os.killpg(self.process.pid, 15)
            self.process.wait(30)
            self.process = None


@pytest.fixture
def server(tmp_path, mlflow_template):
    import shutil

    (tmp_path / "server").mkdir()
    shutil.copy(mlflow_template, tmp_path / "server" / "server.db")
    server = Server(tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "Clients give up quickly, as they do in `_client`, whatever ran before in this process"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def check(server, run, updates):
    "Every point is there once, with the status"
    import mlflow

    client = mlflow.MlflowClient(server.uri)
    (recorded,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert recorded.info.status == "FINISHED" and recorded.info.run_name == run.id
    history = client.get_metric_history(recorded.info.run_id, "loss")
    assert [m.step for m in history] == list(range(1, updates + 1))
    assert {a.path for a in client.list_artifacts(recorded.info.run_id)} >= {"config.yaml", "certificate.json"}


def config(server, epochs):
    return load("dev", [f"tracking.uri={server.uri}", f"train.epochs={epochs}"])


def test_down_all_the_time(project, server):
    started = time.monotonic()
    run = fit(config(server, 3))
    assert time.monotonic() - started < 60
    assert any("no answer from MLflow" in note for note in run.metrics["notes"])
    failed = gpuml("sync", "dev", cwd=project)
    assert failed.returncode == 1 and "did not take it" in failed.stderr and "Traceback" not in failed.stderr
    server.start()
    assert gpuml("sync", "dev", cwd=project).returncode == 0
    check(server, run, 9)
    assert gpuml("sync", "dev", cwd=project).stdout == ""  # nothing is left to tell


def test_comes_and_goes_while_training(project, server):
    "Up at the start, gone in the middle, back before the end"
    server.start()

    def interfere():
        time.sleep(3)
        server.stop()
        time.sleep(3)
        server.start()

    thread = threading.Thread(target=interfere)
    run = fit(config(server, 50), watch=lambda p: p.step and (thread.ident or thread.start()))
    thread.join()
    if gpuml("sync", "dev", cwd=project).returncode:
        raise AssertionError("the server is back")
    check(server, run, 150)


def test_hangs_all_the_time(project, server):
    "A server that takes connections and never answers"
    with socket.socket() as hung:
        hung.bind((HOST, server.port))
        hung.listen(64)
        started = time.monotonic()
        run = fit(config(server, 3))
        assert time.monotonic() - started < 60
    server.start()
    assert gpuml("sync", "dev", cwd=project).returncode == 0
    check(server, run, 9)


def test_ui_shows_the_projects_runs(project, store):
    "`gpuml ui` serves the local store, says where, and ends with its servers when it is stopped"
    run = fit(load("dev", ["train.epochs=1"]))
    port = free_port()
    command = [sys.executable, "-m", "gpuml.ui.cli", "ui", "--no-browser", "--port", str(port)]
    with open(project / "ui.log", "w") as log:
        process = subprocess.Popen(command, cwd=project, stdout=log, stderr=log, start_new_session=True)
    api = f"http://127.0.0.1:{port}/api/2.0/mlflow"
    try:
        deadline = time.monotonic() + 90
        while f"MLflow answers at http://localhost:{port}\n" not in (project / "ui.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        found = requests.get(f"{api}/experiments/get-by-name?experiment_name=test", timeout=10).json()
        runs = requests.post(
            f"{api}/runs/search", json={"experiment_ids": [found["experiment"]["experiment_id"]]}, timeout=10
        ).json()
        assert [r["info"]["run_name"] for r in runs["runs"]] == [run.id]
        process.terminate()
        assert process.wait(30) == 0
        with pytest.raises(requests.RequestException):
            requests.get(f"{api}/experiments/search?max_results=1", timeout=2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
