"`--after`: who waits holds nothing, starts once others have ended, and is started by an account that may do nothing else"

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from jupyter_client.manager import start_new_kernel

from gpuml.base.errors import GpumlError
from gpuml.base.grid import grid_of
from gpuml.cluster import jobs as c
from gpuml.cluster.submission import prepare
from gpuml.cluster.sweep_jobs import prepare_sweep
from gpuml.ui.ledger_words import project_ledger
from tests.cluster.api import Api, ApiError
from tests.cluster.applied import IMAGE, holding, made
from tests.cluster.site import Site
from tests.conftest import ENDLESS
from tests.manifests import find, pod_of
from tests.s3 import KEY, SECRET

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


class Kernel:
    "A kernel that belongs to the project's notebook, as JupyterLab starts one"

    def __init__(self, site):
        environment = {**os.environ, "JPY_SESSION_NAME": str(site.notebook)}
        self.manager, self.client = start_new_kernel(
            cwd=str(site.notebook.parent), env=environment, startup_timeout=600
        )
        self.interrupt = self.manager.interrupt_kernel

    def run(self, source, awaited="", act=None):
        "All that a cell shows; once it shows a text, something is done"
        shown, ident = [], self.client.execute(source)
        while True:
            message = self.client.get_iopub_msg(timeout=600)
            if message["parent_header"].get("msg_id") != ident:
                continue
            content = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return "\n".join(shown)
            shown.append(content.get("text") or content.get("data", {}).get("text/plain", ""))
            shown += content.get("traceback", [])
            if act and awaited in "".join(shown):
                act, _ = None, act()


@pytest.fixture
def kernel(both):
    kernel = Kernel(both)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


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
        assert process.wait(600) == 0, lines
        assert (folder / "gpuml-after-alive").exists()


def updates(site, count, **more):
    "A job of the development user; `count` tells it from others"
    return site.submit(IMAGED, f"train.epochs={count}", of="dev", **more)


def test_jobs_wait_for_others_to_end(site, cluster, team, account, tmp_path):
    "One that is cancelled, one that succeeds; and without what starts them nothing is sent"
    first = updates(site, 10_000)
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
        assert second.wait(600).phase == "succeeded", second.logs()
        assert third.wait(600).phase == "succeeded", third.logs()
    started = [line.split(":")[0] for line in lines if ": started, as " in line]
    assert started == [f"gpuml-dev/{second.run_id}", f"gpuml-dev/{third.run_id}"], lines
    times = [cluster.admin.get("jobs", "gpuml-dev", job.run_id)["status"] for job in (second, third)]
    assert times[0]["completionTime"] <= times[1]["startTime"]
    over = prepare(site.config(IMAGED, "train.epochs=4", of="dev"), site.notebook, after=second.run_id)
    assert f"✓ after: {second.run_id} has ended already, so nothing is waited for" in repr(over.findings)
    assert "suspend" not in over.manifest["spec"]
    near = prepare(site.config(IMAGED, "train.epochs=4", of="dev"), site.notebook, after=f"{second.run_id}x")
    assert f"did you mean '{second.run_id}'?" in near.findings.bad[0].text


@pytest.fixture
def both(site, cluster, monkeypatch):
    "The same project with a `prod` in gpuml-prod, and a user of both groups; a second node with a GPU"
    monkeypatch.setenv("KUBECONFIG", str(cluster.plane.kubeconfig("team-user", "gpuml-dev")))
    monkeypatch.chdir(site.folder)
    cluster.secret("gpuml-prod", "gpuml-s3", AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
    site.write("prod", "gpuml-prod", 1)
    file = site.folder / "config" / "prod.yaml"
    file.write_text(file.read_text().replace("namespace: gpuml-dev", "namespace: gpuml-prod"))
    cluster.agent.add_node("gpu-2")
    yield site
    cluster.agent.remove_node("gpu-2")
    cluster.admin.delete("secrets", "gpuml-prod", "gpuml-s3")


def sweep_of(site, name, seeds, **options):
    "Two jobs that end only with their test"
    words = grid_of([IMAGED, ENDLESS, f"train.seed={seeds}"])
    return prepare_sweep("dev", words, site.notebook, {"--name": name, **options})


def test_production_a_sweep_and_several_nodes_wait(both, cluster, team, account, tmp_path):
    "For a job of another namespace, for a sweep, which has to be there, and for a job of two nodes"
    with starting(cluster, team, account, tmp_path) as lines:

        def starts(*names):
            done = [f"{name}: started, as " for name in names]
            cluster.wait(lambda: all(any(start in line for line in lines) for start in done), 60, f"{names} to start")

        first = both.submit(IMAGED, ENDLESS, of="dev")
        both.why(first, "running", 90)
        production = both.submit(IMAGED, of="prod", after=first.run_id)
        assert f"waits for gpuml-dev/{first.run_id} (" in production.note and "to end" in production.note
        sending = sweep_of(both, "warm", "1,2").send()
        warm = [next(sending)]
        with pytest.raises(GpumlError, match="--after warm: 1 of its 2 runs are neither done nor a job that is there"):
            both.submit(IMAGED, "train.epochs=2", of="dev", after="warm")
        warm += sending
        with pytest.raises(GpumlError, match="--after warm-1-seed-1: that is this very job"):
            sweep_of(both, "warm", "1,2", **{"--after": "warm"}).check()
        behind = both.submit(IMAGED, "train.epochs=2", of="dev", after="warm")
        late = [*sweep_of(both, "late", "3,4", **{"--after": f"warm,{first.run_id}"}).send()]
        gang = both.submit(IMAGED, ENDLESS, "compute.nodes=2", "train.slots=2", of="dev", after=first.run_id)
        last = both.submit(IMAGED, "train.epochs=3", of="dev", after=gang.run_id)
        listed = repr(c.jobs([both.config(IMAGED, of=name) for name in ("prod", "dev")]))
        assert listed.count("waits for gpuml-dev/") == 6, listed
        for job in warm:
            cluster.admin.delete("jobs", "gpuml-dev", job.run_id, propagationPolicy="Background")
        starts(f"gpuml-dev/{behind.run_id}")
        behind.cancel()
        assert sum(": started, as " in line for line in lines) == 1, lines
        first.cancel()
        starts(f"gpuml-prod/{production.run_id}", *(f"gpuml-dev/{job.run_id}" for job in [*late, gang]))
        cluster.wait(lambda: len(cluster.pods("gpuml-dev", gang.run_id)) == 2, 60, "the pods of both nodes")
        for job in (*late, gang, production):
            job.cancel()
        starts(f"gpuml-dev/{last.run_id}")
        last.cancel()


def test_a_cell_waits_and_its_stop_button_cancels(both, cluster, team, account, tmp_path, kernel):
    "`%%gpu` and `%gpu_train --on cluster`: the cell shows whom the job waits for; at last it runs, and the ledger tells the waits apart"
    train = f"%gpu_train dev {IMAGED} train.seed=7 --on cluster --after"
    with starting(cluster, team, account, tmp_path):
        first = both.submit(IMAGED, ENDLESS, of="dev")
        waits = f"waits for gpuml-dev/{first.run_id} ("
        both.add_cell(f"{train} {first.run_id}")
        kernel.run("%load_ext gpuml")
        cell = f"%%gpu dev {IMAGED} --after {first.run_id}\nprint('six times seven is', 6 * 7)"
        for line in (f"{train} {first.run_id}", cell):
            shown = kernel.run(line, waits, kernel.interrupt)
            assert "cancelled by" in shown and "before it ran" in shown, shown
        shown = kernel.run(cell, waits, lambda: time.sleep(2) or first.cancel())  # its wait is counted by the second
        assert "six times seven is 42" in shown, shown
    ledger = project_ledger([both.config(IMAGED, of="dev")], "run")
    (patient,) = [each for each in ledger.accounts if each.chosen]
    assert patient.chosen > 0 and "that jobs waited for others to end, as --after asked" in repr(ledger)


def refusal(api, job, change):
    "What the server says against a change of a job; empty where it takes it"
    path = f"/apis/batch/v1/namespaces/{job['metadata']['namespace']}/jobs/{job['metadata']['name']}"
    try:
        api.request("PATCH", path, change, {"dryRun": "All"}, kind="application/merge-patch+json")
    except ApiError as error:
        return error.message
    return ""


UNTIL = "gpuml.io/after-until"
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
    for change in ({"labels": {"c": "d"}}, {"annotations": {"c": "d"}}, {"annotations": {UNTIL: "since noon"}}):
        changed = {"spec": {"template": {"metadata": change}, "suspend": False}}
        assert "nothing of what a job runs" in refusal(api, waits, {**START, **changed}), change
    noted = {"template": {"metadata": {"annotations": {UNTIL: "2026-11-29T14:03:10Z"}}}, "suspend": False}
    assert refusal(api, waits, {**START, "spec": noted}) == ""
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
