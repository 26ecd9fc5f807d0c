"Where the programs are that the tests' clusters are made of, and the manifests that go with them: `build.sh` makes them"

import os
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuml-tests" / "servers"
# of one version: GPUML_TEST_KUBERNETES may name another folder for them
KUBERNETES = {"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"}


class MissingServers(Exception):
    "A program or a manifest is not there, and what to do about it"


def program(name: str) -> str:
    "The path of a program, such as kubelet"
    if names := missing([name]):
        raise MissingServers(remedy(names))
    return str(_path(name))


def missing(names: Iterable[str]) -> list[str]:
    "Those programs that are not there"
    return [name for name in names if not os.access(_path(name), os.X_OK)]


def remedy(names: list[str]) -> str:
    "What to do about missing programs, in one line"
    other = os.environ.get("GPUML_TEST_KUBERNETES")
    if other and (lacking := [name for name in names if name in KUBERNETES]):
        return f"GPUML_TEST_KUBERNETES={other} has no {', '.join(lacking)}"
    return f"no {', '.join(names)} in {CACHE}: `make servers` builds what the tests need"


def manifests(name: str) -> Path:
    "A file or folder that a controller's module brings, such as kueue.yaml or prometheus-operator"
    path = CACHE / "manifests" / name
    if not path.exists():
        raise MissingServers(f"no {name} in {CACHE / 'manifests'}: `make servers` puts it there")
    return path


def _path(name: str) -> Path:
    other = os.environ.get("GPUML_TEST_KUBERNETES")
    return (Path(other) if other and name in KUBERNETES else CACHE) / name
