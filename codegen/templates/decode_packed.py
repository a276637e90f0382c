"""Attention of one new token a sequence over packed keys and values: `decode_attention` for pages of few bits.

How programs share the work, when what is read, and why that is safe stands there. Here a tile of codes becomes the left
operand of both products in registers, exact in bf16; a key's scale and offset are applied to its scores, a value's to
its probabilities, so nothing is unpacked into memory. What codes as operands have too much or too little is settled in
the sums: that of q's elements in the scores, that of the probabilities in the result.

The token's own key and value are rotated, rounded and stored here, and enter as what their codes stand for. Where some
tokens are seen as they are (`near_rows`), the own one enters unrounded if it is, programs share the others, and the
tiles of codes pass over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.decode_attention import (
    FEW,
    _begin,
    _channels,
    _keys,
    _leave,
    _let_next_start,
)
from llmopt.codegen.templates.near_rows import is_far, over_near, shared, store_near
from llmopt.codegen.templates.packed import (
    by_channel,
    centre_of,
    in_order,
    key_operand,
    load_codes,
    offset_of,
    row_width,
    scale_and_offset,
    value_operand,
)
from llmopt.codegen.templates.packed_rows import bits_of, numbers, rotated, rounded, row_at, stages, store_row
from llmopt.codegen.templates.paged import dot, logits
from llmopt.compiler.emittable import why_no_attention
from llmopt.compiler.target import Target


@triton.jit
def _own_row(pages, x, d, slot, h, KIND: tl.constexpr, ORDER: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
             PAGE: tl.constexpr, near, NEAR: tl.constexpr):  # fmt: skip
    # what the codes of x [1, DP], which go into their slot, stand for; NEAR: if it is near, x itself, rotated
    y = rotated(x, d, ORDER, False)
    codes, scale, offset = rounded(y, d, KIND, D)
    store_row(pages, slot, h, codes, scale, offset, True, KIND, HKV, D, PAGE)
    found = numbers(codes, scale, offset, KIND)
    if NEAR:
        found = tl.where(near, y, found)
    return tl.where(d < D, found, 0.0)


@triton.jit
def _padded(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # x [R, D] with zeros behind its rows and columns
    for _ in tl.static_range(stages(ROWS // x.shape[0])):
        x = tl.reshape(tl.permute(tl.join(x, x * 0), 2, 0, 1), [2 * x.shape[0], x.shape[1]])
    for _ in tl.static_range(stages(COLUMNS // x.shape[1])):
        x = tl.reshape(tl.permute(tl.join(x, x * 0), 0, 2, 1), [x.shape[0], 2 * x.shape[1]])
    return x


@triton.jit
def _page(table, at, last, PAGE: tl.constexpr):
    # of the keys at these positions
    return tl.load(table + at // PAGE, mask=at < last, other=0)


@triton.jit(do_not_specialize=["N", "M", "SPLITS"])
def decode_packed(
    k_pages, v_pages, tables, positions, slots, sinks, out, partial, lse, tickets, e0, e1, e2, e3, e4, e5, N, M, SPLITS,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LOAD_Q: tl.constexpr, LOAD_K: tl.constexpr, LOAD_V: tl.constexpr,
    K_KIND: tl.constexpr, K_ORDER: tl.constexpr, V_KIND: tl.constexpr, V_ORDER: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_T: tl.constexpr, LEAST: tl.constexpr, EARLY: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
    FIRST: tl.constexpr = 0, RECENT: tl.constexpr = 0,
):  # fmt: skip
    """out [N, HQ * DV] of token n = row n of tables [., M]; grid (N, HKV, SPLITS). As `decode_attention` but for

    k_pages uint8 [P, HKV, PAGE, row of D], v_pages uint8 [P, HKV, PAGE, row of DV] as `kv.pages_of` arranges them, of
    the packings K_KIND, V_KIND with Hadamard blocks of K_ORDER, V_ORDER. The FIRST first tokens of a sequence and the
    RECENT last ones, its own included, are seen as they are: bf16, arranged by `compiler.quant.near`.
    """
    if PDL and EARLY:
        _let_next_start(SPLITS <= FEW)
    G: tl.constexpr = HQ // HKV
    WIDTH: tl.constexpr = max(8, triton.next_power_of_2(G))
    KW: tl.constexpr = row_width(K_KIND, D, 4)
    VW: tl.constexpr = row_width(V_KIND, DV, 8)
    NEAR: tl.constexpr = FIRST + RECENT > 0
    APART: tl.constexpr = PAGE == 1 or WINDOW > 0  # tokens of a pair may lie in two pages
    n, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = tables + n * M
    k_words, v_words = k_pages.to(tl.pointer_type(tl.int32)), v_pages.to(tl.pointer_type(tl.int32))
    g = tl.arange(0, WIDTH)
    dv = tl.arange(0, VW * (32 // bits_of(V_KIND)))
    # what hooks are asked for is as wide as they expect it, and padded to a tile's width afterwards
    c, cv = _channels(D)[None, :], _channels(DV)[None, :]
    head = h * G + g
    real = g < G
    SINKS: tl.constexpr = sinks is not None
    sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) if SINKS else 0.0
    slot = tl.load(slots + n, cache_modifier=".cg")
    position = tl.load(positions + n, cache_modifier=".cg").to(tl.int32)
    first, last, parts = _keys(position, split, SPLITS, WINDOW, BLOCK_T, LEAST)
    owner = split == parts - 1
    t = tl.arange(0, BLOCK_T)
    pair = tl.arange(0, BLOCK_T // 2) * 2
    page, even_page = _page(table, first + t, last, PAGE), _page(table, first + pair, last, PAGE)
    odd_page = _page(table, first + pair + 1, last, PAGE) if APART else even_page
    if PDL:
        tl.extra.cuda.gdc_wait()

    few = tl.arange(0, triton.next_power_of_2(G))[:, None]  # heads that pad the group are not rotated
    q = LOAD_Q(n, h * G + few, c, (few < G) & (c < D), e0, e1, e2, e3, e4, e5)
    plain = q.to(tl.bfloat16)
    q = rotated(plain.to(tl.float32), c, K_ORDER, True).to(tl.bfloat16)
    q = _padded(q, WIDTH, KW * (32 // bits_of(K_KIND)))
    # with near tokens a part may have no key that it sees, and the maximum stays finite
    m = tl.full([WIDTH], -1e30 if NEAR else float("-inf"), tl.float32)
    mass = tl.zeros([WIDTH], tl.float32)
    own = tl.zeros([WIDTH, dv.shape[0]], tl.float32)
    if owner:  # a branch, since the others need nothing of it
        k = LOAD_K(n, h, c, c < D, e0, e1, e2, e3, e4, e5).to(tl.bfloat16).to(tl.float32)
        v = LOAD_V(n, h, cv, cv < DV, e0, e1, e2, e3, e4, e5).to(tl.bfloat16).to(tl.float32)
        kept = True if RECENT > 0 else position < FIRST
        if NEAR:
            store_near(k_pages, k, c, table, M, position, kept, h, K_KIND, HKV, D, PAGE, FIRST, RECENT)
            store_near(v_pages, v, cv, table, M, position, kept, h, V_KIND, HKV, DV, PAGE, FIRST, RECENT)
        k = _padded(_own_row(k_pages, k, c, slot, h, K_KIND, K_ORDER, HKV, D, PAGE, kept, NEAR), 1, q.shape[1])
        v = _padded(_own_row(v_pages, v, cv, slot, h, V_KIND, V_ORDER, HKV, DV, PAGE, kept, NEAR), 1, dv.shape[0])
        m, mass, share = _begin(q, k, sink, SCALE, SOFTCAP, SINKS)
        own = share[:, None] * v
    if NEAR:
        begin, end = shared(split, parts, FIRST, RECENT)
        if begin < end:
            top, mass, near = over_near(_padded(plain, WIDTH, plain.shape[1]), m, mass, begin, end, k_pages, v_pages, c,
                                        cv, table, M, position, h, K_KIND, V_KIND, HKV, D, DV, PAGE, SCALE, WINDOW,
                                        SOFTCAP, FIRST, RECENT)  # fmt: skip
            near = _padded(rotated(near, cv, V_ORDER, False), WIDTH, dv.shape[0])
            own = own * tl.exp2(m - top)[:, None] + near
            m = top
    # codes have OFFSET too much: what a query makes of that
    total = tl.sum(q.to(tl.float32), 1)
    q = tl.trans(in_order(q, K_KIND))
    own = tl.trans(own)
    acc = tl.zeros([dv.shape[0], WIDTH], tl.float32)
    # sums over the keys of a tile, added up at the end
    masses = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    beside = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    started = m
    for begin in range(first, last, BLOCK_T):
        ok = begin + t < last
        if NEAR:
            ok = ok & is_far(begin + t, position, FIRST, RECENT)
        k_first, k_word, k_step = row_at(page, (begin + t) % PAGE, h, K_KIND, HKV, D, PAGE)
        _, v_word, _ = row_at(page, (begin + t) % PAGE, h, V_KIND, HKV, DV, PAGE)
        even_first, _, even_step = row_at(even_page, (begin + pair) % PAGE, h, V_KIND, HKV, DV, PAGE)
        odd_first, _, odd_step = row_at(odd_page, (begin + pair + 1) % PAGE, h, V_KIND, HKV, DV, PAGE)
        k = load_codes(k_words, k_first, k_step, ok, K_KIND, D, KW)
        k_scale, k_offset = scale_and_offset(tl.load(k_words + k_word, mask=ok, other=0), K_KIND)
        even = load_codes(v_words, even_first, even_step, begin + pair < last, V_KIND, DV, VW)
        odd = load_codes(v_words, odd_first, odd_step, begin + pair + 1 < last, V_KIND, DV, VW)
        v_scale, v_offset = scale_and_offset(tl.load(v_words + v_word, mask=ok, other=0), V_KIND)
        after = begin + BLOCK_T
        # rows of the tile after: the loads of a tile then wait for no table
        page, even_page = _page(table, after + t, last, PAGE), _page(table, after + pair, last, PAGE)
        odd_page = _page(table, after + pair + 1, last, PAGE) if APART else even_page
        s = dot(key_operand(k, K_KIND), q, tl.zeros([BLOCK_T, WIDTH], tl.float32))
        s = s * k_scale[:, None] + (k_offset - offset_of(K_KIND) * k_scale)[:, None] * total[None, :]
        s = tl.where(ok[:, None], logits(s, SCALE, SOFTCAP), float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - top[None, :])
        shrink = tl.exp2(m - top)
        m = top
        scaled = (p * v_scale[:, None]).to(tl.bfloat16)
        masses = masses * shrink[None, :] + p
        beside = beside * shrink[None, :] + p * (v_offset + centre_of(V_KIND) * v_scale)[:, None]
        acc = dot(value_operand(even, odd, V_KIND), scaled, acc * shrink[None, :])
    if PDL:
        _let_next_start(SPLITS > FEW if EARLY else True)

    begun = tl.where(started > float("-inf"), tl.exp2(started - m), 0.0)
    mass = mass * begun + tl.sum(masses, 0)
    acc = by_channel(acc, V_KIND) + tl.sum(beside, 0)[None, :] + own * begun[None, :]
    acc = tl.trans(acc)
    _leave(out, partial, lse, tickets, m, mass, acc, head, real, dv, n, h, split, parts, SPLITS, HQ, HKV, DV, BLOCK_S,
           ORDER, V_ORDER)  # fmt: skip


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return ("N", shape["HKV"], "SPLITS")


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the attention, else the reason why not. `shape`: HQ, HKV, D, DV, PAGE."""
    if "triton" not in target.features:
        return "the target has no Triton"
    return why_no_attention(shape, dtype)


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first. `shape` as for `supports`, N the tokens, INT4: both are."""
    heads = triton.next_power_of_2(shape["HQ"] // shape["HKV"])
    wide = max(64, triton.next_power_of_2(max(shape["D"], shape["DV"])))
    few = max(8, heads) * wide <= 2048
    if few and wide > 128:  # two warps hold what spills from one, and multiply by mma.sync, as one does
        tried = [(32, 2, 3), (32, 2, 2)]
    else:
        tried = [(64, 1, 2), (64, 1, 3)] if few and shape["INT4"] else []
        tried += [(32, 1, 3), (32, 1, 2), (32, 1, 4)] if few else [(32, 4, 2)]
    return [
        {"BLOCK_T": block, "LEAST": max(1, 64 // block), "EARLY": early,
         "BLOCK_S": max(1, min(16, 4096 * warps // (heads * wide))), "num_warps": warps, "num_stages": stages}
        for early in (0, 1) for block, warps, stages in tried
    ]  # fmt: skip
