"What Tab offers, in a shell and in a cell, and what the command says of words that are nearly right"

import os
import subprocess
import sys

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

from gpuml.base.config import Config
from gpuml.base.loading import load
from gpuml.training.run_list import find_row
from gpuml.training.sweep_rows import find_sweep
from gpuml.ui.magics import load as load_magics
from gpuml.ui.run_table import project_runs


def offered_in_shell(line: str, folder) -> set[str]:
    "What bash gets from the command, as argcomplete's function asks it"
    answers = folder / "answers.txt"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answers), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SHELL": "bash"}
    asked |= {"_ARGCOMPLETE_COMP_WORDBREAKS": " \"'><=;|&(:"}
    subprocess.run([sys.executable, "-m", "gpuml"], cwd=folder, env={**os.environ, **asked}, check=True)
    return {word.strip() for word in answers.read_text().split("\n")}


def offered_in_cell(line: str) -> list[str]:
    "What IPython offers behind a line"
    shell = InteractiveShell()
    load_magics(shell)
    with provisionalcompleter():
        return [one.text for one in shell.Completer.completions(line, len(line))]


@pytest.fixture
def two_runs(project, monkeypatch):
    "The folders of two runs"
    monkeypatch.chdir(project)
    for name in ("spring", "autumn"):
        folder = project / "outputs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text((project / "config" / "dev.yaml").read_text())
    return project


def test_a_shell_is_answered(two_runs):
    (two_runs / "data").mkdir(exist_ok=True)
    assert "train" in offered_in_shell("gpuml tr", two_runs)
    assert "data/" in offered_in_shell("gpuml train data.train=da", two_runs)
    assert "cosine" in offered_in_shell("gpuml train dev train.schedule=c", two_runs)
    assert offered_in_shell("gpuml runs sp", two_runs) == {"spring"}
    assert "learning_rate" in offered_in_shell("gpuml runs --sort lear", two_runs)


def test_a_cell_is_offered_nothing_of_python(two_runs):
    (two_runs / "data").mkdir(exist_ok=True)
    assert not {"ArithmeticError", "abs"} & set(offered_in_cell("%gpu_train dev model.name="))
    assert offered_in_cell("%gpu_train dev --on ") == ["cluster", "here"]
    assert "data/" in offered_in_cell("%gpu_train dev data.train=da")
    assert offered_in_cell("%gpu_train dev model.name=nothing-like-it") == ["nothing-like-it"]
    assert "spring" in offered_in_cell("%gpu_train --resume s")
    assert "print" in offered_in_cell("prin")


def test_what_is_nearly_right_is_named(two_runs):
    for command in ("runs", "note"):
        ended = subprocess.run(
            [sys.executable, "-m", "gpuml", command, "sprin"], cwd=two_runs, capture_output=True, text=True
        )
        assert ended.returncode == 66 and "did you mean 'spring'?" in ended.stderr, ended.stderr


def of_production(config: Config) -> Config:
    "A config whose output nobody here has keys for"
    return config.model_copy(update={"output": "s3://models/production"})


def test_outputs_without_keys_are_named_only_where_they_matter(two_runs, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    configs = [load("dev"), of_production(load("dev"))]
    (two_runs / "outputs" / "spring" / "note.txt").write_text("of spring")
    assert "can't be looked through" not in repr(project_runs(configs))
    assert "no keys for S3" in repr(project_runs(configs[1:]))
    with pytest.raises(Exception, match="no such run of this project; s3://.*no keys for S3"):
        find_row("nothing-like-it", configs)
    assert find_sweep("nothing-like-it", configs) is None  # so that a run opens, and is deleted
