"""Clean-ups every pass may rely on: no-ops dropped, equal nodes merged, dead nodes gone."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.graph import Graph, target_name

_SAME_TYPE = {"aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.type_as"}
_SAME_SHAPE = {"aten.view", "aten.reshape", "aten.expand", "aten._unsafe_view"}
_VIEWS = {"aten.view", "aten._unsafe_view"}
_UNITS = {"aten.mul": 1, "aten.div": 1, "aten.add": 0, "aten.sub": 0}


def simplify(graph: Graph) -> int:
    """Drop no-ops, merge equal nodes, remove dead ones; returns how many nodes went away."""
    before = len(graph.fx.nodes)
    fix_sizes(graph)
    drop_noops(graph)
    merge_equal(graph)
    graph.fx.eliminate_dead_code()
    return before - len(graph.fx.nodes)


def fix_sizes(graph: Graph) -> None:
    """Sizes that are known numbers become literals."""
    for node in list(graph.fx.nodes):
        if node.op != "call_function" or not isinstance(size := node.meta.get("val"), int) or isinstance(size, bool):
            continue
        _put_literal(node, size)
        graph.fx.erase_node(node)


def _put_literal(node: fx.Node, value: int) -> None:
    def put(other: fx.Node) -> Any:
        return value if other is node else other

    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(user.args, put), fx.node.map_arg(user.kwargs, put)


def drop_noops(graph: Graph) -> None:
    """Replace nodes that return their first argument unchanged (same shape and dtype, so same value)."""
    for node in list(graph.fx.nodes):
        # a view may have been legal only because of a `contiguous` that is dropped here; view.dtype is no such view
        if target_name(node) in _VIEWS and isinstance(node.args[1], (list, tuple)):
            node.target = torch.ops.aten.reshape.default
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) and _is_noop(node):
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)


def _is_noop(node: fx.Node) -> bool:
    name = target_name(node)
    if name == "aten.dropout":
        return not (node.args[2] if len(node.args) > 2 else node.kwargs.get("train", False))
    source, value = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(source, Tensor) or not isinstance(value, Tensor) or source.dtype != value.dtype:
        return False
    if name in _SAME_TYPE:
        return True  # memory layout is the emitter's business, not the graph's
    if not _same_shape(source, value):
        return False
    return name in _SAME_SHAPE or _is_unit(node, name) or (name == "aten.slice" and _is_whole_slice(node))


def _is_unit(node: fx.Node, name: str) -> bool:
    return name in _UNITS and not node.kwargs and len(node.args) == 2 and _literal(node.args[1]) == _UNITS[name]


def _literal(arg: Any) -> Any:
    return arg if isinstance(arg, (int, float)) and not isinstance(arg, bool) else None


def _is_whole_slice(node: fx.Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else 0
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start is None or start == 0) and bool(step == 1)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    if a.dim() != b.dim():
        return False
    return all(_same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _same_size(x: Any, y: Any) -> bool:
    if isinstance(x, torch.SymInt) or isinstance(y, torch.SymInt):
        return str(x) == str(y)  # compares the expressions; never adds a guard
    return bool(x == y)


def merge_equal(graph: Graph) -> None:
    """Common subexpression elimination over pure calls and weight reads."""
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.fx.nodes):
        if node.op not in ("call_function", "get_attr") or is_impure(node):
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):  # two ways to ask for the same size are one
            key: Hashable = ("size", str(value))
        else:
            key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.fx.erase_node(node)


def is_impure(node: fx.Node) -> bool:
    """Does this call write to one of its arguments, or draw random numbers?"""
    schema = getattr(node.target, "_schema", None)
    tags = getattr(node.target, "tags", ())
    return (schema is not None and schema.is_mutable) or torch.Tag.nondeterministic_seeded in tags


def _key(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, torch.SymInt):
        return str(value)
    return (type(value).__name__, value)  # 1, 1.0 and True are different arguments
