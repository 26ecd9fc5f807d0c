"A throw-away PostgreSQL server on loopback, made as the image's entrypoint makes one"

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import free_port


def find_programs() -> Path | None:
    "The folder of initdb, postgres, pg_dump; on Debian it is not on the path"
    here = shutil.which("initdb")
    found = [Path(here).resolve().parent] if here else []
    return next(iter(found + sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


class Postgres:
    "A server, as the image's entrypoint makes one: a superuser with a password; by the pod's socket everybody may"

    def __init__(self, user: str, password: str):
        self.programs, self.user, self.port = find_programs(), user, free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="gpuml-postgres-"))  # the names of sockets are short
        self.process, self.log = None, open(self.folder / "log", "w")
        (self.folder / "password").write_text(password)
        self._who = {}
        if os.geteuid() == 0:  # as root it does not run
            self._who = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
            for place in (self.folder, self.folder / "password"):
                shutil.chown(place, "nobody")
        options = [
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]
        made = self._run("initdb", "-D", "data", "-U", user, "--pwfile=password", *options)
        assert made.wait() == 0, (self.folder / "log").read_text()

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.programs}:/usr/bin:/bin"
        return {"PATH": path, "PGHOST": str(self.folder), "PGPORT": str(self.port), "POSTGRES_USER": self.user}

    def _run(self, program: str, *arguments: str) -> subprocess.Popen:
        command, streams = [self.programs / program, *arguments], {"stdout": self.log, "stderr": self.log}
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, **streams, **self._who)

    def start(self) -> None:
        where = ["-k", str(self.folder), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        self.process, end = self._run("postgres", "-D", "data", *where), time.monotonic() + 600
        while self.shell(f"psql -qX -U {self.user} -d postgres -c 'select 1'").returncode:
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # the image's STOPSIGNAL: clients are not waited for
        self.process.wait(600)

    def shell(self, script: str, **more) -> subprocess.CompletedProcess:
        "What `kubectl exec … -- sh -c SCRIPT` does in the pod"
        environment = self.environment | more.pop("env", {})
        return subprocess.run(["sh", "-c", script], env=environment, capture_output=True, **more)

    def ask(self, database: str, query: str) -> str:
        done = self.shell(f"psql -qAtX -v ON_ERROR_STOP=1 -U {self.user} -d {database}", input=query.encode())
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()


@contextmanager
def postgres(user: str, password: str, database: str):
    "A server that runs, with a database"
    server = Postgres(user, password)
    try:
        server.start()
        server.ask("postgres", f"create database {database}")
        yield server
    finally:
        if server.process and server.process.poll() is None:
            server.process.kill()
            server.process.wait(600)
        server.log.close()
        shutil.rmtree(server.folder)
