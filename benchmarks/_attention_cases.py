"""Caches, hooks and launches for `gpu_attention.py`, in the shapes of three models."""
# ruff: noqa: ANN001, ANN202 (Triton gives the parameters of kernels their meaning)

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmopt.codegen.templates import decode_attention as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.compiler.ops.attention import attend
from llmopt.runtime.attend import StepLayout
from llmopt.runtime.attend import attend as attend_whole


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads of D channels; `norm`: queries and keys are normed before they are rotated."""

    name: str
    HQ: int
    HKV: int
    D: int
    norm: int = 0

    @property
    def width(self) -> int:
        """Of a token's queries, keys and values together."""
        return (self.HQ + 2 * self.HKV) * self.D

    @property
    def shape(self) -> dict[str, int]:
        """What the templates read."""
        return {"HQ": self.HQ, "HKV": self.HKV, "D": self.D, "DV": self.D}


MODELS = {h.name: h for h in (Heads("8b", 32, 8, 128), Heads("1b", 32, 8, 64), Heads("0.6b", 16, 8, 128, norm=1))}
LLAMA = MODELS["8b"]


@triton.jit
def turned(qkv, cos, sin, weight, at, n, d, ok, D: tl.constexpr, NORM: tl.constexpr):
    """Channels d of a head of qkv that begins at `at`, normed with `weight` if NORM, rotated by cos and sin [N, D]."""
    near = (d + D // 2) % D
    x = tl.load(qkv + at + d, mask=ok, other=0.0).to(tl.float32)
    other = tl.load(qkv + at + near, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + 1e-6)
        x = x * scale * tl.load(weight + d, mask=ok, other=0.0).to(tl.float32)
        other = other * scale * tl.load(weight + near, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(cos + n * D + d, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(sin + n * D + d, mask=ok, other=0.0).to(tl.float32)
    return x * c + tl.where(d < D // 2, -other, other) * s


_HOOKS = """
@triton.jit
def q_{name}(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    return turned(e0, e1, e2, e3, n * {width} + h * {D}, n, d, ok, {D}, {norm})

@triton.jit
def k_{name}(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    return turned(e0, e1, e2, e4, n * {width} + {keys} + h * {D}, n, d, ok, {D}, {norm})

@triton.jit
def v_{name}(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + n * {width} + {values} + h * {D} + d, mask=ok, other=0.0).to(tl.float32)
"""


@cache
def hooks() -> Any:
    """q, k and v of each model from qkv [N, width] in e0, cos, sin [N, D] and weights [D], as a module of its own file,
    where Triton reads a function's text."""
    parts = ["import triton\nimport triton.language as tl\nfrom _attention_cases import turned\n"]
    for h in MODELS.values():
        places = {"width": h.width, "D": h.D, "norm": h.norm, "keys": h.HQ * h.D, "values": (h.HQ + h.HKV) * h.D}
        parts.append(_HOOKS.format(name=_word(h), **places))
    path = Path(tempfile.gettempdir()) / "attention_hooks.py"
    path.write_text("".join(parts))
    spec = importlib.util.spec_from_file_location("attention_hooks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attention_hooks"] = module
    spec.loader.exec_module(module)
    return module


def _word(heads: Heads) -> str:
    return heads.name.replace(".", "_")


def constants(heads: Heads, page: int, config: Mapping[str, Any], pdl: bool = True) -> dict[str, Any]:
    """Every constant of the decoding kernel, and how it is launched."""
    made = {name: getattr(hooks(), f"{name[-1].lower()}_{_word(heads)}") for name in ("LOAD_Q", "LOAD_K", "LOAD_V")}
    settings = {
        "PAGE": page,
        "SCALE": heads.D**-0.5,
        "WINDOW": 0,
        "SOFTCAP": 0.0,
        "ORDER": 0,
        "PDL": pdl,
        "launch_pdl": pdl,
    }
    return {**heads.shape, **settings, **made, **config}


@dataclass(frozen=True)
class Compiled:
    """A decoding kernel to be compiled without tensors and without a GPU, for `_gemm_cases.compile_all`."""

    heads: Heads
    page: int
    config: tuple[tuple[str, Any], ...]

    def compile(self) -> None:
        """Into Triton's cache, where a launch with the same constants finds it."""
        from triton.runtime.jit import MockTensor

        x, i, f = MockTensor(torch.bfloat16), MockTensor(torch.int64), MockTensor(torch.float32)
        given = [x, x, x, *([x, x] if self.heads.norm else [None, None]), None]
        decode.decode_attention.warmup(
            x, x, i, i, i, None, x, f, f, MockTensor(torch.int32), *given, 1, 1, 1, grid=(1, 1, 1),
            **constants(self.heads, self.page, dict(self.config)),
        )  # fmt: skip


class Decode:
    """`layers` caches of `batch` sequences that hold context - 1 tokens each, and one new token a sequence."""

    def __init__(self, heads: Heads, batch: int, context: int, page: int, layers: int = 1, seed: int = 0) -> None:
        make = torch.Generator("cuda").manual_seed(seed)
        self.heads, self.batch, self.context, self.page = heads, batch, context, page
        width = -(-context // page)
        pages = batch * width + 1
        self.tables = (torch.randperm(pages - 1, generator=make, device="cuda") + 1).view(batch, width)
        shape = (pages, heads.HKV, page, heads.D)
        self.k, self.v = (
            [torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
            for _ in "kv"
        )
        self.qkv = torch.randn(batch, heads.width, generator=make, device="cuda", dtype=torch.bfloat16)
        angle = torch.randn(batch, heads.D // 2, generator=make, device="cuda").repeat(1, 2)
        self.cos, self.sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        norms = [1 + torch.randn(heads.D, generator=make, device="cuda").mul(0.1).bfloat16() for _ in "qk"]
        self.norms = norms if heads.norm else [None, None]
        self.positions = torch.full((batch,), context - 1, device="cuda")
        self.slots = self.tables[:, -1] * page + (context - 1) % page
        self.out = torch.zeros(batch, heads.HQ * heads.D, device="cuda", dtype=torch.bfloat16)
        self.tickets = torch.zeros(batch * heads.HKV, device="cuda", dtype=torch.int32)
        self.partial = self.lse = torch.empty(0, device="cuda")

    @property
    def bytes(self) -> int:
        """Of keys and values, read once."""
        return 2 * self.batch * self.context * self.heads.HKV * self.heads.D * 2

    def launch(self, config: Mapping[str, Any], splits: int, layer: int = 0, pdl: bool = True) -> None:
        """One layer's attention, the kernel as it is."""
        heads = self.batch * self.heads.HQ
        if self.lse.numel() < heads * splits * 2:
            self.partial = torch.empty(heads * splits * self.heads.D, device="cuda")
            self.lse = torch.empty(heads * splits * 2, device="cuda")
        decode.decode_attention[(self.batch, self.heads.HKV, splits)](
            self.k[layer], self.v[layer], self.tables, self.positions, self.slots, None, self.out, self.partial,
            self.lse, self.tickets, self.qkv, self.cos, self.sin, *self.norms, None, self.batch, self.tables.shape[1],
            splits, **constants(self.heads, self.page, config, pdl),
        )  # fmt: skip

    def made(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, HQ, D], k and v [N, HKV, D] of qkv as the hooks make them, rounded."""
        counts = [self.heads.HQ, self.heads.HKV, self.heads.HKV]
        q, k, v = self.qkv.view(self.batch, -1, self.heads.D).split(counts, 1)
        return self._rotated(q, self.norms[0]), self._rotated(k, self.norms[1]), v

    def _rotated(self, x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float()
        if weight is not None:
            x = torch.nn.functional.rms_norm(x, (self.heads.D,), weight.float(), 1e-6)
        low, high = x.chunk(2, -1)
        return (x * self.cos[:, None] + torch.cat((-high, low), -1) * self.sin[:, None]).bfloat16()

    def stored(self, layer: int = 0) -> bool:
        """Do the pages hold the tokens' own keys (to their rounding) and values?"""
        at = self.slots // self.page, slice(None), self.slots % self.page
        _, k, v = (x.float() for x in self.made())
        own_k, own_v = self.k[layer][at].float(), self.v[layer][at].float()
        return bool((own_k - k).abs().max() <= 0.01 * k.abs().max()) and torch.equal(own_v, v)

    def error(self, tokens: int = 4, layer: int = 0) -> float:
        """Largest error of `out` against fp64 over all heads of a few tokens, relative to the largest value."""
        worst = torch.zeros((), device="cuda", dtype=torch.float64)
        q, row = self.made()[0], torch.zeros(1, device="cuda", dtype=torch.int64)
        k_pages, v_pages = self.k[layer], self.v[layer]
        for n in sorted({0, self.batch - 1, *range(0, self.batch, -(-self.batch // tokens))}):
            pages = self.tables[n]
            near = torch.arange(len(pages), device="cuda")[None]
            args = (k_pages[pages].double(), v_pages[pages].double(), near, row, self.positions[n].view(1, 1))
            want = attend(q[n].double()[None, :, None], *args, None, self.heads.D**-0.5, 0, 0.0)[0, :, 0]
            worst = torch.maximum(worst, (self.out[n].view(*want.shape) - want).abs().max() / want.abs().max())
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
        shape = (batch * width + 1, LLAMA.HKV, page, LLAMA.D)
        self.k, self.v = (torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        self.q = torch.randn(batch * count, LLAMA.HQ, LLAMA.D, generator=make, device="cuda", dtype=torch.bfloat16)
        self.out = torch.zeros_like(self.q)
        # [N, HKV, D] as the product of qkv leaves them, equal to the pages where there are no tokens before
        self.fresh = [pages[self.tables].transpose(2, 3).flatten(0, 2) for pages in (self.k, self.v)]

    @property
    def flops(self) -> int:
        """Of both products, over the keys that are seen."""
        return 4 * LLAMA.HQ * LLAMA.D * self.batch * self.count * (2 * self.have + self.count + 1) // 2

    def launch(self, config: Mapping[str, Any]) -> None:
        """The Triton kernel over the pages."""
        tiles = self.layout.tiles(config["BLOCK_Q"])
        prefill.prefill_attention[(len(tiles), LLAMA.HQ)](
            self.q, self.k, self.v, self.tables, tiles, None, self.out, self.tables.shape[1], **LLAMA.shape,
            PAGE=self.page, SCALE=LLAMA.D**-0.5, WINDOW=0, SOFTCAP=0.0, K_KIND="", V_KIND="", V_ORDER=1, **config,
        )  # fmt: skip

    def whole(self) -> None:
        """Torch's kernel over the keys of whole prompts, as they are made (no tokens before)."""
        made = attend_whole(
            self.q, *self.fresh, self.layout, self.out.flatten(1)[None], scale=LLAMA.D**-0.5, multiple=1
        )
        if made is not None:
            self.out = made.view(self.q.shape)

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, HQ, count, D], k and v [B, HKV, have + count, D] of the same sizes, for SDPA."""
        length, dtype = self.have + self.count, torch.bfloat16
        q = torch.randn(self.batch, LLAMA.HQ, self.count, LLAMA.D, device="cuda", dtype=dtype)
        k, v = (torch.randn(self.batch, LLAMA.HKV, length, LLAMA.D, device="cuda", dtype=dtype) for _ in "kv")
        return q, k, v

    def error(self) -> float:
        """Largest error of the last sequence's last 256 tokens against fp64, relative to the largest value."""
        q, at = self.q[-256:].double().transpose(0, 1)[None], self.at[:, -256:]
        pages, near = self.tables[-1], torch.arange(self.tables.shape[1], device="cuda")[None]
        args = (self.k[pages].double(), self.v[pages].double(), near, torch.zeros_like(at[0]), at)
        want = attend(q, *args, None, LLAMA.D**-0.5, 0, 0.0)[0].transpose(0, 1)
        return ((self.out[-256:] - want).abs().max() / want.abs().max()).item()
