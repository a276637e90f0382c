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

from llmopt.codegen.templates.packed import (
    centre_of,
    in_channels,
    in_order,
    key_operand,
    load_codes,
    offset_of,
    row_width,
    scale_and_offset,
)
from llmopt.codegen.templates.packed_rows import bits_of, row_at, turned_back
from llmopt.codegen.templates.paged import dot, drain, key_rows, logits, rows
from llmopt.compiler.emittable import why_no_attention
from llmopt.compiler.target import Target


@triton.constexpr_function
def _channels(size, kind):
    return row_width(kind, size, 4) * (32 // bits_of(kind)) if kind else max(16, triton.next_power_of_2(size))


@triton.jit
def _lies(table, h, t, ok, KIND: tl.constexpr, HKV: tl.constexpr, PAGE: tl.constexpr):
    # rows of keys at positions t; of packed pages the pages alone
    if KIND != "":
        return tl.load(table + t // PAGE, mask=ok, other=0)
    else:
        return key_rows(table, h, t, ok, HKV, PAGE)


@triton.jit
def _packed_tile(pages, page, h, at, ok, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    # bf16 [T, channels] in the operand's order, and the scale and offset [T] of each
    words = pages.to(tl.pointer_type(tl.int32))
    first, word, step = row_at(page, at % PAGE, h, KIND, HKV, D, PAGE)
    codes = load_codes(words, first, step, ok, KIND, D, row_width(KIND, D, 4))
    scale, offset = scale_and_offset(tl.load(words + word, mask=ok, other=0), KIND)
    return key_operand(codes, KIND), scale, offset


@triton.jit
def _walk(
    q, total, k_pages, v_pages, table, h, at, begin, end, m, mass, beside, acc, MASKED: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_T: tl.constexpr, DRAIN: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
):  # fmt: skip
    # keys begin .. end - 1 for queries q [Q, D] at positions `at` [Q]; without MASKED whole tiles that all of them see.
    # Of packed pages q's channels are in the operand's order and `total` [Q] their sum; acc's channels come in that
    # order, and `beside` [Q] is what belongs to all of them
    t = begin + tl.arange(0, BLOCK_T)
    row = _lies(table, h, t, t < end, K_KIND, HKV, PAGE)
    for _ in range(begin, end, BLOCK_T):
        ok = t < end
        if K_KIND != "":
            k, scale, offset = _packed_tile(k_pages, row, h, t, ok, K_KIND, HKV, D, PAGE)
            s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_T], tl.float32)) * scale[None, :]
            s += total[:, None] * (offset - offset_of(K_KIND) * scale)[None, :]
        else:
            k = rows(k_pages, row, ok, D, False)
            s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_T], tl.float32))
        if V_KIND != "":
            v, v_scale, v_offset = _packed_tile(v_pages, row, h, t, ok, V_KIND, HKV, DV, PAGE)
        else:
            v = rows(v_pages, row, ok, DV, False)
        s = logits(s, SCALE, SOFTCAP)
        if MASKED:
            seen = t[None, :] <= at[:, None]
            if WINDOW > 0:
                seen = seen & (t[None, :] > at[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        t += BLOCK_T
        row = _lies(table, h, t, t < end, K_KIND, HKV, PAGE)
        top = tl.maximum(m, tl.max(s, 1))
        # a row may have seen no key yet (window, or a masked tile before its first)
        known = tl.where(top > float("-inf"), top, 0.0) if MASKED else top
        p = tl.exp2(s - known[:, None])
        shrink = tl.exp2(m - known)
        mass = mass * shrink + tl.sum(p, 1)
        if V_KIND != "":
            v = (v.to(tl.float32) - (offset_of(V_KIND) + centre_of(V_KIND))).to(v.dtype)
            beside = beside * shrink + tl.sum(p * (v_offset + centre_of(V_KIND) * v_scale)[None, :], 1)
            acc = dot((p * v_scale[None, :]).to(v.dtype), v, acc * shrink[:, None])
        else:
            acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        if DRAIN:  # the product reads p from registers while it runs
            drain()
        m = top
    return m, mass, beside, acc


@triton.jit(do_not_specialize=["M"])
def prefill_attention(
    q, k_pages, v_pages, tables, tiles, sinks, out, M, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, DRAIN: tl.constexpr, K_KIND: tl.constexpr,
    V_KIND: tl.constexpr, V_ORDER: tl.constexpr,
):  # fmt: skip
    """out [N, HQ, DV] of q [N, HQ, D]; grid (T, HQ).

    k_pages [P, HKV, PAGE, D], v_pages [P, HKV, PAGE, DV], or both packed, of kinds K_KIND and V_KIND (else ""), with
    values rotated in blocks of V_ORDER (q is rotated already, as `write_packed` leaves it); tables int64 [., M];
    tiles int32 [T, 4] = row of tables, first token, tokens (at most BLOCK_Q, consecutive), position of the first;
    sinks [HQ] or None.
    """
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    table = tables + tl.load(tiles + tile * 4) * M
    token = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    h = head // (HQ // HKV)
    i = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, _channels(D, K_KIND))
    dv = tl.arange(0, _channels(DV, V_KIND))
    # tokens * heads * channels may pass 2^31
    line = (token + i).to(tl.int64) * HQ + head
    x = tl.load(q + (line[:, None] * D + d[None, :]), mask=(i < count)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if K_KIND != "":
        total = tl.sum(x.to(tl.float32), 1)
        x = in_order(x, K_KIND)
    else:
        x = x.to(k_pages.dtype.element_ty)
    at = position + i
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    beside = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, dv.shape[0]], tl.float32)
    # before `far` the window cuts some rows, from `inner` on the diagonal does, between them every row sees every key
    end = position + count
    far = 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0)
        far = tl.minimum(start + tl.cdiv(tl.maximum(end - WINDOW - start, 0), BLOCK_T) * BLOCK_T, end)
        m, mass, beside, acc = _walk(x, total, k_pages, v_pages, table, h, at, start, far, m, mass, beside, acc, True,
                                     HKV, D, DV, PAGE, SCALE, WINDOW, SOFTCAP, BLOCK_T, DRAIN, K_KIND,
                                     V_KIND)  # fmt: skip
    inner = far + tl.maximum(position + 1 - far, 0) // BLOCK_T * BLOCK_T
    m, mass, beside, acc = _walk(x, total, k_pages, v_pages, table, h, at, far, inner, m, mass, beside, acc, False, HKV,
                                 D, DV, PAGE, SCALE, WINDOW, SOFTCAP, BLOCK_T, DRAIN, K_KIND, V_KIND)  # fmt: skip
    m, mass, beside, acc = _walk(x, total, k_pages, v_pages, table, h, at, inner, end, m, mass, beside, acc, True, HKV,
                                 D, DV, PAGE, SCALE, WINDOW, SOFTCAP, BLOCK_T, DRAIN, K_KIND, V_KIND)  # fmt: skip
    if V_KIND != "":
        acc = in_channels(acc, V_KIND) + beside[:, None]
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(m, sink)
        acc = acc * tl.exp2(m - top)[:, None]
        mass = mass * tl.exp2(m - top) + tl.exp2(sink - top)
    # rows past the count have seen nothing of their own
    value = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    if V_ORDER > 1:
        value = turned_back(value, dv[None, :], V_ORDER)
    value = value.to(out.dtype.element_ty)
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
    """Constants worth trying, the default first; none if nothing fits. `shape` as for `supports`; PACKED: pages are."""
    wide = max(16, triton.next_power_of_2(max(shape["D"], shape["DV"])))
    if dtype == "float32":
        # products on the plain cores, whose operands the compiler keeps in registers: more of them from sm_90 on
        large = wide <= (64 if "pdl" in target.features else 128)
        tried = [(32, 32, 4, 2), (16, 16, 4, 2)] if large else [(16, 16, 4, 2), (32, 16, 8, 2)]
    elif shape.get("PACKED"):
        # codes are unpacked in registers
        narrow = [(64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (64, 64, 8, 2)]
        tried = narrow if wide <= 128 else [(32, 32, 8, 2), (16, 32, 4, 2)]
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
