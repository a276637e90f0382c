"""Causal attention of tiles of tokens over paged keys and values: prompts, chunks of prompts and mixed steps.

A program owns one tile of consecutive tokens of one sequence and one query head; all keys are in the pages already.
Keys that every token of the tile sees are walked without a mask, the few beside the diagonal (and the window's far
end) with one (Dao, 2023: FlashAttention-2). Tiles at later positions have more keys, so they are started first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.paged import dot, drain, key_rows, logits, rows
from llmopt.compiler.emittable import why_no_attention
from llmopt.compiler.target import Target


@triton.jit
def _walk(
    q, k_pages, v_pages, table, h, at, begin, end, m, mass, acc, MASKED: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_T: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    # keys begin .. end - 1 for queries q [Q, D] at positions `at` [Q]; without MASKED whole tiles that all of them see
    t = begin + tl.arange(0, BLOCK_T)
    row = key_rows(table, h, t, t < end, HKV, PAGE)
    for _ in range(begin, end, BLOCK_T):
        k = rows(k_pages, row, t < end, D, False)
        v = rows(v_pages, row, t < end, DV, False)
        s = logits(dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_T], tl.float32)), SCALE, SOFTCAP)
        if MASKED:
            ok = t[None, :] <= at[:, None]
            if WINDOW > 0:
                ok = ok & (t[None, :] > at[:, None] - WINDOW)
            s = tl.where(ok, s, float("-inf"))
        t += BLOCK_T
        row = key_rows(table, h, t, t < end, HKV, PAGE)
        top = tl.maximum(m, tl.max(s, 1))
        # a row may have seen no key yet (window, or a masked tile before its first)
        known = tl.where(top > float("-inf"), top, 0.0) if MASKED else top
        p = tl.exp2(s - known[:, None])
        shrink = tl.exp2(m - known)
        mass = mass * shrink + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        if DRAIN:  # the product reads p from registers while it runs
            drain()
        m = top
    return m, mass, acc


@triton.jit(do_not_specialize=["M"])
def prefill_attention(
    q, k_pages, v_pages, tables, tiles, sinks, out, M, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """out [N, HQ, DV] of q [N, HQ, D]; grid (T, HQ).

    k_pages [P, HKV, PAGE, D], v_pages [P, HKV, PAGE, DV]; tables int64 [., M]; tiles int32 [T, 4] = row of tables,
    first token, tokens (at most BLOCK_Q, consecutive), position of the first; sinks [HQ] or None.
    """
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    table = tables + tl.load(tiles + tile * 4) * M
    token = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    h = head // (HQ // HKV)
    i = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, max(16, triton.next_power_of_2(D)))
    dv = tl.arange(0, max(16, triton.next_power_of_2(DV)))
    # tokens * heads * channels may pass 2^31
    line = (token + i).to(tl.int64) * HQ + head
    x = tl.load(q + (line[:, None] * D + d[None, :]), mask=(i < count)[:, None] & (d < D)[None, :], other=0.0)
    x = x.to(k_pages.dtype.element_ty)
    at = position + i
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, dv.shape[0]], tl.float32)
    # before `far` the window cuts some rows, from `inner` on the diagonal does, between them every row sees every key
    end = position + count
    far = 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0)
        far = tl.minimum(start + tl.cdiv(tl.maximum(end - WINDOW - start, 0), BLOCK_T) * BLOCK_T, end)
        m, mass, acc = _walk(x, k_pages, v_pages, table, h, at, start, far, m, mass, acc, True, HKV, D, DV, PAGE, SCALE,
                             WINDOW, SOFTCAP, BLOCK_T, DRAIN)  # fmt: skip
    inner = far + tl.maximum(position + 1 - far, 0) // BLOCK_T * BLOCK_T
    m, mass, acc = _walk(x, k_pages, v_pages, table, h, at, far, inner, m, mass, acc, False, HKV, D, DV, PAGE, SCALE,
                         WINDOW, SOFTCAP, BLOCK_T, DRAIN)  # fmt: skip
    m, mass, acc = _walk(x, k_pages, v_pages, table, h, at, inner, end, m, mass, acc, True, HKV, D, DV, PAGE, SCALE,
                         WINDOW, SOFTCAP, BLOCK_T, DRAIN)  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(m, sink)
        acc = acc * tl.exp2(m - top)[:, None]
        mass = mass * tl.exp2(m - top) + tl.exp2(sink - top)
    # rows past the count have seen nothing of their own
    value = (acc / tl.where(mass > 0, mass, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (line[:, None] * DV + dv[None, :]), value, mask=(i < count)[:, None] & (dv < DV)[None, :])


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return ("T", shape["HQ"])


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the attention, else the reason why not. `shape`: HQ, HKV, D, DV, PAGE."""
    if "triton" not in target.features:
        return "the target has no Triton"
    why_not = why_no_attention(shape, dtype)
    if why_not is None and not configs(shape, dtype, target):
        size = max(shape["D"], shape["DV"])
        return f"head size {size}: no tile of {dtype} fits {target.shared_bytes} bytes of shared memory"
    return why_not


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first; none if nothing fits. `shape` as for `supports`."""
    wide = max(16, triton.next_power_of_2(max(shape["D"], shape["DV"])))
    if dtype == "float32":
        # products on the plain cores, whose operands the compiler keeps in registers: more of them from sm_90 on
        large = wide <= (64 if "pdl" in target.features else 128)
        tried = [(32, 32, 4, 2), (16, 16, 4, 2)] if large else [(16, 16, 4, 2), (32, 16, 8, 2)]
    elif wide > 128:
        tried = [(128, 32, 8, 2), (64, 32, 4, 2)]
    elif "wgmma" in target.features:
        tried = [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)]
    else:
        # the queries lie in registers: less room for scores
        tried = [(64, 32, 4, 3), (128, 32, 8, 3), (64, 32, 4, 2), (128, 32, 8, 2)]
    drain = int("wgmma" in target.features and dtype != "float32")
    size = 4 if dtype == "float32" else 2
    room = [t for t in tried if (2 * t[3] * t[1] + t[0]) * wide * size <= target.shared_bytes]
    return [
        {"BLOCK_Q": block_q, "BLOCK_T": block_t, "DRAIN": drain, "num_warps": warps, "num_stages": stages}
        for block_q, block_t, warps, stages in room
    ]


def torch_attends(
    shape: Mapping[str, int], dtype: str, target: Target, window: int, softcap: float, sinks: bool
) -> str | None:
    """None if torch's attention of whole prompts computes the same, faster where it was measured; else why not."""
    if window > 0 or softcap > 0 or sinks:
        return "window, softcap and sinks are not its own"
    if dtype not in ("bfloat16", "float16"):
        return f"dtype {dtype}: it has no fast kernel"
    if "wgmma" not in target.features:
        return f"{target.isa}: not measured there"
    if shape["D"] != shape["DV"] or shape["D"] % 8 or shape["D"] > 256:
        return f"head sizes {shape['D']} and {shape['DV']}: equal multiples of 8 up to 256 are wanted"
    return None
