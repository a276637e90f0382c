"""Quantising whole tensors and back: every scheme, ragged shapes, edges, tracing, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmopt
from llmopt.compiler import _torch
from llmopt.compiler.quant import SCHEMES, QuantizedTensor, dequantize, fake_quantize, quantize

SHAPES = [(1, 1), (3, 17), (5, 128), (130, 200)]
OUTLIERS = ["nvfp4", "mxfp4", "fp8_block", "int4_g32", "int4_g32_asym", "int8"]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def from_packed(made: QuantizedTensor, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize(packed, made.scales, made.global_scale, made.zero_points, made.scheme, made.shape[1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_packed_storage_gives_the_same_numbers(name: str, shape: tuple[int, int], dtype: torch.dtype):
    if SCHEMES[name].element.bits == 4 and SCHEMES[name].padded(shape[1]) % 2:
        pytest.skip("no scheme of 4 bits has odd rows")
    made = quantize(matrix(*shape), name)
    assert torch.equal(from_packed(made, made.packed(), dtype), made.dequantize(dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_storage_is_traceable(name: str):
    made = quantize(matrix(130, 200), name)
    packed = made.packed()
    with _torch.faking(mode := _torch.fake_mode()):
        move: Callable[[Tensor | None], Any] = lambda t: None if t is None else mode.from_tensor(t)  # noqa: E731
        parts = [move(t) for t in (packed, made.scales, made.global_scale, made.zero_points)]
        fake = dequantize(*parts, made.scheme, 200, torch.bfloat16)
    assert (fake.shape, fake.dtype) == ((130, 200), torch.bfloat16)
    torch._dynamo.reset()
    whole = torch.compile(from_packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(made, packed), made.dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp6_e2m3", "int4_g32_asym"])
def test_compiled_code_gives_the_same_bits(name: str):
    scheme, x = SCHEMES[name], matrix(130, 200)
    made = quantize(x, name)

    def both(packed: Tensor, scales: Tensor, global_scale: Tensor | None, zero_points: Tensor | None, x: Tensor) -> Any:
        return dequantize(packed, scales, global_scale, zero_points, scheme, 200), fake_quantize(x, scheme)

    torch._dynamo.reset()
    whole = torch.compile(both, fullgraph=True)
    restored, faked = whole(made.packed(), made.scales, made.global_scale, made.zero_points, x)
    assert torch.equal(restored, made.dequantize())
    assert torch.equal(faked, fake_quantize(x, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_activations_are_quantised_row_by_row(name: str, dtype: torch.dtype):
    x = (matrix(6, 200) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    alone = torch.cat([quantize(row[None], name).dequantize(dtype) for row in x])
    assert torch.equal(fake_quantize(x, SCHEMES[name]), alone)
    assert torch.equal(fake_quantize(x.view(2, 3, 200), SCHEMES[name]), alone.view(2, 3, 200))


@pytest.mark.parametrize("scale", ["max", "search"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_error_is_that_of_the_restored_matrix(name: str, scale: str):
    x = matrix(260, 200).bfloat16()
    made = quantize(x, name, scale)
    squared_error = (made.dequantize().double() - x.double()).square().sum().item()
    assert made.squared_error == pytest.approx(squared_error, rel=1e-12)
    assert made.energy == pytest.approx(x.double().square().sum().item(), rel=1e-12)
    assert made.error() == pytest.approx(squared_error / made.energy)
    assert made.sqnr() == pytest.approx(10 * math.log10(made.energy / squared_error))


@pytest.mark.parametrize("scale", ["max", "search"])
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_at_once_change_nothing(name: str, scale: str):
    x, weight = matrix(300, 200), None
    if scale != "max":
        weight = torch.rand(200, generator=torch.Generator().manual_seed(2))
    whole = quantize(x, name, scale, weight=weight, rows_at_once=300)
    parts = quantize(x, name, scale, weight=weight, rows_at_once=7)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales.float(), parts.scales.float())


@pytest.mark.parametrize("scale", ["max", "search"])
@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name: str, scale: str):
    made = quantize(torch.zeros(130, 200), name, scale)
    assert torch.equal(made.dequantize(), torch.zeros(130, 200))
    assert made.scales.float().isfinite().all()
    assert made.global_scale is None or made.global_scale == 1
    assert (made.error(), made.sqnr()) == (0.0, math.inf)
    assert torch.equal(fake_quantize(torch.zeros(2, 200), SCHEMES[name]), torch.zeros(2, 200))
    partly = matrix(130, 512)
    partly[:, 128:384] = 0
    assert torch.equal(quantize(partly, name, scale).dequantize()[:, 128:384], torch.zeros(130, 256))


@pytest.mark.parametrize("scale", ["max", "search"])
@pytest.mark.parametrize("name", OUTLIERS)
def test_an_outlier_leaves_everything_finite(name: str, scale: str):
    x = matrix(64, 256) * 1e-2
    x[3, 5] = 1e4
    made = quantize(x, name, scale)
    restored = made.dequantize()
    assert restored.isfinite().all()
    assert restored[3, 5] == pytest.approx(1e4, rel=0.19)  # mxfp4: 4.9 of its units becomes 4
    scheme = made.scheme
    others = torch.ones_like(x, dtype=torch.bool)
    others[slice(0, 64) if scheme.rows > 1 else 3, : scheme.group or 256] = False
    error = (restored - x)[others].square().sum() / x[others].square().sum()
    assert error < 0.02
    if scheme.has_global:  # the largest scale is 448, so that many others have the smallest
        assert made.scales.float().min() == 2.0**-9


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 2.5e38])
@pytest.mark.parametrize("scale", ["max", "search"])
@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_at_the_ends_of_float32(name: str, scale: str, size: float):
    x = torch.linspace(-1, 1, 256)[None] * size
    made = quantize(x, name, scale)
    restored = made.dequantize()
    assert restored.isfinite().all()
    assert made.scales.float().isfinite().all()
    if size > 1e-35 and made.scheme.scale != "float16":  # whose ends are nearer
        assert made.error() < 0.03


@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_call_gives_the_same_result_and_leaves_its_input(name: str):
    x = matrix(130, 200).bfloat16().requires_grad_()
    before = x.detach().clone()
    first, second = quantize(x, name, "search"), quantize(x, name, "search")
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(x, before)
    assert not first.dequantize().requires_grad


def test_a_common_global_scale():
    a, b = matrix(8, 64), matrix(8, 64, seed=1) * 3
    amax = torch.cat([a, b]).abs().amax()
    both = quantize(torch.cat([a, b]), "nvfp4")
    assert both.global_scale == amax / (448 * 6)
    for part, rows in ((a, slice(0, 8)), (b, slice(8, 16))):
        alone = quantize(part, "nvfp4", global_scale=both.global_scale)
        assert torch.equal(alone.codes, both.codes[rows])
        assert torch.equal(alone.scales.float(), both.scales[rows].float())


def test_scale_max_is_the_largest_scale():
    x = matrix(8, 64)
    for scale_max in (448.0, 256.0, 1.0):
        assert quantize(x, "nvfp4", scale_max=scale_max).scales.float().max() == scale_max


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("scale", ["max", "search"])
@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_grows_with_the_rows_but_the_result(name: str, scale: str):
    """A weight [28672, 4096] needs little beside itself: no intermediate is larger than a few rows."""
    x = torch.ones(2048, 1024, dtype=torch.bfloat16)
    with Largest() as seen:
        made = quantize(x, name, scale)
    assert made.codes.nbytes <= seen.bytes <= made.codes.nbytes + 2**18 * 8


def test_the_public_door():
    x = matrix(16, 48)
    made = llmopt.quantize(x, "NVFP4", "search", weight=torch.ones(48), scale_max=256.0)
    wanted = quantize(x, "nvfp4", "search", scale_max=256.0)
    assert torch.equal(made.codes, wanted.codes)
    assert "quantize" in llmopt.__all__
