"""Printed hooks without Triton: index arithmetic against torch's views, the text of hooks, what is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emitted import aten, calls_of, region
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.codegen import emit
from llmopt.codegen.index import ZERO, Index, sizes_of, split, variable
from llmopt.codegen.printer import Operands, Printer, Variable
from llmopt.compiler import emittable
from llmopt.compiler.errors import EmitError
from llmopt.compiler.ops import gated, linear, rms_norm, softcap

bf16, f32, i64 = torch.bfloat16, torch.float32, torch.int64
TOKENS = 1009  # no other size is as long
X = {"x": ((1, "N", 24), f32)}


class Pointer:
    """A tensor's address: refuses to be read outside the tensor, but where a mask forbids reading."""

    def __init__(self, data: np.ndarray, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.data, self.at + by)


def load(pointer: Pointer, mask: Any = True, other: int = 0) -> np.ndarray:
    at, mask = np.broadcast_arrays(pointer.at, mask)
    inside = (at >= 0) & (at < pointer.data.size)
    assert inside[mask].all(), "reads outside the tensor"
    return np.where(mask, pointer.data[np.where(inside, at, 0)], other)


def evaluate(graph: Any, x: torch.Tensor) -> torch.Tensor:
    """The graph's output from its printed statements, every element of every token at once."""
    (node,) = graph.outputs()
    size = emit.per_token(node)
    n, c = variable("n", None), variable("c", size)
    variables = {"n": Variable(n, "n_ok"), "c": Variable(c, f"c < {size}")}
    printer = Printer(emit.PRINTERS, Operands(1), variables)
    value = printer.value(node, emit.token_coords(node, n, c))
    tokens = np.arange(TOKENS + 1)[:, None]  # one more than there are, which the mask leaves out
    columns = np.arange(size + 2)[None, :]
    names: dict[str, Any] = {
        "n": tokens, "c": columns, "n_ok": tokens < TOKENS, "ok": (tokens < TOKENS) & (columns < size), "N": TOKENS,
        "e0": Pointer(x.numpy().reshape(-1)), "tl": SimpleNamespace(load=load, where=np.where),
    }  # fmt: skip
    exec("\n".join(printer.lines), names)
    flat = np.broadcast_to(eval(value.text, names), (TOKENS + 1, size + 2))[:TOKENS, :size]
    axis = emit.token_axis(node)
    others = [s for at, (s, _) in enumerate(sizes_of(node.meta["val"])) if at != axis]
    return torch.from_numpy(flat.reshape(TOKENS, *others).copy()).movedim(0, axis)


def factors(size: int) -> list[tuple[int, ...]]:
    pairs = [(a, size // a) for a in range(1, size + 1) if size % a == 0]
    return [(size,), *pairs, *[(a, b, c // b) for a, c in pairs for b in range(1, c + 1) if c % b == 0]]


def one_view(draw: Any, shape: list[int]) -> Callable[[Any], Any]:
    """A random view (or join) of a tensor of this shape that keeps the tokens apart."""
    at = shape.index(TOKENS)
    axis = draw(st.sampled_from([i for i in range(len(shape)) if i != at]))
    size, rank = shape[axis], len(shape)
    kind = draw(
        st.sampled_from(["reshape", "permute", "slice", "split", "cat", "repeat", "select", "stack", "squeeze"])
    )
    if kind == "reshape" and all(s == 1 for s in shape[:at]):
        inner = draw(st.sampled_from(factors(math.prod(shape) // TOKENS)))
        return lambda x: aten.reshape.default(x, [1, aten.sym_size.int(x, at), *inner])
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda x: aten.permute.default(x, order)
    if kind == "slice":
        start = draw(st.integers(0, size - 1))
        end, step = draw(st.integers(start + 1, size)), draw(st.integers(1, 2))
        return lambda x: aten.slice.Tensor(x, axis, start, end, step)
    if kind == "split" and size > 1:
        cut, which = draw(st.integers(1, size - 1)), draw(st.integers(-1, 0))
        return lambda x: swapped(aten.split_with_sizes.default(x, [cut, size - cut], axis), axis, which)
    if kind == "cat":
        return lambda x: aten.cat.default([x, x], axis)
    if kind == "repeat":
        return lambda x: aten.repeat_interleave.self_int(x, 2, axis)
    if kind == "select" and rank > 2:
        index = draw(st.integers(0, size - 1))
        return lambda x: aten.select.int(x, axis, index)
    if kind == "stack" and rank < 5:
        return lambda x: aten.stack.default([x, x], axis)
    return lambda x: aten.unsqueeze.default(x, axis)


def swapped(pieces: Any, axis: int, which: int) -> Any:
    one = aten.unsqueeze.default(aten.select.int(pieces[1], axis, which), axis)
    return aten.cat.default([one, pieces[0]], axis)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_are_what_torch_computes(data: st.DataObject):
    x = result = torch.arange(TOKENS * 24, dtype=f32).reshape(1, TOKENS, 24)
    steps: list[Callable[[Any], Any]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        steps.append(one_view(data.draw, list(result.shape)))
        result = steps[-1](result)
    graph = region(lambda x: (functools.reduce(lambda value, step: step(value), steps, x),), X)
    assert torch.equal(evaluate(graph, x), result)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(-40, 40)), min_size=1, max_size=3),
    st.integers(0, 30),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
)
def test_quotients_and_remainders(terms: list[tuple[int, int]], constant: int, divisors: list[int]):
    """Against Python's numbers, for every value of the variables that makes all parts at least 0."""
    index = Index((), constant)
    for i, (size, factor) in enumerate(terms):
        index = index + variable(f"v{i}", size) * factor
    parts = [index]
    for divisor in divisors:
        quotient, remainder = split(parts.pop(), divisor)
        parts += [remainder, quotient]
    for values in np.ndindex(*(size for size, _ in terms)):
        names = {f"v{i}": value for i, value in enumerate(values)}
        number = constant + sum(v * f for v, (_, f) in zip(values, terms, strict=True))
        if number < 0:
            continue
        for divisor, remainder in zip(divisors, parts, strict=False):
            assert eval(str(remainder), names) == number % divisor
            number //= divisor
        assert eval(str(parts[-1]), names) == number


def test_heads_and_back_need_no_division():
    def heads(x):
        by_head = aten.transpose.int(aten.reshape.default(x, [1, aten.sym_size.int(x, 1), 4, 6]), 1, 2)
        return (aten.reshape.default(aten.transpose.int(by_head, 1, 2), [1, aten.sym_size.int(x, 1), 24]),)

    hook = emit.load_x_hook(Operands(), region(heads, X).outputs()[0], ())
    assert "e0 + (m * 24 + k)" in hook.source
    assert "//" not in hook.source
    assert "%" not in hook.source
    assert hook.source.endswith("return v0\n")


def test_quotient_and_remainder_of_one_value_cancel():
    p = variable("p", 96)
    quotient, remainder = split(p, 8)
    assert quotient * 8 + remainder == p
    assert split(quotient * 8 + remainder, 96) == (ZERO, p)


def hooks_of_gemm(graph: Any) -> tuple[Operands, emit.Hook, tuple[int, ...]]:
    operands = Operands()
    (linear,) = graph.calls("linear")
    return operands, *emit.epilogue_hook(operands, graph.outputs()[0], linear, ())


LINEAR = {"x": ((1, "N", 24), bf16), "w": ((16, 24), bf16), "b": ((16,), bf16), "y": ((1, "N", 16), bf16)}


def test_epilogue_of_two_halves():
    def half(x, w, b, y):
        made = aten.add.Tensor(linear(x, w), b)
        gate, up = (aten.slice.Tensor(made, 2, start, start + 8) for start in (0, 8))
        return (gated(gate, up, "silu"),)

    operands, hook, offsets = hooks_of_gemm(region(half, LINEAR))
    assert offsets == (0, 8)
    assert [n.name for n in operands.nodes] == ["b"]
    assert "tl.load(e0 + (n + 8), mask=(n < 8), other=0)" in hook.source
    assert hook.helpers == {"silu"}
    compile(emit.source_of(hook), "hooks", "exec")


def test_a_bias_inside_a_product_is_refused_not_left_out():
    def biased(x, w, b, y):
        return (linear(x, w, b),)

    with pytest.raises(EmitError, match="adds a bias itself"):
        hooks_of_gemm(region(biased, LINEAR))


def test_epilogue_adds_a_residual_and_keeps_fp32():
    def add(x, w, b, y):
        return (softcap(aten.add.Tensor(linear(x, w), y), 30.0),)

    operands, hook, offsets = hooks_of_gemm(region(add, LINEAR))
    assert offsets == (0,)
    assert operands.types() == (("e0", "*bf16"),)
    assert dict(operands.absent()) == dict.fromkeys(("e1", "e2", "e3", "e4", "e5"))
    assert "v0 = tl.load(e0 + (m * 16 + n), mask=ok, other=0).to(tl.float32)  # of bf16[1, N, 16]" in hook.source
    assert "v1 = acc0 + v0" in hook.source
    assert "tanh" in emit.source_of(hook)


def test_plain_epilogue_is_the_accumulator():
    graph = region(lambda x, w, b, y: (linear(x, w),), LINEAR)
    _, hook, offsets = hooks_of_gemm(graph)
    assert hook.source.splitlines()[-1] == "    return acc0"
    assert offsets == (0,)


def test_norm_weight_with_shift():
    graph = region(lambda x, w: (rms_norm(x, w, 1e-6, 1.0, True),), {"x": ((1, "N", 24), bf16), "w": ((24,), bf16)})
    hook = emit.load_g_hook(Operands(), graph.outputs()[0], ())
    assert "+ 1.0" in hook.source


def test_names_tell_contents():
    one, two = (
        emit.load_x_hook(Operands(), region(fn, X).outputs()[0], ())
        for fn in (lambda x: (aten.mul.Tensor(x, 2.0),), lambda x: (aten.mul.Tensor(x, 3.0),))
    )
    assert one.name != two.name
    assert one == emit.load_x_hook(Operands(), region(lambda x: (aten.mul.Tensor(x, 2.0),), X).outputs()[0], ())


def test_printer_prints_exactly_the_tables():
    assert set(emit.PRINTERS) == emittable.VIEWS | emittable.POINTWISE | emittable.REDUCTIONS


REFUSED = {
    "another axis": (lambda x: (aten.mean.dim(x, [1], True),), "reduces axes"),
    "tokens merged": (lambda x: (aten.neg.default(aten.reshape.default(x, [-1, 12])),), "one symbolic axis"),
    "another op": (lambda x: (aten.cumsum.default(x, -1),), "cumsum"),
    "double": (lambda x: (aten.to.dtype(x, torch.float64),), "float64"),
    "odd power": (lambda x: (aten.pow.Tensor_Scalar(x, 2.5),), "exponent 2.5"),
    "two lengths": (
        lambda x: (
            aten.mul.Tensor(rms_norm(aten.slice.Tensor(x, 2, 0, 12), None, 1e-6), aten.mean.dim(x, [-1], True)),
        ),
        "one length",
    ),
    "a size as a number": (lambda x: (aten.mul.Tensor(x, aten.sym_size.int(x, 1)),), "size"),
    "a product": (lambda x: (aten.matmul.default(x, aten.transpose.int(x, 1, 2)),), "matmul"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_printed_is_refused(name: str):
    fn, reason = REFUSED[name]
    with pytest.raises(EmitError, match=reason):
        calls_of(region(fn, X))


def test_long_rows_are_refused():
    with pytest.raises(EmitError, match="16384"):
        calls_of(region(lambda x: (aten.softmax.int(x, -1),), {"x": ((1, "N", 20000), f32)}))


def test_too_many_tensors_are_refused():
    def total(x, a, b):
        return (aten.add.Tensor(aten.add.Tensor(x, a), b),)

    graph = region(total, {name: ((1, "N", 24), f32) for name in "xab"})
    with pytest.raises(EmitError, match="wanted 2 at most"):
        emit.load_x_hook(Operands(2), graph.outputs()[0], ())


def test_interleaved_halves_are_refused():
    def interleaved(x, w, b, y):
        return (aten.slice.Tensor(linear(x, w), 2, 0, 16, 2),)

    with pytest.raises(EmitError, match="wanted for column n"):
        hooks_of_gemm(region(interleaved, LINEAR))
