"""Numbers at the end of their dtype's range stay finite, and those that are not finite stay what they are."""

from __future__ import annotations

import math

import pytest
import torch

from llmopt.compiler.quant import SCHEMES, dequantize, fake_quantize, quantize
from llmopt.compiler.quant.scales import rules_of

ENDS = [
    (torch.float16, 64000.0),
    (torch.float16, 65504.0),
    (torch.bfloat16, 3.3e38),
    (torch.bfloat16, torch.finfo(torch.bfloat16).max),
    (torch.float32, 3.0e38),
    (torch.float32, torch.finfo(torch.float32).max),
]
# how far the largest number may be from itself, by bits: the last step before it, if that is all that bfloat16 can hold
NEAR = {4: 0.34, 6: 0.13, 8: 0.072}


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize(("dtype", "size"), ENDS)
@pytest.mark.parametrize("name", [name for name in SCHEMES if SCHEMES[name].scale != "float16"])
def test_finite_numbers_stay_finite(name: str, dtype: torch.dtype, size: float, ramp: bool):
    x = torch.full((2, 200), size, dtype=dtype)
    if ramp:  # of both signs, so that what a row spans is twice as much
        x = (torch.linspace(-1, 1, 200, dtype=torch.float64) * size).to(dtype).expand(2, -1).contiguous()
    made = quantize(x, name)
    parts = made.packed(), made.scales, made.global_scale, made.zero_points
    near = NEAR[made.scheme.element.bits]
    assert made.error() < near**2
    assert made.sqnr() > 0
    for restored in (
        made.dequantize(dtype),
        dequantize(*parts, made.scheme, 200, dtype),
        fake_quantize(x, made.scheme),
    ):
        assert restored.dtype is dtype
        assert restored.isfinite().all()
        torch.testing.assert_close(restored[:, -1].double(), x[:, -1].double(), rtol=near, atol=0)


@pytest.mark.parametrize("name", [name for name in SCHEMES if SCHEMES[name].scale == "float16"])
def test_what_scales_in_float16_reach(name: str):
    """As packers have it: beyond 65504 steps are the largest there are, below the smallest one the smallest."""
    x = torch.linspace(-1, 1, 256)[None].repeat(2, 1)
    for size in (64000.0, 1e-3):
        made = quantize(x * size, name)
        assert made.error() < NEAR[made.scheme.element.bits] ** 2
        assert made.dequantize(torch.float16).isfinite().all()
    large, small = quantize(x * 3e38, name), quantize(x * 1e-30, name)
    assert large.scales.unique().tolist() == [65504.0]
    assert large.dequantize().isfinite().all()
    assert small.scales.unique().tolist() == [2.0**-24]
    assert (small.dequantize().abs() <= 2.0**-25).all()


CHOSEN = [
    (name, rule) for name in ("nvfp4", "mxfp4", "mxfp8", "int8", "int4_g32_asym") for rule in rules_of(SCHEMES[name])
]


@pytest.mark.parametrize(("name", "scale"), CHOSEN)
def test_searches_at_the_end_are_no_worse(name: str, scale: str):
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(3)).clamp(-3, 3) * 1e38
    assert quantize(x, name, scale).error() <= quantize(x, name).error()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", SCHEMES)
def test_activations_that_are_not_finite_show(name: str, bad: float, dtype: torch.dtype):
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole = fake_quantize(x, SCHEMES[name])
    x[1, 70] = bad
    seen = fake_quantize(x, SCHEMES[name])
    assert not seen[1, 70].isfinite()
    assert torch.equal(seen[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp8"])
def test_beyond_the_end_is_the_largest_number(name: str):
    x = torch.full((1, 32), 65504.0)
    made = quantize(x, name)
    assert (made.dequantize() == 65536.0).all()
    assert (made.dequantize(torch.float16) == 65504.0).all()
    assert (fake_quantize(x.half(), made.scheme) == 65504.0).all()
