"""The rewrite engine: matching against a naive matcher, rewriting against running the graph."""

from __future__ import annotations

import itertools
import operator
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler import rewrite
from llmopt.compiler._torch import fake_mode, fake_tensor
from llmopt.compiler.errors import RewriteError
from llmopt.compiler.graph import Graph, Origin, origin
from llmopt.compiler.pattern import AnyOf, Const, Maybe, Rest, Var, aten, call, ir
from llmopt.compiler.rewrite import Rule, apply_rules

A = torch.ops.aten
L = torch.ops.llmopt


class Sketch:
    """A graph under construction; every node's fake value is that of running the op."""

    def __init__(self, *shape: int | str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.graph, self.mode, self.line = fx.Graph(), fake_mode(), 0
        self.shape, self.dtype, self.device, self.symbols = shape or (2, 4), dtype, device, {}

    def input(self, name: str, *shape: int | str, dtype: torch.dtype | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        fake = fake_tensor(self.mode, shape or self.shape, dtype or self.dtype, self.symbols)
        node.meta["val"] = fake.to(self.device)
        return node

    def __call__(self, target, *args, **kwargs) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values[0], **values[1])
        self.line += 1
        node.meta["origin"] = Origin(f"model.py:{self.line}", "layers.0")
        return node

    def done(self, *outputs: fx.Node) -> Graph:
        self.graph.output(outputs)
        self.graph.lint()
        return Graph("g", self.graph)


def targets(graph: Graph) -> list[str]:
    return [n.target._schema.name.split("::")[1] for n in graph.calls()]


def run(graph: Graph, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    graph.fx.lint()
    return fx.Interpreter(fx.GraphModule({}, graph.fx)).run(*inputs)


class SwiGLU(Rule):
    name = "swiglu"

    def pattern(self, gate, up):
        return aten.mul.Tensor(aten.silu.default(gate), up)

    def rewrite(self, b, m):
        return b.ir.gated(m["gate"], m["up"], "silu")


class Seen(Rule):
    """Records every binding and turns it down."""

    def __init__(self, pattern) -> None:
        self.made, self.bindings = pattern, []

    def pattern(self):
        return self.made

    def check(self, m):
        self.bindings.append((m.root, dict(m.env)))
        return m.fail("recorded")

    def rewrite(self, b, m):
        raise AssertionError("check turns everything down")


def bindings(graph: Graph, pattern) -> list[tuple[fx.Node, dict]]:
    rule = Seen(pattern)
    apply_rules(graph, [rule])
    return rule.bindings


def rule_of(pattern, rewrite_fn, check_fn=None, **attributes) -> Rule:
    """A rule from functions; `pattern` gets Vars for its parameters, as a method would."""
    body = {"pattern": lambda self: pattern, "rewrite": lambda self, b, m: rewrite_fn(b, m), **attributes}
    if check_fn is not None:
        body["check"] = lambda self, m: check_fn(m)
    return type("Made", (Rule,), body)()


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


class Norm(Rule):
    def pattern(self, x, eps):
        mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
        return aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))

    def rewrite(self, b, m):
        return b.ir.rms_norm(m["x"], None, m["eps"])


def norm(s: Sketch, x: fx.Node, exponent: int = 2, root=A.rsqrt.default, other: fx.Node | None = None) -> fx.Node:
    mean = s(A.mean.dim, s(A.pow.Tensor_Scalar, x, exponent), [-1], True)
    return s(A.mul.Tensor, other or x, s(root, s(A.add.Tensor, mean, 1e-6)))


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


# ---- all or nothing


def boom(b, m):
    b.aten.neg.default(m["x"])
    raise ValueError("boom")


def wrong_shape(b, m):
    return b.aten.sum.default(m["x"])


def wrong_dtype(b, m):
    return b.aten.to.dtype(m["x"], torch.float64)


def bad_arguments(b, m):
    return b.ir.rms_norm(b.aten.neg.default(m["x"]), None)


BROKEN = [
    (boom, r"rewrite raised ValueError: boom.*left as it was"),
    (wrong_shape, r"replacement of %exp_default is f32\[\], wanted f32\[2, 4\].*changes_type"),
    (wrong_dtype, r"is f64\[2, 4\], wanted f32\[2, 4\]"),
    (bad_arguments, r"missing.*eps"),
    (lambda b, m: None, r"returned None, wanted a replacement"),
    (lambda b, m: m.root, r"wanted a replacement"),
    (lambda b, m: (m["x"], m["x"]), r"returned 2 values, wanted 1"),
    (lambda b, m: b.aten.neg.default(m.root), r"uses the root it replaces"),
    (lambda b, m: b.aten.exp.default(m["x"]), r"rewrote its own results 100 times"),
]


@pytest.mark.parametrize(("rewrite_fn", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_a_broken_rewrite_leaves_the_graph_as_it_was(rewrite_fn, message):
    s = Sketch()
    x, y = s.input("x"), s.input("y")
    # swiglu is rewritten first (its root comes last), then the broken rule runs: both must be undone
    graph = s.done(s(A.mul.Tensor, s(A.silu.default, s(A.exp.default, x)), y), s(A.neg.default, y))
    graph.outputs()[0].args[0].args[0].meta["origin"] = Origin("llama.py:7", "layers.0.mlp")
    before, users = graph.print(), {n: set(n.users) for n in graph.fx.nodes}
    order = list(graph.fx.nodes)
    broken = rule_of(aten.exp.default(Var("x")), rewrite_fn, name="broken")
    with pytest.raises(RewriteError, match=message) as error:
        apply_rules(graph, [SwiGLU(), broken])
    assert "rule broken at %exp" in str(error.value)
    assert "(layers.0.mlp llama.py:7)" in str(error.value)
    assert graph.print() == before
    assert list(graph.fx.nodes) == order
    assert {n: set(n.users) for n in graph.fx.nodes} == users
    graph.fx.lint()


def test_moved_nodes_are_put_back():
    s = Sketch()
    x, w = s.input("x"), s.input("w", 6, 4)
    broken_at = s(A.exp.default, x)
    first = s(A.linear.default, x, w)
    late = s(A.abs.default, s(A.neg.default, w))
    graph = s.done(broken_at, first, s(A.linear.default, x, late))
    pattern = (aten.linear.default(Var("x"), Var("a")), aten.linear.default(Var("x"), Var("b")))
    pair = rule_of(
        pattern,
        lambda b, m: (b.aten.matmul.default(m["x"], b.aten.t.default(m["b"])), b.aten.mm.default(m["x"], m["b"])),
        changes_type=True,
    )
    swap = rule_of(
        pattern,
        lambda b, m: tuple(b.aten.matmul.default(m["x"], b.aten.t.default(m[v])) for v in "ab"),
        name="swap",
    )
    before, order = graph.print(), list(graph.fx.nodes)
    kept = graph.copy()
    assert apply_rules(kept, [swap]).rewritten == 1
    kept.fx.lint()
    assert targets(kept)[:4] == ["exp", "neg", "abs", "t"]
    for rules in ([swap, rule_of(aten.exp.default(Var("x")), boom)], [pair]):
        with pytest.raises(RewriteError):
            apply_rules(graph, rules)
        assert graph.print() == before
        assert list(graph.fx.nodes) == order
        graph.fx.lint()


def test_a_check_that_raises_is_an_error_with_its_place():
    s = Sketch()
    graph = s.done(s(A.exp.default, s.input("x")))
    rule = rule_of(aten.exp.default(Var("x")), None, lambda m: m["misspelt"])
    with pytest.raises(RewriteError, match=r"rule made at %exp_default \(layers.0 model.py:1\): .*misspelt"):
        apply_rules(graph, [rule])


def test_changes_type_allows_another_type():
    s = Sketch()
    graph = s.done(s(A.exp.default, s.input("x")))
    apply_rules(graph, [rule_of(aten.exp.default(Var("x")), wrong_dtype, changes_type=True)])
    assert graph.outputs()[0].meta["val"].dtype == torch.float64


def test_symbolic_shapes_are_compared_without_guards():
    s = Sketch("B", "T")
    x = s.input("x")
    graph = s.done(s(A.exp.default, x))
    transposed = rule_of(aten.exp.default(Var("x")), lambda b, m: b.aten.t.default(m["x"]))
    with pytest.raises(RewriteError, match="the replacement of %exp_default is"):
        apply_rules(graph, [transposed])
    assert s.mode.shape_env.guards == []


# ---- cost


def decoder(layers: int) -> Graph:
    s = Sketch()
    x, w = s.input("x"), s.input("w")
    for _ in range(layers):
        h = s(A.mul.Tensor, norm(s, x), w)
        act = s(A.mul.Tensor, s(A.silu.default, s(A.exp.default, h)), s(A.tanh.default, h))
        x = s(A.add.Tensor, x, s(A.cos.default, act))
    return s.done(x)


def late_misses() -> list[Rule]:
    class Cubic(Norm):
        def pattern(self, x, eps):
            mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 3), [-1], True)
            return aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))

    residual = aten.add.Tensor(Var("x"), aten.cos.default(aten.mul.Tensor(aten.silu.default(Var("g")), Var("u"))))
    return [Cubic(), rule_of(aten.neg.default(residual), None)]


def test_identical_layers_are_matched_once():
    rules = [SwiGLU(), Norm(), *late_misses()]
    few, many = apply_rules(decoder(2), rules), apply_rules(decoder(80), rules)
    assert (few.rewritten, many.rewritten) == (4, 160)
    assert many.attempts == few.attempts
    assert few.attempts > 0


def test_attempts_do_not_grow_with_rules_on_other_ops():
    more = [rule_of(getattr(aten, op).default(Var("x")), None) for op in ("sin", "tan", "erf", "ceil")]
    assert apply_rules(decoder(4), [Norm(), *more]).attempts == apply_rules(decoder(4), [Norm()]).attempts


def test_fake_values_are_computed_once_for_identical_layers():
    class Counted(SwiGLU):
        name = "counted"

        def rewrite(self, b, m):
            return b.call(counting, m["gate"], m["up"])

    calls = []

    def counting(gate, up):
        calls.append(1)
        return gate * up

    assert apply_rules(decoder(10), [Counted()]).rewritten == 10
    assert len(calls) == 1


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


def test_public_names():
    assert set(rewrite.__all__) >= {"Rule", "Match", "Fail", "Builder", "Stats", "apply_rules"}
    assert type("FuseQKVNorm", (Rule,), {}).name == "fuse-qkv-norm"
