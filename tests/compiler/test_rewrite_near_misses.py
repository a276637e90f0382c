"""Checks, near misses, and what happens to users of matched nodes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from rewriting import A, L, Norm, Sketch, SwiGLU, norm, rule_of, targets

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler.pattern import Const, Var, aten
from llmopt.compiler.rewrite import apply_rules

# ---- checks and near misses


def test_check_failing_is_counted_with_its_reason():
    s = Sketch()
    x, y = s.input("x"), s.input("y", dtype=torch.float64)
    root = s(A.mul.Tensor, s(A.silu.default, x), y)
    graph = s.done(root)
    before = graph.print()

    class Strict(SwiGLU):
        name = "strict-swiglu"

        def check(self, m):
            same = m.val("gate").dtype == m.val("up").dtype
            return None if same else m.fail("dtypes differ", m["gate"])

    stats = apply_rules(graph, [Strict()])
    assert graph.print() == before
    assert (stats.matched, stats.rewritten) == (1, 0)
    assert stats.rejected == Counter({("strict-swiglu", "dtypes differ"): 1})
    miss = stats.near_misses["strict-swiglu"]
    assert (miss.matched, miss.total, miss.node, miss.reason) == (2, 2, x, "dtypes differ")


def test_rewrite_may_decline():
    s = Sketch()
    graph = s.done(s(A.neg.default, s.input("x")))
    before = graph.print()

    def decline(b, m):
        b.aten.neg.default(b.aten.neg.default(m["x"]))
        return m.fail("not worth it")

    stats = apply_rules(graph, [rule_of(aten.neg.default(Var("x")), decline)])
    assert stats.rejected == Counter({("made", "not worth it"): 1})
    assert graph.print() == before


def test_near_miss_names_the_op_and_its_place():
    s = Sketch()
    graph = s.done(norm(s, s.input("x"), root=A.sqrt.default))
    stats = apply_rules(graph, [Norm()])
    assert str(stats.near_misses["norm"]) == (
        "norm: 1 of 5 pattern nodes fit at %sqrt_default (layers.0 model.py:4): expected aten.rsqrt, saw aten.sqrt"
    )


def test_near_miss_prefers_the_place_that_fits_most():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    graph = s.done(s(A.mul.Tensor, x, y), norm(s, x, exponent=3), s(A.mul.Tensor, y, y))
    miss = apply_rules(graph, [Norm()]).near_misses["norm"]
    assert (miss.matched, miss.total) == (4, 5)
    assert miss.node.target is A.pow.Tensor_Scalar
    assert miss.reason == "expected 2, saw 3"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (aten.tanh.default(Var("x")), "the graph has no aten.tanh"),
        (aten.sub.Tensor(Var("x"), Var("x")), "expected 'x' to be placeholder %x again, saw %neg_default"),
        (aten.sub.Tensor(Var("x"), Const("c", float)), "expected a literal float, saw %neg_default"),
        (
            aten.sub.Tensor(Var("x", lambda v: False), Var("y")),
            "placeholder %x does not meet the condition on 'x'",
        ),
        (aten.sub.Tensor(aten.neg.default(Var("x")), Var("y")), "expected aten.neg, saw placeholder %x"),
        (aten.cat.default([Var("x")]), "expected a list of 1, saw [x, x]"),
    ],
)
def test_near_miss_reasons(pattern, reason):
    s = Sketch()
    x = s.input("x")
    graph = s.done(s(A.sub.Tensor, x, s(A.neg.default, x)), s(A.cat.default, [x, x]))
    stats = apply_rules(graph, [rule_of(pattern, None)])
    assert stats.near_misses["made"].reason == reason


def test_rules_that_rewrote_have_no_near_miss():
    s = Sketch()
    graph = s.done(norm(s, s.input("x")))
    assert apply_rules(graph, [Norm()]).near_misses == {}


# ---- users


@pytest.mark.parametrize("exclusive", [False, True])
def test_interior_nodes_with_outside_users(exclusive):
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    act = s(A.silu.default, x)
    graph = s.done(s(A.mul.Tensor, act, y), act)
    rule = type("Made", (SwiGLU,), {"exclusive": exclusive})()
    stats = apply_rules(graph, [rule])
    if exclusive:
        assert targets(graph) == ["silu", "mul"]
        assert stats.rejected == Counter({("made", "an interior node has users outside of the match"): 1})
        assert stats.near_misses["made"].node is act
    else:
        assert targets(graph) == ["silu", "gated"]
        assert graph.outputs()[1] is act


def test_exclusive_allows_users_inside_the_match_and_of_bound_nodes():
    s = Sketch()
    x = s.input("x")
    inner = s(A.neg.default, x)
    graph = s.done(s(A.add.Tensor, s(A.exp.default, inner), s(A.tanh.default, inner)), x)
    shared = aten.neg.default(Var("x"))
    pattern = aten.add.Tensor(aten.exp.default(shared), aten.tanh.default(shared))
    rule = rule_of(pattern, lambda b, m: b.aten.sin.default(m["x"]), exclusive=True)
    assert apply_rules(graph, [rule]).rewritten == 1
    assert targets(graph) == ["sin"]


def test_all_users_of_the_root_get_the_replacement():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    root = s(A.mul.Tensor, s(A.silu.default, x), y)
    graph = s.done(s(A.cat.default, [root, root]), s(A.add.Tensor, root, root), root)
    apply_rules(graph, [SwiGLU()])
    new = graph.outputs()[2]
    assert new.target is L.gated.default
    assert graph.outputs()[0].args[0] == [new, new]
    assert graph.outputs()[1].args == (new, new)


def test_what_only_the_match_needed_is_erased_but_mutation_and_old_dead_code_stay():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    dead = s(A.cos.default, x)
    written = s(A.relu_.default, s(A.clone.default, y))
    graph = s.done(s(A.add.Tensor, s(A.neg.default, s(A.exp.default, x)), written))
    pattern = aten.add.Tensor(aten.neg.default(Var("x")), aten.relu_.default(Var("y")))
    apply_rules(graph, [rule_of(pattern, lambda b, m: b.aten.sin.default(m.root.args[1].args[0]))])
    assert targets(graph) == ["cos", "clone", "relu_", "sin"]
    assert dead in graph.fx.nodes
