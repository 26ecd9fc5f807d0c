"""The order of training rows: windows that are known before anything is read, the same in every attempt.

Windows are made small here, so that a few kilobytes have several.
"""

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpuml.base.errors import ConfigError, DataError, Exit, OutputError, Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.data import reading
from gpuml.data.early import Early
from gpuml.data.order_choice import choose_order, free_space
from gpuml.data.orders import Global
from gpuml.data.pieces import WindowLimits, cut_windows
from gpuml.data.windows import Windows
from gpuml.training.fit import fit
from gpuml.training.model import load_classifier
from gpuml.training.origin import locate
from gpuml.training.setting import Limits
from tests.conftest import rows
from tests.faults import SLOW_DOWN, Proxy
from tests.test_interrupt import CONTEXT, recorded, result, stop_at

LABELS = "data.labels=[billing, delivery]"
EARLY = [LABELS, "data.order=early", "train.checkpoint_updates=3"]
WINDOWS = ["data.order=windows", "train.checkpoint_updates=3"]
PIECE = 600  # bytes
SMALL = WindowLimits(PIECE, 4 * PIECE)
train = partial(fit, limits=Limits(windows=SMALL))


def write(folder, files=5, count=60):
    "Some files of rows in two classes; rows that differ in length, and some texts twice"
    made = rows(files * count)
    for i in range(files):
        part = made[i * count : (i + 1) * count] + made[:1]
        (folder / f"part-{i}.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in part))


@pytest.fixture
def project_of_files(store):
    "A project on the tiny model, with five files; its MLflow store"
    (store.parent / "data" / "a.csv").unlink()
    write(store.parent / "data")
    return store


def cold(project):
    "Remove all that was prepared"
    for path in sorted((project / "cache").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


CALM = {}


@pytest.fixture
def calm(project_of_files):
    "A function: what an order gives when nothing interferes, from cold; computed once"

    def undisturbed(order):
        if tuple(order) not in CALM:
            run = train(load("dev", [*order, "output=calm", "tracking.experiment=calm"]))
            CALM[tuple(order)] = result(run)
            cold(project_of_files.parent)
        return CALM[tuple(order)]

    return undisturbed


# ---- which bytes form which window


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_windows_have_every_byte_once(seed, scatter):
    sizes = np.random.default_rng(seed).integers(0, 20_000, 12).tolist()
    windows = cut_windows(sizes, seed, 3, scatter, SMALL)
    assert windows == cut_windows(sizes, seed, 3, scatter, SMALL) != cut_windows(sizes, seed, 4, scatter, SMALL)
    pieces = sorted(piece for window in windows for piece in window)
    for i, size in enumerate(sizes):
        mine = [piece for piece in pieces if piece.file == i]
        assert (mine[0].start, mine[-1].end) == (0, size)
        assert all(a.end == b.start and a.end - a.start <= PIECE for a, b in zip(mine, mine[1:], strict=False))
    bytes_of = [sum(p.end - p.start for p in window) for window in windows]
    assert max(bytes_of) < 5 * PIECE and bytes_of[0] < 2 * PIECE
    if not scatter:  # files in a shuffled order, each from its start to its end
        flat = [piece for window in windows for piece in window]
        assert [p.file for p in flat] != sorted(p.file for p in flat)
        assert all(a.file != b.file or a.end == b.start for a, b in zip(flat, flat[1:], strict=False))


def tokenizer_of(project):
    from gpuml.training.model import load_tokenizer
    from gpuml.training.origin import locate

    return load_tokenizer(locate(load("dev")))


def seen(order, epoch):
    "Place, class and token ids of every row of an epoch, in the order of its parts"
    found = []
    for i in range(len(order.sizes(epoch))):
        part = order.part(epoch, i)
        ids = [tuple(part.tokens.ids(np.array([j])).tolist()) for j in range(len(part))]
        found += zip(part.places(), part.classes.tolist(), ids, strict=True)
    return found


def test_every_row_once_an_epoch(project_of_files):
    "With both orders the rows of an epoch are those of the global order, with the same tokens and classes"
    tokenizer = tokenizer_of(project_of_files)
    early, windows = load("dev", EARLY), load("dev", WINDOWS)

    def read(feed, check, say):
        return reading.read(early, tokenizer, 24, check=check, say=say, feed=feed)

    one = Early(early, read, limits=SMALL)
    first, data = seen(one, 0), one.data()
    assert sorted(first) == sorted(seen(Global(data.train), 0)) == sorted(seen(one, 1))
    assert sum(one.counts(0)) == len(first) == len(data.train) and len(one.counts(0)) == len(one.sizes(0)) > 3
    one.close()
    expected = sorted(seen(Global(reading.read(load("dev", [LABELS]), tokenizer, 24).train), 0))
    data = reading.read(windows, tokenizer, 24)
    assert data.train.tokens is None and len(data.validation.tokens) == len(data.validation)
    two = Windows(data, windows, tokenizer, 24, limits=SMALL)
    epochs = [seen(two, epoch) for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [expected, expected] and epochs[0] != epochs[1]
    assert [sum(two.counts(epoch)) for epoch in range(2)] == [len(data.train)] * 2
    two.close()


def test_a_window_is_there_before_its_file_is_finished(project_of_files):
    "The reading thread is held in the middle of a file: the windows before that can be taken, and are the final ones"
    folder, tokenizer = project_of_files.parent / "data", tokenizer_of(project_of_files)
    for file in folder.iterdir():
        file.unlink()
    write(folder, files=1, count=12_000)
    config, go, calls = load("dev", EARLY), threading.Event(), []

    def read(feed, check, say):
        def held():
            calls.append(1)
            if len(calls) > 8:
                assert go.wait(600), "nobody had the first window"
            check()

        return reading.read(
            config, tokenizer, 24, check=held, say=say, feed=feed, threads=2
        )  # so four thousand rows are read before the first are tokenised

    early = Early(config, read, limits=WindowLimits(20_000))
    first = early.part(0, 0)
    assert not go.is_set() and early.counts(0) is None and not list(project_of_files.parent.glob("cache/tokens/[!.]*"))
    go.set()
    rows = seen(early, 0)
    kept = seen(Global(first), 0)
    assert 100 < len(kept) < 1000 and rows[: len(kept)] == kept
    assert sorted(rows) == sorted(seen(Global(early.data().train), 0))
    early.close()


# ---- training


def test_early_is_the_same_from_cold_and_warm(project_of_files, calm):
    first = calm(EARLY)
    runs = [train(load("dev", EARLY)) for _ in range(2)]  # cold again, and with everything prepared
    assert [result(run) for run in runs] == [first, first]
    (run, _), metrics = recorded(project_of_files), runs[0].metrics
    certificate = json.loads((runs[0].folder / "certificate.json").read_text())
    assert certificate["planned_updates"] == certificate["done_updates"] == metrics["updates"]
    assert any("the first epoch is shuffled in" in note for note in metrics["notes"])
    assert run.data.params["data.order_used"] == "early"
    assert run.data.params["data.fingerprint"] == certificate["data_fingerprint"][:16]
    assert int(run.data.params["data.train_rows"]) > 200 and run.data.params["data.order"] == "early"
    assert first != calm([LABELS])


def test_learning_rate_follows_the_bytes(project_of_files):
    run = train(load("dev", [*EARLY, "train.warmup=0.2"]))
    import mlflow

    (found,) = recorded(project_of_files)
    history = mlflow.MlflowClient(f"sqlite:///{project_of_files}").get_metric_history(
        found.info.run_id, "learning_rate"
    )
    rates = [m.value for m in sorted(history, key=lambda m: m.step)]
    top = int(np.argmax(rates))
    assert len(rates) == run.metrics["updates"] and abs(top / len(rates) - 0.2) < 0.05 and max(rates) > 1.9e-4
    assert np.all(np.diff(rates[:top]) > 0) and np.all(np.diff(rates[top:]) < 0) and 0 < rates[-1] < 1e-5
    assert abs(rates[0] / (max(rates) / top) - 1) < 0.5  # parts of the first epoch are not all of one size


@pytest.mark.parametrize(
    "order,moments",
    [
        (EARLY, ["training", 1, "evaluating"]),
        (EARLY, [4, 31, 50, "saving"]),
        (WINDOWS, [3, 17, "evaluating", 45]),
    ],
    ids=["early at the edges", "early within", "windows"],
)
def test_interruptions_change_nothing(order, moments, project_of_files, calm):
    expected = calm(order)
    resume = None
    for moment in moments:
        with pytest.raises(Preempted):
            train(load("dev", order), watch=stop_at(moment), resume=resume)
        resume = "latest" if list((project_of_files.parent / "outputs").glob("*/tracking.json")) else None
        cold(project_of_files.parent)
    assert result(train(load("dev", order), resume=resume)) == expected
    (run,) = recorded(project_of_files)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project_of_files}")
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == list(range(1, len(steps) + 1))


def train_in_child(folder, order, resume, started, environment, wanted):
    os.environ.update(environment)
    os.chdir(folder)
    started.set()

    def watch(progress):
        while list(Path("outputs").glob(f"*/{wanted}")):
            time.sleep(0.01)  # until it is killed: its end does not come before

    try:
        train(load("dev", order), watch=watch, resume=resume)
    except Preempted:
        os._exit(75)
    os._exit(0)


@pytest.mark.parametrize("order", [EARLY, WINDOWS], ids=["early", "windows"])
def test_kills_change_nothing(order, project_of_files, calm):
    expected, outputs = calm(order), project_of_files.parent / "outputs"
    for wanted in ("tracking.json", "checkpoints/step-*/manifest.json"):  # in the first window, and later
        known, started = list(outputs.glob("*/tracking.json")), CONTEXT.Event()
        arguments = (
            str(project_of_files.parent),
            order,
            "latest" if known else None,
            started,
            dict(os.environ),
            wanted,
        )
        child = CONTEXT.Process(target=train_in_child, args=arguments)
        child.start()
        while child.is_alive() and not list(outputs.glob(f"*/{wanted}")):
            child.join(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join(600)
    assert result(train(load("dev", order), resume="latest")) == expected


# ---- what can be wrong


def test_unknown_label_is_a_bad_row(project_of_files):
    file = project_of_files.parent / "data" / "part-3.csv"
    file.write_text(file.read_text() + "late again,delivry\n")
    for order in ([LABELS], EARLY, [*WINDOWS, LABELS]):
        said = r"data/part-3.csv:63: the label 'delivry' is not in data.labels; did you mean 'delivery'\?"
        with pytest.raises(DataError, match=said) as e:
            train(load("dev", order))
        assert e.value.exit_code == Exit.BAD_DATA
    run = train(load("dev", [*EARLY, "data.on_bad_row=skip", "train.epochs=1"]))
    assert run.labels == ["billing", "delivery"] and "the label 'delivry'" in (run.folder / "skipped.csv").read_text()
    notes = reading.read(load("dev", ["data.labels=[billing, other, delivery]", "data.on_bad_row=skip"])).notes
    assert "no training row has the label: other" in notes


def test_validation_data_of_its_own(project_of_files):
    write(project_of_files.parent, files=1, count=20)
    order = [*EARLY, "data.validation=part-0.csv", "train.epochs=1"]
    runs = [train(load("dev", order)) for _ in range(2)]
    assert result(runs[0]) == result(runs[1]) and "by hash" not in str(runs[0].metrics["notes"])
    assert len((runs[0].folder / "predictions.csv").read_text().splitlines()) == 22
    windows = train(load("dev", [*WINDOWS, "data.validation=part-0.csv", "train.epochs=1"]))
    assert len((windows.folder / "predictions.csv").read_text().splitlines()) == 22


def test_changed_data_is_refused(project_of_files):
    with pytest.raises(Preempted):
        train(load("dev", EARLY), watch=stop_at(2))
    (project_of_files.parent / "data" / "part-9.csv").write_text("text,label\nlate,delivery\n")
    with pytest.raises(ConfigError, match=r"the data changed since the checkpoint of .* \((files|training rows): "):
        train(load("dev", EARLY), resume="latest")


def test_disk_that_is_too_small_for_the_tokens(project_of_files, calm):
    "Windows are used in place of the global order, the record says so, and later attempts keep to it"
    with pytest.raises(Preempted):
        train(
            load("dev", WINDOWS[1:]),
            watch=stop_at(5),
            limits=Limits(lambda folder: 10_000 if folder.name == "cache" else 10**12, SMALL),
        )
    kept = project_of_files.parent.glob("cache/tokens/*/ids")
    assert sum(path.stat().st_size for path in kept) < 3000  # of validation rows only
    run = train(load("dev", WINDOWS[1:]), resume="latest")  # where the disk is large enough
    assert result(run) == calm(WINDOWS)
    assert any("data.order=windows is used in place of global: 0.0 GB are free" in n for n in run.metrics["notes"])
    (found,) = recorded(project_of_files)
    assert found.data.params["data.order_used"] == "windows" and found.data.params["data.order"] == "global"


def test_the_estimate_of_what_tokens_take(project_of_files):
    "What a sample says is near what preparing then takes; with a fifth more than that the order stays as it is asked for"
    config, tokenizer = load("dev", EARLY), tokenizer_of(project_of_files)
    answers = {
        room: choose_order(config, tokenizer, 24, lambda _, room=room: room) for room in range(10_000, 30_000, 1000)
    }
    reading.read(config, tokenizer, 24)
    files = [p for p in (project_of_files.parent / "cache").rglob("*") if p.is_file() and p.suffix != ".json"]
    kept = sum(path.stat().st_size for path in files)
    enough = min(room for room, (order, _) in answers.items() if order == "early")
    assert 1.2 < enough / kept < 1.5
    assert all(
        (order, bool(why)) == (("windows", True) if room < enough else ("early", False))
        for room, (order, why) in answers.items()
    )
    assert choose_order(config, tokenizer, 24, lambda _: 0) == ("early", "")  # all of it is prepared
    assert free_space(project_of_files.parent / "not" / "there") > 0


# ---- through S3, with a server that holds back a part of the data


@pytest.fixture
def held(project_of_files, s3, monkeypatch):
    "The data is on S3, and the file that comes last is held back until `go`"
    for file in (project_of_files.parent / "data").iterdir():
        Storage().put(file, s3.url(f"in/{file.name}"))
    config = load("dev", EARLY)
    sizes = [f.size for f in Storage().find(s3.url("in"))]
    last = cut_windows(sizes, config.train.seed, 0, False, SMALL)[-1][-1].file
    go = threading.Event()

    def plan(request):
        return SLOW_DOWN if f"part-{last}.csv" in request.path and not go.is_set() else None

    with Proxy(s3.endpoint, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield SimpleNamespace(order=[*EARLY, f"data.train={s3.url('in')}"], last=s3.url(f"in/part-{last}.csv"), go=go)


def same(run, expected):
    "Weights and metrics; the predictions name other files"
    return json.loads(result(run))[:2] == json.loads(expected)[:2]


def test_trains_while_s3_is_still_read(held, calm):
    steps = []

    def watch(progress):
        steps.append((progress.step, progress.steps))
        if progress.step >= 5:
            held.go.set()

    expected = calm(EARLY)
    run = train(load("dev", held.order), watch=watch)
    assert same(run, expected) and any(step and steps != run.metrics["updates"] for step, steps in steps)
    assert steps[-1][1] == run.metrics["updates"]


def test_windows_through_s3(held, calm):
    held.go.set()
    order = [*WINDOWS, held.order[-1]]
    expected = calm(WINDOWS)
    with pytest.raises(Preempted):
        train(load("dev", order), watch=stop_at(20))
    assert same(train(load("dev", order), resume="latest"), expected)


def test_stopped_while_s3_is_still_read(held, calm):
    expected = calm(EARLY)
    with pytest.raises(Preempted, match=r"stopped at update \d+ of"):
        train(load("dev", held.order), watch=stop_at(4))
    with pytest.raises(Preempted, match="stopped at update"):  # waiting for a window that does not come
        train(load("dev", held.order), watch=stop_later(2), resume="latest")
    held.go.set()
    assert same(train(load("dev", held.order), resume="latest"), expected)


def stop_later(seconds):
    "A watch that sends SIGTERM some time after training began"
    timer = []

    def watch(progress):
        if progress.phase == "training" and not timer:
            timer.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)))
            timer[0].start()

    return watch


def test_bad_row_that_shows_while_it_trains(held):
    bad = Storage().read(Storage().info(held.last)) if held.go.set() is None else b""
    Storage().put_bytes(bad + b"one,two,three\n", held.last)
    held.go.clear()

    def watch(progress):
        if progress.step >= 3:
            held.go.set()

    with pytest.raises(DataError, match=r"part-\d.csv:63: 3 fields where the header has 2") as e:
        train(load("dev", held.order), watch=watch)
    assert e.value.exit_code == Exit.BAD_DATA and "updates had been done: data.order=early reads while" in str(e.value)
    assert not list(Path("outputs").glob("*/certificate.json"))


@pytest.mark.parametrize(("copies", "outcome"), [(4, OutputError), (6, Preempted)])
def test_disk_that_is_too_small_for_the_run(project_of_files, copies, outcome):
    "It shows before training, not at the first checkpoint or the last (SimpleTuner#2353, metaseq#53)"
    weights = load_classifier(locate(load("dev")), ["a", "b"]).get_memory_footprint(return_buffers=False)
    notes = []
    with pytest.raises(outcome) as error:
        train(
            load("dev"),
            watch=lambda p: (notes.extend(p.notes), stop_at(1)(p)),
            limits=Limits(lambda folder: copies * weights if "outputs" in folder.parts else 10**12, SMALL),
        )
    assert ("GB at least, for a checkpoint and the model" in str(error.value)) == (outcome is OutputError)
    assert any("needs up to" in note for note in notes) == (outcome is Preempted)
