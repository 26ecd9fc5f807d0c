"Architectures on a GPU: those that take rows train by graphs as padded texts do, and to try any of them does no harm"

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpuml.training import model, padding
from gpuml.training.deterministic import deterministic
from gpuml.training.trial import made_up, try_model
from tests.gpu.learners import SHORT_TEXTS, learner_on, train
from tests.models import ARCHITECTURES, model_of, tokenizer_of

PACKED = ["bert", "distilbert", "roberta", "xlm-roberta", "electra", "modernbert", "gpt2", "llama", "mistral", "qwen2"]
ANY = [
    "gpt2",
    "gpt_neox",
    "opt",
    "bart",
    "xlnet",
    "fnet",
    "modernbert",
    "mpnet",
    "llama",
    "deberta-v2",
    "longformer",
    "t5",
]


def calm(kind: str):
    "A tiny model of an architecture, which draws nothing"
    classifier = model_of(kind, num_labels=3)
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if classifier.config.pad_token_id is None:
        classifier.config.pad_token_id = 0
    return classifier


def made_up_texts(tokenizer) -> SimpleNamespace:
    "Texts as a tokenizer makes them, with a last token that some architectures look for"
    tokens = made_up(tokenizer, SHORT_TEXTS.tokens.lengths.tolist())
    return SimpleNamespace(tokens=tokens, classes=SHORT_TEXTS.classes, places=SHORT_TEXTS.places)


@pytest.mark.parametrize("kind", PACKED)
def test_rows_and_graphs(kind, device):
    near = 3e-2 if device.type == "cuda" else 1e-4
    outcomes = {}
    with deterministic(True, device):
        for name in ("graphs", "python", "padded"):
            classifier = calm(kind)
            rows = "padded" if name == "padded" else "packed"
            learner, notes = learner_on(device, classifier, SHORT_TEXTS, rows, classifier.config.pad_token_id)
            assert notes == [] and learner.packed == (rows == "packed")
            if name == "python":
                learner.unrecord()
            outcomes[name] = train(learner, SHORT_TEXTS)
    assert outcomes["graphs"].equals(outcomes["python"])
    assert outcomes["graphs"].numbers[:, 0] == pytest.approx(outcomes["padded"].numbers[:, 0], rel=near)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ANY)
def test_no_architecture_harms_the_process(kind, device):
    "Tried with the longest text that it reads, and trained with or without rows; the GPU can be used afterwards"
    tokenizer = tokenizer_of(ARCHITECTURES[kind][1].get("pad_token_id", 1))
    classifier = model_of(kind, num_labels=3)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    verdict = try_model(classifier.to(device), tokenizer, kind, min(model.token_limit(classifier, tokenizer), 64))
    padding.keep_padding(classifier, tokenizer, verdict.padding)
    texts = made_up_texts(tokenizer)
    learner, _ = learner_on(device, classifier, texts, "auto", tokenizer.pad_token_id)
    assert np.isfinite(train(learner, texts).numbers).all()
    assert torch.ones(8, device=device).sum().item() == 8
