"The text of a notebook's own code: the same in every process, and what the notebook means by it"

import subprocess
import sys

import numpy as np

from gpuml.training.own_scores import own_scores
from gpuml.training.recipe import recipe_of
from tests.own_code import cell

SETS = """\
STOP = {"alpha", "beta", "gamma", "delta"}
NESTED = [{"of": {("a",), ("b",), ("c",)}}, set(), ()]


def scores(labels, probabilities):
    return {"words": len(STOP) + len(NESTED)}
"""
BUILTIN = """\
from numpy import abs, sum


def scores(labels, probabilities):
    return {"sum": sum(abs(probabilities))}
"""


def test_sets_are_written_alike_in_every_process():
    "Strings hash otherwise in each process: an attempt that goes on would find its own code changed"
    program = "from tests.test_recipe import *; print(recipe_of(metrics=cell(SETS)['scores']).content())"
    texts = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)} for seed in "123")
    }
    assert len(texts) == 1
    space = {}
    exec(texts.pop(), space)
    assert space["NESTED"] == [{"of": {("a",), ("b",), ("c",)}}, set(), ()] and len(space["STOP"]) == 4


def test_a_builtin_that_the_notebook_replaced_is_the_notebooks():
    made = cell(BUILTIN)
    recipe = recipe_of(metrics=made["scores"])
    assert own_scores(recipe, np.full((3, 2), 0.5), np.zeros(3, int), ["a", "b"]) == {"sum": 3.0}
    assert "print" not in recipe.text and "float" not in recipe.text
