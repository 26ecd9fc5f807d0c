"""The images of the tests, a few MB, made without a registry or a builder: archives that containerd imports.

What is in them is busybox and places for what the host brings. Who asks for a device of the tests (a GPU, or
`gpuml.test/host`) finds the host's Python, libraries and this checkout where they are on the host, read-only.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

from tests.cluster.nodes.machine import run
from tests.cluster.programs import CACHE
from tests.conftest import ROOT

TRAIN = "docker.io/library/gpuml-train:test"
REGISTRY = "registry.example.com/gpuml-train:0.1.0"  # the same, as the policies of k8s/ let it in
PAUSE = "registry.k8s.io/pause:tests"  # holds a pod's network
HOLDS = ["/bin/sleep", "2147483647"]  # its command
FOLDERS = ["bin", "dev", "etc", "proc", "run", "sys", "tmp", "usr", "usr/lib", "usr/lib64", "var", "var/run", "work"]
LINKS = {"lib": "usr/lib", "lib64": "usr/lib64"}
USERS = {  # as in docker/Dockerfile
    "etc/passwd": "root:x:0:0:root:/:/bin/sh\ngpuml:x:10001:10001::/work:/bin/sh\n",
    "etc/group": "root:x:0:\ngpuml:x:10001:\n",
}


def host_paths() -> list[str]:
    "What a container needs of this machine to run gpuml: folders and files, none inside another"
    environment, python = Path(sys.prefix), Path(sys.base_prefix)
    paths = [ROOT, environment, environment.resolve(), python, CACHE.resolve()]
    paths += [Path("/usr/lib"), Path("/usr/lib64"), Path("/etc/ld.so.cache")]
    real = {str(path) for path in paths if path.exists() and not path.is_symlink()}
    return sorted(path for path in real if not any(path.startswith(f"{other}/") for other in real))


def write_images(folder: Path) -> list[Path]:
    "The image of jobs and services, and the one that holds a pod's network"
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": "/work", "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    layer = _layer()
    train, pause = folder / "train.tar", folder / "pause.tar"
    _write_image(train, [TRAIN, REGISTRY], layer, {"Cmd": ["/bin/sh"], "User": "10001:10001", "Env": environment})
    _write_image(pause, [PAUSE], layer, {"Entrypoint": HOLDS, "User": "65535:65535", "Env": {}})
    return [train, pause]


def _layer() -> bytes:
    "A file system, as an archive"
    content = io.BytesIO()
    busybox = Path(shutil.which("busybox")).read_bytes()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in FOLDERS:
            _add(archive, name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        for name, target in LINKS.items():
            _add(archive, name, tarfile.SYMTYPE, target=target)
        _add(archive, "bin/busybox", tarfile.REGTYPE, busybox, 0o755)
        for applet in run("busybox", "--list").split():
            if applet != "busybox":
                _add(archive, f"bin/{applet}", tarfile.SYMTYPE, target="busybox")
        for name, text in USERS.items():
            _add(archive, name, tarfile.REGTYPE, text.encode(), 0o644)
    return content.getvalue()


def _add(archive, name: str, kind: bytes, content: bytes = b"", mode: int = 0o777, target: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = kind, mode
    entry.size, entry.linkname = len(content), target
    archive.addfile(entry, io.BytesIO(content))


def _write_image(file: Path, names: list[str], layer: bytes, settings: dict) -> None:
    "An archive as `docker save` writes one"
    settings = {**settings, "Env": [f"{key}={value}" for key, value in settings["Env"].items()]}
    layers = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    config = json.dumps({"architecture": _architecture(), "os": "linux", "config": settings, "rootfs": layers}).encode()
    place = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": place, "RepoTags": names, "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(file, "w") as archive:
        for name, content in {place: config, "layer.tar": layer, "manifest.json": manifest}.items():
            _add(archive, name, tarfile.REGTYPE, content, 0o644)


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
