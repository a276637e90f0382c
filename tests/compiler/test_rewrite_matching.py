"""What patterns match: operand order, variables, literals, defaults, lists, alternatives."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from rewriting import A, L, Sketch, SwiGLU, bindings, rule_of
from torch import fx

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler import rewrite
from llmopt.compiler.errors import RewriteError
from llmopt.compiler.graph import Graph
from llmopt.compiler.pattern import AnyOf, Const, Maybe, Rest, Var, aten, call, ir
from llmopt.compiler.rewrite import Rule, apply_rules

# ---- matching


@pytest.mark.parametrize("swapped", [False, True])
def test_commutative_operands_match_in_both_orders(swapped):
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    act = s(A.silu.default, x)
    graph = s.done(s(A.mul.Tensor, *((y, act) if swapped else (act, y))))
    stats = apply_rules(graph, [SwiGLU()])
    (node,) = graph.calls()
    assert node.target is L.gated.default
    assert node.args == (x, y, "silu")
    assert (stats.matched, stats.rewritten, stats.per_rule) == (1, 1, Counter(swiglu=1))


def test_subtraction_and_scaled_addition_do_not_commute():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    neg = s(A.neg.default, x)
    graph = s.done(s(A.sub.Tensor, y, neg), s(A.add.Tensor, y, neg, alpha=2), s(A.add.Tensor, y, neg))
    _, scaled, plain = graph.outputs()
    assert bindings(graph, aten.sub.Tensor(aten.neg.default(Var("a")), Var("b"))) == []
    assert bindings(graph, aten.add.Tensor(aten.neg.default(Var("a")), Var("b"), alpha=2)) == []
    found = bindings(graph, aten.add.Tensor(aten.neg.default(Var("a")), Var("b")))
    assert found == [(plain, {"a": x, "b": y})]
    assert [n for n, _ in bindings(graph, aten.add.Tensor(Var("b"), Var("a"), alpha=2))] == [scaled]


def test_ir_ops_are_matched_and_commute_only_if_declared():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    graph = s.done(s(L.gated.default, x, s(A.relu.default, y), "silu"))
    assert bindings(graph, ir.gated(Var("g"), aten.relu.default(Var("u")), Var("act"))) == [
        (graph.outputs()[0], {"g": x, "u": y, "act": "silu"})
    ]
    assert bindings(graph, ir.gated(aten.relu.default(Var("u")), Var("g"), "silu")) == []


def test_same_variable_twice_is_the_same_node_or_equal_literal():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    graph = s.done(s(A.mul.Tensor, x, x), s(A.mul.Tensor, x, y), s(A.clamp.default, x, 2.0, 2.0))
    square, _, clamp = graph.outputs()
    assert {n for n, _ in bindings(graph, aten.mul.Tensor(Var("a"), Var("a")))} == {square}
    assert bindings(graph, aten.clamp.default(Var("a"), Var("b"), Var("b"))) == [(clamp, {"a": x, "b": 2.0})]


def test_literals_by_value_and_by_type():
    s = Sketch()
    x = s.input("x")
    graph = s.done(s(A.pow.Tensor_Scalar, x, 2), s(A.pow.Tensor_Scalar, x, 3.5), s(A.add.Tensor, x, True))
    two, half, add = graph.outputs()
    pow_of = aten.pow.Tensor_Scalar
    assert [n for n, _ in bindings(graph, pow_of(Var("x"), 2))] == [two]
    assert [n for n, _ in bindings(graph, pow_of(Var("x"), Const("e", int)))] == [two]
    assert {n for n, _ in bindings(graph, pow_of(Var("x"), Const("e", float)))} == {two, half}
    assert {n for n, _ in bindings(graph, pow_of(Var("x"), Const("e", float, lambda e: e > 3)))} == {half}
    assert bindings(graph, pow_of(Const("x", float), Var("e"))) == []
    assert bindings(graph, aten.add.Tensor(Var("x"), Const("c", int))) == []
    assert {n for n, _ in bindings(graph, aten.add.Tensor(Var("x"), Const("c", bool)))} == {add}


def test_equal_literals_of_different_types_are_told_apart():
    s = Sketch()
    x = s.input("x")
    values = (1, 1.0, True)
    graph = s.done(*(s(A.add.Tensor, x, v) for v in values))
    one, real, true = graph.outputs()
    for kind, wanted in ((int, {one}), (float, {one, real}), (bool, {true})):
        assert {n for n, _ in bindings(graph, aten.add.Tensor(Var("x"), Const("c", kind)))} == wanted


def test_where_narrows_a_variable_and_picks_the_order():
    s = Sketch()
    x, w = s.input("x"), s.input("w")
    graph = s.done(s(A.mul.Tensor, x, w))
    pattern = aten.mul.Tensor(Var("w", lambda v: v is w), Var("x"))
    assert bindings(graph, pattern) == [(graph.outputs()[0], {"w": w, "x": x})]


def test_check_may_choose_among_operand_orders():
    s = Sketch()
    x, w = s.input("x"), s.input("w")
    graph = s.done(s(A.mul.Tensor, x, w))
    pattern = aten.mul.Tensor(Var("w"), Var("x"))
    rule = rule_of(pattern, lambda b, m: b.ir.gated(m["x"], m["w"], "silu"), lambda m: m["w"] is w)
    assert apply_rules(graph, [rule]).rewritten == 1
    assert graph.outputs()[0].args == (x, w, "silu")


def test_defaults_given_omitted_and_by_keyword_match_equally():
    s = Sketch()
    x = s.input("x")
    graph = s.done(
        s(A.mean.dim, x, [-1]),
        s(A.mean.dim, x, [-1], False),
        s(A.mean.dim, x, [-1], keepdim=False, dtype=None),
        s(A.mean.dim, x, [-1], True),
        s(A.mean.dim, x, [0]),
    )
    wanted = set(graph.outputs()[:3])
    for pattern in (
        aten.mean.dim(Var("x"), [-1]),
        aten.mean.dim(Var("x"), [-1], False, dtype=None),
        aten.mean.dim(Var("x"), dim=[-1], keepdim=False),
    ):
        assert {n for n, _ in bindings(graph, pattern)} == wanted
    assert len(bindings(graph, aten.mean.dim(Var("x"), Var("d"), Var("keep")))) == 5


def test_variadic_lists():
    s = Sketch()
    x, y, z = s.input("x"), s.input("y"), s.input("z")
    graph = s.done(s(A.cat.default, [s(A.neg.default, x), y, z], -1), s(A.cat.default, [x], -1))
    root = graph.outputs()[0]
    cat = call(aten.cat.default, [aten.neg.default(Var("x")), Rest("xs")], -1)
    assert bindings(graph, cat) == [(root, {"x": x, "xs": (y, z)})]
    assert bindings(graph, call(aten.cat.default, [Rest("xs"), Var("y"), Var("z")], -1)) == [
        (root, {"xs": (root.args[0][0],), "y": y, "z": z})
    ]
    assert len(bindings(graph, call(aten.cat.default, [Rest("xs")], Var("d")))) == 2
    assert len(bindings(graph, call(aten.cat.default, Var("xs"), -1))) == 2
    assert bindings(graph, call(aten.cat.default, [Var("a"), Var("b")], -1)) == []


def test_alternatives_of_targets_and_of_patterns():
    s = Sketch()
    x = s.input("x")
    cast = s(A.to.dtype, x, torch.float64)
    graph = s.done(
        s(A.view.default, x, [8]),
        s(A.reshape.default, x, [4, 2]),
        s(A.rsqrt.default, cast),
        s(A.rsqrt.default, x),
        s(A.sqrt.default, x),
    )
    view, reshape, wide, narrow, root = graph.outputs()
    assert {n for n, _ in bindings(graph, call((aten.view.default, aten.reshape.default), Var("x"), Var("s")))} == {
        view,
        reshape,
    }
    either = AnyOf(aten.rsqrt.default(Var("x")), aten.sqrt.default(Var("x")))
    assert {n for n, _ in bindings(graph, either)} == {wide, narrow, root}
    found = bindings(graph, aten.rsqrt.default(Maybe(aten.to.dtype, Var("x"), Var("d"))))
    # the op around x is preferred to x itself, which also fits
    assert [e for n, e in found if n is wide] == [{"x": x, "d": torch.float64}, {"x": cast}]
    assert [e for n, e in found if n is narrow] == [{"x": x}]


def test_plain_functions_can_be_matched():
    graph = fx.Graph()
    pair = graph.call_function(A.split.Tensor, (graph.placeholder("x"), 2))
    graph.output((graph.call_function(operator.getitem, (pair, 1)),))
    pattern = call(operator.getitem, aten.split.Tensor(Var("x"), Var("n")), Var("i"))
    ((_, env),) = bindings(Graph("g", graph), pattern)
    assert (env["n"], env["i"]) == (2, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aten.mul.Tenser(Var("x"), Var("y")), "did you mean 'Tensor'"),
        (lambda: aten.mull.Tensor(Var("x"), Var("y")), "no op aten.mull"),
        (lambda: ir.rmsnorm(Var("x")), "did you mean 'rms_norm'"),
        (lambda: aten.silu.default(), "'self' is missing"),
        (lambda: aten.silu.default(Var("x"), Var("y")), "at most 1"),
        (lambda: aten.mean.dim(Var("x"), [-1], keep_dim=True), "did you mean 'keepdim'"),
        (lambda: aten.cat.default([Rest("a"), Rest("b")]), "at most one"),
        (lambda: apply_rules(Sketch().done(), [rule_of(Var("x"), None)]), "root must be a call"),
    ],
)
def test_malformed_patterns_are_errors_that_help(make, message):
    with pytest.raises(RewriteError, match=message):
        make()


def test_public_names():
    assert set(rewrite.__all__) >= {"Rule", "Match", "Fail", "Builder", "Stats", "apply_rules"}
    assert type("FuseQKVNorm", (Rule,), {}).name == "fuse-qkv-norm"
