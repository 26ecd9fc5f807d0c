"Texts in one row without padding: right for the architectures that take it, refused for all others"

import numpy as np
import pytest

from gpuml.training import attention, forward, packing

SIZES = dict(vocab_size=99, pad_token_id=0, num_labels=3)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def classifier_of(kind, **more):
    "A small classifier with random weights, whose dropout is its architecture's default"
    import transformers
    from transformers import set_seed

    set_seed(0)
    name, sizes = {
        "bert": ("Bert", SMALL),
        "distilbert": ("DistilBert", dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
        "roberta": ("Roberta", {**SMALL, "pad_token_id": 1}),
        "electra": ("Electra", {**SMALL, "embedding_size": 32}),
        "modernbert": ("ModernBert", {**SMALL, "num_hidden_layers": 3}),
        "deberta": ("DebertaV2", SMALL),
        "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=2)),
    }[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes, **more})
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def batch(pad_id=0, lengths=(9, 4, 4, 1)):
    "Ids and mask of texts with these lengths"
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(0).integers(5, 99, mask.shape)
    return np.where(mask == 1, ids, pad_id), mask


def logits_and_gradients(classifier, ids, mask, packed):
    import torch

    classifier.zero_grad()
    out = forward.logits(classifier, ids, mask, packed)
    (out * torch.arange(1, 4)).sum().backward()
    grads = [p.grad.ravel() for _, p in sorted(classifier.named_parameters()) if p.grad is not None]
    return out.detach().numpy(), np.concatenate(grads)


def row_of(ids, mask, spare=5, empty=2):
    "The batch's texts in one row; behind them padding in texts of its own, and texts of no length"
    import torch

    lengths = [*mask.sum(1), 3, spare - 3]
    row = np.append(ids[mask == 1], [ids.min()] * spare)
    positions = np.concatenate([np.arange(n) for n in lengths])
    starts = np.append(0, np.cumsum(lengths + [0] * empty))
    return torch.from_numpy(row), torch.from_numpy(positions), torch.from_numpy(starts.astype(np.int32))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_a_row_with_spare_and_empty_texts(kind):
    "As a buffer of fixed size has them: the texts' logits and gradients are those without"
    import torch

    classifier = classifier_of(kind)
    ids, mask = batch(classifier.config.pad_token_id)
    expected = logits_and_gradients(classifier, ids, mask, packed=False)
    assert packing.use_packed(classifier, ids, mask) == ""
    classifier.zero_grad()
    out = forward.row_logits(classifier, *row_of(ids, mask), longest=9)
    assert out.shape == (8, 3) and out.dtype == torch.float32 and torch.isfinite(out).all()
    (out[:4] * torch.arange(1, 4)).sum().backward()
    grads = [p.grad.ravel() for _, p in sorted(classifier.named_parameters()) if p.grad is not None]
    for found, wanted in zip((out[:4].detach().numpy(), np.concatenate(grads)), expected, strict=True):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_packed_is_padded_without_the_padding(kind):
    classifier = classifier_of(kind)
    ids, mask = batch(classifier.config.pad_token_id)
    expected = logits_and_gradients(classifier, ids, mask, packed=False)
    assert packing.use_packed(classifier, ids, mask) == ""
    for found, wanted in zip(logits_and_gradients(classifier, ids, mask, packed=True), expected, strict=True):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    again = logits_and_gradients(classifier, ids, mask, packed=False)  # padded batches still work, for evaluation
    assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("kind", ["modernbert", "deberta", "gpt2"])
def test_what_does_not_take_it_is_left_as_it_was(kind):
    "A window around each token, positions inside the attention, a causal model that looks at the last token"
    classifier = classifier_of(kind)
    ids, mask = batch()
    before = classifier.config._attn_implementation
    expected = forward.logits(classifier, ids, mask).detach().numpy()
    assert packing.use_packed(classifier, ids, mask) != ""
    assert classifier.config._attn_implementation == before
    assert np.array_equal(forward.logits(classifier, ids, mask).detach().numpy(), expected)


def test_attention_across_texts_is_noticed():
    "Attention that ignores where texts start, as sdpa does with positions that start anew: differences of a millionth"
    import torch

    def across(query, key, value, starts, longest, dropout, scale):
        parts = (x.transpose(0, 1)[None] for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*parts, scale=scale)[0].transpose(0, 1)

    ids, mask = batch()
    loose, strict = (packing.use_packed(classifier_of("distilbert"), ids, mask, t, across) for t in (1e9, 1e-5))
    assert loose == "texts attend to their neighbours" and "differ" in strict


def test_dropout_in_attention_is_drawn():
    "In training the attention's dropout is the model's own: 0.1 in DistilBERT"
    drawn = []

    def recorded(*arguments):
        drawn.append(arguments[5])
        return attention.attend(*arguments)

    classifier = classifier_of("distilbert")
    assert packing.use_packed(classifier, *batch(), attend=recorded) == "" and set(drawn) == {0.0}
    forward.logits(classifier.train(), *batch(), packed=True)
    assert drawn[-1] == 0.1


def test_saved_model_does_not_ask_for_it(tmp_path):
    classifier = classifier_of("bert")
    packing.use_packed(classifier, *batch())
    classifier.save_pretrained(tmp_path)
    assert attention.PACKED not in (tmp_path / "config.json").read_text()
