"""What cannot be quantised, or not as asked for: one kind of error, which says what was wrong and what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llmopt
from llmopt.compiler.errors import InputError
from llmopt.compiler.quant import quantize

ONES = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor([[1.0, math.nan], [math.inf, 1.0]]), r"2 of 4 elements .* first at \[0, 1\] \(nan\)"),
        (torch.tensor([[1.0, 1.0], [-math.inf, 1.0]]), r"1 of 4 elements .* first at \[1, 0\] \(-inf\)"),
        (torch.tensor([[1e300]], dtype=torch.float64), r"first at \[0, 0\] \(1e\+300\)"),
        (torch.ones(3), r"matrices \[N, K\].*\[3\].*reshape"),
        (torch.ones(3, 4, 5), r"matrices \[N, K\].*\[3, 4, 5\]"),
        (torch.ones(0, 4), r"with elements.*\[0, 4\]"),
        (torch.ones(2, 2, dtype=torch.int32), "torch.int32"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64.*real"),
        (torch.ones(2, 2, device="meta"), "meta device.*load it"),
        (torch.eye(4).to_sparse(), "sparse_coo.*to_dense"),
        ([[1.0]], r"is a list; wanted a tensor \[N, K\].*torch.tensor"),
        (np.ones((2, 2)), "is a ndarray"),
        (None, "is a NoneType"),
    ],
)
def test_tensors_that_cannot_be_quantised(tensor: Any, said: str):
    with pytest.raises(InputError, match=said):
        llmopt.quantize(tensor, "mxfp4")


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("nvfp5", {}, "did you mean 'nvfp4'"),
        (None, {}, "scheme is a NoneType, None; wanted .*nvfp4"),
        (4, {}, "scheme is a int, 4"),
        ("nvfp4", {"scale": "serch"}, "did you mean 'search'"),
        ("nvfp4", {"scale": 3}, "scale is a int, 3; wanted .*max, search"),
        ("mxfp4", {"scale": "optimal"}, r"mxfp4 \(e8m0\) cannot be chosen by 'optimal'.*Known: all, max, search"),
        ("int4_g32", {"scale": "four-six"}, "Known: max, search"),
        ("fp8", {"scale_max": 256.0}, "no global scale"),
        ("int8", {"global_scale": torch.tensor(1.0)}, "no global scale"),
        ("nvfp4", {"scale_max": 449.0}, "449"),
        ("nvfp4", {"scale_max": 0.0}, "0.0"),
        ("nvfp4", {"scale_max": math.nan}, "scale_max is nan"),
        ("nvfp4", {"scale_max": "256"}, "scale_max is '256'"),
        ("nvfp4", {"global_scale": torch.tensor(0.0)}, "positive"),
        ("nvfp4", {"global_scale": -1.0}, "global_scale is -1.0.*positive"),
        ("nvfp4", {"global_scale": math.nan}, "positive"),
        ("nvfp4", {"global_scale": torch.ones(2)}, r"shape \[2\]; wanted one positive"),
        ("nvfp4", {"global_scale": torch.ones(())[None].to_sparse()}, "to_dense"),
        ("nvfp4", {"global_scale": torch.ones((), device="meta")}, "meta device"),
        ("nvfp4", {"global_scale": "0.01"}, "global_scale is a str, '0.01'; wanted one positive number"),
        ("nvfp4", {"global_scale": True}, "global_scale is a bool"),
        ("nvfp4", {"global_scale": 1e-60}, "global_scale is 1e-60, in float32 0.0; wanted one positive"),
        ("nvfp4", {"global_scale": 1e-30}, "1e-30 is too small for a largest element of 1, .* from 0.000372 on"),
        ("nvfp4", {"global_scale": 2688.0}, "2.69e[+]03 is too large .* a multiplier and no divisor"),
        ("nvfp4", {"scale": "search", "weight": torch.ones(3)}, r"shape \[3\]; wanted \[64\]"),
        ("nvfp4", {"scale": "search", "weight": torch.ones(0)}, r"shape \[0\]; wanted \[64\]"),
        ("nvfp4", {"scale": "search", "weight": torch.full((64,), -1.0)}, "from -1.0 to -1.0; .*not negative"),
        ("nvfp4", {"scale": "search", "weight": torch.full((64,), torch.nan)}, "finite"),
        ("nvfp4", {"scale": "search", "weight": [1.0] * 64}, r"weight is a list; wanted a tensor \[64\]"),
        ("nvfp4", {"scale": "search", "weight": torch.ones(64, dtype=torch.complex64)}, "complex64"),
        ("nvfp4", {"scale": "search", "weight": torch.ones(64, device="meta")}, "weight is on the meta device"),
        ("nvfp4", {"scale": "search", "weight": torch.ones(64).to_sparse()}, "to_dense"),
        ("nvfp4", {"scale": "max", "weight": torch.ones(64)}, "'max' looks at the largest .*scale='search', or leave"),
    ],
)
def test_options_that_a_scheme_cannot_have(scheme: Any, options: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        llmopt.quantize(ONES, scheme, **options)


@pytest.mark.parametrize("rows", [0, -1, 1.5, "all"])
def test_rows_at_once_is_a_number_of_rows(rows: Any):
    with pytest.raises(InputError, match="rows_at_once is"):
        quantize(ONES, "nvfp4", rows_at_once=rows)


def test_what_a_result_is_restored_to_is_a_float():
    with pytest.raises(InputError, match=r"dtype is torch.int8; wanted one of floats"):
        quantize(ONES, "nvfp4").dequantize(torch.int8)


def normal(columns: int = 64) -> Tensor:
    return torch.randn(16, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "given", [0.01, np.float32(0.01), np.float64(0.01), torch.tensor(0.01), torch.full((1,), 0.01)]
)
def test_a_global_scale_is_a_number_or_a_tensor(given: Any):
    made = llmopt.quantize(normal(), "nvfp4", global_scale=given)
    want = quantize(normal(), "nvfp4", global_scale=torch.tensor(0.01))
    assert made.global_scale is not None
    assert made.global_scale.dtype is torch.float32
    assert made.global_scale == torch.tensor(0.01)
    assert torch.equal(made.codes, want.codes)


@pytest.mark.parametrize("part", [1.0, 1e-3, 1e-5])
def test_a_global_scale_of_larger_neighbours_is_taken(part: float):
    """A layer that is so much smaller than the one it shares its scale with."""
    both = quantize(normal(), "nvfp4").global_scale
    assert quantize(normal() * part, "nvfp4", global_scale=both).error() < 0.5
    assert quantize(torch.zeros(2, 64), "nvfp4", global_scale=both).error() == 0


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int8", "int4_g32", "int4_g32_asym", "fp8_block"])
def test_only_the_proportions_of_a_weight_count(name: str, size: float):
    weight = torch.logspace(-2, 2, 64, dtype=torch.float64)[
        torch.randperm(64, generator=torch.Generator().manual_seed(1))
    ]
    made = quantize(normal(), name, "search", weight=weight * size)
    want = quantize(normal(), name, "search", weight=weight.float())
    assert torch.equal(made.codes, want.codes)
    assert torch.equal(made.scales.float(), want.scales.float())
    assert not torch.equal(made.scales.float(), quantize(normal(), name, "search").scales.float())


def test_a_weight_of_whole_numbers_or_zeros():
    counts = torch.arange(64)
    made = quantize(normal(), "nvfp4", "search", weight=counts)
    assert torch.equal(made.codes, quantize(normal(), "nvfp4", "search", weight=counts.float()).codes)
    nothing = quantize(normal(), "nvfp4", "search", weight=torch.zeros(64))
    assert torch.equal(nothing.codes, quantize(normal(), "nvfp4").codes)
