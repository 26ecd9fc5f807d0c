"Logits on a GPU: in rows, by graphs and in 16 bits they are what float32 says of padded texts"

import numpy as np
import pytest
import torch

from gpuml.training.evaluation import logits_of
from gpuml.training.inference import Inference, take_rows
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
