"What a test run has made on the machine: written down first, and removed at its end, or at the start of the next run"

import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil

from tests.cluster.nodes import machine, network

PATIENCE = 300.0  # seconds until killed processes are gone


def begin() -> tuple[Path, network.Network]:
    "This run's folder and network, after what killed runs have left is removed"
    with open(machine.runs().with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in machine.runs().iterdir():
            if not _is_alive(folder):
                clear(folder)
        return _write_down(os.getpid())


def _write_down(number: int) -> tuple[Path, network.Network]:
    others = [_written(folder) for folder in machine.runs().iterdir()]
    taken = {facts.get("block") for facts in others}
    block = next(b for i in range(network.BLOCKS) if (b := (number + i) % network.BLOCKS) not in taken)
    folder = machine.runs() / str(number)
    folder.mkdir()
    started = psutil.Process(number).create_time()
    settings = next((facts["settings"] for facts in others if "settings" in facts), None) or machine.settings()
    facts = {"started": started, "block": block, "settings": settings}  # as they were before any of the runs
    (folder / "run.json").write_text(json.dumps(facts))
    return folder, network.Network(number, block)


def clear(folder: Path) -> None:
    "Ends and removes all that a run has made, however far it came"
    facts = _written(folder)
    addresses = network.Network(int(folder.name), facts.get("block", 0))
    _end_processes(folder.name)
    for point in machine.mounts_below(folder):
        machine.run("umount", "-l", point, check=False)
    addresses.remove()
    for group in _groups(folder.name):
        machine.remove_group(group)
    machine.restore(facts.get("settings", {}))
    if left := machine.mounts_below(folder):  # what is mounted would be deleted where it comes from
        raise RuntimeError(f"still mounted: {', '.join(left)}")
    shutil.rmtree(folder)


def group_name(number: int | str, index: int | str) -> str:
    "The cgroup of a node's pods"
    return f"gpuml-{number}-{index}"


def _groups(number: str) -> set[str]:
    return {path.name for root in machine.groups() for path in root.glob(group_name(number, "*"))}


def _processes(number: str) -> set[int]:
    "Those in a node's network, such as containerd and its shims, and those of pods"
    namespaces = [path.name for path in Path("/run/netns").glob(f"gpuml-{number}-*")]
    inside = [network.processes_in(name) for name in namespaces]
    return set().union(*inside, *(machine.processes_in(group) for group in _groups(number)))


def _end_processes(number: str) -> None:
    end = time.monotonic() + PATIENCE
    while pids := _processes(number):
        if time.monotonic() > end:
            raise RuntimeError(f"processes of real nodes do not end: {sorted(pids)}")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def _written(folder: Path) -> dict:
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def _is_alive(folder: Path) -> bool:
    "Whether the process that made a folder is there; another one may have its number by now"
    try:
        return abs(psutil.Process(int(folder.name)).create_time() - _written(folder).get("started", 0)) < 1
    except psutil.NoSuchProcess:
        return False
