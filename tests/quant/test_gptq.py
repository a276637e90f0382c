"""GPTQ against the textbook: one column after the other, the inverse computed anew each time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant import SCHEMES, QuantizedTensor, quantize
from llmopt.compiler.quant.gptq import gptq, output_error

EVERY = sorted(SCHEMES)
ORDERS = ("none", "activation")


def correlated(tokens: int, columns: int, seed: int = 0, noise: float = 0.3) -> Tensor:
    """X^T X of inputs that mostly live in a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    few = max(2, columns // 8)
    x = torch.randn(tokens, few, generator=generator) @ torch.randn(few, columns, generator=generator)
    x += noise * torch.randn(tokens, columns, generator=generator)
    return x.T.double() @ x.double()


def matrix(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))
    assert (a.zero_points is None) == (b.zero_points is None)
    if a.zero_points is not None and b.zero_points is not None:
        assert torch.equal(a.zero_points, b.zero_points)


def textbook(weight: Tensor, hessian: Tensor, scheme: str, scale: str, damping: float, order: str) -> Tensor:
    """Optimal brain quantisation, columns in a fixed order, fp64 [N, K]: what the codes stand for.

    A group's scale is the one that `quantize` gives its columns as they are when it is reached; a column is
    rounded by quantising it with the others of its group, and the weights left move along H^-1 of the columns left.
    """
    left = weight.double().clone()
    done = torch.zeros_like(left)
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    columns = list(range(len(h)))
    if order == "activation":
        columns = sorted(columns, key=lambda c: -float(h[c, c]))
    group = SCHEMES[scheme].group
    fixed = quantize(weight, scheme, scale)
    units: dict[int, Tensor] = {}
    for at, column in enumerate(columns):
        start = column // group * group
        if start not in units:
            now = left if order == "none" else weight.double()
            made = quantize(now[:, start : start + group].float(), scheme, scale, global_scale=fixed.global_scale)
            units[start] = scales_of(made)
        done[:, column] = rounded(left[:, column], units[start], made_like=scheme)
        rest = columns[at:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        step = (left[:, column] - done[:, column]) / inverse[0, 0]
        left[:, rest] -= step[:, None] * inverse[0][None]
    return done


def scales_of(made: QuantizedTensor) -> Tensor:
    """[N, 2]: the step of the one group of a row, and the value (in steps) that its lowest code stands for."""
    scheme = made.scheme
    step = made.scales.float()[:, 0] if scheme.scale != "e8m0" else 2.0 ** (made.scales.float()[:, 0] - 127)
    step = step * made.global_scale if made.global_scale is not None else step
    zero = made.zero_points.float()[:, 0] if made.zero_points is not None else torch.full_like(step, 8.0)
    return torch.stack([step, -zero], dim=1).double()


def rounded(column: Tensor, units: Tensor, made_like: str) -> Tensor:
    """A column to the nearest number its rows' scales allow, by looking at all of them (ties do not occur)."""
    if "int4" in made_like:
        numbers = torch.arange(16, dtype=torch.float64)[None] + units[:, 1:]
    else:
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        numbers = torch.cat([positive, -positive])[None].expand(len(units), -1)
    grid = numbers * units[:, :1]
    nearest = (grid - column[:, None]).abs().argmin(1, keepdim=True)
    return grid.gather(1, nearest)[:, 0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4_g32", "int4_g32_asym"])
def test_equals_the_textbook(scheme: str, order: str):
    weight, hessian = matrix(24, 96), correlated(400, 96)
    got = gptq(weight, hessian, scheme, order=order)
    want = textbook(weight, hessian, scheme, "max", 0.01, order)
    torch.testing.assert_close(got.dequantize(torch.float64), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("block", [1, 16, 48, 1000])
def test_the_block_changes_no_code(block: int):
    weight, hessian = matrix(16, 160), correlated(600, 160)
    same(gptq(weight, hessian, "nvfp4", block=block), gptq(weight, hessian, "nvfp4"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", EVERY)
def test_without_correlation_it_rounds_to_nearest(scheme: str, order: str):
    weight = matrix(130, 300)  # a multiple of no group and of no tile
    diagonal = torch.rand(300, generator=torch.Generator().manual_seed(3)) + 0.1
    for hessian in (torch.eye(300), torch.diag(diagonal)):
        same(gptq(weight, hessian, scheme, order=order), quantize(weight, scheme))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", EVERY)
def test_products_suffer_far_less(scheme: str, order: str):
    weight, hessian = matrix(64, 256), correlated(2000, 256)
    made, nearest = gptq(weight, hessian, scheme, order=order), quantize(weight, scheme)
    assert output_error(weight, made.dequantize(), hessian) < 0.15 * output_error(weight, nearest.dequantize(), hessian)
    assert made.error() > nearest.error()  # the weights themselves are farther away: that is the price


@pytest.mark.parametrize("rule", ["search", "four-six"])
def test_a_searched_scale_is_searched_on_the_updated_group(rule: str):
    weight, hessian = matrix(24, 96), correlated(400, 96)
    want = textbook(weight, hessian, "nvfp4", rule, 0.01, "none")
    torch.testing.assert_close(
        gptq(weight, hessian, "nvfp4", rule).dequantize(torch.float64), want, rtol=1e-6, atol=1e-7
    )
    most = gptq(weight, hessian, "nvfp4", "max")
    assert output_error(weight, want, hessian) < output_error(weight, most.dequantize(), hessian)


def test_sum_or_mean_is_the_same():
    weight, hessian = matrix(16, 64), correlated(512, 64)
    same(gptq(weight, hessian / 512, "mxfp4"), gptq(weight, hessian, "mxfp4"))


def test_few_tokens():
    """A Hessian of rank 20 in 128 columns: damping keeps it solvable, and it still beats rounding to nearest."""
    weight, hessian = matrix(32, 128), correlated(20, 128)
    assert int(torch.linalg.matrix_rank(hessian)) == 20
    said: list[str] = []
    made = gptq(weight, hessian, "nvfp4", say=said.append)
    assert said == []
    nearest = quantize(weight, "nvfp4")
    assert output_error(weight, made.dequantize(), hessian) < 0.1 * output_error(weight, nearest.dequantize(), hessian)


def test_damping_is_raised_where_it_must_be_and_said():
    weight, hessian = matrix(8, 64), correlated(20, 64)
    said: list[str] = []
    made = gptq(weight, hessian, "nvfp4", damping=0.0, say=said.append)
    assert len(said) == 1
    assert "raised to 0.01" in said[0]
    same(made, gptq(weight, hessian, "nvfp4", damping=0.01))


def test_a_column_without_inputs_is_rounded_to_nearest():
    weight, hessian = matrix(16, 96), correlated(400, 96)
    hessian[40], hessian[:, 40] = 0, 0
    said: list[str] = []
    made = gptq(weight, hessian, "fp8_channel", say=said.append)
    assert "1 of 96 columns" in said[0]
    assert torch.equal(made.codes[:, 40], quantize(weight, "fp8_channel").codes[:, 40])
    alive = [c for c in range(96) if c != 40]
    without = gptq(weight[:, alive], hessian[alive][:, alive], "fp8_channel", global_scale=None)
    fixed = quantize(weight, "fp8_channel").scales
    rows = (without.scales == fixed).flatten()  # where the largest weight is not the one left out
    assert int(rows.sum()) > 10
    assert torch.equal(made.codes[rows][:, alive], without.codes[rows])


def test_no_inputs_at_all():
    weight = matrix(8, 64)
    same(gptq(weight, torch.zeros(64, 64), "nvfp4", say=lambda text: None), quantize(weight, "nvfp4"))


@pytest.mark.parametrize("scheme", EVERY)
def test_columns_that_fill_no_group(scheme: str):
    weight, hessian = matrix(16, 75), correlated(400, 75)
    made = gptq(weight, hessian, scheme)
    group = SCHEMES[scheme].group
    assert made.codes.shape == (16, -(-75 // group) * group if group else 75)
    restored = made.dequantize()
    assert restored.shape == (16, 75)
    nearest = quantize(weight, scheme)
    assert output_error(weight, restored, hessian) < 0.3 * output_error(weight, nearest.dequantize(), hessian)
    padding = QuantizedTensor(made.scheme, (16, made.codes.shape[1]), *(getattr(made, n) for n in FIELDS), 0.0, 0.0)
    assert bool((padding.dequantize()[:, 75:] == 0).all())


FIELDS = ("codes", "scales", "global_scale", "zero_points")


def test_the_global_scale_is_kept():
    weight, hessian = matrix(16, 64), correlated(400, 64)
    shared = torch.tensor(0.01)
    made = gptq(weight, hessian, "nvfp4", global_scale=shared)
    assert made.global_scale is not None
    assert float(made.global_scale) == pytest.approx(0.01, rel=1e-6)
    own = gptq(weight, hessian, "nvfp4")
    assert own.global_scale is not None
    assert torch.equal(own.global_scale, quantize(weight, "nvfp4").global_scale)


def test_bfloat16_weights_and_figures():
    weight, hessian = matrix(16, 64).bfloat16(), correlated(400, 64).float()
    kept = hessian.clone()
    made = gptq(weight, hessian, "int4_g32")
    assert torch.equal(hessian, kept)
    lost = (weight.double() - made.dequantize().double()).square().sum()
    assert made.squared_error == pytest.approx(float(lost), rel=1e-12)
    assert made.energy == pytest.approx(float(weight.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("hessian", "said"),
    [
        (torch.eye(63), r"\[64, 64\]"),
        (torch.ones(64), r"\[64, 64\]"),
        (torch.eye(64, dtype=torch.int64), "float"),
        (torch.full((64, 64), torch.nan), "not finite"),
        (-torch.eye(64), "negative diagonal"),
        (torch.ones(64, 64) * 3 - 2 * torch.eye(64), "not positive semidefinite"),
        (1.5 * torch.eye(64) - 0.5, "not positive semidefinite"),  # which no two columns by themselves show
        (torch.eye(64) * (torch.arange(64) > 0) + torch.eye(64).roll(1, 0) + torch.eye(64).roll(1, 1), "semidefinite"),
        (correlated(400, 64).triu(), r"not symmetric: \[0, 1\] is .* and \[1, 0\] is 0; give all of X\^T X"),
        (torch.eye(64).to_sparse(), "Hessian is torch.sparse_coo; .*to_dense"),
        (torch.eye(64, device="meta"), "Hessian is on the meta device"),
        ([[1.0]], r"Hessian is a list; wanted a tensor \[64, 64\]"),
    ],
)
def test_wrong_hessians_are_refused(hessian: Any, said: str):
    with pytest.raises(InputError, match=said):
        gptq(matrix(8, 64), hessian, "nvfp4")


def test_wrong_options_are_refused():
    weight, hessian = matrix(8, 64), torch.eye(64)
    with pytest.raises(InputError, match="did you mean 'activation'"):
        gptq(weight, hessian, "nvfp4", order="activations")
    with pytest.raises(InputError, match="damping"):
        gptq(weight, hessian, "nvfp4", damping=-1.0)
    with pytest.raises(InputError, match=r"damping is nan; wanted a share .*0.01"):
        gptq(weight, hessian, "nvfp4", damping=math.nan)
    with pytest.raises(InputError, match="damping is inf"):
        gptq(weight, hessian, "nvfp4", damping=math.inf)
    with pytest.raises(InputError, match="block"):
        gptq(weight, hessian, "nvfp4", block=0)
    with pytest.raises(InputError, match="tokens is 0; wanted how many"):
        gptq(weight, hessian, "nvfp4", tokens=0)
    with pytest.raises(InputError, match="'max' looks at the largest"):
        gptq(weight, hessian, "nvfp4", weight=torch.ones(64))
    with pytest.raises(InputError, match="is a list"):
        gptq([[1.0]], hessian, "nvfp4")  # type: ignore[arg-type]


def test_a_parameter_is_a_matrix():
    weight, hessian = matrix(8, 64), correlated(400, 64)

    def kept(tensor: Tensor) -> Tensor:
        raise AssertionError(f"{list(tensor.shape)} is kept for a backward pass")

    with torch.autograd.graph.saved_tensors_hooks(kept, kept):
        made = gptq(torch.nn.Parameter(weight), hessian.requires_grad_(), "nvfp4", "search", weight=torch.rand(64))
    assert not any(t.requires_grad for t in (made.codes, made.dequantize(), made.global_scale))


def test_sums_in_single_precision_are_symmetric_enough():
    x = torch.randn(3000, 200, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 3, 200)
    x[:, 7] = 1e-30  # its square has no float32, its products with others have one
    hessian = x.T @ x
    hessian += 1e-6 * hessian.triu(1)
    assert bool((hessian[7] != 0).any())
    said: list[str] = []
    gptq(matrix(8, 200), hessian, "nvfp4", say=said.append)
    assert "1 of 200 columns" in said[0]


def test_output_error_is_that_of_the_products():
    x, weight = torch.randn(50, 20, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
    near = weight + 0.1 * torch.randn(7, 20, dtype=torch.float64)
    want = float((x @ (weight - near).T).square().sum() / (x @ weight.T).square().sum())
    assert output_error(weight, near, x.T @ x) == pytest.approx(want, rel=1e-10)
