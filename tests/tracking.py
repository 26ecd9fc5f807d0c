"A real MLflow tracking server, and the gate through which clients come to it, which is open, shut or silent"

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import requests

from tests.conftest import free_port
from tests.waiting import until

GATE = "127.0.0.2"  # this machine, but not by a name that gpuml takes for a server that nobody started


@contextmanager
def tracking_server(folder: Path, template: Path) -> Iterator[int]:
    "A server over a copy of an empty store, which knows two host names; its port"
    shutil.copy(template, folder / "server.db")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    command += ["--allowed-hosts", f"127.0.0.1:*,{GATE}:*"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}", folder / "server.log")
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(600)


def wait_until_it_answers(uri: str, log: Path) -> None:
    "Until it is up"

    def is_up():
        with suppress(requests.RequestException):
            return requests.get(f"{uri}/health", timeout=5).ok
        return False

    try:
        until(is_up, pause=0.25)
    except AssertionError:
        raise TimeoutError(log.read_text()[-2000:]) from None


class Gate:
    "An address of a server: where it is shut, nobody listens, and the connections through it are gone"

    def __init__(self, port: int):
        self.target = ("127.0.0.1", port)
        self.address = (GATE, free_port())
        self.uri = f"http://{GATE}:{self.address[1]}"
        self.listener: socket.socket | None = None
        self.connections: list[socket.socket] = []

    def open(self) -> None:
        self.listener = socket.create_server(self.address)
        Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def be_silent(self) -> None:
        "Take connections and never answer"
        self.listener = socket.create_server(self.address)

    def shut(self) -> None:
        for one in filter(None, [self.listener, *self.connections]):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
                self.connections += [client, server]
                if listener.fileno() < 0:  # shut meanwhile
                    client.close()
                    server.close()
                    return
                for pair in ((client, server), (server, client)):
                    Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    "Until either end is closed"
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
