"""Weights laid out for scaled products, and the schemes that take part."""

from __future__ import annotations

import pytest
import torch

from llmopt.codegen.scaled_layout import constants, lay_scaled, padded, tiled
from llmopt.compiler.emittable import SCALED
from llmopt.compiler.quant.packing import unpack
from llmopt.compiler.quant.quantize import quantize
from llmopt.compiler.quant.schemes import SCHEMES


def test_a_scale_lies_where_cublas_and_ptx_say() -> None:
    """cuBLAS, "1D Block Scaling Factors Layout": the offset of (row, group) in a tile of 128 rows and 4 groups is
    (row % 32) * 16 + (row / 32) * 4 + group; tiles follow along K first."""
    scales = torch.arange(256 * 8, dtype=torch.int32).reshape(256, 8)
    flat = tiled(scales).reshape(-1)
    for row, group in ((0, 0), (1, 0), (31, 3), (32, 0), (127, 3), (5, 4), (128, 1), (255, 7)):
        tile = row // 128 * 2 + group // 4
        assert flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] == scales[row, group]


@pytest.mark.parametrize("name", sorted(weights for weights, _ in SCALED))
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (200, 400), (3, 16)])
def test_padding_is_zeros_and_the_rest_is_kept(name: str, rows: int, columns: int) -> None:
    kind = SCHEMES[name]
    q = quantize(torch.randn(rows, columns), kind)
    laid = lay_scaled(q.packed(), q.scales, q.global_scale, q.zero_points, kind, columns)
    whole = padded(kind, columns)
    assert whole % (8 * 128 // kind.element.bits) == 0
    assert laid.codes.shape == (-(-rows // 128) * 128, whole * kind.element.bits // 8)
    codes = unpack(laid.codes, kind.element.bits, whole)
    assert codes[:rows, : q.codes.shape[1]].equal(q.codes)
    assert not codes[rows:].any()
    assert not codes[:, q.codes.shape[1] :].any()
    back = laid.scales.permute(0, 3, 2, 1, 4).reshape(-1, whole // kind.group)
    assert back[:rows, : q.scales.shape[1]].equal(q.scales.view(torch.uint8))
    assert (laid.factor is None) == (q.global_scale is None)
    assert constants(kind, columns)["KP"] == whole
