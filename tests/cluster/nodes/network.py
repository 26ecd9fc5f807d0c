"A bridge on this machine, and networks for nodes, pods and services; a node is a network namespace on the bridge"

import ipaddress
from pathlib import Path

from tests.cluster.nodes.machine import run

BLOCKS = 512  # of addresses, so that test runs at the same time don't meet
FIRST = ipaddress.ip_address("10.64.0.0")


class Network:
    "The addresses of one test run, and what has them"

    def __init__(self, number: int, block: int):
        self.number, self.block, self.bridge = number, block, f"gb{number}"
        whole = ipaddress.ip_network((int(FIRST) + block * 2**14, 18))
        self.parts = list(whole.subnets(new_prefix=24))  # the first for nodes, those of pods from 16 on
        _, self.pods, self.services, _ = whole.subnets(new_prefix=20)
        self.host = str(self.parts[0][1])  # where the API server listens, and whatever else pods reach here

    def node_address(self, index: int) -> str:
        return str(self.parts[0][10 + index])

    def pods_of(self, index: int) -> str:
        "The addresses of a node's pods"
        return str(self.parts[16 + index])

    def namespace(self, index: int) -> str:
        return f"gpuml-{self.number}-{index}"

    def service(self, index: int) -> str:
        "An address for a Service"
        return str(self.services[index])

    def start(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.host}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        if _filters_bridges():  # as Docker has it, which lets nothing through then
            run("iptables", "-I", "FORWARD", *self._forwarded())

    def _forwarded(self) -> list[str]:
        return ["-i", self.bridge, "-o", self.bridge, "-j", "ACCEPT"]

    def add_node(self, index: int, others: list[int]) -> str:
        "The name of the network namespace of a new node; it and the others know the way to each other's pods"
        name, outside = self.namespace(index), f"gv{self.number}-{index}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", outside, "master", self.bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{self.node_address(index)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")
        run("ip", "-n", name, "route", "add", "default", "via", self.host)
        run("nsenter", f"--net=/run/netns/{name}", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        run("ip", "route", "replace", self.pods_of(index), "via", self.node_address(index))
        for other in others:
            self._route(index, other)
            self._route(other, index)
        return name

    def _route(self, index: int, other: int) -> None:
        name, address = self.namespace(index), self.node_address(other)
        run("ip", "-n", name, "route", "replace", self.pods_of(other), "via", address)

    def remove(self) -> None:
        "All of it; what is not there is no harm"
        for path in Path("/run/netns").glob(self.namespace("*")):
            run("ip", "netns", "del", path.name, check=False)
        if _filters_bridges():
            run("iptables", "-D", "FORWARD", *self._forwarded(), check=False)
        run("ip", "link", "del", self.bridge, check=False)


def _filters_bridges() -> bool:
    "Whether what a bridge passes on goes through the machine's iptables"
    return Path("/proc/sys/net/bridge/bridge-nf-call-iptables").exists()


def processes_in(namespace: str) -> set[int]:
    "Processes of a network namespace"
    return {int(pid) for pid in run("ip", "netns", "pids", namespace, check=False).split()}
