"""Attempts that end in the middle of training, and jobs that are preempted again and again

What is unfinished must not be shown as finished: not by the Job, nor in MLflow, its registry, or the executed notebook.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest

from gpuml.base.storage import Storage
from gpuml.cluster.manifest import verdict
from gpuml.cluster.submission import prepare
from gpuml.training.account import ACCOUNT, account_text
from gpuml.training.attempts import moment
from gpuml.training.ledger import ledger_of
from gpuml.training.ledger_files import read_histories
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.conftest import ENDLESS

SENSITIVE = """\
import signal
from torch.optim import optimizer
failing, hoard = [], []
def fail(*_):
    if failing:
        1 / 0
optimizer.register_optimizer_step_pre_hook(fail)
signal.signal(signal.SIGUSR1, lambda *_: failing.append(1))
signal.signal(signal.SIGUSR2, lambda *_: hoard.append(b"x" * 6 * 10**9))
"""


def training(site, job):
    "Wait until the attempt is in the middle of its training; what runs it"
    site.wait_update(job)
    return site.worker(job)


def kernel_of(worker) -> psutil.Process:
    "The process that trains"
    below = psutil.Process(worker.process.pid).children(recursive=True)
    return next(p for p in below if "ipykernel_launcher" in " ".join(p.cmdline()))


ENDINGS = {  # what is done to the attempt; the state that it leaves the job in, and a part of the sentence
    "SIGTERM": (lambda worker: worker.terminate(60), ("waiting", "running", "pending"), ""),
    "SIGKILL": (lambda worker: worker.main.kill(), ("failed",), "killed"),
    "out of memory": (lambda worker: kernel_of(worker).send_signal(signal.SIGUSR2), ("failed",), "compute.memory=4Gi"),
    "cell error": (lambda worker: kernel_of(worker).send_signal(signal.SIGUSR1), ("failed",), "ZeroDivisionError"),
    "kernel death": (lambda worker: kernel_of(worker).kill(), ("failed",), "the kernel died in cell"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_unfinished_is_nowhere_shown_as_finished(site, mlflow, ending):
    act, phases, said = ENDINGS[ending]
    site.add_cell(SENSITIVE, before="%gpu_train")
    retries = 3 if ending == "SIGTERM" else 0  # older servers count an interruption as a failure
    words = [f"compute.retries={retries}", f"tracking.register={site.namespace}", "tracking.log_model=true"]
    job = site.submit(ENDLESS, *words)
    worker = training(site, job)
    act(worker)

    try:
        site.cluster.wait(lambda: worker.name not in alive(site, job), 180, "the attempt to end")
    finally:
        print(job.logs()[-2000:])
    assert not shown_as_finished(site, job, mlflow)
    state = job.status
    assert state.phase in phases and said in state.why, state
    job.cancel()
    assert job.wait(600).phase in ("cancelled", "failed")
    assert not shown_as_finished(site, job, mlflow)


def alive(site, job) -> list[str]:
    "Pods of attempts that have not ended"
    pods = site.cluster.pods(site.namespace, job.run_id)
    return [p["metadata"]["name"] for p in pods if p["status"]["phase"] not in ("Failed", "Succeeded")]


def shown_as_finished(site, job, database) -> list[str]:
    "Where the job, of which much is left to do, is shown as done"
    found, store = [], sqlite3.connect(database)
    if (made := job.api.get(job.at.path)) and any(
        x["type"] == "Complete" for x in made["status"].get("conditions", [])
    ):
        found.append("Job")
    statuses = [s for (s,) in store.execute("select status from runs where name = ?", (job.run_id,))]
    if len(statuses) > 1 or "FINISHED" in statuses:
        found.append(f"MLflow: {statuses}")
    if store.execute("select count(*) from model_versions where name = ?", (site.namespace,)).fetchone() != (0,):
        found.append("registry")
    note, *cells = json.loads(job.notebook().read_text())["cells"]
    states = [x["metadata"]["papermill"]["status"] for x in cells if "%gpu_train" in "".join(x["source"])]
    if states == ["completed"] or "all cells are done" in "".join(note["source"]):
        found.append(f"notebook: {states}, {note['source']}")
    return found + [f.url for f in Storage(site.s3.endpoint).find(f"{job.place}/certificate.json")]


def test_preempted_three_times(site, mlflow):
    "No retry is used up, production starts within the grace period, and the curve in MLflow has every step once"
    site.write("dev", "gpuml-dev", 12)
    site.calm(0.5)
    dev = site.submit(of="dev")
    for i in range(3):
        training(site, dev)
        name = f"prod-{i}"
        begun = time.monotonic()
        production = holder(name, "exec sleep 6000", priority="gpuml-prod", grace=1)
        with site.standing(dev):
            site.cluster.admin.create("jobs", site.namespace, production)
        site.cluster.wait_pod(site.namespace, name, phase("Running"), 60 + 5)
        print(f"production runs {time.monotonic() - begun:.1f} s after it was submitted")
        why = site.why(dev, "held by 1 production job")
        assert "needs 1 GPU" in why
        assert not site.cluster.admin.get("jobs", site.namespace, dev.run_id)["status"].get("failed")
        outcome = dev.outcome()
        assert (outcome["exit_code"], outcome["attempt"]) == (75, i + 1)
        assert verdict(prepare(site.config(of="dev"), site.notebook).manifest, 75) == "Ignore"
        site.cluster.admin.delete("jobs", site.namespace, name, propagationPolicy="Background")
    state = dev.wait(600)
    assert (state.phase, dev.outcome()["attempt"]) == ("succeeded", 4), f"{state}\n{dev.logs()}"
    steps = (
        "select step, count(*) from metrics join runs using (run_uuid) where name = ? and key = 'loss' group by step"
    )
    counted = sqlite3.connect(mlflow).execute(steps, (dev.run_id,)).fetchall()
    assert counted == [(i, 1) for i in range(1, dev.run.metrics["updates"] + 1)]
    its_time_adds_up(site, dev)


def its_time_adds_up(site, job):
    "The ledger has four attempts on one GPU, all of their time, and the waits between them"
    histories = read_histories([site.config(of="dev")])
    (history,) = histories.attempts.values()
    (account,) = histories.accounts()
    print(ledger_of([account], "run"), account_text(account), sep="\n\n")
    print(*(f"attempt {a.attempt}: {a.spent}, resumed {a.resumed}, marks {a.marks}" for a in history), sep="\n")
    assert (len(account.stretches), account.interruptions, account.gpus, histories.notes) == (4, 3, 1, [])
    assert account.spent.total == sum(sum(attempt.spent.values()) for attempt in history)
    for attempt in history:  # their clock and that of their files agree, to the second that is written
        assert abs(sum(attempt.spent.values()) - (moment(attempt.finished) - moment(attempt.started))) < 2000
    resumed = [attempt.resumed for attempt in history]
    assert resumed[0] == 0 and resumed[1:] == [attempt.checkpoint for attempt in history[:-1]]
    first = moment(history[0].submitted)
    apart = moment(history[-1].finished) - first - account.spent.total
    assert abs(account.waited - apart) < 8000 and account.waited > 3000
    assert account.spent.useful > 0 and account.spent.lost < account.spent.useful
    assert "3 interruptions cost" in json.loads(Storage(site.s3.endpoint).read_now(f"{job.place}/{ACCOUNT}"))["text"]
    assert "3 interruptions cost" in repr(job.run)


@pytest.mark.parametrize("wanted", [1, 2])
def test_no_more_victims_than_needed(site, wanted):
    "Of three development jobs on a full node as many go as production has need for; it starts after their grace"
    site.cluster.agent.add_node("gpu-3", gpus=3, labels={"kind": "victims"})
    where = {"nodeSelector": {"kind": "victims"}}
    deaf = "trap '' TERM; while :; do sleep 0.1; done"
    try:
        for i in range(3):
            body = holder(f"dev-{i}", deaf, priority="gpuml-dev", grace=4, **where)
            site.cluster.admin.create("jobs", site.namespace, body)
            site.cluster.wait_pod(site.namespace, f"dev-{i}", phase("Running"))
        begun = time.monotonic()
        body = holder("prod", "exec sleep 6000", gpus=wanted, priority="gpuml-prod", grace=1, **where)
        site.cluster.admin.create("jobs", site.namespace, body)
        site.cluster.wait_pod(site.namespace, "prod", phase("Running"), 4 + 5 + 10)  # 10 s for a busy machine
        print(f"production runs {time.monotonic() - begun:.1f} s after it was submitted; the grace is 4 s")

        def preempted():
            return sum(reason == "Preempted" for reason, _ in site.cluster.events(site.namespace))

        site.cluster.wait(lambda: preempted() >= wanted)
        assert preempted() == wanted
    finally:
        site.cluster.agent.remove_node("gpu-3")


FOLLOW = """\
import sys
from gpuml.cluster import jobs as cluster
from gpuml.base.loading import load
cluster.find(sys.argv[1], [load("prod")]).logs(follow=True)
"""


def test_who_follows_may_die(site):
    "The job goes on, and is there again within seconds for anybody"
    site.calm(0.5)
    job = site.submit("train.epochs=12")
    command = [sys.executable, "-c", FOLLOW, job.run_id]
    follower = subprocess.Popen(command, cwd=site.folder, stdout=subprocess.PIPE, text=True)
    training(site, job)
    follower.kill()
    follower.communicate()
    begun = time.monotonic()
    code = f"from gpuml.cluster import jobs as cluster; from gpuml.base.loading import load; print(cluster.find({job.run_id!r}, [load('prod')]))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=site.folder, capture_output=True, text=True, env=os.environ
    )
    taken = time.monotonic() - begun
    print(f"found again {taken:.1f} s after a new process was started")
    assert "running" in shown.stdout and "update" in shown.stdout, shown.stderr
    assert job.wait(600).phase == "succeeded"
