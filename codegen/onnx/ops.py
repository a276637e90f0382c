"""Lowerings of the IR ops that are neither products nor attention."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from llmopt.codegen.onnx.emitter import Emitter, Heads
from llmopt.compiler import ops
from llmopt.compiler.emittable import argument, op_name

_HALF = (torch.float16, torch.bfloat16)
_POINTWISE = ("to", "_to_copy", "mul", "cos", "sin")


@ops.rms_norm.onnx
def rms_norm(e: Emitter, node: fx.Node) -> Any:
    """RMSNormalization, which rounds before the product with the weight; after it, all in float32."""
    x, weight = node.args[0], argument(node, "weight", None)
    assert isinstance(x, fx.Node)
    given = e.values.get(x)
    value = given.value if isinstance(given, Heads) else e(x)
    made = _normed(e, node, value, weight, x.meta["val"])
    return Heads(made) if isinstance(given, Heads) else made


def _normed(e: Emitter, node: fx.Node, value: ir.Value, weight: Any, fake: Tensor) -> ir.Value:
    eps, shift = float(argument(node, "eps", 0.0)), float(argument(node, "shift", 0.0))
    late = bool(argument(node, "late_cast", False)) and fake.dtype in _HALF and weight is not None
    computed = torch.float32 if late else fake.dtype
    if weight is None:
        scale = e.constant([1.0] * int(fake.shape[-1]), computed)
    else:
        held = weight.meta["val"].dtype

        def shifted(tensor: Tensor) -> Tensor:
            return tensor.to(computed if late else held) + shift

        name = str(weight.target)
        scale = e.stored(name, shifted, f"plus_{shift:g}", computed) if shift else e.stored(name, dtype=computed)
    if late:
        value = e.op.Cast(value, to=int(ir.DataType.FLOAT))
    made = e.op.RMSNormalization(value, scale, axis=-1, epsilon=eps, stash_type=1)
    return e.op.Cast(made, to=int(ir.tensor_adapters.from_torch_dtype(fake.dtype))) if late else made


@ops.rope.onnx
def rope(e: Emitter, node: fx.Node) -> Any:
    """RotaryEmbedding where the two halves of cos and of sin are one; products and sums otherwise."""
    x, cos, sin = (arg for arg in node.args[:3] if isinstance(arg, fx.Node))
    r, heads = int(cos.meta["val"].shape[-1]), int(x.meta["val"].shape[1])
    if not (_same_halves(cos) and _same_halves(sin)):
        return _rotated(e, e(x), e(cos), e(sin), r, int(x.meta["val"].shape[-1]))
    tables = [_half(e, table, r, x) for table in (cos, sin)]
    flat = e.op.Reshape(e.apart(x), [0, 0, -1])
    made = e.op.RotaryEmbedding(flat, *tables, num_heads=heads, rotary_embedding_dim=r)
    return Heads(e.op.Reshape(made, [0, 0, heads, -1]))


def _half(e: Emitter, table: fx.Node, r: int, x: fx.Node) -> ir.Value:
    """The first half of cos or sin, for each sequence of x its own."""
    key = "half", table
    if key not in e.once:
        half = e.op.Slice(e(table), [0], [r // 2], [-1])
        if str(table.meta["val"].shape[0]) != str(x.meta["val"].shape[0]):  # one for all sequences
            sequences = e.op.Shape(e.values[e.graph.inputs()[0]], start=0, end=1)
            half = e.op.Expand(half, e.op.Concat(sequences, e.constant([1, 1], torch.int64), axis=0))
        e.once[key] = half
    return e.once[key]  # type: ignore[no-any-return]


def _same_halves(table: Any) -> bool:
    """Is it `cat((m, m), -1)`, behind ops of one element that treat both halves alike?"""
    while isinstance(table, fx.Node) and op_name(table) in _POINTWISE:
        if op_name(table) == "mul" and isinstance(table.args[1], fx.Node):
            return False
        table = table.args[0]
    if not isinstance(table, fx.Node) or op_name(table) != "cat":
        return False
    parts: Any = table.args[0]
    return len(parts) == 2 and parts[0] is parts[1] and argument(table, "dim", 0) in (-1, table.meta["val"].dim() - 1)


def _rotated(e: Emitter, x: ir.Value, cos: ir.Value, sin: ir.Value, r: int, width: int) -> ir.Value:
    turned = x if r == width else e.op.Slice(x, [0], [r], [-1])
    low, high = e.op.Split(turned, [r // 2, r // 2], axis=-1, _outputs=2)
    crossed = e.op.Concat(e.op.Neg(high), low, axis=-1)
    c, s = (e.op.Unsqueeze(table, [1]) for table in (cos, sin))
    made = e.op.Add(e.op.Mul(turned, c), e.op.Mul(crossed, s))
    return made if r == width else e.op.Concat(made, e.op.Slice(x, [r], [width], [-1]), axis=-1)  # type: ignore[no-any-return]


@ops.gated.onnx
def gated(e: Emitter, node: fx.Node) -> Any:
    """act(gate) * up."""
    gate, up, act = node.args[:3]
    value = e(gate)
    if act == "silu":
        return e.op.Mul(e.op.Mul(value, e.op.Sigmoid(value)), e(up))
    return e.op.Mul(e.op.Gelu(value, approximate="tanh" if act == "gelu_tanh" else "none"), e(up))


@ops.softcap.onnx
def softcap(e: Emitter, node: fx.Node) -> Any:
    """cap * tanh(x / cap)."""
    x, cap = node.args[:2]
    limit = e.constant(cap, node.meta["val"].dtype)
    return e.op.Mul(e.op.Tanh(e.op.Div(e(x), limit)), limit)


@ops.rotate.onnx
def rotate(e: Emitter, node: fx.Node) -> Any:
    """Two products with the factors of an order."""
    x, left, right = (arg for arg in node.args[:3] if isinstance(arg, fx.Node))
    fake = x.meta["val"]
    a, b = int(left.meta["val"].shape[0]), int(right.meta["val"].shape[0])
    wide = ir.tensor_adapters.from_torch_dtype(left.meta["val"].dtype)
    value = e(x) if fake.dtype == left.meta["val"].dtype else e.op.Cast(e(x), to=int(wide))
    kept = [0] * (fake.dim() - 1)
    parts = e.op.Reshape(value, [*kept, -1, a, b])
    turned = e.stored(str(left.target), torch.t, "transposed")
    made = e.op.Reshape(e.op.MatMul(turned, e.op.MatMul(parts, e(right))), [*kept, int(fake.shape[-1])])
    narrow = ir.tensor_adapters.from_torch_dtype(fake.dtype)
    return made if fake.dtype == left.meta["val"].dtype else e.op.Cast(made, to=int(narrow))
