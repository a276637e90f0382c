"""Why a rule matched nothing: the place where most of its pattern fits, and what differs there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt.compiler.graph import where
from llmopt.compiler.matcher import bind, root_calls
from llmopt.compiler.pattern import AnyOf, Call, Const, Form, ListOf, Var, name_of, node_args


@dataclass(frozen=True)
class NearMiss:
    """`matched` of `total` pattern calls fit; at `node` something else was wanted, as `reason` says."""

    rule: str
    matched: int
    total: int
    node: fx.Node | None
    reason: str

    def __str__(self) -> str:
        at = f" at {where(self.node)}" if self.node is not None else ""
        return f"{self.rule}: {self.matched} of {self.total} pattern nodes fit{at}: {self.reason}"


@dataclass(frozen=True)
class _Partial:
    """How far a pattern fits: calls that fit, what the first misfit is and where, and the variables bound."""

    count: int
    env: dict[str, Any]
    reason: str = ""
    node: fx.Node | None = None

    def rank(self) -> tuple[int, bool]:
        return self.count, not self.reason


def nearest(rule: str, roots: tuple[Any, ...], nodes: Iterable[fx.Node]) -> NearMiss:
    """The best near miss of a pattern among the nodes (linear in the nodes that call its root op)."""
    anchors = {form.target for found in root_calls(roots[0]) for form in found.forms}
    total = sum(map(size_of, roots))
    best: _Partial | None = None
    for node in nodes:
        if node.op == "call_function" and node.target in anchors:
            partial = _fit(roots[0], node, node, {})
            if best is None or partial.rank() > best.rank():
                best = partial
    if best is None:
        names = " or ".join(sorted({name_of(t) for t in anchors}))
        return NearMiss(rule, 0, total, None, f"the graph has no {names}")
    reason = best.reason or (
        f"the first of {len(roots)} roots fits, but no others beside it" if len(roots) > 1 else "fits; not tried"
    )
    return NearMiss(rule, best.count, total, best.node, reason)


def size_of(pattern: Any) -> int:
    """Calls in the largest alternative of the pattern."""
    if isinstance(pattern, Call):
        return 1 + sum(map(size_of, pattern.forms[0].args))
    if isinstance(pattern, AnyOf):
        return max(map(size_of, pattern.options))
    return sum(map(size_of, pattern.items)) if isinstance(pattern, ListOf) else 0


def _fit(pattern: Any, value: Any, owner: fx.Node, env: dict[str, Any]) -> _Partial:
    """Fit as much as possible; `owner` is the node whose argument `value` is."""
    if isinstance(pattern, Var):
        return _fit_var(pattern, value, owner, env)
    if isinstance(pattern, Call):
        return _fit_call(pattern, value, owner, env)
    if isinstance(pattern, AnyOf):
        return max((_fit(o, value, owner, env) for o in pattern.options), key=_Partial.rank)
    if isinstance(pattern, ListOf):
        pairs = pattern.split(value)
        if pairs is None:
            return _Partial(0, env, f"expected a list of {len(pattern.items)}, saw {_shown(value)}", owner)
        return _fit_all(pairs, owner, env)
    if isinstance(value, fx.Node) or value != pattern:
        return _Partial(0, env, f"expected {pattern!r}, saw {_shown(value)}", owner)
    return _Partial(0, env)


def _fit_var(pattern: Var, value: Any, owner: fx.Node, env: dict[str, Any]) -> _Partial:
    env = dict(env)
    if bind(pattern, value, env):
        return _Partial(0, env)
    if isinstance(pattern, Const) and not pattern.is_literal(value):
        return _Partial(0, env, f"expected a literal {pattern.kind.__name__}, saw {_shown(value)}", owner)
    if not pattern.accepts(value):
        return _Partial(0, env, f"{_shown(value)} does not meet the condition on {pattern.name!r}", owner)
    wanted = _shown(env[pattern.name])
    return _Partial(0, env, f"expected {pattern.name!r} to be {wanted} again, saw {_shown(value)}", owner)


def _fit_call(pattern: Call, value: Any, owner: fx.Node, env: dict[str, Any]) -> _Partial:
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return _Partial(0, env, f"expected {_wanted(pattern)}, saw {_shown(value)}", owner)
    forms = [f for f in pattern.forms if f.target == value.target]
    if not forms:
        return _Partial(0, env, f"expected {_wanted(pattern)}, saw {name_of(value.target)}", value)
    return max((_fit_form(f, value, env) for f in forms), key=_Partial.rank)


def _fit_form(form: Form, node: fx.Node, env: dict[str, Any]) -> _Partial:
    below = _fit_all(list(zip(form.args, node_args(node), strict=False)), node, env)
    # a misfit of the call's own arguments is its own; one further down is not
    own = 0 if below.reason and below.node is node else 1
    return _Partial(below.count + own, below.env, below.reason, below.node)


def _fit_all(pairs: list[tuple[Any, Any]], owner: fx.Node, env: dict[str, Any]) -> _Partial:
    count, reason, at = 0, "", None
    for pattern, value in pairs:
        part = _fit(pattern, value, owner, env)
        count, env = count + part.count, part.env
        if part.reason and not reason:
            reason, at = part.reason, part.node
    return _Partial(count, env, reason, at)


def _wanted(pattern: Call) -> str:
    names: dict[str, None] = dict.fromkeys(name_of(f.target) for f in pattern.forms)
    return " or ".join(names)


def _shown(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return f"%{value.name}" if value.op == "call_function" else f"{value.op} %{value.name}"
