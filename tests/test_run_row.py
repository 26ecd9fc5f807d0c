"No file of a run breaks the list of runs, whatever stands in it: what is damaged counts as missing, and is named once"

import json

import pytest

from gpuml.base.files import write_file
from gpuml.base.storage import Storage
from gpuml.training.run_list import read_output, runs_csv, sort_key, sort_rows
from gpuml.ui.run_table import runs_html

ATTEMPT = {"run": "a", "attempt": 1, "exit_code": 0, "reason": "", "cell": None, "started": "2026-01-01T08:00:00+00:00"}
ATTEMPT |= {"finished": "2026-01-01T09:00:00+00:00", "host": "node-7", "namespace": "gpuml-dev", "updates": 3}
ABOUT = {"run": "a", "uri": "http://m", "page": "p", "experiment": "e", "artifacts": None, "tags": {"gpuml.sweep": "s"}}
RECORD = ABOUT | {"params": {"train.seed": "1"}, "status": "KILLED", "process": ["h", 1, 1.0], "mlflow_run": "m"}
SCORES = {"loss": 1.0, "macro_f1": 0.5}
CERTIFICATE = {"finished": "2026-01-01T09:00:00+00:00", "done_updates": 3, "evaluation": SCORES, "test": SCORES}
FILES = {
    "attempts/1.json": ATTEMPT,
    "tracking.json": RECORD,
    "account.json": {"gpus": 1, "spent": {"useful": 3}},
    "certificate.json": CERTIFICATE,
}
GARBAGE = (None, "", "x", [], {}, 0, -1, 1.5, True, 10**400, [1], {"a": "b"}, "9999-99-99", "0001-01-01", float("inf"))
FIELDS = [(name, key) for name, values in FILES.items() for key in values]


def listed(root, files):
    "The list of one run with these files, shown in every way"
    for name, text in files.items():
        write_file(root / "a" / name, text if isinstance(text, str) else json.dumps(text))
    rows = read_output(str(root), Storage())
    assert [row.run for row in rows.rows] == ["a"]
    runs_csv(rows.rows)
    runs_html(rows.rows)
    for column in ("time", "gpu_time", "updates", "loss", "test_macro_f1", "state", "seed"):
        sort_rows(rows.rows * 2, sort_key(column, rows.rows))
    return rows


@pytest.mark.parametrize(("name", "key"), FIELDS)
def test_no_value_of_a_field_breaks_it(tmp_path, name, key):
    for number, value in enumerate(GARBAGE):
        notes = listed(tmp_path / f"{number}", {name: FILES[name] | {key: value}}).notes
        assert len(notes) <= 1 and all(f"/{name} is left out: it is damaged" in note for note in notes)
        notes = listed(tmp_path / f"{number}", FILES | {name: FILES[name] | {key: value}}).notes
        assert len(notes) <= 1 and all(f"/{name} is left out: it is damaged" in note for note in notes)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "[" * 100_000])
def test_no_content_of_a_file_breaks_it(tmp_path, name, text):
    rows = listed(tmp_path, FILES | {name: text})
    assert [note.partition(" is left out: it is damaged")[0] for note in rows.notes] == [f"{tmp_path}/a/{name}"]


def test_what_is_whole_is_not_left_out(tmp_path):
    rows = listed(tmp_path, FILES)
    row = rows.rows[0]
    assert rows.notes == () and (row.sweep, row.updates, row.held, row.gpus, row.state) == ("s", 3, 3, 1, "finished")
    assert (row.config, row.scores, row.test_scores) == ({"train.seed": "1"}, SCORES, SCORES)


@pytest.mark.parametrize("started", ["", None, 5, "at noon"])
def test_an_attempt_without_a_beginning_is_named(tmp_path, started):
    rows = listed(tmp_path, {"attempts/1.json": ATTEMPT | {"started": started}})
    words = f"/attempts/1.json is left out: it is damaged: started is {started!r}, and not a time"
    assert len(rows.notes) == 1 and words in rows.notes[0]
    assert rows.rows[0].time == ""
