"`--after`: who waits holds nothing, starts once others have ended, and is started by an account that may do nothing else"

import copy
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from gpuml.base.errors import GpumlError
from gpuml.cluster import jobs as c
from gpuml.cluster.submission import prepare
from tests.cluster.api import Api, ApiError
from tests.cluster.applied import IMAGE, holding, made
from tests.cluster.site import Site
from tests.manifests import find, pod_of

IMAGED = f"compute.image={IMAGE}"


@pytest.fixture
def site(team, tidy, cluster, project, s3, monkeypatch):
    "A project whose jobs go to gpuml-dev, and whose user is the development user"
    site = Site(cluster, "gpuml-dev", project, s3, monkeypatch)
    site.write("dev", "gpuml-dev", 1)
    (project / "config" / "prod.yaml").unlink()
    monkeypatch.setenv("KUBECONFIG", str(cluster.plane.kubeconfig("dev-user", "gpuml-dev")))
    yield site
    cluster.admin.delete("secrets", "gpuml-dev", "gpuml-s3")


@pytest.fixture
def account(cluster, administrator, team):
    "The token of k8s/after's account"
    return administrator.token("gpuml-system", "after")


@contextmanager
def starting(cluster, team, token, folder):
    "The Deployment's own command, which looks more often; a list of what it says, line by line"
    (container,) = pod_of(find(team, "Deployment", "after"))["containers"]
    change = {"gpuml": f"{os.path.dirname(sys.executable)}/gpuml", "--every=10": "--every=1"}
    assert change.keys() <= set(container["command"])
    kubeconfig = folder / "after.kubeconfig"
    admin = cluster.plane.kubeconfig("admin", "gpuml-dev").read_text()
    kubeconfig.write_text(admin.replace(cluster.plane.tokens["admin"], token))
    process = subprocess.Popen(
        [change.get(word, word) for word in container["command"]],
        env={**os.environ, "KUBECONFIG": str(kubeconfig), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True).start()
    lease = "/apis/coordination.k8s.io/v1/namespaces/gpuml-dev/leases/gpuml-after"
    try:
        cluster.wait(lambda: "renewTime" in cluster.admin.request("GET", lease).json()["spec"], 60, "its first look")
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, lines
        assert (folder / "gpuml-after-alive").exists()


def updates(site, count, **more):
    "A job of the development user; `count` tells it from others"
    return site.submit(IMAGED, f"train.epochs={count}", of="dev", **more)


def test_jobs_wait_for_others_to_end(site, cluster, team, account, tmp_path):
    "One that is cancelled, one that succeeds; and without what starts them nothing is sent"
    first = updates(site, 300)
    site.why(first, "running", 90)
    with pytest.raises(GpumlError, match="what would start the job has never looked: an administrator"):
        updates(site, 1, after=first.run_id)
    assert len(cluster.admin.get("jobs", "gpuml-dev")["items"]) == 1
    with starting(cluster, team, account, tmp_path) as lines:
        second = updates(site, 1, after=first.run_id)
        assert f"waits for gpuml-dev/{first.run_id} (running" in second.note and "to end" in second.note, second.note
        third = updates(site, 2, after=second.run_id)
        fourth = updates(site, 3, after=f"{first.run_id},{third.run_id}")
        site.why(second, f"pending: waits for gpuml-dev/{first.run_id} (running, ends in about", 60)
        listed = repr(c.jobs([site.config(IMAGED, of="dev")]))
        assert f"waits for gpuml-dev/{second.run_id} (pending) to end, as --after asked" in listed, listed
        assert not cluster.pods("gpuml-dev", second.run_id)
        assert "changes nothing of it" in updates(site, 1, after=third.run_id).note
        assert fourth.cancel().phase == "cancelled"
        assert not any(": started, as " in line for line in lines)
        first.cancel()
        assert second.wait(300).phase == "succeeded", second.logs()
        assert third.wait(300).phase == "succeeded", third.logs()
    started = [line.split(":")[0] for line in lines if ": started, as " in line]
    assert started == [f"gpuml-dev/{second.run_id}", f"gpuml-dev/{third.run_id}"], lines
    times = [cluster.admin.get("jobs", "gpuml-dev", job.run_id)["status"] for job in (second, third)]
    assert times[0]["completionTime"] <= times[1]["startTime"]
    over = prepare(site.config(IMAGED, "train.epochs=4", of="dev"), site.notebook, after=second.run_id)
    assert f"✓ after: {second.run_id} has ended already, so nothing is waited for" in repr(over.findings)
    assert "suspend" not in over.manifest["spec"]
    near = prepare(site.config(IMAGED, "train.epochs=4", of="dev"), site.notebook, after=f"{second.run_id}x")
    assert f"did you mean '{second.run_id}'?" in near.findings.bad[0].text


def refusal(api, job, change):
    "What the server says against a change of a job; empty where it takes it"
    path = f"/apis/batch/v1/namespaces/{job['metadata']['namespace']}/jobs/{job['metadata']['name']}"
    try:
        api.request("PATCH", path, change, {"dryRun": "All"}, kind="application/merge-patch+json")
    except ApiError as error:
        return error.message
    return ""


START = {"spec": {"suspend": False}, "metadata": {"annotations": {"gpuml.io/after-uids": None}}}


def test_its_account_starts_jobs_and_does_nothing_else(team, tidy, cluster, administrator, account):
    "By the server's own answers; users may not start them"
    notes = {"gpuml.io/after": "gpuml-dev/x", "gpuml.io/after-uids": "u", "other": "note"}
    plain = holding(pod_of(made("dev")), "Job", "plain")
    waits = holding(pod_of(made("dev")), "Job", "waits")
    queued = holding(pod_of(made("dev")), "Job", "queued")
    waits["metadata"]["annotations"] = queued["metadata"]["annotations"] = notes
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpuml"}
    policy = cluster.admin.request(
        "GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/gpuml-after"
    )
    assert not policy.json().get("status", {}).get("typeChecking"), policy.json()["status"]
    for job in (plain, waits, queued):
        job["spec"]["suspend"] = True
        job["spec"]["template"]["spec"]["restartPolicy"] = "Never"
        cluster.admin.create("jobs", "gpuml-dev", job)
    api = Api(cluster.plane.url, account, str(cluster.plane.certificate))
    cluster.wait(
        lambda: "may only start jobs that wait" in refusal(api, plain, {"spec": {"suspend": False}}), 30, "the policy"
    )
    assert "may only start jobs that wait" in refusal(api, waits, {"metadata": {"labels": {"a": "b"}}})
    assert "Kueue starts jobs of a queue" in refusal(api, queued, START)
    for part, value in (
        ("activeDeadlineSeconds", 9),
        ("backoffLimit", 0),
        ("parallelism", 2),
        ("ttlSecondsAfterFinished", 9),
        ("podReplacementPolicy", "Failed"),
    ):
        assert "nothing of what a job runs" in refusal(
            api, waits, {**START, "spec": {"suspend": False, part: value}}
        ), part
    labelled = {"spec": {"template": {"metadata": {"labels": {"c": "d"}}}, "suspend": False}}
    assert "nothing of what a job runs" in refusal(api, waits, {**START, **labelled})
    for change in ({"labels": {"c": "d"}}, {"annotations": {"other": None}}, {"annotations": {"more": "x"}}):
        notes = {"annotations": START["metadata"]["annotations"] | change.get("annotations", {})}
        patch = {"spec": {"suspend": False}, "metadata": change | notes}
        assert "no other note or label" in refusal(api, waits, patch), change
    assert refusal(api, waits, START) == ""
    for user in ("dev-user", "prod-user"):
        assert "cannot patch resource" in refusal(cluster.plane.api(user), waits, START)
    with pytest.raises(ApiError, match="cannot list resource"):
        api.get("secrets", "gpuml-dev")


def test_its_account_is_held_to_that_in_any_namespace(team, cluster, administrator, account):
    "Also in one that an administrator gives it without the labels of gpuml's own"
    binding = copy.deepcopy(find(team, "RoleBinding", "gpuml-after", "gpuml-dev"))
    binding["metadata"]["namespace"] = "default"
    administrator.apply(binding)
    job = holding(pod_of(made("dev")), "Job", "foreign", "default")
    job["spec"]["suspend"] = True
    job["spec"]["template"]["spec"]["restartPolicy"] = "Never"
    cluster.admin.create("jobs", "default", job)
    api = Api(cluster.plane.url, account, str(cluster.plane.certificate))
    try:
        cluster.wait(
            lambda: "may only start jobs that wait" in refusal(api, job, {"spec": {"suspend": False}}), 30, "the policy"
        )
    finally:
        cluster.admin.delete("jobs", "default", "foreign", propagationPolicy="Background")
        administrator.remove(binding)
