"Models and tokenizers of many architectures, whole, damaged and mixed up: trained right, or refused in a sentence"

import json
import os
import stat

import pytest
import torch

from gpuml.base.errors import ModelError
from gpuml.training import folder, model
from gpuml.training.head import class_tensors
from gpuml.training.model import load_classifier
from gpuml.training.vocabulary import case_note, check_fit
from tests.models import ARCHITECTURES, config_of, folder_of, model_of, tokenizer_of

# ---- what lies in a folder


def rewrite(folder, tensors=None, **keys):
    "Change a folder's tensors, and keys of its config.json"
    from safetensors.torch import load_file, save_file

    if tensors:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def under(prefix):
    return lambda tensors: {prefix + k: v for k, v in tensors.items()}


BASE, LANGUAGE = "AutoModel", "AutoModelForMaskedLM"
MISFITS = {  # what was saved, its tensors, config.json, and parts of what is said
    "saved by a wrapper (transformers#28122)": (LANGUAGE, under("module."), {}, ["missing: 37 tensors (bert.embeddings.LayerNorm.bias", "there, and not used", "prefix 'module.'"]),
    "a base model saved by a wrapper": (BASE, under("module."), {}, ["missing: 37 tensors", "prefix 'module.'"]),
    "a compiled model": (BASE, under("_orig_mod."), {}, ["prefix '_orig_mod.'"]),
    "a layer is missing": (BASE, without("layer.1."), {}, ["missing: 16 tensors (bert.encoder.layer.1.", "saved by save_pretrained"]),
    "more layers than the config has": (BASE, None, {"num_hidden_layers": 1}, ["there, and not used: 16 tensors (encoder.layer.1."]),
    "more layers than a language model's config has": (LANGUAGE, None, {"num_hidden_layers": 1}, ["there, and not used: 16 tensors (bert.encoder.layer.1."]),
    "another vocabulary (torchgeo#4036)": (BASE, None, {"vocab_size": 120}, ["of another shape: 1 tensor (bert.embeddings.word_embeddings.weight [99, 16], by config.json [120, 16])"]),
    "another width": (BASE, None, {"hidden_size": 32}, ["of another shape: 35 tensors (bert.embeddings.LayerNorm.bias [16], by config.json [32], "]),
    "another architecture (sam3#606)": (LANGUAGE, None, {"model_type": "distilbert"}, ["not those of the distilbert model", "missing: 36 tensors", "there, and not used: 42 tensors"]),
    "no embeddings": (BASE, without("word_embeddings"), {}, ["missing: 1 tensor (bert.embeddings.word_embeddings.weight)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_refused(case, tmp_path):
    saved, tensors, keys, parts = MISFITS[case]
    rewrite(folder_of(tmp_path, model_of("bert", saved)), tensors, **keys)
    with pytest.raises(ModelError) as e:
        model.load_classifier(tmp_path, ["a", "b"])
    assert str(e.value).startswith(f"the weights in {tmp_path} are not those of the ")
    assert [part for part in parts if part not in str(e.value)] == [], e.value


FITTING = {  # architecture, what was saved
    "base": ("bert", BASE), "language model without a pooler": ("bert", LANGUAGE), "older names": ("bert", BASE),
    "token classifier": ("bert", "AutoModelForTokenClassification"), "classifier": ("bert", "AutoModelForSequenceClassification"),
    "answers": ("bert", "AutoModelForQuestionAnswering"), "roberta": ("roberta", LANGUAGE), "electra": ("electra", LANGUAGE),
    "deberta": ("deberta-v2", LANGUAGE), "mpnet": ("mpnet", BASE), "gpt2": ("gpt2", "AutoModelForCausalLM"), "bart": ("bart", "AutoModelForSeq2SeqLM"),
    "t5": ("t5", "AutoModelForSeq2SeqLM"), "llama": ("llama", "AutoModelForCausalLM"), "fnet": ("fnet", "AutoModelForPreTraining"),
    "albert": ("albert", LANGUAGE), "modernbert": ("modernbert", LANGUAGE), "xlnet": ("xlnet", "AutoModelForCausalLM"),
}  # fmt: skip


@pytest.mark.parametrize("case", FITTING)
def test_only_a_head_is_new(case, tmp_path):
    "The base's tensors are those that were saved; the head, whatever it was before, has three classes"
    import torch

    kind, saved = FITTING[case]
    before = model_of(kind, saved)
    folder_of(tmp_path, before)
    if case == "older names":
        rewrite(tmp_path, lambda t: {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in t.items()})  # fmt: skip
    loaded = model.load_classifier(tmp_path, ["a", "b", "c"])
    assert loaded.config.num_labels == 3
    base = getattr(before, before.base_model_prefix, before).state_dict()
    found = loaded.base_model.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in base.items() if k in found and "pooler" not in k)
    assert len(base.keys() & found.keys()) >= 0.8 * len(base)


def test_in_a_trained_model_nothing_is_new(tmp_path):
    "What predicts: a head that is missing, or has another number of classes, would be random"
    model.save(model_of("bert", num_labels=3), tokenizer_of(), tmp_path)
    assert model.load_classifier(tmp_path).config.num_labels == 3
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damage, part in ((without("classifier"), "missing: 2 tensors (classifier.bias"), (without("pooler"), "missing: 2 tensors (bert.pooler")):  # fmt: skip
        rewrite(tmp_path, damage)
        with pytest.raises(ModelError, match="missing: 2 tensors") as e:
            model.load_classifier(tmp_path)
        assert part in str(e.value)
        (tmp_path / "model.safetensors").write_bytes(whole)
    rewrite(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ModelError):
        model.load_classifier(tmp_path)


def test_what_transformers_warns_of_is_not_lost():
    "Only lines that gpuml knows are left out; before, all were"
    import logging

    from transformers.utils import logging as hf

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines, kept, logger = [], Kept(), logging.getLogger("transformers.models.bert")
    hf.add_handler(kept)
    try:
        with model.quiet():
            logger.warning("BertModel LOAD REPORT from: x")
            logger.warning("something that nobody knows")
            logger.info("chatter")
        logger.warning("LOAD REPORT outside")
    finally:
        hf.remove_handler(kept)
    assert lines == ["something that nobody knows", "LOAD REPORT outside"]


def test_a_saved_model_can_be_read_by_others(tmp_path):
    "Every file has the mode that the umask gives, model.safetensors and a checkpoint's tensors as well"
    import torch

    from gpuml.training import checkpoint

    before = os.umask(0o027)
    try:
        model.save(model_of("bert"), tokenizer_of(), tmp_path / "model")
        (tmp_path / "checkpoints").mkdir()
        checkpoint.save(tmp_path / "checkpoints", 1, checkpoint.as_files({"x": torch.ones(1)}, {}))
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert set(modes.values()) == {0o640} and modes.keys() >= {"model.safetensors", "tensors.safetensors"}, modes


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 90864192\n"
PRETENDERS = {  # file, its content, what is said of it
    "weights are a pointer": ("model.safetensors", LFS, "is a Git LFS pointer in place of the file; fetch the file: git lfs pull"),
    "tokenizer is a pointer": ("tokenizer.json", LFS, "is a Git LFS pointer"),
    "vocabulary is a pointer": ("vocab.txt", LFS, "is a Git LFS pointer"),
    "weights are a page": ("model.safetensors", "\n<!DOCTYPE html><html><title>Sign in</title>", "is a web page, perhaps one that asks for a login"),
    "config is a page": ("config.json", "\ufeff<HTML>", "is a web page"),
    "weights are empty": ("model.safetensors", "", "is empty"),
    "config is no object": ("config.json", "[1]", "has no model_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", PRETENDERS)
def test_a_file_that_is_something_else(case, tmp_path):
    name, content, message = PRETENDERS[case]
    folder_of(tmp_path, model_of("bert"))
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError) as e:
        folder.check_folder(tmp_path, "./mine")
    assert str(e.value).startswith("model.name: ./mine: ") and f"{tmp_path / name} {message}" in str(e.value)


# ---- numbers in a folder


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_text_of_the_stated_length_goes_through(kind):
    "64 positions; in some architectures those up to the padding's index are never used"
    import torch

    classifier = model_of(kind)
    pad = 3 if kind.endswith("3") else 1
    limit = model.token_limit(classifier, tokenizer_of(pad))
    assert limit == {**LIMITS, "roberta with padding 3": 60}.get(kind, 64)
    ids = torch.full((1, min(limit, 100)), 7)
    ids[0, -1] = 2
    with torch.no_grad():
        assert classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


AHEAD = "camembert data2vec-text esm ibert longformer luke markuplm mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod"
LIMITS = dict.fromkeys(AHEAD.split(), 62) | dict.fromkeys(("bloom", "t5", "mt5", "xlnet", "funnel"), 2**31)

NUMBERS = {  # key in config.json or tokenizer_config.json, value: the limit, or what is said
    "none": ({}, {}, 64),
    "null": ({"max_position_embeddings": None}, {"model_max_length": None}, 2**31),
    "a float": ({"max_position_embeddings": 64.0}, {"model_max_length": 32.0}, 32),
    "as transformers writes none": ({}, {"model_max_length": 1000000000000000019884624838656}, 64),
    "-1": ({}, {"model_max_length": -1}, 64),
    "beyond all texts": ({"max_position_embeddings": 10**40}, {}, 2**31),
    "negative": ({}, {"model_max_length": -7}, "tokenizer_config.json: model_max_length: -7 is no whole number of 1 or more"),
    "zero": ({}, {"model_max_length": 0}, "tokenizer_config.json: model_max_length: 0 is no whole number"),
    "a fraction": ({}, {"model_max_length": 12.5}, "model_max_length: 12.5 is no whole number"),
    "a word": ({}, {"model_max_length": "512"}, "model_max_length: '512' is no whole number"),
    "true": ({}, {"model_max_length": True}, "model_max_length: True is no whole number"),
    "nothing is left": ({"max_position_embeddings": 3}, {}, "config.json: max_position_embeddings: leaves 3 tokens for a text"),
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_a_folder_are_checked(case, tmp_path):
    from types import SimpleNamespace

    config, tokenizer, expected = NUMBERS[case]
    measures = SimpleNamespace(**{"model_type": "bert", "max_position_embeddings": 64, **config})
    words = SimpleNamespace(**{"model_max_length": None, **tokenizer})
    if isinstance(expected, int):
        assert model.token_limit(measures, words) == expected
        return
    with pytest.raises(ModelError) as e:
        model.token_limit(measures, words)
    assert expected in str(e.value)


# ---- tokenizer and model


MIXED = {  # architecture, sizes, tokenizer, what is said
    "a token was added (transformers#12763)": ("bert", {}, dict(size=100), "its tokenizer has 1 token for which the model has no embedding: 'w95' is number 99, and its rows end at 98"),
    "another model's tokenizer": ("bert", {}, dict(size=500), "has 401 tokens for which the model has no embedding: 'w495' is number 499"),
    "a vocabulary with gaps": ("bert", {}, dict(pad=70_000), "has 1 token for which the model has no embedding: '<pad>' is number 70,000"),
    "positions start elsewhere (SELFormer#19)": ("roberta", {}, dict(pad=3), "the model's padding has id 1, the tokenizer's 3 ('<pad>')"),
    "mpnet starts at 2": ("mpnet", {"pad_token_id": 3}, dict(pad=3), "the model's padding has id 1, the tokenizer's 3"),
    "no padding to start from": ("roberta", {"pad_token_id": None}, {}, "pad_token_id: roberta counts positions from there, and no number stands there"),
    "absurd padding": ("roberta", {"pad_token_id": -3}, {}, "pad_token_id: -3 is no whole number of 0 or more"),
    "absurd vocabulary": ("bert", {"vocab_size": 0}, {}, "vocab_size: 0 is no whole number of 1 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_tokenizer_and_model_that_do_not_belong_together(case):
    from types import SimpleNamespace

    kind, sizes, tokenizer, message = MIXED[case]
    config = SimpleNamespace(**{"model_type": kind, **ARCHITECTURES[kind][1], **sizes})
    with pytest.raises(ModelError) as e:
        check_fit(config, tokenizer_of(**tokenizer), "./mine")
    assert message in str(e.value)


def test_a_special_token_that_no_text_has_needs_no_row():
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    check_fit(config_of("bert"), tokenizer, "./mine")
    check_fit(config_of("roberta with padding 3"), tokenizer_of(3), "./mine")
    check_fit(
        config_of("bert", vocab_size=120), tokenizer, "./mine"
    )  # rows that no token has: padded, as many models are


EMPTY = {  # files beside the weights: what transformers makes of them without a word
    "a vocabulary for another class": ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n", "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}'}, "bert", "its tokenizer knows no words: transformers made an empty RobertaTokenizer"),
    "no sentencepiece model": ({"vocab.txt": "[PAD]\n"}, "xlm-roberta", "its tokenizer knows no words: transformers made an empty XLMRobertaTokenizer"),
    "no spiece model": ({"vocab.txt": "[PAD]\n"}, "t5", "its tokenizer knows no words: transformers made an empty T5Tokenizer"),
    "no unknown token": ({"tokenizer.json": '{"version": "1.0", "added_tokens": [], "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"b": 0}}}'}, "bert", "can't be loaded: WordPiece error: Missing [UNK] token"),
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_a_tokenizer_without_its_files_is_refused(case, tmp_path):
    "Every text was the same three tokens, trained and certified"
    files, kind, message = EMPTY[case]
    model_of(kind).save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError) as e:
        check_fit(model.load_config(tmp_path), model.load_tokenizer(tmp_path), "./mine")
    assert message in str(e.value)


@pytest.mark.parametrize("settings,lowered", [({}, True), ({"do_lower_case": False}, False)])
def test_a_cased_vocabulary_that_is_read_in_lower_case(settings, lowered, tmp_path):
    "delft#144: without tokenizer_config.json no word with a capital is ever found"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "Berlin", "house", "##s", "is", "in", "a", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(words)}))
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    note = case_note(model.load_tokenizer(tmp_path))
    assert ("never finds the words of its vocabulary that have capitals, such as 'The'" in note) == lowered
    assert case_note(tokenizer_of()) == ""


def test_a_tensor_that_only_its_twin_holds(tmp_path):
    "transformers#38870: a file that keeps tied weights under the head's name left the embeddings random"
    folder_of(tmp_path, model_of("gpt2", "AutoModelForCausalLM"))
    rewrite(tmp_path, lambda t: {("lm_head.weight" if k == "transformer.wte.weight" else k): v for k, v in t.items()})
    with pytest.raises(ModelError) as e:
        model.load_classifier(tmp_path, ["a", "b"])
    assert "missing: 1 tensor (transformer.wte.weight); there, and not used: 1 tensor (lm_head.weight)" in str(e.value)


ORDERS = {  # the folder's classes; of three of ours, the rows that are the folder's
    "same order": (["a", "b", "c"], {"a": 0, "b": 1, "c": 2}),
    "another order": (["c", "a", "b"], {"a": 1, "b": 2, "c": 0}),
    "one is another": (["a", "x", "c"], {"a": 0, "c": 2}),
    "no names": (["LABEL_0", "LABEL_1", "LABEL_2"], {}),
    "another number": (["a", "b"], {}),
}


@pytest.mark.parametrize("kind", ["bert", "roberta", "bart", "xlnet", "gpt2", "distilbert"])
def test_rows_of_a_head_go_by_the_names_of_its_classes(tmp_path, kind):
    "optimum#197, transformers#10555: by number, what was learnt of one class would begin as another"
    for case, (classes, kept) in ORDERS.items():
        names = dict(id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)})
        before = model_of(kind, **names)
        folder = folder_of(tmp_path / case.replace(" ", "-"), before)
        first, again = (load_classifier(folder, ["a", "b", "c"]) for _ in (1, 2))
        (name, *_) = [n for n in class_tensors(before) if n.endswith("weight")]
        rows, learnt = first.get_parameter(name), before.get_parameter(name)
        for i, label in enumerate("abc"):
            same = [j for j in range(len(learnt)) if torch.equal(rows[i], learnt[j])]
            assert same == ([kept[label]] if label in kept else []), (case, label)
        assert first.config.id2label == {0: "a", 1: "b", 2: "c"} and again.config.num_labels == 3


def test_names_of_classes_go_by_their_numbers(tmp_path):
    "A config.json may have its keys in the order of the alphabet: 0, 1, 10, 11, 2"
    classes = [f"class {i}" for i in range(12)]
    before = model_of("bert", id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)})
    folder = folder_of(tmp_path / "model", before)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_classifier(folder, classes).classifier.weight, before.classifier.weight)


@pytest.mark.parametrize("kind", ["bert", "bart", "t5", "opt", "xlm", "esm", "longformer", "biogpt"])
def test_model_dropout_reaches_every_layer(tmp_path, kind):
    "Many architectures hand their dropout to a function, and have no module for it"
    folder, tokens = folder_of(tmp_path, model_of(kind)), torch.randint(5, 90, (3, 16))
    tokens[:, -1] = 2
    noise = []
    for dropout in (0.0, 0.5):
        classifier = load_classifier(folder, ["a", "b"], dropout).train()
        with torch.no_grad():
            first, second = (classifier(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits for _ in "12")
        noise.append((first - second).abs().max().item())
    assert noise[0] == 0 < noise[1]
