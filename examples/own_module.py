"""Compile a forward you wrote yourself: (input_ids, position_ids) -> logits, no cache anywhere. llmopt adds it."""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llmopt


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]"""
        batch, tokens, width = x.shape
        q, k, v = (
            t.view(batch, tokens, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class TinyLM(nn.Module):
    """A decoder with learned positions."""

    def __init__(self, vocab: int = 300, width: int = 64, layers: int = 3, context: int = 128) -> None:
        super().__init__()
        self.vocab_size, self.context_length = vocab, context
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """int64 [B, T] twice -> logits [B, T, vocab]"""
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


torch.manual_seed(0)
plain = TinyLM().eval()
compiled = llmopt.compile(plain, recipe=sys.argv[1] if len(sys.argv) > 1 else "default")
prompts = [[5, 6, 7, 8], [1, 2]]
made = compiled.generate(prompts, max_new_tokens=16)

for prompt, new in zip(prompts, made, strict=True):
    ids = list(prompt)
    for _ in range(16):  # the whole sequence again for every token: what a model without a cache has to do
        row = torch.tensor([ids])
        ids.append(int(plain(row, torch.arange(len(ids))[None])[0, -1].argmax()))
    print(new, "same as the plain forward:", new == ids[len(prompt) :])
