"A real Prometheus with the rules of k8s/monitoring, over pages that a test writes as exporters do"

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from ruamel.yaml import YAML

from tests.conftest import ROOT, free_port
from tests.waiting import until

RULES = ROOT / "k8s" / "monitoring" / "rules.yaml"
TEXT, OPENMETRICS = "text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0; charset=utf-8"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus: install it (Debian: apt-get install prometheus) to test rules and dashboard",
)


@contextmanager
def exporter(pages: dict[str, Callable[[], tuple[str, str]]]) -> Iterator[str]:
    "A server of pages, each a function that gives content type and text; its address"

    class Exporter(BaseHTTPRequestHandler):
        def do_GET(self):
            kind, text = pages[self.path]()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


class Prometheus:
    "A Prometheus in a folder; can be stopped and started again"

    def __init__(self, folder: Path, *flags: str):
        self.folder, self.flags, self.url = folder, flags, f"http://127.0.0.1:{free_port()}"
        yaml = YAML(typ="safe", pure=True)
        yaml.dump(yaml.load(RULES)["spec"], folder / "rules.yml")
        (folder / "prometheus.yml").write_text("{}")

    def look_at(self, target: str, pages: dict[str, dict[str, str]]) -> "Prometheus":
        "Collect these pages, each with some labels more, and evaluate the rules, every second"
        jobs = [
            {"job_name": path[1:], "metrics_path": path, "honor_labels": True,
             "static_configs": [{"targets": [target], "labels": labels}]}
            for path, labels in pages.items()
        ]  # fmt: skip
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config = {"global": every, "rule_files": ["rules.yml"], "scrape_configs": jobs}
        YAML(typ="safe", pure=True).dump(config, self.folder / "prometheus.yml")
        return self

    def start(self) -> None:
        "Until it answers"
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address={self.url[7:]}",
                 "--storage.tsdb.path=data", *self.flags],
                cwd=self.folder, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        until(self.is_ready, pause=0.1)

    def is_ready(self) -> bool:
        "Whether it answers; raises where it has ended"
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/-/ready", timeout=5).ok
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def ask(self, kind: str = "query", **parameters) -> list[dict]:
        "What it has for a query"
        reply = requests.get(f"{self.url}/api/v1/{kind}", params=parameters, timeout=600).json()
        assert reply["status"] == "success", reply
        return reply["data"]["result"]
