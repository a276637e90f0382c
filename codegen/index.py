"""Index expressions: integers linear in variables, with `//` and `%` where a view needs them and nowhere else.

An Index is a constant plus coefficients times atoms; an atom is a variable, a quotient or remainder of another Index,
or text. Values of atoms are at least 0 and, where `size` is known, below it; that is what lets
[1, N, H * D] -> [1, N, H, D] -> back cancel. Quotients and remainders are taken of values >= 0 only, where Python's and
C's agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llmopt.compiler.errors import EmitError


@dataclass(frozen=True)
class Atom:
    """What an Index is made of; `depends` are the variables that its value varies with."""

    text: str
    size: int | None
    depends: frozenset[str]
    op: str = ""  # "//" or "%", of `base` by `divisor`
    base: Index | None = None
    divisor: int = 0


@dataclass(frozen=True)
class Index:
    """`constant` + sum of coefficient * atom; equal expressions are equal objects."""

    terms: tuple[tuple[Atom, int], ...] = ()
    constant: int = 0

    @cached_property
    def depends(self) -> frozenset[str]:
        """The variables that the value varies with."""
        return frozenset().union(*(atom.depends for atom, _ in self.terms))

    @cached_property
    def lowest(self) -> int | None:
        """A lower bound of the value; None if there is none."""
        return self._bound(negative=True)

    @cached_property
    def highest(self) -> int | None:
        """An upper bound (reached at most) of the value; None if there is none."""
        return self._bound(negative=False)

    def _bound(self, negative: bool) -> int | None:
        total = self.constant
        for atom, factor in self.terms:
            if (factor < 0) == negative:
                if atom.size is None:
                    return None
                total += factor * (atom.size - 1)
        return total

    def below(self, size: int) -> bool:
        """Is 0 <= value < size known?"""
        low, high = self.lowest, self.highest
        return low is not None and low >= 0 and high is not None and high < size

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.terms, self.constant + other)
        return _sum([*self.terms, *other.terms], self.constant + other.constant)

    def __mul__(self, factor: int) -> Index:
        if factor == 0:
            return ZERO
        return Index(tuple((a, f * factor) for a, f in self.terms), self.constant * factor)

    def __str__(self) -> str:
        parts = [a.text if f == 1 else f"{a.text} * {f}" for a, f in self.terms]
        if self.constant or not parts:
            parts.append(str(self.constant))
        return " + ".join(parts).replace("+ -", "- ")


ZERO = Index()


def variable(name: str, size: int | None) -> Index:
    """A variable with values 0..size - 1 (or no known end)."""
    return Index(((Atom(name, size, frozenset({name})), 1),))


def opaque(text: str, size: int | None, depends: Iterable[str]) -> Index:
    """An integer that is only known by its text and its range 0..size - 1."""
    return Index(((Atom(text, size, frozenset(depends)), 1),))


def _sum(terms: Sequence[tuple[Atom, int]], constant: int) -> Index:
    merged: dict[Atom, int] = {}
    for atom, factor in terms:
        merged[atom] = merged.get(atom, 0) + factor
    merged = {a: f for a, f in merged.items() if f}
    for atom, factor in merged.items():
        if atom.op == "%":  # (x // d) * d + x % d is x
            assert atom.base is not None
            whole = next((a for a in merged if a.op == "//" and (a.base, a.divisor) == (atom.base, atom.divisor)), None)
            if whole is not None and merged[whole] == factor * atom.divisor:
                rest = [(a, f) for a, f in merged.items() if a not in (atom, whole)]
                return _sum([*rest, *(atom.base * factor).terms], constant + atom.base.constant * factor)
    return Index(tuple(sorted(merged.items(), key=lambda t: (-t[1], t[0].text))), constant)


def split(index: Index, divisor: int) -> tuple[Index, Index]:
    """(index // divisor, index % divisor), with everything that is known to vanish left out."""
    whole = _sum([(a, f // divisor) for a, f in index.terms], index.constant // divisor)
    rest = _sum([(a, f % divisor) for a, f in index.terms], index.constant % divisor)
    if rest.below(divisor):
        return whole, rest
    for common in sorted({math.gcd(divisor, f) for _, f in rest.terms} - {1}, reverse=True):
        low = _sum([(a, f) for a, f in rest.terms if f % common], rest.constant % common)
        if low.below(common):  # rest = common * high + low, so low takes no part in the quotient
            high = _sum([(a, f // common) for a, f in rest.terms if not f % common], rest.constant // common)
            quotient, remainder = split(high, divisor // common)
            return whole + quotient, remainder * common + low
    size = rest.highest
    quotient = _derived("//", rest, divisor, None if size is None else size // divisor + 1)
    return whole + quotient, _derived("%", rest, divisor, divisor)


def _derived(op: str, base: Index, divisor: int, size: int | None) -> Index:
    text = str(base) if len(base.terms) == 1 and base.terms[0][1] == 1 and not base.constant else f"({base})"
    return Index(((Atom(f"({text} {op} {divisor})", size, base.depends, op, base, divisor), 1),))


# sizes: an int, or for a symbolic one a factor and the names of symbols, which never divide each other by chance
Factors = tuple[int, tuple[str, ...]]


def sizes_of(value: Any) -> tuple[Factors, ...]:
    """The sizes of a fake tensor."""
    return tuple(_factors(size) for size in value.shape)


def _factors(size: Any) -> Factors:
    if isinstance(size, torch.SymInt):
        factor, rest = size.node.expr.as_coeff_Mul()
        names = () if rest == 1 else tuple(sorted(map(str, rest.as_ordered_factors())))
        return int(factor), names
    return int(size), ()


def _times(a: Factors, b: Factors) -> Factors:
    return a[0] * b[0], tuple(sorted((*a[1], *b[1])))


def _divides(a: Factors, b: Factors) -> bool:
    left = list(b[1])
    for name in a[1]:
        if name not in left:
            return False
        left.remove(name)
    return b[0] % a[0] == 0


def reshaped(coords: Sequence[Index], new: Sequence[Factors], old: Sequence[Factors]) -> tuple[Index, ...]:
    """Coordinates in the shape `old` of the element at `coords` of its reshape to `new`. Raises EmitError."""
    result: dict[int, Index] = {}
    for outer, inner in _groups(new, old):
        flat = coords[outer[0]]
        for at in outer[1:]:
            flat = flat * _static(new[at]) + coords[at]
        for at in reversed(inner[1:]):
            flat, result[at] = split(flat, _static(old[at]))
        result[inner[0]] = flat
    return tuple(result.get(at, ZERO) for at in range(len(old)))


def _groups(new: Sequence[Factors], old: Sequence[Factors]) -> list[tuple[list[int], list[int]]]:
    """Axes of both shapes (those of size 1 left out) in runs that hold the same elements, runs as short as possible."""
    sides = [[at for at, size in enumerate(shape) if size != (1, ())] for shape in (new, old)]
    groups: list[tuple[list[int], list[int]]] = []
    while sides[0] or sides[1]:
        run: tuple[list[int], list[int]] = ([], [])
        counts: list[Factors] = [(1, ()), (1, ())]
        while not run[0] or counts[0] != counts[1]:
            side = 0 if not run[0] or (run[1] and not _divides(counts[1], counts[0])) else 1
            if not sides[side]:
                side = 1 - side
            if not sides[side]:
                raise EmitError(f"a reshape from {_text(old)} to {_text(new)} does not keep the elements of a token")
            at = sides[side].pop(0)
            run[side].append(at)
            counts[side] = _times(counts[side], (new, old)[side][at])
        groups.append(run)
    return groups


def _static(size: Factors) -> int:
    if size[1]:
        raise EmitError("a reshape merges the token axis behind another one; wanted tokens as the outermost axis")
    return size[0]


def _text(shape: Sequence[Factors]) -> str:
    return "[" + ", ".join("*".join([str(f), *names]) for f, names in shape) + "]"


def offset(coords: Sequence[Index], shape: Sequence[Factors], tokens: str | None) -> tuple[str, frozenset[str]]:
    """The text of a contiguous tensor's offset at these coordinates, and what it depends on.

    The one symbolic size among the inner axes is called `tokens`. Raises EmitError if it is needed and None.
    """
    plain, scaled = ZERO, ZERO
    stride: Factors = (1, ())
    for index, size in zip(reversed(coords), reversed(shape), strict=True):
        if len(stride[1]) > 1:
            raise EmitError(f"a tensor {_text(shape)} has two symbolic axes that stand inside another one")
        if size != (1, ()):
            if stride[1]:
                scaled = scaled + index * stride[0]
            else:
                plain = plain + index * stride[0]
        stride = _times(stride, size)
    depends = plain.depends | scaled.depends
    if scaled == ZERO:
        return str(plain), depends
    if tokens is None:
        raise EmitError(f"a tensor {_text(shape)} has the tokens as an inner axis, and their number is not at hand")
    return f"({scaled}) * {tokens} + {plain}", depends
