"What is given to predict: texts in any form are taken, all else is told what is taken"

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gpuml.base.errors import GpumlError
from gpuml.training.inputs import as_files, as_output, as_texts
from tests.test_predict import CACHE, run, trained, write_csv  # noqa: F401

TWO = ["late parcel", "refund 🙂"]
FRAME = pd.DataFrame({"text": TWO, "label": ["x", "y"]})

TAKEN = {
    "string": ("late parcel", ["late parcel"]),
    "list": (TWO, TWO),
    "tuple": (tuple(TWO), TWO),
    "generator": ((text for text in TWO), TWO),
    "column": (FRAME["text"], TWO),
    "column with another index": (FRAME["text"].set_axis([7, 3]), TWO),
    "array": (np.array(TWO), TWO),
    "array of objects": (np.array(TWO, object), TWO),
    "values of a dict": ({"a": TWO[0], "b": TWO[1]}.values(), TWO),
    "nothing": ([], []),
    "empty text": ([""], [""]),
}

REFUSED = {
    "table": (FRAME, "not a table (DataFrame); pass one of its columns: text, label"),
    "dict": ({"a": "late parcel"}, "not a dict; pass its values: list(….values())"),
    "set": ({"late parcel"}, "not a set, which has no order"),
    "None": (None, "not NoneType"),
    "number": (3, "not int"),
    "truth": (True, "not bool"),
    "float": (np.float64(1.5), "not float64"),
    "bytes": (b"late parcel", "not bytes; decode them first"),
    "path": (Path("a.csv"), "not the name of a file; predict_file reads files"),
    "array of two dimensions": (np.array([TWO]), "not an array of 2 dimensions"),
    "array of none": (np.array("late parcel"), "not an array of 0 dimensions"),
    "nested": ([["late parcel"]], "text 0 is list, not a string"),
    "number among texts": (["late parcel", 3], "text 1 is int, not a string"),
    "bytes among texts": ([b"late parcel"], "text 0 is bytes; decode it first"),
    "missing": (pd.Series(["late parcel", None], dtype=object), "text 1 is missing (None)"),
    "missing number": (["late parcel", float("nan")], "text 1 is missing (nan)"),
    "missing in a column": (pd.Series(["late parcel", None], dtype="string"), "text 1 is missing (<NA>)"),
    "half a character": (["late parcel", "x\ud83d"], r"text 1 has half of a character, '\ud83d', at position 1"),
    "string with half a character": ("\udc80", r"text 0 has half of a character, '\udc80', at position 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_texts_in_any_form(case):
    given, texts = TAKEN[case]
    assert as_texts(given) == texts


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_texts_is_told(case):
    given, message = REFUSED[case]
    with pytest.raises(GpumlError) as e:
        as_texts(given)
    assert message in str(e.value) and str(e.value).startswith("predict") and "\n" not in str(e.value)


def test_names_of_files():
    assert as_files("in/*.csv") == "in/*.csv" and as_files(Path("in") / "a.csv") == os.path.join("in", "a.csv")
    assert as_files((Path("a.csv"), "b.csv")) == ["a.csv", "b.csv"]
    for given, message in [
        (None, "not NoneType"), (3, "not int"), (FRAME, "not DataFrame; predict takes texts"), ([], "this list is empty"),
        ({"a.csv"}, "not set"), (b"a.csv", "not bytes"), ([None], "not NoneType"), (" ", "not ' '"),
    ]:  # fmt: skip
        with pytest.raises(GpumlError, match="predict_file takes the name of a file") as e:
            as_files(given)
        assert message in str(e.value)
    for given in (None, "", b"out.csv"):
        with pytest.raises(GpumlError, match="predict_file writes a CSV file"):
            as_output(given)


def test_predict_takes_them(run, project):  # noqa: F811
    expected = run.predict(TWO)
    for given in (tuple(TWO), (text for text in TWO), FRAME["text"], np.array(TWO)):
        predicted = run.predict(given)
        assert predicted.labels == expected.labels and (predicted.probabilities == expected.probabilities).all()
    assert expected[1:].labels == expected.labels[1:] and list(expected[:1]) == [expected[0]]
    nothing = run.predict([])
    assert (len(nothing), nothing.labels, list(nothing)) == (0, [], []) and "<table>" in nothing._repr_html_()
    with pytest.raises(GpumlError, match="not a table"):
        run.predict(FRAME)
    write_csv("a.csv", TWO)
    assert len(run.predict_file(Path("a.csv"), Path("out.csv"), CACHE)) == 2
