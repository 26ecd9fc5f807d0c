"The programs of real nodes: each with a log, in a node's network or in this machine's"

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.nodes.machine import search_path

HOLD = """
for place in /var/lib /var/log /run; do
    mkdir -p "$1$place/upper" "$1$place/work"
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$1$place/upper,workdir=$1$place/work" "$place"
done
mkdir -p /var/lib/kubelet "$2"
mount --bind "$2" /var/lib/kubelet
touch "$1/ready"
exec sleep infinity
"""


class Programs:
    "Running programs by name, of one node. They end with the thread that starts them, in every case"

    def __init__(self, folder: Path):
        self.folder, self.running, self.entry = folder, {}, []

    def start_namespace(self, network: str, kubelet: Path) -> None:
        """Where the others run from then on: in a network, and with folders of their own at places that kubelets and
        containerds share, such as /var/lib/kubelet. (`ip netns exec` would give them a /sys without cgroups.)"""
        self.entry = ["nsenter", f"--net=/run/netns/{network}", "unshare", "--mount"]
        self.start("namespace", "sh", "-ec", HOLD, "sh", self.folder / "own", kubelet)
        self.wait("namespace", (self.folder / "own" / "ready").exists)
        self.entry[2:] = [f"--mount=/proc/{self.running['namespace'].pid}/ns/mnt", f"--wdns={self.folder}"]

    def start(self, name: str, *command: str | Path) -> None:
        line = ["setpriv", "--pdeathsig", "KILL", *self.entry, *map(str, command)]
        environment = {**os.environ, "PATH": f"{Path(command[0]).parent}:{search_path()}"}
        with open(self.log(name), "a") as log:
            self.running[name] = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True, env=environment)

    def stop(self, name: str) -> None:
        "At once, as if it had failed"
        self.running[name].kill()
        self.running.pop(name).wait(600)

    def stop_all(self) -> None:
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait(600)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def wait(self, name: str, ready: Callable[[], bool], seconds: float = 600) -> None:
        "Until a program is ready; where it has ended or takes too long, its log says why"
        end = time.monotonic() + seconds
        while not ready():
            ended = self.running[name].poll() is not None
            if ended or time.monotonic() > end:
                text = self.log(name).read_text()[-3000:]
                raise RuntimeError(f"{name} {'ended' if ended else 'is not ready'}; its log ends\n{text}")
            time.sleep(0.05)
