"The delivery's last step, by its own script, on a real control plane: submits once, with the image's digest, and leaves no key"

import pytest

from tests.s3 import KEY, SECRET
from tests.test_docker import DIGEST, as_runner, step

IMAGE = f"ghcr.io/some-one/gpuml-train@{DIGEST}"


@pytest.fixture
def deliver(site):
    "Runs the step in the site's project, with a kubeconfig's text"

    def run(kubeconfig: str):
        environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": site.s3.endpoint}
        environment |= {"GITHUB_REF_NAME": "v1.0-RC_1"}
        done = as_runner(
            step("deliver.yml", "submit", "Submit"), site.folder, KUBECONFIG_TEXT=kubeconfig, IMAGE=IMAGE, **environment
        )
        assert not (site.folder / "kubeconfig").exists()
        assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_the_same_tag_submits_once(site, deliver):
    text = site.cluster.plane.kubeconfig("admin", site.namespace).read_text()
    first, second = deliver(text), deliver(text)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    (job,) = site.cluster.admin.get("jobs", site.namespace)["items"]
    name = job["metadata"]["name"]
    assert name == "prod-v1-0-rc-1"
    assert name in first.stdout and name in second.stdout and "--again" in second.stdout
    pod = site.cluster.wait_pod(site.namespace, name, lambda pod: True)
    assert [c["image"] for c in pod["spec"]["containers"]] == [IMAGE]
    site.cluster.admin.delete("jobs", site.namespace, name, propagationPolicy="Background")


WRONG = {
    "not set": ("", "✗ cluster: "),
    "no kubeconfig": ("c2VjcmV0", "kubeconfig is no kubeconfig ("),
    "cut off": ("apiVersion: v1\nclusters: [{name: a", "kubeconfig is no kubeconfig ("),
    "an old key": (None, "does not accept your login"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kubeconfig(site, deliver, case):
    text, said = WRONG[case]
    if text is None:
        good = site.cluster.plane.kubeconfig("admin", site.namespace).read_text()
        text = good.replace(site.cluster.plane.tokens["admin"], "expired")
    done = deliver(text)
    assert done.returncode not in (0, 1) and said in done.stderr, done.stderr
    assert not site.cluster.admin.get("jobs", site.namespace)["items"]
