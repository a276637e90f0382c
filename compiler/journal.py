"""Edits of a graph that can be taken back: a run of rules is all or nothing without a copy of the graph.

Dead nodes are only emptied of operands while rules run (so that they count as nobody's users) and erased at
the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import OpOverload


class Journal:
    """Records edits of one graph: `created` are the builders' lists of new nodes, `dead` awaits erasure."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._edits: list[tuple[fx.Node, Any, Any]] = []  # (node, old args, old kwargs) or (node, old next node, None)
        self.created: list[list[fx.Node]] = []
        self.dead: dict[fx.Node, None] = {}

    def replace(self, old: fx.Node, new: Any) -> Iterator[fx.Node]:
        """Make every user of `old` use `new` (a node or a value) instead; yields the users."""
        for user in list(old.users):
            self._edits.append((user, user.args, user.kwargs))
            if isinstance(new, fx.Node):
                user.replace_input_with(old, new)
            else:
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: new if n is old else n)
            yield user

    def move(self, node: fx.Node, before: fx.Node) -> None:
        """Move a node in front of another."""
        self._edits.append((node, node.next, None))
        before.prepend(node)

    def bury(self, roots: Sequence[fx.Node], interior: Sequence[fx.Node]) -> list[fx.Node]:
        """Mark replaced roots, and everything only they needed, as dead; returns what died."""
        died = []
        stack = [*interior, *roots]
        while stack:
            node = stack.pop()
            if node.users or node in self.dead or not (node in roots or _is_erasable(node)):
                continue
            stack.extend(node.all_input_nodes)
            self._edits.append((node, node.args, node.kwargs))
            node.args = ()
            if node.kwargs:
                node.kwargs = {}
            self.dead[node] = None
            died.append(node)
        return died

    def erase_dead(self) -> None:
        """Erase the dead nodes for good."""
        for node in self.dead:
            self._graph.erase_node(node)
        self.dead.clear()

    def undo(self) -> None:
        """Take every edit back, latest first."""
        for node, before, kwargs in reversed(self._edits):
            if isinstance(before, fx.Node):
                before.prepend(node)
            else:
                node.args, node.kwargs = before, kwargs
        for nodes in reversed(self.created):
            for node in reversed(nodes):
                self._graph.erase_node(node)


def _is_erasable(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and _is_pure(node.target))


@cache
def _is_pure(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
