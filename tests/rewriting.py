"""What the tests of the rewrite engine share: graphs drawn by hand, and rules made on the spot."""

from __future__ import annotations

import torch
from torch import fx

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler._torch import fake_mode, fake_tensor
from llmopt.compiler.graph import Graph, Origin
from llmopt.compiler.pattern import aten
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


class Norm(Rule):
    def pattern(self, x, eps):
        mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
        return aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))

    def rewrite(self, b, m):
        return b.ir.rms_norm(m["x"], None, m["eps"])


def norm(s: Sketch, x: fx.Node, exponent: int = 2, root=A.rsqrt.default, other: fx.Node | None = None) -> fx.Node:
    mean = s(A.mean.dim, s(A.pow.Tensor_Scalar, x, exponent), [-1], True)
    return s(A.mul.Tensor, other or x, s(root, s(A.add.Tensor, mean, 1e-6)))
