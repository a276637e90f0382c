"""Model families that must compile and give transformers' own tokens, each as a small random model.

Sizes are as small as the feature under test allows; windows are shorter than the prompts, so that a window which is
ignored shows. `markdown()` is the table of supported models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 160
WINDOW = 7
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA = {"rms_norm": 5, "rope": 4, "attention": 2, "gated": 2}


@dataclass(frozen=True)
class Family:
    """A model type with the options that matter, and what raising must find in it.

    `counts` are calls in the raised forward graph (softcap: on logits; that of attention is an argument of it);
    `windows`, `softcap`, `sinks` describe its attention calls, one window a layer (None: 0 in each). `alter` edits the
    random model before use; a model so edited is compiled as it is, others from the folder they were saved to.
    `embedding` scales the token embeddings: where they are tied, large ones make a random model repeat its input.
    """

    name: str
    model_type: str
    features: str
    counts: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    windows: tuple[int, ...] | None = None
    softcap: float = 0.0
    sinks: bool = False
    alter: Callable[[PreTrainedModel], None] | None = None
    embedding: float = 0.3

    def model(self, seed: int = 0) -> PreTrainedModel:
        """The random model in fp32, its biases and norm weights random as well."""
        options = {k: v for k, v in {**SMALL, **self.options}.items() if k not in self.drop}
        config = CONFIG_MAPPING[self.model_type](**options)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        if self.alter is not None:
            self.alter(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            model.get_input_embeddings().weight.mul_(self.embedding)
        model.generation_config.eos_token_id = None
        return model.eval()

    def attention_windows(self) -> tuple[int, ...]:
        """The window of each attention call, in order."""
        return self.windows if self.windows is not None else (0,) * self.counts["attention"]


class DenseMLP(nn.Module):
    """What stands in for a mixture of experts: the same interface, one dense layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 96), nn.Linear(96, hidden)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=0.2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [B, T, hidden] -> ([B, T, hidden], router scores that nobody reads)."""
        return self.down(nn.functional.relu(self.up(x))), None


def without_experts(model: PreTrainedModel) -> None:
    """Replace the experts of a GPT-OSS model, and give its sinks weight."""
    for layer in model.model.layers:
        layer.mlp = DenseMLP(model.config.hidden_size)
        with torch.no_grad():
            layer.self_attn.sinks.copy_(2 * torch.randn_like(layer.self_attn.sinks))


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_TWO_BASES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    }
}
_LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_NO_GQA = ("num_key_value_heads",)

FAMILIES = (
    Family("Llama", "llama", "RMSNorm, RoPE, GQA, SwiGLU", LLAMA),
    Family("Llama, tied", "llama", "tied embeddings, biases", LLAMA,
           {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    Family("Llama 3.1", "llama", "RoPE scaled by parts (llama3)", LLAMA, _LLAMA3),
    Family("Llama, linear", "llama", "RoPE scaled linearly", LLAMA, _rope("linear", factor=3.0)),
    Family("Llama, YaRN", "llama", "RoPE scaled by YaRN", LLAMA,
           _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    Family("Qwen2", "qwen2", "biases on q, k, v", LLAMA),
    Family("Qwen3", "qwen3", "RMSNorm on q and k, own head size", {**LLAMA, "rms_norm": 9}, {"head_dim": 24}),
    Family("Mistral", "mistral", "sliding window", LLAMA, {"sliding_window": WINDOW}, windows=(WINDOW, WINDOW)),
    Family("Gemma", "gemma", "RMSNorm with 1 + w, scaled embeddings, GeGLU", LLAMA, {"head_dim": 16}),
    Family("Gemma 2", "gemma2", "soft-caps on scores and logits, norms before and after, local and global layers",
           {"rms_norm": 17, "rope": 8, "attention": 4, "gated": 4, "softcap": 1},
           {**_LOCAL_GLOBAL, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
           windows=(WINDOW, 0, WINDOW, 0), softcap=3.0, embedding=0.05),
    Family("Gemma 3", "gemma3_text", "local and global layers with two RoPE bases, RMSNorm on q and k",
           {"rms_norm": 25, "rope": 8, "attention": 4, "gated": 4},
           {**_LOCAL_GLOBAL, **_TWO_BASES, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW},
           windows=(WINDOW, 0, WINDOW, 0), embedding=0.05),
    Family("Phi-3", "phi3", "fused q/k/v and gate/up", LLAMA, {"pad_token_id": 0}),
    Family("Phi-4-mini", "phi3", "fused q/k/v, RoPE on part of each head, sliding window", LLAMA,
           {"pad_token_id": 0, "sliding_window": WINDOW,
            **_rope("default", partial_rotary_factor=0.5)}, windows=(WINDOW, WINDOW)),
    Family("Phi-2", "phi", "LayerNorm, parallel residual, RoPE on part of each head",
           {"rope": 4, "attention": 2}, {**_rope("default", partial_rotary_factor=0.5)}),
    Family("GPT-NeoX", "gpt_neox", "parallel residual, fused q/k/v, RoPE on part of each head",
           {"rope": 4, "attention": 2}, {**_rope("default", partial_rotary_factor=0.25)}, drop=_NO_GQA),
    Family("GPT-2", "gpt2", "Conv1D, learned positions, LayerNorm", {"attention": 2, "linear": 9}, {"n_inner": 96},
           drop=("num_key_value_heads", "intermediate_size")),
    Family("GPT-OSS, dense", "gpt_oss", "attention sinks, sliding and full layers, YaRN (its experts replaced)",
           {"rms_norm": 9, "rope": 8, "attention": 4},
           {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 2,
            "num_experts_per_tok": 1, **_rope("yarn", factor=4.0, original_max_position_embeddings=64,
                                              beta_fast=32.0, beta_slow=1.0, truncate=False)},
           windows=(WINDOW, 0, WINDOW, 0), sinks=True, alter=without_experts),
    Family("OLMo", "olmo", "LayerNorm without weights, clipped q, k, v", {"rope": 4, "attention": 2, "gated": 2},
           {"clip_qkv": 1.5, "pad_token_id": 1}),
    Family("OLMo 2", "olmo2", "norms after each block, RMSNorm on all of q and k", {**LLAMA, "rms_norm": 9},
           {"pad_token_id": 1}),
    Family("OLMo 3", "olmo3", "as OLMo 2, local and global layers", {**LLAMA, "rms_norm": 17, "rope": 8,
           "attention": 4, "gated": 4}, {**_LOCAL_GLOBAL, "sliding_window": WINDOW, "pad_token_id": 1},
           windows=(WINDOW, 0, WINDOW, 0)),
    Family("Granite", "granite", "multipliers on embeddings, residuals, attention and logits", LLAMA,
           {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2,
            "logits_scaling": 2.0}),
    Family("Cohere", "cohere", "interleaved RoPE (kept in aten), parallel residual, scaled logits",
           {"attention": 2, "gated": 2}, {"logit_scale": 0.3, "pad_token_id": 0, "use_qk_norm": True}),
    Family("Cohere 2", "cohere2", "layers with a window and RoPE, layers with neither", {"attention": 4, "gated": 4},
           {**_LOCAL_GLOBAL, "logit_scale": 0.3, "pad_token_id": 0, "sliding_window": WINDOW, "head_dim": 16},
           windows=(WINDOW, 0, WINDOW, 0)),
    Family("StableLM", "stablelm", "LayerNorm, RoPE on part of each head", {"rope": 4, "attention": 2, "gated": 2},
           {"use_qkv_bias": True, **_rope("default", partial_rotary_factor=0.5)}),
    Family("SmolLM3", "smollm3", "some layers without positions",
           {"rms_norm": 9, "rope": 4, "attention": 4, "gated": 4},
           {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": 0}),
    Family("StarCoder2", "starcoder2", "LayerNorm, biases, sliding window", {"rope": 4, "attention": 2},
           {"sliding_window": WINDOW}, windows=(WINDOW, WINDOW)),
    Family("GLM-4", "glm4", "interleaved RoPE on part of each head (kept in aten), fused gate/up, four norms a layer",
           {"rms_norm": 9, "attention": 2, "gated": 2}, {"head_dim": 16, "pad_token_id": 0}),
    Family("Nemotron", "nemotron", "LayerNorm with 1 + w, squared ReLU", {"rope": 4, "attention": 2}),
    Family("OPT", "opt", "learned positions with an offset, ReLU", {"attention": 2},
           {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}, drop=_NO_GQA),
    Family("GPT-J", "gptj", "interleaved RoPE from a table (kept in aten), parallel residual", {"attention": 2},
           {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
           drop=("num_key_value_heads", "intermediate_size")),
    Family("Falcon", "falcon", "one key/value head, parallel residual, RoPE", {"rope": 4, "attention": 2},
           {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
           drop=_NO_GQA),
)  # fmt: skip


def markdown() -> str:
    """The families as a Markdown table, one row each."""
    lines = ["| model | what it has | raised to ops, of which attention |", "|---|---|---|"]
    for family in FAMILIES:
        raised = ", ".join(f"{name} {count}" for name, count in sorted(family.counts.items()))
        lines.append(f"| {family.name} | {family.features} | {raised} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
