"""Code of one's own that a notebook needs: what travels, and what is said of what does not.

Each case lays out a small git repository, packs its notebook, and unpacks and follows the bundle as a submission does. Nothing is trained.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpuml.base.errors import GpumlError, NotebookError
from gpuml.base.loading import load
from gpuml.cluster.checks import check_code
from gpuml.cluster.sending import send, submit
from gpuml.cluster.submission import prepare
from gpuml.jobs.bundle import pack
from gpuml.jobs.resolve import lacking


def notebook(*sources):
    cells = [("config = 'dev'", ["parameters"]), *((source, []) for source in sources)]
    made = [
        {"cell_type": "code", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None}
        for source, tags in cells
    ]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def lay_out(top: Path, files: dict, *sources, git=True):
    "A project in a repository of its own, with its notebook in nbs/; a value that is a Path becomes a link there"
    for name, content in (
        files | {"config/dev.yaml": "data:\n  train: data\n", "nbs/n.ipynb": notebook(*sources)}
    ).items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            (top / name).symlink_to(content)
        else:
            (top / name).write_text(content)
    if git:
        subprocess.run(["git", "init", "-q", top], check=True)


def packed(top: Path):
    return pack(load("dev", start=top), top / "nbs" / "n.ipynb")


def code(bundle):
    return sorted(set(bundle.files) - {"nbs/n.ipynb", "config/dev.yaml", "bundle.json"})


def said(bundle, **elsewhere):
    return [f"{'✗' if lack.certain else '?'} {lack}" for lack in lacking(bundle, **elsewhere)]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "A new empty folder for each case, which is the current one"

    def make(number):
        folder = tmp_path / f"case-{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        return folder

    return make


PACKAGE = {"nbs/mine/__init__.py": ""}
# what travels with which cells
TRAVELS = {
    "a folder on sys.path": ({"lib/helpers.py": ""}, ["import sys\nsys.path.append('../lib')\nimport helpers"], ["lib/helpers.py"]),
    "a folder in front": ({"lib/yaml.py": ""}, ["import sys\nsys.path.insert(0, '../lib')\nimport yaml"], ["lib/yaml.py"]),
    "a folder that is put together": (
        {"lib/a/helpers.py": ""},
        ["import os, sys\nfrom pathlib import Path\nROOT = Path.cwd().parent", "sys.path += [str(ROOT / 'lib' / 'a')]", "import helpers"],
        ["lib/a/helpers.py"]),
    "by os.path": ({"lib/helpers.py": ""}, ["import sys, os\nsys.path.append(os.path.abspath(os.path.join('..', 'lib')))\nimport helpers"], ["lib/helpers.py"]),
    "a changed folder": ({"lib/helpers.py": "", "lib/run.py": "import helpers"}, ["%cd ../lib\n%run run.py"], ["lib/helpers.py", "lib/run.py"]),
    "%run": ({"nbs/prep.py": "import clean", "clean.py": ""}, ["%run prep.py"], ["clean.py", "nbs/prep.py"]),
    "%run without .py": ({"nbs/prep.py": ""}, ["%run -i prep --fast"], ["nbs/prep.py"]),
    "%run of a notebook": ({"nbs/prep.ipynb": notebook("import clean"), "clean.py": ""}, ["%run prep.ipynb"], ["clean.py", "nbs/prep.ipynb"]),
    "%run -m": ({"nbs/tools/a.py": ""}, ["%run -m tools.a"], ["nbs/tools/a.py"]),
    "%load_ext": ({"nbs/ours.py": ""}, ["%load_ext ours"], ["nbs/ours.py"]),
    "%aimport": ({"nbs/ours.py": ""}, ["%load_ext autoreload\n%aimport ours"], ["nbs/ours.py"]),
    "%time": ({"nbs/ours.py": ""}, ["%time import ours"], ["nbs/ours.py"]),
    "importlib": ({"nbs/ours.py": ""}, ["import importlib\nm = importlib.import_module('ours')"], ["nbs/ours.py"]),
    "__import__": ({"nbs/ours.py": ""}, ["__import__('ours')"], ["nbs/ours.py"]),
    "runpy": ({"nbs/a.py": "", "nbs/b.py": ""}, ["import runpy\nrunpy.run_path('a.py')\nrunpy.run_module('b')"], ["nbs/a.py", "nbs/b.py"]),
    "exec": ({"nbs/a.py": ""}, ["exec(open('a.py').read())"], ["nbs/a.py"]),
    "!python": ({"nbs/scripts/x.py": "import y", "nbs/scripts/y.py": ""}, ["!python scripts/x.py --all"], ["nbs/scripts/x.py", "nbs/scripts/y.py"]),
    "!cd and python": ({"scripts/x.py": ""}, ["!cd ../scripts && PYTHONUTF8=1 python -u x.py"], ["scripts/x.py"]),
    "!python -m": ({"nbs/tools/a.py": ""}, ["files = !python3 -m tools.a"], ["nbs/tools/a.py"]),
    "%%bash": ({"nbs/x.sh": "python y.py", "nbs/y.py": ""}, ["%%bash\nset -e\nbash x.sh"], ["nbs/x.sh", "nbs/y.py"]),
    "subprocess": ({"nbs/x.py": "", "nbs/y.py": ""}, ["import subprocess, sys\nsubprocess.run([sys.executable, 'x.py'])\nsubprocess.check_call('python y.py', shell=True)"], ["nbs/x.py", "nbs/y.py"]),
    "requirements": ({"nbs/needed.txt": ""}, ["%pip install -r needed.txt"], ["nbs/needed.txt"]),
    "a linked subpackage": (PACKAGE | {"nbs/mine/part": Path("../../shared/part"), "shared/part/a.py": ""}, ["from mine.part import a"], ["nbs/mine/__init__.py", "nbs/mine/part/a.py"]),
    "subpackages named as what is left here": (
        PACKAGE | {"nbs/mine/env/__init__.py": "", "nbs/mine/outputs/write.py": "", "nbs/mine/venv/a.py": ""},
        ["import mine.env, mine.venv.a\nfrom mine.outputs.write import *"],
        ["nbs/mine/__init__.py", "nbs/mine/env/__init__.py", "nbs/mine/outputs/write.py", "nbs/mine/venv/a.py"]),
    ".gitignore that lists what counts": (
        PACKAGE | {"nbs/mine/a.py": "", "nbs/mine/a.bin": "", ".gitignore": "*\n!*/\n!*.py\n!*.ipynb\n"}, ["import mine.a"], ["nbs/mine/__init__.py", "nbs/mine/a.py"]),
    ".gitignore that lists folders": (
        PACKAGE | {"nbs/mine/a.py": "", ".gitignore": "/*\n!/nbs/\n/nbs/*\n!/nbs/mine/\n"}, ["import mine.a"], ["nbs/mine/__init__.py", "nbs/mine/a.py"]),
    "the inner .gitignore decides": (
        PACKAGE | {"nbs/mine/a.gen.py": "", ".gitignore": "*.gen.py", "nbs/mine/.gitignore": "!a.gen.py"}, ["import mine"], ["nbs/mine/__init__.py", "nbs/mine/a.gen.py"]),
    "a folder of data with an installed name": ({"nbs/yaml/a.csv": "", "nbs/yaml/scripts/get.py": ""}, ["import yaml"], []),
    "a text that is no file": ({}, ["print('see prep.py')"], []),
    "a rule for folders is none for links": (
        PACKAGE | {"nbs/mine/part": Path("../../shared/part"), "shared/part/a.py": "", ".gitignore": "/nbs/mine/part/"}, ["from mine.part import a"],
        ["nbs/mine/__init__.py", "nbs/mine/part/a.py"]),
    "data of a package": (
        {"nbs/mine/__init__.py": "from pathlib import Path\nwords = Path(__file__).parent / 'words.txt'", "nbs/mine/words.txt": ""}, ["import mine"],
        ["nbs/mine/__init__.py", "nbs/mine/words.txt"]),
    "a repository inside": ({"nbs/inner/a.py": "", "nbs/inner/.git/HEAD": "ref: refs/heads/main", "nbs/inner/.git/objects/x": "", "nbs/inner/.git/refs/x": ""}, ["import inner.a"], ["nbs/inner/a.py"]),
    "a module that installs": ({}, ["%pip install no-such_module", "import no_such_module"], []),
    "a module that a cell writes": ({}, ["%%writefile made.py\nx = 1", "import made"], []),
    "what is expected to be absent": ({}, ["try:\n    import no_such_module\nexcept ImportError:\n    pass"], []),
    "what only type checkers import": ({}, ["from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no_such_module"], []),
    "what nobody imports may lack": (PACKAGE | {"nbs/mine/plots.py": "import no_such_module"}, ["import mine"], ["nbs/mine/__init__.py", "nbs/mine/plots.py"]),
    "names that a package defines": ({"nbs/mine/__init__.py": "from .a import *\nversion = 1", "nbs/mine/a.py": "b = 1"}, ["from mine import b, version"], ["nbs/mine/__init__.py", "nbs/mine/a.py"]),
    "submodules of what is installed": ({}, ["import os.path, numpy.linalg, xml.etree.ElementTree, __main__\nfrom google.protobuf import message"], []),
    "folders that every machine has": ({}, ["import os\nos.chdir('/tmp')\nos.chdir('/')"], []),
    "what is no code": ({}, ["%%html\n<b>a.py</b>", "!ls; cat a.sh | head", "x = f'{1}' + 'a/b.py'\nexec('import y')"], []),
}  # fmt: skip


@pytest.mark.parametrize("git", [True, False])
def test_what_travels(git, folders):
    wrong = {}
    for number, (case, (files, sources, wanted)) in enumerate(TRAVELS.items()):
        top = folders(number)
        lay_out(top, files, *sources, git=git)
        bundle = packed(top)
        if (code(bundle), said(bundle)) != (wanted, []):
            wrong[case] = code(bundle), said(bundle)
    assert not wrong


KEY = "has a name that files with keys have, and stays here; rename it, if there is no key in it"
# what is said where something stays here: the beginning of each line
STAYS = {
    "ignored by git": (
        {"nbs/gen.py": "", ".gitignore": "gen*"}, ["import gen"],
        ["✗ cell 2, line 1: `import gen`: nbs/gen.py is left out by .gitignore:1: gen*, and stays here; change that rule"]),
    "ignored, and its absence is caught": (
        {"nbs/gen.py": "", ".gitignore": "gen*"}, ["try:\n    import gen\nexcept ImportError:\n    gen = None"],
        ["✗ cell 2, line 2: `import gen`: nbs/gen.py is left out by"]),
    "ignored, and another has its name": (
        {"nbs/yaml.py": "", ".gitignore": "yaml.py"}, ["import yaml"], ["✗ cell 2, line 1: `import yaml`: nbs/yaml.py is left out by"]),
    "a folder is ignored": ({"nbs/gen/a.py": "", ".gitignore": "gen/"}, ["import gen.a"], ["✗ cell 2, line 1: `import gen.a`: nbs/gen is left out by .gitignore:1: gen/"]),
    "an ignored script": ({"nbs/gen.py": "", ".gitignore": "gen*"}, ["%run gen.py"], ["✗ cell 2, line 1: `gen.py`: nbs/gen.py is left out by"]),
    "credentials.py": (
        PACKAGE | {"nbs/mine/credentials.py": ""}, ["import mine.credentials"], [f"✗ cell 2, line 1: `import mine.credentials`: nbs/mine/credentials.py {KEY}"]),
    "credentials.py from inside": (
        {"nbs/mine/__init__.py": "\nfrom . import credentials", "nbs/mine/credentials.py": ""}, ["import mine"],
        [f"✗ nbs/mine/__init__.py, line 2: `from . import credentials`: nbs/mine/credentials.py {KEY}"]),
    "a name of its contents": (
        {"nbs/mine/__init__.py": "from .credentials import key", "nbs/mine/credentials.py": "key = 1"}, ["import mine"],
        [f"✗ nbs/mine/__init__.py, line 1: `from .credentials import key`: nbs/mine/credentials.py {KEY}"]),
    "a link that leads out": (
        PACKAGE | {"nbs/mine/part": Path(os.path.dirname(os.__file__)) / "json"}, ["import mine.part"],
        ["✗ cell 2, line 1: `import mine.part`: nbs/mine/part is a link that leads out of the project: "]),
    "nowhere": ({}, ["import no_such_module"], ["✗ cell 2, line 1: `import no_such_module`: is neither in the project nor installed here; install it, or name it"]),
    "nowhere, of a submodule": (PACKAGE, ["import mine.typo"], ["✗ cell 2, line 1: `import mine.typo`: is neither in the project"]),
    "nowhere, in a function": ({}, ["def f():\n    import no_such_module"], ["? cell 2, line 2: `import no_such_module`: is neither in the project"]),
    "nowhere, and declared": ({"requirements.txt": "no-such-module>=1"}, ["import no_such_module"], ["? cell 2, line 1: `import no_such_module`: is neither"]),
    "nowhere, in a module": ({"nbs/a.py": "\nimport b", "b.py": "from no_such_module.c import d"}, ["import a"], ["✗ b.py, line 1: `from no_such_module.c import d`: is neither"]),
    "no such script": ({}, ["%run prep.py"], ["? cell 2, line 1: `prep.py`: no such file here; in a job, a cell has to make it"]),
    "data of a package that git leaves out": (
        {"nbs/mine/__init__.py": "open(f'{__file__}/../words.pkl')\nname = 'words.pkl'", "nbs/mine/words.pkl": "", ".gitignore": "*.pkl"}, ["import mine"],
        ["? nbs/mine/__init__.py, line 2: `words.pkl`: nbs/mine/words.pkl is left out by .gitignore:1: *.pkl, and stays here"]),
    "data beside the notebook": (
        {"nbs/words.csv": ""}, ["open('words.csv')"],
        ["? cell 2, line 1: `words.csv`: nbs/words.csv is neither code nor data that the config names, and stays here; put it into a package"]),
    "a repeated one is said once": ({}, ["import no_such_module", "import no_such_module"], ["✗ cell 2, line 1: "]),
}  # fmt: skip


def test_what_stays_here_is_said(folders):
    wrong = {}
    for number, (case, (files, sources, wanted)) in enumerate(STAYS.items()):
        top = folders(number)
        lay_out(top, files, *sources)
        lines = said(packed(top))
        if len(lines) != len(wanted) or not all(map(str.startswith, lines, wanted)):
            wrong[case] = lines
    assert not wrong


def test_what_lies_outside_the_project(folders, tmp_path, monkeypatch):
    "It travels with no job; one on this machine finds what is named by an absolute path, and what PYTHONPATH has"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "helpers.py").touch()
    (tmp_path / "other" / "script.py").touch()
    outside = (
        f"`import helpers`: lies outside the project, at {tmp_path}/other/helpers.py, and stays here; copy it into"
    )
    cases = [
        (f"import sys\nsys.path.append('{tmp_path}/other')\nimport helpers", f"✗ cell 2, line 3: {outside}", True),
        ("import sys\nsys.path.append('../../other')\nimport helpers", f"✗ cell 2, line 3: {outside}", False),
        (f"%run {tmp_path}/other/script.py", f"✗ cell 2, line 1: `{tmp_path}/other/script.py`: {tmp_path}/other/script.py is a path of this", True),
        ("%run ../../other/script.py", "✗ cell 2, line 1: `../../other/script.py`: lies outside the project, at ", False),
    ]  # fmt: skip
    for number, (source, wanted, is_here) in enumerate(cases):
        top = folders(number)
        lay_out(top, {}, source)
        (line,) = said(packed(top))
        assert line.startswith(wanted)
        assert (said(packed(top), elsewhere=False) == []) == is_here, source
    monkeypatch.syspath_prepend(tmp_path / "other")
    top = folders("path")
    lay_out(top, {}, "import helpers")
    assert [line[:1] for line in said(packed(top))] == ["?"]  # installed in place: the image may have it too
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    assert said(packed(top))[0].startswith(f"✗ cell 2, line 1: {outside}") and said(packed(top), elsewhere=False) == []


def test_an_absolute_path_into_the_project(folders):
    "The job has no such folder; what it holds is on its path all the same"
    top = folders("absolute")
    lay_out(
        top,
        {"lib/helpers.py": "", "lib/x.py": ""},
        f"import sys\nsys.path.append('{top}/lib')\nimport helpers",
        f"!python {top}/lib/x.py",
    )
    bundle = packed(top)
    assert code(bundle) == ["lib/helpers.py", "lib/x.py"] and bundle.code.folders[-1] == top / "lib"
    assert said(bundle) == [
        f"✗ cell 3, line 1: `{top}/lib/x.py`: lib/x.py is a path of this machine; write it relative to the notebook's folder"
    ]


def test_a_folder_of_this_machine(folders):
    "`os.chdir` to where the project lies here fails on another machine"
    top = folders("chdir")
    lay_out(top, {}, f"import os\nos.chdir(os.path.join('{top.parent}', '{top.name}'))")
    (line,) = said(packed(top))
    assert (
        line.startswith("✗ cell 2, line 2: ") and "is a path of this machine; write it relative to the notebook" in line
    )
    assert said(packed(top), elsewhere=False) == []


def test_code_that_was_just_edited(folders):
    "One process that submits again and again: each bundle has the code as it is, a module that is new included"
    top = folders("edited")
    names = set()
    for text in ("x = 1", "x = 2", "import added"):
        lay_out(
            top, {"nbs/ours.py": text} | ({"nbs/added.py": ""} if "added" in text else {}), "import ours", git=False
        )
        names.add(packed(top).name)
        assert said(packed(top)) == []
    assert len(names) == 3 and code(packed(top)) == ["nbs/added.py", "nbs/ours.py"]


def test_tracked_files_travel_though_they_are_ignored(folders):
    top = folders("tracked")
    lay_out(top, PACKAGE | {"nbs/mine/a.py": "", "nbs/mine/b.py": "", ".gitignore": "*"}, "import mine.a")
    subprocess.run(["git", "-C", top, "add", "-f", "nbs/mine/__init__.py", "nbs/mine/a.py"], check=True)
    assert code(packed(top)) == ["nbs/mine/__init__.py", "nbs/mine/a.py"] and said(packed(top)) == []


def test_files_that_are_none(folders):
    "A link to nothing, a link to itself, a pipe: said, and nothing hangs; a link to a folder around it ends"
    top = folders("odd")
    links = {"nbs/mine/gone.txt": Path("nothing"), "nbs/mine/self": Path("self"), "nbs/mine/around": Path("..")}
    lay_out(top, PACKAGE | links, "import mine")
    os.mkfifo(top / "nbs" / "mine" / "pipe")
    bundle = packed(top)
    (finding,) = check_code(bundle)
    assert code(bundle) == ["nbs/mine/__init__.py"] and finding.good
    for part in (
        "gone.txt is a link to nothing: nothing, and stays here",
        "self is a link to nothing: self",
        "around is a link to a folder that it lies in",
        "pipe is no file but a pipe, a socket or a device",
    ):
        assert f"nbs/mine/{part}" in finding.text
    (top / "nbs" / "broken.py").symlink_to("nothing.py")
    (top / "nbs" / "n.ipynb").write_text(notebook("import broken"))
    assert said(packed(top)) == [
        "✗ cell 2, line 1: `import broken`: nbs/broken.py is a link to nothing: nothing.py, and stays here; remove it, or mend it"
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
def test_what_may_not_be_read(tmp_path):
    "A folder that is closed stays here, and that is said; a file that should travel is refused, and neither is a traceback"
    top = Path(tempfile.mkdtemp())
    try:
        lay_out(top, PACKAGE | {"nbs/mine/shut/a.txt": "", "nbs/mine/closed.py": ""}, "import mine")
        top.chmod(0o755)
        (top / "nbs" / "mine" / "shut").chmod(0)
        os.seteuid(65534)
        (finding,) = check_code(packed(top))
        assert finding.good and "nbs/mine/shut can't be read: Permission denied, and stays here" in finding.text
        os.seteuid(0)
        (top / "nbs" / "mine" / "closed.py").chmod(0)
        os.seteuid(65534)
        with pytest.raises(
            NotebookError, match=r"nbs/mine/closed.py: can't be read: Permission denied; it would have to"
        ):
            packed(top)
    finally:
        os.seteuid(0)
        shutil.rmtree(top)


def test_outputs_of_other_notebooks_stay_here(folders):
    top = folders("other")
    other = json.loads(notebook("x = 1"))
    other["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "hello"}]
    lay_out(top, {"nbs/prep.ipynb": json.dumps(other)}, "%run prep.ipynb")
    first = packed(top)
    (top / "nbs" / "prep.ipynb").write_text(notebook("x = 1"))
    assert packed(top).archive == first.archive and first.notebook == "nbs/n.ipynb"


def test_nothing_is_executed(folders):
    "Neither modules nor scripts nor cells run while they are followed"
    top = folders("executed")
    source = "open('executed', 'w')"
    lay_out(
        top,
        {"nbs/mine/__init__.py": source, "nbs/mine/a.py": source, "nbs/x.py": source},
        "import mine.a\n%run x.py\n" + source,
    )
    before = set(sys.modules)
    assert len(code(packed(top))) == 3 and said(packed(top)) == []
    assert not list(top.rglob("executed")) and "mine" not in set(sys.modules) - before


def test_a_submission_is_refused(project):
    "All that is lacking is said at once, and nothing is sent"
    (project / "nbs").mkdir()
    (project / "nbs" / "n.ipynb").write_text(notebook("import no_such_module, other_such_module", "run = %gpu_train"))
    planned = prepare(load("dev"), project / "nbs" / "n.ipynb", local=True)
    assert [f.text.split("`")[1] for f in planned.findings.bad] == ["import no_such_module", "import other_such_module"]
    assert {f.exit_code for f in planned.findings.bad} == {NotebookError.exit_code}
    with pytest.raises(GpumlError, match="not submitted"):
        send(planned)
    assert not list((project / "outputs").rglob("*.tar.gz"))


def test_what_may_be_lacking_stands_at_the_job(project):
    "What can't be told from here does not stop a submission, and is not lost either"
    (project / "nbs").mkdir()
    sources = "def later():\n    import no_such_module", "%gpu_train"
    (project / "nbs" / "n.ipynb").write_text(notebook(*sources))
    job = submit(load("dev"), project / "nbs" / "n.ipynb", local=True)
    job.cancel()
    assert job.note.startswith("cell 2, line 2: `import no_such_module`: is neither in the project nor installed here")
    assert job.note in repr(job)
