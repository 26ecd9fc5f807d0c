"Nothing in a row's way through a classifier waits for the GPU: tried here on pretended ones"

from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpuml.training import attention, forward
from gpuml.training.architecture import MEAN
from tests.rows import KINDS, batch, classifier_of, row_of, switch

EVERY = [*KINDS, "modernbert with the mean"]
aten = torch.ops.aten
WAIT = (  # operators whose result, or its shape, has to come from the GPU first
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.repeat_interleave,
)  # fmt: skip


@dataclass
class Watch(TorchDispatchMode):
    "Inside the block an operator that waits raises, or one with very much to say; what attention's kernel is given is kept"

    most: int = 256 * 256  # numbers: what a mask of each token and each other would have
    kernels: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = func.overloadpacket
        assert operator not in WAIT, func
        if operator is aten.index:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), func
        if operator is aten._flash_attention_forward:
            self.kernels.append((*args[:3], args[5], args[8], kwargs))
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert len({x.device.type for x in tensors if x.dim() or x.device.type != "cpu"}) <= 1, f"{func} copies"
        assert all(x.numel() < self.most for x in tensors), f"{func} of {max(x.numel() for x in tensors):,} numbers"
        return result


def of(kind):
    more = {"classifier_pooling": MEAN} if kind.endswith("mean") else {}
    return classifier_of(kind.split()[0], **more)


def pretended(kind, device="cpu"):
    "The classifier, and a row's tensors, all without values"
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        classifier = switch(of(kind), attention.flash).train()
        row = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
        return classifier, (*row, torch.zeros(11, dtype=torch.int32)), torch.zeros(10, dtype=torch.int64)


@pytest.mark.parametrize("kind", EVERY)
def test_an_update_reads_no_value(kind):
    "Tensors without values: forward, loss and backward in bfloat16, with the GPU's attention"
    with FakeTensorMode():
        classifier, row, targets = pretended(kind)
        with Watch() as watch:
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward.row_logits(classifier, *row, longest=128)
            loss = cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            loss.backward()
        assert logits.shape == (10, 3) and logits.dtype == torch.float32
        assert all(p.grad is not None for name, p in classifier.named_parameters() if "pooler" not in name)
    assert len(watch.kernels) == 3
    for query, key, value, *_, options in watch.kernels:
        assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        assert query.shape[-1] % 8 == 0 and key.shape == value.shape and options["scale"] is not None


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_is_copied_to_the_gpu(kind):
    "Tensors without values that say they are on one"
    with FakeTensorMode():
        try:
            classifier, row, _ = pretended(kind, "cuda")
        except (RuntimeError, AssertionError) as e:
            pytest.skip(f"this torch can't pretend: {e}")
        with Watch():
            assert forward.row_logits(classifier, *row, longest=128).device.type == "cuda"


@pytest.mark.parametrize("kind", EVERY)
def test_transformers_does_not_look_either(kind):
    "What it looks for in real ids and positions only: padding without a mask, and positions that start anew"

    def whole(query, key, value, starts, longest, rule):
        "As if the row were one text"
        groups = query.shape[1] // key.shape[1]
        rows = (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in rows)).transpose(0, 1)

    classifier = switch(of(kind), whole).train()
    row = row_of(classifier, *batch())
    with Watch():
        logits = forward.row_logits(classifier, *row, longest=19)
        cross_entropy(logits, torch.full((len(logits),), -100), ignore_index=-100, reduction="sum").backward()


@pytest.mark.parametrize("kind", ["modernbert", "mistral", "llama"])
def test_what_the_kernel_is_given(kind):
    "Windows without the own token, on both sides or on one; fewer heads of keys than of queries; zeros behind narrow heads"
    more = {"modernbert": {}, "mistral": {"head_dim": 12}, "llama": {}}[kind]
    with FakeTensorMode():
        from transformers.initialization import no_init_weights

        with no_init_weights():
            classifier = switch(classifier_of(kind, **more), attention.flash)
        texts = (torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64))
        with Watch() as watch:
            forward.row_logits(classifier, *texts, torch.zeros(3, dtype=torch.int32), longest=64)
    query, key, _, _, causal, options = watch.kernels[-1]
    windows = [[k[-1].get(f"window_size_{side}") for side in ("left", "right")] for k in watch.kernels]
    width = 16 if kind == "mistral" else 8
    assert query.shape == (64, 4, width) and key.shape == (64, 4 if kind == "modernbert" else 2, width)
    assert causal == (kind != "modernbert") and options["scale"] == (12 if kind == "mistral" else 8) ** -0.5
    expected = {"modernbert": [[None] * 2, [4, 4], [None] * 2], "mistral": [[3, 0]] * 3, "llama": [[None] * 2] * 3}
    assert windows == expected[kind]


def test_texts_of_one_token():
    "With one as the longest the kernel would lay out heads as tokens, one for each text, also those of no length"
    with FakeTensorMode(), Watch() as watch:
        query, key = (torch.zeros(64, heads, 8, dtype=torch.bfloat16) for heads in (4, 2))
        attention.flash(query, key, key, torch.zeros(9, dtype=torch.int32), 1, attention.Rule(causal=True))
    assert [longest for _, _, _, longest, _, _ in watch.kernels] == [2]
