"""The matrices of a `rotate` as the template `rotated` multiplies by them: signs, as all elements have one size.

    left     int8 [A, A]     signs of the left factor, transposed; None for blocks that one matrix turns
    right    int8 [B, B]     of the right factor, or of both factors' Kronecker product

Each padded with zeros to a power of two, 16 at least, as tensor cores want it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.compiler.errors import BuildError

WHOLE = 128  # elements of a block that one matrix turns: that many by that many signs fit beside a tile


@dataclass(frozen=True)
class Signs:
    """A rotation in this form: see the module's docstring."""

    left: Tensor | None
    right: Tensor


def sides(left: int, right: int) -> tuple[int, int]:
    """(A, B) for factors of these orders: what a block of A * B elements is turned by, A = 1 by one matrix."""
    return (1, left * right) if left * right <= WHOLE else (left, right)


def width(side: int) -> int:
    """What a matrix of this order is padded to."""
    return max(16, 1 << (side - 1).bit_length())


def lay_signs(left: Tensor, right: Tensor) -> Signs:
    """Factors [a, a] and [b, b] in this form. Raises BuildError: elements are not alike in size."""
    for name, factor in (("left", left), ("right", right)):
        # a matrix with 0.5 % less in one element is no Hadamard matrix any more, and rounding is far below that
        if ((factor.abs() * len(factor) ** 0.5 - 1).abs() > 1e-3).any():
            sizes = factor.abs().aminmax()
            raise BuildError(
                f"rotate: elements of its {name} factor [{len(factor)}, {len(factor)}] have sizes from "
                f"{float(sizes.min):.4g} to {float(sizes.max):.4g}; wanted {len(factor) ** -0.5:.4g} all over, as in "
                "`hadamard.Rotation`'s factors; set LLMOPT_PROVIDER=reference to run other ones by torch"
            )
    sides_ = sides(len(left), len(right))
    if sides_[0] == 1:
        return Signs(None, _padded(torch.kron(left.contiguous(), right.contiguous())))
    return Signs(_padded(left.T), _padded(right))


def _padded(factor: Tensor) -> Tensor:
    room = width(len(factor)) - len(factor)
    return F.pad(factor.sign().to(torch.int8), (0, room, 0, room)).contiguous()
