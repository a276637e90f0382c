"""Activations rounded to low-bit codes token by token, as `compiler.quant.fake_quantize` does, for `scaled`.

Every token has its own scales, by the rule of the largest element, and where the scheme has one its own global scale.
Codes and scales are the reference's bit for bit: the same divisions, rounded to nearest, and rounding by the same
arithmetic on bits. A norm in front of the product is taken on the way and rounded to bf16 before anything is measured;
other ops that LOAD_X has are computed in fp32 and rounded once, where the reference rounds after each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.small_floats import bits_of, encoded, exponent_value, nearest
from llmopt.compiler.target import Target

_INFINITE = tl.constexpr(0x7F800000)
_TINY = tl.constexpr(2.0**-126)
_MOST = tl.constexpr(2.0**128 - 2.0**120)  # bf16's largest number


@triton.constexpr_function
def last_binade(element):
    """Exponent of the binade that the largest element of a group is brought into: `scales._even_exponent`'s."""
    _, _, largest, _ = bits_of(element)
    return {6.0: 2, 448.0: 8}[largest]


@triton.jit
def _divided(x, y):
    """x / y rounded to nearest, as torch divides; Triton's own division on a GPU is not."""
    x, y = tl.broadcast(x, y)
    return tl.div_rn(x, y)


@triton.jit
def _seen(m, k, scale, e0, e1, e2, e3, e4, e5, K: tl.constexpr, NORM: tl.constexpr, TWICE: tl.constexpr,
          LOAD_X: tl.constexpr, LOAD_G: tl.constexpr):  # fmt: skip
    """The operand at columns k [1, BLOCK] as its dtype, bf16, holds it; fp32, 0 from K on."""
    x = LOAD_X(m, k, k < K, e0, e1, e2, e3, e4, e5)
    if NORM:
        x = x * scale
        if TWICE:
            x = x.to(tl.bfloat16).to(tl.float32)
        x = x * LOAD_G(k, k < K, e0, e1, e2, e3, e4, e5)
    return tl.broadcast_to(x.to(tl.bfloat16).to(tl.float32), k.shape)


@triton.jit
def _token_scales(
    m, column, e0, e1, e2, e3, e4, e5, ELEMENT: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    NORM: tl.constexpr, TWICE: tl.constexpr, EPS: tl.constexpr, LOAD_X: tl.constexpr, LOAD_G: tl.constexpr,
):  # fmt: skip
    """(what the norm multiplies the token by, its global scale [1]), both 1 where there is none."""
    BLOCK: tl.constexpr = column.shape[1]
    scale = 1.0
    unit = tl.full([1], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([1, BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            x = LOAD_X(m, start + column, start + column < K, e0, e1, e2, e3, e4, e5)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares) / K + EPS)
    if FACTORS:
        # sizes are compared as integers, among which NaN is the largest
        largest = tl.zeros([1, BLOCK], tl.int32)
        for start in range(0, K, BLOCK):
            x = _seen(m, start + column, scale, e0, e1, e2, e3, e4, e5, K, NORM, TWICE, LOAD_X, LOAD_G)
            largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        unit = global_scale(tl.max(largest), ELEMENT)
    return scale, unit


@triton.jit
def global_scale(largest, ELEMENT: tl.constexpr):
    """[1] of a token whose largest element has these bits."""
    size = (tl.full([1], 0, tl.int32) + largest).to(tl.float32, bitcast=True)
    reach = tl.full([1], 448.0 * bits_of(ELEMENT)[2], tl.float32)
    return tl.where(size > 0, tl.maximum(_divided(size, reach), _TINY), 1.0)


@triton.jit
def _group_scales(size, unit, ELEMENT: tl.constexpr, FACTORS: tl.constexpr):
    """(codes of the scales, what a code's unit is worth) of groups whose largest elements have these bits."""
    if FACTORS:
        wanted = _divided(size.to(tl.float32, bitcast=True), tl.full([1], bits_of(ELEMENT)[2], tl.float32))
        near = nearest(tl.maximum(_divided(wanted, unit), 0.001953125), "e4m3")  # at least 2**-9: never zero
        return tl.where(size < _INFINITE, encoded(near, "e4m3"), 0x7F), near * unit
    else:
        # one bit of the largest element's mantissa counts, also with e4m3: see `scales._even_exponent`
        exponent = ((size + (1 << 21)) >> 23) - last_binade(ELEMENT)
        code = tl.where(size < _INFINITE, tl.minimum(tl.maximum(exponent, 0), 254), 255)
        return code, exponent_value(code)


@triton.jit
def _held(units, step, ELEMENT: tl.constexpr):
    """`units` within the numbers that stand for no more than bf16 holds with these steps: `quantize._held`."""
    MANTISSA: tl.constexpr = bits_of(ELEMENT)[1]
    MAX: tl.constexpr = bits_of(ELEMENT)[2]
    most = nearest(_divided(tl.full([1], 1.0, tl.float32) * _MOST, step), ELEMENT)
    lower = (most.to(tl.int32, bitcast=True) - (1 << (23 - MANTISSA))).to(tl.float32, bitcast=True)
    most = tl.where(most * step > _MOST, lower, most)
    most = tl.where(step > _MOST / MAX, most, MAX)[:, None]
    return tl.minimum(tl.maximum(units, -most), most)


@triton.jit
def store_codes(
    x, group, ok, m, unit, codes, scales, ELEMENT: tl.constexpr, GROUP: tl.constexpr, FACTORS: tl.constexpr,
    KP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the groups `group` [COUNT] of token m, x [COUNT, GROUP] in fp32 as bf16 holds it."""
    code, step = _group_scales(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), unit, ELEMENT, FACTORS)
    if TILED:
        spot = ((m // 128) * (KP // GROUP // 4) + group // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + group % 4
    else:
        spot = m * (KP // GROUP) + group
    tl.store(scales + spot, code.to(tl.uint8), mask=ok)
    units = _held(_divided(x, step[:, None]), step, ELEMENT)
    value = encoded(nearest(units, ELEMENT), ELEMENT)
    if ELEMENT == "e2m1":
        BYTES: tl.constexpr = GROUP // 2
        low, high = tl.split(tl.reshape(value, [x.shape[0], BYTES, 2]))
        byte = group[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        tl.store(codes + m * (KP // 2) + byte, (low | (high << 4)).to(tl.uint8), mask=ok[:, None])
    else:
        byte = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(codes + m * KP + byte, value.to(tl.uint8), mask=ok[:, None])


@triton.jit
def rounded(
    codes, scales, factor, e0, e1, e2, e3, e4, e5, ELEMENT: tl.constexpr, GROUP: tl.constexpr, FACTORS: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr, TWICE: tl.constexpr, EPS: tl.constexpr,
    LOAD_X: tl.constexpr, LOAD_G: tl.constexpr, BLOCK: tl.constexpr, TILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes and scales of BLOCK columns (program_id 1) of token m (program_id 0): LOAD_X(m), or its RMSNorm with NORM.

    codes uint8 [N, bytes of KP codes], the even column in the low half of a byte of two; scales uint8 [N, KP / GROUP],
    E4M3 with FACTORS, else E8M0, or with TILED as `scaled_layout` lays out a weight's; factor fp32 [N], the tokens'
    global scales, or None. Columns from K to KP hold 0. TWICE: the norm's result is rounded to bf16 before the product
    with its weight, too, since a last bit may change a code. A group with a number that is not finite gets the scale
    NaN.
    Grid (N, cdiv(KP, BLOCK)); each program looks at the whole token where there is a norm or a global scale.
    """
    COUNT: tl.constexpr = BLOCK // GROUP
    m = tl.program_id(0).to(tl.int64)
    token = tl.full([1, 1], 0, tl.int64) + m
    column = tl.arange(0, BLOCK)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    scale, unit = _token_scales(
        token, column, e0, e1, e2, e3, e4, e5, ELEMENT, FACTORS, K, NORM, TWICE, EPS, LOAD_X, LOAD_G
    )
    first = tl.program_id(1) * BLOCK
    x = _seen(token, first + column, scale, e0, e1, e2, e3, e4, e5, K, NORM, TWICE, LOAD_X, LOAD_G)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    group = first // GROUP + tl.arange(0, COUNT)
    store_codes(
        tl.reshape(x, [COUNT, GROUP]), group, group < KP // GROUP, m, unit, codes, scales, ELEMENT, GROUP, FACTORS, KP,
        TILED,
    )  # fmt: skip
    if FACTORS:
        one = tl.arange(0, 1)
        tl.store(factor + m + one, unit, mask=one == tl.program_id(1))


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return ("N", -(-shape["KP"] // config["BLOCK"]))


def supports(shape: Mapping[str, int], scheme: str, target: Target) -> str | None:
    """None if this template takes the rows, else the reason why not. `shape`: K, KP (padded), NORM, N (tokens)."""
    return None if "triton" in target.features else "the target has no Triton"


def configs(shape: Mapping[str, int], scheme: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first: short blocks, so that few tokens fill the machine as well."""
    most = triton.next_power_of_2(shape["KP"])
    blocks = (4096, 2048, 1024) if shape["N"] > 64 else (1024, 2048, 4096)
    found = [{"BLOCK": min(block, most), "num_warps": max(1, min(block, most) // 512)} for block in blocks]
    return list({repr(c): {**c, "num_stages": 1} for c in found}.values())
