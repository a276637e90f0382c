"""Rewriting: values and provenance of new nodes, order, fixpoint, limits, several roots."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from rewriting import A, Norm, Sketch, SwiGLU, norm, rule_of, targets
from torch import fx

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler.graph import Graph, Origin, origin
from llmopt.compiler.pattern import Const, Var, aten
from llmopt.compiler.rewrite import apply_rules

# ---- rewriting


def test_new_nodes_have_values_and_provenance():
    s = Sketch("B", 4, dtype=torch.bfloat16, device="meta")
    x, y = s.input("x"), s.input("y")
    graph = s.done(s(A.mul.Tensor, s(A.silu.default, x), y))
    old = graph.outputs()[0]
    stats = apply_rules(graph, [SwiGLU()])
    (new,) = graph.calls()
    value = new.meta["val"]
    assert (value.dtype, value.device.type) == (torch.bfloat16, "meta")
    assert value.shape[0].node.expr == s.symbols["B"].node.expr
    assert origin(new) == Origin("model.py:2", "layers.0", ("swiglu",))
    assert new.name == "gated"
    assert [(r.rule, r.root, r.source) for r in stats.log] == [("swiglu", old.name, "model.py:2")]


def test_provenance_grows_with_each_rule():
    s = Sketch()
    graph = s.done(s(A.exp.default, s.input("x")))
    first = rule_of(aten.exp.default(Var("x")), lambda b, m: b.aten.sin.default(m["x"]), name="first")
    second = rule_of(aten.sin.default(Var("x")), lambda b, m: b.aten.cos.default(m["x"]), name="second")
    apply_rules(graph, [second, first])
    assert origin(graph.outputs()[0]) == Origin("model.py:1", "layers.0", ("first", "second"))


def test_builder_reads_weights_and_takes_schema_keywords():
    s = Sketch()
    graph = s.done(s(A.exp.default, s.input("x")))

    def scale(b, m):
        return b.aten.add.Tensor(m["x"], b.weight("layers.0.scale", m.val("x")), alpha=2)

    apply_rules(graph, [rule_of(aten.exp.default(Var("x")), scale)])
    assert list(graph.weights()) == ["layers.0.scale"]
    assert 'aten.add(x, w["layers.0.scale"], alpha=2)' in graph.print()
    assert origin(graph.weights()["layers.0.scale"]).rules == ("made",)


def test_an_existing_node_or_a_literal_may_be_the_replacement():
    s = Sketch()
    x = s.input("x")
    graph = s.done(s(A.neg.default, s(A.neg.default, x)), s(A.cat.default, [s(A.neg.default, s(A.neg.default, x))]))
    twice = rule_of(aten.neg.default(aten.neg.default(Var("x"))), lambda b, m: m["x"])
    assert apply_rules(graph, [twice]).rewritten == 2
    assert graph.outputs()[0] is x
    s = Sketch()
    x = s.input("x")
    graph = s.done(s(A.view.default, x, [s(A.sym_size.int, x, 0), 4]))
    rule = rule_of(aten.sym_size.int(Var("x"), Const("d", int)), lambda b, m: m.val("x").shape[m["d"]])
    apply_rules(graph, [rule])
    assert graph.outputs()[0].args == (x, [2, 4])


def test_larger_match_wins_over_the_smaller_inside_it():
    s = Sketch()
    graph = s.done(s(A.mul.Tensor, s(A.silu.default, s.input("x")), s.input("y")))
    inner = rule_of(aten.silu.default(Var("x")), lambda b, m: b.aten.tanh.default(m["x"]))
    assert apply_rules(graph, [inner, SwiGLU()]).per_rule == Counter(swiglu=1)


def test_at_one_node_rules_are_tried_in_order():
    s = Sketch()
    graph = s.done(s(A.exp.default, s.input("x")))
    one = rule_of(aten.exp.default(Var("x")), lambda b, m: b.aten.sin.default(m["x"]), name="one")
    two = rule_of(aten.exp.default(Var("x")), lambda b, m: b.aten.cos.default(m["x"]), name="two")
    assert apply_rules(graph, [two, one]).per_rule == Counter(two=1)


def test_fixpoint_a_rewrite_enables_one_above_it():
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    sigmoid = s(A.mul.Tensor, x, s(A.sigmoid.default, x))
    graph = s.done(s(A.mul.Tensor, sigmoid, y))
    silu = rule_of(
        aten.mul.Tensor(Var("x"), aten.sigmoid.default(Var("x"))),
        lambda b, m: b.aten.silu.default(m["x"]),
        name="silu",
    )
    stats = apply_rules(graph, [SwiGLU(), silu])
    assert targets(graph) == ["gated"]
    assert [r.rule for r in stats.log] == ["silu", "swiglu"]


def test_fixpoint_reaches_any_height_above_a_rewrite():
    s = Sketch()
    graph = s.done(s(A.neg.default, s(A.exp.default, s(A.abs.default, s(A.sin.default, s.input("x"))))))
    pattern = aten.neg.default(aten.exp.default(aten.abs.default(aten.cos.default(Var("x")))))
    high = rule_of(pattern, lambda b, m: b.aten.tanh.default(m["x"]), name="high")
    low = rule_of(aten.sin.default(Var("x")), lambda b, m: b.aten.cos.default(m["x"]), name="low")
    assert [r.rule for r in apply_rules(graph, [high, low]).log] == ["low", "high"]
    assert targets(graph) == ["tanh"]


@pytest.mark.parametrize("mul_first", [False, True])
def test_fixpoint_a_rewrite_elsewhere_lets_a_rejected_match_through(mul_first):
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    act = s(A.silu.default, x)
    product, other_user = (
        (s(A.mul.Tensor, act, y), s(A.neg.default, act))
        if mul_first
        else reversed((s(A.neg.default, act), s(A.mul.Tensor, act, y)))
    )
    graph = s.done(product, other_user)
    swiglu = type("Made", (SwiGLU,), {"exclusive": True})()
    other = rule_of(aten.neg.default(aten.silu.default(Var("x"))), lambda b, m: b.aten.cos.default(m["x"]), name="o")
    # when the mul comes last it is visited first, turned down, and has to be tried again
    stats = apply_rules(graph, [swiglu, other])
    assert sorted(targets(graph)) == ["cos", "gated"]
    assert stats.rejected == Counter()


def test_second_run_rewrites_nothing():
    s = Sketch()
    graph = s.done(norm(s, norm(s, s.input("x"))))
    assert apply_rules(graph, [Norm()]).rewritten == 2
    before = graph.print()
    assert apply_rules(graph, [Norm()]).rewritten == 0
    assert graph.print() == before


def test_limit_counts_rewrites():
    def three() -> Graph:
        s = Sketch()
        x = s.input("x")
        for _ in range(3):
            x = norm(s, x)
        return s.done(x)

    for limit in range(5):
        graph = three()
        stats = apply_rules(graph, [Norm()], limit=limit)
        assert stats.rewritten == min(limit, 3)
        assert targets(graph).count("rms_norm") == min(limit, 3)
        assert targets(graph).count("rsqrt") == 3 - min(limit, 3)
    assert apply_rules(three(), [Norm()], limit=None).rewritten == 3


@pytest.mark.parametrize(
    "build",
    [
        lambda s, x: norm(s, x, exponent=3),
        lambda s, x: norm(s, x, root=A.sqrt.default),
        lambda s, x: norm(s, x, other=s(A.exp.default, x)),
    ],
)
def test_must_not_match(build):
    s = Sketch()
    graph = s.done(build(s, s.input("x")))
    before = graph.print()
    stats = apply_rules(graph, [Norm()])
    assert (stats.matched, stats.rewritten) == (0, 0)
    assert graph.print() == before


def test_several_roots():
    s = Sketch()
    x, w1 = s.input("x"), s.input("w1", 6, 4)
    q = s(A.linear.default, x, w1)
    w2 = s.graph.get_attr("w2")  # stands after the first root: must move in front of it
    w2.meta["val"] = w1.meta["val"]
    graph = s.done(s(A.exp.default, q), s(A.linear.default, x, w2))

    def split(b, m):
        both = b.aten.linear.default(m["x"], b.aten.cat.default([m["a"], m["b"]]))
        parts = b.aten.split.Tensor(both, 6, -1)
        return b.call(operator.getitem, parts, 0), b.call(operator.getitem, parts, 1)

    pattern = (aten.linear.default(Var("x"), Var("a")), aten.linear.default(Var("x"), Var("b")))
    rule = rule_of(pattern, split, lambda m: m["a"].op != "call_function")
    inputs = [torch.randn(2, 4), torch.randn(6, 4)]
    weight = torch.randn(6, 4)
    module = torch.nn.Module()
    module.w2 = weight
    expected = fx.Interpreter(fx.GraphModule(module, graph.fx)).run(*inputs)
    assert apply_rules(graph, [rule]).rewritten == 1
    graph.fx.lint()
    assert [n.name for n in graph.calls("aten.linear")] == ["linear"]
    seen = fx.Interpreter(fx.GraphModule(module, graph.fx)).run(*inputs)
    torch.testing.assert_close(seen, expected)


def test_roots_that_depend_on_each_other_are_left_alone():
    s = Sketch(4, 4)
    x = s.input("x")
    first = s(A.linear.default, x, s.input("w"))
    graph = s.done(s(A.linear.default, x, s(A.exp.default, first)))
    pattern = (aten.linear.default(Var("x"), Var("a")), aten.linear.default(Var("x"), Var("b")))
    rule = rule_of(pattern, lambda b, m: (b.aten.add.Tensor(m["a"], m["b"]), b.aten.sub.Tensor(m["a"], m["b"])))
    before = graph.print()
    stats = apply_rules(graph, [rule])
    assert graph.print() == before
    ((_, reason),) = stats.rejected
    assert reason == f"an operand depends on %{first.name}, which would be replaced"
