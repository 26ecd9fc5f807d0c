"Runs as a list: read from small files, noted, deleted, never while somebody works on them; sorted by a click, without a script"

import shutil
import time
from datetime import UTC, datetime

import pytest

from gpuml.base.errors import GpumlError
from gpuml.base.files import write_file, write_json
from gpuml.base.line import parse_words
from gpuml.base.loading import load, load_all
from gpuml.base.storage import Storage
from gpuml.cluster.removal import plan_removal, remove_run
from gpuml.training.own_job import OwnJob
from gpuml.training.record import this_process
from gpuml.training.run_list import find_row, read_rows
from gpuml.training.run_note import write_note
from gpuml.training.start import begin
from gpuml.ui.run_table import project_runs, runs_html
from gpuml.ui.sweep_line import sweep_of
from tests.conftest import gpuml

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ABOUT = {"uri": "sqlite:///m", "page": "p", "experiment": "test", "artifacts": None, "tags": {}}


def put_run(root, name, rate="0.0001", score=None, **record):
    "A run's small files as training leaves them"
    folder = root / "outputs" / name
    values = ABOUT | {"run": name, "status": "KILLED", "params": {"train.learning_rate": rate}} | record
    write_json(folder / "tracking.json", values)
    write_file(folder / "config.yaml", (root / "config" / "dev.yaml").read_text())
    if score is not None:
        scores = {"macro_f1": score, "accuracy": score, "loss": 1 - score}
        write_json(
            folder / "certificate.json", {"run": name, "evaluation": scores, "finished": f"2026-01-0{score * 10:.0f}"}
        )
    return folder


def test_states_and_a_damaged_file(project):
    put_run(project, "dev-1", score=0.9, status="FINISHED")
    put_run(project, "dev-2", status="RUNNING", process=this_process())
    put_run(project, "dev-3", status="FAILED", reason="the loss is not finite")
    put_run(project, "dev-4", reason="stopped by SIGTERM")
    write_file(put_run(project, "dev-5") / "tracking.json", '{"run": "dev')
    states = {row.run: (row.state, row.reason) for row in read_rows(load_all()).rows}
    assert states == {
        "dev-1": ("finished", ""),
        "dev-2": ("running", ""),
        "dev-3": ("failed", "the loss is not finite"),
        "dev-4": ("interrupted", "stopped by SIGTERM"),
        "dev-5": ("interrupted", "ended without a word"),
    }
    assert find_row("latest", load_all()).run == "dev-1"


def test_large_files_are_left_alone(project):
    folder = put_run(project, "dev-1", score=0.9)
    (folder / "note.txt").write_bytes(b"x" * (4 * 2**20 + 1))
    listed = read_rows(load_all())
    assert listed.rows[0].note == "" and "note.txt is left out: it has 4,194,305 bytes" in listed.notes[0]


def test_what_is_at_work_is_not_deleted(project):
    folder = put_run(project, "dev-1", status="RUNNING", process=this_process())
    put_run(project, "dev-10")
    done = gpuml("delete", "dev-1", "dev-10", "--yes", cwd=project)
    assert done.returncode == 77 and "still being worked on" in done.stderr
    assert (folder / "tracking.json").exists() and (project / "outputs" / "dev-10").exists()
    done = gpuml("delete", "dev-10", cwd=project)  # nobody is there to be asked
    assert "nothing is deleted; --yes deletes it" in done.stdout and (project / "outputs" / "dev-10").exists()
    assert gpuml("delete", "dev-10", "--yes", cwd=project).returncode == 0
    assert [path.name for path in (project / "outputs").iterdir()] == ["dev-1"]


def test_begun_between_question_and_answer(project):
    put_run(project, "dev-1")
    removal = plan_removal("dev-1", load_all())
    put_run(project, "dev-1", status="RUNNING", process=this_process())
    with pytest.raises(GpumlError, match="dev-1 is not deleted: it is still being worked on"):
        remove_run(removal, load_all())


def test_on_s3(project, s3):
    "Listed, noted and deleted there; a neighbour whose name begins alike stays"
    configs = [load("dev", [f"output={s3.url('runs')}"])]
    for name in ("dev-1", "dev-10"):
        folder = put_run(project, name, score=0.9)
        for file in folder.iterdir():
            Storage().put(file, s3.url(f"runs/{name}/{file.name}"))
    assert write_note(find_row("dev-1", configs), "the one to keep") == ""
    assert [(row.run, row.note) for row in read_rows(configs).rows] == [("dev-10", ""), ("dev-1", "the one to keep")]
    removal = plan_removal("dev-1", configs)
    assert "4 files" in repr(removal)
    remove_run(removal, configs)
    assert [row.run for row in read_rows(configs).rows] == ["dev-10"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_click_sorts_without_a_script(project):
    "What has no value stays at the end in both orders"
    from playwright.sync_api import sync_playwright

    for number, (rate, score) in enumerate((("0.001", 0.7), ("2e-05", 0.9), ("0.0001", 0.8)), 1):
        put_run(project, f"dev-{number}", rate, score)
    put_run(project, "dev-4", reason="stopped", params={})
    rows = project_runs(load_all()).rows
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(java_script_enabled=False).new_page()
        page.set_default_timeout(600_000)
        page.set_content(runs_html(rows) + runs_html(rows))

        def order(table):
            cells = page.locator(".gpuml-runs-table").nth(table).locator("tbody td:first-child").all()
            return [cell.inner_text() for cell in sorted(cells, key=lambda cell: cell.bounding_box()["y"])]

        def click(name):
            head = page.locator(".gpuml-runs-table").first.locator("thead th", has_text=name)
            head.locator("label:visible").click()

        assert order(0) == ["dev-2", "dev-3", "dev-1", "dev-4"]
        click("learning_rate")
        assert order(0) == ["dev-2", "dev-3", "dev-1", "dev-4"]
        click("learning_rate")
        assert order(0) == ["dev-1", "dev-3", "dev-2", "dev-4"]
        click("loss")
        assert order(0) == ["dev-2", "dev-3", "dev-1", "dev-4"]
        click("macro-F1")
        click("macro-F1")
        assert order(0) == ["dev-1", "dev-3", "dev-2", "dev-4"]
        assert order(1) == ["dev-2", "dev-3", "dev-1", "dev-4"]  # a second list has its own order
        browser.close()


@pytest.mark.parametrize("zone", ["EAST-14", "WEST+12"])  # 14 hours before Greenwich, and 12 behind it
def test_ids_sort_by_time_wherever_runs_are_begun(zone, project, monkeypatch):
    "Also in the hour that a clock does twice in autumn: they have the time in UTC"
    times = [datetime.now(UTC)]
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            run = begin(load("dev"), None, OwnJob()).run_id
            sweep = sweep_of(parse_words(["dev", "train.seed=0,1"])).sweep.id
    finally:
        time.tzset()
    times.append(datetime.now(UTC))
    first, last = (f"{moment:%Y%m%d-%H%M%S}" for moment in times)
    for made in (run, sweep):
        assert first <= made.removeprefix("dev-")[: len(first)] <= last
