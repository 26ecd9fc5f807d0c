"GPUs of a node by Dynamic Resource Allocation, beside those of its device plugin"

from tests.cluster.nodes.devices import Devices
from tests.cluster.nodes.node import Node
from tests.cluster.programs import program

NAME, VARIABLE = "gpu.gpuml.test", "GPUML_TEST_CLAIMED"


class Driver(Devices):
    "What a node offers in ResourceSlices: how many devices there are, and what a container finds with them"

    def __init__(self, node: Node, count: int):
        super().__init__(NAME, count, node.folder)
        self.node = node

    def start(self) -> "Driver":
        "With the node's own account, in its network"
        account = self.node.plane.kubeconfig(f"system:node:{self.node.name}")
        flags = {"kubeconfig": account, "node": self.node.name, "name": NAME, "variable": VARIABLE, "state": self.state}
        self.node.programs.start("driver", program("gpu-plugin"), "driver", *(f"-{f}={v}" for f, v in flags.items()))
        return self

    def stop(self) -> None:
        self.node.programs.stop("driver")
