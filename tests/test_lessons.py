"The runner of the pages' lessons: what it stores, what it calls stale, and a page whose process dies"

import json
import subprocess
import sys

from tests.conftest import ROOT


def page(path, *codes, outputs=()):
    "A notebook with these cells, the first of which has shown something already"
    cell = {"cell_type": "code", "execution_count": 7, "metadata": {}}
    cells = [{**cell, "id": f"cell{i}", "source": code, "outputs": []} for i, code in enumerate(codes)]
    cells[0]["outputs"] = [*outputs]
    path.write_text(json.dumps({"cells": cells, "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def lessons(*arguments):
    command = [sys.executable, "tests/lessons.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def shown_by(path):
    "What each cell keeps as text"
    cells = json.loads(path.read_text())["cells"]
    texts = [[line for o in c["outputs"] for line in o.get("text") or o["data"]["text/plain"]] for c in cells]
    return ["".join(lines) for lines in texts]


def test_outputs_are_stored_and_compared(tmp_path):
    good = page(tmp_path / "good.ipynb", "print('a', end='')", "object", "#| hide\n1 + 1")
    clock = page(tmp_path / "clock.ipynb", "import time", "time.time()")
    run = lessons("--store", good, clock)
    assert run.returncode == 0, run.stdout
    assert shown_by(good) == ["a", "object", ""]  # what is hidden from readers is not stored
    stored = good.read_text()
    run = lessons(good, clock)
    assert run.returncode == 1 and "clock.ipynb: cell cell1" in run.stdout and "good.ipynb" not in run.stdout
    assert "shows something else than is stored: 1" in run.stdout
    assert good.read_text() == stored  # comparing writes nothing


def test_a_page_whose_process_dies_is_named_and_the_others_go_on(tmp_path):
    good = page(tmp_path / "good.ipynb", "1 + 1")
    wrong = page(tmp_path / "wrong.ipynb", "assert 1 == 2, 'not equal'")
    killed = page(tmp_path / "killed.ipynb", "import os\nos.kill(os.getpid(), 9)")
    run = lessons(killed, wrong, good)
    assert run.returncode == 1 and "killed.ipynb: its process died (-9)" in run.stdout
    assert "wrong.ipynb" in run.stdout and "not equal" in run.stdout
    assert "3 pages; with a lesson that fails, or shows something else than is stored: 2" in run.stdout


def test_storing_refuses_what_is_only_here_and_now(tmp_path):
    run = lessons("--store", page(tmp_path / "here.ipynb", "import tempfile\ntempfile.mkdtemp() + '/run'"))
    assert run.returncode == 1 and "cell cell0 shows what is only here and now" in run.stdout


def test_what_belongs_to_one_kernel_is_taken_out(tmp_path):
    warning = {"output_type": "stream", "name": "stderr", "text": ["a warning\n"]}
    data = {"text/plain": ["Button()"], "application/vnd.jupyter.widget-view+json": {"model_id": "1f"}}
    button = {"output_type": "execute_result", "execution_count": 7, "metadata": {"took": 3}, "data": data}
    path = page(tmp_path / "page.ipynb", "button", outputs=[warning, button])
    assert lessons("--tidy", path).returncode == 0
    tidied = json.loads(path.read_text())
    (output,) = tidied["cells"][0]["outputs"]
    assert output == {**button, "execution_count": None, "metadata": {}, "data": {"text/plain": ["Button()"]}}
    assert tidied["metadata"] == {} and tidied["cells"][0]["execution_count"] is None
