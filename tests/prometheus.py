"A real Prometheus over pages that a test writes, as exporters do"

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from ruamel.yaml import YAML

from tests.conftest import ROOT, free_port

RULES = ROOT / "k8s" / "monitoring" / "rules.yaml"
TEXT = "text/plain; version=0.0.4"
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
    "A Prometheus with the rules of k8s/monitoring that looks every second; can be stopped and started again"

    def __init__(self, folder: Path, target: str, paths: dict[str, dict[str, str]]):
        "Page → labels that are added to what it says"
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        self.url, yaml = f"http://{self.address}", YAML(typ="safe", pure=True)
        yaml.dump(yaml.load(RULES)["spec"], folder / "rules.yml")
        jobs = [
            {"job_name": path[1:], "metrics_path": path, "honor_labels": True,
             "static_configs": [{"targets": [target], "labels": labels}]}
            for path, labels in paths.items()
        ]  # fmt: skip
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        yaml.dump({"global": every, "rule_files": ["rules.yml"], "scrape_configs": jobs}, folder / "prometheus.yml")

    def start(self) -> "Prometheus":
        command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address={self.address}"]
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [*command, "--storage.tsdb.path=data"], cwd=self.folder, stdout=subprocess.DEVNULL, stderr=log
            )
        return self

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, query: str) -> list[dict]:
        "What it has for a query"
        reply = requests.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10).json()
        assert reply["status"] == "success", json.dumps(reply)
        return reply["data"]["result"]
