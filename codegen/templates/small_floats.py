"""Small floats in kernels by arithmetic on bits, the same on a GPU and on Triton's interpreter, whose casts to fp8 are
wrong where a mantissa carries: `compiler.quant.elements`, line by line."""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.compiler.quant.elements import ELEMENTS


@triton.constexpr_function
def bits_of(element):
    """(bits of a code, of its mantissa, the largest number, exponent of the smallest normal number)."""
    found = ELEMENTS[element]
    return found.bits, found.mantissa, found.max, found.lowest_exponent


@triton.constexpr_function
def power(exponent):
    """2 to it."""
    return 2.0**exponent


@triton.jit
def nearest(x, ELEMENT: tl.constexpr):
    """`Element.nearest` of fp32: ties to even, at most the largest number."""
    MANTISSA: tl.constexpr = bits_of(ELEMENT)[1]
    MAX: tl.constexpr = bits_of(ELEMENT)[2]
    held = tl.minimum(tl.maximum(x, -MAX), MAX)
    binade = (held.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # beside 1.5 * 2**23 steps of its binade a float32 has room for whole steps only, and rounds ties to even
    anchor = tl.maximum(binade, power(bits_of(ELEMENT)[3])) * (1.5 * power(23 - MANTISSA))
    return held + anchor - anchor


@triton.jit
def encoded(value, ELEMENT: tl.constexpr):
    """Codes (int32) of `nearest`'s numbers, as `Element.encode` gives them; 0 for a zero of either sign."""
    BITS: tl.constexpr = bits_of(ELEMENT)[0]
    MANTISSA: tl.constexpr = bits_of(ELEMENT)[1]
    LOWEST: tl.constexpr = bits_of(ELEMENT)[3]
    size = tl.abs(value)
    subnormal = (size * power(MANTISSA - LOWEST)).to(tl.int32)
    normal = (size.to(tl.int32, bitcast=True) >> (23 - MANTISSA)) - ((126 + LOWEST) << MANTISSA)
    magnitude = tl.where(size < power(LOWEST), subnormal, normal)
    return magnitude | tl.where(value < 0, 1 << (BITS - 1), 0)


@triton.jit
def decoded(codes, ELEMENT: tl.constexpr):
    """The numbers (fp32) that codes stand for, as `Element.decode` gives them."""
    BITS: tl.constexpr = bits_of(ELEMENT)[0]
    MANTISSA: tl.constexpr = bits_of(ELEMENT)[1]
    codes = codes.to(tl.int32)
    magnitude = codes & ((1 << (BITS - 1)) - 1)
    binade = magnitude >> MANTISSA
    normal = tl.where(binade > 0, 1, 0)
    multiple = ((magnitude & ((1 << MANTISSA) - 1)) + (normal << MANTISSA)) << (binade - normal)
    value = multiple.to(tl.float32) * power(bits_of(ELEMENT)[3] - MANTISSA)
    if ELEMENT == "e4m3":
        value = tl.where(magnitude == 127, float("nan"), value)
    return tl.where(codes >> (BITS - 1) > 0, -value, value)


@triton.jit
def exponent_value(code):
    """The power of two (fp32) that an E8M0 code (int32) stands for: 2**-127, a subnormal, for 0, and NaN for 255."""
    bits = tl.where(code > 0, code << 23, 0x00400000)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
