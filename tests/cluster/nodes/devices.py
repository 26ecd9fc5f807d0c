"What a node's device plugins offer: GPUs, and the host's Python environment alone"

import json
from pathlib import Path

from tests.cluster.nodes.image import host_paths
from tests.cluster.programs import program

GPU, HOST = "nvidia.com/gpu", "gpuml.test/host"  # `HOST`: for services of the tests that need no GPU
VARIABLES = {GPU: "NVIDIA_VISIBLE_DEVICES", HOST: "GPUML_TEST_HOST"}


class Devices:
    "One resource of one node, by a device plugin: how many devices there are, and whether they are well"

    def __init__(self, resource: str, count: int, folder: Path):
        self.resource, self.state, self.mounts = resource, folder / f"{resource.replace('/', '-')}.json", host_paths()
        self.set(count)

    def set(self, healthy: int, unhealthy: int = 0) -> None:
        "So many from now on; the kubelet hears of it within a second"
        states = ["Healthy"] * healthy + ["Unhealthy"] * unhealthy
        text = json.dumps({"devices": {f"gpu-{i}": state for i, state in enumerate(states)}, "mounts": self.mounts})
        new = self.state.with_suffix(".new")
        new.write_text(text)
        new.rename(self.state)

    def command(self, sockets: Path) -> list[str | Path]:
        "The plugin, for a kubelet whose sockets are in that folder"
        flags = {"folder": sockets, "resource": self.resource, "variable": VARIABLES[self.resource]}
        flags["state"] = self.state
        return [program("gpu-plugin"), "plugin", *(f"-{flag}={value}" for flag, value in flags.items())]
