"""A rewrite is all or nothing; types are checked; equal layers cost nothing more."""

from __future__ import annotations

import pytest
import torch
from rewriting import A, Norm, Sketch, SwiGLU, norm, rule_of, targets

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler.errors import RewriteError
from llmopt.compiler.graph import Graph, Origin
from llmopt.compiler.pattern import Var, aten
from llmopt.compiler.rewrite import Rule, apply_rules

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
