"JSON lines, gzip and Parquet, here and from S3: what is read of each is what CSV gives, in every order"

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.data.reading import read
from gpuml.training.fit import fit
from tests.conftest import rows
from tests.test_predict import CACHE, run, trained  # noqa: F401

LABELS = 'data.labels=["billing", "delivery"]'


def content(kind: str) -> bytes:
    "The tests' rows, with a number each, as a file of that kind"
    records = [{"id": i, "text": text, "label": label} for i, (text, label) in enumerate(rows())]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    packed = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), packed, row_group_size=5)
    plain = {"csv": table.getvalue().encode(), "jsonl": lines.encode(), "parquet": packed.getvalue()}
    return gzip.compress(plain[kind.removesuffix(".gz")]) if kind.endswith(".gz") else plain[kind]


KINDS = ["jsonl", "csv.gz", "jsonl.gz", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_from_s3_it_is_what_csv_is(kind, s3, project):
    expected = read(load("dev"))
    Storage(s3.endpoint).put_bytes(content(kind), f"{s3.prefix}/a.{kind}")
    for order in ("global", "windows"):
        data = read(load("dev", [f"data.train={s3.prefix}/a.{kind}", f"data.order={order}"]))
        assert data.fingerprint == expected.fingerprint
        assert data.train.texts() == expected.train.texts() and data.validation.labels == expected.validation.labels


@pytest.mark.parametrize("order", ["early", "windows"])
@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_it_is_trained_on_in_every_order(kind, order, store):
    (store.parent / f"b.{kind}").write_bytes(content(kind))
    files = [fit(load("dev", [f"data.train={file}", f"data.order={order}", LABELS, "train.epochs=1"])).folder / "certificate.json"
             for file in ("data", f"b.{kind}")]  # fmt: skip
    of_csv, packed = (json.loads(file.read_text()) for file in files)
    assert packed["data_fingerprint"] == of_csv["data_fingerprint"]
    assert packed["done_updates"] == of_csv["done_updates"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_carried_through_from_s3(kind, run, s3, project):  # noqa: F811
    Storage(s3.endpoint).put_bytes(content(kind), f"{s3.prefix}/a.{kind}")
    run.predict_file(f"{s3.prefix}/a.{kind}", "out.csv", CACHE, keep=["id"])
    with open("out.csv", newline="", encoding="utf-8") as f:
        assert [row["id"] for row in csv.DictReader(f)] == [str(i) for i in range(24)]
