"`gpuml export`: an ONNX file that answers as the run does, used as its README says, or no folder"

import csv
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from gpuml.base.errors import Exit, ModelError
from gpuml.training import model
from gpuml.training.results import Run
from gpuml.ui.cli import main
from tests.models import folder_of, model_of, tokenizer_of
from tests.test_predict import trained  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs gpuml[onnx]"
)
EXAMPLE = np.array([[0, 5, 6, 2], [0, 7, 2, 1]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])


def run_readme(folder):
    "What the code in the README prints, in a process that has neither gpuml nor torch"
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    alone = "import sys\nsys.modules.update(torch=None, gpuml=None)\n"
    done = subprocess.run([sys.executable, "-c", alone + code], cwd=folder, capture_output=True, text=True, check=True)
    return [line.split(maxsplit=2) for line in done.stdout.splitlines()]


def test_an_export_answers_as_the_run_does(trained, project, capsys):  # noqa: F811
    assert main(["export", str(trained), "made/onnx"]) == Exit.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("made/onnx: model.onnx, ")
    assert float(re.search(r"by (\S+) at most", lines[1])[1]) < 1e-5
    assert re.fullmatch(r"onnxruntime [\d,]+ texts/s, torch [\d,]+ texts/s, with \d+ CPU threads? each", lines[2])
    folder = project / "made" / "onnx"
    assert {"model.onnx", "README.md", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert str(project) not in "".join(path.read_text() for path in folder.glob("*.[jm][sd]*"))
    answers = run_readme(folder)
    expected = Run(trained).predict([text for *_, text in answers])
    assert [label for label, *_ in answers] == expected.labels
    np.testing.assert_allclose([float(p) for _, p, _ in answers], expected.probabilities.max(1), atol=2e-6)


def test_what_differs_or_is_there_is_not_written(trained, project, capsys):  # noqa: F811
    from gpuml.training.onnx_file import export_onnx

    with pytest.raises(ModelError, match="differ from torch's by"):
        export_onnx(Run(trained), project / "onnx", most=-1.0)
    assert not [path for path in project.iterdir() if "onnx" in path.name]
    assert main(["export", str(trained), "data"]) == Exit.NOT_WRITTEN
    assert "data: is there already; name a new folder" in capsys.readouterr().err
    assert list(csv.DictReader(open("data/a.csv")))


@pytest.mark.parametrize("kind", ["gpt2", "modernbert"])
def test_other_architectures_answer_alike(tmp_path, kind):
    from gpuml.training.onnx_file import onnx_answer, torch_answer, write_onnx

    classifier = model_of(kind)
    classifier.config.pad_token_id = 1
    write_onnx(classifier, EXAMPLE, tmp_path / "model.onnx")
    ids = np.random.default_rng(0).integers(5, 90, (3, 12))
    mask = np.arange(12) < np.array([[12], [7], [1]])
    batch = np.where(mask, ids, 1), mask.astype(np.int64)
    np.testing.assert_allclose(
        onnx_answer(tmp_path / "model.onnx", 1)(batch), torch_answer(classifier)(batch), atol=1e-5
    )


@pytest.mark.parametrize(("line", "missing"), [("export x", "folder"), ("serve", "run"), ("evaluate x", "input")])
def test_what_is_missing_is_named_and_nothing_else(line, missing, capsys):
    with pytest.raises(SystemExit):
        main(line.split())
    assert capsys.readouterr().err.endswith(f"are required: {missing}\n")


def test_what_torch_can_not_export_is_said(tmp_path):
    from gpuml.training.onnx_file import write_onnx

    folder = folder_of(tmp_path / "model", model_of("xlnet"), tokenizer_of())
    with pytest.raises(ModelError, match="torch can't export a xlnet model to ONNX: Cannot find"):
        write_onnx(model.load_classifier(folder), EXAMPLE, tmp_path / "model.onnx")
