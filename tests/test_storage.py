"""Files on a real S3 server, which a proxy in front of it breaks.

What was read is what had been written, whatever happens on the way; what was written is whole or not there; what can't
be is said in a sentence. Times are scaled by `patience`: 150 seconds for users, a few here.
"""

import asyncio
import csv
import gc
import hashlib
import io
import itertools
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest

from gpuml.base.errors import ConfigError, DataError, Exit, OutputError, Preempted
from gpuml.base.files import as_csv
from gpuml.base.place import is_s3
from gpuml.base.s3_errors import bucket_and_key
from gpuml.base.s3_read import list_objects
from gpuml.base.s3_write import PART, moving
from gpuml.base.storage import Storage
from tests.conftest import ROOT, free_port
from tests.faults import GATEWAY, INTERNAL, SLOW_DOWN, Fault, Proxy, s3_error
from tests.s3 import KEY, READER, READER_SECRET, SECRET, keys_in_environment
from tests.waiting import Passing


@pytest.fixture
def proxy(s3):
    with Proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def quiet(caplog):
    "Requests that nobody waits for any more leave no errors in the log"
    yield
    gc.collect()
    assert [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio" and r.levelname == "ERROR"] == []


@pytest.fixture(scope="module")
def content():
    "Bytes for an object of three parts"
    return random.Random(0).randbytes(2 * PART + 12_345)


def digest(blocks) -> str:
    made = hashlib.sha256()
    for block in blocks:
        made.update(block)
    return made.hexdigest()


def faults_in_turn(*faults):
    "A plan: the faults one after another, then none"
    left = list(faults)
    return lambda request: left.pop(0) if left else None


ODD_NAMES = (
    "tickets [old]",
    "a?b",
    "a*b",
    "a%20b",
    "a#b",
    'it\'s "q"',
    "$HOME",
    "{x}",
    "~x",
    "[",
    "100% ü",
    "a&b=c+d;e,f",
)


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    "Where files are: the same is expected of both"
    if request.param == "local":
        return lambda name: str(tmp_path / "place" / name) if name else str(tmp_path / "place")
    s3 = request.getfixturevalue("s3")
    return lambda name: s3.url(name) if name else s3.prefix


class TestBothPlaces:
    def test_what_is_written_is_read(self, place, content, tmp_path):
        storage = Storage()
        for name, data in {"empty": b"", "small": b"hello", "large": content}.items():
            (tmp_path / name).write_bytes(data)
            storage.put(tmp_path / name, place(name))
            file = storage.info(place(name))
            assert (file.url, file.size) == (place(name), len(data))
            assert storage.read(file) == data and storage.read(file, 2, 4) == data[2:4]
            assert storage.read(file, len(data) + 5) == b"" and storage.read(file, 3, 1) == b""
            assert b"".join(storage.blocks(file, start=3, size=1_000_000)) == data[3:]
            assert storage.get(file, tmp_path / "copy").read_bytes() == data
            storage.put_bytes(data + b"!", place(name))
            assert storage.get(place(name), tmp_path / "copy").read_bytes() == data + b"!"
            assert storage.info(place(name)).version != file.version
        assert {p.name for p in tmp_path.iterdir()} <= {"empty", "small", "large", "copy", "place"}

    def test_a_folder_is_what_lies_directly_in_it(self, place):
        storage = Storage()
        names = ["b.csv", "a.CSV", "c.tsv", "note.txt", ".hidden.csv", "deep/d.csv", "deep/er/e.csv", "b.csv.old"]
        for name in names:
            storage.put_bytes(b"x", place(f"d/{name}"))

        def found(what, *suffixes):
            return [f.url.removeprefix(place("d") + "/") for f in storage.find(place(what), suffixes)]

        assert found("d", ".csv", ".tsv") == found("d/", ".csv", ".tsv") == ["a.CSV", "b.csv", "c.tsv"]
        assert found("d") == ["a.CSV", "b.csv", "b.csv.old", "c.tsv", "note.txt"]
        assert found("d/b.csv", ".tsv") == ["b.csv"]  # a file is what was asked for, whatever its ending
        assert found("d/*.csv") == ["b.csv"] and found("d/[bc].?sv") == ["b.csv", "c.tsv"]
        assert found("d/*/*.csv") == ["deep/d.csv"]
        assert found("d/**/*.csv") == ["b.csv", "deep/d.csv", "deep/er/e.csv"]
        assert found("d/b") == found("d/b.cs") == found("no") == found("d/*.parquet") == []
        assert storage.info(place("d")) is None and storage.info(place("d/b")) is None

    def test_names_that_need_quoting(self, place):
        storage = Storage()
        for name in ("a b.csv", "ü+&%41=?.csv", "[x]*.csv", "a'\"b#.csv"):
            storage.put_bytes(name.encode(), place(f"q/{name}"))
            (file,) = storage.find(place(f"q/{name}"))
            assert storage.read(file) == name.encode() and file == storage.info(place(f"q/{name}"))
        assert len(storage.find(place("q"))) == 4

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_a_folder_by_the_name_of_a_pattern_is_that_folder(self, name, place):
        "datasets#7468, kit#1551: in `tickets [old]` nothing was found"
        storage = Storage()
        for other in ("axb", "tickets o", "a b", name):  # what the name would match as a pattern is another folder
            storage.put_bytes(other.encode(), place(f"n/{other}/x.csv"))
        storage.put_bytes(b"deep", place(f"n/{name}/in/y.csv"))

        def found(files):
            return [f.url.removeprefix(place(f"n/{name}") + "/") for f in files]

        assert found(storage.find(place(f"n/{name}"))) == found(storage.find(place(f"n/{name}/"))) == ["x.csv"]
        assert found(storage.find(place(f"n/{name}/*.csv"))) == found(storage.match(place(f"n/{name}"), "*.csv"))
        assert found(storage.find(place(f"n/{name}/*.csv"))) == ["x.csv"]
        assert found(storage.find(place(f"n/{name}/**/*.csv"))) == ["in/y.csv", "x.csv"]
        assert found(storage.match(place(f"n/{name}"), "*/y.csv")) == ["in/y.csv"]
        assert storage.match(place(f"n/{name}/no"), "*") == storage.match(place("n/[a]*"), "*.csv") == []
        storage.remove(place("n"))

    def test_remove(self, place):
        storage = Storage()
        for name in ("r/a", "r/b/c", "rest", "r2/d"):
            storage.put_bytes(b"x", place(name))
        storage.remove(place("r"))
        assert storage.find(place("r")) == storage.find(place("r/b")) == []
        storage.remove(place("rest"))
        storage.remove(place("rest"))
        assert storage.info(place("rest")) is None and storage.info(place("r2/d"))

    def test_changed_while_it_is_read(self, place, content, tmp_path):
        storage = Storage()
        storage.put_bytes(content, place("a"))
        file = storage.info(place("a"))
        blocks = storage.blocks(file, size=PART, ahead=1)
        assert next(blocks) == content[:PART]
        if is_s3(file.url):
            storage.put_bytes(content[::-1], file.url)  # of the same size
        else:
            with open(file.url, "r+b") as f:  # as a program does that writes into the file
                f.write(content[::-1])
        with pytest.raises(DataError, match="a: has changed since it was listed") as e:
            next(blocks)
        assert e.value.exit_code == Exit.BAD_DATA
        with pytest.raises(DataError, match="has changed"):
            storage.read(file, 5, 10)
        (tmp_path / "copy").write_bytes(b"what was there")
        with pytest.raises(DataError, match="has changed"):
            storage.get(file, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"what was there" and not list(tmp_path.glob(".copy*"))

    def test_replaced_while_it_is_read(self, place, content):
        "All of the listed version, or an error; never a mixture"
        storage = Storage()
        storage.put_bytes(content, place("a"))
        blocks = storage.blocks(storage.info(place("a")), size=PART)
        read = [next(blocks)]
        storage.put_bytes(b"x" + content[1:], place("a"))
        try:
            read.extend(blocks)
            assert digest(read) == digest([content])
        except DataError as e:
            assert "has changed" in str(e)

    def test_gone_or_shorter(self, place):
        storage = Storage()
        storage.put_bytes(b"0123456789", place("a"))
        file = storage.info(place("a"))
        storage.put_bytes(b"01234", place("a"))
        for start in (0, 7):
            with pytest.raises(DataError, match="has changed"):
                storage.read(file, start)
        storage.remove(place("a"))
        with pytest.raises(DataError) as e:
            storage.read(file)
        assert e.value.exit_code == Exit.NOT_FOUND and place("a") in str(e.value)
        with pytest.raises(DataError, match="no such file") as e:
            storage.get(place("a"), "copy")
        assert e.value.exit_code == Exit.NOT_FOUND


def test_every_field_of_a_table_is_read_back(tmp_path):
    "pandas#10018, polars#15349: a bare carriage return ends a row for whoever reads the table"
    fields = [
        "plain",
        "",
        " ",
        "a\rb",
        "\r",
        "a\nb",
        "a\r\nb",
        'say "no"',
        '"',
        "a,b",
        "'q'",
        "\u2028",
        "\x85",
        "é",
        "\t",
        "\\",
    ]
    rows = [["text", "n"], *([field, str(i)] for i, field in enumerate(fields)), *([field] for field in fields)]
    (tmp_path / "a.csv").write_bytes(as_csv(rows))
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as f:
        assert list(csv.reader(f, strict=True)) == rows
    assert as_csv([(1, 0.5, "a")]) == b"1,0.5,a\n"


def test_more_objects_than_a_page(s3):
    storage = Storage()
    names = [s3.url(f"many/{i:02}.csv") for i in range(25)]
    for name in names:
        storage.put_bytes(b"x", name)
    listed = list_objects(storage.s3, s3.url("many"), bucket_and_key(s3.url("many/"))[1], limit=10)
    assert [f.url for f in listed] == names == [f.url for f in storage.find(s3.url("many"))]


# What is refused, and how: (endpoint or fault, key, secret, read: exit code and words, write: exit code and words)
def another_region(status, code):
    fault = s3_error(status, code, "the region 'us-east-1' is wrong; expecting 'eu-west-3'")
    return replace(fault, headers="x-amz-bucket-region: eu-west-3\r\n")


class Nonsense:
    "A server that is not an S3 server: whoever connects gets these bytes"

    def __init__(self, answer: bytes):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint, self.answer = f"http://127.0.0.1:{self.socket.getsockname()[1]}", answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self.answer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()


def http(status, body, kind="text/html"):
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


NOT_S3 = "is not an S3 server; see data.endpoint in the config, or AWS_ENDPOINT_URL"
REGION = "the bucket 'datasets' is in another region; set AWS_DEFAULT_REGION"
REFUSED = {
    "wrong key": ("keys", ("nobody", SECRET), 77, 77, "the server does not know the key in AWS_ACCESS_KEY_ID"),
    "wrong secret": ("keys", (KEY, "not-it-8c1d"), 77, 77, "AWS_SECRET_ACCESS_KEY is not the secret of the key in"),
    "no keys": ("keys", ("", ""), 77, 77, "no keys for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "secret with a line break": ("keys", (KEY, SECRET + "\n"), 77, 77, "AWS_SECRET_ACCESS_KEY has a blank or a line break"),
    "may not": ("fault", s3_error(403, "AccessDenied", "Access Denied"), 77, 77, "is not permitted to {verb} it"),
    "expired": ("fault", s3_error(400, "ExpiredToken", "expired"), 77, 77, "AWS_SESSION_TOKEN has expired"),
    "clock": ("fault", s3_error(403, "RequestTimeTooSkewed"), 66, 73, "this machine's clock is wrong"),
    "no bucket": ("fault", s3_error(404, "NoSuchBucket"), 66, 73, "there is no bucket 'datasets'"),
    "redirect": ("fault", another_region(301, "PermanentRedirect"), 66, 73, REGION),
    "region": ("fault", another_region(400, "AuthorizationHeaderMalformed"), 66, 73, REGION),
    "full": ("fault", s3_error(403, "QuotaExceeded", "the quota of 5 TiB"), 66, 73, "refused to {verb} it: QuotaExceeded: the quota of 5 TiB"),
    "secret in the answer": ("fault", s3_error(400, "Odd", f"{KEY} {SECRET}"), 66, 73, "refused to {verb} it: Odd: *** ***"),
    "braces in the answer": ("fault", s3_error(400, "Odd", "{x} {0}"), 66, 73, "refused to {verb} it: Odd: (x) (0)"),
    "web page": ("bytes", http("200 OK", "<html><body>Welcome<br></body></html>"), 75, 75, "did not answer for 1 s (500); see data.endpoint in the config, or AWS_ENDPOINT_URL"),
    "well-formed page": ("bytes", http("200 OK", "<html><body>Welcome</body></html>"), 66, 73, NOT_S3),
    "nothing": ("bytes", http("200 OK", ""), 66, 73, NOT_S3),
    "JSON": ("bytes", http("200 OK", '{"status": "ok"}', "application/json"), 75, 75, "did not answer for 1 s (500)"),
    "page not found": ("bytes", http("404 Not Found", "<html>nothing here</html>"), 66, 73, NOT_S3),
    "sent to log in": ("bytes", http("302 Found\r\nLocation: /login", ""), 66, 73, NOT_S3),
    "method not known": ("bytes", http("501 Unsupported", "<p>Unsupported method"), 66, 73, NOT_S3),
    "SSH": ("bytes", b"SSH-2.0-OpenSSH_9.2\r\n", 66, 73, NOT_S3),
    "no such host": ("endpoint", "http://no-such-host.invalid:9000", 66, 73, "there is no host of the name in http://no-such-host.invalid:9000"),
    "https where it is http": ("endpoint", "https", 66, 73, "https:// where it speaks http://"),
    "nobody listens": ("endpoint", "free", 75, 75, "did not answer for 1 s (connection refused)"),
    "takes connections only": ("endpoint", "hung", 75, 75, "did not answer for"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name, s3, proxy, monkeypatch, caplog, capfd):
    "One sentence with the file and what to do, at once, and nothing secret in it or in the log"
    kind, what, read_code, write_code, words = REFUSED[name]
    endpoint, opened = s3.endpoint, []
    caplog.set_level(logging.DEBUG)
    if kind == "keys":
        keys_in_environment(monkeypatch, *what)
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            if not os.environ[variable]:
                monkeypatch.delenv(variable)
    elif kind == "fault":
        proxy.plan, endpoint = lambda request: what, proxy.endpoint
    elif kind == "bytes":
        opened.append(Nonsense(what))
        endpoint = opened[0].endpoint
    else:
        hung = socket.create_server(("127.0.0.1", 0))
        opened.append(hung)
        ports = {"free": free_port(), "hung": hung.getsockname()[1]}
        endpoint = f"http://127.0.0.1:{ports[what]}" if what in ports else what
        endpoint = s3.endpoint.replace("http:", "https:") if what == "https" else endpoint
    url, said = s3.url("a.csv"), []
    passing = Passing()
    storage = Storage(endpoint, say=said.append, patience=4, first_patience=1, clock=passing.clock)
    for verb, error, code, act in (
        ("read", DataError, read_code, lambda: storage.find(url)),
        ("write", OutputError, write_code, lambda: storage.put_bytes(b"x", url)),
    ):
        begun = passing.seconds
        with pytest.raises(error) as e:
            act()
        assert passing.seconds - begun < 1.01 and e.value.exit_code == code, e.value
        assert str(e.value).startswith(url) and words.format(verb=verb) in str(e.value)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300
        for text in (str(e.value), *said, caplog.text, *capfd.readouterr()):
            assert not any(secret in text for secret in (SECRET, READER_SECRET, "not-it-8c1d"))
    assert "did not answer" in words or not [text for text in said if "is slow to answer" not in text]
    for thing in opened:
        thing.socket.close() if isinstance(thing, Nonsense) else thing.close()


@pytest.mark.parametrize("endpoint", ["minio:9000", "s3://x", "http://", "http://host/path", "http://me:s3cret@host"])
def test_endpoint_of_another_form(endpoint):
    with pytest.raises(ConfigError, match="must be http://HOST:PORT or https://HOST") as e:
        Storage(endpoint)
    assert "s3cret" not in str(e.value)


def test_a_reader_may_not_write(s3, monkeypatch):
    keys = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    Storage().put_bytes(b"x", s3.url("a"))
    keys_in_environment(monkeypatch, READER, READER_SECRET)
    reader = Storage(s3.endpoint)
    assert reader.read(reader.info(s3.url("a"))) == b"x"
    for refused in (lambda: reader.put_bytes(b"y", s3.url("a")), lambda: reader.remove(s3.url("a"))):
        with pytest.raises(OutputError, match="is not permitted to write it") as e:
            refused()
        assert e.value.exit_code == Exit.NOT_PERMITTED
    keys_in_environment(monkeypatch, *keys)
    assert Storage(s3.endpoint).info(s3.url("a"))


def test_no_suchbucket_and_key(s3):
    with pytest.raises(DataError, match="there is no bucket 'nobody-has-it'"):
        Storage().find("s3://nobody-has-it/data")
    with pytest.raises(OutputError, match="a whole bucket is not removed"):
        Storage().remove("s3://datasets/")


def test_session_tokens_are_not_logged(s3, monkeypatch):
    "botocore logs every header at the level DEBUG"
    code = f"""
        import logging
        logging.basicConfig(level=logging.DEBUG)
        from gpuml.base.storage import Storage
        try: Storage().find("{s3.url("a")}")
        except Exception as e: print(e)
    """
    environment = {**os.environ, "AWS_SESSION_TOKEN": "marked-token-1f9e"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0
    assert not any(secret in done.stdout + done.stderr for secret in ("marked-token-1f9e", SECRET))


PASSING = {
    "slow down": SLOW_DOWN,
    "internal error": INTERNAL,
    "bad gateway": GATEWAY,
    "reset": Fault("reset"),
    "cut": Fault("cut"),
    "lost": Fault("lost"),
    "half": Fault("half"),
    "short": Fault("short"),
    "page of a proxy": Fault("answer", status=404, body="default backend - 404"),
    "login page": Fault("answer", status=200, body="<html><head><title>Sign in</title></head></html>"),
    "login page that is no XML": Fault("answer", status=200, body="<html><br>Sign in</html>"),
    "sent to log in": Fault("answer", status=302, headers="Location: https://login.example.com/\r\n"),
    "nothing": Fault("answer", status=200),
    "hang": Fault("hang", 5),
    "slow": Fault("slow", 0.3),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes(name, s3, proxy, content, tmp_path):
    "Each request of an upload, a listing and a reading is hit once; the bytes are the same"
    fault, hit = PASSING[name], set()

    def once_each(request):
        key = (request.method, request.path)
        return None if key in hit or hit.add(key) else fault

    storage = Storage(proxy.endpoint, patience=3 if name == "hang" else 30, clock=Passing().clock)
    assert storage.find(s3.prefix) == []
    proxy.plan = once_each
    storage.put_bytes(content, s3.url("a"))
    assert digest(storage.blocks(storage.info(s3.url("a")))) == digest([content])
    assert len(proxy.faults) >= 7 and Storage(s3.endpoint).sweep(s3.prefix + "/", older=0) <= 1


def test_a_completion_whose_answer_is_lost(s3, proxy, content):
    "Amazon's S3 then knows nothing of the upload any more; what tells is whether the object is the one"
    storage, asked = Storage(proxy.endpoint, clock=Passing().clock), []

    def plan(request):
        if request.method == "POST" and "uploadId" in request.path:
            asked.append(request)
            return first if len(asked) == 1 else s3_error(404, "NoSuchUpload")

    first, proxy.plan = Fault("lost"), plan
    storage.put_bytes(content, s3.url("a"))
    assert len(asked) == 2 and storage.info(s3.url("a")).size == len(content)
    first = Fault("reset")  # the server has not seen it, and somebody has removed the parts
    asked.clear()
    with pytest.raises(OutputError, match="NoSuchUpload"):
        storage.put_bytes(content[::-1], s3.url("a"))
    assert digest(storage.blocks(storage.info(s3.url("a")))) == digest([content])


def test_200_random_faults_lose_nothing(s3, proxy, content, tmp_path):
    "P9: 0 wrong bytes, 0 lost"
    dice = random.Random(9)
    choices = [*PASSING.values()]
    weights = [1.0 if f.kind not in ("hang", "slow") else 0.1 for f in choices]
    storage, direct = Storage(proxy.endpoint, patience=5, clock=Passing().clock), Storage(s3.endpoint)
    written, wrong = {}, 0
    assert storage.find(s3.prefix) == []
    proxy.plan = lambda request: dice.choices(choices, weights)[0] if dice.random() < 0.45 else None
    while len(proxy.faults) < 200:
        name = s3.url(str(dice.randrange(7)))
        data = content[
            : dice.choice([0, 5, 1_000, 70_000, 300_000, 300_000, 1_000_000, len(content)])
        ] + dice.randbytes(8)
        storage.put_bytes(data, name)
        written[name] = data
        file = direct.info(name)
        wrong += file is None or digest(direct.blocks(file)) != digest([data])
        wrong += storage.info(name) != file or digest(storage.blocks(file, size=3_000_000)) != digest([data])
        wrong += storage.get(file, tmp_path / "copy").read_bytes() != data
    listed = {f.url: f.size for f in storage.find(s3.prefix)}
    assert wrong == 0 and listed == {name: len(data) for name, data in written.items()}
    print("\nfaults:", dict(Counter(f"{f.kind} {f.status if f.kind == 'answer' else ''}" for f in proxy.faults)))


def test_an_outage_is_waited_for(s3, proxy, content):
    "For less than `patience`: nothing is lost, and it is said what is waited for, not too often"
    said, passing = [], Passing()

    def say(text):
        said.append((passing.seconds, text))
        if len(said) == 3:
            proxy.up()

    storage = Storage(proxy.endpoint, say=say, clock=passing.clock)
    storage.put_bytes(content, s3.url("a"))
    proxy.down()
    assert digest(storage.blocks(storage.info(s3.url("a")))) == digest([content])
    form = re.escape(f"S3 at {proxy.endpoint}") + r" does not answer \((.+)\); trying again, \d+ s so far"
    assert "connection refused" in [m[1] for m in (re.fullmatch(form, text) for _, text in said) if m]
    assert len(said) == 3 and all(b - a >= 150 / 12 for (a, _), (b, _) in itertools.pairwise(said)), said
    storage, proxy.rate = Storage(proxy.endpoint), 30e6
    threading.Timer(0.3, proxy.outage, [1]).start()  # in the middle of an upload
    storage.put_bytes(content[::-1], s3.url("b"))
    assert digest(storage.blocks(storage.info(s3.url("b")))) == digest([content[::-1]])


def test_an_outage_in_the_middle_of_reading(s3, proxy, content):
    storage = Storage(proxy.endpoint)
    storage.put_bytes(content, s3.url("a"))
    blocks = storage.blocks(storage.info(s3.url("a")), size=1_000_000)
    read = [next(blocks), next(blocks)]
    proxy.outage(1.5)
    assert digest([*read, *blocks]) == digest([content])


def test_patience_ends(s3, proxy):
    passing = Passing()
    storage = Storage(proxy.endpoint, clock=passing.clock)
    storage.put_bytes(b"x", s3.url("a"))
    for fault, why in ((SLOW_DOWN, "503 SlowDown"), (Fault("half"), "the connection broke"), (GATEWAY, "502")):
        proxy.plan, begun, sent = lambda request, fault=fault: fault, passing.seconds, len(proxy.requests)
        with pytest.raises(DataError) as e:
            storage.find(s3.prefix)
        assert (
            f"{proxy.endpoint} did not answer for 150 s ({why})" in str(e.value)
            and e.value.exit_code == Exit.INTERRUPTED
        )
        assert str(e.value).endswith("run it again when it does")
        assert passing.seconds - begun == pytest.approx(150) and 24 <= len(proxy.requests) - sent <= 60


def test_patience_ends_in_an_upload(s3, proxy, content):
    "The parts that are there are aborted"
    storage, direct = Storage(proxy.endpoint, clock=Passing().clock), Storage(s3.endpoint)
    storage.put_bytes(b"old", s3.url("a"))
    proxy.plan = lambda request: Fault("cut") if "partNumber=2" in request.path else None
    with pytest.raises(OutputError, match="did not answer for 150 s \\(.*connection.*\\)") as e:
        storage.put_bytes(content, s3.url("a"))
    assert e.value.exit_code == Exit.INTERRUPTED
    assert direct.read(direct.info(s3.url("a"))) == b"old" and direct.sweep(s3.prefix + "/", older=0) == 0


def test_a_server_that_comes_late(s3):
    "Nothing answers at first contact: it is said promptly, and waited for a little"
    said, passing = [], Passing()

    def say(text):
        said.append((round(passing.seconds), text))
        proxy.up()

    with Proxy(s3.endpoint) as proxy:
        proxy.down()
        assert Storage(proxy.endpoint, say=say, clock=passing.clock).find(s3.prefix) == []
    assert said == [(0, f"S3 at {proxy.endpoint} does not answer (connection refused); trying again, 0 s so far")]


class Simulated(asyncio.SelectorEventLoop):
    "A loop whose seconds pass at once where nothing else is to do"

    def __init__(self):
        super().__init__()
        self.ahead, select = 0.0, self._selector.select

        def skip(timeout=None):
            self.ahead += timeout or 0.0
            return select(0)

        self._selector.select = skip

    def time(self):
        return self.ahead


@pytest.mark.parametrize(("pause", "is_dead"), [(9.0, False), (60.0, True)])
def test_a_slow_line_is_not_a_dead_one(pause, is_dead):
    "A part of an upload may take as long as it likes, as long as some of it moves; the seconds are simulated"
    body = io.BytesIO(bytes(100))

    async def upload():
        while body.read(10):
            await asyncio.sleep(pause)
        return "sent"

    with asyncio.Runner(loop_factory=Simulated) as runner:
        with pytest.raises(TimeoutError) if is_dead else nullcontext():
            assert runner.run(moving(upload(), body, silence=10.0)) == "sent"
        assert runner.get_loop().time() == pytest.approx(13 if is_dead else 90, abs=1.5)


def test_a_slow_line(s3, proxy, content):
    storage = Storage(proxy.endpoint)
    proxy.rate = 20e6
    storage.put_bytes(content, s3.url("a"))
    assert digest(storage.blocks(storage.info(s3.url("a")))) == digest([content])
    assert Counter(r.method for r in proxy.requests)["PUT"] == 3 and not proxy.faults


def test_a_server_far_away(s3, proxy, content):
    "Blocks are asked for ahead, so that the line is full in spite of its latency: none is sent before four are asked for"
    storage, ahead = Storage(proxy.endpoint), 4
    storage.put_bytes(content, s3.url("a"))
    file, blocks = storage.info(s3.url("a")), math.ceil(len(content) / 2**20)
    asked = itertools.count(1)
    arrived = [0]

    def plan(request):
        if request.method == "GET":
            arrived[0] = number = next(asked)
            wanted = min(math.ceil(number / ahead) * ahead, blocks)
            return Fault("held", until=lambda: arrived[0] >= wanted)

    proxy.plan = plan
    assert digest(storage.blocks(file, size=2**20, ahead=ahead)) == digest([content])
    assert arrived[0] == blocks


@pytest.mark.parametrize("way", ["check", "say", "signal"])
def test_waiting_ends_at_once(way, s3, proxy, content):
    "By a signal, or an exception from what is called while waiting; the parts of an upload are aborted"
    enough, ended = [math.inf], []

    def end(error):
        ended.append(len(proxy.requests))
        raise error

    def check():
        if way == "check" and len(proxy.requests) >= enough[0]:
            end(Preempted("stopped"))

    def say(text):
        if way == "say" and enough[0] < math.inf:  # what is slow before is nothing to end
            end(Preempted("stopped"))

    def refuse(request):
        if way == "signal" and len(proxy.requests) == enough[0]:
            os.kill(os.getpid(), signal.SIGALRM)
        return SLOW_DOWN if request.method in ("PUT", "GET") else None

    patience = 30 if way == "say" else 600  # a word is said after a sixtieth of it
    storage, direct = Storage(proxy.endpoint, say=say, check=check, patience=patience), Storage(s3.endpoint)
    storage.put_bytes(content, s3.url("a"))
    file = storage.info(s3.url("a"))
    proxy.plan = refuse
    before = signal.signal(signal.SIGALRM, lambda *_: end(KeyboardInterrupt()))
    try:
        for act in (lambda: list(storage.blocks(file)), lambda: storage.put_bytes(content, s3.url("b"))):
            enough[0], storage.s3.last_word = len(proxy.requests) + 6, -math.inf
            with pytest.raises(KeyboardInterrupt if way == "signal" else Preempted):
                act()
            assert (
                len(proxy.requests) - ended.pop() <= 5 and not ended
            )  # four under way, and that the upload is aborted
    finally:
        signal.signal(signal.SIGALRM, before)
    assert direct.info(s3.url("b")) is None and direct.sweep(s3.prefix + "/", older=0) == 0


CHILD = """
import os, resource, sys
from gpuml.base.s3_write import PART
from gpuml.base.storage import Storage
storage = Storage()
storage.find(sys.argv[1])
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
"""


def child(code, *arguments, endpoint):
    environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_of_an_upload(s3, proxy, content, tmp_path):
    "The object is not there; `sweep` removes the parts"
    (tmp_path / "a").write_bytes(content)
    proxy.rate = 4e6
    completes = re.compile(r"\?.*uploadId=")  # it does not come to its end, however late it is killed
    proxy.plan = lambda request: Fault("reset") if request.method == "POST" and completes.search(request.path) else None
    process = child("storage.put(sys.argv[2], sys.argv[1])", s3.url("a"), tmp_path / "a", endpoint=proxy.endpoint)
    while proxy.received < len(content) // 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    storage = Storage(s3.endpoint)
    assert storage.info(s3.url("a")) is None and storage.find(s3.prefix) == []
    assert storage.sweep(s3.prefix + "/") == 0  # it may be somebody's that is still at work
    assert storage.sweep(s3.prefix + "/", older=0) == 1 and storage.sweep(s3.prefix + "/", older=0) == 0


def test_memory_is_bounded(s3, content, tmp_path):
    "Of 96 MiB, a few blocks are in memory at once"
    (tmp_path / "a").write_bytes(content * 6)
    code = """
        storage.put(sys.argv[2], sys.argv[1])
        put = peak() - before
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        size = sum(len(block) for block in storage.blocks(storage.info(sys.argv[1])))
        print(size, put, peak() - before)
    """
    process = child(code, s3.url("a"), tmp_path / "a", endpoint=s3.endpoint)
    size, put, blocks = map(float, process.communicate()[0].split())
    print(f"\nmemory for {size / 2**20:.0f} MiB: put {put:.0f} MiB, blocks {blocks:.0f} MiB")
    assert size == 6 * len(content) and put < 80 and blocks < 80
    assert Storage().info(s3.url("a")).version.endswith("-13")


def _read_in_child(storage, file, pipe):
    pipe.send(storage.read(file))


def test_a_fork_connects_anew(s3):
    storage = Storage()
    storage.put_bytes(b"both", s3.url("a"))
    file = storage.info(s3.url("a"))
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(storage, file, there))
    process.start()
    assert here.poll(600) and here.recv() == storage.read(file) == b"both"
    process.join(600)
    assert process.exitcode == 0


def test_what_is_replaced_all_the_time_is_read_whole(place):
    storage, url, stop = Storage(), place("log.txt"), threading.Event()
    assert storage.read_now(url) is None
    storage.put_bytes(b"0" * 10, url)

    def replace():
        for i in itertools.count(1):
            storage.put_bytes(str(i % 10).encode() * (10 + i % 50), url)
            if stop.is_set():
                return

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        read = []
        while len(set(read)) < 20:
            assert writer.is_alive()
            read.append(storage.read_now(url))
    finally:
        stop.set()
        writer.join()
    assert all(len(set(found)) == 1 for found in read)
