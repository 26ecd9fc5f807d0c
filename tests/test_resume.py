"A run that goes on keeps to its own config, and gets more epochs where that changes nothing of what is done"

import json
import shutil
from pathlib import Path

import pytest

from gpuml.base.config import Config, data_moved
from gpuml.base.errors import ConfigError, Preempted
from gpuml.base.line import parse_words
from gpuml.base.loading import load
from gpuml.training import start as starting
from gpuml.training.fit import carry_out, fit
from gpuml.training.own_job import OwnJob
from gpuml.training.results import load_run
from gpuml.training.resume import continue_run
from gpuml.training.unfinished import alone_on
from tests.conftest import runs_in
from tests.test_interrupt import OVERRIDES, result, stop_at

FILE = "data:\n  train: data/a.csv\ntrain:\n  epochs: 3\n  schedule: constant\n  warmup: 0\n"
LONGER = ["train.epochs=4", "train.checkpoint_updates=2", "train.schedule=constant", "train.warmup=0"]
SHORTER = ["train.epochs=2", *LONGER[1:]]

# what the run was begun with, what its file says now, what stands behind --resume, and what it goes on with
GOES_ON = {
    "nothing on the line": (["train.epochs=30"], FILE, [], {"epochs": 30}),
    "the same on the line": (["train.epochs=30"], FILE, ["train.epochs=30"], {"epochs": 30}),
    "the file was edited": ([], FILE.replace("3", "7") + "  seed: 5\n", [], {"epochs": 3, "seed": 42}),
    "the run's value on the line, another in the file": ([], FILE.replace("3", "7"), ["train.epochs=3"], {"epochs": 3}),
    "what is harmless, on the line": ([], FILE, ["train.checkpoint_updates=9"], {"checkpoint_updates": 9}),
    "what is harmless, of the run": (["train.checkpoint_updates=9"], FILE, [], {"checkpoint_updates": 9}),
    "more epochs": ([], FILE, ["train.epochs=31"], {"epochs": 31, "warmup": 0.0}),
    "more epochs and a warm-up": (["train.warmup=0.5"], FILE, ["train.epochs=6"], {"epochs": 6, "warmup": 0.25}),
}
REFUSED = {
    "another value": (["train.epochs=30"], ["train.seed=1"], "train.seed: 42 → 1"),
    "the file's value": (["train.seed=1"], ["train.seed=42"], "train.seed: 1 → 42"),
    "fewer epochs": ([], ["train.epochs=2"], "train.epochs: 3 → 2"),
    "more epochs and another value": ([], ["train.epochs=4", "train.seed=1"], "train.seed: 42 → 1"),
    "more epochs, linear": (["train.schedule=linear"], ["train.epochs=4"], "need train.schedule=constant: with linear"),
    "more epochs, cosine": (["train.schedule=cosine"], ["train.epochs=4"], "need train.schedule=constant: with cosine"),
}


def begun(folder: Path, begin: list[str], now: str, line: list[str]) -> tuple[Config, Config]:
    "The config of a run as it stands in its folder, and the one that is loaded to go on"
    file = folder / "config" / "dev.yaml"
    file.parent.mkdir()
    file.write_text(FILE)
    own = load("dev", begin, folder)
    own = own.model_copy(update={"data": data_moved(own, str)})
    file.write_text(now)
    return own, load("dev", line, folder)


def test_what_a_run_goes_on_with(tmp_path):
    for number, (name, (begin, now, line, expected)) in enumerate(GOES_ON.items()):
        (tmp_path / str(number)).mkdir()
        own, given = begun(tmp_path / str(number), begin, now, line)
        going_on = continue_run("dev-1", own, given)
        assert {key: getattr(going_on.config.train, key) for key in expected} == expected, name
        assert going_on.config.root == given.root and going_on.config.name == "dev", name
        assert (going_on.epochs_before == 3) == name.startswith("more"), name


def test_what_a_run_does_not_go_on_with(tmp_path):
    for number, (name, (begin, line, message)) in enumerate(REFUSED.items()):
        (tmp_path / str(number)).mkdir()
        own, given = begun(tmp_path / str(number), begin, FILE, line)
        with pytest.raises(ConfigError, match="--resume: dev-1 was started with another config") as refused:
            continue_run("dev-1", own, given)
        assert message in str(refused.value), name


def test_what_the_file_says_now_is_said(tmp_path):
    own, given = begun(tmp_path, ["train.epochs=30"], FILE + "  seed: 5\n", [])
    assert continue_run("dev-1", own, given).notes == (
        "the run goes on with its own values: train.epochs=30 (dev: 3), train.seed=42 (dev: 5)",
    )


def stopped(overrides: list[str], at: int | str) -> None:
    with pytest.raises(Preempted):
        fit(load("dev", overrides), watch=stop_at(at))


def test_resume_without_the_overrides_of_its_line(store):
    expected = result(fit(load("dev", [*OVERRIDES, "tracking.experiment=undisturbed"])))
    stopped(OVERRIDES, 4)
    assert result(fit(load("dev"), resume="latest")) == expected


def steps(database: Path, run_id: str, key: str) -> list[int]:
    "The steps that MLflow has of a run's metric, and its only run"
    import mlflow

    (run,) = [r for r in runs_in(database) if r.data.tags["gpuml.run"] == run_id]
    assert run.info.status == "FINISHED"
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    return [m.step for m in client.get_metric_history(run.info.run_id, key)]


def test_more_epochs_give_what_was_planned_with_them(store):
    expected = result(fit(load("dev", LONGER)))
    done = fit(load("dev", SHORTER))
    folder, epochs = done.folder, done.metrics["history"]
    assert len(list((folder / "checkpoints").iterdir())) == 1
    with pytest.raises(ConfigError, match="is finished"):
        fit(load("dev"), resume=done.id)
    with pytest.raises(Preempted):  # in the middle of what is added
        fit(load("dev", ["train.epochs=4"]), watch=stop_at(8), resume=done.id)
    assert load(folder / "config.yaml").train.epochs == 4
    with pytest.raises(Exception, match="not a finished run: it has no certificate"):
        load_run(folder)
    longer = fit(load("dev"), resume="latest")
    certificate = json.loads((folder / "certificate.json").read_text())
    assert longer.folder == folder and longer.metrics["history"][:2] == epochs
    assert certificate["planned_updates"] == certificate["done_updates"] == 12
    assert result(longer) == expected
    assert steps(store, done.id, "loss") == list(range(1, 13))
    evaluated = steps(store, done.id, "validation_loss")
    assert evaluated == sorted(set(evaluated)) and {3, 6, 9, 12} <= set(evaluated)


def test_a_stopped_run_gets_more_epochs(store):
    expected = result(fit(load("dev", LONGER)))
    stopped(SHORTER, 4)
    assert result(fit(load("dev", ["train.epochs=4"]), resume="latest")) == expected


def test_a_run_without_its_checkpoint_stays_whole(store):
    "What refuses comes before anything of the run is touched"
    done = fit(load("dev", SHORTER))
    (tensors,) = (done.folder / "checkpoints").glob("*/tensors.safetensors")
    tensors.write_bytes(b"")
    with pytest.raises(ConfigError, match="its last checkpoint is damaged; start a new run with more epochs"):
        fit(load("dev", ["train.epochs=4"]), resume=done.id)
    assert load_run(done.folder).config.train.epochs == 2
    done = fit(load("dev", [*SHORTER, "train.schedule=linear"]))
    assert not (done.folder / "checkpoints").exists()
    with pytest.raises(ConfigError, match="more epochs need train.schedule=constant"):
        fit(load("dev", ["train.epochs=4"]), resume=done.id)


def test_words_are_read_once():
    from gpuml.base.options import take_place

    run = "dev-20261103-093000-beef"
    lines = {
        "--resume --on here": (["dev", [], "latest"], {"--on": "here"}),
        f"--resume {run} --on=here train.epochs=4": (["dev", ["train.epochs=4"], run], {"--on": "here"}),
        f"--on here --resume={run}": (["dev", [], run], {"--on": "here"}),
        "prod --notebook a.ipynb --resume": (["prod", [], "latest"], {"--notebook": "a.ipynb"}),
    }
    for line, (expected, places) in lines.items():
        words, options = take_place(line.split())
        assert (list(parse_words(words)), options) == (expected, places), line
    with pytest.raises(ConfigError, match="--on: needs a value"):
        take_place(["--on"])


def test_a_run_that_stopped_early_says_so_once(store):
    "The note is in the checkpoint, and whether to stop is decided again behind it"
    words = ["train.epochs=20", "train.early_stopping=1", "train.learning_rate=1e-9"]
    with pytest.raises(Preempted):
        fit(load("dev", words), watch=stop_at("saving"))
    run = fit(load("dev", words), resume="latest")
    assert len(run.metrics["history"]) == 2
    assert [note for note in run.metrics["notes"] if "stopped after epoch 2" in note] == [run.metrics["notes"][-1]]


def test_other_tokens_are_no_way_to_go_on(store, tiny, tmp_path):
    "A model's folder, or its newest revision, may have another tokenizer by the next attempt: texts would be other ids"
    own = Path(shutil.copytree(tiny, tmp_path / "model"))
    words = [*OVERRIDES, f"model.name={own}"]
    with pytest.raises(Preempted):
        fit(load("dev", words), watch=stop_at(4))
    file, text = own / "tokenizer.json", (own / "tokenizer.json").read_text()
    tree = json.loads(text)
    tree["model"]["vocab"] |= {"a": tree["model"]["vocab"]["b"], "b": tree["model"]["vocab"]["a"]}
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="the tokenizer of model.name changed since the checkpoint of dev-"):
        fit(load("dev", words), resume="latest")
    file.write_text(json.dumps({"post_processor": None, "decoder": None} | json.loads(text), indent=1))  # the same one
    assert fit(load("dev", words), resume="latest").metrics["updates"] == 9


def test_one_process_goes_on_with_a_run(store):
    "Between the look at the record and the first update lie seconds, in which another process may begin the same"
    with pytest.raises(Preempted):
        fit(load("dev", OVERRIDES), watch=stop_at(4))
    (folder,) = (store.parent / "outputs").glob("dev-*")
    start = starting.begin(load("dev", OVERRIDES), folder.name, OwnJob())
    kept = sorted(file.name for file in (folder / "checkpoints").iterdir())
    with alone_on(folder), pytest.raises(ConfigError, match="is still running"):
        carry_out(start)
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == kept
    assert carry_out(start).metrics["updates"] == 9
