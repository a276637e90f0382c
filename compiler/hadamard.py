"""Hadamard matrices, and rotations made of two small ones with random signs.

A Hadamard matrix H of order n has entries 1 and -1 and H H^T = n I. Orders made here: 1 and 2, q + 1 for primes
q = 3 mod 4 and 2 (q + 1) for primes q = 1 mod 4 (Paley, J. Math. Phys. 12, 1933), and products of these (Sylvester,
1867): among them 12, 20, 28, 44, 76, 108, 148 and 14336 = 28 * 512, so that few widths of models need blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError

WIDEST = 256  # elements on a side: a matrix that a kernel can hold


@cache
def hadamard(order: int) -> Tensor:
    """Float64 [order, order] of 1 and -1. Raises InputError for orders that none of the constructions gives."""
    if order in (1, 2):
        return torch.ones(1, 1, dtype=torch.float64) if order == 1 else _two()
    if order % 4 == 0:
        if _is_prime(order - 1):  # 3 mod 4
            return _first_paley(order - 1)
        if order % 8 == 4 and _is_prime(order // 2 - 1):  # 1 mod 4
            return _second_paley(order // 2 - 1)
        for left in range(2, order // 2 + 1):
            if order % left == 0 and exists(left) and exists(order // left):
                return torch.kron(hadamard(left), hadamard(order // left))
    raise InputError(f"no Hadamard matrix of order {order} can be made; wanted 1, 2, or such as `exists` knows")


@cache
def exists(order: int) -> bool:
    """Can a matrix of this order be made?"""
    if order in (1, 2):
        return True
    if order % 4:
        return False
    if _is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1)):
        return True
    return any(order % left == 0 and exists(left) and exists(order // left) for left in range(2, order // 2 + 1))


def largest(size: int, most: int) -> int:
    """The largest order up to `most` of a `Rotation` of vectors of `size` elements, which it divides."""
    return max(order for order in range(1, min(size, most) + 1) if size % order == 0 and _split(order) is not None)


@cache
def _split(order: int) -> tuple[int, int] | None:
    """Two orders a <= b <= WIDEST whose product this is, as near to each other as there are."""
    sizes = [a for a in range(1, WIDEST + 1) if order % a == 0 and a * a <= order <= a * WIDEST]
    return next(((a, order // a) for a in reversed(sizes) if exists(a) and exists(order // a)), None)


@dataclass(frozen=True)
class Rotation:
    """x -> x Q over blocks of `order` elements; Q = (S L / sqrt a) (x) (T R / sqrt b), S and T random signs.

    L and R are Hadamard matrices of orders a * b = `order`, as near to each other as there are. Q is orthogonal, and
    spreads an outlier, or an offset that all elements share, over the whole block (QuaRot, arXiv 2404.00456).
    """

    order: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order < 1 or _split(self.order) is None:
            known = (n for n in range(1, 2 * max(self.order, 1) + 1) if _split(n) is not None)
            near = min(known, key=lambda n: abs(n - self.order))
            raise InputError(f"no rotation of order {self.order} can be made; wanted such as {near}")

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Float64 [a, a] and [b, b], a <= b."""
        sizes = _split(self.order)
        assert sizes is not None
        make = torch.Generator().manual_seed(self.seed)
        return _signed(sizes[0], make), _signed(sizes[1], make)

    def turned(self, x: Tensor) -> Tensor:
        """x Q in float64 for x [..., n], n a multiple of the order."""
        left, right = (factor.to(x.device) for factor in self.factors)
        parts = x.double().unflatten(-1, (-1, len(left), len(right)))
        return (left.T @ (parts @ right)).flatten(-3)


def _signed(order: int, make: torch.Generator) -> Tensor:
    signs = torch.randint(2, (order, 1), generator=make) * 2 - 1
    return signs * hadamard(order) / order**0.5


def _two() -> Tensor:
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def _residues(q: int) -> Tensor:
    """Float64 [q, q]: the quadratic character of j - i modulo the prime q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    at = torch.arange(q)
    return character[(at[None, :] - at[:, None]) % q]


def _first_paley(q: int) -> Tensor:
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _residues(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _second_paley(q: int) -> Tensor:
    symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _residues(q)
    identity = torch.eye(q + 1, dtype=torch.float64)
    beside = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(symmetric, _two()) + torch.kron(identity, beside)
