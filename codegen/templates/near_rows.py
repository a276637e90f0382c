"""Near tokens of packed pages while decoding: plain bf16 rows that `compiler.quant.near` arranges.

The programs of a sequence share its near rows, which were written by earlier steps; the one that owns the token's key
writes the token's own over one that nobody sees any more: the row of the token `RECENT` before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.templates.packed_rows import row_words, step_words
from llmopt.codegen.templates.paged import dot, logits

_BLOCK = tl.constexpr(16)  # near rows of a tile


@triton.constexpr_function
def _page_elements(kind, channels, page):
    # of a head's part of a page
    return page * (row_words(kind, channels) + 1 + step_words(kind, channels)) * 2


@triton.jit
def _begins(table, M, r, ok, h, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    # the element of the pages at which near row r begins
    EACH: tl.constexpr = _page_elements(KIND, D, PAGE)
    page = tl.load(table + (M - 1 - r // (EACH // D)), mask=ok, other=0)
    return (page * HKV + h) * EACH + r % (EACH // D) * D


@triton.jit
def store_near(pages, x, d, table, M, position, kept, h, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
               PAGE: tl.constexpr, FIRST: tl.constexpr, RECENT: tl.constexpr):  # fmt: skip
    """x [1, DP] of the token at `position` into its near row, if it is kept."""
    r = tl.where(position < FIRST, position, FIRST + (position - FIRST) % RECENT) if RECENT > 0 else position
    at = _begins(table, M, r, kept, h, KIND, HKV, D, PAGE)
    tl.store(pages.to(tl.pointer_type(tl.bfloat16)) + (at + d), x.to(tl.bfloat16), mask=kept & (d < D))


@triton.jit
def is_far(t, position, FIRST: tl.constexpr, RECENT: tl.constexpr):
    """Are the tokens at positions t, before `position`, seen as packed rows?"""
    far = t >= FIRST
    if RECENT > 0:
        far = far & (t <= position - RECENT)
    return far


@triton.jit
def _tile(pages, begins, d, ok, D: tl.constexpr):
    # past the first-level cache, since rows are written over from step to step
    source = pages.to(tl.pointer_type(tl.bfloat16)) + (begins[:, None] + d)
    return tl.load(source, mask=ok[:, None] & (d < D), other=0.0, cache_modifier=".cg")


@triton.jit
def shared(split, parts, FIRST: tl.constexpr, RECENT: tl.constexpr):
    """The near rows of one of the `parts` programs: from, and up to; of programs behind them none."""
    each = tl.cdiv(FIRST + RECENT, parts * _BLOCK) * _BLOCK
    return split * each, tl.where(split < parts, tl.minimum(split * each + each, FIRST + RECENT), 0)


@triton.jit
def over_near(
    q, m, mass, begin, end, k_pages, v_pages, c, cv, table, M, position, h, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FIRST: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """(m, mass, acc fp32 [G, DVP]) of a softmax that stood at m, mass [G], finite, after the near rows from `begin` up
    to `end` of tokens before `position`; acc is theirs alone. q bf16 [G, DP] of channels c [1, DP], not rotated;
    values' channels are cv."""
    acc = tl.zeros([cv.shape[1], q.shape[0]], tl.float32)
    q = tl.trans(q)
    for row in tl.range(begin, end, _BLOCK, num_stages=1):
        r = row + tl.arange(0, _BLOCK)
        away = position - r  # of first tokens
        seen = (r < position) & (r < end)
        if RECENT > 0:  # the ring: the last token before `position` of each row; the one RECENT away is not near
            round = 1 + (away - 1) % RECENT
            away = tl.where(r < FIRST, away, round)
            seen = seen & ((r < FIRST) | (round < RECENT))
        if WINDOW > 0:
            seen = seen & (away < WINDOW)
        k = _tile(k_pages, _begins(table, M, r, seen, h, K_KIND, HKV, D, PAGE), c, seen, D)
        v = _tile(v_pages, _begins(table, M, r, seen, h, V_KIND, HKV, DV, PAGE), cv, seen, DV)
        s = dot(k, q, tl.zeros([_BLOCK, q.shape[1]], tl.float32))
        s = tl.where(seen[:, None], logits(s, SCALE, SOFTCAP), float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - top[None, :])
        shrink = tl.exp2(m - top)
        mass = mass * shrink + tl.sum(p, 0)
        acc = dot(tl.trans(v), p.to(tl.bfloat16), acc * shrink[None, :])
        m = top
    return m, mass, tl.trans(acc)
