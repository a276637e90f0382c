"""Where attention's values come from and go to, where only products and views stand there."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from llmopt.compiler.graph import target_name
from llmopt.passes.residual import has_given_weights

_VIEWS = {"aten.transpose", "aten.reshape", "aten.view", "aten.contiguous", "aten.clone"}


def value_path(node: fx.Node) -> tuple[fx.Node, int, int, fx.Node] | str:
    """For a call of `attention`: the product that makes v, the first of its rows that do, how many do, and the product
    that reads the result; or why there are no such two.
    """
    made: Any = node.args[2]
    size: int = made.meta["val"].shape[-1]
    while target_name(made) in _VIEWS and len(made.users) == 1 and _keeps_heads(made, size):
        made = made.args[0]
    count = int(made.meta["val"].shape[-1])
    first = 0
    if made.op == "call_function" and made.target is operator.getitem and len(made.users) == 1:
        split, index = made.args
        if target_name(split) != "aten.split_with_sizes" or len(split.args) < 3 or split.args[2] != -1:
            return f"its values come from {target_name(split)}"
        first, made = sum(split.args[1][:index]), split.args[0]
        if any(user is not split for user in made.users):
            return "its values are read by others, too"
    elif len(made.users) != 1:
        return "its values are read by others, too"
    if target_name(made) != "linear" or not has_given_weights(made):
        return f"its values come from {target_name(made)}, not from a product with a weight"
    reader: Any = node
    while len(reader.users) == 1:
        (reader,) = reader.users
        if target_name(reader) == "linear":
            return (made, first, count, reader) if has_given_weights(reader) else "the weight behind it is computed"
        if target_name(reader) not in _VIEWS or not _keeps_heads(reader, size):
            break
    return "what reads its result is no product with a weight"


def _keeps_heads(view: Any, size: int) -> bool:
    """Does a view leave the elements of each head together, in order?"""
    if target_name(view) == "aten.transpose":
        last = view.meta["val"].dim() - 1
        return last not in {int(dim) % (last + 1) for dim in view.args[1:3]}
    return all(isinstance(n.meta["val"].shape[-1], int) and n.meta["val"].shape[-1] % size == 0
               for n in (view, view.args[0]))  # fmt: skip
