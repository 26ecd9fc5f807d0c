"tests/cluster/build.sh with a Go that compiles nothing: what is made anew, and what a build that ends early leaves"

import fcntl
import os
import subprocess
import time

import pytest

from tests.conftest import ROOT
from tests.waiting import until

GO = """\
#!/bin/sh
case "$1 $2" in
    "env GOVERSION") echo go1.99.0 ;;
    "env GOMODCACHE") echo /none ;;
    "env GOPROXY") echo off ;;
    build*)
        while [ "$1" != -o ]; do shift; done
        echo "$1 $2" >> "$LOG"
        [ ! -e "$LOG.slow" ] || exec sleep 600
        [ ! -e "$LOG.broken" ] || { echo "main.go:1: no such thing"; exit 1; }
        echo a program > "$2" ;;
esac
"""


@pytest.fixture
def build(tmp_path):
    "A function that starts it on a copy of its folder; what it makes is in `tmp_path`/cache/gpuml-tests/servers"
    for folder in ("bin", "cluster", "cache"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bin" / "go").write_text(GO)
    (tmp_path / "bin" / "go").chmod(0o755)
    subprocess.run(
        ["cp", "-r", ROOT / "tests/cluster/build.sh", ROOT / "tests/cluster/servers", tmp_path / "cluster"], check=True
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {
        "PATH": path,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LOG": str(tmp_path / "log"),
    }

    def start(*words):
        command = [tmp_path / "cluster" / "build.sh", *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)

    return start


def made(tmp_path) -> list[str]:
    "The programs in the cache"
    return sorted(p.name for p in (tmp_path / "cache/gpuml-tests/servers").iterdir() if not p.name.startswith("."))


def finish(process) -> str:
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return said


def test_only_what_is_missing_or_changed_is_built(build, tmp_path):
    assert "etcd (1 of 2)" in finish(build("etcd", "kubelet")) and made(tmp_path) == ["etcd", "kubelet"]
    assert finish(build("etcd", "kubelet")) == ""
    (tmp_path / "cache/gpuml-tests/servers/kubelet").unlink()
    assert "kubelet (1 of 1)" in finish(build("etcd", "kubelet"))
    with open(tmp_path / "cluster/servers/etcd/go.mod", "a") as file:
        file.write("\n")
    assert "etcd (1 of 1)" in finish(build("etcd", "kubelet"))
    old = tmp_path / "cache/gpuml-tests/servers"
    (old / ".stamps" / "gone").touch()
    (old / "gone").touch()
    (old / "another's").touch()
    finish(build("etcd"))
    assert made(tmp_path) == ["another's", "etcd", "kubelet"]


def test_a_build_that_fails_or_is_stopped_leaves_what_was_there(build, tmp_path):
    finish(build("etcd"))
    folder = tmp_path / "cache/gpuml-tests/servers"
    (folder / "etcd").write_text("the old one")
    (folder / ".stamps" / "etcd").unlink()
    (tmp_path / "log.broken").touch()
    broken = build("etcd")
    assert "main.go:1: no such thing" in (said := broken.communicate(timeout=600)[1]) and broken.returncode == 1, said
    (tmp_path / "log.broken").unlink()
    (tmp_path / "log.slow").touch()
    slow = build("etcd")
    until(lambda: (tmp_path / "log").read_text().count("etcd") == 3)
    os.killpg(slow.pid, 15)
    slow.wait(600)
    assert (folder / "etcd").read_text() == "the old one" and not list(folder.glob(".build.*"))
    (tmp_path / "log.slow").unlink()
    finish(build("etcd"))
    assert (folder / "etcd").read_text() == "a program\n"


def test_two_builds_wait_for_each_other(build, tmp_path):
    folder = tmp_path / "cache/gpuml-tests/servers"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = build("etcd")
        assert "another build is under way" in waiting.stderr.readline()
        time.sleep(0.1)
        assert waiting.poll() is None and made(tmp_path) == []
    assert "ready in" in finish(waiting)


def test_what_it_does_not_know(build):
    process = build("no-such-program")
    assert "unknown: no-such-program" in process.communicate(timeout=600)[1] and process.returncode == 1
