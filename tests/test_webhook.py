"A word at the end of a run: a server on loopback that records, and what becomes of a run whose webhook fails"

import json
import os
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from gpuml.base.errors import ConfigError, TrainError
from gpuml.base.line import parse_words
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.base.webhook import TRY, VARIABLE, Message, Sending, hook_of, post
from gpuml.jobs.runner import execute
from gpuml.training import attempts
from gpuml.training.attempts import Attempt
from gpuml.training.fit import fit
from gpuml.training.message import Occasions, tell_of_job
from gpuml.training.own_run import own_run
from gpuml.training.record import read_record
from gpuml.ui.cli import main
from gpuml.ui.sweep_line import train_line
from tests.conftest import free_port
from tests.test_run import PARAMETERS, write_notebook

SECRET = "T0B0xyzTOKEN"


class _Records(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, json.loads(body)))
        self.server.slow.wait()
        self.send_response(self.server.status)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.server.heard.append((self.path, None))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook(monkeypatch):
    "What listens; `heard` has what it was sent"
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Records)
    server.heard, server.status, server.slow = [], 200, Event()
    server.slow.set()
    server.address = f"http://127.0.0.1:{server.server_port}/hooks/{SECRET}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv(VARIABLE, server.address)
    yield server
    server.slow.set()
    server.shutdown()
    server.server_close()


def events(hook):
    return [(body["event"], body["run"]) for _, body in hook.heard]


@pytest.mark.parametrize(
    ("status", "sentence"), [(204, ""), (500, "HTTP 500"), (302, "HTTP 302, a redirect: the address is another one")]
)
def test_an_answer(hook, status, sentence):
    hook.status = status
    assert post(hook_of(os.environ), TRY, {}) == sentence
    assert [path for path, _ in hook.heard] == [f"/hooks/{SECRET}"]  # a redirect is not followed


def test_nobody_waits_for_a_slow_server(hook):
    hook.slow.clear()
    started = time.monotonic()
    assert Sending(lambda: TRY).wait(0.2) == "the webhook had not answered after 0.2 s"
    assert Sending(lambda: TRY, seconds=0.2).wait(600).endswith("did not take the word: no answer in 0.2 s")
    assert time.monotonic() - started < 300


def test_what_goes_wrong_does_not_show_the_address(hook, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{free_port()}/hooks/{SECRET}")
    assert Sending(lambda: TRY).wait(600) == "the webhook at 127.0.0.1 did not take the word: Connection refused"
    for address in (f"http://no host/{SECRET}", f"htp://a/{SECRET}", f"http://[::1/{SECRET}", f"http:///{SECRET}"):
        with pytest.raises(ConfigError) as raised:
            hook_of({VARIABLE: address})
        assert SECRET not in str(raised.value)
    for address in (f"http://127.0.0.1:99999/{SECRET}", f"http://no.such.invalid/{SECRET}"):
        monkeypatch.setenv(VARIABLE, address)
        note = Sending(lambda: TRY).wait(600)
        assert note and SECRET not in note, note


def test_a_message_has_no_secret(hook, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    assert not Sending(lambda: Message("failed", "r", f"no login correct-horse-battery at {hook.address}")).wait(600)
    assert hook.heard[0][1]["sentence"] == "no login [MY_TOKEN] at [GPUML_WEBHOOK]"


def test_a_training_here(hook, project, store):
    run = fit(load("dev", ["train.epochs=1"]))
    [(_, body)] = hook.heard
    assert (body["event"], body["run"], body["place"]) == ("done", run.id, run.place)
    assert body["scores"]["accuracy"] == run.metrics["accuracy"] and "useful" in body["sentence"]
    assert body["owner"] and ("/runs/" in body["link"] or not read_record(Path(run.place)).sent.run)
    files = [file for file in (project / "outputs").rglob("*") if file.is_file()] + [project / "mlflow.db"]
    assert files and not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_training_that_a_webhook_refuses(hook, project, store):
    hook.status = 500
    run = fit(load("dev", ["train.epochs=1"]))
    assert run.metrics["accuracy"] > 0 and len(hook.heard) == 1


def test_a_training_of_which_nobody_hears(hook, project, store):
    fit(load("dev", ["train.epochs=1", "tracking.notify=none"]))
    fit(load("dev", ["train.epochs=1", "tracking.notify=failed"]))
    with pytest.raises(Exception, match="no-such.csv"):  # before anything was trained: whoever typed it sees it
        fit(load("dev", ["data.train=no-such.csv"]))
    assert hook.heard == []


def test_a_loop_that_fails(hook, project, store):
    with pytest.raises(TrainError), own_run(load("dev")) as job:
        for _ in job.steps(range(3)):
            raise TrainError("the loss is not a number")
    [(_, body)] = hook.heard
    assert (body["event"], body["sentence"]) == ("failed", "the loss is not a number")


def sweep(*words):
    "A line with several values, trained"
    return train_line(parse_words(["dev", "train.epochs=1", *words]), lambda: None, say=lambda text: None)


@pytest.mark.parametrize("notify", ["all", "failed"])
def test_a_sweep_is_one_message(hook, project, store, notify):
    "Also where runs fail; and of one without a failure `failed` says nothing"
    with open("data/a.csv", "a") as f:
        f.write("a row with no label\n")
    sweep("data.on_bad_row=refuse,skip", f"tracking.notify={notify}")
    [(_, body)] = hook.heard
    assert body["event"] == "sweep" and body["sentence"].startswith("1 of 2 runs failed; best: "), body
    with pytest.raises(TrainError, match="all 2 runs failed"):
        sweep("data.train=none.csv", "train.seed=0,1", f"tracking.notify={notify}")
    (_, body) = hook.heard[1]
    assert body["event"] == "failed" and "all 2 runs failed; the first one: " in body["sentence"], body
    sweep("data.on_bad_row=skip", "train.seed=0,1", f"tracking.notify={notify}")
    assert [body["sentence"][:6] for _, body in hook.heard[2:]] == ["best: "] * (notify == "all")


def test_a_job(hook, tmp_path):
    notebook = write_notebook(tmp_path / "n" / "n.ipynb", PARAMETERS, "print(1)")
    broken = write_notebook(tmp_path / "n" / "broken.ipynb", PARAMETERS, "1/0")
    for file in (broken, notebook, notebook):  # of one run: the third attempt finds it done
        execute(file, {"config": "prod"}, "job-1", str(tmp_path / "job-1"))
    assert events(hook) == [("failed", "job-1"), ("done", "job-1")]
    assert hook.heard[0][1]["sentence"] == "cell 2 raised ZeroDivisionError: division by zero"
    logs = [log.read_text() for log in (tmp_path / "job-1" / "logs").iterdir()]
    assert len(logs) == 3 and SECRET not in "".join(logs)


def test_a_job_whose_webhook_fails(hook, tmp_path):
    hook.status = 403
    notebook = write_notebook(tmp_path / "n" / "n.ipynb", PARAMETERS, "print(1)")
    assert execute(notebook, {"config": "prod"}, "job-1", str(tmp_path / "job-1")).exit_code == 0
    [log] = (tmp_path / "job-1" / "logs").iterdir()
    assert "note: the webhook at 127.0.0.1 did not take the word: HTTP 403" in log.read_text()


@pytest.mark.parametrize("where", ["a disk", "S3"])
def test_a_job_is_preempted_again_and_again(hook, where, request, tmp_path):
    place = request.getfixturevalue("s3").url("runs/dev-1") if where == "S3" else str(tmp_path / "dev-1")
    first = Attempt("dev-1", 1, 75, "stopped by SIGTERM", 3, "2026-01-01T08:00", "2026-01-01T09:00", "pod", "ada")
    first = replace(first, namespace="gpuml-dev")
    ends = [first, replace(first, attempt=2), replace(first, attempt=3), replace(first, attempt=4, exit_code=0)]
    for ended in ends:
        Storage().put_bytes(attempts.content(ended), f"{place}/attempts/{ended.attempt}.json")
        assert tell_of_job(ended, Storage(), place, Occasions()).wait(600) == ""
    assert events(hook) == [("preempted", "dev-1"), ("done", "dev-1")]
    assert {body["place"] for _, body in hook.heard} == {place}


def test_the_command_tries_it(hook, capsys):
    assert main(["notify"]) == 0
    assert capsys.readouterr().out == "127.0.0.1 has taken a message, written for json\n"
    hook.status = 404
    assert main(["notify"]) == 1
    assert capsys.readouterr().err == "gpuml: the webhook at 127.0.0.1 did not take a message: HTTP 404\n"
