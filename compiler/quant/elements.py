"""The numbers that low-bit codes stand for: small floats and integers, and the rounding of tensors to them.

Everything is plain arithmetic on whole tensors, so that the same lines run eagerly, under fake tensors and compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT = 0x7F800000  # where a float32 keeps its exponent


@dataclass(frozen=True)
class Element:
    """A format of `bits` bits a number: a small float, or an integer when `exponent` is 0.

    Floats are sign, `exponent` bits, `mantissa` bits, with subnormals and without infinities (OCP Microscaling Formats
    1.0, section 5.3; OCP 8-bit Floating Point for e4m3, which alone has a NaN). Integers are two's complement plus
    2**(bits-1), so that codes are not negative. `max` is the largest number of either.
    """

    name: str
    bits: int
    max: float
    exponent: int = 0
    mantissa: int = 0

    @property
    def is_float(self) -> bool:
        """Whether codes are small floats."""
        return self.exponent > 0

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal float: 1 - bias."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 0 if self.is_float else 1 << (self.bits - 1)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the numbers nearest to `x` (float, any shape): ties to the even code, at most `max`.

        What rounds to zero has the code of zero, whatever its sign. NaN has no code: the result is arbitrary.
        """
        value = self.nearest(x)
        if not self.is_float:
            return (value + self.zero).to(torch.uint8)
        size = value.abs()
        subnormal = size * 2.0 ** (self.mantissa - self.lowest_exponent)
        # a normal number's code is the top of its float32, with another bias
        normal = (size.view(torch.int32) >> (23 - self.mantissa)) - ((126 + self.lowest_exponent) << self.mantissa)
        magnitude = torch.where(size < 2.0**self.lowest_exponent, subnormal.to(torch.int32), normal)
        return (magnitude + ((value < 0).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32) that `codes` (uint8, any shape) stand for."""
        wide = codes.to(torch.int32)
        if not self.is_float:
            return (wide - (1 << (self.bits - 1))).to(torch.float32)
        magnitude = wide & ((1 << (self.bits - 1)) - 1)
        binade = magnitude >> self.mantissa
        fraction = magnitude & ((1 << self.mantissa) - 1)
        # every number is a whole multiple of the smallest subnormal
        normal = (binade > 0).to(torch.int32)
        multiple = (fraction + (normal << self.mantissa)) << (binade - normal)
        value = multiple.to(torch.float32) * 2.0 ** (self.lowest_exponent - self.mantissa)
        if self.name == "e4m3":  # the one format of these with a NaN, where 480 would be
            value = torch.where(value > self.max, torch.nan, value)
        return torch.where(wide >> (self.bits - 1) > 0, -value, value)

    def nearest(self, x: Tensor) -> Tensor:
        """`decode(encode(x))` (float32) without the codes in between; NaN stays NaN."""
        x = x.float()
        if not self.is_float:
            return x.clamp(-self.zero, self.zero - 1).round()
        held = x.clamp(-self.max, self.max)
        binade = (held.view(torch.int32) & _EXPONENT).view(torch.float32).clamp(min=2.0**self.lowest_exponent)
        # beside 1.5 * 2**23 steps of its binade a float32 has room for whole steps only, and rounds ties to even
        anchor = binade * (1.5 * 2.0 ** (23 - self.mantissa))
        # nothing in place: regions are traced as they are, and Inductor's own passes take writes to be done with
        return held + anchor - anchor


ELEMENTS = {
    element.name: element
    for element in (
        Element("e2m1", 4, 6.0, 2, 1),
        Element("e2m3", 6, 7.5, 2, 3),
        Element("e3m2", 6, 28.0, 3, 2),
        Element("e4m3", 8, 448.0, 4, 3),
        Element("int4", 4, 7.0),
        Element("int8", 8, 127.0),
    )
}
