"Texts in one row without padding: right for the architectures that take it, refused for all others"

import numpy as np
import pytest

from gpuml.training import attention, forward, packing
from gpuml.training.architecture import CAUSAL, MEAN
from tests.rows import KINDS, LENGTHS, PLAIN, WINDOWED, batch, classifier_of, row_of, switch


def with_gradients(classifier, logits):
    "Logits of the batch's texts, and all gradients in one array"
    import torch

    classifier.zero_grad()
    out = logits()[: len(LENGTHS)]
    (out * torch.arange(1, 4)).sum().backward()
    grads = [p.grad.ravel() for _, p in sorted(classifier.named_parameters()) if p.grad is not None]
    return out.detach().numpy(), np.concatenate(grads)


def off(pairs, expected):
    "How far logits or gradients are from those expected, as a share of the largest"
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_padded_without_the_padding(kind):
    "Also with spare texts and texts of no length behind, as a buffer of fixed size has them"
    import torch

    classifier = classifier_of(kind)
    ids, mask = batch()
    expected = with_gradients(classifier, lambda: forward.logits(classifier, ids, mask))
    assert packing.use_packed(classifier, ids, mask) == ""
    row = row_of(classifier, ids, mask)
    every = forward.row_logits(classifier, *row, longest=19)
    assert len(every) > len(ids) + 2 and every.shape[1] == 3 and every.dtype == torch.float32 and every.isfinite().all()
    assert off(with_gradients(classifier, lambda: forward.row_logits(classifier, *row, longest=19)), expected) <= 1e-5
    assert off(with_gradients(classifier, lambda: packing.in_a_row(classifier, ids, mask)), expected) <= 1e-5
    again = with_gradients(classifier, lambda: forward.logits(classifier, ids, mask))
    assert off(again, expected) <= 1e-6  # padded batches still work, for evaluation


def test_mean_of_each_text():
    "answerdotai/ModernBERT-base looks at the mean of all tokens"
    classifier = classifier_of("modernbert", classifier_pooling=MEAN)
    ids, mask = batch()
    expected = with_gradients(classifier, lambda: forward.logits(classifier, ids, mask))
    assert packing.use_packed(classifier, ids, mask) == ""
    row = row_of(classifier, ids, mask)
    assert off(with_gradients(classifier, lambda: forward.row_logits(classifier, *row, longest=19)), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_batch_padded_on_the_left(kind):
    classifier = classifier_of(kind)
    ids, mask = batch(side="left")
    expected = forward.logits(classifier, ids, mask).detach().numpy()
    assert packing.use_packed(classifier, ids, mask) == ""
    packed = packing.in_a_row(classifier, ids, mask).detach().numpy()
    assert off([packed], [expected]) <= 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_text_that_ends_in_the_padding(kind):
    "A tokenizer that pads with its end, and ends texts with it: the head looks at the token before"
    classifier = switch(classifier_of(kind))
    ids, mask = batch()
    ids[0, 17:] = ids[1, 8] = ids[4, 0] = 1
    padded, packed = (way(classifier, ids, mask).detach().numpy() for way in (forward.logits, packing.in_a_row))
    assert off([packed], [padded]) <= 1e-5
    classifier.config.pad_token_id = None  # the padded way takes one text at a time then
    ids, mask = batch(lengths=(19,))
    padded, packed = (way(classifier, ids, mask).detach().numpy() for way in (forward.logits, packing.in_a_row))
    assert off([packed], [padded]) <= 1e-5


@pytest.mark.parametrize("kind", [*CAUSAL, "modernbert"])
def test_a_rule_that_is_left_out_shows(kind):
    "What the tests above compare depends on it: no look ahead, and none beyond the window"
    classifier = classifier_of(kind)
    ids, mask = batch()
    expected = forward.logits(classifier, ids, mask).detach().numpy()
    rules = set()

    def lax(*arguments, **changes):
        rules.add(arguments[-1])
        return attention.attend(*arguments[:-1], arguments[-1]._replace(**changes))

    wrong = [dict(causal=False)] * (kind in CAUSAL) + [dict(window=None)] * (kind in WINDOWED)
    for changes in wrong:
        switch(classifier, lambda *a, changes=changes: lax(*a, **changes))
        assert off([packing.in_a_row(classifier, ids, mask).detach().numpy()], [expected]) > 1e-2
    assert {rule.causal for rule in rules} == {kind in CAUSAL}
    assert {rule.window for rule in rules} <= {None, 4, 5} and (rules != {None}) == bool(wrong)


REFUSED = {
    "mpnet": "mpnet models add to their attention what depends on the distance of two tokens",
    "deberta-v2": "deberta-v2 models add to their attention what depends on the distance of two tokens",
    "bloom": "bloom models add to their attention what depends on the distance of two tokens",
    "openai-gpt": "openai-gpt models are not among those that take texts in one row",
    "mixtral": "mixtral models are not among those that take texts in one row",
    "albert": "albert models are not among those that take texts in one row",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_take_it_is_not_even_tried(kind):
    from types import SimpleNamespace

    config = classifier_of(kind, **PLAIN).config if kind != "bloom" else SimpleNamespace(model_type="bloom")
    untouchable = SimpleNamespace(config=config)  # has neither attention nor weights
    assert packing.use_packed(untouchable, *batch()) == REFUSED[kind]


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_attention_across_texts_is_noticed(kind):
    "Attention that ignores where texts start, as sdpa does with positions that start anew"
    import torch

    def across(query, key, value, starts, longest, rule):
        whole = torch.tensor([0, len(query)])
        return attention.by_text(query, key, value, whole, len(query), rule)

    classifier = classifier_of(kind)
    before = classifier.config._attn_implementation
    expected = forward.logits(classifier, *batch()).detach().numpy()
    loose, strict = (packing.use_packed(classifier, *batch(), t, across) for t in (1e9, 1e-5))
    assert loose == "texts attend to their neighbours" and "differ" in strict
    assert classifier.config._attn_implementation == before
    assert np.array_equal(forward.logits(classifier, *batch()).detach().numpy(), expected)


def test_a_look_back_by_one_token_is_noticed():
    "Of two texts only the second one sees another"
    import torch

    def beyond(query, key, value, starts, longest, rule):
        inside = attention.by_text(query, key, value, starts, longest, rule)
        return inside + 1e-4 * torch.roll(inside, 1, 0)

    assert (
        packing.use_packed(classifier_of("llama"), *batch(lengths=(9, 4)), 1.0, beyond)
        == "texts attend to their neighbours"
    )


def test_an_index_out_of_range_is_noticed_before_it_is_looked_up():
    "On a GPU it would end the process; a table of positions that was cut off, and padding without a row"
    import torch

    classifier = classifier_of("gpt2")
    classifier.transformer.wpe.weight = torch.nn.Parameter(classifier.transformer.wpe.weight[:16])
    assert packing.use_packed(classifier, *batch()) == "IndexError: row 18 of a table of 16"
    classifier = classifier_of("gpt2")
    classifier.config.pad_token_id = 99
    assert packing.use_packed(classifier, *batch(pad_id=5)) == "IndexError: row 99 of a table of 99"


def test_gradients_that_are_no_numbers_are_noticed():
    "A kernel that can't do dropout: seen in training alone"

    def without(*arguments):
        return attention.attend(*arguments) * (float("nan") if arguments[-1].dropout else 1.0)

    assert packing.use_packed(classifier_of("bert"), *batch(), attend=without) == "gradients are no finite numbers"


def test_dropout_in_attention_is_drawn():
    "In training the attention's dropout is the model's own: 0.1 in DistilBERT"
    drawn = []

    def recorded(*arguments):
        drawn.append(arguments[-1].dropout)
        return attention.attend(*arguments)

    classifier = switch(classifier_of("distilbert"), recorded)
    packing.in_a_row(classifier, *batch())
    packing.in_a_row(classifier.train(), *batch())
    assert drawn == [0.0] * 3 + [0.1] * 3


def test_saved_model_does_not_ask_for_it(tmp_path):
    classifier = classifier_of("bert")
    packing.use_packed(classifier, *batch())
    classifier.save_pretrained(tmp_path)
    assert attention.PACKED not in (tmp_path / "config.json").read_text()
