"""Processes that stand still until a test has acted, so that it is never too late, on any machine

`STANDING` is code for a notebook's cell or a `sitecustomize`: a training that stands still in an update. `stand_still` puts
it into a notebook, and `make_calm` has its training take its time. `hold_imports` has a process stand still where it imports a module.
"""

import json
import os
from pathlib import Path

from tests.waiting import until

STANDING = """\
import os, signal, time

def stand_still(file=""):
    "Until a signal has come that this process heeds, or the file is there"
    came = []
    for number in (signal.SIGTERM, signal.SIGINT):
        heed = signal.getsignal(number)
        def note(number, frame, heed=heed):
            came.append(number)
            heed(number, frame)
        if callable(heed):
            signal.signal(number, note)
    while not came and not os.path.exists(file):
        time.sleep(0.01)

def stand_still_in(update, file=""):
    "In the update of this number, counted in this process"
    from torch.optim import optimizer
    begun = []
    def before(*_):
        begun.append(1)
        if len(begun) == update:
            stand_still(file)
    optimizer.register_optimizer_step_pre_hook(before)
"""


def stand_still(notebook: Path, run: str, update: int) -> Path:
    "Have a run's attempts stand still in an update, counted in each, until they are stopped or killed, or the file is there"
    file = notebook.parent / "go on"
    code = f"""{STANDING}
if os.environ["GPUML_RUN"] == {run!r}:
    stand_still_in({update}, {str(file)!r})
"""
    _insert(notebook, "stands", code)
    return file


def make_calm(notebook: Path, seconds: float) -> None:
    "An update of its training takes so long at least, so that who looks on has time on fast machines, too"
    hook = f"optimizer.register_optimizer_step_pre_hook(lambda *_: time.sleep({seconds}));"
    _insert(notebook, "calm", f"import time\nfrom torch.optim import optimizer\n\n{hook}")


def _insert(notebook: Path, name: str, code: str) -> None:
    "Put a cell in front of the one that trains"
    cell = {"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": [], "source": code}
    tree = json.loads(notebook.read_text())
    place = next(i for i, there in enumerate(tree["cells"]) if "%gpu_train" in "".join(there["source"]))
    tree["cells"].insert(place, cell)
    notebook.write_text(json.dumps(tree))


_HOLDING = """\
import os, sys, time

class Hold:
    def find_spec(self, name, path=None, target=None):
        mark = os.environ.get("HOLD_MARK", "")
        if name == os.environ.get("HOLD_AT") and os.environ["HOLD_IN"] in " ".join(sys.orig_argv) and not os.path.exists(mark):
            open(mark, "w").close()
            while not os.path.exists(mark + ".go"):
                time.sleep(0.001)

sys.meta_path.insert(0, Hold())
"""


class Held:
    "The first process whose command line has these words, where it imports a module"

    def __init__(self, mark: Path):
        self.mark = mark

    def wait(self) -> None:
        "Until it is there"
        until(self.mark.exists, pause=0.005)

    def release(self) -> None:
        "It goes on"
        self.mark.with_name(f"{self.mark.name}.go").touch()


def hold_imports(folder: Path, monkeypatch, module: str, words: str = "") -> Held:
    "Processes that are started from now on by a Python of their own"
    folder = folder / f"held-{module}"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HOLDING)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {"PYTHONPATH": os.pathsep.join(path), "HOLD_AT": module, "HOLD_IN": words}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOLD_MARK", str(folder / "mark"))
    return Held(folder / "mark")
