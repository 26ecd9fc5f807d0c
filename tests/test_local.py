"Jobs on this machine: submitted once, followed, killed, continued, cancelled, found again"

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from gpuml.base.errors import Exit, GpumlError
from gpuml.base.files import write_json
from gpuml.base.loading import load
from gpuml.cluster import clean
from gpuml.cluster import jobs as c
from gpuml.cluster.local import jobs_folder
from gpuml.cluster.manifest import rename_run
from gpuml.cluster.sending import send, submit
from gpuml.cluster.submission import prepare
from tests import forked
from tests.conftest import ENDLESS, ROOT, gpuml, runs_in
from tests.standing import hold_imports, stand_still
from tests.waiting import until

PYTHON = sys.executable


@pytest.fixture
def shipped(project, store, monkeypatch):
    "The shipped notebook beside a small project"
    monkeypatch.setattr(sys, "executable", forked.python())  # which a job's processes are started with
    (project / "nbs").mkdir()
    notebook = project / "nbs" / "train.ipynb"
    notebook.write_text((ROOT / "nbs" / "train.ipynb").read_text())
    yield notebook
    for job, state in c.jobs([load("dev")]):
        if not state.over:
            job.cancel()


def weights(run):
    return (run.folder / "model" / "model.safetensors").read_bytes()


def test_submit_wait_and_everything_a_job_tells(shipped, project):
    "The command and the handle, on one job; what happens to a job that was killed and goes on is bit-equal"
    done = gpuml("submit", "dev", "--local", "--wait", "train.epochs=1", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training" in done.stdout and "macro-F1" in done.stdout
    ((job, state),) = c.jobs([load("dev")])
    assert (state.phase, state.exit_code, state.attempts) == ("succeeded", 0, 1)
    assert job.run.id == job.run_id and job.place == str(project / "outputs" / job.run_id)
    assert "update" in job.logs() and len(job.metrics()["loss"]) == job.run.metrics["updates"]
    cells = json.loads(job.notebook().read_text())["cells"]
    assert not [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert [r.info.status for r in runs_in(project / "mlflow.db")] == ["FINISHED"]
    assert job.run_id in repr(job) and "succeeded" in job._repr_html_()
    assert [item for item in clean.survey([load("dev")]) if item.obstacle] == []  # `gpuml clean` may remove all
    for words in (["jobs"], ["jobs", job.run_id], ["logs", job.run_id], ["wait", job.run_id]):
        shown = gpuml(*words, cwd=project)
        assert shown.returncode == 0 and shown.stdout, shown.stderr
    assert c.find(job.run_id, [load("dev")]).run_id == job.run_id
    missing = gpuml("logs", "no-such-job", cwd=project)
    assert (
        missing.returncode == Exit.NOT_FOUND
        and "no job no-such-job" in missing.stderr
        and "Traceback" not in missing.stderr
    )


def test_twenty_at_once_are_one(shipped):
    config = load("dev", [ENDLESS])
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda _: submit(config, shipped, local=True), range(20)))
    assert len({job.run_id for job in made}) == 1 and len(c.jobs([config])) == 1
    again = submit(config, shipped, local=True, again=True)
    assert again.run_id != made[0].run_id and len(c.jobs([config])) == 2
    with pytest.raises(GpumlError, match="is there already"):
        submit(load("dev"), shipped, local=True, name=again.run_id)
    for job, _ in c.jobs([config]):
        job.cancel()
        assert until(lambda job=job: job.status.over) and job.status.phase == "cancelled"


def test_stopped_and_killed_it_goes_on(shipped, project):
    "SIGTERM to an attempt is a preemption; the worker's death is a restart of the machine: the result is the same"
    config = load("dev", ["train.epochs=12", "train.checkpoint_updates=5"])
    go_on = stand_still(shipped, "disturbed", 7)
    quiet = submit(config, shipped, local=True, name="quiet")
    assert quiet.wait(600).phase == "succeeded", quiet.logs()
    job = submit(config, shipped, local=True, name="disturbed", again=True)
    until(lambda: "update 5 of" in job.logs() or (job.status.progress and "update" in job.status.progress))
    told = json.loads((job.folder / "state.json").read_text())
    os.kill(told["attempts"][-1]["pid"], signal.SIGTERM)
    until(lambda: job.status.attempts == 2 and job.status.phase == "running")
    until(lambda: job.logs().count("disturbed: training, update") > 1)
    told = json.loads((job.folder / "state.json").read_text())
    psutil.Process(told["process"][0]).kill()
    os.killpg(told["attempts"][-1]["pid"], signal.SIGKILL)
    assert until(lambda: job.status.phase == "waiting") and "its process is gone" in job.why()
    go_on.touch()
    same = submit(config, shipped, local=True, name="disturbed")
    assert same.run_id == "disturbed" and same.wait(600).phase == "succeeded", same.logs()
    assert weights(same.run) == weights(quiet.run)
    assert same.run.metrics["train_loss"] == quiet.run.metrics["train_loss"]


def test_an_attempt_is_stopped_in_its_first_second(shipped, tmp_path, monkeypatch):
    "That is an interruption and no failure: there is a next one, and no retry is used up"
    monkeypatch.setattr(sys, "executable", PYTHON)  # one that imports, as users have it
    importing = hold_imports(tmp_path, monkeypatch, "pydantic_core", "-m gpuml run")
    job = submit(load("dev", [ENDLESS, "compute.retries=0"]), shipped, local=True)

    def first():
        return json.loads((job.folder / "state.json").read_text())["attempts"][0]

    importing.wait()
    until(lambda: job.status.attempts)
    os.kill(first()["pid"], signal.SIGTERM)
    until(lambda: "verdict" in first())
    assert (first()["exit_code"], first()["verdict"]) == (Exit.INTERRUPTED, "Ignore")
    assert job.logs().startswith("gpuml: stopped before anything was done\n")
    until(lambda: job.status.attempts == 2)


def test_cancelled_while_its_process_starts_again(shipped, tmp_path, monkeypatch):
    "After a restart of the machine, as it were: what is said in its first second holds"
    monkeypatch.setattr(sys, "executable", PYTHON)
    config = load("dev", [ENDLESS])
    job = submit(config, shipped, local=True)
    until(lambda: job.status.attempts)
    killed = json.loads((job.folder / "state.json").read_text())
    psutil.Process(killed["process"][0]).kill()
    os.killpg(killed["attempts"][-1]["pid"], signal.SIGKILL)
    until(lambda: job.status.phase == "waiting")
    starting = hold_imports(tmp_path, monkeypatch, "gpuml.cluster.work", "import work; work(")
    same = submit(config, shipped, local=True, name=job.run_id)
    starting.wait()
    assert same.cancel().phase == "cancelled"
    starting.release()

    def at_work():
        "Processes of the job"
        mine = []
        for p in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ends just now; of a zombie, too, there is no command line
                mine += [p] * (str(job.folder) in p.cmdline())
        return mine

    until(lambda: not at_work() or same.status.phase != "cancelled")
    assert same.status.phase == "cancelled" and same.status.attempts == 1


def test_cancelled_promises_nothing(shipped, project):
    "What is left of a cancelled job, and that submitting the same does not go on with it"
    config = load("dev", [ENDLESS])
    job = submit(config, shipped, local=True)
    until(lambda: "update" in job.status.progress)
    said = gpuml("cancel", job.run_id, cwd=project)
    state = job.wait(600)
    told = rf"cancelled at update \d+ of 30000; its checkpoint stays in {job.place}, submitting the same begins anew; `gpuml train dev --resume {job.run_id}` goes on with it"
    assert said.returncode == 0 and re.fullmatch(told, str(state)), state
    assert list((project / "outputs" / job.run_id / "checkpoints").iterdir())
    assert "next attempt" not in job.logs() + repr(job) + said.stdout
    again = submit(config, shipped, local=True)
    assert again.run_id != job.run_id
    again.cancel()
    assert re.match(r"cancelled(;| at update | by \S+ before it ran; nothing was saved)", str(again.wait(600)))


def test_who_only_looked_on_says_that_the_job_goes_on(shipped, project):
    "Ctrl-C on a command that follows a job leaves the job alone, and says so"
    job = submit(load("dev", [ENDLESS]), shipped, local=True)
    until(lambda: "update" in job.status.progress)
    follow = ["submit", "dev", ENDLESS, "--local", "--wait"], ["logs", job.run_id, "--follow"]
    for words in (*follow, ["wait", job.run_id]):
        command = [forked.python(), "-u", "-m", "gpuml", *words]
        process = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        looks_on = re.compile(rf"(\[{job.run_id} )?running\]?\n")  # the last of what there is to say for now
        assert any(map(looks_on.fullmatch, process.stdout))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=600)[1]
        assert said == (
            f"gpuml: {job.run_id} goes on without this command: "
            f"gpuml logs {job.run_id} --follow, gpuml cancel {job.run_id}\n"
        )
        assert process.returncode == Exit.INTERRUPTED and job.status.phase == "running"


def test_a_reader_that_leaves(shipped, project):
    "`gpuml submit … | head -1`: no traceback, and the job is made"
    for words in (["--dry-run"], []):
        command = [forked.python(), "-m", "gpuml", "submit", "dev", ENDLESS, "--local", *words]
        reading, writing = os.pipe()
        os.close(reading)
        process = subprocess.Popen(command, cwd=project, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        said = process.stderr.read().decode()
        assert (process.wait(600), said) == (128 + signal.SIGPIPE, "")
    assert len(c.jobs([load("dev")])) == 1


def test_it_outlives_who_started_it(shipped, project):
    code = """
import os
from gpuml.cluster.local import jobs_folder
from gpuml.cluster.manifest import rename_run
from gpuml.cluster.sending import send, submit
from gpuml.cluster.submission import prepare
from gpuml.base.files import write_json
from gpuml.base.loading import load
print(submit(load("dev", ["train.epochs=1"]), "nbs/train.ipynb", local=True).run_id, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([forked.python(), "-c", code], cwd=project, capture_output=True, text=True)
    job = c.find(done.stdout.strip(), [load("dev")])
    assert job.wait(600).phase == "succeeded", job.logs()


def test_what_fails_says_why(shipped, project):
    text = shipped.read_text().replace("run.mistakes(8)", "1 / 0")
    shipped.write_text(text)
    job = submit(load("dev", ["train.epochs=1"]), shipped, local=True)
    state = job.wait(600)
    assert (state.phase, state.exit_code) == ("failed", 1) and "ZeroDivisionError" in state.why


def test_what_it_shows(shipped, project):
    "The whole name of the config, and nothing of a cluster"
    name = "a-very-long-config-name-for-the-german-tickets"
    (project / "config" / f"{name}.yaml").write_text((project / "config" / "dev.yaml").read_text())
    job = submit(load(name, [ENDLESS]), shipped, local=True)
    shown = repr(job)
    assert f" {name}\n" in shown and "gpus" not in shown and "gpuml-dev" not in shown + repr(c.jobs([load(name)]))
    job.cancel()


def test_deadline(shipped):
    job = submit(load("dev", [ENDLESS, "compute.deadline=0.004"]), shipped, local=True)
    state = job.wait(600)
    assert (state.phase, state.command_code) == ("failed", 75) and "deadline" in state.why
    longer = submit(load("dev", [ENDLESS, "compute.deadline=1"]), shipped, local=True)
    assert longer.run_id == job.run_id and longer.note.startswith("goes on where its deadline ended it")
    assert longer.status.phase in ("pending", "running")
    longer.cancel()


def test_refused_before_anything_is_left(shipped, project):
    "Every finding at once, and no job, bundle or output"
    shipped.write_text(shipped.read_text().replace('"parameters"', '"none"'))
    with pytest.raises(GpumlError) as refused:
        submit(load("dev", ["data.train=missing.csv"]), shipped, local=True)
    text = str(refused.value)
    assert "✗ notebook" in text and "✗ data: data.train: no such file" in text and "✓ output" in text
    assert not c.jobs([load("dev")]) and not list(project.glob("outputs/*/*"))
    done = gpuml("submit", "dev", "--local", "data.train=missing.csv", cwd=project)
    assert done.returncode != 0 and "not submitted" in done.stderr and "Traceback" not in done.stderr


def test_dry_run_sends_nothing(shipped, project):
    done = gpuml("submit", "dev", "--local", "--dry-run", "train.epochs=7", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kind: Job" not in done.stdout and "✓ data" in done.stdout
    differences = done.stdout.partition("differences from the config that one develops with:\n")[2].partition("\n\n")[0]
    assert re.fullmatch(r"train.epochs +2 +→ +7", differences), differences
    assert re.search(r"starts +gpuml run .*[.]tar[.]gz --run dev-", done.stdout) and "gpuml cancel dev-" in done.stdout
    assert not (project / "cache" / "jobs").exists()


def test_the_tenth_job_is_newer_than_the_ninth(shipped):
    "Of several that do the same work the newest is found, not the last by its letters"
    planned = prepare(load("dev"), shipped, local=True)
    folders = []
    for number in (9, 10):
        rename_run(planned.manifest, f"dev-{planned.bundle.name[:10]}-{number}")
        folders.append(jobs_folder(planned.config) / planned.manifest["metadata"]["name"])
        write_json(folders[-1] / "job.json", planned.manifest)
        write_json(folders[-1] / "state.json", {"phase": "running"})
        os.utime(folders[-1] / "job.json", (number, number))
    same = send(planned)
    for folder in folders:
        write_json(folder / "state.json", {"phase": "cancelled"})
    assert same.run_id.endswith("-10")
