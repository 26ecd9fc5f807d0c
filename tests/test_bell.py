"A notification of the browser at the end of a training: only after a click, and nothing where there is none"

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpuml.ui.beside import Training
from gpuml.ui.panel_train import bell_html, end_html
from tests.test_lab import CHROMIUM, browser  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install it to run the browser tests")
RECORD = """() => {
    window.told = [];
    const Shown = window.Notification;
    window.Notification = class extends Shown {
        constructor(title, options) { super(title, options); window.told.push(options.body); }
    };
}"""
SET = "html => { document.querySelector('.gpuml-panel div').innerHTML = html; }"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def page(browser, tmp_path, monkeypatch):  # noqa: F811
    "A page that may show notifications, with an empty panel"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index.html").write_text("<body><div class='gpuml-panel'><div></div></div></body>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Quiet)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    with browser.new_context() as context:
        context.grant_permissions(["notifications"], origin=address)
        page = context.new_page()
        page.set_default_timeout(600_000)
        page.goto(address)
        yield page
    server.shutdown()
    server.server_close()


@pytest.fixture
def ended(tmp_path):
    (tmp_path / "progress.json").write_text('{"phase": "failed", "run": "dev-1", "error": "a.csv:2: it\'s <b>"}')
    return end_html(Training(tmp_path))


def test_it_is_told_after_a_click(page, ended):
    page.evaluate(RECORD)
    page.evaluate(SET, bell_html())
    page.get_by_role("button", name="Tell me when it ends").click()
    page.get_by_text("You will be told").wait_for()
    assert page.evaluate("told") == []
    page.evaluate(SET, ended)
    page.wait_for_function("told.length === 1")
    assert page.evaluate("told") == ["dev-1 failed: a.csv:2: it's <b>"]


def test_nobody_is_told_who_did_not_ask(page, ended):
    page.evaluate(RECORD)
    page.evaluate(SET, bell_html())
    page.get_by_role("button", name="Tell me when it ends").wait_for()
    page.evaluate(SET, ended)
    page.wait_for_timeout(200)
    assert page.evaluate("told") == []


def test_a_browser_without_notifications_has_no_button(page):
    page.evaluate("() => { delete window.Notification; }")
    page.evaluate(SET, bell_html())
    page.wait_for_function("!document.querySelector('.gpuml-panel img')")
    assert page.evaluate("document.querySelector('.gpuml-bell').hidden")
