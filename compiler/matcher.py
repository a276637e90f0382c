"""Matching many patterns at once: a bottom-up tree automaton, then a binder for what it lets through.

The automaton gives each node a *state*: the set of pattern calls that match there when identity of nodes is
left out. A state depends only on the target, the literals and the states of the operands, so it is found by
one lookup in a table that is filled on demand: cost is linear in nodes, independent of the number of
patterns, and a repeated layer adds no entry. Only where a state says that a root matches does the binder run;
it binds variables, checks that the same variable means the same node, and backtracks over operand orders and
alternatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt.compiler.errors import RewriteError
from llmopt.compiler.pattern import AnyOf, Call, Const, Form, ListOf, Rest, Var, flat_args, node_args

Goals = tuple[Any, Any, Any] | None  # (pattern, value, the goals after it)


class State:
    """A set of matching pattern calls; `rules` are the indices of rules whose first root is among them."""

    __slots__ = ("calls", "rules")

    def __init__(self, calls: frozenset[Call], rules: tuple[int, ...]) -> None:
        self.calls = calls
        self.rules = rules


EMPTY = State(frozenset(), ())


@dataclass(frozen=True)
class Binding:
    """One way a rule's pattern fits: its roots, its variables, and all matched calls (roots included)."""

    roots: tuple[fx.Node, ...]
    env: dict[str, Any]
    nodes: tuple[fx.Node, ...]


def calls_in(pattern: Any) -> Iterator[Call]:
    """The pattern's call nodes, outermost first (a shared one each time it is used)."""
    if isinstance(pattern, Call):
        yield pattern
    for child in children(pattern):
        yield from calls_in(child)


def children(pattern: Any) -> Iterator[Any]:
    """Direct sub-patterns (of every form of a call)."""
    if isinstance(pattern, Call):
        for form in pattern.forms:
            yield from form.args
    elif isinstance(pattern, AnyOf):
        yield from pattern.options
    elif isinstance(pattern, ListOf):
        yield from pattern.items


def root_calls(pattern: Any) -> Iterator[Call]:
    """The calls that may be the outermost node of the pattern."""
    if isinstance(pattern, Call):
        yield pattern
    elif isinstance(pattern, AnyOf):
        for option in pattern.options:
            yield from root_calls(option)
    else:
        raise RewriteError(f"a pattern's root must be a call, not {pattern!r}; match an op around it")


def depths_of_vars(pattern: Any, depth: int = 0) -> set[tuple[str, int]]:
    """(variable, number of calls above it) for every place a variable stands."""
    if isinstance(pattern, (Var, Rest)):
        return {(pattern.name, depth)}
    below = depth + isinstance(pattern, Call)
    return {found for child in children(pattern) for found in depths_of_vars(child, below)}


def shape_of(pattern: Any) -> Any:
    """The pattern with variable names left out: two roots of equal shape are interchangeable."""
    if isinstance(pattern, (Var, Rest)):
        return "var"
    if isinstance(pattern, Call):
        return tuple((f.target, tuple(shape_of(a) for a in f.args)) for f in pattern.forms)
    return (type(pattern).__name__, *(shape_of(c) for c in children(pattern))) if _nested(pattern) else pattern


def _nested(pattern: Any) -> bool:
    return isinstance(pattern, (AnyOf, ListOf))


def _literal_key(value: Any) -> Any:
    """A hashable key of a literal that tells 1, 1.0 and True apart."""
    try:
        hash(value)
    except TypeError:
        return type(value), repr(value)
    return type(value), value


class Table:
    """The automaton for a list of rule patterns, each a tuple of roots."""

    def __init__(self, patterns: Iterable[tuple[Any, ...]]) -> None:
        self.patterns = tuple(patterns)
        self.attempts = 0
        # by id of the target: overloads are singletons, and hash in Python
        self._forms: dict[int, list[tuple[Call, Form]]] = {}
        self._anchors: list[frozenset[Call]] = [frozenset(root_calls(roots[0])) for roots in self.patterns]
        self._entries: dict[tuple[Any, ...], State] = {}
        self._interned: dict[frozenset[Call], State] = {EMPTY.calls: EMPTY}
        self._others = [self._secondary(roots) for roots in self.patterns]
        self.states: dict[fx.Node, State] = {}  # nodes in the empty state are left out
        for found in dict.fromkeys(c for roots in self.patterns for root in roots for c in calls_in(root)):
            for form in found.forms:
                self._forms.setdefault(id(form.target), []).append((found, form))

    def state(self, node: fx.Node) -> State:
        """Compute the node's state from those of its operands, and remember it."""
        if id(node.target) not in self._forms:
            return EMPTY
        key = self._key(node)
        state = self._entries.get(key)
        if state is None:
            state = self._entries[key] = self._evaluate(node)
        if state is not EMPTY:
            self.states[node] = state
        elif node in self.states:
            del self.states[node]
        return state

    def _key(self, node: fx.Node) -> tuple[Any, ...]:
        key: list[Any] = [id(node.target)]
        get = self.states.get
        for arg in node.args:
            if isinstance(arg, fx.Node):
                key.append(get(arg, EMPTY))
            elif arg.__class__ is int or arg is None:
                key.append(arg)
            else:
                key.append(self._arg_key(arg))
        if node.kwargs:
            for name, arg in node.kwargs.items():
                key.append((name, self._arg_key(arg)))
        return tuple(key)

    def _arg_key(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self.states.get(arg, EMPTY)
        if isinstance(arg, (list, tuple)):
            return tuple([self._arg_key(a) for a in arg])
        return _literal_key(arg)

    def _evaluate(self, node: fx.Node) -> State:
        """Try every form of this target on the node: the only place where structure is tested."""
        values = node_args(node)
        calls = set()
        for found, form in self._forms[id(node.target)]:
            if found in calls:
                continue
            self.attempts += 1
            if self._fits_all(form.args, values):
                calls.add(found)
        frozen = frozenset(calls)
        state = self._interned.get(frozen)
        if state is None:
            rules = tuple(i for i, anchors in enumerate(self._anchors) if anchors & frozen)
            state = self._interned[frozen] = State(frozen, rules)
        return state

    def _fits_all(self, patterns: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
        return len(patterns) == len(values) and all(map(self.fits, patterns, values))

    def fits(self, pattern: Any, value: Any) -> bool:
        """Does the value fit as a tree, identities and `where` left out?"""
        if isinstance(pattern, Const):
            return pattern.is_literal(value)
        if isinstance(pattern, Var):
            return True
        if isinstance(pattern, Call):
            return isinstance(value, fx.Node) and pattern in self.states.get(value, EMPTY).calls
        if isinstance(pattern, AnyOf):
            return any(self.fits(o, value) for o in pattern.options)
        if isinstance(pattern, ListOf):
            pairs = pattern.split(value)
            return pairs is not None and all(self.fits(p, v) for p, v in pairs)
        return not isinstance(value, fx.Node) and bool(value == pattern)

    def bindings(self, rule: int, root: fx.Node) -> Iterator[Binding]:
        """Every way rule number `rule` fits with this node as its first root, preferred ones first."""
        for env, nodes in self._solve((self.patterns[rule][0], root, None), {}, None):
            yield from self._bind_roots(rule, (root,), env, nodes)

    def _bind_roots(self, rule: int, roots: tuple[fx.Node, ...], env: dict[str, Any], nodes: Any) -> Iterator[Binding]:
        patterns = self.patterns[rule]
        if len(roots) == len(patterns):
            yield Binding(roots, env, _unlink(nodes))
            return
        at = len(roots)
        earlier = [r for r, p in zip(roots, patterns, strict=False) if shape_of(p) == shape_of(patterns[at])]
        for candidate in self._candidates(rule, at, env):
            # interchangeable roots are taken in graph order, so that each set is found once
            if candidate in roots or any(candidate < r for r in earlier):
                continue
            for more, matched in self._solve((patterns[at], candidate, None), dict(env), nodes):
                yield from self._bind_roots(rule, (*roots, candidate), more, matched)

    def _secondary(self, roots: tuple[Any, ...]) -> list[tuple[frozenset[Call], set[tuple[str, int]]]]:
        return [(frozenset(root_calls(r)), depths_of_vars(r)) for r in roots]

    def _candidates(self, rule: int, at: int, env: dict[str, Any]) -> list[fx.Node]:
        """Nodes that may be root `at`: as far from a bound variable as the pattern has calls in between."""
        anchors, places = self._others[rule][at]
        for name in sorted({name for name, _ in places}):
            if isinstance(env.get(name), fx.Node):
                depths = {d for n, d in places if n == name}
                found = _users_at(env[name], depths)
                return sorted(n for n in found if anchors & self.states.get(n, EMPTY).calls)
        raise RewriteError(f"root {at} of a pattern shares no variable with the roots before it; let it share one")

    def _solve(self, goals: Goals, env: dict[str, Any], nodes: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        """Bindings that meet all goals.

        `env` is this frame's own and is filled; `nodes` is a linked list of the call nodes matched so far.
        """
        while goals is not None:
            pattern, value, after = goals
            if isinstance(pattern, Var):
                if not bind(pattern, value, env):
                    return
                goals = after
                continue
            choices = self._choices(pattern, value, after)
            if not choices:
                return
            if isinstance(pattern, Call):
                nodes = (value, nodes)
            for choice in choices[:-1]:
                yield from self._solve(choice, dict(env), nodes)
            goals = choices[-1]
        yield env, nodes

    def _choices(self, pattern: Any, value: Any, after: Goals) -> list[Goals]:
        """What to solve instead of `pattern` at `value`: a list of goals per operand order or option."""
        if isinstance(pattern, Call):
            forms = self._forms_at(pattern, value)
            values = node_args(value) if forms else ()
            return [_push(form.args, values, after) for form in forms]
        if isinstance(pattern, AnyOf):
            return [(option, value, after) for option in pattern.options if self.fits(option, value)]
        if isinstance(pattern, ListOf):
            pairs = pattern.split(value)
            if pairs is None:
                return []
            return [_push(tuple(p for p, _ in pairs), tuple(v for _, v in pairs), after)]
        return [] if isinstance(value, fx.Node) or value != pattern else [after]

    def _forms_at(self, pattern: Call, value: Any) -> list[Form]:
        if not isinstance(value, fx.Node) or pattern not in self.states.get(value, EMPTY).calls:
            return []
        forms = [f for f in pattern.forms if f.target == value.target]
        if len(forms) == 1:
            return forms
        values = node_args(value)
        return [f for f in forms if self._fits_all(f.args, values)]


def bind(pattern: Var, value: Any, env: dict[str, Any]) -> bool:
    """Bind the variable in `env`; False if it is bound to something else or does not accept the value."""
    if pattern.name in env:
        return pattern.accepts(value) and is_same(env[pattern.name], value)
    if not pattern.accepts(value):
        return False
    env[pattern.name] = value
    return True


def is_same(a: Any, b: Any) -> bool:
    """The same node, or equal literals (lists by element)."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and bool(a == b))


def _push(patterns: tuple[Any, ...], values: tuple[Any, ...], goals: Goals) -> Goals:
    for pattern, value in zip(reversed(patterns), reversed(values), strict=True):
        goals = (pattern, value, goals)
    return goals


def _unlink(nodes: Any) -> tuple[fx.Node, ...]:
    found = []
    while nodes is not None:
        found.append(nodes[0])
        nodes = nodes[1]
    return tuple(dict.fromkeys(reversed(found)))


def _users_at(node: fx.Node, depths: set[int]) -> set[fx.Node]:
    level, found = {node}, set()
    for depth in range(1, max(depths, default=0) + 1):
        level = {u for n in level for u in n.users}
        if depth in depths:
            found |= level
    return found


__all__ = ["EMPTY", "Binding", "State", "Table", "bind", "flat_args", "is_same"]
