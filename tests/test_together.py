"""Several processes train one model: the same updates as one process, with and without parts of a fixed order"""

import os
import subprocess

import numpy as np
import pytest
import torch

from gpuml.base.errors import Preempted
from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training import attempts
from gpuml.training.fit import fit
from tests.conftest import ROOT
from tests.forked import python
from tests.test_interrupt import result, stop_at
from tests.test_processes import STOPS, fault, pair, real_pair  # noqa: F401  fixtures

CODE = """
import sys
import numpy as np, torch
from torch.distributed import FileStore
from gpuml.base.config import TrainConfig
from gpuml.data.orders import Global
from gpuml.training.feed import Feed
from gpuml.training.learner import Learner
from gpuml.training.loop import updates
from gpuml.training.tune import tune
from gpuml.training.world import world
from tests.test_rows import rows_of
from tests.gpu.learners import distilbert

torch.set_num_threads(1)
place, rank, size, slots, parts, rows, epochs = sys.argv[1:]
rank, size, slots, parts, epochs = int(rank), int(size), int(slots) or None, int(parts), int(epochs)
texts = rows_of(np.random.default_rng(0).integers(4, 60, 64))
with world(rank, size, FileStore(place, size) if size > 1 else None) as processes:
    config = TrainConfig(batch_size=16, learning_rate=1e-3, warmup=0.0, rows=rows, epochs=epochs, slots=slots)
    learner = Learner(config, distilbert(), 0, processes, longest=60)
    if rows == "packed":
        tune(learner, texts)
    learner.parts = parts
    feed = Feed(Global(texts), 16, 42, epochs)
    steps = []
    while feed.epochs_done < epochs:
        steps += updates(learner, feed)
if rank == size - 1:
    weights = [p.detach().numpy().ravel() for p in learner.classifier.parameters()]
    np.savez(place + ".npz", losses=[s.loss for s in steps], weights=np.concatenate(weights))
"""


def train(tmp_path, size, rows="padded", slots=0, parts=8, epochs=25):
    "Losses and weights of 100 updates, as the last process has them"
    place = tmp_path / f"{size}-{rows}-{slots}-{parts}"
    given = [rows, str(epochs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [python(), "-c", CODE, str(place), str(rank), str(size), str(slots), str(parts), *given], env=environment
        )
        for rank in range(size)
    ]
    try:
        assert [process.wait(600) for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
    answer = np.load(f"{place}.npz")
    return answer["losses"], answer["weights"]


def test_any_number_of_processes_does_the_same_updates(tmp_path):
    "With dropout: its draws are those of the parts"
    losses, weights = train(tmp_path, 1, "packed")
    assert len(losses) == 100 and losses[-1] < losses[0] / 2
    for size in (2, 3):
        _, others = train(tmp_path, size, "packed")
        assert np.linalg.norm(others - weights) <= 1e-5 * np.linalg.norm(weights)


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_parts_of_a_fixed_order_give_the_same_bits(tmp_path, rows):
    losses, weights = train(tmp_path, 1, rows, slots=4, parts=4, epochs=2)
    for size in (2, 4):
        others, other_weights = train(tmp_path, size, rows, slots=4, parts=4, epochs=2)
        assert np.array_equal(losses, others) and np.array_equal(weights, other_weights), size


@pytest.fixture
def one_thread(monkeypatch):
    "On a CPU the bits of a product depend on the threads that share it"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_goes_on_with_any_number_of_processes(store, fault, one_thread, monkeypatch):  # noqa: F811
    "Four, two, one, four: stopped after some updates each time, and it comes to what one process does undisturbed"
    line = ["train.epochs=8", "train.slots=4", "train.checkpoint_updates=100"]  # 24 updates
    monkeypatch.setenv("GPUML_GPUS", "1")
    calm = fit(load("dev", [*line, "output=calm"]))
    for number, (processes, updates, how) in enumerate(STOPS):
        monkeypatch.setenv("GPUML_GPUS", str(processes))
        fault(how)
        with pytest.raises(Preempted, match="stopped at update"):
            fit(load("dev", line), watch=stop_at(updates), resume="latest" if number else None)
    monkeypatch.setenv("GPUML_GPUS", "4")
    fault("none:0")
    done = fit(load("dev", line), resume="latest")
    assert result(done) == result(calm) and len(attempts.read(Storage(), str(done.folder))) == 4
