"The shipped notebook, and a panel at its end, executed as papermill and nbconvert execute it: there is no browser"

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import CONFIG, ROOT, free_port, rows


@dataclass(frozen=True)
class Executed:
    "A notebook that a program has executed"

    file: Path
    errors: str  # what the program wrote there

    @property
    def outputs(self) -> list[list[dict]]:
        "Of each cell"
        return [cell.get("outputs", []) for cell in json.loads(self.file.read_text())["cells"]]


def execute(home: Path, program: str, *arguments: str) -> Executed:
    "Run a program in the notebook's folder"
    done = subprocess.run(
        [f"{sys.prefix}/bin/{program}", *arguments], cwd=home / "nbs", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Executed(home / "nbs" / "out.ipynb", done.stderr)


def project_in(home: Path, tiny: Path, mlflow_template: Path) -> Path:
    "A small project with two configs and the notebook"
    for folder in ("config", "data", "nbs"):
        (home / folder).mkdir()
    text = CONFIG.format(cache=home / "cache", model=tiny, port=free_port())
    (home / "config" / "dev.yaml").write_text(text)
    other = text.replace("epochs: 2", "epochs: 1").replace("output: outputs", "output: elsewhere")
    (home / "config" / "other.yaml").write_text(other)
    (home / "data" / "a.csv").write_text("text,label\n" + "".join(f"{words},{label}\n" for words, label in rows()))
    shutil.copy(mlflow_template, home / "mlflow.db")
    notebook = json.loads((ROOT / "nbs" / "train.ipynb").read_text())
    notebook["cells"].append(
        {"cell_type": "code", "id": "panel", "metadata": {}, "outputs": [], "execution_count": None, "source": "%gpuml"}
    )
    (home / "nbs" / "train.ipynb").write_text(json.dumps(notebook))
    return home


@pytest.fixture(scope="module")
def by_papermill(tmp_path_factory, tiny, mlflow_template):
    home = project_in(tmp_path_factory.mktemp("papermill"), tiny, mlflow_template)
    return execute(home, "papermill", "train.ipynb", "out.ipynb", "-p", "config", "other")


@pytest.fixture(scope="module")
def by_nbconvert(tmp_path_factory, tiny, mlflow_template):
    home = project_in(tmp_path_factory.mktemp("nbconvert"), tiny, mlflow_template)
    return execute(
        home, "jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "out.ipynb", "train.ipynb"
    )


@pytest.fixture(params=["papermill", "nbconvert"])
def executed(request):
    return request.getfixturevalue(f"by_{request.param}")


def test_papermill_passes_the_config(by_papermill):
    "The parameters cell decides which config trains"
    text, home = json.dumps(by_papermill.outputs), by_papermill.file.parent.parent
    assert "other-" in text and "macro-F1" in text and "confusion matrix" in text and "loss curve" in text
    assert (home / "elsewhere").is_dir() and not (home / "outputs").exists()


def test_it_is_executed_without_a_widget(executed):
    outputs = executed.outputs
    assert not [output for cell in outputs for output in cell if output["output_type"] == "error"]
    assert "widget" not in executed.errors.lower()
    text = json.dumps(outputs[:-1])
    assert "confusion matrix" in text and "widget" not in text and "text/html" in text and "text/plain" in text
    assert "application/vnd.jupyter.widget-view" not in text


def test_the_panel_is_there_as_it_stands(executed):
    "In HTML and in text"
    static = executed.outputs[-1][0]["data"]
    assert "run = %gpu_train dev" in "".join(static["text/html"])
    assert "run = %gpu_train dev" in "".join(static["text/plain"])


def test_it_is_shown_as_a_page(by_nbconvert):
    shown = execute(by_nbconvert.file.parent.parent, "jupyter", "nbconvert", "--to", "html", "out.ipynb")
    assert "widget" not in shown.errors.lower(), shown.errors
    assert "run = %gpu_train dev" in by_nbconvert.file.with_suffix(".html").read_text()
