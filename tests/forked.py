"""Processes that have imported everything already: a server imports it once, and forks a process for each command.

`python` gives an interpreter's stand-in: it takes `-u`, `-m MODULE` and `-c CODE` as Python does, hands its input, outputs and what else
it has open, its environment and folder to the server, passes signals on, and ends as the forked process ends; where it is killed, that
process is, too. Where it is stopped, or whoever started it is killed, nothing happens to that process.
A job's runner that was forked has a kernel that was forked from it. Where a test is about imports, it starts a real Python.
"""

import array
import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

from filelock import FileLock

ROOT = Path(__file__).parent.parent
PRELOADED = (
    "torch._dynamo",
    "transformers.models.bert.modeling_bert",
    "sklearn.metrics",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "s3fs",
    "papermill",
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "gpuml.jobs.runner",
    "gpuml.training.fit",
    "gpuml.training.loop",
    "gpuml.training.predict",
    "gpuml.training.mlflow_run",
    "gpuml.cluster.jobs",
    "gpuml.cluster.work",
    "gpuml.cluster.sending",
    "tests.forked_kernel",
)
MOST_OPEN = 64  # files and the like that a process is given
STAY = struct.pack("q", -1)  # from a process of tests, in place of a request
RUNNER = ["-m", "gpuml", "run"]  # what a process has a kernel in reserve for
STAND_IN = """#!{python} -ISE
import array, json, os, resource, select, signal, socket, struct, sys

def number_of(server):
    data = server.recv(8, socket.MSG_WAITALL)
    return struct.unpack("q", data)[0] if len(data) == 8 else os._exit(71)

given = [int(number) for number in os.listdir("/proc/self/fd")]
given = [0, 1, 2, *(number for number in given if number > 2 and os.path.exists(f"/proc/self/fd/{{number}}"))]
reading, writing = os.pipe()
os.set_blocking(writing, False)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
signal.set_wakeup_fd(writing)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
text = json.dumps([sys.argv, os.getcwd(), dict(os.environ), given, os.getppid()]).encode()
server.sendmsg([struct.pack("q", len(text))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))])
server.sendall(text)
for number in given:
    os.close(number)
pid = number_of(server)
while True:
    for ready in select.select([server, reading], [], [])[0]:
        if ready is not server:
            for number in os.read(reading, 99):
                os.kill(pid, number)
            continue
        status = number_of(server)
        if os.WIFEXITED(status):
            os._exit(os.WEXITSTATUS(status))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
"""


# ---- in the tests' process


@cache
def python() -> str:
    "The stand-in for Python; all workers of a session have one server, which ends when the last of them does"
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"gpuml-forked-{session}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "server").exists():
            _start(folder)
        KEPT_OPEN.append(socket.socket(socket.AF_UNIX))
        KEPT_OPEN[-1].connect(str(folder / "server"))
        KEPT_OPEN[-1].sendall(STAY)
    return str(folder / "python")


KEPT_OPEN: list[socket.socket] = []


def _start(folder: Path) -> None:
    "Start the server, and write the stand-in for it"
    address = folder / "server"
    with open(folder / "log", "wb") as log:
        command = [sys.executable, "-m", "tests.forked", str(address)]
        server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.format(python=os.path.realpath(sys.executable), address=str(address)))
    stand_in.chmod(0o700)
    while not address.exists():
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.01)


# ---- on the way


def send(connection: socket.socket, request: list, descriptors: list[int]) -> None:
    "Send a request, as the stand-in does"
    text = json.dumps(request).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    connection.sendmsg([struct.pack("q", len(text))], rights)
    connection.sendall(text)


def receive(connection: socket.socket) -> tuple[list, list[int]] | None:
    "A request, and the descriptors that came with it; nothing where the other side is gone"
    head, rights, *_ = connection.recvmsg(8, socket.CMSG_SPACE(4 * MOST_OPEN))
    if head in (b"", STAY):
        return None
    (size,) = struct.unpack("q", head)
    return json.loads(connection.recv(size, socket.MSG_WAITALL)), array.array("i", rights[0][2]).tolist()


# ---- in the server, and in what it has forked


class Server:
    "Forks a process for each request, and tells who asked how it ended"

    def __init__(self, address: str):
        self.address = address
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{address}.new")
        self.listener.listen(64)
        os.rename(f"{address}.new", address)  # who finds it can connect
        self.tests: set[socket.socket] = set()  # from processes of tests
        self.clients: dict[int, socket.socket] = {}  # by the process that was forked for them
        self.selector = selectors.DefaultSelector()
        self.ended, self.ends = os.pipe()
        os.set_blocking(self.ends, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.ends)
        for source in (self.listener, self.ended):
            self.selector.register(source, selectors.EVENT_READ)

    def serve(self) -> tuple[list, list[int]] | None:
        "Returns in a forked process, with its request; or with nothing, when the tests are over"
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if made := self.answer():
                        return made
                elif key.fileobj == self.ended:
                    os.read(self.ended, 4096)
                    self.reap()
                elif key.fileobj not in self.tests:
                    self.leave(key.data)
                else:
                    self.selector.unregister(key.fileobj)
                    self.tests.remove(key.fileobj)
                    if not self.tests:
                        return None

    def answer(self) -> tuple[list, list[int]] | None:
        "Fork a process for a request; returns with it in that process only"
        client, _ = self.listener.accept()
        try:
            made = receive(client)
        except (OSError, ValueError, IndexError):  # it was killed while it asked
            client.close()
            return None
        if made is None:
            self.tests.add(client)
            self.selector.register(client, selectors.EVENT_READ)
            return None
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            self.selector.close()
            for part in (client, self.listener, *self.tests, *self.clients.values()):
                part.close()
            os.close(self.ended)
            os.close(self.ends)
            return made
        for descriptor in made[1]:
            os.close(descriptor)
        self.clients[pid] = client
        self.selector.register(client, selectors.EVENT_READ, pid)
        with suppress(OSError):  # it was killed already: the selector says so next
            client.sendall(struct.pack("q", pid))
        return None

    def reap(self) -> None:
        "Say of each process that has ended how it did"
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if client := self.clients.pop(pid, None):
                self.selector.unregister(client)
                with suppress(OSError):  # it was killed in the same moment
                    client.sendall(struct.pack("q", status))
                client.close()

    def leave(self, pid: int) -> None:
        "The stand-in was killed, and so is what it stands for"
        client = self.clients.pop(pid)
        self.selector.unregister(client)
        client.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


reserve: tuple[int, socket.socket] | None = None  # in a runner: the process that its kernel will be, and the way to it


def reserve_kernel(descriptors: list[int]) -> tuple[list, list[int]] | None:
    "Fork the process that is to be this runner's kernel; returns there, once it is to be one"
    global reserve
    here, there = socket.socketpair()
    if pid := os.fork():
        there.close()
        reserve = pid, here
        return None
    here.close()
    for descriptor in descriptors:
        os.close(descriptor)
    os.setsid()
    return receive(there) or os._exit(0)


def become(request: list, descriptors: list[int]) -> list[str]:
    "Take over what a process inherits; returns what is to be run"
    (program, *words), folder, environment, numbers, parent = request
    beyond = max(4 * MOST_OPEN, *numbers) + 1  # no number that is to be taken over lies there
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, beyond) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for number, descriptor in zip(numbers, aside, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if parent:
        os.getppid = lambda: parent
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    mine, theirs = (
        [os.path.abspath(part) for part in e.get("PYTHONPATH", "").split(os.pathsep) if part]
        for e in (os.environ, environment)
    )
    sys.path[1:] = theirs + [part for part in sys.path[1:] if part not in mine]
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = program
    for file in (Path(part) / "sitecustomize.py" for part in theirs):
        if file.exists():
            runpy.run_path(str(file))
    import numpy
    import torch

    numpy.random.seed()
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    return words


def run(words: list[str]) -> None:
    "What Python does with these arguments"
    kind, what, *rest = words
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.path[0] = os.getcwd()
        if not hasattr(sys.modules.get(what), "__path__"):  # of a package its __main__ is run
            sys.modules.pop(what, None)  # or it warns of a module that is imported already
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c", words
        sys.path[0] = ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


def main(address: str) -> None:
    "The server; and each process that it forks"
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    made = Server(address).serve()
    if made is None:
        return shutil.rmtree(Path(address).parent)
    os.setsid()
    words, environment = made[0][0][1:], made[0][2]
    if words[:3] == RUNNER:
        sys.path.append(str(ROOT / "tests" / "entry_points"))
        environment["JUPYTER_DEFAULT_PROVISIONER_NAME"] = "forked"
        made = reserve_kernel(made[1]) or made
    end(become(*made))


def end(words: list[str]) -> None:
    "Run it, and end as Python does, without taking apart all that the server has imported"
    code = 0
    try:
        run(words)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and code is not e.code:
            print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(*sys.exc_info())
        code = 1
        if isinstance(e, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    os._exit(code & 255)


if __name__ == "__main__":
    from tests import forked  # whose `reserve` others see, too

    forked.main(sys.argv[1])
