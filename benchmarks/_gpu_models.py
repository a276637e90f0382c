"""What the GPU benchmarks run: model shapes, random weights, a plain module in gpt-fast's style, and fp64 logits.

The plain module is written for Inductor: q, k, v in one matrix, gate and up in one, a static cache that is written in
place, nothing that asks the host for a number. Its attention is torch's SDPA under a mask, FlexAttention, or two
batched products over groups of query heads. The fp64 logits come from the same two functions, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from llmopt.compiler.quant import quantize

ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_key_value_heads": 8, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-3.1-8b": (LlamaConfig, {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**ROPE, "factor": 8.0, "original_max_position_embeddings": 8192},
    }),
    "llama-3.2-1b": (LlamaConfig, {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},
    }),
    "qwen3-0.6b": (Qwen3Config, {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "tiny-llama": (LlamaConfig, {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    }),
    "tiny-qwen3": (Qwen3Config, {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip


def random_model(shape: str, device: str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """A model of this shape, matrices N(0, 0.02), norms 1 + N(0, 0.02), made where it runs."""
    make, settings = SHAPES[shape]
    config = make(**(settings if layers is None else {**settings, "num_hidden_layers": layers}))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    generator = torch.Generator(device).manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False).normal_(0.0, 0.02, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return model


class Layer(NamedTuple):
    """The tensors of a decoder layer: qkv [(Hq + 2 Hkv) D, E], out [E, Hq D], gate_up [2 I, E], down [E, I], norms."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Weights(NamedTuple):
    """A whole model's tensors, and what its computation needs beside them; fused matrices are copies."""

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor
    frequencies: Tensor  # radians a position, [D / 2]
    heads: tuple[int, int, int]  # query heads, key heads, channels
    eps: float


def plain_weights(model: PreTrainedModel) -> Weights:
    """The weights of a Llama or Qwen3 of transformers, with q, k, v and gate, up concatenated."""
    layers = []
    for layer in model.model.layers:
        at, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = (getattr(getattr(at, n, None), "weight", None) for n in ("q_norm", "k_norm"))
        qkv = torch.cat([p.weight for p in (at.q_proj, at.k_proj, at.v_proj)])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        layers.append(
            Layer(
                layer.input_layernorm.weight, qkv, at.o_proj.weight, q_norm, k_norm,
                layer.post_attention_layernorm.weight, gate_up, mlp.down_proj.weight,
            )
        )  # fmt: skip
    config = model.config
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return Weights(
        model.model.embed_tokens.weight, tuple(layers), model.model.norm.weight, model.lm_head.weight,
        model.model.rotary_emb.inv_freq, heads, config.rms_norm_eps,
    )  # fmt: skip


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis, in fp32 (fp64 for fp64)."""
    wide = x.to(_wide(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D] turned by halves; cos and sin [T, D / 2], wide."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def project(w: Layer, x: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], eps: float) -> list[Tensor]:
    """q [B, Hq, T, D], k and v [B, Hkv, T, D] of x [B, T, E], normed and turned."""
    hq, hkv, d = heads
    qkv = F.linear(rms_norm(x, w.norm, eps), w.qkv).unflatten(-1, (hq + 2 * hkv, d)).transpose(1, 2)
    q, k, v = qkv.split([hq, hkv, hkv], 1)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)
    return [rope(q, cos, sin), rope(k, cos, sin), v]


def finish(w: Layer, x: Tensor, attended: Tensor, eps: float) -> Tensor:
    """The rest of the layer: x [B, T, E], attended [B, Hq, T, D] -> [B, T, E]."""
    x = x + F.linear(attended.transpose(1, 2).flatten(2), w.out)
    gate, up = F.linear(rms_norm(x, w.mlp_norm, eps), w.gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w.down)


class Plain(nn.Module):
    """Decoder with a static cache [B, Hkv, S, D] a layer; `attention` is sdpa, flex or grouped (single tokens only).

    `step` needs no input: the token [B, 1] and its position [1] are buffers, and it leaves the next ones there.
    """

    def __init__(self, weights: Weights, batch: int, cache_length: int, attention: str = "sdpa") -> None:
        super().__init__()
        self.w, self.attention, self.length = weights, attention, cache_length
        _, hkv, d = weights.heads
        like = weights.embedding
        for i, layer in enumerate(weights.layers):
            for name, tensor in layer._asdict().items():
                self._hold(f"{name}_{i}", tensor)
            for name in ("k", "v"):
                self._hold(f"{name}_cache_{i}", like.new_zeros(batch, hkv, cache_length, d))
        for name in ("embedding", "norm", "head"):
            self._hold(name, getattr(weights, name))
        angles = torch.arange(cache_length, device=like.device)[:, None].double() * weights.frequencies.double()
        self._hold("cos", angles.cos().to(_wide(like.dtype)))
        self._hold("sin", angles.sin().to(_wide(like.dtype)))
        self._hold("token", torch.zeros(batch, 1, dtype=torch.int64, device=like.device))
        self._hold("position", torch.zeros(1, dtype=torch.int64, device=like.device))

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)  # buffers keep their address, which CUDA graphs rely on

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] after the last of ids [B, T] at positions [T], which the cache then holds.

        Several tokens are a prompt: positions 0..T-1, and attention over themselves. One token looks at the cache.
        """
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[positions], self.sin[positions]
        mask = torch.arange(self.length, device=ids.device) <= positions[:, None]
        for i in range(len(self.w.layers)):
            w = Layer(*(getattr(self, f"{name}_{i}") for name in Layer._fields))
            q, k, v = project(w, x, cos, sin, self.w.heads, self.w.eps)
            keys, values = getattr(self, f"k_cache_{i}"), getattr(self, f"v_cache_{i}")
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            if ids.shape[1] > 1:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                attended = self._attend(q, keys, values, mask, positions)
            x = finish(w, x, attended, self.w.eps)
        return F.linear(rms_norm(x[:, -1], self.norm, self.w.eps), self.head)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        if self.attention == "flex":
            return _flex(q, k, v, positions)
        if self.attention == "grouped":
            return _grouped(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def step(self) -> Tensor:
        """One token of each sequence in, the most likely next one out; logits [B, V]."""
        logits = self(self.token, self.position)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits


def _flex(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def seen(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j <= positions[i], score, -float("inf"))

    return flex_attention(q, k, v, score_mod=seen, enable_gqa=True)  # type: ignore[return-value]


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Query heads of one key head as the rows of a product, so that the cache is read once."""
    b, hq, t, d = q.shape
    grouped = q.reshape(b, k.shape[1], hq // k.shape[1] * t, d)
    scores = (grouped @ k.transpose(2, 3)).to(_wide(q.dtype)) * d**-0.5
    weights = scores.masked_fill(~mask, -float("inf")).softmax(-1).to(q.dtype)
    return (weights @ v).view(b, hq, t, d)


@torch.no_grad()
def reference_logits(weights: Weights, ids: Tensor) -> Tensor:
    """fp64 logits [B, V] after the last of ids [B, T]: no cache, one layer in fp64 at a time."""
    dtype = torch.float64
    angles = torch.arange(ids.shape[1], device=ids.device)[:, None].double() * weights.frequencies.double()
    cos, sin = angles.cos(), angles.sin()
    states = [F.embedding(row[None], weights.embedding).to(dtype) for row in ids]
    for layer in weights.layers:
        wide = Layer(*(None if t is None else t.to(dtype) for t in layer))
        for i, x in enumerate(states):
            q, k, v = project(wide, x, cos, sin, weights.heads, weights.eps)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            states[i] = finish(wide, x, attended, weights.eps)
    last = torch.cat([x[:, -1] for x in states])
    return F.linear(rms_norm(last, weights.norm.to(dtype), weights.eps), weights.head.to(dtype))


class Rounded(Sequence[Layer]):
    """Layers with the matrices of a model in a low-bit scheme, dequantised (fp32) when a layer is asked for."""

    def __init__(self, layers: Sequence[Layer], scheme: str, scale: str) -> None:
        self.layers, self.scheme, self.scale = layers, scheme, scale

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, at: Any) -> Any:
        layer = self.layers[at]
        names = ("qkv", "out", "gate_up", "down")
        return layer._replace(**{n: quantize(getattr(layer, n), self.scheme, self.scale).dequantize() for n in names})


def step_bytes(weights: Weights, batch: int, context: int) -> int:
    """Bytes that a decoding step must read: every matrix once (of the embedding, rows only), K and V of `context`."""
    layers = sum(t.nbytes for layer in weights.layers for t in layer if t is not None)
    _, hkv, d = weights.heads
    cached = 2 * len(weights.layers) * hkv * d * weights.embedding.element_size()
    return layers + weights.norm.nbytes + weights.head.nbytes + batch * context * cached
