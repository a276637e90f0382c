"""How views are printed: as their operand at other coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from llmopt.codegen.index import ZERO, Factors, Index, opaque, reshaped, sizes_of, split
from llmopt.codegen.printer import Print, Printer, Value, broadcast, kind_of
from llmopt.compiler.emittable import argument, op_name
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import where

Coords = tuple[Index, ...]


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _shape(node: fx.Node) -> tuple[Factors, ...]:
    return sizes_of(node.meta["val"])


def _axis(node: fx.Node, name: str = "dim", default: int = 0, rank: int | None = None) -> int:
    axis = argument(node, name, default)
    return int(axis) % (len(_shape(_source(node))) if rank is None else rank)


def _moved(coords: Coords, axis: int, index: Index) -> Coords:
    return (*coords[:axis], index, *coords[axis + 1 :])


def _reshape(p: Printer, node: fx.Node, coords: Coords) -> Value:
    try:
        return p.value(_source(node), reshaped(coords, _shape(node), _shape(_source(node))))
    except EmitError as error:
        raise error if str(error).startswith("%") else EmitError(f"{where(node)}: {error}") from error


def _permute(p: Printer, node: fx.Node, coords: Coords) -> Value:
    rank = len(coords)
    if op_name(node) == "permute":
        order = [d % rank for d in argument(node, "dims", ())]
    else:
        order = list(range(rank))
        a, b = (0, rank - 1) if op_name(node) == "t" else (argument(node, f"dim{i}", 0) % rank for i in (0, 1))
        order[a], order[b] = order[b], order[a]
    inner = [ZERO] * rank
    for at, axis in enumerate(order):
        inner[axis] = coords[at]
    return p.value(_source(node), tuple(inner))


def _expand(p: Printer, node: fx.Node, coords: Coords) -> Value:
    return p.value(_source(node), broadcast(coords, _shape(_source(node))))


def _slice(p: Printer, node: fx.Node, coords: Coords) -> Value:
    axis = _axis(node)
    size = _shape(_source(node))[axis]
    start, step = argument(node, "start", None) or 0, argument(node, "step", 1)
    if size[1] and start == 0 and step == 1 and _shape(node)[axis] == size:
        return p.value(_source(node), coords)
    if size[1]:
        raise EmitError(f"{where(node)}: takes a part of the tokens")
    start = min(max(start + size[0] if start < 0 else start, 0), size[0])
    return p.value(_source(node), _moved(coords, axis, coords[axis] * step + start))


def _narrow(p: Printer, node: fx.Node, coords: Coords) -> Value:
    axis = _axis(node)
    start = argument(node, "start", 0)
    size = _shape(_source(node))[axis]
    start = start + size[0] if start < 0 else start
    return p.value(_source(node), _moved(coords, axis, coords[axis] + start))


def _select(p: Printer, node: fx.Node, coords: Coords) -> Value:
    axis, at = _axis(node), argument(node, "index", 0)
    size = _shape(_source(node))[axis]
    if size[1]:
        raise EmitError(f"{where(node)}: takes one of the tokens")
    return p.value(_source(node), (*coords[:axis], Index((), at % size[0]), *coords[axis:]))


def _getitem(p: Printer, node: fx.Node, coords: Coords) -> Value:
    """One of the results of a split or unbind."""
    whole, at = node.args
    assert isinstance(whole, fx.Node)
    assert isinstance(at, int)
    if op_name(whole) not in ("split", "split_with_sizes", "chunk", "unbind"):
        raise EmitError(f"{where(node)}: takes a result of {op_name(whole)}; wanted a split or unbind")
    axis = _axis(whole)
    values = whole.meta["val"]
    at %= len(values)
    if op_name(whole) == "unbind":
        return p.value(_source(whole), (*coords[:axis], Index((), at), *coords[axis:]))
    before = [sizes_of(v)[axis] for v in values[:at]]
    if any(size[1] for size in before):
        raise EmitError(f"{where(node)}: splits the tokens")
    return p.value(_source(whole), _moved(coords, axis, coords[axis] + sum(size[0] for size in before)))


def _cat(p: Printer, node: fx.Node, coords: Coords) -> Value:
    parts: Sequence[Any] = argument(node, "tensors", ())
    axis = _axis(node, rank=len(coords))
    parts = [n for n in parts if _shape(n) != ((0, ()),)]  # torch lets an empty vector pass
    sizes = [_shape(n)[axis] for n in parts]
    if any(size[1] for size in sizes):
        raise EmitError(f"{where(node)}: joins along the tokens")
    widths = [size[0] for size in sizes]
    if len(set(parts)) == 1:
        return p.value(parts[0], _moved(coords, axis, split(coords[axis], widths[0])[1]))
    pieces = [(n, sum(widths[:i]), widths[i]) for i, n in enumerate(parts)]
    return _pieces(p, kind_of(node) == "float", [(n, start, size, axis) for n, start, size in pieces], coords)


def _pieces(p: Printer, floats: bool, pieces: list[tuple[fx.Node, int, int, int]], coords: Coords) -> Value:
    """The piece (node, start, size, axis) that the coordinate lies in; nothing of the others is read."""
    (node, start, size, axis), *others = pieces
    at = coords[axis]
    low, high = at.lowest, at.highest
    if others and low is not None and low >= start + size:
        return _pieces(p, floats, others, coords)
    inside = None if not others or (high is not None and high < start + size) else p.condition(at, f"< {start + size}")
    local = at + -start
    if start and not local.below(size):
        local = opaque(f"({local})", size, local.depends)
    with p.guarded(inside):
        value = p.value(node, _moved(coords, axis, local))
    value = p.to_float(value) if floats else value
    if inside is None:
        return value
    outside = p.condition(at, f">= {start + size}")
    with p.guarded(outside):
        rest = _pieces(p, floats, others, coords)
    return p.choose(inside, value, rest)


def _stack(p: Printer, node: fx.Node, coords: Coords) -> Value:
    parts: Sequence[Any] = argument(node, "tensors", ())
    axis = _axis(node, rank=len(coords))
    rest = (*coords[:axis], *coords[axis + 1 :])
    value = p.value(parts[-1], rest)
    for i in reversed(range(len(parts) - 1)):
        if coords[axis] == Index((), i):
            value = p.value(parts[i], rest)
        elif coords[axis].terms:
            value = p.choose(p.condition(coords[axis], f"== {i}"), p.value(parts[i], rest), value)
    return value


def _repeat(p: Printer, node: fx.Node, coords: Coords) -> Value:
    shape = _shape(_source(node))
    kept = list(coords[len(coords) - len(shape) :])
    for at, (size, full) in enumerate(zip(shape, _shape(node)[len(coords) - len(shape) :], strict=True)):
        if size == full:
            continue
        if size[1]:
            raise EmitError(f"{where(node)}: repeats the tokens")
        kept[at] = split(kept[at], size[0])[1]
    return p.value(_source(node), tuple(kept))


def _repeat_interleave(p: Printer, node: fx.Node, coords: Coords) -> Value:
    axis = _axis(node)
    return p.value(_source(node), _moved(coords, axis, split(coords[axis], argument(node, "repeats", 1))[0]))


def _embedding(p: Printer, node: fx.Node, coords: Coords) -> Value:
    """The row of the table that an id names."""
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node)
    assert isinstance(ids, fx.Node)
    row = p.value(ids, coords[:-1])
    return p.value(table, (opaque(row.text, None, row.depends), coords[-1]))


PRINTERS: dict[str, Print] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape
    ),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "getitem": _getitem,
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "embedding": _embedding,
}
