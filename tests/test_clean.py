"`gpuml clean`: says what and how much before, and never takes what runs, what is certified, or what is somebody's own"

import json
import os
import shutil
import time

import psutil
import pytest

from gpuml.base.errors import ConfigError, Exit, OutputError
from gpuml.base.files import write_json
from gpuml.base.loading import load
from gpuml.cluster import clean
from gpuml.cluster.local import PROGRESS_FILE
from gpuml.jobs.gpu_cell import VALUES
from gpuml.training.recipe import FILE
from gpuml.training.record import WORK, this_host
from gpuml.training.runs import output_folder
from tests.conftest import gpuml
from tests.test_projects import project_at, put_job

OLD = 90 * 86_400


def aged(path, seconds=OLD):
    for one in [path, *path.rglob("*")]:
        os.utime(one, (time.time() - seconds,) * 2)
    return path


def put_run(root, name, certified=False, size=1000, **record):
    "A run's folder as training leaves it"
    folder = root / "outputs" / name
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000004" / "model").write_bytes(b"x" * size)
    shutil.copy(root / "config" / "dev.yaml", folder / "config.yaml")
    (folder / WORK).touch()
    about = {"uri": "sqlite:///m", "page": "p", "experiment": "test", "artifacts": None, "params": {}, "tags": {}}
    write_json(folder / "tracking.json", about | {"run": name, "status": "KILLED", "reason": "interrupted"} | record)
    if certified:
        write_json(folder / "certificate.json", {"run": name})
    return aged(folder)


def put_rows(cache, key="0" * 32):
    folder = cache / "rows" / key
    folder.mkdir(parents=True)
    write_json(folder / "rows.json", {"sizes": {}})
    return aged(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A project with one of everything, all of it old"
    root = project_at(tmp_path / "p", tmp_path / "cache")
    monkeypatch.chdir(root)
    put_run(root, "dev-stopped")
    put_run(root, "dev-done", certified=True)
    aged(put_job(root, "dev-job"))
    put_rows(tmp_path / "cache")
    return root


def names(planned):
    return {item.name for item in planned.items}


def survey():
    return clean.survey([load("dev")])


def test_what_goes_and_what_stays(here, tmp_path):
    "Each case adds something old beside what can go"
    usual = {"dev-stopped", "dev-job", "0" * 32}
    assert names(clean.plan(survey())) == usual
    me = [this_host(), os.getpid(), psutil.Process().create_time()]
    put_run(here, "dev-alive", status="RUNNING", process=me)
    put_run(here, "dev-far", status="RUNNING", process=["elsewhere", 1, 1.0])
    aged(put_job(here, "dev-busy", phase="running", process=me[1:]))
    put_run(here, "dev-busy"), put_run(here, "dev-busy-2")
    (put_job(here, "dev-job-2") / "thesis.md").write_text("not to be lost")
    aged(put_job(here, "dev-job-2"))
    (put_run(here, "dev-mine") / "thesis.md").write_text("not to be lost")
    aged(here / "outputs" / "dev-mine")
    put_run(here, "dev-copied").rename(here / "outputs" / "renamed")
    (here / "outputs" / "linked").symlink_to(here / "config")
    (here / "outputs" / "notes.txt").write_text("mine")
    own = tmp_path / "cache" / "rows" / "mine"
    own.mkdir()
    (own / "rows.json").write_text("{}")
    other = project_at(tmp_path / "q", tmp_path / "cache")
    aged(put_job(other, "its-job")), put_run(other, "its-run")
    planned = clean.plan(survey())
    assert names(planned) == usual
    kept = {item.name: item.obstacle for item in planned.left_alone}
    assert kept == {
        "dev-alive": "is at work",
        "dev-far": "is at work on elsewhere, by its record",
        "dev-busy": "is at work",
        "dev-busy-2": "its job is at work",
        "dev-mine": "has files that gpuml did not make: thesis.md",
        "dev-job-2": "has files that gpuml did not make: thesis.md",
    } | {"dev-busy": kept["dev-busy"]}
    for name in ("dev-alive", "dev-far", "dev-busy", "dev-mine"):  # not even where it is named
        assert names(clean.plan(survey(), [name], 0)) == set()
    before = sorted(p for p in tmp_path.rglob("*") if not any(set(p.parts) & {name} for name in usual))
    clean.remove(planned)
    assert [p for p in before if not p.exists()] == [] and names(clean.plan(survey())) == set()


def test_what_gpuml_itself_wrote_is_no_obstacle(here):
    "Jobs keep how far they are; a cell its values; a run its own code"
    job = put_job(here, "dev-job")
    (job / PROGRESS_FILE).write_text("{}")
    cell = put_run(here, "dev-cell")
    (cell / "attempts").mkdir()
    write_json(cell / "attempts" / "1.json", {"run": "dev-cell", "kind": "cell", "reason": "all cells are done"})
    for folder, name in ((cell, VALUES), (here / "outputs" / "dev-stopped", FILE)):
        (folder / name).write_text("")
    for folder in (job, *(here / "outputs").iterdir()):
        aged(folder)
    planned = clean.plan(survey())
    assert not planned.left_alone and names(planned) >= {"dev-job", "dev-cell", "dev-stopped"}
    assert "run, of a cell" in repr(planned)


def test_an_output_on_s3(here, tmp_path):
    "Its copies here are runs like others; another output's are somebody else's"
    config = load("dev", ["output=s3://models/dev"])
    folder = output_folder(config)
    assert clean.runs_folder(config) == folder and clean.runs_folder(load("dev")) == output_folder(load("dev"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dev-stopped", "dev-done"):
        (here / "outputs" / name).rename(folder / name)
    shutil.copytree(folder / "dev-stopped", folder.parent / ("f" * 16) / "dev-stopped")
    aged(folder.parent)
    assert [item.path for item in clean.plan(clean.survey([config]), ["runs"]).items] == [folder / "dev-stopped"]


def test_looking_does_not_make_it_young(here):
    for _ in range(2):
        assert names(clean.plan(survey(), ["runs", "jobs"], OLD - 60)) == {"dev-stopped", "dev-job"}


def test_what_is_begun_while_it_asks_stays(here):
    shown = clean.plan(survey())
    write_json(here / "outputs" / "dev-stopped" / "tracking.json", {})
    assert names(clean.both(shown, clean.plan(survey()))) == names(shown) - {"dev-stopped"}


def test_data_that_is_in_use_stays(here, tmp_path):
    with open(put_rows(tmp_path / "cache", "1" * 32) / "rows.json"):
        aged(tmp_path / "cache" / "rows" / ("1" * 32))
        planned = clean.plan(survey(), ["caches"])
        assert names(planned) == {"0" * 32} and [item.obstacle for item in planned.left_alone] == ["is in use"]


def test_age_kinds_and_names(here):
    put_run(here, "dev-young")
    aged(here / "outputs" / "dev-young", 3600)
    cases = {
        ("runs",): {"dev-stopped"},
        ("jobs",): {"dev-job"},
        ("runs", "jobs"): {"dev-stopped", "dev-job"},
        ("dev-done",): {"dev-done"},
        ("dev-young",): {"dev-young"},
        ("dev-done", "caches"): {"dev-done", "0" * 32},
    }
    for words, gone in cases.items():
        assert names(clean.plan(survey(), words)) == gone, words
    assert "dev-young" in names(clean.plan(survey(), ["runs"], 600)) and clean.age("12h") == 43_200
    for text in ("soon", "-1d", "1w", ""):
        with pytest.raises(ConfigError, match="--older .*: must be days or hours"):
            clean.age(text)


def test_the_command_says_before_it_does(here):
    "Without --yes and nobody to ask, and with --dry-run, nothing goes"
    for words in ([], ["--dry-run", "--yes"]):
        said = gpuml("clean", *words, cwd=here)
        assert said.returncode == 0 and (here / "outputs" / "dev-stopped").exists(), said.stderr
        assert "dev-stopped" in said.stdout and "3 to remove" in said.stdout
        assert "1 certified run stays" in said.stdout and "nothing is removed" in said.stdout
    said = gpuml("clean", "--yes", cwd=here)
    assert said.returncode == 0 and "is free" in said.stdout and not (here / "outputs" / "dev-stopped").exists()
    assert (here / "outputs" / "dev-done" / "certificate.json").exists()
    said = gpuml("clean", "dev-done", "--yes", cwd=here)
    assert said.returncode == 0 and not (here / "outputs" / "dev-done").exists()
    for words, text in ((["dev-9"], "dev-9: no run and no job"), (["--fast"], "unknown option --fast")):
        said = gpuml("clean", *words, cwd=here)
        assert said.returncode == Exit.BAD_CONFIG and text in said.stderr and "Traceback" not in said.stderr


def test_interrupted_nothing_is_half_removed(here):
    "A kill in the middle of a folder: what was begun is gone from sight, the rest whole; the next time removes what is left"

    def one_file(folder):
        next(path for path in folder.rglob("*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clean.remove(clean.plan(survey(), ["runs"]), delete=one_file)
    assert not (here / "outputs" / "dev-stopped").exists()
    assert [p.name[:15] for p in (here / "outputs").glob(".*")] == [".gpuml-removed-"]
    assert clean.finish(clean.places([load("dev")])) > 0
    assert [p.name for p in (here / "outputs").iterdir()] == ["dev-done"]
    assert json.loads((here / "outputs" / "dev-done" / "tracking.json").read_text())["run"] == "dev-done"


def test_no_permission(here):
    if os.geteuid() == 0:
        pytest.skip("root may remove everything")
    planned = clean.plan(survey(), ["runs"])
    (here / "outputs").chmod(0o555)
    with pytest.raises(OutputError, match="dev-stopped: Permission denied"):
        clean.remove(planned)
