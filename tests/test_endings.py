"""What a cell shows does not decide how its job ends; and what it prints, however much, costs seconds and little memory.

Real kernels, in this process.
"""

import json

import pytest

from gpuml.base.errors import Exit
from gpuml.jobs.runner import execute
from tests.test_run import PARAMETERS, executed, write_notebook

TAGGED = "raises-exception"
AFTER = "print('went on')"
GOES_ON = {  # what stops nothing: notebook#4198, papermill#786
    "an error that is expected": ("1/0", TAGGED),
    "KeyboardInterrupt that is expected": ("raise KeyboardInterrupt", TAGGED),
    "SystemExit that is expected": ("import sys; sys.exit(0)", TAGGED),
    "a traceback that is shown": "try:\n    1/0\nexcept Exception:\n    get_ipython().showtraceback()",
    "%run of what fails": "open('x.py', 'w').write('1/0')\n%run x.py",
    "%run of what exits": "open('x.py', 'w').write('import sys; sys.exit(3)')\n%run x.py",
    "an error in a thread": "import threading\nt = threading.Thread(target=lambda: 1/0); t.start(); t.join()",
    "a command that fails": "!false",
    "a script whose failure is allowed": "%%script --no-raise-error false\nx",
    "words of an error": "print('Traceback (most recent call last):\\nDeadKernelError: Kernel died')",
}  # fmt: skip
STOPS = {
    "a script that fails": ("%%script false\nx", 1, "cell 2 raised CalledProcessError"),
    "sys.exit(0)": ("import sys; sys.exit(0)", 1, "cell 2 raised SystemExit: 0; cells after it were not run"),
    "exit()": ("exit()", 1, "cell 2 raised SystemExit: 0; cells after it were not run"),
    "sys.exit(3)": ("import sys; sys.exit(3)", 1, "cell 2 raised SystemExit: 3"),
    "the kernel ends in a cell of which errors are expected": (("import os; os._exit(0)", TAGGED), 70, "the kernel died in cell 2 (exit code 0)"),
    "an expected error of a cell that trains": (("1/0\n%gpu_train", TAGGED), 1, "cell 2 raised ZeroDivisionError"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path):
    "Execute cells in this process; the outcome"

    def run(*cells):
        file = write_notebook(tmp_path / "n" / "n.ipynb", PARAMETERS, *cells)
        return execute(file, {"config": "prod"}, "job-1", str(tmp_path / "job-1"))

    return run


def test_what_stops_nothing(here, tmp_path):
    "All of them in one kernel"
    ended = here(*GOES_ON.values(), AFTER)
    states, outputs, _ = executed(tmp_path / "job-1")
    assert (ended.exit_code, ended.reason) == (0, "all cells are done"), ended
    assert set(states) == {"completed"} and "went on" in outputs[-1] and "ZeroDivisionError" in outputs[2]


@pytest.mark.parametrize("name", STOPS)
def test_what_stops(name, here, tmp_path):
    cell, code, reason = STOPS[name]
    ended = here(cell, AFTER)
    assert (ended.exit_code, ended.cell) == (code, 2) and ended.reason.startswith(reason), ended
    assert executed(tmp_path / "job-1")[0][-2:] == ["failed", "pending"]


@pytest.mark.parametrize("cell", ["import sys; sys.exit(0)", "exit()"])
def test_a_notebook_may_end_itself_when_its_work_is_done(cell, here, tmp_path):
    assert here(cell).reason == "all cells are done"
    (tmp_path / "job-1" / "certificate.json").write_text("{}")
    ended = here(cell, AFTER)
    assert (ended.exit_code, ended.reason) == (0, "cell 2 ended the notebook, whose training is certified")
    assert executed(tmp_path / "job-1")[0][-2:] == ["completed", "pending"]
    assert here(cell, "%gpu_train").exit_code == 1


def test_a_stop_is_no_error_that_is_expected(here, tmp_path):
    cell = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    ended = here((cell, TAGGED))
    assert ended.exit_code == Exit.INTERRUPTED and "stopped by SIGTERM in cell 2" in ended.reason, ended


PRINTED = {  # what a cell prints, and how its text in the notebook ends: papermill#426
    "one long line": ("print('x' * 60_000_000)", "x\n"),
    "one long line in pieces": ("for i in range(100): print('y' * 100_000, end='', flush=True)", "yyy"),
    "carriage returns": ("print(*(f'\\r{i}' for i in range(200_000)), sep='', end='')", "199999"),
    "backspaces": ("print(*(f'{i:3}\\b\\b\\b' for i in range(30_000)), sep='', end='end')", "end"),
    "many lines": ("for i in range(50_000): print(i)", "49999\n"),
    "many small prints": ("for i in range(3_000): print(i, flush=True)", "2999\n"),
    "beside the cell": ("import os\nfor i in range(50): os.write(1, b'z' * 100_000)\nprint('done')", "done\n"),
}  # fmt: skip


def test_whatever_is_printed(here, tmp_path, capfd):
    "Nothing is lost at the end, memory and files stay small, and what is left out is said"
    ended = here(*(cell for cell, _ in PRINTED.values()), "raise ValueError('v' * 5_000_000)")
    assert ended.exit_code == 1 and len(ended.reason) < 2000
    _, *cells = json.loads((tmp_path / "job-1" / "notebook.ipynb").read_text())["cells"]
    for (name, (_, end)), cell in zip(PRINTED.items(), cells[2:-1], strict=True):
        assert len(cell["outputs"]) == 1 and cell["outputs"][0]["text"].endswith(end), name
    assert "[59,000,001 characters are left out here]" in cells[2]["outputs"][0]["text"]
    assert cells[4]["outputs"][0]["text"] == "199999"
    assert cells[7]["outputs"][0]["text"] == "".join(f"{i}\n" for i in range(3000))
    assert (tmp_path / "job-1" / "notebook.ipynb").stat().st_size < 12e6
    (log,) = (tmp_path / "job-1" / "logs").iterdir()
    lines = log.read_text().splitlines()
    assert max(map(len, lines)) < 11_000 and "49999" in lines and "characters are left out here]" in log.read_text()


def test_much_that_is_shown(here, tmp_path):
    show = "from IPython.display import HTML, display\n"
    cells = [show + "HTML('<b>x</b>' * 7_000_000)", show + "for i in range(3_000): display(i)"]
    assert here(*cells).exit_code == 0
    _, *cells = json.loads((tmp_path / "job-1" / "notebook.ipynb").read_text())["cells"]
    assert "[text/html of 56.0 MB is left out here]" in cells[2]["outputs"][0]["data"]["text/plain"]
    texts = [o.get("text") or o["data"]["text/plain"] for o in cells[3]["outputs"]]
    assert texts[0] == "0" and texts[-1] == "2999" and texts[500] == "[2,000 outputs of 0.0 MB are left out here]\n"
