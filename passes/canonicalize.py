"""canonicalize: one form for equal things, and fewer, larger matrix products.

    q = linear(x, w["q"])                        qkv = linear(x, w["q|k|v"])
    k = linear(x, w["k"])                 =>     q, k, v = aten.split_with_sizes(qkv, [512, 256, 256], -1)
    v = linear(x, w["v"])

Equal nodes are merged and dead ones dropped; nodes that depend on weights alone become Folds, computed once when the
weights are read, and the products and norms that read them are raised; linears that share their input become one
(q/k/v, gate/up), which reads the activation once and runs as one kernel. Exact: each output row is the same dot product
as before.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler import ops
from llmopt.compiler._torch import faking
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import JOINED, Fold, Program
from llmopt.compiler.rewrite import apply_rules
from llmopt.compiler.simplify import is_impure, simplify
from llmopt.passes.raise_aten import weight_rules


@dataclass(frozen=True)
class Canonicalize(Pass):
    """CSE, dead code, constant folding, merging of linears; see the module's docstring."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    ensures: ClassVar[frozenset[str]] = frozenset({"canonical"})
    must_match: ClassVar[bool] = False  # a model that is canonical already is fine

    merge_linears: bool = True

    def run(self, program: Program, context: Context) -> PassStats:
        """Canonicalise every graph."""
        stats = PassStats()
        for graph in program.graphs.values():
            simplify(graph)
            if context.fold_weights:
                raise_folded(graph, program, stats, context)
            if context.fold_weights and self.merge_linears:
                merge_linears(graph, program, stats, context)
            simplify(graph)
        return stats


def fold_constants(graph: Graph, program: Program, stats: PassStats, context: Context) -> None:
    """Replace each largest subgraph that reads only weights by one folded weight."""
    constant: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.all_input_nodes
            and not is_impure(node)
            and isinstance(node.meta.get("val"), Tensor)
            and all(n in constant for n in node.all_input_nodes)
        ):
            constant.add(node)
    for node in list(graph.fx.nodes):
        largest = node in constant and node.op == "call_function" and any(u not in constant for u in node.users)
        if largest and context.rewrites_left != 0:
            _fold(graph, node, program, stats)
            context.spend(1)


def raise_folded(graph: Graph, program: Program, stats: PassStats, context: Context) -> None:
    """Fold; then `linear(x, tanh(w))`, which raise-aten had to leave, is a product with a weight."""
    before = stats.rewritten
    fold_constants(graph, program, stats, context)
    if stats.rewritten > before:
        raised = apply_rules(graph, weight_rules(program, fold=True), limit=context.rewrites_left)
        context.spend(raised.rewritten)
        stats.add(raised)


def _fold(graph: Graph, node: fx.Node, program: Program, stats: PassStats) -> None:
    chain = _chain(node)
    inputs = tuple(str(n.target) for n in chain if n.op == "get_attr")
    value = node.meta["val"]
    name = f"{inputs[0]}.{node.name}"
    shape = tuple(int(s) for s in value.shape)
    label = "+".join(target_name(n).removeprefix("aten.") for n in chain if n.op == "call_function")
    program.fold(Fold(name, inputs, _replay(chain), shape, value.dtype, label))
    with graph.fx.inserting_before(node):
        folded = graph.fx.create_node("get_attr", name)
    folded.meta.update(val=value, origin=origin(node).touched("fold-constants"))
    node.replace_all_uses_with(folded)
    stats.record("fold-constants", node.name, origin(node).source)


def _chain(root: fx.Node) -> list[fx.Node]:
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            visit(source)
        order.setdefault(node)

    visit(root)
    return list(order)


def _replay(chain: list[fx.Node]) -> Callable[..., Tensor]:
    """The chain as a function of its weights; copies what it needs, so later edits of the graph do not matter."""
    steps = [(n, n.op, n.target, n.args, dict(n.kwargs)) for n in chain]

    def run(*weights: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        given = iter(weights)
        for node, kind, target, args, kwargs in steps:
            if kind == "get_attr":
                values[node] = next(given)
            else:
                real = fx.node.map_arg((args, kwargs), lambda n: values[n])
                values[node] = target(*real[0], **real[1])  # type: ignore[operator]
        return values[steps[-1][0]]

    return run


def merge_linears(graph: Graph, program: Program, stats: PassStats, context: Context) -> None:
    """Merge linears of one input, when all or none have a bias and all weights are of one dtype."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.calls("linear"):
        x, weight, bias = (*node.args, None)[:3]
        if all(isinstance(w, fx.Node) and w.op == "get_attr" for w in (weight, bias) if w is not None):
            held: Any = node.args[1]
            groups[x, bias is None, held.meta["val"].dtype, program.same_codes(str(held.target))].append(node)
    for nodes in groups.values():
        allowed = context.rewrites_left is None or context.rewrites_left > 0
        if len(nodes) > 1 and len({n.args[1] for n in nodes}) == len(nodes) and allowed:
            stats.record("merge-linears", nodes[0].name, origin(nodes[0]).source)
            _merge(graph, nodes, program)
            context.spend(1)


def _merge(graph: Graph, nodes: list[fx.Node], program: Program) -> None:
    first = nodes[0]
    sizes = [int(n.args[1].meta["val"].shape[0]) for n in nodes]  # type: ignore[union-attr]
    weight = _concat(graph, first, [n.args[1] for n in nodes], program)
    biases = [n.args[2] for n in nodes if len(n.args) > 2 and n.args[2] is not None]
    bias = _concat(graph, first, biases, program) if biases else None
    assert graph.symbols is not None
    with graph.fx.inserting_before(first), faking(graph.symbols.mode):
        made = _call(graph, first, ops.linear.overload, (first.args[0], weight, bias))
        parts = _call(graph, first, torch.ops.aten.split_with_sizes.default, (made, sizes, -1))
        for i, node in enumerate(nodes):
            node.replace_all_uses_with(_call(graph, node, operator.getitem, (parts, i)))
    for node in nodes:
        graph.fx.erase_node(node)


def _call(graph: Graph, like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = graph.call(target, args, like, "merge-linears")
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def _concat(graph: Graph, before: fx.Node, parts: list[Any], program: Program) -> fx.Node:
    names = [str(p.target) for p in parts]
    value = parts[0].meta["val"]
    rows = sum(int(p.meta["val"].shape[0]) for p in parts)
    name = _joined(names)
    shape = (rows, *(int(s) for s in value.shape[1:]))
    if name not in program.weights:
        program.fold(Fold(name, tuple(names), lambda *t: torch.cat(t), shape, value.dtype, JOINED))
    with graph.fx.inserting_before(before):
        node = graph.fx.create_node("get_attr", name)
    node.meta.update(val=value.new_empty(shape), origin=origin(before).touched("merge-linears"))
    return node


def _joined(names: list[str]) -> str:
    """`layers.0.attn.q_proj.weight`, `...k_proj.weight` -> `layers.0.attn.q_proj|k_proj.weight`."""
    split = [n.split(".") for n in names]
    differing = {i for i, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1}
    if len({len(s) for s in split}) != 1 or len(differing) != 1:
        return "|".join(names)
    (at,) = differing
    return ".".join([*split[0][:at], "|".join(s[at] for s in split), *split[0][at + 1 :]])
