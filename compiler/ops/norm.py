"""Normalisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.op import Cost, nbytes, op


@op
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, shift: float = 0.0, late_cast: bool = False) -> Tensor:
    """RMSNorm over the last axis (Zhang and Sennrich, 2019), computed in fp32, returned in x's dtype.

    x [..., K], weight [K] or None. `shift` is added to the weight (Gemma: 1.0). `late_cast` says where the result is
    rounded to x's dtype: after the product with the weight (Gemma) or before it (Llama); the two differ in bf16.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if late_cast:
        scale = weight.to(wide.dtype)
        return (normed * (scale + shift if shift else scale)).to(x.dtype)
    return normed.to(x.dtype) * (weight + shift if shift else weight)


@rms_norm.cost
def _cost(x: Tensor, weight: Tensor | None, eps: float, shift: float = 0.0, late_cast: bool = False) -> Cost:
    return Cost(4 * x.numel(), 2 * nbytes(x) + nbytes(weight))


@rms_norm.samples
def _samples() -> Iterable[tuple[Any, ...]]:
    yield torch.randn(2, 3, 8), torch.randn(8), 1e-6
    yield torch.randn(2, 3, 8), None, 1e-5
    yield torch.randn(1, 3, 8).bfloat16(), torch.randn(8).bfloat16(), 1e-6, 1.0, True
