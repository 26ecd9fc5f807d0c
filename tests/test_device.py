"""Where tensors are on a GPU, without one: torch's fake tensors have a device, and no numbers.

What is left on the CPU can't be computed with, and what asks for a number, as a wait for the GPU does, raises. The backward
pass alone asks the driver for a real GPU, and is left out.
"""

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor

from gpuml.base.config import TrainConfig
from gpuml.training import attention
from gpuml.training.learner import Learner
from gpuml.training.row import Filling, Row, fill, shape_for
from gpuml.training.row_model import RowModel
from gpuml.training.world import World
from tests.gpu.learners import SHORT_TEXTS
from tests.gpu.test_gpu_architectures import PACKED, calm

GPU = torch.device("cuda", 0)
LENGTHS = SHORT_TEXTS.tokens.lengths
ALL = np.arange(len(LENGTHS))


def adamw(*lists, lr, grad_scale, found_inf, **_):
    "The kernel of AdamW, which fake tensors lack: what it takes is float32 on the GPU"
    numbers = [lr, found_inf, *lists[5], *([] if grad_scale is None else [grad_scale])]
    assert {(x.device, x.dtype, x.dim()) for x in numbers} == {(GPU, torch.float32, 0)}
    assert {(x.device, x.dtype) for tensors in lists for x in tensors} == {(GPU, torch.float32)}


@pytest.fixture
def fake(monkeypatch):
    "Fake tensors, in a process that has a GPU as torch is told"
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda **_: True)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(fake_tensor.FakeTensorMode, "avoid_device_init", True)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    monkeypatch.setattr(torch, "_fused_adamw_", adamw)
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(classifier, fake):
    "The classifier with fake weights and buffers on the GPU; what it has beside them stays, as `.to` leaves it"
    moved = {}  # tied weights are one
    for module in classifier.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in moved:
                    copy = fake.from_tensor(tensor.detach()).to(GPU)
                    moved[id(tensor)] = torch.nn.Parameter(copy) if isinstance(tensor, torch.nn.Parameter) else copy
                table[name] = tensor if tensor is None else moved[id(tensor)]
    classifier.to = lambda device: classifier
    return classifier.train()


def learner_on_gpu(classifier, dtype, fake, monkeypatch):
    "A learner, whose backward pass gives each weight a gradient"
    with monkeypatch.context() as patch:  # AdamW looks whether the learning rate is positive
        patch.setattr(torch.Tensor, "__bool__", lambda number: True, raising=False)
        learner = Learner(TrainConfig(), on_gpu(classifier, fake), 0, World(device=GPU), dtype, longest=40)

    def backward(loss):
        assert (loss.device, loss.dtype, loss.dim()) == (GPU, torch.float32, 0)
        for weight in classifier.parameters():
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return learner


@pytest.mark.parametrize("kind, dtype", [*((kind, torch.bfloat16) for kind in PACKED), ("bert", torch.float16)])
def test_updates_and_logits(kind, dtype, fake, monkeypatch):
    shape = shape_for(int(LENGTHS.sum()), len(LENGTHS), 40)
    filled, classifier = Row(shape, torch.empty(shape.bytes, dtype=torch.uint8)), calm(kind)
    fill(filled, SHORT_TEXTS.tokens, ALL, SHORT_TEXTS.classes, Filling(0, 40), len(ALL))
    with fake:
        learner = learner_on_gpu(classifier, dtype, fake, monkeypatch)
        row = Row(shape, filled.memory.to(GPU))
        learner.add_padded(SHORT_TEXTS, ALL, len(ALL))
        learner.step()
        attention.register()
        classifier.set_attn_implementation(attention.PACKED)
        learner.descent.in_place = True
        learner.add_row(row)
        assert learner.step().device == GPU
        logits = RowModel(classifier.eval(), dtype).plain(row)
        assert (logits.device, logits.dtype, len(logits)) == (GPU, torch.float32, shape.texts)
