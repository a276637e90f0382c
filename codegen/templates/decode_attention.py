"""Attention of one new token a sequence over paged keys and values: the context is split over programs.

A program owns one token, one key/value head and one part of the context. The query heads that share the key/value
head are the columns (SWAP) or rows of the products, padded to what the tensor cores take, so that every key and value
is read once. The new token's own key and value come from hooks: the last part starts its softmax with them, and
stores them into the pages. Parts leave an unnormalised result, its maximum and its sum; the last program to arrive,
by a ticket counted with acquire and release, combines them in the order of the parts, so the result does not depend
on who was last (Dao et al., 2023: Flash-Decoding; a sink is one more term of the last part's sum). There are no more
parts than a token has keys for: programs beyond leave nothing and draw no ticket.

What is read before the wait for the kernel ahead (PDL) is positions, slots, tables, sinks, and pages of earlier tokens.
Under PDL the kernel ahead may still run by then, and the ones ahead of that too, as far back as each lets its
dependents start before its own wait (`gemv`, `gemm` and this kernel do with EARLY; `rows` and `sample` do not). So
none of it may be written by a kernel of the same step that is still running:

- Sinks are weights. Pages of earlier tokens are written by earlier steps (or prompts), tables, slots and positions by
  the host's copies between steps and by the sampling that ended the step before. In a step, only the sampling at its
  end writes any of them, and it waits: all of the step is complete by then, as the last point says.
- A step that is a CUDA graph starts when everything ahead of it in the stream is complete, and so does a kernel
  launched without the attribute, as torch's are. With either one between two steps, nothing of the step before runs.
- Steps launched back to back, kernel by kernel, need one kernel between the sampling and this one that lets dependents
  start only after its own wait, and a step has it: the rows of the embedding, which are its first. For a program of
  this kernel to start, every program of the kernel ahead must have let it (or have ended), and so have started; by
  induction back to that kernel, all of its programs are past their wait, and what they waited for, the sampling, is
  complete and its writes are visible.
- A kernel that is complete makes all ahead of it complete, since some program of it waited for the one ahead before it
  ended. So past this kernel's own wait all kernels ahead are complete, and whatever is written here (the token's own
  key and value, results, parts, tickets) is written after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.order import place
from llmopt.codegen.templates.packed_rows import turned_back
from llmopt.codegen.templates.paged import dot, drain, key_rows, logits, rows
from llmopt.compiler.emittable import why_no_attention
from llmopt.compiler.target import Target

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FEW = tl.constexpr(16)  # parts of one sequence's eight key/value heads that have a multiprocessor each


@triton.jit
def _step(
    q, k, v, ok, m, mass, acc, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SWAP: tl.constexpr, DRAIN: tl.constexpr
):  # fmt: skip
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
    if DRAIN:  # without SWAP the product reads p from registers while it runs
        drain()
    return top, mass, acc


@triton.jit
def _combine(partial, lse, n, h, parts, SPLITS, HQ: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr,
             BLOCK_S: tl.constexpr):  # fmt: skip
    # the result [G, DV] of partial [N, HQ, SPLITS, DV], lse [N, HQ, SPLITS, 2]; all of the first `parts` hold something
    G: tl.constexpr = HQ // HKV
    g = tl.arange(0, triton.next_power_of_2(G))
    d = tl.arange(0, max(16, triton.next_power_of_2(DV)))
    head = n * HQ + h * G + g
    inside = (g < G)[:, None] & (d < DV)[None, :]
    m = tl.full([g.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([g.shape[0]], tl.float32)
    acc = tl.zeros([g.shape[0], d.shape[0]], tl.float32)
    for first in range(0, parts, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = head[None, :] * SPLITS + split[:, None]
        real = split < parts
        # three loads under way at once, past the first-level cache, which may hold what an earlier launch left there
        some = real[:, None, None] & inside[None, :, :]
        results = tl.load(
            partial + (at[:, :, None] * DV + d[None, None, :]), mask=some, other=0.0, cache_modifier=".cg"
        )
        # heads by parts: the threads that hold a head's parts are neighbours
        ok = (g < G)[:, None] & real[None, :]
        tops = tl.load(lse + tl.trans(at) * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(lse + tl.trans(at) * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
        tops = tl.where((g < G)[:, None], tops, 0.0)  # heads that pad the group stay finite
        top = tl.maximum(m, tl.max(tops, 1))
        shrink, weights = tl.exp2(m - top), tl.exp2(tops - top[:, None])
        mass = mass * shrink + tl.sum(sums * weights, 1)
        acc = acc * shrink[:, None] + tl.sum(results * tl.trans(weights)[:, :, None], 0)
        m = top
    return acc / tl.where(g < G, mass, 1.0)[:, None]


@triton.jit
def _store(out, value, n, h, HQ: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr, ORDER: tl.constexpr):
    # `_combine`'s value
    g = tl.arange(0, value.shape[0])
    d = tl.arange(0, value.shape[1])
    at = _place(n, n * HQ + h * (HQ // HKV) + g, d, HQ, DV, ORDER)
    inside = (g < HQ // HKV)[:, None] & (d < DV)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place(n, head, d, HQ: tl.constexpr, DV: tl.constexpr, ORDER: tl.constexpr):
    # of channel d [D] of head [H], counted through all tokens
    if ORDER == 0:
        return head[:, None] * DV + d[None, :]
    else:
        return n * (HQ * DV) + place((head - n * HQ)[:, None] * DV + d[None, :], ORDER)


@triton.jit
def _begin(q, own_k, sink, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr):
    # maximum, sum and the own value's share [G] of a softmax that begins with the token's own key [1 or G, D]
    s = logits(tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1), SCALE, SOFTCAP)
    top, share, mass = s, tl.full(s.shape, 1.0, tl.float32), tl.full(s.shape, 1.0, tl.float32)
    if SINKS:
        sink = sink * 1.4426950408889634
        top = tl.maximum(s, sink)
        share = tl.exp2(s - top)
        mass = share + tl.exp2(sink - top)
    return top, mass, share


@triton.jit
def _own(k_pages, v_pages, slot, q, own_k, own_v, sink, h, owner, HKV: tl.constexpr, D: tl.constexpr,
         DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
         SINKS: tl.constexpr):  # fmt: skip
    # the token's key [1 or G, D] and value [1 or G, DV], rows alike, into their slot, and the state of the softmax that
    # begins with them; the parts that do not own the token begin with nothing, by selects: a branch would end the batch
    # of loads above it
    d = tl.arange(0, own_k.shape[1])[None, :]
    dv = tl.arange(0, own_v.shape[1])[None, :]
    once = owner & (tl.arange(0, own_k.shape[0]) == 0)[:, None]
    row = ((slot // PAGE) * HKV + h) * PAGE + slot % PAGE
    tl.store(k_pages + (row * D + d) + tl.zeros(own_k.shape, tl.int32), own_k, mask=once & (d < D))
    tl.store(v_pages + (row * DV + dv) + tl.zeros(own_v.shape, tl.int32), own_v, mask=once & (dv < DV))
    top, mass, share = _begin(q, own_k, sink, SCALE, SOFTCAP, SINKS)
    share = tl.where(owner, share, 0.0)
    m = tl.where(owner, top, float("-inf"))
    return m, tl.where(owner, mass, 0.0), share[:, None] * own_v.to(tl.float32)


@triton.jit
def _part(partial, lse, m, mass, acc, part, real, DV: tl.constexpr):
    # a part's unnormalised result acc [G, DV], its maximum and its sum
    dv = tl.arange(0, acc.shape[1])
    tl.store(partial + (part[:, None] * DV + dv[None, :]), acc, mask=real[:, None] & (dv < DV)[None, :])
    tl.store(lse + part * 2, m, mask=real)
    tl.store(lse + part * 2 + 1, mass, mask=real)
    tl.debug_barrier()  # the ticket, drawn by one thread, is to follow the stores of all


@triton.jit
def _leave(
    out, partial, lse, tickets, m, mass, acc, head, real, dv, n, h, split, parts, SPLITS, HQ: tl.constexpr,
    HKV: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, ORDER: tl.constexpr, V_ORDER: tl.constexpr,
):  # fmt: skip
    # a part's acc [G, DV] of query heads [G], of which some are real: the result if there is no other part, else left
    # for the last one to arrive, who adds all up. Values that are rotated in blocks of V_ORDER are turned back
    heads = n * HQ + head
    if split < parts:
        if parts == 1:
            value = turned_back(acc / mass[:, None], dv[None, :], V_ORDER).to(out.dtype.element_ty)
            at = _place(n, heads, dv, HQ, DV, ORDER)
            tl.store(out + at, value, mask=real[:, None] & (dv < DV)[None, :])
        else:
            _part(partial, lse, m, mass, acc, heads * SPLITS + split, real, DV)
            if tl.atomic_add(tickets + (n * HKV + h), 1, sem="acq_rel") == parts - 1:
                value = _combine(partial, lse, n, h, parts, SPLITS, HQ, HKV, DV, BLOCK_S)
                value = turned_back(value, tl.arange(0, value.shape[1])[None, :], V_ORDER)
                _store(out, value, n, h, HQ, HKV, DV, ORDER)
                tl.store(tickets + (n * HKV + h), 0)


@triton.jit
def _keys(position, split, SPLITS, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr, LEAST: tl.constexpr):
    # positions first .. last - 1 of a part, whole tiles, and how many parts there are: the last has the fewest keys,
    # and the token's own besides
    start = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    tiles = tl.cdiv(position - start, BLOCK_T)
    each = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    first = start + split * (each * BLOCK_T)
    return first, tl.minimum(first + each * BLOCK_T, position), tl.maximum(tl.cdiv(tiles, each), 1)


@triton.jit
def _channels(D: tl.constexpr):
    return tl.arange(0, max(16, triton.next_power_of_2(D)))


@triton.jit
def _touch(pages, row, D: tl.constexpr):
    # lines of 128 bytes of the rows [T] on their way to the second-level cache, and nobody waits for them
    BITS: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, triton.next_power_of_2(triton.cdiv(D * BITS, 1024))) * (1024 // BITS)
    at = (pages + (row[:, None] * D + tl.minimum(line, D - 1)[None, :])).to(tl.int64)
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _let_next_start(now):
    if now:
        tl.extra.cuda.gdc_launch_dependents()


# no kernel of its own for one token, one part or a table of a multiple of 16 pages: all steps of a bucket run the same
@triton.jit(do_not_specialize=["N", "M", "SPLITS"])
def decode_attention(
    k_pages, v_pages, tables, positions, slots, sinks, out, partial, lse, tickets, e0, e1, e2, e3, e4, e5, N, M, SPLITS,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LOAD_Q: tl.constexpr, LOAD_K: tl.constexpr, LOAD_V: tl.constexpr,
    ORDER: tl.constexpr, BLOCK_T: tl.constexpr, LEAST: tl.constexpr, SWAP: tl.constexpr, PEEL: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, WIDE: tl.constexpr, DRAIN: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [N, HQ * DV] of token n = row n of tables [., M]; grid (N, HKV, SPLITS).

    k_pages [P, HKV, PAGE, D], v_pages [P, HKV, PAGE, DV]; positions, slots int64 [N]; sinks [HQ] or None; partial fp32
    [N * HQ * SPLITS * DV], lse fp32 [N * HQ * SPLITS * 2], tickets int32 [N * HKV], zero and left zero.
    LEAST: tiles of BLOCK_T keys that a part has, if the token has as many. SWAP: keys are the left operand. PEEL: a
    part's first tile is read into registers before the wait for the kernel ahead; AHEAD: the next so many tiles into
    the second-level cache. EARLY: the next kernel may start as soon as this one has, if there are at most FEW parts;
    else after the last load of keys, since programs of it that come while several of this one share a multiprocessor
    leave the multiprocessors with unequal work (H200: with 64 parts 20 % slower, with 16 a step is 1 to 2 % faster).
    WIDE: the token's own key and value are made anew for each query head, which costs loads, and spares the threads of
    several warps an exchange. DRAIN: products of a tile have ended before the next one's begin. ORDER: `order.place`'s
    OWN of the columns of out.
    """
    if PDL and EARLY:
        _let_next_start(SPLITS <= FEW)
    G: tl.constexpr = HQ // HKV
    WIDTH: tl.constexpr = max(8 if SWAP else 16, triton.next_power_of_2(G))
    n, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = tables + n * M
    g = tl.arange(0, WIDTH)
    d, dv = _channels(D), _channels(DV)
    head = h * G + g
    real = g < G
    SINKS: tl.constexpr = sinks is not None
    sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) if SINKS else 0.0
    slot = tl.load(slots + n, cache_modifier=".cg")
    position = tl.load(positions + n, cache_modifier=".cg").to(tl.int32)
    first, last, parts = _keys(position, split, SPLITS, WINDOW, BLOCK_T, LEAST)
    owner = split == parts - 1
    t = first + tl.arange(0, BLOCK_T)
    row = key_rows(table, h, t, t < last, HKV, PAGE)
    if PEEL:
        ok = t < last
        k = rows(k_pages, row, ok, D, False, True)
        v = rows(v_pages, row, ok, DV, SWAP, True)
        t += BLOCK_T
        row = key_rows(table, h, t, t < last, HKV, PAGE)
    for tile in tl.static_range(AHEAD):
        after = t + tile * BLOCK_T
        near = row if tile == 0 else key_rows(table, h, after, after < last, HKV, PAGE)
        _touch(k_pages, near, D)
        _touch(v_pages, near, DV)
    if PDL:
        tl.extra.cuda.gdc_wait()

    q = LOAD_Q(n, head[:, None], d[None, :], real[:, None] & (d < D)[None, :], e0, e1, e2, e3, e4, e5)
    q = q.to(k_pages.dtype.element_ty)
    alike = tl.zeros([WIDTH if WIDE else 1, 1], tl.int32)
    c, cv = alike + d[None, :], alike + dv[None, :]
    own_k = LOAD_K(n, h, c, owner & (c < D), e0, e1, e2, e3, e4, e5).to(k_pages.dtype.element_ty)
    own_v = LOAD_V(n, h, cv, owner & (cv < DV), e0, e1, e2, e3, e4, e5).to(v_pages.dtype.element_ty)
    m, mass, acc = _own(
        k_pages, v_pages, slot, q, own_k, own_v, sink, h, owner, HKV, D, DV, PAGE, SCALE, SOFTCAP, SINKS
    )
    if SWAP:
        q, acc = tl.trans(q), tl.trans(acc)
    if PEEL and first < last:
        m, mass, acc = _step(q, k, v, ok, m, mass, acc, SCALE, SOFTCAP, SWAP, DRAIN)
    for _ in range(first + PEEL * BLOCK_T, last, BLOCK_T):
        ok = t < last
        k = rows(k_pages, row, ok, D, False)
        v = rows(v_pages, row, ok, DV, SWAP)
        t += BLOCK_T
        # rows of the tile after: the loads of a tile then wait for no table
        row = key_rows(table, h, t, t < last, HKV, PAGE)
        m, mass, acc = _step(q, k, v, ok, m, mass, acc, SCALE, SOFTCAP, SWAP, DRAIN)
    if PDL:
        _let_next_start(SPLITS > FEW if EARLY else True)

    if SWAP:
        acc = tl.trans(acc)
    _leave(out, partial, lse, tickets, m, mass, acc, head, real, dv, n, h, split, parts, SPLITS, HQ, HKV, DV, BLOCK_S,
           ORDER, 1)  # fmt: skip


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return ("N", shape["HKV"], "SPLITS")


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the attention, else the reason why not. `shape`: HQ, HKV, D, DV, PAGE."""
    if "triton" not in target.features:
        return "the target has no Triton"
    return why_no_attention(shape, dtype)


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first. `shape` as for `supports`, N the tokens."""
    heads = triton.next_power_of_2(shape["HQ"] // shape["HKV"])
    wide = max(16, triton.next_power_of_2(max(shape["D"], shape["DV"])))
    if dtype == "float32":
        # products on the plain cores: small tiles, or they spill
        tried = [(0, 16, 4, 3), (0, 32, 8, 3), (0, 16, 4, 2)]
    elif heads > 16 or wide > 128:
        # more registers a key: four warps share the tile
        tried = [(0, 32, 4, 2), (1, 32, 4, 2), (0, 32, 4, 3), (0, 64, 4, 2)]
    else:
        tried = [(1, 32, 1, 3), (0, 32, 1, 3), (1, 32, 1, 4), (1, 64, 2, 3), (0, 64, 2, 3), (1, 64, 4, 3)]
        tried += [(0, 64, 4, 3), (1, 64, 1, 2), (1, 128, 4, 2), (0, 128, 4, 2)]
    # from 64 rows of queries on, their product with the values is a wgmma with its left operand in registers
    drained = heads > 32 and "wgmma" in target.features and dtype != "float32"
    plain = [
        {"SWAP": swap, "BLOCK_T": block, "LEAST": max(1, 64 // block), "PEEL": 0, "AHEAD": 0, "EARLY": 0,
         "WIDE": int(warps > 1 and heads <= 16), "DRAIN": int(drained and not swap),
         "BLOCK_S": max(1, min(16, 2048 * (1 + swap) * warps // (heads * wide))), "num_warps": warps,
         "num_stages": stages}
        for swap, block, warps, stages in tried
    ]  # fmt: skip
    few = [tile for tile in plain if tile["SWAP"] and tile["BLOCK_T"] <= 64 and tile["num_stages"] <= 3]
    begun = [c for tile in few for c in starts(tile)[1:] if not c["EARLY"]]
    return [plain[0], *begun, *plain[1:]]


def starts(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A tile with every way to begin worth trying, itself first: what is read ahead, when the next kernel may start."""
    block, warps = config["BLOCK_T"], config["num_warps"]
    tiles = config["LEAST"]
    ahead = [(0, 0, tiles), (0, tiles, tiles), (0, 2 * tiles, tiles)]
    if block <= 16 * (1 + config["SWAP"]) * warps:  # a tile of more does not fit the registers
        # where a part is two tiles, it may also be the one that is there ahead
        ahead += [(1, 0, tiles), (1, 1, tiles), *([(1, 0, 1)] if tiles > 1 else [])]
    return [
        {**config, "PEEL": peel, "AHEAD": touched, "LEAST": least, "EARLY": early}
        for early in (0, 1)
        for peel, touched, least in ahead
    ]
