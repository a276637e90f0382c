"""Elements: every code and every tie, against their definitions and torch's own float8."""

from __future__ import annotations

import math

import pytest
import torch

from llmopt.compiler.quant import ELEMENTS, Element, pack

FLOATS = ["e2m1", "e2m3", "e3m2", "e4m3"]
INTS = ["int4", "int8"]
# exponent bits, mantissa bits, bias: OCP Microscaling Formats 1.0, section 5.3, and OCP 8-bit Floating Point
FORMATS = {"e2m1": (2, 1, 1), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3), "e4m3": (4, 3, 7)}


def meaning(name: str, code: int) -> float:
    """What a code stands for, by the formats' definition, a code at a time."""
    if name in INTS:
        return float(code - (8 if name == "int4" else 128))
    exponent_bits, mantissa_bits, bias = FORMATS[name]
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if name == "e4m3" and exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def all_codes(element: Element) -> torch.Tensor:
    return torch.arange(1 << element.bits).to(torch.uint8)


def ladder(element: Element) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from the smallest to the largest, each once, and the codes that encode gives."""
    codes = [c for c in range(1 << element.bits) if not math.isnan(meaning(element.name, c))]
    ordered = sorted({meaning(element.name, c): c for c in reversed(codes)}.items())
    values, codes = zip(*ordered, strict=True)
    return torch.tensor(values), torch.tensor([0 if v == 0 and element.is_float else c for v, c in ordered])


@pytest.mark.parametrize("name", ELEMENTS)
def test_decode_is_the_definition(name: str):
    element = ELEMENTS[name]
    wanted = torch.tensor([meaning(name, c) for c in range(1 << element.bits)])
    assert torch.equal(element.decode(all_codes(element)).nan_to_num(999.0), wanted.nan_to_num(999.0))
    assert wanted.nan_to_num(0.0).max() == element.max


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_comes_back(name: str):
    element = ELEMENTS[name]
    values, codes = ladder(element)
    assert len(values) == {"e2m1": 15, "e2m3": 63, "e3m2": 63, "e4m3": 253, "int4": 16, "int8": 256}[name]
    assert torch.equal(element.encode(values), codes.to(torch.uint8))
    assert torch.equal(element.nearest(values), values)


@pytest.mark.parametrize("name", ELEMENTS)
def test_ties_take_the_even_code_and_their_neighbours_the_near_one(name: str):
    element = ELEMENTS[name]
    values, codes = ladder(element)
    middle = (values[1:] + values[:-1]) / 2  # exact in float32
    even = torch.where(codes[1:] % 2 == 0, codes[1:], codes[:-1])
    assert torch.equal(element.encode(middle), even.to(torch.uint8))
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    assert torch.equal(element.encode(above), codes[1:].to(torch.uint8))
    assert torch.equal(element.encode(below), codes[:-1].to(torch.uint8))


@pytest.mark.parametrize("name", ELEMENTS)
def test_any_number_goes_to_the_nearest(name: str):
    element = ELEMENTS[name]
    values, codes = ladder(element)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * element.max
    distance = (x.double()[:, None] - values.double()).abs()
    assert torch.equal(element.encode(x), codes[distance.argmin(1)].to(torch.uint8))
    assert torch.equal(element.nearest(x), element.decode(element.encode(x)))


@pytest.mark.parametrize("name", FLOATS)
def test_what_rounds_to_zero_has_no_sign(name: str):
    element = ELEMENTS[name]
    smallest = element.decode(torch.tensor([1], dtype=torch.uint8))
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1e-30, -smallest.item() / 2, smallest.item() / 2])
    assert torch.equal(element.encode(tiny), torch.zeros(7, dtype=torch.uint8))
    assert not element.nearest(tiny).signbit().any()


@pytest.mark.parametrize("name", ELEMENTS)
def test_too_large_is_the_largest(name: str):
    element = ELEMENTS[name]
    lowest = -element.max if element.is_float else -element.max - 1
    x = torch.tensor([element.max + 0.4, 1e30, torch.inf, lowest - 0.4, -1e30, -torch.inf])
    assert element.decode(element.encode(x)).tolist() == [element.max] * 3 + [lowest] * 3
    assert element.nearest(torch.tensor([torch.nan])).isnan().all()


def test_e4m3_is_torchs_over_all_of_bfloat16():
    """Subnormals, ties and all; above 448 torch has NaN where the largest number is wanted here."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    x = x[x.isfinite()]
    torchs = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    positive_zero = torch.where(torchs.float() == 0, 0, torchs.view(torch.uint8))
    assert torch.equal(ELEMENTS["e4m3"].encode(x), positive_zero)
    assert torch.equal(ELEMENTS["e4m3"].nearest(x), torchs.float())


def test_e2m1_golden_vector():
    """Bytes that compressed-tensors and ModelOpt write for these, the first column in the low half of a byte."""
    x = [0, 0.25, -0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5, 6, -6, 0.2, 1, -1, 3, 7]
    codes = ELEMENTS["e2m1"].encode(torch.tensor(x))
    # the third is 8, negative zero, where writers keep the sign of what rounds to zero
    assert codes.tolist() == [0, 0, 0, 2, 2, 12, 4, 14, 6, 7, 15, 0, 2, 10, 5, 7]
    assert bytes(pack(codes[None], 4)[0].tolist()).hex() == "0020c2e4760fa275"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_widened_first(dtype: torch.dtype):
    x = torch.linspace(-7, 7, 1001).to(dtype)
    assert torch.equal(ELEMENTS["e2m1"].encode(x), ELEMENTS["e2m1"].encode(x.float()))
