"Tiny models of many architectures with random weights, and tokenizers for them"

from pathlib import Path
from typing import Any

S = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    vocab_size=99,
)
P = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=99)
SEQ2SEQ = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, vocab_size=99, **P,
)  # fmt: skip
T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=99, decoder_start_token_id=1, **P)
CAUSAL = {**S, **P, "num_key_value_heads": 2}

ARCHITECTURES = {  # name: class of its config, its sizes
    "albert": ("Albert", {**S, "embedding_size": 16}),
    "bart": ("Bart", SEQ2SEQ),
    "bert": ("Bert", S),
    "big_bird": ("BigBird", {**S, **P, "attention_type": "original_full"}),
    "biogpt": ("BioGpt", {**S, **P}),
    "bloom": ("Bloom", dict(hidden_size=16, n_layer=2, n_head=2, vocab_size=99)),
    "camembert": ("Camembert", {**S, **P}),
    "convbert": ("ConvBert", {**S, "embedding_size": 16, "num_attention_heads": 4, "head_ratio": 2}),
    "ctrl": ("CTRL", {**GPT, "dff": 32}),
    "data2vec-text": ("Data2VecText", {**S, **P}),
    "deberta": ("Deberta", S),
    "deberta-v2": ("DebertaV2", {**S, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}),
    "distilbert": ("DistilBert", dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, vocab_size=99)),
    "electra": ("Electra", {**S, "embedding_size": 16}),
    "ernie": ("Ernie", S),
    "esm": ("Esm", {**S, **P, "mask_token_id": 5, "position_embedding_type": "absolute"}),
    "esm-rotary": ("Esm", {**S, **P, "mask_token_id": 5, "position_embedding_type": "rotary"}),
    "flaubert": ("Flaubert", dict(emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=64, vocab_size=99, pad_index=1)),
    "fnet": ("FNet", S),
    "funnel": ("Funnel", dict(block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=32, vocab_size=99)),
    "gpt2": ("GPT2", {**GPT, "bos_token_id": 2, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoX", {**S, **P}),
    "ibert": ("IBert", {**S, **P}),
    "layoutlm": ("LayoutLM", S),
    "llama": ("Llama", CAUSAL),
    "longformer": ("Longformer", {**S, **P, "attention_window": 4}),
    "luke": ("Luke", {**S, **P, "entity_vocab_size": 9, "entity_emb_size": 8}),
    "markuplm": ("MarkupLM", {**S, **P, "max_xpath_tag_unit_embeddings": 8, "max_xpath_subs_unit_embeddings": 8, "tag_pad_id": 2, "subs_pad_id": 2, "xpath_unit_hidden_size": 4, "max_depth": 4}),
    "mbart": ("MBart", SEQ2SEQ),
    "megatron-bert": ("MegatronBert", S),
    "mistral": ("Mistral", CAUSAL),
    "mobilebert": ("MobileBert", {**S, **P, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "modernbert": ("ModernBert", {**S, **P, "cls_token_id": 0, "sep_token_id": 2}),
    "mpnet": ("MPNet", {**S, **P}),
    "mpt": ("Mpt", dict(d_model=16, n_heads=2, n_layers=2, vocab_size=99, max_seq_len=64)),
    "mt5": ("MT5", T5),
    "nystromformer": ("Nystromformer", {**S, **P, "num_landmarks": 4, "segment_means_seq_len": 64}),
    "openai-gpt": ("OpenAIGPT", GPT),
    "opt": ("OPT", dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, max_position_embeddings=64, vocab_size=99, word_embed_proj_dim=16, **P)),
    "plbart": ("PLBart", SEQ2SEQ),
    "qwen2": ("Qwen2", CAUSAL),
    "reformer": ("Reformer", dict(hidden_size=16, vocab_size=99, num_attention_heads=2, attention_head_size=8, feed_forward_size=32, attn_layers=["local"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[8, 8], max_position_embeddings=64, local_attn_chunk_length=4, is_decoder=False)),
    "rembert": ("RemBert", {**S, "input_embedding_size": 16, "output_embedding_size": 16}),
    "roberta": ("Roberta", {**S, **P}),
    "roberta with padding 3": ("Roberta", {**S, **P, "pad_token_id": 3}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {**S, **P}),
    "roformer": ("RoFormer", {**S, "embedding_size": 16}),
    "squeezebert": ("SqueezeBert", {**S, "embedding_size": 16}),
    "t5": ("T5", T5),
    "xlm": ("XLM", dict(emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=64, vocab_size=99, pad_index=1)),
    "xlm-roberta": ("XLMRoberta", {**S, **P}),
    "xlm-roberta-xl": ("XLMRobertaXL", {**S, **P}),
    "xlnet": ("XLNet", dict(d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=99, pad_token_id=1)),
    "xmod": ("Xmod", {**S, **P, "languages": ["en_XX"], "default_language": "en_XX"}),
    "yoso": ("Yoso", {**S, **P}),
}  # fmt: skip


def config_of(kind: str, **more: Any) -> Any:
    "A tiny model's config"
    import transformers

    name, sizes = ARCHITECTURES[kind]
    return getattr(transformers, f"{name}Config")(**{**sizes, **more})


def model_of(kind: str, auto: str = "AutoModelForSequenceClassification", **more: Any) -> Any:
    "A tiny model with the random weights of seed 0, in evaluation mode"
    import transformers

    transformers.set_seed(0)
    return getattr(transformers, auto).from_config(config_of(kind, **more)).eval()


def tokenizer_of(pad: int = 1, size: int = 99, side: str = "right", **more: Any) -> Any:
    "A tokenizer of words: `<s>` 0, `</s>` 2, the padding where it is wanted, and the words w0, w1, … up to `size` ids"
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<s>": 0, "</s>": 2, "<pad>": pad, "<unk>": 4}
    free = [i for i in range(size) if i not in special.values()]
    words = {f"w{n}": i for n, i in enumerate(free)}
    inner = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(
        bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=side, **{**names, **more})


def folder_of(at: Path, model: Any, tokenizer: Any = None) -> Path:
    "A model's folder as transformers saves it"
    model.save_pretrained(at)
    (tokenizer or tokenizer_of()).save_pretrained(at)
    return at
