"A BERT of two small layers with random weights and a vocabulary of some words: what a test asks of it does not depend on the model"

import json
import string
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WORDS = {"billing": "invoice card charged twice refund price", "delivery": "parcel courier late tracking box door"}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = string.ascii_lowercase + string.digits
WIDTH, INNER, LAYERS, LENGTH = 32, 64, 2, 512


def vocabulary() -> list[str]:
    "Special tokens, letters and signs, alone and inside words, and the words of the tests' rows"
    words = [*" ".join(WORDS.values()).split(), "the", "my", "is", "not", "where", "again", "when"]
    return [*SPECIAL, *LETTERS, *string.punctuation, *(f"##{letter}" for letter in LETTERS), *words]


def tokenizer() -> dict:
    "tokenizer.json, as BERT's"
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    single = [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **plain} for i, name in enumerate(SPECIAL)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *second],
            "special_tokens": {
                name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(vocabulary())},
        },
    }


def weights() -> dict[str, np.ndarray]:
    "What training begins with, drawn as transformers draws it"
    draw = np.random.default_rng(0)
    made = {}

    def matrix(name: str, *shape: int) -> None:
        made[f"{name}.weight"] = draw.normal(0, 0.02, shape).astype(np.float32)

    def dense(name: str, inputs: int, outputs: int) -> None:
        matrix(name, outputs, inputs)
        made[f"{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name: str) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)

    for name, count in (("word", len(vocabulary())), ("position", LENGTH), ("token_type", 2)):
        matrix(f"bert.embeddings.{name}_embeddings", count, WIDTH)
    norm("bert.embeddings.LayerNorm")
    for layer in (f"bert.encoder.layer.{i}" for i in range(LAYERS)):
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", WIDTH, WIDTH)
        dense(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", WIDTH, INNER)
        dense(f"{layer}.output.dense", INNER, WIDTH)
        norm(f"{layer}.output.LayerNorm")
    dense("bert.pooler.dense", WIDTH, WIDTH)
    dense("classifier", WIDTH, 2)
    return made


def make_tiny(folder: Path) -> Path:
    "The model's folder, as transformers saves one; nothing heavy is imported for it"
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": len(vocabulary()),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
    }
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": LENGTH, **names}
    for name, content in (("config", config), ("tokenizer", tokenizer()), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
