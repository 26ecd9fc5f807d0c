"Requests to a Kubernetes API server, as plain dicts"

import json
import time
from collections.abc import Iterator

import urllib3

GROUPS = {
    "jobs": "/apis/batch/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "replicasets": "/apis/apps/v1",
    "clusterqueues": "/apis/kueue.x-k8s.io/v1beta2",
    "localqueues": "/apis/kueue.x-k8s.io/v1beta2",
    "workloads": "/apis/kueue.x-k8s.io/v1beta2",
    "priorityclasses": "/apis/scheduling.k8s.io/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "clusterroles": "/apis/rbac.authorization.k8s.io/v1",
    "clusterrolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "deviceclasses": "/apis/resource.k8s.io/v1",
    "resourceslices": "/apis/resource.k8s.io/v1",
    "resourceclaims": "/apis/resource.k8s.io/v1",
    "resourceclaimtemplates": "/apis/resource.k8s.io/v1",
}
PATCHES = {"merge": "application/merge-patch+json", "strategic": "application/strategic-merge-patch+json"}


class ApiError(Exception):
    "What the server answered instead"

    def __init__(self, status: int, message: str, audit: str = ""):
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message
        self.audit = audit  # the request's id in the audit log


def address(resource: str, namespace: str = "", name: str = "", part: str = "") -> str:
    "The path of a resource, such as `address('pods', 'default', 'p-1', 'log')`"
    where = f"/namespaces/{namespace}" if namespace else ""
    path = f"{GROUPS.get(resource, '/api/v1')}{where}/{resource}"
    return "/".join([path, *filter(None, (name, part))])


class Api:
    "One user's requests; for any number of threads"

    def __init__(self, url: str, token: str, certificate: str, patience: float = 0, headers: dict | None = None):
        self.url, self.token, self.patience = url, token, patience  # seconds in which a server may come back
        self.headers = headers or {}
        self.http = urllib3.PoolManager(maxsize=20, ca_certs=certificate, retries=False)

    def request(self, method: str, path: str, body=None, query=None, kind: str = "application/json", **options):
        "The server's answer, or an ApiError"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind} | self.headers
        data = None if body is None else json.dumps(body)
        text = "?" + "&".join(f"{k}={v}" for k, v in query.items()) if query else ""
        answer = self._send(method, self.url + path + text, body=data, headers=headers, **options)
        if answer.status < 400:
            return answer
        try:
            message = json.loads(answer.data)["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.data.decode(errors="replace")
        raise ApiError(answer.status, message, answer.headers.get("Audit-Id", ""))

    def _send(self, *request, **options) -> urllib3.BaseHTTPResponse:
        end = time.monotonic() + self.patience
        while True:
            try:
                return self.http.request(*request, **options)
            except urllib3.exceptions.HTTPError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def get(self, resource: str, namespace: str = "", name: str = "", **query) -> dict:
        "One object, or a list with `items`; `labelSelector`, `fieldSelector` and the like choose"
        return json.loads(self.request("GET", address(resource, namespace, name), query=query).data)

    def create(self, resource: str, namespace: str, body: dict, name: str = "", part: str = "") -> dict:
        return json.loads(self.request("POST", address(resource, namespace, name, part), body).data)

    def patch(self, resource, namespace, name, body: dict, part: str = "", kind: str = "merge") -> dict:
        path = address(resource, namespace, name, part)
        return json.loads(self.request("PATCH", path, body, kind=PATCHES[kind]).data)

    def delete(self, resource: str, namespace: str, name: str, **options) -> dict:
        "`gracePeriodSeconds`, `propagationPolicy` and `preconditions` as in DeleteOptions"
        return json.loads(self.request("DELETE", address(resource, namespace, name), options).data)

    def logs(self, namespace: str, pod: str, **query) -> str:
        "A pod's log so far, or with `follow='true'` until its end"
        answer = self.request("GET", address("pods", namespace, pod, "log"), query=query, timeout=120)
        return answer.data.decode()

    def watch(self, resource: str, namespace: str = "", **query) -> Iterator[tuple[str, dict]]:
        "Every object there is (as ADDED), then every change, until the connection ends"
        path, query = address(resource, namespace), {"watch": "true", **query}
        timeout = urllib3.Timeout(connect=5, read=None)
        answer = self.request("GET", path, query=query, preload_content=False, timeout=timeout)
        rest = b""
        for piece in answer.stream(None):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ERROR":  # such as 410: what changed since is no longer known
                    raise ApiError(event["object"]["code"], event["object"]["message"])
                yield event["type"], event["object"]
