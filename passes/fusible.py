"""Which nodes of a step kernels can take, and why not the others; views, which are no kernel's work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.emittable import (
    ATTENDS,
    PRODUCTS,
    argument,
    attention_shape,
    op_name,
    packings_of,
    weight_of,
    why_no_attention,
    why_no_near,
    why_no_packing,
    why_no_product,
    why_no_rotation,
    why_not,
)
from llmopt.compiler.target import Target

VIEWS = frozenset({
    "view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "permute", "t", "slice", "select",
    "narrow", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten",
})  # fmt: skip


def is_view(node: fx.Node) -> bool:
    """Does the node only name elements of its operand anew?"""
    if node.op != "call_function":
        return False
    if op_name(node) == "getitem":
        return is_view(node.args[0])  # type: ignore[arg-type]
    return op_name(node) in VIEWS


def base(node: fx.Node) -> fx.Node:
    """What the views (and choices among several results) that end in `node` look at."""
    while is_view(node) or op_name(node) == "getitem":
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_row_choice(node: fx.Node) -> bool:
    """Is this the selection of the rows whose logits are wanted?"""
    rows = node.args[2] if op_name(node) == "index_select" else None
    return isinstance(rows, fx.Node) and rows.op == "placeholder"


def reason_against(node: fx.Node, target: Target) -> str | None:
    """Why no kernel template can take this node on this target, or None."""
    if is_row_choice(node):
        return "rows are chosen by a copy"
    if any(_is_double(n) for n in (node, *node.all_input_nodes)):
        return "float64"
    value = node.meta.get("val")
    if isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape):
        return "the same in every step, and not folded into a weight"
    for source in node.all_input_nodes:
        while is_view(source):
            if (reason := why_not(source)) is not None:
                return f"{op_name(source)} in front of it: {reason}"
            source = source.args[0]  # type: ignore[assignment]
    if op_name(node) in PRODUCTS:
        return _not_product(node, target)
    return ANCHORS[op_name(node)](node) if op_name(node) in ANCHORS else why_not(node)


def _not_product(node: fx.Node, target: Target) -> str | None:
    return why_no_product(node, target.features) if all(map(is_given, weight_of(node))) else "its weight is computed"


def _not_attend(node: fx.Node) -> str | None:
    writes: tuple[Any, ...] = node.args[1:3]
    users = {u for n in writes for u in n.users if u.op != "output" and u not in near_writes(node)}
    if any(op_name(n) != "kv_write" for n in writes) or users != {node}:
        return "others read its pages too"
    early = {"tables": node.args[3], "positions": node.args[5], "slots": writes[0].args[2], "sinks": node.args[6]}
    for name, value in early.items():
        if isinstance(value, fx.Node) and not is_given(value):
            return f"its {name} are computed in the step; wanted an input or a weight, as they are read ahead"
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    why_not = why_no_attention(attention_shape(node), dtype) or why_no_packing(packings_of(node), dtype)
    return why_not or why_no_near(node)


def near_writes(attend: fx.Node) -> list[fx.Node]:
    """What puts the step's own tokens among the near ones behind this attention."""
    return [u for u in attend.users if op_name(u) == "near_write" and argument(u, "attended", None) is attend]


def is_given(node: fx.Node) -> bool:
    """Is this there before the step starts? A kernel that starts early may then read it before its wait."""
    return node.op in ("get_attr", "placeholder")


def _not_write(node: fx.Node) -> str | None:
    attends = [u for u in node.users if op_name(u) in ATTENDS]
    return _not_attend(attends[0]) if attends else "nothing attends to its pages"


def _not_near_write(node: fx.Node) -> str | None:
    attend = argument(node, "attended", None)
    return _not_attend(attend) if op_name(attend) in ATTENDS else "it follows no attention"


def _not_rotate(node: fx.Node) -> str | None:
    given = all(isinstance(n, fx.Node) and is_given(n) for n in node.args[1:3])
    return why_no_rotation(node) if given else "its matrices are computed"


ANCHORS = {
    **dict.fromkeys(ATTENDS, _not_attend), "kv_write": _not_write, "near_write": _not_near_write, "rotate": _not_rotate,
}  # fmt: skip


def _is_double(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float64
