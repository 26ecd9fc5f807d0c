"What a bundle takes along, what it leaves here, and what is not taken for one"

import io
import json
import subprocess
import tarfile

import pytest

from gpuml.base.errors import DataError, Exit, NotebookError
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.jobs.bundle import pack, put, unpack


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def made(tmp_path, monkeypatch):
    "A git repository with a project in it, whose notebook is two folders deep; packs with these files added"
    top = tmp_path / "repository"
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "config = 'dev'"}
    notebook = {"cells": [cell | {"outputs": [], "execution_count": None}], "metadata": {}, "nbformat": 4}
    write(
        top,
        {
            "ml/config/dev.yaml": "data:\n  train: data\n",
            "ml/nbs/n.ipynb": json.dumps(notebook | {"nbformat_minor": 5}),
        },
    )
    subprocess.run(["git", "init", "-q", top], check=True)
    monkeypatch.chdir(top / "ml")

    def make(files=None, *imports, **options):
        write(top, files or {})
        return pack(load("dev"), top / "ml" / "nbs" / "n.ipynb", imports, **options)

    make.top = top
    return make


def code(packed):
    "The files beside notebook, config and what is said about them"
    return sorted(set(packed.files) - {"ml/nbs/n.ipynb", "ml/config/dev.yaml", "bundle.json"})


TAKEN = {
    "beside the notebook": ({"ml/nbs/a.py": ""}, ["a"], ["ml/nbs/a.py"]),
    "in the project": ({"ml/a.py": ""}, ["a"], ["ml/a.py"]),
    "at the repository's top, in src": ({"src/a/__init__.py": "", "src/a/b.py": ""}, ["a"], ["src/a/__init__.py", "src/a/b.py"]),
    "the nearest of two": ({"ml/nbs/a.py": "", "a.py": ""}, ["a"], ["ml/nbs/a.py"]),
    "what modules import": ({"ml/a.py": "import b", "b.py": "from c.d import e", "c/d.py": "e = 1"}, ["a"], ["b.py", "c/d.py", "ml/a.py"]),
    "in a circle": ({"ml/a.py": "import b", "ml/b.py": "import a"}, ["a"], ["ml/a.py", "ml/b.py"]),
    "imported in a function": ({"ml/a.py": "def f():\n import b", "ml/b.py": ""}, ["a"], ["ml/a.py", "ml/b.py"]),
    "a package whole, its data too": ({"a/__init__.py": "", "a/deep/words.txt": "x"}, ["a"], ["a/__init__.py", "a/deep/words.txt"]),
    "not valid Python": ({"ml/a.py": "import b\n("}, ["a"], ["ml/a.py"]),
    "not UTF-8 by name": ({"ml/ä.py": "b = 1"}, ["ä"], ["ml/ä.py"]),
    "what is not imported": ({"ml/a.py": "", "ml/other.py": ""}, ["a"], ["ml/a.py"]),
    "what is installed": ({"numpy.py": "", "json.py": ""}, ["numpy", "json"], []),
    "gpuml itself": ({"gpuml/__init__.py": ""}, ["gpuml"], []),
    "folders of data": ({"data/a.csv": "text"}, ["data"], []),
    "hidden files and keys": (
        {f"a/{n}": "" for n in ("__init__.py", ".env", "x.pem", "id_rsa", "kubeconfig.yaml", "my-credentials.json", "outputs/m.bin")},
        ["a"], ["a/__init__.py"]),
    "what git ignores": (
        {"a/__init__.py": "", "a/big.bin": "", "a/keep.bin": "", "a/tmp/x.py": "", ".gitignore": "*.bin\n!keep.bin\n", "a/.gitignore": "tmp/"},
        ["a"], ["a/__init__.py", "a/keep.bin"]),
    "an ignored module": ({"a.py": "", ".gitignore": "a.py"}, ["a"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case, made):
    files, imports, wanted = TAKEN[case]
    assert code(made(files, *imports)) == wanted


def test_links_that_lead_out_are_left_here(made, tmp_path):
    write(tmp_path, {"private/key.txt": "of somebody", "private/code.py": ""})
    write(made.top, {"a/__init__.py": "", "a/words.txt": "x"})
    (made.top / "a" / "key.txt").symlink_to(tmp_path / "private" / "key.txt")
    (made.top / "a" / "folder").symlink_to(tmp_path / "private")
    (made.top / "a" / "same.txt").symlink_to("words.txt")
    (made.top / "b.py").symlink_to(tmp_path / "private" / "code.py")
    assert code(made({}, "a", "b")) == ["a/__init__.py", "a/same.txt", "a/words.txt"]


def test_its_name_is_what_it_contains(made):
    first = made({"a.py": "x = 1"}, "a")
    notebook = made.top / "ml" / "nbs" / "n.ipynb"
    tree = json.loads(notebook.read_text())
    tree["cells"][0] |= {
        "execution_count": 7,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": "hello"}],
    }
    notebook.write_text(json.dumps(tree))
    assert made({}, "a") == first and b"hello" not in made({}, "a").archive
    assert made({"a.py": "x = 2"}, "a").name != first.name
    assert made({"a.py": "x = 1"}, "a").name == first.name
    assert made({"ml/config/dev.yaml": "data:\n  train: other\n"}, "a").name != first.name


CELL = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "config = 'dev'\n1"}
NOTEBOOK = {
    "cells": [CELL | {"outputs": [], "execution_count": None}],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}
HELLO = {"output_type": "stream", "name": "stdout", "text": "hello"}
# (of the notebook, of its cell, how the JSON is written)
SAME_CODE = {
    "executed": ({}, {"outputs": [HELLO], "execution_count": 7}, {}),
    "state of widgets": ({"metadata": {"widgets": {"application/x": {"state": {"a": {"value": "hello"}}}}}}, {}, {}),
    "another Python": ({"metadata": {"language_info": {"name": "python", "version": "3.13.1"}}}, {}, {}),
    "another kernel's name": ({"metadata": {"kernelspec": {"name": "hello", "display_name": "hello"}}}, {}, {}),
    "other metadata": ({"metadata": {"papermill": {"duration": 3}, "toc": {}, "authors": [{"name": "hello"}]}}, {}, {}),
    "another id": ({}, {"id": "hello"}, {}),
    "no id": ({"nbformat_minor": 4}, {"id": None}, {}),
    "folded, scrolled, run at": ({}, {"metadata": {"tags": ["parameters"], "collapsed": True, "execution": {"t": 1}}}, {}),
    "lines as a list": ({}, {"source": ["config = 'dev'\n", "1"]}, {}),
    "JSON on one line": ({}, {}, {"separators": (",", ":")}),
    "JSON with sorted keys": ({}, {}, {"sort_keys": True, "indent": 4}),
}  # fmt: skip


def test_its_name_is_what_runs(made):
    "Whoever executed and saved the notebook, with whatever program: the bundle is the same, byte for byte"
    file = made.top / "ml" / "nbs" / "n.ipynb"
    file.write_text(json.dumps(NOTEBOOK))
    first = made()
    for case, (top, cell, written) in SAME_CODE.items():
        whole = {k: v for k, v in (NOTEBOOK["cells"][0] | cell).items() if v is not None or k != "id"}
        file.write_text(json.dumps(NOTEBOOK | {"cells": [whole]} | top, **written))
        again = made()
        assert (again.name, again.archive) == (first.name, first.archive), case
    for other in ({"source": "config = 'dev'\n2"}, {"metadata": {"tags": []}}, {"cell_type": "markdown"}):
        file.write_text(json.dumps(NOTEBOOK | {"cells": [NOTEBOOK["cells"][0] | other]}))
        assert made().name != first.name, other


def test_secrets_stay_here(made, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "tok-1234567890")
    with pytest.raises(
        NotebookError, match=r"^a.py: the value of MY_TOKEN stands in it; secrets belong in the environ"
    ):
        made({"a.py": "token = 'tok-1234567890'"}, "a")


def test_what_is_too_large(made):
    with pytest.raises(NotebookError, match="a/big.txt: 0 MB are too much for a bundle; put it into storage"):
        made({"a/__init__.py": "", "a/big.txt": "x" * 1001}, "a", limit=1000)
    with pytest.raises(NotebookError, match="the bundle has .* MB, .* are the limit; the largest: .*a/big.txt"):
        made({"a/big.txt": "x" * 990}, "a", limit=1000)


def test_notebooks_that_are_none(made, tmp_path):
    config = load("dev")
    for text, said in (
        (None, "no such notebook"),
        ("{", "not a notebook"),
        ("[]", "not a notebook"),
        ('{"cells": [1]}', "not a notebook"),
    ):
        file = made.top / "ml" / "other.ipynb"
        if text:
            file.write_text(text)
        with pytest.raises(NotebookError, match=said):
            pack(config, file)
    write(tmp_path, {"n.ipynb": "{}"})
    with pytest.raises(NotebookError, match="lies outside the project"):
        pack(config, tmp_path / "n.ipynb")


def test_stored_once_and_unpacked(made, tmp_path, s3):
    packed = made({"a.py": "x = 1"}, "a")
    for output in (str(tmp_path / "out"), s3.url("out")):
        address = put(packed, output, Storage())
        before = Storage().info(address)
        assert put(packed, output, Storage()) == address and Storage().info(address) == before
        folder = tmp_path / f"unpacked-{len(output)}"
        about = unpack(address, folder)
        assert (about["notebook"], about["config"], about["root"]) == ("ml/nbs/n.ipynb", "dev", "ml")
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(packed.files)
        assert (folder / "a.py").read_text() == "x = 1"


def archive(**files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_what_is_not_a_bundle(made, tmp_path):
    whole = made().archive
    cases = [b"", b"hello", whole[: len(whole) // 2], archive(**{"a.py": b""}), archive(**{"bundle.json": b"{"})]
    cases += [
        archive(**{"../evil.py": b"", "bundle.json": b'{"format": 1}'}),
        archive(**{"/tmp/evil": b"", "bundle.json": b"[]"}),
    ]
    for i, raw in enumerate(cases):
        (tmp_path / "x.tar.gz").write_bytes(raw)
        with pytest.raises(DataError, match="x.tar.gz: not a bundle") as refused:
            unpack(str(tmp_path / "x.tar.gz"), tmp_path / f"unpacked-{i}")
        assert refused.value.exit_code == Exit.NOT_FOUND
    assert not (tmp_path / "evil.py").exists()
    (tmp_path / "x.tar.gz").write_bytes(archive(**{"bundle.json": b'{"format": 2}'}))
    with pytest.raises(DataError, match=r"of another version of gpuml \(format 2\)"):
        unpack(str(tmp_path / "x.tar.gz"), tmp_path / "unpacked")
    with pytest.raises(DataError, match="no such bundle"):
        unpack(str(tmp_path / "none.tar.gz"), tmp_path / "unpacked")


REACHING_OUT = [
    ("../outside", tarfile.REGTYPE),
    ("/tmp/outside", tarfile.REGTYPE),
    ("a", tarfile.SYMTYPE),
    ("a", tarfile.LNKTYPE),
]


@pytest.mark.parametrize("name, kind", REACHING_OUT)
def test_only_files_inside_are_unpacked(name, kind, tmp_path):
    "Whoever can write to the storage may have put another archive there"
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(member)
    with pytest.raises(DataError, match=f"{name} is not a file inside it") as refused:
        unpack(str(tmp_path / "x.tar.gz"), tmp_path / "out")
    assert refused.value.exit_code == Exit.NOT_FOUND and not (tmp_path / "out" / "a").exists()
