"A real Kubernetes control plane on loopback: etcd, API server, controller manager and scheduler"

import ipaddress
import json
import re
import secrets
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3

from tests.cluster.api import Api, ApiError
from tests.cluster.programs import program
from tests.conftest import free_port

READY = {  # by server, in the order in which they start: the path that says whether it is ready
    "etcd": "health",
    "kube-apiserver": "readyz",
    "kube-controller-manager": "healthz",
    "kube-scheduler": "healthz",
}
USERS = {
    "admin": ["system:masters"],
    "prod-user": ["gpuml-prod"],
    "dev-user": ["gpuml-dev"],
    "team-user": ["gpuml-dev", "gpuml-prod"],
    "outsider": [],
}  # groups
NAMES = [f"DNS:kubernetes{end}" for end in ("", ".default", ".default.svc", ".default.svc.cluster.local")]


class Plane:
    "The control plane; `start` it, and `stop` kills it. It dies with the thread that started it in every case"

    def __init__(
        self,
        folder: Path,
        apiserver_flags: dict | None = None,
        controller_flags: dict | None = None,
        scheduler_flags: dict | None = None,
        address: str = "127.0.0.1",  # the API server's
        services: str = "10.0.0.0/24",  # addresses of Services
        users: dict[str, list[str]] = USERS,  # their groups
        port: int = 0,  # the API server's; 0: any that is free
    ):
        self.folder, self.processes, self.address, self.services, self.users = folder, {}, address, services, users
        self.apiserver_flags, self.controller_flags = apiserver_flags or {}, controller_flags or {}
        self.scheduler_flags = scheduler_flags or {}
        text = subprocess.check_output([program("kube-apiserver"), "--version"], text=True)
        self.version = tuple(int(n) for n in re.search(r"v(\d+)\.(\d+)", text).groups())
        self.ports = {server: free_port() for server in READY} | ({"kube-apiserver": port} if port else {})
        self.url = f"https://{address}:{self.ports['kube-apiserver']}"
        self.certificate, self.key = folder / "server.crt", folder / "server.key"
        self.tokens = {user: secrets.token_hex(16) for user in users}
        self._write_credentials()

    def start(self, servers: Iterable[str] = READY) -> "Plane":
        "The control plane, or some of its servers"
        self.flags = {
            "etcd": self._etcd(),
            "kube-apiserver": self._apiserver(),
            "kube-controller-manager": self._controller_manager(),
            "kube-scheduler": self._scheduler(),
        }
        for server in servers:
            self.up(server)
        if "kube-controller-manager" in servers:
            self._wait("kube-controller-manager", lambda: self.has_service_account("default"))
        return self

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()  # there is nothing to save
        for process in self.processes.values():
            process.wait(600)

    def down(self, server: str) -> None:
        "Such as kube-apiserver: as if its machine had failed"
        self.processes[server].kill()
        self.processes.pop(server).wait(600)

    def up(self, server: str) -> None:
        "What was down comes back"
        self._start(server, self.flags[server])
        self._wait(server, lambda: self._is_ready(server))

    def api(self, user: str = "admin", patience: float = 0) -> Api:
        "A user's requests; they fail if there is no server for so many seconds"
        return Api(self.url, self.tokens[user], str(self.certificate), patience)

    def kubeconfig(self, user: str = "admin", namespace: str = "default") -> Path:
        "A file for KUBECONFIG"
        cluster = {"server": self.url, "certificate-authority": str(self.certificate)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": self.tokens[user]}}],
            "contexts": [{"name": user, "context": {"cluster": "test", "user": user, "namespace": namespace}}],
            "current-context": user,
        }
        file = self.folder / f"{user}-{namespace}.kubeconfig"
        file.write_text(json.dumps(config))  # JSON is YAML
        return file

    @contextmanager
    def requests_of(self, user: str) -> Iterator[set]:
        "What a user is allowed inside the block, known at its end: verb and resource, such as ('get', 'pods/log')"
        before, found = len(self.audited()), set()
        yield found
        for event in self.audited()[before:]:
            if (
                event["user"]["username"] == user
                and event.get("annotations", {}).get("authorization.k8s.io/decision") == "allow"
            ):
                of = event.get("objectRef", {})
                found.add((event["verb"], "/".join(filter(None, (of.get("resource"), of.get("subresource"))))))

    def audited(self) -> list[dict]:
        "The events of the audit log, without one that is being written"
        log = self.folder / "audit.log"
        *lines, _ = log.read_bytes().split(b"\n") if log.exists() else [b""]
        return [json.loads(line) for line in lines]

    def has_service_account(self, namespace: str) -> bool:
        "Whether pods can be made in a namespace: its default ServiceAccount is there"
        try:
            return bool(self.api().get("serviceaccounts", namespace, "default"))
        except ApiError:
            return False

    def _etcd(self) -> dict:
        clients, peers = f"http://127.0.0.1:{self.ports['etcd']}", f"http://127.0.0.1:{free_port()}"
        return {
            "data-dir": self.folder / "etcd",
            "listen-client-urls": clients,
            "advertise-client-urls": clients,
            "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers,
            "initial-cluster": f"default={peers}",
        }

    def _apiserver(self) -> dict:
        return {
            "etcd-servers": f"http://127.0.0.1:{self.ports['etcd']}",
            "advertise-address": "127.0.0.1",
            "endpoint-reconciler-type": "none",
            "token-auth-file": self.folder / "tokens.csv",
            "authorization-mode": "RBAC",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-signing-key-file": self.key,
            "service-account-key-file": self.key,
            "allow-privileged": "true",  # as clusters have it: Pod Security says where not
            "service-cluster-ip-range": self.services,
            "kubelet-preferred-address-types": "InternalIP",
            "audit-policy-file": self._audit_policy(),
            "audit-log-path": self.folder / "audit.log",
            "default-not-ready-toleration-seconds": 3,  # by default a lost node's pods are left for 5 minutes
            "default-unreachable-toleration-seconds": 3,
            **self._listens("kube-apiserver"),
            "bind-address": self.address,
            **self.apiserver_flags,
        }

    def _audit_policy(self) -> Path:
        "What the users of the tests ask for is written down, but not what the servers ask of each other"
        users = [user for user in USERS if user != "admin"]
        rules = [{"level": "Metadata", "users": users}, {"level": "None"}]
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": rules}
        file = self.folder / "audit-policy.json"
        file.write_text(json.dumps(policy))
        return file

    def _controller_manager(self) -> dict:
        return {
            "kubeconfig": self.kubeconfig(),
            "service-account-private-key-file": self.key,
            "root-ca-file": self.certificate,
            "node-monitor-period": "1s",
            "node-monitor-grace-period": "20s",
            "node-eviction-rate": 1,
            "leader-elect": "false",
            **self._listens("kube-controller-manager"),
            **self.controller_flags,
        }

    def _scheduler(self) -> dict:
        flags = {"kubeconfig": self.kubeconfig(), "leader-elect": "false"}
        return flags | self._listens("kube-scheduler") | self.scheduler_flags

    def _listens(self, server: str) -> dict:
        "On loopback only, with the certificate that all share"
        flags = {"bind-address": "127.0.0.1", "secure-port": self.ports[server]}
        return flags | {"tls-cert-file": self.certificate, "tls-private-key-file": self.key}

    def _write_credentials(self) -> None:
        "One key for everything: the server's certificate, the agent's, and the tokens of service accounts"
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 7 -subj /CN=gpuml-tests -addext"
        first = next(ipaddress.ip_network(self.services).hosts())  # of the Service `kubernetes`
        names = ",".join(dict.fromkeys([*(f"IP:{a}" for a in ("127.0.0.1", self.address, first)), *NAMES]))
        command = [*command.split(), f"subjectAltName={names}", "-keyout", self.key, "-out", self.certificate]
        subprocess.run(command, check=True, capture_output=True)
        lines = [f'{self.tokens[user]},{user},{user},"{",".join(groups)}"\n' for user, groups in self.users.items()]
        (self.folder / "tokens.csv").write_text("".join(lines))

    def _start(self, server: str, flags: dict) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", program(server)]
        command += [f"--{flag}={value}" for flag, value in flags.items()]
        with open(self.folder / f"{server}.log", "a") as log:
            self.processes[server] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _wait(self, server: str, ready, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not ready():
            dead = next((name for name, process in self.processes.items() if process.poll() is not None), None)
            if dead or time.monotonic() > end:
                self.stop()
                log = (self.folder / f"{dead or server}.log").read_text()
                raise RuntimeError(
                    f"{dead or server} {'ended' if dead else 'is not ready'}; its log ends\n{log[-3000:]}"
                )
            time.sleep(0.1)

    def _is_ready(self, server: str) -> bool:
        address = self.address if server == "kube-apiserver" else "127.0.0.1"
        url = f"{'http' if server == 'etcd' else 'https'}://{address}:{self.ports[server]}/{READY[server]}"
        http = urllib3.PoolManager(ca_certs=str(self.certificate), retries=False, timeout=5)
        try:
            return http.request("GET", url).status == 200
        except urllib3.exceptions.HTTPError:
            return False
