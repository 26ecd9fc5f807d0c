"A real node: containerd, kubelet, kube-proxy and kube-router in a network namespace"

import json
import subprocess
from pathlib import Path

from tests.cluster.api import ApiError
from tests.cluster.nodes.certificate import sign
from tests.cluster.nodes.devices import GPU, HOST, Devices
from tests.cluster.nodes.footprint import group_name
from tests.cluster.nodes.image import PAUSE
from tests.cluster.nodes.machine import CNI, make_group
from tests.cluster.nodes.network import Network
from tests.cluster.nodes.programs import Programs
from tests.cluster.plane import Plane
from tests.cluster.programs import program

CONTAINERD = """\
version = 3
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{cni}"]
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""
EVICTION = {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"}
LIFETIME = 8  # seconds of the lease that says a node is alive; it is renewed four times in that


class Node:
    "One node. `launch`, `load` and `join` start it in steps, so that several start at the same time"

    def __init__(self, plane: Plane, network: Network, folder: Path, index: int, gpus: int, **kubelet):
        self.plane, self.network, self.index, self.name = plane, network, index, f"node-{index}"
        self.folder, self.kubelet = folder / self.name, kubelet  # settings of the kubelet that differ
        self.programs, self.address = Programs(self.folder), network.node_address(index)
        self.folder.mkdir()
        self.gpus, self.host = Devices(GPU, gpus, self.folder), Devices(HOST, 100, self.folder)
        self.group = group_name(network.number, index)

    def launch(self, others: list[int]) -> None:
        "Its network and containerd"
        self.programs.start_namespace(self.network.add_node(self.index, others), self.folder / "kubelet")
        make_group(self.group)
        self._write_network()
        text = CONTAINERD.format(folder=self.folder, cni=CNI, pause=PAUSE)
        (self.folder / "containerd.toml").write_text(text)
        self.start("containerd", "-c", self.folder / "containerd.toml")

    def load(self, images: list[Path]) -> None:
        "Images, as if they had been pulled"
        self.programs.wait("containerd", lambda: self.ctr("version", check=False).returncode == 0)
        for image in images:
            self.ctr("images", "import", image)

    def join(self) -> None:
        "The programs of Kubernetes"
        self.start_kubelet()
        for devices in (self.gpus, self.host):
            plugin, *flags = devices.command(self.folder / "kubelet" / "device-plugins")
            name = f"plugin-{devices.resource.partition('/')[2]}"
            self.programs.start(name, plugin, *flags)
        self._start_proxy()

    def start(self, name: str, *arguments: str | Path) -> None:
        self.programs.start(name, program(name), *arguments)

    def start_kubelet(self) -> None:
        "The kubelet, again after `stop`"
        account = self.plane.kubeconfig(f"system:node:{self.name}")
        flags = {"config": self._write_kubelet(), "kubeconfig": account, "hostname-override": self.name}
        flags |= {"root-dir": self.folder / "kubelet", "cert-dir": self.folder, "node-ip": self.address}
        self.start("kubelet", *(f"--{flag}={value}" for flag, value in flags.items()))

    def is_ready(self) -> bool:
        "Whether pods can run here, with its devices"
        try:
            status = self.plane.api().get("nodes", "", self.name)["status"]
        except ApiError:
            return False
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"])
        return ready and {GPU, HOST} <= status["capacity"].keys()

    def ctr(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        "Asks containerd, such as `ctr('containers', 'ls').stdout`"
        line = [program("ctr"), "-a", self.folder / "containerd.sock", "-n", "k8s.io", *arguments]
        return subprocess.run(list(map(str, line)), capture_output=True, text=True, check=check)

    def _write_network(self) -> None:
        "Pods are routed, not bridged: so NetworkPolicies hold between those of one node, too"
        addresses = {"ranges": [[{"subnet": self.network.pods_of(self.index)}]], "routes": [{"dst": "0.0.0.0/0"}]}
        addresses |= {"type": "host-local", "dataDir": str(self.folder / "addresses")}
        plugins = [{"type": "ptp", "ipam": addresses}, {"type": "portmap", "capabilities": {"portMappings": True}}]
        (self.folder / "cni").mkdir()
        file = self.folder / "cni" / "10-pods.conflist"
        file.write_text(json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}))

    def _write_kubelet(self) -> Path:
        certificate, key = sign(self.plane, self.name, f"/O=system:nodes/CN=system:node:{self.name}", self.address)
        resolver = self.folder / "resolv.conf"
        resolver.write_text("")
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {"x509": {"clientCAFile": str(self.plane.certificate)}, "anonymous": {"enabled": False}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "containerRuntimeEndpoint": f"unix://{self.folder}/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.group}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDNS": [self.network.service(10)],
            "clusterDomain": "cluster.local",
            "resolvConf": str(resolver),
            "podLogsDir": str(self.folder / "logs"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "nodeLeaseDurationSeconds": LIFETIME,
            "nodeStatusUpdateFrequency": "2s",
            "evictionHard": EVICTION,
            "imageGCHighThresholdPercent": 100,
            **self.kubelet,
        }
        file = self.folder / "kubelet.json"
        file.write_text(json.dumps(config))
        return file

    def _start_proxy(self) -> None:
        "Services"
        flags = {"kubeconfig": self.plane.kubeconfig("system:kube-proxy"), "hostname-override": self.name}
        flags |= {"proxy-mode": "iptables", "cluster-cidr": self.network.pods, "conntrack-max-per-core": 0}
        flags |= {"conntrack-tcp-timeout-established": 0, "conntrack-tcp-timeout-close-wait": 0}
        self.start("kube-proxy", *(f"--{flag}={value}" for flag, value in flags.items()))

    def start_router(self) -> None:
        "NetworkPolicies, once the node is known"
        flags = {"kubeconfig": self.plane.kubeconfig("kube-router"), "hostname-override": self.name}
        flags |= {"run-firewall": "true", "run-router": "false", "run-service-proxy": "false"}
        flags |= {"service-cluster-ip-range": self.network.services, "health-port": 0, "metrics-port": 0}
        self.start("kube-router", *(f"--{flag}={value}" for flag, value in flags.items()))
