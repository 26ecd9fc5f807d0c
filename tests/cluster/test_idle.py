"A GPU that is held and not used: warned about, released with a checkpoint, and continued; Prometheus and the API server are real"

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from ruamel.yaml import YAML

from gpuml.base.errors import Exit
from gpuml.base.storage import Storage
from gpuml.cluster import jobs as c
from gpuml.cluster.idle import notice
from tests.cluster.administer import Administrator
from tests.cluster.api import Api, ApiError
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.conftest import ROOT
from tests.prometheus import TEXT, Prometheus, exporter, needs_prometheus

pytestmark = needs_prometheus
IDLE = list(YAML(typ="safe").load_all((ROOT / "k8s" / "idle" / "idle.yaml").read_text()))
WARN, RELEASE = 0.05, 0.2  # minutes
LATER = 0.5  # where Prometheus is stopped between the two
FAR = 60.0  # where a warning is looked at: the release is up to another process, which warns anew


@pytest.fixture
def prometheus(cluster, namespace, tmp_path):
    "Prometheus, over what the exporters say of the namespace's pods; `.busy[pod]` is what its GPU does, in per cent"
    busy = {}

    def pods():
        return [p for p in cluster.admin.get("pods", namespace)["items"] if p["spec"].get("nodeName")]

    def dcgm():
        said = 'DCGM_FI_DEV_GPU_UTIL{{gpu="0",UUID="GPU-{0}",namespace="{1}",pod="{0}"}} {2}\n'
        return TEXT, "".join(said.format(n, namespace, busy.get(n, busy.get("*", 0))) for n in names(pods()))

    def kube_state_metrics():
        text = ""
        for pod in pods():
            meta, where = pod["metadata"], f'namespace="{namespace}",pod="{pod["metadata"]["name"]}"'
            labels = {k: v for k, v in meta.get("labels", {}).items() if k.startswith("gpuml.io/")}
            shown = "".join(f',label_{re.sub("[^a-z]", "_", k)}="{v}"' for k, v in labels.items())
            text += f"kube_pod_labels{{{where}{shown}}} 1\n"
            text += (
                f'kube_pod_info{{{where},node="gpu-1",priority_class="{pod["spec"].get("priorityClassName", "")}"}} 1\n'
            )
        return TEXT, text

    pages, server = {"/dcgm": dcgm, "/ksm": kube_state_metrics}, Prometheus(tmp_path)
    server.busy = busy
    with exporter(pages) as address, server.look_at(address, dict.fromkeys(pages, {})):
        yield server


def names(pods):
    return [p["metadata"]["name"] for p in pods]


@pytest.fixture
def account(cluster, namespace):
    "k8s/idle's account with its rights in the test's namespace, as a kubeconfig of its own"
    administrator = Administrator(cluster.plane)
    made = []
    for m in json.loads(json.dumps([m for m in IDLE if m["kind"] not in ("Deployment", "NetworkPolicy")])):
        if m["metadata"].get("namespace") == "gpuml-dev":
            m["metadata"]["name"] += "-jobs"  # all in one namespace here
        if "namespace" in m["metadata"]:
            m["metadata"]["namespace"] = namespace
        for subject in m.get("subjects", []):
            subject["namespace"] = namespace
        if m["kind"] == "Role":
            m["rules"][-1]["resourceNames"] = ["ada-jupyter"]
        administrator.apply(m)
        made.append(m)
    yield administrator.token(namespace, "idle")
    for m in made:
        administrator.remove(m)


@contextmanager
def releasing(cluster, namespace, prometheus, token, folder, release=RELEASE):
    "The Deployment's own command, with other minutes; a list of what it says, line by line"
    (deployment,) = (m for m in IDLE if m["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    change = {
        "gpuml": f"{os.path.dirname(sys.executable)}/gpuml", "gpuml-dev=30/60": f"{namespace}={WARN}/{release}",
        "gpuml-system=60/120": None, "--every=60": "--every=1",
        "--prometheus=http://prometheus-operated.monitoring:9090": f"--prometheus={prometheus.url}",
    }  # fmt: skip
    assert change.keys() <= set(container["command"])
    command = [change.get(word, word) for word in container["command"] if change.get(word, word)]
    kubeconfig = folder / "idle.kubeconfig"
    admin = cluster.plane.kubeconfig("admin", namespace).read_text()
    kubeconfig.write_text(admin.replace(cluster.plane.tokens["admin"], token))
    process = subprocess.Popen(
        command, env={**os.environ, "KUBECONFIG": str(kubeconfig), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = []
    threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")), daemon=True).start()
    try:
        yield said
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0, said
        assert (folder / "gpuml-idle-alive").exists()


def test_a_job_is_warned_about_released_and_goes_on(site, prometheus, account, tmp_path):
    site.write("dev", "gpuml-dev", 48)
    prometheus.busy["*"] = 90
    dev = site.submit(of="dev")
    site.wait_update(dev)
    worker = site.worker(dev)
    worker.freeze()  # until it is told to end: it is not done before
    with releasing(site.cluster, site.namespace, prometheus, account, tmp_path, FAR) as said:
        site.cluster.wait(lambda: len(said) == 1, what="its first line")
        prometheus.busy["*"] = 0
        told = site.why(dev, "it has not used its GPU since")
        assert re.search(
            r"running: it has not used .* UTC; unless it does, it is ended at .* UTC, with a checkpoint", told
        )
        assert "it has not used its GPU since" in repr(c.jobs([site.config(of="dev")]))
    with releasing(site.cluster, site.namespace, prometheus, account, tmp_path) as later:
        site.why(dev, "stopping")
        worker.thaw()
        state = dev.wait(600)
    assert state.phase == "released" and "so it was ended; the checkpoint stays" in state.why, (state, later)
    events = sorted(e for e, _ in site.cluster.events(site.namespace, dev.run_id) if e.startswith("GPU"))
    assert events == ["GPUIdle", "GPUIdle", "GPUReleased"]
    said += later[1:]
    assert [line.split(": ", 1)[1].split()[1] for line in said[1:]] == ["has", "has", "did"], said
    done = max(step for step, _ in dev.metrics()["loss"])
    assert Storage(site.s3.endpoint).find(f"{dev.place}/checkpoints/*/*") and state.exit_code == Exit.INTERRUPTED
    assert not Storage(site.s3.endpoint).find(f"{dev.place}/certificate.json")
    wait = subprocess.run([sys.executable, "-m", "gpuml", "wait", dev.run_id], capture_output=True, text=True)
    assert wait.returncode == Exit.INTERRUPTED and "released: it did not use its GPU" in wait.stdout, wait
    # the GPU is free for others
    site.cluster.admin.create("jobs", site.namespace, holder("other", "true", priority="gpuml-prod"))
    assert site.cluster.wait_job(site.namespace, "other") == "Complete"
    # and the same submitted again is the same run
    again = site.submit(of="dev")
    assert again.run_id == dev.run_id and "goes on where it was when its GPU was released" in again.note
    assert site.submit(of="dev").note.startswith("the same notebook, code and config is at work already")
    state = again.wait(600)
    assert state.phase == "succeeded", f"{state}\n{again.logs()}"
    steps = [step for step, _ in again.metrics()["loss"]]
    assert again.outcome()["attempt"] == 2 and steps == list(range(1, again.run.metrics["updates"] + 1))
    assert 1 <= done < len(steps)
    assert site.submit(of="dev").run_id == dev.run_id.removesuffix("1") + "2"  # what is done is not gone on with


LAB = {"app": "lab", "gpuml.io/owner": "ada"}


def test_jupyterlab_is_warned_stopped_and_started_again(cluster, namespace, prometheus, account, tmp_path):
    pod = holder("x", ["sleep", "6000"], grace=1, priority="gpuml-dev")["spec"]["template"]["spec"]
    spec = {"serviceName": "lab", "replicas": 1, "selector": {"matchLabels": LAB}}
    spec |= {"template": {"metadata": {"labels": LAB}, "spec": pod | {"restartPolicy": "Always"}}}
    path = f"/apis/apps/v1/namespaces/{namespace}/statefulsets"
    cluster.admin.request("POST", path, {"metadata": {"name": "ada-jupyter"}, "spec": spec})
    notices = tmp_path / "notices"
    notices.mkdir()

    def running():
        return [p for p in cluster.admin.get("pods", namespace)["items"] if phase("Running")(p)]

    def note():
        "What the pod would see in its volume, as a notebook there shows it"
        data = cluster.admin.get("configmaps", namespace, "gpuml-idle").get("data") or {}
        (notices / "ada-jupyter").write_text(data.get("ada-jupyter", ""))
        return notice(str(notices), "ada-jupyter-0")

    def since():
        "The moment from which on it is idle, by what is noted of it"
        return json.loads(cluster.admin.get("configmaps", namespace, "gpuml-idle")["data"]["ada-jupyter"])["since"]

    assert names(cluster.wait(running)) == ["ada-jupyter-0"]
    with releasing(cluster, namespace, prometheus, account, tmp_path, FAR):
        told = cluster.wait(note, what="a warning")
        assert re.fullmatch(r"it has not used its GPU since .* UTC; unless it does, it is stopped at .* UTC: .*", told)
    with releasing(cluster, namespace, prometheus, account, tmp_path) as said:
        cluster.wait(lambda: not cluster.admin.get("pods", namespace)["items"], what="the pod to go")
        cluster.wait(lambda: "so it was stopped; its files stay" in said[-1], what="its last line")
        assert note() == ""
    gone = f"{datetime.now(UTC):%FT%TZ}"
    cluster.admin.request(
        "PATCH", f"{path}/ada-jupyter/scale", {"spec": {"replicas": 1}}, kind="application/merge-patch+json"
    )
    (pod,) = cluster.wait(running)
    with releasing(cluster, namespace, prometheus, account, tmp_path, FAR):
        cluster.wait(note, what="a warning of its own")
        assert since() >= gone  # the one before was idle, not this one
        assert [p["metadata"]["uid"] for p in running()] == [pod["metadata"]["uid"]]
    mine = Api(cluster.plane.url, account, str(cluster.plane.certificate))
    with pytest.raises(ApiError, match="403"):  # it can't change what the pod runs
        mine.request("PATCH", f"{path}/ada-jupyter", {"spec": {"replicas": 0}}, kind="application/merge-patch+json")


def test_a_job_s_author_can_not_keep_the_gpu_and_a_busy_pod_does(cluster, namespace, prometheus, account, tmp_path):
    "Marks on a Job that name a time far off, or say that it was released, don't help, nor does a pod that never starts; a Job is as idle as its busiest pod"
    forged = {"idle-since": "2020-01-01T00:00:00Z", "idle-until": "2099-01-01T00:00:00Z"}
    cases = {"later": forged, "over": {"released": "2020-01-01T00:00:00Z"}, "nonsense": dict.fromkeys(forged, "x")}
    cases["stuck"] = {}  # its image can't be pulled
    cluster.agent.add_node("gpu-6", gpus=6)
    try:
        for name in (*cases, "two"):
            image = {"image": "no-such-image"} if name == "stuck" else {}
            body = holder(name, "exec sleep 6000", grace=1, priority="gpuml-dev", **image)
            body["metadata"]["annotations"] = {f"gpuml.io/{k}": v for k, v in cases.get(name, {}).items()}
            body["spec"] |= {"parallelism": 2, "completions": 2} if name == "two" else {}
            body["spec"]["template"]["metadata"] = {"labels": {"gpuml.io/owner": "ada"}}
            cluster.admin.create("jobs", namespace, body)
            cluster.wait_pod(namespace, name, phase("Pending" if name == "stuck" else "Running"))
        cluster.wait(lambda: all(map(phase("Running"), cluster.pods(namespace, "two"))))
        busy = names(cluster.pods(namespace, "two"))[0]
        prometheus.busy[busy] = 50
        with releasing(cluster, namespace, prometheus, account, tmp_path) as said:
            assert {name: cluster.wait_job(namespace, name) for name in cases} == dict.fromkeys(cases, "Failed")
            assert not any("two" in line for line in said[1:]), said
            prometheus.busy[busy] = 0
            assert cluster.wait_job(namespace, "two") == "Failed"
    finally:
        cluster.agent.remove_node("gpu-6")


def test_what_is_not_known_or_not_named_is_left_alone(cluster, namespace, prometheus, account, tmp_path):
    "Prometheus goes away before the release: it waits until it is back, and begins anew; another namespace is not looked at"

    def marked(place):
        return (cluster.admin.get("jobs", place, "quiet")["metadata"].get("annotations") or {}).keys()

    other = cluster.make_namespace()
    cluster.agent.add_node("gpu-2", gpus=1)
    try:
        for place in (namespace, other):
            body = holder("quiet", "exec sleep 6000", grace=1, priority="gpuml-dev")
            body["spec"]["template"]["metadata"] = {"labels": {"gpuml.io/owner": "ada"}}
            cluster.admin.create("jobs", place, body)
        cluster.wait_pod(namespace, "quiet", phase("Running"))
        with releasing(cluster, namespace, prometheus, account, tmp_path, LATER) as said:
            cluster.wait(lambda: any("it has not used its GPU" in line for line in said), what="a warning")
            assert marked(namespace) == {"gpuml.io/idle-since", "gpuml.io/idle-until"}
            prometheus.busy["*"] = 90
            cluster.wait(lambda: not marked(namespace), what="the warning to be withdrawn")
            prometheus.busy["*"] = 0
            cluster.wait(lambda: marked(namespace), what="another warning")
            prometheus.stop()
            cluster.wait(lambda: "no answer from Prometheus" in said[-1])
            threading.Event().wait(LATER * 60)
            assert phase("Running")(cluster.pods(namespace, "quiet")[0]) and marked(namespace)
            words = [line.split(": ", 1)[1].split()[1] for line in said[1:-1]]
            assert words == ["has", "uses", "has"], said
            prometheus.start()
            cluster.wait(lambda: "it goes on" in "".join(said))
            assert cluster.wait_job(namespace, "quiet") == "Failed"
        (pod,) = cluster.pods(other, "quiet")
        assert phase("Running")(pod) and not marked(other)
    finally:
        cluster.remove_namespace(other)
        cluster.agent.remove_node("gpu-2")
