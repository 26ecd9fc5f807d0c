"""Tests that use a GPU where there is one: `pytest tests/gpu -n 4` there, in under 3 minutes.

Each test runs on the GPU of its machine, else on the CPU. What says nothing there is marked `gpu`, and left out without
one; `--pretend-gpu` runs it all the same, so that a change that breaks it shows before there is a GPU.
"""

import gc

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    "Where a test computes"
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def clean_gpu():
    "After a test the GPU's memory is free, and nothing limits it"
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
