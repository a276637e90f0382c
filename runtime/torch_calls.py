"""Torch's own ops as a region's code calls them: those that no template of ours beats, or takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler import quant
from llmopt.compiler.quant import scheme_of
from llmopt.runtime.attend import attend

_AT_ONCE = 2**24  # weights decoded at a time


def linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [..., J] = x [..., K] @ weight [J, K].T"""
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, out.shape[-1]))


def linear_add(x: Tensor, weight: Tensor, added: Tensor, out: Tensor) -> None:
    """out [..., J] = added + x [..., K] @ weight [J, K].T, rounded once; added [J] or as out, which it may be.

    A matrix is added without being copied only in place.
    """
    rows = out.view(-1, out.shape[-1])
    left = x.reshape(-1, x.shape[-1])
    if added is out:
        rows.addmm_(left, weight.t())
    else:
        torch.addmm(added if added.dim() == 1 else added.view_as(rows), left, weight.t(), out=rows)


def dequantize(
    packed: Tensor, scales: Tensor, global_scale: Tensor | None, zero_points: Tensor | None, out: Tensor, scheme: str
) -> None:
    """out [N, K]: what the others hold in `scheme` (`compiler.quant`). Some rows at a time, as it is made in fp32."""
    kind = scheme_of(scheme)
    rows, columns = out.shape
    height = kind.rows or 1
    at_once = max(_AT_ONCE // columns // height, 1) * height
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        part = scales[start // height : -(-stop // height)] if kind.rows else scales
        zeros = None if zero_points is None else zero_points[start:stop]
        out[start:stop] = quant.dequantize(packed[start:stop], part, global_scale, zeros, kind, columns, out.dtype)


TORCH_CALLS: Mapping[str, Callable[..., Any]] = {
    "linear": linear, "linear_add": linear_add, "dequantize": dequantize, "attend": attend,
}  # fmt: skip
