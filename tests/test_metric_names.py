"Which scores a notebook's function computes is read from its text, never run; where it can't be known, nothing is said"

import json

import pytest

from gpuml.base.errors import ConfigError
from gpuml.base.loading import load
from gpuml.jobs.metric_names import check_read_metric, names_in
from gpuml.ui.own_metric import check_own_metric
from tests.conftest import gpuml

TRAINS = "run = %gpu_train --metrics costs"


def put(project, *sources):
    "A notebook of these cells, behind the one with its parameters"
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [cell | {"source": text, "id": f"c{number}"} for number, text in enumerate(sources)]
    first = cell | {"source": 'config = "dev"', "id": "first", "metadata": {"tags": ["parameters"]}}
    path = project / "nbs/train.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cells": [first, *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


KNOWN = {
    "a dict": ("return {'cost': 1.0, 'gain': raise_(2)}", {"cost", "gain"}),
    "by keywords": ("return dict(cost=1.0)", {"cost"}),
    "two ways out": ("if labels.any():\n    return {'cost': 1.0}\nreturn {'gain': 1.0}", {"cost", "gain"}),
    "a name": ("scores = {'cost': 1.0}\nscores['gain'] = scores['cost'] / 2\nreturn scores", {"cost", "gain"}),
    "joined": ("return {'cost': 1.0} | dict(gain=2.0)", {"cost", "gain"}),
    "an inner function": ("def inner():\n    return {'inner': 1}\nreturn {'cost': inner()['inner']}", {"cost"}),
    "a note": ("scores: dict[str, float] = {'cost': 1.0}\nreturn scores", {"cost"}),
}
UNKNOWN = {
    "a loop": "return {f'cost_{c}': 1.0 for c in range(3)}",
    "another function": "return other(labels)",
    "unpacked": "return {'cost': 1.0, **other(labels)}",
    "a key that is computed": "scores = {}\nscores[name] = 1.0\nreturn scores",
    "filled elsewhere": "scores = {'cost': 1.0}\nfill(scores)\nreturn scores",
    "updated": "scores = {'cost': 1.0}\nscores.update(other())\nreturn scores",
    "enlarged": "scores = {'cost': 1.0}\nscores |= other()\nreturn scores",
    "by another name": "scores = {'cost': 1.0}\nothers = scores\nothers['gain'] = 1.0\nreturn scores",
    "another dict": "from builtins import dict\nreturn dict(cost=1.0)",
    "in an inner function": "scores = {'cost': 1.0}\ndef fill():\n    scores[name] = 2\nfill()\nreturn scores",
    "a parameter": "return classes",
    "a parameter that is filled": "classes['cost'] = 1.0\nreturn classes",
    "a global": "global scores\nscores = {'cost': 1.0}\nother()\nreturn scores",
    "nothing": "pass",
    "a generator": "yield {'cost': 1.0}",
    "a choice": "return {'cost': 1.0} if labels.any() else other()",
    "deleted": "scores = {'cost': 1.0}\ndel scores['cost']\nreturn scores",
}


def function(body, head="def costs(labels, probabilities, classes=()):"):
    return "\n    ".join([head, *body.splitlines()])


@pytest.mark.parametrize("kind", KNOWN)
def test_what_can_be_known(project, kind):
    body, names = KNOWN[kind]
    path = put(project, "raise_ = float", function(body), TRAINS)
    assert names_in(path) == ("costs", names)
    for metric in names:
        check_read_metric(load("dev", [f"train.best_metric=-{metric}"]), path)
    with pytest.raises(ConfigError, match="metric: costs: no such score; there are .*, and costs has .*cost"):
        check_read_metric(load("dev", ["train.best_metric=costs"]), path)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_can_not_be_known(project, kind):
    path = put(project, function(UNKNOWN[kind]), TRAINS)
    assert names_in(path) is None
    check_read_metric(load("dev", ["train.best_metric=-costs"]), path)


GOOD = function("return {'cost': 1.0}")
ELSEWHERE = {
    "not defined": [TRAINS],
    "imported": ["from own import costs", TRAINS],
    "defined twice": [GOOD, GOOD, TRAINS],
    "another by a condition": [GOOD, "if True:\n    costs = print", TRAINS],
    "all of a module": [GOOD, "from own import *", TRAINS],
    "another notebook's": [GOOD, "%run own.py", TRAINS],
    "behind a decorator": ["@wrapped\n" + GOOD, TRAINS],
    "in a class": ["class A:\n    " + GOOD.replace("\n", "\n    "), TRAINS],
    "two trainings": [GOOD, TRAINS, TRAINS],
    "no training": [GOOD],
    "a name that is filled in": [GOOD, "%gpu_train --metrics $which"],
    "a score of the line": [GOOD, f"{TRAINS} train.best_metric=-other"],
    "no Python": [GOOD, TRAINS, "def ("],
    "dynamic": [GOOD, "globals()['costs'] = print", TRAINS],
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_where_it_is_not_known_which_function_it_is(project, kind):
    path = put(project, *ELSEWHERE[kind])
    check_read_metric(load("dev", ["train.best_metric=-costs"]), path)
    assert check_own_metric([load("dev", ["train.best_metric=-costs"])], path, {}) == ""


def test_a_line_without_a_function(project):
    path = put(project, "run = %gpu_train")
    with pytest.raises(ConfigError, match="no such score; .*, and other ones are computed by a function of yours"):
        check_read_metric(load("dev", ["train.best_metric=-cost"]), path)


def test_nothing_of_the_notebook_is_run(project):
    path = put(project, f"open({str(project / 'ran')!r}, 'w')\n{GOOD}", TRAINS)
    with pytest.raises(ConfigError):
        check_read_metric(load("dev", ["train.best_metric=-costs"]), path)
    assert not (project / "ran").exists()


@pytest.mark.parametrize("command", [["submit", "--dry-run", "--local"], ["submit", "--local"], ["plan"]])
def test_the_commands_refuse_it(project, command):
    put(project, GOOD, TRAINS)
    ended = gpuml(*command, "dev", "train.best_metric=-costs", cwd=project)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 78 and "train.best_metric: -costs: no such score; there are" in printed
    assert "and costs has cost; did you mean 'cost'" in printed
    assert "Traceback" not in ended.stderr and not list(project.glob("outputs/dev-*"))


def test_a_plan_looks_at_the_notebook_that_is_named(project):
    put(project, GOOD, TRAINS).rename(project / "other.ipynb")
    words = ["plan", "dev", "train.best_metric=-costs"]
    assert gpuml(*words, cwd=project).returncode != 78  # there is no nbs/train.ipynb
    assert gpuml(*words, "--notebook", "other.ipynb", cwd=project).returncode == 78
    assert gpuml(*words, "--notebook", "none.ipynb", cwd=project).returncode == 78
