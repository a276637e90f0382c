"""Scales of blocks: the rule of the largest element, and searches that start from it.

A *block* is what shares a scale, here always the last axis of a tensor [.., n]; its scales have the shape [..]. What
one unit of the element is worth, scales times the tensor's own, is called a *step*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.quant.elements import ELEMENTS
from llmopt.compiler.quant.schemes import Scheme

E4M3_TINY = 2.0**-9  # smallest subnormal
E4M3_MAX = 448.0
F16_TINY, F16_NORMAL, F16_MAX = 2.0**-24, 2.0**-14, 65504.0  # smallest subnormal, smallest normal number, largest
_TINY = torch.finfo(torch.float32).tiny

# Steps of the stored code tried besides the largest element's own. "search": ScaleSearch (arXiv 2605.12464); "optimal":
# the window outside which no best scale lies, and "fast" a cheap subset (ScaleSweep, arXiv 2606.07618). With e8m0 the
# paper's {0, +1} count from the lower power of two, which is one below or the one that the rule here starts from.
_OFFSETS = {
    "e4m3": {"search": (*range(-2, 0), *range(1, 7)), "optimal": (*range(-3, 0), *range(1, 8)), "fast": (-1, 4, 5)},
    "e8m0": {"search": (-1, 1)},
}
_LAST_CODE = {"e4m3": (1, 126), "e8m0": (0, 254)}
# scales kept as floats have no few neighbours: these multiples are tried
_FACTORS = tuple(k / 50 for k in (*range(49, 19, -1), 51, 52, 53))

# Sums of squares in float32 are good to this part. A candidate has to win by more, so that it is no worse exactly.
_NOISE = 2.0**-18

Losses = Callable[[Tensor, Tensor | None], Tensor]
"""(steps [..], zero points [..] or None) -> the loss of every block [..]."""


def rules_of(scheme: Scheme) -> tuple[str, ...]:
    """The rules that `scheme` can have, "max" first."""
    return {"e4m3": ("max", "search", "optimal", "fast", "four-six", "all"), "e8m0": ("max", "search", "all")}.get(
        scheme.scale, ("max", "search")
    )


def check_rule(rule: str, scheme: Scheme) -> None:
    """Raise `InputError` unless `scheme` can have scales by `rule`."""
    known = rules_of(scheme)
    if not isinstance(rule, str):
        raise InputError(f"scale is a {type(rule).__name__}, {rule!r}; wanted the name of a rule: {', '.join(known)}")
    if rule not in known:
        remedy = did_you_mean(rule, known)
        raise InputError(f"scales of {scheme.name} ({scheme.scale}) cannot be chosen by {rule!r}; {remedy}")


def global_scale_of(amax: Tensor, scheme: Scheme, scale_max: float = E4M3_MAX) -> Tensor:
    """The scale (float32, shape of `amax`) that turns the scale of a block with `amax` into `scale_max`; 1 for zeros.

    compressed-tensors stores the reciprocal of a tensor's (generate_gparam).
    """
    scale = (amax.float() / (scale_max * scheme.element.max)).clamp(min=_TINY)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def block_scales(
    blocks: Tensor, scheme: Scheme, rule: str = "max", global_scale: Tensor | None = None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales (the scheme's dtype, [..]) and zero points (uint8 [..], or None) of blocks (float32 [.., n]).

    `weight` (float32, broadcast against blocks): how much the square of each element's error counts in a search.
    """
    low, high = torch.aminmax(blocks, dim=-1)
    unit = _unit(low, high)
    scaled = blocks if rule == "max" else blocks * unit.unsqueeze(-1)

    def losses(steps: Tensor, zero_points: Tensor | None) -> Tensor:
        return block_losses(scaled, steps * unit, zero_points, scheme, weight)

    return scales_from(low, high, scheme, rule, global_scale, losses)


def scales_from(
    low: Tensor, high: Tensor, scheme: Scheme, rule: str, global_scale: Tensor | None, losses: Losses
) -> tuple[Tensor, Tensor | None]:
    """As `block_scales`, of blocks whose smallest and largest elements (float32 [..]) are known.

    The scale by the largest element comes first and a candidate replaces what is best so far only by being better, so
    that no block is ever worse off than by "max".
    """
    wanted = wanted_scales(low, high, scheme, global_scale)
    best = rounded_scales(wanted, scheme)
    zero_points = None if scheme.symmetric else zero_points_of(low, wanted, scheme)
    if rule == "max":
        return best, zero_points
    least = losses(decoded_scales(best, scheme, global_scale), zero_points)
    for candidate in list(_candidates(best, wanted, scheme, rule)):
        loss = losses(decoded_scales(candidate, scheme, global_scale), zero_points)
        better = loss < least * (1 - _NOISE)
        least = torch.where(better, loss, least)
        best = _where(better, candidate, best)
    return best, zero_points


def block_losses(
    blocks: Tensor, steps: Tensor, zero_points: Tensor | None, scheme: Scheme, weight: Tensor | None
) -> Tensor:
    """Sums of squared errors [..] (float32) of blocks [.., n] quantised with `steps` [..]; with their `weight` each."""
    steps = steps.unsqueeze(-1)
    units = blocks / steps
    if zero_points is None:
        restored = scheme.element.nearest(units)
    else:
        shift = (zero_points.float() - scheme.element.zero).unsqueeze(-1)
        restored = scheme.element.nearest(units.add_(shift)).sub_(shift)
    squares = restored.mul_(steps).sub_(blocks).square_()
    return (squares if weight is None else squares.mul_(weight)).sum(-1)


def wanted_scales(low: Tensor, high: Tensor, scheme: Scheme, global_scale: Tensor | None) -> Tensor:
    """Float32 [..]: the scale by the largest element before it is rounded to what it is stored in.

    `low` and `high` are the smallest and largest element of a block. With e8m0 it is the largest magnitude itself.
    The arithmetic is compressed-tensors' (calculate_qparams), so that its packers give the same codes.
    """
    if not scheme.symmetric:
        codes = 2**scheme.element.bits - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = high - low
        return torch.where(
            span.isfinite(), span / codes, high / codes - low / codes
        )  # from 1.7e38 on it has no float32
    amax = torch.maximum(high, -low)
    if scheme.scale == "e8m0":
        return amax
    # integers reach from -2**(bits-1) to 2**(bits-1)-1: half of that range, so that the positive end loses half a step
    reach = scheme.element.max if scheme.element.is_float else (2**scheme.element.bits - 1) / 2
    scale = amax / reach
    return scale if global_scale is None else scale / global_scale


def rounded_scales(wanted: Tensor, scheme: Scheme) -> Tensor:
    """`wanted_scales` in the scheme's own dtype; never zero, so that blocks of zeros divide like others."""
    if scheme.scale == "e8m0":
        return _even_exponent(wanted, scheme)
    # rounded before the cast: compilers leave out a cast there and back, and would compute with what was not rounded
    if scheme.scale == "e4m3":
        return ELEMENTS["e4m3"].nearest(wanted.clamp(min=E4M3_TINY)).to(torch.float8_e4m3fn)
    if scheme.scale == "float16":
        return _to_float16(wanted).to(torch.float16)
    wanted = wanted.clamp(min=_TINY)
    return (_to_bfloat16(wanted) if scheme.scale == "bfloat16" else wanted).to(scheme.scale_dtype)


def zero_points_of(low: Tensor, wanted: Tensor, scheme: Scheme) -> Tensor:
    """Codes (uint8) that stand for 0, so that the lowest code stands for `low`, the smallest element (or for 0)."""
    half = scheme.element.zero
    # counted from the lowest code as compressed-tensors does, since that rounds, too
    lowest = -half - low.clamp(max=0) / wanted.clamp(min=_TINY)
    return (lowest.clamp(-half, half - 1).round() + half).to(torch.uint8)


def decoded_scales(scales: Tensor, scheme: Scheme, global_scale: Tensor | None) -> Tensor:
    """Steps (float32 [..]): what one unit of an element is worth."""
    if scheme.scale == "e8m0":
        exponents = scales.to(torch.int32)
        # 2**-127 is a subnormal, which no shifted exponent gives
        return torch.where(exponents > 0, (exponents << 23).view(torch.float32), 2.0**-127)
    plain = scales.to(torch.float32)
    return plain if global_scale is None else plain * global_scale


def _even_exponent(amax: Tensor, scheme: Scheme) -> Tensor:
    """Exponent (bias 127) that puts `amax` into the element's last binade, or one more if it would round past `max`.

    255, the code of NaN (OCP Microscaling Formats 1.0), where `amax` is not finite.
    """
    element = scheme.element
    # 448 = 1.75 * 2**8 is not the last number of its binade; compressed-tensors treats it as e2m1's 6 = 1.5 * 2**2
    mantissa = 1 if element.name == "e4m3" else element.mantissa
    last = (1 << element.exponent) + element.lowest_exponent - 2
    exponent = (amax.view(torch.int32) + (1 << (22 - mantissa))) >> 23
    return torch.where(amax < torch.inf, (exponent - last).clamp(0, 254), 255).to(torch.uint8)


def _candidates(base: Tensor, wanted: Tensor, scheme: Scheme, rule: str) -> Iterator[Tensor]:
    """Scales to try after `base`; where a code does not exist, `base` again."""
    if scheme.scale not in _OFFSETS:
        yield from (rounded_scales(wanted * factor, scheme) for factor in _FACTORS)
        return
    if rule == "four-six":  # Four Over Six (arXiv 2512.02010): let the largest element be 4 instead of 6
        yield rounded_scales(wanted * 1.5, scheme)
        return
    first, last = _LAST_CODE[scheme.scale]
    codes = base.view(torch.uint8).to(torch.int16)
    if rule == "all":
        yield from (torch.full_like(codes, code).to(torch.uint8).view(base.dtype) for code in range(first, last + 1))
        return
    for offset in _OFFSETS[scheme.scale][rule]:
        moved = codes + offset
        exists = (moved >= first) & (moved <= last)
        yield torch.where(exists, moved, codes).to(torch.uint8).view(base.dtype)


def _where(choice: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` of equal dtypes, which has no 8-bit floats."""
    if yes.dtype is torch.float8_e4m3fn:
        return torch.where(choice, yes.view(torch.uint8), no.view(torch.uint8)).view(yes.dtype)
    return torch.where(choice, yes, no)


def _to_bfloat16(x: Tensor) -> Tensor:
    """Positive float32 rounded to the nearest bfloat16, ties to even, as float32; NaN stays NaN."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


def _unit(low: Tensor, high: Tensor) -> Tensor:
    """Power of two (float32 [..]) that brings a block's largest element near 1, so that squares keep their range."""
    amax = torch.maximum(high, -low)
    exponent = (amax.view(torch.int32) >> 23).clamp(1, 253)
    return torch.where(amax > 0, ((254 - exponent) << 23).view(torch.float32), 1.0)


def _to_float16(x: Tensor) -> Tensor:
    """Float32 from 0 on rounded to the nearest float16 but 0, ties to even, as float32; what is not finite stays so."""
    bits = x.view(torch.int32)
    normal = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)
    rounded = torch.where(x < F16_NORMAL, (x / F16_TINY).round() * F16_TINY, normal)
    return torch.where(x.isfinite(), rounded.clamp(F16_TINY, F16_MAX), x)
