"What Kubernetes makes of an attempt's end: its own answers, held against what gpuml expects of a job's failure policy"

import pytest

from gpuml.cluster.manifest import failure_policy, verdict
from tests.cluster.cluster import job, phase
from tests.test_job import EVERYTHING, made

CODES = [0, 1, 65, 66, 70, 71, 73, 75, 77, 78, 137, 139, 143]
TRACKED = "batch.kubernetes.io/job-tracking"  # on a pod that its Job has not counted yet


def with_policy(name: str, command: str) -> dict:
    "A Job under the rules of gpuml's, with attempts left"
    body = job(name, command, gpus=0, retries=3, grace=30)
    body["spec"] |= {"podFailurePolicy": failure_policy("main"), "podReplacementPolicy": "Failed"}
    return body


def ruling(cluster, namespace: str, name: str, pod: str) -> str | None:
    "What the server did with a pod that has ended: `Complete`, `FailJob`, `Count` or `Ignore`; None until it has"
    pods = [p for p in cluster.pods(namespace, name) if p["metadata"]["name"] == pod]  # a pod that was deleted goes
    if any(p["status"]["phase"] not in ("Succeeded", "Failed") or is_tracked(p) for p in pods):
        return None
    status = cluster.admin.get("jobs", namespace, name)["status"]
    if any(status.get("uncountedTerminatedPods", {}).values()):
        return None
    conditions = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    for announced, end, answer in (
        ("SuccessCriteriaMet", "Complete", "Complete"),
        ("FailureTarget", "Failed", "FailJob"),
    ):
        assert end not in conditions or announced in conditions  # each is announced first
        if announced in conditions:
            return answer if end in conditions else None
    return "Count" if status.get("failed", 0) else "Ignore"


def is_tracked(pod: dict) -> bool:
    return TRACKED in pod["metadata"].get("finalizers", [])


@pytest.mark.parametrize("disrupted", [False, True], ids=["by itself", "disrupted"])
def test_verdicts(disrupted, cluster, namespace):
    "Interruptions are free, errors final, the rest counts; a disruption is free whatever the exit code"
    script = "trap 'exit {0}' TERM; touch $HOME/ready; sleep 6000 & wait" if disrupted else "exit {0}"
    for code in CODES:
        cluster.admin.create("jobs", namespace, with_policy(f"exit-{code}", script.format(code)))
    first = {}
    for code in CODES:
        pod = cluster.wait_pod(namespace, f"exit-{code}", lambda pod: pod["status"]["phase"] != "Pending", 120)
        first[code] = pod["metadata"]["name"]
        if disrupted:
            cluster.wait_pod(namespace, f"exit-{code}", phase("Running"))
            worker = cluster.agent.worker(namespace, first[code])
            cluster.wait(lambda w=worker: (w.folder / "home" / "ready").exists(), 60)
            cluster.admin.create("pods", namespace, eviction(first[code]), first[code], "eviction")
    expected = {code: verdict(with_policy("x", ""), code, disrupted=disrupted) for code in CODES}
    answers = {
        code: cluster.wait(
            lambda c=code: ruling(cluster, namespace, f"exit-{c}", first[c]), 120, f"a verdict on {code}"
        )
        for code in CODES
    }
    assert answers == expected
    assert set(expected.values()) == (
        {"Complete", "Ignore"} if disrupted else {"Complete", "Ignore", "FailJob", "Count"}
    )


def eviction(pod: str) -> dict:
    "What a drain asks for"
    return {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}


def test_the_server_takes_every_job_that_gpuml_makes(cluster, namespace):
    "With all that a config can ask for; and it would say what it does not know"
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    query = {"dryRun": "All", "fieldValidation": "Strict"}
    for body in (made(), made(*EVERYTHING)):
        body["metadata"]["namespace"] = namespace
        answer = cluster.admin.request("POST", path, body, query)
        assert answer.status == 201 and "Warning" not in answer.headers
