"What `plan` says of random clusters is what the real kube-scheduler does; benchmarks/queue_oracle.py asks it of a thousand"

from collections import Counter
from datetime import UTC, datetime

import pytest

from gpuml.base.errors import ClusterError, Exit
from gpuml.ui.cli import main
from tests.cluster.oracle import Judge, random_case
from tests.cluster.programs import missing
from tests.conftest import ROOT

SERVERS = ["etcd", "kube-apiserver", "kube-scheduler"]
pytestmark = pytest.mark.skipif(bool(missing(SERVERS)), reason="no servers for a cluster: `make servers` builds them")
CASES = 50


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    judge = Judge(tmp_path_factory.mktemp("judge"))
    try:
        yield judge.start()
    finally:
        judge.stop()


@pytest.fixture(scope="module")
def verdicts(judge):
    return judge.judge([random_case(seed) for seed in range(CASES)])


def test_answers(verdicts):
    "Starts, preempts, waits or never: each comes, and as it was predicted"
    assert [str(v) for v in verdicts if not v.is_class_right] == []
    assert min(Counter(v.answer for v in verdicts)[answer] for answer in ("starts", "preempts", "waits", "never")) >= 4


def test_victims_and_nodes(verdicts):
    "The pods that are ended are one of the sets that were predicted, and a job starts on nodes on which it may"
    submitted = [v for v in verdicts if v.plan.answer != "never"]
    assert [str(v) for v in submitted if not v.are_victims_right] == []
    assert all(v.nodes <= {*v.plan.nodes} for v in submitted if v.answer == "starts")


def test_plan_command(judge, monkeypatch, capsys):
    "Whom a job would preempt, and that another never fits"
    amounts = {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "500Gi", "pods": "10", "nvidia.com/gpu": "4"}
    judge.admin.create("nodes", "", {"metadata": {"name": "gpu-1"}, "status": {"allocatable": amounts}})
    container = {"name": "train", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "4"}}}
    spec = {"nodeName": "gpu-1", "priorityClassName": "low", "containers": [container]}
    labels = {"gpuml.io/run": "dev-1", "gpuml.io/owner": "ada"}
    judge.admin.create("pods", "default", {"metadata": {"name": "dev-1-x", "labels": labels}, "spec": spec})
    monkeypatch.setenv("KUBECONFIG", str(judge.plane.kubeconfig()))
    monkeypatch.chdir(ROOT)

    def plan(*words):
        code = main(["plan", "dev", "compute.namespace=default", "compute.cpu=1", *words])
        return code, capsys.readouterr().out.strip()

    top = "compute.priority_class=top"
    assert plan(top) == (0, "starts within about 30 s: preempts dev-1 (ada, other)")
    waits = plan("compute.priority_class=low")[1]
    assert waits.startswith("waits: 50 % by ") and ", 90 % by " in waits
    assert "; needs 1 GPU: none of 4 is free; held by 1 other job" in waits
    code, text = plan(top, "compute.gpus=8")
    assert code == ClusterError.exit_code and text.startswith("never fits: it asks for 8 nvidia.com/gpu of a node")
    assert plan("compute.priority_class=none")[1] == "never fits: the cluster has no PriorityClass none"
    judge.admin.delete("pods", "default", "dev-1-x", gracePeriodSeconds=0)
    assert plan(top) == (0, "starts now on gpu-1")


def as_job(name, container):
    "A Job of gpuml, as the API server takes it"
    labels = {"app.kubernetes.io/managed-by": "gpuml", "gpuml.io/config": "dev", "gpuml.io/run": name}
    meta = {"name": name, "labels": labels, "annotations": {"gpuml.io/output": f"s3://none/{name}"}}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "restartPolicy": "Never"}}
    return {"metadata": meta, "spec": {"template": template}}


def test_plan_of_a_later_moment(judge, monkeypatch, capsys):
    "What `--after` brings: of a job that holds all, of one that waits for that one, and of none"
    amounts = {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "500Gi", "pods": "10", "nvidia.com/gpu": "16"}
    judge.admin.create("nodes", "", {"metadata": {"name": "large"}, "status": {"allocatable": amounts}})
    container = {"name": "train", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "16"}}}
    uid = judge.admin.create("jobs", "default", as_job("dev-2", container))["metadata"]["uid"]
    waiting = as_job("dev-3", container)
    waiting["spec"]["suspend"] = True
    waiting["metadata"]["annotations"] |= {"gpuml.io/after": "default/dev-2", "gpuml.io/after-uids": uid}
    judge.admin.create("jobs", "default", waiting)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "dev-2", "uid": uid, "controller": True}
    meta = {"name": "dev-2-x", "ownerReferences": [owner], "labels": {"gpuml.io/run": "dev-2"}}
    spec = {"nodeName": "large", "priorityClassName": "low", "containers": [container]}
    judge.admin.create("pods", "default", {"metadata": meta, "spec": spec})
    monkeypatch.setenv("KUBECONFIG", str(judge.plane.kubeconfig()))
    monkeypatch.chdir(ROOT)
    where = ["plan", "dev", "compute.namespace=default", "compute.cpu=1", "compute.gpus=16"]

    def plan(*words):
        code = main([*where, "compute.priority_class=low", *words])
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).strip()

    code, text = plan("--after", "dev-2")
    assert code == ClusterError.exit_code and "nothing starts jobs that wait in or for default" in text, text
    look = {"renewTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"}
    judge.admin.create("leases", "default", {"metadata": {"name": "gpuml-after"}, "spec": look})
    assert plan()[1].startswith("waits: ")
    for name in ("dev-2", "dev-3"):
        code, text = plan("--after", name)
        start = f"once default/{name} (pending) has ended, when that is can't be told, and all else is as it is now: "
        assert (code, text) == (0, f"{start}starts on large")
    code, text = plan("--after", "dev-5")
    assert code == Exit.NOT_FOUND and "--after dev-5: no job of this name that you may see; did you mean" in text, text
    judge.admin.delete("pods", "default", "dev-2-x", gracePeriodSeconds=0)
