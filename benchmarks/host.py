"""What Python does beside the model's computing, for each update: microseconds of the training thread.

    pip install 'gpuml[benchmarks]'     the peer needs accelerate
    python benchmarks/host.py [--batches 8 32 128 512] [--updates 200]

With CUDA graphs an update of 32 examples takes some 4 ms on a GPU; whatever the training thread does beside starting
it has to be far below that. A BERT of one layer of 8 numbers is trained on texts as long as those of R8, on a CPU.
gpuml trains as on a GPU (`train.rows: packed`): a thread makes the rows, a graph is a call here, and what it computes is
no cost of the host. In the arm `launching` the call computes nothing, as a GPU's host does not, and leaves the caches
to Python. All that `fit` does beside it is: the plan, seeds, each update's record for MLflow (a store in a file,
which a thread sends the points to), progress.json, checkpoints. The peer is the loop of HuggingFace's Trainer in the
same run, with the same model, texts and batches, without its forward, backward, clipping and optimiser's step; it
records nothing and saves nothing.
A process for each figure. Typical is the median over updates, in all the mean, with what is done now and then. It is
processor time of the training thread, so that a machine that others use measures the same; what it waits for (the disk,
another thread's Python) is not in it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial, wraps
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARMS = ("launching", "gpuml", "Trainer")
CLASSES = 8
COMPUTING = "computing"
PARTS = {
    "gpuml": {
        COMPUTING: ("gpuml.training.graph:Graph.run", "gpuml.training.graph:Graph.__init__"),
        "copy of the row": ("gpuml.training.graph:Graphs.run",),
        "plan": ("gpuml.data.updates:Plan.update",),
        "seeds": ("gpuml.training.loop:seed_draws",),
        "launch": ("gpuml.training.loop:launch",),
        "answer": ("gpuml.training.outcomes:Answer.read",),
        "record": ("gpuml.training.tracking:TrackedRun.log",),
        "progress": ("gpuml.training.progress:Reporter.step",),
        "checkpoints": ("gpuml.training.training:Training.save", "gpuml.training.checkpoint:Writer.due"),
        "after the update": ("gpuml.training.epochs:after_update",),
    },
    "Trainer": {
        COMPUTING: (
            "torch:Tensor.backward",
            "torch.optim:AdamW.step",
            "torch.nn.utils:clip_grad_norm_",
            "transformers:BertForSequenceClassification.forward",
        ),
        "padding": ("transformers:DataCollatorWithPadding.__call__",),
        "update": ("transformers:Trainer.training_step",),
    },
}


class Clock:
    "The time of each update by part, without what is inside of other parts"

    def __init__(self):
        self.updates: list[dict[str, float]] = []  # seconds
        self._spent = defaultdict(float)
        self._inner = [0.0]
        self._last = time.thread_time()

    def watch(self, place: str, part: str) -> None:
        "Measure a function, `module:name` or `module:class.name`"
        module, _, path = place.partition(":")
        *names, last = path.split(".")
        owner = import_module(module)
        for name in names:
            owner = getattr(owner, name)
        function = getattr(owner, last)

        @wraps(function)  # Trainer looks at the names of a model's arguments
        def timed(*arguments, **named):
            started = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                seconds = time.thread_time() - started
                self._spent[part] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        setattr(owner, last, timed)

    def next_update(self) -> None:
        "The update that is under way has ended"
        now = time.thread_time()
        self.updates.append({**self._spent, "all": now - self._last})
        self._spent.clear()
        self._last = now


def texts(count: int) -> list[tuple[list[int], int]]:
    "Words of each text by number, with its class; as many as R8's texts have, cut at 126"
    draw = random.Random(0)
    sizes = [max(5, min(126, int(draw.lognormvariate(4.2, 0.6)))) for _ in range(count)]
    return [(draw.choices(range(90), k=size), draw.randrange(CLASSES)) for size in sizes]


def make_model(folder: Path) -> None:
    "The tiny BERT with its tokenizer of words"
    from tests.models import folder_of, model_of, tokenizer_of

    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    folder_of(folder, model_of("bert", max_position_embeddings=128, **sizes), tokenizer_of())


def train_gpuml(
    folder: Path, rows: list[tuple[list[int], int]], batch: int, clock: Clock, only_launches: bool = False
) -> None:
    "`fit`, as a user calls it; graphs may compute nothing from the second update on"
    import torch

    import gpuml.training.mlflow_run  # noqa: F401  importing it is no cost of an update
    from gpuml.base.loading import load
    from gpuml.training import epochs, graph
    from gpuml.training.fit import fit
    from tests.conftest import CONFIG

    text = CONFIG.format(cache=folder / "cache", model=folder / "model", port=9)
    (folder / "config").mkdir()
    (folder / "config" / "dev.yaml").write_text(text.replace("max_length: 24", "max_length: 128"))
    lines = [f"{' '.join(f'w{n}' for n in words)} {i},{target}\n" for i, (words, target) in enumerate(rows)]
    (folder / "data.csv").write_text("".join(["text,label\n", *lines]))
    train = ["train.rows=packed", "train.epochs=1", f"train.batch_size={batch}"]
    overrides = ["data.train=data.csv", "data.validation_fraction=0.01", *train]
    after_update = epochs.after_update
    nothing = torch.tensor([1.0, 1.0, 0.0, 0.0])  # loss and norm, and that all went well

    def counted(*arguments):
        after_update(*arguments)
        clock.next_update()
        if only_launches:
            graph.Graph.run = lambda self: nothing

    epochs.after_update = counted
    fit(load("dev", [*overrides, f"tracking.uri=sqlite:///{folder}/mlflow.db"], start=folder))


def train_peer(folder: Path, rows: list[tuple[list[int], int]], batch: int, clock: Clock) -> None:
    "Trainer with its defaults and this batch size"
    import torch
    from train import make_trainer
    from transformers import AutoTokenizer, BertForSequenceClassification, TrainerCallback

    from gpuml.data.encoder import tokenise

    class Counter(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.next_update()

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokens = tokenise([" ".join(f"w{n}" for n in words) for words, _ in rows], tokenizer, 128)
    classifier = BertForSequenceClassification.from_pretrained(
        folder / "model", num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    trainer = make_trainer("default", classifier, tokenizer, tokens, [target for _, target in rows], num_train_epochs=1)
    trainer.args.per_device_train_batch_size = batch
    trainer._train_batch_size = batch
    trainer.add_callback(Counter())
    torch.set_num_threads(1)
    trainer.train()


def one(arm: str, batch: int, updates: int) -> dict:
    "Microseconds of an update by part, and in all: the mean, and the median of what is host"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        for part, names in PARTS["Trainer" if arm == "Trainer" else "gpuml"].items():
            for name in names:
                clock.watch(name, part)
        rows = texts(int(batch * updates / 0.99))
        os.chdir(folder)
        trains = {"gpuml": train_gpuml, "Trainer": train_peer, "launching": partial(train_gpuml, only_launches=True)}
        trains[arm](folder, rows, batch, clock)
    warm = clock.updates[updates // 10 :]
    hosts = [update["all"] - update.get(COMPUTING, 0.0) for update in warm]
    names = {name for update in warm for name in update if name not in (COMPUTING, "all")}
    parts = {name: 1e6 * statistics.fmean(update.get(name, 0.0) for update in warm) for name in names}
    mean = 1e6 * statistics.fmean(hosts)
    parts["rest"] = mean - sum(parts.values())
    computing = 1e6 * statistics.fmean(update.get(COMPUTING, 0.0) for update in warm)
    return {"parts": parts, "mean": mean, "median": 1e6 * statistics.median(hosts), "computing": computing}


def measured(arm: str, batch: int, updates: int) -> dict:
    "What `one` returns, from a process of its own"
    command = [sys.executable, __file__, "--one", arm, str(batch), "--updates", str(updates)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128, 512])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "BATCH"))
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]), given.updates)))
        return
    for batch in given.batches:
        updates = max(60, min(given.updates, 6400 // batch))
        results = {arm: measured(arm, batch, updates) for arm in ARMS}
        for arm, result in results.items():
            parts = ", ".join(f"{k} {v:.0f}" for k, v in sorted(result["parts"].items(), key=lambda part: -part[1]))
            typical = f"{arm:<9} batch {batch:3}: typical {result['median']:6.0f} µs, in all {result['mean']:6.0f} µs"
            print(f"{typical} ({parts}); computing {result['computing']:.0f}", flush=True)
        print(f"Trainer over gpuml: {results['Trainer']['median'] / results['gpuml']['median']:.1f}x", flush=True)


if __name__ == "__main__":
    main()
