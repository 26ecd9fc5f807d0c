"`gpuml serve`: real requests to a real server, whose answers are those of `gpuml predict`"

import csv
import json
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import requests
from playwright.sync_api import sync_playwright

from gpuml.base.errors import Exit
from gpuml.training.desk import Desk
from gpuml.training.results import Run
from gpuml.ui.cli import main
from gpuml.ui.web import MOST_BYTES, MOST_TEXTS
from tests import forked
from tests.conftest import free_port
from tests.test_lab import CHROMIUM, FLAGS
from tests.test_predict import some_texts, trained, write_csv  # noqa: F401  a fixture


@contextmanager
def serving(run, *options):
    "The server of a run, and the address that it prints"
    command = [forked.python(), "-m", "gpuml", "serve", str(run), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            yield process, line.partition(" at ")[2].partition(" ")[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):  # noqa: F811
    "A server's address"
    with serving(trained) as (_, address):
        yield address


def ask(server, body, **options):
    return requests.post(f"{server}/predict", json=body, timeout=600, **options)


def test_answers_are_those_of_predict(server, trained, project):  # noqa: F811
    texts = some_texts(60)
    assert main(["predict", str(trained), write_csv("in.csv", texts), "out.csv", "data.cache=cache"]) == Exit.DONE
    table = list(csv.DictReader(open("out.csv")))
    answer = ask(server, {"texts": texts}).json()
    assert answer["run"] == trained.name
    for row, prediction in zip(table, answer["predictions"], strict=True):
        assert prediction["label"] == row["label"]
        assert prediction["probability"] == float(row["probability"])
        assert prediction["probabilities"] == {label: float(row[f"p_{label}"]) for label in prediction["probabilities"]}
    (alone,) = ask(server, {"text": texts[0]}).json()["predictions"]
    assert alone["label"] == table[0]["label"]
    assert alone["probability"] == pytest.approx(float(table[0]["probability"]), abs=2e-6)


def test_health_names_run_labels_and_scores(server, trained):  # noqa: F811
    run, health = Run(trained), requests.get(f"{server}/health").json()
    assert (health["status"], health["run"], health["labels"]) == ("ready", trained.name, run.labels)
    assert health["scores"]["accuracy"] == run.metrics["accuracy"]


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        (b'{"text": " "}', 422, '"text" is empty'),
        (b'{"texts": []}', 422, '"texts" is empty'),
        (b'{"texts": ["a", ""]}', 422, "text 1 is empty"),
        (b'{"texts": ["a", 3]}', 422, "texts.1: Input should be a valid string"),
        (b'{"text": "a", "texts": ["a"]}', 422, 'either "text" or "texts"'),
        (b'{"txt": "a"}', 422, "txt: Extra inputs are not permitted"),
        (b'{"text": "\\ud83d"}', 422, "half of a character"),
        (b"where is it", 422, "JSON decode error"),
        (b'{"text": "Gr\xf6\xdfe"}', 400, "the body is no JSON in UTF-8; send {"),
        (b"[" * 20_000, 400, "the body is no JSON in UTF-8; send {"),
        (json.dumps({"texts": ["a"] * (MOST_TEXTS + 1)}).encode(), 422, "has 1,001 texts; the limit is 1,000"),
        (json.dumps({"text": "a" * MOST_BYTES}).encode(), 413, "the body is larger than 4 MiB"),
    ],
)
def test_what_can_not_be_answered_says_why(server, body, status, problem):
    answer = requests.post(f"{server}/predict", data=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, problem in answer.json()["detail"]) == (status, True), answer.text


def test_a_body_in_pieces_has_the_same_limit(server):
    pieces = (b"a" * 2**20 for _ in range(6))
    answer = requests.post(f"{server}/predict", data=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_form_is_refused_and_no_page_comes_from_elsewhere(server):
    answer = requests.post(f"{server}/predict", data='{"text": "a"}')
    assert (answer.status_code, "Content-Type: application/json" in answer.json()["detail"]) == (415, True)
    assert requests.get(f"{server}/docs").status_code == 404
    assert "/predict" in requests.get(f"{server}/openapi.json").json()["paths"]


def test_a_page_elsewhere_has_no_answer_by_a_name_of_its_own(server):
    "DNS rebinding: the browser asks 127.0.0.1 for another name, and takes the answer as that page's"
    port = server.rpartition(":")[2]
    for method, path in (("GET", "/"), ("GET", "/health"), ("POST", "/predict")):
        answer = requests.request(method, f"{server}{path}", json={"text": "a"}, headers={"Host": f"evil.test:{port}"})
        assert (answer.status_code, "evil.test" in answer.json()["detail"]) == (421, True)
    assert ask(server, {"text": "late"}, headers={"Host": f"localhost:{port}"}).ok


def test_many_ask_at_once(server):
    texts = some_texts(40, seed=1)
    together = ask(server, {"texts": texts}).json()["predictions"]
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda text: ask(server, {"text": text}).json()["predictions"][0], texts))
    for answer, expected in zip(answers, together, strict=True):
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-6)


def test_a_text_that_fails_fails_alone(trained):  # noqa: F811
    with closing(Desk(Run(trained))) as desk:
        bad = [desk.ask([None]), desk.ask(["late parcel"]), desk.ask([None])]
        assert bad[1].result().labels
        assert all(answer.exception() for answer in (bad[0], bad[2]))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(trained, project, name):  # noqa: F811
    with serving(trained) as (process, address):
        assert ask(address, {"text": "late"}).ok
        process.send_signal(name)
        output, errors = process.communicate(timeout=600)
    assert (process.returncode, output.splitlines()[-1], errors) == (0, "stopped", "")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address}/health")


def test_its_curl_line_works_and_an_open_address_is_warned_of(trained, project):  # noqa: F811
    with serving(trained, "--host", "0.0.0.0") as (process, _):
        line = process.stdout.readline()
        assert json.loads(subprocess.check_output(["bash", "-c", f"{line.strip()} -s"]))["predictions"][0]["label"]
        assert "there is no authentication" in process.stderr.readline()
        named = line.replace("-H", "-H 'Host: models.example.com' -H", 1)  # a server in front has names of its own
        assert "predictions" in json.loads(subprocess.check_output(["bash", "-c", f"{named.strip()} -s"]))


def test_a_busy_port_is_said_before_anything_is_loaded(server, trained, capsys):  # noqa: F811
    port = server.rpartition(":")[2]
    assert main(["serve", str(trained), "--port", port]) == Exit.BAD_CONFIG
    assert f"--port {port}: Address already in use; --port 0 takes one that is free" in capsys.readouterr().err
    assert main(["serve", str(trained), "--host", "no.such.host.invalid"]) == Exit.BAD_CONFIG
    assert main(["serve", "no-such-run", "--port", str(free_port())]) == Exit.NOT_FOUND


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_the_page(server):
    foreign = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme="dark")
        page.set_default_timeout(600_000)
        page.on("request", lambda request: request.url.startswith(server) or foreign.append(request.url))
        page.goto(server)
        page.fill("textarea", "<b>late parcel</b>")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#answer:not([hidden])")
        (expected,) = ask(server, {"text": "<b>late parcel</b>"}).json()["predictions"]
        assert page.inner_text("#label") == expected["label"]
        assert page.inner_text(".share .number") == f"{expected['probability']:.3f}"
        assert page.evaluate("[document.documentElement.scrollWidth]") == [360]
        page.fill("textarea", "  ")
        page.click("button")
        page.wait_for_selector("#problem:not(:empty)")
        assert '"text" is empty' in page.inner_text("#problem")
        browser.close()
    assert not foreign
