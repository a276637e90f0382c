"""Low-bit weights as ONNX Runtime's CPU provider multiplies them today.

Integers and small floats of up to eight bits are MatMulNBits, whose codes are uint8 less a zero point: e2m1's numbers
are whole multiples of 1/2 and e2m3's of 1/8, so that codes of 8 bits hold them exactly. FP8 weights are dequantised by
DequantizeLinear; e3m2, whose numbers are too many for 8 bits, by a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.compiler.quant.schemes import Scheme

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter
    from llmopt.codegen.onnx.products import Held

MULTIPLES = {"e2m1": 2, "e2m3": 8}  # of an element's numbers that are whole
ROW_BLOCK = 128  # MatMulNBits wants blocks; a scale of a whole row is repeated


def why_not(scheme: Scheme) -> str | None:
    """Everything can leave."""
    return None


def product(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """x [..., K] times the weight, [..., N]."""
    if held.scheme.element.name in ("e4m3", "e3m2"):
        return e.op.MatMul(x, (_dequantized if held.scheme.element.bits == 8 else _looked_up)(e, held, dtype))  # type: ignore[no-any-return]
    return _n_bits(e, held, x, dtype)


def _n_bits(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    scheme = held.scheme
    block = scheme.group or ROW_BLOCK
    bits = 4 if scheme.element.bits == 4 and not scheme.element.is_float else 8
    blocks = -(-held.columns // block)
    multiple = MULTIPLES.get(scheme.element.name, 1)

    def codes() -> Tensor:
        if bits == 4:
            return held.part("packed").reshape(held.rows, blocks, -1)
        every = torch.arange(1 << scheme.element.bits, dtype=torch.uint8)
        table = (scheme.element.decode(every) * multiple + 128).to(torch.uint8)
        return held.looked_up(table, blocks * block, 128).reshape(held.rows, blocks, block)

    def scales() -> Tensor:
        return (held.steps() / multiple).expand(held.rows, blocks)

    def zero_points() -> Tensor:
        zeros = held.part("zero_points")
        pairs = torch.nn.functional.pad(zeros, (0, blocks % 2)).reshape(held.rows, -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4

    given = [
        held.initializer(e, "codes", (held.rows, blocks, block * bits // 8), ir.DataType.UINT8, codes),
        held.initializer(e, "steps", (held.rows, blocks), dtype, scales),
    ]
    if not scheme.symmetric:
        shape = (held.rows, -(-blocks // 2))
        given.append(held.initializer(e, "zero_points", shape, ir.DataType.UINT8, zero_points))
    return e.contrib.MatMulNBits(  # type: ignore[no-any-return]
        x, *given, K=held.columns, N=held.rows, bits=bits, block_size=block, accuracy_level=e.options.accuracy_level
    )


def _dequantized(e: Emitter, held: Held, dtype: ir.DataType) -> ir.Value:
    """float [K, N] of e4m3: one scale for the weight, for each of its rows, or for blocks along K."""
    scheme = held.scheme
    codes = held.initializer(
        e, "codes", (held.columns, held.rows), ir.DataType.FLOAT8E4M3FN,
        lambda: held.part("packed")[:, : held.columns].t().contiguous().view(torch.float8_e4m3fn),
    )  # fmt: skip
    if not scheme.group:
        shape: tuple[int, ...] = () if scheme.rows == 0 else (held.rows,)
        steps = held.initializer(e, "steps", shape, dtype, lambda: held.steps().reshape(shape))
        return e.op.DequantizeLinear(codes, steps, axis=1)  # type: ignore[no-any-return]

    def blocked() -> Tensor:
        return held.steps().repeat_interleave(scheme.rows, 0)[: held.rows].t()

    shape = -(-held.columns // scheme.group), held.rows
    steps = held.initializer(e, "steps", shape, dtype, blocked)
    return e.op.DequantizeLinear(codes, steps, axis=0, block_size=scheme.group)  # type: ignore[no-any-return]


def _looked_up(e: Emitter, held: Held, dtype: ir.DataType) -> ir.Value:
    """float [K, N] of e3m2 by a table of its 64 numbers; a runtime folds this to a plain weight when it loads."""
    scheme, columns = held.scheme, held.scheme.padded(held.columns)
    codes = held.initializer(e, "codes", (columns, held.rows), ir.DataType.UINT8, lambda: held.codes().t())
    shape = columns // scheme.group, 1, held.rows
    steps = held.initializer(e, "steps", shape, dtype, lambda: held.steps().t().unsqueeze(1))
    table = e.constant(scheme.element.decode(torch.arange(64, dtype=torch.uint8)).tolist(), torch.float32)
    typed = table if dtype == ir.DataType.FLOAT else e.op.Cast(table, to=int(dtype))
    numbers = e.op.Gather(typed, e.op.Cast(codes, to=int(ir.DataType.INT32)), axis=0)
    grouped = e.op.Mul(e.op.Reshape(numbers, [-1, scheme.group, held.rows]), steps)
    whole = e.op.Reshape(grouped, [-1, held.rows])
    return whole if columns == held.columns else e.op.Slice(whole, [0], [held.columns], [0])  # type: ignore[no-any-return]
