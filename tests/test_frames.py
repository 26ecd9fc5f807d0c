"Tables of a notebook: what is trained on them is what a file with the same rows gives, and the same rules hold"

import csv
import importlib
import io
import json

import numpy as np
import pandas as pd
import pytest

from gpuml.base.errors import ConfigError, DataError, Preempted
from gpuml.base.loading import load
from gpuml.data.frames import frame_of, keep_rows, with_frame
from gpuml.data.reading import read
from gpuml.training.fit import fit
from gpuml.training.own_job import OwnJob
from gpuml.ui.cli import main
from tests.conftest import rows
from tests.test_interrupt import OVERRIDES, stop_at
from tests.test_predict import CACHE, run, trained  # noqa: F401

TABLE = pd.DataFrame(rows(), columns=["text", "label"])
QUICK = ["train.epochs=1"]


def in_shell(line, **names):
    "What a notebook with these variables gets of a line"
    from IPython.core.interactiveshell import InteractiveShell

    from gpuml.ui import magics

    shell = InteractiveShell()
    magics.load(shell)
    shell.user_ns |= names
    try:
        return shell.run_cell(line)
    finally:
        magics.unload(shell)


def frames_in(project):
    "The rows that came out of no file, and what else lies beside them"
    return sorted(path.name for path in (project / "cache" / "frames").rglob("*"))


def test_a_frame_gives_what_a_file_gives(store):
    config = load("dev", QUICK)
    of_file = fit(config)
    in_lists = [dict(zip(("text", "label"), row)) for row in rows()]
    for table in (TABLE, in_lists, TABLE.astype({"label": "category"}).set_axis(range(5, 29))):
        data = read(with_frame(config, table))
        assert data.fingerprint == read(config).fingerprint
    of_frame = fit(config, data=TABLE)
    for name in ("model/model.safetensors", "model/config.json"):
        assert (of_frame.folder / name).read_bytes() == (of_file.folder / name).read_bytes()
    certificates = [json.loads((each.folder / "certificate.json").read_text()) for each in (of_file, of_frame)]
    assert certificates[0]["data_fingerprint"] == certificates[1]["data_fingerprint"]
    assert of_frame.config.data.train.endswith("/DataFrame.jsonl") and of_frame.config.data.text == "text"


def test_the_magic_takes_a_variable(store):
    trained_here = in_shell("run = %gpu_train dev train.epochs=1 --data tickets", tickets=TABLE, config="dev")
    assert trained_here.success
    for line, message in {
        "%gpu_train dev --data ticket": "--data ticket: the notebook has no variable of that name; did you mean tickets?",
        "%gpu_train dev --data reviews.csv": "no variable of that name; files are named by data.train=…",
        "%gpu_train dev --data tickets --data tickets": "--data: stands there twice; join the tables first",
        "%gpu_train dev data.train=data --data tickets": "both name the training data",
        "%gpu_train dev --data column": "takes a DataFrame of pandas, a Dataset of HuggingFace, or a list of dicts, not a Series",
        "%gpu_train dev --on cluster --data tickets": "does not go with a job",
        "%submit_prod dev --local --data tickets": "write the table to a file (to_parquet, to_csv)",
        "%gpu_train dev compute.nodes=2 --data tickets": "compute.nodes=2 needs it on each",
        "%gpu_train dev data.text=body --data tickets": "no column 'body'; the columns are: text, label",
    }.items():
        result = in_shell(line, tickets=TABLE, column=TABLE["text"])
        assert isinstance(result.error_in_exec, ConfigError | DataError), line
        assert message in str(result.error_in_exec), line


def test_missing_values_and_odd_types_are_told_as_those_of_a_file(project):
    config = load("dev")
    labels = [f"x{i % 2}" for i in range(8)]
    odd = pd.DataFrame({"text": ["a", None, float("nan"), pd.NA, pd.NaT, "", [1], b"x"], "label": labels})
    with pytest.raises(DataError) as e:
        read(with_frame(config, odd))
    *lines, way_out = str(e.value).splitlines()
    assert way_out == "data.on_bad_row=skip leaves such rows out"
    assert [line.partition(": ")[0] for line in lines] == [f"DataFrame:{line}" for line in range(2, 9)]
    assert all("empty" in line for line in lines[:5]) and [line.partition("'text' is ")[2] for line in lines[5:]] == [
        "a list, not a text",
        "an object, not a text",
    ]
    deep = [np.array(["a", "b"]), ("a", "b"), {"a"}, {("a",): 1}, pd.NA, np.float32("nan")]
    for table in ([{"text": v, "label": "x"} for v in deep], pd.DataFrame({"text": deep, "label": ["x"] * len(deep)})):
        with pytest.raises(DataError) as e:
            read(with_frame(config, table))
        *lines, _ = str(e.value).splitlines()
        assert len(lines) == len(deep) and all("is a list, not a text" in line for line in lines[:3]), lines
        assert "is an object, not a text" in lines[3] and all("empty" in line for line in lines[4:])
    numbers = pd.DataFrame({"text": [f"text {i}" for i in range(8)], "label": pd.Series([1, 2] * 4, dtype="int8")})
    assert read(with_frame(config, numbers)).labels == ["1", "2"]
    doubled = pd.DataFrame([["a", "b", "c"]], columns=["text", "text", "label"])
    with pytest.raises(DataError, match="the column 'text' is there twice"):
        with_frame(config, doubled)


def test_half_written_rows_never_stay(project):
    config = load("dev")

    def breaks():
        yield b'{"text": "late"}\n'
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_rows("DataFrame.jsonl", breaks(), config)
    assert frames_in(project) == []
    path = keep_rows("DataFrame.jsonl", [b'{"text": "late"}\n'], config)
    when = path.stat().st_mtime_ns
    path.with_name("frames.json").unlink()  # as if another process were at it
    assert keep_rows("DataFrame.jsonl", [b'{"text": "late"}\n'], config) == path
    assert path.with_name("frames.json").exists() and path.stat().st_mtime_ns >= when
    assert frames_in(project) == sorted([path.parent.name, "DataFrame.jsonl", "frames.json"])


def test_a_stopped_run_goes_on_with_the_same_table_only(store):
    config = load("dev", OVERRIDES)
    with pytest.raises(Preempted):
        fit(config, stop_at(3), data=TABLE)
    with pytest.raises(ConfigError, match=r"leave these out, or start a new run\n  data.train: .*DataFrame.jsonl"):
        fit(config, resume="latest", data=TABLE[:-1])
    done = fit(config, resume="latest", data=TABLE.copy())
    assert done.metrics["updates"] == json.loads((done.folder / "certificate.json").read_text())["planned_updates"]


def test_a_job_has_no_table(project):
    with pytest.raises(ConfigError, match="a job trains on what its config names; write it to a file"):
        fit(load("dev"), data=TABLE, job=OwnJob(run="dev-1"))


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="the package `datasets` is not installed")
def test_a_dataset_of_huggingface(project):
    import datasets

    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["billing", "delivery"])}
    columns = {"text": TABLE["text"], "label": [kinds["label"].str2int(name) for name in TABLE["label"]]}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    config = load("dev")
    for form in (None, "numpy"):
        assert read(with_frame(config, dataset.with_format(form))).fingerprint == read(config).fingerprint
    assert frame_of(datasets.DatasetDict({"train": dataset})) is None


def predict_stdin(content, monkeypatch, capsysbinary, *words):
    "Exit code, rows and what is printed beside them, of `gpuml predict RUN -`"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    code = main(["predict", *words])
    out, err = capsysbinary.readouterr()
    return code, list(csv.DictReader(io.StringIO(out.decode()))), err.decode()


def test_predict_reads_stdin(run, project, monkeypatch, capsysbinary):  # noqa: F811
    texts = ["card charged twice", "parcel late, again"]
    expected = run.predict(texts)
    for content in (
        "\n".join(texts),
        "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)),
        "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts),
    ):
        words = [str(run.folder), "-", *CACHE]
        code, table, _ = predict_stdin(content.encode(), monkeypatch, capsysbinary, *words)
        assert code == 0 and [row["label"] for row in table] == expected.labels, content
        assert {row["file"] for row in table} == {"stdin"}
    assert expected.to_frame()["label"].tolist() == expected.labels
    words = [str(run.folder), "-", "out.csv", *CACHE]
    code, _, err = predict_stdin(b"late parcel\n\nrefund\n", monkeypatch, capsysbinary, *words)
    assert code == 65 and "stdin:2: the text is empty" in err
    code, table, err = predict_stdin(
        b"late parcel\n\nrefund\n", monkeypatch, capsysbinary, *words[:2], "data.on_bad_row=skip", *CACHE
    )
    assert code == 0 and len(table) == 2 and "1 malformed row was skipped (the first: stdin:2" in err
    assert main(["predict", str(run.folder), "a.csv"]) == 78


def test_what_a_run_shows_becomes_a_frame(run):  # noqa: F811
    history = run.history.to_frame()
    assert history["epoch"].tolist() == [1, 2, 3, 4] and history["accuracy"].iloc[-1] <= 1
    classes = run.classes().to_frame()
    assert classes["class"].tolist() == run.labels
    assert classes["support"].sum() == sum(map(sum, run.metrics["confusion"]))
    mistakes = run.mistakes().to_frame()
    assert len(mistakes) == len(run.mistakes())
