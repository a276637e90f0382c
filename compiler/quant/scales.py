"""Scales of blocks: the rule of the largest element, and searches that start from it.

A *block* is what shares a scale, here always the last axis of a tensor [.., n]; scales have the shape [..]. The rules
are compressed-tensors' own, so that its packers give the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.compiler.quant.schemes import Scheme

E4M3_TINY = 2.0**-9  # smallest subnormal
E4M3_MAX = 448.0
_TINY = torch.finfo(torch.float32).tiny


def global_scale_of(amax: Tensor, scheme: Scheme, scale_max: float = E4M3_MAX) -> Tensor:
    """The tensor's own scale, float32 []: it turns the largest block scale into `scale_max`. 1 for a tensor of zeros.

    compressed-tensors stores the reciprocal.
    """
    scale = (amax.float() / (scale_max * scheme.element.max)).clamp(min=_TINY)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def wanted_scales(low: Tensor, high: Tensor, scheme: Scheme, global_scale: Tensor | None) -> Tensor:
    """Float32 [..]: the scale by the largest element before it is rounded to what it is stored in.

    `low` and `high` are the smallest and largest element of a block. With e8m0 it is the largest magnitude itself.
    """
    if not scheme.symmetric:
        return (high.clamp(min=0) - low.clamp(max=0)) / (2**scheme.element.bits - 1)
    amax = torch.maximum(high, -low)
    if scheme.scale == "e8m0":
        return amax
    # integers reach from -2**(bits-1) to 2**(bits-1)-1: half of that range, which costs the positive end a half step
    reach = scheme.element.max if scheme.element.is_float else (2**scheme.element.bits - 1) / 2
    scale = amax / reach
    return scale if global_scale is None else scale / global_scale


def rounded_scales(wanted: Tensor, scheme: Scheme) -> Tensor:
    """`wanted_scales` in the scheme's own dtype; never zero, so that blocks of zeros divide like others."""
    if scheme.scale == "e8m0":
        return _even_exponent(wanted, scheme)
    if scheme.scale == "e4m3":
        return wanted.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    return wanted.clamp(min=_TINY).to(scheme.scale_dtype)


def _even_exponent(amax: Tensor, scheme: Scheme) -> Tensor:
    """Exponent (bias 127) that puts `amax` into the element's last binade, or one more if it would round past `max`."""
    element = scheme.element
    # 448 = 1.75 * 2**8 is not the last number of its binade; compressed-tensors treats it as e2m1's 6 = 1.5 * 2**2
    mantissa = 1 if element.name == "e4m3" else element.mantissa
    last = (1 << element.exponent) - 1 + element.lowest_exponent - 1
    exponent = (amax.float().view(torch.int32) + (1 << (22 - mantissa))) >> 23
    return (exponent - last).clamp(0, 254).to(torch.uint8)


def zero_points_of(low: Tensor, wanted: Tensor, scheme: Scheme) -> Tensor:
    """Codes (uint8) that stand for 0 where the smallest element is `low`: the lowest code stands for it, or for 0."""
    half = 1 << (scheme.element.bits - 1)
    # counted from the lowest code as compressed-tensors does, since that rounds, too
    lowest = -half - low.clamp(max=0) / wanted.clamp(min=_TINY)
    return (lowest.clamp(-half, half - 1).round() + half).to(torch.uint8)


def decoded_scales(scales: Tensor, scheme: Scheme, global_scale: Tensor | None) -> Tensor:
    """What one unit of an element is worth, float32 [..]: scales as numbers, times the tensor's own."""
    if scheme.scale == "e8m0":
        exponents = scales.to(torch.int32)
        # 2**-127 is a subnormal, which no shifted exponent gives
        return torch.where(exponents > 0, (exponents << 23).view(torch.float32), 2.0**-127)
    plain = scales.to(torch.float32)
    return plain if global_scale is None else plain * global_scale
