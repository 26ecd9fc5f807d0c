"What an MLflow store refuses is said before anything is trained, with what mends it"

import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpuml.base.errors import ConfigError
from gpuml.base.loading import load
from gpuml.training.store import find_store, revisions


def change(statement):
    "A function that changes a store by SQL"

    def changed(path):
        with closing(sqlite3.connect(path)) as store:
            store.execute(statement)
            store.commit()

    return changed


def other_database(path):
    path.unlink()
    change("CREATE TABLE customers (id)")(path)


DELETED = "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'test', 'deleted')"
FILES = {
    "text": (lambda path: path.write_text("run,loss\n1,0.5\n"), "is no MLflow store (file is not a database): `mv /"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "is no MLflow store (database disk image is malformed)"),
    "another database": (other_database, "is a database, but not MLflow's (tables: customers); name another file"),
    "older": (change(f"UPDATE alembic_version SET version_num = '{revisions()[0]}'"), "is a store of an older MLflow: `cp /"),
    "newer": (change("UPDATE alembic_version SET version_num = 'ffffffffffff'"), "newer MLflow than the installed one: `pip install -U mlflow`"),
    "deleted experiment": (change(DELETED), "'test' was deleted in MLflow: `MLFLOW_TRACKING_URI=sqlite:///"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("named", [True, False])
def test_file_that_takes_no_run(store, case, named):
    "mlflow#6703, mlflow#10493: the store in the config, or the project's own in place of a server that is not there"
    change_it, sentence = FILES[case]
    change_it(store)
    with pytest.raises(ConfigError) as error:
        find_store(load("dev", [f"tracking.uri=sqlite:///{store}"] if named else []))
    assert sentence in str(error.value)


def test_remedy_works(store):
    "What the sentence tells to run mends the store"
    config = load("dev", [f"tracking.uri=sqlite:///{store}"])
    change(DELETED)(store)
    with pytest.raises(ConfigError, match="restore") as error:
        find_store(config)
    command = str(error.value).split("`")[1].replace("mlflow ", f"'{sys.executable}' -m mlflow ", 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert find_store(config) == (config.tracking.uri, "")


def test_file_that_is_locked_is_waited_for(store):
    with closing(sqlite3.connect(store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        uri, note = find_store(load("dev", [f"tracking.uri=sqlite:///{store}"]))
    assert uri == f"sqlite:///{store}" and "is locked by another program" in note


def test_file_in_a_folder_that_is_missing(project):
    with pytest.raises(ConfigError, match="the folder .*/no/where is missing"):
        find_store(load("dev", [f"tracking.uri=sqlite:///{project}/no/where/mlflow.db"]))


@pytest.fixture
def web(monkeypatch):
    "A function: a web server that gives this status and page to every request, and its port"
    servers = []

    def serve(status, page, kind="text/html"):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(page.encode())

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.2", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


LOGIN = "<html><style>b {color: red}</style><title>Sign in</title> to continue</html>"
PAGES = {
    "login": (200, LOGIN, "what answers there is not MLflow's tracking server (200: Sign in to continue)"),
    "not found": (404, "<h1>Not Found</h1>", "is not MLflow's tracking server (404: Not Found)"),
    "other API": (404, '{"detail": "Not Found"}', "is not MLflow's tracking server (404"),
    "who": (401, "You are not authenticated.", "asks who you are (401): set MLFLOW_TRACKING_USERNAME and"),
    "not permitted": (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "does not permit it (no) (403): set MLFLOW"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAGES)
def test_server_that_refuses(project, web, case):
    status, page, sentence = PAGES[case]
    port = web(status, page)
    with pytest.raises(ConfigError) as error:
        find_store(load("dev", [f"tracking.uri=http://127.0.0.2:{port}"]))
    assert sentence in str(error.value)
    assert error.value.exit_code == (77 if status in (401, 403) else 78)


def test_server_in_trouble_is_waited_for(project, web):
    uri, note = find_store(load("dev", [f"tracking.uri=http://127.0.0.2:{web(503, '<h1>Busy</h1>')}"]))
    assert "which is in trouble (503: Busy): what is recorded waits on the disk" in note and uri.startswith("http")


@pytest.mark.parametrize(("status", "refused"), [(403, True), (502, False), (200, True)])
def test_proxy_in_between_is_named(project, web, monkeypatch, status, refused):
    "A proxy that knows no MLflow: named without its password, with the variable that goes past it"
    proxy = web(status, "<h1>Blocked</h1>")
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.2:{proxy}")
    config = load("dev", ["tracking.uri=http://mlflow:5000"])
    if refused:
        with pytest.raises(ConfigError) as error:
            find_store(config)
        sentence = str(error.value)
    else:
        sentence = find_store(config)[1]
    assert (
        f"the proxy http://127.0.0.2:{proxy}" in sentence and "NO_PROXY=mlflow" in sentence and "secret" not in sentence
    )


def test_credentials_are_shown_to_the_server(project, web, monkeypatch):
    "A server that wants a password is asked with the one that MLflow's client has"
    from gpuml.training.store import ask

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    assert ask(f"http://127.0.0.2:{web(200, '{}', 'application/json')}").good


def test_a_server_of_another_project_is_named(tmp_path):
    "Two projects whose configs name one port: the second is told whose server it meets"
    from gpuml.training.served import borrowed, marked_as_served

    first, second = tmp_path / "a project", tmp_path / "b"
    first.mkdir()
    place = {"experiment": {"artifact_location": (first / "mlruns" / "0").as_uri()}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(place).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}"
    try:
        with marked_as_served(first / "mlflow.db", url, os.getpid()):
            assert f"{url} is `gpuml ui` of the project {first}" in borrowed(url, second)
            assert borrowed(url, first) == ""
        assert borrowed(url, second) == ""  # somebody's own server, which may well be for all projects
    finally:
        server.shutdown()
