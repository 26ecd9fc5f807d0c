"Small classifiers of every architecture that takes texts in one row, and texts for them"

from typing import Any

import numpy as np
import torch

from gpuml.data.tokens import join
from gpuml.training import attention
from gpuml.training.architecture import CAUSAL, ENCODERS
from gpuml.training.row import Filling, Row, Shape, fill, shape_for

SIZES = dict(vocab_size=99, num_labels=3, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, initializer_range=0.3)  # attention matters with it
PLAIN = dict(intermediate_size=64, max_position_embeddings=64)
GROUPED = dict(PLAIN, num_key_value_heads=2, head_dim=8)
WINDOW = dict(GROUPED, sliding_window=4)
GPT = dict(n_inner=64, max_position_embeddings=64)
MORE = {  # architecture: its sizes, where they are not `PLAIN` or, if causal, `GROUPED`
    "distilbert": dict(hidden_dim=64, max_position_embeddings=64),
    "electra": dict(PLAIN, embedding_size=32),
    "modernbert": dict(PLAIN, local_attention=8, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=2),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": PLAIN,
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    "qwen2": dict(WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": dict(WINDOW, use_sliding_window=True, max_window_layers=1),
    **dict.fromkeys(("exaone4", "gemma3_text", "ministral", "mistral", "olmo3", "phi3", "starcoder2"), WINDOW),
}
WINDOWED = ("exaone4", "gemma3_text", "ministral", "mistral", "modernbert", "olmo3", "phi3", "qwen2", "qwen3", "starcoder2")  # fmt: skip
LENGTHS = (19, 9, 4, 4, 1)
KINDS = (*ENCODERS, *CAUSAL)


def classifier_of(kind: str, **more: Any) -> Any:
    "A small classifier with random weights, whose dropout is its architecture's default"
    from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

    set_seed(0)
    sizes = MORE.get(kind, GROUPED if kind in CAUSAL else PLAIN)
    config = AutoConfig.for_model(kind, **{**SIZES, **sizes, **more})
    return AutoModelForSequenceClassification.from_config(config).eval()


def batch(pad_id: int = 1, lengths: tuple[int, ...] = LENGTHS, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    "Ids and mask of texts with these lengths"
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    mask = mask if side == "right" else mask[:, ::-1].copy()
    ids = np.random.default_rng(0).integers(5, 99, mask.shape)
    return np.where(mask == 1, ids, pad_id), mask


def row_of(classifier: Any, ids: np.ndarray, mask: np.ndarray, empty: int = 2) -> tuple[Any, Any, Any]:
    "The batch's texts in a row; behind them padding in texts of its own, and texts of no length"
    lengths = mask.sum(1)
    tokens = join([(ids[mask == 1], lengths)])
    shape = shape_for(int(lengths.sum()), len(lengths), int(lengths.max()))
    shape = Shape(shape.tokens, shape.texts + empty)
    row = Row(shape, torch.empty(shape.bytes, dtype=torch.uint8))
    filling = Filling(classifier.config.pad_token_id, int(lengths.max()))
    fill(row, tokens, np.arange(len(lengths)), None, filling)
    return row.ids, row.positions, row.starts


def switch(classifier: Any, attend: Any = attention.attend) -> Any:
    "Attention for rows, without a trial"
    attention.register(attend)
    classifier.set_attn_implementation(attention.PACKED)
    return classifier
