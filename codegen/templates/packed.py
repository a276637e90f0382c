"""Keys and values in few bits, as `compiler.quant.kv` defines them: rotated, rounded, laid out, and made operands of
matrix products again.

The codes of a word are taken out two at a time, by one mask, and or-ed to a float whose last bits count ones. What
that float has too much, scales and offsets are settled in scores and probabilities, token by token. Values are centred
first: tensor cores cut what they add up, by which sums of many terms of one sign would drift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.templates.small_floats import decoded, encoded, nearest
from llmopt.compiler.quant.kv import KINDS, TINY

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TINY = tl.constexpr(TINY)
# text that makes pairs of bf16 of a word `w` of codes; int4: 128 + code, int8: code - 128, fp8: the number itself
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
}  # fmt: skip


def _text(kind: str, words: tuple[str, ...], behind: str = "") -> str:
    """The whole text: `words` are instructions that set w, `behind` what is done to each pair."""
    found = ["{ .reg .b32 w, s, t, u, v;"]
    at = 0
    for word in words:
        found.append(word)
        for pair in _PAIRS[kind]:
            found += [pair, behind, f"mov.b32 {{${at}, ${at + 1}}}, t;"]
            at += 2
    return "\n".join([*found, "}"])


# by kind: codes of one word; of two words, of two tokens side by side, which are the pairs then
OF_ONE = {
    k: (_text(k, (f"mov.b32 w, ${2 * len(p)};",)), ",".join(["=h"] * 2 * len(p) + ["r"])) for k, p in _PAIRS.items()
}
OF_TWO = {
    k: (_text(k, tuple(f"prmt.b32 w, ${4 * len(p)}, ${4 * len(p) + 1}, {half};" for half in ("0x5410", "0x7632")),
              "mov.b32 u, 0x3F803F80; mov.b32 v, 0xC308C308; fma.rn.bf16x2 t, t, u, v;" if k == "int4" else ""),
        ",".join(["=h"] * 4 * len(p) + ["r", "r"]))
    for k, p in _PAIRS.items()
}  # fmt: skip
OFFSETS = {"int4": 128.0, "int8": -128.0, "fp8": 0.0}  # keys: what an operand's elements are more than the codes
CENTRES = {"int4": 8.0, "int8": 128.0, "fp8": 0.0}  # values: what they are less


@triton.constexpr_function
def bits_of(kind):
    """Of a code."""
    return KINDS[kind]


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
def row_words(kind, channels):
    """Words of 32 bits of a row's codes."""
    return channels * KINDS[kind] // 32


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
        second = tl.arange(0, 2)[None, None, :, None] == 1
        x = tl.reshape(tl.where(second, other - pairs, pairs + other), [R, D])
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
def rounded(y, d, KIND: tl.constexpr, D: tl.constexpr):
    """(codes int32 [R, DP], scale fp32 [R], offset fp32 [R]) of y [R, DP], rotated, of which D channels count."""
    real = d < D
    least = tl.min(tl.where(real, y, float("inf")), 1)
    most = tl.max(tl.where(real, y, float("-inf")), 1)
    if KIND == "fp8":
        offset = tl.zeros(most.shape, tl.float32)
        scale = _floored(tl.div_rn(tl.maximum(most, -least), tl.full(most.shape, 448.0, tl.float32)))
        units = tl.div_rn(y, tl.broadcast_to(scale[:, None], y.shape))
        codes = encoded(nearest(units, "e4m3"), "e4m3")
    else:
        LEVELS: tl.constexpr = (1 << bits_of(KIND)) - 1
        offset = _bf16(least)
        scale = _floored(tl.div_rn(most - offset, tl.full(most.shape, LEVELS, tl.float32)))
        units = tl.div_rn(y - offset[:, None], tl.broadcast_to(scale[:, None], y.shape))
        # beside 1.5 * 2**23 a float32 has room for whole numbers only, and rounds ties to even
        codes = (tl.minimum(tl.maximum(units, 0.0), LEVELS) + 12582912.0 - 12582912.0).to(tl.int32)
    # minima and maxima pass over NaN
    scale = tl.where(tl.max(tl.where(real & (y != y), 1, 0), 1) > 0, float("nan"), scale)
    return tl.where(real, codes, 0), scale, offset


@triton.jit
def numbers(codes, scale, offset, KIND: tl.constexpr):
    """What codes stand for, fp32."""
    if KIND == "fp8":
        return decoded(codes, "e4m3") * scale[:, None]
    else:
        return codes.to(tl.float32) * scale[:, None] + offset[:, None]


@triton.jit
def row_at(page, at, h, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    """(first word of the codes, the word of scale and offset) of token `at` of page `page`, as words of the pages."""
    CODES: tl.constexpr = row_words(KIND, D)
    base = (page * HKV + h) * (PAGE * (CODES + 1))
    return base + at * CODES, base + PAGE * CODES + at


@triton.jit
def store_row(pages, slot, h, codes, scale, offset, ok, KIND: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
              PAGE: tl.constexpr):  # fmt: skip
    """A row of codes [1, DP] with its scale and offset [1] into its slot, if ok."""
    EACH: tl.constexpr = 32 // bits_of(KIND)
    WORDS: tl.constexpr = codes.shape[1] // EACH
    page, at = slot // PAGE, slot % PAGE
    first, word = row_at(page, at, h, KIND, HKV, D, PAGE)
    out = pages.to(tl.pointer_type(tl.int32))
    channel = tl.arange(0, EACH)[None, :]
    place = (channel % 2 * (EACH // 2) + channel // 2) * bits_of(KIND)
    words = tl.sum(tl.reshape(codes, [WORDS, EACH]) << place, 1)
    i = tl.arange(0, WORDS)
    tl.store(out + first + i, words, mask=ok & (i < row_words(KIND, D)))
    low = scale.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = offset.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    tl.store(out + word + tl.arange(0, 1), low | high, mask=ok)


@triton.jit
def load_codes(pages, first, ok, KIND: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Words [T, W] of the rows that begin at words `first` [T] of the pages, 0 where not ok and past a row's end."""
    i = tl.arange(0, W)[None, :]
    inside = ok[:, None]
    if row_words(KIND, D) != W:
        inside = inside & (i < row_words(KIND, D))
    return tl.load(pages + (first[:, None] + i), mask=inside, other=0)


@triton.constexpr_function
def row_width(kind, channels, least):
    """Words of a tile's row: a power of two, and `least` at least, one for each lane that shares a row."""
    return max(least, triton.next_power_of_2(row_words(kind, channels)))


@triton.jit
def scale_and_offset(word):
    """Both halves of words of scales, fp32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _eight(v0, v1, v2, v3, v4, v5, v6, v7):
    # behind the dimensions there are: the bits of a number, highest first
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def key_operand(words, KIND: tl.constexpr):
    """bf16 [T, channels] of words [T, W]: a product's left operand, its columns as `in_order` has a query's. Elements
    are `offset_of` too large."""
    T: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    own = tl.reshape(words, [T, 4, W // 4])  # lane t's words are neighbours
    if INTERPRETED:
        v = _taken(own, KIND)
    elif KIND == "int4":
        v = tl.inline_asm_elementwise(text_of(KIND, 1)[0], text_of(KIND, 1)[1], [own], (tl.bfloat16,) * 8, True, 1)
    else:
        v = tl.inline_asm_elementwise(text_of(KIND, 1)[0], text_of(KIND, 1)[1], [own], (tl.bfloat16,) * 4, True, 1)
    if KIND == "int4":
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
    """bf16 [channels, T] of words [T / 2, W] of tokens 0, 2, .. and 1, 3, ..: a product's left operand, its rows in an
    order that `by_channel` undoes. Elements are `centre_of` too small."""
    HALF: tl.constexpr = even.shape[0]
    W: tl.constexpr = even.shape[1]
    a = tl.reshape(even, [HALF // 8, 2, 4, 8, W // 8])  # step, half of it, lane t, lane g, its words
    b = tl.reshape(odd, [HALF // 8, 2, 4, 8, W // 8])
    if INTERPRETED:
        v = _taken_of_two(a, b, KIND)
    elif KIND == "int4":
        v = tl.inline_asm_elementwise(text_of(KIND, 2)[0], text_of(KIND, 2)[1], [a, b], (tl.bfloat16,) * 16, True, 1)
    else:
        v = tl.inline_asm_elementwise(text_of(KIND, 2)[0], text_of(KIND, 2)[1], [a, b], (tl.bfloat16,) * 8, True, 1)
    one = _eight(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])
    if KIND == "int4":
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
def _number(word, at, MORE: tl.constexpr, KIND: tl.constexpr):
    code = (word >> at) & ((1 << bits_of(KIND)) - 1)
    if KIND == "fp8":
        return decoded(code, "e4m3").to(tl.bfloat16)
    else:
        return (code.to(tl.float32) + MORE).to(tl.bfloat16)


@triton.jit
def _taken(word, KIND: tl.constexpr):
    found = []
    for pair in range(16 // bits_of(KIND)):
        for half in range(2):
            found.append(_number(word, bits_of(KIND) * pair + 16 * half, offset_of(KIND), KIND))
    return found


@triton.jit
def _taken_of_two(a, b, KIND: tl.constexpr):
    found = []
    for half in range(2):
        for pair in range(16 // bits_of(KIND)):
            found.append(_number(a, bits_of(KIND) * pair + 16 * half, -centre_of(KIND), KIND))
            found.append(_number(b, bits_of(KIND) * pair + 16 * half, -centre_of(KIND), KIND))
    return found
