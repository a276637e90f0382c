"""Paged caches, tokens and the attention's meaning in fp64, for the tests of both attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmopt.codegen import tuning
from llmopt.compiler.ops.attention import attend, kv_write

ISAS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
SHAPE = {"HQ": 32, "HKV": 8, "D": 128, "DV": 128, "PAGE": 16}
# hooks by plain loads, for kernels that are only compiled
HOOKS = """
import triton
import triton.language as tl

@triton.jit
def load_q(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + n * 8192 + h * 256 + d, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def load_k(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e1 + n * 2048 + h * 256 + d, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def load_v(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e2 + n * 2048 + h * 256 + d, mask=ok, other=0.0).to(tl.float32)
"""


def attention_entries() -> list[dict[str, Any]]:
    """Entries of the shipped tables for decoding, each shape and config once; whatever the number of tokens."""
    entries = [e for p in sorted(tuning.TABLES.glob("*.json")) for e in tuning.table(p.stem).values()]
    found = {
        str(({**e["shape"], "N": 0}, e["config"])): dict(e) for e in entries if e["template"] == "decode_attention"
    }
    return list(found.values())


@triton.jit
def rotated(x, turned, e1, e2, n, d, ok, D: tl.constexpr):
    cos = tl.load(e1 + n * D + d, mask=ok, other=0.0).to(tl.float32)
    sin = tl.load(e2 + n * D + d, mask=ok, other=0.0).to(tl.float32)
    return x * cos + tl.where(d < D // 2, -turned, turned) * sin


@triton.jit
def plain_q(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """q [N, HQ, D] in e0; e3 and e4 hold nothing, e5 [6] holds HQ, HKV, D, DV."""
    return tl.load(e0 + (n * tl.load(e5) + h) * tl.load(e5 + 2) + d, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def plain_k(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """k [N, HKV, D] in e3."""
    return tl.load(e3 + (n * tl.load(e5 + 1) + h) * tl.load(e5 + 2) + d, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def plain_v(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """v [N, HKV, DV] in e4."""
    return tl.load(e4 + (n * tl.load(e5 + 1) + h) * tl.load(e5 + 3) + d, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def rope_q(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """As plain_q, rotated by cos, sin [N, D] in e1, e2, D = 64."""
    at = e0 + (n * tl.load(e5) + h) * 64
    x = tl.load(at + d, mask=ok, other=0.0).to(tl.float32)
    turned = tl.load(at + (d + 32) % 64, mask=ok, other=0.0).to(tl.float32)
    return rotated(x, turned, e1, e2, n, d, ok, 64)


@triton.jit
def rope_k(n, h, d, ok, e0, e1, e2, e3, e4, e5):
    """As plain_k, rotated."""
    at = e3 + (n * tl.load(e5 + 1) + h) * 64
    x = tl.load(at + d, mask=ok, other=0.0).to(tl.float32)
    turned = tl.load(at + (d + 32) % 64, mask=ok, other=0.0).to(tl.float32)
    return rotated(x, turned, e1, e2, n, d, ok, 64)


@dataclass(frozen=True)
class Case:
    """Shapes and the attention's own settings; `lengths` are the tokens a sequence already has."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (4, 1)
    dims: tuple[int, int] = (64, 64)
    page: int = 4
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    rope: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return self.dims[0] ** -0.5


@dataclass
class Cache:
    """Pages filled at random, all of them, so that reading a wrong one shows; tables with pages in random order."""

    k: Tensor
    v: Tensor
    tables: Tensor

    @classmethod
    def of(cls, case: Case, ahead: int, seed: int) -> Cache:
        """Room for `ahead` more tokens a sequence; page 0 belongs to nobody."""
        make = torch.Generator().manual_seed(seed)
        need = [-(-(length + ahead) // case.page) for length in case.lengths]
        width, total = max(need) + 1, sum(need) + 3
        order = (torch.randperm(total - 1, generator=make) + 1).tolist()
        tables = torch.zeros(len(need), width, dtype=torch.int64)
        for row, count in enumerate(need):
            tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        shape = (total, case.heads[1], case.page)
        k, v = (torch.randn(*shape, d, generator=make).to(case.dtype) for d in case.dims)
        return cls(k, v, tables)

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """int64 slot of each position of each row."""
        size = self.k.shape[2]
        return self.tables[rows, positions // size] * size + positions % size


def expected(
    case: Case, cache: Cache, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, at: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages after the write, and out fp64 [N, HQ, DV], from q [N, HQ, D], k, v [N, HKV, .] (rounded by the caller)."""
    slots = cache.slots(rows, at)
    k_pages = kv_write(cache.k, k.transpose(0, 1)[None], slots)
    v_pages = kv_write(cache.v, v.transpose(0, 1)[None], slots)
    sinks = None if sinks is None else sinks.double()
    out = attend(
        q.double().transpose(0, 1)[None], k_pages.double(), v_pages.double(), cache.tables, rows, at[None], sinks,
        case.scale, case.window, case.softcap,
    )  # fmt: skip
    return k_pages, v_pages, out[0].transpose(0, 1)
