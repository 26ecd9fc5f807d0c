"What real nodes need of a machine, and what they change on it"

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CNI = Path("/usr/lib/cni")
COMMANDS = ["ip", "nsenter", "openssl", "runc", "iptables", "ipset", "conntrack", "busybox"]
PLUGINS = ["ptp", "host-local", "loopback", "portmap"]
CHANGED = [  # by kubelets, for the whole machine
    *("vm.overcommit_memory", "vm.panic_on_oom", "kernel.panic", "kernel.panic_on_oops"),
    *("kernel.keys.root_maxkeys", "kernel.keys.root_maxbytes"),
]


def run(*command: str | Path, check: bool = True) -> str:
    "What a command prints; where it may fail, nothing is raised"
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def lacks() -> str:
    "Why there can be no real nodes on this machine, in a line; empty where they can be"
    if os.geteuid() != 0:
        return "real nodes need root"
    absent = [name for name in COMMANDS if not shutil.which(name)]
    absent += [f"{CNI}/{name}" for name in PLUGINS if not (CNI / name).exists()]
    if absent:
        return f"real nodes need {', '.join(absent)}: `make nodes` installs them"
    if not os.access("/sys/fs/cgroup", os.W_OK) or not groups():
        return "real nodes need cgroups that may be written"
    return _network_lacks() or _overlay_lacks()


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
    with tempfile.TemporaryDirectory() as folder:
        lower, upper, work, merged = (Path(folder) / name for name in ("lower", "upper", "work", "merged"))
        for path in (lower, upper, work, merged):
            path.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        try:
            run("mount", "-t", "overlay", "overlay", "-o", options, merged)
        except RuntimeError:
            return f"real nodes need overlayfs, which {folder} can't have"
        run("umount", merged)
    return ""


def groups() -> list[Path]:
    "The roots of the cgroup hierarchies: one for each controller of version 1, one for all of version 2"
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root]
    return sorted({path.resolve() for path in root.iterdir() if (path / "cgroup.procs").exists()})


def make_group(name: str) -> None:
    "A cgroup in each hierarchy, which may give out what the machine has"
    for root in groups():
        (root / name).mkdir(exist_ok=True)
        for amount in ("cpuset.cpus", "cpuset.mems"):  # of version 1, where a new one has none
            if (root / amount).exists() and not (root / "cgroup.controllers").exists():
                (root / name / amount).write_text((root / amount).read_text())
        if (root / "cgroup.controllers").exists():
            controllers = (root / "cgroup.controllers").read_text().split()
            (root / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


def processes_in(group: str) -> set[int]:
    "Processes of a cgroup and of those below it"
    files = [file for root in groups() for file in (root / group).rglob("cgroup.procs")]
    return {int(pid) for file in files for pid in file.read_text().split()}


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
