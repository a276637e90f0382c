"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.op import Cost, nbytes, op


@op
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of each head by position (Su et al., 2021; half-split pairing as in GPT-NeoX).

    x [B, H, T, D]; cos, sin [B, T, R] with R <= D even, already holding both halves; channels R..D pass through.
    """
    r = cos.shape[-1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = x[..., :r]
    lo, hi = turned[..., : r // 2], turned[..., r // 2 :]
    out = turned * c + torch.cat((-hi, lo), dim=-1) * s
    # a custom op may not return its input or a view of it, hence cat or the fresh `out`
    return torch.cat((out, x[..., r:]), dim=-1) if r < x.shape[-1] else out


@rope.cost
def _cost(x: Tensor, cos: Tensor, sin: Tensor) -> Cost:
    return Cost(3 * x.numel(), 2 * nbytes(x) + nbytes(cos, sin))


@rope.samples
def _samples() -> Iterable[tuple[Any, ...]]:
    yield torch.randn(2, 4, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    yield torch.randn(2, 4, 3, 8), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
