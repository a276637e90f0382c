"""Where the bits of low-bit weights stand in the words that the kernels of `lowbit` read, and what takes them out.

A word of 32 bits is used as two halves of 16, the same way in both: one instruction then prepares two neighbouring
weights, which are a register of a matrix product's operand. A code is taken out of its half by terms (plane, shift,
mask): word `plane` shifted left (right if negative), masked, and the terms or-ed. The result of a float is bf16 whose
exponent is too small by a constant, subnormals included, which the product with the scale corrects; the result of an
integer's four bits is or-ed to 128.0, where they count ones. No other table says where a bit is: packing inverts this
one.
"""

from __future__ import annotations

from dataclasses import dataclass

Term = tuple[int, int, int]  # plane, shift to the left, mask of a half
Pairs = tuple[tuple[Term, ...], ...]


@dataclass(frozen=True)
class Bits:
    """An element's code in `planes` words that hold `values` weights of one row, neighbours in pairs.

    `places`: where the terms bring the code's bits, lowest first (integers of 8 bits: of each four). `pairs`: for each
    pair the terms; of an integer of 8 bits first those of the low four bits, then of the high ones. `bias` is the
    exponent's; 0 for integers.
    """

    width: int
    planes: int
    values: int
    bias: int
    places: tuple[int, ...]
    pairs: Pairs

    @property
    def columns(self) -> int:
        """Columns of K in a block of 512 bytes a plane: 32 lanes with 4 words each, of two rows."""
        return 8 * self.values


def _six(direct: int, field: tuple[int, int], sign: int, low: tuple[int, int], top: int) -> Pairs:
    """Sixteen codes in three words: two whole ones in each half, of the last two four bits in planes 0 and 2, and two
    in plane 1. `sign`: how far left the second code's sign moves; `top`: where the last codes' highest bit goes."""
    first = tuple(((plane, 0, direct),) for plane in range(3))
    second = tuple(((plane, sign, 0x8000), (plane, *field)) for plane in range(3))
    last = tuple(((plane, *low), (1, 15 - at, 0x8000), (1, top - at + 1, 1 << top)) for plane, at in ((0, 3), (2, 1)))
    return (*first, *second, *last)


_FP8 = tuple(
    terms for plane in range(2) for terms in (((plane, 0, 0x87F0),), ((plane, 4, 0x80F0), (plane, -4, 0x0700)))
)
_INT8 = tuple(((plane, -at, 0xF), (plane, -at - 4, 0xF)) for plane in range(2) for at in (0, 8))
_FP4 = (
    ((0, 0, 0x81C0),),
    ((0, 3, 0x81C0),),
    ((0, 6, 0x81C0),),
    ((0, 1, 0x8000), (0, -3, 0x0180), (0, -7, 0x0040)),
)

BITS = {
    "e2m1": Bits(4, 1, 8, 1, (6, 7, 8, 15), _FP4),
    "int4": Bits(4, 1, 8, 0, (0, 1, 2, 3), tuple(((0, -4 * pair, 0xF),) for pair in range(4))),
    "e2m3": Bits(6, 3, 16, 1, (4, 5, 6, 7, 8, 15), _six(0x81F0, (-5, 0x01F0), 1, (4, 0x00F0), 8)),
    "e3m2": Bits(6, 3, 16, 3, (5, 6, 7, 8, 9, 15), _six(0x83E0, (-5, 0x03E0), 11, (5, 0x01E0), 9)),
    "e4m3": Bits(8, 2, 8, 7, (4, 5, 6, 7, 8, 9, 10, 15), _FP8),
    "int8": Bits(8, 2, 8, 0, (0, 1, 2, 3), _INT8),
}

# bf16 twice, in a register
ONES_128 = 0x43004300  # 128: an or-ed integer below 16 counts ones
LESS_136 = 0xC308C308  # -136: what an int4 of code 8, which is 0, has too much
SIXTEEN = 0x41804180
LESS_2304 = 0xC510C510  # 16 * (128 + high) - 2304 + (128 + low) = 16 * high + low - 128
ZERO = 0x80008000  # -0, which changes no product


def multiplier(element: str) -> int:
    """The bf16 that makes values of the bits of a float, which has no scale of its own, in both halves."""
    return (254 - BITS[element].bias) << 7 | (254 - BITS[element].bias) << 23


def takes_out(element: str) -> str:
    """PTX: `values` bf16 of the `planes` words. The operand behind them is a pair of bf16: a float's scale (with the
    correction of the exponent), what is added to an int4; an int8 has none, but takes one."""
    bits = BITS[element]
    words = [f"${bits.values + plane}" for plane in range(bits.planes)]
    scale = f"${bits.values + bits.planes}"
    text = ["{ .reg .b32 s, t, u, o, k;", f"mov.b32 o, {ONES_128:#x};", f"mov.b32 k, {ZERO:#x};"]
    for pair, terms in enumerate(bits.pairs):
        if element == "int8":
            text += [*_or(terms[1:], words, "u", "o"), f"mov.b32 s, {SIXTEEN:#x};", f"mov.b32 t, {LESS_2304:#x};"]
            text += ["fma.rn.bf16x2 u, u, s, t;", *_or(terms[:1], words, "t", "o")]
            text += ["mov.b32 s, 0x3f803f80;", "fma.rn.bf16x2 t, t, s, u;"]
        elif element == "int4":
            text += [*_or(terms, words, "t", "o"), "mov.b32 s, 0x3f803f80;", f"fma.rn.bf16x2 t, t, s, {scale};"]
        else:
            text += [*_or(terms, words, "t"), f"fma.rn.bf16x2 t, t, {scale}, k;"]
        text.append(f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, t;")
    return "\n".join([*text, "}"])


def _or(terms: tuple[Term, ...], words: list[str], to: str, onto: str | None = None) -> list[str]:
    """`to` = the terms or-ed, onto a register if one is named; u is used up."""
    text = []
    for plane, shift, mask in terms:
        source = words[plane]
        if shift:
            text.append(f"{'shl' if shift > 0 else 'shr'}.b32 s, {source}, {abs(shift)};")
            source = "s"
        both = mask << 16 | mask
        one = f"and.b32 {to}, {source}, {both:#x};"
        text.append(one if onto is None else f"lop3.b32 {to}, {source}, {both:#x}, {onto}, 0xEA;")  # a & b | c
        onto = to
    return text


def spread_scales(kind: str, count: int) -> str:
    """PTX: pairs of bf16 of the lowest `count` bytes of a word of scales: e8m0, or the five-bit exponents and three-bit
    mantissas that stand for E4M3; the exponent's distance to a float's is `lowbit_layout`'s business."""
    factor, term = (0x00100010, 0x75807580) if kind == "e4m3" else (0x00800080, 0)
    text = ["{ .reg .b32 b;"]
    for byte in range(count):
        text += [f"prmt.b32 b, ${count}, 0, 0x444{byte};", f"mad.lo.u32 ${byte}, b, {factor:#x}, {term:#x};"]
    return "\n".join([*text, "}"])


# looked up while kernels are compiled, when only data may be read
TAKES_OUT = {
    element: (takes_out(element), ",".join(["=h"] * bits.values + ["r"] * (bits.planes + 1)))
    for element, bits in BITS.items()
}
SPREADS = {(kind, count): spread_scales(kind, count) for kind in ("e4m3", "e8m0") for count in (2, 4)}
CONSTANTS = {e: LESS_136 if e == "int4" else 0 if e == "int8" else multiplier(e) for e in BITS}
