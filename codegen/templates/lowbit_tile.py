"""Tiles of low-bit weights, read as `lowbit_layout` lays them out and made the left operand of a matrix product.

Nothing moves between lanes: the words that a lane loads are the operand's registers after a few instructions on whole
words. That holds for the order of columns inside a block which these functions give the weights, and x likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.templates.lowbit_bits import BITS, CONSTANTS, SPREADS, TAKES_OUT

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def asm_of(element):
    """Text and constraints that take values of this element out of words."""
    return TAKES_OUT[element]


@triton.constexpr_function
def asm_of_scales(kind, count):
    """Text that makes so many bf16 pairs of a word of scales."""
    return SPREADS[kind, count]


@triton.constexpr_function
def shape_of(element):
    """(bits, planes, values) of an element's words."""
    bits = BITS[element]
    return bits.width, bits.planes, bits.values


@triton.constexpr_function
def constant_scale(element):
    """The operand where the weights take no scale of their own."""
    return CONSTANTS[element]


@triton.jit
def load_words(w, stripe, first, ELEMENT: tl.constexpr, KP: tl.constexpr, COUNT: tl.constexpr, END: tl.constexpr):
    """The planes (three, of which the last ones may be the first) of columns `first` .. of these stripes [S]: each
    int32 [S, COUNT / columns of a block, 128]. Columns from END on are 0 where END is not None."""
    PLANES: tl.constexpr = shape_of(ELEMENT)[1]
    SPAN: tl.constexpr = 8 * shape_of(ELEMENT)[2]
    STRIPE: tl.constexpr = KP * shape_of(ELEMENT)[0] // 2  # words
    block = first // SPAN + tl.arange(0, COUNT // SPAN)[None, :, None]
    at = w + stripe[:, None, None] * STRIPE + block * (PLANES * 128) + tl.arange(0, 128)[None, None, :]
    a = _load(at, block * SPAN, END)
    b = a
    c = a
    if PLANES > 1:
        b = _load(at + 128, block * SPAN, END)
    if PLANES > 2:
        c = _load(at + 256, block * SPAN, END)
    return a, b, c


@triton.jit
def _load(at, column, END: tl.constexpr):
    if END is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=column < END, other=0)


@triton.jit
def placed(words, GROUPS: tl.constexpr):
    """Words of a plane as [S, row of the pair, g, GROUPS, words of a group, t]."""
    S: tl.constexpr = words.shape[0]
    EACH: tl.constexpr = 2 * words.shape[1] // GROUPS
    words = tl.permute(tl.reshape(words, [S, words.shape[1], 8, 4, 2, 2]), 0, 5, 2, 1, 4, 3)
    return tl.reshape(words, [S, 2, 8, GROUPS, EACH, 4])


@triton.jit
def load_byte_scales(s, stripe, first, KIND: tl.constexpr, KP: tl.constexpr, BATCH: tl.constexpr,
                     BLOCK_K: tl.constexpr, OWN: tl.constexpr, END: tl.constexpr):  # fmt: skip
    """Pairs of bf16 scales as int32 [S, 2, 8, BATCH * BLOCK_K / (4 OWN), 1, 4], for the words of `operand`."""
    SPAN: tl.constexpr = 8 * OWN  # columns that a word of scales serves
    S: tl.constexpr = stripe.shape[0]
    if BLOCK_K % SPAN == 0:
        COUNT: tl.constexpr = BATCH * BLOCK_K // SPAN
        block = first // SPAN + tl.arange(0, COUNT)[None, :, None]
        at = s + stripe[:, None, None] * (KP // SPAN * 32) + block * 32 + tl.arange(0, 32)[None, None, :]
        word = tl.reshape(_load(at, block * SPAN, END), [S, COUNT, 8, 4])
        if INTERPRETED:
            a, b = _spread(word, KIND)
            c, d = _spread(word >> 16, KIND)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                asm_of_scales(KIND, 4), "=r,=r,=r,=r,r", [word], dtype=(tl.int32,) * 4, is_pure=True, pack=1
            )
        scales = tl.join(tl.join(a, c), tl.join(b, d))  # [S, blocks, g, t, half, row of the pair]
        return tl.reshape(tl.permute(scales, 0, 5, 2, 1, 4, 3), [S, 2, 8, COUNT * 2, 1, 4])
    else:  # half a word: its other half is another step's or another warp's, who loads it again
        tl.static_assert(BLOCK_K == SPAN // 2)
        half = first // BLOCK_K + tl.arange(0, BATCH)[None, :, None]
        at = s + stripe[:, None, None] * (KP // SPAN * 32) + half // 2 * 32 + tl.arange(0, 32)[None, None, :]
        word = tl.reshape(_load(at, half * BLOCK_K, END) >> (half % 2 * 16), [S, BATCH, 8, 4])
        if INTERPRETED:
            a, b = _spread(word, KIND)
        else:
            a, b = tl.inline_asm_elementwise(
                asm_of_scales(KIND, 2), "=r,=r,r", [word], dtype=(tl.int32,) * 2, is_pure=True, pack=1
            )
        return tl.reshape(tl.permute(tl.join(a, b), 0, 4, 2, 1, 3), [S, 2, 8, BATCH, 1, 4])


@triton.jit
def load_group_scales(
    s, stripe, first, SCALE: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr, GROUPS: tl.constexpr,
    WIDE: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """(the word beside a row's group, int32 [S, 2, 8, GROUPS, 1, 1] as the words of the weights are placed; the scale,
    fp32 [GROUPS, S, 2, 8]), for groups from column `first` on. A word of scales of 16 bits serves rows g and g + 8."""
    S: tl.constexpr = stripe.shape[0]
    WORDS: tl.constexpr = 8 if SCALE == "bfloat16" or SCALE == "float16" else 16
    group = first // GROUP + tl.arange(0, GROUPS)[None, :, None]
    # a word for each row, even where two rows share one, and each twice for four warps that have few rows: what has
    # fewer elements than there are threads is not loaded ahead
    TWICE: tl.constexpr = WIDE and stripe.shape[0] * GROUPS < 8
    row = tl.arange(0, 32)[None, None, :] // 2 if TWICE else tl.arange(0, 16)[None, None, :]
    word = _load(s + stripe[:, None, None] * (KP // GROUP * WORDS) + group * WORDS + row % WORDS, group * GROUP, END)
    if TWICE:
        word, _ = tl.split(tl.reshape(word, [S, GROUPS, 16, 2]))
    word = tl.permute(tl.reshape(word, [S, GROUPS, 2, 8]), 0, 2, 3, 1)
    scale = word
    if SCALE == "bfloat16" or SCALE == "float16":
        scale = word << (16 - 16 * tl.arange(0, 2)[None, :, None, None])
    if SCALE == "float16" or SCALE == "float16 zeros":
        half = (scale >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        scale = half.to(tl.float32).to(tl.int32, bitcast=True)
    elif SCALE != "float32":
        scale = scale & -65536
    return word[:, :, :, :, None, None], tl.permute(scale, 3, 0, 1, 2).to(tl.float32, bitcast=True)


@triton.jit
def constant_operand(like, ELEMENT: tl.constexpr):
    """The operand of weights without a scale of their own, int32 as `like`: which takes no part, but is loaded ahead
    with what the product needs, since it leads there."""
    if INTERPRETED:
        return like * 0 + (constant_scale(ELEMENT) - (1 << 32) * (constant_scale(ELEMENT) >> 31))
    else:
        return tl.inline_asm_elementwise(
            moves(constant_scale(ELEMENT)), "=r,r", [like], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.constexpr_function
def moves(word):
    """Text that sets a register."""
    return f"mov.b32 $0, {word:#x};"


@triton.jit
def operand(
    a, b, c, scales, ELEMENT: tl.constexpr, GROUPS: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """bf16 [BATCH, rows, COLUMNS] ([rows, COLUMNS] for a BATCH of 1) of planes as `load_words` gives them.

    scales: int32, pairs of bf16, to broadcast with [S, 2, 8, GROUPS, words of a group, 4]. WIDE: the order of columns
    is that of wgmma, else of mma.
    """
    VALUES: tl.constexpr = shape_of(ELEMENT)[2]
    S: tl.constexpr = a.shape[0]
    ROWS: tl.constexpr = S * 16
    a = placed(a, GROUPS)
    b = placed(b, GROUPS)
    c = placed(c, GROUPS)
    a, scales = tl.broadcast(a, scales)
    if INTERPRETED:
        v = _values(a, b, c, scales, ELEMENT)
    elif shape_of(ELEMENT)[1] == 1:
        v = tl.inline_asm_elementwise(asm_of(ELEMENT)[0], asm_of(ELEMENT)[1], [a, scales], (tl.bfloat16,) * 8, True, 1)
    elif shape_of(ELEMENT)[1] == 2:
        v = tl.inline_asm_elementwise(
            asm_of(ELEMENT)[0], asm_of(ELEMENT)[1], [a, b, scales], (tl.bfloat16,) * 8, True, 1
        )
    else:
        v = tl.inline_asm_elementwise(
            asm_of(ELEMENT)[0], asm_of(ELEMENT)[1], [a, b, c, scales], (tl.bfloat16,) * 16, True, 1
        )
    if VALUES == 8:
        # dimensions 0 to 4: S, row of the pair, g, word, t; then a value's bits, highest first
        eight = tl.reshape(_eight(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]),
                           [S, 2, 8, BATCH, COLUMNS // 32, 4, 2, 2, 2])  # fmt: skip
        found = tl.permute(eight, 3, 0, 1, 2, 4, 6, 7, 5, 8) if WIDE else tl.permute(eight, 3, 0, 1, 2, 4, 6, 5, 7, 8)
    else:
        one = _eight(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])
        two = _eight(v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15])
        both = tl.reshape(tl.join(one, two), [S, 2, 8, BATCH, COLUMNS // 64, 4, 2, 2, 2, 2])  # the tile last
        if WIDE:
            found = tl.permute(both, 3, 0, 1, 2, 4, 9, 6, 7, 5, 8)
        else:
            found = tl.permute(both, 3, 0, 1, 2, 4, 9, 6, 5, 7, 8)
    return tl.reshape(found, [ROWS, COLUMNS] if BATCH == 1 else [BATCH, ROWS, COLUMNS])


@triton.jit
def _eight(v0, v1, v2, v3, v4, v5, v6, v7):
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def columns(COUNT: tl.constexpr, SPREAD: tl.constexpr):
    """The columns of a step [1, COUNT] as they are loaded for `in_order`; SPREAD, for lanes with 32 of their own: so
    that they read eight each side by side, where 64 bytes apart they would meet in the same banks of shared memory."""
    at = tl.arange(0, COUNT)
    if SPREAD:
        at = at // 128 * 128 + at // 8 % 4 * 32 + at // 32 % 4 * 8 + at % 8
        # copies of 8 bytes go through the first cache; past it, by 16, such an order costs more than it gains
        at = tl.max_contiguous(at, 4)
    return at[None, :]


@triton.jit
def in_order(
    x, OWN: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, SPREAD: tl.constexpr
):
    """x [M, BATCH * COLUMNS] as `columns` has it with the columns of each step in the operand's order:
    [BATCH, COLUMNS, M], or [COLUMNS, M] for a BATCH of 1."""
    M: tl.constexpr = x.shape[0]
    if WIDE:
        parts = tl.permute(tl.reshape(x, [M, BATCH * COLUMNS // (4 * OWN), 4, OWN // 8, 2, 2, 2]), 0, 1, 3, 4, 5, 2, 6)
        x = tl.reshape(parts, [M, BATCH, COLUMNS])
    elif SPREAD:
        parts = tl.permute(tl.reshape(x, [M, BATCH * COLUMNS // 128, 4, 4, 2, 4]), 0, 1, 2, 4, 3, 5)
        x = tl.reshape(parts, [M, BATCH, COLUMNS])
    else:
        parts = tl.permute(tl.reshape(x, [M, BATCH * COLUMNS // (4 * OWN), 4, OWN // 8, 2, 4]), 0, 1, 3, 4, 2, 5)
        x = tl.reshape(parts, [M, BATCH, COLUMNS])
    if BATCH == 1:
        return tl.trans(tl.reshape(x, [M, COLUMNS]))
    else:
        return tl.permute(x, 1, 2, 0)


# the same on Triton's interpreter, which has no inline assembly: integers, and fp32 for bf16, exact for all values


@triton.jit
def _spread(word, KIND: tl.constexpr):
    found = []
    for byte in range(2):
        code = (word >> (8 * byte)) & 255
        found.append((code << 4) + 0x7580 if KIND == "e4m3" else code << 7)
    return found[0] * 65537, found[1] * 65537


@triton.jit
def _bf16(half):
    return (half << 16).to(tl.float32, bitcast=True)


@triton.jit
def _or_terms(planes, terms, half):
    bits = (planes[0] >> 16) & 0
    for plane, shift, mask in terms:
        word = (planes[plane] >> (16 * half)) & 0xFFFF
        moved = word << shift if shift > 0 else word >> -shift
        bits = bits | (moved & mask)
    return bits


@triton.jit
def _values(a, b, c, scales, ELEMENT: tl.constexpr):
    found = []
    for terms in BITS[str(getattr(ELEMENT, "value", ELEMENT))].pairs:
        for half in range(2):
            scale = _bf16((scales >> (16 * half)) & 0xFFFF)
            planes = (a, b, c)
            if ELEMENT == "int8":
                low = _bf16(_or_terms(planes, terms[:1], half) | 0x4300)
                high = _bf16(_or_terms(planes, terms[1:], half) | 0x4300)
                value = high * 16.0 - 2304.0 + low
            elif ELEMENT == "int4":
                value = _bf16(_or_terms(planes, terms, half) | 0x4300) + scale
            else:
                value = _bf16(_or_terms(planes, terms, half)) * scale
            found.append(value.to(tl.bfloat16))
    return found
