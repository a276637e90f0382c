"""Caches, hooks and launches for `gpu_attention.py`, in the shapes of Llama-3.1-8B."""
# ruff: noqa: ANN001, ANN202 (Triton gives the parameters of kernels their meaning)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmopt.codegen.fused_attention import TORCH_TOKENS
from llmopt.codegen.templates import decode_attention as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.compiler.ops.attention import attend
from llmopt.runtime.attend import StepLayout
from llmopt.runtime.attend import attend as attend_whole

HQ, HKV, D = 32, 8, 128
WIDTH = (HQ + 2 * HKV) * D
SHAPE = {"HQ": HQ, "HKV": HKV, "D": D, "DV": D}


@triton.jit
def _rope(qkv, cos, sin, at, n, d, ok, D: tl.constexpr):
    x = tl.load(qkv + at + d, mask=ok, other=0.0).to(tl.float32)
    other = tl.load(qkv + at + (d + D // 2) % D, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(cos + n * D + d, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(sin + n * D + d, mask=ok, other=0.0).to(tl.float32)
    return x * c + tl.where(d < D // 2, -other, other) * s


@triton.jit
def load_q(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """Query of qkv [N, 48 * 128] in e0, rotated by cos and sin [N, 128] in e1 and e2."""
    return _rope(e0, e1, e2, n * 6144 + h * 128, n, d, ok, 128)


@triton.jit
def load_k(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """Key, rotated."""
    return _rope(e0, e1, e2, n * 6144 + 4096 + h * 128, n, d, ok, 128)


@triton.jit
def load_v(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """Value."""
    return tl.load(e0 + n * 6144 + 5120 + h * 128 + d, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def read(x, y, STEPS, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * STEPS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(STEPS):
        total ^= tl.load(x + at)
        at += BLOCK
    if tl.max(total) == 123456789:
        tl.store(y, 1)


class Decode:
    """`layers` caches of `batch` sequences that hold context - 1 tokens each, and one new token a sequence."""

    def __init__(self, batch: int, context: int, page: int, layers: int = 1, seed: int = 0) -> None:
        make = torch.Generator("cuda").manual_seed(seed)
        self.batch, self.context, self.page = batch, context, page
        width = -(-context // page)
        pages = batch * width + 1
        self.tables = (torch.randperm(pages - 1, generator=make, device="cuda") + 1).view(batch, width)
        shape = (pages, HKV, page, D)
        self.k, self.v = (
            [torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
            for _ in "kv"
        )
        self.qkv = torch.randn(batch, WIDTH, generator=make, device="cuda", dtype=torch.bfloat16)
        angle = torch.randn(batch, D // 2, generator=make, device="cuda").repeat(1, 2)
        self.cos, self.sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        self.positions = torch.full((batch,), context - 1, device="cuda")
        self.slots = self.tables[:, -1] * page + (context - 1) % page
        self.out = torch.zeros(batch, HQ * D, device="cuda", dtype=torch.bfloat16)
        self.tickets = torch.zeros(batch * HKV, device="cuda", dtype=torch.int32)
        self.partial = self.lse = torch.empty(0, device="cuda")

    @property
    def bytes(self) -> int:
        """Of keys and values, read once."""
        return 2 * self.batch * self.context * HKV * D * 2

    def launch(self, config: dict[str, Any], splits: int, layer: int = 0, pdl: bool = True) -> None:
        """One layer's attention, the kernel as it is."""
        if self.lse.numel() < self.batch * HQ * splits * 2:
            self.partial = torch.empty(self.batch * HQ * splits * D, device="cuda")
            self.lse = torch.empty(self.batch * HQ * splits * 2, device="cuda")
        decode.decode_attention[(self.batch, HKV, splits)](
            self.k[layer], self.v[layer], self.tables, self.positions, self.slots, None, self.out, self.partial,
            self.lse, self.tickets, self.qkv, self.cos, self.sin, None, None, None, self.batch, self.tables.shape[1],
            splits, **SHAPE, PAGE=self.page, SCALE=D**-0.5, WINDOW=0, SOFTCAP=0.0, LOAD_Q=load_q, LOAD_K=load_k,
            LOAD_V=load_v, PDL=pdl, launch_pdl=pdl, **config,
        )  # fmt: skip

    def rotated(self, first: int, heads: int) -> Tensor:
        """[N, heads, D] of the heads of qkv from `first` on, rotated and rounded."""
        x = self.qkv.view(-1, WIDTH // D, D)[:, first : first + heads].float()
        low, high = x.chunk(2, -1)
        return (x * self.cos[:, None] + torch.cat((-high, low), -1) * self.sin[:, None]).bfloat16()

    def error(self, tokens: int = 4) -> float:
        """Largest error of `out` against fp64 over all heads of a few tokens, relative to the largest value."""
        worst = torch.zeros((), device="cuda", dtype=torch.float64)
        q, row = self.rotated(0, HQ), torch.zeros(1, device="cuda", dtype=torch.int64)
        for n in sorted({0, self.batch - 1, *range(0, self.batch, -(-self.batch // tokens))}):
            pages = self.tables[n]
            near = torch.arange(len(pages), device="cuda")[None]
            args = (self.k[0][pages].double(), self.v[0][pages].double(), near, row, self.positions[n].view(1, 1))
            want = attend(q[n].double()[None, :, None], *args, None, D**-0.5, 0, 0.0)[0, :, 0]
            worst = torch.maximum(worst, (self.out[n].view(HQ, D) - want).abs().max() / want.abs().max())
        return worst.item()


class Prefill:
    """`batch` sequences with `have` tokens in the pages already and `count` new ones, all keys in the pages."""

    def __init__(self, batch: int, count: int, have: int, page: int) -> None:
        make = torch.Generator("cuda").manual_seed(0)
        width = -(-(have + count) // page)
        self.batch, self.count, self.have, self.page = batch, count, have, page
        self.tables = (torch.randperm(batch * width, generator=make, device="cuda") + 1).view(batch, width)
        self.seqs = torch.arange(batch, device="cuda").repeat_interleave(count)
        self.at = (torch.arange(count, device="cuda") + have).repeat(batch)[None]
        self.layout = StepLayout.of(self.seqs, self.at)
        self.k, self.v = (
            torch.randn(batch * width + 1, HKV, page, D, generator=make, device="cuda", dtype=torch.bfloat16)
            for _ in "kv"
        )
        self.q = torch.randn(batch * count, HQ, D, generator=make, device="cuda", dtype=torch.bfloat16)
        self.out = torch.zeros_like(self.q)

    @property
    def flops(self) -> int:
        """Of both products, over the keys that are seen."""
        return 4 * HQ * D * self.batch * self.count * (2 * self.have + self.count + 1) // 2

    def launch(self, config: dict[str, Any]) -> None:
        """The Triton kernel over the pages."""
        tiles = self.layout.tiles(config["BLOCK_Q"])
        prefill.prefill_attention[(len(tiles), HQ)](
            self.q, self.k, self.v, self.tables, tiles, None, self.out, self.tables.shape[1], **SHAPE, PAGE=self.page,
            SCALE=D**-0.5, WINDOW=0, SOFTCAP=0.0, **config,
        )  # fmt: skip

    def own(self) -> list[Tensor]:
        """q, k and v of the new tokens as a step of whole prompts has them: [N, heads, D], and rows to spare."""
        k, v = (p[self.tables].transpose(2, 3).flatten(1, 2)[:, : self.count].flatten(0, 1) for p in (self.k, self.v))
        return [torch.cat([t, t[: TORCH_TOKENS - 1]]) for t in (self.q, k, v)]

    def whole(self, own: list[Tensor]) -> None:
        """Torch's attention of whole prompts."""
        out = self.out.view(1, self.batch * self.count, HQ * D)
        given = attend_whole(*own, self.layout, out, scale=D**-0.5, multiple=TORCH_TOKENS)
        self.out = self.out if given is None else given.view_as(self.out)

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, HQ, count, D], k and v [B, HKV, have + count, D] of the same sizes, for SDPA."""
        shapes = ((HQ, self.count), (HKV, self.have + self.count), (HKV, self.have + self.count))
        q, k, v = (torch.randn(self.batch, h, t, D, device="cuda", dtype=torch.bfloat16) for h, t in shapes)
        return q, k, v

    def error(self) -> float:
        """Largest error of the last sequence's last 256 tokens against fp64, relative to the largest value."""
        q, at = self.q[-256:].double().transpose(0, 1)[None], self.at[:, -256:]
        pages, near = self.tables[-1], torch.arange(self.tables.shape[1], device="cuda")[None]
        args = (self.k[pages].double(), self.v[pages].double(), near, torch.zeros_like(at[0]), at)
        want = attend(q, *args, None, D**-0.5, 0, 0.0)[0].transpose(0, 1)
        return ((self.out[-256:] - want).abs().max() / want.abs().max()).item()
