"What a forecast is made without is said where it stands: files of earlier runs that are damaged, and outputs that don't answer"

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest

from gpuml.base.files import write_file, write_json
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.cluster.answers import NoServer
from gpuml.cluster.earlier import earlier_runs, grace_of, pace_of, unread
from gpuml.cluster.jobs import cluster_jobs
from gpuml.cluster.objects import JobAddress
from gpuml.cluster.outlook import outlook
from gpuml.cluster.starts import start_of
from gpuml.cluster.submission import prepare
from gpuml.cluster.waits import Wait, read_site_log, write_wait
from gpuml.training.attempts import Attempt, content

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
NOON = "2026-11-28T12:00:00+00:00"
WHOLE = Attempt("dev-1", 1, 0, "", None, NOON, "2026-11-28T13:00:00+00:00", "n", gpus=1, submitted=NOON)


def put(place, text):
    Storage().put_bytes(text, str(place))


@pytest.fixture
def output(tmp_path):
    "An output with an attempt that is whole, and one that a disk has damaged"
    put(tmp_path / "dev-1/attempts/1.json", content(WHOLE))
    put(tmp_path / "dev-2/attempts/1.json", content(WHOLE).replace(b'"2026-11-28T13', b'"at noon 28T13'))
    return str(tmp_path)


def read(output):
    return read_site_log(output, None, NOW)


def test_damaged_files_are_named(output):
    log = read(output)
    assert log.durations.seconds.tolist() == [3600]
    assert log.gaps.files == (f"{output}/dev-2/attempts/1.json",)
    words = "1 file of earlier runs is damaged or can't be read, and left out of this"
    assert log.gaps.words() == f"{words}: {output}/dev-2/attempts/1.json"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"null", b"3"])
def test_whatever_the_damage_is(output, text):
    put(f"{output}/dev-1/attempts/1.json", text)
    assert len(read(output).gaps.files) == 2


GARBAGE = (None, "", 5, -1.5, [], {}, True, "at noon", float("nan"), "2026-11-28")


@pytest.mark.parametrize("field", [*asdict(Wait("a", NOON, 1, 2, 3, 3))])
@pytest.mark.parametrize("value", GARBAGE)
def test_no_field_of_a_wait_breaks_the_log(output, field, value):
    put(f"{output}/.waits/dev-1.json", json.dumps(asdict(Wait("dev-1", NOON, 1, 2, 3, 3)) | {field: value}).encode())
    gaps = read(output).gaps.files
    right = {"run": ("at noon", "2026-11-28"), "submitted": ("2026-11-28",)}.get(field, (5,))
    is_right = any(value == other for other in right)
    assert (f"{output}/.waits/dev-1.json" in gaps) == (not is_right)


def test_times_without_a_zone_are_in_utc(output):
    bare = Attempt("dev-3", 1, 0, "", None, "2026-11-28T12:10", "2026-11-28T13:10", "n", gpus=1, submitted=NOON[:16])
    put(f"{output}/dev-3/attempts/1.json", content(bare))
    write_wait(Storage(), output, Wait("dev-3", NOON, 300, 600, 1200, 1000))
    log = read(output)
    assert log.durations.seconds.tolist() == [3600, 3600] and log.calibration.held == 1


def test_many_are_counted(output):
    for number in range(3, 9):
        put(f"{output}/dev-{number}/attempts/1.json", b"{")
    words = read(output).gaps.words()
    assert words.startswith("7 files of earlier runs are damaged") and words.endswith(" and 4 others")


class Full(NoServer):
    "A node whose two GPUs are held, and a job that waits for them"

    def items(self, path, **query):
        if path.endswith("nodes"):
            return [{"metadata": {"name": "gpu-1"}, "status": {"allocatable": {"nvidia.com/gpu": "2", "cpu": "8"}}}]
        if path.endswith("jobs"):
            labels = {"app.kubernetes.io/managed-by": "gpuml", "gpuml.io/run": "b", "gpuml.io/config": "dev"}
            notes = {"gpuml.io/output": "/nowhere/b"}
            meta = {"name": "b", "uid": "b", "namespace": "gpuml-dev", "creationTimestamp": NOON, "labels": labels}
            return [{"metadata": meta | {"annotations": notes}, "spec": {"template": {"spec": {"containers": []}}}}]
        if not path.endswith("pods"):
            return []
        pods = [self.pod("b", "", "Pending")]
        return [self.pod("a", "gpu-1", "Running"), *pods] if path == "/api/v1/pods" else pods

    def get(self, path, **query):
        return {"value": 0}

    def pod(self, name, node, phase):
        labels = {"app.kubernetes.io/managed-by": "gpuml", "gpuml.io/run": name}
        meta = {"name": f"{name}-1", "namespace": "gpuml-dev", "creationTimestamp": NOON, "labels": labels}
        meta["ownerReferences"] = [{"kind": "Job", "name": name, "uid": name, "controller": True}]
        spec = {"nodeName": node, "containers": [{"resources": {"requests": {"nvidia.com/gpu": "2"}}}]}
        begun = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
        return {"metadata": meta, "spec": spec, "status": {"phase": phase, "startTime": begun}}


def test_a_plan_says_so_once(output):
    container = {"name": "train", "resources": {"requests": {"nvidia.com/gpu": 1}}}
    template = {"spec": {"containers": [container], "priorityClassName": "gpuml-dev"}}
    job = {"metadata": {"namespace": "gpuml-dev", "name": "c"}, "spec": {"template": template}}
    words = str(outlook(Full(), job, lambda: read(output)))
    assert words.startswith("waits: 50 % by ")
    assert words.count("left out of this") == 1 and words.endswith("dev-2/attempts/1.json")


def test_the_sentence_of_a_job_says_so(output):
    words = start_of(JobAddress(Full(), "gpuml-dev", "b"), f"{output}/b", None)
    assert words.startswith("50 % by ") and words.endswith("left out of this: " + f"{output}/dev-2/attempts/1.json")


def test_the_list_of_jobs_says_so_once(project, output):
    with ThreadPoolExecutor(2) as pool:
        listed = cluster_jobs(Full(), load("dev", [f"output={output}"]), None, pool)
    assert listed.rows()[0].reason.startswith("50 % by ")
    assert repr(listed).count("left out of this") == 1
    assert repr(listed).endswith(f"left out of this: {output}/dev-2/attempts/1.json")
    assert listed._repr_html_().count("left out of this") == 1


def test_an_output_that_does_not_answer_is_named(tmp_path):
    gaps = read_site_log("s3://none/dev", "http://127.0.0.1:9", NOW, patience=0.1).gaps
    assert gaps.words().startswith("without what earlier runs at s3://none/dev took: ")


DAMAGED = (b"", b"{", b"[]", b"3", b'{"save_seconds": "long"}', b'{"save_seconds": -1}', b'{"save_seconds": NaN}')


@pytest.mark.parametrize("text", [*DAMAGED, b'{"seconds": [], "updates": 1}', b'{"seconds": 1, "updates": true}'])
def test_damaged_metrics_of_earlier_runs(project, tmp_path, text):
    config = load("dev", [f"output={tmp_path}/out"])
    put(tmp_path / "out/dev-1/metrics.json", b'{"save_seconds": 20.0, "seconds": 9.0, "updates": 3}')
    put(tmp_path / "out/dev-2/metrics.json", text)
    runs = earlier_runs(config)
    assert grace_of(runs) == 70 and grace_of(runs[1:]) == 60 and pace_of(config, runs) is None
    assert unread(runs).files == (f"{tmp_path}/out/dev-2/metrics.json",)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"params": 3}', b'{"params": {"machine.device": "x"}}'])
def test_no_record_of_an_earlier_run_breaks_the_pace(project, tmp_path, text):
    config = load("dev", [f"output={tmp_path}/out"])
    put(tmp_path / "out/dev-1/metrics.json", b'{"save_seconds": 20.0, "seconds": 9.0, "updates": 3}')
    put(tmp_path / "out/dev-1/tracking.json", text)
    assert pace_of(config, earlier_runs(config)) is None


def test_a_submission_says_which_it_left_out(project):
    write_file(project / "outputs/dev-1/metrics.json", "{")
    write_json(project / "nbs/train.ipynb", {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    planned = prepare(load("dev"), project / "nbs/train.ipynb", local=True)
    texts = [finding.text for finding in planned.findings if finding.subject == "earlier"]
    assert len(texts) == 1 and texts[0].endswith(f"left out of this: {project}/outputs/dev-1/metrics.json")
