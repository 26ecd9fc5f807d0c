"What containerd 2.4, runc and the kubelet of Kubernetes 1.37 say, taken from real nodes, and what is made of it"

import pytest

from gpuml.cluster.ending import ending
from gpuml.cluster.pod import end_of, failed_beside, outside_cause, pending_cause
from gpuml.cluster.runtime import pull_failure

STARTED = "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
PULLS = {  # an image; what is said of it, what is told, and what to do
    "localhost:5000/gpuml-train:2": (
        'Failed to pull image "localhost:5000/gpuml-train:2": failed to pull and unpack image "localhost:5000/gpuml-train:2": failed to resolve image: localhost:5000/gpuml-train:2: not found',
        "localhost:5000 has no such image (localhost:5000/gpuml-train:2: not found)", "check compute.image",
    ),
    "127.0.0.1:9/gpuml-train:401": (
        'Failed to pull image "127.0.0.1:9/gpuml-train:401": failed to pull and unpack image "127.0.0.1:9/gpuml-train:401": failed to resolve image: failed to do request: Head "https://127.0.0.1:9/v2/gpuml-train/manifests/401": dial tcp 127.0.0.1:9: connect: connection refused',
        "127.0.0.1:9 does not answer (127.0.0.1:9/gpuml-train:401: dial tcp 127.0.0.1:9: connect: connection refused)", "check compute.image, or an administrator looks at the registry",
    ),
    "registry.example.com/gpuml-train:9.9": (
        'failed to pull and unpack image "registry.example.com/gpuml-train:9.9": failed to resolve image: failed to do request: Head "https://registry.example.com/v2/gpuml-train/manifests/9.9": dial tcp: lookup registry.example.com on 10.255.255.53:53: read udp 10.67.192.12:54120->10.255.255.53:53: i/o timeout',
        "registry.example.com does not answer (registry.example.com/gpuml-train:9.9: dial tcp: lookup registry.example.com on 10.255.255.53:53: read udp 10.67.192.12:54120->10.255.255.53:53: i/o timeout)", "check compute.image, or an administrator looks at the registry",
    ),
    "Registry/UPPER:x": (
        'Failed to apply default image tag "Registry/UPPER:x": couldn\'t parse image name "Registry/UPPER:x": invalid reference format: repository name (UPPER) must be lowercase',
        "the name is not valid (Registry/UPPER:x: invalid reference format: repository name (UPPER) must be lowercase)", "check compute.image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("image", PULLS)
def test_an_image_that_can_not_be_pulled(image):
    message, cause, cure = PULLS[image]
    failure = pull_failure(message, image)
    assert (failure.cause, failure.cure) == (cause, cure)


def test_the_event_that_says_least_does_not_hide_the_cause():
    "A kubelet's latest event is the bare state, and so is what its status says between two tries"
    image = "127.0.0.1:9/gpuml-train:401"
    message, cause, cure = PULLS[image]
    status = {
        "name": "train",
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{image}"'}},
    }
    pod = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "train", "image": image}]}, "status": {"containerStatuses": [status]}}  # fmt: skip
    events = [("Pulling", f'Pulling image "{image}"'), ("Failed", message), ("Failed", "Error: ErrImagePull")]
    events += [("BackOff", f'Back-off pulling image "{image}"'), ("Failed", "Error: ImagePullBackOff")]
    assert pending_cause(pod, events) == f"image can't be pulled: {cause}; {cure}"


@pytest.mark.parametrize(
    "words", ['exec: "gpuml-nowhere": executable file not found in $PATH', 'exec: "/usr/lib": permission denied']
)
def test_a_container_that_can_not_be_started(words):
    end = {"exitCode": 128, "reason": "StartError", "message": STARTED + words}
    assert ending(end, {}) == f"the container can't be started: {words} (exit code 128)"


def native(waiting, last):
    "A pod with a native sidecar that is started again and again"
    sidecar = {"name": "proxy", "restartPolicy": "Always", "image": "proxy:1"}
    status = {"name": "proxy", "state": {"waiting": waiting}, "lastState": {"terminated": last}}
    running = {"name": "train", "state": {"running": {}}}
    spec = {"initContainers": [sidecar], "containers": [{"name": "train"}]}
    status = {"phase": "Pending", "initContainerStatuses": [status], "containerStatuses": [running]}
    return {"metadata": {"name": "p"}, "spec": spec, "status": status}


BACK_OFF = {
    "reason": "CrashLoopBackOff",
    "message": "back-off 10s restarting failed container=proxy pod=n-nocmd-wxb49_t-3a8a39d6(1b8843ff)",
}


def test_a_sidecar_that_is_started_again_and_again_is_told_with_its_end():
    "The kubelet says how long it waits, and not why"
    words = 'exec: "/nowhere": stat /nowhere: no such file or directory'
    pod = native(BACK_OFF, {"exitCode": 128, "reason": "StartError", "message": STARTED + words})
    said = f"waits for its sidecar proxy: it can't be started: {words}; an administrator mends what injects it"
    assert pending_cause(pod, []) == said
    pod = native(BACK_OFF, {"exitCode": 3, "reason": "Error", "message": "no config\n"})
    assert failed_beside(pod) == "beside it proxy (exit code 3: no config) ends again and again"
    assert failed_beside(native({"reason": "PodInitializing"}, {})) == ""


def test_evicted_by_a_kubelet_that_has_just_started():
    status = {"phase": "Failed", "reason": "Evicted", "message": "The node had condition: [DiskPressure]. "}
    assert outside_cause({"spec": {"nodeName": "n1"}, "status": status}) == "evicted: node n1 was low on disk"


def test_a_container_that_was_lost_with_its_node():
    "As containerd reports one whose end it has not seen"
    end = {
        "exitCode": 255,
        "reason": "Unknown",
        "startedAt": "2026-11-28T18:05:59Z",
        "finishedAt": "2026-11-28T18:06:20Z",
    }
    pod = {"spec": {"nodeName": "n1"}, "status": {"phase": "Failed", "containerStatuses": [{"name": "train", "state": {"terminated": end}}]}}  # fmt: skip
    assert end_of(pod)["cause"] == "node n1 was started anew, and its container was lost (exit code 255)"
