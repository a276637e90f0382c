"""The rewrite engine: a rule is pattern / check / rewrite, applied to a fixpoint, each rewrite all or nothing.

Nodes are visited users first, so that the larger of two overlapping matches wins; at one node rules are tried in list
order. A rewrite first adds its nodes in front of the root and only then, when nothing can fail any more, replaces the
root, so a failing rule leaves the graph as it was. Matching is done for all rules at once by `compiler.matcher`.
"""

from __future__ import annotations

import inspect
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import RewriteError
from llmopt.compiler.fake import Fakes, is_alike
from llmopt.compiler.graph import Graph, origin, type_of, where
from llmopt.compiler.journal import Journal
from llmopt.compiler.matcher import EMPTY, Binding, Table
from llmopt.compiler.nearmiss import NearMiss, nearest, size_of
from llmopt.compiler.pattern import AtenOps, IrOps, Var, as_pattern, overload_of

MAX_GENERATIONS = 100  # rewrites of rewrites; more means that rules feed each other for ever


@dataclass(frozen=True)
class Fail:
    """Why a match may not be rewritten, and the node to blame."""

    reason: str
    node: fx.Node | None = None


class Match:
    """One match: `m["x"]` is what variable x is bound to, `m.nodes` are the matched call nodes, roots included."""

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

    `exclusive`: interior nodes may have no users outside of the match. `changes_type`: the replacement may have
    another shape or dtype than the root.
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
        """Add a call of any target; its fake value comes from running the target on the operands' fake values."""
        target = overload_of(target)
        value = self._fakes.run(target, args, kwargs)
        name = target._schema.name.split("::")[1] if isinstance(target, OpOverload) else None
        return self._add("call_function", target, args, kwargs, name, value)

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


@dataclass(frozen=True)
class RewriteRecord:
    """One rewrite done: the rule, the replaced root's name, and its source line."""

    rule: str
    root: str
    source: str


@dataclass
class Stats:
    """What a run of `apply_rules` did.

    `matched` counts matches that were rewritten or rejected, `attempts` the structural tests of a pattern against a node; repeated
    structures need none. `rejected` counts (rule, reason); `ms` is the time taken.
    """

    matched: int = 0
    rewritten: int = 0
    per_rule: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    log: list[RewriteRecord] = field(default_factory=list)
    attempts: int = 0
    ms: float = 0.0
    scan: Callable[[], dict[str, NearMiss]] = field(default=dict, repr=False, compare=False)

    @cached_property
    def near_misses(self) -> dict[str, NearMiss]:
        """The best near miss of each rule that rewrote nothing; scans the graph when first asked."""
        return self.scan()


class _Run:
    """The state of one `apply_rules`; `journal` can undo all of it."""

    def __init__(self, graph: Graph, rules: Sequence[Rule], limit: int | None) -> None:
        self.fx, self.rules, self.limit = graph.fx, rules, limit
        self.patterns = [rule.roots() for rule in rules]
        self.table = Table(self.patterns)
        self.fakes = Fakes(graph.fx)
        self.journal = Journal(graph.fx)
        self.stats = Stats(scan=self.near_misses)
        self.work: list[fx.Node] = []
        self.unchanged: dict[fx.Node, int] = {}  # candidates nothing was done to: rewrites done by then
        self.rejections: dict[tuple[int, fx.Node], Fail] = {}
        self.generation: dict[fx.Node, int] = {}

    def run(self) -> Stats:
        """Rewrite to the fixpoint (or the limit); on an error put everything back."""
        began = time.perf_counter()
        state = self.table.state
        self.work = [node for node in self.fx.nodes if state(node).rules]
        try:
            while self.work and (self.limit is None or self.stats.rewritten < self.limit):
                self.visit(self.work.pop())
                if not self.work:  # a rewrite elsewhere may have made a match possible that was turned down before
                    self.work = sorted(n for n, done in self.unchanged.items() if done < self.stats.rewritten)
        except BaseException:
            self.journal.undo()
            raise
        self.journal.erase_dead()
        for (rule, _), fail in self.rejections.items():
            self.stats.rejected[self.rules[rule].name, fail.reason] += 1
        self.stats.matched = self.stats.rewritten + len(self.rejections)
        self.stats.attempts = self.table.attempts
        self.stats.ms = (time.perf_counter() - began) * 1e3
        return self.stats

    def visit(self, root: fx.Node) -> None:
        """Try the rules whose root may be this node, in order, until one rewrites it."""
        self.unchanged.pop(root, None)
        if root in self.journal.dead:
            return
        rules = self.table.states.get(root, EMPTY).rules
        if not any(self.try_rule(index, root) for index in rules) and rules:
            self.unchanged[root] = self.stats.rewritten

    def try_rule(self, index: int, root: fx.Node) -> bool:
        """Rewrite the first binding that passes the checks; the first reason is kept if none does."""
        first = None
        self.rejections.pop((index, root), None)
        for binding in self.table.bindings(index, root):
            fail = self.attempt(self.rules[index], Match(binding))
            if fail is None:
                return True
            first = first or fail
        if first is not None:
            self.rejections[index, root] = first
        return False

    def attempt(self, rule: Rule, match: Match) -> Fail | None:
        """Check, build and commit one match; the reason if it is turned down."""
        fail = _outside_user(match) if rule.exclusive else None
        if fail is None:
            verdict = _guard(rule, match, rule.check, match)
            fail = verdict if isinstance(verdict, Fail) else None
            if verdict is False:
                fail = Fail("check failed", match.root)
        if fail is not None:
            return fail
        builder = Builder(self.fx, self.fakes, min(match.roots), rule.name)
        self.journal.created.append(builder.created)
        result = _guard(rule, match, rule.rewrite, builder, match)
        if isinstance(result, Fail):
            builder.undo()
            return result
        results = result if isinstance(result, tuple) else (result,)
        _check_results(rule, match, results)
        late = _late_inputs(rule, match, builder, results)
        if isinstance(late, Fail):
            builder.undo()
            return late
        self.commit(rule, match, builder, results, late)
        return None

    def commit(
        self, rule: Rule, match: Match, b: Builder, results: tuple[Any, ...], late: Iterable[fx.Node]
    ) -> None:
        """Put the results in the roots' place; nothing here can fail but the generation limit."""
        generation = 1 + max(self.generation.get(r, 0) for r in match.roots)
        if generation > MAX_GENERATIONS:
            rules = ", ".join(dict.fromkeys(origin(match.root).rules[-10:]))
            raise RewriteError(
                f"rule {rule.name} at {where(match.root)}: rewrote its own results {MAX_GENERATIONS} times over "
                f"(rules involved: {rules}); the rewrite must not match again, add a check"
            )
        for node in late:
            self.journal.move(node, b.created[0] if b.created else min(match.roots))
        touched = [u for r, new in zip(match.roots, results, strict=True) for u in self.journal.replace(r, new)]
        for node in self.journal.bury(match.roots, match.nodes):
            self.table.states.pop(node, None)
            self.unchanged.pop(node, None)
        for node in b.created:
            self.generation[node] = generation
            if self.table.state(node).rules:
                self.work.append(node)
        self.update(touched)
        self.stats.rewritten += 1
        self.stats.per_rule[rule.name] += 1
        self.stats.log.append(RewriteRecord(rule.name, match.root.name, origin(match.root).source))

    def update(self, nodes: list[fx.Node]) -> None:
        """Recompute the states of nodes whose operands changed, and upwards as long as states change."""
        while nodes:
            node = nodes.pop()
            before = self.table.states.get(node, EMPTY)
            after = self.table.state(node)
            if after is not before and node not in self.journal.dead:
                nodes.extend(node.users)
                if after.rules:
                    self.work.append(node)

    def near_misses(self) -> dict[str, NearMiss]:
        """For each rule that rewrote nothing: its first rejection, or else the place where most of it fits."""
        found: dict[str, NearMiss] = {}
        for (index, root), fail in self.rejections.items():
            total = sum(map(size_of, self.patterns[index]))
            name = self.rules[index].name
            found.setdefault(name, NearMiss(name, total, total, fail.node or root, fail.reason))
        for rule, roots in zip(self.rules, self.patterns, strict=True):
            if rule.name not in found and not self.stats.per_rule[rule.name]:
                found[rule.name] = nearest(rule.name, roots, self.fx.nodes)
        return {name: miss for name, miss in found.items() if not self.stats.per_rule[name]}


def apply_rules(graph: Graph, rules: Iterable[Rule], *, limit: int | None = None) -> Stats:
    """Rewrite the graph with the rules until none applies, or until `limit` rewrites are done.

    Raises RewriteError if a rule breaks its contract; the graph is then as it was before the call.
    """
    return _Run(graph, list(rules), limit).run()


def _guard(rule: Rule, match: Match, fn: Callable[..., Any], *args: Any) -> Any:
    """Call a rule's method; whatever it raises becomes a RewriteError that says where."""
    try:
        return fn(*args)
    except Exception as error:
        raise RewriteError(
            f"rule {rule.name} at {where(match.root)}: {fn.__name__} raised {type(error).__name__}: {error}; wanted "
            f"a {'verdict' if fn.__name__ == 'check' else 'replacement'}. The graph is left as it was; fix the rule"
        ) from error


def _outside_user(match: Match) -> Fail | None:
    inside = set(match.nodes)
    bound = set(_nodes_in(match.env.values()))
    for node in match.nodes:
        if node not in match.roots and node not in bound:
            for user in node.users:
                if user not in inside:
                    return Fail("an interior node has users outside of the match", node)
    return None


def _nodes_in(values: Iterable[Any]) -> Iterable[fx.Node]:
    for value in values:
        if isinstance(value, fx.Node):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _nodes_in(value)


def _check_results(rule: Rule, match: Match, results: tuple[Any, ...]) -> None:
    """RewriteError unless there is one result per root, of the root's shape and dtype."""
    at = f"rule {rule.name} at {where(match.root)}"
    if len(results) != len(match.roots):
        raise RewriteError(f"{at}: rewrite returned {len(results)} values, wanted {len(match.roots)}, one per root")
    for root, new in zip(match.roots, results, strict=True):
        if new is None or new in match.roots:
            raise RewriteError(f"{at}: rewrite returned {new}, wanted a replacement; return m.fail(...) to decline")
        wanted, seen = root.meta.get("val"), new.meta.get("val") if isinstance(new, fx.Node) else new
        if not rule.changes_type and wanted is not None and seen is not None and not is_alike(seen, wanted):
            raise RewriteError(
                f"{at}: the replacement of %{root.name} is {type_of(seen)}, wanted {type_of(wanted)} as the root has; "
                f"fix the rewrite, or set changes_type = True"
            )


def _late_inputs(rule: Rule, match: Match, builder: Builder, results: tuple[Any, ...]) -> list[fx.Node] | Fail:
    """Operands that stand after the insertion point and must move in front of it, in graph order.

    A Fail if one of them depends on a root (the rewrite would make a cycle).
    """
    point = min(match.roots) if len(match.roots) > 1 else match.root
    stack = [a for node in builder.created for a in node.all_input_nodes if not a < point]
    stack += [r for r in results if isinstance(r, fx.Node) and not r < point]
    if any(node in match.roots for node in stack):
        raise RewriteError(
            f"rule {rule.name} at {where(match.root)}: the replacement uses the root it replaces; build the root's op "
            f"anew with b.call(m.root.target, ...)"
        )
    late: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in match.roots:
            return Fail(f"an operand depends on %{node.name}, which would be replaced", node)
        if node not in late and not node < point:
            late.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(late)
