"""What a legal graph is: the closed dialect, and the rule that makes caching sound.

`check_dialect`: after `raise_aten` only IR ops and the listed aten subset stand in a graph.
`check_rowwise`: apart from attention, no op mixes tokens. Each tensor has at most one axis that runs over tokens (the
axis whose size holds T); views may move it, pointwise ops keep it, and nothing may contract, scan or index along it.
That is what allows a step to run any tokens of any sequences side by side and to keep only keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import VerifyError
from llmopt.compiler.graph import Graph, target_name, type_of, where
from llmopt.compiler.op import op_of

VIEWS = {
    "view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "permute", "t", "slice",
    "select", "cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "repeat",
    "repeat_interleave", "narrow", "expand_as", "view_as", "to", "clone", "contiguous",
}  # fmt: skip
REDUCTIONS = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "softmax", "_softmax", "log_softmax", "norm",
    "linalg_vector_norm", "argmax", "cumsum", "prod", "logsumexp", "topk", "sort",
}  # fmt: skip
CONTRACTIONS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "scaled_dot_product_attention", "einsum"}
NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "group_norm"}
CREATION = {"arange", "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "scalar_tensor", "new_ones", "new_zeros", "new_full", "empty", "tril", "triu", "eye"}
INDEXING = {"embedding", "index_select", "index", "gather", "one_hot"}
SIZES = {"sym_size", "sym_numel"}
ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "sigmoid", "softplus", "mish", "hardtanh", "dropout", "type_as"}

ATEN_SUBSET = VIEWS | REDUCTIONS | CONTRACTIONS | NORMS | CREATION | INDEXING | SIZES | ACTIVATIONS


def is_pointwise(target: Any) -> bool:
    """Does torch itself call this overload elementwise?"""
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags


def in_dialect(target: Any) -> bool:
    """Is this overload an IR op, pointwise, or in ATEN_SUBSET?"""
    if not isinstance(target, OpOverload):
        return False
    name = target._schema.name.split("::")[1]
    return op_of(target) is not None or is_pointwise(target) or name in ATEN_SUBSET


def check_dialect(graph: Graph) -> None:
    """Raise VerifyError for the first node that is neither an IR op, nor pointwise, nor in ATEN_SUBSET."""
    for node in graph.calls():
        # what is no overload is getitem, or arithmetic on sizes
        if isinstance(node.target, OpOverload) and not in_dialect(node.target):
            raise VerifyError(
                f"{where(node)}: {target_name(node)} -> {type_of(node.meta.get('val'))} is outside the dialect; wanted "
                "an llmopt op, a pointwise aten op or one of the listed aten views, reductions and products; "
                f"add a rule to raise_aten or write the line with other ops\n{context(graph, node)}"
            )


def context(graph: Graph, node: fx.Node, radius: int = 5) -> str:
    """The lines of the printed graph around `node`, it marked with `>`."""
    nodes = list(graph.fx.nodes)
    at = nodes.index(node)
    lines = []
    for other in nodes[max(0, at - radius) : at + radius + 1]:
        if other.op == "call_function":
            lines.append(("  > " if other is node else "    ") + graph.line(other))
    return "\n".join(lines)


class _Rowwise:
    """One walk over a graph that follows the token axis; see `check_rowwise`."""

    def __init__(self, graph: Graph, symbol: str) -> None:
        self.graph = graph
        self.is_tokens = symbol != "B"
        assert graph.symbols is not None
        sizes = {name: size.node.expr for name, size in graph.symbols.sizes.items()}
        self.symbol = sizes[symbol]
        product = 1
        for expr in sizes.values():
            product = product * expr
        self.whole = {str(self.symbol), str(product)}  # T, and B * T where a view merged the two

    def holds(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and self.symbol in size.node.expr.free_symbols

    def axes(self, value: Any) -> tuple[int, ...]:
        """Axes over tokens, counted from the end (-1 is the last)."""
        if not isinstance(value, Tensor):
            return ()
        return tuple(i - value.dim() for i, size in enumerate(value.shape) if self.holds(size))

    def fail(self, node: fx.Node, why: str) -> None:
        raise VerifyError(
            f"{where(node)}: {target_name(node)} -> {type_of(node.meta.get('val'))} {why}; wanted causal attention to be "
            "the only op that mixes tokens, so that past tokens need only their keys and values; "
            f"a model with this op cannot be given a KV cache\n{context(self.graph, node)}"
        )

    def visit(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if self.axes(n.meta.get("val"))]
        sized = [n for n in node.all_input_nodes if self.holds(n.meta.get("val"))]
        value = node.meta.get("val")
        values: Iterable[Any] = value if isinstance(value, (tuple, list)) else (value,)
        name = target_name(node).removeprefix("aten.")
        if not inputs and not sized and not any(self.axes(v) for v in values):
            return
        for v in values:
            self._check_axes(node, v)
        self._kind(node, name)(node, inputs, sized)

    def _check_axes(self, node: fx.Node, value: Any) -> None:
        axes = self.axes(value)
        if len(axes) > 1:
            self.fail(node, "has two token axes")
        if axes and str(value.shape[axes[0]].node.expr) not in self.whole:
            self.fail(node, "has an axis over some, or several copies, of the tokens")

    def _kind(self, node: fx.Node, name: str) -> Callable[[fx.Node, list[fx.Node], list[fx.Node]], None]:
        if name in SIZES or not isinstance(node.target, OpOverload):
            return self.size
        if op_of(node.target) is not None:
            return self.by_ir_name.get(name, _Rowwise.unknown).__get__(self)
        if name in VIEWS:
            return self.view
        if is_pointwise(node.target) or name in ACTIVATIONS:
            return self.pointwise
        return self.by_name.get(name, _Rowwise.unknown).__get__(self)

    def size(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        """Sizes and picks from tuples are fine: what is done with them is checked where it is done."""

    def last(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        """The op works along the last axis of its operands."""
        if any(-1 in self.axes(source.meta["val"]) for source in inputs):
            self.fail(node, "works along the token axis")

    def heads(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        """The op's operands have tokens on the last axis but one."""
        if any(self.axes(source.meta["val"]) != (-2,) for source in inputs) and self.is_tokens:
            self.fail(node, "takes operands whose last axis but one is not the token axis")

    def pointwise(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        if sized:
            self.fail(node, "computes with the number of tokens")

    def view(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        name = target_name(node).removeprefix("aten.")
        if name in ("slice", "narrow") and sized:
            self.fail(node, "takes the first tokens' rows of a table by index instead of by position_ids")
        if name in ("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "cat"):
            self._not_along(node, inputs, 0)
        if name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as"):
            self._keeps_order(node, inputs)

    def _keeps_order(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """A reshape keeps tokens apart if as many elements stand behind the token axis as before."""
        value = node.meta["val"]
        if not inputs or not self.axes(value):
            return
        before = self._behind(inputs[0].meta["val"])
        if before != self._behind(value):
            self.fail(node, "reshapes elements of one token into another")

    def _behind(self, value: Tensor) -> str:
        (axis,) = self.axes(value)
        count: Any = 1
        for size in value.shape[value.dim() + axis + 1 :]:
            count = count * size
        return str(count)

    def _not_along(self, node: fx.Node, inputs: list[fx.Node], default: int) -> None:
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        index = names.index("dim") if "dim" in names else -1
        dim = node.kwargs.get("dim", node.args[index] if 0 <= index < len(node.args) else default)
        for source in inputs:
            value = source.meta["val"]
            dims = dim if isinstance(dim, (list, tuple)) else range(value.dim()) if dim is None else [dim]
            along = {d - value.dim() if d >= 0 else d for d in dims}  # type: ignore[operator, union-attr]
            if along & set(self.axes(value)):
                self.fail(node, "works along the token axis")

    def reduction(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        self._not_along(node, inputs, -1)

    def norm(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        shape = node.args[1]
        count = len(shape) if isinstance(shape, (list, tuple)) else 1
        if any(axis >= -count for source in inputs for axis in self.axes(source.meta["val"])):
            self.fail(node, "normalises over the token axis")

    def product(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        """Neither operand may be contracted over tokens (matmul's axes -1 and -2; a weight has no tokens at all)."""
        args = [a for a in node.args if isinstance(a, fx.Node)]
        name = target_name(node)
        left, right = args[1:3] if name in ("aten.addmm", "aten.baddbmm") else args[:2]
        if name == "aten.scaled_dot_product_attention" and self.is_tokens:
            self.fail(node, "is attention that was not raised")
        if -1 in self.axes(left.meta["val"]) or -2 in self.axes(right.meta["val"]):
            self.fail(node, "multiplies tokens with each other")

    def lookup(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        """A table that does not run over tokens, looked up by anything."""
        table = node.args[0]
        if isinstance(table, fx.Node) and self.axes(table.meta.get("val")):
            self.fail(node, "looks up other tokens")

    def creation(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        if target_name(node) in ("aten.arange", "aten.tril", "aten.triu", "aten.eye"):
            self.fail(node, "numbers the tokens by index instead of by position_ids")

    def unknown(self, node: fx.Node, inputs: list[fx.Node], sized: list[fx.Node]) -> None:
        self.fail(node, "is not known to treat tokens one by one")

    by_ir_name = {
        "linear": last,
        "rms_norm": last,
        "gated": pointwise,
        "softcap": pointwise,
        "rope": heads,
        "attention": heads,
    }
    by_name = {
        **dict.fromkeys(REDUCTIONS, reduction),
        **dict.fromkeys(NORMS, norm),
        **dict.fromkeys(CONTRACTIONS, product),
        **dict.fromkeys(INDEXING, lookup),
        **dict.fromkeys(CREATION, creation),
    }


def check_rowwise(graph: Graph, symbol: str = "T") -> None:
    """Raise VerifyError for the first op, attention apart, that mixes tokens (`symbol` names their size)."""
    for name in (symbol, "B"):
        walk = _Rowwise(graph, name)
        for node in graph.calls():
            walk.visit(node)
