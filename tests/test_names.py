"Projects and texts with names and characters that mean something elsewhere: to an address, a pattern, a table"

import csv

import mlflow

from gpuml.base.loading import load
from gpuml.training.fit import fit
from gpuml.training.mlflow_run import open_client
from gpuml.training.results import load_run
from gpuml.training.store import local_store
from tests.conftest import CONFIG, free_port, gpuml, rows

ODD = 'tickets [old] a?b%20c#d it\'s "f" $HOME {g} :x'


def read_table(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.reader(f, strict=True))


def test_a_project_in_a_folder_whose_name_is_an_address_and_a_pattern(tiny, tmp_path, monkeypatch):
    "sqlalchemy#11234, devenv#2492, datasets#7468, ilastik#2391; pandas#10018: texts with a bare carriage return"
    project = tmp_path / ODD
    for folder in ("config", "data"):
        (project / folder).mkdir(parents=True)
    text = CONFIG.format(cache="cache", model=tiny, port=free_port())
    (project / "config" / "dev.yaml").write_text(text.replace("train: data", "train: data/*.csv"))
    table = "".join(f'"{words}\r again",{label}\n' for words, label in rows())
    (project / "data" / "a.csv").write_bytes(f"text,label\n{table}late\n".encode())
    monkeypatch.chdir(project)

    run = fit(load("dev", ["train.epochs=1", "data.on_bad_row=skip"]))

    assert [p.name for p in tmp_path.iterdir()] == [ODD]
    client = mlflow.MlflowClient(local_store(load("dev")))
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.status == "FINISHED" and (project / "mlflow.db").stat().st_size > 0
    assert {f.path for f in client.list_artifacts(found.info.run_id)} >= {"certificate.json", "metrics.json"}
    assert list((project / "mlruns").rglob("certificate.json"))
    assert load_run(run.id).metrics == run.metrics

    predictions = read_table(run.folder / "predictions.csv")
    assert len(predictions) == 1 + 4 and {len(row) for row in predictions} == {6}
    assert all(row[5].endswith("\r again") for row in predictions[1:])
    run.mistakes()  # reads it back
    assert read_table(run.folder / "skipped.csv")[1][:2] == ["data/a.csv", "50"]  # a bare carriage return ends a line

    (project / "data" / "b\r.csv").write_bytes(b"text\nlate\n")
    assert len(run.predict_file("data/*.csv", "out.csv", ["data.on_bad_row=skip"])) == 25
    table = read_table(project / "out.csv")
    assert len(table) == 26 and table[-1][0] == "data/b\r.csv"


def test_a_store_lies_where_its_project_does(tmp_path):
    "Nothing is left beside it, not even the empty folders that MLflow makes by the text of an address"
    project = tmp_path / "a?b" / "c%20d it's :x"
    (project / "config").mkdir(parents=True)
    (project / "config" / "dev.yaml").write_text(CONFIG.format(cache="cache", model="m", port=1))
    before = set(tmp_path.rglob("*"))
    uri = local_store(load(project / "config" / "dev.yaml"))
    assert [e.name for e in open_client(uri).search_experiments()] == ["Default"]
    assert set(tmp_path.rglob("*")) - before <= {project / "mlflow.db", project / "mlruns"}
    assert (project / "mlflow.db").exists()


def test_the_line_that_init_prints_works_in_a_folder_with_spaces(tmp_path):
    done = gpuml("init", "my project", cwd=tmp_path)
    assert done.returncode == 0 and "cd 'my project' && gpuml train" in done.stdout
