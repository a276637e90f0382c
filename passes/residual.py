"""The residual stream of a graph: what writes to it, and what reads it, so that its basis may be changed.

It begins with embeddings and goes on through sums, casts, scalings by one number and choices of tokens. Products write
to it and read it, mostly behind norms; nothing else may.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from llmopt.compiler.emittable import CASTS
from llmopt.compiler.graph import Graph, target_name

_SUMS = {"aten.add", "aten.sub"}
_SCALINGS = {"aten.mul", "aten.div"}
_CHOICES = {"aten.slice", "aten.select", "aten.index_select"}


@dataclass
class Stream:
    """Embeddings and products that write to it, norms in it, and products that read it, with their norm or None."""

    size: int = 0
    tables: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    readers: list[tuple[fx.Node, fx.Node | None]] = field(default_factory=list)


def residual_stream(graph: Graph) -> Stream | str:
    """The stream, or why its basis cannot be changed."""
    stream, seen = Stream(), set()
    waiting = list(graph.calls("aten.embedding"))
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        name = target_name(node) if node.op == "call_function" else node.op
        stream.size = stream.size or node.meta["val"].shape[-1]
        if (width := node.meta["val"].shape[-1]) != stream.size:
            return f"{node.name} has {width} elements, and what the stream begins with {stream.size}"
        if name == "aten.embedding":
            stream.tables.append(node)
        elif name == "linear":
            stream.writers.append(node)
        elif (sources := _carried(node)) is not None:
            waiting += sources
        else:
            return f"{node.name}, {name}, writes to the residual stream; only embeddings and products may{_post(node)}"
        for user in node.users:
            why = _read(node, user, stream, waiting)
            if why is not None:
                return why
    if not stream.readers:
        return "no product reads what embeddings begin"
    products = [*stream.writers, *(product for product, _ in stream.readers)]
    computed = next((n for n in [*products, *stream.tables, *stream.norms] if not has_given_weights(n)), None)
    return stream if computed is None else f"the weight of {computed.name} is computed"


def has_given_weights(node: fx.Node) -> bool:
    """Are the weights of an embedding, a norm or a product the model's own, and not computed?"""
    name = target_name(node)
    weights = node.args[:1] if name == "aten.embedding" else node.args[1:2] if name == "rms_norm" else node.args[1:3]
    return all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights if w is not None)


def _read(node: fx.Node, user: fx.Node, stream: Stream, waiting: list[fx.Node]) -> str | None:
    name = target_name(user) if user.op == "call_function" else user.op
    if not isinstance(user.meta.get("val"), Tensor) and user.op == "call_function":
        return None  # a size
    if (sources := _carried(user)) is not None and node in sources:
        waiting.append(user)
    elif name == "linear" and user.args[0] is node and node not in user.args[1:]:
        stream.readers.append((user, None))
    elif name == "rms_norm" and user.args[0] is node:
        readers = _behind(user)
        if readers is None:
            return None if _writes(user, stream, waiting) else f"{user.name} is read by more than products"
        stream.norms.append(user)
        stream.readers += [(product, user) for product in readers]
    else:
        return f"{user.name}, {name}, reads the residual stream; only norms and products may"
    return None


def _writes(norm: fx.Node, stream: Stream, waiting: list[fx.Node]) -> bool:
    """A norm without a weight of its own, such as that of embeddings, may stand in the stream."""
    if norm.args[1] is not None:
        return False
    waiting.append(norm)
    return True


def _carried(node: fx.Node) -> list[fx.Node] | None:
    """The operands whose basis this value has, where it is of a kind that keeps it."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    name, first = target_name(node), node.args[0]
    if name in CASTS or (name == "rms_norm" and node.args[1] is None):
        return [first]
    if name in _SUMS and not node.kwargs and len(node.args) == 2:
        sizes = [_size(arg) for arg in node.args]
        return list(node.all_input_nodes) if sizes[0] is not None and sizes[0] == sizes[1] else None
    if name in _SCALINGS and not node.kwargs and len(node.args) == 2:
        return [first] if _is_number(node.args[1]) else None
    if name in _CHOICES and len(node.args) > 1 and _size(first) == _size(node):
        dims = first.meta["val"].dim()
        return [first] if int(node.args[1]) % dims != dims - 1 else None  # type: ignore[arg-type]
    return None


def _size(value: Any) -> int | None:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.shape[-1] if isinstance(found, Tensor) and found.dim() > 1 else None


def _is_number(value: Any) -> bool:
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        return isinstance(found, Tensor) and found.dim() <= 1 and found.numel() == 1
    return isinstance(value, int | float)


def _behind(norm: fx.Node) -> list[fx.Node] | None:
    """The products that read a norm's result, through casts; None if anything else does."""
    found: list[fx.Node] = []
    for user in norm.users:
        if user.op != "call_function":
            return None
        if target_name(user) in CASTS:
            more = _behind(user)
            if more is None:
                return None
            found += more
        elif target_name(user) == "linear" and user.args[0] is norm and norm not in user.args[1:]:
            found.append(user)
        else:
            return None
    return found


def _post(node: fx.Node) -> str:
    return " (a norm's own weight cannot be turned)" if target_name(node) == "rms_norm" else ""
