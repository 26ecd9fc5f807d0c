"Labels: one order in every process, and whatever a person takes for the same is said"

import itertools

import pytest

from gpuml.base.errors import DataError
from gpuml.data.labels import alike, look_of, natural
from gpuml.data.reading import read
from tests.test_dataset import config_in, write

NUMBERS = ["1", "01", "2", "002", "7", "007"]


def test_the_order_does_not_depend_on_where_it_starts():
    "spaCy#7352, ProtTrans#37: over a set, what ties has another order in each process"
    orders = {tuple(sorted(order, key=natural)) for order in itertools.permutations(NUMBERS)}
    assert orders == {tuple(NUMBERS)}
    long = ["9" * 4400, "1" + "0" * 4400, "0" * 5000]
    assert sorted(["b", *long, "é", "10", "9", "²", "-1", "1.0", ""], key=natural) == [
        *(long[2], "9", "10", long[0], long[1]),
        *("", "-1", "1.0", "b", "²", "é"),
    ]


def test_classes_of_a_file_are_in_order(tmp_path):
    labels = [*NUMBERS, "1" * 4400]
    write(tmp_path, "data/a.csv", [(f"text {i}", labels[-i % len(labels)]) for i in range(70)])
    assert read(config_in(tmp_path)).labels == labels


# spellings, how they differ (empty: in several ways)
ALIKE = {
    "NFC and NFD": (["café", "cafe\u0301"], "Unicode form"),
    "full-width": (["１２", "12"], "Unicode form"),
    "one character for two": (["㎏", "kg"], "Unicode form"),
    "Hangul": (["가", "\u1100\u1161"], "Unicode form"),
    "no-break space": (["credit card", "credit\xa0card"], "white space"),
    "two spaces": (["credit card", "credit  card"], "white space"),
    "narrow and ideographic spaces": (["a b", "a\u202fb", "a\u3000b", "a\u2009b"], "white space"),
    "a tab": (["a b", "a\tb"], "white space"),
    "zero width": (["refund", "re\u200bfund"], "invisible characters"),
    "byte-order mark": (["refund", "\ufeffrefund"], "invisible characters"),
    "soft hyphen": (["refund", "re\xadfund"], "invisible characters"),
    "direction mark": (["refund", "refund\u200e"], "invisible characters"),
    "emoji's form": (["❤", "❤\ufe0f"], "invisible characters"),
    "a number": (["1", "1.0", "01", "1."], "spelling of a number"),
    "a fraction": (["0.5", "0.50", "00.5"], "spelling of a number"),
    "below zero": (["-1", "-1.0"], "spelling of a number"),
    "minus": (["-1", "\u22121"], "dashes"),
    "en dash": (["3-5", "3–5"], "dashes"),
    "quotes kept": (["refund", '"refund"', "'refund'", "“refund”"], "quotes"),
    "blank before the quote": (["refund", '" refund"'], "quotes"),
    "apostrophe inside": (["won't pay", "won’t pay"], "quotes"),
    "Cyrillic": (["account", "\u0430ccount", "\u0430\u0441\u0441ount"], "letters of other alphabets"),
    "Greek": (["A", "Α"], "letters of other alphabets"),
    "case": (["Refund", "refund", "REFUND"], "case"),
    "case, Cyrillic": (["Возврат", "возврат"], "case"),
    "sharp s": (["Straße", "STRASSE"], "case"),
    "underscore": (["credit card", "credit_card", "credit-card"], "hyphens, underscores and blanks"),
    "case and space": (["Credit card", "credit\xa0card"], ""),
    "case and composition": (["Café", "cafe\u0301"], ""),
}
DIFFERENT = [
    "1",
    "-1",
    "10",
    "1.5",
    "1.05",
    "C",
    "C++",
    "C#",
    "a",
    "á",
    "caffe",
    "cafe",
    "so",
    "soso",
    "not",
    "no t",
    "?",
]


def test_spellings_that_look_alike():
    found = {name: alike(spellings) for name, (spellings, _) in ALIKE.items()}
    assert found == {name: [(way, spellings)] for name, (spellings, way) in ALIKE.items()}
    assert alike(DIFFERENT) == [] and len({look_of(label) for label in DIFFERENT}) == len(DIFFERENT)


def test_they_are_counted_and_said(tmp_path):
    labels = {"café": 30, "cafe\u0301": 3, "1": 20, "1.0": 2, "'kept'": 20, "re\u200bfund": 20}
    rows = [(f"text {label} {i}", label) for label, count in labels.items() for i in range(count)]
    write(tmp_path, "data/a.csv", rows)
    write(tmp_path, "v.csv", [("new", "1")])
    assert read(config_in(tmp_path, validation="v.csv")).notes == [
        "labels that differ only in spelling of a number: '1', '1.0' (20 and 2 training rows)",
        "labels that differ only in Unicode form: 'cafe\\u0301', 'caf\\xe9' (3 and 30 training rows)",
        "labels with quotes around them; a blank before a quote in the file keeps it: ''kept''",
        "labels with invisible characters: 're\\u200bfund'",
    ]


def test_many_that_look_alike_are_cut(tmp_path):
    labels = [f"{i}{end}" for i in range(1, 13) for end in ("", ".0")] + [f"{'0' * i}7" for i in range(1, 13)]
    rows = [(f"text {label} {i}", label) for label in labels for i in range(2)]
    write(tmp_path, "data/a.csv", rows)
    write(tmp_path, "v.csv", [("new", "1")])
    notes = read(config_in(tmp_path, validation="v.csv")).notes
    assert len(notes) == 11 and notes[-1] == "2 more groups of labels that look alike"
    assert any(note.endswith("and 2 training rows; and 4 labels like these)") for note in notes)


def test_what_a_message_compares_can_be_told_apart(tmp_path):
    "Two names that look the same in `did you mean` help nobody"
    rows = [(f"text {i}", ["café", "tea"][i % 2]) for i in range(40)]
    write(tmp_path, "data/a.csv", rows)
    write(tmp_path, "v.csv", [("new", "cafe\u0301")])
    cases = {
        "v.csv:2: the label 'cafe\\u0301' occurs only in validation; did you mean 'caf\\xe9'?": {"validation": "v.csv"},
        "data/a.csv:2: the label 'caf\\xe9' is not in data.labels; did you mean 'cafe\\u0301'?": {
            "labels": ["cafe\u0301", "tea"]
        },
    }
    for message, keys in cases.items():
        with pytest.raises(DataError) as refusal:
            read(config_in(tmp_path, **keys))
        assert str(refusal.value).startswith(message)


def test_labels_that_other_readers_take_for_nothing(tmp_path):
    "cellxgene#1115, pandas#32084; fastai#3945: as text, `10` would come before `2`"
    labels = ["0", "2", "10", "N/A", "NA", "None", "nan", "null"]
    write(tmp_path, "data/a.csv", [(f"text {i}", labels[i % 8]) for i in range(80)])
    data = read(config_in(tmp_path))
    assert data.labels == labels and len(data.train) + len(data.validation) == 80
