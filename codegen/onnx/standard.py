"""Low-bit weights in ONNX's own types, under DequantizeLinear: the form of TensorRT and of runtimes to come.

NVFP4 has two of them, the inner one for the scales of blocks, as ModelOpt writes it. ONNX Runtime's CPU provider has
no kernels for FLOAT4E2M1 and FLOAT8E8M0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.compiler.quant.packing import pack
from llmopt.compiler.quant.schemes import Scheme

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter
    from llmopt.codegen.onnx.products import Held

_TYPES = {
    "e2m1": ir.DataType.FLOAT4E2M1, "e4m3": ir.DataType.FLOAT8E4M3FN, "int4": ir.DataType.UINT4,
    "int8": ir.DataType.UINT8,
}  # fmt: skip
_SCALES = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e8m0": ir.DataType.FLOAT8E8M0}


def why_not(scheme: Scheme) -> str | None:
    """ONNX has no numbers of six bits."""
    if scheme.element.name in _TYPES:
        return None
    return f"ONNX has no type for {scheme.element.name}; take --weights portable or function, or mxfp8"


def product(e: Emitter, held: Held, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """x [..., K] times the weight, [..., N]."""
    scheme = held.scheme
    groups = -(-held.columns // scheme.group) if scheme.group else 1
    kind = _TYPES[scheme.element.name]
    codes = held.initializer(e, "codes", (held.columns, held.rows), kind, lambda: _codes(held, kind))
    if not scheme.group:  # a scale for the weight, or for each of its rows
        shape: tuple[int, ...] = () if scheme.rows == 0 else (held.rows,)
        settings = {"axis": 1}
    else:
        shape, settings = (groups, held.rows), {"axis": 0, "block_size": scheme.group}
    given = [codes, _steps(e, held, shape, dtype)]
    if not scheme.element.is_float:
        given.append(held.initializer(e, "zero_points", shape, kind, lambda: _zeros(held, shape, kind)))
    weight = e.op.DequantizeLinear(*given, output_dtype=int(dtype), **settings)
    return e.op.MatMul(x, weight)  # type: ignore[no-any-return]


def _codes(held: Held, kind: ir.DataType) -> Tensor | ir.TensorProtocol:
    """[K, N]."""
    codes = held.codes()[:, : held.columns].t().contiguous()
    if kind == ir.DataType.FLOAT8E4M3FN:
        return codes.view(torch.float8_e4m3fn)
    return codes if kind == ir.DataType.UINT8 else _packed(codes, kind)


def _packed(codes: Tensor, kind: ir.DataType) -> ir.TensorProtocol:
    """Codes of 4 bits (uint8, any shape), two a byte, the first one low."""
    flat = codes.reshape(1, -1)
    halves = pack(torch.nn.functional.pad(flat, (0, flat.shape[1] % 2)), 4).reshape(-1).numpy()
    return ir.PackedTensor(halves, kind, shape=ir.Shape(codes.shape))


def _steps(e: Emitter, held: Held, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    scheme = held.scheme

    def scales() -> Tensor:
        whole = held.part("scales")
        if scheme.rows > 1:
            whole = whole.repeat_interleave(scheme.rows, 0)[: held.rows]
        return whole.t().reshape(shape) if scheme.group else whole.reshape(shape)

    if scheme.scale == "e8m0":

        def exponents() -> ir.TensorProtocol:
            return ir.Tensor(scales().contiguous().numpy().view(ir.DataType.FLOAT8E8M0.numpy()))

        return held.initializer(e, "scales", shape, _SCALES["e8m0"], exponents)
    if not scheme.has_global:
        return held.initializer(e, "scales", shape, dtype, scales)
    stored = held.initializer(e, "scales", shape, _SCALES["e4m3"], scales)
    shared = held.initializer(e, "global_scale", (), dtype, lambda: held.part("global_scale"))
    return e.op.DequantizeLinear(stored, shared)  # type: ignore[no-any-return]


def _zeros(held: Held, shape: tuple[int, ...], kind: ir.DataType) -> Tensor | ir.TensorProtocol:
    element = held.scheme.element
    if held.scheme.symmetric:
        zeros = torch.full(shape, element.zero, dtype=torch.uint8)
    else:
        zeros = held.part("zero_points").t().reshape(shape)
    return zeros if kind == ir.DataType.UINT8 else _packed(zeros.contiguous(), kind)
