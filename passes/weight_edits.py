"""Edits of weights where they are read: collected, then made in float64 when a weight is read, and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.graph import Graph, origin
from llmopt.compiler.program import Program, Weight, tensor_weight

_Edit = tuple[str, Callable[..., Tensor], tuple[str, ...]]  # what it is called, of float64 tensors, other weights


class WeightEdits:
    """Edits of one graph. The same edits of a weight that several calls read give one weight."""

    def __init__(self, program: Program, graph: Graph, rule: str) -> None:
        self.program, self.graph, self.rule = program, graph, rule
        self.known: dict[tuple[fx.Node, int], list[_Edit]] = {}

    def add(self, call: fx.Node, at: int, label: str, edit: Callable[..., Tensor], *others: str) -> None:
        """Edit the weight that is this argument of a call, if it has it: `edit(weight, *others)`, shapes kept."""
        if at < len(call.args) and call.args[at] is not None:
            self.known.setdefault((call, at), []).append((label, edit, others))

    def constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        """A read of a weight that the program gets by this."""
        self.program.weights.setdefault(name, tensor_weight(value, self.rule))
        return self._read(before, name, value.shape, value.dtype)

    def commit(self) -> None:
        """Put the edited weights into the program and the graph."""
        for (call, at), edits in self.known.items():
            old: Any = call.args[at]
            source = self.program.weights[str(old.target)]
            labels = [f"{label}({', '.join(others)})" if others else label for label, _, others in edits]
            name = ".".join([str(old.target), *labels])
            if name not in self.program.weights:
                inputs = (str(old.target), *dict.fromkeys(other for _, _, others in edits for other in others))
                run = _Run(source, [(edit, [self.program.weights[o] for o in others]) for _, edit, others in edits])
                note = f"{' + '.join(labels)} of {old.target}"
                self.program.weights[name] = Weight(source.shape, source.dtype, run, note, inputs)
            with self.graph.fx.inserting_before(call):
                call.update_arg(at, self._read(call, name, source.shape, source.dtype))
            if not old.users:
                self.graph.fx.erase_node(old)

    def _read(self, before: fx.Node, name: str, shape: Any, dtype: torch.dtype) -> fx.Node:
        assert self.graph.symbols is not None
        node = self.graph.fx.create_node("get_attr", name)
        with self.graph.symbols.mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        node.meta["origin"] = origin(before).touched(self.rule)
        return node


class _Run:
    """Reads a weight and makes its edits."""

    def __init__(self, source: Weight, edits: list[tuple[Callable[..., Tensor], list[Weight]]]) -> None:
        self.source, self.edits = source, edits

    def __call__(self) -> Tensor:
        made = self.source.load().double()
        for edit, others in self.edits:
            made = edit(made, *(other.load().double() for other in others))
        return made.to(self.source.dtype).contiguous()
