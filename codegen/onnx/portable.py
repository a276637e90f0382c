"""Low-bit weights as ONNX Runtime's CPU provider multiplies them today.

Integers and small floats of up to eight bits are MatMulNBits, whose codes are uint8 less a zero point: e2m1's numbers
are whole multiples of 1/2 and e2m3's of 1/8, so that codes of 8 bits hold them exactly. ONNX Runtime has fast kernels
for float activations and codes of 4 bits, and none for those of 8, so that 8 bits are two products then, of the upper
four, times 16, and of the lower. e4m3 and e3m2, whose numbers are too many for 8 bits, are multiplied by their scales
when the model is loaded (DequantizeLinear would do so for each token).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.compiler.quant.packing import pack
from llmopt.compiler.quant.schemes import Scheme

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter
    from llmopt.codegen.onnx.products import Held

MULTIPLES = {"e2m1": 2, "e2m3": 8}  # of an element's numbers that are whole
HIGH, LOW = "codes_high", "codes_low"  # four bits of eight
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


@dataclass
class _Codes:
    """Codes of a weight in blocks of `block` as MatMulNBits has them."""

    held: Held
    block: int
    halves: dict[str, Tensor] = field(default_factory=dict)  # made of one reading, written one behind the other

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and blocks."""
        return self.held.rows, -(-self.held.columns // self.block)

    @property
    def multiple(self) -> int:
        """What makes the element's numbers whole."""
        return MULTIPLES.get(self.held.scheme.element.name, 1)

    @property
    def lift(self) -> int:
        """The zero point of lower halves: numbers up to 119 have such from -8 to 7, so that small numbers are no
        difference of large ones; int8 goes on, and has 0 to 15."""
        return 8 if self.held.scheme.element.is_float else 0

    def four_bits(self) -> Tensor:
        """uint8 [N, blocks, block / 2] as llmopt stores them."""
        return self.held.part("packed").reshape(*self.shape, -1)

    def eight_bits(self) -> Tensor:
        """uint8 [N, blocks, block]: each number's whole multiple, and 128."""
        element, (rows, blocks) = self.held.scheme.element, self.shape
        every = torch.arange(1 << element.bits, dtype=torch.uint8)
        table = (element.decode(every) * self.multiple + 128).to(torch.uint8)
        return self.held.looked_up(table, blocks * self.block, 128).reshape(rows, blocks, self.block)

    def half(self, which: str) -> Tensor:
        """uint8 [N, blocks, block / 2]: the upper (`codes_high`) or lower (`codes_low`) four bits of eight."""
        if which not in self.halves:
            codes = self.eight_bits().flatten(1).add_(self.lift)
            self.halves = {HIGH: pack(codes >> 4, 4), LOW: pack(codes & 15, 4)}
        return self.halves.pop(which).reshape(*self.shape, -1)

    def zero_points(self) -> Tensor:
        """uint8 [N, (blocks + 1) / 2]: of four bits, two a byte; 0 where there are none of the weight's own."""
        rows, blocks = self.shape
        if self.held.scheme.symmetric:
            return torch.zeros(rows, -(-blocks // 2), dtype=torch.uint8)
        pairs = torch.nn.functional.pad(self.held.part("zero_points"), (0, blocks % 2)).reshape(rows, -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4


def _n_bits(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    element = held.scheme.element
    codes = _Codes(held, held.scheme.group or ROW_BLOCK)

    def multiplied(name: str, bits: int, load: Callable[[], Tensor], zeros: bool) -> ir.Value:
        shape = *codes.shape, codes.block * bits // 8
        given = [
            held.initializer(e, name, shape, ir.DataType.UINT8, load),
            held.initializer(e, "steps", shape[:2], dtype, lambda: (held.steps() / codes.multiple).expand(shape[:2])),
        ]
        if zeros:
            size = shape[0], -(-shape[1] // 2)
            given.append(held.initializer(e, "zero_points", size, ir.DataType.UINT8, codes.zero_points))
        sizes = {"K": held.columns, "N": held.rows, "bits": bits, "block_size": codes.block}
        return e.contrib.MatMulNBits(x, *given, **sizes, accuracy_level=e.options.accuracy_level)  # type: ignore[no-any-return]

    if element.bits == 4 and not element.is_float:
        return multiplied("codes", 4, codes.four_bits, not held.scheme.symmetric)
    if e.options.accuracy_level == INT8_LEVEL:
        return multiplied("codes", 8, codes.eight_bits, False)
    upper = multiplied(HIGH, 4, lambda: codes.half(HIGH), False)
    lower = multiplied(LOW, 4, lambda: codes.half(LOW), not codes.lift)
    sixteen = e.constant(16.0, ir.tensor_adapters.to_torch_dtype(dtype))
    return e.op.Add(e.op.Mul(upper, sixteen), lower)  # type: ignore[no-any-return]


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
