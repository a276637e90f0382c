"""From a region of a lowered step to compiled code: providers put in, sizes concrete or symbolic, then Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.codegen.inductor import CompiledRegion, compile_regions, load_region
from llmopt.compiler._torch import fake_mode
from llmopt.compiler.graph import Graph
from llmopt.compiler.op import op_of
from llmopt.compiler.propagate import Symbols

__all__ = ["CompiledRegion", "build_regions", "load_region"]


def build_regions(graphs: Sequence[Graph], single: bool) -> list[CompiledRegion]:
    """Compile regions for one token (and one row), or for any number of them from 2 on.

    The two are compiled apart because Inductor, like torch.export, takes a symbolic size to be at least 2.
    """
    return compile_regions([(as_function(g), fake_arguments(g, single)) for g in graphs], serial=single)


def as_function(
    graph: Graph, implement: Callable[[fx.Node], Callable[..., Any]] | None = None
) -> Callable[..., list[Any]]:
    """The region as a Python function of its inputs: what `implement` gives for each node, called in order; by default
    the chosen providers' functions."""
    nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
    inputs, outputs = graph.inputs(), graph.outputs()
    functions = {n: (implement or _function)(n) for n in nodes}

    def run(*args: Any) -> list[Any]:
        values: dict[fx.Node, Any] = dict(zip(inputs, args, strict=True))
        for node in nodes:
            a, k = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = functions[node](*a, **k)
        return [values[n] for n in outputs]

    return run


def _function(node: fx.Node) -> Callable[..., Any]:
    op = op_of(node.target)
    if op is None:
        return node.target  # type: ignore[return-value]
    provider = node.meta["provider"]
    return op.fn if provider == "inductor" else op.providers[provider].fn


def fake_arguments(graph: Graph, single: bool) -> list[Any]:
    """Fake inputs like the region's own, in a fresh shape environment; N and R are 1 where `single`."""
    parent = graph.symbols
    names = {str(value): name for name, value in parent.sizes.items()}
    symbols = Symbols(fake_mode(), {}, {})

    def size(value: Any) -> int | str:
        if isinstance(value, int):
            return value
        name = names[str(value)]
        return 1 if single and name in ("N", "R") else name

    made: list[Any] = []
    for node in graph.inputs():
        value = node.meta["val"]
        if isinstance(value, Tensor):
            made.append(symbols.tensor([size(s) for s in value.shape], value.dtype))
        else:
            wanted = size(value)
            made.append(wanted if isinstance(wanted, int) else _symbol(symbols, wanted))
    return made


def _symbol(symbols: Symbols, name: str) -> Any:
    if name not in symbols.sizes:
        symbols.tensor((name,), torch.int64)
    return symbols.sizes[name]
