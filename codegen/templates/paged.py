"""What both attention kernels share: where a key lies in the pages, what a score is, one step of the online softmax.

Scores are kept in units of log2, so that the softmax is one exp2 an element (Dao et al., 2022: FlashAttention).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def key_rows(table, h, t, ok, HKV: tl.constexpr, PAGE: tl.constexpr):
    """Row numbers int64 of keys at positions t (int32) in pages [P, HKV, PAGE, .] viewed as rows."""
    page = tl.load(table + t // PAGE, mask=ok, other=0)
    return (page * HKV + h) * PAGE + t % PAGE


@triton.jit
def rows(pages, row, ok, D: tl.constexpr, TURNED: tl.constexpr, PAST: tl.constexpr = False):
    """Tile [T, D padded to a power of two] of the rows `row` [T] of `pages`, zero where masked. TURNED: its transpose.
    PAST: read past the first-level cache, which may be older than a write of the kernels ahead.

    A tile loaded turned reaches the tensor cores as left operand by asynchronous copies, one turned later does not.
    """
    DP: tl.constexpr = max(16, triton.next_power_of_2(D))
    d = tl.arange(0, DP)[:, None] if TURNED else tl.arange(0, DP)[None, :]
    r, inside = (row[None, :], ok[None, :]) if TURNED else (row[:, None], ok[:, None])
    if DP != D:
        inside = inside & (d < D)
    if PAST:
        return tl.load(pages + (r * D + d), mask=inside, other=0.0, cache_modifier=".cg")
    else:
        return tl.load(pages + (r * D + d), mask=inside, other=0.0)


@triton.jit
def logits(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in units of log2 from q.k: scaled, then cut softly, SOFTCAP * tanh(score / SOFTCAP), if that is > 0."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); an exp that overflows gives 1
        grown = tl.exp2(products * (2.0 * LOG2E * SCALE / SOFTCAP))
        return (SOFTCAP * LOG2E) - (2.0 * SOFTCAP * LOG2E) / (1.0 + grown)
    return products * (LOG2E * SCALE)


@triton.jit
def dot(a, b, acc):
    """acc + a b; fp32 operands in full precision."""
    if INTERPRETED:  # which would multiply the integers that it keeps bf16 in
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def drain():
    """Wait until every wgmma that was started has ended (sm_90 alone has them). One that reads its left operand from
    registers needs it: the compiler uses them again too early.
    """
    wait: tl.constexpr = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;"
    tl.inline_asm_elementwise(wait, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
