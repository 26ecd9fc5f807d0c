"A container that a cluster injects is told to end when the job's container ends"

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gpuml.base.errors import Exit
from gpuml.jobs.sidecars import SIDECARS
from tests.conftest import gpuml


class Proxy(BaseHTTPRequestHandler):
    "What a mesh's container answers when it is told to end"

    def do_POST(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass


def test_the_runner_tells_the_proxy_to_end(tmp_path):
    "Also where the attempt could not even begin; on somebody's own machine nothing is asked"
    try:
        server = HTTPServer(("127.0.0.1", SIDECARS[0].port), Proxy)
    except OSError:
        pytest.skip(f"something listens on port {SIDECARS[0].port} of this machine")
    server.asked, pod = [], {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "GPUML_IMAGE": "gpuml-train:0.1.0"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for environment, asked in ({}, []), (pod, ["/quitquitquit"]):  # one after the other: the port is one
            command = ["run", str(tmp_path / "gone.tar.gz"), "--run", "a-1"]
            done = gpuml(*command, cwd=tmp_path, env={**os.environ, **environment})
            assert done.returncode == Exit.NOT_FOUND and "Traceback" not in done.stderr, done.stderr
            assert server.asked == asked
    finally:
        server.shutdown()
        server.server_close()
