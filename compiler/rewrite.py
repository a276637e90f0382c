"""The rewrite engine: rules (pattern / check / rewrite) are applied to a fixpoint, all or nothing.

Nodes are visited users first, so that the larger of two overlapping matches wins; at one node rules are tried
in list order. A rewrite first adds its nodes in front of the root and only then, when nothing can fail any
more, replaces the root, so a failing rule leaves the graph as it was. Matching is done for all rules at once
by `compiler.matcher`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import fx

from llmopt.compiler.errors import RewriteError
from llmopt.compiler.fake import Fakes, is_alike
from llmopt.compiler.graph import Graph, origin, type_of, where
from llmopt.compiler.journal import Journal
from llmopt.compiler.matcher import EMPTY, Table
from llmopt.compiler.nearmiss import NearMiss, nearest, size_of
from llmopt.compiler.rule import Builder, Fail, Match, Rule

__all__ = ["Builder", "Fail", "Match", "NearMiss", "RewriteRecord", "Rule", "Stats", "apply_rules"]

MAX_GENERATIONS = 100  # rewrites of rewrites; more means that rules feed each other for ever


@dataclass(frozen=True)
class RewriteRecord:
    """One rewrite done: the rule, the replaced root's name, and its source line."""

    rule: str
    root: str
    source: str


@dataclass
class Stats:
    """What a run of `apply_rules` did.

    `matched` counts matches that were rewritten or rejected, `attempts` the structural tests of a pattern
    against a node; repeated structures need none. `rejected` counts (rule, reason); `ms` is the time taken.
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
        self.table = Table(rule.roots() for rule in rules)
        self.fakes = Fakes(graph.fx)
        self.journal = Journal(graph.fx)
        self.stats = Stats()
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
        self.stats.scan = partial(_near_misses, self.rules, self.rejections, self.stats.per_rule, self.fx)
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
            verdict = _guard(rule, match, "check", match)
            fail = verdict if isinstance(verdict, Fail) else None
            if verdict is False:
                fail = Fail("check failed", match.root)
        if fail is not None:
            return fail
        builder = Builder(self.fx, self.fakes, min(match.roots), rule.name)
        self.journal.created.append(builder.created)
        result = _guard(rule, match, "rewrite", builder, match)
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

    def commit(self, rule: Rule, match: Match, b: Builder, results: tuple[Any, ...], late: Iterable[fx.Node]) -> None:
        """Put the results in the roots' place; nothing here can fail but the generation limit."""
        generation = 1 + max(self.generation.get(r, 0) for r in match.roots)
        if generation > MAX_GENERATIONS:
            rules = ", ".join(dict.fromkeys(origin(match.root).rules[-10:]))
            raise RewriteError(
                f"rule {rule.name} at {where(match.root)}: rewrote its own results {MAX_GENERATIONS} "
                f"times over (rules involved: {rules}); the rewrite must not match again, add a check"
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
            if node in self.journal.dead:
                continue
            before = self.table.states.get(node, EMPTY)
            after = self.table.state(node)
            if after is not before:
                nodes.extend(node.users)
                if after.rules:
                    self.work.append(node)


def apply_rules(graph: Graph, rules: Iterable[Rule], *, limit: int | None = None) -> Stats:
    """Rewrite the graph with the rules until none applies, or until `limit` rewrites are done.

    Raises RewriteError if a rule breaks its contract; the graph is then as it was before the call.
    """
    return _Run(graph, list(rules), limit).run()


def _near_misses(
    rules: Sequence[Rule], rejections: dict[tuple[int, fx.Node], Fail], done: Counter[str], graph: fx.Graph
) -> dict[str, NearMiss]:
    """For each rule that rewrote nothing: its first rejection, or else the place where most of it fits."""
    found: dict[str, NearMiss] = {}
    idle = {i: rule.name for i, rule in enumerate(rules) if not done[rule.name]}
    for (index, root), fail in rejections.items():
        if index in idle and idle[index] not in found:
            total = sum(map(size_of, rules[index].roots()))
            found[idle[index]] = NearMiss(idle[index], total, total, fail.node or root, fail.reason)
    for index, name in idle.items():
        if name not in found:
            found[name] = nearest(name, rules[index].roots(), graph.nodes)
    return found


def _guard(rule: Rule, match: Match, method: str, *args: Any) -> Any:
    """Call a rule's method; whatever it raises becomes a RewriteError that says where."""
    try:
        return getattr(rule, method)(*args)
    except Exception as error:
        raise RewriteError(
            f"rule {rule.name} at {where(match.root)}: {method} raised {type(error).__name__}: {error}; "
            f"wanted a {'verdict' if method == 'check' else 'replacement'}. "
            f"The graph is left as it was; fix the rule"
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
                f"{at}: the replacement of %{root.name} is {type_of(seen)}, wanted {type_of(wanted)} "
                f"as the root has; fix the rewrite, or set changes_type = True"
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
            f"rule {rule.name} at {where(match.root)}: the replacement uses the root it replaces; "
            f"build the root's op anew with b.call(m.root.target, ...)"
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
