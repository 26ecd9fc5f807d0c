"Jobs on a real control plane: submitted, explained, followed, preempted, cancelled, found again"

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpuml.base import storage
from gpuml.base.errors import Exit, GpumlError
from gpuml.cluster import jobs as c
from gpuml.ui.attend import attend, run_of
from gpuml.ui.gpu_cell import hand_back, send_cell
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.cluster.relay import Relay
from tests.conftest import ENDLESS
from tests.s3 import KEY, SECRET


def test_a_job_from_submit_to_run(site):
    job = site.submit()
    state = job.wait(600)
    assert (state.phase, state.exit_code, state.attempts) == ("succeeded", 0, 1), f"{state}\n{job.logs()}"
    assert job.run.metrics["accuracy"] > 0.5 and job.run.id == job.run_id
    assert json.loads(job.notebook().read_text())["cells"]
    assert len(job.metrics()["loss"]) == job.run.metrics["updates"]
    assert "training" in job.logs() and "succeeded" in repr(job) and job.run_id in job._repr_html_()
    ((listed, listed_state),) = c.jobs([site.config()])
    assert (listed.run_id, listed_state.phase) == (job.run_id, "succeeded")
    site.cluster.admin.delete("jobs", site.namespace, job.run_id, propagationPolicy="Background")
    site.cluster.wait(lambda: job.api.get(job.at.path) is None)
    again = c.find(job.run_id, [site.config()])
    assert again.status.phase == "succeeded" and again.place == job.place and "training" in again.logs()
    second = site.submit()
    assert second.run_id == job.run_id.removesuffix("1") + "2"
    second.cancel()


def test_a_cell_and_a_training_that_their_cells_wait_for(site):
    "`%%gpu`: values go through the bundle, and come back through S3; `%gpu_train --on cluster` has its run"
    names, phases = {"texts": ["a", "bb"]}, []
    body = "lengths = [len(text) for text in texts]"
    job = send_cell(site.config(), names, body, ["texts"], ["lengths"], {"--on": "cluster"})
    hand_back(names, job, attend(job, lambda _, state: phases.append(state.phase)), ["lengths"])
    assert names["lengths"] == [1, 2] and phases[-1] == "succeeded"
    job = site.submit()
    assert run_of(job, attend(job, lambda *_: None)).id == job.run_id


# what is refused before anything is sent, and the sentence
REFUSED = {
    "never fits": (["compute.gpus=3"], "compute.gpus: 3 never fit: the largest node, gpu-1, has 1"),
    "no such class": (["compute.priority_class=urgent"], "the cluster has no PriorityClass urgent"),
    "missing bucket": (["output=s3://no-such-bucket/out"], "s3://no-such-bucket"),
    "missing data": (["data.train=s3://datasets/nothing-here/"], "no data files at s3://datasets/nothing-here/"),
    "bad column": (["data.text=body"], "no column 'body'; the columns are: text, label"),
    "data elsewhere here": (["data.train=../elsewhere"], "data.train: ../elsewhere: lies outside the project"),
    "output here": (["output=outputs"], "output: outputs: lies on this machine, where a pod can't reach it"),
    "model here": (["model.name=data"], "model.name: data: lies on this machine"),
    "MLflow here": (["tracking.uri=http://localhost:5000"], "means the pod itself there"),
    "no image": (["compute.image=null"], "compute.image: is not set"),
    "no namespace": (["compute.namespace=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(site, case):
    overrides, said = REFUSED[case]
    with pytest.raises(GpumlError) as refused:
        site.submit(*overrides)
    assert said in str(refused.value), refused.value
    assert not site.cluster.admin.get("jobs", site.namespace)["items"]
    assert not storage.Storage(site.s3.endpoint).find(site.s3.url("out/.bundles/*"))


def test_who_may_not(site, monkeypatch):
    "An outsider is told what is missing, an expired login what to do"
    monkeypatch.setenv("KUBECONFIG", str(site.cluster.plane.kubeconfig("outsider", site.namespace)))
    with pytest.raises(
        GpumlError, match="you may not create jobs, get jobs, list pods, get pods/log in the namespace"
    ) as refused:
        site.submit()
    assert refused.value.exit_code == Exit.NOT_PERMITTED
    file = site.cluster.plane.kubeconfig("admin", site.namespace)
    expired = site.folder / "expired.kubeconfig"
    expired.write_text(file.read_text().replace(site.cluster.plane.tokens["admin"], "expired"))
    monkeypatch.setenv("KUBECONFIG", str(expired))
    for call in (site.submit, lambda: c.jobs([site.config()])):
        with pytest.raises(GpumlError, match="does not accept your login") as refused:
            call()
        assert refused.value.exit_code == Exit.NOT_PERMITTED


def test_no_cluster_at_all(site, monkeypatch):
    text = site.cluster.plane.kubeconfig("admin", site.namespace).read_text()
    nowhere = site.folder / "nowhere.kubeconfig"
    nowhere.write_text(text.replace(site.cluster.plane.url, "https://127.0.0.1:9"))
    monkeypatch.setenv("KUBECONFIG", str(nowhere))
    with pytest.raises(GpumlError, match="no answer from the cluster at https://127.0.0.1:9") as refused:
        c.jobs([site.config()], patience=1.0)
    assert refused.value.exit_code == Exit.UNREACHABLE


@pytest.fixture
def held(site):
    "The only GPU is held by a production pod"
    name = "holder"
    body = holder(name, "exec sleep 6000", priority="gpuml-prod", grace=1)
    site.cluster.admin.create("jobs", site.namespace, body)
    site.cluster.wait_pod(site.namespace, name, phase("Running"))
    yield name
    site.cluster.admin.delete("jobs", site.namespace, name, propagationPolicy="Background")


def test_why_it_waits(site, held):
    job = site.submit(ENDLESS)
    said = site.why(job, "GPU")
    assert "pending: needs 1 GPU: none of 1 is free; held by 1 production job; it starts when one ends" in said
    assert "needs 1 GPU" in repr(c.jobs([site.config()]))
    site.cluster.agent.add_node("gpu-2", gpus=1)
    try:
        site.why(job, "running", 60)
    finally:
        site.cluster.agent.remove_node("gpu-2")


@pytest.mark.parametrize(
    "case", ["quota", "image", "no Secret", "no key", "no memory", "deadline", "wrong key", "node lost"]
)
def test_why_it_does_not_run(site, case):
    overrides, secret = ["compute.retries=0"], {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    if case == "quota":
        spec = {"hard": {"requests.nvidia.com/gpu": "0"}}
        site.cluster.admin.create("resourcequotas", site.namespace, {"metadata": {"name": "gpuml-dev"}, "spec": spec})
        site.cluster.wait(
            lambda: site.cluster.admin.get("resourcequotas", site.namespace, "gpuml-dev").get("status", {}).get("hard")
        )
        said = "quota gpuml-dev: 0 of 0 GPUs used; it starts when others end"
    elif case == "image":
        overrides.append("compute.image=registry.example.com/no-such-image:1")
        said = "image can't be pulled: "
    elif case == "no Secret":
        overrides.append("compute.s3_secret=nobody")
        said = "Secret nobody is not in this namespace"
    elif case == "no key":
        site.cluster.secret(site.namespace, "half", AWS_ACCESS_KEY_ID=KEY)
        overrides.append("compute.s3_secret=half")
        said = "Secret half is missing key AWS_SECRET_ACCESS_KEY"
    elif case == "no memory":
        overrides.append("compute.memory=60Mi")
        said = "killed: it needed more memory than compute.memory=60Mi"
    elif case == "deadline":
        overrides += [ENDLESS, "compute.deadline=0.003", "compute.grace=1"]
        said = "ended by its deadline, compute.deadline="
    elif case == "wrong key":
        site.cluster.secret(site.namespace, "wrong", **secret | {"AWS_SECRET_ACCESS_KEY": "not-the-secret-key"})
        overrides.append("compute.s3_secret=wrong")
        said = "(exit code 77)"
    else:
        site.cluster.agent.add_node("gpu-9", gpus=1, labels={"lost": "soon"})
        overrides += [ENDLESS, "compute.node_selector={lost: soon}"]
        said = "node gpu-9 does not answer since"
    job = site.submit(*overrides)
    try:
        if case == "node lost":
            site.cluster.wait_pod(site.namespace, job.run_id, phase("Running"))
            site.cluster.agent.vanish("gpu-9")
        found = site.why(job, said, 120)
        if case in ("no memory", "deadline", "wrong key"):
            assert said in job.wait(600).why and job.status.phase == "failed", found
    finally:
        job.cancel()
        if case == "node lost":
            site.cluster.agent.remove_node("gpu-9")


def test_small_data_travels_and_pods_may_know_s3_by_another_name(site):
    if not site.cluster.agent.isolated:
        pytest.skip("names of services need namespaces of Linux: run as root")
    site.cluster.agent.services["minio"] = "127.0.0.1"
    inside = f"compute.s3_endpoint=http://minio:{site.s3.endpoint.rpartition(':')[2]}"
    site.write("dev", "gpuml-dev", 1)
    job = site.submit("data.train=data", inside, of="dev")
    assert job.wait(600).phase == "succeeded", f"{job}\n{job.logs()}"
    assert "http://minio" in (job.run.folder / "config.yaml").read_text()


def test_a_cell_that_raises(site):
    site.notebook.write_text(site.notebook.read_text().replace("run.mistakes(8)", "1 / 0"))
    job = site.submit("compute.retries=0", "train.epochs=1")
    state = job.wait(600)
    assert (state.phase, state.exit_code) == ("failed", 1) and "ZeroDivisionError" in state.why, (
        f"{state}\n{job.logs()}"
    )
    assert "division by zero" in job.notebook().read_text()


def test_submitted_once(site, held):
    "Twice, twenty times at once, and when the API server's answer is lost: one Job"
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda _: site.submit(), range(20)))
    assert len({job.run_id for job in made}) == 1
    assert "--again makes another" in site.submit().note
    assert site.submit(again=True).run_id != made[0].run_id
    relay = Relay(site.cluster.plane.url, str(site.cluster.plane.certificate))
    config = site.folder / "relay.kubeconfig"
    text = site.cluster.plane.kubeconfig("admin", site.namespace).read_text()
    config.write_text(text.replace(site.cluster.plane.url, relay.url))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(config))
        relay.lose = 1
        lost = site.submit("train.epochs=9")
    relay.close()
    assert relay.lost == 1 and lost.note == "it had been made already"
    names = [
        j["metadata"]["name"]
        for j in site.cluster.admin.get("jobs", site.namespace, labelSelector="app.kubernetes.io/name=gpuml")["items"]
    ]
    assert sorted(names) == sorted({made[0].run_id, lost.run_id, made[0].run_id.removesuffix("1") + "2"})
    with pytest.raises(GpumlError, match="is there already, with other code or another config"):
        site.submit("train.epochs=8", name=lost.run_id)
    for name in names:
        c.find(name, [site.config()]).cancel()


def test_followed_from_another_process_while_the_api_server_is_away(site):
    job = site.submit("train.epochs=40")
    code = f"from gpuml.cluster import jobs as cluster; from gpuml.base.loading import load; cluster.find({job.run_id!r}, [load('prod')]).logs(follow=True)"
    follower = subprocess.Popen([sys.executable, "-c", code], cwd=site.folder, stdout=subprocess.PIPE, text=True)
    site.why(job, "running", 60)
    site.cluster.wait(lambda: "training" in job.logs(), 120)
    site.cluster.plane.down("kube-apiserver")
    time.sleep(3)
    site.cluster.plane.up("kube-apiserver")
    text, _ = follower.communicate(timeout=600)
    assert follower.returncode == 0 and "succeeded" in text and "training" in text
    assert_each_line_once(text)


def assert_each_line_once(text):
    "Nothing of a log is printed twice: its first lines have the pod's name, or a time"
    lines = [line for line in text.splitlines() if not line.startswith("[")]
    twice = {line for line in lines if lines.count(line) > 1 and line.strip()}
    assert text.count(".ipynb on ") == len({line for line in lines if ".ipynb on " in line}) and not twice, twice


def test_followed_late(site):
    "Who begins to follow in the middle gets the running attempt's log once, though storage has a copy of it"
    site.calm(0.2)
    job = site.submit("train.epochs=30")
    site.cluster.wait(
        lambda: storage.Storage(site.s3.endpoint).match(job.place, "logs/*.txt"), 180, "a copy of its log"
    )
    site.cluster.wait(lambda: "training, update" in job.status.progress, 180, "training")
    time.sleep(6)  # until the copy has some of the training too
    printed = []
    c.find(job.run_id, [site.config()]).follow(printed.append)
    text = "".join(printed)
    assert "succeeded" in text and "training" in text, text
    assert_each_line_once(text)


def test_a_longer_deadline_goes_on_with_the_same_run(site):
    "Stopping while its pod saves; one exit code however it is waited for; submitted again, the run goes on"
    job = site.submit("train.epochs=40", "compute.deadline=2")
    site.wait_update(job)
    worker, said = site.worker(job), []
    worker.freeze()
    site.cluster.admin.patch("jobs", site.namespace, job.run_id, {"spec": {"activeDeadlineSeconds": 1}})

    def say(text):
        said.append(text)
        if "its deadline has come" in text:
            worker.thaw()

    state = job.wait(600, say)
    assert any(text.startswith("stopping: saves a checkpoint; its deadline has come") for text in said), said
    assert not any(text.startswith("waiting") for text in said), said
    assert state.phase == "failed" and "the same run goes on from update" in state.why, said
    gpuml = [sys.executable, "-m", "gpuml"]
    codes = [
        subprocess.run([*gpuml, *words], cwd=site.folder, capture_output=True).returncode
        for words in (["wait", job.run_id], ["logs", job.run_id, "--follow"])
    ]
    assert codes == [75, 75]
    longer = site.submit("train.epochs=40", "compute.deadline=3")
    assert longer.run_id == job.run_id and longer.note.startswith("goes on where its deadline ended it")
    state = longer.wait(600)
    assert (state.phase, state.attempts, longer.outcome()["attempt"]) == ("succeeded", 2, 2), (
        f"{state}\n{longer.logs()}"
    )


def test_cancelled(site):
    job = site.submit(ENDLESS)
    site.wait_update(job)
    assert job.cancel().phase in ("cancelled", "stopping")
    state = job.wait(600)
    assert state.phase == "cancelled" and f"stays in {job.place}, submitting the same begins anew" in state.why
    assert not site.cluster.pods(site.namespace, job.run_id)
    assert storage.Storage(site.s3.endpoint).find(f"{job.place}/checkpoints/*/*")
