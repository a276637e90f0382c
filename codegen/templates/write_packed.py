"""Queries, keys and values of a step's tokens made ready for packed pages, in one launch: what stands before attention
(norms, RoPE) is computed by hooks, keys and values are rotated, rounded and stored, queries rotated as keys are.

`prefill_attention` reads the pages then; torch's attention of whole prompts reads k_out and v_out, which hold what the
pages do, rounded to their dtype, so that the same tokens get the same result by either way but for that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.packed_rows import numbers, rotated, rounded, store_row, turned_back
from llmopt.compiler.emittable import why_no_attention
from llmopt.compiler.target import Target

FEW = 32  # tokens whose keys, values and queries have programs of their own
FEWEST = 8  # those of which each query has one


@triton.jit
def _write(
    pages, out, x, d, slot, n, h, KIND: tl.constexpr, ORDER: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # x [1, DP] into its slot, and what its codes stand for into row n of out; BACK: not rotated any more
    ok = d < D
    if KIND == "":
        row = ((slot // PAGE) * HKV + h) * PAGE + slot % PAGE
        tl.store(pages + row * D + d, x, mask=ok)
        value = x
    else:
        x = x.to(tl.bfloat16).to(tl.float32)
        codes, scale, offset = rounded(rotated(x, d, ORDER, False), d, KIND, D)
        store_row(pages, slot, h, codes, scale, offset, True, KIND, HKV, D, PAGE)
        value = numbers(codes, scale, offset, KIND)
        if BACK:
            value = turned_back(value, d, ORDER)
    if out is not None:
        tl.store(out + (n * HKV + h) * D + d, value, mask=ok)


@triton.jit
def _write_queries(out, q, d, ok, n, head, ORDER: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr):
    if ORDER > 1:
        q = rotated(q.to(tl.bfloat16).to(tl.float32), d, ORDER, True)
    tl.store(out + (n * HQ + head) * D + d, q, mask=ok)


@triton.jit
def write_packed(
    q_out, k_out, v_out, k_pages, v_pages, slots, e0, e1, e2, e3, e4, e5, HQ: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, LOAD_Q: tl.constexpr, LOAD_K: tl.constexpr,
    LOAD_V: tl.constexpr, K_KIND: tl.constexpr, K_ORDER: tl.constexpr, V_KIND: tl.constexpr, V_ORDER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Token n = program_id(0), key/value head h = program_id(1): q_out [N, HQ, D], rotated with blocks of K_ORDER;
    k_out [N, HKV, D] and v_out [N, HKV, DV] or None, the keys still rotated; pages as `decode_packed` reads them, or
    plain where the kind is "". Grid (N, HKV, 1), or (N, HKV, 3): programs for keys, for values and for queries, or
    (N, HKV, 2 + HQ // HKV), where each query has its own.
    """
    G: tl.constexpr = HQ // HKV
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, parts = tl.program_id(2), tl.num_programs(2)
    d = tl.arange(0, max(16, triton.next_power_of_2(D)))[None, :]
    dv = tl.arange(0, max(16, triton.next_power_of_2(DV)))[None, :]
    g = tl.arange(0, triton.next_power_of_2(G))
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + n)
    one = tl.zeros([1, 1], tl.int32)
    head = (h * G + g)[:, None]
    ok = (g < G)[:, None] & (d < D)
    if parts == 1:  # loads first, so that what is computed of one hides what another waits for
        k = LOAD_K(n, h, one + d, d < D, e0, e1, e2, e3, e4, e5)
        v = LOAD_V(n, h, one + dv, dv < DV, e0, e1, e2, e3, e4, e5)
        q = LOAD_Q(n, head, d, ok, e0, e1, e2, e3, e4, e5)
        _write(k_pages, k_out, k, d, slot, n, h, K_KIND, K_ORDER, HKV, D, PAGE, False)
        _write(v_pages, v_out, v, dv, slot, n, h, V_KIND, V_ORDER, HKV, DV, PAGE, True)
        _write_queries(q_out, q, d, ok, n, head, K_ORDER, HQ, D)
    elif part == 0:
        k = LOAD_K(n, h, one + d, d < D, e0, e1, e2, e3, e4, e5)
        _write(k_pages, k_out, k, d, slot, n, h, K_KIND, K_ORDER, HKV, D, PAGE, False)
    elif part == 1:
        v = LOAD_V(n, h, one + dv, dv < DV, e0, e1, e2, e3, e4, e5)
        _write(v_pages, v_out, v, dv, slot, n, h, V_KIND, V_ORDER, HKV, DV, PAGE, True)
    elif parts == 3:
        q = LOAD_Q(n, head, d, ok, e0, e1, e2, e3, e4, e5)
        _write_queries(q_out, q, d, ok, n, head, K_ORDER, HQ, D)
    else:
        own = one + (h * G + part - 2)
        alone = LOAD_Q(n, own, d, d < D, e0, e1, e2, e3, e4, e5)
        _write_queries(q_out, alone, d, d < D, n, own, K_ORDER, HQ, D)


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`: few tokens wait for what one program does one by one."""
    more = shape["HQ"] // shape["HKV"] - 1
    return ("N", shape["HKV"], f"1 + 2 * (1 // cdiv(N, {FEW})) + {more} * (1 // cdiv(N, {FEWEST}))")


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the attention, else the reason why not. `shape`: HQ, HKV, D, DV, PAGE."""
    return "the target has no Triton" if "triton" not in target.features else why_no_attention(shape, dtype)


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first: a token's head is little work."""
    return [{"num_warps": warps, "num_stages": 1} for warps in (1, 2, 4)]
