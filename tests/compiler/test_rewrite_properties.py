"""Random graphs: matches equal those of a naive matcher, rewriting keeps the meaning."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import A, Seen, Sketch, rule_of, run
from torch import fx

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler.graph import Graph
from llmopt.compiler.pattern import AnyOf, Var, call
from llmopt.compiler.rewrite import apply_rules

# ---- properties: a naive matcher, and running the graph

UNARY = {"neg": A.neg.default, "abs": A.abs.default}
BINARY = {"add": A.add.Tensor, "mul": A.mul.Tensor, "sub": A.sub.Tensor}

patterns = st.recursive(
    st.sampled_from([("var", "x"), ("var", "y"), ("var", "z"), ("literal", 2), ("literal", 3)]),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), inner),
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
        st.tuples(st.just("any"), inner, inner),
    ),
    max_leaves=6,
)
rooted = patterns.filter(lambda p: p[0] in UNARY or p[0] in BINARY)
steps = st.lists(
    st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 40), st.integers(0, 40), st.booleans()),
    min_size=1,
    max_size=14,
)


def random_graph(plan) -> Graph:
    """A DAG of int64 nodes; operands are earlier nodes or a literal."""
    s = Sketch(2, dtype=torch.int64)
    nodes = [s.input("p"), s.input("q")]
    for op, a, b, literal in plan:
        left = nodes[a % len(nodes)]
        if op in UNARY:
            nodes.append(s(UNARY[op], left))
        else:
            nodes.append(s(BINARY[op], left, 2 + b % 2 if literal else nodes[b % len(nodes)]))
    return s.done(*nodes[-3:])


def engine_pattern(p):
    kind, *rest = p
    if kind == "var":
        return Var(rest[0])
    if kind == "literal":
        return rest[0]
    inner = [engine_pattern(q) for q in rest]
    return AnyOf(*inner) if kind == "any" else call((UNARY | BINARY)[kind], *inner)


def naive(p, value, env) -> list[dict]:
    """All environments in which the pattern fits, by trying everything."""
    kind, *rest = p
    if kind == "var":
        if rest[0] not in env:
            return [{**env, rest[0]: value}]
        known = env[rest[0]]
        same = known is value if isinstance(value, fx.Node) or isinstance(known, fx.Node) else known == value
        return [env] if same else []
    if kind == "literal":
        return [env] if not isinstance(value, fx.Node) and value == rest[0] else []
    if kind == "any":
        return [e for option in rest for e in naive(option, value, env)]
    if not isinstance(value, fx.Node) or value.target is not (UNARY | BINARY)[kind]:
        return []
    found = []
    for operands in itertools.permutations(value.args) if kind in ("add", "mul") else [value.args]:
        envs = [env]
        for q, operand in zip(rest, operands, strict=True):
            envs = [e for known in envs for e in naive(q, operand, known)]
        found += envs
    return found


def frozen(root, env):
    return root, frozenset(env.items())


@settings(max_examples=300, deadline=None)
@given(steps, st.lists(rooted, min_size=1, max_size=4))
def test_matches_are_those_of_a_naive_matcher(plan, wanted):
    graph = random_graph(plan)
    rules = [Seen(engine_pattern(p)) for p in wanted]
    apply_rules(graph, rules)
    for p, rule in zip(wanted, rules, strict=True):
        expected = {frozen(n, e) for n in graph.calls() for e in naive(p, n, {})}
        assert {frozen(n, e) for n, e in rule.bindings} == expected


ALGEBRA = [  # each keeps the value and shrinks or reorders the graph towards a normal form
    (("neg", ("neg", ("var", "x"))), lambda b, m: m["x"]),
    (("sub", ("var", "x"), ("neg", ("var", "y"))), lambda b, m: b.aten.add.Tensor(m["x"], m["y"])),
    (("add", ("var", "x"), ("neg", ("var", "y"))), lambda b, m: b.aten.sub.Tensor(m["x"], m["y"])),
    (("abs", ("any", ("abs", ("var", "x")), ("neg", ("var", "x")))), lambda b, m: b.aten.abs.default(m["x"])),
    (
        ("add", ("mul", ("var", "x"), ("var", "y")), ("mul", ("var", "x"), ("var", "z"))),
        lambda b, m: b.aten.mul.Tensor(m["x"], b.aten.add.Tensor(m["y"], m["z"])),
    ),
    (("neg", ("sub", ("var", "x"), ("var", "y"))), lambda b, m: b.aten.sub.Tensor(m["y"], m["x"])),
]


def are_nodes(m) -> bool:
    return all(isinstance(v, fx.Node) for v in m.env.values())


@settings(max_examples=200, deadline=None)
@given(steps, st.none() | st.integers(0, 3))
def test_rewriting_keeps_the_meaning_and_reaches_a_fixpoint(plan, limit):
    graph = random_graph(plan)
    inputs = torch.tensor([3, -5]), torch.tensor([-7, 2])
    expected = run(graph, *inputs)
    rules = [rule_of(engine_pattern(p), fn, are_nodes, name=str(i)) for i, (p, fn) in enumerate(ALGEBRA)]
    stats = apply_rules(graph, rules, limit=limit)
    for seen, wanted in zip(run(graph, *inputs), expected, strict=True):
        assert torch.equal(seen, wanted)
    assert limit is None or stats.rewritten <= limit
    if limit is None:
        left = [e for p, _ in ALGEBRA for n in graph.calls() for e in naive(p, n, {})]
        assert not [e for e in left if all(isinstance(v, fx.Node) for v in e.values())]
