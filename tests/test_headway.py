"How far a run is, as data: whole or none, whatever happens to its file, and read by every list of jobs"

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gpuml.cluster.answers import NoServer
from gpuml.cluster.jobs import JobList
from gpuml.cluster.local import STATE_FILE, LocalJob
from gpuml.cluster.remote import ClusterJob, headway_of_pod
from gpuml.jobs.handle import State
from gpuml.jobs.outlet import headway_line, last_headway, without_headway
from gpuml.training.headway import Headway, HeadwayFile, as_json, headway_in, read_headway
from gpuml.training.progress import Reporter
from gpuml.ui.panel_jobs import jobs_html
from tests.conftest import JOB_FACTS

SCORES = {"step": 50, "epoch": 1, "loss": 0.5, "accuracy": 0.91, "macro_f1": 0.9}
HALFWAY = Headway(
    "dev-1",
    "training",
    "",
    1050,
    2100,
    1.5,
    3,
    0.7,
    0.8,
    SCORES,
    21.5,
    75.0,
    1000,
    "2026-11-28T10:00:00+00:00",
    "http://m",
    1.25,
    8,
)
WORDS = "training, update 1,050 of 2,100, epoch 1.5 of 3, training loss 0.800, 22 examples/s, 1:15 min left"


def test_the_record_comes_back_as_it_was():
    assert read_headway(as_json(HALFWAY)) == HALFWAY
    assert read_headway(as_json(Headway())) == Headway()
    assert read_headway(as_json(replace(HALFWAY, loss=float("inf")))).loss == float("inf")
    assert all(value for name, value in asdict(HALFWAY).items() if value != "" and name != "own_loop")


def test_what_a_later_version_adds_is_passed_over():
    assert read_headway(as_json(HALFWAY, notes=["a"], colour="red")) == HALFWAY
    assert read_headway('{"run": "dev-1"}') == Headway("dev-1")


@pytest.mark.parametrize("size", range(0, len(as_json(HALFWAY)), 7))
def test_half_a_record_is_none(tmp_path, size):
    file = tmp_path / "progress.json"
    file.write_text(as_json(HALFWAY)[:size])
    assert headway_in(file) is None


@pytest.mark.parametrize(
    "content", [b"\xff\x00", b"[1]", b"null", b'{"update": "many"}', b'{"evaluation": 3}', b'{"run": null}']
)
def test_what_is_no_record_is_none(tmp_path, content):
    file = tmp_path / "progress.json"
    assert headway_in(file) is None
    file.write_bytes(content)
    assert headway_in(file) is None
    assert headway_in(tmp_path) is None


def test_an_interrupted_write_leaves_the_old_one(tmp_path):
    "A process that is killed between the file aside and its name"
    file = tmp_path / "progress.json"
    HeadwayFile(file).write(HALFWAY)
    if (child := os.fork()) == 0:
        os.replace = lambda *_: os._exit(9)
        HeadwayFile(file).write(replace(HALFWAY, update=2000))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert headway_in(file) == HALFWAY


def test_a_file_that_can_not_be_written_stops_nothing(tmp_path):
    HeadwayFile(tmp_path / "gone" / "progress.json").write(HALFWAY)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "progress.json").mkdir()
    HeadwayFile(tmp_path / "progress.json").write(HALFWAY)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_a_loop_writes_once_a_second_and_at_each_phase(tmp_path):
    "Thousands of updates are a handful of writes; the last is the end"
    seconds, versions = [0.0], set()
    report, file = Reporter(None, clock=lambda: seconds[0]), tmp_path / "progress.json"
    report.keep(file)
    report.now("training", run="dev-1", steps=5000, epochs=1)
    for number in range(1, 5001):
        seconds[0] = number / 1000
        report.step(0.5, 16, number / 5000)
        versions.add(headway_in(file).update)
    assert len(versions) == 1 + 4 and max(versions) > 4000  # of five seconds, the last is not over
    report.checkpointed(4990)
    for phase in ("evaluating", "saving", "done"):
        report.now(phase)
        assert headway_in(file).phase == phase
    end = headway_in(file)
    assert (end.run, end.update, end.updates, end.loss, end.checkpoint) == ("dev-1", 5000, 5000, 0.5, 4990)
    assert end.checkpoint_time.endswith("+00:00")


def local_job(folder: Path, **changes) -> LocalJob:
    "A job on this machine whose attempt is at work"
    state = {"phase": "running", "attempts": [{"started": "2026-11-28T10:00:00+00:00"}], **changes}
    (folder / STATE_FILE).write_text(json.dumps(state))
    return LocalJob("dev-1", str(folder), None, JOB_FACTS, "", folder)


def test_the_list_of_local_jobs_reads_the_record(tmp_path):
    job = local_job(tmp_path)
    (tmp_path / "log.txt").write_text("dev-1: training, update 7 of 9\n")
    assert job.status.headway is None and job.status.progress == ""
    HeadwayFile(tmp_path / "progress.json").write(HALFWAY)
    assert job.status.headway == HALFWAY and job.status.progress.startswith(WORDS)
    assert job.logs() == "dev-1: training, update 7 of 9\n"
    html = jobs_html(JobList([(job, job.status)]))
    assert "<progress value='1050' max='2100' aria-label='updates'></progress> 50%" in html and "1:15 min" in html
    assert local_job(tmp_path, phase="waiting").status.headway is None
    HeadwayFile(tmp_path / "progress.json").write(
        Headway("dev-1", "done", evaluation={"accuracy": 0.5, "macro_f1": 0.25})
    )
    done = local_job(tmp_path, phase="succeeded")
    assert done.status.progress == "accuracy 0.500, macro-F1 0.250"
    html = jobs_html(JobList([(done, done.status)]))
    assert "accuracy 0.500" in html and "<progress" not in html


class Pod(NoServer):
    "A server that has the log of one pod"

    def __init__(self, log: str):
        self.log = log

    def request(self, *_, **query) -> bytes:
        return self.log.encode()


def test_the_list_of_jobs_on_the_cluster_reads_the_record():
    lines = ["cell 3: %gpu_train", f"dev-1: {WORDS}", headway_line(HALFWAY), "other output"]
    lines += [headway_line(Headway("dev-2", "done")), headway_line(HALFWAY)[:99]]
    job = ClusterJob("dev-1", "s3://models/dev/dev-1", None, JOB_FACTS, "", Pod("\n".join(lines)), "gpuml-dev")
    state = State("running", headway=headway_of_pod(job, State("running", pod="dev-1-x")))
    assert state.headway == HALFWAY and state.progress.startswith(WORDS)
    assert "50%" in jobs_html(JobList([(job, state)]))


@pytest.mark.parametrize("log", ["", "dev-1: training, update 1,050 of 2,100\n", "\n\n", '{"gpuml.progress": '])
def test_a_log_without_a_record_has_no_figure(log):
    assert last_headway(log, "dev-1") is None
    job = ClusterJob("dev-1", "s3://models/dev/dev-1", None, JOB_FACTS, "", Pod(log), "gpuml-dev")
    state = State("running", headway=headway_of_pod(job, State("running", pod="dev-1-x")))
    assert state.progress == "" and "<progress" not in jobs_html(JobList([(job, state)]))


def test_people_read_the_log_without_records():
    sentences = f"cell 3: %gpu_train\ndev-1: {WORDS}\n"
    assert without_headway(f"{sentences}{headway_line(HALFWAY)}\n") == sentences
    assert without_headway(sentences) == sentences
