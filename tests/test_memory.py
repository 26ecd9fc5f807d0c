"Activations that are computed again: the same gradients to the last bit, of every kind of model, in less memory"

import pytest

from gpuml.training import memory, packing
from gpuml.training.forward import logits
from tests.models import model_of
from tests.rows import batch

KINDS = ["bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert", "gpt2", "llama", "qwen2"]
DROPOUT = {
    "modernbert": dict(embedding_dropout=0.2, attention_dropout=0.2, mlp_dropout=0.2),
    "llama": dict(attention_dropout=0.2),
    "qwen2": dict(attention_dropout=0.2),
}  # of architectures that have none by default


def gradients(model, ids, mask, way=logits, dtype=None, seed=3):
    "All gradients of a loss, with dropout"
    import torch

    model.train().zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = way(model, ids, mask)
    out.square().sum().backward()
    return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])


def check_equal(model, *batch, **options):
    import torch

    usual = gradients(model, *batch, **options)
    assert not torch.equal(usual, gradients(model, *batch, **options, seed=4)), "without dropout nothing is shown"
    assert memory.recompute(model) == "" and model.is_gradient_checkpointing
    assert torch.equal(usual, gradients(model, *batch, **options))
    memory.keep_activations(model)
    assert torch.equal(usual, gradients(model, *batch, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal(kind):
    model = model_of(kind, num_labels=3, **DROPOUT.get(kind, {}))
    if kind == "gpt2":
        model.config.pad_token_id = 0
    model.config.use_cache = False  # with its keys and values in a cache, attention rounds otherwise
    check_equal(model, *batch(model.config.pad_token_id))


def test_a_model_that_can_not():
    model = model_of("mpnet", num_labels=3)
    assert memory.recompute(model) == "MPNetForSequenceClassification can't compute its activations again"
    assert memory.fit_to_memory(model, lambda: 1024) == (1024, False)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "llama"])
def test_gradients_of_rows_are_equal_in_bf16(kind):
    import torch

    model = model_of(kind, num_labels=3, **DROPOUT.get(kind, {}))
    ids, mask = batch(model.config.pad_token_id or 0)
    if problem := packing.use_packed(model, ids, mask):
        pytest.skip(f"rows of this architecture are padded: {problem}")
    check_equal(model, ids, mask, way=packing.in_a_row, dtype=torch.bfloat16)


def kept_bytes(model, ids, mask):
    "Bytes that the forward pass keeps for the backward pass"
    import torch

    storages = {}

    def count(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits(model.train(), ids, mask)
    return sum(storages.values()) - sum(p.numel() * 4 for p in model.parameters())


def test_less_is_kept():
    model = model_of("bert", num_labels=3, num_hidden_layers=6, vocab_size=199)
    ids, mask = batch(lengths=(60, 60, 60, 60))
    usual = kept_bytes(model, ids, mask)
    assert memory.recompute(model) == ""
    assert kept_bytes(model, ids, mask) < usual / 3


def test_evaluation_computes_nothing_again():
    model = model_of("bert", num_labels=3)
    memory.recompute(model)
    passes = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: passes.append(1))
    logits(model.eval(), *batch()).sum().backward()
    assert len(passes) == 1
