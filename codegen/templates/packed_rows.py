"""Keys and values in few bits, as `compiler.quant.kv` defines them, row by row: rotated, rounded, laid out in pages.

Codes of nvfp4 carry the scale of their group of 16 channels in bits 8 to 14 until they are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.templates.small_floats import decoded, encoded, nearest
from llmopt.compiler.quant.kv import GROUP, KINDS, TINY

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TINY = tl.constexpr(TINY)
_GROUP = tl.constexpr(GROUP)


@triton.constexpr_function
def bits_of(kind):
    """Of a code."""
    return KINDS[kind]


@triton.constexpr_function
def row_words(kind, channels):
    """Words of 32 bits of a row's codes."""
    return channels * KINDS[kind] // 32


@triton.constexpr_function
def step_words(kind, channels):
    """Words of the scales of its groups."""
    return -(-channels // (4 * GROUP)) if kind == "nvfp4" else 0


@triton.constexpr_function
def halvings(order, of_queries):
    """The power of two that normalises blocks of `order`: rounded up for queries and results, else down."""
    return 0.5 ** ((order.bit_length() - 1 + of_queries) // 2)


@triton.constexpr_function
def stages(order):
    """Of sums and differences that make up the product with a block of `order`: log2 of it."""
    return order.bit_length() - 1


@triton.jit
def signs(d):
    """1 or -1 (fp32) for channels d (int32): `kv.signs_of`."""
    bits = (d + 1) * -1640531535
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * -2048144777
    return tl.where(bits < 0, -1.0, 1.0)


@triton.jit
def hadamard(x, ORDER: tl.constexpr):
    """`kv.hadamard_blocks` of fp32 [R, D], bit for bit: neighbours are exchanged in place, never through memory."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    for stage in tl.static_range(stages(ORDER)):
        pairs = tl.reshape(x, [R, D // (2 << stage), 2, 1 << stage])
        bits = pairs.to(tl.int32, bitcast=True)
        other = (tl.xor_sum(bits, 2, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
        # one instruction for sums and differences, whose product is exact
        sign = tl.where(tl.arange(0, 2) == 1, -1.0, 1.0)[None, None, :, None]
        x = tl.reshape(tl.fma(pairs, tl.broadcast_to(sign, pairs.shape), other), [R, D])
    return x


@triton.jit
def rotated(x, d, ORDER: tl.constexpr, OF_QUERIES: tl.constexpr):
    """fp32 x [R, D] of channels d [1, D] as `Packing.rotated` (or `.asked`, OF_QUERIES) has it."""
    if ORDER > 1:
        return hadamard(x * signs(d), ORDER) * halvings(ORDER, OF_QUERIES)
    else:
        return x


@triton.jit
def turned_back(x, d, ORDER: tl.constexpr):
    """The inverse of `rotated`."""
    if ORDER > 1:
        return hadamard(x, ORDER) * halvings(ORDER, True) * signs(d)
    else:
        return x


@triton.jit
def _bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _floored(scale):
    scale = _bf16(scale)
    return tl.where(scale < _TINY, _TINY, scale)


@triton.jit
def _order(bits):
    # of floats' bits integers that are ordered as they are, and back; NaN comes first or last by its sign
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ends(y, real):
    # least and largest of each row, one of them NaN where one is: as integers, which a warp reduces in one instruction
    order = _order(y.to(tl.int32, bitcast=True))
    least = _order(tl.min(tl.where(real, order, 0x7FFFFFFF), 1)).to(tl.float32, bitcast=True)
    most = _order(tl.max(tl.where(real, order, -0x80000000), 1)).to(tl.float32, bitcast=True)
    return least, most


@triton.jit
def _inverse(x):
    # 1 / x to the nearest, of normal x of at most 12 significant bits whose inverse is normal, too
    if INTERPRETED:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    else:
        near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
        return tl.fma(near, tl.fma(-x, near, 1.0), near)


@triton.jit
def divided(x, by, inverse):
    """x / by to the nearest, `inverse` being 1 / by to the nearest, without the branches of a division for all numbers
    (Markstein, 1990: a remainder that is exact corrects a quotient). Where it is not, of quotients below 2^-5 by less
    than 2^-100, the last bit may be off: far below what rounds to the least code."""
    if INTERPRETED:  # whose fma rounds twice
        return tl.div_rn(x, tl.broadcast_to(by, x.shape))
    else:
        near = x * inverse
        return tl.fma(tl.fma(-by, near, x), inverse, near)


@triton.jit
def _by(x, NUMBER: tl.constexpr):
    # x [R] divided by a number
    by = tl.full(x.shape, NUMBER, tl.float32)
    return divided(x, by, tl.full(x.shape, 1.0 / NUMBER, tl.float32))


@triton.jit
def rounded(y, d, KIND: tl.constexpr, D: tl.constexpr):
    """(codes int32 [R, DP], scale fp32 [R], offset fp32 [R]) of y [R, DP], rotated, of which D channels count.

    Codes of nvfp4 have the scale of their group in bits 8 to 14.
    """
    real = d < D
    least, most = _ends(y, real)
    if KIND == "fp8":
        offset = tl.zeros(most.shape, tl.float32)
        scale = _floored(_by(tl.maximum(most, -least, tl.PropagateNan.ALL), 448.0))
        units = divided(y, scale[:, None], _inverse(scale)[:, None])
        codes = encoded(nearest(units, "e4m3"), "e4m3")
    elif KIND == "nvfp4":
        GROUPS: tl.constexpr = y.shape[1] // _GROUP
        grouped = tl.reshape(y, [y.shape[0] * GROUPS, _GROUP])
        offset = tl.zeros(most.shape, tl.float32)
        scale = _floored(_by(tl.maximum(most, -least, tl.PropagateNan.ALL), 2688.0))
        each = tl.reshape(tl.broadcast_to(scale[:, None], [y.shape[0], GROUPS]), [y.shape[0] * GROUPS])
        step = divided(_by(tl.max(tl.abs(grouped), 1), 6.0), each, _inverse(each))
        step = encoded(nearest(tl.maximum(step, 0.5**9), "e4m3"), "e4m3")
        unit = decoded(step, "e4m3") * each
        found = divided(grouped, unit[:, None], _inverse(unit)[:, None])
        codes = encoded(nearest(found, "e2m1"), "e2m1") | (step[:, None] << 8)
        codes = tl.reshape(codes, y.shape)
    else:
        LEVELS: tl.constexpr = (1 << bits_of(KIND)) - 1
        offset = _bf16(least) + 0.0  # no zero below zero
        scale = _floored(_by(most - offset, LEVELS))
        units = divided(y - offset[:, None], scale[:, None], _inverse(scale)[:, None])
        # beside 1.5 * 2**23 a float32 has room for whole numbers only, in its last bits, and rounds ties to even
        held = tl.minimum(tl.maximum(units, 0.0), LEVELS) + 12582912.0
        codes = held.to(tl.int32, bitcast=True) & LEVELS
    return tl.where(real, codes, 0), scale, offset


@triton.jit
def numbers(codes, scale, offset, KIND: tl.constexpr):
    """What codes stand for, fp32."""
    if KIND == "fp8":
        return decoded(codes, "e4m3") * scale[:, None]
    elif KIND == "nvfp4":
        return decoded(codes & 15, "e2m1") * (decoded(codes >> 8, "e4m3") * scale[:, None])
    else:
        return codes.to(tl.float32) * scale[:, None] + offset[:, None]


@triton.jit
def row_at(page, at, h, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    """(first word of the codes, the word of scale and offset, first word of the groups' scales) of token `at` of page
    `page`, as words of the pages."""
    CODES: tl.constexpr = row_words(KIND, D)
    STEPS: tl.constexpr = step_words(KIND, D)
    base = (page * HKV + h) * (PAGE * (CODES + 1 + STEPS))
    return base + at * CODES, base + PAGE * CODES + at, base + PAGE * (CODES + 1) + at * STEPS


@triton.jit
def store_row(pages, slot, h, codes, scale, offset, ok, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
              PAGE: tl.constexpr):  # fmt: skip
    """A row of codes [1, DP] with its scale and offset [1] into its slot, if ok."""
    EACH: tl.constexpr = 32 // bits_of(KIND)
    WORDS: tl.constexpr = codes.shape[1] // EACH
    page, at = slot // PAGE, slot % PAGE
    first, word, step = row_at(page, at, h, KIND, HKV, D, PAGE)
    out = pages.to(tl.pointer_type(tl.int32))
    channel = tl.arange(0, EACH)[None, :]
    place = (channel % 2 * (EACH // 2) + channel // 2) * bits_of(KIND)
    words = tl.sum(tl.reshape(codes & 15 if KIND == "nvfp4" else codes, [WORDS, EACH]) << place, 1)
    i = tl.arange(0, WORDS)
    tl.store(out + first + i, words, mask=ok & (i < row_words(KIND, D)))
    low = scale.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = offset.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    tl.store(out + word + tl.arange(0, 1), low | high, mask=ok)
    if KIND == "nvfp4":
        STEPS: tl.constexpr = triton.next_power_of_2(step_words(KIND, D))
        GROUPS: tl.constexpr = codes.shape[1] // _GROUP
        steps = tl.reshape(tl.max(tl.reshape(codes >> 8, [GROUPS, _GROUP]), 1), [STEPS, GROUPS // STEPS])
        steps = tl.sum(steps << (8 * tl.arange(0, GROUPS // STEPS))[None, :], 1)
        i = tl.arange(0, STEPS)
        tl.store(out + step + i, steps, mask=ok & (i < step_words(KIND, D)))
