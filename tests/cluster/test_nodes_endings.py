"Ends of attempts in real containers: by the kernel's memory limit, by a disk that is full, by a node that is short"

import pytest

from tests.cluster.cluster import phase
from tests.cluster.nodes.node import EVICTION
from tests.cluster.nodes.scene import on, own_nodes

HOARD = "hoard = []\nwhile True: hoard.append(b'x' * 10**7)"
CHILD = f"""\
import subprocess, sys
from gpuml.base.process import count_oom_kills
print('begins', count_oom_kills())
code = subprocess.run([sys.executable, '-c', {HOARD!r}]).returncode
print('child', code, 'of', count_oom_kills())
sys.exit(71 if count_oom_kills() else 70)
"""
SAVES = "trap 'printf saved > /dev/termination-log; exit 75' TERM; while :; do sleep 0.1; done"
ENDS = {  # what runs in the place of training; the exit code, the sentence, and settings
    "memory": (["python", "-c", HOARD], 137, "killed: it needed more memory than compute.memory=128Mi; give it more, or a smaller data.max_length"),
    "memory-of-a-child": (["python", "-c", CHILD], 71, "killed: it needed more memory than compute.memory=128Mi; give it more, or a smaller data.max_length"),
    "no-command": (["gpuml-nowhere"], 128, 'the container can\'t be started: exec: "gpuml-nowhere": executable file not found in $PATH (exit code 128)'),
    "no-file": (["/opt/nowhere/gpuml"], 128, 'the container can\'t be started: exec: "/opt/nowhere/gpuml": stat /opt/nowhere/gpuml: no such file or directory (exit code 128)'),
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(scene):
    "All of them, started at the same time"
    return {name: scene.start(name, command) for name, (command, _, _) in ENDS.items()}


@pytest.mark.parametrize("name", ENDS)
def test_an_attempt_ends(scene, ended, name):
    _, code, sentence = ENDS[name]
    state = scene.ends(ended[name])
    assert state.phase == "failed" and state.exit_code == code, state
    assert state.why.removeprefix("gave up after 1 failure; the last: ").startswith(sentence), state.why
    assert state.attempts == 1
    if name == "memory-of-a-child":  # the attempt outlives its kernel here, and can tell why that died
        assert ended[name].logs() == "begins 0\nchild -9 of 1\n"


@pytest.fixture(scope="module")
def strict(real):
    "A node whose kubelet looks at volumes every second"
    with own_nodes(real, 1, volumeStatsAggPeriod="1s", evictionPressureTransitionPeriod="1s") as (node,):
        yield node


FULL = {  # what is written; the sentence
    "a-volume": ("head -c 80000000 /dev/zero > /work/x", "it wrote more into the volume work than compute.disk=64Mi; give it more"),
    "all-volumes": ("for place in /work /tmp; do head -c 40000000 /dev/zero > $place/x; done", "it wrote more than compute.disk=64Mi; give it more"),
}  # fmt: skip


def test_evicted_for_its_disk(scene, strict):
    jobs = {name: scene.start(name, f"{write}; sleep 600", **on(strict)) for name, (write, _) in FULL.items()}
    for name, (_, sentence) in FULL.items():
        state = scene.ends(jobs[name], 90)
        assert state.phase == "failed" and state.why.endswith(sentence), state


def test_evicted_where_its_node_is_short(scene, strict, real):
    "What counts as short is raised while it runs; its checkpoint is saved, no retry used up, and it goes on afterwards"
    job = scene.start("short-of-memory", SAVES, **on(strict))
    real.wait_pod(scene.namespace, job.run_id, phase("Running"))
    before = strict.kubelet
    strict.kubelet = before | {"evictionHard": EVICTION | {"memory.available": "97%"}}
    restart(strict)
    state = scene.says(job, f"evicted: node {strict.name} was low on memory; saved (exit code 75); Kubernetes starts")
    assert state.phase == "waiting"
    strict.kubelet = before
    restart(strict)
    state = scene.says(job, "running", 90)
    assert state.attempts == 2 and not real.admin.get("jobs", scene.namespace, job.run_id)["status"].get("failed")
    job.cancel()


def restart(node):
    node.programs.stop("kubelet")
    node.start_kubelet()
