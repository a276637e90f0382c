"""Activations rounded token by token before a product, as `quant.fake_quantize` rounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import fx

from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import where
from llmopt.compiler.quant import scheme_of

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter

ROUNDED = ("int8", "fp8", "fp8_channel")


def rounded(e: Emitter, node: fx.Node, x: ir.Value, activations: str) -> ir.Value:
    """x [..., K] as codes of the scheme stand for it, one scale a token.

    Raises InputError: a scheme whose scales ONNX's operators do not make.
    """
    if not activations:
        return x
    if activations not in ROUNDED:
        raise InputError(
            f"{where(node)}: activations in {activations} cannot leave as ONNX, whose operators make no such scales; "
            f"leave `activations` out, take one of {', '.join(ROUNDED)}, or export a compressed-tensors checkpoint"
        )
    key = "rounded", node.args[0], activations  # gate, up and others may share an input
    if key in e.once:
        return e.once[key]  # type: ignore[no-any-return]
    element, op, dtype = scheme_of(activations).element, e.op, node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    wide = x if dtype == torch.float32 else op.Cast(x, to=int(ir.DataType.FLOAT))
    reach = element.max if element.is_float else (2**element.bits - 1) / 2
    amax = op.ReduceMax(op.Abs(wide), [-1], keepdims=1)
    tiny = e.constant(torch.finfo(torch.float32).tiny, torch.float32)
    steps = op.Max(op.Div(amax, e.constant(reach, torch.float32)), tiny)
    units = op.Div(wide, steps)
    if element.is_float:
        codes = op.Cast(units, to=int(ir.DataType.FLOAT8E4M3FN), saturate=1)
        numbers = op.Cast(codes, to=int(ir.DataType.FLOAT))
    else:
        low, high = (e.constant(end, torch.float32) for end in (-float(element.zero), element.zero - 1.0))
        numbers = op.Round(op.Clip(units, low, high))
    made = op.Mul(numbers, steps)
    e.once[key] = made if dtype == torch.float32 else op.CastLike(made, x)
    return e.once[key]  # type: ignore[no-any-return]
