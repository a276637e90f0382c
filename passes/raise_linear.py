"""Raising products with weights: whatever its spelling, `x @ w` with a weight becomes one `linear`.

    y = aten.linear(x, w, b)                                  y = linear(x, w, b)
    y = aten.matmul(x, aten.t(w))                       =>    y = linear(x, w)
    y = aten.matmul(x, w)                                     y = linear(x, w.T)        # transposed by a Fold
    y = reshape(addmm(b, reshape(x, [-1, K]), w), ...)        y = linear(x, w.T, b)     # GPT-2's Conv1D
    y = aten.einsum("btd,de->bte", [x, w])                    y = linear(x, w.T)
    y = aten.matmul(x, p)  # x [.., M, 1], p [.., 1, N]       y = aten.mul(x, p)

An einsum of two activations becomes a matmul of permuted operands, so that attention written in it is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.pattern import AnyOf, aten, call
from llmopt.compiler.program import Fold, Program
from llmopt.compiler.rewrite import Builder, Match, Rule

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def _is_weight(m: Match, name: str) -> bool:
    node, value = m[name], m.val(name)
    return isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(value, Tensor) and value.dim() == 2


class Linear(Rule):
    """aten.linear with a weight."""

    name = "linear"

    def pattern(self, x: Any, w: Any, bias: Any) -> Any:
        """Bias or None."""
        return aten.linear.default(x, w, bias)

    def check(self, m: Match) -> Any:
        """The weight must be one of the program's."""
        known = isinstance(m["w"], fx.Node) and m["w"].op in ("get_attr", "placeholder")
        return None if known else m.fail("the weight is computed", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One linear."""
        return b.ir.linear(m["x"], m["w"], m["bias"])


class TurnedProduct(Rule):
    """x @ w.T, as tied embeddings are often written."""

    name = "turned-product"

    def pattern(self, x: Any, w: Any) -> Any:
        """Every way to transpose a matrix."""
        swaps = [aten.transpose.int(w, i, j) for i, j in ((0, 1), (1, 0), (-2, -1), (-1, -2))]
        turned = AnyOf(aten.numpy_T.default(w), aten.t.default(w), aten.permute.default(w, [1, 0]), *swaps)
        return AnyOf(aten.matmul.default(x, turned), aten.mm.default(x, turned))

    def check(self, m: Match) -> Any:
        """A weight matrix on the right."""
        return None if _is_weight(m, "w") else m.fail("the right operand is not a transposed weight", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One linear."""
        return b.ir.linear(m["x"], m["w"], None)


class _WithFold(Rule):
    """A rule that needs a weight transposed."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def turned(self, b: Builder, m: Match) -> Any:
        """w.T as a weight of its own."""
        w = m.val("w")
        name, shape = f"{m['w'].target}.T", (int(w.shape[1]), int(w.shape[0]))
        if name not in self.program.weights:
            source = (str(m["w"].target),)
            self.program.fold(Fold(name, source, lambda t: t.t().contiguous(), shape, w.dtype, "transpose"))
        return b.weight(name, w.new_empty(shape))


class Product(_WithFold):
    """x @ w with a weight [K, N]."""

    name = "product"

    def pattern(self, x: Any, w: Any) -> Any:
        """Batched or flat."""
        return AnyOf(aten.matmul.default(x, w), aten.mm.default(x, w))

    def check(self, m: Match) -> Any:
        """A weight matrix on the right, and rows on the left."""
        fits = _is_weight(m, "w") and m.val("x").dim() >= 2
        return None if fits else m.fail("the right operand is not a weight", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """linear over the transposed weight."""
        return b.ir.linear(m["x"], self.turned(b, m), None)


class TransposedLinear(_WithFold):
    """view(addmm(bias, view(x, [-1, K]), w[K, N]), [..., N]): GPT-2's Conv1D."""

    name = "transposed-linear"

    def pattern(self, bias: Any, x: Any, w: Any, flat: Any, full: Any) -> Any:
        """A flattened product."""
        return call(_VIEWS, aten.addmm.default(bias, call(_VIEWS, x, flat), w), full)

    def check(self, m: Match) -> Any:
        """w is a weight [K, N], bias a vector, and the result has x's leading sizes."""
        x, root = m.val("x"), m.root.meta["val"]
        if not _is_weight(m, "w") or m.val("bias").dim() != 1:
            return m.fail("the right operand is not a weight, or the bias no vector", m.root)
        same = str(root.shape[:-1]) == str(x.shape[:-1]) and x.shape[-1] == m.val("w").shape[0]
        return None if same else m.fail("the views change more than the leading sizes", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """linear over the transposed weight."""
        return b.ir.linear(m["x"], self.turned(b, m), m["bias"])


class _Equation:
    """An einsum of two operands whose axes are: `batch` (in both and the result), one free on each side, one summed."""

    def __init__(self, text: Any) -> None:
        terms, _, self.result = str(text).replace(" ", "").partition("->")
        self.left, _, self.right = terms.partition(",")
        letters = set(self.left) | set(self.right)
        self.batch = [c for c in self.left if c in self.right and c in self.result]
        self.summed = [c for c in self.left if c in self.right and c not in self.result]
        self.rows = [c for c in self.left if c not in self.right]
        self.columns = [c for c in self.right if c not in self.left]
        clean = all(len(set(t)) == len(t) and t.isalpha() for t in (self.left, self.right, self.result))
        kept = {*self.batch, *self.rows, *self.columns} == set(self.result) and len(letters) == len(self.result) + 1
        self.is_product = clean and kept and len(self.summed) == len(self.columns) == 1


class EinsumLinear(_WithFold):
    """einsum("btd,de->bte", x, w) and ("btd,ed->bte")."""

    name = "einsum-linear"

    def pattern(self, equation: Any, x: Any, w: Any) -> Any:
        """Two operands."""
        return aten.einsum.default(equation, [x, w])

    def check(self, m: Match) -> Any:
        """The last axis of x is summed with a weight matrix, the other axes stay in place."""
        if not _is_weight(m, "w"):
            return m.fail("the right operand is not a weight", m.root)
        eq = _Equation(m["equation"])
        plain = eq.is_product and not eq.batch and eq.left[-1:] == "".join(eq.summed)
        in_place = eq.result == eq.left[:-1] + "".join(eq.columns)
        return None if plain and in_place else m.fail(f"{m['equation']!r} is not a linear over the last axis", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One linear."""
        eq = _Equation(m["equation"])
        return b.ir.linear(m["x"], m["w"] if eq.right[-1] == eq.summed[0] else self.turned(b, m), None)


class EinsumProduct(Rule):
    """einsum of two activations: matmul of permuted operands."""

    name = "einsum-product"

    def pattern(self, equation: Any, x: Any, y: Any) -> Any:
        """Two operands."""
        return aten.einsum.default(equation, [x, y])

    def check(self, m: Match) -> Any:
        """Batch axes in both, one row, one column and one summed axis."""
        eq = _Equation(m["equation"])
        fits = eq.is_product and len(eq.rows) == 1 and bool(eq.batch)
        return None if fits else m.fail(f"{m['equation']!r} is not a batched product", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """permute, matmul, permute."""
        eq = _Equation(m["equation"])
        batch = "".join(eq.batch)
        left = _permuted(b, m["x"], eq.left, batch + eq.rows[0] + eq.summed[0])
        right = _permuted(b, m["y"], eq.right, batch + eq.summed[0] + eq.columns[0])
        return _permuted(b, b.aten.matmul.default(left, right), batch + eq.rows[0] + eq.columns[0], eq.result)


class OuterProduct(Rule):
    """A product along an axis of one element, as transformers makes RoPE's angles: nothing is summed."""

    name = "outer-product"

    def pattern(self, x: Any, y: Any) -> Any:
        """Columns times rows."""
        return AnyOf(aten.matmul.default(x, y), aten.bmm.default(x, y), aten.mm.default(x, y))

    def check(self, m: Match) -> Any:
        """One element to sum, and matrices, whose other axes broadcast as a product's do."""
        x, y = m.val("x"), m.val("y")
        if x.dim() < 2 or y.dim() < 2 or not isinstance(x.shape[-1], int) or x.shape[-1] != 1:
            return m.fail("sums over more than one element", m.root)
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One mul, tokens before channels, as everything else has them, where the columns are tokens."""
        if isinstance(m.val("y").shape[-1], int):
            return b.aten.mul.Tensor(m["x"], m["y"])
        x, y = (b.aten.transpose.int(m[name], -2, -1) for name in ("x", "y"))
        return b.aten.transpose.int(b.aten.mul.Tensor(y, x), -2, -1)


def _permuted(b: Builder, x: Any, have: str, want: str) -> Any:
    return x if have == want else b.aten.permute.default(x, [have.index(c) for c in want])


def linear_rules(program: Program, fold: bool) -> list[Rule]:
    """All of the above; without `fold`, only those that leave weights as they are."""
    folding = [TransposedLinear(program), Product(program), EinsumLinear(program)] if fold else []
    return [Linear(), TurnedProduct(), *folding, EinsumProduct(), OuterProduct()]
