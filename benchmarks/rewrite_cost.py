"""Cost of rewriting: llmopt's engine and Inductor's PatternMatcherPass, same graphs, same 50 rules.

    python benchmarks/rewrite_cost.py --out benchmarks/results/rewrite-cost.json

The graphs are decoder blocks as export captures them: norm, gate/up linears, silu * up, down, residual, and
in every third block a projection with a rotation. Two rules hit about one node in ten; the other 48 share
their anchor ops and miss late. Both engines run in one process on fresh graphs, in alternating order;
building graphs and registering Inductor's patterns is not timed, compiling llmopt's rules is. The replacement
work is timed on both sides. Inductor's handlers copy the root's metadata to the new node; llmopt computes
fake values for its new nodes, so it does more. Inductor matches operands in the order given, llmopt in both.
Times are CPU seconds of the process (both engines are single-threaded), so that other work on the machine
counts as little as it can; the load average is recorded.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

import llmopt.compiler.ops  # noqa: F401 - declares the IR ops
from llmopt.compiler._torch import fake_mode, inductor_matcher, lazy_module
from llmopt.compiler.graph import Graph, Origin
from llmopt.compiler.op import OPS
from llmopt.compiler.pattern import Call, Var, aten, overload_of
from llmopt.compiler.rewrite import Builder, Match, Rule, apply_rules
from llmopt.runtime.measure import environment, write_json

SIZES = (1_000, 10_000, 100_000)
UNARY = ("tanh", "sigmoid", "relu", "exp", "abs", "cos", "sin", "neg", "sqrt", "floor")
ATEN = torch.ops.aten

# ---- the graphs


class Blocks:
    """Builds decoder blocks of aten nodes with fake values."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.calls = 0
        with fake_mode():
            self.hidden = torch.empty(1, 16, 64)
            self.wide = torch.empty(1, 16, 256)
            self.column = torch.empty(1, 16, 1)
        self.x = self.input("x", self.hidden)
        self.cos, self.sin = self.input("cos", self.hidden), self.input("sin", self.hidden)

    def input(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, value: torch.Tensor, op: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(op, args)
        node.meta["val"] = value
        node.meta["origin"] = Origin(f"model.py:{self.calls % 97}", f"layers.{self.calls // 12}")
        self.calls += 1
        return node

    def linear(self, x: fx.Node, value: torch.Tensor, name: str) -> fx.Node:
        weight = self.graph.get_attr(f"{name}_{self.calls}")
        weight.meta["val"] = value
        return self.call(value, ATEN.linear.default, x, weight)

    def norm(self, x: fx.Node) -> fx.Node:
        square = self.call(self.hidden, ATEN.pow.Tensor_Scalar, x, 2)
        mean = self.call(self.column, ATEN.mean.dim, square, [-1], True)
        root = self.call(self.column, ATEN.rsqrt.default, self.call(self.column, ATEN.add.Tensor, mean, 1e-6))
        normed = self.call(self.hidden, ATEN.mul.Tensor, x, root)
        weight = self.graph.get_attr(f"norm_{self.calls}")
        weight.meta["val"] = self.hidden
        return self.call(self.hidden, ATEN.mul.Tensor, normed, weight)

    def rotate(self, x: fx.Node) -> fx.Node:
        q = self.linear(x, self.hidden, "q")
        turned = self.call(self.hidden, ATEN.mul.Tensor, self.call(self.hidden, ATEN.neg.default, q), self.sin)
        return self.call(self.hidden, ATEN.add.Tensor, self.call(self.hidden, ATEN.mul.Tensor, q, self.cos), turned)

    def block(self, number: int) -> None:
        x = self.norm(self.x)
        if number % 3 == 0:
            x = self.rotate(x)
        gate, up = self.linear(x, self.wide, "gate"), self.linear(x, self.wide, "up")
        act = self.call(self.wide, ATEN.mul.Tensor, self.call(self.wide, ATEN.silu.default, gate), up)
        self.x = self.call(self.hidden, ATEN.add.Tensor, self.x, self.linear(act, self.hidden, "down"))


def build(calls: int) -> fx.Graph:
    """A graph of at least `calls` call nodes."""
    blocks, number = Blocks(), 0
    while blocks.calls < calls:
        blocks.block(number)
        number += 1
    blocks.graph.output((blocks.x,))
    return blocks.graph


# ---- the rules: one description, two engines

Make = Callable[..., Any]  # makes a pattern node of either engine: make(overload, *args)


def swiglu(make: Make, v: Callable[[str], Any]) -> Any:
    return make(ATEN.mul.Tensor, make(ATEN.silu.default, v("gate")), v("up"))


def rotation(make: Make, v: Callable[[str], Any]) -> Any:
    left = make(ATEN.mul.Tensor, v("q"), v("cos"))
    return make(ATEN.add.Tensor, left, make(ATEN.mul.Tensor, make(ATEN.neg.default, v("q")), v("sin")))


def norm(exponent: int) -> Callable[..., Any]:
    """Differs from the graph's norm in the innermost literal."""

    def pattern(make: Make, v: Callable[[str], Any]) -> Any:
        mean = make(ATEN.mean.dim, make(ATEN.pow.Tensor_Scalar, v("x"), exponent), [-1], True)
        root = make(ATEN.rsqrt.default, make(ATEN.add.Tensor, mean, v("eps")))
        return make(ATEN.mul.Tensor, make(ATEN.mul.Tensor, v("x"), root), v("w"))

    return pattern


def gated_up(unary: str) -> Callable[..., Any]:
    """silu(linear) * unary(linear): the second operand differs."""

    def pattern(make: Make, v: Callable[[str], Any]) -> Any:
        gate = make(ATEN.silu.default, make(ATEN.linear.default, v("x"), v("w1")))
        up = make(getattr(ATEN, unary).default, make(ATEN.linear.default, v("x"), v("w2")))
        return make(ATEN.mul.Tensor, gate, up)

    return pattern


def residual(unary: str) -> Callable[..., Any]:
    """x + linear(unary(linear) * linear): differs three ops below the anchor."""

    def pattern(make: Make, v: Callable[[str], Any]) -> Any:
        gate = make(getattr(ATEN, unary).default, make(ATEN.linear.default, v("y"), v("w1")))
        act = make(ATEN.mul.Tensor, gate, make(ATEN.linear.default, v("y"), v("w2")))
        return make(ATEN.add.Tensor, v("x"), make(ATEN.linear.default, act, v("w3")))

    return pattern


def down(unary: str) -> Callable[..., Any]:
    """linear(silu(unary(gate)) * up): differs three ops below the anchor."""

    def pattern(make: Make, v: Callable[[str], Any]) -> Any:
        gate = make(ATEN.silu.default, make(getattr(ATEN, unary).default, v("gate")))
        return make(ATEN.linear.default, make(ATEN.mul.Tensor, gate, v("up")), v("w"))

    return pattern


def descriptions() -> list[tuple[str, Callable[..., Any]]]:
    """(name, pattern) of the 50 rules; the two that hit come last."""
    missing = [(f"norm-{e}", norm(e)) for e in range(3, 23)]
    missing += [(f"gated-{u}", gated_up(u)) for u in UNARY] + [(f"residual-{u}", residual(u)) for u in UNARY]
    missing += [(f"down-{u}", down(u)) for u in UNARY[:8]]
    return [*missing, ("swiglu", swiglu), ("rotation", rotation)]


class Described(Rule):
    """A described rule for llmopt's engine."""

    def __init__(self, name: str, describe: Callable[..., Any]) -> None:
        self.name, self.describe = name, describe

    def pattern(self) -> Call:
        return self.describe(lambda op, *args: _llmopt_call(op, args), Var)

    def rewrite(self, b: Builder, m: Match) -> fx.Node:
        if self.name == "swiglu":
            return b.ir.gated(m["gate"], m["up"], "silu")
        return b.aten.addcmul.default(b.aten.mul.Tensor(m["q"], m["cos"]), m["q"], m["sin"], value=-1)


def _llmopt_call(op: Any, args: tuple[Any, ...]) -> Call:
    name, overload = op._schema.name.split("::")[1], op._overloadname
    assert overload_of(getattr(getattr(aten, name), overload)) is op
    return getattr(getattr(aten, name), overload)(*args)


def inductor_pass() -> Any:
    """PatternMatcherPass with the same rules; interior nodes may have other users, as in llmopt's engine."""
    matcher = inductor_matcher()
    passes = matcher.PatternMatcherPass()
    gated = OPS["gated"].overload

    def put(match: Any, new: fx.Node) -> None:
        root = match.output_node()
        new.meta.update(root.meta)
        root.replace_all_uses_with(new)
        match.erase_nodes()

    def on_swiglu(match: Any, gate: fx.Node, up: fx.Node) -> None:
        put(match, match.graph.call_function(gated, (gate, up, "silu")))

    def on_rotation(match: Any, q: fx.Node, cos: fx.Node, sin: fx.Node) -> None:
        product = match.graph.call_function(ATEN.mul.Tensor, (q, cos))
        product.meta.update(match.output_node().meta)
        put(match, match.graph.call_function(ATEN.addcmul.default, (product, q, sin), {"value": -1}))

    def never(match: Any, **_: Any) -> None:
        raise AssertionError("a rule that must miss has hit")

    handlers = {"swiglu": on_swiglu, "rotation": on_rotation}

    def make(op: Any, *args: Any) -> Any:
        return matcher.CallFunction(op, *args, _users=matcher.MULTIPLE)

    for name, describe in descriptions():
        pattern = describe(make, matcher.KeywordArg)
        matcher.register_graph_pattern(pattern, pass_dict=passes)(handlers.get(name, never))
    return passes


# ---- measuring


def time_llmopt(size: int) -> tuple[float, int, Any]:
    graph = Graph("decoder", build(size))
    rules = [Described(name, describe) for name, describe in descriptions()]
    gc.collect()
    began = time.process_time()
    stats = apply_rules(graph, rules)
    return time.process_time() - began, stats.rewritten, graph.fx


def time_inductor(size: int, passes: Any) -> tuple[float, int, Any]:
    module = lazy_module(build(size))
    gc.collect()
    began = time.process_time()
    count = passes.apply(module)
    return time.process_time() - began, count, module.graph


def targets(graph: fx.Graph) -> dict[str, int]:
    """How often each target is called."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            found[str(node.target)] = found.get(str(node.target), 0) + 1
    return found


def measure(size: int, repeats: int, passes: Any) -> dict[str, Any]:
    """Median CPU seconds of both engines on graphs of this size; checks that both do the same."""
    ours, theirs, rewritten = [], [], 0
    for turn in range(repeats):
        runs = {}
        for engine in ("llmopt", "inductor") if turn % 2 == 0 else ("inductor", "llmopt"):
            runs[engine] = time_llmopt(size) if engine == "llmopt" else time_inductor(size, passes)
        (a, rewritten, mine), (b, count, peer) = runs["llmopt"], runs["inductor"]
        if rewritten != count or targets(mine) != targets(peer):
            raise SystemExit(f"{size} nodes: llmopt did {rewritten} replacements, Inductor {count}, or results differ")
        ours.append(a)
        theirs.append(b)
    calls = sum(targets(build(size)).values())
    return {
        "nodes": calls, "rewrites": rewritten, "hit_share": rewritten / calls,
        "llmopt_s": statistics.median(ours), "inductor_s": statistics.median(theirs),
        "llmopt_all_s": ours, "inductor_all_s": theirs,
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "llmopt_us_per_node": statistics.median(ours) / calls * 1e6,
    }  # fmt: skip


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """Slope of the least-squares line through (log nodes, log seconds)."""
    xs, ys = [math.log(r["nodes"]) for r in rows], [math.log(r[key]) for r in rows]
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def report(rows: list[dict[str, Any]], growth: dict[str, float]) -> None:
    table = Table(title="50 rules, CPU seconds (median)")
    for column in ("nodes", "rewrites", "llmopt", "Inductor", "ratio", "us/node"):
        table.add_column(column, justify="right")
    for r in rows:
        seconds = (f"{r['llmopt_s']:.4f}", f"{r['inductor_s']:.4f}")
        cost = (f"{r['ratio']:.1f}x", f"{r['llmopt_us_per_node']:.1f}")
        table.add_row(f"{r['nodes']:,}", f"{r['rewrites']:,}", *seconds, *cost)
    Console().print(table)
    Console().print(f"growth exponent: llmopt {growth['llmopt']:.3f}, Inductor {growth['inductor']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="call nodes per graph")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine per size")
    args = parser.parse_args()
    passes = inductor_pass()
    measure(200, 1, passes)  # warm-up: imports, caches of op schemas
    rows = [measure(size, args.repeats, passes) for size in args.sizes]
    growth = {name: exponent(rows, f"{name}_s") for name in ("llmopt", "inductor")} if len(rows) > 1 else {}
    if growth:
        report(rows, growth)
    result = {
        **environment(),
        "rules": len(descriptions()),
        "clock": "process_time",
        "load_average": os.getloadavg(),
        "growth_exponent": growth,
        "sizes": rows,
    }
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
