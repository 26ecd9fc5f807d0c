"A sweep as jobs, as a person meets it: more runs than GPUs, production between them, one that fails, all cancelled"

import os
import signal
import sqlite3
import subprocess
import sys

from gpuml.cluster import jobs as c
from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.conftest import ENDLESS

RATES = "train.learning_rate=1e-4,4e-4,1e-3"
RAISES = "import os\nif '\"number\": 2' in os.environ.get('GPUML_SWEEP', ''):\n    raise ValueError('no luck')"


def names(sweep):
    "The runs of a sweep of these rates"
    return [f"{sweep}-{number}-learning-rate-{rate}" for number, rate in ((1, "1e-4"), (2, "4e-4"), (3, "1e-3"))]


def gpuml(site, *words):
    "The command in the site's project: exit code and all that it prints"
    command = [sys.executable, "-m", "gpuml", *words]
    done = subprocess.run(command, cwd=site.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    return done.returncode, done.stdout


def parents(database, runs):
    "Status, and the id of the run above it, of runs in MLflow"
    query = "select name, status, value from runs left join tags using (run_uuid) where key = 'mlflow.parentRunId'"
    return {name: (status, parent) for name, status, parent in sqlite3.connect(database).execute(query) if name in runs}


def test_all_wait_and_who_looks_on_may_go(site, mlflow):
    "One fails and ends no other, production goes first; the table names all, and MLflow has one family"
    held = holder("held", "exec sleep 6000", priority="gpuml-prod", grace=1)
    site.cluster.admin.create("jobs", site.namespace, held)
    site.cluster.wait_pod(site.namespace, "held", phase("Running"))
    site.write("dev", "gpuml-dev", 4)
    site.add_cell(RAISES, "%gpu_train")
    first, failing, last = names("spring")
    words = ["submit", "dev", RATES, "--name", "spring"]
    code, text = gpuml(site, *words)
    assert code == 0 and [line.partition(": ")[2] for line in text.splitlines()[:3]] == ["submitted"] * 3
    again = f"{last}: the same notebook, code and config is at work already; another --name makes another"
    assert again in gpuml(site, *words)[1]
    code, text = gpuml(site, "runs", "spring")
    assert "3 pending: needs 1 GPU: none of 1 is free; held by 1 production job" in text
    assert "no run is finished yet" in text and "`gpuml cancel spring` ends them" in text
    assert [line.split()[0] for line in gpuml(site, "jobs", "spring")[1].splitlines()[1:]] == [first, failing, last]
    command = [sys.executable, "-m", "gpuml", *words, "--wait"]
    with subprocess.Popen(
        command, cwd=site.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as follower:
        lines = [follower.stdout.readline() for _ in range(4)]
        follower.send_signal(signal.SIGINT)
        text = "".join(lines) + follower.communicate(timeout=600)[0]
    assert "1, 2, 3 of 3: pending: needs 1 GPU" in lines[3], text
    assert follower.returncode == 75 and "spring goes on without this command: gpuml wait spring" in text, text

    prod = site.submit("train.epochs=1")  # which has more to say than any of them, whenever it comes
    site.cluster.admin.delete("jobs", site.namespace, "held", propagationPolicy="Background")
    code, text = gpuml(site, "wait", "spring")
    assert code == 1 and "2 of 3, learning_rate=4e-4: failed: cell 8 raised ValueError: no luck" in text
    assert f"{failing} failed: cell 8 raised ValueError: no luck (exit code 1)" in text
    assert "2 finished, 1 failed; submitting the same again goes on" in text
    best = text.splitlines()[-1]
    assert best.startswith("best: learning_rate=") and best.endswith((first, last))
    assert prod.wait(600).phase == "succeeded"
    ((parent,),) = sqlite3.connect(mlflow).execute("select run_uuid from runs where name = 'spring'").fetchall()
    assert parents(mlflow, names("spring")) == dict.fromkeys((first, last), ("FINISHED", parent))


def test_preempted_cancelled_and_submitted_again(site, mlflow, monkeypatch):
    "All of its jobs end, the same line goes on; where no cluster answers, the table has what storage has"
    site.write("dev", "gpuml-dev", 1)
    first, *others = names("autumn")
    words = ["submit", "dev", RATES, "--name", "autumn", ENDLESS]
    assert gpuml(site, *words)[0] == 0
    job = c.find(first, [site.config(of="dev")])
    site.wait_update(job)
    prod = site.submit(ENDLESS)
    site.cluster.wait_pod(site.namespace, prod.run_id, phase("Running"), 120)
    site.why(job, "needs 1 GPU", 120)
    code, text = gpuml(site, "runs", "autumn")
    assert "3 pending: needs 1 GPU: none of 1 is free; held by 1 production job" in text

    code, text = gpuml(site, "cancel", "autumn")
    assert code == 0 and all(f"{run}: " in text for run in (first, *others))
    code, text = gpuml(site, "wait", "autumn")
    assert code == 75 and "3 cancelled; submitting the same again goes on with what is not finished" in text
    assert text.splitlines()[-1] == "no run is finished"
    assert f"{first}: goes on where an earlier job of this name came to" in gpuml(site, *words)[1]

    nowhere = site.folder / "nowhere.kubeconfig"
    with open(os.environ["KUBECONFIG"]) as file:
        nowhere.write_text(file.read().replace(site.cluster.plane.url, "https://127.0.0.1:9"))
    with monkeypatch.context() as patch:
        patch.setenv("KUBECONFIG", str(nowhere))
        code, text = gpuml(site, "runs", "autumn")
    assert code == 0 and "what its jobs are doing can't be told: " in text and "interrupted" in text
    assert gpuml(site, "cancel", "autumn")[0] == 0
    prod.cancel()


def test_a_job_leaves_off_and_frees_its_gpu(site, mlflow):
    "One GPU: the first goes to its end; the second, which learns nothing, to where they are compared, also on S3"
    site.write("dev", "gpuml-dev", 4)
    words = ["submit", "dev", "--halving", "train.learning_rate=4e-3,1e-9", "train.epochs=4", "--name", "winter"]
    code, text = gpuml(site, *words)
    assert code == 0, text
    code, text = gpuml(site, "wait", "winter")
    assert code == 0 and "best: learning_rate=4e-3" in text, text
    assert "left off before epoch 4, where more than half of the others were better: 2 after epoch 2" in text
    second = c.find("winter-2-learning-rate-1e-9", [site.config(of="dev")])
    assert len(second.run.history) == 2 and second.status.phase == "succeeded"
    ((status,),) = sqlite3.connect(mlflow).execute("select status from runs where name = 'winter'").fetchall()
    assert status == "FINISHED"
