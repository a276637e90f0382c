"""A GPT written from scratch, in the spellings people use: three of attention, two of positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, CONTEXT = 96, 64, 4, 128


class Attention(nn.Module):
    """Causal self-attention; `spelling` is `flag`, `mask` or `written`."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, WIDTH] -> [B, T, WIDTH]."""
        b, t, c = x.shape
        q, k, v = self.qkv(x).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        if self.spelling == "flag":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.spelling == "mask":
            mask = torch.tril(torch.ones(t, t, dtype=torch.bool, device=x.device))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.tril[:, :, :t, :t] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(spelling)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, WIDTH] -> [B, T, WIDTH]."""
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Learned positions, looked up by position_ids or (`counts`) by the model's own torch.arange."""

    def __init__(self, spelling: str = "flag", counts: bool = False) -> None:
        super().__init__()
        self.counts = counts
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(spelling) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """input_ids, position_ids [B, T] -> logits [B, T, VOCAB]."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device) if self.counts else position_ids
        x = self.tokens(input_ids) + self.places(at)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights large enough that its outputs vary, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """`count` tokens by running the plain forward over the whole sequence each time."""
    ids = list(prompt)
    for _ in range(count):
        row = torch.tensor([ids])
        ids.append(int(model(row, torch.arange(len(ids))[None])[0, -1].argmax()))
    return ids[len(prompt) :]
