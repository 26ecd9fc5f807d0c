"What real nodes need of a machine, and what they change on it"

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.cluster.programs import CACHE

PLACES = [Path(tempfile.gettempdir()) / "gpuml-nodes", CACHE.parent / "nodes"]
OTHERS = "others"  # the cgroup of all other processes of a container
CNI = Path("/usr/lib/cni")
COMMANDS = ["ip", "nsenter", "openssl", "runc", "iptables", "ipset", "conntrack", "busybox"]
PLUGINS = ["ptp", "host-local", "loopback", "portmap"]
CHANGED = [  # by kubelets, for the whole machine
    *("vm.overcommit_memory", "vm.panic_on_oom", "kernel.panic", "kernel.panic_on_oops"),
    *("kernel.keys.root_maxkeys", "kernel.keys.root_maxbytes"),
]


def search_path() -> str:
    "PATH, with the folders of programs for administrators"
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def run(*command: str | Path, check: bool = True) -> str:
    "What a command prints; where it may fail, nothing is raised"
    environment = {**os.environ, "PATH": search_path()}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def lacks() -> str:
    "Why there can be no real nodes on this machine, in a line; empty where they can be"
    if os.geteuid() != 0:
        return "real nodes need root"
    absent = [name for name in COMMANDS if not shutil.which(name, path=search_path())]
    absent += [f"{CNI}/{name}" for name in PLUGINS if not (CNI / name).exists()]
    if absent:
        return f"real nodes need {', '.join(absent)}: `make nodes` installs them"
    return _groups_lack() or _network_lacks() or _overlay_lacks()


def _groups_lack() -> str:
    name = f"gpuml-trial-{os.getpid()}"
    try:
        make_group(name)
        remove_group(name)
    except OSError as error:
        return f"real nodes need cgroups that may be written: {error}"
    return "" if groups() else "real nodes need cgroups"


def _network_lacks() -> str:
    name = f"gt{os.getpid()}"
    try:
        run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}b")
        run("ip", "link", "del", name)
        run("ip", "link", "add", name, "type", "bridge")
        run("ip", "link", "del", name)
    except RuntimeError as error:
        return f"real nodes need networks of their own: {error}"
    return ""


def _overlay_lacks() -> str:
    return "" if runs() else f"real nodes need overlayfs, which {' and '.join(map(str, PLACES))} can't have"


@cache
def runs() -> Path | None:
    "Where each run has a folder: a place whose file system takes overlays, as that of a container often does not"
    return next((place for place in PLACES if _takes_overlays(place)), None)


def _takes_overlays(place: Path) -> bool:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        lower, upper, work, merged = (Path(folder) / name for name in ("lower", "upper", "work", "merged"))
        for path in (lower, upper, work, merged):
            path.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        try:
            run("mount", "-t", "overlay", "overlay", "-o", options, merged)
        except RuntimeError:
            return False
        run("umount", merged)
    return True


def groups() -> list[Path]:
    "The roots of the cgroup hierarchies: one for each controller of version 1, one for all of version 2"
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root]
    return sorted({path.resolve() for path in root.iterdir() if (path / "cgroup.procs").exists()})


def make_group(name: str) -> None:
    "A cgroup in each hierarchy, which may give out what the machine has"
    for root in groups():
        if (root / "cgroup.controllers").exists():
            _open_controllers(root)
        (root / name).mkdir(exist_ok=True)
        for amount in ("cpuset.cpus", "cpuset.mems"):  # of version 1, where a new one has none
            if (root / amount).exists() and not (root / "cgroup.controllers").exists():
                (root / name / amount).write_text((root / amount).read_text())


def _open_controllers(root: Path) -> None:
    "Version 2: groups below the root may limit things. In a container the root must have no processes of its own then"
    text = " ".join(f"+{name}" for name in (root / "cgroup.controllers").read_text().split())
    try:
        (root / "cgroup.subtree_control").write_text(text)
    except OSError:
        (root / OTHERS).mkdir(exist_ok=True)
        for pid in (root / "cgroup.procs").read_text().split():
            with suppress(OSError):  # it has ended
                (root / OTHERS / "cgroup.procs").write_text(pid)
        (root / "cgroup.subtree_control").write_text(text)


def processes_in(group: str) -> set[int]:
    "Processes of a cgroup and of those below it"
    pids = set()
    with suppress(FileNotFoundError):  # `rglob` itself: a group has gone while its parent was read
        for file in [file for root in groups() for file in (root / group).rglob("cgroup.procs")]:
            with suppress(OSError):  # the group of a container that has ended
                pids |= {int(pid) for pid in file.read_text().split()}
    return pids


def remove_group(name: str) -> None:
    for root in groups():
        below = sorted((path for path in (root / name).rglob("*") if path.is_dir()), reverse=True)
        for path in [*below, *filter(Path.exists, [root / name])]:
            path.rmdir()


def mounts_below(folder: Path) -> list[str]:
    "Mount points, the innermost first"
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True)


def settings() -> dict[str, str]:
    "Those settings of the kernel that kubelets change"
    files = {name: Path("/proc/sys", *name.split(".")) for name in CHANGED}
    return {name: file.read_text().strip() for name, file in files.items() if file.exists()}


def restore(values: dict[str, str]) -> None:
    "Settings of the kernel as they were"
    for name, value in values.items():
        Path("/proc/sys", *name.split(".")).write_text(value)
