"""Run a graph on real tensors, node by node: for masks, numerics checks, bisection and calibration.

Only what is wanted is computed, and a value is held no longer than until its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.graph import Graph
from llmopt.compiler.program import Weight


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Weight],
    wanted: Iterable[fx.Node] | None = None,
    cache: dict[str, Tensor] | None = None,
) -> tuple[Any, ...]:
    """The values of `wanted` nodes (the graph's outputs by default), computing only what they need.

    `inputs` are by placeholder name; `cache` keeps read weights between calls.
    """
    roots = list(wanted) if wanted is not None else [n for n in graph.outputs() if isinstance(n, fx.Node)]
    asked = set(roots)
    kept = {node: value for node, value in evaluated(graph, inputs, weights, roots, cache) if node in asked}
    return tuple(kept[n] for n in roots)


def evaluated(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Weight],
    wanted: Iterable[fx.Node],
    cache: dict[str, Tensor] | None = None,
    device: torch.device | None = None,
    instead: Mapping[Any, Callable[..., Any]] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Every node that `wanted` nodes need, in the graph's order, as (node, value), each as soon as it is computed.

    Values are dropped after their last use: whoever wants one longer keeps it. Tensors that the graph makes of nothing
    are made on `device`, if one is given; inputs and weights have to be there. A target that is a key of `instead` is
    computed by its value.
    """
    needed = _ancestors(wanted)
    order = [n for n in graph.fx.nodes if n in needed]
    last_use = {source: node for node in order for source in (node, *node.all_input_nodes)}
    values: dict[fx.Node, Any] = {}
    for node in order:
        values[node] = _run(node, inputs, weights, values, cache, device, instead or {})
        yield node, values[node]
        for source in (node, *node.all_input_nodes):
            if last_use[source] is node:
                values.pop(source, None)


def _ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _names_device(target: Any) -> bool:
    return isinstance(target, OpOverload) and any(a.name == "device" for a in target._schema.arguments)


@torch.no_grad()
def _run(
    node: fx.Node,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Weight],
    values: Mapping[fx.Node, Any],
    cache: dict[str, Tensor] | None,
    device: torch.device | None,
    instead: Mapping[Any, Callable[..., Any]],
) -> Any:
    if node.op == "placeholder":
        return inputs[node.name]
    if node.op == "get_attr":
        name = str(node.target)
        if cache is None:
            return weights[name].load()
        if name not in cache:
            cache[name] = weights[name].load()
        return cache[name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if device is not None and _names_device(node.target):
        kwargs = {**kwargs, "device": device}  # the dialect names none
    target: Any = node.target
    return instead.get(target, target)(*args, **kwargs)
