"""What ran in the kernel is in the file that is submitted, and that is the notebook's own file.

The server and the kernel are real ones; what a browser adds (it saves, and tells the server of another name) is done as it does it.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import requests

from gpuml.base.errors import NotebookError
from gpuml.jobs import cell_history, kernel_notebook, unsaved
from tests.conftest import free_port
from tests.waiting import until


def cell(source, cell_id="", *tags):
    made = {
        "cell_type": "code",
        "metadata": {"tags": list(tags)},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }
    return made | ({"id": cell_id} if cell_id else {})


def write(file, *cells):
    tree = {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    file.write_text(json.dumps(tree))
    os.utime(file, (time.time(),) * 2)  # the kernel's clock of files goes by hundredths of a second


SAVED = [cell("rate = 1\nprint(rate)", "a"), cell("%gpu_train dev", "b"), cell("look(1)", "c", "dev-only")]
# what ran: seconds after the file was saved, source, id of the cell; and what is said to be missing
RAN = {
    "as saved": ([(1, "rate = 1\nprint(rate)", "a")], []),
    "edited and run": ([(1, "rate = 2\nprint(rate)", "a")], ["`rate = 2` ([1], cell 1)"]),
    "edited and run, twice": ([(1, "rate = 2", "a"), (2, "rate = 3", "a")], ["`rate = 3` ([2], cell 1)"]),
    "two cells": ([(1, "rate = 2", "a"), (2, "%gpu_train dev train.epochs=9", "b")], ["`rate = 2` ([1], cell 1), `%gpu_train dev train.epochs=9` ([2], cell 2)"]),
    "a new cell": ([(1, "x = 1", "new")], ["`x = 1` ([1])"]),
    "no ids": ([(1, "x = 1", "")], ["`x = 1` ([1])"]),
    "run, then edited and saved": ([(-1, "rate = 2\nprint(rate)", "a")], []),
    "explored, then deleted and saved": ([(-1, "data.head()", "gone")], []),
    "a selected line": ([(1, "print(rate)", "a")], []),
    "spaces at line ends": ([(1, "rate = 1  \nprint(rate)\n", "a")], []),
    "in a cell that a job leaves out": ([(1, "look(2)", "c")], []),
    "help and looks": ([(1, "rate?", "x"), (1, "!nvidia-smi", "x"), (1, "%whos\n%timeit f()", "x"), (1, "# nothing", "x")], []),
    "magics that do something": ([(1, "%run prep.py", "x")], ["`%run prep.py` ([1])"]),
    "another cell's lines, not one after the other": ([(1, "rate = 1\nlook(1)", "a")], ["`rate = 1` ([1], cell 1)"]),
}  # fmt: skip


def test_what_is_missing(tmp_path):
    "Said if it ran after the file was saved and is not in it; what ran before was edited or deleted since, and that was saved"
    file, wrong = tmp_path / "n.ipynb", {}
    write(file, *SAVED)
    at = file.stat().st_mtime
    for case, (ran, missing) in RAN.items():
        history = cell_history.History(
            [cell_history.Executed(i, source, at + after, cell_id) for i, (after, source, cell_id) in enumerate(ran, 1)]
        )
        try:
            unsaved.check_history(file, history)
            text = []
        except NotebookError as e:
            text = [
                str(e)
                .removeprefix("n.ipynb is not saved: it lacks what ran here as ")
                .removesuffix("; save it and submit again, or name the notebook that runs here: --notebook FILE.ipynb")
            ]
        if text != missing:
            wrong[case] = text
    assert not wrong


def test_a_copy_beside_it(tmp_path, monkeypatch):
    "Where no server answers: another notebook has the cell that runs, is newer and differs; a mere copy is no matter"
    old, new = tmp_path / "n.ipynb", tmp_path / "m.ipynb"
    monkeypatch.setenv("JPY_SESSION_NAME", str(old))
    history = cell_history.History([cell_history.Executed(1, "rate = 1\nprint(rate)", time.time(), "a")])
    for file in (old, new):
        write(file, *SAVED)
    os.utime(old, (1e9, 1e9))
    assert kernel_notebook.own_notebook({}, history) == old
    write(new, *SAVED[:2], cell("look(2)", "c"))
    with pytest.raises(
        NotebookError, match="started for n.ipynb, and m.ipynb has the cell that runs as well, and is newer"
    ):
        kernel_notebook.own_notebook({}, history)
    os.utime(new, (9e8, 9e8))
    assert kernel_notebook.own_notebook({}, history) == old
    write(new, cell("look(2)", "other"))
    assert kernel_notebook.own_notebook({}, history) == old


def test_what_ran_before_it_was_loaded(tmp_path):
    "Then the time is not known: as early as the kernel's start, so that nothing is said that may be wrong"
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("early = 1", store_history=True)
    history = cell_history.begin(shell)
    try:
        loaded = time.time()
        shell.run_cell("late = 1", store_history=True)
        shell.run_cell("hidden = 1", silent=True)
        assert [(each.number, each.source) for each in history.cells] == [(1, "early = 1"), (2, "late = 1")]
        assert history.cells[0].at < loaded <= history.cells[1].at
        assert cell_history.begin(shell) is history and cell_history.history_of(shell.user_ns) is history
    finally:
        cell_history.end(shell)
    shell.run_cell("later = 1", store_history=True)
    assert len(history.cells) == 2 and cell_history.history_of(shell.user_ns) is None


def is_up(web, address):
    "Whether a server answers"
    try:
        return web.get(address).ok
    except requests.ConnectionError:
        return False


def is_ready(client):
    "Whether the kernel answers; a client that has not started it takes one that is slow for dead"
    with suppress(RuntimeError):
        client.wait_for_ready(timeout=600)
        return True
    return False


def port_in(runtime):
    "The port in the file that a server leaves, once that is whole"
    for file in runtime.glob("jpserver-*.json"):
        with suppress(ValueError):
            return json.loads(file.read_text())["port"]


@pytest.fixture
def lab(tmp_path):
    "A Jupyter server over a folder, its kernel for n.ipynb, and what a browser does"
    from jupyter_client import BlockingKernelClient

    work, runtime, port = tmp_path / "work", tmp_path / "runtime", free_port()
    work.mkdir()
    environment = {
        **os.environ,
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "c"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyter_server",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=t0ken",
        "--ServerApp.jpserver_extensions={}",
    ]
    server = subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    web = requests.Session()
    web.headers["Authorization"] = "token t0ken"
    port = until(lambda: port_in(runtime))  # another one where ours was taken
    address = f"http://127.0.0.1:{port}/api/sessions"
    until(lambda: is_up(web, address))
    write(work / "n.ipynb", cell("%load_ext gpuml", "l"), *SAVED)
    made = web.post(
        address, json={"path": "n.ipynb", "type": "notebook", "name": "n.ipynb", "kernel": {"name": "python3"}}
    ).json()
    client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{made['kernel']['id']}.json"))
    client.load_connection_file()
    client.start_channels()

    def run(source, cell_id="", show="''"):
        "Run a cell as JupyterLab does; returns the value of an expression"
        content = {
            "code": source,
            "silent": False,
            "store_history": True,
            "user_expressions": {"a": show},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        request = client.session.msg("execute_request", content, metadata={"cellId": cell_id})
        client.shell_channel.send(request)
        while (reply := client.get_shell_msg(timeout=600))["parent_header"].get("msg_id") != request["header"][
            "msg_id"
        ]:
            pass
        assert reply["content"]["status"] == "ok", reply["content"]
        return reply["content"]["user_expressions"]["a"]["data"]["text/plain"].strip("'\"")

    def rename(name):
        assert web.patch(f"{address}/{made['id']}", json={"path": name, "name": name}).ok

    try:
        until(lambda: is_ready(client))
        yield SimpleNamespace(work=work, run=run, rename=rename)
    finally:
        client.stop_channels()
        server.terminate()
        server.wait(600)


FINDINGS = "__import__('gpuml.cluster.checks', fromlist=['_']).check_kernel(__import__('gpuml.ui.here', fromlist=['_']).this_notebook(globals()))"
PATH = "__import__('gpuml.ui.here', fromlist=['_']).this_notebook(globals()).name"


def test_in_a_real_kernel(lab):
    "An unsaved edit in another cell; saved; edited again; saved under another name, and renamed"
    n, m, load = lab.work / "n.ipynb", lab.work / "m.ipynb", cell("%load_ext gpuml", "l")
    lab.run("%load_ext gpuml", "l")
    assert lab.run("%gpu_train?", "x", FINDINGS) == "✓ saved"
    unsaved = "✗ saved: n.ipynb is not saved: it lacks what ran here as `rate = 2` ([3], cell 2); save it and submit again, or name the notebook that runs here: --notebook FILE.ipynb"
    lab.run("rate = 2", "a")
    assert lab.run("rate?", "x", FINDINGS).replace("\\\\n", "\n") == unsaved
    write(n, load, cell("rate = 2", "a"), *SAVED[1:])
    assert lab.run("rate?", "x", FINDINGS) == "✓ saved"
    lab.run("rate = 3", "a")
    write(n, load, cell("rate = 4", "a"), *SAVED[1:])
    assert lab.run("rate?", "x", FINDINGS) == "✓ saved"
    write(m, load, cell("rate = 5", "a"), *SAVED[1:])
    lab.rename("m.ipynb")  # Save as: the old one stays
    assert (lab.run("rate = 5", "a", PATH), lab.run("rate?", "x", FINDINGS)) == ("m.ipynb", "✓ saved")
    lab.run("rate = 6", "a")
    assert "m.ipynb is not saved: it lacks what ran here as `rate = 6`" in lab.run("rate?", "x", FINDINGS)
    m.rename(lab.work / "k.ipynb")
    lab.rename("k.ipynb")
    assert lab.run("rate?", "x", PATH) == "k.ipynb"
