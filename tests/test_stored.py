"Runs that are kept on S3: complete there, found again from anywhere, continued on a machine that has nothing else"

import json
import os
import random
import shutil
import signal
import socket
from pathlib import Path

import pytest

from gpuml.base.errors import ConfigError, Exit, OutputError, Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training.fit import fit
from gpuml.training.machine_choices import MachineChoices, read_choices
from gpuml.training.progress import Reporter
from gpuml.training.results import load_run
from gpuml.training.run_copy import RunCopy, keep_choices
from gpuml.training.runs import output_folder
from gpuml.training.start import Start
from tests.conftest import runs_in
from tests.faults import GATEWAY, INTERNAL, SLOW_DOWN, Fault, Proxy, s3_error
from tests.test_interrupt import (  # noqa: F401
    CALM,
    CONTEXT,
    OVERRIDES,
    check_steps,
    kill_after,
    recorded,
    result,
    stop_at,
    train_in_child,
    undisturbed,
)  # fmt: skip
from tests.waiting import until

CHOICES = MachineChoices(True, True, 4096, False, True, "NVIDIA H200", "2.13.0")  # as an attempt on a GPU keeps them


@pytest.fixture
def kept(store, s3, monkeypatch):
    "A project whose output is on S3; the prefix"
    config = store.parent / "config" / "dev.yaml"
    config.write_text(config.read_text().replace("output: outputs", f"output: {s3.url('runs')}"))
    monkeypatch.setenv("HOME", str(store.parent / "home"))  # whose cache is empty
    return s3.url("runs")


def names(place):
    "What is below a run's place"
    found = Storage().find(f"{place}/*/**/*") + Storage().find(f"{place}/*/*")
    return {f.url.removeprefix(place).split("/", 2)[2] for f in found}


def move(monkeypatch):
    "On to another machine, which has nothing of the run"
    shutil.rmtree(output_folder(load("dev")), ignore_errors=True)
    monkeypatch.setattr(socket, "gethostname", lambda: f"machine-{random.randrange(10**9)}")


def test_everything_is_there(kept, store, undisturbed):  # noqa: F811
    run = fit(load("dev", OVERRIDES))
    assert result(run) == undisturbed and run.place == f"{kept}/{run.id}" and f"{run.place}/model" in repr(run)
    assert names(kept) >= {
        "certificate.json",
        "config.yaml",
        "metrics.json",
        "predictions.csv",
        "model/model.safetensors",
    }
    assert not any(name.startswith(("checkpoints", ".")) for name in names(kept))
    told = json.loads(Storage().read(Storage().info(f"{run.place}/tracking.json")))
    assert told["status"] == told["told"] == "FINISHED"
    shutil.rmtree(output_folder(load("dev")))
    for again in (load_run(run.place), load_run(run.id)):
        assert (
            result(again) == undisturbed
            and again.predict(["late parcel"]).labels == run.predict(["late parcel"]).labels
        )


def test_stopped_here_and_continued_elsewhere(kept, store, undisturbed, monkeypatch):  # noqa: F811
    with pytest.raises(Preempted):
        fit(load("dev", OVERRIDES), watch=stop_at(4))
    saved = sorted(n for n in names(kept) if n.endswith("manifest.json"))
    assert len(saved) == 2 and saved[-1] >= "checkpoints/step-00000004" and "certificate.json" not in names(kept)
    (folder,) = output_folder(load("dev")).iterdir()
    keep_choices(RunCopy(Start(load("dev"), folder), Reporter(None)), CHOICES)
    move(monkeypatch)
    with pytest.raises(Preempted):
        fit(load("dev", OVERRIDES), watch=stop_at(7), resume="latest")
    assert read_choices(folder, CHOICES.device, CHOICES.torch) == (CHOICES, "")
    move(monkeypatch)
    assert result(fit(load("dev", OVERRIDES), resume="latest")) == undisturbed
    (run,) = recorded(store)
    assert run.info.status == "FINISHED"
    check_steps(store, run)


def test_what_was_told_is_newer_than_the_metrics(kept, store, undisturbed, monkeypatch):  # noqa: F811
    "Two files can't be stored at one moment: MLflow was told more than the metrics that are found again"
    with pytest.raises(Preempted):
        fit(load("dev", OVERRIDES), watch=stop_at(4))
    (spool,) = Storage().find(f"{kept}/*/metrics.jsonl")
    older = b"".join(Storage().read(spool).splitlines(keepends=True)[:-2])
    Storage().put_bytes(older, spool.url)
    move(monkeypatch)
    assert result(fit(load("dev", OVERRIDES), resume="latest")) == undisturbed
    (run,) = recorded(store)
    assert run.info.status == "FINISHED"
    check_steps(store, run)


@pytest.mark.parametrize("seed", range(3))
def test_machine_is_lost(seed, kept, store, undisturbed, monkeypatch):  # noqa: F811
    "SIGKILL at a random moment, and the disk is gone; the run goes on elsewhere by its id, and MLflow hears nothing twice"
    code = kill_after(store.parent, random.Random(seed).uniform(1.0, 3.0), signal.SIGKILL, None)
    assert code in (-9, 0)
    place = {f.url.split("/")[-2] for f in Storage().find(f"{kept}/*/tracking.json")}
    move(monkeypatch)
    if code == 0 or not place:
        return
    (run_id,) = place
    if "certificate.json" not in names(kept):
        with pytest.raises(ConfigError, match=f"by its record; if that machine is gone, `--resume {run_id}`"):
            fit(load("dev", OVERRIDES), resume="latest")
        assert result(fit(load("dev", OVERRIDES), resume=run_id)) == undisturbed
        (run,) = recorded(store)
        check_steps(store, run)


@pytest.mark.parametrize("what", ["cut off", "flipped byte", "no manifest"])
def test_damaged_checkpoint_on_s3_is_passed_over(what, kept, store, undisturbed, monkeypatch):  # noqa: F811
    with pytest.raises(Preempted):
        fit(load("dev", OVERRIDES), watch=stop_at(7))
    newest = max(f.url for f in Storage().find(f"{kept}/*/checkpoints/*/tensors.safetensors"))
    raw = bytearray(Storage().read(Storage().info(newest)))
    if what == "no manifest":
        Storage().remove(newest.replace("tensors.safetensors", "manifest.json"))
    else:
        raw[len(raw) // 2] ^= 1
        Storage().put_bytes(bytes(raw if what == "flipped byte" else raw[: len(raw) // 2]), newest)
    move(monkeypatch)
    done = fit(load("dev", OVERRIDES), resume="latest")
    assert result(done) == undisturbed
    assert any("is damaged" in note for note in done.metrics["notes"]) == (what != "no manifest")


def test_failed_run_leaves_nothing(kept, store):
    with pytest.raises(Exception, match="boom"):
        fit(load("dev", OVERRIDES), watch=lambda p: p.phase == "training" and (_ for _ in ()).throw(ValueError("boom")))
    assert names(kept) == set() and runs_in(store)[0].info.status == "FAILED"


@pytest.mark.parametrize(
    "change,code,said",
    [
        (lambda m: m.setenv("AWS_SECRET_ACCESS_KEY", "wrong"), 77, "AWS_SECRET_ACCESS_KEY is not the secret"),
        (lambda m: m.delenv("AWS_ACCESS_KEY_ID"), 77, "no keys for S3"),
    ],
)
def test_output_that_can_not_be_written_is_refused_before_training(change, code, said, kept, monkeypatch):
    change(monkeypatch)
    with pytest.raises(OutputError, match=said) as e:
        fit(load("dev", OVERRIDES))
    assert e.value.exit_code == code and "output: s3://" in str(e.value)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "?") not in str(e.value)
    assert not Path(output_folder(load("dev"))).exists()


def test_reader_can_not_write(kept, monkeypatch):
    from tests.s3 import READER, READER_SECRET, keys_in_environment

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    keys_in_environment(monkeypatch, READER, READER_SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(OutputError, match="not permitted to write") as e:
        fit(load("dev", OVERRIDES))
    assert e.value.exit_code == Exit.NOT_PERMITTED and not list(output_folder(load("dev")).glob("*"))


@pytest.fixture
def proxy(undisturbed, kept, store, s3, monkeypatch):  # noqa: F811
    "Data and output are on S3, behind a proxy that can break requests"
    data = store.parent / "data" / "a.csv"
    Storage().put(data, s3.url("in/a.csv"))
    data.unlink()
    with Proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def same(run, undisturbed):  # noqa: F811
    "Weights and metrics; the predictions name other files"
    return json.loads(result(run))[:2] == json.loads(undisturbed)[:2]


@pytest.mark.parametrize("seed", range(2))
def test_broken_requests_change_nothing(seed, proxy, s3, undisturbed):  # noqa: F811
    "A third of all requests fail: reading, tokenising, checkpoints, results"
    dice = random.Random(seed)
    kinds = [SLOW_DOWN, INTERNAL, GATEWAY, *map(Fault, ("reset", "cut", "lost", "half", "short"))]
    proxy.plan = lambda request: dice.choice(kinds) if dice.random() < 0.3 else None
    run = fit(load("dev", [*OVERRIDES, f"data.train={s3.url('in')}"]))
    assert same(run, undisturbed) and len(proxy.faults) > 10
    assert not [note for note in run.metrics["notes"] if "S3" in note]


def test_s3_goes_away_while_training(proxy, s3, undisturbed, monkeypatch):  # noqa: F811
    "Away from the first update on, until that is said at its end: training goes on, and waits there"
    acts, said = [proxy.up, proxy.down], []

    def watch(progress):
        if progress.step and len(acts) == 2:
            acts.pop()()
        said.append(progress.doing)
        is_told = "does not answer" in said[-1] and "so far" in said[-1]
        if is_told and progress.step == progress.steps and acts:
            acts.pop()()

    run = fit(load("dev", [*OVERRIDES, f"data.train={s3.url('in')}"]), watch=watch)
    assert same(run, undisturbed) and not acts
    place = run.place
    move(monkeypatch)
    assert same(load_run(place), undisturbed)


def test_keys_that_expire_while_training_lose_nothing(proxy, s3, undisturbed):  # noqa: F811
    "fsspec/s3fs#500: they were accepted, so it ends with 75, whole here; with new ones the same run goes on"
    expired = s3_error(400, "ExpiredToken", "The provided token has expired.")

    def watch(progress):
        if progress.step:
            proxy.plan = lambda request: expired

    overrides = [*OVERRIDES, f"data.train={s3.url('in')}"]
    with pytest.raises(OutputError, match="refuses the keys that it accepted until now.* and it goes on") as refused:
        fit(load("dev", overrides), watch=watch)
    assert refused.value.exit_code == Exit.INTERRUPTED
    proxy.plan = lambda request: None
    run = fit(load("dev", overrides), resume="latest")
    assert same(run, undisturbed)


def test_machine_is_lost_when_all_is_on_s3_and_mlflow_does_not_know(proxy, kept, store, s3, undisturbed, monkeypatch):  # noqa: F811
    "SIGKILL when the certificate arrives: the run's id, resumed elsewhere, tells MLflow, and trains nothing"

    def kill():
        until(lambda: recorded(store))
        os.kill(child.pid, signal.SIGKILL)

    overrides, started = [f"data.train={s3.url('in')}"], CONTEXT.Event()
    arguments = (str(store.parent), None, started, overrides, dict(os.environ))
    child = CONTEXT.Process(target=train_in_child, args=arguments)

    def plan(request):
        if request.method == "PUT" and "certificate.json" in request.path:
            return Fault("lost", act=kill)

    proxy.plan = plan
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL and "certificate.json" in names(kept)
    assert [run.info.status for run in recorded(store)] == ["RUNNING"]
    (run_id,) = {f.url.split("/")[-2] for f in Storage().find(f"{kept}/*/tracking.json")}
    move(monkeypatch)
    phases = []
    run = fit(load("dev", [*OVERRIDES, *overrides]), watch=lambda p: phases.append(p.phase), resume=run_id)
    assert same(run, undisturbed) and "training" not in phases
    (recorded_run,) = recorded(store)
    assert recorded_run.info.status == "FINISHED"
    check_steps(store, recorded_run)
    with pytest.raises(ConfigError, match="is finished"):
        fit(load("dev", [*OVERRIDES, *overrides]), resume=run_id)


def test_a_finished_run_gets_more_epochs_elsewhere(kept, store, monkeypatch):
    "Its certificate is gone from S3 before anything is trained, also where the machine that trains on is lost"
    constant = ["train.schedule=constant", "train.warmup=0", "train.checkpoint_updates=2"]
    expected = result(fit(load("dev", ["train.epochs=3", *constant, f"output={kept}-whole"])))
    done = fit(load("dev", ["train.epochs=2", *constant]))
    assert len([name for name in names(kept) if name.endswith("manifest.json")]) == 1
    move(monkeypatch)
    with pytest.raises(Preempted):
        fit(load("dev", ["train.epochs=3"]), watch=stop_at(8), resume=done.id)
    assert "certificate.json" not in names(kept)
    move(monkeypatch)
    assert result(fit(load("dev"), resume="latest")) == expected
    move(monkeypatch)
    assert result(load_run(f"{kept}/{done.id}")) == expected
