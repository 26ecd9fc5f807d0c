"""`gpuml run`: real kernels, real papermill, real training; signals, kills, and what is left behind.

Signals go to the runner, as from Kubernetes; what the next attempt finds is what the one before left.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from gpuml.base.errors import ConfigError, Exit, NotebookError, Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.jobs.bundle import pack, put
from gpuml.jobs.contract import problems
from gpuml.jobs.runner import execute
from gpuml.training import attempts
from gpuml.training.fit import fit
from gpuml.training.own_job import OwnJob
from gpuml.training.record import read_record
from gpuml.training.results import Run
from tests import forked
from tests.conftest import ROOT, gpuml, runs_in
from tests.faults import SLOW_DOWN, Fault, Proxy
from tests.standing import STANDING, hold_imports
from tests.test_interrupt import (
    OVERRIDES,
    result,
    stop_at,
    undisturbed,  # noqa: F401
)
from tests.test_stored import kept, move  # noqa: F401
from tests.waiting import until

PARAMETERS = ('config = "dev"', "parameters")


def write_notebook(path, *cells):
    "A notebook; a cell is its source, or that and tags"
    cells = [(cell,) if isinstance(cell, str) else cell for cell in cells]
    made = [
        {"cell_type": "code", "id": f"c{i}", "source": source, "metadata": {"tags": tags}, "execution_count": None, "outputs": []}
        for i, (source, *tags) in enumerate(cells)
    ]  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def executed(place):
    "States and outputs of an executed notebook's cells, without the note on top, and that note"
    note, *cells = json.loads((Path(place) / "notebook.ipynb").read_text())["cells"]
    states = [cell["metadata"]["papermill"]["status"] for cell in cells]
    return states, [json.dumps(cell.get("outputs", [])) for cell in cells], note["source"]


def outcome(place):
    newest = max((Path(place) / "attempts").glob("*.json"), key=lambda file: int(file.stem))
    return json.loads(newest.read_text())


@pytest.fixture
def here(tmp_path):
    "Execute cells in this process, with a kernel; the outcome"

    def run(*cells, **more):
        file = write_notebook(tmp_path / "n" / "n.ipynb", PARAMETERS, *cells)
        values = {"values": {"config": "prod"}, "run": "job-1", "place": str(tmp_path / "job-1"), **more}
        return execute(file, **values)

    return run


# ---- the contract


CONTRACT = {
    "fine": ([PARAMETERS, "run = %gpu_train train.epochs=2"], []),
    "in a cell magic": ([PARAMETERS, "%%time\nrun = %gpu_train"], []),
    "not tagged": (['config = "dev"', "%gpu_train"], ["no cell is tagged `parameters`"]),
    "two tagged": ([PARAMETERS, PARAMETERS, "%gpu_train"], ["cells 1 and 2: are all tagged"]),
    "not run in a job": ([("config = 'dev'", "parameters", "dev-only"), "%gpu_train"], ["cell 1: is tagged `parameters`, and a job"]),
    "sets no config": ([("x = 1", "parameters"), "%gpu_train"], ["cell 1: is tagged `parameters` and does not set config"]),
    "config is a number": ([("config = 1", "parameters"), "%gpu_train"], ["cell 1: is tagged `parameters` and does not set config"]),
    "no training": ([PARAMETERS, "print(1)"], ["no cell has a `%gpu_train`"]),
    "training at the desk only": ([PARAMETERS, ("%gpu_train", "dev-only")], ["no cell has a `%gpu_train`"]),
    "hard-coded": ([PARAMETERS, "x = 1\nrun = %gpu_train dev"], ["cell 2, line 2: `%gpu_train dev` always trains the config 'dev'"]),
    "hard-coded in a branch": ([PARAMETERS, "if 1:\n    %gpu_train dev"], ["cell 2, line 2: `%gpu_train dev` always trains"]),
    "goes on with a run": ([PARAMETERS, "%gpu_train --resume dev-20260101-000000-ab12"], ["goes on with the run dev-2026"]),
    "unknown option": ([PARAMETERS, "%gpu_train --fast"], ["cell 2, line 1: %gpu_train --fast: unknown option --fast"]),
    "not Python": ([PARAMETERS, "%gpu_train", "x = (\n"], ["cell 3, line 1: '(' was never closed; it would fail"]),
    "an executed one": ([PARAMETERS, ("config = 'prod'", "injected-parameters"), "%gpu_train"], ["cell 2: was put in by papermill"]),
    "all at once": ([("x = 1", "parameters"), "%gpu_train dev", "f("], ["cell 1:", "cell 2, line 1:", "cell 3, line 1:"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name, tmp_path):
    cells, wanted = CONTRACT[name]
    found = problems(write_notebook(tmp_path / "n.ipynb", *cells))
    assert len(found) == len(wanted) and all(w in f for w, f in zip(wanted, found, strict=True)), found


def test_shipped_notebook_keeps_the_contract():
    assert problems(ROOT / "nbs" / "train.ipynb") == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"cells": 5}', '{"worksheets": []}', "\x00"])
def test_not_a_notebook(text, tmp_path):
    (tmp_path / "n.ipynb").write_text(text)
    with pytest.raises(NotebookError, match="n.ipynb: not a notebook of format 4") as e:
        problems(tmp_path / "n.ipynb")
    assert e.value.exit_code == Exit.BAD_CONFIG


# ---- parameters are values, never code


def probes(canary):
    "A hundred texts that do harm where they are taken for code"
    act = f"open({str(canary)!r}, 'w').close()"
    shell = f"touch {canary}"
    plain = [
        act,
        f"!{shell}",
        f"%system {shell}",
        f"%%bash\n{shell}",
        f"__import__('os').system({shell!r})",
        "{" + act + "}",
    ]
    around = [
        "{}",
        '"; {} #',
        "'; {} #",
        '"\n{}\n"',
        '\\"; {} #',
        "\\'; {} #",
        '"""\n{}\n"""',
        "'''\n{}\n'''",
        "\r\n{}\r\n",
        "\u2028{}\u2028",
    ]
    around += [
        "\x00{}",
        "\\\n{}",
        "x = 1; {}",
        "x={}",
        "$({})",
        "`{}`",
        "{{{{{}}}}}",
        "\x0c{}",
        "#\n{}",
        "\\N{{BULLET}}{}",
    ]
    return [a.format(p) for p in plain for a in around][:100]  # fmt: skip


def test_names_are_refused(here, tmp_path):
    names = [
        *probes(tmp_path / "canary"),
        "other",
        "",
        " config",
        "config ",
        "config\n",
        "ｃonfig",
        "__class__",
        "config:str",
    ]
    for name in names:
        with pytest.raises(NotebookError, match="is not set in the cell tagged"):
            here(values={name: "x"})

    class Sly(str):
        def __format__(self, spec):
            return probes(tmp_path / "canary")[0]

    for values in ({Sly("config"): "x"}, {5: "x"}, {None: "x"}):
        with pytest.raises(NotebookError):
            here(values=values)
    for value in ([1], {}, (1,), Path("x"), float("nan"), float("inf"), 2**70, Sly("x"), b"x", "\ud800", object()):
        with pytest.raises(NotebookError, match="is not text, a finite number, true, false or null"):
            here(values={"config": value})
    assert not (tmp_path / "job-1").exists() and not (tmp_path / "canary").exists()


def test_values_arrive_as_they_are(tmp_path):
    values = {f"p{i}": text for i, text in enumerate([*probes(tmp_path / "canary"), 5, -1.5e-7, True, None, 2**60, ""])}
    cells = (
        ("\n".join(f"{name} = 0" for name in values), "parameters"),
        f"import json; json.dump([{','.join(values)}], open('v.json', 'w'))",
    )
    file = write_notebook(tmp_path / "n" / "n.ipynb", *cells)
    assert execute(file, values, "job-1", str(tmp_path / "job-1")).exit_code == 0
    assert json.loads((tmp_path / "n" / "v.json").read_text()) == list(values.values())
    assert not (tmp_path / "canary").exists()  # fmt: skip


# ---- how it can end


RAISED = {
    "code": ("1/0", 1, "cell 3 raised ZeroDivisionError: division by zero"),
    "bad data": ("from gpuml.base.errors import DataError\nraise DataError('a.csv:3: a NUL byte\\nb.csv:1: too')", 65, "a.csv:3: a NUL byte; b.csv:1: too"),
    "of the instance": ("from gpuml.base.errors import DataError\nraise DataError('not there', exit_code=66)", 66, "not there"),
    "S3 is away": ("from gpuml.base.errors import OutputError\nraise OutputError('S3 did not answer', exit_code=75)", 75, "S3 did not answer"),
    "interrupted by nobody": ("raise KeyboardInterrupt", 1, "cell 3 raised KeyboardInterrupt"),
    "exit": ("import sys\nsys.exit(0)", 1, "cell 3 raised SystemExit: 0"),
    "not Python": ("x = (", 1, "cell 3 raised SyntaxError: "),
    "kernel killed": ("import os\nos.kill(os.getpid(), 9)", 70, "the kernel died in cell 3 (killed by signal 9; out of memory?)"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", 70, "the kernel died in cell 3 (killed by signal 11; a segmentation fault)"),
    "kernel exits": ("import os\nos._exit(0)", 70, "the kernel died in cell 3 (exit code 0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_a_cell_does_not_end_well(name, here, tmp_path, monkeypatch):
    cell, code, reason = RAISED[name]
    monkeypatch.setenv("GPUML_TERMINATION_LOG", str(tmp_path / "termination"))
    ended = here("print('so far', config)", cell, "print('never')")
    assert (ended.exit_code, ended.cell) == (code, 3) and ended.reason.startswith(reason), ended
    states, outputs, note = executed(tmp_path / "job-1")
    assert states == ["completed", "completed", "completed", "failed", "pending"]
    assert "so far prod" in outputs[2] and outputs[4] == "[]" and f"{ended.reason} (exit code {code})" in note
    assert outcome(tmp_path / "job-1")["reason"] == ended.reason == (tmp_path / "termination").read_text()


def test_all_cells_done(here, tmp_path, capfd):
    ended = here(
        "print(config)", ("print('at the desk')", "dev-only"), "import os\nos.environ['GPUML_RUN'], os.getcwd()"
    )
    assert (ended.exit_code, ended.cell, ended.attempt) == (0, None, 1)
    states, outputs, note = executed(tmp_path / "job-1")
    assert states == ["completed", "completed", "completed", "skipped", "completed"] and note.endswith(
        ": all cells are done"
    )
    assert "skipped in a job: dev-only" in outputs[3] and "'job-1'" in outputs[4] and str(tmp_path / "n") in outputs[4]
    said = capfd.readouterr().out
    assert "\nprod\n" in said and "at the desk" not in said
    assert here("1").attempt == 2
    logs = sorted(p.read_text() for p in (tmp_path / "job-1" / "logs").iterdir())
    assert len(logs) == 2 and said in logs


def test_files_that_can_not_be_written_cost_nothing(here, tmp_path):
    (tmp_path / "job-1" / "notebook.ipynb").mkdir(parents=True)
    ended = here("print('all the same')")
    assert ended.exit_code == 0 and outcome(tmp_path / "job-1")["exit_code"] == 0
    (log,) = (tmp_path / "job-1" / "logs").iterdir()
    assert "notebook.ipynb is not where it belongs" in log.read_text() and "Is a directory" in log.read_text()


SECRETS = {"MY_TOKEN": "tok-1234567890", "DB_PASSWORD": "pa<ss>&'\"word\\x", "AWS_ACCESS_KEY_ID": "AKIAXXXXYYYY", "PEM_SECRET": "-----BEGIN\nline-two-of-it\n"}  # fmt: skip


def test_secrets_are_not_written(here, tmp_path, capfd, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    show = """
    import json, os, sys, urllib.parse
    from IPython.display import HTML, display
    values = [os.environ[n] for n in ('MY_TOKEN', 'DB_PASSWORD', 'AWS_ACCESS_KEY_ID', 'PEM_SECRET')]
    for v in values:
        print(v, json.dumps(v), urllib.parse.quote(v)); print(v, file=sys.stderr)
        for half in (v[:5], v[5:]):
            print(half, end=''); sys.stdout.flush()
        print(); display(HTML(f'<b>{v}</b>'), {'text/plain': v, v: 'x'}, raw=False); display(v, display_id=True)
    os.system('echo $MY_TOKEN; echo $AWS_ACCESS_KEY_ID >&2')
    values
    """
    ended = here("\n".join(line[4:] for line in show.splitlines()), "raise ValueError(values[0] + values[1])")
    assert ended.exit_code == 1 and "[MY_TOKEN]" in ended.reason
    written = "".join(p.read_text() for p in (tmp_path / "job-1").rglob("*") if p.is_file()) + "".join(
        capfd.readouterr()
    )
    for value in ("tok-1234567890", "pa<ss>&", "pa%3Css", "pa&lt;ss", "AKIAXXXXYYYY", "line-two-of-it"):
        assert value not in written, value
    assert all(f"[{name}]" in written for name in SECRETS)


# ---- with training


TRAINING = f"""\
{STANDING}
if "UPDATE" in os.environ:
    stand_still_in(int(os.environ["UPDATE"]))

def pause(where):
    "Where the test asks for it, wait for a signal"
    if os.environ.get("PAUSE") == where:
        time.sleep(600)
    if os.environ.get("PAUSE") == "after " + where:
        get_ipython().events.register("post_run_cell", lambda result: os.kill(os.getppid(), signal.SIGTERM))
"""


@pytest.fixture
def job(project, store):
    "A project whose notebook trains, as an unpacked bundle"
    cells = [PARAMETERS, "%load_ext gpuml", TRAINING, "pause('early')", "run = %gpu_train train.epochs=4"]
    cells += ["pause('late')\nrun", "pause('last')\nprint(run.predict(['late parcel']).labels)"]
    write_notebook(project / "nbs" / "n.ipynb", *cells)
    about = {"format": 1, "notebook": "nbs/n.ipynb", "config": "dev", "root": ".", "path": [".", "nbs"]}
    (project / "bundle.json").write_text(json.dumps(about))
    return project


class Attempt:
    "`gpuml run` in a process of its own"

    def __init__(self, project, run="job-1", python=(), **environment):
        command = [*(python or [forked.python()]), "-m", "gpuml", "run", str(project), "--run", run]
        self.said, self.environment = "", {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )

    def until(self, pattern):
        "Read what it prints up to a line with the pattern"
        for line in self.process.stdout:
            self.said += line
            if re.search(pattern, line):
                return self
        raise AssertionError(self.said)

    def until_signals_are_caught(self):
        "The first hundredths of a second are Python's own"
        status = Path(f"/proc/{self.process.pid}/status")
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.01)

    @property
    def runner(self):
        "The runner's process: of a prefix, the child"
        me = psutil.Process(self.process.pid)
        return next((p for p in [me, *me.children(recursive=True)] if self.command(p)[:1] == [sys.executable]), me)

    @staticmethod
    def command(process):
        "Nothing of one that has just ended"
        with contextlib.suppress(psutil.Error):
            return process.cmdline()
        return []

    def stop(self, number=signal.SIGTERM):
        self.runner.send_signal(number)
        return self

    def end(self):
        "The exit code"
        self.said += self.process.communicate(timeout=600)[0]
        return self.process.returncode


def weights(project, run="job-1"):
    "All that an interruption must not change"
    return result(Run(project / "outputs" / run))


# In this order: each attempt goes on where the one before was stopped; last, what the record says then
MOMENTS = [
    ("kernel starts", {}, "job-1: n.ipynb on", signal.SIGTERM, "stopped by SIGTERM before", None),
    ("before training", {"PAUSE": "early"}, "cell 4:", signal.SIGINT, "stopped by SIGINT in cell 4", None),
    ("training", {"UPDATE": "1"}, "training, update 0", signal.SIGTERM, r"stopped at update 1 of 12, with a checkpoint", "KILLED"),
    ("evaluating", {"UPDATE": "3"}, "evaluating, update 3 ", signal.SIGTERM, r"stopped at update [34] of 12, with", "KILLED"),
    ("killed", {"UPDATE": "2"}, "training, update [34] ", signal.SIGKILL, "", "RUNNING"),
    ("between cells", {"PAUSE": "after late"}, "cell 6:", None, "stopped by SIGTERM before cell 7", "FINISHED"),
    ("last cell", {"PAUSE": "last"}, "cell 7:", signal.SIGTERM, "stopped by SIGTERM in cell 7", "FINISHED"),
]  # fmt: skip


def test_stopped_at_every_moment(job, store):
    "One run, stopped seven times; in the end it is the same as if nothing had happened"
    place, calm = job / "outputs" / "job-1", Attempt(job, "calm")
    assert calm.end() == 0, calm.said
    slow = job / "slow" / "profile_default" / "startup"  # what its kernel does before it answers
    slow.mkdir(parents=True)
    (slow / "wait.py").write_text("import time; time.sleep(600)")
    for name, environment, seen, number, reason, status in MOMENTS:
        if name == "kernel starts":
            environment = {"IPYTHONDIR": str(job / "slow")}
        attempt = Attempt(job, **environment).until(seen)
        if number:
            attempt.stop(number)
        code = attempt.end()
        assert "Traceback (most recent call last):" not in attempt.said, attempt.said
        states, _, note = executed(place)
        if name == "killed":
            assert (
                code == -9 and states[6] == "pending"
            )  # cell 5 too, where the notebook was not written since it began
            assert states[5] == "pending" or states[5] == "running" and "cell 5 of 7 was running at" in note
        else:
            assert code == Exit.INTERRUPTED and re.search(reason, outcome(place)["reason"]), (name, attempt.said)
            assert outcome(place)["reason"] in note and states[-1] in ("pending", "failed")
        record = read_record(place)
        assert (record and record.status) == status, name
        told = {r.info.status for r in runs_in(store) if r.info.run_name == "job-1"}
        assert told <= ({status} if status == "FINISHED" else {"RUNNING", "KILLED"}), name
        assert (place / "certificate.json").exists() == (status == "FINISHED")
    last = Attempt(job)
    assert last.end() == 0, last.said
    states, outputs, note = executed(place)
    assert set(states) == {"completed"} and f"attempt {len(MOMENTS) + 1} " in note
    assert outputs[-1] == executed(job / "outputs" / "calm")[1][-1] and re.search("delivery|billing", outputs[-1])
    assert weights(job) == weights(job, "calm")
    history = mlflow_steps(store, "job-1")
    assert history == mlflow_steps(store, "calm") == list(range(1, 13))


def mlflow_steps(store, name):
    "The updates that MLflow has"
    import mlflow

    (run,) = [r for r in runs_in(store) if r.info.run_name == name]
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    return [m.step for m in client.get_metric_history(run.info.run_id, "loss")]


# ---- signals


@pytest.fixture
def plain(tmp_path):
    "A bundle that does not train; its last cells are given"

    return partial(write_bundle, tmp_path)


def write_bundle(folder, *cells):
    "Write one that does not train; its folder"
    write_notebook(folder / "nbs" / "n.ipynb", PARAMETERS, *cells)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "dev.yaml").write_text("data:\n  train: data\noutput: outputs\n")
    about = {"format": 1, "notebook": "nbs/n.ipynb", "config": "dev", "root": ".", "path": ["."]}
    (folder / "bundle.json").write_text(json.dumps(about))
    return folder


PID_1 = ("unshare", "--pid", "--fork", "--mount-proc")
CAN_UNSHARE = subprocess.run([*PID_1, "true"], capture_output=True).returncode == 0
WAITING = """\
import time
print("pid", os.getpid() if (os := __import__("os")) else 0)
try:
    print("waiting", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("arrived", time.monotonic())
    raise
"""


@pytest.mark.parametrize("prefix", [(), PID_1], ids=["a process", "PID 1"])
def test_signal_reaches_the_cell_at_once(prefix, plain):
    if prefix and not CAN_UNSHARE:
        pytest.skip("no permission for a PID namespace of its own")
    attempt = Attempt(plain(WAITING, "print('never')"), python=[*prefix, sys.executable]).until("^waiting")
    sent = time.monotonic()
    assert attempt.stop().end() == 75
    delay = float(re.search(r"arrived (\S+)", attempt.said)[1]) - sent
    assert delay < 300, f"{delay:.3f} s"  # not at the end of the cell; on an idle machine it is 2 ms
    assert "never" not in attempt.said and "stopped by SIGTERM in cell 2" in attempt.said


@pytest.mark.parametrize("prefix", [(), PID_1], ids=["a process", "PID 1"])
def test_a_signal_in_the_first_second_ends_it(prefix, plain, tmp_path, monkeypatch):
    "While the command's own libraries load; as process 1 without a handler it would never hear of it"
    if prefix and not CAN_UNSHARE:
        pytest.skip("no permission for a PID namespace of its own")
    importing = hold_imports(tmp_path, monkeypatch, "pydantic_core", "gpuml run")
    attempt = Attempt(plain("print('never')"), python=[*prefix, sys.executable])
    importing.wait()
    assert attempt.stop().end() == Exit.INTERRUPTED, attempt.said
    assert attempt.said == "gpuml: stopped before anything was done\n"


SWALLOWED = """\
import time
for seconds in (600, 3):
    try:
        print("waiting", flush=True)
        time.sleep(seconds)
    except BaseException as e:
        print(type(e).__name__)
print("went on")
"""
FINALIZER = """\
import time
class Held:
    def __del__(self):
        print("waiting", flush=True)
        time.sleep(3)
Held()
time.sleep(600)
"""
FORK = """\
import os, time
os.register_at_fork(after_in_parent=lambda: (print("waiting", flush=True), time.sleep(3)))
child = os.fork() or os._exit(0)
os.waitpid(child, 0)
time.sleep(600)
"""
CELLS = {  # what the cell does when the job is to stop: exit code, what is printed, and what not
    "awaits": ("import asyncio\nprint('waiting', flush=True)\nawait asyncio.sleep(600)", 75, "in cell 2", "never"),
    "swallows it": (SWALLOWED, 75, "went on", "never"),
    "runs a process": ("print('waiting', flush=True)\nimport subprocess; subprocess.run(['sleep', '600'])", 75, "in cell 2", "never"),
    "is in a finalizer": (FINALIZER, 75, "in cell 2", "never"),
    "forks": (FORK, 75, "in cell 2", "never"),
    "shell": ("print('waiting', flush=True)\n!sleep 600", 75, "", "never"),
    "takes SIGTERM away": ("import signal; signal.signal(15, signal.SIG_DFL)\nprint('waiting', flush=True)\nimport time; time.sleep(600)", 75, "in cell 2", "never"),
    "makes another error of it": ("print('waiting', flush=True)\nimport time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    raise RuntimeError('oh')", 75, "in cell 2", "never"),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_cells_that_are_stopped(name, plain):
    cell, code, said, unsaid = CELLS[name]
    attempt = Attempt(plain(cell, f"print({unsaid!r})")).until("^waiting").stop()
    time.sleep(0.2)
    attempt.stop()  # a second signal changes nothing
    assert attempt.end() == code, attempt.said
    assert (
        said in attempt.said
        and f"\n{unsaid}\n" not in attempt.said
        and "Traceback (most recent call last):" not in attempt.said
    )
    assert executed(plain(cell).joinpath("outputs", "job-1"))[0][-1] == "pending"  # fmt: skip


def test_signal_in_the_last_cell_that_ends_well(plain):
    "All cells are done: that is success, whatever was asked meanwhile"
    cell = "import os, signal\nget_ipython().events.register('post_run_cell', lambda r: os.kill(os.getppid(), signal.SIGTERM))"
    attempt = Attempt(plain(cell))
    assert attempt.end() == 0 and "SIGTERM: the kernel is told" in attempt.said, attempt.said


def test_random_moments(plain):
    "From the first import to the last byte: 75 while cells are left, 0 when none is, and never anything else"
    project, rng = plain("import time\ntime.sleep(0.5)", "time.sleep(0.5)"), random.Random(0)
    for _ in range(6):
        attempt = Attempt(project, python=[sys.executable])
        attempt.until_signals_are_caught()
        time.sleep(rng.uniform(0.0, 4.0))
        code = attempt.stop().end()
        assert code in (0, 75) and "Traceback (most recent call last):" not in attempt.said, (code, attempt.said)
        assert code == Exit.INTERRUPTED or "all cells are done" in attempt.said


def test_runner_is_killed(plain):
    "The kernel goes with it, and what is left says what ran"
    project = plain(WAITING, "print('never')")
    attempt = Attempt(project).until("^waiting")
    kernel = psutil.Process(int(re.search(r"pid (\d+)", attempt.said)[1]))
    file = project / "outputs" / "job-1" / "notebook.ipynb"
    until(lambda: file.exists() and executed(file.parent)[0][2] == "running")  # it is written now and then
    assert attempt.stop(signal.SIGKILL).end() == -9
    kernel.wait(600)
    states, outputs, note = executed(project / "outputs" / "job-1")
    assert states == ["completed", "completed", "running", "pending"] and "cell 2 of 3 was running at" in note
    (killed,) = attempts.read(Storage(), str(project / "outputs" / "job-1"))
    assert killed.is_open and killed.exit_code is None
    assert Attempt(project).until("^waiting").stop().end() == 75
    killed, second = attempts.read(Storage(), str(project / "outputs" / "job-1"))
    assert (
        killed.reason.startswith("ended without a word")
        and killed.finished == killed.alive
        and second.exit_code == Exit.INTERRUPTED
    )


def test_usage(tmp_path, plain):
    project = plain("1")
    for arguments, code, said in [
        ([str(project), "--run", "../x"], 78, "--run: '../x' is not a run's id: lower-case letters"),
        ([str(tmp_path / "nbs"), "--run", "a"], 66, "not an unpacked bundle"),
        ([str(tmp_path / "none.tar.gz"), "--run", "a"], 66, "none.tar.gz: no such bundle"),
        ([str(project)], 2, "the following arguments are required: --run"),
    ]:
        done = gpuml(
            "run", *arguments, cwd=tmp_path, env={**os.environ, "GPUML_TERMINATION_LOG": str(tmp_path / "word")}
        )
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "none.tar.gz" in (tmp_path / "word").read_text()
    write_notebook(project / "nbs" / "n.ipynb", ("x = 1", "parameters"), "%gpu_train")
    done = gpuml("run", str(project), "--run", "a", cwd=tmp_path)
    assert (
        done.returncode == Exit.BAD_CONFIG
        and "parameter 'config' is not set in the cell tagged `parameters`" in done.stderr
    )
    assert not (project / "outputs").exists()


def test_packed(plain, tmp_path):
    "From the archive that is submitted: code of the project is found, and the folder it was unpacked to is gone"
    project = plain("from helper import answer\nimport os\nprint(answer, os.getcwd())")
    (project / "helper.py").write_text("answer = 41 + 1")
    file = project / "nbs" / "n.ipynb"
    packed = pack(load("dev", [f"output={tmp_path / 'outputs'}"], start=project), file)
    address = put(packed, str(tmp_path / "outputs"), Storage())
    done = gpuml("run", address, "--run", "job-1", cwd="/")
    folder = re.search(r"^42 (\S+)$", done.stdout, re.MULTILINE)[1]
    assert done.returncode == 0 and "gpuml-bundle-" in folder and not Path(folder).exists()
    assert executed(tmp_path / "outputs" / "job-1")[0][-1] == "completed"


# ---- S3


def test_everything_is_on_s3(here, s3, tmp_path):
    place = s3.url("runs/job-1")
    for attempt, (cell, code) in enumerate([("1/0", 1), ("1", 0)], 1):
        ended = here(cell, place=place)
        assert (ended.exit_code, ended.attempt) == (code, attempt)
        for name in ("notebook.ipynb", f"attempts/{attempt}.json"):
            Storage().get(f"{place}/{name}", tmp_path / "copy" / name)
        states, _, note = executed(tmp_path / "copy")
        assert states[-1] == ("completed" if code == 0 else "failed") and f"attempt {attempt} " in note
        assert outcome(tmp_path / "copy")["attempt"] == attempt
    logs = [Storage().read(f).decode() for f in Storage().find(f"{place}/logs/")]
    assert len(logs) == 2 and "ZeroDivisionError" in logs[0] and logs[1].endswith("job-1: all cells are done\n")


def test_an_attempt_s_time_ends_before_it_is_written_down(here, s3):
    "Its parts add up to the time from its beginning to its end, to the second that is written, however slow storage is"
    slow = Fault("slow", seconds=3)
    with Proxy(s3.endpoint, lambda request: slow if "attempts" in request.path else None) as proxy:
        here("1", place=s3.url("runs/job-1"), endpoint=proxy.endpoint)
    (attempt,) = attempts.read(Storage(), s3.url("runs/job-1"))
    lasted = attempts.moment(attempt.finished) - attempts.moment(attempt.started)
    assert abs(sum(attempt.spent.values()) - lasted) < 2000


def test_notebooks_that_s3_does_not_take_cost_nothing(here, s3, capfd):
    with Proxy(s3.endpoint, lambda request: SLOW_DOWN if ".ipynb" in request.path else None) as proxy:
        ended = here("print('all the same')", place=s3.url("runs/job-1"), endpoint=proxy.endpoint, patience=10.0)
    assert ended.exit_code == 0 and proxy.faults
    there = {f.url.rpartition("/")[2] for f in Storage().find(s3.url("runs/job-1/*"))}
    assert there == set() and len(Storage().find(s3.url("runs/job-1/attempts/"))) == 1
    assert len(Storage().find(s3.url("runs/job-1/logs/"))) == 1
    said = re.search(
        r"note: notebook.ipynb is not where it belongs, but in (\S+): \S+ \S+ did not answer", capfd.readouterr().out
    )
    assert executed(said[1])[0][-1] == "completed"
    shutil.rmtree(said[1])


# ---- `fit` in a job


def fit_in_job(config, process=None, **more):
    "Train as a job's attempt does, by default in another process than before"
    return fit(config, job=process or OwnJob("job-1"), **more)


def test_fit_goes_on_by_itself(store, undisturbed):  # noqa: F811
    with pytest.raises(Preempted, match=r"stopped at update \d of 9, with a checkpoint"):
        fit_in_job(load("dev", OVERRIDES), watch=stop_at(4))
    run = fit_in_job(load("dev", OVERRIDES))
    assert run.id == "job-1" and result(run) == undisturbed
    before = (run.folder / "tracking.json").read_bytes()
    process, phases = OwnJob("job-1"), []
    again = fit_in_job(load("dev", OVERRIDES), process, watch=lambda p: phases.append(p.phase))
    assert again.folder == run.folder and phases == ["done"] and (run.folder / "tracking.json").read_bytes() == before
    second = fit_in_job(load("dev", [*OVERRIDES, "train.epochs=1"]), process)
    assert second.id == "job-1-2" and result(run) == undisturbed


def test_fit_goes_on_in_another_folder(store, undisturbed):  # noqa: F811
    "A bundle is unpacked elsewhere each time; other data is refused all the same"
    with pytest.raises(Preempted):
        fit_in_job(load("dev", OVERRIDES), watch=stop_at(2))
    copy = shutil.copytree(store.parent / "data", store.parent / "elsewhere" / "data")
    (copy / "b.csv").write_text("text,label\nmore,billing\n")
    with pytest.raises(ConfigError, match="the data changed since the checkpoint"):
        fit_in_job(load("dev", [*OVERRIDES, f"data.train={copy}"]))
    (copy / "b.csv").unlink()
    done = fit_in_job(load("dev", [*OVERRIDES, f"data.train={copy}"]))
    assert json.loads(result(done))[:2] == json.loads(undisturbed)[:2]
    with pytest.raises(ConfigError, match="job-1 was started with another config(.|\n)*train.seed"):
        fit_in_job(load("dev", [*OVERRIDES, "train.seed=7"]))


def test_fit_that_fails_leaves_the_jobs_files(store):
    place = store.parent / "outputs" / "job-1"
    (place / "logs").mkdir(parents=True)
    with pytest.raises(ValueError):
        fit_in_job(
            load("dev", OVERRIDES), watch=lambda p: p.phase == "training" and (_ for _ in ()).throw(ValueError("boom"))
        )
    assert (place / "logs").exists()


def test_fit_goes_on_elsewhere(kept, store, undisturbed, monkeypatch):  # noqa: F811
    with pytest.raises(Preempted):
        fit_in_job(load("dev", OVERRIDES), watch=stop_at(4))
    move(monkeypatch)
    assert result(fit_in_job(load("dev", OVERRIDES))) == undisturbed
    move(monkeypatch)
    phases = []
    assert result(fit_in_job(load("dev", OVERRIDES), watch=lambda p: phases.append(p.phase))) == undisturbed
    assert phases == ["done"]
