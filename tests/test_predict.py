"Predictions of files: the same as `Run.predict` says, in order, complete or absent, and never done twice"

import csv
import json
import os
import resource
import shutil
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpuml.base.errors import DataError, Exit, OutputError, Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training.answers import predictions_of_many
from gpuml.training.chunks import TOGETHER
from gpuml.training.fit import fit
from gpuml.training.predict import finished_model, predict_file
from gpuml.training.predictors import devices_for
from gpuml.training.results import Run
from gpuml.ui.cli import main
from tests.conftest import CONFIG, WORDS, free_port, rows
from tests.s3 import READER, READER_SECRET, keys_in_environment
from tests.standing import STANDING
from tests.test_interrupt import CONTEXT
from tests.waiting import until


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory, mlflow_template):
    "The folder of a finished run of the tiny model"
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config").mkdir()
    (folder / "config" / "dev.yaml").write_text(
        CONFIG.format(cache=folder / "cache", model=tiny, port=free_port()).replace("2e-4", "1e-2")
    )
    (folder / "data").mkdir()
    (folder / "data" / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows()))
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return fit(load(folder / "config" / "dev.yaml", ["train.epochs=4"])).folder


@pytest.fixture
def run(trained, project):
    return Run(trained)


CACHE = ["data.cache=cache"]


def some_texts(count, seed=0):
    rng, words = np.random.default_rng(seed), " ".join(WORDS.values()).split()
    return [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(count)]


def write_csv(path, texts, **columns):
    "A CSV file with a text column and constant others"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow([*columns, "text"])
        writer.writerows([*columns.values(), text] for text in texts)
    return str(path)


def table(text):
    return list(csv.DictReader(text.splitlines()))


def check_table(found, run, texts, places):
    "The table is what `Run.predict` says of these texts"
    said = run.predict(texts)
    assert [(r["file"], int(r["line"])) for r in found] == places
    assert [r["label"] for r in found] == said.labels
    columns = [[float(r[f"p_{label}"]) for label in run.labels] for r in found]
    np.testing.assert_allclose(columns, said.probabilities, atol=2e-6)
    assert [float(r["probability"]) for r in found] == [max(row) for row in columns]


def test_the_same_as_predict_in_order(run):
    "Several files in two dialects, other columns, line breaks in quotes, one with labels and one without"
    texts = some_texts(60)
    write_csv("in/b.csv", texts[20:], id="7", label="billing")
    Path("in/a.csv").write_text(
        "\ufefftext;when\n" + "".join(f'"{t}\nwhen; or not";today\n' for t in texts[:20]), encoding="utf-8"
    )
    done = run.predict_file("in", "out.csv", CACHE)
    places = [("in/a.csv", 2 + 2 * i) for i in range(20)] + [("in/b.csv", 2 + i) for i in range(40)]
    check_table(
        table(Path("out.csv").read_text()), run, [f"{t}\nwhen; or not" for t in texts[:20]] + texts[20:], places
    )
    assert len(done) == 60 and sum(done.counts.values()) == 60 and "60 rows" in repr(done)
    assert len(set(done.counts.values()) - {0}) == 2  # a model that says one thing only would prove little
    assert not list(Path("cache/predictions").iterdir())


def test_command(run, capsys):
    texts = some_texts(5)
    write_csv("a.csv", texts)
    Path("a.csv").write_text(Path("a.csv").read_text().replace("text", "body", 1))
    assert main(["predict", str(run.folder), "a.csv", "new/out.csv", "data.text=body", *CACHE]) == 0
    said = capsys.readouterr()
    assert "new/out.csv: 5 rows" in said.out and "5 of 5 rows" in said.err
    assert main(["predict", str(run.folder), "a.csv", "new/out.csv", "data.text=body", *CACHE]) == 73
    assert "new/out.csv: is there already; `--force`, in Python `force=True`, replaces it" in capsys.readouterr().err
    write_csv("a.csv", texts[:2])
    assert main(["predict", str(run.folder), "a.csv", "new/out.csv", "--force", *CACHE]) == 0
    check_table(table(Path("new/out.csv").read_text()), run, texts[:2], [("a.csv", 2), ("a.csv", 3)])


def test_s3_in_and_out(run, s3):
    texts = some_texts(30)
    for name, part in (("x.csv", texts[:10]), ("y.csv", texts[10:])):
        Storage().put(write_csv(name, part), s3.url(f"in/{name}"))
    run.predict_file(s3.url("in/*.csv"), s3.url("out/p.csv"), CACHE)
    found = table(Storage().read(Storage().info(s3.url("out/p.csv"))).decode())
    places = [(s3.url("in/x.csv"), i + 2) for i in range(10)] + [(s3.url("in/y.csv"), i + 2) for i in range(20)]
    check_table(found, run, texts, places)
    assert [f.url for f in Storage().find(s3.url("out/"))] == [s3.url("out/p.csv")]
    with pytest.raises(OutputError, match="is there already") as e:
        run.predict_file(s3.url("in/*.csv"), s3.url("out/p.csv"), CACHE)
    assert e.value.exit_code == Exit.NOT_WRITTEN


def test_s3_that_is_not_to_be_written_shows_at_once(run, s3, monkeypatch):
    endpoint, target, phases = os.environ["AWS_ENDPOINT_URL"], s3.url("p.csv"), []
    write_csv("a.csv", some_texts(5))
    keys_in_environment(monkeypatch, READER, READER_SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(OutputError, match="not permitted to write") as e:
        run.predict_file("a.csv", target, CACHE, watch=lambda p: phases.append(p.phase))
    assert (
        e.value.exit_code == Exit.NOT_PERMITTED
        and "can-be-written" not in str(e.value)
        and set(phases) == {"data", "failed"}
    )


def predict_in_child(folder, words, environment, enough):
    "Predict, and stand still until a signal comes once so many rows are kept"
    from torch.nn.modules import module

    space = {}
    exec(STANDING, space)

    def before(model, arguments):
        is_whole = type(model).__name__.endswith("ForSequenceClassification")
        if is_whole and sum(state_of(Path(folder))["counts"].values()) >= enough:
            space["stand_still"]()

    module.register_module_forward_pre_hook(before)
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # the fork server's is another test's
    os._exit(main(["predict", *words]))


def state_of(folder):
    "What an unfinished prediction has kept"
    files = list((folder / "cache" / "predictions").glob("*/state.json"))
    return json.loads(files[0].read_text()) if files else {"counts": {}, "rows": 0}


def stop_in_the_middle(project, words, number, chunks):
    "Predict in a process of its own, and send it a signal once some chunks are kept; exit code, and rows that are kept"
    enough = sum(state_of(project)["counts"].values()) + chunks * TOGETHER["cpu"]
    child = CONTEXT.Process(target=predict_in_child, args=(str(project), words, dict(os.environ), enough))
    child.start()
    until(lambda: sum(state_of(project)["counts"].values()) >= enough or not child.is_alive())
    os.kill(child.pid, number)
    child.join(600)
    state = state_of(project)
    assert sum(state["counts"].values()) < state["rows"]
    return child.exitcode, sum(state["counts"].values())


def test_killed_and_continued(run, project):
    "SIGKILL, SIGTERM, and on to the end: each row is predicted once, and the output is what a calm run writes"
    texts = some_texts(6 * TOGETHER["cpu"])
    for i in range(3):  # whose ends are not those of chunks
        write_csv(f"in/{i}.csv", texts[i * 5000 : (i + 1) * 5000])
    words = [str(run.folder), "in", "out.csv", *CACHE]
    code, first = stop_in_the_middle(project, words, signal.SIGKILL, 1)
    assert code == -9 and first >= TOGETHER["cpu"] and not Path("out.csv").exists()
    with open(next(project.glob("cache/predictions/*/rows.csv")), "a") as f:
        f.write("half a ro")  # as if it had been killed while it wrote
    code, second = stop_in_the_middle(project, words, signal.SIGTERM, 2)
    assert code == Exit.INTERRUPTED and second > first and not Path("out.csv").exists()
    said = (project / "stderr").read_text()
    assert (
        f"stopped at row {second:,} of {len(texts):,}; the same line goes on there" in said and "Traceback" not in said
    )
    steps = []
    done = run.predict_file("in", "out.csv", CACHE, watch=lambda p: steps.append(p.step) if p.steps else None)
    assert steps[0] == second == done.resumed and steps[-1] == len(texts) == sum(done.counts.values())
    run.predict_file("in", "calm.csv", CACHE)
    assert Path("calm.csv").read_bytes() == Path("out.csv").read_bytes()
    assert not list(project.glob("cache/predictions/*")) and not list(project.glob(".out*"))


def test_killed_after_the_output_was_written(run, project):
    "What was not cleaned up is, and an output that only looks alike is not touched"
    write_csv("a.csv", some_texts(10))

    def stop(p):
        if p.phase == "saving":
            os.kill(os.getpid(), signal.SIGTERM)  # noted, and too late to stop anything

    run.predict_file("a.csv", "out.csv", CACHE, watch=stop)
    made = Path("out.csv").read_bytes()
    Path("out.csv").unlink()

    def in_the_way(p):
        if p.phase == "saving":
            Path("out.csv").mkdir()

    with pytest.raises(OutputError, match="all rows are predicted: the same line writes them"):
        run.predict_file("a.csv", "out.csv", CACHE, watch=in_the_way)
    Path("out.csv").rmdir()
    Path("out.csv").write_bytes(made.replace(b"a.csv,2", b"b.csv,2"))
    with pytest.raises(OutputError, match="is there already"):
        run.predict_file("a.csv", "out.csv", CACHE)
    Path("out.csv").write_bytes(made)
    phases = []
    again = run.predict_file("a.csv", "out.csv", CACHE, watch=lambda p: phases.append(p.phase))
    assert len(again) == again.resumed == 10 and "predicting" not in phases
    assert not list(project.glob("cache/predictions/*"))


def test_other_rows_are_another_prediction(run, project):
    "What is kept belongs to these files, in these versions"
    texts = some_texts(3 * TOGETHER["cpu"])
    write_csv("a.csv", texts)

    def stop(p):
        if p.phase == "predicting" and p.step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stopped at row"):
        run.predict_file("a.csv", "out.csv", CACHE, watch=stop)
    write_csv("a.csv", texts[::-1])
    done = run.predict_file("a.csv", "out.csv", CACHE)
    assert not done.resumed and Path("out.csv").exists()


def predictors():
    "The processes that predict for this one"
    return [process for process in psutil.Process().children() if "gpuml.training.predictor" in command_of(process)]


def command_of(process):
    "Nothing of one that has just ended"
    with suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.fixture
def pair(forking, monkeypatch):
    "Two processes on this machine, for however few texts"
    monkeypatch.setenv("GPUML_GPUS", "2")
    return partial(devices_for, many=0)


def test_two_processes_write_the_same_file(run, pair):
    "One of them killed, and continued; a list of texts has the same answers"
    texts = some_texts(5 * TOGETHER["cpu"] + 100)
    write_csv("a.csv", texts)
    sizes = set()

    def kill(p):
        if p.phase == "predicting" and p.step and p.steps:
            for process in predictors():
                process.kill()

    predict = partial(predict_file, run, "a.csv", "out.csv", tuple(CACHE), devices=pair)
    with pytest.raises(Preempted, match=r"process \d of 2 was killed \(signal 9\); the same line goes on"):
        predict(watch=kill)
    assert not predictors()
    done = predict(watch=lambda p: sizes.add(p.processes))
    assert TOGETHER["cpu"] <= done.resumed < len(done) and max(sizes) == 2 and not predictors()
    run.predict_file("a.csv", "alone.csv", CACHE)
    assert Path("out.csv").read_bytes() == Path("alone.csv").read_bytes()
    answers = predictions_of_many(texts, finished_model(run), pair(1), 24, run.labels)
    columns = [[float(row[f"p_{label}"]) for label in run.labels] for row in table(Path("out.csv").read_text())]
    np.testing.assert_allclose(answers.probabilities, columns, atol=1e-6)


BAD = "text,label\nlate parcel,x\nlate, again,x\n,x\nrefund,\n"


def test_bad_rows(run):
    Path("a.csv").write_text(BAD)
    with pytest.raises(DataError) as e:
        run.predict_file("a.csv", "out.csv", CACHE)
    assert e.value.exit_code == Exit.BAD_DATA and str(e.value).splitlines() == [
        "a.csv:3: 3 fields where the header has 2; a text with ',' in it needs quotes",
        "a.csv:4: the text is empty",
        "data.on_bad_row=skip leaves such rows out",
    ]
    assert not Path("out.csv").exists()
    done = run.predict_file("a.csv", "out.csv", [*CACHE, "data.on_bad_row=skip"])
    assert [r["line"] for r in table(Path("out.csv").read_text())] == ["2", "5"]
    assert "2 malformed rows were skipped (the first: a.csv:3: 3 fields" in repr(done)


def test_file_that_changes_meanwhile(run):
    write_csv("a.csv", some_texts(6 * TOGETHER["cpu"]), more="x" * 4000)

    def change(p):
        if p.phase == "predicting" and p.step:
            with open("a.csv", "a") as f:
                f.write("y,more\n")

    with pytest.raises(DataError, match="has changed since it was listed"):
        run.predict_file("a.csv", "out.csv", CACHE, watch=change)
    assert not Path("out.csv").exists()


def peak_in_child(folder, run, name, found):
    os.chdir(folder)
    Run(run).predict_file(name, f"{name}.out", CACHE)
    found.value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_memory_does_not_grow_with_the_file(run, project):
    peaks = []
    for name, count in (("small.csv", 3), ("large.csv", 9)):
        write_csv(name, some_texts(count * TOGETHER["cpu"]), more="x" * 7000)
        found = CONTEXT.Value("l")
        child = CONTEXT.Process(target=peak_in_child, args=(str(project), run.folder, name, found))
        child.start()
        child.join(600)
        assert child.exitcode == 0
        peaks.append(found.value / 1024)
    assert Path("large.csv").stat().st_size > Path("small.csv").stat().st_size + 80e6
    assert peaks[1] < peaks[0] + 30, peaks  # MB
