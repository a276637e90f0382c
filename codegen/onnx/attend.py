"""Attention and its cache: inputs `past_key_values.N.key` and `.value`, outputs `present.N.key` and `.value`.

With a cache a step is given its tokens' ids [B, T], `position_ids` [B, T], the keys and values of P earlier tokens, and
`attention_mask` [B, P + T], 0 where a sequence has no token: on the left for `Attention`, on the right for
GroupQueryAttention, which counts.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx

from llmopt.codegen.onnx.emitter import Emitter, Heads
from llmopt.compiler import ops
from llmopt.compiler.emittable import argument
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import where

KEYS = ("key", "value")


def inputs(e: Emitter) -> None:
    """Make the inputs of the model."""
    ids, positions = e.graph.inputs()
    whole = ir.DataType.INT64
    e.values[ids] = e.builder.input("input_ids", whole, ["batch", "sequence"])
    if e.options.cache:
        e.once["mask"] = e.builder.input("attention_mask", whole, ["batch", "total"])
    e.values[positions] = e.builder.input("position_ids", whole, ["batch", "sequence"])
    e.once["past"], e.once["present"] = {}, {}
    for index, node in enumerate(e.graph.calls("attention") if e.options.cache else ()):
        for name, source in zip(KEYS, node.args[1:3], strict=True):
            fake = source.meta["val"]  # type: ignore[union-attr]
            dtype, width = _held(e, from_torch_dtype(fake.dtype), int(fake.shape[3]))
            shape = ["batch", int(fake.shape[1]), "past", width]
            e.once["past"][node, name] = e.builder.input(f"past_key_values.{index}.{name}", dtype, shape)


def _held(e: Emitter, dtype: ir.DataType, channels: int) -> tuple[ir.DataType, int]:
    """What a row of the cache is made of: in 4 bits, two channels a byte."""
    kept = e.options.kv_cache
    return {"": (dtype, channels), "int8": (ir.DataType.INT8, channels), "int4": (ir.DataType.UINT8, channels // 2)}[
        kept
    ]


def outputs(e: Emitter) -> None:
    """Give out the keys and values of all tokens."""
    for index, node in enumerate(e.graph.calls("attention") if e.options.cache else ()):
        for name, value in zip(KEYS, e.once["present"][node], strict=True):
            past = e.once["past"][node, name]
            value.dtype, value.shape = past.dtype, ir.Shape(["batch", past.shape[1], "total", past.shape[3]])
            e.builder.add_output(value, f"present.{index}.{name}")


@ops.attention.onnx
def attention(e: Emitter, node: fx.Node) -> Any:
    """As the options say; q, k, v [B, H, T, D] -> [B, Hq, T, Dv]."""
    flat = []
    for arg in node.args[:3]:
        shape = arg.meta["val"].shape  # type: ignore[union-attr]
        flat.append(e.op.Reshape(e.apart(arg), [0, 0, int(shape[1]) * int(shape[3])]))  # type: ignore[arg-type]
    made = (_grouped if e.options.attention == "gqa" else _standard)(e, node, flat)
    sequences, heads, tokens, channels = node.meta["val"].shape
    made.dtype = from_torch_dtype(node.meta["val"].dtype)
    made.shape = ir.Shape([e.size(sequences), e.size(tokens), int(heads) * int(channels)])
    return Heads(e.op.Reshape(made, [0, 0, int(heads), -1]))


def _settings(node: fx.Node) -> tuple[Any, float, int, float]:
    return (
        argument(node, "sinks", None), float(argument(node, "scale", 1.0)), int(argument(node, "window", 0)),
        float(argument(node, "softcap", 0.0)),
    )  # fmt: skip


def _standard(e: Emitter, node: fx.Node, flat: list[ir.Value]) -> ir.Value:
    sinks, scale, window, softcap = _settings(node)
    q, k = (arg.meta["val"].shape for arg in node.args[:2])  # type: ignore[union-attr]
    heads = {"q_num_heads": int(q[1]), "kv_num_heads": int(k[1])}
    if sinks is not None:
        raise InputError(
            f"attention at {where(node)} has sinks, which ONNX's Attention does not; take --attention gqa, whose "
            "GroupQueryAttention has them"
        )
    if not e.options.cache and not window:
        return e.op.Attention(*flat, scale=scale, softcap=softcap, is_causal=1, **heads)  # type: ignore[no-any-return]
    mask = _mask(e, window)
    if not e.options.cache:
        return e.op.Attention(*flat, mask, scale=scale, softcap=softcap, **heads)  # type: ignore[no-any-return]
    past = [e.once["past"][node, name] for name in KEYS]
    made, *present = e.op.Attention(*flat, mask, *past, scale=scale, softcap=softcap, _outputs=3, **heads)
    e.once["present"][node] = present
    return made  # type: ignore[no-any-return]


def _mask(e: Emitter, window: int) -> ir.Value:
    """bool [B, 1, T, P + T] (or [T, T] without a cache): what each token may see. Every token sees itself, also one
    that is no token, so that no row is without any."""
    key = "visible", window
    if key in e.once:
        return e.once[key]  # type: ignore[no-any-return]
    op = e.op
    ids = e.values[e.graph.inputs()[0]]
    tokens = op.Squeeze(op.Shape(ids, start=1, end=2), [0])
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    if e.options.cache:
        total = op.Squeeze(op.Shape(e.once["mask"], start=1, end=2), [0])
        first = op.Sub(total, tokens)
    else:
        total, first = tokens, zero
    queries = op.Unsqueeze(op.Range(first, total, one), [1])
    keys = op.Unsqueeze(op.Range(zero, total, one), [0])
    seen = op.LessOrEqual(keys, queries)
    if window:
        seen = op.And(seen, op.Greater(keys, op.Sub(queries, e.constant(window, torch.int64))))
    if e.options.cache:
        real = op.Unsqueeze(op.Cast(e.once["mask"], to=int(ir.DataType.BOOL)), [1, 2])
        seen = op.Or(op.And(seen, real), op.Equal(keys, queries))
    e.once[key] = seen
    return seen  # type: ignore[no-any-return]


def _grouped(e: Emitter, node: fx.Node, flat: list[ir.Value]) -> ir.Value:
    sinks, scale, window, softcap = _settings(node)
    q, k, v = (arg.meta["val"].shape for arg in node.args[:3])  # type: ignore[union-attr]
    if k[3] != v[3]:
        raise InputError(
            f"attention at {where(node)} has keys of {k[3]} channels and values of {v[3]}, and GroupQueryAttention has "
            "one number for both; take --attention standard"
        )
    if k[3] % 8:
        raise InputError(
            f"attention at {where(node)} has heads of {k[3]} channels, and GroupQueryAttention wants multiples of 8; "
            "take --attention standard"
        )
    past = [e.once["past"][node, name] for name in KEYS]
    given = [*flat, *past, *_lengths(e), None, None, None, None, None if sinks is None else e(sinks)]
    kept: dict[str, Any] = {}
    if e.options.kv_cache:
        given += _steps(e, node, int(k[1]))
        bits = {"int8": 8, "int4": 4}[e.options.kv_cache]
        kept = {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    while given[-1] is None:
        given.pop()
    made, *present = e.contrib.GroupQueryAttention(
        *given, num_heads=int(q[1]), kv_num_heads=int(k[1]), scale=scale, softcap=softcap,
        local_window_size=window or -1, _outputs=3, **kept,
    )  # fmt: skip
    e.once["present"][node] = present
    return made  # type: ignore[no-any-return]


def _steps(e: Emitter, node: fx.Node, heads: int) -> list[ir.Value]:
    """float32 [Hkv, 1, D]: what one unit of keys and of values is worth, by channel."""
    index = list(e.graph.calls("attention")).index(node)
    return [e.constant(steps.expand(heads, 1, -1).tolist(), torch.float32) for steps in e.kv_steps[index]]


def _lengths(e: Emitter) -> tuple[ir.Value, ir.Value]:
    """int32: for each sequence how many tokens it has, less one [B, 1]; the longest [1]."""
    if "lengths" not in e.once:
        short = int(ir.DataType.INT32)
        counted = e.op.ReduceSum(e.once["mask"], [1], keepdims=1)
        last = e.op.Cast(e.op.Sub(counted, e.constant(1, torch.int64)), to=short)
        e.once["lengths"] = last, e.op.Cast(e.op.Shape(e.once["mask"], start=1, end=2), to=short)
    return e.once["lengths"]  # type: ignore[no-any-return]
