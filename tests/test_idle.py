"GPUs that are not used, in the notebook that is concerned; who is warned and released: tests/cluster/test_idle.py"

import json
import math
import socket
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from IPython.core.interactiveshell import InteractiveShell

from gpuml.base.errors import ClusterError, ConfigError
from gpuml.cluster.demand import pod_devices
from gpuml.cluster.devices import own_gpus
from gpuml.cluster.holders import Holder
from gpuml.cluster.idle import decide
from gpuml.cluster.marks import IdleMark
from gpuml.cluster.state import Seen, explain
from gpuml.cluster.usage import Limits, limits, query
from gpuml.ui import magics


@pytest.fixture
def shell(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUML_NOTICES", str(tmp_path))
    monkeypatch.setattr(socket, "gethostname", lambda: "ada-jupyter-0")
    shell = InteractiveShell()
    magics.load(shell)
    yield shell
    magics.unload(shell)


def test_a_notebook_tells_once_that_its_gpu_is_about_to_go(shell, tmp_path, capsys):
    def said():
        shell.run_cell("None")
        return capsys.readouterr().err

    def note(**mark):
        (tmp_path / "ada-jupyter").write_text(json.dumps({"since": None, "until": None, "released": None} | mark))

    assert said() == ""
    note(since="2026-11-26T13:05:00Z", until="2026-11-26T15:05:00Z")
    assert said() == (
        "gpuml: this JupyterLab: it has not used its GPU since 26 Nov 13:05 UTC; unless it does, it is stopped at "
        "26 Nov 15:05 UTC: files stay, what kernels hold is lost\n"
    )
    assert said() == ""
    (tmp_path / "ada-jupyter").unlink()
    assert said() == ""
    note(since="2026-11-26T14:05:00Z")
    assert said() == "gpuml: this JupyterLab: it has not used its GPU since 26 Nov 14:05 UTC\n"
    (tmp_path / "ada-jupyter").write_text("half a no")
    assert said() == ""


def test_elsewhere_nothing_is_looked_at(monkeypatch, capsys):
    monkeypatch.delenv("GPUML_NOTICES", raising=False)
    shell = InteractiveShell()
    magics.load(shell)
    assert magics._tell not in shell.events.callbacks["post_run_cell"]
    magics.unload(shell)


@pytest.mark.parametrize(
    "words",
    [["gpuml-dev"], ["gpuml-dev="], ["=30/60"], ["GPU=30"], ["a=30/60/90"], ["a=-1"], ["a=0/5"], ["a=nan"], ["a=1e3"],
     ["a=30/30"], ["a=60/30"], ["a=30", "a=40"], ['a"}=30'], ["a|b=30"]],
)  # fmt: skip
def test_limits_that_are_refused(words):
    with pytest.raises(ConfigError, match="a=|gpuml-dev|=30|GPU="):
        limits(words)
    assert limits(["a=0.5/1"]) == {"a": Limits(0.5, 1.0)}


def seen(marks: dict, reason: str = "") -> Seen:
    "A job with marks; failed for that reason, or running"
    notes = {f"gpuml.io/{name}": moment for name, moment in marks.items()}
    conditions = [{"type": "Failed", "status": "True", "reason": reason}] if reason else []
    job = {"metadata": {"name": "j", "annotations": notes}, "spec": {}, "status": {"conditions": conditions}}
    pod = {"metadata": {"name": "p", "creationTimestamp": ""}, "spec": {}, "status": {"phase": "Running"}}
    return Seen(job, [] if reason else [pod])


WARNED = {"idle-since": "2026-11-26T13:05:00Z", "idle-until": "2026-11-26T14:05:00Z"}
RELEASED = WARNED | {"released": "2026-11-26T14:05:07Z"}


@pytest.mark.parametrize(
    "marks, reason, phase, why",
    [
        (
            WARNED,
            "",
            "running",
            "it has not used its GPU since 26 Nov 13:05 UTC; unless it does, it is ended at 26 Nov",
        ),
        (RELEASED, "DeadlineExceeded", "released", "it did not use its GPU from 26 Nov 13:05 UTC to 26 Nov 14:05 UTC"),
        (WARNED, "DeadlineExceeded", "failed", "ended by its deadline"),
        (WARNED, "BackoffLimitExceeded", "failed", "BackoffLimitExceeded"),
        (RELEASED, "PodFailurePolicy", "failed", "PodFailurePolicy"),
        ({"idle-since": "x", "idle-until": "13:05"}, "", "running", "it has not used its GPU since ?; unless it does"),
        ({"released": ""}, "DeadlineExceeded", "failed", "ended by its deadline"),
    ],
)
def test_what_is_said_of_a_job(marks, reason, phase, why):
    "A warning is no release, and what somebody wrote on a Job breaks nothing"
    state = explain(seen(marks, reason))
    assert state.phase == phase and why in state.why


@pytest.mark.parametrize("before", [0, 29, 40, 300])  # minutes without use when it is first looked at
@pytest.mark.parametrize("times", ["a=30/60", "a=1/60", "a=30"])
def test_every_minute_until_it_is_released(before, times):
    "One warning, and the release at its minute; what Prometheus is asked for is no longer than the release"
    ((_, limit),) = limits([times]).items()
    window = 5 + (limit.warn if limit.release == math.inf else limit.release)
    mark, steps, start = IdleMark(), [], datetime(2026, 11, 26, 12, tzinfo=UTC)
    for minute in range(150):
        now = start + timedelta(minutes=minute, seconds=7)
        step = decide(Holder("a", "Job", "j", 1, 60.0 * min(before + minute, window), mark), limit, now)
        if step == "warn":
            until = None if limit.release == math.inf else now + timedelta(minutes=limit.release - limit.warn)
            mark = IdleMark(f"{now:%FT%TZ}", until and f"{until:%FT%TZ}")
        steps += [(step, minute)] * bool(step)
        if step == "release":
            break
    warned = max(0, limit.warn - before)
    assert steps == [("warn", warned)] + [("release", warned + limit.release - limit.warn)] * (limit.release < math.inf)


def limit_of(name: str, count: str = "1") -> dict:
    return {"name": "c", "resources": {"limits": {name: count, "cpu": "4", "rdma.example/hca": "2"}}}


@pytest.mark.parametrize(
    "spec, gpus",
    [
        ({"containers": [limit_of("nvidia.com/gpu", "2")]}, 2),
        ({"containers": [limit_of("cpu"), limit_of("nvidia.com/mig-1g.10gb")]}, 1),
        ({"containers": [limit_of("nvidia.com/gpu"), limit_of("nvidia.com/gpu")]}, 2),
        ({"containers": [limit_of("cpu")], "initContainers": [limit_of("nvidia.com/gpu", "3")]}, 3),
        ({"containers": [limit_of("nvidia.com/gpu.shared")]}, 0),  # how busy it is is not known of each pod
        ({"containers": [{"name": "c"}]}, 0),
        ({"containers": [limit_of("nvidia.com/gpu", "1k")]}, 1000),
    ],
)
def test_gpus_that_a_pod_holds(spec, gpus):
    "In any of its containers, under any name that NVIDIA's plug-in gives them"
    assert own_gpus(pod_devices(spec)) == gpus


NOON = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def answering():
    "A server that answers everything in one way, and has the time NOON; its address"

    @contextmanager
    def answer(status: int, body: bytes, length: int | None = None):
        class Odd(BaseHTTPRequestHandler):
            def date_time_string(self, timestamp=None):
                return super().date_time_string(NOON)

            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

    return answer


@pytest.mark.parametrize(
    "answer, said",
    [
        ((400, b"exceeded maximum resolution"), "Prometheus at .*: 400: exceeded maximum resolution"),
        ((200, b"<html>"), "no answer from Prometheus at "),
        ((200, b"[]"), "no answer from Prometheus at "),
        ((200, b'{"data": null}'), "no answer from Prometheus at "),
        ((200, b'{"data": {"result": [{"metric": {}, "values": []}]}}'), "no answer from Prometheus at "),
        ((200, b'{"data"', 500), "no answer from Prometheus at "),
    ],
)
def test_what_is_no_answer(answering, answer, said):
    "Whatever a proxy in between may say is a sentence, after which the next look follows"
    with answering(*answer) as address, pytest.raises(ClusterError, match=said):
        query(address, "gpuml-dev", NOON - 600, NOON)


def test_another_clock(answering):
    "With clocks apart, what was an hour ago would be taken for now"
    with answering(200, b'{"data": {"result": []}}') as address:
        for apart in (-60, 0, 60):
            assert query(address, "gpuml-dev", NOON - 600, NOON + apart) == {}
        for apart in (-3660, -61, 61, 3660):
            sentence = rf"the clock here and the one of Prometheus at .* are {abs(apart)} s apart"
            with pytest.raises(ClusterError, match=sentence):
                query(address, "gpuml-dev", 0, NOON + apart)
