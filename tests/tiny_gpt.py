"""A GPT written from scratch, with tied embeddings and learned positions; only the process that compiles it has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

VOCAB, CONTEXT, HEADS, DIM, LAYERS = 61, 48, 4, 32, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.behind = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, DIM))
        return x + self.down(gelu(self.up(self.behind(x))))


class TinyGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.vocab_size, self.context_length = VOCAB, CONTEXT
        self.tokens, self.places = nn.Embedding(VOCAB, DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tiny_gpt() -> TinyGPT:
    """The same random weights in every process, drawn wide so that logits differ clearly."""
    torch.manual_seed(5)
    model = TinyGPT().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4)
    return model
