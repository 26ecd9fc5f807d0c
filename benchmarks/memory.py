"""Which models fit into which GPUs: calculated, not measured, and needs no GPU

    python -m benchmarks.memory

Each parameter takes 16 bytes: the weight, its gradient and AdamW's two averages, in float32. What a micro-batch takes is
counted: the model's own code runs with tensors that have a shape and no memory, in bf16 on packed rows, and what its
forward pass keeps for the backward pass is added up. What no count shows (fragments, libraries) is 3 % of a GPU and 1 GB.
"""

import math
import warnings

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.initialization import no_init_weights

from gpuml.training import memory

GPUS = (24, 40, 80, 141)  # GB
BYTES = 16  # of each parameter
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
LLAMA = dict(vocab_size=128_256, num_key_value_heads=8, **ENDS)
MODELS = {
    "MiniLM-L6": ("Bert", dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)),
    "DistilBERT": ("DistilBert", {}),
    "BERT-base": ("Bert", {}),
    "ModernBERT-base": ("ModernBert", {}),
    "BERT-large": ("Bert", LARGE),
    "ModernBERT-large": (
        "ModernBert",
        dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=2624),
    ),
    "XLM-R-large": ("XLMRoberta", {**LARGE, "vocab_size": 250_002, "max_position_embeddings": 514}),
    "Llama 3.2 1B": (
        "Llama",
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, **LLAMA),
    ),
    "Llama 3.2 3B": (
        "Llama",
        dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, **LLAMA),
    ),
    "Llama 3.1 8B": (
        "Llama",
        dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
    ),
}


def attend(module, query, key, value, mask, dropout=0.0, scaling=None, **options):
    "The shapes of FlashAttention on a row of texts"
    groups = query.shape[1] // key.shape[1]
    row = (x.repeat_interleave(n, 1)[0].transpose(0, 1) for x, n in ((query, 1), (key, groups), (value, groups)))
    starts = torch.zeros(33, dtype=torch.int32)
    flash = torch.ops.aten._flash_attention_forward
    return flash(*row, starts, starts, 512, 512, dropout, False, False, scale=scaling)[0][None], None


def model_of(name, sizes):
    "An encoder with weights that have no memory"
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = "counted"
    config.use_cache = False
    with no_init_weights():
        return getattr(transformers, f"{name}Model")(config).train()


def kept_bytes(model, tokens):
    "What a forward pass keeps for the backward pass, beside the weights"
    storages = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held: a number is not used again
        return tensor

    row = torch.zeros(1, tokens, dtype=torch.long)
    mask = {"full_attention": None, "sliding_attention": None} if model.config.model_type == "modernbert" else None
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=row, position_ids=row, attention_mask=mask)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


def trials(model):
    "What two sizes of micro-batches take"
    return [memory.Trial(tokens, kept_bytes(model, tokens)) for tokens in memory.SIZES]


def lean(model, usual):
    "What they take where activations are computed again: inputs of all layers, and twice all of the one at hand"
    layers = model.config.num_hidden_layers
    memory.recompute(model)
    return [memory.Trial(few.tokens, few.spent + 2 * many.spent // layers) for few, many in zip(trials(model), usual)]


def fitting(counted, parameters, gigabytes):
    "Tokens of a micro-batch that fit, or a dash"
    free = int(gigabytes * 0.97e9 - 1e9 - BYTES * parameters)
    per_token = (counted[1].spent - counted[0].spent) / (counted[1].tokens - counted[0].tokens)
    smallest = counted[0].spent - per_token * (counted[0].tokens - memory.FEWEST_TOKENS)
    return f"{memory.tokens_that_fit(counted, free):,}" if smallest <= 0.8 * free else "–"


def main():
    "Print the table"
    warnings.filterwarnings("ignore")
    AttentionInterface.register("counted", attend)
    AttentionMaskInterface.register("counted", lambda *arguments, **options: None)
    print("tokens of a micro-batch that fit: activations kept → computed again (calculated)")
    print(f"{'':18}{'parameters':>11}{'kB/token':>10}  " + "".join(f"{f'{gb} GB':>20}" for gb in GPUS))
    for name, (kind, sizes) in MODELS.items():
        with FakeTensorMode():
            model = model_of(kind, sizes)
            parameters = sum(p.numel() for p in model.parameters())
            usual = trials(model)
            again = lean(model, usual)
        per_token = (usual[1].spent - usual[0].spent) / (usual[1].tokens - usual[0].tokens) / 1000
        cells = (" → ".join(fitting(counted, parameters, gb) for counted in (usual, again)) for gb in GPUS)
        print(
            f"{name:18}{parameters / 1e6:9.0f} M{math.ceil(per_token):10,}  " + "".join(f"{cell:>20}" for cell in cells)
        )


if __name__ == "__main__":
    main()
