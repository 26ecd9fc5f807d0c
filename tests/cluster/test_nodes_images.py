"Images that a node can't have, and one that it pulls, in the words of containerd and its kubelet"

import json
import sys

import pytest

from tests.cluster.nodes import registry
from tests.cluster.nodes.scene import on

PORT = 5000  # of a node's own loopback: others have their own
AT = f"localhost:{PORT}"
PULL_SECRETS = "compute.image_pull_secrets"
CAUSES = {  # the image; why, what containerd says itself, and what to do
    "not-there": (f"{AT}/gpuml-train:2", f"{AT} has no such image", "not found", "check compute.image"),
    "busy": (f"{AT}/busy/gpuml-train:1", "", "503 Service Unavailable", f"check compute.image and {PULL_SECRETS}"),
    "no-server": ("localhost:9/gpuml-train:1", "localhost:9 does not answer", "connection refused", "check compute.image, or an administrator looks at the registry"),
    "bad-name": (f"{AT}/GPU:1", "the name is not valid", "must be lowercase", "check compute.image"),
    "bad-digest": (f"{AT}/gpuml-train@sha256:12", "the name is not valid", "invalid reference format", "check compute.image"),
}  # fmt: skip


@pytest.fixture(scope="module")
def node(real):
    "One with a registry of its own"
    node = real.nodes["node-1"]
    program = [sys.executable, registry.__file__, str(PORT), str(real.images[0])]
    node.programs.start("registry", *program)
    yield node
    node.programs.stop("registry")


@pytest.fixture(scope="module")
def jobs(scene, node):
    return {name: scene.start(f"image-{name}", "true", image=image, **on(node)) for name, (image, *_) in CAUSES.items()}


@pytest.mark.parametrize("name", CAUSES)
def test_an_image_that_can_not_be_pulled(scene, jobs, name):
    image, cause, words, cure = CAUSES[name]
    state = scene.says(jobs[name], "image can't be pulled: " + cause)
    for _ in range(10):  # whichever of the kubelet's changing words are the latest
        assert state.phase == "pending" and state.why.endswith(f"; {cure}"), state.why
        assert all(part in state.why for part in (image, cause, words)), state.why
        state = jobs[name].status


def test_an_image_is_pulled_with_the_login_of_a_secret(scene, node, real):
    login = {"auths": {AT: dict(zip(("username", "password"), registry.LOGIN.split(":")))}}
    secret = {"metadata": {"name": "pull"}, "type": "kubernetes.io/dockerconfigjson"}
    real.admin.create("secrets", scene.namespace, secret | {"stringData": {".dockerconfigjson": json.dumps(login)}})
    image = f"{AT}/private/gpuml-train:1"
    job = scene.start("pulled", "echo it runs", image=image, image_pull_secrets=["pull"], **on(node))
    assert scene.ends(job).phase == "succeeded" and job.logs() == "it runs\n"
    events = real.events(scene.namespace, real.pods(scene.namespace, "pulled")[0]["metadata"]["name"])
    assert any(reason == "Pulled" and f'Successfully pulled image "{image}"' in words for reason, words in events)


def test_a_secret_that_is_not_there(scene, real):
    "It starts as soon as an administrator makes it"
    job = scene.start("no-secret", "true", s3_secret="keys")
    assert scene.says(job, "Secret keys is not in this namespace; an administrator makes it, or").phase == "pending"
    real.secret(scene.namespace, "keys", AWS_ACCESS_KEY_ID="a")
    scene.says(job, "Secret keys is missing key AWS_SECRET_ACCESS_KEY; an administrator adds it, or")
    real.admin.delete("secrets", scene.namespace, "keys")
    real.secret(scene.namespace, "keys", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    assert scene.ends(job).phase == "succeeded"
