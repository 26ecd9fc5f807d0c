"Containers that an administrator's webhook puts into a job's pod: native sidecars, init containers, and others beside it"

import pytest

from tests.cluster.nodes.image import TRAIN
from tests.cluster.nodes.scene import COMPUTE

DONE = "sleep 2; printf 'all cells are done' > /dev/termination-log"
MENDS = "an administrator mends what injects it"


def injected(name, command, image=TRAIN, **more):
    "An init container"
    command = ["sh", "-c", command] if isinstance(command, str) else command
    container = {"name": name, "image": image, "command": command, "terminationMessagePolicy": "FallbackToLogsOnError"}
    return lambda pod: pod.setdefault("initContainers", []).append(container | more)


def sidecar(command, image=TRAIN):
    "A native one"
    return injected("proxy", command, image, restartPolicy="Always")


def beside(command):
    "A container as webhooks put it there before there were native sidecars"
    container = {"name": "logger", "image": TRAIN, "command": ["sh", "-c", command]}
    return lambda pod: pod["containers"].append(container)


STATES = {  # what is put into the pod; a state that the job comes to, and its sentence
    "sidecar-image": (sidecar("true", "Registry/Proxy:1"), "pending", f"waits for its sidecar proxy: its image can't be pulled: the name is not valid (Registry/Proxy:1: invalid reference format: repository name (Proxy) must be lowercase); {MENDS}"),
    "sidecar-no-server": (sidecar("true", "localhost:9/proxy:1"), "pending", "waits for its sidecar proxy: its image can't be pulled: localhost:9 does not answer (localhost:9/proxy:1: "),
    "sidecar-command": (sidecar(["/nowhere"]), "pending", f'waits for its sidecar proxy: it can\'t be started: exec: "/nowhere": stat /nowhere: no such file or directory; {MENDS}'),
    "sidecar-deaf": (sidecar("trap '' TERM; while :; do sleep 0.1; done"), "succeeded", ""),
    "init-fails": (injected("setup", "echo no such host; exit 3"), "failed", "its init container setup failed (exit code 3: no such host)"),
    "init-hangs": (injected("setup", "sleep 600"), "pending", "its init container setup has not ended yet"),
    "init-memory": (injected("setup", "x=a; while :; do x=$x$x; done", resources={"limits": {"memory": "20Mi"}}), "failed", "its init container setup failed (OOMKilled, exit code 137)"),
    "beside-fails": (beside("exit 4"), "succeeded", "beside it logger (exit code 4) ended"),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(scene):
    "All at the same time"
    return {name: scene.start(name, DONE, edit) for name, (edit, _, _) in STATES.items()}


@pytest.mark.parametrize("name", STATES)
def test_what_is_said_of_an_injected_container(scene, jobs, name):
    _, phase, sentence = STATES[name]
    state = scene.ends(jobs[name]) if phase == "succeeded" else scene.says(jobs[name], sentence or phase)
    assert state.phase == phase and state.why.removeprefix("gave up after 1 failure; the last: ").startswith(sentence)
    if phase == "succeeded":
        assert state.exit_code == 0


def test_a_native_sidecar_does_not_hold_the_gpu(scene, jobs, real):
    "It is told to end when training has, and killed after the pod's grace"
    scene.ends(jobs["sidecar-deaf"])
    assert real.wait_job(scene.namespace, "sidecar-deaf", COMPUTE["grace"] + 20) == "Complete"
