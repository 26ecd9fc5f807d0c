"A throw-away PostgreSQL server on loopback, made as the image's entrypoint makes one"

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import free_port


def find_programs() -> Path | None:
    "The folder of initdb, postgres, pg_dump; on Debian it is not on the path"
    here = shutil.which("initdb")
    found = [Path(here).resolve().parent] if here else []
    return next(iter(found + sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@dataclass(frozen=True)
class Postgres:
    "A server, and what its pod would find: programs, and a socket that needs no password"

    programs: Path
    folder: Path
    port: int
    user: str

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.programs}:/usr/bin:/bin"
        return {"PATH": path, "PGHOST": str(self.folder), "PGPORT": str(self.port), "POSTGRES_USER": self.user}

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
    "As the image's entrypoint: a superuser with a password, and its database; by the socket everybody may"
    programs, folder = find_programs(), Path(tempfile.mkdtemp(prefix="gpuml-postgres-"))  # sockets need short names
    server = Postgres(programs, folder, free_port(), user)
    who = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    (folder / "password").write_text(password)
    if who:  # root it refuses to run as
        for place in (folder, folder / "password"):
            shutil.chown(place, "nobody")
    log, more = open(folder / "log", "w"), {"env": server.environment, "cwd": folder, **who}
    made = ["initdb", "-D", "data", "-U", user, "--pwfile=password", "--auth-local=trust", "--auth-host=scram-sha-256"]
    made += ["--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
    command = ["postgres", "-D", "data", "-k", str(folder), "-p", str(server.port), "-c", "listen_addresses=127.0.0.1"]
    process = None
    try:
        subprocess.run([programs / made[0], *made[1:]], check=True, stdout=log, stderr=log, **more)
        process = subprocess.Popen([programs / command[0], *command[1:]], stdout=log, stderr=log, **more)
        end = time.monotonic() + 60
        while server.shell(f"psql -qX -U {user} -d postgres -c 'create database {database}'").returncode:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        if process:
            process.kill()
            process.wait(10)
        shutil.rmtree(folder)
