"""Fake values for graphs: what shape and dtype each node has, with named symbolic sizes and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import FakeTensorMode, fake_mode, fake_tensor, faking
from llmopt.compiler.errors import VerifyError
from llmopt.compiler.graph import Graph, target_name, where
from llmopt.compiler.program import Weight


@dataclass
class Symbols:
    """A fake mode, its named symbolic sizes ("B", "T", "N", ...), and fake inputs made with them."""

    mode: FakeTensorMode
    sizes: dict[str, Any]
    inputs: dict[str, torch.Tensor]

    def tensor(self, shape: Sequence[int | str], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor; string sizes are symbols."""
        return fake_tensor(self.mode, shape, dtype, self.sizes)


def symbolic_inputs(shapes: Mapping[str, Sequence[int | str]], dtype: torch.dtype = torch.int64) -> Symbols:
    """Fake inputs of the given names and shapes, all of one dtype."""
    symbols = Symbols(fake_mode(), {}, {})
    for name, shape in shapes.items():
        symbols.inputs[name] = symbols.tensor(shape, dtype)
    return symbols


def propagate(graph: Graph, symbols: Symbols, weights: Mapping[str, Weight]) -> None:
    """Set `meta["val"]` of every node by running the graph on fake values.

    Inputs not in `symbols.inputs` keep no value. Raises VerifyError naming the node whose op refuses its arguments.
    """
    values: dict[fx.Node, Any] = {}
    with faking(symbols.mode):
        for node in graph.fx.nodes:
            if node.op == "output":
                continue
            values[node] = node.meta["val"] = _value(node, symbols, weights, values)
    graph.symbols = symbols


def _value(node: fx.Node, symbols: Symbols, weights: Mapping[str, Weight], values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        return symbols.inputs[node.name]
    if node.op == "get_attr":
        weight = weights[str(node.target)]
        return torch.empty(weight.shape, dtype=weight.dtype)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise VerifyError(
            f"{target_name(node)} at {where(node)} refuses its arguments "
            f"{[tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]}: {error}"
        ) from error
