"""Causal attention, whole (`attention`) and over a paged KV cache (`kv_write`, `attend`).

Pages hold keys and values as they are, or as rows of bytes that a `packing` names (`compiler.quant.kv`).

All three share one meaning of scale, window, softcap and sinks:
score = scale * q.k, then softcap * tanh(score / softcap) if softcap > 0; a query at position p sees the keys at
max(0, p - window + 1)..p (window 0: from 0); a sink is one more logit per head that joins the softmax's denominator
only (GPT-OSS). Query head h reads key/value head h // (Hq // Hkv).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.op import Cost, nbytes, op
from llmopt.compiler.quant.kv import Packing, pages_of


def _scores_to_output(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """q [B, Hq, T, D], k/v [B, Hkv, S, D], allowed bool [T, S] -> [B, Hq, T, Dv]; softmax in fp32 or wider."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    products = torch.matmul(q, k.transpose(-1, -2))
    return torch.matmul(probabilities(products, allowed, sinks, scale, softcap).to(v.dtype), v)


def probabilities(products: Tensor, allowed: Tensor, sinks: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Of products q.k [B, Hq, T, S], allowed bool [T, S]; softmax in fp32 or wider."""
    scores = products * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    wide = torch.float64 if products.dtype == torch.float64 else torch.float32
    scores = scores.to(wide).masked_fill(~allowed, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.to(wide).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]


def visible(q_pos: Tensor, k_pos: Tensor, window: int) -> Tensor:
    """bool [T, S]: may the query at q_pos [T] see the key at k_pos [S]?"""
    distance = q_pos[:, None] - k_pos[None, :]
    return (distance >= 0) & (distance < window) if window > 0 else distance >= 0


@op
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    """Causal self-attention over whole sequences: q [B, Hq, T, D], k/v [B, Hkv, T, D] -> [B, Hq, T, Dv]."""
    at = torch.arange(q.shape[2], device=q.device)
    return _scores_to_output(q, k, v, visible(at, at, window), sinks, scale, softcap)


@attention.fake
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@attention.cost
def _attention_cost(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Cost:
    seen = k.shape[2] if window <= 0 else min(window, k.shape[2])
    return Cost(4 * q.numel() * seen, 2 * nbytes(q) + nbytes(k, v))


@attention.samples
def _attention_samples() -> Iterable[tuple[Any, ...]]:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    yield q, k, v, None, 0.35, 0, 0.0
    yield q, k, v, None, 0.35, 3, 20.0
    yield q, k, v, torch.randn(4), 0.35, 2, 0.0


@op
def kv_write(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> Tensor:
    """The pages after writing x: pages [P, H, page, D], x [1, H, N, D], slots int64 [N] = page * page_size + offset.

    With a packing pages are uint8 [P, H, page, `Packing.row_bytes(D)`], arranged as `kv.pages_of` says.
    """
    return _kv_write_in_place(pages.clone(), x, slots, packing)


kv_write.traceable = False  # a copy of the pages is never wanted; a provider writes in place


@kv_write.in_place
def _kv_write_in_place(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> Tensor:
    if packing:
        return write_packed(pages, x, slots, packing)
    size = pages.shape[2]
    pages[slots // size, :, slots % size] = x[0].transpose(0, 1).to(pages.dtype)
    return pages


def write_packed(pages: Tensor, x: Tensor, slots: Tensor, packing: str) -> Tensor:
    """`kv_write` with a packing, in place."""
    size, how = pages.shape[2], Packing.parse(packing)
    made, at = how.pack(x[0].transpose(0, 1)), 0
    for part in pages_of(pages, how):
        part[slots // size, :, slots % size] = made[..., at : at + part.shape[-1]]
        at += part.shape[-1]
    return pages


@kv_write.fake
def _kv_write_fake(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> Tensor:
    return torch.empty_like(pages)


@kv_write.cost
def _kv_write_cost(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> Cost:
    row = pages.shape[-1] * pages.element_size()
    return Cost(0, nbytes(x) + x.numel() // x.shape[-1] * row + nbytes(slots))


@kv_write.samples
def _kv_write_samples() -> Iterable[tuple[Any, ...]]:
    yield torch.randn(5, 2, 4, 8), torch.randn(1, 2, 3, 8), torch.tensor([5, 6, 17])
    for packing in ("int4-h8", "nvfp4", "fp8"):
        row = Packing.parse(packing).row_bytes(16)
        yield torch.zeros(5, 2, 4, row, dtype=torch.uint8), torch.randn(1, 2, 3, 16), torch.tensor([5, 6, 17]), packing


@op
def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    k_packing: str = "",
    v_packing: str = "",
) -> Tensor:
    """Causal attention of N tokens over their own sequences' pages (Kwon et al., 2023: PagedAttention).

    q [1, Hq, N, D]; k_pages, v_pages [P, Hkv, page, D], or rows of bytes as `kv_write` makes them with a packing;
    block_tables int64 [S, M]; seq_ids int64 [N] = row of block_tables; positions int64 [1, N]. Token n sees positions
    0..positions[0, n] of its sequence, cut by window. Queries are rotated as packed keys are, and results turned back.
    """
    if k_packing or v_packing:
        given = q, k_pages, v_pages, block_tables, seq_ids, positions, sinks, scale, window, softcap
        return attend_unpacked(attend.fn, *given, k_packing, v_packing)
    out = q.new_empty((*q.shape[:-1], v_pages.shape[-1]))
    size = k_pages.shape[2]
    for row in seq_ids.unique().tolist():
        tokens = (seq_ids == row).nonzero().squeeze(1)
        at = positions[0, tokens]
        length = int(at.max()) + 1
        pages = block_tables[row, : -(-length // size)]
        k, v = (p[pages].transpose(0, 1).flatten(1, 2)[None, :, :length].to(q.dtype) for p in (k_pages, v_pages))
        allowed = visible(at, torch.arange(length, device=q.device), window)
        out[:, :, tokens] = _scores_to_output(q[:, :, tokens], k, v, allowed, sinks, scale, softcap)
    return out


attend.traceable = False


@attend.fake
def _attend_fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    k_packing: str = "",
    v_packing: str = "",
) -> Tensor:
    width = v_pages.shape[-1]
    return q.new_empty((*q.shape[:-1], Packing.parse(v_packing).channels(width) if v_packing else width))


def attend_unpacked(
    attend: Callable[..., Tensor],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    *settings: Any,
) -> Tensor:
    """`attend` with all its arguments by an implementation that reads plain pages: what the tokens may see is unpacked
    for it into q's dtype, or fp32 if that has fewer bits, so that numbers of few bits are rounded once."""
    *others, k_packing, v_packing = settings
    size, rows = k_pages.shape[2], seq_ids.unique()
    last = torch.zeros(block_tables.shape[0], dtype=torch.int64, device=q.device)
    last = last.scatter_reduce(0, seq_ids, positions[0] // size, "amax")
    seen = torch.arange(block_tables.shape[1], device=q.device) <= last[:, None]
    live = torch.zeros_like(seen)
    live[rows] = seen[rows]
    used, place = block_tables[live].unique(return_inverse=True)
    tables = torch.zeros_like(block_tables)
    tables[live] = place
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (plain_pages(p[used], packing, wide) for p, packing in ((k_pages, k_packing), (v_pages, v_packing)))
    asked = Packing.parse(k_packing).asked(q) if k_packing else q
    out = attend(asked.to(wide), k, v, tables, seq_ids, positions, *others)
    return (Packing.parse(v_packing).turned_back(out) if v_packing else out).to(q.dtype)


def plain_pages(pages: Tensor, packing: str, dtype: torch.dtype) -> Tensor:
    """Pages [P, H, page, D] of what their rows stand for, still rotated; they may be plain ones (packing "")."""
    if not packing:
        return pages.to(dtype)
    how = Packing.parse(packing)
    return how.unpack(torch.cat(pages_of(pages, how), -1)).to(dtype)


@attend.cost
def _attend_cost(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, *rest: Any) -> Cost:
    # the upper bound: every page of every listed sequence is read once
    keys = block_tables.numel() * k_pages.shape[2]
    per_key = sum(p.shape[-1] * p.element_size() for p in (k_pages, v_pages)) * k_pages.shape[1]
    return Cost(4 * q.numel() * block_tables.shape[1] * k_pages.shape[2], keys * per_key + 2 * nbytes(q))


def _sampled(packing: str) -> Tensor:
    if not packing:
        return torch.randn(5, 2, 4, 16)
    pages = torch.zeros(5, 2, 4, Packing.parse(packing).row_bytes(16), dtype=torch.uint8)
    return write_packed(pages, torch.randn(1, 2, 20, 16), torch.arange(20), packing)


@attend.samples
def _attend_samples() -> Iterable[tuple[Any, ...]]:
    tables = torch.tensor([[1, 2], [4, 3]])
    seqs, at = torch.tensor([0, 0, 1]), torch.tensor([[2, 3, 6]])
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(5, 2, 4, 8), torch.randn(5, 2, 4, 8)
    yield q, k, v, tables, seqs, at, None, 0.35, 0, 0.0
    yield q, k, v, tables, seqs, at, torch.randn(4), 0.35, 3, 15.0
    for k_packing, v_packing in (("int4-h8", "int8"), ("fp8", ""), ("nvfp4-h16", "int4-h4")):
        q = torch.randn(1, 4, 3, 16)
        pages = (_sampled(k_packing), _sampled(v_packing))
        yield q, *pages, tables, seqs, at, None, 0.25, 0, 0.0, k_packing, v_packing
