"""Packed keys and values (`packed_rows`) as operands of matrix products.

The codes of a word are taken out two at a time, by one mask, and or-ed to a float whose last bits count ones. What
that float has too much, scales and offsets are settled in scores and probabilities, token by token. Values are centred
first: tensor cores cut what they add up, by which sums of many terms of one sign would drift.

A number of nvfp4 times the scale of its group has six bits and is exact in bf16; of these operands 2^-8, since the
power of two that a subnormal float needs does not fit beside the largest scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.templates.packed_rows import bits_of, row_words, step_words
from llmopt.codegen.templates.small_floats import decoded

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# text that makes pairs of bf16 of a word `w` of codes; int4: 128 + code, int8: code - 128, fp8: the number itself,
# nvfp4: that times 2^-126, by the pair `m` of scales, which stand 2^118 too high
_PAIRS = {
    "int4": [
        f"{f'shr.b32 t, w, {4 * pair}; lop3.b32 t, t' if pair else 'lop3.b32 t, w'}, 0xF000F, 0x43004300, 0xEA;"
        for pair in range(4)
    ],
    "int8": [
        f"shr.b32 t, w, {8 * pair}; lop3.b32 s, t, 0xF000F, 0x43004300, 0xEA; shr.b32 t, t, 4; "
        "lop3.b32 t, t, 0xF000F, 0x43004300, 0xEA; mov.b32 u, 0x41804180; mov.b32 v, 0xC510C510; "
        "fma.rn.bf16x2 t, t, u, v; mov.b32 u, 0x3F803F80; fma.rn.bf16x2 t, s, u, t;"
        for pair in range(2)
    ],
    "fp8": [
        f"{'shl.b32 s, w, 8; shl.b32 t, w, 4' if pair == 0 else 'mov.b32 s, w; shr.b32 t, w, 4'}; "
        "and.b32 s, s, 0x80008000; lop3.b32 t, t, 0x07F007F0, s, 0xEA; mov.b32 u, 0x7B807B80; mov.b32 v, 0x80008000; "
        "fma.rn.bf16x2 t, t, u, v;"
        for pair in range(2)
    ],
    "nvfp4": [
        f"{sign} {number} and.b32 s, s, 0x80008000; lop3.b32 t, t, 0x01C001C0, s, 0xEA; mov.b32 v, 0x80008000; "
        "fma.rn.bf16x2 t, t, m, v;"
        for sign, number in (
            ("shl.b32 s, w, 12;", "shl.b32 t, w, 6;"),
            ("shl.b32 s, w, 8;", "shl.b32 t, w, 2;"),
            ("shl.b32 s, w, 4;", "shr.b32 t, w, 2;"),
            ("mov.b32 s, w;", "shr.b32 t, w, 6;"),
        )
    ],
}  # fmt: skip
SCALED = frozenset({"nvfp4"})  # kinds whose text takes a pair of scales beside the words


def _text(kind: str, words: tuple[str, ...], behind: str = "") -> tuple[str, str]:
    """The whole text and its constraints: `words` are instructions that set w, `behind` what is done to each pair."""
    found = ["{ .reg .b32 w, s, t, u, v, m;"]
    results, at = 2 * len(words) * len(_PAIRS[kind]), 0
    if kind in SCALED:
        found.append(f"mov.b32 m, ${results + len(words)};")
    for word in words:
        found.append(word)
        for pair in _PAIRS[kind]:
            found += [pair, behind, f"mov.b32 {{${at}, ${at + 1}}}, t;"]
            at += 2
    return "\n".join([*found, "}"]), ",".join(["=h"] * results + ["r"] * (len(words) + (kind in SCALED)))


# by kind: codes of one word; of two words, of two tokens side by side, which are the pairs then
OF_ONE = {k: _text(k, (f"mov.b32 w, ${2 * len(p)};",)) for k, p in _PAIRS.items()}
OF_TWO = {
    k: _text(k, tuple(f"prmt.b32 w, ${4 * len(p)}, ${4 * len(p) + 1}, {half};" for half in ("0x5410", "0x7632")),
             "mov.b32 u, 0x3F803F80; mov.b32 v, 0xC308C308; fma.rn.bf16x2 t, t, u, v;" if k == "int4" else "")
    for k, p in _PAIRS.items()
}  # fmt: skip
OFFSETS = {
    "int4": 128.0,
    "int8": -128.0,
    "fp8": 0.0,
    "nvfp4": 0.0,
}  # keys: what an operand's elements are more than the codes
CENTRES = {"int4": 8.0, "int8": 128.0, "fp8": 0.0, "nvfp4": 0.0}  # values: what they are less


@triton.constexpr_function
def offset_of(kind):
    """What elements of `key_operand` are more than the codes' numbers."""
    return OFFSETS[kind]


@triton.constexpr_function
def centre_of(kind):
    """What elements of `value_operand` are less than the codes' numbers."""
    return CENTRES[kind]


@triton.constexpr_function
def text_of(kind, words):
    """Text and constraints that make pairs of one word or of two."""
    return (OF_ONE if words == 1 else OF_TWO)[kind]


@triton.constexpr_function
def is_scaled(kind):
    """Has a row scales of its groups?"""
    return kind in SCALED


@triton.jit
def _load(pages, first, ok, COUNT: tl.constexpr, W: tl.constexpr):
    i = tl.arange(0, W)[None, :]
    inside = ok[:, None]
    if COUNT != W:
        inside = inside & (i < COUNT)
    return tl.load(pages + (first[:, None] + i), mask=inside, other=0)


@triton.jit
def load_codes(pages, first, step, ok, KIND: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """(words [T, W] of the rows that begin at words `first` [T] of the pages, and where groups have scales, those in
    words [T, S] from `step` [T] on), 0 where not ok and past a row's end."""
    words = _load(pages, first, ok, row_words(KIND, D), W)
    if is_scaled(KIND):
        return words, _load(pages, step, ok, step_words(KIND, D), triton.next_power_of_2(step_words(KIND, D)))
    else:
        return words, words


@triton.constexpr_function
def row_width(kind, channels, least):
    """Words of a tile's row: a power of two, and `least` at least, one for each lane that shares a row."""
    return max(least, triton.next_power_of_2(row_words(kind, channels)))


@triton.jit
def scale_and_offset(word, KIND: tl.constexpr):
    """Both halves of words of scales, fp32; what operands have too little of nvfp4 put in."""
    scale, offset = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    return scale * 256.0 if is_scaled(KIND) else scale, offset


@triton.jit
def _units(steps, W: tl.constexpr):
    # bits of bf16 [T, W], 2^118 times the scale of each word's channels, of scales in words [T, S]
    T: tl.constexpr = steps.shape[0]
    S: tl.constexpr = steps.shape[1]
    EACH: tl.constexpr = W // (2 * S)  # groups of a word of scales, four or all there are
    code = (steps[:, :, None] >> (8 * tl.arange(0, EACH))[None, None, :]) & 127
    unit = (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36 * 3.32306998946229e35  # 2^120, 2^118
    bits = (unit.to(tl.int32, bitcast=True) >> 16)[:, :, :, None]
    return tl.reshape(tl.broadcast_to(bits, [T, S, EACH, 2]), [T, W])


@triton.jit
def _eight(v0, v1, v2, v3, v4, v5, v6, v7):
    # behind the dimensions there are: the bits of a number, highest first
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def key_operand(tile, KIND: tl.constexpr):
    """bf16 [T, channels] of a tile of `load_codes`, words [T, W]: a product's left operand, its columns as `in_order`
    has a query's. Elements are `offset_of` too large."""
    T: tl.constexpr = tile[0].shape[0]
    W: tl.constexpr = tile[0].shape[1]
    own = tl.reshape(tile[0], [T, 4, W // 4])  # lane t's words are neighbours
    units = own
    if is_scaled(KIND):
        units = tl.reshape(_units(tile[1], W) * 65537, [T, 4, W // 4])
    if INTERPRETED:
        v = _taken(own, units, KIND)
    elif is_scaled(KIND):
        v = tl.inline_asm_elementwise(text_of(KIND, 1)[0], text_of(KIND, 1)[1], [own, units], (tl.bfloat16,) * 8, True,
                                      1)  # fmt: skip
    elif KIND == "int4":
        v = tl.inline_asm_elementwise(text_of(KIND, 1)[0], text_of(KIND, 1)[1], [own], (tl.bfloat16,) * 8, True, 1)
    else:
        v = tl.inline_asm_elementwise(text_of(KIND, 1)[0], text_of(KIND, 1)[1], [own], (tl.bfloat16,) * 4, True, 1)
    if bits_of(KIND) == 4:
        eight = _eight(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])  # pair (two bits), which of it
        return tl.reshape(tl.permute(eight, 0, 2, 3, 1, 4, 5), [T, W * 8])
    else:
        four = tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3]))
        return tl.reshape(tl.permute(four, 0, 2, 1, 3, 4), [T, W * 4])


@triton.jit
def in_order(q, KIND: tl.constexpr):
    """A query's channels [G, D] as the columns of `key_operand` stand."""
    G: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    PAIRS: tl.constexpr = 16 // bits_of(KIND)  # of a word
    parts = tl.reshape(q, [G, 4, D // (8 * PAIRS), PAIRS // 2, 2, 2])
    return tl.reshape(tl.permute(parts, 0, 2, 3, 1, 4, 5), [G, D])


@triton.jit
def in_channels(x, KIND: tl.constexpr):
    """What `in_order` undoes: x [R, D] with columns as `key_operand` has them, in the channels' own order."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    PAIRS: tl.constexpr = 16 // bits_of(KIND)
    parts = tl.reshape(x, [R, D // (8 * PAIRS), PAIRS // 2, 4, 2, 2])
    return tl.reshape(tl.permute(parts, 0, 3, 1, 2, 4, 5), [R, D])


@triton.jit
def value_operand(even, odd, KIND: tl.constexpr):
    """bf16 [channels, T] of tiles of `load_codes`, words [T / 2, W], of tokens 0, 2, .. and 1, 3, ..: a product's left
    operand, its rows in an order that `by_channel` undoes. Elements are `centre_of` too small."""
    HALF: tl.constexpr = even[0].shape[0]
    W: tl.constexpr = even[0].shape[1]
    a = tl.reshape(even[0], [HALF // 8, 2, 4, 8, W // 8])  # step, half of it, lane t, lane g, its words
    b = tl.reshape(odd[0], [HALF // 8, 2, 4, 8, W // 8])
    units = a
    if is_scaled(KIND):
        units = tl.reshape(_units(even[1], W) | (_units(odd[1], W) << 16), [HALF // 8, 2, 4, 8, W // 8])
    if INTERPRETED:
        v = _taken_of_two(a, b, units, KIND)
    elif is_scaled(KIND):
        v = tl.inline_asm_elementwise(text_of(KIND, 2)[0], text_of(KIND, 2)[1], [a, b, units], (tl.bfloat16,) * 16,
                                      True, 1)  # fmt: skip
    elif KIND == "int4":
        v = tl.inline_asm_elementwise(text_of(KIND, 2)[0], text_of(KIND, 2)[1], [a, b], (tl.bfloat16,) * 16, True, 1)
    else:
        v = tl.inline_asm_elementwise(text_of(KIND, 2)[0], text_of(KIND, 2)[1], [a, b], (tl.bfloat16,) * 8, True, 1)
    one = _eight(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])
    if bits_of(KIND) == 4:
        # place of a code: half of the word, pair (two bits); then token of the pair
        two = _eight(v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15])
        both = tl.join(one, two)  # pair, pair, token, half
        found = tl.permute(both, 4, 5, 6, 8, 3, 0, 1, 2, 7)
        return tl.reshape(found, [W * 8, HALF * 2])
    else:  # half, pair, token
        found = tl.permute(one, 4, 6, 5, 3, 0, 1, 2, 7)
        return tl.reshape(found, [W * 4, HALF * 2])


@triton.jit
def by_channel(acc, KIND: tl.constexpr):
    """acc [channels, G] of a product with `value_operand`, in the channels' own order."""
    D: tl.constexpr = acc.shape[0]
    G: tl.constexpr = acc.shape[1]
    PAIRS: tl.constexpr = 16 // bits_of(KIND)
    parts = tl.reshape(acc, [D // (16 * PAIRS), PAIRS, 2, 8, G])  # word, pair, half, lane g
    return tl.reshape(tl.permute(parts, 3, 0, 1, 2, 4), [D, G])


# the same on Triton's interpreter, which has no inline assembly


@triton.jit
def _number(word, unit, at, MORE: tl.constexpr, KIND: tl.constexpr):
    code = (word >> at) & ((1 << bits_of(KIND)) - 1)
    if KIND == "fp8":
        return decoded(code, "e4m3").to(tl.bfloat16)
    elif KIND == "nvfp4":
        return (decoded(code, "e2m1") * ((unit << 16).to(tl.float32, bitcast=True) * 0.5**126)).to(tl.bfloat16)
    else:
        return (code.to(tl.float32) + MORE).to(tl.bfloat16)


@triton.jit
def _taken(word, unit, KIND: tl.constexpr):
    found = []
    for pair in range(16 // bits_of(KIND)):
        for half in range(2):
            found.append(_number(word, unit, bits_of(KIND) * pair + 16 * half, offset_of(KIND), KIND))
    return found


@triton.jit
def _taken_of_two(a, b, units, KIND: tl.constexpr):
    found = []
    for half in range(2):
        for pair in range(16 // bits_of(KIND)):
            found.append(_number(a, units, bits_of(KIND) * pair + 16 * half, -centre_of(KIND), KIND))
            found.append(_number(b, units >> 16, bits_of(KIND) * pair + 16 * half, -centre_of(KIND), KIND))
    return found
