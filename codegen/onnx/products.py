"""Products with weights as they are, and with weights in low-bit formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx

from llmopt.codegen.onnx import function, portable, standard
from llmopt.codegen.onnx.activations import rounded
from llmopt.codegen.onnx.emitter import Emitter
from llmopt.compiler import ops
from llmopt.compiler.emittable import argument
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import where
from llmopt.compiler.program import Program
from llmopt.compiler.quant import scheme_of
from llmopt.compiler.quant.packing import unpack
from llmopt.compiler.quant.scales import decoded_scales
from llmopt.compiler.quant.schemes import Scheme
from llmopt.compiler.quant.storage import PARTS


@ops.linear.onnx
def linear(e: Emitter, node: fx.Node) -> Any:
    """x @ w.T + bias."""
    x, weight, bias = (*node.args, None)[:3]
    assert isinstance(weight, fx.Node)
    if weight.op == "get_attr" and len(weight.users) == 1:
        turned = e.stored(str(weight.target), torch.t, "transposed")
    else:  # a tied head: the table lies in the file once
        turned = e.op.Transpose(e(weight), perm=[1, 0])
    return _plus(e, e.op.MatMul(e(x), turned), bias)


@ops.quantized_linear.onnx
def quantized_linear(e: Emitter, node: fx.Node) -> Any:
    """In the form of `OnnxOptions.weights`."""
    x: Any = node.args[0]
    packed: Any = node.args[1]
    scheme = scheme_of(str(argument(node, "scheme", "")))
    held = Held(e.program, str(packed.target).removesuffix(f".{PARTS[0]}"), scheme, int(x.meta["val"].shape[-1]))
    form = {"portable": portable, "standard": standard, "function": function}[e.options.weights]
    if why := form.why_not(scheme):
        raise InputError(
            f"{where(node)}: weights in {scheme.name} cannot leave with --weights {e.options.weights}: {why}"
        )
    value = rounded(e, node, e(x), str(argument(node, "activations", "")))
    made = form.product(e, held, value, from_torch_dtype(x.meta["val"].dtype))
    return _plus(e, made, argument(node, "bias", None))


def _plus(e: Emitter, value: ir.Value, bias: Any) -> ir.Value:
    return value if bias is None else e.op.Add(value, e(bias))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Held:
    """A quantised weight [rows, columns] of a program, its parts read when they are asked for."""

    program: Program
    name: str
    scheme: Scheme
    columns: int

    @property
    def rows(self) -> int:
        """N."""
        return self.program.weights[f"{self.name}.{PARTS[0]}"].shape[0]

    def part(self, part: str) -> Tensor:
        """One of `storage.PARTS`."""
        return self.program.weights[f"{self.name}.{part}"].load()

    def codes(self) -> Tensor:
        """uint8 [N, K up to a whole group]."""
        return unpack(self.part("packed"), self.scheme.element.bits, self.scheme.padded(self.columns))

    def looked_up(self, table: Tensor, columns: int, rest: int) -> Tensor:
        """[N, columns]: what `table` has for each code, and `rest` behind them; a few rows at a time."""
        packed, width = self.part("packed"), self.scheme.padded(self.columns)
        found = table.new_full((self.rows, columns), rest)
        at_once = max(2**20 // width, 1)
        for first in range(0, self.rows, at_once):
            some = slice(first, first + at_once)
            found[some, :width] = table[unpack(packed[some], self.scheme.element.bits, width).int()]
        return found

    def steps(self) -> Tensor:
        """float32, as the scales: what one unit of an element is worth."""
        shared = self.part("global_scale") if self.scheme.has_global else None
        return decoded_scales(self.part("scales"), self.scheme, shared)

    def initializer(
        self, e: Emitter, label: str, shape: tuple[int, ...], dtype: ir.DataType, load: Callable[[], Any]
    ) -> ir.Value:
        """A tensor made of this weight: `load` gives a torch tensor, or a packed one of ONNX's."""
        name = f"{self.name}.{label}"

        def made() -> ir.TensorProtocol:
            tensor = load()
            if not isinstance(tensor, Tensor):
                return tensor  # type: ignore[no-any-return]
            return ir.tensor_adapters.TorchTensor(
                tensor.to(ir.tensor_adapters.to_torch_dtype(dtype)).contiguous(), name
            )

        return e.initializer(name, shape, dtype, made)
