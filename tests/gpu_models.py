"""Tiny models with random weights, large enough that greedy tokens are no matter of rounding."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

VOCAB, CONTEXT = 128, 256
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def tiny(kind, dtype=torch.float32, **changes):
    """A model of this kind on the CPU."""
    torch.manual_seed(1)
    config = CONFIGS[kind](**{**_COMMON, "tie_word_embeddings": kind == "qwen3", **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def ragged(*lengths):
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]
