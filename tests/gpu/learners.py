"Small learners on the device of a test, and what they come to"

from typing import Any, NamedTuple

import numpy as np
import torch

from gpuml.base.config import TrainConfig
from gpuml.data.orders import Global
from gpuml.training.feed import Feed
from gpuml.training.learner import Learner
from gpuml.training.loop import updates
from gpuml.training.outcomes import Step
from gpuml.training.tune import tune
from gpuml.training.world import World
from tests.test_rows import rows_of

EPOCHS = 2
MOST = 300 if torch.cuda.is_available() else 60  # tokens: over 128 of them, kernels on a GPU may add in any order
TEXTS = rows_of(np.random.default_rng(0).integers(MOST // 15, MOST, 36))
SHORT_TEXTS = rows_of(np.random.default_rng(1).integers(3, 40, 24))  # what the tiny models of tests/models.py read
CALM = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


def distilbert(**more: Any) -> Any:
    "A small classifier with random weights, and its architecture's dropout"
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, set_seed

    set_seed(0)
    sizes = dict(dim=64, n_layers=2, n_heads=2, hidden_dim=128, vocab_size=99, num_labels=3)
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, **more))


def number_format(device: torch.device) -> torch.dtype | None:
    "What a device computes in; packed rows need 16 bits on a GPU"
    return torch.bfloat16 if device.type == "cuda" else None


def learner_on(
    device: torch.device, classifier: Any, texts: Any = TEXTS, rows: str = "packed", pad_id: int = 0, **more: Any
) -> tuple[Learner, list[str]]:
    "A learner as a training has it, and what tuning it says"
    config = TrainConfig(batch_size=8, learning_rate=1e-3, warmup=0.0, rows=rows, epochs=EPOCHS)
    options = {"dtype": number_format(device), "longest": int(texts.tokens.lengths.max()), **more}
    learner = Learner(config, classifier, pad_id, World(device=device), **options)
    return learner, tune(learner, texts).notes


class Outcome(NamedTuple):
    "What a training has come to"

    numbers: np.ndarray  # float64 [updates, 2]: loss and norm of the gradients
    weights: np.ndarray  # all of them
    steps: list[Step]

    def equals(self, other: "Outcome") -> bool:
        "Whether all bits are equal"
        return np.array_equal(self.numbers, other.numbers) and np.array_equal(self.weights, other.weights)


def train(learner: Learner, texts: Any = TEXTS) -> Outcome:
    "Do all updates"
    feed = Feed(Global(texts), learner.config.batch_size, learner.config.seed, EPOCHS)
    steps = []
    while feed.epochs_done < EPOCHS:
        steps += updates(learner, feed)
    weights = [p.detach().float().cpu().numpy().ravel() for p in learner.classifier.parameters()]
    return Outcome(np.array([(s.loss, s.grad_norm) for s in steps]), np.concatenate(weights), steps)
