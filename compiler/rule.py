"""Rule, Match and Builder: what the author of a rewrite sees.

A rule is pattern / check / rewrite. The parameters of `pattern` are its variables; `check` may turn a match
down with a reason; `rewrite` builds the replacement in front of the root and returns it (one per root if
there are several).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from llmopt.compiler.errors import RewriteError
from llmopt.compiler.fake import Fakes
from llmopt.compiler.graph import origin, where
from llmopt.compiler.matcher import Binding
from llmopt.compiler.pattern import AtenOps, IrOps, Var, as_pattern, name_of, overload_of


@dataclass(frozen=True)
class Fail:
    """Why a match may not be rewritten, and the node to blame."""

    reason: str
    node: fx.Node | None = None


class Match:
    """One match: `m["x"]` is what x is bound to, `m.nodes` are the matched calls, roots included."""

    def __init__(self, binding: Binding) -> None:
        self.roots = binding.roots
        self.root = binding.roots[0]
        self.nodes = binding.nodes
        self.env = binding.env

    def __getitem__(self, name: str) -> Any:
        return self.env[name]

    def val(self, name: str) -> Any:
        """The fake value of what the variable is bound to (a literal is its own value)."""
        return fx.map_arg(self.env[name], value_of)

    def fail(self, reason: str, node: Any = None) -> Fail:
        """What `check` returns to turn the match down."""
        return Fail(reason, node if isinstance(node, fx.Node) else None)


def value_of(node: fx.Node) -> Any:
    """The node's fake value; RewriteError if it has none."""
    if "val" not in node.meta:
        raise RewriteError(f"{where(node)} has no fake value; capture the graph with fake values")
    return node.meta["val"]


class Rule:
    """Subclasses give `pattern(self, ...)`, `rewrite(self, b, m)` and, if need be, `check(self, m)`.

    `exclusive`: interior nodes may have no users outside of the match. `changes_type`: the replacement may
    have another shape or dtype than the root.
    """

    name: str = ""
    exclusive: bool = False
    changes_type: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()

    pattern: Callable[..., Any]
    rewrite: Callable[[Builder, Match], Any]

    def check(self, m: Match) -> Fail | bool | None:
        """None or True if the match may be rewritten, else `m.fail(reason, node)`."""
        return None

    def roots(self) -> tuple[Any, ...]:
        """The pattern, as a tuple of roots."""
        names = inspect.signature(self.pattern).parameters
        pattern = self.pattern(**{n: Var(n) for n in names})
        return tuple(map(as_pattern, pattern)) if isinstance(pattern, tuple) else (pattern,)


class Builder:
    """Adds nodes in front of a root, with their fake values and origin."""

    def __init__(self, graph: fx.Graph, fakes: Fakes, before: fx.Node, rule: str) -> None:
        self._graph, self._fakes, self._before = graph, fakes, before
        self._origin = origin(before).touched(rule)
        self.created: list[fx.Node] = []

    @cached_property
    def aten(self) -> AtenOps:
        """`b.aten.mul.Tensor(x, y)` adds a call of an aten overload."""
        return AtenOps(self.call)

    @cached_property
    def ir(self) -> IrOps:
        """`b.ir.rms_norm(x, w, eps)` adds a call of an IR op."""
        return IrOps(self.call)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of any target; its fake value comes from running it on the operands' fake values."""
        target = overload_of(target)
        value = self._fakes.run(target, args, kwargs)
        return self._add("call_function", target, args, kwargs, name_of(target).removeprefix("aten."), value)

    def weight(self, name: str, fake: torch.Tensor) -> fx.Node:
        """Add a read of the weight `name`, which looks like `fake`."""
        return self._add("get_attr", name, (), {}, None, fake)

    def _add(self, op: str, target: Any, args: Any, kwargs: Any, name: str | None, value: Any) -> fx.Node:
        with self._graph.inserting_before(self._before):
            node = self._graph.create_node(op, target, args, kwargs, name)
        node.meta["origin"] = self._origin
        if value is not None:
            node.meta["val"] = value
        self.created.append(node)
        return node

    def undo(self) -> None:
        """Take away all nodes added so far."""
        for node in reversed(self.created):
            self._graph.erase_node(node)
        self.created.clear()
