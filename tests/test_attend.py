"A job that a cell waits for, in a real kernel: it shows how far it is, the stop button ends it, and its result is the cell's"

import json
import os

import pytest
from jupyter_client.manager import KernelManager

from gpuml.base.errors import ClusterError, ConfigError, GpumlError, Preempted
from gpuml.base.loading import load
from gpuml.base.person import person_mark
from gpuml.cluster import jobs as c
from gpuml.jobs.gpu_cell import pack_values
from gpuml.jobs.handle import Job, State
from gpuml.training.attempts import owner
from gpuml.ui.attend import attend
from tests import forked
from tests.conftest import ENDLESS
from tests.standing import STANDING
from tests.waiting import until

PARAMETERS = {"cell_type": "code", "source": "config = 'dev'", "metadata": {"tags": ["parameters"]}}


def write(path, *sources):
    "A notebook of these cells behind the one with the parameters"
    cells = [PARAMETERS, *({"cell_type": "code", "source": source, "metadata": {}} for source in sources)]
    rest = {"execution_count": None, "outputs": []}
    tree = {"cells": [cell | rest for cell in cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(tree))


class Kernel:
    "A person's kernel in a project: it runs cells of n.ipynb, which is saved with them before"

    def __init__(self, folder):
        self.notebook = folder / "n.ipynb"
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env=_environment(self.notebook))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=600)
        self.sources = ["%load_ext gpuml"]
        self.run(f"import sys; sys.executable = {forked.python()!r}", silent=True)
        self.run(self.sources[0])

    def start(self, source, silent=False):
        "Send a cell that was saved before; its request"
        if not silent:
            self.sources = [*dict.fromkeys([*self.sources, source])]
            write(self.notebook, *self.sources)
        return self.client.execute(source, silent=silent, store_history=not silent)

    def result(self, request, act=lambda outputs: None):
        "The outputs of a request, and its error in the words that a person sees; `act` sees the outputs as they come"
        outputs = []
        while True:
            message = self.client.get_iopub_msg(timeout=600)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            outputs.append((kind, content))
            act(outputs)
        errors = ["\n".join(content["traceback"]) for kind, content in outputs if kind == "error"]
        return outputs, "".join(errors)

    def run(self, source, silent=False):
        return self.result(self.start(source, silent))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def _environment(notebook):
    return {**os.environ, "JPY_SESSION_NAME": str(notebook)}


def words(outputs):
    "All that a cell has shown, as text"
    texts = [content["data"]["text/plain"] for kind, content in outputs if "data" in content]
    return "\n".join([*texts, *(content["text"] for kind, content in outputs if kind == "stream")])


def html(outputs):
    "The last that a cell has shown, as a page"
    return [content["data"]["text/html"] for kind, content in outputs if "data" in content][-1]


@pytest.fixture
def kernel(project, store):
    kernel = Kernel(project)
    yield kernel
    for job, state in c.jobs([load("dev")]):
        if not state.over:
            job.cancel()
    kernel.close()


def the_job():
    "The project's only job, and its state, once it is there"
    return until(lambda: list(c.jobs([load("dev")])))[0]


def test_a_training_in_a_job_comes_back_into_the_cell(kernel, project):
    "Progress in the cell while it trains; the run behind it; the kernel has loaded no torch"
    seen = project / "its progress was seen"
    kernel.sources.append(f"{STANDING}\nstand_still_in(5, {str(seen)!r})")  # in the job alone
    request = kernel.start("run = %gpu_train dev train.epochs=3 --local")
    outputs, error = kernel.result(request, lambda outputs: "update" in words(outputs) and seen.touch())
    assert not error and "✓" in words(outputs).splitlines()[-1], words(outputs)
    outputs, error = kernel.run("run.id, sorted(run.metrics)[:1]")
    assert not error and the_job()[0].run_id in words(outputs)
    assert words(kernel.run("import sys; 'torch' in sys.modules")[0]) == "False"


def test_the_stop_button_ends_the_job_and_the_same_cell_goes_on(kernel):
    line = f"run = %gpu_train dev {ENDLESS} --local"
    request = kernel.start(line)
    job, _ = the_job()
    until(lambda: job.status.headway and job.status.headway.update)
    kernel.manager.interrupt_kernel()
    _, error = kernel.result(request)
    updates = job.record()["updates"]
    assert (
        error == f"Preempted: {job.run_id}: stopped at update {updates} of 30000; running the cell again goes on there"
    )
    assert job.status.phase == "cancelled"
    request = kernel.start(line)
    until(lambda: job.status.headway and job.status.headway.update > updates)
    kernel.manager.interrupt_kernel()
    outputs, error = kernel.result(request)
    assert the_job()[0].run_id == job.run_id and job.record()["updates"] > updates
    assert "goes on where an earlier job of this name came to" in html(outputs) and "stopped at update" in error


def test_an_error_of_the_job_is_a_sentence(kernel):
    _, error = kernel.run("run = %gpu_train dev data.text=body --local")
    assert error.startswith("GpumlError: not submitted") and "body" in error and "Traceback" not in error


def test_the_body_of_a_cell_as_a_job(kernel, project):
    "Values and functions go in and come back, with what it showed; the kernel's variables stay; no data is needed"
    (project / "data" / "a.csv").unlink()
    kernel.run("k = 3\ndef scale(x): return k * x\ntexts = ['a', 'bb']", silent=True)
    body = "k = 5\nlengths = [scale(len(t)) for t in texts]\nprint('at work')\nimport os; os.environ['GPUML_RUN']"
    outputs, error = kernel.run(f"%%gpu --local --in texts,scale --out lengths\n{body}")
    assert not error, error
    job, state = the_job()
    assert state.phase == "succeeded" and {"at work", f"'{job.run_id}'"} <= set(words(outputs).split("\n"))
    assert words(kernel.run("lengths, k")[0]) == "([3, 6], 3)"
    assert not list(project.glob(".gpu-cell*"))


def test_an_error_of_the_body_is_its_traceback_and_a_sentence(kernel):
    outputs, error = kernel.run("%%gpu --local\nx = 1\nraise ValueError(f'too few: {x}')")
    assert error == f"GpumlError: {the_job()[0].run_id}: the cell raised ValueError: too few: 1"
    assert "ValueError" in words(outputs) and "gpu_cell.py" not in words(outputs)
    for cell, problem in {
        "%%gpu --local --in nothing\n1": "ConfigError: nothing: there is no such variable to hand over",
        "%%gpu --local\nx = (1": "ConfigError: line 1 below %%gpu: '(' was never closed",
        "%%gpu --local --out y\nx = 1": "y: there is no such variable to hand over",
        "%%gpu --lokal\n1": "ConfigError: unknown option --lokal; known: --in, --out",
    }.items():
        assert problem in kernel.run(cell)[1]


def test_the_stop_button_ends_the_body_too(kernel):
    request = kernel.start("%%gpu --local\nimport time\nprint('asleep')\ntime.sleep(600)")
    job, _ = the_job()
    until(lambda: "asleep" in job.logs())
    kernel.manager.interrupt_kernel()
    _, error = kernel.result(request)
    assert error == f"Preempted: {job.run_id}: stopped; nothing comes back" and job.status.phase == "cancelled"


def test_a_body_may_use_any_name_and_what_can_come_back_does(kernel):
    "A variable `config` of its own, and one value of three that can't leave the job; the job has a name for people"
    _, error = kernel.run(
        "%%gpu --local --out config,y,lock\nimport threading\nconfig, y = {'rate': 1}, 2\nlock = threading.Lock()"
    )
    job, state = the_job()
    assert "lock: a lock can't be handed over" in error and error.endswith("; config, y came back"), error
    assert words(kernel.run("config, y")[0]) == "({'rate': 1}, 2)"
    assert job.facts["notebook"] == "%%gpu in n.ipynb" and "%%gpu in n.ipynb" in repr(job)


def test_a_value_with_a_secret_stays(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "correct-horse-battery")
    with pytest.raises(ConfigError, match="client: the value of A_TOKEN stands in it"):
        pack_values(["client"], {"client": {"headers": ["Bearer correct-horse-battery"]}})


class Stubborn(Job):
    "A job whose watcher is interrupted, and again while it is cancelled, or whose server is away by then"

    def __init__(self, error, state=State("running")):
        super().__init__("dev-1", "outputs/dev-1", facts={"person": person_mark()})
        self.error, self.state = error, state
        self.is_interrupted = False

    @property
    def status(self):
        return self.state

    def states(self):
        if not self.is_interrupted:
            self.is_interrupted = True
            raise KeyboardInterrupt
        yield self.state

    def cancel(self):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ClusterError("the API server does not answer")])
def test_who_could_not_cancel_it_is_told_so(error):
    with pytest.raises(GpumlError, match="the job may go on; `gpuml cancel dev-1` ends it"):
        attend(Stubborn(error), lambda *_: None)


def test_a_job_of_somebody_else_with_the_same_user_name_goes_on():
    job = Stubborn(AssertionError("cancelled"))
    job.facts = {"owner": owner(), "person": "somebody else"}
    with pytest.raises(Preempted, match="dev-1: goes on without this cell; it is another person's"):
        attend(job, lambda *_: None)


def test_a_job_that_is_over_is_not_cancelled():
    "The interruption came with its last word"
    job = Stubborn(AssertionError("cancelled"), State("succeeded"))
    assert attend(job, lambda *_: None).phase == "succeeded"
