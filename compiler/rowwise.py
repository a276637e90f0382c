"""The rule that makes caching sound: apart from attention, no op mixes tokens.

Each tensor has at most one axis that runs over tokens (the axis whose size holds T); views may move it, pointwise ops
keep it, and nothing may contract, scan, reorder or index along it, nor compute with the number of tokens. That is what
allows a step to run any tokens of any sequences side by side and to keep only keys and values. What is not known to
obey is refused. The same walk over B shows that sequences of a batch do not see each other either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import VerifyError
from llmopt.compiler.graph import Graph, target_name, where
from llmopt.compiler.op import op_of
from llmopt.compiler.verify import (
    ACTIVATIONS,
    CONTRACTIONS,
    CREATION,
    INDEXING,
    NORMS,
    REDUCTIONS,
    SIZES,
    VIEWS,
    context,
    is_pointwise,
    result_type,
)

_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as"}
_SHAPED = {*_RESHAPES, "expand", "repeat", "repeat_interleave"}  # may be given the number of tokens, as a size
_ALONG = {
    "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "cat", "squeeze", "slice_scatter",
    "select_scatter",
}  # fmt: skip
_FILLS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}  # where the value stands


def check_rowwise(graph: Graph, positions: Collection[fx.Node] = ()) -> None:
    """Raise VerifyError for the first op, attention apart, that mixes tokens or sequences.

    `positions` are nodes known to hold the position of each token, whatever way they are made.
    """
    for name in ("T", "B"):
        walk = _Rowwise(graph, name)
        for node in graph.calls():
            if node not in positions:
                walk.visit(node)


class _Rowwise:
    """One walk over a graph that follows the axis over tokens (or over sequences, for B)."""

    def __init__(self, graph: Graph, symbol: str) -> None:
        self.graph = graph
        self.is_tokens = symbol == "T"
        assert graph.symbols is not None
        sizes = {name: size.node.expr for name, size in graph.symbols.sizes.items()}
        self.symbol, self.inner = sizes[symbol], sizes["T"]
        self.merged = str(sizes["B"] * sizes["T"])

    def holds(self, size: Any) -> bool:
        symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
        return symbolic and self.symbol in size.node.expr.free_symbols

    def axes(self, value: Any) -> tuple[int, ...]:
        """Axes over tokens, counted from the end (-1 is the last)."""
        if not isinstance(value, Tensor):
            return ()
        return tuple(i - value.dim() for i, size in enumerate(value.shape) if self.holds(size))

    def axes_of(self, arg: Any) -> tuple[int, ...]:
        return self.axes(arg.meta.get("val")) if isinstance(arg, fx.Node) else ()

    def fail(self, node: fx.Node, why: str) -> None:
        raise VerifyError(
            f"{where(node)}: {target_name(node)} -> {result_type(self.graph, node)} {why}; wanted causal attention to "
            f"be the only op that mixes {'tokens' if self.is_tokens else 'sequences'}, so that past tokens need only "
            f"their keys and values; a model with this op cannot be given a KV cache\n{context(self.graph, node)}"
        )

    def visit(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if self.axes_of(n)]
        sized = any(self.holds(n.meta.get("val")) for n in node.all_input_nodes)
        value = node.meta.get("val")
        values: Iterable[Any] = value if isinstance(value, (tuple, list)) else (value,)
        if not inputs and not sized and not any(self.axes(v) for v in values):
            return
        name = target_name(node).removeprefix("aten.")
        if not isinstance(node.target, OpOverload) or name in SIZES:
            return  # getitem and arithmetic on sizes: what is done with the result is checked where it is done
        for v in values:
            self._check_axes(node, v)
        if sized and name not in _SHAPED and name not in CREATION:
            self._refuse_size(node, name)
        check = self._check_of(node, name)
        if check is not None:
            check(self, node, inputs)

    def _check_axes(self, node: fx.Node, value: Any) -> None:
        axes = self.axes(value)
        if len(axes) > 1:
            self.fail(node, "has two token axes")
        if axes and _text(value.shape[axes[0]]) not in (str(self.symbol), self.merged):
            self.fail(node, "has an axis over some, or several copies, of the tokens")

    def _refuse_size(self, node: fx.Node, name: str) -> None:
        if name in ("slice", "narrow", "select"):
            self.fail(node, "takes rows by the number of tokens instead of by position_ids")
        self.fail(node, "computes with the number of tokens")

    def _check_of(self, node: fx.Node, name: str) -> Callable[[_Rowwise, fx.Node, list[fx.Node]], None] | None:
        if op_of(node.target) is not None:
            return self.by_ir_name.get(name, _Rowwise.unknown)
        if name in VIEWS:
            return _Rowwise.view
        is_binary = node.target._overloadname == "other"  # type: ignore[union-attr]  # max and min of two tensors
        if is_pointwise(node.target) or name in ACTIVATIONS or is_binary:
            return None
        return self.by_name.get(name, _Rowwise.unknown)

    def pointwise(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Nothing to check: two token axes that do not lie on each other show in the result."""

    def last(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """The op works along the last axis of its operands."""
        if any(-1 in self.axes_of(source) for source in inputs):
            self.fail(node, "works along the token axis")

    def rope(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """x [B, H, T, D], cos and sin [B, T, R]."""
        self._placed(node, [(node.args[0], -2, -4), *((n, -2, -3) for n in node.args[1:3])])

    def attention(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """q, k and v [B, H, T, D], sinks [H]."""
        self._placed(node, [(n, -2, -4) for n in node.args[:3]])
        if self.axes_of(node.args[3]):
            self.fail(node, "has sinks that depend on the tokens")

    def _placed(self, node: fx.Node, wanted: list[tuple[Any, int, int]]) -> None:
        for source, tokens, batch in wanted:
            at = tokens if self.is_tokens else batch
            if self.axes_of(source) not in ((), (at,)):
                axis = "token" if self.is_tokens else "batch"
                self.fail(node, f"takes %{source.name}, whose axis {at} is not the {axis} axis")

    def view(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        name = target_name(node).removeprefix("aten.")
        if name in _ALONG:
            self._not_along(node, inputs)
        elif name in _RESHAPES:
            self._keeps_order(node, inputs)

    def _keeps_order(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """A reshape keeps tokens apart if as many elements stand behind the token axis as before."""
        value = node.meta["val"]
        if inputs and self.axes(value) and self._behind(inputs[0].meta["val"]) != self._behind(value):
            self.fail(node, "reshapes elements of one token into another")

    def _behind(self, value: Tensor) -> str:
        """Elements from one index of this axis to the next; where a view merged B and T, T runs faster."""
        at = value.dim() + self.axes(value)[0]
        count: Any = 1
        for size in value.shape[at + 1 :]:
            count = count * size
        expr = count.node.expr if isinstance(count, torch.SymInt) else count
        merged = not self.is_tokens and _text(value.shape[at]) == self.merged
        return str(expr * self.inner if merged else expr)

    def _not_along(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """The axes named by the argument `dim` (all if there is none, or it is empty) are not the token axis."""
        dim = _axis_argument(node)
        for source in inputs:
            rank = source.meta["val"].dim()
            dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
            if {d - rank if d >= 0 else d for d in dims} & set(self.axes_of(source)):
                self.fail(node, "works along the token axis")

    def reduction(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Softmax, sums, scans and sorts: not over tokens."""
        self._not_along(node, inputs)

    def norm(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Over the last axes; group_norm over all but the first."""
        shape: Any = node.args[1]
        for source in inputs:
            count = len(shape) if isinstance(shape, (list, tuple)) else source.meta["val"].dim() - 1
            if any(axis >= -count for axis in self.axes_of(source)):
                self.fail(node, "normalises over the token axis")

    def product(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Neither operand may be contracted over tokens (matmul's axes -1 and -2; a vector has only -1)."""
        name = target_name(node)
        if name == "aten.scaled_dot_product_attention":
            self.fail(node, "is attention that was not raised")
        if name == "aten.einsum":
            return self._einsum(node)
        if name == "aten.linear":
            return self.last(node, inputs)
        args = node.args[1:3] if name in ("aten.addmm", "aten.baddbmm") else node.args[:2]
        left, right = (n for n in args if isinstance(n, fx.Node))
        contracted = -1 if right.meta["val"].dim() == 1 else -2
        if -1 in self.axes_of(left) or contracted in self.axes_of(right):
            self.fail(node, "multiplies tokens with each other")

    def _einsum(self, node: fx.Node) -> None:
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        terms, arrow, result = equation.partition("->")
        for term, source in zip(terms.split(","), operands, strict=True):  # type: ignore[arg-type]
            for axis in self.axes_of(source):
                after_dots = "." not in term or -axis <= len(term) - term.index(".") - 3
                if not arrow or not after_dots or term[axis] not in result:
                    self.fail(node, "sums over tokens, or hides their axis behind `...`")

    def lookup(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """A table may be looked up by anything if it does not run over tokens, and along another axis if it does."""
        table: Any = node.args[0]
        name = target_name(node)
        if name == "aten.one_hot" or not self.axes_of(table):
            return
        (axis,) = self.axes_of(table)
        if name == "aten.index":
            picks: Any = node.args[1]
            at = table.meta["val"].dim() + axis
            own = picks[at] if at < len(picks) else None
            if own is None and not any(self.axes_of(p) for p in picks):
                return
        elif name in ("aten.gather", "aten.index_select"):
            self._not_along(node, [table])
            if name == "aten.index_select" or self.axes_of(node.args[2]) == (axis,):
                return
        self.fail(node, "looks up other tokens")

    def creation(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """New tensors may have T as a size, but not as a value."""
        name = target_name(node).removeprefix("aten.")
        if name in ("arange", "tril", "triu", "eye"):
            self.fail(node, "numbers the tokens by index instead of by position_ids")
        at = _FILLS.get(name, len(node.args))
        fill = node.args[at] if at < len(node.args) else node.kwargs.get("fill_value")
        if isinstance(fill, fx.Node):
            self.fail(node, "computes with the number of tokens")

    def unknown(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Refused."""
        self.fail(node, "is not known to treat tokens one by one")

    by_ir_name: ClassVar = {
        "linear": last,
        "quantized_linear": last,
        "rms_norm": last,
        "rotate": last,
        "gated": pointwise,
        "softcap": pointwise,
        "rope": rope,
        "attention": attention,
    }
    by_name: ClassVar = {
        **dict.fromkeys(REDUCTIONS, reduction),
        **dict.fromkeys(NORMS, norm),
        **dict.fromkeys(CONTRACTIONS, product),
        **dict.fromkeys(INDEXING, lookup),
        **dict.fromkeys(CREATION, creation),
    }


def _text(size: Any) -> str:
    return str(size.node.expr)


def _axis_argument(node: fx.Node) -> Any:
    """The call's argument `dim`, or its default; None where the op has no such argument."""
    for at, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == "dim":
            return node.args[at] if at < len(node.args) else node.kwargs.get("dim", argument.default_value)
    return None
