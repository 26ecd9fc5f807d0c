"CoreDNS as a pod in kube-system, behind the Service kube-dns"

from pathlib import Path

from tests.cluster.nodes.devices import HOST
from tests.cluster.nodes.image import TRAIN
from tests.cluster.programs import program

NAME = "coredns"
COREFILE = """\
.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa {
        pods insecure
    }
}
"""
WATCHED = [
    {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
]


def manifests(address: str) -> list[dict]:
    "What makes names known at the address; the program comes from the host"

    def thing(version: str, kind: str, **fields) -> dict:
        return {"apiVersion": version, "kind": kind, "metadata": {"name": NAME, "namespace": "kube-system"}, **fields}

    labels = {"k8s-app": "kube-dns"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME}
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": "kube-system"}
    ports = [{"name": name, "port": 53, "protocol": name.upper()} for name in ("udp", "tcp")]
    service = {"selector": labels, "clusterIP": address, "ports": ports}
    template = {"metadata": {"labels": labels}, "spec": _pod()}
    deployment = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    rbac = "rbac.authorization.k8s.io/v1"
    made = [
        thing("v1", "ServiceAccount"),
        thing(rbac, "ClusterRole", rules=WATCHED),
        thing(rbac, "ClusterRoleBinding", roleRef=role, subjects=[account]),
        thing("v1", "ConfigMap", data={"Corefile": COREFILE}),
        thing("v1", "Service", spec=service) | {"metadata": {"name": "kube-dns", "namespace": "kube-system"}},
        thing("apps/v1", "Deployment", spec=deployment),
    ]
    for manifest in made:
        if manifest["kind"].startswith("Cluster"):
            del manifest["metadata"]["namespace"]
    return made


def _pod() -> dict:
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": NAME,
        "image": TRAIN,
        "command": [str(Path(program(NAME)).resolve()), "-conf", "/etc/coredns/Corefile"],
        "resources": {"limits": {HOST: 1, "memory": "170Mi"}, "requests": {"cpu": "50m"}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "securityContext": security,
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }
    return {
        "serviceAccountName": NAME,
        "priorityClassName": "system-cluster-critical",
        "dnsPolicy": "Default",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001},
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": NAME}}],
    }
