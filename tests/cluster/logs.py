"The kubelet's port: what the API server asks for a pod's log"

import datetime
import http.server
import ssl
import time
from urllib.parse import parse_qs, urlsplit


def log_server(agent, certificate, key) -> http.server.ThreadingHTTPServer:
    "A server, over TLS as the API server wants it, for `/containerLogs/NAMESPACE/POD/CONTAINER`"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Logs)
    server.agent = agent
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


class Logs(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urlsplit(self.path)
        _, _, namespace, name, container = url.path.split("/")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        worker = self.server.agent.worker(namespace, name)
        if not worker:
            return self._refuse(404, f'pods "{name}" not found')
        if worker.node in self.server.agent.vanished:
            return None  # a lost node does not answer
        if not worker.started_at:
            return self._refuse(400, f'container "{container}" in pod "{name}" is waiting to start: {worker.waiting}')
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        try:
            for line in lines(worker, query):
                self.wfile.write(line)
        except OSError:
            return None  # who asked went away
        return None

    def _refuse(self, status: int, text: str):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


def lines(worker, query: dict):
    "The lines that a request asks for, and with `follow` those that come, until the process has ended"
    shown = [index for index, (at, _) in enumerate(worker.lines) if at >= _since(query)]
    tail = min(int(query.get("tailLines", len(shown))), len(shown))
    position = shown[-tail] if tail else len(worker.lines)
    follow, timestamps = (query.get(name) == "true" for name in ("follow", "timestamps"))
    while True:
        with worker.more:
            while follow and not worker.ended and len(worker.lines) <= position:
                worker.more.wait()
            new, ended = worker.lines[position:], worker.ended
        for at, line in new:
            yield at.encode() + b" " + line if timestamps else line
        position += len(new)
        if ended or not follow:
            return


def _since(query: dict) -> str:
    "The time from which on lines are asked for, as it stands before them"
    if "sinceSeconds" in query:
        at = datetime.datetime.fromtimestamp(time.time() - float(query["sinceSeconds"]), datetime.UTC)
        return at.isoformat()
    return query.get("sinceTime", "").removesuffix("Z")  # what has a fraction of that second, too
