"Special tokens that are spelt in texts are text: in training, in predict, and for who loads the model elsewhere"

import json

import numpy as np
import pytest

from gpuml.data.encoder import describe_tokenizer, encoder, tokenise
from gpuml.training import model
from tests.models import folder_of, model_of, tokenizer_of

CORPUS = ["the quick brown fox jumps over the lazy dog <b>strike</s> out / s [SEP] endoftext </s> pad mask"] * 20
SPELT = [
    "a</s>b <|endoftext|> [SEP] x",
    "</s>",
    "<pad> </s> </s> <unk>",
    "[CLS] [MASK] dog",
    "<s>struck</s> out<|endoftext|>",
]


def trained(kind):
    "A small tokenizer of the kind, and the ids that it puts around a text"
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]")  # fmt: skip
    special = [*names.values(), "<|endoftext|>", "<s>"]
    inner, trainer, cut = {
        "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>"), pre_tokenizers.Metaspace()),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=200, special_tokens=special), pre_tokenizers.WhitespaceSplit()),
        "words": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(special_tokens=special), pre_tokenizers.WhitespaceSplit()),
        "bytes": (models.BPE(), trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False), pre_tokenizers.ByteLevel()),
        "whole words first": (models.BPE(ignore_merges=True), trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    }[kind]  # fmt: skip
    tokenizer = Tokenizer(inner)
    tokenizer.pre_tokenizer = cut
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    more = dict(additional_special_tokens=["<|endoftext|>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **more), end


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "words", "bytes", "whole words first"])
def test_no_text_spells_a_special_token(kind):
    "One `</s>`, at the end, and no other special token but the unknown one; PiPPy#308, adapters#563"
    tokenizer, end = trained(kind)
    tokens = tokenise([*SPELT, "the quick fox"], tokenizer, 64)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for i, text in enumerate(SPELT):
        ids = tokens.ids(np.array([i])).tolist()
        assert ids[-1] == end and not special & set(ids[:-1]), (text, tokenizer.convert_ids_to_tokens(ids))
        assert len(ids) > 1
    usual = tokens.ids(np.array([len(SPELT)])).tolist()
    assert usual == tokenizer("the quick fox")["input_ids"]  # what has no special token is as it was


def test_words_that_were_added_and_are_not_special_are_still_found():
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["brand-name"])
    tokens = tokenise(["w1 brand-name </s>"], tokenizer, 64)
    assert tokens.ids(np.array([0])).tolist() == [0, *tokenizer.convert_tokens_to_ids(["w1", "brand-name"]), 4, 2]


def test_tokenizer_without_fast_code(tmp_path):
    "Esm's looks up whole words: a mask in the letters of a protein was the mask"
    from transformers import EsmTokenizer

    class Slow(EsmTokenizer):
        backend_tokenizer = None

    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "A", "G", "<mask>"]))
    tokens = tokenise(["A G <mask> A", "<eos>", "G"], Slow(str(tmp_path / "vocab.txt")), 64)
    assert [tokens.ids(np.array([i])).tolist() for i in range(3)] == [[0, 4, 5, 3, 4, 2], [0, 3, 2], [0, 5, 2]]


def test_settings_of_a_tokenizer_without_fast_code_name_its_tokens(tmp_path):
    "Tokens that were kept with another do_lower_case are not taken for those of this one"
    from transformers import ProphetNetTokenizer

    (tmp_path / "words").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[X_SEP]", "hello", "Hello"])
    )
    lower, cased = (ProphetNetTokenizer(str(tmp_path / "words"), do_lower_case=lowers) for lowers in (True, False))
    assert lower.get_vocab() == cased.get_vocab() and lower("Hello") != cased("Hello")
    assert describe_tokenizer(lower) != describe_tokenizer(cased)
    for place in ("here", "elsewhere"):
        lower.save_pretrained(tmp_path / place)
    here, elsewhere = (ProphetNetTokenizer.from_pretrained(tmp_path / place) for place in ("here", "elsewhere"))
    assert describe_tokenizer(here) == describe_tokenizer(elsewhere)


@pytest.mark.parametrize("pad,dtype", [(1, np.uint16), (65_535, np.uint16), (70_000, np.uint32)])
def test_vocabulary_with_gaps(pad, dtype):
    "A hundred tokens, one of them far out: what counts is the largest id"
    tokenizer = tokenizer_of()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner["model"]["vocab"]["far"] = pad + (pad == 1) * 110
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(inner)), pad_token="<pad>")
    tokens = tokenise(["w1 far"], tokenizer, 64)
    assert encoder(tokenizer, 64).dtype == dtype
    assert tokens.ids(np.array([0])).tolist()[2] == tokenizer.convert_tokens_to_ids("far")


def test_others_read_the_saved_tokenizer_the_same_way(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = model.load_tokenizer(folder_of(tmp_path / "base", model_of("bert")))
    model.save(model_of("bert"), tokenizer, tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").split_special_tokens
