"A model is tried before it is trained: lengths that it takes, padding that changes nothing, nothing left changed"

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpuml.base.errors import ModelError
from gpuml.data.tokens import join
from gpuml.data.updates import pad
from gpuml.training import bounds, model, padding
from gpuml.training.evaluation import equally_long, logits_of
from gpuml.training.forward import logits
from gpuml.training.padding import EQUAL
from gpuml.training.trial import made_up, try_model
from tests.models import ARCHITECTURES, folder_of, model_of, tokenizer_of

LEFT = ["bloom", "gpt_neox", "llama", "mistral", "mpt", "opt", "qwen2", "xlnet"]  # right with padding on the left
ONLY_LEFT = ["xlnet"]
NEITHER = ["fnet", "yoso"]
REFUSED = {
    "nystromformer": "fails with a text of 48 tokens (RuntimeError: shape",
    "reformer": "can't be trained with a text of 12 tokens (ValueError: If training, make sure that",
}


def classifier_for(kind, tokenizer, **more):
    classifier = model_of(kind, **more)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    return classifier


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_padded_as_it_is_right_for_it(kind):
    "transformers#1882, #1320: XLNet's logits differed by 31 % beside a longer text, FNet has no mask at all"
    pad = 3 if kind.endswith("3") else 1
    for declared in ("right", "left"):
        tokenizer = tokenizer_of(pad, side=declared)
        classifier = classifier_for(kind, tokenizer)
        longest = min(model.token_limit(classifier, tokenizer), 64)
        if kind in REFUSED:
            with pytest.raises(ModelError) as e:
                try_model(classifier, tokenizer, "./mine", longest)
            assert REFUSED[kind] in str(e.value) and "take another model" in str(e.value)
            continue
        verdict = try_model(classifier, tokenizer, "./mine", longest)
        expected = EQUAL if kind in NEITHER else "left" if declared == "left" and kind in LEFT else "right"
        assert verdict.padding == ("left" if kind in ONLY_LEFT else expected)
        assert bool(verdict.note) == (verdict.padding != declared), verdict


@pytest.mark.parametrize("kind", ["xlnet", "fnet", "gpt2", "bert", "llama"])
def test_predictions_do_not_depend_on_neighbours(kind):
    "Alone and in one call, in any order; afterwards the folder's own config says how"
    tokenizer = tokenizer_of(side="left")
    classifier = classifier_for(kind, tokenizer)
    padding.keep_padding(classifier, tokenizer, try_model(classifier, tokenizer, "./mine", 40).padding)
    tokens = made_up(tokenizer, [5, 40, 11, 5, 23])
    together = logits_of(classifier, tokens, 1)
    for i in range(5):
        alone = logits_of(classifier, tokens.take(np.array([i])), 1)
        assert np.abs(alone - together[i]).max() <= 1e-4 * np.abs(together[1] - together[0]).max()
    assert padding.side_of(classifier) == {"xlnet": "left", "llama": "left", "fnet": EQUAL}.get(kind, "right")
    assert tokenizer.padding_side == ("right" if kind in ("gpt2", "bert") else "left")


def test_equally_long():
    lengths = np.array([3, 9, 9, 4, 3])
    parts = equally_long(np.array([1, 2, 3, 0, 4]), lengths)
    assert [part.tolist() for part in parts] == [[1, 2], [3], [0, 4]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side):
    tokens = join([(np.array([7, 8, 9]), np.array([3])), (np.array([5]), np.array([1]))])
    ids, mask = pad(tokens, np.array([0, 1]), 1, side=side)
    assert ids.tolist() == [[7, 8, 9], [5, 1, 1] if side == "right" else [1, 1, 5]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0] if side == "right" else [0, 0, 1]]


LONG = {  # architecture, sizes: a limit that its config does not state, and what is said
    "fewer positions than stated (transformers#9116)": ("bert", {}, 40, "fails with a text of 64 tokens (IndexError: row 63 of a table of 40); it takes 40: data.max_length=40"),
    "positions from the padding (japanese-pretrained-models#3)": ("roberta", {}, 40, "fails with a text of 62 tokens (IndexError: row 63 of a table of 40); it takes 38: data.max_length=38"),
    "positions behind two others": ("bart", {}, 40, "it takes 38: data.max_length=38"),
}  # fmt: skip


@pytest.mark.parametrize("case", LONG)
def test_what_is_too_long_is_found_before_any_operator_runs(case):
    "A table of positions that is cut off: what fails is the look-up itself, on a GPU as here"
    kind, sizes, rows, message = LONG[case]
    tokenizer = tokenizer_of()
    classifier = classifier_for(kind, tokenizer, **sizes)
    for module in list(classifier.modules()):
        for name, part in list(module.named_children()):
            if "position" in name and isinstance(part, torch.nn.Embedding):
                part.weight = torch.nn.Parameter(part.weight[:rows])
    for buffer in ("position_ids", "token_type_ids"):
        for module in classifier.modules():
            if hasattr(module, buffer):
                setattr(module, buffer, torch.cat([getattr(module, buffer)] * 2, 1)[:, :128])
    with pytest.raises(ModelError) as e:
        try_model(classifier, tokenizer, "./mine", model.token_limit(classifier, tokenizer))
    assert message in str(e.value)


BEYOND = {  # architecture, the table that is too short and its rows: what is said
    "no row for a text's first part": ("bert", "token_type_embeddings", 0, "IndexError: row 0 of a table of 0"),
    "positions of a causal model": ("gpt2", "wpe", 9, "IndexError: row 47 of a table of 9"),
    "no row for the largest id": ("llama", "embed_tokens", 98, "its tokenizer's 'w94' is number 98, and the model's embeddings end at 97"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND)
def test_what_would_end_a_process_on_a_gpu(case):
    "Found by what is checked before each look-up, not by the look-up itself"
    kind, table, rows, message = BEYOND[case]
    tokenizer = tokenizer_of()
    classifier = classifier_for(kind, tokenizer)
    part = next(part for name, part in classifier.named_modules() if name.endswith(table))
    part.weight = torch.nn.Parameter(part.weight[:rows])
    with pytest.raises(ModelError) as e:
        try_model(classifier, tokenizer, "./mine", 48)
    assert message in str(e.value)


ARITHMETIC = [
    "_local_scalar_dense",
    "_to_copy",
    "_unsafe_view",
    "abs",
    "add",
    "add_",
    "alias",
    "argmax",
    "as_strided",
    "clamp",
    "clone",
    "copy_",
    "cumsum",
    "div",
    "embedding_dense_backward",
    "eq",
    "expand",
    "fill_",
    "full_like",
    "ge",
    "gt",
    "le",
    "lift_fresh",
    "lt",
    "masked_fill_",
    "max",
    "minimum",
    "mul",
    "ne",
    "neg",
    "new_ones",
    "new_zeros",
    "pow",
    "rsub",
    "select",
    "sign",
    "slice",
    "squeeze",
    "sub",
    "sum",
    "transpose",
    "unbind",
    "unique_consecutive",
    "unsqueeze",
    "view",
    "where",
    "zeros_like",
]  # with whole numbers, which are no places in a table, or those of a look-up that was checked


class WholeNumbers(TorchDispatchMode):
    "Keeps the operators that get whole numbers"

    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        if any(x.dtype in (torch.int32, torch.int64) for x in tensors):
            self.operators.add(func.overloadpacket)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - REFUSED.keys()))
def test_every_look_up_is_checked(kind):
    "An operator that a new release brings shows here, and not by the end of a process that uses a GPU"
    tokenizer = tokenizer_of(3 if kind.endswith("3") else 1)
    classifier = classifier_for(kind, tokenizer)
    batch = pad(made_up(tokenizer, [16, 8]), np.arange(2), tokenizer.pad_token_id)
    with WholeNumbers() as whole:
        logits(classifier.train(), *batch).sum().backward()
        logits(classifier.eval(), *batch)
    unknown = {operator.__name__ for operator in whole.operators - bounds.LOOKUPS} - set(ARITHMETIC)
    assert not unknown and torch.ops.aten.embedding in whole.operators


def test_weights_that_are_no_numbers():
    tokenizer = tokenizer_of()
    classifier = classifier_for("bert", tokenizer)
    with torch.no_grad():
        classifier.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="its logits are no finite numbers: its weights are damaged"):
        try_model(classifier, tokenizer, "./mine", 16)


def test_a_model_with_a_memory_is_refused():
    "BigBird leaves its sparse attention for good at the first short text: what it says depends on what came before"
    tokenizer = tokenizer_of()
    sparse = dict(attention_type="block_sparse", block_size=4, num_random_blocks=1, initializer_range=0.5)
    classifier = classifier_for("big_bird", tokenizer, **sparse)
    with pytest.raises(
        ModelError, match="depends on the texts before or beside it; set attention_type to original_full"
    ):
        try_model(classifier, tokenizer, "./mine", 60)


@pytest.mark.parametrize("kind", ["xlnet", "fnet"])
def test_a_run_pads_as_the_trial_says(kind, project, store):
    "Trained, saved, loaded again: a text is predicted the same alone and beside a long one"
    from gpuml.base.loading import load
    from gpuml.training.fit import fit
    from gpuml.training.results import Run

    words = " ".join(f"w{i}" for i in range(20))
    rows = [f"{words[: 3 * (1 + 5 * i % 17)]},{'ab'[i % 2]}" for i in range(24)]
    (project / "data" / "a.csv").write_text("\n".join(["text,label", *rows]))
    folder_of(project / "mine", model_of(kind, initializer_range=0.5))
    run = fit(load("dev", ["model.name=./mine", "train.epochs=1"]))
    expected = {"xlnet": "padded on the left: on the right", "fnet": "batches of equal length"}[kind]
    assert [note for note in run.metrics["notes"] if expected in note]
    for loaded in (run, Run(run.folder)):
        together = loaded.predict(["w1 w2", words, "w1 w2"]).probabilities
        alone = loaded.predict("w1 w2").probabilities[0]
        assert np.allclose(together[0], alone, atol=1e-6) and np.allclose(together[2], alone, atol=1e-6)
        assert np.abs(together[1] - alone).max() > 1e-4


@dataclass
class State:
    "All that a trial may not change"

    weights: dict
    draws: tuple

    @classmethod
    def of(cls, classifier):
        weights = {k: v.clone() for k, v in [*classifier.state_dict().items(), *classifier.named_buffers()]}
        return cls(weights, (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))

    def same(self, other):
        weights = all(torch.equal(v, other.weights[k]) for k, v in self.weights.items())
        return weights and torch.equal(self.draws[0], other.draws[0]) and self.draws[1:] == other.draws[1:]


@pytest.mark.parametrize("kind", ["bert", "ibert", "squeezebert", "xlnet", "bart"])
def test_nothing_is_left_of_a_trial(kind):
    "Weights, running averages, gradients, mode and three sources of random numbers"
    tokenizer = tokenizer_of()
    more = {"quant_mode": True} if kind == "ibert" else {}
    classifier = classifier_for(kind, tokenizer, **more).train()
    before = State.of(classifier)
    try_model(classifier, tokenizer, "./mine", 30)
    assert State.of(classifier).same(before)
    assert classifier.training and all(p.grad is None for p in classifier.parameters())
