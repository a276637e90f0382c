"""Matrix products with weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.op import Cost, nbytes, op


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias; x [..., K], weight [N, K], bias [N] or None, y [..., N] in x's dtype."""
    return torch.nn.functional.linear(x, weight, bias)


@linear.cost
def _cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    n, k = weight.shape
    rows = x.numel() // k
    return Cost(2 * rows * n * k, nbytes(x, weight, bias) + rows * n * x.element_size())


@linear.samples
def _samples() -> Iterable[tuple[Any, ...]]:
    yield torch.randn(2, 3, 8), torch.randn(5, 8)
    yield torch.randn(1, 1, 7), torch.randn(4, 7), torch.randn(4)
