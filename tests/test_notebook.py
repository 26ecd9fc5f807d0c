"The shipped notebook, executed as papermill and nbconvert execute it"

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def small(project, store):
    "The shipped notebook beside a small project"
    (project / "nbs").mkdir()
    notebook = project / "nbs" / "train.ipynb"
    notebook.write_text((ROOT / "nbs" / "train.ipynb").read_text())
    return notebook


def outputs(path):
    "All outputs of the notebook as one text"
    cells = json.loads(path.read_text())["cells"]
    assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    return json.dumps([c.get("outputs") for c in cells])


def test_papermill_passes_the_config(small):
    "The parameters cell decides which config trains"
    other = small.parent.parent / "config" / "other.yaml"
    other.write_text(
        (other.parent / "dev.yaml")
        .read_text()
        .replace("epochs: 2", "epochs: 1")
        .replace("output: outputs", "output: elsewhere")
    )
    done = subprocess.run(
        [f"{sys.prefix}/bin/papermill", "train.ipynb", "out.ipynb", "-p", "config", "other"],
        cwd=small.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    text = outputs(small.parent / "out.ipynb")
    assert "other-" in text and "macro-F1" in text and "confusion matrix" in text and "loss curve" in text
    assert (small.parent.parent / "elsewhere").is_dir() and not (small.parent.parent / "outputs").exists()


def test_nbconvert_executes_without_a_widget(small):
    done = subprocess.run(
        [f"{sys.prefix}/bin/jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "out.ipynb", "train.ipynb"],
        cwd=small.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    text = outputs(small.parent / "out.ipynb")
    assert "application/vnd.jupyter.widget-view" not in text and "text/html" in text and "text/plain" in text
