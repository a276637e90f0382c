"""Loops whose index is divided: no column is lost where the division leaves a rest, through every way to Inductor.

Expected values are eager PyTorch's. What was never written is whatever memory held, which is filled with NaN before.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from llmopt.codegen.cpp import cpp_available
from llmopt.codegen.inductor import compile_region, load_region
from llmopt.compiler import _torch
from llmopt.compiler._torch import fake_mode, fake_tensor, inductor_compile, inductor_source
from llmopt.compiler.quant import SCHEMES, dequantize, fake_quantize, quantize

reason = cpp_available()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(240)]

HALF = [torch.bfloat16, torch.float16]
ROWS = 24


def restored(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Low-bit numbers as anybody would write it, sliced before they are rounded."""
    values = codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, :columns].to(dtype)


def spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """Each scale as often as it has columns, and a sum so that nothing is a view."""
    return scales.repeat_interleave(group, 1)[:, :columns] + 1


def stored(columns: int, group: int) -> tuple[Tensor, Tensor]:
    generator, count = torch.Generator().manual_seed(0), -(-columns // group)
    codes = torch.randint(1, 255, (ROWS, count * group), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(ROWS, count, generator=generator) + 0.1


def spoil(columns: int) -> None:
    """Leave NaN in memory of the sizes that results will have."""
    for dtype in (*HALF, torch.float32):
        held = [torch.full((ROWS, columns), torch.nan, dtype=dtype) for _ in range(20)]
        del held


@pytest.mark.parametrize(("columns", "group"), [(200, 16), (704, 128), (100, 64)])
def test_a_region_writes_every_column(columns: int, group: int):
    codes, scales = stored(columns, group)

    def region(codes: Tensor, scales: Tensor) -> list[Tensor]:
        every = [restored(codes, scales, columns, dtype) for dtype in (*HALF, torch.float32)]
        return [*every, spread(scales, group, columns)]

    mode = fake_mode()
    fakes = [fake_tensor(mode, list(t.shape), t.dtype, {}) for t in (codes, scales)]
    call = load_region(compile_region(region, fakes))
    spoil(columns)
    for got, want in zip(call([codes, scales]), region(codes, scales), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALF)
def test_dynamo_graphs_write_every_column(dtype: torch.dtype):
    codes, scales = stored(200, 16)
    torch._dynamo.reset()
    compiled = torch.compile(restored, backend=lambda graph, inputs: inductor_compile(graph, inputs, {}))
    spoil(200)
    assert torch.equal(compiled(codes, scales, 200, dtype), restored(codes, scales, 200, dtype))


def kernels(columns: int, group: int) -> str:
    mode = fake_mode()
    fakes = [fake_tensor(mode, list(t.shape), t.dtype, {}) for t in stored(columns, group)]
    _, _, found = inductor_source(lambda c, s: [restored(c, s, columns, torch.bfloat16)], fakes, {})
    return "".join(code for _, code in found)


def test_loops_are_still_split_where_nothing_is_left():
    """Which is what makes scales one load a group instead of one a column."""
    assert "div_floor" not in kernels(208, 16)
    assert "div_floor" in kernels(200, 16)


def test_torch_still_has_what_is_guarded(monkeypatch: pytest.MonkeyPatch):
    """Where this fails, Inductor was mended: the guard can go once the oldest torch supported is that one."""
    monkeypatch.setattr(_torch, "_splits_whole", lambda nodes: True)
    assert "div_floor" not in kernels(200, 16)


def test_code_cached_by_others_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    codes, scales = stored(200, 16)
    wrong = torch.compile(restored, backend="inductor", dynamic=False)
    right = torch.compile(restored, backend=lambda graph, inputs: inductor_compile(graph, inputs, {}), dynamic=False)
    hits = []
    for compiled in (wrong, wrong, right, right):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            spoil(200)
            got = compiled(codes, scales, 200, torch.bfloat16)
        hits.append(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0)
    assert hits == [False, True, False, True]
    assert torch.equal(got, restored(codes, scales, 200, torch.bfloat16))


@pytest.mark.parametrize(("name", "dtype"), [("nvfp4", torch.bfloat16), ("mxfp4", torch.float16)])
def test_low_bit_numbers_need_no_guard(name: str, dtype: torch.dtype):
    """Plain Inductor, which others may compile the ops with."""
    scheme = SCHEMES[name]
    x = torch.randn(ROWS, 200, generator=torch.Generator().manual_seed(1))
    made = quantize(x, name)
    args = x.to(dtype), made.packed(), made.scales, made.global_scale, made.zero_points

    def both(x: Tensor, *parts: Tensor) -> list[Tensor]:
        return [dequantize(*parts, scheme, 200, dtype), fake_quantize(x, scheme)]

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="inductor", dynamic=False)
    spoil(200)
    for got, want in zip(compiled(*args), both(*args), strict=True):
        assert torch.equal(got, want)
