"""Attention of one new token a sequence over paged keys and values: the context is split over programs.

A program owns one token, one key/value head and one part of the context. The query heads that share the key/value
head are the columns (SWAP) or rows of the products, padded to what the tensor cores take, so that every key and value
is read once. The new token's own key and value come from hooks: the last part starts its softmax with them, and
stores them into the pages. Parts leave an unnormalised result, its maximum and its sum; the last program to arrive,
by a ticket counted with acquire and release, combines them in the order of the parts, so the result does not depend
on who was last (Dao et al., 2023: Flash-Decoding; a sink is one more term of the last part's sum).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.paged import dot, key_rows, logits, rows
from llmopt.compiler.target import Target


@triton.jit
def _step(q, k, v, ok, m, mass, acc, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SWAP: tl.constexpr):
    # one tile of keys k [T, D], v [T, DV] (SWAP: [DV, T]), one key at least visible (ok [T]); m, mass [G]
    if SWAP:  # q [D, G], acc [DV, G]
        s = dot(k, q, tl.zeros([k.shape[0], q.shape[1]], tl.float32))
        s = tl.where(ok[:, None], logits(s, SCALE, SOFTCAP), float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - top[None, :])
        shrink = tl.exp2(m - top)
        mass = mass * shrink + tl.sum(p, 0)
        acc = dot(v, p.to(v.dtype), acc * shrink[None, :])
    else:  # q [G, D], acc [G, DV]
        s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
        s = tl.where(ok[None, :], logits(s, SCALE, SOFTCAP), float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        shrink = tl.exp2(m - top)
        mass = mass * shrink + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return top, mass, acc


@triton.jit
def _combine(partial, lse, out, n, h, SPLITS, HQ: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr,
             BLOCK_S: tl.constexpr):  # fmt: skip
    # partial [N, HQ, SPLITS, DV], lse [N, HQ, SPLITS, 2]; a part without keys has maximum -inf and no partial
    G: tl.constexpr = HQ // HKV
    g = tl.arange(0, triton.next_power_of_2(G))
    d = tl.arange(0, max(16, triton.next_power_of_2(DV)))
    head = n * HQ + h * G + g
    inside = (g < G)[:, None] & (d < DV)[None, :]
    m = tl.full([g.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([g.shape[0]], tl.float32)
    acc = tl.zeros([g.shape[0], d.shape[0]], tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        part = head[None, :] * SPLITS + split[:, None]
        ok = (split < SPLITS)[:, None] & (g < G)[None, :]
        # past the first-level cache, which may hold what an earlier launch left there
        tops = tl.load(lse + part * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(lse + part * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
        used = (tops > float("-inf"))[:, :, None] & inside[None, :, :]
        parts = tl.load(
            partial + (part[:, :, None] * DV + d[None, None, :]), mask=used, other=0.0, cache_modifier=".cg"
        )
        top = tl.maximum(m, tl.max(tops, 0))
        known = tl.where(top > float("-inf"), top, 0.0)
        shrink, weights = tl.exp2(m - known), tl.exp2(tops - known[None, :])
        mass = mass * shrink + tl.sum(sums * weights, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        m = top
    value = acc / tl.where(g < G, mass, 1.0)[:, None]
    tl.store(out + (head[:, None] * DV + d[None, :]), value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _own(k_pages, v_pages, slots, q, own_k, own_v, sink, n, h, owner, HKV: tl.constexpr, D: tl.constexpr,
         DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
         SINKS: tl.constexpr):  # fmt: skip
    # the token's key [1, D] and value [1, DV] into their slot, and the state of the softmax that begins with them; the
    # parts that do not own the token begin with nothing, by selects: a branch would end the batch of loads above it
    d = tl.arange(0, own_k.shape[1])
    dv = tl.arange(0, own_v.shape[1])
    slot = tl.load(slots + n)
    row = ((slot // PAGE) * HKV + h) * PAGE + slot % PAGE
    tl.store(k_pages + (row * D + d[None, :]), own_k, mask=owner & (d < D)[None, :])
    tl.store(v_pages + (row * DV + dv[None, :]), own_v, mask=owner & (dv < DV)[None, :])
    s = logits(tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1), SCALE, SOFTCAP)
    top, share, mass = s, tl.full(s.shape, 1.0, tl.float32), tl.full(s.shape, 1.0, tl.float32)
    if SINKS:
        sink = sink * 1.4426950408889634
        top = tl.maximum(s, sink)
        share = tl.exp2(s - top)
        mass = share + tl.exp2(sink - top)
    share = tl.where(owner, share, 0.0)
    m = tl.where(owner, top, float("-inf"))
    return m, tl.where(owner, mass, 0.0), share[:, None] * own_v.to(tl.float32)


@triton.jit
def _part(partial, lse, m, mass, acc, part, real, some, DV: tl.constexpr):
    # a part's unnormalised result acc [G, DV], its maximum and its sum; without keys (some false) no result
    dv = tl.arange(0, acc.shape[1])
    tl.store(partial + (part[:, None] * DV + dv[None, :]), acc, mask=(real & some)[:, None] & (dv < DV)[None, :])
    tl.store(lse + part * 2, m, mask=real)
    tl.store(lse + part * 2 + 1, mass, mask=real)
    tl.debug_barrier()  # the ticket, drawn by one thread, is to follow the stores of all


@triton.jit
def _keys(position, split, SPLITS, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr):
    # positions first .. last - 1 of a part, whole tiles; the last part has the fewest, and the token's own key besides
    start = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    chunk = tl.cdiv(tl.cdiv(position - start, SPLITS), BLOCK_T) * BLOCK_T
    first = start + split * chunk
    return first, tl.minimum(first + chunk, position)


@triton.jit
def _channels(D: tl.constexpr):
    return tl.arange(0, max(16, triton.next_power_of_2(D)))


# no kernel of its own for one token, one part or a table of a multiple of 16 pages: all steps of a bucket run the same
@triton.jit(do_not_specialize=["N", "M", "SPLITS"])
def decode_attention(
    k_pages, v_pages, tables, positions, slots, sinks, out, partial, lse, tickets, e0, e1, e2, e3, e4, e5, N, M, SPLITS,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LOAD_Q: tl.constexpr, LOAD_K: tl.constexpr, LOAD_V: tl.constexpr,
    BLOCK_T: tl.constexpr, SWAP: tl.constexpr, PEEL: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N, HQ * DV] of token n = row n of tables [., M]; grid (N, HKV, SPLITS).

    k_pages [P, HKV, PAGE, D], v_pages [P, HKV, PAGE, DV]; positions, slots int64 [N]; sinks [HQ] or None; partial fp32
    [N * HQ * SPLITS * DV], lse fp32 [N * HQ * SPLITS * 2], tickets int32 [N * HKV], zero and left zero.
    SWAP: keys are the left operand. PEEL: a part's first tile is on its way before the query is made.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    G: tl.constexpr = HQ // HKV
    WIDTH: tl.constexpr = max(8 if SWAP else 16, triton.next_power_of_2(G))
    n, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = tables + n * M
    position = tl.load(positions + n).to(tl.int32)
    first, last = _keys(position, split, SPLITS, WINDOW, BLOCK_T)
    owner = split == SPLITS - 1
    if PEEL:
        t = first + tl.arange(0, BLOCK_T)
        ok = t < last
        row = key_rows(table, h, t, ok, HKV, PAGE)
        k = rows(k_pages, row, ok, D, False)
        v = rows(v_pages, row, ok, DV, SWAP)

    g = tl.arange(0, WIDTH)
    d, dv = _channels(D), _channels(DV)
    head = h * G + g
    real = g < G
    q = LOAD_Q(n, head[:, None], d[None, :], real[:, None] & (d < D)[None, :], e0, e1, e2, e3, e4, e5)
    q = q.to(k_pages.dtype.element_ty)
    own_k = LOAD_K(n, h, d[None, :], owner & (d < D)[None, :], e0, e1, e2, e3, e4, e5).to(k_pages.dtype.element_ty)
    own_v = LOAD_V(n, h, dv[None, :], owner & (dv < DV)[None, :], e0, e1, e2, e3, e4, e5).to(v_pages.dtype.element_ty)
    SINKS: tl.constexpr = sinks is not None
    sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) if SINKS else 0.0
    m, mass, acc = _own(
        k_pages, v_pages, slots, q, own_k, own_v, sink, n, h, owner, HKV, D, DV, PAGE, SCALE, SOFTCAP, SINKS
    )
    if SWAP:
        q, acc = tl.trans(q), tl.trans(acc)
    if PEEL and first < last:
        m, mass, acc = _step(q, k, v, ok, m, mass, acc, SCALE, SOFTCAP, SWAP)
    t = first + PEEL * BLOCK_T + tl.arange(0, BLOCK_T)
    row = key_rows(table, h, t, t < last, HKV, PAGE)
    for _ in range(first + PEEL * BLOCK_T, last, BLOCK_T):
        ok = t < last
        k = rows(k_pages, row, ok, D, False)
        v = rows(v_pages, row, ok, DV, SWAP)
        t += BLOCK_T
        # rows of the tile after: the loads of a tile then wait for no table
        row = key_rows(table, h, t, t < last, HKV, PAGE)
        m, mass, acc = _step(q, k, v, ok, m, mass, acc, SCALE, SOFTCAP, SWAP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    if SWAP:
        acc = tl.trans(acc)
    heads = n * HQ + head
    if SPLITS == 1:
        value = (acc / mass[:, None]).to(out.dtype.element_ty)
        tl.store(out + (heads[:, None] * DV + dv[None, :]), value, mask=real[:, None] & (dv < DV)[None, :])
    else:
        _part(partial, lse, m, mass, acc, heads * SPLITS + split, real, owner | (first < last), DV)
        if tl.atomic_add(tickets + (n * HKV + h), 1, sem="acq_rel") == SPLITS - 1:
            _combine(partial, lse, out, n, h, SPLITS, HQ, HKV, DV, BLOCK_S)
            tl.store(tickets + (n * HKV + h), 0)


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return ("N", shape["HKV"], "SPLITS")


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the attention, else the reason why not. `shape`: HQ, HKV, D, DV, PAGE."""
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"dtype {dtype}: scores are fp32"
    if "triton" not in target.features:
        return "the target has no Triton"
    if max(shape["D"], shape["DV"]) > 256:
        return f"head size {max(shape['D'], shape['DV'])}: at most 256 fits the registers of a program"
    if shape["HQ"] % shape["HKV"]:
        return f"{shape['HQ']} query heads over {shape['HKV']} key/value heads: no whole group"
    if shape["HQ"] // shape["HKV"] > 128:
        return f"{shape['HQ'] // shape['HKV']} query heads a key/value head: at most 128 fit the registers of a program"
    if shape["PAGE"] & (shape["PAGE"] - 1):
        return f"pages of {shape['PAGE']} tokens: a power of two is wanted"
    return None


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first. `shape` as for `supports`, N the tokens."""
    heads = triton.next_power_of_2(shape["HQ"] // shape["HKV"])
    wide = max(16, triton.next_power_of_2(max(shape["D"], shape["DV"])))
    if dtype == "float32":
        # products on the plain cores: small tiles, or they spill
        tried = [(0, 16, 4, 3, 0), (0, 32, 8, 3, 0), (0, 16, 4, 2, 0)]
    elif heads > 16 or wide > 128:
        # more registers a key: four warps share the tile
        tried = [(0, 32, 4, 2, 0), (1, 32, 4, 2, 0), (0, 32, 4, 3, 0), (0, 64, 4, 2, 0)]
    else:
        tried = [(1, 32, 1, 3, 0), (1, 32, 1, 3, 1), (0, 32, 1, 3, 0), (0, 32, 1, 3, 1), (1, 32, 1, 4, 0)]
        tried += [(swap, 64, 2, 3, peel) for swap in (1, 0) for peel in (0, 1)]
        tried += [(swap, 64, 4, 3, peel) for swap in (1, 0) for peel in (0, 1)]
        tried += [(1, 64, 1, 2, 0), (1, 128, 4, 2, 0), (0, 128, 4, 2, 0)]
    return [
        {"SWAP": swap, "BLOCK_T": block, "PEEL": peel, "BLOCK_S": max(1, min(16, 2048 * warps // (heads * wide))),
         "num_warps": warps, "num_stages": stages}
        for swap, block, warps, stages, peel in tried
    ]  # fmt: skip
