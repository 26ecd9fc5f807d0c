"""Measures arms of gpu.py, one after the other in this process, and prints a line of JSON for each.

python benchmarks/gpu_arms.py [--tiny] [--seconds 2.5] SHAPE/BATCH/ARM …
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from train import MAX_LENGTH, flops, make_trainer, peak, texts_of, train_gpuml
from transformers import TrainerCallback, set_seed

from gpuml.base.loading import load
from gpuml.data.encoder import tokenise
from gpuml.data.tokens import Tokens
from gpuml.training import model, origin

HERE = Path(__file__).parent
LABELS = 8  # of R8
STARTS, ENDS = ("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id")
SHAPES = {  # class of the config, sizes where they aren't its defaults
    "distilbert": ("DistilBertConfig", {}),
    "modernbert": ("ModernBertConfig", dict(pad_token_id=0, **dict.fromkeys(STARTS, 101), **dict.fromkeys(ENDS, 102))),
}
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=30_522)
TINY = {"distilbert": dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64), "modernbert": SMALL}
ENDLESS = 10_000  # epochs


@dataclass(frozen=True)
class Texts:
    "What all arms train on"

    tokenizer: Any
    tokens: Tokens
    classes: list[int]


def read_texts(tiny: bool) -> Texts:
    "R8's training texts; in their place some made-up ones"
    tokenizer = model.load_tokenizer(origin.locate(load(HERE / "reuters.yaml")))
    if tiny:
        rng = np.random.default_rng(0)
        texts = [" ".join(["wheat"] * n) for n in rng.integers(2, 20, 24)]
        return Texts(tokenizer, tokenise(texts, tokenizer, MAX_LENGTH), rng.integers(0, LABELS, len(texts)).tolist())
    texts, classes, _ = texts_of("R8", 2**30)
    return Texts(tokenizer, tokenise(texts, tokenizer, MAX_LENGTH), classes)


def make_classifier(shape: str, tiny: bool) -> Any:
    "A classifier of this shape with random weights"
    set_seed(0)
    name, sizes = SHAPES[shape]
    config = getattr(transformers, name)(num_labels=LABELS, **sizes, **(TINY[shape] if tiny else {}))
    return transformers.AutoModelForSequenceClassification.from_config(config)


def settle() -> None:
    "Wait until the GPU has done all that it was given"
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Window:
    "Times the updates that come after the warm-up, for some seconds"

    config: Any  # the model's
    seconds: float
    warm_up: float  # seconds
    waits: bool = True  # for the GPU, as an update was given to it; not where it is known to be done
    most: float = 5.0  # seconds after which it warms up no more, whatever is new
    least: int = 3  # updates, of the warm-up and of what is timed
    clock: Callable[[], float] = time.perf_counter
    first: float = 0.0  # of the first update's end
    begin: float = 0.0  # of the warm-up
    start: float = 0.0  # of what is timed
    end: float = 0.0
    before: int = 0  # updates of the warm-up
    updates: int = 0
    tokens: int = 0
    flops: float = 0.0

    def update(self, lengths: np.ndarray, is_new: bool = False) -> bool:
        "An update with texts of these lengths is done; returns whether enough is timed. What is new is warmed up first"
        now = self.clock()
        self.first = self.first or now
        if not self.begin or is_new and now - self.first < self.most:
            self.begin, self.start, self.before = now, 0.0, 0
            self.updates, self.tokens, self.flops = 0, 0, 0.0
        if not self.start:
            self.before += 1
            if self.before >= self.least and now - self.begin >= self.warm_up:
                self.start = self._moment()
            return False
        self.updates += 1
        self.tokens += int(lengths.sum())
        self.flops += flops(lengths, self.config)
        if self.updates < self.least or now - self.start < self.seconds:
            return False
        self.end = self._moment()
        return True

    def _moment(self) -> float:
        "When the updates so far were done"
        if self.waits:
            settle()
        return self.clock()


class TimedUpdates(TrainerCallback):
    "Ends a Trainer's training when the window has all that it times"

    def __init__(self, window: Window, batches: list[np.ndarray]):
        self.window = window
        self.batches = batches  # lengths of the texts of each update, as the collator made them

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.window.update(self.batches[state.global_step - 1])


def time_trainer(arm: str, batch: int, classifier: Any, texts: Texts, window: Window) -> tuple[str, list[str]]:
    "Train with HuggingFace's Trainer until the window is full; returns its number format, and no notes"
    tokens, classes = texts.tokens, texts.classes
    common = dict(num_train_epochs=ENDLESS, learning_rate=1e-4)
    trainer = make_trainer(f"{arm}:{batch}", classifier, texts.tokenizer, tokens, classes, **common)
    batches, collate = [], trainer.data_collator

    def counted(features):
        batches.append(np.array([len(feature["input_ids"]) for feature in features]))
        return collate(features)

    trainer.data_collator = counted
    trainer.add_callback(TimedUpdates(window, batches))
    trainer.train()
    return {"no": "fp32"}.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision), []


def time_gpuml(arm: str, batch: int, classifier: Any, texts: Texts, window: Window) -> tuple[str, list[str]]:
    "Train as `gpuml train` does until the window is full; returns how, and its notes"
    window.waits = False  # what `after` hears of was read from the GPU; others are under way
    lengths = texts.tokens.lengths
    graphs, notes = 0, []

    def after(step, learner) -> bool:
        nonlocal graphs
        before, graphs = graphs, len(learner.replay.rows) if learner.replay else 0
        return window.update(lengths[step.update.rows], graphs > before)

    rows = "auto" if torch.cuda.is_available() else "packed"  # as on a GPU
    learner = train_gpuml(
        classifier, texts.tokenizer, texts.tokens, texts.classes, batch_size=batch, after=after, say=notes.append, epochs=ENDLESS,
        learning_rate=1e-4, deterministic=not arm.endswith(":any"), rows=rows,
    )  # fmt: skip
    return f"{'packed' if learner.packed else 'padded'}, {graphs} graphs", notes


def measure(name: str, texts: Texts, best: float, given: argparse.Namespace) -> dict[str, Any]:
    "An arm's figures"
    shape, batch, arm = name.split("/")
    torch.set_float32_matmul_precision("highest")  # as a process begins
    began = time.perf_counter()
    classifier = make_classifier(shape, given.tiny)
    window = Window(classifier.config, given.seconds, given.seconds / 2)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    train = time_gpuml if arm.startswith("gpuml") else time_trainer
    with model.quiet():
        how, notes = train(arm, int(batch), classifier, texts, window)
    seconds = window.end - window.start
    return {
        "arm": name,
        "ms": 1000 * seconds / window.updates,
        "tokens_per_second": window.tokens / seconds,
        "share": window.flops / seconds / best,
        "updates": window.updates,
        "warm_up_seconds": window.start - began,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
        "peak_flops": best,
        "how": how,
        "notes": notes,
        "arm_seconds": time.perf_counter() - began,
    }


def free_memory() -> bool:
    "Free what an arm has left on the GPU; returns whether this process can still use it"
    gc.collect()
    try:
        settle()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("arms", nargs="+")
    given = parser.parse_args()
    print("imported", flush=True)
    texts, best = read_texts(given.tiny), peak()
    print(f"{best / 1e12:.1f} TFLOP/s at best", flush=True)
    for name in given.arms:
        try:
            result = measure(name, texts, best, given)
        except Exception as e:  # the next arm may go well
            traceback.print_exc()
            result = {"arm": name, "error": f"{type(e).__name__}: {e}"[:500]}
        print(json.dumps(result), flush=True)
        if not free_memory():  # the other arms need a process of their own, and this one can't end as others do
            os._exit(0)


if __name__ == "__main__":
    main()
