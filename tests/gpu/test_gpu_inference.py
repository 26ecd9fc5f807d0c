"Logits on a GPU: in rows, by graphs and in 16 bits they are what float32 says of padded texts"

import numpy as np
import pytest
import torch

from gpuml.training.evaluation import logits_of
from gpuml.training.inference import Inference
from gpuml.training.packing import take_rows
from tests.gpu.learners import MOST, TEXTS, distilbert, number_format

TOKENS = TEXTS.tokens


@pytest.fixture
def classifier(device):
    "A small classifier that takes rows, on the device"
    made = distilbert().to(device)
    assert take_rows(made, TOKENS, 0, number_format(device)) == ""
    return made


@pytest.fixture
def expected(device) -> np.ndarray:
    "Logits in float32, of padded texts"
    return logits_of(distilbert().to(device), TOKENS, 0)


def apart(logits: np.ndarray, others: np.ndarray) -> float:
    "The largest difference, as a share of how far logits are apart"
    return np.abs(logits - others).max() / np.ptp(others)


def test_rows_say_what_float32_says(device, classifier, expected):
    inference = Inference(classifier, 0, number_format(device), packed=True)
    logits = inference.logits_of(TOKENS)
    assert apart(logits, expected) < (2e-2 if device.type == "cuda" else 1e-5)
    assert np.array_equal(inference.logits_of(TOKENS), logits)
    assert inference.model.graphs is not None and len(inference.model.graphs) > 0


def test_rows_that_do_not_fit_are_halved(device, classifier, expected):
    def refuse(module, arguments, options):
        if options["input_ids"].numel() > 4 * MOST:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    notes = []
    classifier.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    inference = Inference(classifier, 0, number_format(device), packed=True, note=notes.append)
    assert apart(inference.logits_of(TOKENS), expected) < (2e-2 if device.type == "cuda" else 1e-5)
    assert inference.most <= 4 * MOST and notes == []


def test_graphs_see_weights_that_change_in_place(device, classifier):
    "Autocast's 16-bit copies of the old ones, too, are none of theirs"
    inference = Inference(classifier, 0, number_format(device), packed=True)
    first = inference.logits_of(TOKENS)
    recorded = len(inference.model.graphs)
    changed = distilbert(initializer_range=0.05).to(device)
    classifier.load_state_dict(changed.state_dict())
    second = inference.logits_of(TOKENS)
    assert len(inference.model.graphs) == recorded and apart(first, second) > 0.1
    assert apart(second, logits_of(changed, TOKENS, 0)) < (2e-2 if device.type == "cuda" else 1e-5)
