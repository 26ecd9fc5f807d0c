"Kernels that always add in the same order, activations that are computed again, and what fits, as a GPU does it"

import numpy as np
import pytest
import torch

from gpuml.training import attention, forward, memory
from gpuml.training.deterministic import deterministic, without_deterministic_kernel
from tests.models import model_of

LENGTHS = (300, 7, 190, 129)  # of more than 128 tokens: FlashAttention adds their gradients in any order otherwise
SIZES = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128, max_position_embeddings=512)


@pytest.fixture
def encoder(device):
    "A small BERT with dropout that takes rows without padding"
    model = model_of("bert", num_labels=3, **SIZES).to(device).train()
    attention.register()
    model.set_attn_implementation(attention.PACKED)
    return model


def row(device, lengths=LENGTHS):
    "Texts of these lengths, one behind the other, and the longest length"
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 99, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32)
    return *(x.to(device) for x in (ids, positions, starts)), max(lengths)


def gradients(model, texts, seed=3):
    "All gradients of a loss, in bf16, with dropout"
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast(model.device.type, torch.bfloat16):
        out = forward.row_logits(model, *texts)
    out.square().sum().backward()
    return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])


def test_equal_gradients_each_time(device, encoder):
    texts = row(device)
    with deterministic(True, device):
        first, *others = (gradients(encoder, texts) for _ in range(4))
        assert all(torch.equal(first, other) for other in others)
        assert not torch.equal(first, gradients(encoder, texts, seed=4))
    apart = (first - gradients(encoder, texts)).norm() / first.norm()
    assert apart < 1e-2  # whichever kernels add


def test_activations_that_are_computed_again(device, encoder):
    texts = row(device)
    with deterministic(True, device):
        usual = gradients(encoder, texts)
        assert memory.recompute(encoder) == ""
        assert torch.equal(usual, gradients(encoder, texts))


def test_an_operation_without_such_a_kernel():
    device = torch.device("cuda")
    with deterministic(True, device), pytest.raises(RuntimeError) as caught:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    assert without_deterministic_kernel(caught.value) == "put_"


LITTLE = 200 * 10**6  # bytes


class NearlyFull(memory.GpuMemory):
    "A GPU on which others leave little"

    def free(self) -> int:
        return LITTLE


@pytest.mark.gpu
def test_what_fits(encoder):
    if encoder.device.type != "cuda":
        pytest.skip("a CPU does not count its memory")

    def trial(size):
        lengths = [64] * (size // 64)
        gradients(encoder, row(encoder.device, lengths))
        return sum(lengths)

    tokens = memory.probe(trial, 0, NearlyFull())
    assert memory.FEWEST_TOKENS < tokens < memory.MOST_TOKENS
    taken = memory.measure(trial, tokens, memory.GpuMemory()).spent
    assert LITTLE / 4 < taken < LITTLE
