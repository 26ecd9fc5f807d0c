"The test bed itself: what a cluster does, this one does too"

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from tests.cluster.api import ApiError
from tests.cluster.cluster import job, phase, state
from tests.cluster.kueue import Kueue
from tests.cluster.programs import missing
from tests.cluster.worker import ROOT, for_any_user
from tests.waiting import until

STUBBORN = "trap 'echo told to stop' TERM; echo ready; while true; do sleep 0.1; done"
POLITE = "trap 'echo told to stop; exit 75' TERM; echo ready; while true; do sleep 0.1; done"


def submit(cluster, namespace, name, command, **more) -> None:
    cluster.admin.create("jobs", namespace, job(name, command, **more))


def logged(cluster, namespace, name, text: str = "ready\n") -> str:
    "The name of a Job's pod, once its log begins with a text"
    pod = cluster.wait_pod(namespace, name, phase("Running"))["metadata"]["name"]
    cluster.wait(lambda: cluster.admin.logs(namespace, pod).startswith(text), 20, f"the log of {pod}")
    return pod


def outcome(cluster, namespace, name, command, **more) -> dict:
    "How a Job's container ended"
    submit(cluster, namespace, name, command, **more)
    return state(cluster.wait_pod(namespace, name, lambda pod: "exitCode" in state(pod)))


def last_seen(cluster, namespace, pod, since: str) -> dict:
    "A pod as it was when it was removed"
    changes = cluster.admin.watch("pods", namespace, resourceVersion=since, timeoutSeconds=300)
    return next(seen for change, seen in changes if change == "DELETED" and seen["metadata"]["name"] == pod)


def delete(cluster, namespace, pod) -> dict:
    "Ask for a pod's end; the pod as it was when it was removed"
    since = cluster.admin.delete("pods", namespace, pod)["metadata"]["resourceVersion"]
    return last_seen(cluster, namespace, pod, since)


def removed(cluster, namespace, pod) -> bool:
    return not any(p["metadata"]["name"] == pod for p in cluster.admin.get("pods", namespace)["items"])


def test_a_job_runs_and_its_log_can_be_read_meanwhile_and_after(cluster, namespace):
    submit(cluster, namespace, "j", "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two")
    pod = logged(cluster, namespace, "j", "one\n")
    followed = []
    follower = threading.Thread(target=lambda: followed.append(cluster.admin.logs(namespace, pod, follow="true")))
    follower.start()
    (cluster.agent.worker(namespace, pod).folder / "work" / "go").touch()
    assert cluster.wait_job(namespace, "j") == "Complete"
    follower.join(600)
    assert followed == ["one\ntwo\n"] == [cluster.admin.logs(namespace, pod)]
    assert cluster.admin.logs(namespace, pod, tailLines=1) == "two\n"
    assert cluster.admin.logs(namespace, pod, tailLines=9) == "one\ntwo\n"
    assert cluster.admin.logs(namespace, pod, timestamps="true").startswith("20")


def test_the_usual_client_follows_the_log(cluster, namespace):
    import kubernetes

    api = kubernetes.client.CoreV1Api(kubernetes.config.new_client_from_config(str(cluster.plane.kubeconfig())))
    submit(cluster, namespace, "j", "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two")
    pod = cluster.wait_pod(namespace, "j", phase("Running"))["metadata"]["name"]
    followed = api.read_namespaced_pod_log(pod, namespace, follow=True, _preload_content=False).stream()
    assert next(followed) == b"one\n"
    (cluster.agent.worker(namespace, pod).folder / "work" / "go").touch()
    assert b"".join(followed) == b"two\n"


@pytest.mark.parametrize("code", [0, 1, 75])
def test_exit_code_and_termination_message(cluster, namespace, code):
    log = "${GPUML_TERMINATION_LOG:-/dev/termination-log}"
    ended = outcome(cluster, namespace, "j", f"echo because > {log}; exit {code}")
    assert (ended["exitCode"], ended["message"]) == (code, "because\n")
    assert ended["reason"] == ("Error" if code else "Completed") and ended["startedAt"] <= ended["finishedAt"]
    assert cluster.wait_job(namespace, "j") == ("Failed" if code else "Complete")


def test_a_program_that_is_not_there(cluster, namespace):
    ended = outcome(cluster, namespace, "j", ["no-such-program"])
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError") and '"no-such-program"' in ended["message"]


def test_environment(cluster, namespace, monkeypatch):
    monkeypatch.setenv("OURS", "not for pods")
    cluster.secret(namespace, "gpuml-s3", KEY="k1", SECRET="s1")
    settings = {"metadata": {"name": "settings"}, "data": {"MODE": "fast"}}
    cluster.admin.create("configmaps", namespace, settings)
    env = [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "gpuml-s3", "key": "KEY"}}},
        {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "MODE"}}},
        {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['job-name']"}}},
        {"name": "D", "value": "$(A)-$(B)-$$(A)"},
        {"name": "E", "valueFrom": {"secretKeyRef": {"name": "none", "key": "X", "optional": True}}},
    ]
    body = job("j", "echo $A $B $C $D ${E-none} $P_SECRET $(hostname) ${OURS-none}", env=env)
    body["spec"]["template"]["spec"]["containers"][0]["envFrom"] = [{"prefix": "P_", "secretRef": {"name": "gpuml-s3"}}]
    cluster.admin.create("jobs", namespace, body)
    pod = cluster.wait_pod(namespace, "j", phase("Succeeded"))["metadata"]["name"]
    host = pod if cluster.agent.isolated else os.uname().nodename
    assert cluster.admin.logs(namespace, pod) == f"k1 fast j k1-fast-$(A) none s1 {host} none\n"


def test_missing_secret_then_missing_key_then_neither(cluster, namespace):
    wanted = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "gpuml-s3", "key": "KEY"}}}]
    submit(cluster, namespace, "j", "echo $A", env=wanted)

    def waits(message):
        return lambda pod: (
            (state(pod).get("reason"), state(pod).get("message")) == ("CreateContainerConfigError", message)
        )

    pod = cluster.wait_pod(namespace, "j", waits('secret "gpuml-s3" not found'))["metadata"]["name"]
    with pytest.raises(ApiError, match="is waiting to start: CreateContainerConfigError"):
        cluster.admin.logs(namespace, pod)
    cluster.secret(namespace, "gpuml-s3", OTHER="x")
    cluster.wait_pod(namespace, "j", waits(f"couldn't find key KEY in Secret {namespace}/gpuml-s3"))
    assert ("Failed", 'Error: secret "gpuml-s3" not found') in cluster.events(namespace, pod)
    cluster.admin.patch("secrets", namespace, "gpuml-s3", {"stringData": {"KEY": "k1"}})
    assert cluster.wait_job(namespace, "j") == "Complete" and cluster.admin.logs(namespace, pod) == "k1\n"


def test_volumes(cluster, namespace):
    if not cluster.agent.isolated:
        pytest.skip("volumes need namespaces of Linux: run as root")
    cluster.secret(namespace, "gpuml-s3", KEY="k1")
    volumes = [{"name": "scratch", "emptyDir": {}}, {"name": "keys", "secret": {"secretName": "gpuml-s3"}}]
    places = {"scratch": ["/no-such-folder/scratch", "/home/nobody-lives-here/x", "/tmp"], "keys": ["/var/keys"]}
    mounts = [{"name": name, "mountPath": path} for name, paths in places.items() for path in paths]
    script = "echo hello > /tmp/a; cat /no-such-folder/scratch/a /home/nobody-lives-here/x/a /var/keys/KEY; "
    script += "echo; pwd; touch $HOME/a $TMPDIR/a; python -c 'import gpuml'"
    body = job("j", script, volumes=volumes)
    container = body["spec"]["template"]["spec"]["containers"][0]
    container |= {"volumeMounts": mounts, "workingDir": "/no-such-folder/scratch"}
    cluster.admin.create("jobs", namespace, body)
    assert cluster.wait_job(namespace, "j") == "Complete"
    (pod,) = cluster.pods(namespace, "j")
    log = cluster.admin.logs(namespace, pod["metadata"]["name"])
    assert log == "hello\nhello\nk1\n/no-such-folder/scratch\n"
    assert not any(os.path.exists(path) for path in ("/no-such-folder", "/home/nobody-lives-here", "/var/keys"))


def test_security_context(cluster, namespace):
    if not cluster.agent.isolated:
        pytest.skip("users and mounts need namespaces of Linux: run as root")
    security = {"runAsUser": 10001, "runAsGroup": 10001}
    body = job("j", "id -u; touch /work/a; for d in / /tmp /work /var $HOME /ro; do [ -w $d ] && echo $d; done; true")
    spec = body["spec"]["template"]["spec"] | {
        "volumes": [{"name": "work", "emptyDir": {}}],
        "securityContext": security,
    }
    mounts = [{"name": "work", "mountPath": "/work"}, {"name": "work", "mountPath": "/ro", "readOnly": True}]
    spec["containers"][0] |= {"volumeMounts": mounts, "securityContext": {"readOnlyRootFilesystem": True}}
    body["spec"]["template"]["spec"] = spec
    cluster.admin.create("jobs", namespace, body)
    pod = cluster.wait_pod(namespace, "j", phase("Succeeded"))["metadata"]["name"]
    uid = 10001 if for_any_user() else 0
    assert cluster.admin.logs(namespace, pod) == f"{uid}\n/work\n"


def test_pods_know_services_by_name(cluster, namespace):
    import http.server

    address = cluster.service("greeter")
    server = http.server.HTTPServer((address, 5000), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    script = "import urllib.request as u; print(u.urlopen('http://greeter:5000', timeout=20).status)"
    submit(cluster, namespace, "j", ["python", "-c", script])
    assert cluster.wait_job(namespace, "j") == "Complete"
    server.server_close()


def test_deletion_is_said_to_the_process(cluster, namespace):
    submit(cluster, namespace, "j", POLITE, grace=60)
    pod = logged(cluster, namespace, "j")
    last = delete(cluster, namespace, pod)
    assert state(last)["exitCode"] == 75 and last["status"]["phase"] == "Failed"
    cluster.wait(lambda: "Killing" in dict(cluster.events(namespace, pod)), 5, "the event Killing")


def test_after_the_grace_period_it_is_killed(cluster, namespace):
    submit(cluster, namespace, "j", STUBBORN, grace=5)
    pod = logged(cluster, namespace, "j")
    worker, asked = cluster.agent.worker(namespace, pod), time.monotonic()
    last = delete(cluster, namespace, pod)
    assert time.monotonic() - asked >= 5
    assert b"told to stop" in b"".join(line for _, line in worker.lines)
    assert state(last)["exitCode"] == 137 and not worker.main.is_running()


def test_without_namespaces(cluster, namespace, monkeypatch):
    monkeypatch.setattr(cluster.agent, "isolated", False)
    submit(cluster, namespace, "j", f"echo because > $GPUML_TERMINATION_LOG; cd $HOME; sleep 60 & {POLITE}")
    main = cluster.agent.worker(namespace, logged(cluster, namespace, "j")).main
    (left,) = [child for child in main.children() if "60" in child.cmdline()]
    main.terminate()
    ended = state(cluster.wait_pod(namespace, "j", phase("Failed")))
    assert (ended["exitCode"], ended["message"]) == (75, "because\n")
    cluster.wait(lambda: not left.is_running(), 5, "the end of what the main process left behind")


def test_process_1_gets_no_signal_that_it_does_not_ask_for(cluster, namespace):
    if not cluster.agent.isolated:
        pytest.skip("process 1 needs namespaces of Linux: run as root")
    submit(
        cluster, namespace, "j", ["python", "-c", "print('ready', flush=True); import time; time.sleep(60)"], grace=1
    )
    pod = logged(cluster, namespace, "j")
    asked = time.monotonic()
    cluster.admin.delete("pods", namespace, pod)
    cluster.wait(lambda: removed(cluster, namespace, pod), 10)
    assert time.monotonic() - asked >= 1


def test_forced_deletion_ends_the_process_at_once(cluster, namespace):
    submit(cluster, namespace, "j", STUBBORN, grace=60)
    pod = logged(cluster, namespace, "j")
    process = cluster.agent.worker(namespace, pod).main
    cluster.remove_pod(namespace, pod)
    cluster.wait(lambda: not process.is_running(), 5, "the process's end")


def test_production_preempts_development(cluster, namespace):
    submit(cluster, namespace, "dev", POLITE, priority="gpuml-dev", grace=20, retries=3)
    victim = logged(cluster, namespace, "dev")
    since = cluster.admin.get("pods", namespace)["metadata"]["resourceVersion"]
    submit(cluster, namespace, "prod", POLITE, priority="gpuml-prod")
    last = last_seen(cluster, namespace, victim, since)
    conditions = {c["type"]: c.get("reason") for c in last["status"]["conditions"]}
    assert state(last)["exitCode"] == 75
    assert conditions["DisruptionTarget"] == "PreemptionByScheduler"
    prod = logged(cluster, namespace, "prod")
    assert cluster.wait_event(namespace, "Preempted").startswith("Preempted by")
    cluster.wait_pod(namespace, "dev", lambda pod: pod["metadata"]["name"] != victim and phase("Pending")(pod))
    cluster.admin.delete("jobs", namespace, "prod", propagationPolicy="Background")
    cluster.wait(lambda: removed(cluster, namespace, prod), 20)
    logged(cluster, namespace, "dev")


def test_development_preempts_nothing(cluster, namespace):
    cluster.admin.create("priorityclasses", "", {"metadata": {"name": "lowest"}, "value": -2000})
    submit(cluster, namespace, "low", POLITE, priority="lowest")
    low = logged(cluster, namespace, "low")
    submit(cluster, namespace, "dev", POLITE, priority="gpuml-dev")
    assert "Insufficient nvidia.com/gpu" in cluster.wait_event(namespace, "FailedScheduling")
    time.sleep(1)
    assert "deletionTimestamp" not in cluster.admin.get("pods", namespace, low)["metadata"]
    assert [phase("Pending")(pod) for pod in cluster.pods(namespace, "dev")] == [True]
    cluster.admin.delete("priorityclasses", "", "lowest")


def test_more_gpus_than_any_node_has(cluster, namespace):
    submit(cluster, namespace, "j", "true", gpus=3)
    assert "Insufficient nvidia.com/gpu" in cluster.wait_event(namespace, "FailedScheduling")
    cluster.agent.add_node("gpu-4", gpus=4)
    try:
        assert cluster.wait_job(namespace, "j") == "Complete"
        assert cluster.pods(namespace, "j")[0]["spec"]["nodeName"] == "gpu-4"
    finally:
        cluster.agent.remove_node("gpu-4")


def test_image_that_can_not_be_pulled(cluster, namespace):
    submit(cluster, namespace, "j", "true", image="registry.example/no-such-image:1")
    seen = []

    def back_off(pod):
        seen.append(state(pod).get("reason"))
        return {"ErrImagePull", "ImagePullBackOff"} <= {*seen}  # by turns

    pod = cluster.wait_pod(namespace, "j", back_off)["metadata"]["name"]
    cluster.wait(lambda: ("Failed", "Error: ImagePullBackOff") in cluster.events(namespace, pod), 5)
    assert any(
        "registry.example/no-such-image:1: not found" in message for _, message in cluster.events(namespace, pod)
    )
    cluster.admin.delete("pods", namespace, pod)
    cluster.wait(lambda: removed(cluster, namespace, pod), 10)


def test_more_memory_than_its_limit(cluster, namespace):
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'a = bytearray(200_000_000); input()'])"
    ended = outcome(cluster, namespace, "j", ["sh", "-c", f'sleep 60 | python -c "{script}"'], memory="100Mi")
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")


def test_evicted_by_the_kubelet(cluster, namespace):
    submit(cluster, namespace, "j", STUBBORN)
    pod = logged(cluster, namespace, "j")
    cluster.agent.evict(namespace, pod)
    status = cluster.wait_pod(namespace, "j", phase("Failed"))["status"]
    assert status["reason"] == "Evicted" and "low on resource: memory" in status["message"]
    disrupted = [c["reason"] for c in status["conditions"] if c["type"] == "DisruptionTarget"]
    assert disrupted == ["TerminationByKubelet"]


def test_a_lost_node(cluster, namespace):
    cluster.agent.add_node("gpu-2", gpus=2)
    try:
        submit(cluster, namespace, "j", STUBBORN, gpus=2, retries=1)
        pod = logged(cluster, namespace, "j")
        process = cluster.agent.worker(namespace, pod).main
        cluster.agent.vanish("gpu-2")
        cluster.wait(lambda: not process.is_running(), 5, "the process's end")

        def ready():
            conditions = cluster.admin.get("nodes", "", "gpu-2")["status"]["conditions"]
            return next(c["status"] for c in conditions if c["type"] == "Ready")

        cluster.wait(lambda: ready() == "Unknown", 30, "the node to be taken for lost")
        cluster.wait_pod(namespace, "j", lambda pod: "deletionTimestamp" in pod["metadata"], 30)
        with pytest.raises(ApiError):
            cluster.admin.logs(namespace, pod)
        cluster.agent.come_back("gpu-2")
        cluster.wait(lambda: removed(cluster, namespace, pod), 10)
        again = cluster.wait_pod(namespace, "j", phase("Running"))["metadata"]["name"]
        assert again != pod
    finally:
        cluster.agent.remove_node("gpu-2")


def test_the_api_server_goes_and_comes_back(cluster, namespace):
    submit(cluster, namespace, "j", "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two")
    pod = logged(cluster, namespace, "j", "one\n")
    cluster.plane.down("kube-apiserver")
    (cluster.agent.worker(namespace, pod).folder / "work" / "go").touch()
    cluster.agent.worker(namespace, pod).process.wait(600)
    cluster.plane.up("kube-apiserver")
    assert cluster.wait_job(namespace, "j") == "Complete"
    assert cluster.admin.logs(namespace, pod) == "one\ntwo\n"
    cluster.remove_pod(namespace, pod)
    cluster.wait(lambda: not cluster.agent.worker(namespace, pod), 20, "the agent to see it")


def test_quota(cluster, namespace):
    hard = {"requests.nvidia.com/gpu": "0"}
    cluster.admin.create("resourcequotas", namespace, {"metadata": {"name": "gpus"}, "spec": {"hard": hard}})
    cluster.wait(lambda: cluster.admin.get("resourcequotas", namespace, "gpus")["status"].get("hard"), 10)
    submit(cluster, namespace, "j", "true")
    assert "exceeded quota: gpus" in cluster.wait_event(namespace, "FailedCreate")


def test_users(cluster, namespace):
    for user in ("prod-user", "dev-user", "outsider"):
        with pytest.raises(ApiError, match=f'User "{user}" cannot list resource "pods"'):
            cluster.plane.api(user).get("pods", namespace)


@pytest.mark.skipif(bool(missing(["kueue"])), reason="no kueue for a cluster: `make servers` builds it")
def test_a_kueue_that_does_not_start_leaves_nothing_in_the_way_of_jobs(cluster, namespace, tmp_path):
    kueue = Kueue(cluster.plane, tmp_path)
    with socket.create_server(("127.0.0.1", kueue.health)), pytest.raises(AssertionError, match="Kueue ended"):
        kueue.start()
    hooks = "/apis/admissionregistration.k8s.io/v1/{}webhookconfigurations"
    for path in map(hooks.format, ("mutating", "validating")):
        assert json.loads(cluster.admin.request("GET", path).data)["items"] == []
    assert outcome(cluster, namespace, "j", "exit 0")["exitCode"] == 0


def test_nothing_outlives_the_tests(plane, tmp_path):
    "Neither servers nor pods, also when the tests are killed"
    script = """
        import pathlib, sys, time
        from tests.cluster.cluster import AgentCluster, job, phase
        from tests.cluster.plane import Plane
        folder = pathlib.Path(sys.argv[1])
        cluster = AgentCluster(Plane(folder).start(), folder)
        cluster.admin.create("jobs", "default", job("j", "sleep 12345 & sleep 12345"))
        cluster.wait_pod("default", "j", phase("Running"))
        print("running", flush=True)
        time.sleep(300)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    tests = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert tests.stdout.readline() == "running\n"
    assert len(mine(tmp_path)) > 4
    tests.kill()
    try:
        until(lambda: not mine(tmp_path), pause=0.1)
    finally:
        for process in mine(tmp_path):
            process.kill()


def mine(folder) -> list[psutil.Process]:
    "Processes that were started with a folder in their command or environment"
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        text = " ".join([*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()])
        if str(folder) in text and process.pid != os.getpid() and process.info["status"] != "zombie":
            found.append(process)
    return found
