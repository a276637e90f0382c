"""Online rotations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.hadamard import Rotation
from llmopt.compiler.op import Cost, nbytes, op


@op
def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x Q over blocks of a * b elements of the last axis, Q = left (x) right: `hadamard.Rotation`'s factors.

    x [..., n], left [a, a] and right [b, b] in float32 (float64 for an x of it), in which it is computed; returned in
    x's dtype.
    """
    parts = x.to(left.dtype).unflatten(-1, (-1, left.shape[0], right.shape[0]))
    return (left.transpose(0, 1) @ (parts @ right)).flatten(-3).to(x.dtype)


@rotate.cost
def _cost(x: Tensor, left: Tensor, right: Tensor) -> Cost:
    return Cost(2 * x.numel() * (left.shape[0] + right.shape[0]), 2 * nbytes(x) + nbytes(left, right))


@rotate.samples
def _samples() -> Iterable[tuple[Any, ...]]:
    for size, order in ((24, 12), (32, 32)):
        left, right = (factor.float() for factor in Rotation(order).factors)
        yield torch.randn(2, 3, size), left, right
        yield torch.randn(2, 3, size).bfloat16(), left, right
