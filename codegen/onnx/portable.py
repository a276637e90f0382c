"""Low-bit weights as ONNX Runtime's CPU provider multiplies them today.

Integers and small floats of up to eight bits are MatMulNBits, whose codes are uint8 less a zero point: e2m1's numbers
are whole multiples of 1/2 and e2m3's of 1/8, so that codes of 8 bits hold them exactly. It multiplies float activations
fast by codes of 4 bits alone (ONNX Runtime 1.32: 60 times slower by those of 8 for 4096 by 4096 and one token), so that
8 bits are two products then, of the upper four, times 16, and of the lower. e4m3 and e3m2, whose numbers are too many
for 8 bits, are multiplied by their scales when the model is loaded (DequantizeLinear would do so for each token).
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
HIGH, LOW = 0, 1  # four bits of eight
NAMES = "codes_high", "codes_low"
INT8_LEVEL = 4  # of MatMulNBits: activations are rounded to int8
ROW_BLOCK = 128  # MatMulNBits wants blocks; a scale of a whole row is repeated


def why_not(scheme: Scheme) -> str | None:
    """Everything can leave."""
    return None


def product(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """x [..., K] times the weight, [..., N]."""
    if held.scheme.element.name in ("e4m3", "e3m2"):
        return e.op.MatMul(x, _folded(e, held, dtype))  # type: ignore[no-any-return]
    return _n_bits(e, held, x, dtype)


def _n_bits(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    scheme = held.scheme
    block = scheme.group or ROW_BLOCK
    blocks = -(-held.columns // block)
    multiple = MULTIPLES.get(scheme.element.name, 1)
    plain = scheme.element.bits == 4 and not scheme.element.is_float
    bits = 4 if plain or e.options.accuracy_level < INT8_LEVEL else 8

    # numbers up to 119 have lower parts from -8 to 7, so that small ones are no difference of large ones; int8 goes on
    lift = 8 if scheme.element.is_float else 0

    def stored(which: int) -> Tensor:
        """uint8 codes: ours, or a number's whole multiple and 128, of which `which` says the four bits."""
        if plain:
            return held.part("packed").reshape(held.rows, blocks, -1)
        every = torch.arange(1 << scheme.element.bits, dtype=torch.uint8)
        table = (scheme.element.decode(every) * multiple + 128).to(torch.uint8)
        codes = held.looked_up(table, blocks * block, 128)
        if bits == 4:
            half = codes + lift >> 4 if which == HIGH else codes + lift & 15
            codes = half[:, ::2] | half[:, 1::2] << 4
        return codes.reshape(held.rows, blocks, -1)

    def scales() -> Tensor:
        return (held.steps() / multiple).expand(held.rows, blocks)

    def zero_points() -> Tensor:
        if scheme.symmetric:
            return torch.zeros(held.rows, -(-blocks // 2), dtype=torch.uint8)
        zeros = held.part("zero_points")
        pairs = torch.nn.functional.pad(zeros, (0, blocks % 2)).reshape(held.rows, -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4

    def multiplied(which: int) -> ir.Value:
        shape = held.rows, blocks, block * bits // 8
        name = "codes" if plain or bits == 8 else NAMES[which]
        given = [
            held.initializer(e, name, shape, ir.DataType.UINT8, lambda: stored(which)),
            held.initializer(e, "steps", shape[:2], dtype, scales),
        ]
        if (which == LOW and not lift) or not scheme.symmetric:
            size = held.rows, -(-blocks // 2)
            given.append(held.initializer(e, "zero_points", size, ir.DataType.UINT8, zero_points))
        sizes = {"K": held.columns, "N": held.rows, "bits": bits, "block_size": block}
        return e.contrib.MatMulNBits(x, *given, **sizes, accuracy_level=e.options.accuracy_level)  # type: ignore[no-any-return]

    high = multiplied(HIGH)
    if plain or bits == 8:
        return high
    sixteen = e.constant(16.0, ir.tensor_adapters.to_torch_dtype(dtype))
    return e.op.Add(e.op.Mul(high, sixteen), multiplied(LOW))  # type: ignore[no-any-return]


def _folded(e: Emitter, held: Held, dtype: ir.DataType) -> ir.Value:
    """float [K, N] of e4m3 or e3m2 codes and their scales, which a runtime folds to a plain weight when it loads."""
    scheme, columns = held.scheme, held.scheme.padded(held.columns)
    stored = ir.DataType.FLOAT8E4M3FN if scheme.element.bits == 8 else ir.DataType.UINT8

    def codes() -> Tensor:
        turned = held.codes().t().contiguous()
        return turned.view(torch.float8_e4m3fn) if scheme.element.bits == 8 else turned

    given = held.initializer(e, "codes", (columns, held.rows), stored, codes)
    if scheme.element.bits == 8:
        numbers = e.op.Cast(given, to=int(dtype))
    else:
        table = e.constant(scheme.element.decode(torch.arange(64, dtype=torch.uint8)).tolist(), torch.float32)
        typed = table if dtype == ir.DataType.FLOAT else e.op.Cast(table, to=int(dtype))
        numbers = e.op.Gather(typed, e.op.Cast(given, to=int(ir.DataType.INT32)), axis=0)
    if not scheme.group:
        shape: tuple[int, ...] = () if scheme.rows == 0 else (held.rows,)
        steps = held.initializer(e, "steps", shape, dtype, lambda: held.steps().reshape(shape))
        return e.op.Mul(numbers, steps)  # type: ignore[no-any-return]

    def blocked() -> Tensor:
        return held.steps().repeat_interleave(scheme.rows, 0)[: held.rows].t().unsqueeze(1)

    steps = held.initializer(e, "steps", (columns // scheme.group, 1, held.rows), dtype, blocked)
    grouped = e.op.Mul(e.op.Reshape(numbers, [-1, scheme.group, held.rows]), steps)
    whole = e.op.Reshape(grouped, [-1, held.rows])
    return whole if columns == held.columns else e.op.Slice(whole, [0], [held.columns], [0])  # type: ignore[no-any-return]
