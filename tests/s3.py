"A real S3 server on loopback: SeaweedFS, once per session, with buckets and keys of its own"

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.waiting import until

KEY, SECRET = "gpuml-test-key", "gpuml-test-secret-5f2c"
READER, READER_SECRET = "gpuml-reader-key", "gpuml-reader-secret-77aa"  # may list and read, and not write
BUCKETS = "datasets,models,mlflow"


@dataclass(frozen=True)
class S3:
    "Where the server is, and a prefix that is this test's alone"

    endpoint: str
    prefix: str  # s3://datasets/<unique>

    def url(self, name: str) -> str:
        return f"{self.prefix}/{name}"


def write_keys(file: Path) -> Path:
    def identity(name, key, secret, actions):
        return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}

    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        identity("tests", KEY, SECRET, everything),
        identity("reader", READER, READER_SECRET, ["Read", "List"]),
    ]
    file.write_text(json.dumps({"identities": identities}))
    return file


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    "The server's process and endpoint; started again in the same folder, it has the same data at the same place"
    from tests.conftest import free_port  # which imports this file's fixtures

    keys, chosen = write_keys(folder / "s3.json"), folder / "ports.json"
    if not chosen.exists():
        chosen.write_text(json.dumps([free_port() for _ in range(10)]))
    ports = iter(json.loads(chosen.read_text()))
    port = next(ports)
    command = [shutil.which("weed", path=str(Path(sys.executable).parent)), "mini", f"-dir={folder}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", f"-s3.port={port}"]
    command += [f"-s3.config={keys}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false"]
    command += ["-admin.ui=false", f"-bucket={BUCKETS}", f"-s3.port.grpc={next(ports)}"]
    for part in ("master", "filer", "volume", "admin"):
        command += [f"-{part}.port={next(ports)}", f"-{part}.port.grpc={next(ports)}"]
    with open(folder / "weed.log", "w") as log:
        environment = {**os.environ, "GOMEMLIMIT": "400MiB"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return process, f"http://127.0.0.1:{port}"


def _ready(endpoint: str, process: subprocess.Popen, log: Path) -> None:
    "Wait until it answers and has its buckets"
    from gpuml.base.errors import GpumlError
    from gpuml.base.storage import Storage

    def is_ready():
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(endpoint, timeout=1)
        except urllib.error.HTTPError:
            with suppress(GpumlError):
                for bucket in BUCKETS.split(","):
                    Storage(endpoint, patience=1).find(f"s3://{bucket}/x")
                return True
        except OSError:
            pass
        return False

    until(is_ready, pause=0.1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    "The endpoint of the session's server"
    folder = tmp_path_factory.mktemp("s3")
    process, endpoint = start(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            keys_in_environment(patch)
            _ready(endpoint, process, folder / "weed.log")
        yield endpoint
    finally:
        process.kill()  # its data goes with the test's folder
        process.wait(600)


def keys_in_environment(monkeypatch, key: str = KEY, secret: str = SECRET) -> None:
    "The test's keys, and nothing of this machine's own"
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


_prefixes = iter(range(1_000_000))


@pytest.fixture
def s3(s3_server, monkeypatch) -> S3:
    "The server, with keys and endpoint in the environment, and a fresh prefix"
    keys_in_environment(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    return S3(s3_server, f"s3://datasets/t{next(_prefixes)}")
