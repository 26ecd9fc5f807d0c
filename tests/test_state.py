"""What a job's state says of every end of a pod

The statuses are as Kubernetes 1.29 to 1.37 writes them: pkg/kubelet (eviction, preemption, nodeshutdown, lifecycle,
kubelet.rejectPod, kubelet_pods), pkg/controller (job, podgc, tainteviction), pkg/scheduler, and the Eviction API.
"""

import pytest

from gpuml.base.errors import Exit
from gpuml.base.loading import load
from gpuml.cluster.answers import NoServer
from gpuml.cluster.events import events_about
from gpuml.cluster.facts import job_facts
from gpuml.cluster.manifest import Source, manifest
from gpuml.cluster.remote import ClusterJob, forgotten
from gpuml.cluster.snapshot import snapshot_of
from gpuml.cluster.state import Seen, explain
from gpuml.training.attempts import Attempt, content
from tests.conftest import ROOT

RUN, NODE, BEGAN = "prod-0f2a9c11d4-1", "n1", "2026-11-26T12:03:00Z"
WORDS = ["compute.image=gpuml-train:0.1.0", "compute.disk=50Gi", "compute.memory=16Gi", "compute.shared_memory=1Gi"]
MADE = manifest(load("prod", WORDS, start=ROOT), RUN, Source("0f2a9c11d4", "s3://b/x.tar.gz", "train.ipynb", "Ada"))


def waits(reason, message=""):
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


def ended(code, reason="Error", message=""):
    about = {"exitCode": code, "reason": reason, "finishedAt": "2026-11-26T13:00:00Z"}
    return {"terminated": about | ({"message": message} if message else {})}


RUNS = {"running": {"startedAt": BEGAN}}
INTERRUPTED = ended(75, "Error", "stopped at update 6 of 270, with a checkpoint")
LOST = ended(137, "ContainerStatusUnknown", "The container could not be located when the pod was terminated")


def disruption(reason, message):
    return {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}


def pod(
    phase, train=None, others=None, init=None, reason="", message="", *conditions, deleted=False, name="p-1", at="12:02"
):
    "A pod of the job, with its containers' states: injected ones stand before the one that trains"
    others, init = others or {}, init or {}
    spec = MADE["spec"]["template"]["spec"]
    strangers = [{"name": n, "resources": {"limits": {"memory": "128Mi"}}} for n in others]
    spec = {**spec, "nodeName": NODE, "containers": [*strangers, *spec["containers"]]}
    image = {"image": "istio/proxyv2:1.30"}
    spec["initContainers"] = [{"name": n} | image | ({"restartPolicy": "Always"} if "proxy" in n else {}) for n in init]
    status = {
        "phase": phase,
        "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": BEGAN}, *conditions],
    }
    status |= {"reason": reason, "message": message} if reason or message else {}
    if train or others:
        status["containerStatuses"] = [{"name": n, "state": s} for n, s in others.items()]
        status["containerStatuses"] += [{"name": "train", "state": train}] if train else []
    if init:
        status["initContainerStatuses"] = [{"name": n, "state": s} for n, s in init.items()]
    meta = {"name": name, "creationTimestamp": f"2026-11-26T{at}:00Z"}
    return {"metadata": meta | ({"deletionTimestamp": BEGAN} if deleted else {}), "spec": spec, "status": status}


def unscheduled(reason, message):
    "A pod that no node has"
    made = pod("Pending")
    made["spec"] = {k: v for k, v in made["spec"].items() if k != "nodeName"} | {
        "schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]
    }
    made["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]
    return made


def job(*conditions, **status):
    return {
        **MADE,
        "status": {"startTime": BEGAN, "conditions": [{"status": "True", **c} for c in conditions], **status},
    }


def event(reason, message, about="p-1"):
    return {"reason": reason, "message": message, "involvedObject": {"name": about}}


def seen(made, *pods, events=(), nodes=None, record=None):
    return Seen(made, list(pods), list(events), snapshot_of(nodes), record)


FAILED = {
    "type": "Failed",
    "reason": "PodFailurePolicy",
    "message": "Container train for pod a/p-1 failed with exit code 137 matching FailJob rule at index 2",
}
GAVE_UP = {"type": "Failed", "reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
LATE = {"type": "Failed", "reason": "DeadlineExceeded", "message": "Job was active longer than specified deadline"}
DEVICES = "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy devices nvidia.com/gpu, which is unexpected"
LOW = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 90Mi. Container train was using 15Gi, request is 16Gi, has larger consumption of memory. "
SANDBOX = 'Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "5f": plugin type="calico" failed (add): error getting ClusterInformation'
MOUNT = 'MountVolume.SetUp failed for volume "work" : mkdir /var/lib/kubelet/pods/x: no space left on device'
PULL = 'Back-off pulling image "istio/proxyv2:1.30": ErrImagePull: failed to pull and unpack image "docker.io/istio/proxyv2:1.30": not found'
OOM_HOOK = "failed to create containerd task: failed to create shim task: OCI runtime create failed: nvidia-container-cli: initialization error: driver error: unknown"

NO_QUOTA = 'Error creating: pods "p-2" is forbidden: exceeded quota: gpuml-dev, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=4, limited: requests.nvidia.com/gpu=4'
ENDS = {  # what is seen; the phase; what the sentence says, and what it must not
    # emptyDir and disk: kubernetes#116986
    "emptyDir over its limit": (
        seen(job(FAILED, failed=1), pod("Failed", LOST, {}, {}, "Evicted", 'Usage of EmptyDir volume "work" exceeds the limit "50Gi". ')),
        "failed", ["compute.disk=50Gi"], ["memory limit", "could not be located"],
    ),
    "memory disk over its limit": (
        seen(job(FAILED, failed=1), pod("Failed", ended(137), {}, {}, "Evicted", 'Usage of EmptyDir volume "shm" exceeds the limit "1Gi". ')),
        "failed", ["compute.shared_memory=1Gi"], ["memory limit"],
    ),
    "container over its disk": (
        seen(job(failed=1), pod("Failed", ended(137), {}, {}, "Evicted", 'Container train exceeded its local ephemeral storage limit "50Gi". ')),
        "waiting", ["compute.disk=50Gi", "next attempt"], ["memory limit"],
    ),
    "pod over its disk": (
        seen(job(FAILED, failed=1), pod("Failed", ended(137), {}, {}, "Evicted", "Pod ephemeral local storage usage exceeds the total limit of containers 50Gi. ")),
        "failed", ["compute.disk=50Gi"], ["memory limit"],
    ),
    "a sidecar over its disk": (
        seen(job(failed=1), pod("Failed", ended(137), {"vault-agent": LOST}, {}, "Evicted", 'Container vault-agent exceeded its local ephemeral storage limit "1Gi". ')),
        "waiting", ["vault-agent", "limit of 1Gi", "next attempt"], ["compute.disk", "memory limit"],
    ),
    # the node: kubernetes#97131, #130145
    "node low on memory": (
        seen(job(failed=1), pod("Failed", LOST, {}, {}, "Evicted", LOW, disruption("TerminationByKubelet", LOW))),
        "waiting", ["node n1 was low on memory", "starts the next attempt"], ["would end the same way", "could not be located"],
    ),
    "evicted before any container was made": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "Evicted", "The node had condition: [DiskPressure]. ")),
        "waiting", ["node n1", "low on disk", "starts the next attempt"], ["starts on n1"],
    ),
    "no healthy GPU": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "UnexpectedAdmissionError", DEVICES)),
        "waiting", ["node n1 refused it", "no healthy devices present", "nvidia.com/gpu", "administrator"], ["Pod was rejected"],
    ),
    "no healthy GPU, four times": (
        seen(job(GAVE_UP, failed=4), pod("Failed", None, {}, {}, "UnexpectedAdmissionError", DEVICES)),
        "failed", ["gave up after 4 failures", "no healthy devices present"], [],
    ),
    "out of CPU": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "OutOfcpu", "Pod was rejected: Node didn't have enough resource: cpu, requested: 4000, used: 15000, capacity: 16000")),
        "waiting", ["node n1 had not enough cpu"], ["Pod was rejected"],
    ),
    "out of GPUs": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "OutOfnvidia.com/gpu", "Node didn't have enough resource: nvidia.com/gpu, requested: 1, used: 1, capacity: 1")),
        "waiting", ["node n1 had not enough nvidia.com/gpu"], [],
    ),
    "node's labels changed": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "NodeAffinity", "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector")),
        "waiting", ["node n1 refused it", "compute.node_selector"], ["Pod was rejected"],
    ),
    "node shuts down": (
        seen(job(failed=1), pod("Failed", INTERRUPTED, {}, {}, "Terminated", "Pod was terminated in response to imminent node shutdown.", disruption("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."))),
        "waiting", ["node n1 was shut down", "stopped at update 6 of 270, with a checkpoint"], [],
    ),
    "node is shutting down already": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "NodeShutdown", "Pod was rejected as the node is shutting down.")),
        "waiting", ["node n1 was shut down"], [],
    ),
    "critical pod": (
        seen(job(failed=1), pod("Failed", ended(137), {}, {}, "Preempting", "Preempted in order to admit critical pod", disruption("TerminationByKubelet", "Preempted in order to admit critical pod"))),
        "waiting", ["node n1 needed the room for a pod of the system"], ["memory limit", "would end the same way"],
    ),
    "drained": (
        seen(job(), pod("Failed", INTERRUPTED, {}, {}, "", "", disruption("EvictionByEvictionAPI", "Eviction API: evicting"))),
        "waiting", ["drained", "node n1", "stopped at update 6 of 270"], [],
    ),
    "being drained": (
        seen(job(active=1), pod("Running", RUNS, {}, {}, "", "", disruption("EvictionByEvictionAPI", "Eviction API: evicting"), deleted=True)),
        "stopping", ["saves a checkpoint", "node n1 is being drained"], ["Eviction API"],
    ),
    "being preempted": (
        seen(job(active=1), pod("Running", RUNS, {}, {}, "", "", disruption("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"), deleted=True)),
        "stopping", ["saves a checkpoint", "preempted"], [],
    ),
    "killed while it was preempted": (
        seen(job(), pod("Failed", ended(137), {}, {}, "", "", disruption("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"))),
        "waiting", ["preempted", "starts the next attempt"], ["memory limit", "would end the same way"],
    ),
    "tainted node": (
        seen(job(), pod("Failed", ended(143), {}, {}, "", "", disruption("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"))),
        "waiting", ["node n1 was tainted"], [],
    ),
    "node gone, and its pod": (
        seen(job(), pod("Failed", RUNS, {}, {}, "", "", disruption("DeletionByPodGC", "PodGC: node no longer exists"))),
        "waiting", ["node n1 is gone", "starts the next attempt"], [],
    ),
    "node gone, its pod not yet": (
        seen(job(active=1), pod("Running", RUNS), nodes=[{"metadata": {"name": "n2"}, "status": {}}]),
        "waiting", ["node n1 is gone"], [],
    ),
    "node gone before it started": (
        seen(job(active=1), pod("Pending", waits("ContainerCreating")), nodes=[{"metadata": {"name": "n2"}, "status": {}}]),
        "waiting", ["node n1 is gone"], ["starts on"],
    ),
    "a pod's own deadline": (
        seen(job(failed=1), pod("Failed", ended(143), {}, {}, "DeadlineExceeded", "Pod was active on the node longer than the specified deadline")),
        "waiting", ["longer than the specified deadline"], [],
    ),
    # what does not start: skypilot#9758
    "sandbox": (
        seen(job(active=1), pod("Pending", waits("ContainerCreating")), events=[event("Scheduled", "x"), event("FailedCreatePodSandBox", SANDBOX)]),
        "pending", ["node n1", "calico", "administrator"], ["starts on n1"],
    ),
    "volume": (
        seen(job(active=1), pod("Pending", waits("ContainerCreating")), events=[event("FailedMount", MOUNT)]),
        "pending", ["node n1", "no space left on device", "administrator"], ["starts on n1"],
    ),
    "another pod's volume": (
        seen(job(active=1), pod("Pending", waits("ContainerCreating"), name="p-2"), events=[event("FailedMount", MOUNT), event("Pulling", 'Pulling image "gpuml-train:0.1.0"', "p-2")]),
        "pending", ["pulls the image", "since 26 Nov 12:03 UTC"], ["no space left"],
    ),
    "no word of it": (
        seen(job(active=1), pod("Pending", waits("ContainerCreating")), events=[]),
        "pending", ["starts on n1 since 26 Nov 12:03 UTC"], [],
    ),
    "image": (
        seen(job(active=1), pod("Pending", waits("ImagePullBackOff", 'Back-off pulling image "gpuml-train:0.1.0"')), events=[event("Failed", "Error: ImagePullBackOff")]),
        "pending", ["image can't be pulled", "gpuml-train:0.1.0", "compute.image"], [],
    ),
    "image, beside a proxy that runs": (
        seen(job(active=1), pod("Running", waits("ErrImagePull", "rpc error: not found"), {"istio-proxy": RUNS})),
        "pending", ["image can't be pulled", "rpc error: not found", "compute.image"], [],
    ),
    "an injected init container's image": (
        seen(job(active=1), pod("Pending", waits("PodInitializing"), {}, {"istio-init": waits("ImagePullBackOff", PULL)})),
        "pending", ["istio-init", "istio/proxyv2:1.30", "administrator"], ["compute.image", "starts on n1"],
    ),
    "an init container that fails": (
        seen(job(failed=1), pod("Failed", waits("PodInitializing"), {}, {"vault-agent-init": ended(1, "Error", "permission denied")})),
        "waiting", ["vault-agent-init", "exit code 1", "permission denied"], ["the notebook's code failed"],
    ),
    "an init container at work": (
        seen(job(active=1), pod("Pending", waits("PodInitializing"), {}, {"vault-agent-init": RUNS})),
        "pending", ["vault-agent-init", "has not ended"], ["starts on n1"],
    ),
    "a native sidecar that crashes": (
        seen(job(active=1), pod("Pending", waits("PodInitializing"), {}, {"istio-proxy": waits("CrashLoopBackOff", "back-off 40s restarting failed container=istio-proxy")})),
        "pending", ["istio-proxy", "back-off 40s restarting"], ["starts on n1"],
    ),
    "no such key": (
        seen(job(active=1), pod("Pending", waits("CreateContainerConfigError", "couldn't find key AWS_SECRET_ACCESS_KEY in Secret gpuml-prod/gpuml-s3"))),
        "pending", ["Secret gpuml-s3 is missing key AWS_SECRET_ACCESS_KEY"], [],
    ),
    "no such Secret, beside a proxy that runs": (
        seen(job(active=1), pod("Running", waits("CreateContainerConfigError", 'secret "gpuml-s3" not found'), {"istio-proxy": RUNS})),
        "pending", ["Secret gpuml-s3 is not in this namespace"], [],
    ),
    "GPU driver": (
        seen(job(failed=1), pod("Failed", ended(128, "StartError", OOM_HOOK))),
        "waiting", ["can't be started", "nvidia-container-cli"], ["log ends"],
    ),
    # memory
    "out of memory": (
        seen(job(FAILED, failed=1), pod("Failed", ended(137, "OOMKilled"), {"istio-proxy": ended(0, "Completed")})),
        "failed", ["compute.memory=16Gi"], [],
    ),
    "a sidecar out of memory, training goes on": (
        seen(job(active=1), pod("Running", RUNS, {"istio-proxy": ended(137, "OOMKilled")})),
        "running", ["istio-proxy", "OOMKilled"], ["compute.memory"],
    ),
    "a sidecar out of memory, training fails": (
        seen(job(failed=1), pod("Failed", ended(75, "Error", "S3 did not answer for 150 s"), {"istio-proxy": ended(137, "OOMKilled")})),
        "waiting", ["S3 did not answer for 150 s", "istio-proxy", "OOMKilled"], ["compute.memory"],
    ),
    # done, and not yet Complete
    "pod done": (seen(job(active=1), pod("Succeeded", ended(0, "Completed"))), "succeeded", [], []),
    "success met": (
        seen(job({"type": "SuccessCriteriaMet", "reason": "CompletionsReached"}, terminating=1), pod("Running", RUNS, deleted=True)),
        "succeeded", [], [],
    ),
    "failure met, and pods that save": (
        seen(job({**LATE, "type": "FailureTarget"}, terminating=1), pod("Running", RUNS, deleted=True)),
        "stopping", ["saves a checkpoint", "compute.deadline"], [],
    ),
    "failure met, and nothing at work": (
        seen(job({**FAILED, "type": "FailureTarget"}), pod("Failed", ended(1, "Error", "cell 2 raised ValueError: x"))),
        "failed", ["cell 2 raised ValueError: x"], [],
    ),
    # containers that a cluster injects: katib#1042, trainer#1577
    "the proxy has ended well": (
        seen(job(failed=1), pod("Failed", ended(65, "Error", "data/a.csv:3: bad row"), {"istio-proxy": ended(0, "Completed")})),
        "failed", ["data/a.csv:3: bad row"], ["next attempt"],
    ),
    "the proxy fails, training is done": (
        seen(job(GAVE_UP, failed=4), pod("Failed", ended(0, "Completed"), {"istio-proxy": ended(1)})),
        "succeeded", ["istio-proxy", "exit code 1"], ["gave up"],
    ),
    "training is done, a proxy runs on": (
        seen(job(active=1), pod("Running", ended(0, "Completed"), {"istio-proxy": RUNS})),
        "succeeded", ["istio-proxy", "runs on", "GPU", f"gpuml cancel {RUN}", "native"], [],
    ),
    "training was interrupted, a proxy runs on": (
        seen(job(active=1), pod("Running", INTERRUPTED, {"vault-agent": RUNS})),
        "stopping", ["stopped at update 6 of 270", "vault-agent", "runs on", "no next attempt", f"gpuml cancel {RUN}"], [],
    ),
    "training failed, two run on": (
        seen(job(active=1), pod("Running", ended(1, "Error", "cell 2 raised ValueError: x"), {"a": RUNS, "b": RUNS})),
        "stopping", ["cell 2 raised ValueError: x", "a and b run on"], [],
    ),
    "the deadline ended a proxy": (
        seen(job(LATE, failed=1), pod("Failed", ended(0, "Completed"), {"istio-proxy": ended(137)})),
        "succeeded", ["istio-proxy"], ["compute.deadline"],
    ),
    "a native sidecar is ended by the kubelet": (
        seen(job(active=1), pod("Running", ended(0, "Completed"), {}, {"istio-proxy": RUNS})),
        "succeeded", [], ["istio-proxy"],
    ),
    "a native sidecar, and the next attempt comes": (
        seen(job(active=1), pod("Running", INTERRUPTED, {}, {"istio-proxy": RUNS})),
        "waiting", ["stopped at update 6 of 270", "starts the next attempt"], ["istio-proxy"],
    ),
    "training runs beside a proxy": (seen(job(active=1), pod("Running", RUNS, {"istio-proxy": RUNS})), "running", [], []),
    # words of an earlier attempt
    "preempted long ago": (
        seen(job(failed=1), pod("Failed", ended(65, "Error", "data/a.csv:3: bad row"), name="p-2"), events=[event("Preempted", "Preempted by pod 5f on node n1")]),
        "failed", ["data/a.csv:3: bad row"], ["preempted", "next attempt"],
    ),
    "an earlier attempt's word in storage": (
        seen(job(failed=1), pod("Failed", None, {}, {}, "UnexpectedAdmissionError", DEVICES), record={"attempt": 1, "exit_code": 75, "reason": "stopped at update 6 of 270, with a checkpoint"}),
        "waiting", ["no healthy devices present"], ["exit code 75"],
    ),
    # k8sgpt-ai/k8sgpt#1474: a pod that is held back, with and without a message
    "gates": (
        seen(job(active=1), unscheduled("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates")),
        "pending", ["held back", "kueue.x-k8s.io/admission"], ["no node takes it"],
    ),
    "gates, and nothing said": (
        seen(job(active=1), unscheduled("SchedulingGated", "")), "pending", ["held back"], ["the scheduler has not looked at it yet"],
    ),
    # kubernetes#88718: the next attempt is not let in
    "no quota for the next attempt": (
        seen(job(failed=1), pod("Failed", INTERRUPTED), events=[event("SuccessfulCreate", "Created pod: p-1", RUN), event("FailedCreate", NO_QUOTA, RUN)]),
        "waiting", ["stopped at update 6 of 270", "quota gpuml-dev: 4 of 4 GPUs used"], ["after 10 s"],
    ),
    "there was no quota, and now there is": (
        seen(job(failed=1), pod("Failed", INTERRUPTED), events=[event("FailedCreate", NO_QUOTA, RUN), event("SuccessfulCreate", "Created pod: p-1", RUN)]),
        "waiting", ["stopped at update 6 of 270", "after 10 s"], ["quota"],
    ),
    # kubernetes#61051, actions-runner-controller#1369: containers that a restart of the node has lost
    "node was started anew": (
        seen(job(failed=1), pod("Failed", ended(255, "Unknown"))), "waiting", ["node n1 was started anew", "exit code 255"], [],
    ),
    "removed, and its container is gone": (
        seen(job(active=1), pod("Running", waits("ContainerCreating") | {"lastState": LOST}, deleted=True)),
        "stopping", ["its pod is being removed", "nothing runs in it"], ["saves a checkpoint"],
    ),
    "removed before it began": (
        seen(job(active=1), pod("Pending", waits("ContainerCreating"), {}, {}, "", "", disruption("EvictionByEvictionAPI", "Eviction API: evicting"), deleted=True)),
        "stopping", ["its pod is being removed", "node n1 is being drained"], ["saves a checkpoint"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_every_end_is_told(name):
    case, phase, said, unsaid = ENDS[name]
    state = explain(case)
    assert state.phase == phase, state
    assert all(words in state.why for words in said), state
    assert not any(words in state.why for words in unsaid), state
    assert "\n" not in state.why and len(state.why) < 500


def test_codes_are_those_of_the_container_that_trains():
    for order in (1, -1):
        made = pod("Failed", ended(65), {"istio-proxy": ended(0), "vault-agent": ended(1)})
        made["status"]["containerStatuses"] = made["status"]["containerStatuses"][::order]
        assert explain(seen(job(failed=1), made)).exit_code == Exit.BAD_DATA
    evicted = pod("Failed", None, {}, {}, "Evicted", LOW)
    assert explain(seen(job(failed=1), evicted)).exit_code is None


def test_the_job_s_own_container_is_found_wherever_it_stands():
    "Where a webhook has put another one in front of it: its memory, its GPUs, its command"
    made = {**MADE, "spec": {**MADE["spec"], "template": {"spec": pod("Failed", None, {"istio-proxy": RUNS})["spec"]}}}
    assert made["spec"]["template"]["spec"]["containers"][0]["name"] == "istio-proxy"
    killed = explain(seen({**job(FAILED, failed=1), "spec": made["spec"]}, pod("Failed", ended(137, "OOMKilled"))))
    assert "compute.memory=16Gi" in killed.why
    assert job_facts(made)["gpus"] == "1"


def test_a_job_that_was_deleted_in_the_background(tmp_path):
    "As `kubectl delete job` does: the Job is gone at once, while its pod saves"
    handle = ClusterJob(RUN, str(tmp_path), None, {}, "", NoServer(), "gpuml-prod")
    saves = forgotten(handle, [pod("Running", RUNS, deleted=True)])
    assert (saves.phase, saves.why) == ("stopping", "its Job was deleted; saves a checkpoint")
    ended = Attempt(RUN, 1, 75, "stopped at update 6 of 270, with a checkpoint", None, BEGAN, BEGAN, "p-1")
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "1.json").write_bytes(content(ended))
    gone = forgotten(handle, [])
    assert (gone.phase, gone.command_code, gone.attempts) == ("failed", 75, 1)
    assert gone.why.startswith("stopped at update 6 of 270, with a checkpoint (exit code 75)")


def test_events_of_a_job_before_say_nothing_of_this_one():
    "Neither those of an earlier Job of its name, nor those of a run whose name begins alike"
    made = job(active=1)
    made["metadata"] = made["metadata"] | {"uid": "2", "creationTimestamp": "2026-11-26T12:00:00Z"}
    before = event("FailedCreate", NO_QUOTA, RUN)
    before["involvedObject"] |= {"kind": "Job", "uid": "1"}
    other = event("Preempted", "x", f"{RUN}-2-x2z7k") | {"lastTimestamp": "2026-11-26T12:05:00Z"}
    events = events_about([before, other], made, [])
    assert not events and explain(seen(made, events=events)).why == "Kubernetes has not made its pod yet"
