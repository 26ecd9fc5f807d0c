"""A real JupyterLab, a real kernel, a real browser.

Pictures go to the folder named by GPUML_PICTURES; `make pictures` makes the README's there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import requests
from PIL import Image

from tests import forked
from tests.conftest import OFFLINE, ROOT, free_port, runs_in
from tests.standing import STANDING
from tests.waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install it to run the JupyterLab tests")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip

PICTURES = os.environ.get("GPUML_PICTURES")  # what is to be seen on them is trained on a real model
ENDLESS = 500 if PICTURES else 10000  # epochs
PATIENCE = 600_000  # milliseconds: for a machine that hangs, not for a slow one


def answers(address):
    "Whether a server is up there"
    with suppress(requests.RequestException):
        return requests.get(f"{address}/api", timeout=5).ok
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "JupyterLab on loopback over an empty folder: (its address, the folder)"
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), "test-token"
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(home / name.lower()) for name in names}}
    (home / "work").mkdir()
    announcements = "@jupyterlab/apputils-extension:announcements"
    subprocess.run(
        [f"{sys.prefix}/bin/jupyter", "labextension", "disable", announcements],
        env=environment,
        check=True,
        capture_output=True,
    )
    process = subprocess.Popen(
        [f"{sys.prefix}/bin/jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly"],
        cwd=home / "work", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or answers(address), pause=0.5)
        assert process.poll() is None, "JupyterLab did not start"
        yield f"{address}/lab?token={token}", home / "work"
    finally:
        process.terminate()
        process.wait(600)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request):
    "A page with nothing of earlier ones"
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        yield page
        if getattr(request.node, "failed", False):
            picture(page, f"failed-{request.node.name}.png")


def notebook(*cells: str) -> str:
    "A notebook with these code cells"
    made = [
        dict(cell_type="code", id=f"c{i}", metadata={}, outputs=[], execution_count=None, source=c)
        for i, c in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5))


def open_notebook(page, server, path: Path):
    "Open it in JupyterLab and wait until its kernel answers"
    address, work = server
    page.goto(address.replace("/lab?", f"/lab/tree/{path.relative_to(work)}?reset&"))
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.evaluate(
        """async () => {
            while (!window.jupyterapp?.shell?.currentWidget?.sessionContext) await new Promise(r => setTimeout(r, 100));
            const session = window.jupyterapp.shell.currentWidget.sessionContext;
            await session.ready;
            await session.session.kernel.info;
            await session.session.kernel.requestExecute({code: 'pass', silent: true}).done;
        }"""
    )


def run_all(page):
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


def picture(page, name):
    "Keep a screenshot where they are asked for"
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / name)


@pytest.fixture
def model(tiny):
    "What the projects are on"
    return OFFLINE if PICTURES else str(tiny)


@pytest.fixture
def lab_project(project, store, server):
    "The small project inside JupyterLab's folder"
    place = server[1] / f"p{time.monotonic_ns()}"
    shutil.copytree(project, place)
    return place


OBSERVE = """() => {
    window.curves = [];
    new MutationObserver(() => {
        const curve = document.querySelector("svg[aria-label='loss curve'] g path + path");
        if (curve) window.curves.push(curve.getAttribute('d'));
        window.progressSeen ||= !!document.querySelector('progress');
    }).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


def test_train_and_look(page, server, mlflow_template, model):
    "The shipped notebook on the shipped sample: progress that moves, a report, everything saved in the notebook"
    place = server[1] / "sample"
    for part in ("config", "data"):
        shutil.copytree(ROOT / part, place / part)
    shutil.copy(mlflow_template, place / "mlflow.db")
    shutil.copy(ROOT / "nbs" / "train.ipynb", place / "train.ipynb")
    dev = place / "config" / "dev.yaml"
    text = dev.read_text()
    changes = {} if PICTURES else {"epochs: 3": "epochs: 20", "max_length: 256": "max_length: 48"}
    for old, new in {"distilbert-base-uncased": model, **changes}.items():
        text = text.replace(old, new)
    dev.write_text(text)
    open_notebook(page, server, place / "train.ipynb")
    page.evaluate(OBSERVE)  # what was shown, also where the training is over before this test looks
    run_all(page)
    page.wait_for_function("() => window.progressSeen && new Set(window.curves).size > 1")
    picture(page, "training.png")
    page.locator("svg[aria-label='confusion matrix']").first.wait_for()
    page.get_by_text("where is my parcel??").last.wait_for()
    assert page.locator(".jp-RenderedHTMLCommon", has_text="✓").count() >= 1  # the bar gave way to one line
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()
    page.locator("svg[aria-label='confusion matrix']").first.scroll_into_view_if_needed()
    picture(page, "train.png")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    until(lambda: "confusion matrix" in (place / "train.ipynb").read_text())
    saved = (place / "train.ipynb").read_text()
    assert "Traceback" not in saved and "widget-view" not in saved


def test_tab_completes(page, server, lab_project):
    path = lab_project / "tab.ipynb"
    path.write_text(notebook("%load_ext gpuml", ""))
    open_notebook(page, server, path)
    run_all(page)
    page.wait_for_function("() => document.querySelectorAll('.jp-InputPrompt')[0].textContent.includes('1')")
    cell = page.locator(".jp-CodeCell .cm-content").nth(1)
    cell.click()
    for typed, completed in (("run = %gpu_train de", "%gpu_train dev"), (" train.epo", "train.epochs=")):
        page.keyboard.type(typed)
        page.keyboard.press("Tab")
        page.locator(".jp-Completer-item").first.wait_for()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "text => document.querySelectorAll('.jp-CodeCell .cm-content')[1].textContent.endsWith(text)", arg=completed
        )
    page.keyboard.type("2 train.schedule=")
    page.keyboard.press("Tab")
    page.locator(".jp-Completer-item").first.wait_for()
    assert page.locator(".jp-Completer-match").all_inner_texts() == ["linear", "cosine", "constant"]
    picture(page, "tab.png")


def test_stop_button_ends_training_cleanly(page, server, lab_project):
    path = lab_project / "stop.ipynb"
    path.write_text(notebook("%load_ext gpuml", f"run = %gpu_train dev train.epochs={ENDLESS}", "print('went on')"))
    open_notebook(page, server, path)
    run_all(page)
    page.get_by_text("examples/s").first.wait_for()
    page.locator(
        "button[data-command='notebook:interrupt-kernel'], jp-button[data-command='notebook:interrupt-kernel']"
    ).first.click()
    page.get_by_text("stopped at update").first.wait_for()
    time.sleep(1)
    assert page.locator(".jp-OutputArea-output", has_text="went on").count() == 0  # the cells below don't run
    text = page.locator(".jp-Notebook").inner_text()
    assert "Traceback" not in text and "KeyboardInterrupt" not in text and "Preempted: stopped at update" in text
    (recorded,) = runs_in(lab_project / "mlflow.db")
    assert recorded.info.status == "KILLED"
    picture(page, "stopped.png")


def test_two_processes_in_a_notebook_and_in_the_panel(page, server, lab_project):
    "The stop button ends both, and the panel goes on with the run in two processes"

    def has_workers():
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if "gpuml.training.worker" in process.cmdline() and process.cwd() == str(lab_project):
                    return True
        return False

    path = lab_project / "two.ipynb"
    environment = "import os\nos.environ['GPUML_GPUS'] = '2'\n%load_ext gpuml"
    path.write_text(notebook(environment, f"run = %gpu_train dev train.epochs={ENDLESS}"))
    open_notebook(page, server, path)
    run_all(page)
    page.get_by_text("in 2 processes").first.wait_for()
    page.get_by_text("examples/s").first.wait_for()
    picture(page, "two-training.png")
    page.locator(
        "button[data-command='notebook:interrupt-kernel'], jp-button[data-command='notebook:interrupt-kernel']"
    ).first.click()
    page.get_by_text("stopped at update").first.wait_for()
    until(lambda: not has_workers())
    (folder,) = (lab_project / "outputs").iterdir()
    assert any((folder / "checkpoints").iterdir())
    picture(page, "two-stopped.png")
    panel = lab_project / "panel.ipynb"
    panel.write_text(notebook(environment, "%gpuml"))
    open_notebook(page, server, panel)
    run_all(page)
    page.get_by_role("button", name="Resume", exact=True).click()
    page.locator(".gpuml-panel [role=status]", has_text="in 2 processes").wait_for()
    page.locator(".gpuml-panel [role=status]", has_text="examples/s").wait_for()
    picture(page, "two-panel.png")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator(".gpuml-panel").get_by_text("stopped at update").first.wait_for()
    until(lambda: not has_workers())
    picture(page, "two-panel-stopped.png")


def test_help_and_mistakes_are_readable(page, server, lab_project):
    path = lab_project / "help.ipynb"
    path.write_text(notebook("%load_ext gpuml", "%gpu_train dev train.epoch=5", "%gpu_train --help"))
    open_notebook(page, server, path)
    run_all(page)
    page.get_by_text("ConfigError: train.epoch=5: unknown key 'train.epoch'; did you mean 'train.epochs'?").wait_for()
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()
    picture(page, "help.png")


def field(page, name: str):
    "The input with that label in the panel"
    return page.locator(".gpuml-fields:visible .gpuml-field", has_text=re.compile(rf"^{name}\b")).locator(
        "input,select"
    )


def section(page, name: str):
    "Show another section of the config"
    page.locator(".gpuml-sections:visible").get_by_role("button", name=name, exact=True).click()


def line(page):
    return page.locator("input.gpuml-line[aria-label^='the same']:visible")


def pick(page, config):
    "Pick a config, and wait until its inputs have taken the place of the others"
    from playwright.sync_api import expect

    section(page, "train")
    before = field(page, "epochs").element_handle()
    page.locator(".gpuml-panel select").first.select_option(config)
    before.wait_for_element_state("hidden")
    expect(line(page)).to_have_value(f"run = %gpu_train {config}")


def open_panel(page, server, place):
    path = place / "panel.ipynb"
    path.write_text(notebook("%load_ext gpuml", "%gpuml"))
    open_notebook(page, server, path)
    run_all(page)
    page.locator(".gpuml-panel").wait_for()
    return path


def tops(page, *selectors):
    "Where elements begin, from the page's top, at one moment"
    look = "all => all.map(one => [...document.querySelectorAll(one)].map(part => part.getBoundingClientRect().top))"
    return page.evaluate(look, selectors)


def middle(locator):
    "The middle of an element, from the page's top"
    box = locator.bounding_box()
    return box["y"] + box["height"] / 2


def submit(page, name):
    "Submit what the tab Production describes, and go where the job is followed"
    page.get_by_role("button", name="Submit", exact=True).click()
    page.locator(".gpuml-panel", has_text=f"{name} is submitted").wait_for()
    page.get_by_role("tab", name="Jobs").click()


def see_notebook(page, name):
    "Wait for the end of the job, which is open, and look at its executed notebook"
    page.locator(".gpuml-jobs tr", has_text=name).locator(".gpuml-succeeded").wait_for()
    page.locator(".gpuml-panel").get_by_role("button", name="notebook", exact=True).click()
    page.frame_locator(".gpuml-notebook").get_by_text("Train a text classifier").wait_for()


def theme(page, name):
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
    page.wait_for_function(
        "dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg=name == "JupyterLab Dark"
    )
    page.wait_for_selector("#jupyterlab-splash", state="detached")


def test_panel_trains_stops_resumes_and_is_found_again(page, server, lab_project):
    from playwright.sync_api import expect

    (lab_project / "config" / "prod.yaml").write_text((lab_project / "config" / "dev.yaml").read_text())
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    path = open_panel(page, server, lab_project)
    pick(page, "prod")
    pick(page, "dev")
    field(page, "epochs").fill("0")
    page.get_by_text("train.epochs=0: train.epochs: must be at least 1, not 0").wait_for()
    expect(page.get_by_role("button", name="Train", exact=True)).to_be_disabled()
    picture(page, "panel-wrong.png")
    field(page, "epochs").fill(str(ENDLESS))
    field(page, "schedule").select_option("cosine")
    expect(line(page)).to_have_value(f"run = %gpu_train dev train.epochs={ENDLESS} train.schedule=cosine")
    line(page).focus()
    assert page.evaluate("() => getSelection().toString()") == line(page).input_value()
    page.get_by_role("button", name="Train", exact=True).click()
    curve = page.locator(".gpuml-panel svg[aria-label='loss'] .line").first
    curve.wait_for()
    page.wait_for_function(
        "before => document.querySelector(\".gpuml-panel svg[aria-label='loss'] .line\")?.getAttribute('d') != before",
        arg=curve.get_attribute("d"),
    )
    page.get_by_text(re.compile(r"\bleft\b")).first.wait_for()
    picture(page, "panel-training.png")
    theme(page, "JupyterLab Dark")
    picture(page, "panel-training-dark.png")
    theme(page, "JupyterLab Light")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator(".gpuml-panel").get_by_text("stopped at update").first.wait_for()
    picture(page, "panel-stopped.png")
    page.get_by_role("button", name="Resume", exact=True).click()
    page.locator(".gpuml-panel [role=status]", has_text="examples/s").wait_for()
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_timeout(2000)
    open_notebook(page, server, path)
    run_all(page)
    page.locator(".gpuml-panel [role=status]", has_text="examples/s").wait_for()  # still at work
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator(".gpuml-panel").get_by_text("stopped at update").first.wait_for()
    assert len(runs_in(lab_project / "mlflow.db")) == 1
    section(page, "train")
    field(page, "epochs").fill("1")
    page.get_by_role("button", name="Train", exact=True).click()
    page.locator(".gpuml-panel svg[aria-label='confusion matrix']").wait_for()
    picture(page, "panel-done.png")
    saved_without_a_kernel(page, server, path)
    assert not [url for url in asked if not re.match(r"(http://127\.0\.0\.1|ws://127\.0\.0\.1|data:|blob:)", url)]


def saved_without_a_kernel(page, server, path):
    "The notebook, saved and opened again where its kernel is gone, shows what was there"
    from playwright.sync_api import expect

    expect(page.get_by_role("button", name="Train", exact=True)).to_be_enabled()

    def saved():
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(500)
        return "confusion matrix" in path.read_text()

    until(saved)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    open_notebook(page, server, path)
    page.locator(".gpuml-static svg[aria-label='confusion matrix']").wait_for()
    assert (
        page.get_by_text("Error displaying widget").count() == 0
        or not page.get_by_text("Error displaying").is_visible()
    )
    picture(page, "panel-saved.png")


def test_panel_in_a_narrow_window(page, server, lab_project):
    "All tabs and a dozen fields are seen, and a file is chosen by mouse"
    from playwright.sync_api import expect

    (lab_project / "data" / "new.csv").write_text("text,label\nlate,delivery\n")
    page.set_viewport_size({"width": 480, "height": 1000})
    open_panel(page, server, lab_project)
    page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    expect(page.get_by_role("tab", name="Compare")).to_be_visible()
    clipped = "tabs => tabs.filter(tab => tab.scrollWidth > tab.clientWidth + 1).length"
    assert page.locator(".gpuml-panel [role=tab] .lm-TabBar-tabLabel").evaluate_all(clipped) == 0
    box = page.locator(".gpuml-fields:visible").bounding_box()
    fields = page.locator(".gpuml-fields:visible .gpuml-field").all()
    assert sum(one.bounding_box()["y"] < box["y"] + box["height"] for one in fields) >= 12
    lists = page.locator(".gpuml-choice select")
    lists.first.select_option("data/new.csv")
    expect(field(page, "train")).to_have_value("data/new.csv")
    picture(page, "panel-narrow.png")
    section(page, "train")
    page.locator(".gpuml-choice:visible", has_text="best_metric").locator("select").select_option("accuracy")
    expect(field(page, "best_metric")).to_have_value("accuracy")
    page.get_by_role("tab", name="Production").click()
    after = page.get_by_label("starts after")
    expect(after).to_be_visible()
    edge = "part => part.getBoundingClientRect().right"
    assert after.evaluate(edge) <= page.locator(".gpuml-panel").evaluate(edge) - 8


def test_panel_trains_a_sweep(page, server, lab_project):
    "Where fields have several values: as many runs as there are combinations, and the table at their end"
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 700, "height": 1000})
    open_panel(page, server, lab_project)
    page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    section(page, "train")
    halving = page.get_by_label("leave out the worse half early")
    expect(halving).to_be_hidden()
    field(page, "epochs").fill("1")
    field(page, "learning_rate").fill("1e-4, 4e-4")
    field(page, "seed").fill("0,1")
    button = page.get_by_role("button", name="Train 4 runs", exact=True)
    expect(button).to_be_enabled()
    several = "train.epochs=1 train.learning_rate=1e-4,4e-4 train.seed=0,1"
    expect(line(page)).to_have_value(f"sweep = %gpu_train dev {several}")
    halving.check()
    expect(line(page)).to_have_value(f"sweep = %gpu_train dev {several} --halving")
    picture(page, "panel-sweep.png")
    halving.uncheck()
    button.click()
    page.locator(".gpuml-panel").get_by_text("over 2 seeds").wait_for()
    assert page.locator(".gpuml-panel .gpuml-runs-table tbody tr").count() == 4
    theme(page, "JupyterLab Dark")
    picture(page, "panel-sweep-done-dark.png")
    theme(page, "JupyterLab Light")
    picture(page, "panel-sweep-done.png")


DARK = "--vscode-editor-foreground: #ccc; --vscode-editor-background: #1e1e1e; background: #1e1e1e"


@pytest.mark.parametrize("style", [DARK, "background: #111; color: #eee"])
def test_a_saved_panel_is_readable_without_jupyters_colours(page, project, style):
    from gpuml.ui.panel import panel

    opened = panel()
    page.set_content(f"<body class='vscode-dark' style='{style}'>{opened._repr_html_()}")
    opened.close()
    colours = "all => all.filter(one => one.innerText).map(one => getComputedStyle(one).color.match(/[0-9.]+/g).slice(0, 3).map(Number))"
    for channels in page.locator(".gpuml-static :is(div, td, th, pre)").evaluate_all(colours):
        scale = 255 if max(channels) <= 1 else 1  # of color(srgb …)
        assert min(channels) * scale > 110, channels
    widget = "document.body.insertAdjacentHTML('beforeend', '<div class=gpuml-panel>live</div>')"
    page.evaluate(widget)
    assert not page.locator(".gpuml-static").is_visible()  # one of both is seen


LONG = "a-job-of-last-winter-with-a-name-as-long-as-allowed"


def test_panel_submits_and_follows_jobs(page, server, lab_project):
    (lab_project / "config" / "prod.yaml").write_text((lab_project / "config" / "dev.yaml").read_text())
    (lab_project / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "train.ipynb", lab_project / "nbs")
    words = ["submit", "prod", "train.epochs=3", f"--name={LONG}", "--local", "--wait"]
    earlier = subprocess.Popen([forked.python(), "-m", "gpuml", *words], cwd=lab_project, stdout=subprocess.PIPE)
    path = lab_project / "panel.ipynb"
    cells = json.loads((ROOT / "nbs" / "train.ipynb").read_text())
    seen = lab_project / "its progress was seen"
    if not PICTURES:
        stands = f"{STANDING}\nstand_still_in(7, {str(seen)!r})"
        place = next(i for i, cell in enumerate(cells["cells"]) if "%gpu_train" in "".join(cell["source"]))
        cells["cells"].insert(place, json.loads(notebook(stands))["cells"][0])
    more = json.loads(notebook("%gpuml"))["cells"][0]
    cells["cells"].append({**more, "metadata": {"tags": ["dev-only"]}})
    path.write_text(json.dumps(cells))
    open_notebook(page, server, path)
    for code in ("%load_ext gpuml", "%gpuml"):
        page.evaluate(
            """code => {
                const {content} = window.jupyterapp.shell.currentWidget;
                content.activeCellIndex = content.widgets.findIndex(c => c.model.sharedModel.source == code);
                return window.jupyterapp.commands.execute('notebook:run-cell');
            }""",
            code,
        )
    page.locator(".gpuml-panel").wait_for()
    page.locator(".gpuml-panel").scroll_into_view_if_needed()
    page.get_by_role("tab", name="Production").click()
    page.get_by_label("on this machine").check()
    place = page.locator(".gpuml-panel .widget-checkbox:visible", has_text="on this machine")
    assert abs(middle(place.locator("input")) - middle(place.locator("span"))) < 1.5
    section(page, "train")
    field(page, "epochs").fill("40" if PICTURES else "100")
    page.get_by_label("name", exact=True).fill("spring")
    page.get_by_role("button", name="Check", exact=True).click()
    page.locator(".gpuml-checks").wait_for()
    page.get_by_text("process", exact=True).click()
    picture(page, "panel-production.png")
    theme(page, "JupyterLab Dark")
    picture(page, "panel-production-dark.png")
    select = Image.open(BytesIO(page.locator(".gpuml-panel select:visible").first.screenshot())).convert("L")
    darkest, brightest = select.crop((select.width - 20, 6, select.width - 4, select.height - 6)).getextrema()
    assert brightest - darkest > 60  # the arrow is seen
    submit(page, "spring")
    name = page.locator(".gpuml-list button", has_text="spring")
    name.wait_for()
    page.locator(".gpuml-jobs tr", has_text="spring").locator("progress").wait_for()
    seen.touch()
    name.focus()
    page.keyboard.press("Enter")
    page.locator(".gpuml-log", has_text="spring").wait_for()
    picture(page, "panel-jobs-dark.png")
    theme(page, "JupyterLab Light")
    page.locator(".gpuml-list button", has_text=LONG).wait_for()
    buttons, lines = tops(page, ".gpuml-list button", ".gpuml-jobs tbody tr")
    assert len(buttons) == len(lines) == 2 and max(abs(a - b) for a, b in zip(buttons, lines)) < 2
    picture(page, "panel-jobs.png")
    see_notebook(page, "spring")
    picture(page, "panel-notebook.png")
    assert earlier.wait(600) == 0
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("runs").select_option(index=[0, 1])
    page.locator(".gpuml-panel svg[aria-label='training loss']").wait_for()
    keys = page.locator("table[aria-label='what differs between the runs'] tbody th:first-child")
    assert keys.first.evaluate("key => getComputedStyle(key.nextSibling).textAlign") == "right"
    picture(page, "panel-compare.png")
    page.set_viewport_size({"width": 720, "height": 1000})
    picture(page, "panel-compare-narrow.png")
    key_lines = "keys => keys.map(key => { const text = document.createRange(); text.selectNodeContents(key); return text.getClientRects().length })"
    assert set(keys.evaluate_all(key_lines)) == {1}
    assert "Traceback" not in page.locator(".gpuml-panel").inner_text()


def test_what_is_not_saved_is_not_submitted(page, server, lab_project):
    "An edit in another cell that ran and is not saved; the same after Rename, where the kernel has the old name"
    path = lab_project / "n.ipynb"
    path.write_text(notebook("%load_ext gpuml", "rate = 1", "%submit_prod dev --local --dry-run"))
    open_notebook(page, server, path)
    edit_and_run = """async ([first, text]) => {
        const {content} = window.jupyterapp.shell.currentWidget;
        if (text) content.widgets[1].model.sharedModel.setSource(text);
        for (let index = first; index < 3; index++) {
            content.activeCellIndex = index;
            await window.jupyterapp.commands.execute('notebook:run-cell');
        }
        return content.widgets[2].node.querySelector('.jp-OutputArea').innerText;
    }"""
    assert "✓ saved" in page.evaluate(edit_and_run, [0, ""])
    said = page.evaluate(edit_and_run, [1, "rate = 2"])
    assert "✗ saved: n.ipynb is not saved: it lacks what ran here as `rate = 2` ([4], cell 2)" in said
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    assert "✓ saved" in page.evaluate(edit_and_run, [2, ""])
    page.evaluate("() => window.jupyterapp.shell.currentWidget.context.rename('m.ipynb')")
    said = page.evaluate(edit_and_run, [1, "rate = 3"])
    assert "✗ saved: m.ipynb is not saved: it lacks what ran here as `rate = 3`" in said
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    assert "✓ saved" in page.evaluate(edit_and_run, [2, ""])
    assert not path.exists() and "rate = 3" in (lab_project / "m.ipynb").read_text()
