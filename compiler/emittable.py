"""Which nodes codegen can print into a kernel, as tables that passes may read.

Names are `op_name`'s. A test holds the printer (codegen/emit.py) to exactly these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.graph import target_name
from llmopt.compiler.op import OPS, op_of
from llmopt.compiler.quant.near import NearLayout

VIEWS = frozenset({
    "view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze", "permute",
    "transpose", "t", "expand", "expand_as", "slice", "narrow", "select", "getitem", "cat", "stack", "repeat",
    "repeat_interleave", "embedding",
})  # fmt: skip
SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})  # printed as the getitem behind them
POINTWISE = frozenset({
    "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "reciprocal", "erf", "sigmoid", "floor", "ceil", "sin", "cos",
    "tanh", "silu", "add", "sub", "rsub", "mul", "div", "pow", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "logical_not",
    "bitwise_not", "where", "masked_fill", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "relu", "gelu",
    "gated", "softcap", "rope", "to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach",
    "lift_fresh_copy", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones",
    "full", "full_like", "new_full", "scalar_tensor", "arange",
})  # fmt: skip
REDUCTIONS = frozenset({
    "rms_norm", "layer_norm", "softmax", "_softmax", "log_softmax", "_log_softmax", "mean", "sum", "amax", "amin",
    "var", "std", "linalg_vector_norm",
})  # fmt: skip
# views of the same elements in the same order
PLAIN_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"})
CASTS = frozenset({"to", "_to_copy"})
# products with a weight, by what of their arguments holds it and which one is a bias
PRODUCTS = {"linear": (range(1, 2), 2), "quantized_linear": (range(1, 5), 5)}
# (weights, activations) that scaled matrix instructions multiply as they are, both sides in codes with scales
SCALED = frozenset({("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8")})
ATTENDS = frozenset({"attend", "attend_near"})
WRITES = frozenset({"kv_write", "near_write"})
OPERANDS = {"gemm": 6, "rows": 8}  # tensors a template's hooks may read
OUTPUTS = 4  # tensors a kernel over rows may write
LONGEST_ROW = 16384  # elements of a reduced axis: one program holds them all

LARGEST_HEAD = 256  # channels: the registers of a program hold so many for every query head
LARGEST_GROUP = 128  # query heads of one key/value head, for the same reason

_DTYPES = {
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """`target_name` without `aten.`, unless that is the name of an op of llmopt's."""
    name = target_name(node)
    short = name.removeprefix("aten.")
    return name if short != name and short in OPS else short


def argument(node: fx.Node, name: str, default: Any) -> Any:
    """The call's argument of this name, else the schema's default, else `default`."""
    schema = node.target._schema if isinstance(node.target, OpOverload) else None
    for at, given in enumerate(schema.arguments if schema is not None else ()):
        if given.name == name:
            if at < len(node.args):
                return node.args[at]
            found = node.kwargs.get(name, given.default_value)
            return default if found is None else found
    return node.kwargs.get(name, default)


def is_product(node: fx.Node) -> bool:
    """Is this a call of one of PRODUCTS? (An input may be named like an op.)"""
    return node.op == "call_function" and op_name(node) in PRODUCTS


def weight_of(product: fx.Node) -> list[fx.Node]:
    """The tensors that hold a product's weight."""
    held = (product.args[i] for i in PRODUCTS[op_name(product)][0])
    return [arg for arg in held if isinstance(arg, fx.Node)]


def bias_of(product: fx.Node) -> fx.Node | None:
    """What a product adds to every row."""
    at = PRODUCTS[op_name(product)][1]
    bias = product.args[at] if at < len(product.args) else None
    return bias if isinstance(bias, fx.Node) else None


def why_no_product(product: fx.Node, features: Collection[str]) -> str | None:
    """None if the templates of products take this one on a target with these features, else the reason."""
    if op_name(product) == "linear":
        return None
    x = product.args[0].meta["val"]  # type: ignore[union-attr]
    pair = argument(product, "scheme", ""), argument(product, "activations", "")
    if pair[1] and pair not in SCALED:
        taken = ", ".join(sorted(weights for weights, _ in SCALED))
        return f"its weights are in {pair[0]} and activations in {pair[1]}; kernels take both in one of {taken}"
    if pair[1] and "scaled_mma" not in features:
        return (
            f"its activations are rounded to {pair[1]}, and this GPU has no instruction for scaled products, as sm_100 "
            "and sm_120 have; without `activations` kernels take it"
        )
    if x.dtype != torch.bfloat16:
        return f"low-bit weights are multiplied in bfloat16, and its operand is {x.dtype}".replace("torch.", "")
    return None


def why_no_rotation(rotate: fx.Node) -> str | None:
    """None if the template of rotations takes this one, else the reason."""
    shape, dtype = rotate.meta["val"].shape, str(rotate.meta["val"].dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"dtype {dtype}: wanted bfloat16, float16 or float32"
    if sum(not isinstance(size, int) for size in shape) != 1 or not isinstance(shape[-1], int):
        return f"its shape is {list(shape)}; wanted one size that differs from step to step, and not the last"
    return None


def reduced(node: fx.Node) -> int | None:
    """The length of the last axis if this node reduces it; None for another op."""
    if op_name(node) not in REDUCTIONS:
        return None
    size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    return size if isinstance(size, int) else None


def why_not(node: fx.Node) -> str | None:
    """None if the node can be printed inside a kernel, else the reason in a few words."""
    name = op_name(node)
    if node.op != "call_function":
        return f"is a {node.op}"
    if name not in VIEWS | SPLITS | POINTWISE | REDUCTIONS:
        return f"{name} is not among the ops that can be printed"
    return _types(node) or (_reduction(node) if name in REDUCTIONS else _arguments(node, name))


def keeps_order(node: fx.Node) -> bool:
    """Is this a view of the same elements in the same order?"""
    if node.op != "call_function":  # an input may be named like an op
        return False
    if op_name(node) == "select":
        return bool(node.args[0].meta["val"].shape[node.args[1]] == 1)  # type: ignore[union-attr, index]
    return op_name(node) in PLAIN_VIEWS


def puts_tokens_first(node: fx.Node) -> bool:
    """Is this the view [1, N, H, D] of [1, H, N, D]?"""
    if node.op != "call_function" or op_name(node) not in ("transpose", "permute"):
        return False
    given: Any = node.args[1:3] if op_name(node) == "transpose" else node.args[1]
    axes = [d % 4 for d in given]
    return node.meta["val"].dim() == 4 and (sorted(axes) == [1, 2] or axes == [0, 2, 1, 3])


def attention_shape(attend: fx.Node) -> dict[str, int]:
    """What the templates of attention are asked about: HQ, HKV, D, DV, PAGE."""
    q, k = (n.meta["val"].shape for n in attend.args[:2])  # type: ignore[union-attr]
    return {"HQ": q[1], "HKV": k[1], "D": q[3], "DV": attend.meta["val"].shape[3], "PAGE": k[2]}


def packings_of(attend: fx.Node) -> tuple[str, str]:
    """How its keys and values are packed; empty where they are not."""
    return argument(attend, "k_packing", ""), argument(attend, "v_packing", "")


def why_no_packing(packings: tuple[str, str], dtype: str) -> str | None:
    """None if the templates of attention read pages packed so for results of this dtype (a torch name), or why not."""
    if not any(packings):
        return None
    if not all(packings):
        said = " and ".join(packing or "plain" for packing in packings)
        return f"keys and values are packed as {said}; kernels read pages that are packed both, or neither"
    return None if dtype == "bfloat16" else f"dtype {dtype}: packed keys and values are multiplied in bfloat16"


def near_of(attend: fx.Node) -> tuple[int, int]:
    """How many first and last tokens it sees as they are."""
    return argument(attend, "first", 0), argument(attend, "recent", 0)


def why_no_near(attend: fx.Node) -> str | None:
    """None if the templates of decoding read the near tokens of keys and values that are both packed, else the reason.

    There may be none.
    """
    if op_name(attend) != "attend_near":
        return None
    for letter in "kv":
        pages, x = argument(attend, f"{letter}_pages", None), argument(attend, letter, None)
        value, (_, _, page, row) = x.meta["val"], pages.meta["val"].shape
        if value.dtype != torch.bfloat16:
            return f"near tokens in {value.dtype}; kernels read bfloat16".replace("torch.", "")
        if not NearLayout(page * row, value.shape[3], value.dtype.itemsize).rows_per_page:
            return f"pages of {page} tokens hold no whole row of {value.shape[3]} channels as it is; wanted larger ones"
    return None


def why_no_attention(shape: Mapping[str, int], dtype: str) -> str | None:
    """None if the templates of attention take this shape and dtype (a torch name), else the reason."""
    size, group = max(shape["D"], shape["DV"]), shape["HQ"] // shape["HKV"]
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"dtype {dtype}: scores are fp32, wanted bfloat16, float16 or float32"
    if size > LARGEST_HEAD:
        return f"head size {size}: at most {LARGEST_HEAD} fits the registers of a program"
    if shape["HQ"] % shape["HKV"]:
        return f"{shape['HQ']} query heads over {shape['HKV']} key/value heads: no whole group"
    if group > LARGEST_GROUP:
        return f"{group} query heads a key/value head: at most {LARGEST_GROUP} fit the registers of a program"
    if shape["PAGE"] & (shape["PAGE"] - 1):
        return f"pages of {shape['PAGE']} tokens: a power of two is wanted"
    return None


def _types(node: fx.Node) -> str | None:
    for value in _tensors([node, *node.all_input_nodes]):
        if value.dtype not in _DTYPES:
            return f"{value.dtype} is not computed in kernels"
    return None


def _tensors(nodes: Iterable[fx.Node]) -> Iterable[torch.Tensor]:
    for node in nodes:
        value = node.meta.get("val")
        yield from (v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor))


def _reduction(node: fx.Node) -> str | None:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if op_name(node) == "layer_norm":
        axes = list(range(rank - len(argument(node, "normalized_shape", ())), rank))
    else:
        dim = argument(node, "dim", list(range(rank)) if op_of(node.target) is None else -1)
        axes = [d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank))] if rank else []
    if axes != [rank - 1]:
        return f"reduces axes {axes} of {rank}; only the last one can be"
    size = reduced(node)
    if size is None or size > LONGEST_ROW:
        return f"reduces {size or 'any number of'} elements; {LONGEST_ROW} at most fit one program"
    if op_name(node) == "linalg_vector_norm" and argument(node, "ord", 2) != 2:
        return "is a norm of another order than 2"
    return None


def _arguments(node: fx.Node, name: str) -> str | None:
    if name == "pow" and not _plain_power(node.args[1]):
        return f"has the exponent {node.args[1]}; wanted 0.5, -0.5 or a whole number from -8 to 8"
    if name == "div" and argument(node, "rounding_mode", None) is not None:
        return "rounds a quotient"
    if name == "repeat_interleave" and not isinstance(argument(node, "repeats", None), int):
        return "repeats by a tensor"
    if name == "getitem" and op_name(node.args[0]) not in SPLITS:  # type: ignore[arg-type]
        return f"takes a result of {op_name(node.args[0])}"  # type: ignore[arg-type]
    if name in POINTWISE and any(not _tensors_of(n) for n in node.all_input_nodes):
        return "computes with a symbolic size"
    return None


def _plain_power(exponent: Any) -> bool:
    if not isinstance(exponent, (int, float)):
        return False
    return exponent in (0.5, -0.5) or (exponent == int(exponent) and 1 <= abs(exponent) <= 8)


def _tensors_of(node: fx.Node) -> bool:
    return any(True for _ in _tensors([node]))
