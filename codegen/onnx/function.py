"""Low-bit weights under functions that the model itself defines, in the domain `llmopt.quantized`.

A weight keeps the bytes that llmopt stores. A runtime that knows a function by name may have a kernel for it; every
other one inlines the function's body, which is made of plain operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnxscript import build_function

from llmopt.compiler.quant.scales import decoded_scales
from llmopt.compiler.quant.schemes import Scheme
from llmopt.compiler.quant.storage import PARTS, types_of

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter
    from llmopt.codegen.onnx.products import Held

DOMAIN = "llmopt.quantized"
_DTYPES = {
    torch.uint8: ir.DataType.UINT8, torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN, torch.float32: ir.DataType.FLOAT,
    torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16,
}  # fmt: skip
_FLOAT = int(ir.DataType.FLOAT)
_END = 2**63 - 1


def why_not(scheme: Scheme) -> str | None:
    """Everything can leave."""
    return None


def product(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """x [..., K] times the weight, [..., N]."""
    given = []
    for part, (shape, stored) in types_of(held.scheme, held.rows, held.columns).items():
        given.append(held.initializer(e, part, shape, _DTYPES[stored], lambda part=part: held.part(part)))  # type: ignore[misc]
    key = "function", held.scheme.name
    if key not in e.once:
        e.once[key] = _function(held.scheme, list(types_of(held.scheme, held.rows, held.columns)), e.options.opset)
        e.builder.graph.opset_imports[DOMAIN] = 1
    return e.builder.call(e.once[key], x, *given)  # type: ignore[no-any-return]


def _function(scheme: Scheme, parts: list[str], opset: int) -> ir.Function:
    inputs = [ir.Value(name=name) for name in ("x", *parts)]

    def body(op: Any, x: ir.Value, *given: ir.Value) -> ir.Value:
        stored = dict(zip(parts, given, strict=True))
        numbers = _numbers(op, scheme, stored["packed"])
        rows = op.Shape(stored["packed"], start=0, end=1)
        if not scheme.symmetric:
            zeros = op.Unsqueeze(op.Cast(stored["zero_points"], to=_FLOAT), [2])
            numbers = op.Sub(
                _grouped(op, numbers, rows, scheme), op.Sub(zeros, _constant(op, float(scheme.element.zero)))
            )
        else:
            numbers = _grouped(op, numbers, rows, scheme)
        weight = op.Mul(numbers, op.Unsqueeze(_steps(op, scheme, stored, rows), [2]))
        whole = op.Reshape(weight, op.Concat(rows, op.Constant(value_ints=[-1]), axis=0))
        columns = op.Shape(x, start=-1, end=_END)
        wanted = op.Slice(whole, op.Constant(value_ints=[0]), columns, op.Constant(value_ints=[1]))
        return op.MatMul(x, op.Transpose(op.CastLike(wanted, x), perm=[1, 0]))  # type: ignore[no-any-return]

    return build_function(body, inputs, domain=DOMAIN, name=f"{scheme.name}_linear", opset_imports={"": opset})


def _constant(op: Any, value: Any) -> ir.Value:
    dtype = torch.uint8 if isinstance(value, int) else torch.float32
    return op.Constant(value=ir.tensor(torch.tensor(value, dtype=dtype)))  # type: ignore[no-any-return]


def _table(op: Any, decode: Callable[[torch.Tensor], torch.Tensor], bits: int, codes: ir.Value) -> ir.Value:
    """The numbers (float32) that codes (uint8) stand for."""
    numbers = decode(torch.arange(1 << bits, dtype=torch.uint8))
    return op.Gather(op.Constant(value=ir.tensor(numbers)), op.Cast(codes, to=int(ir.DataType.INT32)), axis=0)  # type: ignore[no-any-return]


def _numbers(op: Any, scheme: Scheme, packed: ir.Value) -> ir.Value:
    """float32 [N, K up to a whole group] of packed codes."""
    bits = scheme.element.bits
    if bits == 8:
        return _table(op, scheme.element.decode, 8, packed)
    rows = op.Concat(op.Shape(packed, start=0, end=1), op.Constant(value_ints=[-1]), axis=0)

    def low(value: ir.Value, mask: int) -> ir.Value:
        return op.BitwiseAnd(value, _constant(op, mask))  # type: ignore[no-any-return]

    def up(value: ir.Value, by: int) -> ir.Value:
        return op.BitShift(value, _constant(op, by), direction="LEFT")  # type: ignore[no-any-return]

    def down(value: ir.Value, by: int) -> ir.Value:
        return op.BitShift(value, _constant(op, by), direction="RIGHT")  # type: ignore[no-any-return]

    if bits == 4:
        parts = [low(packed, 15), down(packed, 4)]
    else:
        threes = op.Reshape(packed, op.Concat(rows, op.Constant(value_ints=[3]), axis=0))
        a, b, c = (op.Gather(threes, op.Constant(value_int=at), axis=2) for at in range(3))
        parts = [
            low(a, 63),
            op.BitwiseOr(down(a, 6), up(low(b, 15), 2)),
            op.BitwiseOr(down(b, 4), up(low(c, 3), 4)),
            down(c, 2),
        ]
    apart = op.Concat(*(op.Unsqueeze(part, op.Constant(value_ints=[2])) for part in parts), axis=2)
    return _table(op, scheme.element.decode, bits, op.Reshape(apart, rows))


def _grouped(op: Any, numbers: ir.Value, rows: ir.Value, scheme: Scheme) -> ir.Value:
    """[N, groups, their elements]."""
    ends = [-1, scheme.group] if scheme.group else [1, -1]
    return op.Reshape(numbers, op.Concat(rows, op.Constant(value_ints=ends), axis=0))  # type: ignore[no-any-return]


def _steps(op: Any, scheme: Scheme, stored: dict[str, ir.Value], rows: ir.Value) -> ir.Value:
    """float32 [N, groups]."""
    if scheme.scale == "e8m0":
        steps = _table(op, lambda codes: decoded_scales(codes, scheme, None), 8, stored["scales"])
    else:
        steps = op.Cast(stored["scales"], to=_FLOAT)
    if scheme.has_global:
        steps = op.Mul(steps, stored[PARTS[2]])
    if scheme.rows < 2:  # one scale for the weight broadcasts
        return steps
    tiles = op.Unsqueeze(steps, op.Constant(value_ints=[1]))
    wide = op.Expand(tiles, op.Constant(value_ints=[1, scheme.rows, 1]))
    flat = op.Reshape(wide, op.Concat(op.Constant(value_ints=[-1]), op.Shape(steps, start=1, end=2), axis=0))
    return op.Slice(flat, op.Constant(value_ints=[0]), rows, op.Constant(value_ints=[0]))  # type: ignore[no-any-return]
