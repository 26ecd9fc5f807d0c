"""Several processes share one model out: the same updates as one that has all of it"""

import os
import subprocess

import numpy as np
import pytest
from safetensors.torch import load_file

from gpuml.base.errors import Preempted, TrainError
from gpuml.base.loading import load
from gpuml.training.fit import fit
from tests import forked
from tests.conftest import ROOT
from tests.test_interrupt import stop_at
from tests.test_processes import STOPS, fault, pair, real_pair  # noqa: F401  fixtures

CODE = """
import sys
import numpy as np, torch
from torch.distributed import FileStore
from gpuml.base.config import TrainConfig
from gpuml.data.orders import Global
from gpuml.training.feed import Feed
from gpuml.training.inference import Inference
from gpuml.training.learner import Learner
from gpuml.training.loop import updates
from gpuml.training.portion import whole
from gpuml.training.shard import share_out
from gpuml.training.shared_evaluation import sharded_logits
from gpuml.training.tune import tune
from gpuml.training.world import world
from tests.test_rows import rows_of
from tests.gpu.learners import distilbert
from tests.models import model_of

torch.set_num_threads(1)
place, rank, size, rows, epochs, kind, full = sys.argv[1:]
rank, size, epochs, full = int(rank), int(size), int(epochs), int(full)
texts = rows_of(np.random.default_rng(0).integers(4, 60, 64))
with world(rank, size, FileStore(place, size) if size > 1 else None) as processes:
    config = TrainConfig(batch_size=16, learning_rate=1e-3, warmup=0.0, rows=rows, epochs=epochs)
    classifier = distilbert() if kind == "distilbert" else model_of(kind, num_labels=3)
    shards = share_out(classifier, processes) if size > 1 else None
    pad_id = classifier.config.pad_token_id or 0
    learner = Learner(config, classifier, pad_id, processes, longest=60, shards=shards)
    if rows == "packed":
        tune(learner, texts)
    learner.parts = 4
    if rank == full - 1:
        linear = torch.nn.Linear.forward

        def forward(self, x):
            if x.numel() // x.shape[-1] > 150:
                raise torch.OutOfMemoryError("no room")
            return linear(self, x)

        torch.nn.Linear.forward = forward
    feed = Feed(Global(texts), 16, 42, epochs)
    steps = []
    while feed.epochs_done < epochs:
        steps += updates(learner, feed)
    inference = Inference(classifier, pad_id, packed=learner.packed)
    inference.most = 256
    if shards:
        logits = sharded_logits(inference, texts.tokens, learner, lambda: None)
    else:
        logits = inference.logits_of(texts.tokens)
    weights = [whole(p.detach()).numpy().ravel() for p in classifier.parameters()]
if rank == size - 1:
    np.savez(place + ".npz", losses=[s.loss for s in steps], weights=np.concatenate(weights), logits=logits,
        norms=[s.grad_norm for s in steps], tokens=learner.max_tokens)
"""


def train(tmp_path, size, rows="padded", epochs=25, kind="distilbert", full=0):
    "What the last process has come to"
    place = tmp_path / f"{size}-{rows}-{kind}-{full}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [rows, str(epochs), kind, str(full)]
    processes = [
        subprocess.Popen([forked.python(), "-c", CODE, str(place), str(rank), str(size), *words], env=environment)
        for rank in range(size)
    ]
    assert [process.wait(600) for process in processes] == [0] * size
    return np.load(f"{place}.npz")


def apart(answer, other, name="weights"):
    "How far two trainings are from each other, relative to the first"
    return np.linalg.norm(answer[name] - other[name]) / np.linalg.norm(answer[name])


def test_a_shared_model_does_the_same_updates(tmp_path):
    "A hundred, with dropout"
    one, others = train(tmp_path, 1), train(tmp_path, 2)
    assert len(others["losses"]) == 100 and apart(one, others) <= 1e-5
    assert apart(one, others, "norms") <= 1e-4 and apart(one, others, "logits") <= 1e-4


def test_memory_that_runs_out_in_one_process_hangs_none(tmp_path):
    "A causal model in rows: its encoder and its head are called one after the other. The second process is full"
    one, others = (train(tmp_path, size, "packed", 2, "llama", full) for size, full in ((1, 0), (2, 2)))
    assert others["tokens"] < 2**40 and len(others["losses"]) == 8
    assert apart(one, others) <= 1e-5 and apart(one, others, "logits") <= 1e-4


def test_a_run_goes_on_with_a_shared_model_and_with_a_whole_one(store, fault, monkeypatch):  # noqa: F811
    "Four processes that share it, two, one, four: each but the last stopped after some updates"
    line = ["train.epochs=8", "train.checkpoint_updates=100", "train.shard=always"]  # 24 updates
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GPUML_GPUS", "4")
    fault("none:0")
    calm = fit(load("dev", [*line, "output=calm"]))
    for number, (processes, updates, how) in enumerate(STOPS):
        monkeypatch.setenv("GPUML_GPUS", str(processes))
        fault(how)
        with pytest.raises(Preempted, match="stopped at update"):
            fit(load("dev", line), watch=stop_at(updates), resume="latest" if number else None)
    monkeypatch.setenv("GPUML_GPUS", "4")
    fault("none:0")
    done = fit(load("dev", line), resume="latest")
    expected, weights = (load_file(run.model_folder / "model.safetensors") for run in (calm, done))
    assert expected.keys() == weights.keys()
    assert all((weights[name] - w).norm() <= 1e-5 * w.norm() for name, w in expected.items() if w.norm() > 1e-3)
    assert done.metrics["accuracy"] == calm.metrics["accuracy"]
    assert len(done.predict(["good", "bad"])) == 2


def test_a_torch_that_can_not_go_on_is_named(monkeypatch):
    "Versions before 2.13 can't take up a shared model again whose pass has broken off"
    import torch
    from torch.distributed.fsdp import FSDPModule

    from gpuml.training.shard import Shards
    from gpuml.training.world import world

    def full():
        raise torch.OutOfMemoryError("no room")

    with world(0, 1, None) as alone:
        shards = Shards(alone, [])
        with pytest.raises(
            TrainError, match="in the first pass of a shared model: more GPUs, or a smaller data.max_length"
        ):
            shards.run("update", full)
        shards.run("update", lambda: None)
        monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
        with pytest.raises(TrainError, match="torch .* can't go on with smaller .*, torch 2.13 or later can"):
            shards.run("update", full)
