"""What the tests of printed kernels share: region graphs from functions over aten ops, and kernels run on tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.codegen.kernel import Call, evaluate
from llmopt.codegen.rows import rows_calls, written
from llmopt.compiler._torch import fake_mode
from llmopt.compiler.graph import Graph
from llmopt.compiler.op import op_of
from llmopt.compiler.propagate import Symbols, propagate

aten = torch.ops.aten
Inputs = dict[str, tuple[tuple[int | str, ...], torch.dtype]]
SIZES = {"N": 3, "P": 4}


def region(fn: Callable[..., Any], inputs: Inputs) -> Graph:
    """The graph of `fn`, a function over overloads that returns a tuple; the sizes named are symbolic."""
    symbols = Symbols(fake_mode(), {}, {})
    for name, (shape, dtype) in inputs.items():
        symbols.inputs[name] = symbols.tensor(shape, dtype)
    graph = Graph("region", fx.Tracer().trace(fn))
    propagate(graph, symbols, {})
    return graph


def tensors(inputs: Inputs, below: int = 7, sizes: dict[str, int] = SIZES) -> list[Tensor]:
    """Random tensors for the inputs; integers lie in 0..below - 1."""
    torch.manual_seed(0)
    made = []
    for shape, dtype in inputs.values():
        whole = [sizes[s] if isinstance(s, str) else s for s in shape]
        made.append(torch.randn(whole).to(dtype) if dtype.is_floating_point else torch.randint(below, whole).to(dtype))
    return made


def calls_of(graph: Graph, by_token: Collection[fx.Node] = ()) -> list[Call]:
    """The rows kernels of all outputs; a kv_write's pages are its input."""
    stored = {node: f"in{i}" for i, node in enumerate(graph.inputs())}
    outputs = {n: stored[n.args[0]] if written(n) is not n else f"out{i}" for i, n in enumerate(graph.outputs())}
    return rows_calls(outputs, stored, by_token=by_token)


def run(
    graph: Graph, args: list[Tensor], sizes: dict[str, int] = SIZES, by_token: Collection[fx.Node] = ()
) -> list[Tensor]:
    """The outputs by the kernels, interpreted."""
    from llmopt.codegen.interpret import launcher

    args = [a.clone() for a in args]
    memory: dict[Any, Any] = {f"in{i}": a for i, a in enumerate(args)} | sizes
    for i, node in enumerate(graph.outputs()):
        value = node.meta["val"]
        shape = [s if isinstance(s, int) else sizes["N"] for s in value.shape]
        memory[f"out{i}"] = torch.full(shape, 99, dtype=value.dtype) if written(node) is node else None
    for call in calls_of(graph, by_token):
        assert call.kernel is not None
        launcher(call.kernel)(tuple(evaluate(g, sizes) for g in call.grid), [memory[a] for a in call.args])
    pages = {n: memory[f"in{graph.inputs().index(n.args[0])}"] for n in graph.outputs() if written(n) is not n}
    return [pages.get(node, memory[f"out{i}"]) for i, node in enumerate(graph.outputs())]


def assert_as_good(got: Tensor, plain: Tensor, wide: Tensor) -> None:
    """In the norm no further from the result in fp64 than half as far again as torch, or as the stored type's eps."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    if not plain.is_floating_point():
        assert torch.equal(got, plain)
        return
    known = wide.isfinite()
    error, theirs = ((t.double() - wide.double())[known].norm() for t in (got, plain))
    allowed = 1.5 * max(theirs, torch.finfo(plain.dtype).eps * wide[known].norm())
    assert error <= allowed, f"error {error:.3g}, torch's {theirs:.3g}"
    for of in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(of(got), of(plain))


def check(fn: Callable[..., Any], inputs: Inputs, below: int = 7) -> None:
    """The kernels of `fn` against torch on the same tensors, and on those widened to fp64."""
    graph = region(fn, inputs)
    args = tensors(inputs, below)
    got = run(graph, args)
    plain = fn(*[a.clone() for a in args])
    wide = _wide(graph, args)
    for one, two, three in zip(got, plain, wide, strict=True):
        assert_as_good(one, two, three)


def _wide(graph: Graph, args: list[Tensor]) -> list[Tensor]:
    """The graph in fp64: casts to narrower floats are left out, IR ops run by their body."""
    values: dict[fx.Node, Any] = {}
    for node, arg in zip(graph.inputs(), args, strict=True):
        values[node] = arg.double() if arg.is_floating_point() else arg
    for node in graph.calls():
        given = fx.node.map_arg(node.args, lambda n: values[n])
        given = [torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in given]
        declared = op_of(node.target)
        values[node] = (declared.fn if declared else node.target)(*given, **node.kwargs)  # type: ignore[operator]
    return [values[n] for n in graph.outputs()]
