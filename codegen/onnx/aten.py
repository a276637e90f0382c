"""Lowerings of the aten ops that nearly every model has; `single_op` takes all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx

from llmopt.codegen.onnx.single_op import single_op
from llmopt.compiler.emittable import argument

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter

Lowering = Callable[["Emitter", fx.Node], Any]
_ALIKE = {
    "cos": "Cos", "sin": "Sin", "tanh": "Tanh", "exp": "Exp", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs",
    "sigmoid": "Sigmoid", "relu": "Relu", "reciprocal": "Reciprocal", "erf": "Erf", "log": "Log",
    "clone": "Identity", "contiguous": "Identity", "alias": "Identity", "detach": "Identity",
}  # fmt: skip
_END = 2**63 - 1


def _alike(name: str) -> Lowering:
    return lambda e, node: getattr(e.op, name)(_operand(e, node, node.args[0]))


def _operand(e: Emitter, node: fx.Node, arg: Any) -> Any:
    """An operand in the dtype that torch computes in, the result's."""
    wanted = node.meta["val"].dtype
    if not isinstance(arg, fx.Node):
        return e.constant(arg, wanted)
    held = arg.meta["val"]
    if isinstance(held, Tensor) and held.dtype == wanted:
        return e(arg)
    return e.op.Cast(e(arg), to=int(from_torch_dtype(wanted)))


def _arithmetic(name: str) -> Lowering:
    def lower(e: Emitter, node: fx.Node) -> Any:
        if not isinstance(node.meta["val"], Tensor):  # of sizes, which are int64 [1]
            return getattr(e.op, name)(*(e.sizes([arg]) for arg in node.args[:2]))
        if argument(node, "rounding_mode", None) is not None:
            return single_op(e, node)
        left, right = (_operand(e, node, arg) for arg in node.args[:2])
        if node.meta["val"].dtype == torch.bool:
            return getattr(e.op, {"Add": "Or", "Mul": "And"}[name])(left, right)  # torch subtracts and divides none
        alpha = argument(node, "alpha", 1)
        if alpha != 1:
            right = e.op.Mul(right, _operand(e, node, alpha))
        return getattr(e.op, name)(left, right)

    return lower


def _pow(e: Emitter, node: fx.Node) -> Any:
    return e.op.Pow(_operand(e, node, node.args[0]), _operand(e, node, node.args[1]))


def _rsqrt(e: Emitter, node: fx.Node) -> Any:
    return e.op.Reciprocal(e.op.Sqrt(_operand(e, node, node.args[0])))


def _embedding(e: Emitter, node: fx.Node) -> Any:
    return e.op.Gather(e(node.args[0]), e(node.args[1]), axis=0)


def _cast(e: Emitter, node: fx.Node) -> Any:
    value = e(node.args[0])
    source: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
    made = node.meta["val"].dtype
    return value if source.dtype == made else e.op.Cast(value, to=int(from_torch_dtype(made)))


def _cat(e: Emitter, node: fx.Node) -> Any:
    return e.op.Concat(*e(node.args[0]), axis=int(argument(node, "dim", 0)))


def _unsqueeze(e: Emitter, node: fx.Node) -> Any:
    return e.op.Unsqueeze(e(node.args[0]), [int(argument(node, "dim", 0))])


def _squeeze(e: Emitter, node: fx.Node) -> Any:
    dim = argument(node, "dim", None)
    if dim is None:
        return single_op(e, node)
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    dims = [d for d in ([dim] if isinstance(dim, int) else dim) if shape[d] == 1]
    return e.op.Squeeze(e(node.args[0]), dims) if dims else e(node.args[0])


def _transpose(e: Emitter, node: fx.Node) -> Any:
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload,arg-type]
    if rank == 4 and {a, b} == {1, 2}:  # to heads and back, which attention need not do
        return e.heads(source)
    perm = list(range(rank))
    perm[a], perm[b] = b, a
    return e.op.Transpose(e(source), perm=perm)


def _permute(e: Emitter, node: fx.Node) -> Any:
    dims: Any = node.args[1]
    return e.op.Transpose(e(node.args[0]), perm=[int(d) % len(dims) for d in dims])


def _reshape(e: Emitter, node: fx.Node) -> Any:
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    wanted = node.meta["val"].shape
    sizes: list[int] = []
    for at, size in enumerate(wanted):
        if isinstance(size, int):
            sizes.append(size)
        else:  # 0 keeps the size at this place, -1 is what is left
            sizes.append(0 if at < len(source) and str(source[at]) == str(size) else -1)
    if sizes.count(-1) > 1 or any(size == 0 for size in wanted if isinstance(size, int)):
        return e.op.Reshape(e(node.args[0]), e.sizes(argument(node, "shape", argument(node, "size", None))))
    return e.op.Reshape(e(node.args[0]), sizes)


def _split(e: Emitter, node: fx.Node) -> Any:
    """split, split_with_sizes and chunk, by the sizes of the results."""
    dim = int(argument(node, "dim", 0))
    parts = node.meta["val"]
    lengths = [part.shape[dim] for part in parts]
    if not all(isinstance(length, int) for length in lengths):
        return single_op(e, node)
    return e.op.Split(e(node.args[0]), lengths, axis=dim, _outputs=len(parts)) if len(parts) > 1 else [e(node.args[0])]


def _getitem(e: Emitter, node: fx.Node) -> Any:
    return e.values[node.args[0]][node.args[1]]  # type: ignore[index]


def _slice(e: Emitter, node: fx.Node) -> Any:
    first, last, step = (argument(node, name, default) for name, default in (("start", 0), ("end", _END), ("step", 1)))
    return e.op.Slice(e(node.args[0]), e.sizes([first]), e.sizes([last]), [int(argument(node, "dim", 0))], [int(step)])


def _select(e: Emitter, node: fx.Node) -> Any:
    index = argument(node, "index", 0)
    at = e.constant(index, torch.int64) if isinstance(index, int) else e.op.Squeeze(e.sizes([index]), [0])
    return e.op.Gather(e(node.args[0]), at, axis=int(argument(node, "dim", 0)))


def _index_select(e: Emitter, node: fx.Node) -> Any:
    return e.op.Gather(e(node.args[0]), e(node.args[2]), axis=int(argument(node, "dim", 0)))


def _layer_norm(e: Emitter, node: fx.Node) -> Any:
    x: Any = node.args[0]
    weight, bias = argument(node, "weight", None), argument(node, "bias", None)
    shape: Sequence[int] = argument(node, "normalized_shape", None)
    if weight is None and len(shape) > 1:
        return single_op(e, node)
    scale = e.constant([1.0] * shape[0], x.meta["val"].dtype) if weight is None else e(weight)
    given = (e(x), scale) if bias is None else (e(x), scale, e(bias))
    return e.op.LayerNormalization(*given, axis=-len(shape), epsilon=float(argument(node, "eps", 1e-5)))


def _size(e: Emitter, node: fx.Node) -> Any:
    dim = int(argument(node, "dim", 0))
    return e.op.Shape(e(node.args[0]), start=dim, end=dim + 1 if dim != -1 else _END)


def _arange(e: Emitter, node: fx.Node) -> Any:
    first, step = argument(node, "start", 0), argument(node, "step", 1)
    last = argument(node, "end", None)
    if any(isinstance(size, float) for size in (first, last, step)):
        return single_op(e, node)
    made = e.op.Range(*(e.op.Squeeze(e.sizes([size]), [0]) for size in (first, last, step)))
    return e.op.Cast(made, to=int(from_torch_dtype(node.meta["val"].dtype)))


def _repeat(e: Emitter, node: fx.Node) -> Any:
    counts: Any = argument(node, "repeats", None)
    value = e(node.args[0])
    if extra := len(counts) - node.args[0].meta["val"].dim():  # type: ignore[union-attr]
        value = e.op.Unsqueeze(value, list(range(extra)))
    return e.op.Tile(value, e.sizes(counts))


def _expand(e: Emitter, node: fx.Node) -> Any:
    sizes: Any = argument(node, "size", None)
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if list(map(str, source)) == list(map(str, node.meta["val"].shape)):
        return e(node.args[0])
    return e.op.Expand(e(node.args[0]), e.sizes([1 if size == -1 else size for size in sizes]))


def _softmax(e: Emitter, node: fx.Node) -> Any:
    return e.op.Softmax(_operand(e, node, node.args[0]), axis=int(argument(node, "dim", -1)))


def _silu(e: Emitter, node: fx.Node) -> Any:
    x = e(node.args[0])
    return e.op.Mul(x, e.op.Sigmoid(x))


def _gelu(e: Emitter, node: fx.Node) -> Any:
    return e.op.Gelu(e(node.args[0]), approximate=str(argument(node, "approximate", "none")))


TABLE: dict[str, Lowering] = {
    **{name: _alike(theirs) for name, theirs in _ALIKE.items()},
    **{name: _arithmetic(theirs) for name, theirs in (("add", "Add"), ("sub", "Sub"), ("mul", "Mul"), ("div", "Div"))},
    "pow": _pow, "rsqrt": _rsqrt, "silu": _silu, "gelu": _gelu, "softmax": _softmax, "_softmax": _softmax,
    "embedding": _embedding, "to": _cast, "_to_copy": _cast, "type_as": _cast, "cat": _cat,
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "transpose": _transpose, "permute": _permute,
    "reshape": _reshape, "view": _reshape, "_unsafe_view": _reshape, "expand": _expand, "repeat": _repeat,
    "split": _split, "split_with_sizes": _split, "chunk": _split, "getitem": _getitem,
    "slice": _slice, "select": _select, "index_select": _index_select,
    "layer_norm": _layer_norm, "sym_size": _size, "arange": _arange,
}  # fmt: skip
