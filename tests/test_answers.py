"""What stands between a user and the API server: proxies, login pages, balancers, tokens that are renewed, logs that rotate

A real HTTP server on loopback answers as they do.
"""

import json
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from gpuml.base.errors import ClusterError
from gpuml.base.grid import grid_of
from gpuml.cluster.answers import Answer
from gpuml.cluster.api import Api
from gpuml.cluster.logs import Position, print_log, read_log
from gpuml.cluster.objects import JobAddress
from gpuml.cluster.remote import ClusterJob
from gpuml.cluster.sweep_jobs import prepare_sweep
from gpuml.cluster.watch import Watch
from tests.conftest import OFFLINE, ROOT
from tests.waiting import until

LOGIN = b"<!DOCTYPE html><html><head><title>Sign in &middot; Example</title></head><body>Please log in</body></html>"
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: c
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
clusters: [{{name: c, cluster: {{server: "{server}"}}}}]
users: [{{name: u, user: {user}}}]
"""


class Server(ThreadingHTTPServer):
    "`answer(request)` writes what whoever stands there says; `asked` has the paths with their queries"

    daemon_threads = True

    def handle_error(self, *connection):
        pass  # who asked went away

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked = answer, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.path)
        self.server.answer(self)

    do_POST = do_PUT = do_DELETE = do_GET

    def send(self, status, kind, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_object(self, kind, status=200, **fields):
        self.send(status, "application/json", json.dumps({"kind": kind, **fields}).encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def connect(tmp_path, monkeypatch):
    "An `Api` of a server; its kubeconfig has this user"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)

    def made(server, user="{token: a}", patience=1.0):
        file = tmp_path / "kubeconfig"
        file.write_text(KUBECONFIG.format(server=server.url, user=user))
        monkeypatch.setenv("KUBECONFIG", str(file))
        return Api(patience=patience)

    return made


NO_ANSWERS = {  # status, type, body, headers; what is said of it
    "login page": (200, "text/html; charset=utf-8", LOGIN, {}, "200, a web page ('Sign in · Example')"),
    "login page that calls itself JSON": (200, "application/json", LOGIN, {}, "a web page ('Sign in · Example')"),
    "sent to the login page": (302, "text/plain", b"", {"Location": "https://login.example.com/?token=s3cret"}, "302, sent on to https://login.example.com/;"),
    "forbidden by the proxy": (403, "text/html", b"<html><body><h1>Access denied by policy</h1></body></html>", {}, "403, a web page ('Access denied by policy')"),
    "not found by the proxy": (404, "text/html", b"<html><h1>404 Not Found</h1><hr>nginx</html>", {}, "404, a web page ('404 Not Found nginx')"),
    "login of the proxy": (401, "text/html", LOGIN, {}, "401, a web page ('Sign in · Example')"),
    "bad gateway": (502, "text/html", b"<html><title>502 Bad Gateway</title></html>", {}, "502, a web page ('502 Bad Gateway')"),
    "JSON of something else": (200, "application/json", b'{"error": "login required"}', {}, 'no object of Kubernetes: {"error": "login required"}'),
    "a list": (200, "application/json", b"[]", {}, "no object of Kubernetes: []"),
    "nothing": (200, "application/json", b"", {}, "200, and nothing"),
    "half an object": (200, "application/json", b'{"kind": "JobList", "items": [{"meta', {}, "200, a web page"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_is_said(name, connect):
    "kubernetes/kubectl#552: neither an empty list, nor a job that is gone, nor a traceback"
    status, kind, body, headers, words = NO_ANSWERS[name]
    with Server(lambda request: request.send(status, kind, body, **headers)) as server:
        api = connect(server, patience=0.3)
        for ask in (api.items, api.get, lambda path: api.delete(path, {})):
            if ask in (api.items, api.get) or status >= 300 or body == LOGIN:
                with pytest.raises(ClusterError) as refused:
                    ask("/apis/batch/v1/namespaces/a/jobs")
                said = str(refused.value)
                assert words in said and f"what answers at {server.url} is no API server of Kubernetes" in said
                assert "kubeconfig" in said and "s3cret" not in said and "\n" not in said
                assert refused.value.exit_code == ClusterError.exit_code


def test_refusals_of_the_api_server_stay_what_they_are(connect):
    answers = iter([("Status", 403, "Forbidden"), ("Status", 404, "NotFound")])

    def answer(request):
        kind, status, reason = next(answers)
        request.send_object(kind, status, message="jobs is forbidden", reason=reason)

    with Server(answer) as server:
        api = connect(server)
        with pytest.raises(Answer, match="jobs is forbidden"):
            api.get("/x")
        assert api.get("/x") is None


def test_a_gateway_that_fails_for_a_while_is_asked_again(connect):
    "And not more often than it asks for"
    times = []

    def answer(request):
        times.append(time.monotonic())
        if len(times) < 3:
            request.send(
                502 if len(times) == 1 else 429, "text/html", LOGIN, **{"Retry-After": "1"} if len(times) == 2 else {}
            )
        else:
            request.send_object("JobList", items=[])

    with Server(answer) as server:
        assert connect(server, patience=600).items("/x") == []
    assert times[2] - times[1] >= 1


WATCHES = {  # what the server says to a watch, which it ends at once
    "nothing": ("application/json", b""),
    "one event": ("application/json", b'{"type": "ADDED", "object": {"kind": "Job"}}\n'),
    "a web page": ("text/html", LOGIN),
}


def test_a_watch_that_ends_at_once_is_not_asked_for_sixty_times_a_second(connect):
    "fabric8io/kubernetes-client#7896"
    over, asked = threading.Event(), {}
    started = time.monotonic()
    with ExitStack() as servers:
        for name, (kind, body) in WATCHES.items():
            server = servers.enter_context(Server(lambda request, kind=kind, body=body: request.send(200, kind, body)))
            asked[name] = server.asked
            watch = Watch(connect(server), "/apis/batch/v1/namespaces/a/jobs", {})
            threading.Thread(target=watch.run, args=(threading.Event(), over), daemon=True).start()
        until(lambda: all(asked.values()))
        time.sleep(1.5)
        over.set()
        counts = {name: len(paths) for name, paths in asked.items()}
        seconds = time.monotonic() - started
    assert max(counts.values()) <= 2 * seconds, counts


def test_a_renewed_token_is_read_again(connect, tmp_path):
    "kubernetes-client/python#1946: a kubeconfig's tokenFile that something renews"
    file, valid = tmp_path / "token", ["one"]
    file.write_text("one")

    def answer(request):
        if request.headers["Authorization"] == f"Bearer {valid[0]}":
            request.send_object("JobList", items=[])
        else:
            request.send_object("Status", 401, message="Unauthorized", reason="Unauthorized")

    with Server(answer) as server:
        api = connect(server, f"{{tokenFile: {file}}}")
        assert api.items("/x") == []
        valid[0] = "two"
        asked = len(server.asked)
        with pytest.raises(Answer, match="Unauthorized"):  # nobody has renewed it
            api.items("/x")
        assert len(server.asked) == asked + 1
        file.write_text("two")
        assert api.items("/x") == []
        file.unlink()  # while it is being replaced
        valid[0] = "three"
        with pytest.raises(Answer, match="Unauthorized"):
            api.items("/x")


def stamped(number):
    return f"2026-11-26T12:00:{number // 10:02}.{number % 10}00000000Z line {number}\n".encode()


def test_a_rotated_log_is_followed_whole(connect):
    "kubernetes/kubernetes#115701: the node's file is replaced while it is followed, and a connection that hears nothing more"
    connections, printed, over = [], [], threading.Event()

    def answer(request):
        query = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        connections.append(query)
        kept = {1: range(25), 2: range(18, 40), 3: range(38, 60)}[
            min(len(connections), 3)
        ]  # lines that the file still has
        lines = [stamped(n) for n in kept if stamped(n)[:19].decode() >= query.get("sinceTime", "")[:19]]
        lines = lines if query.get("timestamps") == "true" else [line.partition(b" ")[2] for line in lines]
        request.send_response(200)
        request.send_header("Content-Type", "text/plain")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        data = b"".join(lines)[: None if len(connections) > 1 else -4]  # first it breaks in the middle of a line
        request.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) + b"0\r\n\r\n" * (len(connections) > 2))
        request.wfile.flush()
        if len(connections) == 2:  # it goes on, and nothing more is heard of it
            over.wait(600)
        request.close_connection = True

    with Server(answer) as server:
        job = JobAddress(connect(server), "a", "a-1")
        position = Position()
        for _ in range(4):
            print_log(job, "p", position, printed.append, silence=5)
        over.set()
    assert "".join(printed) == "".join(f"line {n}\n" for n in range(60))


def test_letters_of_a_long_line_stay_whole(connect):
    "kubernetes-client/python-base#245: a progress bar of more than a block, in which a letter lies across two"
    bars = f"a{'█' * 60_000}\n"
    line = b"2026-11-26T12:00:00.000000000Z " + bars.encode()
    printed = []
    with Server(lambda request: request.send(200, "text/plain", line)) as server:
        job = JobAddress(connect(server), "a", "a-1")
        print_log(job, "p", Position(), printed.append)
    assert "".join(printed) == bars and len(printed) > 1


def test_a_web_page_is_no_log(connect):
    with Server(lambda request: request.send(200, "text/html", LOGIN)) as server:
        job = JobAddress(connect(server), "a", "a-1")
        assert read_log(job, "p") == ""
        print_log(job, "p", Position(), pytest.fail)


def test_a_job_is_cancelled_while_storage_does_not_answer(connect, monkeypatch):
    "Who ended it is written as soon as storage answers, and nobody waits for that"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    deleted, written = threading.Event(), []

    def cluster(request):
        if request.command == "DELETE":
            deleted.set()
            return request.send_object("Status")
        if "/jobs/" in request.path:
            return request.send_object("Status", 404, message="not there")
        return request.send_object("PodList", items=[])

    def storage(request):
        if request.command != "PUT":
            return request.send(404, "application/xml", b"")
        written.append((request.path, deleted.wait(600)))
        return request.send(200, "application/xml", b"")

    with Server(cluster) as api_server, Server(storage) as s3:
        job = ClusterJob("prod-1", "s3://models/prod-1", s3.url, {}, "", connect(api_server), "gpuml-prod")
        job.cancel()
    assert written == [("/models/prod-1/cancelled.json", True)]


def test_who_cancelled_a_job_is_said_while_the_cluster_still_has_it(connect, tmp_path):
    "Its controller may take its time; what a cell shows last is this state"
    removed = {"name": "prod-1", "uid": "u", "deletionTimestamp": "2026-11-30T00:00:00Z"}
    (tmp_path / "cancelled.json").write_text('{"by": "Ada"}')

    def cluster(request):
        if "/jobs/" in request.path:
            return request.send_object("Job", metadata=removed, spec={})
        return request.send_object("PodList", items=[])

    with Server(cluster) as server:
        job = ClusterJob("prod-1", str(tmp_path), None, {}, "", connect(server), "gpuml-prod")
        assert job.status.phase == "cancelled"
        assert job.status.why.startswith("cancelled by Ada before it ran;")


def test_the_jobs_of_a_sweep_are_checked_against_one_reading_of_the_cluster(connect, project):
    "However many there are; a trial of each one's manifest is its own"
    notebook = project / "train.ipynb"
    notebook.write_text((ROOT / "nbs" / "train.ipynb").read_text())

    def cluster(request):
        if request.path.endswith("accessreviews"):
            body = {"kind": "SelfSubjectAccessReview", "status": {"allowed": True}}
            return request.send(200, "application/json", json.dumps(body).encode())
        return request.send_object("List", items=[], value=1)

    choices = grid_of(["train.seed=0,1,2", f"model.name={OFFLINE}", "compute.image=registry.example.com/a:1"])
    with Server(cluster) as server:
        connect(server)
        ready = prepare_sweep("dev", choices, notebook, {})
    asked = [path.partition("?")[0] for path in server.asked]
    assert len(ready.planned) == 3 and asked.count("/api/v1/nodes") == asked.count("/version") == 1, asked
    assert len([path for path in server.asked if "dryRun" in path]) == 3
