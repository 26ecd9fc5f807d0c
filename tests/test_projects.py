"Several projects on one machine: each has its own jobs and names; others are seen and touched only where they are asked for"

import json
import os
import subprocess
import sys

import psutil
import pytest

from gpuml.base.errors import ClusterError, Exit
from gpuml.base.files import write_json
from gpuml.base.loading import load
from gpuml.cluster import jobs as c
from gpuml.cluster import local
from gpuml.cluster import manifest as job
from tests.conftest import CONFIG, OFFLINE, gpuml


def project_at(folder, cache):
    (folder / "config").mkdir(parents=True)
    text = CONFIG.format(cache=cache, model=OFFLINE, port=9)
    (folder / "config" / "dev.yaml").write_text(text)
    return folder


WORKER = """
import sys, time
from pathlib import Path
from gpuml.base.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""  # what works on a job has its lock


def put_job(root, name, minutes=0, phase="succeeded", **state):
    "A job as its own process leaves it on this machine"
    config = load("dev", [f"output={root}/outputs"], start=root)
    source = job.Source("0f2a9c11d4", f"{root}/outputs/.bundles/0f2a9c11d4.tar.gz", "train.ipynb", "me")
    manifest = job.manifest(config, name, source)
    manifest["metadata"]["annotations"]["gpuml.io/project"] = str(root.resolve())
    folder = local.jobs_folder(config) / name
    write_json(folder / "job.json", manifest)
    write_json(folder / "state.json", {"phase": phase, "why": "", "attempts": [], **state})
    os.utime(folder / "job.json", (2e9 - 60 * minutes,) * 2)
    return folder


@pytest.fixture
def two(tmp_path, monkeypatch):
    "Two projects of one name, and one cache; the first is the current one"
    here, there = (project_at(tmp_path / who / "tickets", tmp_path / "cache") for who in ("me", "you"))
    monkeypatch.chdir(here)
    return here, there


def test_this_projects_jobs_newest_first_and_others_on_request(two):
    here, there = two
    for root, name, minutes in ((here, "b", 1), (here, "a", 3), (here, "c", 2), (there, "a", 0), (there, "z", 5)):
        put_job(root, name, minutes)
    configs = [load("dev")]
    listed = c.jobs(configs)
    assert [one.address for one, _ in listed] == ["b", "c", "a"]
    assert repr(listed).endswith("\n2 more on this machine, of other projects: --all lists them")
    assert "2 more on this machine" in listed._repr_html_()
    everyone = c.jobs(configs, everyone=True)
    assert [one.address for one, _ in everyone] == ["b", "c", "a", "you/tickets/a", "you/tickets/z"]
    assert "more on this machine" not in repr(everyone)
    said = gpuml("jobs", cwd=here)
    assert said.returncode == 0 and "you/tickets" not in said.stdout and "--all" in said.stdout
    said = gpuml("jobs", "--all", cwd=here)
    assert said.returncode == 0 and "you/tickets/z" in said.stdout, said.stderr


def test_a_name_is_its_projects_own(two):
    "Found by its name here; of another project only by that project's; never one for the other"
    here, there = two
    put_job(here, "nightly"), put_job(there, "nightly", phase="failed"), put_job(there, "spring")
    configs = [load("dev")]
    assert c.find("nightly", configs).status.phase == "succeeded"
    for name in ("you/tickets/nightly", str(there / "nightly")):
        assert c.find(name, configs).status.phase == "failed"
    assert c.find("me/tickets/nightly", configs).status.phase == "succeeded"
    with pytest.raises(
        ClusterError, match="2 jobs have the name nightly: say .*me/tickets/nightly or .*you/tickets/ni"
    ):
        c.find("tickets/nightly", configs)
    with pytest.raises(ClusterError, match="no job spring of this project; of another: you/tickets/spring"):
        c.find("spring", configs)
    with pytest.raises(ClusterError, match="no job no/such"):
        c.find("no/such", configs)


def test_jobs_that_were_made_before_are_found(two):
    "They lie in one folder for all projects and do not name theirs: their output does"
    here, there = two
    for root, name in ((here, "mine"), (there, "its")):
        folder = put_job(root, name)
        made = json.loads((folder / "job.json").read_text())
        del made["metadata"]["annotations"]["gpuml.io/project"]
        write_json(folder / "job.json", made)
        folder.rename(folder.parent.parent / name)
    config = load("dev")
    assert [one.address for one, _ in c.jobs([config], everyone=True)] == ["mine", "you/tickets/its"]
    assert c.own_folders(config) == {"mine": local.jobs_folder(config).parent / "mine"}
    assert c.find("mine", [config]).run_id == "mine"


def test_a_job_of_another_project_is_cancelled_only_by_its_projects_name(two):
    here, there = two
    folder = put_job(there, "long", phase="running")
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(folder / local.LOCK_FILE)], stdout=subprocess.PIPE)
    try:
        assert worker.stdout.readline() == b"locked\n"
        process = [worker.pid, psutil.Process(worker.pid).create_time()]
        put_job(there, "long", phase="running", process=process)
        said = gpuml("cancel", "long", cwd=here)
        assert said.returncode == Exit.NOT_FOUND and said.stderr.startswith(
            "gpuml: no job long of this project; of another: "
        )
        assert worker.poll() is None
        said = gpuml("cancel", "you/tickets/long", cwd=here)
        assert said.returncode == 0 and worker.wait(600) != 0, said.stderr
    finally:
        worker.kill()
